"""Snapshots of a running guest: it goes on where it was kept, and only from the very file of the very guest."""

import fcntl
import hashlib
import json
import os
import socket
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from control_world import CLOCK, World, vmgraft
from hypothesis import given, settings
from hypothesis import strategies as st

from vmgraft.errors import FileError, HostError, UsageError, VmgraftError
from vmgraft.vmmhost.control.client import ControlClient
from vmgraft.vmmhost.control.wire import Op, Request
from vmgraft.vmmhost.core.contract import EndReason
from vmgraft.vmmhost.launch import Launcher, RunReport
from vmgraft.vmmhost.layer.states import ExtensionState
from vmgraft.vmmhost.plan import RunOptions
from vmgraft.vmmhost.snapshots import container
from vmgraft.vmmhost.snapshots.extensions import pack, unpack

#: Sends what port 510h says to COM1, for ever.
COUNT = bytes.fromhex("ba1005 ed baf803 ee ebf6".replace(" ", ""))
#: Counts the reads; keeps the count.
COUNTER = """(import "vmgraft" "set_buffer" (func $set (param i32 i32)))
  (import "vmgraft" "get_buffer" (func $get (param i32 i32 i32) (result i32)))"""
BODY = """(func (export "on_pio_read") (param i32 i32) (result i64)
    (i32.store (i32.const 0) (i32.add (i32.load (i32.const 0)) (i32.const 1)))
    (i64.load32_u (i32.const 0)))
  (func (export "on_snapshot") (result i32) (call $set (i32.const 0) (i32.const 4)) (i32.const 4))
  (func (export "on_restore") (param i32) (result i32)
    (i32.ne (call $get (i32.const 0) (i32.const 0) (i32.const 4)) (i32.const 4)))"""


class Counting(World):
    """A guest that shows how far its extension has counted."""

    def __init__(self, studio: Any) -> None:
        studio.boot_code(COUNT)
        super().__init__(studio)
        studio.boot_code(COUNT)
        self.module = studio.wat(BODY, COUNTER)
        self.image = self.make("disk.img", self.package(CLOCK))
        self.kept = self.folder / "guest.snap"

    def run(self, **chosen: Any) -> RunReport:
        options = RunOptions(**({"cpu": "soft", "timeout": 60, "restore": self.kept} | chosen))
        return Launcher(self.image, self.studio.policy, options).run()

    def keep(self, **chosen: Any) -> bytes:
        """Run the guest, keep it on the way; return all that it sent."""
        with self.guest(**chosen) as (client, reports):
            done = client.snapshot(self.kept)
            assert done == {"bytes": self.kept.stat().st_size, "sha256": self.kept.read_bytes()[-32:].hex()}
        return serial(reports[0])

    def counted(self) -> int:
        """Return how far the extension had counted when it was kept."""
        data = self.kept.read_bytes()
        (state,) = unpack(data[data.rindex(b'[{"id": "') : -32])
        assert state.state is not None
        return int.from_bytes(state.state, "little")


def serial(report: RunReport) -> bytes:
    assert report.result is not None
    assert report.result.reason is EndReason.SHUTDOWN, report.result.detail
    return report.result.serial


def goes_on(sent: bytes, start: int) -> bool:
    """Say whether bytes count on from a number, of which only the low byte is sent."""
    return len(sent) > 100 and sent == bytes(start + index & 0xFF for index in range(len(sent)))


@pytest.fixture(scope="module")
def kept(make_studio: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Counting, bytes]:
    world = Counting(make_studio(tmp_path_factory.mktemp("kept")))
    return world, world.keep()


def test_a_guest_and_its_extension_go_on(kept: tuple[Counting, bytes]) -> None:
    world, whole = kept
    assert goes_on(whole, 1), "keeping it changed nothing"
    assert stat.S_IMODE(world.kept.stat().st_mode) == 0o600
    assert [record["event"] for record in world.studio.log()].count("snapshot") == 1
    for again in ("first", "second"):
        log = world.folder / again
        with world.guest(restore=world.kept, audit_log=log) as (client, reports):
            while client.ask(Op.STATS)["extensions"][0]["calls"] < 500:
                time.sleep(0.01)
        rest, count = serial(reports[0]), world.counted()
        # It rests between any two instructions: what was read last may have been sent or not.
        assert goes_on(rest, count) or goes_on(rest, count + 1)
        records = [json.loads(line) for line in log.read_text().splitlines()]
        (restored,) = [record for record in records if record["event"] == "restore"]
        assert restored["sha256"] == world.kept.read_bytes()[-32:].hex()
        plan = reports[0].plan
        assert plan is not None
        assert plan.to_dict()["restoreSha256"] == restored["sha256"]


def test_what_an_extension_left_in_guest_memory_comes_back(studio: Any) -> None:
    """Its window is a memory file of its own, mapped in its worker too; and it has no state besides."""
    world = Counting(studio)
    imports = """(import "vmgraft" "guest_read" (func $read (param i64 i32 i32) (result i32)))
      (import "vmgraft" "guest_write" (func $write (param i64 i32 i32) (result i32)))"""
    body = """(func (export "on_pio_read") (param i32 i32) (result i64)
      (drop (call $read (i64.const 0x20000) (i32.const 0) (i32.const 4)))
      (i32.store (i32.const 0) (i32.add (i32.load (i32.const 0)) (i32.const 1)))
      (drop (call $write (i64.const 0x20000) (i32.const 0) (i32.const 4)))
      (i64.load8_u (i32.const 1)))"""
    claims = ["guest:0x20000+0x1000:rw", "pio:0x510-0x517"]
    world.image.write_bytes(studio.guest.ljust(1 << 20, b"\0"))
    studio.graft(studio.wat(body, imports), world.image, id=CLOCK, capabilities=claims)
    with world.guest() as (client, reports):
        while client.ask(Op.STATS)["extensions"][0]["calls"] < 600:
            time.sleep(0.01)
        client.snapshot(world.kept)
    assert serial(reports[0])[0] == 0
    with world.guest(restore=world.kept, audit_log=world.folder / "again") as (client, reports):
        while client.ask(Op.STATS)["extensions"][0]["calls"] < 100:
            time.sleep(0.01)
    rest = serial(reports[0])
    assert rest[0] >= 600 >> 8
    assert all((after - before) % 256 in (0, 1) for before, after in pairwise(rest))


def test_as_programs(studio: Any, cpu: str) -> None:
    """The host has given up its rights when it keeps the guest."""
    world = Counting(studio)
    command = [sys.executable, "-m", "vmgraft", "run", world.image, "--policy", studio.policy, "--cpu", cpu]
    command += ["--timeout", "60", "--state", "none", "--control", world.socket]

    def run(output: Path, *more: str | Path) -> bytes:
        with output.open("wb") as file:
            process = subprocess.Popen([*command, *more], stdout=file)
        try:
            while output.stat().st_size < 200:
                assert process.poll() is None
                time.sleep(0.01)
            if not more:
                assert b"sha256:" in vmgraft("ctl", world.socket, "snapshot", world.kept).stdout
            with ControlClient(world.socket) as client:
                client.ask(Op.STOP)
            assert process.wait(60) == 0
        finally:
            process.kill()
            process.wait()
        return output.read_bytes()

    assert goes_on(run(world.folder / "first"), 1)
    rest, count = run(world.folder / "rest", "--restore", world.kept), world.counted()
    assert count >= 200
    assert goes_on(rest, count) or goes_on(rest, count + 1)


# --- what is refused -------------------------------------------------------------------------------------------------


def other_image(world: Counting) -> dict[str, Any]:
    world.image = world.make("other.img", world.package(CLOCK), code=b"\x90" + world.studio.guest[1:])
    return {}


def other_module(world: Counting) -> dict[str, Any]:
    module = world.studio.wat(BODY + '(func (export "more"))', COUNTER)
    world.image = world.make("newer.img", world.package(CLOCK, module=module))
    return {}


@pytest.mark.parametrize(
    ("change", "kind", "field"),
    [
        (other_image, UsageError, "contentTree"),
        (other_module, UsageError, "extensions"),
        (lambda world: {"memory_mib": 32}, UsageError, "memoryMiB"),
        (lambda world: {"boot": "disk"}, UsageError, "boot"),
        (lambda world: {"extensions": False}, UsageError, "extensions"),
        (lambda world: {"cpu": "kvm"}, HostError, "cpu"),
        (lambda world: {"record": world.folder / "tape"}, UsageError, "restore"),
        (lambda world: {"engine": "qemu"}, UsageError, "restore"),
    ],
)  # fmt: skip
def test_another_run_does_not_take_it(
    kept: tuple[Counting, bytes], change: Callable[[Counting], dict[str, Any]], kind: type[VmgraftError], field: str
) -> None:
    world, _whole = kept
    image = world.image
    try:
        with pytest.raises(kind) as caught:
            world.run(**change(world))
    finally:
        world.image = image
    assert (caught.value.field, caught.value.hint is not None) == (field, True)


def test_the_image_is_verified_all_the_same(kept: tuple[Counting, bytes]) -> None:
    """A snapshot does not stand in for a signature: a changed image is refused before it is looked at."""
    world, _whole = kept
    image = world.image
    data = bytearray(image.read_bytes())
    data[700_000] ^= 1
    world.image = written(world.folder / "bad.img", bytes(data))
    try:
        report = world.run(restore=world.folder / "none", verify_all=True)
    finally:
        world.image = image
    assert (report.error, report.result) == ("content-mismatch", None)


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_may_write_is_refused(kept: tuple[Counting, bytes], tmp_path: Path, mode: int) -> None:
    world, _whole = kept
    copy = tmp_path / "copy"
    copy.write_bytes(world.kept.read_bytes())
    copy.chmod(mode)
    with pytest.raises(FileError, match="others may write"):
        world.run(restore=copy)


def test_a_file_of_another_user_is_refused(kept: tuple[Counting, bytes], tmp_path: Path) -> None:
    world, _whole = kept
    if os.geteuid() != 0:
        pytest.skip("only root gives files away")
    copy = tmp_path / "copy"
    copy.write_bytes(world.kept.read_bytes())
    os.chown(copy, 65534, 65534)
    with pytest.raises(FileError, match="belongs to user 65534"):
        world.run(restore=copy)


def test_what_is_no_file_is_not_waited_for(kept: tuple[Counting, bytes], tmp_path: Path) -> None:
    world, _whole = kept
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(world.kept)
    for name in ("fifo", "link", ".", "none"):
        with pytest.raises(FileError):
            world.run(restore=tmp_path / name)
    with pytest.raises(FileError, match="no regular file"):
        world.run(restore=Path("/dev/zero"))


@pytest.fixture(scope="module")
def plan(kept: tuple[Counting, bytes]) -> Any:
    world, _whole = kept
    report = Launcher(world.image, world.studio.policy, RunOptions(cpu="soft")).plan()
    assert report.plan is not None
    return report.plan


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    path.chmod(0o600)
    return path


def sealed(data: bytes) -> bytes:
    """Return a snapshot with its hash made right."""
    return data[:-32] + hashlib.sha256(data[:-32]).digest()


@pytest.mark.parametrize(
    ("damage", "field"),
    [
        (lambda data: b"", "head"),
        (lambda data: data[:40], "head"),
        (lambda data: b"x" + data[1:], "magic"),
        (lambda data: data[:8] + b"\2" + data[9:], "version"),
        (lambda data: data[:-1], "length"),
        (lambda data: data + b"\0", "length"),
        (lambda data: data[:12] + b"\xff" * 4 + data[16:], "length"),
        (lambda data: data[:16] + b"\xff" * 8 + data[24:], "length"),
        (lambda data: data[:100] + bytes((data[100] ^ 1,)) + data[101:], "hash"),
        (lambda data: data[:-1] + bytes((data[-1] ^ 1,)), "hash"),
        (lambda data: sealed(data.replace(b'"soft"', b'"ssot"', 1)), "header"),
        (lambda data: sealed(data.replace(b'"binding"', b'"bindinx"', 1)), "header"),
        (lambda data: sealed(data.replace(b'{"vmgraft"', b'["vmgraft"', 1)), None),
    ],
)  # fmt: skip
def test_a_damaged_file_is_one_error(
    kept: tuple[Counting, bytes], plan: Any, tmp_path: Path, damage: Callable[[bytes], bytes], field: str | None
) -> None:
    path = written(tmp_path / "snap", damage(kept[0].kept.read_bytes()))
    with pytest.raises(FileError) as caught:
        container.read_snapshot(path, plan)
    assert (caught.value.file, caught.value.field) == (str(path), field)


def test_a_file_that_is_too_long_is_not_read(
    kept: tuple[Counting, bytes], plan: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = kept[0].kept.stat().st_size
    monkeypatch.setattr(container, "largest", lambda _plan: size - 1)
    with pytest.raises(FileError, match="longer than one of this machine can be"):
        container.read_snapshot(kept[0].kept, plan)


def test_every_byte_counts(kept: tuple[Counting, bytes], plan: Any, tmp_path: Path) -> None:
    """Changed anywhere, with the hash made right or not: one error, or a guest that is the same."""
    data = kept[0].kept.read_bytes()
    path = tmp_path / "snap"

    @given(st.integers(0, len(data) - 33), st.integers(1, 255), st.booleans())
    @settings(max_examples=150, deadline=None)
    def check(at: int, change: int, mend: bool) -> None:
        changed = data[:at] + bytes((data[at] ^ change,)) + data[at + 1 :]
        written(path, sealed(changed) if mend else changed)
        try:
            found = container.read_snapshot(path, plan)
        except (FileError, UsageError) as error:
            assert error.file == str(path)
        else:
            assert mend
            assert len(found.machine) < len(data)

    check()


def test_a_machine_part_that_was_changed_ends_the_run(kept: tuple[Counting, bytes], tmp_path: Path) -> None:
    """The outer hash made right: what is inside is looked at again, and nothing of the guest runs."""
    world, _whole = kept
    data = world.kept.read_bytes()
    _magic, _version, header, _machine = struct.unpack_from("<8sIIQ", data)
    start = 24 + header
    for at in (start, start + 9, start + 40, len(data) - 40):
        changed = data[:at] + bytes((data[at] ^ 0x41,)) + data[at + 1 :]
        path = written(tmp_path / f"snap{at}", sealed(changed))
        with pytest.raises(HostError) as caught:
            world.run(restore=path)
        assert caught.value.file == str(path)


STATE = ExtensionState("a.b", "1.0", "00" * 32, b"state", {b"k": b"v"}, frozenset({5}))


def test_states_come_back() -> None:
    states = (STATE, ExtensionState("c.d", "2.0", "11" * 32))
    assert unpack(pack(states)) == states


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("id", None), ("id", "x" * 256), ("version", 7), ("moduleSha256", []), ("state", "0"), ("state", "zz"),
        ("state", "00" * 65537), ("state", 5), ("store", {}), ("store", [["00"]]), ("store", [["00", 1]]),
        ("store", [["00", "00"]] * 1025), ("store", [["00" * 65, "00"]]), ("irqs", 5), ("irqs", [16]), ("irqs", [-1]),
        ("irqs", [True]), ("irqs", [0] * 17),
    ],
)  # fmt: skip
def test_states_that_make_no_sense(name: str, value: Any) -> None:
    (document,) = json.loads(pack([STATE]))
    for raw in (json.dumps([document | {name: value}]), json.dumps([document, document]), "[1]", "{}", "[" * 99, ""):
        with pytest.raises(HostError):
            unpack(raw.encode())


# --- the socket ------------------------------------------------------------------------------------------------------


def held() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture
def client(studio: Any) -> Iterator[tuple[World, ControlClient]]:
    world = World(studio)
    with world.guest() as (client, _reports):
        yield world, client


def test_an_extension_that_is_gone_is_not_kept(studio: Any) -> None:
    world = World(studio)
    world.module = studio.wat('(func (export "on_pio_read") (param i32 i32) (result i64) unreachable)')
    world.image = world.make("trap.img", world.package(CLOCK))
    with world.guest() as (client, _reports):
        while client.ask(Op.STATUS)["extensions"][0]["state"] == "running":
            time.sleep(0.01)
        with pytest.raises(HostError, match="does not run any more"):
            client.snapshot(world.folder / "snap")
        assert not (world.folder / "snap").exists()
        client.ask(Op.UNLOAD, CLOCK)
        client.snapshot(world.folder / "snap")
        assert (world.folder / "snap").stat().st_size > 4096


def test_nothing_is_written_over_and_nothing_is_left(client: tuple[World, ControlClient]) -> None:
    world, guest = client
    taken = world.folder / "taken"
    taken.write_bytes(b"mine")
    before = sorted(path.name for path in world.folder.iterdir())
    with pytest.raises(UsageError, match="exists already"):
        guest.snapshot(taken)
    with pytest.raises(FileError):
        guest.snapshot(world.folder / "no" / "folder")
    assert taken.read_bytes() == b"mine"
    assert sorted(path.name for path in world.folder.iterdir()) == before
    assert guest.ask(Op.STATUS)["extensions"]


@pytest.mark.parametrize("what", ["pipe", "file", "sealed", "full", "read-only"])
def test_only_an_empty_memory_file_is_filled(client: tuple[World, ControlClient], what: str) -> None:
    world, guest = client
    fds = []
    if what == "pipe":
        fds += os.pipe()[::-1]
    elif what == "file":
        fds.append(os.open(world.folder / "plain", os.O_RDWR | os.O_CREAT))
    else:
        fds.append(os.memfd_create("x", os.MFD_ALLOW_SEALING))
    if what == "sealed":
        fcntl.fcntl(fds[0], fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    elif what == "full":
        os.write(fds[0], b"x")
    elif what == "read-only":
        fds.insert(0, os.open(f"/proc/self/fd/{fds[0]}", os.O_RDONLY))
    try:
        if what == "file":
            with open("/proc/mounts", encoding="utf-8") as mounts:
                if any(line.split()[1:3] == ["/tmp", "tmpfs"] for line in mounts):
                    pytest.skip("temporary files are memory here, as good as any other")
        with pytest.raises(UsageError):
            guest._ask(Request(Op.SNAPSHOT), fds[0])
    finally:
        for fd in fds:
            os.close(fd)
    assert guest.ask(Op.STATUS)["extensions"]


def test_one_who_goes_away_while_it_is_kept_leaves_nothing(client: tuple[World, ControlClient]) -> None:
    world, guest = client
    guest.ask(Op.STATUS)
    before = held()
    for _ in range(5):
        fd = os.memfd_create("x", os.MFD_ALLOW_SEALING)
        with ControlClient(world.socket) as hasty:
            socket.send_fds(hasty._socket, [b'{"op": "snapshot"}\n'], [fd])
        os.close(fd)
    assert guest.ask(Op.STATUS)["extensions"]
    deadline = time.monotonic() + 10
    while held() > before and time.monotonic() < deadline:
        time.sleep(0.05)
        guest.ask(Op.STATUS)
    assert held() <= before
