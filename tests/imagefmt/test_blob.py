"""Blobs: the same bytes whether they are in memory or in a file; and records that are never in memory whole."""

import gc
import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmgraft.errors import FileError, UsageError
from vmgraft.imagefmt.blob import CHUNK, SMALL, Blob, BytesBlob, FileBlob, Spool, blob_of, file_blob, open_blob

DATA = os.urandom(CHUNK + 4321)


@pytest.fixture(scope="module")
def in_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("blob") / "data"
    path.write_bytes(b"before" + DATA + b"behind")
    with path.open("rb") as file:
        yield FileBlob(file.fileno(), 6, len(DATA), file=path)


@given(st.integers(-5, len(DATA) + 5), st.integers(-5, len(DATA) + 5))
def test_both_kinds_read_alike(in_file, offset, length):
    want = DATA[offset : offset + length] if offset >= 0 and length > 0 else b""
    assert in_file.read(offset, length) == BytesBlob(DATA).read(offset, length) == want


def test_whole_and_digest(in_file):
    assert in_file.read_all() == DATA
    assert [len(chunk) for chunk in in_file.chunks()] == [CHUNK, 4321]
    assert in_file.sha256 == sha256(DATA).digest()
    assert in_file == BytesBlob(DATA) and hash(in_file) == hash(BytesBlob(DATA))
    assert in_file != BytesBlob(DATA[:-1] + b"x") and in_file != DATA
    assert blob_of(DATA) == in_file and blob_of(in_file) is in_file


def test_a_file_that_was_cut_is_an_error(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(b"x" * 100)
    with path.open("rb") as file:
        blob = FileBlob(file.fileno(), 0, 100, file=path)
    os.truncate(path, 60)
    assert len(blob.read_all()) == 60
    with pytest.raises(FileError, match="ends at byte 60"):
        list(blob.chunks())


def test_a_file_that_was_cut_in_the_middle_of_a_later_chunk_is_an_error(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(DATA)
    with path.open("rb") as file:
        blobs = [FileBlob(file.fileno(), 0, len(DATA), file=path) for _ in range(2)]
    os.truncate(path, CHUNK + 1000)
    chunks = blobs[0].chunks()
    assert next(chunks) == DATA[:CHUNK]
    with pytest.raises(FileError, match=f"ends at byte {CHUNK + 1000} of them"):
        next(chunks)
    with pytest.raises(FileError, match="ends at byte"):
        assert blobs[1].sha256


class ShortBlob(Blob):
    """Claims a byte more than it has."""

    size = CHUNK + 10

    def read(self, offset, length):
        return bytes(CHUNK + 9)[offset : offset + length]


def test_any_blob_that_ends_early_is_an_error():
    with pytest.raises(FileError, match=f"ends at byte {CHUNK + 9} of them"):
        list(ShortBlob().chunks())


def test_small_files_are_read_at_once_and_large_ones_keep_a_descriptor(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(b"x" * (SMALL + 1))
    with path.open("rb") as file:
        small = file_blob(file.fileno(), 0, SMALL, file=path)
        large = file_blob(file.fileno(), 0, SMALL + 1, file=path)
    path.write_bytes(b"y" * (SMALL + 1))
    assert small.read(0, 1) == b"x" and large.read(0, 1) == b"y"
    fd = large._fd
    os.fstat(fd)
    del large
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_open_blob(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(DATA)
    assert open_blob(path, len(DATA)) == BytesBlob(DATA)
    with pytest.raises(UsageError, match="at most"):
        open_blob(path, len(DATA) - 1)
    with pytest.raises(FileError, match="regular"):
        open_blob(tmp_path, 10)


def test_spool(tmp_path):
    spool = Spool(tmp_path)
    spool.write(5, b"world")
    spool.write(0, b"hello")
    blob = spool.finish(10)
    assert blob.read_all() == b"helloworld"
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileError, match="temporary file"):
        Spool(tmp_path / "nowhere")


#: Attaches, reads back and detaches a sidecar record of the given number of 64 MiB sections; prints the peak memory.
STREAM = """
import sys
from pathlib import Path
from vmgraft.imagefmt.blob import open_blob
from vmgraft.imagefmt.contract import GraftState
from vmgraft.imagefmt.graft import Graft, attach_sections, detach_image, open_image
from vmgraft.imagefmt.record import Section, SectionKind
image, count, parts = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
sections = [Section(SectionKind.FILES, open_blob(parts / str(i), 64 << 20)) for i in range(count)]
sections[1] = Section(SectionKind.FILES, sections[1].raw, compress=True)
located = attach_sections(image, sections, tree_digest=bytes(32))
assert located.state is GraftState.OK and located.record.size > (count - 1) * (64 << 20)
with open_image(image) as opened:
    graft = Graft(opened)
    assert graft.format_problem() is None
    import hashlib
    for i in range(count):
        raw = (parts / str(i)).read_bytes()
        assert graft.payload(hashlib.sha256(raw).hexdigest()) == raw
        del raw
detach_image(image)
# Not ru_maxrss, which counts what the parent had before exec.
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def test_large_records_are_never_in_memory_whole(tmp_path):
    image = tmp_path / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(image), "4M"], check=True)
    before = image.read_bytes()
    count, parts = 6, tmp_path / "parts"
    parts.mkdir()
    for index in range(count):
        (parts / str(index)).write_bytes(os.urandom(1 << 20) * 64)
        with (parts / str(index)).open("r+b") as file:
            file.write(index.to_bytes(8, "big"))
    command = [sys.executable, "-c", STREAM, str(image), str(count), str(parts)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert int(done.stdout) < 300 << 10, "KiB"
    assert image.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk.qcow2", "parts"]
