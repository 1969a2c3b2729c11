"""Packing, scaffolding, attaching: what a vendor does, and what goes wrong without losing anything."""

import shutil
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from vmgraft.errors import FileError, UsageError, VerificationError
from vmgraft.signing.keys import generate
from vmgraft.vendor.graft import AttachOptions, attach, check_detach_ids, detach
from vmgraft.vendor.pack import load_package
from vmgraft.vendor.scaffold import new_extension

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(b"content" * 1000)
    return path


def copy_clock(tmp_path: Path) -> Path:
    return Path(shutil.copytree(EXAMPLES / "clock", tmp_path / "clock"))


def test_a_new_extension_builds_and_packs(tmp_path: Path) -> None:
    folder = tmp_path / "My Counter!"
    new_extension(folder)
    subprocess.run(["make", "-C", str(folder)], check=True, capture_output=True)
    package = load_package(folder)
    assert package.id == "com.example.my-counter"
    assert package.module is not None
    assert load_package(folder) == package


def test_the_template_carries_the_current_header() -> None:
    template = Path(__file__).resolve().parents[2] / "vmgraft" / "vendor" / "template" / "vmgraft.h"
    for example in ("clock", "entropy"):
        assert template.read_bytes() == (EXAMPLES / example / "vmgraft.h").read_bytes()


def test_new_never_writes_into_a_folder_in_use(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        new_extension(tmp_path)
    with pytest.raises(UsageError, match="not an extension id"):
        new_extension(tmp_path / "x", "No Dots")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (("[limits]", "[limit]"), None),
        (('id = "org.vmgraft.clock"', 'id = "Clock"'), "id"),
        (("securityVersion = 1", 'securityVersion = "1"'), "securityVersion"),
        (("pio:0x510-0x517", "pio:everything"), "capabilities[2]"),
        (("memoryMiB = 1", "memoryMiB = 1e3"), "limits.memoryMiB"),
        (('module = "module.wasm"', 'module = "../module.wasm"'), "module"),
    ],
)
def test_bad_manifests_name_the_field(tmp_path: Path, change: tuple[str, str], field: str | None) -> None:
    path = copy_clock(tmp_path) / "manifest.toml"
    assert change[0] in path.read_text()
    path.write_text(path.read_text().replace(*change))
    with pytest.raises(UsageError) as caught:
        load_package(path.parent)
    assert caught.value.field == field
    assert caught.value.file == str(path)


def test_modules_that_are_none(tmp_path: Path) -> None:
    module = copy_clock(tmp_path) / "module.wasm"
    module.write_bytes(b"\x7fELF" + bytes(100))
    with pytest.raises(FileError, match="not a WebAssembly core module"):
        load_package(module.parent)
    module.write_bytes(b"\0asm\x01\0\0\0" + bytes(1 << 20))
    with pytest.raises(FileError, match="larger than"):
        load_package(module.parent)
    module.unlink()
    module.symlink_to("/dev/zero")
    with pytest.raises(FileError):
        load_package(module.parent)


def test_nothing_is_grafted_twice(disk: Path) -> None:
    package, key = load_package(EXAMPLES / "clock"), generate("p256")
    attach(disk, [package], [key], AttachOptions())
    grafted = disk.read_bytes()
    with pytest.raises(UsageError, match="already"):
        attach(disk, [package], [key], AttachOptions())
    with pytest.raises(UsageError, match="twice"):
        detach(disk)
        attach(disk, [package], [key, key], AttachOptions())
    attach(disk, [package], [key], AttachOptions())
    assert len(disk.read_bytes()) == len(grafted)


def test_a_failed_verification_takes_the_graft_away(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = disk.read_bytes()
    key = generate("p256")
    expired = AttachOptions(expires=datetime.now(UTC) - timedelta(days=1))
    with pytest.raises((VerificationError, UsageError)):
        attach(disk, [load_package(EXAMPLES / "clock")], [key], expired)
    assert disk.read_bytes() == before
    with pytest.raises((VerificationError, UsageError)):
        attach(
            disk, [load_package(EXAMPLES / "clock")], [key],
            AttachOptions(expires=expired.expires, output=disk.with_name("out.img")),
        )  # fmt: skip
    assert [path.name for path in disk.parent.iterdir()] == ["disk.img"]


def test_output_never_overwrites(disk: Path) -> None:
    package, key = load_package(EXAMPLES / "clock"), generate("p256")
    other = disk.with_name("other.img")
    other.write_bytes(b"precious")
    with pytest.raises(FileError, match="exists"):
        attach(disk, [package], [key], AttachOptions(output=other))
    assert other.read_bytes() == b"precious"


def test_ids_of_detach(disk: Path) -> None:
    packages = [load_package(EXAMPLES / "clock"), load_package(EXAMPLES / "entropy")]
    attach(disk, packages, [generate("p256")], AttachOptions())
    with pytest.raises(UsageError, match="one statement covers all"):
        check_detach_ids(disk, ["org.vmgraft.clock"])
    check_detach_ids(disk, ["org.vmgraft.entropy", "org.vmgraft.clock"])
