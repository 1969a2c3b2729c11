"""One byte changed anywhere: never exit 0, and no worker is ever started."""

import json
import shutil
from pathlib import Path

import pytest

#: What is changed, and the exit code that names it (docs/exit-codes.md).
CODES = {"envelope": 10, "statement": 10, "manifest": 13, "module": 13, "content": 12, "locator": 5}


def sections(cli, image: Path) -> dict[str, tuple[int, int]]:
    """Return file offset and size of each section, found by searching the file for the record."""
    record = Path(image.parent / "record.bin")
    cli("extract", image, "record", "-o", record)
    base = image.read_bytes().find(record.read_bytes())
    assert base >= 0
    table = cli.json("inspect", image)["unverified"]["sections"]
    record.unlink()
    return {entry["kind"].lower(): (base + entry["offset"], entry["storedSize"]) for entry in table}


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x20
    path.write_bytes(data)


def refuse(cli, image: Path, policy: Path, code: int, log: Path) -> None:
    """Both verify and run refuse with the code; the audit log shows that nothing was started."""
    document = cli.json("verify", image, "--policy", policy, code=code)
    assert not document["ok"]
    cli.json("run", image, "--policy", policy, "--cpu", "soft", "--audit-log", log, "--timeout", "20", code=code)
    events = [json.loads(line)["event"] for line in log.read_text().splitlines()] if log.exists() else []
    assert not {"extension-start", "boot", "plan"} & set(events)
    log.unlink(missing_ok=True)


@pytest.fixture(params=["raw", "qcow2", "iso"])
def image(request, cli, vendor: Path, clock: Path, guest: Path, tmp_path: Path, tool) -> Path:
    raw = tmp_path / "disk.img"
    raw.write_bytes(guest.read_bytes().ljust(1 << 20, b"\0") + bytes(range(256)) * 1024)
    path = raw
    if request.param == "qcow2":
        path = tmp_path / "disk.qcow2"
        tool("qemu-img", "convert", "-O", "qcow2", raw, path)
    elif request.param == "iso":
        path, tree = tmp_path / "disk.iso", tmp_path / "tree"
        tree.mkdir()
        shutil.copy(raw, tree / "data.bin")
        tool("xorriso", "-as", "mkisofs", "-quiet", "-o", path, tree)
    cli("attach", path, clock, "--key", vendor / "acme.key")
    cli("verify", path, "--policy", vendor / "policy.json")
    return path


@pytest.mark.parametrize("part", ["envelope", "manifest", "module"])
def test_stored_sections(cli, vendor: Path, image: Path, tmp_path: Path, part: str) -> None:
    offset, size = sections(cli, image)[part]
    pristine = image.read_bytes()
    for position in (0, size // 2, size - 1):
        flip(image, offset + position)
        refuse(cli, image, vendor / "policy.json", CODES[part], tmp_path / "audit.jsonl")
        image.write_bytes(pristine)


def test_content(cli, vendor: Path, image: Path, tmp_path: Path) -> None:
    offset = image.read_bytes().find(bytes(range(256)) * 64)
    flip(image, offset + 1000)
    refuse(cli, image, vendor / "policy.json", CODES["content"], tmp_path / "audit.jsonl")


def test_locator(cli, vendor: Path, image: Path, tmp_path: Path) -> None:
    offset = cli.json("inspect", image)["unverified"]["locator"]["offset"]
    pristine = image.read_bytes()
    for position in (9, 20, 40, 127):
        flip(image, offset + position)
        refuse(cli, image, vendor / "policy.json", CODES["locator"], tmp_path / "audit.jsonl")
        image.write_bytes(pristine)


def test_the_statement_in_a_record_laid_out_anew(cli, vendor: Path, image: Path, tmp_path: Path, clock: Path) -> None:
    """Somebody who can write records, but not sign: every digest of the record is right, the statement is not."""
    import base64

    from vmgraft.imagefmt.graft import attach_sections, open_image
    from vmgraft.imagefmt.record import Section, SectionKind, parse_record

    with open_image(image) as opened:
        record = opened.locate().record
        assert record is not None
        parsed = parse_record(record, file=None, offset=0)
        kept = [(SectionKind(s.kind), parsed.raw(s)) for s in parsed.sections if s.name != "UNDO"]
    envelope = json.loads(next(raw for kind, raw in kept if kind is SectionKind.ENVELOPE))
    statement = base64.b64decode(envelope["payload"]).replace(b'"securityVersion":"1"', b'"securityVersion":"9"')
    envelope["payload"] = base64.b64encode(statement).decode()
    cli("detach", image)
    forged = [
        Section(kind, json.dumps(envelope).encode() if kind is SectionKind.ENVELOPE else raw, compress=True)
        for kind, raw in kept
    ]
    attach_sections(image, forged, tree_digest=bytes(32))
    refuse(cli, image, vendor / "policy.json", CODES["statement"], tmp_path / "audit.jsonl")


def test_every_byte_of_the_policy_matters_or_the_verdict_stays(cli, vendor: Path, image: Path, tmp_path: Path) -> None:
    policy = (vendor / "policy.json").read_bytes()
    broken = tmp_path / "broken.json"
    for old, new, code in (
        (b'"version": "1.0"', b'"version": "9.0"', 18),
        (b'"trustPolicies"', b'"trustPolicys!"', 18),
        (b'"capabilities"', b'"capabilitixs"', 18),
        (policy[:1], b"[", 18),
        (b"-----BEGIN PUBLIC KEY-----", b"-----BEGIN PUBLIC KEX-----", 18),
        (b"pio:0x510-0x517", b"pio:0x510-0x516", 17),
    ):
        assert old in policy
        broken.write_bytes(policy.replace(old, new, 1))
        refuse(cli, image, broken, code, tmp_path / "audit.jsonl")


def test_unsigned_is_never_fine(cli, vendor: Path, tmp_path: Path, clock: Path) -> None:
    plain = tmp_path / "plain.img"
    plain.write_bytes(bytes(100_000))
    refuse(cli, plain, vendor / "policy.json", 4, tmp_path / "audit.jsonl")
    cli("keygen", tmp_path / "stranger", "--no-passphrase")
    cli("attach", plain, clock, "--key", tmp_path / "stranger.key")
    refuse(cli, plain, vendor / "policy.json", 11, tmp_path / "audit.jsonl")


def test_a_missing_policy_means_no(cli, vendor: Path, image: Path, tmp_path: Path) -> None:
    refuse(cli, image, tmp_path / "nowhere.json", 18, tmp_path / "audit.jsonl")
    (tmp_path / "link.json").symlink_to(vendor / "policy.json")
    refuse(cli, image, tmp_path / "link.json", 18, tmp_path / "audit.jsonl")
