"""What the corpus breaks is whole before: programs that others wrote read it as we do."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import corpus_graft as lay
import corpus_iso
import corpus_qcow2_base
import corpus_record
import corpus_vdi
import corpus_vhd
import corpus_vhdx
import corpus_vmdk
import corpus_zip
import pytest

from vmgraft.imagefmt.contract import GraftState
from vmgraft.imagefmt.graft import detach_image, open_graft, open_image


def qemu_img(*arguments: object) -> None:
    done = subprocess.run(["qemu-img", *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_qcow2(tmp_path: Path) -> None:
    for version in (2, 3):
        path, raw = tmp_path / f"v{version}.qcow2", tmp_path / "raw"
        path.write_bytes(corpus_qcow2_base.image(version=version))
        qemu_img("check", "-f", "qcow2", path)
        qemu_img("convert", "-f", "qcow2", "-O", "raw", path, raw)
        assert raw.read_bytes() == corpus_qcow2_base.content()
        with open_image(path) as image:
            assert image.read(0, image.virtual_size) == corpus_qcow2_base.content()


@pytest.mark.parametrize(
    ("form", "data"),
    [
        ("vdi", corpus_vdi.image(block=corpus_vdi.QEMU_BLOCK)),
        ("vpc", corpus_vhd.image()),
        ("vpc", corpus_vhd.fixed()),
        ("vmdk", corpus_vmdk.image()),
        ("vmdk", corpus_vmdk.stream()),
        ("vhdx", corpus_vhdx.samples()["disk.vhdx"]),
    ],
    ids=["vdi", "vhd", "vhd fixed", "vmdk", "vmdk stream", "vhdx"],
)
def test_other_disks(form: str, data: bytes, tmp_path: Path) -> None:
    path, raw = tmp_path / "disk", tmp_path / "raw"
    path.write_bytes(data)
    qemu_img("convert", "-f", form, "-O", "raw", path, raw)
    with open_image(path) as image:
        assert image.read(0, image.virtual_size) == raw.read_bytes()
        assert {extent.kind.value for extent in image.extents()} >= {"data"}


def test_zip(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    for data in (corpus_zip.image(), corpus_zip.zip64()):
        path.write_bytes(data)
        subprocess.run(["unzip", "-tqq", path], check=True)
        with zipfile.ZipFile(path) as archive:
            assert archive.read("hello.txt") == corpus_zip.DATA
        with open_image(path) as image:
            assert (image.format_name, image.metadata()["entries"]) == ("zip", 1)


def test_iso(tmp_path: Path) -> None:
    path = tmp_path / "disc.iso"
    path.write_bytes(corpus_iso.image())
    done = subprocess.run(["isoinfo", "-d", "-i", path], capture_output=True, text=True, check=False)
    assert "Volume id: CORPUS" in done.stdout
    assert "Eltorito validation header" in done.stdout
    with open_image(path) as image:
        assert image.metadata()["elTorito"][0]["bootable"]


def test_grafts(tmp_path: Path) -> None:
    """Laid out by hand from docs/format.md, and yet sound to the reader: the document is complete."""
    record = lay.record(corpus_record.PARTS)
    for name, data, original in (
        ("disc.iso", corpus_iso.grafted(), corpus_iso.image()),
        ("disk.img", corpus_record.trailer(record), corpus_record.DISK),
    ):
        path = tmp_path / name
        path.write_bytes(data)
        with open_image(path) as image:
            assert image.locate().state is GraftState.OK
            assert open_graft(image).format_problem() is None
        detach_image(path)
        assert path.read_bytes() == original


def test_sidecar(tmp_path: Path) -> None:
    path, side = tmp_path / "disk.img", tmp_path / "disk.img.vmgraft"
    path.write_bytes(corpus_record.DISK)
    side.write_bytes(corpus_record.sidecar(lay.record(corpus_record.PARTS)))
    with open_image(path) as image:
        assert open_graft(image).format_problem() is None
    detach_image(path)
    assert not side.exists()
