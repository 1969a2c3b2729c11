"""Images that nobody here made: Debian's boot media, from vendor to boot and back."""

import shutil
from pathlib import Path

import pytest

GRUB = Path("/usr/lib/grub-rescue")
MEMTEST = Path("/usr/lib/memtest86+")

#: File, its format and how it is found out, how to boot it, and what it shows. The floppy carries an ISO file system
#: behind its boot sector, so it can be grafted as either. Memtest86+ takes a while to get to its own screen on the soft
#: CPU: the one for 64 bits is given the time, of the other one the boot loader's word does.
MEDIA = [
    pytest.param("grub-rescue-floppy.img", "raw", ["--image-format", "raw"], "floppy", "GNU GRUB", id="floppy-raw"),
    pytest.param("grub-rescue-floppy.img", "iso9660", [], "auto", "GNU GRUB", id="floppy-iso"),
    pytest.param("grub-rescue-usb.img", "iso9660", [], "disk", "GNU GRUB", id="usb"),
    pytest.param("memtest86+ia32.iso", "iso9660", [], "auto", "Loading Memtest86+", id="memtest-ia32"),
    pytest.param("memtest86+x64.iso", "iso9660", [], "auto", "Memtest86+ v", id="memtest-x64", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("medium", "image_format", "naming", "boot", "text"), MEDIA)
def test_from_vendor_to_boot_and_back(
    cli, vendor: Path, clock: Path, sha256, tmp_path: Path, medium: str, image_format: str, naming: list[str],
    boot: str, text: str,
) -> None:  # fmt: skip
    source = (GRUB if medium.startswith("grub") else MEMTEST) / medium
    image = Path(shutil.copyfile(source, tmp_path / medium))  # follows the link that the USB image is
    policy, log = vendor / "policy.json", tmp_path / "audit.jsonl"
    before = sha256(image)
    cli("attach", image, clock, "--key", vendor / "acme.key", *naming)
    grafted = sha256(image)
    assert grafted != before
    assert cli.json("verify", image, "--policy", policy, *naming)["error"] is None
    report = cli.json(
        "run", image, "--policy", policy, "--cpu", "soft", "--boot", boot, "--until", text, "--timeout", "200",
        "--audit-log", log, *naming, timeout=230,
    )  # fmt: skip
    assert report["end"]["reason"] == "until"
    assert any(text in line for line in report["end"]["screen"])
    assert (report["plan"]["format"], report["plan"]["boot"]) == (image_format, boot)
    assert report["end"]["blocksChecked"] > 0
    assert [(item["id"], item["state"]) for item in report["layer"]] == [("org.vmgraft.clock", "running")]
    assert cli.json("check-log", log, "--head", report["auditHead"])["head"] == report["auditHead"]
    assert sha256(image) == grafted
    cli("detach", image, *naming)
    assert sha256(image) == before
