"""ISO images: the pristine content, states, and real readers before and after."""

import os
import shutil
from hashlib import sha256

import pytest
from imagefmt_helpers import (
    GRUB_ISO,
    MEMTEST_ISO,
    SECTOR,
    attach,
    content_of,
    digest,
    flip,
    iso_bytes,
    operations_of,
    problem_of,
    sample_sections,
    state_of,
    tool,
)

from vmgraft.errors import GraftFormatError, NoGraftError, UsageError
from vmgraft.imagefmt.contract import GraftState, Placement
from vmgraft.imagefmt.graft import detach_image, open_graft, open_image
from vmgraft.imagefmt.record import Section, SectionKind
from vmgraft.imagefmt.tree import digest_content

FIELD = 34035
VOLUME_SIZE = 16 * SECTOR + 80


def locator_of(path):
    with open_image(path) as image:
        return image.locate()


# --- layout ---


@pytest.mark.parametrize("tail", [b"", b"x", bytes(SECTOR), os.urandom(5000)])
@pytest.mark.parametrize("filling", [b"\0", b" "])
def test_layout_and_way_back(tmp_path, tail, filling):
    path = tmp_path / "disc.iso"
    original = iso_bytes(tail=tail, field=filling * 512)
    path.write_bytes(original)
    located = attach(path, Placement.AUTO)
    data, locator = path.read_bytes(), located.locator
    start = -(-len(original) // SECTOR) * SECTOR
    assert len(data) % SECTOR == 0
    assert data[FIELD : FIELD + 128] == data[-SECTOR : -SECTOR + 128]
    assert not any(data[-SECTOR + 128 :])
    assert (locator.record_offset, locator.file_size) == (start, len(original))
    assert data[start : start + locator.record_size] == located.record.read_all()
    assert data[:FIELD] + original[FIELD : FIELD + 128] + data[FIELD + 128 : len(original)] == original
    assert FIELD // 512 == (FIELD + 127) // 512  # one disk sector
    with open_image(path) as image:
        assert (image.virtual_size, image.sector_size) == (len(original), SECTOR)
        assert image.read(0, 1 << 30) == original
        assert image.read(FIELD + 5, 7) == filling * 7
        assert image.read(FIELD - 3, 6) == original[FIELD - 3 : FIELD + 3]
        assert image.read(FIELD + 120, 20) == original[FIELD + 120 : FIELD + 140]
        assert digest_content(image).flat == sha256(original).digest()
        assert sum(extent.length for extent in image.extents()) == len(original)
    detach_image(path)
    assert path.read_bytes() == original


def test_a_taken_field_is_left_alone(tmp_path):
    path = tmp_path / "disc.iso"
    original = iso_bytes(field=b"application use of somebody else".ljust(512, b"."))
    path.write_bytes(original)
    located = attach(path, Placement.INLINE)
    assert path.read_bytes()[: len(original)] == original
    assert located.locator_offset == path.stat().st_size - SECTOR
    assert content_of(path) == original
    flip(path, path.stat().st_size - SECTOR + 40)
    assert state_of(path) is GraftState.DAMAGED
    flip(path, path.stat().st_size - SECTOR + 40)
    detach_image(path)
    assert path.read_bytes() == original


def test_order_of_writes(iso_image):
    steps = [(item.name, item.offset) for item in operations_of(lambda: attach(iso_image, Placement.INLINE))]
    size = len(iso_bytes())
    assert steps == [("write", size), ("sync", 0), ("write", FIELD), ("sync", 0)]
    steps = [(item.name, item.offset) for item in operations_of(lambda: detach_image(iso_image))]
    assert steps == [("write", FIELD), ("sync", 0), ("truncate", size), ("sync", 0)]


# --- states ---


@pytest.fixture
def grafted(iso_image):
    attach(iso_image, Placement.INLINE)
    return iso_image


def test_cut(grafted):
    locator = locator_of(grafted).locator
    whole, original = grafted.read_bytes(), content_of(grafted)
    for size in (len(whole) - 1, len(whole) - SECTOR, locator.record_offset + locator.record_size // 2):
        grafted.write_bytes(whole[:size])
        assert state_of(grafted) is GraftState.CUT
        assert problem_of(grafted).startswith("record-cut")
        assert content_of(grafted) == original
    # Without UNDO nobody knows whether zeros or spaces stood in the descriptor.
    grafted.write_bytes(whole[: locator.record_offset + 10])
    assert state_of(grafted) is GraftState.CUT
    with pytest.raises(GraftFormatError, match="way back"):
        detach_image(grafted)


def test_grown(grafted):
    whole, original = grafted.read_bytes(), content_of(grafted)
    grafted.write_bytes(whole + b"more")
    assert state_of(grafted) is GraftState.GROWN
    assert content_of(grafted) == original
    with pytest.raises(UsageError, match="4 bytes behind the graft"):
        detach_image(grafted)
    assert grafted.read_bytes() == whole + b"more"


def test_footer_overwritten(grafted):
    flip(grafted, grafted.stat().st_size - 1)
    assert state_of(grafted) is GraftState.DAMAGED
    damaged = digest(grafted)
    with pytest.raises(GraftFormatError, match="footer"):
        detach_image(grafted)
    assert digest(grafted) == damaged


def test_descriptor_locator_damaged_is_found_by_the_footer(grafted):
    original = content_of(grafted)
    flip(grafted, FIELD + 50)
    assert state_of(grafted) is GraftState.DAMAGED
    assert content_of(grafted) == original
    detach_image(grafted)
    assert grafted.read_bytes() == original


def test_volume_size_changed_by_another_program(grafted):
    with open(grafted, "r+b") as file:
        file.seek(VOLUME_SIZE)
        file.write((23).to_bytes(4, "little") + (23).to_bytes(4, "big"))
    assert state_of(grafted) is GraftState.DAMAGED
    changed = digest(grafted)
    with pytest.raises(GraftFormatError, match="volume's size"):
        detach_image(grafted)
    assert digest(grafted) == changed


def test_xorriso_growing_the_image_is_noticed(tmp_path):
    path, extra = tmp_path / "disc.iso", tmp_path / "extra"
    extra.write_bytes(b"extra" * 1000)
    build_iso(tmp_path, path, "xorriso")
    attach(path, Placement.INLINE)
    record = locator_of(path).record
    tool("xorriso", "-dev", path, "-add", extra, "--")
    located = locator_of(path)
    assert located.state is GraftState.ORPHANED
    assert located.record == record
    with pytest.raises(NoGraftError, match="another program"):
        problem_of(path)
    grown = digest(path)
    with pytest.raises(GraftFormatError, match="given back"):
        detach_image(path)
    assert digest(path) == grown


# --- real readers ---


def build_iso(folder, path, program):
    tree = folder / f"tree-{program}"
    (tree / "sub").mkdir(parents=True)
    (tree / "hello.txt").write_text("hello\n")
    (tree / "sub" / "a long name with spaces.bin").write_bytes(os.urandom(3 << 20))
    options = ["-R", "-J", "-V", "SAMPLE", "-o", path, tree]
    tool(
        *({"genisoimage": ["genisoimage", "-quiet"], "xorriso": ["xorriso", "-as", "mkisofs", "-quiet"]}[program]),
        *options,
    )
    return path


@pytest.fixture(params=["grub", "memtest", "genisoimage", "xorriso"])
def real_iso(request, tmp_path):
    path = tmp_path / "real.iso"
    if request.param in ("grub", "memtest"):
        shutil.copy({"grub": GRUB_ISO, "memtest": MEMTEST_ISO}[request.param], path)
        return path
    return build_iso(tmp_path, path, request.param)


def pycdlib_files(path):
    import pycdlib

    iso = pycdlib.PyCdlib()
    iso.open(str(path))
    names = [f"{folder}/{file}" for folder, _, files in iso.walk(iso_path="/") for file in files]
    iso.close()
    return names


def xorriso_view(path):
    listing = tool("xorriso", "-indev", path, "-find", "/", "-exec", "report_lba", "--")
    boot = tool("xorriso", "-indev", path, "-report_el_torito", "plain", "-report_system_area", "plain")
    # The size of the medium is the size of the file, which grew; all else must be as before.
    keep = [line for line in boot.stdout.splitlines() if "Image size" not in line and "GPT backup" not in line]
    return listing.stdout, keep


def seven_readers(path):
    return {
        "isoinfo -l": tool("isoinfo", "-l", "-i", path).stdout,
        "isoinfo -R -f": tool("isoinfo", "-R", "-f", "-i", path).stdout,
        "isoinfo -d": tool("isoinfo", "-d", "-i", path).stdout,
        "xorriso": xorriso_view(path),
        "pycdlib": pycdlib_files(path),
    }


def test_real_readers_see_what_they_saw(real_iso):
    tool("implantisomd5", "--force", real_iso)
    before, original = seven_readers(real_iso), real_iso.read_bytes()
    tool("checkisomd5", real_iso)
    located = attach(real_iso, Placement.INLINE)
    assert located.state is GraftState.OK
    tool("checkisomd5", real_iso)
    after = seven_readers(real_iso)
    for reader, view in before.items():
        assert after[reader] == view, reader
    assert content_of(real_iso) == original
    detach_image(real_iso)
    assert real_iso.read_bytes() == original


def test_a_megabyte_behind_a_real_iso(tmp_path):
    path = tmp_path / "grub.iso"
    shutil.copy(GRUB_ISO, path)
    sections = [*sample_sections(), Section(SectionKind.FILES, os.urandom(3 << 20))]
    assert attach(path, Placement.AUTO, sections).locator.placement is Placement.INLINE
    assert problem_of(path) is None
    assert digest(path) != digest(GRUB_ISO)
    detach_image(path)
    assert digest(path) == digest(GRUB_ISO)


def test_metadata_of_real_images(tmp_path):
    with open_image(GRUB_ISO) as image:
        facts = image.metadata()
    assert facts["volumeId"] == "ISOIMAGE"
    assert facts["isohybridMbr"] is True
    assert facts["elTorito"][0]["platform"] == "x86"
    assert facts["elTorito"][0]["media"] == "no-emulation"
    with open_image(MEMTEST_ISO) as image:
        platforms = [entry["platform"] for entry in image.metadata()["elTorito"]]
    assert platforms == ["x86", "efi"]
    with open_image(build_iso(tmp_path, tmp_path / "plain.iso", "genisoimage")) as image:
        facts = image.metadata()
    assert (facts["joliet"], facts["rockRidge"], facts["elTorito"], facts["udf"]) == (True, True, [], False)
    assert facts["volumeId"] == "SAMPLE"
    udf = tmp_path / "udf.iso"
    tool("genisoimage", "-quiet", "-udf", "-o", udf, tmp_path / "tree-genisoimage")
    with open_image(udf) as image:
        assert image.metadata()["udf"] is True


def test_a_graft_does_not_change_the_facts(grafted):
    with open_image(grafted) as image:
        grafted_facts = image.metadata()
        assert open_graft(image).format_problem() is None
    detach_image(grafted)
    with open_image(grafted) as image:
        facts = image.metadata()
    facts.pop("fileSize"), grafted_facts.pop("fileSize")
    assert facts == grafted_facts
