"""Checked content: the same bytes as the image, a private overlay, and nothing of a block that changed."""

import random
import threading

import pytest

from vmgraft.errors import ContentMismatchError
from vmgraft.imagefmt.tree import build_tree
from vmgraft.vmmhost.core.disk import OverlayFullError
from vmgraft.vmmhost.nbd.content import CheckedContent

from .conftest import BLOCK, HOLE, SIZE


def test_it_reads_what_the_image_holds(world) -> None:
    rng = random.Random(1)
    for _ in range(300):
        offset = rng.randrange(SIZE)
        length = rng.randrange(min(SIZE - offset, 4 * BLOCK) + 1)
        assert world.content.read(offset, length) == world.bytes[offset : offset + length]
    assert world.content.read(0, SIZE) == world.bytes
    assert world.content.read(SIZE, 0) == b""


def test_ranges_outside_are_refused(world) -> None:
    for offset, length in ((-1, 1), (0, SIZE + 1), (SIZE, 1), (0, -1)):
        with pytest.raises(ValueError, match="not inside"):
            world.content.read(offset, length)
        with pytest.raises(ValueError, match="not inside"):
            list(world.content.extents(offset, length))


def test_extents_come_from_what_was_verified(world) -> None:
    assert list(world.content.extents(0, SIZE)) == [
        (HOLE.start, False), (len(HOLE), True), (SIZE - HOLE.stop, False),
    ]  # fmt: skip
    assert list(world.content.extents(HOLE.start - 5, 10)) == [(5, False), (5, True)]
    world.content.write(HOLE.start + BLOCK, b"x")
    assert list(world.content.extents(HOLE.start, 3 * BLOCK)) == [(BLOCK, True), (BLOCK, False), (BLOCK, True)]


def test_verified_zeros_are_served_without_reading(world) -> None:
    checked = world.content.blocks_checked
    assert world.content.read(HOLE.start, len(HOLE)) == bytes(len(HOLE))
    assert world.content.blocks_checked == checked


@pytest.mark.parametrize("length", [1, BLOCK, 3 * BLOCK])
def test_a_block_that_changed_is_not_served(world, length: int) -> None:
    world.spoil(3)
    with pytest.raises(ContentMismatchError) as caught:
        world.content.read(3 * BLOCK + (5 if length == 1 else 0), length)
    assert caught.value.offset == 3 * BLOCK
    assert world.content.read(2 * BLOCK, BLOCK) == world.bytes[2 * BLOCK : 3 * BLOCK]


def test_whole_blocks_are_checked_every_time(world) -> None:
    assert world.content.read(BLOCK, BLOCK) == world.bytes[BLOCK : 2 * BLOCK]
    world.spoil(1)
    with pytest.raises(ContentMismatchError):
        world.content.read(BLOCK, BLOCK)


def test_a_file_that_became_shorter_is_noticed(world) -> None:
    with world.path.open("r+b") as file:
        file.truncate(35 * BLOCK)
    with pytest.raises(ContentMismatchError):
        world.content.read(36 * BLOCK, BLOCK)


def test_writes_stay_in_the_overlay(world) -> None:
    model = bytearray(world.bytes)
    rng = random.Random(2)
    for _ in range(100):
        offset = rng.randrange(SIZE)
        data = rng.randbytes(rng.randrange(min(SIZE - offset, 2 * BLOCK) + 1))
        world.content.write(offset, data)
        model[offset : offset + len(data)] = data
    assert world.content.read(0, SIZE) == model
    assert world.path.read_bytes() == world.bytes


def test_the_overlay_is_bounded_and_a_refused_write_changes_nothing(world) -> None:
    content = CheckedContent(world.image, build_tree(world.image), overlay_max=2 * BLOCK)
    content.write(0, b"x" * BLOCK)
    with pytest.raises(OverlayFullError):
        content.write(BLOCK, b"y" * 2 * BLOCK)
    assert content.blocks_written == 1
    assert content.read(BLOCK, BLOCK) == world.bytes[BLOCK : 2 * BLOCK]
    content.write(10, b"again")  # what is there already costs nothing


def test_writing_a_part_of_a_changed_block_is_refused_and_the_whole_is_not(world) -> None:
    world.spoil(2)
    with pytest.raises(ContentMismatchError):
        world.content.write(2 * BLOCK, b"part")
    world.content.write(2 * BLOCK, b"w" * BLOCK)
    assert world.content.read(2 * BLOCK, BLOCK) == b"w" * BLOCK


def test_many_threads_read_and_write_at_once(world) -> None:
    wrong: list[int] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        own = 32 + seed
        for turn in range(100):
            offset = rng.randrange(HOLE.stop - 1)
            length = rng.randrange(min(HOLE.stop - offset, 2 * BLOCK))
            if world.content.read(offset, length) != world.bytes[offset : offset + length]:
                wrong.append(offset)
            world.content.write(own * BLOCK, bytes([turn]) * BLOCK)
            if world.content.read(own * BLOCK, BLOCK) != bytes([turn]) * BLOCK:
                wrong.append(own)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
