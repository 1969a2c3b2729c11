"""Malformed VHDs: one clear error with offset and field, in bounded time and memory."""

import struct
import time
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vhd_testkit import HEADER, POINTER, dynamic, fixed, footer, header, noise, sample, summed

from vmgraft.errors import FileError, MalformedImageError, UnsupportedError, VmgraftError
from vmgraft.imagefmt.contract import Opening
from vmgraft.imagefmt.graft import open_graft, open_image

VHD = Opening(format="vhd")


def patched(data, offset, value, *, field=None, start=0, size=512):
    """Return ``data`` with bytes replaced, and the checksum of the structure at ``start`` set right."""
    data = data[:offset] + value + data[offset + len(value) :]
    return data if field is None else data[:start] + summed(data[start : start + size], field) + data[start + size :]


def foot(offset, value):
    """A sample with a change in both copies of the footer."""
    data = sample()
    for start in (0, len(data) - 512):
        data = patched(data, start + offset, value, field=64, start=start)
    return data


def head(offset, value):
    return patched(sample(), HEADER + offset, value, field=36, start=HEADER, size=1024)


def u32(value):
    return struct.pack(">I", value)


def u64(value):
    return struct.pack(">Q", value)


BLOCK = dynamic({0: noise(4096)})
CASES = {
    "checksum of the copy": (patched(sample(), 70, b"x"), "footer's checksum", MalformedImageError),
    "type 1": (foot(60, u32(1)), "disk type 1", UnsupportedError),
    "type 5": (foot(60, u32(5)), "disk type 5", UnsupportedError),
    "fixed with a copy": (foot(60, u32(2)), "no footer at its beginning", MalformedImageError),
    "version 2": (foot(12, u32(0x20000)), "version 2.0", UnsupportedError),
    "size 0": (foot(48, u64(0)), "0 sectors", MalformedImageError),
    "size over 2040 GiB": (foot(48, u64((2040 << 30) + 512)), "sectors", MalformedImageError),
    "size 2^64": (foot(48, u64((1 << 64) - 1)), "sectors", MalformedImageError),
    "geometry 0": (foot(28, b"vpc "), "0 sectors", MalformedImageError),
    "header offset 0": (foot(16, u64(0)), "dynamic header at 0", MalformedImageError),
    "header offset unaligned": (foot(16, u64(513)), "dynamic header", MalformedImageError),
    "header behind the end": (foot(16, u64(1 << 20)), "dynamic header", MalformedImageError),
    "header offset 2^64": (foot(16, u64((1 << 64) - 1)), "dynamic header", MalformedImageError),
    "header cookie": (head(0, b"cxsparsf"), "dynamic header", MalformedImageError),
    "header checksum": (patched(sample(), HEADER + 800, b"x"), "header's checksum", MalformedImageError),
    "header version": (head(24, u32(0x20000)), "version 2.0", UnsupportedError),
    "block size 0": (head(32, u32(0)), "block size 0", MalformedImageError),
    "block size 512": (head(32, u32(512)), "block size 512", MalformedImageError),
    "block size odd": (head(32, u32(12288)), "block size 12288", MalformedImageError),
    "too few blocks": (head(28, u32(15)), "15 blocks", MalformedImageError),
    "too many blocks": (head(28, u32(1 << 30)), "at most", UnsupportedError),
    "table larger than the file": (head(28, u32(1 << 22)), "table at", MalformedImageError),
    "table on the footer": (head(16, u64(0)), "table at", MalformedImageError),
    "table on the header": (head(16, u64(1024)), "table at", MalformedImageError),
    "table unaligned": (head(16, u64(1537)), "table at", MalformedImageError),
    "table behind the end": (head(16, u64(1 << 40)), "table at", MalformedImageError),
    "table 2^64": (head(16, u64((1 << 64) - 512)), "table at", MalformedImageError),
    "block behind the end": (dynamic({0: b""}, bat={2: 1 << 20}), "behind the end", MalformedImageError),
    "block 2 TiB away": (dynamic({0: b""}, bat={2: 0xFFFFFFFE}), "behind the end", MalformedImageError),
    "block on the footer": (dynamic({0: b""}, bat={2: 0}), "on metadata", MalformedImageError),
    "block on the header": (dynamic({0: b""}, bat={2: 2}), "on metadata", MalformedImageError),
    "block on the table": (dynamic({0: b""}, bat={2: 3}), "on metadata", MalformedImageError),
    "block twice": (dynamic({0: b"", 1: b""}, bat={2: 4}), "overlaps", MalformedImageError),
    "blocks overlap": (dynamic({0: b"", 1: b""}, bat={2: 5}), "overlaps", MalformedImageError),
    "block on a locator's data": (
        dynamic({0: b""}, head=header(16, 4096, locators=[(b"W2ru", 512, 10, 2560)])),
        "on metadata",
        MalformedImageError,
    ),
    "cut inside the last block": (BLOCK[:-1000], "cut", MalformedImageError),
    "cut behind the copy": (sample()[:600], "dynamic header", MalformedImageError),
    "cut inside the copy": (sample()[:100], "ends", MalformedImageError),
    "footers disagree": (sample()[:-512] + footer(65536 - 512), "disagree", MalformedImageError),
    "fixed: checksum": (fixed(noise(4096))[:-1] + b"x", "footer's checksum", MalformedImageError),
    "fixed: cut": (fixed(noise(4096))[512:], "file was cut", MalformedImageError),
    "fixed: geometry larger": (
        fixed(noise(4096), creator=b"vpc ", geometry=(9, 1, 1)),
        "file was cut",
        MalformedImageError,
    ),
    "fixed: size 0": (bytes(512) + footer(0, kind=2), "0 sectors", MalformedImageError),
    "fixed: only a footer": (footer(512, kind=2), "no footer at its beginning", MalformedImageError),
    "the copy is missing": (bytes(512) + sample()[512:], "copy at the beginning is missing", MalformedImageError),
}


@pytest.mark.parametrize("case", CASES)
def test_malformed(tmp_path, case):
    data, message, kind = CASES[case]
    path = tmp_path / "a.vhd"
    path.write_bytes(data)
    with pytest.raises(kind, match=message) as caught, open_image(path) as image:
        image.read(0, image.virtual_size)
    assert caught.value.file == str(path)
    assert caught.value.field
    assert caught.value.offset is not None
    assert 0 <= caught.value.offset <= len(data)


def test_no_footer_at_all(tmp_path):
    path = tmp_path / "a.vhd"
    for data in (b"", b"x", bytes(511), bytes(5000)):
        path.write_bytes(data)
        with pytest.raises(FileError):
            open_image(path, VHD)


def test_a_table_of_the_greatest_size_is_checked_in_bounded_time_and_memory(tmp_path):
    path = tmp_path / "a.vhd"
    entries = 1 << 22
    first = (1536 + 4 * entries) // 512
    with path.open("wb") as file:
        file.write(footer(4096) + header(entries, 4096))
        file.seek(1536)
        # All blocks in descending order, of a sparse file that is large enough for them.
        for start in range(0, entries, 1 << 16):
            file.write(struct.pack(">65536I", *(first + 9 * (entries - 1 - start - i) for i in range(1 << 16))))
        file.truncate((first + 9 * entries) * 512)
    tracemalloc.start()
    began = time.process_time()
    with open_image(path) as image:
        assert image.read(0, 8192) == bytes(4096)
    assert time.process_time() - began < 2
    assert tracemalloc.get_traced_memory()[1] < 256 << 20
    tracemalloc.stop()


START = sample()
PLACES = [*range(0, 90), *range(HEADER, HEADER + 70), *range(HEADER + POINTER, HEADER + 768), *range(1536, 1600)]


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.tuples(st.sampled_from(PLACES), st.integers(0, 255)), max_size=6),
    st.integers(0, len(START) + 600),
    st.booleans(),
)
def test_any_damage(tmp_path, changes, size, repair):
    data = bytearray(START)
    for offset, value in changes:
        data[offset] = value
    if repair:  # checksums hold, so that what lies behind them is reached
        data[:512] = summed(bytes(data[:512]), 64)
        data[HEADER:1536] = summed(bytes(data[HEADER:1536]), 36)
        data[-512:] = data[:512]
    path = tmp_path / "a.vhd"
    path.write_bytes(bytes(data).ljust(size, b"\0")[: max(size, 1)])
    began = time.process_time()
    try:
        with open_image(path, VHD) as image:
            image.metadata()
            image.read(0, min(image.virtual_size, 1 << 20))
            for number, _extent in enumerate(image.extents()):
                if number > 1000:
                    break
            open_graft(image)
    except VmgraftError as problem:
        assert str(problem)
    assert time.process_time() - began < 2
