"""Archives as content: their bytes, what is recognised as one, and what is not."""

import json
import struct
import zipfile

import pytest
from imagefmt_helpers import attach, iso_bytes, sample_sections, tool
from zip_testkit import KINDS, MARK, archive, by_hand, central, end, end64, local, noise

from vmgraft.errors import MalformedImageError, NoRoomError, UnsupportedError, UsageError
from vmgraft.imagefmt.contract import GraftState, Kind, Opening, Placement
from vmgraft.imagefmt.graft import detach_image, open_graft, open_image
from vmgraft.imagefmt.record import Section, SectionKind
from vmgraft.imagefmt.registry import detect


@pytest.mark.parametrize("kind", KINDS)
def test_content_is_the_file(tmp_path, kind):
    path = tmp_path / "a.jar"
    path.write_bytes(KINDS[kind])
    with open_image(path) as image:
        assert image.format_name == "zip"
        assert not image.is_disk
        assert image.virtual_size == len(KINDS[kind])
        assert image.read(0, 1 << 30) == KINDS[kind]
        assert image.read(7, 9) == KINDS[kind][7:16]
        assert image.read(len(KINDS[kind]), 1) == b""
        assert sum(extent.length for extent in image.extents()) == len(KINDS[kind])
        assert image.locate().state is GraftState.NONE
        assert json.dumps(image.metadata())
        with pytest.raises(UsageError):
            image.read(-1, 1)
        if kind == "zip64, extensible":
            return  # more than Python's zipfile knows
        with zipfile.ZipFile(path) as outside:
            assert image.metadata()["entries"] == len(outside.infolist())


def test_facts(tmp_path):
    path = tmp_path / "a.jar"
    expected = {"launcher, not counted": (28, False), "launcher, counted": (0, False), "zip64": (0, True)}
    for kind, (prefix, zip64) in expected.items():
        path.write_bytes(KINDS[kind])
        with open_image(path) as image:
            assert (image.metadata()["prefixSize"], image.metadata()["zip64"]) == (prefix, zip64)
    path.write_bytes(KINDS["comment"])
    with open_image(path) as image:
        assert image.metadata()["commentSize"] == 9


def test_an_empty_archive_is_read_and_not_grafted(tmp_path):
    path = tmp_path / "a.zip"
    path.write_bytes(end(0, 0, 0))
    with open_image(path) as image:
        assert image.read(0, 100) == end(0, 0, 0)
        assert image.metadata()["entries"] == 0
    with pytest.raises(UnsupportedError, match="empty"):
        attach(path, Placement.AUTO)
    assert path.read_bytes() == end(0, 0, 0)


def test_what_is_recognised(tmp_path):
    archive_bytes, launcher = archive(), by_hand(prefix=b"#!/bin/sh\n")
    boot = bytearray(archive({"a": noise(1000)}, method=0))
    boot[510:512] = b"\x55\xaa"  # a disk may begin with any bytes, and ends its first sector so
    iso = iso_bytes(tail=end(0, 0, 0))
    cases = [
        ("a.zip", archive_bytes, "zip"),
        ("a.bin", archive_bytes, "zip"),
        ("a.docx", archive_bytes, "zip"),
        ("a.jar", launcher, "zip"),
        ("a.JAR", launcher, "zip"),
        ("a.war", launcher, "zip"),
        ("a.img", launcher, "raw"),
        ("a.sh", launcher, "raw"),
        ("b.img", bytes(boot), "raw"),
        ("b.zip", bytes(boot), "zip"),
        ("c.jar", b"no archive" * 100, "raw"),
        ("c.iso", iso, "iso9660"),
    ]
    for name, data, expected in cases:
        path = tmp_path / name
        path.write_bytes(data)
        assert detect(path).name == expected, name
    with open_image(tmp_path / "a.img", Opening(format="zip")) as image:
        assert image.metadata()["prefixSize"] == 10


def test_other_containers_named_like_archives(tmp_path):
    """A container that also ends like an archive is refused, and says how to go on."""
    path = tmp_path / "a.zip"
    tool("qemu-img", "create", "-q", "-f", "qcow2", path, "1M")
    assert detect(path).name == "qcow2"
    with path.open("ab") as file:
        file.write(by_hand(prefix=b"x"))
    with pytest.raises(UnsupportedError, match="qcow2 and zip") as caught:
        open_image(path)
    assert "--image-format" in caught.value.hint


def test_a_launcher_in_several_files_is_not_taken_for_a_disk(tmp_path):
    path = tmp_path / "a.jar"
    path.write_bytes(b"#!/bin/sh\n" + end(1, 0, 0, disk=3))
    with pytest.raises((UnsupportedError, MalformedImageError)):
        open_image(path)


def large_archive(path, *, wide):
    """A sparse archive with a 5 GiB hole as its first entry, or with offsets that just fit into 32 bits."""
    size = 5 << 30 if wide else MARK - (8 << 20)
    sizes = struct.pack("<HHQQ", 1, 16, size, size)
    text = b"behind the hole\n"
    first = local(b"hole", b"", sizes=(MARK, MARK) if wide else (size, size), extra=sizes if wide else b"")
    second_at = len(first) + size
    offset64 = struct.pack("<HHQ", 1, 8, second_at)
    directory = central(b"hole", b"", 0, sizes=(MARK, MARK) if wide else (size, size), extra=sizes if wide else b"")
    directory += central(b"text", text, MARK if wide else second_at, extra=offset64 if wide else b"")
    start = second_at + len(local(b"text", text))
    with path.open("wb") as file:
        file.write(first)
        file.seek(second_at)
        file.write(local(b"text", text) + directory)
        if wide:
            file.write(end64(2, len(directory), start, start + len(directory)))
            file.write(end(0xFFFF, MARK, MARK))
        else:
            file.write(end(2, len(directory), start))
    return text


def test_an_archive_over_4_gib(tmp_path):
    path = tmp_path / "large.zip"
    text = large_archive(path, wide=True)
    size = path.stat().st_size
    attach(path, Placement.INLINE)
    with open_image(path) as image:
        assert image.virtual_size == size > 5 << 30
        assert image.metadata()["zip64"]
        runs = [extent for extent in image.extents() if extent.kind is Kind.DATA]
        assert sum(extent.length for extent in runs) < 1 << 20
        assert open_graft(image).format_problem() is None
        assert len(image.read(size - 5, 100)) == 5
    assert zipfile.ZipFile(path).read("text") == text
    assert tool("unzip", "-p", path, "text").stdout == text.decode()
    assert tool("bsdtar", "-xOf", path, "text").stdout == text.decode()
    assert "text" in tool("7z", "l", path).stdout
    detach_image(path)
    assert path.stat().st_size == size


def test_an_archive_just_below_4_gib(tmp_path):
    path = tmp_path / "large.zip"
    text = large_archive(path, wide=False)
    size = path.stat().st_size
    with open_image(path) as image:
        room = image.room().inline
        assert (8 << 20) - 20_000 < room < 8 << 20
    large = [*sample_sections(), Section(SectionKind.FILES, noise(8 << 20))]
    with pytest.raises(NoRoomError, match="4 GiB"):
        attach(path, Placement.INLINE, large)
    assert path.stat().st_size == size
    assert attach(path, Placement.AUTO, large).locator.placement is Placement.SIDECAR
    assert zipfile.ZipFile(path).read("text") == text
    detach_image(path)
    assert path.stat().st_size == size
    fitting = [*sample_sections(), Section(SectionKind.FILES, noise(room - 6000))]
    assert attach(path, Placement.AUTO, fitting).locator.placement is Placement.INLINE
    assert zipfile.ZipFile(path).read("text") == text
    detach_image(path)
    assert path.stat().st_size == size
