"""What inspect, list and extract say of an image, and that nothing in it can speak for itself."""

import json
import subprocess
import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from vmgraft.cli.app import cli
from vmgraft.errors import FileError, NoGraftError, UsageError
from vmgraft.imagefmt.graft import attach_sections
from vmgraft.imagefmt.record import Section, SectionKind
from vmgraft.inspect.extract import extract_part
from vmgraft.inspect.report import inspect_image, list_extensions
from vmgraft.signing.keys import generate
from vmgraft.vendor.graft import AttachOptions, attach
from vmgraft.vendor.pack import load_package

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def grafted(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(b"content" * 1000)
    packages = [load_package(EXAMPLES / "clock"), load_package(EXAMPLES / "entropy")]
    attach(path, packages, [generate("ed25519")], AttachOptions())
    return path


def test_everything_the_file_claims_is_below_unverified(grafted: Path) -> None:
    report = inspect_image(grafted)
    assert set(report) == {"image", "graft", "unverified"}
    measured = json.dumps([report["image"], report["graft"]])
    for claim in ("org.vmgraft.clock", "SHA256:", "expires", "capabilities"):
        assert claim not in measured
    claims = report["unverified"]
    assert [entry["manifest"]["id"] for entry in claims["manifests"]] == ["org.vmgraft.clock", "org.vmgraft.entropy"]
    assert claims["envelopes"][0]["statement"]["_type"] == "https://in-toto.io/Statement/v1"
    assert claims["formatProblem"] is None
    assert json.loads(json.dumps(report)) == report


def test_list(grafted: Path, tmp_path: Path) -> None:
    listing = list_extensions(grafted)
    assert listing["state"] == "ok"
    assert [entry["id"] for entry in listing["unverified"]["extensions"]] == [
        "org.vmgraft.clock",
        "org.vmgraft.entropy",
    ]
    (tmp_path / "plain").write_bytes(b"x")
    with pytest.raises(NoGraftError):
        list_extensions(tmp_path / "plain")


def test_extract_gives_the_very_bytes(grafted: Path) -> None:
    assert (
        extract_part(grafted, "module", extension="org.vmgraft.clock")
        == (EXAMPLES / "clock" / "module.wasm").read_bytes()
    )
    assert extract_part(grafted, "manifest", extension="org.vmgraft.clock") == load_package(EXAMPLES / "clock").manifest
    assert json.loads(extract_part(grafted, "statement"))["predicateType"] == "https://vmgraft.dev/graft/v1"
    assert extract_part(grafted, "record") in grafted.read_bytes()
    with pytest.raises(UsageError, match="which extension"):
        extract_part(grafted, "module")


def test_a_record_full_of_rubbish_is_still_described(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(b"content" * 1000)
    rubbish = [
        Section(SectionKind.ENVELOPE, b'{"payload": 1}'),
        Section(SectionKind.MANIFEST, b"\xff\xfe not json"),
        Section(SectionKind.MANIFEST, b"[" * 50_000),
        Section(SectionKind.HINTS, b'{"tool": "\x1b[2J"}', critical=False),
    ]
    attach_sections(path, rubbish, tree_digest=bytes(32))
    claims = inspect_image(path)["unverified"]
    assert "error" in claims["envelopes"][0]
    assert [set(entry) for entry in claims["manifests"]] == [{"error"}, {"error"}]
    assert "error" in claims["hints"]


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(FileError):
        inspect_image(tmp_path / "nowhere")
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(FileError):
        inspect_image(tmp_path / "empty")
    with pytest.raises(FileError):
        inspect_image(tmp_path)


def test_partitions_of_every_disk_and_of_nothing_else(tmp_path: Path) -> None:
    disk, archive = tmp_path / "disk.img", tmp_path / "a.zip"
    with disk.open("wb") as file:
        file.truncate(64 << 20)
    script = "label: gpt\nstart=2048, size=8192, name=boot, type=uefi\nname=root"
    subprocess.run(["sfdisk", "-q", str(disk)], input=script, text=True, check=True)
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", str(disk), str(tmp_path / "disk.qcow2")], check=True)
    tables = [inspect_image(path)["unverified"]["partitions"] for path in (disk, tmp_path / "disk.qcow2")]
    assert tables[0] == tables[1]
    assert tables[0]["scheme"] == "gpt" and tables[0]["problems"] == []
    found = [(part["number"], part["start"], part["size"], part["name"]) for part in tables[0]["partitions"]]
    assert found[0] == (1, 1 << 20, 4 << 20, "boot") and found[1][3] == "root"
    with zipfile.ZipFile(archive, "w") as bundle:
        bundle.writestr("a.txt", "a")
    assert inspect_image(archive)["unverified"]["partitions"] is None


def test_inspect_shows_partitions_and_their_problems_to_people(tmp_path: Path) -> None:
    disk = tmp_path / "disk.img"
    with disk.open("wb") as file:
        file.truncate(64 << 20)
    subprocess.run(["sfdisk", "-q", str(disk)], input="label: gpt\nname=root", text=True, check=True)
    with disk.open("r+b") as file:
        file.truncate(80 << 20)
    done = CliRunner().invoke(cli, ["inspect", str(disk)])
    assert done.exit_code == 0 and "partition table: gpt" in done.output and "root" in done.output
    assert any("?" in line and "end" in line for line in done.output.splitlines() if line.startswith("│"))
