"""Content and extents against qemu-img, for disks of all creators; sizes; sector bitmaps; differencing disks."""

import json
import threading

import pytest
from imagefmt_helpers import tool
from vhd_testkit import MIB, dynamic, fixed, footer, header, make, noise, raw_bytes, sample, write

from vmgraft.errors import MalformedImageError, UnsupportedError, UsageError
from vmgraft.imagefmt.contract import Kind, Opening
from vmgraft.imagefmt.graft import open_image

GEOMETRY = (80, 2, 4)
MAX_GEOMETRY = (65535, 16, 255)


def check_content(path, *, current_size=False):
    expected = raw_bytes(path, current_size=current_size)
    with open_image(path) as image:
        assert image.format_name == "vhd"
        assert image.virtual_size == len(expected)
        assert image.read(0, image.virtual_size) == expected
        size = len(expected)
        for offset, length in ((0, 1), (511, 3), (size // 2 - 7, 70_001), (size - 5, 99), (size, 1)):
            assert image.read(offset, length) == expected[offset : offset + length]
        position = 0
        for extent in image.extents():
            assert extent.start == position
            assert extent.length > 0
            position += extent.length
            if extent.kind is not Kind.DATA:
                assert not any(expected[extent.start : position])
        assert position == image.virtual_size


def mapped(rows):
    found = []
    for start, length, data in rows:
        if found and found[-1][2] == data:
            found[-1][1] += length
        else:
            found.append([start, length, data])
    return found


@pytest.mark.parametrize("size", ["8M", "8389632", "1500M"])
@pytest.mark.parametrize("options", ["", "subformat=fixed", "force_size=on", "subformat=fixed,force_size=on"])
def test_disks_of_qemu(tmp_path, size, options):
    if size == "1500M" and "fixed" in options:
        size = "20M"
    path = make(tmp_path / "a.vhd", size, options)
    if size == "1500M":
        with open_image(path) as image:
            info = json.loads(tool("qemu-img", "info", "--output=json", "-f", "vpc", path).stdout)
            assert image.virtual_size == info["virtual-size"]
    else:
        check_content(path)
    if "fixed" not in options:
        rows = json.loads(tool("qemu-img", "map", "--output=json", "-f", "vpc", path).stdout)
        expected = mapped((row["start"], row["length"], row["data"] and not row["zero"]) for row in rows)
        with open_image(path) as image:
            assert mapped((e.start, e.length, e.kind is Kind.DATA) for e in image.extents()) == expected


@pytest.mark.parametrize("geometry", [GEOMETRY, MAX_GEOMETRY])
@pytest.mark.parametrize(
    "creator", [b"qemu", b"vpc ", b"qem2", b"win ", b"d2v ", b"CTXS", b"tap\0", b"wa\0\0", b"vbox"]
)
def test_size_by_creator(tmp_path, creator, geometry):
    """Geometry or current size: whichever QEMU takes for that creator; Debian's does not know the last two yet."""
    size = 512 * 700  # the geometry holds 640 sectors
    path, later = tmp_path / "a.vhd", creator in (b"wa\0\0", b"vbox")
    path.write_bytes(dynamic({0: noise(4096)}, size, foot=footer(size, creator=creator, geometry=geometry)))
    check_content(path, current_size=later)
    path.write_bytes(fixed(noise(size), creator=creator, geometry=geometry))
    check_content(path, current_size=later)
    with open_image(path) as image:
        assert image.virtual_size == (512 * 640 if creator in (b"qemu", b"vpc ") and geometry == GEOMETRY else size)


@pytest.mark.parametrize("block_size", [4096, 65536, 512 * 1024, 2 * MIB, 4 * MIB])
def test_block_sizes(tmp_path, block_size):
    blocks = {2: noise(block_size, 2), 0: noise(block_size // 2, 3)}
    path = tmp_path / "a.vhd"
    path.write_bytes(dynamic(blocks, block_size * 3 - 512 * 5, block_size))
    check_content(path)


def test_current_size_is_rounded_down_to_sectors(tmp_path):
    path = tmp_path / "a.vhd"
    path.write_bytes(dynamic({0: noise(4096)}, 65536 + 100))
    with open_image(path) as image:
        assert image.virtual_size == 65536 == len(raw_bytes(path))


@pytest.mark.parametrize("end", [b"", bytes(512), footer(65536)[:511]])
def test_dynamic_disks_without_a_sound_512_byte_footer(tmp_path, end):
    """QEMU reads the copy at the beginning; footers of old programs are one byte shorter."""
    path = tmp_path / "a.vhd"
    path.write_bytes(dynamic({1: noise(4096)}, end=end))
    check_content(path)
    with open_image(path) as image:
        assert image.metadata()["footer"] == ("sound" if len(end) == 511 else "missing")


def test_fixed_disk_with_a_footer_of_511_bytes(tmp_path):
    """Virtual PC before 2004; QEMU does not know these."""
    path, content = tmp_path / "a.vhd", noise(8192)
    path.write_bytes(fixed(content, length=511))
    with open_image(path) as image:
        assert image.read(0, 1 << 20) == content
        assert image.metadata()["subformat"] == "fixed"


def test_threads_read_the_same(tmp_path):
    path = make(tmp_path / "a.vhd")
    expected, wrong = raw_bytes(path), []
    with open_image(path) as image:

        def work(seed):
            for at in range(seed * 4096, len(expected), 4 * 65536):
                buffer = bytearray(65536)
                count = image.readinto(at, memoryview(buffer))
                if buffer[:count] != expected[at : at + 65536]:
                    wrong.append(at)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


# --- sector bitmaps ------------------------------------------------------------------------------------------------


def test_clear_bits_over_zeros_are_fine(tmp_path):
    path = tmp_path / "a.vhd"
    path.write_bytes(dynamic({0: noise(512) + bytes(3584), 1: b""}, bitmaps={0: b"\x80", 1: b"\0"}))
    check_content(path)


def test_clear_bits_over_data_are_refused_where_they_matter(tmp_path):
    """QEMU shows the bytes, 7-Zip reports an error: no answer is right."""
    data = noise(4096)
    path = tmp_path / "a.vhd"
    path.write_bytes(dynamic({1: data}, 65536))
    tool("7z", "t", "-tvhd", path)
    path.write_bytes(dynamic({1: data}, 65536, bitmaps={1: b"\xf7"}))  # sector 4 of 8
    assert raw_bytes(path)[4096:8192] == data
    done = tool("7z", "t", "-tvhd", path, check=False)
    assert done.returncode
    assert "Data Error" in done.stdout + done.stderr
    with open_image(path) as image:
        assert image.read(4096, 2048) == data[:2048]
        assert image.read(4096 + 2560, 1536) == data[2560:]
        assert image.read(8192, 4096) == bytes(4096)
        for offset, length in ((0, 65536), (4096 + 2559, 1), (4096 + 2047, 2)):
            with pytest.raises(MalformedImageError, match="sector 4 was never written") as caught:
                image.read(offset, length)
            assert caught.value.field == "sector bitmap"


# --- what is not read ----------------------------------------------------------------------------------------------


def test_a_differencing_disk_names_its_parent_and_has_no_content(tmp_path):
    path = tmp_path / "child.vhd"
    head = header(16, 4096, parent="C:\\base\n.vhd", locators=[(b"W2ru", 512, 10, 1 << 40)])
    path.write_bytes(dynamic({1: noise(4096)}, foot=footer(65536, kind=4), head=head))
    with open_image(path) as image:
        assert image.metadata()["subformat"] == "differencing"
        assert image.metadata()["parent"]["name"] == "C:\\base\ufffd.vhd"
        assert json.dumps(image.metadata())
        for action in (lambda: image.read(0, 1), lambda: list(image.extents())):
            with pytest.raises(UnsupportedError, match="parent") as caught:
                action()
            assert "base" in str(caught.value)
            assert caught.value.hint


def test_detection(tmp_path):
    path = tmp_path / "a.vhd"
    path.write_bytes(fixed(noise(8192)))
    with open_image(path) as image:
        assert image.format_name == "vhd"
    with open_image(path, Opening(format="raw")) as image:
        assert image.virtual_size == 8192 + 512
    # The guest of a fixed disk can write the beginning of any other container, and a qcow2's last cluster a footer.
    path.write_bytes(fixed(b"QFI\xfb\0\0\0\3" + noise(8184)))
    with pytest.raises(UnsupportedError, match=r"qcow2.*vhd") as caught:
        open_image(path)
    assert "--image-format" in caught.value.hint
    with open_image(path, Opening(format="vhd")) as image:
        assert image.read(0, 4) == b"QFI\xfb"


def test_facts(tmp_path):
    path = make(tmp_path / "a.vhd", "8M")
    with open_image(path) as image:
        facts = image.metadata()
        assert image.backing_chain() == ()
        with pytest.raises(UsageError):
            image.read(-1, 1)
    assert facts["subformat"] == "dynamic"
    assert facts["creator"] == "qemu"
    assert facts["sizeFrom"] == "geometry"
    assert facts["blockSize"] == 2 * MIB
    assert facts["footer"] == "sound"
    assert json.dumps(facts)
    path.write_bytes(sample())
    with open_image(path) as image:
        assert image.metadata()["created"].startswith("2000-01-01T00:00:00")


def test_a_large_disk_costs_nothing(tmp_path):
    path = make(tmp_path / "a.vhd", "2040G", "force_size=on")
    write(path, "write -P 8 2190433255424 64k")
    with open_image(path) as image:
        assert image.virtual_size == 2040 << 30
        runs = [(e.start, e.length) for e in image.extents() if e.kind is Kind.DATA]
        assert runs == [(0, 4 * MIB), (6 * MIB, 2 * MIB), ((2040 << 30) - 2 * MIB, 2 * MIB)]
        assert image.read(2190433255423, 3) == b"\0\x08\x08"
