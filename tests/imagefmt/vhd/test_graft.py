"""Attach and detach: the original comes back, other programs read on, every state is told, no crash hurts."""

import json
import shutil

import pytest
from imagefmt_helpers import (
    attach,
    content_of,
    digest,
    operations_of,
    problem_of,
    run_and_die,
    sample_sections,
    state_of,
    tool,
)
from vhd_testkit import HEADER, POINTER, dynamic, fixed, footer, header, make, noise, sample, summed, write

from vmgraft.errors import (
    FileError,
    GraftFormatError,
    ImageInUseError,
    MalformedImageError,
    NoRoomError,
    UnsupportedError,
)
from vmgraft.imagefmt.commit import Writer
from vmgraft.imagefmt.contract import GraftState, Placement
from vmgraft.imagefmt.graft import attach_sections, detach_image, open_graft, open_image
from vmgraft.imagefmt.sidecar import sidecar_path
from vmgraft.imagefmt.tree import digest_content
from vmgraft.imagefmt.vhd import graft

AUTO = Placement.AUTO
KINDS = {"dynamic": sample(), "fixed": fixed(noise(8192)), "fixed, 511": fixed(noise(8192), length=511)}


@pytest.fixture(params=list(KINDS))
def vhd(request, tmp_path):
    path = tmp_path / "disk.vhd"
    path.write_bytes(KINDS[request.param])
    return path


def is_grafted(path, pristine):
    return state_of(path) is GraftState.OK and problem_of(path) is None and content_of(path) == pristine


@pytest.mark.parametrize("placement", [AUTO, Placement.SIDECAR])
def test_attach_and_detach(vhd, placement):
    before, pristine = vhd.read_bytes(), content_of(vhd)
    located = attach(vhd, placement)
    assert located.locator.placement is Placement.SIDECAR
    assert is_grafted(vhd, pristine)
    after = vhd.read_bytes()
    changed = [at for at in range(len(before)) if before[at] != after[at]]
    assert len(after) == len(before)
    if before[:8] == b"conectix":
        pointer = range(HEADER + POINTER, HEADER + POINTER + 24)
        assert set(changed) <= {*range(HEADER + 36, HEADER + 40), *pointer}
        assert after[HEADER : HEADER + 1024] == summed(after[HEADER : HEADER + 1024], 36)
    else:
        assert changed == []
    detach_image(vhd)
    assert vhd.read_bytes() == before
    assert not sidecar_path(vhd).exists()


def test_there_is_no_room(vhd):
    before = vhd.read_bytes()
    with open_image(vhd) as image:
        assert image.room().inline == 0
        assert image.room().reason
    with pytest.raises(NoRoomError, match="room") as caught:
        attach(vhd, Placement.INLINE)
    assert "sidecar" in caught.value.hint
    assert vhd.read_bytes() == before
    assert not sidecar_path(vhd).exists()


def test_a_taken_locator_entry_is_left_alone(tmp_path):
    path = tmp_path / "disk.vhd"
    taken = [(b"\0\0\0\0", 0, 0, 0)] * 7 + [(b"W2ru", 0, 0, 7)]
    path.write_bytes(dynamic({1: noise(4096)}, head=header(16, 4096, locators=taken)))
    before = path.read_bytes()
    with pytest.raises(NoRoomError, match="in use"):
        attach(path, AUTO)
    assert path.read_bytes() == before
    assert not sidecar_path(path).exists()


def test_differencing_and_damaged_disks_are_not_grafted(tmp_path):
    path = tmp_path / "disk.vhd"
    path.write_bytes(dynamic({1: b""}, foot=footer(65536, kind=4), head=header(16, 4096, parent="base")))
    with pytest.raises(UnsupportedError, match="parent"):
        attach(path, AUTO)
    path.write_bytes(dynamic({1: b""}, bat={2: 2}))
    with pytest.raises(MalformedImageError):
        attach(path, AUTO)
    assert not sidecar_path(path).exists()


# --- other programs ------------------------------------------------------------------------------------------------

OPERATIONS = {
    "read": [],
    "write in a stored block": ["write -P 3 64k 64k"],
    "write a new block": ["write -P 3 5M 64k"],
    "write many": ["write -P 4 0 8M"],
    "write zeros": ["write -z 64k 64k"],
    "discard": ["discard 64k 64k"],
    "flush and truncate nothing": ["write -P 1 2M 4k", "flush"],
}


@pytest.mark.parametrize("options", ["", "subformat=fixed", "force_size=on"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_qemu_keeps_the_graft(tmp_path, operation, options):
    """detach(op(attach(x))) == op(x), byte for byte: QEMU changes no time stamp when it writes."""
    path, plain = make(tmp_path / "disk.vhd", "8M", options), tmp_path / "plain.vhd"
    shutil.copy(path, plain)
    attach(path, AUTO)
    for image in (path, plain):
        if OPERATIONS[operation]:
            write(image, *OPERATIONS[operation])
    tool("qemu-img", "compare", "-f", "vpc", "-F", "vpc", path, plain)
    assert state_of(path) is GraftState.OK
    assert problem_of(path) is None
    detach_image(path)
    assert path.read_bytes() == plain.read_bytes()


def test_a_machine_writes_to_it(tmp_path):
    path, plain = make(tmp_path / "disk.vhd"), tmp_path / "plain.vhd"
    shutil.copy(path, plain)
    attach(path, AUTO)
    for image in (path, plain):
        command = 'qemu-io ide0-hd0 "write -P 3 5M 64k"\nquit\n'
        drive = f"file={image},format=vpc,if=ide"
        program = ("qemu-system-x86_64", "-accel", "tcg", "-m", "32", "-display", "none", "-net", "none", "-S")
        tool(*program, "-monitor", "stdio", "-drive", drive, stdin=command)
    assert state_of(path) is GraftState.OK
    detach_image(path)
    assert path.read_bytes() == plain.read_bytes()
    assert content_of(path)[5 << 20] == 3


def facts_of(path):
    facts = json.loads(tool("qemu-img", "info", "--output=json", "-f", "vpc", path).stdout)
    del facts["actual-size"]  # disk blocks
    return facts


def test_other_readers_read_on(tmp_path):
    path = make(tmp_path / "disk.vhd")
    listing = tool("7z", "l", "-slt", "-tvhd", path).stdout
    info = facts_of(path)
    attach(path, AUTO)
    assert tool("7z", "l", "-slt", "-tvhd", path).stdout == listing
    assert facts_of(path) == info
    tool("7z", "t", "-tvhd", path)


def test_convert_drops_it_and_the_sidecar_is_told_as_left_behind(tmp_path):
    path = make(tmp_path / "disk.vhd")
    attach(path, AUTO)
    tool("qemu-img", "convert", "-f", "vpc", "-O", "vpc", path, tmp_path / "new.vhd")
    (tmp_path / "new.vhd").replace(path)
    before = path.read_bytes()
    assert state_of(path) is GraftState.ORPHANED
    detach_image(path)
    assert not sidecar_path(path).exists()
    assert path.read_bytes() == before


@pytest.mark.parametrize("kind", ["dynamic", "fixed"])
def test_an_image_in_use(tmp_path, kind):
    path = tmp_path / "disk.vhd"
    path.write_bytes(KINDS[kind])
    with open_image(path, writable=True):
        with pytest.raises(ImageInUseError):
            attach(path, AUTO)
        done = tool("qemu-io", "-f", "vpc", "-c", "write 0 512", path, check=False)
        assert "lock" in done.stderr + done.stdout


# --- states --------------------------------------------------------------------------------------------------------


def test_lost_swapped_and_stale_sidecars(tmp_path):
    path, other = tmp_path / "disk.vhd", tmp_path / "other.vhd"
    path.write_bytes(sample())
    other.write_bytes(sample())
    attach(path, AUTO)
    own = sidecar_path(path).read_bytes()
    attach_sections(other, sample_sections(), placement=AUTO, tree_digest=bytes(32))
    sidecar_path(path).write_bytes(sidecar_path(other).read_bytes())
    assert state_of(path) is GraftState.SWAPPED
    detach_image(other)
    attach(other, AUTO, sample_sections(640))
    sidecar_path(path).write_bytes(sidecar_path(other).read_bytes())
    assert state_of(path) is GraftState.STALE
    with pytest.raises(GraftFormatError, match="earlier or later graft"):
        detach_image(path)  # the sidecar may be somebody's only copy
    sidecar_path(path).rename(tmp_path / "kept")
    detach_image(path)
    assert path.read_bytes() == sample()
    attach_bytes = tmp_path / "third.vhd"
    attach_bytes.write_bytes(sample())
    attach(attach_bytes, AUTO)
    assert sidecar_path(attach_bytes).read_bytes() == own
    sidecar_path(attach_bytes).unlink()
    assert state_of(attach_bytes) is GraftState.NO_RECORD
    detach_image(attach_bytes)
    assert attach_bytes.read_bytes() == sample()


@pytest.mark.parametrize(
    ("change", "state"),
    [
        (lambda data: data[:-1], GraftState.CUT),
        (lambda data: data[:60], GraftState.DAMAGED),
        (lambda data: data + b"x", GraftState.DAMAGED),
        (lambda data: data[:-1] + b"\xff", GraftState.OVERWRITTEN),
        (lambda data: data[:40] + b"x" + data[41:], GraftState.DAMAGED),
    ],
)
def test_damaged_sidecars(vhd, change, state):
    before = vhd.read_bytes()
    attach(vhd, AUTO)
    sidecar = sidecar_path(vhd)
    sidecar.write_bytes(change(sidecar.read_bytes()))
    assert state_of(vhd) is state
    try:
        detach_image(vhd)
    except GraftFormatError:
        assert before[:8] != b"conectix"  # a fixed disk was not touched: nothing to give back
    assert vhd.read_bytes() == before


def test_a_damaged_pointer(tmp_path):
    path = tmp_path / "disk.vhd"
    path.write_bytes(sample())
    attach(path, AUTO)
    data = bytearray(path.read_bytes())
    data[HEADER + POINTER + 8] = 1
    data[HEADER : HEADER + 1024] = summed(bytes(data[HEADER : HEADER + 1024]), 36)
    path.write_bytes(bytes(data))
    assert state_of(path) is GraftState.DAMAGED
    detach_image(path)
    assert path.read_bytes() == sample()


def test_a_fixed_disk_that_grew_or_shrank(tmp_path):
    path = tmp_path / "disk.vhd"
    path.write_bytes(fixed(noise(8192)))
    attach(path, AUTO)
    for size, state in ((9216, GraftState.GROWN), (7168, GraftState.DAMAGED)):
        path.write_bytes(fixed(noise(size)))
        assert state_of(path) is state


def test_the_sidecar_of_a_dynamic_disk_survives_growth(tmp_path):
    path = make(tmp_path / "disk.vhd")
    attach(path, AUTO)
    size = path.stat().st_size
    write(path, "write -P 3 5M 64k")
    assert path.stat().st_size > size
    with open_image(path) as image:
        assert image.locate().state is GraftState.OK
        assert image.locate().locator_offset == HEADER + POINTER
        assert json.dumps(image.metadata())


# --- crashes -------------------------------------------------------------------------------------------------------


def test_kill_during_attach_and_detach(vhd):
    before, pristine = vhd.read_bytes(), content_of(vhd)
    for action in ("attach", "detach"):
        for after in range(1, 60):
            vhd.write_bytes(before)
            sidecar_path(vhd).unlink(missing_ok=True)
            if action == "detach":
                attach(vhd, AUTO)
            killed = run_and_die(
                (lambda: attach(vhd, AUTO)) if action == "attach" else (lambda: detach_image(vhd)), after
            )
            if not is_grafted(vhd, pristine):
                assert vhd.read_bytes() == before
                attach(vhd, AUTO)
            assert is_grafted(vhd, pristine)
            detach_image(vhd)
            assert vhd.read_bytes() == before
            assert not sidecar_path(vhd).exists()
            if not killed:
                break
        else:
            raise AssertionError(f"{action} never came to its end")


@pytest.mark.parametrize("direction", ["attach", "detach"])
def test_a_torn_header(tmp_path, direction):
    """A power loss that keeps one of the header's two sectors: not grafted, and the next writer puts it right."""
    path = tmp_path / "disk.vhd"
    path.write_bytes(sample())
    pristine = content_of(path)
    if direction == "detach":
        attach(path, AUTO)
    start = path.read_bytes()
    action = (lambda: attach(path, AUTO)) if direction == "attach" else (lambda: detach_image(path))
    writes = [item for item in operations_of(action) if item.name == "write" and item.file == path]
    assert [(item.offset, len(item.data)) for item in writes] == [(HEADER, 1024)]
    if direction == "detach":
        attach(path, AUTO)  # the sidecar is removed only when the header is on the disk
    for kept in (0, 512):
        data = bytearray(start)
        data[HEADER + kept : HEADER + kept + 512] = writes[0].data[kept : kept + 512]
        path.write_bytes(bytes(data))
        assert state_of(path) is GraftState.ORPHANED
        assert content_of(path) == pristine
        with open_image(path) as image:
            assert image.metadata()["interruptedChange"]
        with open_image(path, writable=True) as image:
            assert image.recovered
            assert not image.metadata()["interruptedChange"]
        assert path.read_bytes() == sample()
        path.write_bytes(bytes(data))
        attach(path, AUTO)
        assert is_grafted(path, pristine)
        torn = sidecar_path(path).read_bytes()
        detach_image(path)
        assert path.read_bytes() == sample()
        sidecar_path(path).write_bytes(torn)


def test_a_torn_header_without_its_sidecar_is_a_wrong_checksum(tmp_path):
    path = tmp_path / "disk.vhd"
    path.write_bytes(sample())
    attach(path, AUTO)
    data = bytearray(path.read_bytes())
    data[HEADER + 512 : HEADER + 1024] = sample()[HEADER + 512 : HEADER + 1024]
    path.write_bytes(bytes(data))
    sidecar_path(path).unlink()
    with pytest.raises(MalformedImageError, match="checksum"):
        open_image(path)


def test_a_refused_write_leaves_everything_as_before(tmp_path, monkeypatch):
    """The header write fails: pointer and sidecar are taken back."""
    path = tmp_path / "disk.vhd"
    path.write_bytes(sample())
    real, calls = graft.write_header, []

    def refuse_once(*args):
        calls.append(args)
        if len(calls) == 1:
            raise FileError("no space left on device")
        real(*args)

    monkeypatch.setattr(graft, "write_header", refuse_once)
    with pytest.raises(FileError, match="no space"):
        attach(path, AUTO)
    assert len(calls) == 2
    assert path.read_bytes() == sample()
    assert not sidecar_path(path).exists()


def test_no_space_left(vhd, monkeypatch):
    """ENOSPC at every write, of the sidecar and of the image: both are as before."""
    before, real = vhd.read_bytes(), Writer.write
    for fail_at in range(1, 10):
        calls = []

        def write(self, offset, data, *, fail_at=fail_at, calls=calls):
            calls.append(offset)
            if len(calls) == fail_at:
                real(self, offset, data[: len(data) // 2])
                raise FileError("no space left on device", file=self.file)
            real(self, offset, data)

        monkeypatch.setattr(Writer, "write", write)
        try:
            attach(vhd, AUTO)
        except FileError as problem:
            assert "no space" in str(problem)
            assert vhd.read_bytes() == before
            assert not sidecar_path(vhd).exists()
            continue
        finally:
            monkeypatch.setattr(Writer, "write", real)
        assert fail_at == len(calls) + 1 >= 3
        return
    raise AssertionError("attach never came to its end")


def test_digest_is_that_of_the_raw_disk(tmp_path):
    path = make(tmp_path / "disk.vhd")
    tool("qemu-img", "convert", "-f", "vpc", "-O", "raw", path, tmp_path / "disk.raw")
    attach(path, AUTO)
    with open_image(path) as image, open_image(tmp_path / "disk.raw") as raw:
        found, expected = open_graft(image).content(flat=True), digest_content(raw, flat="always")
    assert (found.root_hash, found.flat) == (expected.root_hash, expected.flat)
    assert expected.flat.hex() == digest(tmp_path / "disk.raw")
