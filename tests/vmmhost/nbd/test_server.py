"""The protocol as clients meet it: our own byte by byte, and programs written by others."""

import json
import os
import stat
import struct
import subprocess
from pathlib import Path

import pytest

from vmgraft.errors import FileError, UsageError
from vmgraft.vmmhost.core.disk import VerifiedDisk
from vmgraft.vmmhost.nbd._layout import ChunkType, Errno, Rep
from vmgraft.vmmhost.nbd.server import NbdExport, NbdServer

from .conftest import BLOCK, HOLE, SIZE


def run(*args: str | Path) -> str:
    done = subprocess.run([str(a) for a in args], check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_nbdinfo_sees_the_exports_and_the_holes(world) -> None:
    _, uri = world.serve()
    listing = json.loads(run("nbdinfo", "--json", "--list", uri))
    assert [(e["export-name"], e["export-size"]) for e in listing["exports"]] == [("", SIZE), ("second", SIZE)]
    first = listing["exports"][0]
    assert first["is_read_only"]
    assert first["can_multi_conn"]
    assert first["description"] == "a disk"
    assert (first["block_size_minimum"], first["block_size_maximum"]) == (1, 32 << 20)
    extents = json.loads(run("nbdinfo", "--map", "--json", uri))
    assert [(e["offset"], e["length"], e["type"]) for e in extents] == [
        (0, HOLE.start, 0), (HOLE.start, len(HOLE), 3), (HOLE.stop, SIZE - HOLE.stop, 0),
    ]  # fmt: skip


def test_other_programs_copy_and_compare(world, tmp_path: Path) -> None:
    server, uri = world.serve()
    run("nbdcopy", uri, tmp_path / "copy.img")
    assert (tmp_path / "copy.img").read_bytes() == world.bytes
    copied = server.counters.bytes_read
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", uri, tmp_path / "copy.qcow2")
    assert "identical" in run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", world.path, tmp_path / "copy.qcow2")
    assert "identical" in run("qemu-img", "compare", "-f", "raw", "-F", "raw", world.path, uri)
    assert copied < SIZE - len(HOLE) // 2  # holes are skipped, but for what a request of its own size takes along


def test_writes_of_other_programs_go_to_the_overlay(world, tmp_path: Path) -> None:
    _, uri = world.serve(read_only=False)
    (tmp_path / "new.img").write_bytes(os.urandom(BLOCK) * 40 + bytes(SIZE - 40 * BLOCK))
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", tmp_path / "new.img", uri)
    assert "identical" in run("qemu-img", "compare", "-f", "raw", "-F", "raw", tmp_path / "new.img", uri)
    assert world.path.read_bytes() == world.bytes


def test_tcp_on_the_loopback_address(world) -> None:
    server = world.server()
    uri = server.listen_tcp("127.0.0.1", 0)
    server.start()
    assert json.loads(run("nbdinfo", "--json", uri))["exports"][0]["export-size"] == SIZE


def test_the_socket_is_its_owners_alone_and_goes_away(world, tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        server, _ = world.serve()
    finally:
        os.umask(old)
    made = tmp_path / "1.sock"
    assert stat.S_IMODE(made.stat().st_mode) == 0o600
    server.close()
    assert not made.exists()


def test_a_socket_that_is_there_is_refused_and_left(world, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    server = world.server()
    with pytest.raises(FileError, match="cannot listen"):
        server.listen_unix(tmp_path / "taken")
    with pytest.raises(UsageError, match="107 bytes"):
        server.listen_unix(tmp_path / ("x" * 120))
    assert (tmp_path / "taken").read_text() == "mine"


def test_names_are_checked() -> None:
    with pytest.raises(UsageError, match="names"):
        NbdServer([])


@pytest.mark.parametrize("no_zeroes", [0, 2])
def test_the_old_way_to_choose_an_export(world, no_zeroes: int) -> None:
    world.serve()
    client = world.connect()
    client.hello(1 | no_zeroes)
    client.socket.sendall(b"IHAVEOPT" + struct.pack(">II", 1, 6) + b"second")
    assert struct.unpack(">QH", client.take(10)) == (SIZE, 1 | 2 | 4 | 128 | 256)
    assert no_zeroes or client.take(124) == bytes(124)
    assert client.read(5, 10) == (0, world.bytes[5:15])


def test_options_are_answered_as_the_protocol_says(world) -> None:
    world.serve()
    client = world.connect()
    client.hello()
    assert client.option(5) == [(Rep.ERR_UNSUP, b"")]  # STARTTLS
    assert client.option(11) == [(Rep.ERR_UNSUP, b"")]  # EXTENDED_HEADERS
    assert client.option(3, b"x")[0][0] == Rep.ERR_INVALID
    assert client.option(7, struct.pack(">I", 4) + b"none\0\0")[0][0] == Rep.ERR_UNKNOWN
    assert client.option(7, struct.pack(">I", 99) + b"none\0\0")[0][0] == Rep.ERR_INVALID
    assert client.option(7, struct.pack(">I", 2) + b"\xff\xfe\0\0")[0][0] == Rep.ERR_INVALID
    query = struct.pack(">III", 0, 1, 5) + b"base:"
    assert client.option(10, query)[0][0] == Rep.ERR_INVALID  # before structured replies
    assert client.option(9, query)[0] == (Rep.META_CONTEXT, struct.pack(">I", 1) + b"base:allocation")
    assert client.option(8, b"x")[0][0] == Rep.ERR_INVALID
    assert client.option(2) == [(Rep.ACK, b"")]  # ABORT
    assert client.is_closed()


def test_commands_are_answered_as_the_protocol_says(world) -> None:
    world.serve()
    client = world.connect()
    client.go()
    assert client.read(SIZE - 1, 1) == (0, world.bytes[-1:])
    assert client.read(SIZE, 1)[0] == Errno.INVAL
    assert client.read(2**64 - 1, 2)[0] == Errno.INVAL
    assert client.read(0, (32 << 20) + 1)[0] == Errno.INVAL
    assert client.read(0, 0) == (0, b"")
    for kind in (4, 5, 6, 7, 99):  # TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS without a context, nothing
        client.request(kind, 0, 512)
        assert client.simple()[0] == Errno.INVAL
    client.request(0, 0, 512, flags=0x8000)
    assert client.simple()[0] == Errno.INVAL
    client.request(3, 0, 0)
    assert client.simple()[0] == 0
    client.request(1, 0, 512, data=bytes(512))
    assert client.simple()[0] == Errno.PERM
    assert client.read(0, 512) == (0, world.bytes[:512])
    client.request(2, 0, 0)
    assert client.is_closed()


def test_structured_replies(world) -> None:
    world.serve()
    client = world.connect()
    client.go(structured=True)
    client.request(0, 100, 50)
    assert client.chunk() == (1, ChunkType.OFFSET_DATA, struct.pack(">Q", 100) + world.bytes[100:150])
    client.request(0, 0, 0)
    assert client.chunk() == (1, ChunkType.NONE, b"")
    client.request(0, SIZE, 1)
    flags, kind, payload = client.chunk()
    assert (flags, kind, struct.unpack_from(">I", payload)[0]) == (1, ChunkType.ERROR, Errno.INVAL)
    client.request(7, 0, SIZE)
    assert client.chunk()[2] == struct.pack(">IIIIIII", 1, HOLE.start, 0, len(HOLE), 3, SIZE - HOLE.stop, 0)
    client.request(7, 0, SIZE, flags=8)  # REQ_ONE
    assert client.chunk()[2] == struct.pack(">III", 1, HOLE.start, 0)
    client.request(7, 0, 0)
    assert client.chunk()[1] == ChunkType.ERROR


def test_a_full_overlay_is_no_space(world) -> None:
    world.content._overlay_blocks = 1
    world.serve(read_only=False)
    client = world.connect()
    client.go()
    client.request(1, 0, 2 * BLOCK, flags=1, data=bytes(2 * BLOCK))
    assert client.simple()[0] == Errno.NOSPC
    client.request(1, SIZE - 1, 2, data=b"xy")
    assert client.simple()[0] == Errno.NOSPC
    client.request(1, 5, 2, data=b"xy")
    assert client.simple()[0] == 0
    assert client.read(4, 4) == (0, world.bytes[4:5] + b"xy" + world.bytes[7:8])


def test_wrong_content_is_an_error_then_silence_and_a_record(world) -> None:
    server, _ = world.serve()
    client, other = world.connect(), world.connect()
    client.go()
    other.go("second")
    assert other.read(0, 512) == (0, world.bytes[:512])
    world.spoil(5)
    assert client.read(4 * BLOCK, 4 * BLOCK) == (Errno.IO, b"")
    server.wait()
    assert server.failure is not None
    assert server.failure.code == "content-mismatch"
    assert server.failure.offset == 5 * BLOCK
    assert other.read(8 * BLOCK, 512) == (Errno.IO, b"")  # and nobody gets anything any more
    assert client.read(0, 512) == (Errno.IO, b"")
    (failure,) = [detail for event, detail in world.records if event == "nbd-failure"]
    assert failure["field"] == "block 5"


def test_any_disk_can_be_an_export(world) -> None:
    from vmgraft.imagefmt.tree import build_tree

    disk = VerifiedDisk(world.image, build_tree(world.image).check)
    with NbdServer([NbdExport("plain", disk)]) as server:
        uri = server.listen_unix(world.folder / "plain.sock")
        server.start()
        assert uri == f"nbd+unix:///plain?socket={world.folder}/plain.sock"
        assert "identical" in run("qemu-img", "compare", "-f", "raw", "-F", "raw", world.path, uri)


def test_once_ends_when_the_last_client_has_gone(world) -> None:
    server, _ = world.serve()
    idle = world.connect()  # one that only shakes hands does not count
    idle.hello()
    idle.option(2)
    client = world.connect()
    client.go()
    client.request(2, 0, 0)
    server.wait(once=True)
    assert server.summary()["clients"] == 1
