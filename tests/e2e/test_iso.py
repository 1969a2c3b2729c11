"""The GRUB rescue ISO: grafted, still an ISO for everybody, verified, booted to its menu, detached."""

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import pycdlib
import pytest

GRUB_ISO = Path("/usr/lib/grub-rescue/grub-rescue-cdrom.iso")


@pytest.fixture
def iso(tmp_path: Path) -> Path:
    return Path(shutil.copy(GRUB_ISO, tmp_path / "grub.iso"))


def facts(path: Path, tool: Callable[..., str]) -> dict[str, str]:
    """What outside readers say of an ISO, without the lines that name file, size or application field."""
    volume = pycdlib.PyCdlib()
    volume.open(str(path))
    names = [f"{folder}/{name}" for folder, _dirs, files in volume.walk(iso_path="/") for name in files]
    content = io.BytesIO()
    volume.get_file_from_iso_fp(content, iso_path=names[0])
    volume.close()
    toc = tool("xorriso", "-indev", path, "-find", "/", "-exec", "report_lba", "--")
    return {
        "isoinfo": tool("isoinfo", "-l", "-i", path),
        "xorriso": "\n".join(line for line in toc.splitlines() if line.startswith("File data lba")),
        "pycdlib": "\n".join(names) + repr(content.getvalue()[:64]),
        "el torito": "\n".join(
            line
            for line in tool("xorriso", "-indev", path, "-report_el_torito", "plain").splitlines()
            if line.startswith("El Torito")
        ),
    }


def test_grub_from_vendor_to_menu_and_back(cli, vendor: Path, iso: Path, clock: Path, tool, sha256) -> None:
    before, original = sha256(iso), facts(iso, tool)
    assert original["xorriso"]
    cli("attach", iso, clock, "--key", vendor / "acme.key")
    assert sha256(iso) != before
    assert facts(iso, tool) == original
    assert cli.json("verify", iso, "--policy", vendor / "policy.json")["ok"]
    report = cli.json(
        "run", iso, "--policy", vendor / "policy.json", "--cpu", "soft", "--until", "GNU GRUB", "--timeout", "60"
    )
    assert any("GNU GRUB" in line for line in report["end"]["screen"])
    assert report["end"]["reason"] == "until"
    assert [item["state"] for item in report["layer"]] == ["running"]
    cli("detach", iso)
    assert sha256(iso) == before


@pytest.mark.kvm
@pytest.mark.slow
def test_grub_menu_on_kvm(cli, vendor: Path, iso: Path, clock: Path, kvm) -> None:
    cli("attach", iso, clock, "--key", vendor / "acme.key")
    args = ("run", iso, "--policy", vendor / "policy.json", "--cpu", "kvm", "--until", "GNU GRUB", "--timeout", "200")
    report = cli.json(*args, timeout=230)
    assert any("GNU GRUB" in line for line in report["end"]["screen"])
    assert report["end"]["engine"] == "kvm"


def test_checkisomd5_stays_happy(cli, vendor: Path, tmp_path: Path, clock: Path, tool, sha256) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "data.bin").write_bytes(bytes(range(256)) * 16384)
    iso = tmp_path / "small.iso"
    tool("genisoimage", "-quiet", "-J", "-R", "-o", iso, tree)
    tool("implantisomd5", iso)
    before = sha256(iso)
    tool("checkisomd5", iso)
    cli("attach", iso, clock, "--key", vendor / "acme.key")
    tool("checkisomd5", iso)
    cli("verify", iso, "--policy", vendor / "policy.json")
    cli("detach", iso)
    assert sha256(iso) == before


def test_burnt_with_padding_and_recovered(cli, vendor: Path, iso: Path, clock: Path, sha256) -> None:
    before = sha256(iso)
    cli("attach", iso, clock, "--key", vendor / "acme.key")
    grafted = sha256(iso)
    with iso.open("ab") as file:
        file.write(bytes(150 * 2048))
    assert "all of them zero" in cli.json("inspect", iso)["graft"]["detail"]
    cli("verify", iso, "--policy", vendor / "policy.json", code=5)
    cli("recover", iso)
    assert sha256(iso) == grafted
    cli("verify", iso, "--policy", vendor / "policy.json")
    cli("detach", iso)
    assert sha256(iso) == before


def test_burnt_with_the_volumes_size(cli, vendor: Path, iso: Path, clock: Path, tool, sha256) -> None:
    """The record is gone, the content is not: the digest in the locator shows the way back."""
    before, sectors = sha256(iso), iso.stat().st_size // 2048
    cli("attach", iso, clock, "--key", vendor / "acme.key")
    copy = iso.with_name("copy.iso")
    tool("dd", f"if={iso}", f"of={copy}", "bs=2048", f"count={sectors}")
    assert "the record is gone" in cli.json("inspect", copy)["graft"]["detail"]
    cli("verify", copy, "--policy", vendor / "policy.json", code=5)
    cli("detach", copy)
    assert sha256(copy) == before
