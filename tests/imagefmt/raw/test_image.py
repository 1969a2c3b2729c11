"""Raw images: sizes, states, and what other programs do to a trailer."""

import os
import struct
from pathlib import Path

import pytest
from imagefmt_helpers import (
    attach,
    content_of,
    digest,
    flip,
    operations_of,
    problem_of,
    state_of,
    tool,
)

from vmgraft.errors import GraftFormatError, NoRoomError, UnsupportedError, UsageError
from vmgraft.imagefmt.contract import GraftState, Kind, Placement
from vmgraft.imagefmt.graft import detach_image, open_image
from vmgraft.imagefmt.record import Section, SectionKind
from vmgraft.imagefmt.sidecar import sidecar_path

MIB = 1 << 20


def noise(size):
    return os.urandom(size)


def trailer_of(path):
    with open_image(path) as image:
        locator = image.locate().locator
    head = -(-locator.file_size // 4096) * 4096
    return head, locator, path.stat().st_size


@pytest.mark.parametrize("size", [1, 511, 512, 513, 4095, 4096, 4097, 100_000, MIB])
def test_every_size_comes_back(tmp_path, size):
    path = tmp_path / "disk.img"
    original = noise(size)
    path.write_bytes(original)
    attach(path, Placement.INLINE)
    head, locator, end = trailer_of(path)
    data = path.read_bytes()
    assert head % 4096 == 0 and end % 4096 == 0
    assert end - size < MIB
    assert data[:size] == original
    assert not any(data[size:head])
    assert data[head : head + 128] == data[-128:]
    assert data[head + 128 : head + 136] == b"VMGRAFT\0"
    assert locator.file_size == size
    with open_image(path) as image:
        assert image.virtual_size == -(-size // 512) * 512
        assert image.read(0, 1 << 30) == original.ljust(image.virtual_size, b"\0")
        assert image.read(size, 600) == bytes(image.virtual_size - size)
        assert image.read(image.virtual_size, 1) == b""
        assert sum(extent.length for extent in image.extents()) == image.virtual_size
    detach_image(path)
    assert path.read_bytes() == original


def test_attach_is_one_write_and_detach_one_truncate(raw_image):
    names = [item.name for item in operations_of(lambda: attach(raw_image, Placement.INLINE))]
    assert names == ["write", "sync"]
    assert [item.name for item in operations_of(lambda: detach_image(raw_image))] == ["truncate", "sync"]


def test_the_room_is_exact(raw_image):
    before = digest(raw_image)
    with open_image(raw_image) as image:
        room = image.room().inline
    overhead = attach(raw_image, Placement.SIDECAR, [Section(SectionKind.FILES, b"")]).record.size
    detach_image(raw_image)
    with pytest.raises(NoRoomError) as caught:
        attach(raw_image, Placement.INLINE, [Section(SectionKind.FILES, noise(room - overhead + 1))])
    assert "sidecar" in caught.value.hint
    assert digest(raw_image) == before
    attach(raw_image, Placement.INLINE, [Section(SectionKind.FILES, noise(room - overhead))])
    assert raw_image.stat().st_size - len(bytes(range(256)) * 40 + b"odd") < MIB
    assert problem_of(raw_image) is None
    detach_image(raw_image)
    assert digest(raw_image) == before


def test_holes_are_reported_and_kept(tmp_path):
    path = tmp_path / "disk.img"
    with open(path, "wb") as file:
        file.truncate(64 * MIB)
        file.seek(32 * MIB)
        file.write(noise(65536))
    blocks = path.stat().st_blocks
    attach(path, Placement.INLINE)
    with open_image(path) as image:
        runs = [(extent.kind, extent.start, extent.length) for extent in image.extents()]
    assert runs == [
        (Kind.HOLE, 0, 32 * MIB),
        (Kind.DATA, 32 * MIB, 65536),
        (Kind.HOLE, 32 * MIB + 65536, 32 * MIB - 65536),
    ]
    assert path.stat().st_blocks < blocks + 200


@pytest.fixture
def grafted(raw_image):
    attach(raw_image, Placement.INLINE)
    return raw_image


def test_cut(grafted, raw_image):
    head, locator, end = trailer_of(grafted)
    whole, original = grafted.read_bytes(), content_of(grafted)
    for size in (head + 128, head + 129, head + 128 + locator.record_size, end - 128, end - 1):
        grafted.write_bytes(whole[:size])
        assert state_of(grafted) is GraftState.CUT
        assert content_of(grafted) == original
        assert "missing" in problem_of(grafted)
        detach_image(grafted)
        assert grafted.read_bytes() == whole[: locator.file_size]


def test_overwritten_record(grafted):
    head, _, _ = trailer_of(grafted)
    flip(grafted, head + 128 + 70)
    assert state_of(grafted) is GraftState.OVERWRITTEN
    assert problem_of(grafted)


@pytest.mark.parametrize("place", ["head", "tail", "padding", "gap"])
def test_overwritten_around_the_record(grafted, place):
    head, locator, end = trailer_of(grafted)
    before = grafted.read_bytes()[: locator.file_size]
    offset = {"head": head, "tail": end - 128, "padding": end - 129, "gap": locator.file_size}[place]
    flip(grafted, offset)
    assert state_of(grafted) is GraftState.DAMAGED
    assert problem_of(grafted)
    detach_image(grafted)
    assert grafted.read_bytes() == before


def test_both_locators_damaged(grafted):
    """The record says by itself how long the original is; with its header gone too nothing is known any more."""
    head, locator, end = trailer_of(grafted)
    whole = grafted.read_bytes()
    for offset in (head + 20, end - 100):
        flip(grafted, offset)
    assert state_of(grafted) is GraftState.DAMAGED
    assert "both locators" in problem_of(grafted)
    detach_image(grafted)
    assert grafted.read_bytes() == whole[: locator.file_size]
    grafted.write_bytes(whole)
    for offset in (head + 20, end - 100, head + 128 + 40):
        flip(grafted, offset)
    damaged = digest(grafted)
    assert state_of(grafted) is GraftState.DAMAGED
    assert "digest" in problem_of(grafted)
    with pytest.raises(GraftFormatError):
        detach_image(grafted)
    assert digest(grafted) == damaged


@pytest.mark.parametrize("how", ["resize", "append", "append much"])
def test_grown(grafted, how):
    original, before = content_of(grafted), grafted.read_bytes()
    if how == "resize":
        tool("qemu-img", "resize", "-q", "-f", "raw", grafted, "3G")
    else:
        with open(grafted, "ab") as file:
            file.write(b"\x11" * (4096 if how == "append" else 900_000))
    assert state_of(grafted) is GraftState.GROWN
    assert content_of(grafted) == original
    assert "grew" in problem_of(grafted)
    with pytest.raises(UsageError, match="would be lost") as caught:
        detach_image(grafted)
    assert str(len(before)) in caught.value.hint
    os.truncate(grafted, len(before))
    assert grafted.read_bytes() == before
    detach_image(grafted)


def test_a_write_into_the_content_leaves_the_graft_alone(grafted):
    tool("qemu-io", "-f", "raw", "-c", "write -P 7 512 512", grafted)
    assert state_of(grafted) is GraftState.OK
    assert content_of(grafted)[512:1024] == b"\7" * 512


def test_metadata(tmp_path, raw_image):
    with open_image(raw_image) as image:
        facts = image.metadata()
    assert facts["partitionTable"] == "none"
    assert facts["fileSize"] == facts["contentSize"] == raw_image.stat().st_size
    assert "recipes" not in facts
    gpt = tmp_path / "gpt.img"
    gpt.write_bytes(bytes(MIB))
    tool("sfdisk", "-q", gpt, stdin="label: gpt\nstart=64\n")
    with open_image(gpt) as image:
        assert image.metadata()["partitionTable"] == "gpt"
    mbr = tmp_path / "mbr.img"
    mbr.write_bytes(bytes(510) + b"\x55\xaa")
    with open_image(mbr) as image:
        assert image.metadata()["partitionTable"] == "mbr"


def test_firmware_is_refused(tmp_path):
    by_name, by_content = tmp_path / "OVMF.FD", tmp_path / "vars.img"
    by_name.write_bytes(bytes(4096))
    by_content.write_bytes(bytes(40) + b"_FVH" + bytes(4096))
    for path in (by_name, by_content):
        with pytest.raises(UnsupportedError, match="firmware"):
            open_image(path)


def test_the_grub_floppy(tmp_path):
    source = Path("/usr/lib/grub-rescue/grub-rescue-floppy.img")
    path = tmp_path / "floppy.img"
    tool("cp", source, path)
    attach(path, Placement.INLINE)
    assert content_of(path) == source.read_bytes()
    detach_image(path)
    assert path.read_bytes() == source.read_bytes()


def test_a_locator_only_counts_where_it_says_it_is(tmp_path, grafted):
    """A grafted image inside another one's file system must not be taken for the outer one's graft."""
    inner = grafted.read_bytes()
    outer = tmp_path / "outer.img"
    outer.write_bytes(noise(8192) + inner)
    with open_image(outer) as image:
        assert image.locate().state is GraftState.NONE
        assert image.virtual_size == -(-(8192 + len(inner)) // 512) * 512
    assert struct.unpack_from("<8s", inner, len(inner) - 128)[0] == b"VMGRAFT\0"


def test_a_stale_sidecar_does_not_hide_a_trailer(grafted):
    sidecar_path(grafted).write_bytes(b"VMGRAFT\0 rubbish")
    assert state_of(grafted) is GraftState.OK


def test_grafts_of_files_within_the_disk_are_not_the_disks_own(tmp_path, iso_image):
    """Records, locators and sidecars of the images that a disk holds, on every kind of boundary in its last MiB."""
    inner = tmp_path / "inner.img"
    inner.write_bytes(noise(5000))
    attach(inner, Placement.INLINE)
    side = tmp_path / "side.img"
    side.write_bytes(noise(5000))
    attach(side, Placement.SIDECAR)
    attach(iso_image, Placement.INLINE)
    disk = bytearray(noise(4 * MIB))
    at = 3 * MIB + 4096
    for data in (iso_image.read_bytes(), inner.read_bytes(), sidecar_path(side).read_bytes()):
        for shift in (0, 512, 2048, 4096 - 128):
            place = at + shift
            disk[place : place + len(data)] = data
            at = -(-(place + len(data)) // 4096) * 4096
    assert at < len(disk)
    outer = tmp_path / "outer.img"
    outer.write_bytes(disk)
    assert state_of(outer) is GraftState.NONE
    attach(outer, Placement.INLINE)
    assert content_of(outer) == disk
    detach_image(outer)
    assert outer.read_bytes() == disk


def test_damaged_locators_are_known_by_their_numbers_or_their_record(grafted):
    whole = grafted.read_bytes()
    head, locator, size = trailer_of(grafted)
    for keep in ("numbers", "record"):
        data = bytearray(whole)
        data[size - 128] ^= 1  # the magic of the second locator
        data[head + (120 if keep == "numbers" else 96)] ^= 1  # its digest, or the content's size
        if keep == "numbers":
            data[locator.record_offset] ^= 1
        grafted.write_bytes(data)
        assert state_of(grafted) is GraftState.DAMAGED, keep
