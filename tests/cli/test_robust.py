"""What the command line does when things go wrong: one documented exit code, one JSON object, nothing left behind."""

import contextlib
import errno
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from vmgraft.cli import output
from vmgraft.cli.app import COMMANDS, cli, run
from vmgraft.cli.console import Outputs
from vmgraft.cli.exitcodes import BROKEN_PIPE, EXIT_CODES
from vmgraft.cli.files import write_output
from vmgraft.cli.views import _branch
from vmgraft.errors import FileError, UsageError, VmgraftError
from vmgraft.schemas import validate

PROGRAM = str(Path(sys.executable).with_name("vmgraft"))
CLOCK = Path(__file__).resolve().parents[2] / "examples" / "clock"
DOCUMENTED = set(EXIT_CODES.values()) - {EXIT_CODES["internal"]} | {0}


def call(*args: str | Path) -> tuple[int, str, str]:
    """Run the program in this process; return exit code, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
        run([str(arg) for arg in args])
    assert isinstance(ended.value.code, int)
    return ended.value.code, out.getvalue(), err.getvalue()


def call_json(*args: str | Path) -> dict[str, object]:
    """Run with ``--json``: exactly one object, which agrees with the exit code."""
    code, out, _ = call(*args, "--json")
    document: dict[str, object] = json.loads(out)
    assert (document["exitCode"], document["ok"]) == (code, code == 0)
    if code:
        assert list(document["error"]) == ["code", "message", "file", "offset", "field", "hint"]  # type: ignore[call-overload]
    return document


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a key, a policy, a plain image and a grafted one; the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain.img").write_bytes(bytes(range(256)) * 300)
    assert call("keygen", "acme", "--no-passphrase")[0] == 0
    assert call("policy", "init", "--trust", "acme.pub", "--grant-all-declared", CLOCK, "-o", "p.json")[0] == 0
    assert call("attach", "plain.img", CLOCK, "--key", "acme.key", "-o", "good.img")[0] == 0
    yield tmp_path


# --- --json ---------------------------------------------------------------------------------------------------------


def test_verdicts_are_what_their_schema_says(house: Path) -> None:
    data = bytearray((house / "good.img").read_bytes())
    data[5000] ^= 1
    (house / "bad.img").write_bytes(data)
    shutil.copy("good.img", "other.img")
    policy = json.loads((house / "p.json").read_text())
    policy["trustPolicies"][0]["grants"] = {}
    (house / "mean.json").write_text(json.dumps(policy))
    cases = [("good.img", "p.json", 0), ("bad.img", "p.json", 12), ("plain.img", "p.json", 4),
             ("good.img", "nowhere.json", 18), ("good.img", "mean.json", 17), ("nowhere.img", "p.json", 3)]  # fmt: skip
    for image, name, code in cases:
        for command in (["verify"], ["run", "--dry-run"]):
            document = call_json(*command, image, "--policy", name)
            assert document["exitCode"] == code, (image, name)
            validate("report", document, file=None, error=VmgraftError)
            error = document["error"] if code else None
            assert error is None or EXIT_CODES[error["code"]] == code  # type: ignore[index]
            if "checks" in document:
                assert document["image"] == image


@pytest.mark.parametrize("change", [{"ok": True}, {"error": "no-graft"}, {"error": None}, {"exitCode": 0}])
def test_the_schema_of_verdicts_refuses_contradictions(house: Path, change: dict[str, object]) -> None:
    document = call_json("verify", "plain.img", "--policy", "p.json")
    with pytest.raises(VmgraftError):
        validate("report", {**document, **change}, file=None, error=VmgraftError)


def test_interruption_is_one_object(house: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_args: object, **_named: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vmgraft.inspect.verdict.verify_evidence", interrupt)
    document = call_json("verify", "good.img", "--policy", "p.json")
    assert document["exitCode"] == 130
    validate("report", document, file=None, error=VmgraftError)


def test_differences_and_sick_machines_are_errors_too(house: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (house / "b.img").write_bytes(b"\1" + (house / "plain.img").read_bytes()[1:])
    assert call_json("diff", "plain.img", "good.img")["identical"] is True
    document = call_json("diff", "plain.img", "b.img")
    assert (document["exitCode"], document["identical"]) == (12, False)
    monkeypatch.setattr("vmgraft.vmmhost.doctor.examine", lambda: {"ready": False, "engines": []})
    assert call_json("doctor")["exitCode"] == 20


def test_usage_errors_as_json_say_where_help_is(house: Path) -> None:
    error = call_json("verify", "good.img")["error"]
    assert error == {
        "code": "usage", "message": "Missing option '--policy'.", "file": None, "offset": None, "field": None,
        "hint": "see `vmgraft verify --help`",
    }  # fmt: skip


def test_json_is_ascii_so_that_claims_cannot_drive_a_terminal(house: Path) -> None:
    name = "gr\u202e\x1b[2J\x9b1m.img"
    shutil.copy("good.img", name)
    code, out, _ = call("inspect", name, "--json")
    assert code == 0 and out.isascii() and "\x1b" not in out
    assert json.loads(out)["image"]["path"] == name


def test_one_passphrase_from_a_pipe_opens_several_keys(house: Path) -> None:
    for name in ("a", "b"):
        (house / "pass").write_text("correct horse\n")
        assert call("keygen", name, "--passphrase-file", "pass")[0] == 0
    reader, writer = os.pipe()
    os.write(writer, b"correct horse\n")
    os.close(writer)
    keys = ["--key", "a.key", "--key", "b.key", "--passphrase-fd", str(reader)]
    document = call_json("attach", "plain.img", str(CLOCK), *keys, "-o", "two.img")
    os.close(reader)
    assert len(document["keyids"]) == 2  # type: ignore[arg-type]


def test_what_a_guest_failed_to_show_is_told(house: Path) -> None:
    guest = (CLOCK.parent / "guest" / "guest.bin").read_bytes()
    (house / "guest.img").write_bytes(guest.ljust(1 << 20, b"\0"))
    command = [PROGRAM, "attach", "guest.img", str(CLOCK), "--key", "acme.key"]
    subprocess.run(command, check=True, capture_output=True)
    # A process of its own, since a run gives up rights for good.
    boot = [PROGRAM, "run", "guest.img", "--policy", "p.json", "--cpu", "soft", "--timeout", "60"]
    shown = subprocess.run([*boot, "--until", "never\x1bthis"], capture_output=True, text=True, check=False)
    assert shown.returncode == 22 and "\x1b" not in shown.stderr
    assert "error: guest.img: 'never\\x1bthis' never appeared; the guest ended: shutdown" in shown.stderr
    files = ["--serial", "serial", "--screen", "screen", "--json"]
    told = subprocess.run([*boot, *files], capture_output=True, text=True, check=False)
    document = json.loads(told.stdout)
    assert told.returncode == 0 and document["end"]["serial"].encode() == (house / "serial").read_bytes()
    validate("report", document, file=None, error=VmgraftError)


# --- terminals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args", [["inspect"], ["verify", "--policy", "p.json"], ["verify", "--policy"], ["list", "x"], ["digest"]]
)
def test_names_of_files_cannot_drive_a_terminal(house: Path, args: list[str]) -> None:
    name = "evil\x1b[2J\n\u202ename.img"
    shutil.copy("plain.img", name)
    _, out, err = call(*args, name)
    assert "\x1b" not in out + err and "\u202e" not in out + err
    assert not any(line.startswith("\u202ename") or line.startswith("name.img") for line in (out + err).splitlines())


def test_names_that_are_not_text_do_not_stop_a_report(house: Path) -> None:
    name = os.fsdecode(b"bad\xff.img")
    shutil.copy("good.img", name)
    for encoding in ("utf-8", "ascii", "latin-1"):
        for extra in ([], ["--json"]):
            done = subprocess.run(
                [PROGRAM, "inspect", name, *extra], capture_output=True, check=False,
                env={**os.environ, "PYTHONIOENCODING": f"{encoding}:strict"},
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            assert b"\\xff" in done.stdout or b"\\udcff" in done.stdout


def test_payloads_are_not_poured_into_a_terminal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Terminal(io.StringIO):
        buffer = io.BytesIO()

        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    for data in (b"\0asm", b"{\x1b[2J}", "\u009b31m".encode(), b"\xff"):
        with pytest.raises(UsageError, match="not plain text"):
            write_output(Path("-"), data, what="module")
    write_output(Path("-"), b'{"a":\t1}\n', what="manifest")
    assert terminal.buffer.getvalue() == b'{"a":\t1}\n'


def test_serial_bytes_reach_a_pipe_as_they_are(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    with Outputs(screen=None, serial=None, as_json=False) as outputs:
        assert outputs.serial_sink is not None
        outputs.serial_sink(b"\x80\xff\x1b[2J\n")
    assert capfdbinary.readouterr().out == b"\x80\xff\x1b[2J\n"


# --- streams and signals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("args", ["verify good.img --policy p.json --json", "inspect good.img", "--help"])
def test_a_full_disk_below_stdout_is_no_success(house: Path, args: str) -> None:
    done = subprocess.run(["sh", "-c", f"{PROGRAM} {args} > /dev/full"], capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert done.stderr.startswith("error: the system refused: No space left on device")
    assert "Exception ignored" not in done.stderr


def unread(stream: str, *args: str) -> tuple[int, bytes]:
    """Run with a pipe that nobody reads as ``stdout`` or ``stderr``; return exit code and what the other one got."""
    reader, writer = os.pipe()
    os.close(reader)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: writer}
    done = subprocess.run([PROGRAM, *args], stdin=subprocess.DEVNULL, **streams, check=False)  # type: ignore[call-overload]
    os.close(writer)
    return done.returncode, done.stderr if stream == "stdout" else done.stdout


@pytest.mark.parametrize(
    "args",
    [
        "verify good.img --policy p.json", "verify plain.img --policy p.json --json", "inspect good.img",
        "list good.img", "list none.img --json", "list --bogus --json", "digest good.img --json", "--help",
        "--version", "detach --help", "extract good.img module",
    ],
)  # fmt: skip
def test_a_reader_of_stdout_that_went_away(house: Path, args: str) -> None:
    assert unread("stdout", *args.split()) == (BROKEN_PIPE, b"")


@pytest.mark.parametrize("args", ["list none.img", "list --bogus", "list good.img"])
def test_a_reader_of_stderr_that_went_away(house: Path, args: str) -> None:
    assert unread("stderr", *args.split())[0] == BROKEN_PIPE


def test_an_unread_stderr_does_not_matter_where_nothing_is_said(house: Path) -> None:
    code, out = unread("stderr", "verify", "plain.img", "--policy", "p.json", "--json")
    assert (code, json.loads(out)["exitCode"]) == (4, 4)


def test_another_broken_pipe_is_not_taken_for_the_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    def burst(*_args: object, **_options: object) -> None:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    monkeypatch.setattr("vmgraft.inspect.report.list_extensions", burst)
    code, _, err = call("list", "any.img")
    assert (code, err) == (3, "error: the system refused: Broken pipe\n")


def test_closed_streams_do_not_matter(house: Path) -> None:
    for args, code in (("verify good.img --policy p.json", 0), ("verify plain.img --policy p.json", 4)):
        for closed in (">&-", "2>&-", "<&- >&- 2>&-"):
            done = subprocess.run(["sh", "-c", f"{PROGRAM} {args} {closed}"], capture_output=True, check=False)
            assert done.returncode == code, (args, closed, done.stderr)
    done = subprocess.run(["sh", "-c", f"{PROGRAM} extract good.img module >&-"], capture_output=True, check=False)
    assert done.returncode == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_termination_is_orderly_while_images_are_written(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), output.orderly_end():
        signal.raise_signal(number)
    assert signal.getsignal(number) == before


# --- files ----------------------------------------------------------------------------------------------------------


def test_files_of_a_run_that_was_refused_go_away(house: Path) -> None:
    args = ["run", "plain.img", "--policy", "p.json", "--serial", "serial", "--screen"]
    assert call(*args, "screen")[0] == 4
    assert call(*args, "serial")[0] == 3
    assert not (house / "serial").exists() and not (house / "screen").exists()


def test_files_of_a_run_that_took_place_stay(tmp_path: Path) -> None:
    with Outputs(screen=tmp_path / "screen", serial=tmp_path / "serial", as_json=False) as outputs:
        outputs.started = True
    assert sorted(path.name for path in tmp_path.iterdir()) == ["screen", "serial"]


def test_half_written_output_goes_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vmgraft.signing.files.os.fsync", full)
    with pytest.raises(FileError, match="No space left"):
        write_output(tmp_path / "x", b"data", what="record")
    assert not list(tmp_path.iterdir())


def test_export_writes_all_or_nothing(house: Path) -> None:
    (house / "out").mkdir()
    (house / "out" / "verify.sh").write_text("mine")
    code, _, err = call("export", "good.img", "--format", "openssl", "-o", "out")
    assert code == 3 and "hint:" in err
    assert [path.name for path in (house / "out").iterdir()] == ["verify.sh"]
    assert call("export", "good.img", "--format", "bundle", "--key", "acme.pub", "-o", "b")[0] == 2


@pytest.mark.parametrize(
    "args",
    [
        ["keygen", "k", "--no-passphrase", "--passphrase-file", "p.json"],
        ["keygen", "k", "--passphrase-fd", "99999999999"],
        ["run", "good.img", "--policy", "p.json", "--timeout", "nan"],
        ["run", "good.img", "--policy", "p.json", "--timeout", "inf"],
        ["run", "good.img", "--policy", "p.json", "--until", ""],
        ["policy", "init", "--trust", "acme.pub", "--grant-all-declared", str(CLOCK), "--grant-all-declared",
         str(CLOCK), "-o", "-"],
    ],
)  # fmt: skip
def test_requests_that_make_no_sense(house: Path, args: list[str]) -> None:
    assert call(*args)[0] == 2
    assert not list(house.glob("k.*"))


def test_policy_init_says_all_a_policy_needs(house: Path) -> None:
    assert call("attach", "plain.img", CLOCK, "--key", "acme.key", "--binding", "any", "-o", "any.img")[0] == 0
    assert call("verify", "any.img", "--policy", "p.json")[0] == 12
    init = ["policy", "init", "--trust", "acme.pub", "--grant-all-declared", CLOCK, "--binding", "any", "--require",
            "--image-scope", "name:any*", "--extension-scope", "org.vmgraft.*"]  # fmt: skip
    assert call(*init, "--expires", "2999-01-01", "-o", "any.json")[0] == 0
    assert call("verify", "any.img", "--policy", "any.json")[0] == 0
    assert call("verify", "good.img", "--policy", "any.json")[0] == 11
    entry = json.loads((house / "any.json").read_text())
    assert entry["expires"] == "2999-01-01T00:00:00Z"
    assert entry["trustPolicies"][0]["requireExtensions"] == ["org.vmgraft.clock"]


# --- help -----------------------------------------------------------------------------------------------------------


def _commands() -> Iterator[click.Command]:
    context = click.Context(cli)
    for name in COMMANDS:
        command = cli.get_command(context, name)
        assert command is not None
        yield command
        if isinstance(command, click.Group):
            yield from command.commands.values()


def test_every_option_says_what_it_is_for() -> None:
    for command in _commands():
        assert command.help and command.epilog, command.name
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f"{command.name} {parameter.name}"


# --- hostile input --------------------------------------------------------------------------------------------------


def _mutate(data: bytes, dice: random.Random) -> bytes:
    """Change a few bytes, mostly near the end where the graft is, or cut, or grow."""
    changed = bytearray(data)
    for _ in range(dice.choice([1, 1, 2, 8])):
        place = dice.choice([dice.randrange(len(changed)), max(0, len(changed) - 1 - dice.randrange(8192))])
        what = dice.random()
        if what < 0.7:
            changed[place] ^= 1 << dice.randrange(8)
        elif what < 0.85:
            changed[place : place + 8] = b"\xff" * len(changed[place : place + 8])
        elif what < 0.95:
            changed = changed[: max(1, place)]
        else:
            changed += bytes(dice.randrange(5000))
    return bytes(changed)


@pytest.mark.parametrize("seed", range(4))
def test_mutated_images_end_in_a_documented_code(house: Path, seed: int) -> None:
    dice, good = random.Random(seed), (house / "good.img").read_bytes()
    content = (house / "plain.img").stat().st_size
    for _ in range(25):
        data = _mutate(good, dice)
        (house / "t.img").write_bytes(data)
        for args in (["verify", "t.img", "--policy", "p.json"], ["inspect", "t.img"], ["extract", "t.img", "manifest"]):
            if args[0] == "extract":
                assert call(*args, "-o", "m")[0] in DOCUMENTED
                (house / "m").unlink(missing_ok=True)
                continue
            document = call_json(*args)
            assert document["exitCode"] in DOCUMENTED
            if args[0] == "verify" and document["ok"]:
                assert data[:content] == good[:content]


@pytest.mark.parametrize("seed", range(2))
def test_mutated_policies_end_in_a_documented_code(house: Path, seed: int) -> None:
    dice, good = random.Random(seed), (house / "p.json").read_bytes()
    for _ in range(60):
        data = bytearray(good)
        for _ in range(dice.choice([1, 1, 3])):
            data[dice.randrange(len(data))] = dice.choice(b'\0"[]{},:0-\xff\n')
        (house / "bad.json").write_bytes(data)
        assert call_json("policy", "check", "bad.json")["exitCode"] in (0, 18)


@pytest.mark.parametrize(
    ("manifest", "shown"),
    [
        ({"capabilities": ["log", 7, None, "\x1b[2J"]}, "? None None  [log, 7, \\x1b[2J]"),
        ({"capabilities": 5, "id": ["x"], "version": {}}, "? ['x'] {}  [5]"),
        ({"id": "a" * 5000, "title": {"deep": [[[1]]]}}, "? " + "a" * 157 + "... None  []"),
        (["no object"], "? a manifest that cannot be read: not readable"),
    ],
)
def test_manifests_of_any_shape_are_shown(house: Path, manifest: object, shown: str) -> None:
    from vmgraft.imagefmt.graft import attach_sections
    from vmgraft.imagefmt.record import Section, SectionKind

    shutil.copy("plain.img", "odd.img")
    sections = [Section(SectionKind.ENVELOPE, b"{}"), Section(SectionKind.MANIFEST, json.dumps(manifest).encode())]
    attach_sections("odd.img", sections, tree_digest=bytes(32))
    code, out, _ = call("list", "odd.img")
    assert (code, out.rstrip("\n")) == (0, shown)
    for args in (["list", "odd.img", "--json"], ["inspect", "odd.img"], ["inspect", "odd.img", "--json"]):
        assert call(*args)[0] == 0
    assert call("verify", "odd.img", "--policy", "p.json")[0] == 10


def test_inspection_has_no_python_words_and_no_room_where_a_graft_is(house: Path) -> None:
    for image, roomy in (("plain.img", True), ("good.img", False)):
        code, out, _ = call("inspect", image)
        assert code == 0
        assert ("room for an inline record" in out) is roomy
        assert not re.search(r": (None|True|False|\[\]|\{\})$", out, re.MULTILINE)
        assert re.search(r"\? critical: yes$", out, re.MULTILINE) or roomy
        assert call_json("inspect", image)["image"]["room"]["inline"] is not None  # type: ignore[index]


@pytest.mark.parametrize(
    ("claim", "shown"), [(None, "none"), (True, "yes"), (False, "no"), ([], "-"), ({}, "-"), (0, "0"), (1, "1")]
)
def test_words_of_claims(claim: object, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    _branch({"x": claim}, "")
    assert capsys.readouterr().out == f"? x: {shown}\n"


def test_a_trusted_key_signs_nonsense(house: Path) -> None:
    """A stolen key, or a careless vendor: whatever it signs, the verdict is a documented refusal or sound."""
    from vmgraft.imagefmt.graft import attach_sections
    from vmgraft.imagefmt.record import Section, SectionKind
    from vmgraft.signing.dsse import PAYLOAD_TYPE, Envelope, Signature, pae, serialise
    from vmgraft.signing.keyfiles import load_private

    dice, key = random.Random(1), load_private("acme.key")
    with contextlib.redirect_stdout(io.StringIO()):
        call("extract", "good.img", "statement", "-o", "statement")
    call("extract", "good.img", "manifest", "-o", "manifest")
    good, manifest = (house / "statement").read_bytes(), (house / "manifest").read_bytes()
    verdicts = set()
    for _ in range(60):
        statement = bytearray(good)
        statement[dice.randrange(len(good))] = dice.choice(b'\0"[]{},:0-9a\xff')
        signed = bytes(statement)
        envelope = serialise(Envelope(signed, (Signature(key.keyid, key.sign(pae(PAYLOAD_TYPE, signed))),)))
        shutil.copy("plain.img", "t.img")
        module = (CLOCK / "module.wasm").read_bytes()
        parts = {SectionKind.ENVELOPE: envelope, SectionKind.MANIFEST: manifest, SectionKind.MODULE: module}
        attach_sections("t.img", [Section(kind, data) for kind, data in parts.items()], tree_digest=bytes(32))
        document = call_json("verify", "t.img", "--policy", "p.json")
        validate("report", document, file=None, error=VmgraftError)
        assert document["exitCode"] in (0, 5, 11, 12, 13, 14, 16)
        verdicts.add(document["exitCode"])
    assert {5, 12, 13} <= verdicts
