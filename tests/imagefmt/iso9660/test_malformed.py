"""Malformed ISO images: one clear error with offset and field, in bounded time; facts never raise."""

import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from imagefmt_helpers import SECTOR, TERMINATOR, attach, both, flip, iso_bytes, pvd_bytes

from vmgraft.errors import GraftFormatError, MalformedImageError, VmgraftError
from vmgraft.imagefmt.assemble import build_record
from vmgraft.imagefmt.contract import GraftState, Locator, OpenOptions, Patch, Placement, Undo
from vmgraft.imagefmt.graft import detach_image, open_graft, open_image
from vmgraft.imagefmt.iso9660 import FORMAT
from vmgraft.imagefmt.locator import pack_locator
from vmgraft.imagefmt.record import Section, SectionKind
from vmgraft.imagefmt.undo import pack_undo

PVD = 16 * SECTOR


def changed(offset, data, base=None):
    image = bytearray(iso_bytes() if base is None else base)
    image[offset : offset + len(data)] = data
    return bytes(image)


def with_descriptors(*descriptors):
    return changed(PVD, b"".join(descriptors), iso_bytes(120))


BOOT = (b"\0CD001\x01" + b"EL TORITO SPECIFICATION".ljust(64, b"\0") + struct.pack("<I", 19)).ljust(SECTOR, b"\0")
OTHER = b"\2CD001\x01".ljust(SECTOR, b"\0")

CASES = {
    "no identifier": (changed(PVD + 1, b"CD002"), "volume descriptor.identifier", PVD),
    "identifier lost in the second": (changed(PVD + SECTOR, b"garbage"), "volume descriptor.identifier", PVD + SECTOR),
    "no terminator in the file": (iso_bytes()[: PVD + SECTOR], "volume_space_size", PVD),
    "no terminator within 64": (with_descriptors(pvd_bytes(120), *[OTHER] * 70), "type", PVD + 63 * SECTOR),
    "two primaries": (with_descriptors(pvd_bytes(120), pvd_bytes(120), TERMINATOR), "type", PVD + SECTOR),
    "primary not first": (with_descriptors(OTHER, pvd_bytes(120), TERMINATOR), "type", PVD),
    "terminator first": (with_descriptors(TERMINATOR), "type", PVD),
    "version": (changed(PVD + 6, b"\2"), "version", PVD),
    "volume size in two orders": (changed(PVD + 84, b"\0\0\0\x19"), "volume_space_size", PVD),
    "set size in two orders": (changed(PVD + 120, b"\2"), "volume_set_size", PVD),
    "sequence number in two orders": (changed(PVD + 124, b"\2"), "volume_sequence_number", PVD),
    "block size in two orders": (changed(PVD + 128, b"\0\2"), "logical_block_size", PVD),
    "block size 512": (changed(PVD + 128, both(512, 2)), "logical_block_size", PVD),
    "block size 0": (changed(PVD + 128, both(0, 2)), "logical_block_size", PVD),
    "path table size in two orders": (changed(PVD + 132, b"\2"), "path_table_size", PVD),
    "volume of no blocks": (changed(PVD + 80, both(0, 4)), "volume_space_size", PVD),
    "volume of 17 blocks": (changed(PVD + 80, both(17, 4)), "volume_space_size", PVD),
    "volume larger than the file": (changed(PVD + 80, both(25, 4)), "volume_space_size", PVD),
    "volume of 8 TiB": (changed(PVD + 80, both(0xFFFFFFFF, 4)), "volume_space_size", PVD),
    "file ends in a descriptor": (iso_bytes()[: PVD + 100], "primary volume descriptor", PVD),
}


@pytest.mark.parametrize("case", CASES)
def test_malformed(tmp_path, case):
    data, field, offset = CASES[case]
    path = tmp_path / "disc.iso"
    path.write_bytes(data)
    with pytest.raises(MalformedImageError) as caught:
        FORMAT.open(path, OpenOptions())
    assert caught.value.file == str(path)
    assert caught.value.offset == offset
    assert caught.value.field.startswith(field) or field == "primary volume descriptor"
    if FORMAT.probe(data, len(data)):
        with pytest.raises(MalformedImageError):
            attach(path, Placement.AUTO)
        assert path.read_bytes() == data


CATALOGS = {
    "outside the file": (struct.pack("<I", 0xFFFFFFFF), b"", "cannot be read"),
    "empty": (struct.pack("<I", 19), b"", "cannot be read"),
    "wrong checksum": (struct.pack("<I", 19), b"\1" + bytes(29) + b"\x55\xaa", "checksum"),
    "wrong key": (struct.pack("<I", 19), b"\1" + bytes(29) + b"\x55\xab", "cannot be read"),
}


@pytest.mark.parametrize("case", CATALOGS)
def test_a_bad_boot_catalogue_is_a_fact_not_an_error(tmp_path, case):
    sector, catalog, message = CATALOGS[case]
    image = changed(PVD + SECTOR, BOOT[:71] + sector + BOOT[75:] + TERMINATOR)
    path = tmp_path / "disc.iso"
    path.write_bytes(changed(19 * SECTOR, catalog.ljust(SECTOR, b"\0"), image))
    with open_image(path) as opened:
        assert message in opened.metadata()["elTorito"][0]["problem"]


def test_a_catalogue_full_of_entries_is_bounded(tmp_path):
    validation = bytearray(b"\1" + bytes(29) + b"\x55\xaa")
    struct.pack_into("<H", validation, 28, -(0x01 + 0xAA55) & 0xFFFF)
    entry = b"\x88\0\0\0\0\0\4\0" + struct.pack("<I", 20) + bytes(20)
    path = tmp_path / "disc.iso"
    image = changed(PVD + SECTOR, BOOT + TERMINATOR)
    path.write_bytes(changed(19 * SECTOR, bytes(validation) + entry * 63, image))
    with open_image(path) as opened:
        assert len(opened.metadata()["elTorito"]) == 63


def graft(path, undo, *, locator=None, iso=None):
    """Lay out an inline graft by hand, with whatever UNDO the test wants."""
    original = iso_bytes() if iso is None else iso
    from hashlib import sha256

    record = build_record([Section(SectionKind.UNDO, pack_undo(undo)), Section(SectionKind.ENVELOPE, b"{}")])
    sound = Locator(Placement.INLINE, len(original), len(record), sha256(record).digest(), bytes(32), len(original))
    packed = pack_locator(sound if locator is None else locator(sound))
    data = bytearray(original) + record.ljust(-(-len(record) // SECTOR) * SECTOR, b"\0") + packed.ljust(SECTOR, b"\0")
    data[34035 : 34035 + 128] = packed
    path.write_bytes(bytes(data))
    return path


BLANK = Patch(34035, bytes(128))
FACTS = {"volume_space_size": 24}
SIZE = len(iso_bytes())
BAD_UNDO = {
    "patch elsewhere": Undo(SIZE, (Patch(0, b"evil"),), FACTS),
    "patch of another length": Undo(SIZE, (Patch(34035, bytes(127)),), FACTS),
    "patch that was not blank": Undo(SIZE, (Patch(34035, b"evil" * 32),), FACTS),
    "two patches": Undo(SIZE, (BLANK, Patch(40000, bytes(128))), FACTS),
    "no patch": Undo(SIZE, (), FACTS),
    "no facts": Undo(SIZE, (BLANK,), {}),
    "another volume size": Undo(SIZE, (BLANK,), {"volume_space_size": 23}),
    "another file size": Undo(SIZE - SECTOR, (BLANK,), FACTS),
    "size of nothing": Undo(0, (BLANK,), FACTS),
}


@pytest.mark.parametrize("case", BAD_UNDO)
def test_hostile_undo_is_neither_shown_nor_followed(tmp_path, case):
    path = graft(tmp_path / "disc.iso", BAD_UNDO[case])
    before = path.read_bytes()
    with open_image(path) as image:
        assert image.locate().state is GraftState.DAMAGED
        assert open_graft(image).format_problem()
        content = image.read(0, SIZE)
        assert content[:34035] == iso_bytes()[:34035]
    with pytest.raises(GraftFormatError):
        detach_image(path)
    assert path.read_bytes() == before


def test_the_hand_made_graft_is_sound_otherwise(tmp_path):
    path = graft(tmp_path / "disc.iso", Undo(SIZE, (BLANK,), FACTS))
    with open_image(path) as image:
        assert image.locate().state is GraftState.OK
    detach_image(path)
    assert path.read_bytes() == iso_bytes()


def test_a_locator_that_points_into_the_content(tmp_path):
    from dataclasses import replace

    undo = Undo(SIZE, (BLANK,), FACTS)
    for change in ({"record_offset": 0}, {"record_offset": 34035}, {"file_size": 0}, {"file_size": 1 << 62}):
        path = graft(tmp_path / "disc.iso", undo, locator=lambda sound, change=change: replace(sound, **change))
        with open_image(path) as image:
            assert image.locate().state is not GraftState.OK
            assert image.virtual_size <= path.stat().st_size
            image.read(0, 1 << 40)
        before = path.read_bytes()
        with pytest.raises(VmgraftError):
            detach_image(path)
        assert path.read_bytes() == before


def test_thousands_of_magics_behind_the_volume(tmp_path):
    path = tmp_path / "disc.iso"
    path.write_bytes(iso_bytes() + b"VMGRAFT\0".ljust(SECTOR, b"\1") * 4000 + bytes(SECTOR))
    with open_image(path) as image:
        assert image.locate().state is GraftState.NONE


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.tuples(st.integers(PVD, PVD + 3 * SECTOR), st.binary(min_size=1, max_size=9)), max_size=6),
    st.binary(max_size=64),
)
def test_any_descriptors(tmp_path, changes, catalog):
    image = bytearray(changed(PVD + SECTOR, BOOT + TERMINATOR))
    image[19 * SECTOR : 19 * SECTOR + len(catalog)] = catalog
    for offset, data in changes:
        image[offset : offset + len(data)] = data
    path = tmp_path / "disc.iso"
    path.write_bytes(bytes(image))
    try:
        with FORMAT.open(path, OpenOptions()) as opened:
            opened.metadata()
            opened.locate()
            assert len(opened.read(0, 1 << 40)) == opened.virtual_size
    except VmgraftError:
        pass


@pytest.mark.parametrize("place", ["before the record", "behind the record"])
def test_bytes_hidden_in_the_padding(tmp_path, place):
    path = tmp_path / "disc.iso"
    path.write_bytes(iso_bytes(tail=b"odd"))
    locator = attach(path, Placement.INLINE).locator
    start = locator.file_size if place == "before the record" else locator.record_offset + locator.record_size
    flip(path, start + 1)
    with open_image(path) as image:
        assert image.locate().state is GraftState.DAMAGED
        assert "before or behind" in open_graft(image).format_problem()


def test_a_volume_that_reaches_behind_the_content(tmp_path):
    """No original can have been like that: readers of the grafted file would see the record as part of the volume."""
    larger = iso_bytes(blocks=26)[: 24 * SECTOR]
    path = graft(tmp_path / "disc.iso", Undo(SIZE, (BLANK,), {"volume_space_size": 26}), iso=larger)
    with open_image(path) as image:
        assert image.locate().state is GraftState.DAMAGED
        assert "larger than the original" in open_graft(image).format_problem()
    with pytest.raises(GraftFormatError, match="larger"):
        detach_image(path)


@pytest.mark.parametrize("cut", [0, 1, SECTOR, 1 << 29])
def test_a_record_of_a_gibibyte_that_is_a_hole(tmp_path, cut):
    """A sparse file may claim it; nobody holds it in memory."""
    import os
    import tracemalloc

    path = tmp_path / "disc.iso"
    claim = Locator(Placement.INLINE, SIZE, 1 << 30, bytes(32), bytes(32), SIZE)
    image = bytearray(iso_bytes())
    image[34035 : 34035 + 128] = pack_locator(claim)
    path.write_bytes(image)
    with open(path, "r+b") as file:
        file.seek(SIZE + (1 << 30))
        file.write(pack_locator(claim).ljust(SECTOR, b"\0"))
    os.truncate(path, path.stat().st_size - cut)
    tracemalloc.start()
    try:
        with open_image(path) as opened:
            assert opened.locate().state is (GraftState.CUT if cut else GraftState.DAMAGED)
            assert opened.locate().record.size >= 1 << 29
            assert open_graft(opened).format_problem()
            opened.metadata()
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()
