"""Moving a disk's content from one image to a new one: every data byte is read once, hashed and stored."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from sys import maxsize

from vmgraft.imagefmt.contract import Image, Progress
from vmgraft.imagefmt.tree import data_runs, read_blocks, reader_count
from vmgraft.imagefmt.treenodes import BLOCK_SIZE, ContentTree, TreeBuilder, leaf_hashes
from vmgraft.imagefmt.write.base import DiskWriter

#: Bytes read at a time; a multiple of the largest unit a format asks for.
_CHUNK = 2 << 20


def write_content(image: Image, writer: DiskWriter, *, progress: Progress | None = None) -> ContentTree:
    """Store the content of ``image`` with ``writer``, and finish the new image.

    Several threads read, hash and compress, each its own part, and take turns to store it in order. So the result does
    not depend on their timing, and what is stored is still in the processor's cache.

    Args:
        image: Its ``readinto`` must be safe to call from several threads.
        writer: A fresh writer for a content of the same size.
        progress: Called from this thread with (bytes done, bytes in all) of the content.

    Returns:
        The content tree of what was read, without leaves.

    Raises:
        MalformedImageError: the extents have gaps or reads end early.
        FileError: the image cannot be read, or the new one not be written.
    """
    job = _Job(image, writer)
    workers = reader_count()
    waiting: deque[tuple[int, Future[None]]] = deque()

    def collect() -> None:
        position, future = waiting.popleft()
        future.result()
        if progress is not None:
            progress(position, image.virtual_size)

    pool = ThreadPoolExecutor(workers, thread_name_prefix="vmgraft-copy")
    try:
        for number, (position, end) in enumerate(_chunks(image, writer.alignment)):
            # Each with a copy of this context, so that whoever observes the writes sees those of all threads.
            waiting.append((position, pool.submit(copy_context().run, job.move, number, position, end)))
            if len(waiting) > 2 * workers:
                collect()
        while waiting:
            collect()
    finally:
        pool.shutdown(cancel_futures=True)
    writer.finish()
    if progress is not None:
        progress(image.virtual_size, image.virtual_size)
    return job.builder.finish()


class _Job:
    """What the threads share."""

    def __init__(self, image: Image, writer: DiskWriter) -> None:
        self._image, self._writer = image, writer
        self.builder = TreeBuilder(image.virtual_size, keep_leaves=False)
        self._turns = _Turns()
        self._own = threading.local()

    def move(self, number: int, position: int, end: int) -> None:
        """Move one part of the content, the ``number``-th."""
        buffer = getattr(self._own, "buffer", None)
        if buffer is None:
            buffer = self._own.buffer = memoryview(bytearray(_CHUNK))
        view = buffer[: end - position]
        with self._turns.stopped_by_failure(number):
            read_blocks(self._image, position, view)
            blocks = -(-(self._image.virtual_size - position) // BLOCK_SIZE)  # alignment may add some behind the end
            hashes = leaf_hashes(view[: blocks * BLOCK_SIZE])
            pieces = [] if hashes is None else self._writer.pieces(position, view)
            with self._turns.take(number):
                self.builder.add(position, hashes)
                for piece in pieces:
                    self._writer.store(piece)


class _Turns:
    """Lets threads do one thing each in the order of their numbers; a failure ends it for all numbers behind."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._next = 0
        self._failed = maxsize

    @contextmanager
    def take(self, number: int) -> Iterator[None]:
        """Wait for the turn of ``number``, and pass it on when the block ends well."""
        with self._changed:
            self._changed.wait_for(lambda: self._next == number or self._failed < number)
            if self._failed < number:
                raise CancelledError
        yield
        with self._changed:
            self._next += 1
            self._changed.notify_all()

    @contextmanager
    def stopped_by_failure(self, number: int) -> Iterator[None]:
        """Let nobody wait for ``number`` when the block fails."""
        try:
            yield
        except BaseException:
            with self._changed:
                self._failed = min(self._failed, number)
                self._changed.notify_all()
            raise


def _chunks(image: Image, alignment: int) -> Iterator[tuple[int, int]]:
    """Cut the data runs at multiples of the chunk size; their ends are moved to multiples of ``alignment``."""
    done = 0
    for start, end in data_runs(image):
        position = max(done, start // alignment * alignment)
        done = max(done, -(-end // alignment) * alignment)
        while position < done:
            stop = min(done, (position // _CHUNK + 1) * _CHUNK)
            yield position, stop
            position = stop
