"""Content that is checked when it is first read: where the image holds the signed tree, nothing is read up front."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vmgraft.errors import ContentMismatchError, UsageError
from vmgraft.imagefmt.contract import Opening
from vmgraft.imagefmt.graft import Graft, open_graft, open_image
from vmgraft.imagefmt.record import Section, SectionKind
from vmgraft.imagefmt.tree import ContentTree
from vmgraft.imagefmt.treesection import stored_tree
from vmgraft.signing.keys import generate
from vmgraft.signing.manifest import canonical_manifest, parse_manifest
from vmgraft.signing.policytools import format_policy, init_policy
from vmgraft.vendor import edit, resign
from vmgraft.vendor import graft as grafting
from vmgraft.vendor.graft import AttachOptions, attach
from vmgraft.vendor.pack import Package
from vmgraft.vmmhost import verification
from vmgraft.vmmhost.core.contract import EndReason
from vmgraft.vmmhost.launch import Launcher
from vmgraft.vmmhost.plan import RunOptions
from vmgraft.vmmhost.verification import BEFORE, FIRST_READ

#: mov ax, 0201h; mov cx, 0101h; mov dx, 80h; mov bx, 8000h; int 13h; cli; hlt: reads block 7 of the disk
READ_FAR = bytes.fromhex("b80102b90101ba8000bb0080cd13faf4")
#: cli; hlt
REST = bytes.fromhex("faf4")
#: Cylinder 1, head 0, sector 1 of 16 heads and 63 sectors.
FAR = 16 * 63 * 512
MARK = b"what the far sector holds"


def content(code: bytes) -> bytes:
    boot = code.ljust(510, b"\0") + b"\x55\xaa"
    return boot.ljust(FAR, b"\0") + MARK.ljust((1 << 20) - FAR, b"\0")


@pytest.fixture
def make(studio) -> Any:
    """Return what makes an image that boots some code, grafted with its content tree."""

    def graft(code: bytes, suffix: str = "img", **options: Any) -> None:
        studio.image.write_bytes(content(code))
        if suffix == "qcow2":
            raw, studio.image = studio.image, studio.folder / "disk.qcow2"
            convert = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(studio.image)]
            subprocess.run(convert, check=True)
        attach(studio.image, [package()], [studio.key], AttachOptions(**({"tree": True} | options)))
        policy = init_policy({"vendor": studio.key.public}, [parse_manifest(package().manifest)])
        studio.policy.write_bytes(format_policy(policy))

    def package(version: str = "1.0") -> Package:
        module = studio.wat(studio.ONES)
        manifest = {
            "id": "org.example.culprit", "version": version, "securityVersion": 1, "abi": "vmgraft/1",
            "module": "module.wasm", "capabilities": ["pio:0x510-0x517"],
        }  # fmt: skip
        return Package("org.example.culprit", version, canonical_manifest(manifest), module)

    graft.package = package
    return graft


def run(studio, **options: Any) -> Any:
    chosen = RunOptions(**({"cpu": "soft", "timeout": 60, "audit_log": studio.audit_log} | options))
    return Launcher(studio.image, studio.policy, chosen).run()


def spoil(path: Path, mark: bytes = MARK) -> None:
    """Change one byte of the content, wherever the container keeps it."""
    data = path.read_bytes()
    assert data.count(mark) == 1
    with path.open("r+b") as file:
        file.seek(data.index(mark))
        file.write(b"W")


def content_detail(report: Any) -> str:
    return next(check.detail for check in report.verification.checks if check.name == "content")


@pytest.mark.parametrize("suffix", ["img", "qcow2"])
def test_nothing_is_read_before_the_start(studio, make, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make(REST, suffix)
    monkeypatch.setattr(Graft, "content", lambda *_: pytest.fail("the content was read"))
    report = run(studio)
    assert (report.error, report.result.reason, report.plan.content_check) == (None, EndReason.HALT, FIRST_READ)
    assert report.result.blocks_checked == 1
    assert "when it is first read" in content_detail(report)
    plan = next(record for record in studio.log() if record["event"] == "plan")
    assert plan["plan"]["contentCheck"] == FIRST_READ


@pytest.mark.parametrize("suffix", ["img", "qcow2"])
def test_a_wrong_block_ends_the_run_that_reads_it_and_no_other(studio, make, suffix: str) -> None:
    make(READ_FAR, suffix)
    spoil(studio.image)
    report = run(studio)
    assert (report.result.reason, report.error) == (EndReason.DISK, "content-mismatch")
    assert report.result.detail == "block 7 of the guest content is not what was verified"
    end = studio.log()[-1]
    assert (end["event"], end["reason"], end["detail"]) == ("end", "content-mismatch", report.result.detail)
    studio.audit_log.unlink()
    refused = run(studio, verify_all=True)
    assert (refused.error, refused.plan) == ("content-mismatch", None)


def test_a_wrong_block_that_nobody_reads_stops_nobody(studio, make) -> None:
    make(REST)
    spoil(studio.image)
    assert run(studio).error is None


def test_a_wrong_boot_block_never_starts(studio, make) -> None:
    make(REST)
    with studio.image.open("r+b") as file:
        file.seek(100)
        file.write(b"\1")
    with pytest.raises(ContentMismatchError) as caught:
        run(studio)
    assert caught.value.field == "block 0"
    assert caught.value.file == str(studio.image)


def test_the_program_ends_with_12_and_names_the_block(studio, make) -> None:
    make(READ_FAR)
    spoil(studio.image)
    command = [sys.executable, "-m", "vmgraft", "run", studio.image, "--policy", studio.policy]
    done = subprocess.run([*command, "--cpu", "soft", "--json", "--state", "none"], capture_output=True, check=False)
    assert done.returncode == 12
    assert "block 7" in json.loads(done.stdout)["error"]["message"]


def test_an_iso_image_too(studio, make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "boot.img").write_bytes(REST.ljust(2048, b"\0"))
    (tmp_path / "tree" / "far.bin").write_bytes(bytes(300_000) + MARK.ljust(4096, b"\0"))
    studio.image = tmp_path / "boot.iso"
    subprocess.run(
        ["xorriso", "-as", "mkisofs", "-quiet", "-o", str(studio.image), "-b", "boot.img", "-no-emul-boot",
         "-boot-load-size", "4", str(tmp_path / "tree")], check=True, capture_output=True,
    )  # fmt: skip
    attach(studio.image, [make.package()], [studio.key], AttachOptions(tree=True))
    policy = init_policy({"vendor": studio.key.public}, [parse_manifest(make.package().manifest)])
    studio.policy.write_bytes(format_policy(policy))
    spoil(studio.image)
    report = run(studio, boot="cdrom")
    assert (report.error, report.plan.content_check) == (None, FIRST_READ)
    studio.audit_log.unlink()
    assert run(studio, boot="cdrom", verify_all=True).error == "content-mismatch"


@pytest.mark.parametrize("options", [{"verify_all": True}, {}])
def test_all_is_read_where_that_is_asked_for_or_no_tree_is_there(studio, make, options: dict[str, bool]) -> None:
    make(REST, tree=bool(options))
    report = run(studio, **options)
    assert (report.error, report.plan.content_check) == (None, BEFORE)
    assert content_detail(report) == f"{1 << 20} bytes as signed"


def forged(make: Any, monkeypatch: pytest.MonkeyPatch, raw: bytes) -> None:
    """Graft an image whose record holds these bytes for a tree; nobody signs the section."""
    monkeypatch.setattr(grafting, "tree_section", lambda _tree: Section(SectionKind.TREE, raw, critical=False))
    make(READ_FAR)


def other_tree(**change: bytes) -> bytes:
    data = content(READ_FAR).replace(MARK, change.get("mark", MARK))
    blocks = [data[at : at + 65536] for at in range(0, len(data), 65536)]
    from vmgraft.imagefmt.treenodes import TreeBuilder, leaf_hashes
    from vmgraft.imagefmt.treesection import tree_section

    builder = TreeBuilder(len(data))
    for number, block in enumerate(blocks):
        builder.add(number * 65536, leaf_hashes(memoryview(block)))
    raw = tree_section(builder.finish()).raw
    assert isinstance(raw, bytes)
    return raw


def test_a_tree_that_is_not_the_signed_one_is_not_used(studio, make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever changes a block can change the unsigned tree with it: then all is read, and found out."""
    forged(make, monkeypatch, other_tree(mark=b"W" + MARK[1:]))
    report = run(studio)
    assert (report.error, report.plan.content_check) == (None, BEFORE)
    assert any("is not the signed one" in text for text in report.verification.warnings)
    studio.audit_log.unlink()
    spoil(studio.image)
    refused = run(studio)
    assert (refused.error, refused.plan) == ("content-mismatch", None)


@pytest.mark.parametrize("raw", [b"", b"nonsense" * 100, other_tree()[:-1]])
def test_a_tree_that_is_none_is_not_used(studio, make, monkeypatch: pytest.MonkeyPatch, raw: bytes) -> None:
    forged(make, monkeypatch, raw)
    report = run(studio)
    assert (report.error, report.plan.content_check) == (None, BEFORE)
    assert any("of no use" in text for text in report.verification.warnings)


def test_a_damaged_section_is_a_damaged_graft(studio, make) -> None:
    make(REST)
    tree = stored(studio.image)
    assert tree is not None
    spoil(studio.image, tree.leaf(7))
    report = run(studio)
    assert (report.error, report.plan) == ("graft-format", None)


def test_a_portable_graft_has_no_tree(studio, make) -> None:
    with pytest.raises(UsageError, match="portable"):
        make(REST, binding="any")


def stored(path: Path) -> ContentTree | None:
    with open_image(path, Opening()) as image:
        return stored_tree(open_graft(image))


def test_edits_keep_the_tree(studio, make) -> None:
    make(REST)
    tree = stored(studio.image)
    assert tree is not None
    edit.replace_extensions(studio.image, [make.package("1.1")], [studio.key], edit.EditOptions())
    resign.resign(studio.image, [studio.key], resign.ResignOptions())
    kept = stored(studio.image)
    assert kept is not None
    assert kept.tree_digest == tree.tree_digest
    assert run(studio).plan.content_check == FIRST_READ
    edit.replace_extensions(studio.image, [make.package("1.2")], [studio.key], edit.EditOptions(binding="any"))
    assert stored(studio.image) is None


def test_a_policy_can_demand_that_all_is_read(studio, make) -> None:
    make(READ_FAR)
    document = json.loads(studio.policy.read_bytes())
    document["trustPolicies"][0]["contentCheck"] = "before-start"
    studio.policy.write_bytes(format_policy(document))
    report = run(studio)
    assert (report.error, report.plan.content_check) == (None, BEFORE)
    studio.audit_log.unlink()
    spoil(studio.image)
    refused = run(studio)
    assert (refused.error, refused.plan) == ("content-mismatch", None)
    document["trustPolicies"][0]["contentCheck"] = "first-read"
    studio.policy.write_bytes(format_policy(document))
    studio.audit_log.unlink()
    assert run(studio).plan.content_check == FIRST_READ


def stranger(studio: Any) -> None:
    """Let the policy know another key than the one that signed."""
    document = json.loads(studio.policy.read_bytes())
    document["keys"] = [{"name": "other", "pem": generate("p256").public.pem.decode()}]
    document["trustPolicies"][0]["signatures"] = {"allOf": ["key:other"]}
    studio.policy.write_bytes(format_policy(document))


def two_signers(studio: Any) -> None:
    """Let the policy demand the signature of one more key than has signed."""
    document = json.loads(studio.policy.read_bytes())
    document["keys"].append({"name": "other", "pem": generate("p256").public.pem.decode()})
    document["trustPolicies"][0]["signatures"] = {"allOf": ["key:other", f"key:{document['keys'][0]['name']}"]}
    studio.policy.write_bytes(format_policy(document))


def demand_more(studio: Any) -> None:
    """Let the policy demand an extension that is not there."""
    document = json.loads(studio.policy.read_bytes())
    document["trustPolicies"][0]["requireExtensions"] = ["org.example.absent"]
    studio.policy.write_bytes(format_policy(document))


@pytest.mark.parametrize("spoiled", [stranger, two_signers, demand_more])
def test_no_tree_is_parsed_and_nothing_read_of_what_is_refused(
    studio, make, spoiled: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The section is unsigned: whoever cannot sign must not be able to make the host compute."""
    make(REST)
    spoiled(studio)
    monkeypatch.setattr(verification, "stored_tree", lambda *_: pytest.fail("the tree was parsed"))
    monkeypatch.setattr(Graft, "content", lambda *_: pytest.fail("the content was read"))
    report = run(studio)
    assert report.error is not None
    assert report.plan is None
    assert "not read" in content_detail(report)


def test_a_signature_that_merely_counts_as_a_warning_opens_no_tree(
    studio, make, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(REST)
    document = json.loads(studio.policy.read_bytes())
    document["keys"].append({"name": "other", "pem": generate("p256").public.pem.decode()})
    rule = document["trustPolicies"][0]
    rule["signatures"] = {"allOf": ["key:other"]}
    rule["signatureVerification"] = {"level": "strict", "override": {"authenticity": "log"}}
    studio.policy.write_bytes(format_policy(document))
    monkeypatch.setattr(verification, "stored_tree", lambda *_: pytest.fail("the tree was parsed"))
    report = run(studio)
    assert (report.error, report.plan.content_check) == (None, BEFORE)


def test_a_tree_of_another_size_than_the_signed_one_is_not_parsed(
    studio, make, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(REST)
    real = verification.judge_evidence

    def other_size(*args: Any, **options: Any) -> Any:
        judgement = real(*args, **options)
        image = replace(judgement.run.statement.image, virtual_size=(1 << 20) + 512)
        judgement.run.statement = replace(judgement.run.statement, image=image)
        return judgement

    monkeypatch.setattr(verification, "judge_evidence", other_size)
    monkeypatch.setattr(verification, "stored_tree", lambda *_: pytest.fail("the tree was parsed"))
    assert run(studio).plan.content_check == BEFORE
