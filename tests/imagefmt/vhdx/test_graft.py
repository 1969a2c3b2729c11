"""Attach and detach on images of the real qemu-img, what QEMU's operations leave of a graft, and the states."""

import hashlib
import struct
import subprocess
import time

import pytest
from imagefmt_helpers import TREE, attach, content_of, flip, problem_of, sample_sections, state_of
from vhdx_testkit import (
    BAT_AT,
    GRAFT,
    HEADERS,
    MIB,
    TABLES,
    disk,
    entry,
    get,
    header,
    make,
    metadata,
    put,
    qemu_check,
    qemu_content,
    qemu_io,
    run,
    sealed,
    set_log_guid,
    simple,
    table,
)

from vmgraft.errors import FileError, GraftFormatError, ImageInUseError, NoGraftError, NoRoomError, UnsupportedError
from vmgraft.imagefmt.blob import BytesBlob
from vmgraft.imagefmt.contract import GraftState, Placement
from vmgraft.imagefmt.graft import detach_image, open_graft, open_image
from vmgraft.imagefmt.record import Section, SectionKind
from vmgraft.imagefmt.sidecar import sidecar_path

VARIANTS = {
    "dynamic, 1 MiB": ("64M", "block_size=1M"),
    "dynamic, 8 MiB": ("64M",),
    "dynamic, 256 MiB": ("6M", "block_size=256M"),
    "not zeroed": ("64M", "block_state_zero=off"),
    "fixed": ("6M", "subformat=fixed"),
    "long log": ("64M", "log_size=4M"),
}


@pytest.fixture
def path(tmp_path):
    return simple(tmp_path / "disk.vhdx")


def rows(path, slot=0):
    """The region table, read independently of the package."""
    (count,) = struct.unpack("<I", get(path, TABLES[slot] + 8, 4))
    return list(struct.iter_unpack("<16sQII", get(path, TABLES[slot] + 16, 32 * count)))


def current_header(path):
    headers = [get(path, offset, 4096) for offset in HEADERS]
    return max(headers, key=lambda raw: struct.unpack("<Q", raw[8:16]))


def fingerprint(path):
    """Size and SHA-256 of a file that may be long."""
    with path.open("rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()


def as_bytes(path):
    """The file, but for what QEMU draws at random or counts: headers and log."""
    data = bytearray(path.read_bytes())
    length, offset = struct.unpack("<IQ", current_header(path)[68:80])
    for start, end in ((HEADERS[0], HEADERS[0] + 4096), (HEADERS[1], HEADERS[1] + 4096), (offset, offset + length)):
        data[start:end] = bytes(end - start)
    return bytes(data)


@pytest.mark.parametrize(
    ("variant", "placement"),
    [*((variant, Placement.INLINE) for variant in VARIANTS), ("dynamic, 8 MiB", Placement.SIDECAR)],
)
def test_there_and_back(tmp_path, variant, placement):
    path = make(tmp_path / "disk.vhdx", *VARIANTS[variant])
    qemu_io(path, "write -P 7 1M 300k", "write -P 9 5M 64k")
    original, content = fingerprint(path), qemu_content(path)
    before = struct.unpack("<Q16s16s", current_header(path)[8:48])
    located = attach(path, placement)
    assert located.state is GraftState.OK
    assert located.locator.placement is placement
    assert located.locator.tree_digest == TREE
    assert rows(path) == rows(path, 1)
    assert [(guid, length, required) for guid, _, length, required in rows(path)[2:]] == [(GRAFT, MIB, 0)]
    assert rows(path)[-1][1] + MIB == path.stat().st_size
    sequence, file_write, data_write = struct.unpack("<Q16s16s", current_header(path)[8:48])
    assert sequence == before[0] + 2
    assert file_write != before[1]  # a new one for every change of the file
    assert data_write == before[2]  # the guest's data are the same
    qemu_check(path)
    assert qemu_content(path) == content
    assert problem_of(path) is None
    with open_image(path) as image:
        assert image.read(0, image.virtual_size) == content
        assert open_graft(image).envelopes() == (sample_sections()[0].raw,)
    detach_image(path)
    assert fingerprint(path) == original
    assert not sidecar_path(path).exists()


IN_PLACE = {
    "write": lambda path: qemu_io(path, "write -P 3 100k 5k", "write -P 4 2M 1M"),
    "flush": lambda path: qemu_io(path, "flush"),
    "write zeros": lambda path: qemu_io(path, "write -z 64k 128k"),
    "check": lambda path: run("qemu-img", "check", "-r", "all", "-f", "vhdx", path),
    "bench": lambda path: run("qemu-img", "bench", "-q", "-w", "-c", "20", "-f", "vhdx", path),
    "convert into": lambda path: run("qemu-img", "convert", "-n", "-S", "0", "-O", "vhdx", path.with_name("src"), path),
    "open for writing": lambda path: run("qemu-io", "-f", "vhdx", "-c", "read 0 4k", path),
}  # fmt: skip


@pytest.mark.parametrize(
    ("operation", "placement"),
    [*((operation, Placement.INLINE) for operation in IN_PLACE), ("write", Placement.SIDECAR)],
)
def test_operations_commute_with_attach(tmp_path, operation, placement):
    """detach(op(attach(x))) == op(x), byte for byte but for headers and log, which QEMU fills with random GUIDs."""
    path = make(tmp_path / "disk.vhdx", "8M", "block_size=8M")
    qemu_io(path, "write -P 7 0 64k")
    qemu_io(make(tmp_path / "src", "8M"), "write -P 1 0 8M")
    original = path.read_bytes()
    IN_PLACE[operation](path)
    expected, content = as_bytes(path), qemu_content(path)
    path.write_bytes(original)
    attach(path, placement)
    IN_PLACE[operation](path)
    assert state_of(path) is GraftState.OK
    assert problem_of(path) is None
    detach_image(path)
    assert as_bytes(path) == expected
    assert qemu_content(path) == content
    qemu_check(path)


@pytest.mark.parametrize("placement", [Placement.INLINE, Placement.SIDECAR])
def test_blocks_allocated_behind_the_graft(path, placement):
    """The one thing that detach cannot take back: the region's place stays in the file, unused and zero."""
    attach(path, placement)
    region = rows(path)[-1][1]
    qemu_io(path, "write -P 3 1M 4k", "write -P 4 3M 1M")
    assert path.stat().st_size == region + 3 * MIB
    with open_image(path) as image:
        located = image.locate()
        assert located.state is GraftState.OK
        assert "detach will leave 1 MiB" in located.detail
        assert open_graft(image).format_problem() is None
    content = qemu_content(path)
    assert content_of(path) == content
    detach_image(path)
    assert path.stat().st_size == region + 3 * MIB
    assert get(path, region, MIB) == bytes(MIB)
    assert len(rows(path)) == len(rows(path, 1)) == 2
    qemu_check(path)
    assert qemu_content(path) == content_of(path) == content
    assert state_of(path) is GraftState.NONE
    slack = path.read_bytes()
    attach(path, placement)
    detach_image(path)
    assert path.read_bytes() == slack


def test_headers_that_qemu_wrote_are_not_put_back(path):
    attach(path, Placement.INLINE)
    qemu_io(path, "write -P 5 0 4k")
    sequence, guid = struct.unpack("<Q16s", current_header(path)[8:32])
    detach_image(path)
    after, other = struct.unpack("<Q16s", current_header(path)[8:32])
    assert after == sequence + 2
    assert other != guid


def test_a_graft_is_dropped_by_convert(path, tmp_path):
    attach(path, Placement.INLINE)
    run("qemu-img", "convert", "-O", "vhdx", path, tmp_path / "copy.vhdx")
    assert state_of(tmp_path / "copy.vhdx") is GraftState.NONE
    assert content_of(tmp_path / "copy.vhdx") == content_of(path)


@pytest.mark.parametrize("sparse", [False, True])
def test_a_last_block_that_the_file_holds_in_part(tmp_path, sparse):
    """QEMU counts such a block in full when it looks for overlaps: the region must lie behind that."""
    path = disk(tmp_path / "disk.vhdx", [entry(4 * MIB)], [b"x" * MIB], size=MIB + 512, block=256 * MIB)
    path.open("r+b").truncate(4 * MIB + (MIB + 512 if sparse else 3 * MIB + 77))
    original = fingerprint(path)
    qemu_check(path)
    attach(path, Placement.INLINE)
    assert rows(path)[-1][1] == 260 * MIB
    qemu_check(path)
    detach_image(path)
    assert fingerprint(path) == original


def test_room(path):
    original = path.read_bytes()
    with open_image(path) as image:
        room = image.room()
    assert room.inline == 64 * MIB - 16384
    many = tuple((bytes([n]) * 16, (n + 8) * MIB, MIB, 0) for n in range(1, 14))
    many = table((*many, *rows(path)))
    for offset in TABLES:
        put(path, offset, many)
    with open_image(path) as image:
        room = image.room()
        assert (room.inline, "14 entries" in room.reason) == (0, True)
    with pytest.raises(NoRoomError, match="14 entries"):
        attach(path, Placement.AUTO)
    path.write_bytes(original)
    put(path, TABLES[1] + 100, b"damage")
    with pytest.raises(NoRoomError, match="two copies"):
        attach(path, Placement.AUTO)
    assert get(path, TABLES[1] + 100, 6) == b"damage"


def grow_record(path, size, placement):
    """Attach a record of exactly ``size`` bytes, by the format's own contract: no need for it to make sense."""
    with open_image(path, writable=True) as image:
        record = BytesBlob(bytes(range(256)) * (size // 256) + bytes(size % 256))
        located = image.attach(lambda _undo: record, placement, TREE)
        return located.state, located.locator.placement


def test_the_longest_inline_record(path):
    original, longest = path.read_bytes(), 64 * MIB - 16384
    with pytest.raises(NoRoomError, match="does not fit"):
        grow_record(path, longest + 1, Placement.INLINE)
    assert path.read_bytes() == original
    assert grow_record(path, longest, Placement.AUTO) == (GraftState.OK, Placement.INLINE)
    assert rows(path)[-1][2] == 64 * MIB
    qemu_check(path)
    with open_image(path, writable=True) as image:
        image.detach(image.recovery_undo())
    assert path.read_bytes() == original
    assert grow_record(path, longest + 1, Placement.AUTO) == (GraftState.OK, Placement.SIDECAR)
    with open_image(path, writable=True) as image:
        image.detach(image.recovery_undo())
    assert path.read_bytes() == original


# --- states --------------------------------------------------------------------------------------------------------


@pytest.fixture
def grafted(path):
    attach(path, Placement.INLINE, [*sample_sections(), Section(SectionKind.FILES, bytes(range(256)) * 40)])
    return path


def test_states_of_a_damaged_record(grafted):
    region = rows(grafted)[-1][1]
    original = simple(grafted.with_name("original.vhdx")).read_bytes()
    kept = grafted.read_bytes()
    flip(grafted, region + 16384 + 3000)
    assert state_of(grafted) is GraftState.OVERWRITTEN
    grafted.write_bytes(kept)
    flip(grafted, region + 16384 + 70)  # the record's own section table: UNDO comes from the region's head
    assert state_of(grafted) is GraftState.OVERWRITTEN
    detach_image(grafted)
    assert grafted.read_bytes() == original


@pytest.mark.parametrize(
    ("offset", "detail"),
    [(10, "locator"), (150, "note"), (600, "UNDO"), (900_000, "another program wrote")],
)
def test_states_of_a_damaged_region(grafted, offset, detail):
    original = simple(grafted.with_name("original.vhdx")).read_bytes()
    flip(grafted, rows(grafted)[-1][1] + offset)
    with open_image(grafted) as image:
        located = image.locate()
        assert located.state is GraftState.DAMAGED
        assert detail in located.detail
        assert image.read(0, 5) == b"first"
    if offset == 10:  # without a locator nothing says which bytes are ours
        with pytest.raises(GraftFormatError, match="lost"):
            detach_image(grafted)
    else:
        detach_image(grafted)
        assert grafted.read_bytes() == original


@pytest.mark.parametrize(
    ("left", "state"), [(100, GraftState.DAMAGED), (17000, GraftState.CUT), (MIB - 1, GraftState.CUT)]
)
def test_states_of_a_file_that_was_cut(grafted, left, state):
    region = rows(grafted)[-1][1]
    with grafted.open("r+b") as file:
        file.truncate(region + left)
    assert state_of(grafted) is state
    assert content_of(grafted)
    if state is GraftState.CUT:
        attach(grafted, Placement.INLINE)
        assert state_of(grafted) is GraftState.OK


def test_a_file_that_grew_by_bytes_of_nobody(grafted):
    original = simple(grafted.with_name("original.vhdx")).read_bytes()
    with grafted.open("ab") as file:
        file.write(b"x" * 5000)
    with open_image(grafted) as image:
        assert image.locate().state is GraftState.GROWN
        assert "5000 bytes" in image.locate().detail
    detach_image(grafted)
    data = grafted.read_bytes()
    assert data[-5000:] == b"x" * 5000
    assert data[: len(original)] == original
    assert not any(data[len(original) : -5000])


def test_a_region_that_another_program_dropped(grafted):
    """Its entry taken out of both tables, and a FileWriteGuid that is not ours: the record can still be had."""
    original = simple(grafted.with_name("original.vhdx")).read_bytes()
    for offset in TABLES:
        put(grafted, offset, table())
    put(grafted, HEADERS[0], header(99, file_guid=b"Z" * 16))
    kept = grafted.read_bytes()
    with open_image(grafted) as image:
        located = image.locate()
        assert located.state is GraftState.ORPHANED
        assert located.record.sha256 == located.locator.record_sha256
    with open_image(grafted, writable=True) as image:
        assert not image.recovered
        assert image.locate().state is GraftState.ORPHANED
    assert grafted.read_bytes() == kept
    attach(grafted, Placement.SIDECAR)
    assert state_of(grafted) is GraftState.OK
    detach_image(grafted)
    assert state_of(grafted) is GraftState.NONE
    assert grafted.stat().st_size == len(original)
    grafted.write_bytes(kept)
    detach_image(grafted)
    assert grafted.read_bytes()[MIB:] == original[MIB:]


def test_the_first_copy_of_the_table_counts(grafted):
    put(grafted, TABLES[1], table())
    assert state_of(grafted) is GraftState.OK
    detach_image(grafted)
    assert grafted.read_bytes() == simple(grafted.with_name("original.vhdx")).read_bytes()


def test_a_graft_listed_only_in_the_other_copy_is_cleared_away(grafted):
    """As a kill between two writes of detach leaves it, here with a block behind the region besides."""
    qemu_io(grafted, "write -P 3 1M 4k")
    content = qemu_content(grafted)
    both = [get(grafted, offset, 512) for offset in HEADERS]
    detach_image(grafted)
    done = [get(grafted, offset, 512) for offset in HEADERS]
    assert both != done
    grafted2 = simple(grafted.with_name("again.vhdx"))
    attach(grafted2, Placement.INLINE, [*sample_sections(), Section(SectionKind.FILES, bytes(range(256)) * 40)])
    put(grafted2, TABLES[0], table())
    assert state_of(grafted2) is GraftState.NONE
    with open_image(grafted2, writable=True) as image:
        assert image.recovered
    assert grafted2.read_bytes() == simple(grafted.with_name("original.vhdx")).read_bytes()
    assert content_of(grafted) == content


def test_states_of_a_sidecar(path, tmp_path):
    original = path.read_bytes()
    attach(path, Placement.SIDECAR)
    sidecar = sidecar_path(path)
    kept = sidecar.read_bytes()
    sidecar.unlink()
    assert state_of(path) is GraftState.NO_RECORD
    detach_image(path)
    assert path.read_bytes() == original
    sidecar.write_bytes(kept)
    assert state_of(path) is GraftState.ORPHANED
    detach_image(path)
    assert not sidecar.exists()
    attach(path, Placement.SIDECAR)
    sidecar.write_bytes(kept[:-1])
    assert state_of(path) is GraftState.CUT


def test_the_sidecar_of_another_image_is_left_alone(path, tmp_path):
    other = simple(tmp_path / "other.vhdx")
    attach(other, Placement.SIDECAR, sample_sections(64))
    attach(path, Placement.SIDECAR)
    strange = sidecar_path(other).read_bytes()
    sidecar_path(path).write_bytes(strange)
    assert state_of(path) is GraftState.STALE
    with open_image(path, writable=True) as image:
        image.detach(image.recovery_undo())
    assert sidecar_path(path).read_bytes() == strange


# --- what must not happen ------------------------------------------------------------------------------------------


def test_guest_data_that_look_like_a_graft_are_not_one(path):
    """A block may hold a grafted image: nothing that the block table uses is taken for a region left over."""
    attach(path, Placement.INLINE)
    region = get(path, rows(path)[-1][1], MIB)
    detach_image(path)
    put(path, 5 * MIB, region)  # the last block of the file is guest data now
    content = qemu_content(path)
    assert state_of(path) is GraftState.NONE
    with open_image(path, writable=True) as image:
        assert not image.recovered
    assert content_of(path) == content
    put(path, 6 * MIB, region)  # behind the last block, where it says it was made: that is ours
    with open_image(path) as image:
        assert image.metadata()["interruptedChange"]


def test_undo_cannot_cut_off_the_disk(path):
    """A region whose locator and note say that the original was shorter than its own blocks."""
    original = path.read_bytes()
    attach(path, Placement.INLINE)
    with open_image(path, writable=True) as image:
        undo = image.recovery_undo()
        with pytest.raises(GraftFormatError, match="UNDO"):
            image.detach(type(undo)(file_size=5 * MIB, patches=undo.patches))
    detach_image(path)
    assert path.read_bytes() == original


def test_a_log_to_replay_refuses_attach_and_detach(path):
    from vhdx_testkit import log_entry

    attach(path, Placement.INLINE)
    set_log_guid(path, b"L" * 16)
    put(path, *log_entry(b"L" * 16, page=get(path, BAT_AT, 4096), file_size=path.stat().st_size))
    kept = path.read_bytes()
    with pytest.raises(UnsupportedError, match="log"):
        detach_image(path)
    with pytest.raises(UnsupportedError, match="log"):
        content_of(path)
    assert state_of(path) is GraftState.OK
    assert path.read_bytes() == kept
    run("qemu-img", "check", "-r", "all", "-f", "vhdx", path)
    assert problem_of(path) is None
    detach_image(path)
    with pytest.raises(NoGraftError):
        detach_image(path)


def test_sequence_numbers_at_their_end(path):
    put(path, HEADERS[0], header((1 << 64) - 2))
    with pytest.raises(UnsupportedError, match="sequence number"):
        attach(path, Placement.INLINE)


def test_an_image_in_use(path):
    attach(path, Placement.INLINE)
    user = subprocess.Popen(["qemu-io", "-f", "vhdx", str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 20
        while True:
            try:
                with open_image(path, writable=True):
                    pass
            except ImageInUseError:
                break
            assert time.monotonic() < deadline
            time.sleep(0.02)
        with pytest.raises(ImageInUseError):
            detach_image(path)
    finally:
        user.communicate(b"quit\n")
    with open_image(path, writable=True):
        refused = run("qemu-io", "-f", "vhdx", "-c", "write 0 512", path, check=False)
    assert "lock" in refused.stderr + refused.stdout
    detach_image(path)


def test_other_readers_read_on(path, tmp_path):
    for placement in (Placement.INLINE, Placement.SIDECAR):
        attach(path, placement)
        run("7z", "x", "-y", f"-o{tmp_path / placement}", path)
        (found,) = (tmp_path / placement).iterdir()
        assert found.read_bytes() == content_of(path)
        detach_image(path)


def test_a_region_too_far_out_is_refused(path):
    put(path, 3 * MIB, metadata(4 * MIB))
    far = (b"far".ljust(16), 200 << 40, MIB, 0)
    for offset in TABLES:
        put(path, offset, table((*rows(path)[:2], far)))
    with pytest.raises(NoRoomError, match="too far out"):
        attach(path, Placement.INLINE)


def test_a_foreign_entry_behind_ours_stays(grafted):
    """Another program added a region after attach: only our entry goes, and the order of the others stays."""
    size = grafted.stat().st_size
    foreign = (b"other program's.", size, MIB, 0)
    mine = rows(grafted)
    for offset in TABLES:
        put(grafted, offset, table((*mine, foreign)))
    put(grafted, size + MIB - 1, b"\0")
    assert state_of(grafted) is GraftState.OK
    detach_image(grafted)
    assert rows(grafted) == rows(grafted, 1) == [*mine[:2], foreign]
    assert grafted.stat().st_size == size + MIB
    qemu_check(grafted)
    assert sealed(get(grafted, TABLES[0], 65536)) == get(grafted, TABLES[0], 65536)


def test_not_a_file_error_in_disguise(path):
    attach(path, Placement.INLINE)
    with pytest.raises(FileError, match="read-only"), open_image(path) as image:
        image.detach(image.recovery_undo())
