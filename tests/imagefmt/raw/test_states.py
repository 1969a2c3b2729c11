"""What other programs do to a grafted raw disk: each is noticed, said in words, and never costs content."""

import os

import pytest
from imagefmt_helpers import attach, content_of, digest, problem_of, sample_sections, state_of, tool

from vmgraft.errors import UsageError
from vmgraft.imagefmt.contract import GraftState, Placement
from vmgraft.imagefmt.graft import detach_image, open_image
from vmgraft.imagefmt.record import Section, SectionKind

MIB = 1 << 20
SIZE = 8 * MIB


@pytest.fixture
def gpt_disk(tmp_path):
    path = tmp_path / "disk.img"
    with open(path, "wb") as file:
        file.truncate(SIZE)
    tool("sfdisk", "-q", path, stdin="label: gpt\nstart=2048\n")
    return path


def located(path):
    with open_image(path) as image:
        return image.locate()


MOVERS = {
    "sgdisk -e": lambda path: tool("sgdisk", "--move-second-header", path),
    "parted, answering Fix": lambda path: tool("parted", "---pretend-input-tty", path, "print", stdin="Fix\n"),
    "parted --fix": lambda path: tool("parted", "--script", "--fix", path, "print"),
    "sfdisk --relocate": lambda path: tool("sfdisk", "--relocate", "gpt-bak-std", path),
    "growing the partition": lambda path: tool("sfdisk", "-N", "1", path, stdin=",+\n"),
}


@pytest.mark.parametrize(("mover", "filler"), [*((mover, 0) for mover in MOVERS), ("parted --fix", 900_000)])
def test_a_tool_moves_the_backup_gpt_into_the_trailer(gpt_disk, mover, filler):
    """However short the record, a moved backup GPT leaves the first locator and the record alone."""
    sections = [*sample_sections(), Section(SectionKind.FILES, os.urandom(filler))]
    record = attach(gpt_disk, Placement.INLINE, sections).record.read_all()
    end = gpt_disk.stat().st_size
    tool("parted", "--script", gpt_disk, "print")
    tool("sfdisk", "--verify", gpt_disk)
    assert state_of(gpt_disk) is GraftState.OK
    MOVERS[mover](gpt_disk)
    found = located(gpt_disk)
    assert found.state is GraftState.DAMAGED
    assert "moved the backup GPT" in found.detail and "the record is whole" in found.detail
    assert found.record.read_all() == record
    assert gpt_disk.read_bytes()[end - 512 : end - 504] == b"EFI PART"
    with open_image(gpt_disk) as image:
        assert image.virtual_size == SIZE


def test_sgdisk_after_detach_gives_the_original_back(gpt_disk):
    gpt_disk.write_bytes(bytes(SIZE))
    tool("sgdisk", "--new=1:2048:0", gpt_disk)
    original = digest(gpt_disk)
    attach(gpt_disk, Placement.INLINE)
    tool("sgdisk", "--move-second-header", gpt_disk)
    detach_image(gpt_disk)
    assert digest(gpt_disk) != original  # the primary header still speaks of the other end
    tool("sgdisk", "--move-second-header", gpt_disk)
    assert digest(gpt_disk) == original


def test_a_backup_gpt_of_large_sectors(tmp_path):
    """Five sectors of 4096 bytes are the most that a moved backup GPT takes."""
    path = tmp_path / "disk.img"
    with open(path, "wb") as file:
        file.truncate(SIZE)
    script = "g\nn\n1\n\n\nw\n"
    tool("fdisk", "--sector-size", "4096", path, stdin=script)
    attach(path, Placement.INLINE)
    grafted = path.read_bytes()
    # fdisk writes a moved backup as soon as anything is written.
    tool("fdisk", "--sector-size", "4096", path, stdin="x\nn\nname\nr\nw\n")
    changed = [
        at for at in range(SIZE, len(grafted), 4096) if path.read_bytes()[at : at + 4096] != grafted[at : at + 4096]
    ]
    assert changed and len(grafted) - min(changed) <= 20480
    found = located(path)
    assert found.state is GraftState.DAMAGED
    assert "moved the backup GPT" in found.detail and "the record is whole" in found.detail


def test_zapping_the_partition_table(gpt_disk):
    attach(gpt_disk, Placement.INLINE)
    tool("sgdisk", "--zap-all", gpt_disk)
    found = located(gpt_disk)
    assert found.state is GraftState.DAMAGED
    assert "second locator" in found.detail and "the record is whole" in found.detail


@pytest.mark.parametrize("program", ["qemu-img", "truncate"])
def test_growing(gpt_disk, program):
    attach(gpt_disk, Placement.INLINE)
    grafted, content = gpt_disk.read_bytes(), content_of(gpt_disk)
    grow(gpt_disk, program, 3 << 30)
    found = located(gpt_disk)
    assert found.state is GraftState.GROWN
    assert f"shrink it to {len(grafted)} bytes" in found.detail
    assert content_of(gpt_disk) == content
    with pytest.raises(UsageError, match="would be lost"):
        detach_image(gpt_disk)
    grow(gpt_disk, program, len(grafted))
    assert state_of(gpt_disk) is GraftState.OK
    assert gpt_disk.read_bytes() == grafted


def grow(path, program, size):
    if program == "qemu-img":
        tool("qemu-img", "resize", "-q", "-f", "raw", "--shrink", path, str(size))
    else:
        tool("truncate", "--size", str(size), path)


def test_growing_and_moving_the_backup_gpt(gpt_disk):
    """What growpart does after a resize: the trailer is amid the file, and the GPT no longer tells where."""
    attach(gpt_disk, Placement.INLINE)
    end = gpt_disk.stat().st_size
    grow(gpt_disk, "qemu-img", 64 * MIB)
    MOVERS["growing the partition"](gpt_disk)
    found = located(gpt_disk)
    assert found.state is GraftState.GROWN
    assert "moved the backup GPT to its new end" in found.detail
    assert f"shrink it to {end} bytes" in found.detail
    assert problem_of(gpt_disk).startswith("file-grown")


def test_growing_by_data_is_found_through_the_gpt(gpt_disk):
    original = gpt_disk.read_bytes()
    attach(gpt_disk, Placement.INLINE)
    with open(gpt_disk, "ab") as file:
        file.write(b"\x22" * (3 * MIB))
    assert state_of(gpt_disk) is GraftState.GROWN
    assert content_of(gpt_disk) == original


@pytest.mark.parametrize("program", ["qemu-img", "truncate"])
def test_shrinking_into_the_trailer(gpt_disk, program):
    original = digest(gpt_disk)
    attach(gpt_disk, Placement.INLINE)
    end = gpt_disk.stat().st_size
    grow(gpt_disk, program, end - 512)
    found = located(gpt_disk)
    assert found.state is GraftState.CUT
    assert "the last 512 bytes are missing" in found.detail and "the record is whole" in found.detail
    grow(gpt_disk, program, SIZE + 512)
    found = located(gpt_disk)
    assert found.state is GraftState.CUT
    assert "recover" not in found.detail
    detach_image(gpt_disk)
    assert digest(gpt_disk) == original


def test_shrinking_to_the_original_size_is_a_detach(gpt_disk):
    original = digest(gpt_disk)
    attach(gpt_disk, Placement.INLINE)
    grow(gpt_disk, "truncate", SIZE)
    assert state_of(gpt_disk) is GraftState.NONE
    assert digest(gpt_disk) == original


def test_an_overlay_made_before_attach_keeps_its_disk(gpt_disk, tmp_path):
    overlay, copy = tmp_path / "overlay.qcow2", tmp_path / "seen.img"
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-b", gpt_disk.name, "-F", "raw", overlay)
    original = gpt_disk.read_bytes()
    attach(gpt_disk, Placement.INLINE)
    tool("qemu-img", "convert", "-O", "raw", overlay, copy)
    assert copy.read_bytes() == original
    assert content_of(overlay) == original


def test_an_overlay_made_after_attach_shows_the_trailer_to_its_guest(gpt_disk, tmp_path):
    """QEMU takes the size from the file; vmgraft shows zeros there. The size must be named: docs/format.md."""
    attach(gpt_disk, Placement.INLINE)
    plain, sized = tmp_path / "plain.qcow2", tmp_path / "sized.qcow2"
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-b", gpt_disk.name, "-F", "raw", plain)
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-b", gpt_disk.name, "-F", "raw", sized, str(SIZE))
    with open_image(plain) as image:
        assert image.virtual_size == gpt_disk.stat().st_size > SIZE
    assert content_of(sized) == content_of(gpt_disk)
