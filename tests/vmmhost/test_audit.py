"""The audit log: an honest one passes; whatever is changed, removed, moved, added or cut is found out."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from vmgraft.cli.app import cli, run
from vmgraft.errors import FileError
from vmgraft.vmmhost import audit
from vmgraft.vmmhost.audit import GENESIS, MAX_LINE, AuditLog, check_chain

RECORDS: list[tuple[str, dict[str, Any]]] = [
    ("start", {"image": "disk.img", "coreSha256": "ab" * 32}),
    ("verification", {"ok": True, "error": None, "checks": [{"name": "signature", "status": "pass"}]}),
    ("log", {"id": "org.example.clock", "text": "größe \u2028 \ud800"}),
    ("fault", {"id": "org.example.clock", "kind": "trap", "pid": 7}),
    ("end", {"reason": "shutdown", "wallSeconds": 0.25}),
]


def make(path: Path, records: list[tuple[str, dict[str, Any]]]) -> str:
    """Write a log and return its head."""
    log = AuditLog(path)
    for event, detail in records:
        log.write(event, detail)
    log.close()
    return log.head


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "audit.jsonl"
    make(path, RECORDS)
    return path


def lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def head(path: Path) -> str:
    return str(json.loads(lines(path)[-1])["hash"])


def check_log(*args: str | Path) -> Result:
    return CliRunner().invoke(cli, ["check-log", *map(str, args), "--json"], standalone_mode=False, obj=True)


def refused(path: Path, words: str, *, expected: str | None = None, field: str | None = None) -> None:
    """The library and the program refuse the log, for the same reason."""
    with pytest.raises(FileError, match=words) as caught:
        check_chain(path, expected)
    if field is not None:
        assert caught.value.field == field
    result = check_log(path, *([] if expected is None else ["--head", expected]))
    assert result.return_value == 3
    document = json.loads(result.stdout)
    assert (document["ok"], document["exitCode"]) == (False, 3)
    assert document["error"] == caught.value.to_dict()


@pytest.mark.parametrize("last", ["end", "error"])
def test_an_honest_log_passes(tmp_path: Path, last: str) -> None:
    path = tmp_path / "audit.jsonl"
    told = make(path, [*RECORDS[:-1], (last, {"code": "host"})])
    assert told == head(path)
    for expected in (None, told):
        assert check_chain(path, expected) == (5, told)
    result = check_log(path, "--head", told)
    assert result.return_value in (None, 0)
    document = json.loads(result.stdout)
    assert (document["ok"], document["records"], document["head"]) == (True, 5, told)


def test_lines_are_chained_by_hashes_of_what_they_say(log: Path) -> None:
    """Worked out here anew, by the rule in the documents alone."""
    import hashlib

    previous = GENESIS
    for number, line in enumerate(lines(log)):
        record = json.loads(line)
        claimed = record.pop("hash")
        assert (record["seq"], record["prev"]) == (number, previous)
        body = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        previous = hashlib.sha256(body.encode("utf-8", "surrogatepass")).hexdigest()
        assert claimed == previous


@pytest.mark.parametrize("number", range(len(RECORDS)))
def test_a_changed_byte_in_any_field(log: Path, number: int) -> None:
    """Every byte of a line, the names of the fields and all that stands between them."""
    honest = log.read_bytes()
    start = sum(map(len, lines(log)[:number]))
    for position in range(start, start + len(lines(log)[number])):
        data = bytearray(honest)
        data[position] ^= 1
        log.write_bytes(data)
        with pytest.raises(FileError) as caught:
            check_chain(log)
        # A broken line end joins two lines or splits one; the line at fault is named all the same.
        assert caught.value.field == f"line {number + 1}", position
    log.write_bytes(honest)
    assert check_chain(log)[0] == len(RECORDS)


@pytest.mark.parametrize("field", ["seq", "time", "event", "id", "kind", "pid", "prev", "hash"])
def test_a_changed_field(log: Path, field: str) -> None:
    all_lines = lines(log)
    record = json.loads(all_lines[3])
    record[field] = record[field] + 1 if isinstance(record[field], int) else "0" + record[field][1:] + "x"
    all_lines[3] = json.dumps(record, ensure_ascii=False).encode() + b"\n"
    log.write_bytes(b"".join(all_lines))
    refused(log, "chain is broken" if field in ("seq", "prev") else "was changed", field="line 4")


def test_a_changed_line_with_its_hash_made_anew(log: Path) -> None:
    all_lines = lines(log)
    record = json.loads(all_lines[3])
    del record["hash"]
    record["kind"] = "quota"
    record["hash"] = audit._line_hash(record)
    all_lines[3] = json.dumps(record, ensure_ascii=False).encode() + b"\n"
    log.write_bytes(b"".join(all_lines))
    refused(log, "chain is broken", field="line 5")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"kind": "trap"', b'"kind": "quota", "kind": "trap"'),
        (b'"kind": "trap"', b'"kind":  "trap"'),
        (b'"kind": "trap"', b'"kind": "\\u0074rap"'),
        (b'"pid": 7, ', b""),
        (b'"pid": 7', b'"pid": 7, "note": 1'),
        (b'"hash": ', b'"Hash": '),
    ],
    ids=["a name twice", "a blank", "an escape", "a field less", "a field more", "no hash"],
)
def test_a_line_written_otherwise(log: Path, old: bytes, new: bytes) -> None:
    all_lines = lines(log)
    assert old in all_lines[3]
    all_lines[3] = all_lines[3].replace(old, new, 1)
    log.write_bytes(b"".join(all_lines))
    refused(log, "the line was changed", field="line 4")


@pytest.mark.parametrize("number", range(len(RECORDS) - 1))
def test_a_removed_line(log: Path, number: int) -> None:
    all_lines = lines(log)
    del all_lines[number]
    log.write_bytes(b"".join(all_lines))
    refused(log, "removed, added or moved", field=f"line {number + 1}")


@pytest.mark.parametrize(("first", "second"), [(0, 1), (1, 2), (1, 3), (3, 4)])
def test_swapped_lines(log: Path, first: int, second: int) -> None:
    all_lines = lines(log)
    all_lines[first], all_lines[second] = all_lines[second], all_lines[first]
    log.write_bytes(b"".join(all_lines))
    refused(log, "removed, added or moved", field=f"line {first + 1}")


def test_a_moved_line(log: Path) -> None:
    all_lines = lines(log)
    all_lines.insert(3, all_lines.pop(1))
    log.write_bytes(b"".join(all_lines))
    refused(log, "removed, added or moved", field="line 2")


@pytest.mark.parametrize("number", range(len(RECORDS) + 1))
def test_an_inserted_line(log: Path, tmp_path: Path, number: int) -> None:
    """A line of another log's, and one of this log's own once more."""
    make(tmp_path / "other", [("start", {}), *RECORDS[1:], *RECORDS[1:]])
    honest = lines(log)
    for line in (lines(tmp_path / "other")[number], honest[min(number, 4)], b"\n", b"[]\n", b"{}\n"):
        changed = [*honest[:number], line, *honest[number:]]
        log.write_bytes(b"".join(changed))
        with pytest.raises(FileError) as caught:
            check_chain(log)
        assert caught.value.field in (f"line {number + 1}", f"line {number + 2}")
    refused(log, "removed, added or moved")


@pytest.mark.parametrize("kept", range(1, len(RECORDS)))
def test_a_cut_log(log: Path, kept: int) -> None:
    told = head(log)
    log.write_bytes(b"".join(lines(log)[:kept]))
    refused(log, "incomplete: the run has not ended or its last lines are missing", field=f"line {kept}")
    refused(log, "does not end with the expected hash", expected=told)
    # Not even with the hash of the line that is now the last.
    refused(log, "incomplete", expected=head(log))
    with pytest.raises(FileError) as caught:
        check_chain(log)
    assert "--head" in (caught.value.hint or "")


def test_a_log_cut_within_a_line(log: Path) -> None:
    honest = log.read_bytes()
    for size in (len(honest) - 1, len(honest) - 5, len(lines(log)[0]) + 10):
        log.write_bytes(honest[:size])
        with pytest.raises(FileError):
            check_chain(log)


def test_a_log_made_anew_is_found_by_its_head_only(log: Path) -> None:
    told = head(log)
    log.unlink()
    make(log, [RECORDS[0], ("end", {"reason": "shutdown"})])
    assert check_chain(log)[0] == 2
    refused(log, "does not end with the expected hash", expected=told, field="hash")


def test_the_program_names_what_is_wrong(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = log.with_name("empty")
    empty.touch()
    for arguments, words in (
        ([str(log), "--head", GENESIS], "does not end with the expected hash"),
        ([str(empty)], "is empty"),
        (["/dev/null"], "is no regular file"),
    ):
        with pytest.raises(SystemExit) as ended:
            run(["check-log", *arguments, "--json"])
        document = json.loads(capsys.readouterr().out)
        assert (ended.value.code, document["ok"], document["error"]["code"]) == (3, False, "file")
        assert words in document["error"]["message"]
    with pytest.raises(SystemExit) as ended:
        run(["check-log", str(log), "--head", head(log)])
    assert ended.value.code == 0
    assert "5 records, the chain holds" in capsys.readouterr().out


@pytest.mark.parametrize("change", [lambda h: GENESIS, lambda h: h[:-1], lambda h: "", lambda h: h + "0"])
def test_a_wrong_head(log: Path, change: Callable[[str], str]) -> None:
    refused(log, "does not end with the expected hash", expected=change(head(log)))


def test_an_empty_log(log: Path) -> None:
    log.write_bytes(b"")
    refused(log, "empty")
    refused(log, "empty", expected=GENESIS)


@pytest.mark.parametrize(
    "data",
    [b"\0" * 100, b"\xff\xfe{\0}\0", b"[" * 200_000, b"1" * 10_000, b'{"a": "' + b"x" * MAX_LINE + b'"}\n', b"null\n"],
    ids=["zeros", "utf-16", "deep", "long number", "long line", "null"],
)
def test_what_is_not_a_log(log: Path, data: bytes) -> None:
    log.write_bytes(data)
    refused(log, "not a record|chain is broken", field="line 1")


def test_the_longest_line(tmp_path: Path) -> None:
    make(tmp_path / "short", [("end", {"text": ""})])
    spare = MAX_LINE - len(lines(tmp_path / "short")[0])
    make(tmp_path / "longest", [("end", {"text": "x" * spare})])
    assert check_chain(tmp_path / "longest")[0] == 1
    make(tmp_path / "too long", [("end", {"text": "x" * (spare + 1)})])
    refused(tmp_path / "too long", "not a record", field="line 1")


def test_a_log_that_cannot_be_read(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "cannot read the audit log: No such file")


def test_a_run_that_is_not_over(tmp_path: Path) -> None:
    """What the file holds while the run goes on is there at once, chained, and not taken for a whole log."""
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)
    for number, (event, detail) in enumerate(RECORDS[:-1]):
        log.write(event, detail)
        assert len(lines(path)) == log.count == number + 1
        refused(path, "incomplete")
    log.write(*RECORDS[-1])
    assert check_chain(path, log.head) == (5, log.head)
    log.close()
