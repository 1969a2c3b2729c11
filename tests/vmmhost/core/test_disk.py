"""Verified reading and the copy-on-write overlay."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmgraft.errors import ContentMismatchError, FileError
from vmgraft.vmmhost.core import disk as disk_module
from vmgraft.vmmhost.core.contract import EndReason
from vmgraft.vmmhost.core.disk import BLOCK, OverlayFullError, VerifiedDisk
from vmgraft.vmmhost.core.machine import Machine


def pattern(size: int) -> bytes:
    return bytes((index * 7 + (index >> 8)) & 0xFF for index in range(size))


def test_every_block_is_checked_with_its_real_bytes(content):
    seen = []
    disk = VerifiedDisk(
        content(pattern(2 * BLOCK + 512)), lambda index, block: seen.append((index, len(block))) or True
    )
    assert disk.read(0, disk.size) == pattern(disk.size)
    disk.read(BLOCK, 10)
    assert seen == [(0, BLOCK), (1, BLOCK), (2, 512)]
    assert disk.blocks_checked == 3


def test_mismatch_names_the_block(content):
    disk = VerifiedDisk(content(bytes(3 * BLOCK)), lambda index, _block: index != 2)
    disk.read(0, 2 * BLOCK)
    with pytest.raises(ContentMismatchError, match="block 2") as caught:
        disk.read(2 * BLOCK - 1, 2)
    assert caught.value.offset == 2 * BLOCK


def test_a_reader_that_runs_short_is_a_mismatch(content):
    reader = content(bytes(BLOCK))
    reader.virtual_size = 2 * BLOCK
    with pytest.raises(ContentMismatchError, match="block 1"):
        VerifiedDisk(reader, lambda _index, _block: True).read(BLOCK, 1)


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, -1), (BLOCK, 1), (BLOCK - 1, 2), (1 << 70, 1)])
def test_range_outside_the_disk(content, offset, length):
    disk = VerifiedDisk(content(bytes(BLOCK)), lambda _index, _block: True)
    with pytest.raises(ValueError, match="not inside"):
        disk.read(offset, length)
    if length >= 0:
        with pytest.raises(ValueError, match="not inside"):
            disk.write(offset, bytes(length))


def test_cache_is_bounded_and_evicted_blocks_are_checked_again(content, monkeypatch):
    monkeypatch.setattr(disk_module, "CACHE_BLOCKS", 2)
    reader = content(bytes(3 * BLOCK))
    good = [True]
    disk = VerifiedDisk(reader, lambda _index, _block: good[0])
    for index in (0, 1, 0, 2):
        disk.read(index * BLOCK, 1)
    assert len(reader.reads) == 3
    good[0] = False
    disk.read(0, 1)  # still cached: used more lately than block 1
    with pytest.raises(ContentMismatchError):
        disk.read(BLOCK, 1)


def test_overlay_is_bounded_and_the_image_untouched(content):
    reader = content(pattern(4 * BLOCK))
    disk = VerifiedDisk(reader, lambda _index, _block: True, overlay_max=2 * BLOCK)
    disk.write(BLOCK - 1, b"xy")
    disk.write(5, b"z")
    with pytest.raises(OverlayFullError):
        disk.write(2 * BLOCK, b"w")
    assert disk.read(BLOCK - 2, 4) == pattern(BLOCK)[-2:-1] + b"xy" + pattern(2 * BLOCK)[BLOCK + 1 : BLOCK + 2]
    assert disk.read(2 * BLOCK, 1) == pattern(3 * BLOCK)[2 * BLOCK : 2 * BLOCK + 1]
    assert bytes(reader.data) == pattern(4 * BLOCK)
    assert disk.blocks_written == 2


SIZE = 2 * BLOCK + 1000


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, SIZE), st.binary(max_size=300), st.booleans()), max_size=20))
def test_disk_behaves_like_a_byte_array(operations):
    class Reader:
        virtual_size, sector_size = SIZE, 512

        def read(self, offset, length):
            return pattern(SIZE)[offset : offset + length]

    disk, model = VerifiedDisk(Reader(), lambda _index, _block: True), bytearray(pattern(SIZE))
    for offset, raw, write in operations:
        data = raw[: SIZE - offset]
        if write:
            disk.write(offset, data)
            model[offset : offset + len(data)] = data
        assert disk.read(offset, len(data)) == model[offset : offset + len(data)]
    assert disk.read(0, SIZE) == model


def run_with(engine, reader, check) -> tuple[EndReason, str]:
    with Machine(engine, VerifiedDisk(reader, check), timeout=20, memory_mib=4) as machine:
        result = machine.run()
    return result.reason, result.detail


def test_guest_stops_at_a_block_that_changed(engine, guest):
    boot = guest("overlay", 4 * BLOCK)
    loads = []

    def check(index: int, _block: bytes) -> bool:
        loads.append(index)
        return index != 1

    # the guest's packet asks for LBA 2; patch it to a sector of block 1
    at = bytes(boot.data).index(bytes((16, 0, 1, 0, 0, 0x80)))
    code = bytes(boot.data).index(b"\xc6\x06")  # mov byte [packet+8], 2
    boot.data[code + 4] = 200
    assert boot.data[at] == 16
    reason, detail = run_with(engine, boot, check)
    assert (reason, detail) == (EndReason.DISK, "block 1 of the guest content is not what was verified")
    assert loads == [0, 1]


def test_unreadable_image_ends_the_run(engine, guest):
    boot = guest("overlay", 4 * BLOCK)
    first = boot.read

    def read(offset: int, length: int) -> bytes:
        if offset:
            raise FileError("input/output error", file="disk.raw", offset=offset)
        return first(offset, length)

    boot.read = read
    code = bytes(boot.data).index(b"\xc6\x06")
    boot.data[code + 4] = 200
    reason, detail = run_with(engine, boot, lambda _index, _block: True)
    assert reason is EndReason.ERROR
    assert detail == "disk.raw, offset 65536: input/output error"
