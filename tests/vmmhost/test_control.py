"""The control socket: what it shows, what it changes after a whole verification, and what it refuses."""

import array
import fcntl
import json
import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from control_world import ALARM, CLOCK, READ_BOTH, World

from vmgraft.errors import (
    CapabilityError,
    ContentMismatchError,
    FileError,
    GraftFormatError,
    HostError,
    NoGraftError,
    RequiredExtensionError,
    RollbackError,
    UntrustedSignerError,
    UsageError,
    VmgraftError,
)
from vmgraft.inspect.extract import extract_part
from vmgraft.signing.keys import generate
from vmgraft.vmmhost.control.client import ControlClient, sealed_copy
from vmgraft.vmmhost.control.server import ACCEPTS, MAX_CLIENTS, MAX_RECORDS, ControlServer
from vmgraft.vmmhost.control.wire import MAX_REQUEST, Op, Request, parse_request
from vmgraft.vmmhost.core.contract import EndReason
from vmgraft.vmmhost.launch import Launcher, RunReport
from vmgraft.vmmhost.plan import RunOptions


@pytest.fixture
def world(studio: Any) -> World:
    return World(studio)


def running(client: ControlClient) -> dict[str, str]:
    return {item["id"]: item["version"] for item in client.ask(Op.STATUS)["extensions"] if item["state"] == "running"}


# --- looking ---------------------------------------------------------------------------------------------------------


def test_what_a_look_shows(world: World) -> None:
    with world.guest() as (client, reports):
        status = client.ask(Op.STATUS)
        assert (status["engine"], status["image"], running(client)) == ("soft", str(world.image), {CLOCK: "1.0"})
        first = client.ask(Op.STATS)
        time.sleep(0.2)
        second = client.ask(Op.STATS)
        assert second["exits"]["pio"] > first["exits"]["pio"] > 0
        assert second["virtualNs"] > first["virtualNs"]
        (clock,) = second["extensions"]
        assert clock["calls"] > first["extensions"][0]["calls"] > 0
        times = clock["latencyMicroseconds"]
        assert 0 < times["p50"] <= times["p90"] <= times["p99"] <= times["max"]
        assert clock["fuel"]["total"] >= clock["calls"] > 0, "every call uses some"
        assert 0 < clock["fuel"]["max"] < 100, "a constant is all it answers"
        screen = client.ask(Op.SCREEN)
        assert len(screen["lines"]) == 25
        client.ask(Op.STOP)
    (report,) = reports
    assert report.result is not None
    assert (report.result.reason, report.error) == (EndReason.SHUTDOWN, None)
    assert report.control is not None
    assert report.control["done"] == 6  # STATUS and STATS twice each, SCREEN, STOP
    # A look is logged once a connection, a change each time.
    assert [record["op"] for record in world.requests()] == ["status", "stats", "screen", "stop"]
    assert world.requests()[0]["uid"] == os.geteuid() and world.requests()[0]["pid"] == os.getpid()


# --- changing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_record", [False, True])
def test_load_replace_unload(world: World, as_record: bool) -> None:
    both = world.make("both.img", world.package(CLOCK, version=2), world.package(ALARM))
    if as_record:
        (world.folder / "both.rec").write_bytes(extract_part(both, "record"))
        both = world.folder / "both.rec"
    with world.guest() as (client, reports):
        plans = [client.ask(Op.STATUS)["planSha256"]]
        for op, name, expected in (
            (Op.LOAD, ALARM, {CLOCK: "1.0", ALARM: "1.0"}),
            (Op.REPLACE, CLOCK, {CLOCK: "2.0", ALARM: "1.0"}),
        ):
            plans.append(client.offer(op, both, extension=name)["planSha256"])
            assert running(client) == expected
        before = {item["id"]: item["calls"] for item in client.ask(Op.STATS)["extensions"]}
        time.sleep(0.2)
        after = {item["id"]: item["calls"] for item in client.ask(Op.STATS)["extensions"]}
        assert after[CLOCK] > before[CLOCK] and after[ALARM] > before[ALARM], "the guest reaches both"
        with pytest.raises(RollbackError, match="runs with security version 2, and this has 1"):
            client.offer(Op.REPLACE, world.make("old.img", world.package(CLOCK)))
        plans.append(client.ask(Op.UNLOAD, CLOCK)["planSha256"])
        assert running(client) == {ALARM: "1.0"}
        assert len(set(plans)) == 4
    assert [(r["op"], r["id"], r["ok"]) for r in world.requests() if r["op"] not in ("status", "stats", "stop")] == [
        ("load", ALARM, True), ("replace", CLOCK, True), ("replace", None, False), ("unload", CLOCK, True)]  # fmt: skip
    assert [record["sha256"] for record in world.studio.log() if record["event"] == "plan"] == plans
    assert reports[0].plan is not None and reports[0].plan.digest == plans[-1]


Offer = Callable[[ControlClient, World], Any]


def _offer(op: Op, *packages: tuple[Any, ...], name: str | None = None, **made: Any) -> Offer:
    def offer(client: ControlClient, world: World) -> Any:
        built = [world.package(*args[:-1], **args[-1]) for args in packages]
        return client.offer(op, world.make("offer.img", *built, **made), extension=name)

    return offer


def _spoilt(client: ControlClient, world: World) -> Any:
    record = bytearray(extract_part(world.make("offer.img", world.package(ALARM)), "record"))
    record[len(record) // 2] ^= 1
    return _send_record(client, bytes(record))


def _send_record(client: ControlClient, data: bytes) -> Any:
    from vmgraft.imagefmt.blob import BytesBlob

    fd = sealed_copy(BytesBlob(data))
    try:
        return client._ask(Request(Op.LOAD), fd)
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("offer", "kind", "words"),
    [
        (_offer(Op.LOAD, (ALARM, {}), code=b"\xf4"), ContentMismatchError, None),
        (_offer(Op.LOAD, (ALARM, {}), key=generate("p256")), UntrustedSignerError, None),
        (_offer(Op.LOAD, (ALARM, "pio:0x530-0x531", {})), CapabilityError, "0x530"),
        (_offer(Op.LOAD, (ALARM, "pio:0x516-0x527", {})), CapabilityError, CLOCK),
        (_offer(Op.LOAD, (ALARM, {"module": b"\0asm no"})), GraftFormatError, None),
        (_offer(Op.LOAD, (CLOCK, {})), UsageError, "runs already"),
        (_offer(Op.LOAD, (CLOCK, {}), (ALARM, {})), UsageError, "say which"),
        (_offer(Op.LOAD, (ALARM, {}), name="org.example.other"), UsageError, "say which"),
        (_offer(Op.REPLACE, (ALARM, {})), UsageError, "does not run here"),
        (_offer(Op.REPLACE, (CLOCK, {"version": 0})), RollbackError, "1 is the lowest"),
        (_offer(Op.REPLACE, (CLOCK, {"module": b"\0asm no"})), GraftFormatError, None),
        (lambda client, world: client.ask(Op.UNLOAD, ALARM), UsageError, "does not run here"),
        (_spoilt, VmgraftError, None),
        (lambda client, world: _send_record(client, b"VMGRAFT\0" + bytes(4096)), GraftFormatError, None),
        (lambda client, world: _send_record(client, os.urandom(100_000)), GraftFormatError, None),
        (lambda client, world: client.offer(Op.LOAD, world.folder / "none"), FileError, None),
        (lambda client, world: client.offer(Op.LOAD, world.studio.policy), NoGraftError, None),
    ],
)  # fmt: skip
def test_a_refusal_changes_nothing(shared: Any, offer: Offer, kind: type[VmgraftError], words: str | None) -> None:
    world, client = shared
    before = client.ask(Op.STATUS)
    with pytest.raises(kind, match=words) as caught:
        offer(client, world)
    assert caught.value.message
    after = client.ask(Op.STATUS)
    assert {item["id"]: item["version"] for item in after["extensions"]} == {CLOCK: "1.0"}
    assert after["planSha256"] == before["planSha256"]
    calls = client.ask(Op.STATS)["extensions"][0]["calls"]
    time.sleep(0.05)
    assert client.ask(Op.STATS)["extensions"][0]["calls"] > calls, "the guest goes on, with its extension"
    lines = map(json.loads, world.studio.audit_log.read_text().splitlines())
    refused = [record for record in lines if record["event"] == "control" and not record["ok"]]
    if kind not in (FileError, NoGraftError):  # those never left the client
        assert refused[-1]["error"]["code"] == kind.code or kind is VmgraftError


@pytest.fixture(scope="module")
def one_guest(make_studio: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """One guest for all that leaves it as it was."""
    world = World(make_studio(tmp_path_factory.mktemp("shared")))
    with world.guest(timeout=300):
        yield world


@pytest.fixture
def shared(one_guest: World) -> Iterator[tuple[World, ControlClient]]:
    with ControlClient(one_guest.socket, seconds=30) as client:
        yield one_guest, client


def test_a_required_extension_stays(studio: Any) -> None:
    world = World(studio, requireExtensions=[CLOCK])
    with world.guest() as (client, _reports):
        with pytest.raises(RequiredExtensionError, match="requires"):
            client.ask(Op.UNLOAD, CLOCK)
        with pytest.raises(RequiredExtensionError):
            client.offer(Op.LOAD, world.make("alarm.img", world.package(ALARM)), extension=ALARM)
        assert running(client) == {CLOCK: "1.0"}


def test_rollback_memory_is_asked_and_raised(world: World) -> None:
    state = world.folder / "state" / "state.db"
    with world.guest(state=state) as (client, reports):
        client.offer(Op.REPLACE, world.make("new.img", world.package(CLOCK, version=5)))
        client.ask(Op.UNLOAD, CLOCK)
        with pytest.raises(RollbackError):
            client.offer(Op.LOAD, world.make("old.img", world.package(CLOCK, version=4)))
        client.offer(Op.LOAD, world.make("same.img", world.package(CLOCK, version=5)))
        assert running(client) == {CLOCK: "5.0"}
    assert reports[0].memory is not None
    assert [record["raised"][0]["securityVersion"] for record in world.studio.log()
            if record["event"] == "remember" and record["raised"]][:2] == [1, 5]  # fmt: skip
    options = RunOptions(cpu="soft", timeout=60, state=state)
    assert Launcher(world.image, world.studio.policy, options).run().error == "rollback"


@pytest.mark.parametrize(
    "stats",
    [
        {},
        {"virtualNs": 10**400, "exits": {"\x1b[2J": 10**400}}, {"virtualNs": "x", "exits": [1], "extensions": {"a": 1}},
        {"extensions": [7, {"id": "\x1b]0;x\x07", "calls": None, "fuel": {"total": []}, "metrics": {"\x1b": "\x1b"}}]},
        {"extensions": [{"latencyMicroseconds": {"p50": "\x1b"}, "fuel": 3, "metrics": 3}]},
    ],
)  # fmt: skip
def test_an_answer_is_not_trusted_with_the_terminal(stats: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    from vmgraft.cli.ctlview import show_stats, show_status

    show_stats(stats, stats)
    show_status({**stats, "image": "\x1b[2J", "wallSeconds": {}})
    assert "\x1b" not in capsys.readouterr().out


def test_what_an_extension_reports_is_shown(studio: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from vmgraft.cli.ctlview import show_stats

    studio.boot_code(READ_BOTH)
    report = '(import "vmgraft" "metric" (func $metric (param i32 i32 i64)))'
    body = """(data (i32.const 0) "hits\\1b[2Jold") (global $n (mut i64) (i64.const 0))
      (func (export "on_pio_read") (param i32 i32) (result i64)
        (global.set $n (i64.sub (global.get $n) (i64.const 1)))
        (call $metric (i32.const 0) (i32.const 4) (global.get $n))
        (call $metric (i32.const 4) (i32.const 7) (i64.const 3)) (i64.const 7))"""
    claims = ["pio:0x510-0x517", "metric"]
    studio.graft(studio.wat(body, report), capabilities=claims)
    socket = studio.folder / "guest.sock"
    options = RunOptions(cpu="soft", timeout=60, control=socket, audit_log=studio.audit_log)
    reports: list[RunReport] = []
    thread = threading.Thread(target=lambda: reports.append(Launcher(studio.image, studio.policy, options).run()))
    thread.start()
    try:
        while '"event": "boot"' not in (studio.audit_log.read_text() if studio.audit_log.exists() else ""):
            assert thread.is_alive()
            time.sleep(0.005)
        with ControlClient(socket, seconds=30) as client:
            while not (stats := client.ask(Op.STATS))["extensions"][0]["metrics"]:
                time.sleep(0.005)
            client.ask(Op.STOP)
    finally:
        thread.join(30)
    show_stats(stats)
    shown = capsys.readouterr().out
    assert f"hits={stats['extensions'][0]['metrics']['hits']}" in shown and "hits=-" in shown
    assert "\x1b" not in shown and "[2Jold=3" in shown
    assert reports[0].extensions[0]["metrics"]["hits"] <= stats["extensions"][0]["metrics"]["hits"] < 0


@pytest.mark.parametrize("op", [Op.LOAD, Op.REPLACE])
def test_what_must_not_be_remembered_changes_nothing(world: World, op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between verdict and ready mark another process raised the memory: the new one ends, the old one stays."""
    from vmgraft.signing.state import RollbackState

    def raised(*_args: Any, **_named: Any) -> None:
        raise RollbackError("a newer one got ready")

    offered = world.make("new.img", world.package(CLOCK if op is Op.REPLACE else ALARM, version=5))
    with world.guest(state=world.folder / "state" / "state.db") as (client, _reports):
        before = client.ask(Op.STATUS)
        monkeypatch.setattr(RollbackState, "raise_to", raised)
        with pytest.raises(RollbackError, match="got ready"):
            client.offer(op, offered)
        after = client.ask(Op.STATUS)
        assert (running(client), after["planSha256"]) == ({CLOCK: "1.0"}, before["planSha256"])
        calls = client.ask(Op.STATS)["extensions"][0]["calls"]
        time.sleep(0.05)
        assert client.ask(Op.STATS)["extensions"][0]["calls"] > calls, "the guest still reaches the old one"
        monkeypatch.undo()
        client.offer(op, offered)
        assert len(running(client)) == (1 if op is Op.REPLACE else 2)


# --- hostile clients -------------------------------------------------------------------------------------------------


def raw(world: World) -> socket.socket:
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    client.settimeout(20)
    client.connect(str(world.socket))
    return client


def said(client: socket.socket) -> list[dict[str, Any]]:
    """Return every answer until the host ends the connection."""
    data = b""
    while more := client.recv(65536):
        data += more
    return [json.loads(line) for line in data.splitlines()]


@pytest.mark.parametrize(
    "line",
    [
        b"\n", b"\xff\xfe\n", b"{}\n", b"[]\n", b"null\n", b'"status"\n', b"{" * 2000 + b"\n", b'{"op": "status"\n',
        b'{"op": "Status"}\n', b'{"op": null}\n', b'{"op": ["status"]}\n', b'{"op": "status", "op": "stop"}\n',
        b'{"op": "status", "uid": 0}\n', b'{"op": "unload"}\n', b'{"op": "unload", "id": 7}\n',
        b'{"op": "unload", "id": ""}\n', b'{"op": "stop", "id": "x"}\n', b'{"op": "load"}\n',
        b'{"op": "unload", "id": "' + b"x" * 256 + b'"}\n', b'{"op": "status"}\n{"op": "status"}\n',
        b"x" * MAX_REQUEST, b"GET / HTTP/1.1\r\n\r\n", b'{"op": 1e999}\n', b'{"op": "snapshot"}\n',
    ],
)  # fmt: skip
def test_what_is_no_request(shared: Any, line: bytes) -> None:
    world, client = shared
    with raw(world) as hostile:
        hostile.sendall(line)
        (answer,) = said(hostile)
    assert answer["ok"] is False
    assert answer["error"]["code"] == "usage"
    assert client.ask(Op.STATUS)["extensions"]


def test_half_a_request_and_silence_are_dropped(shared: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vmgraft.vmmhost.control import server

    world, _client = shared
    monkeypatch.setattr(server, "PROGRESS_SECONDS", 0.2)
    monkeypatch.setattr(server, "IDLE_SECONDS", 0.6)
    with raw(world) as half, raw(world) as silent:
        half.sendall(b'{"op":')
        began = time.monotonic()
        assert said(half) == []
        assert time.monotonic() - began < 0.55
        assert said(silent) == []
    monkeypatch.undo()
    with ControlClient(world.socket) as again:
        assert again.ask(Op.STATUS)["extensions"]


@pytest.fixture
def ends() -> Iterator[list[int]]:
    opened: list[int] = []
    yield opened
    for fd in opened:
        os.close(fd)


def unsealed() -> int:
    fd = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    os.write(fd, b"VMGRAFT\0" * 100)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
    return fd


def empty() -> int:
    fd = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_WRITE)
    return fd


def pipe(ends: list[int]) -> int:
    read, write = os.pipe()
    ends.append(write)
    return read


@pytest.mark.parametrize(
    "make",
    [
        lambda world, ends: pipe(ends), lambda world, ends: os.open(world.folder, os.O_RDONLY),
        lambda world, ends: os.open("/dev/zero", os.O_RDONLY), lambda world, ends: os.open(world.image, os.O_RDONLY),
        lambda world, ends: os.open(world.image, os.O_PATH), lambda world, ends: unsealed(),
        lambda world, ends: empty(), lambda world, ends: socket.socket().detach(),
    ],
)  # fmt: skip
def test_descriptors_that_are_no_record(shared: Any, ends: list[int], make: Callable[[Any, list[int]], int]) -> None:
    world, _client = shared
    ends.append(make(world, ends))
    with raw(world) as hostile:
        socket.send_fds(hostile, [b'{"op": "load"}\n'], [ends[-1]])
        answer = json.loads(hostile.recv(65536))
    assert (answer["ok"], answer["error"]["code"], answer["error"]["field"]) == (False, "usage", "record")


def held() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_floods_of_descriptors_stay_nowhere(shared: Any) -> None:
    world, client = shared
    client.ask(Op.STATUS)
    before = held()
    for count in (2, 20):
        with raw(world) as hostile:
            hostile.sendmsg([b"{"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0] * count))])
            (answer,) = said(hostile)
            assert "one descriptor" in answer["error"]["message"]
    with raw(world) as hostile:
        for _ in range(200):
            try:
                socket.send_fds(hostile, [b" "], [0])
            except OSError:
                break
    with raw(world) as hostile:  # one with a request that takes none
        socket.send_fds(hostile, [b'{"op": "status"}\n'], [0])
        assert said(hostile)[0]["error"]["field"] == "record"
    client.ask(Op.STATUS)
    assert held() == before


def test_a_thousand_connections(shared: Any) -> None:
    world, client = shared
    client.ask(Op.STATUS)
    before, many = held(), []
    for _ in range(1000):
        one = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        many.append(one)
        one.connect(str(world.socket))  # waits where the queue is full
        one.settimeout(20)
    turned_away = said(many[-1])
    assert "too many clients" in turned_away[0]["error"]["message"]
    assert client.ask(Op.STATUS)["extensions"], "who was there before is served"
    for one in many:
        one.close()
    deadline = time.monotonic() + 10
    while held() > before and time.monotonic() < deadline:
        client.ask(Op.STATUS)
        time.sleep(0.02)
    assert held() == before
    records = [json.loads(line) for line in world.studio.audit_log.read_text().splitlines()]
    refused = [record for record in records if record["event"] == "control-refused"]
    assert 0 < len(refused) <= MAX_RECORDS
    assert any(record.get("quota") == "controlRecords" for record in records)
    assert ACCEPTS > MAX_CLIENTS


def test_an_answer_that_nobody_reads(shared: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vmgraft.vmmhost.control import server

    world, _client = shared
    monkeypatch.setattr(server, "PROGRESS_SECONDS", 0.3)
    with raw(world) as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2304)
        sent = 0
        with pytest.raises(OSError, match=r"Broken pipe|reset"):
            while sent < 10_000:
                slow.sendall(b'{"op": "screen"}\n')
                sent += 1
                time.sleep(0.005)
    monkeypatch.undo()
    with ControlClient(world.socket) as again:
        assert again.ask(Op.STATUS)["extensions"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_another_user_is_turned_away(shared: Any) -> None:
    world, client = shared
    world.socket.chmod(0o666)
    for folder in (world.folder, *world.folder.parents):
        if folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o111)
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.setresuid(65534, 65534, 65534)
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
                other.settimeout(10)
                other.connect(str(world.socket))
                os.write(writing, other.recv(4096))
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    answer = json.loads(os.read(reading, 4096))
    os.close(reading)
    assert "another user" in answer["error"]["message"]
    assert client.ask(Op.STATUS)["extensions"]


# --- the socket itself -----------------------------------------------------------------------------------------------


def serve_nothing(_request: Request, _fd: int | None) -> dict[str, Any]:
    raise HostError("nothing is served here")


def listen(path: Path) -> ControlServer:
    return ControlServer(path, serve_nothing, lambda _event, _detail: None)


def test_the_file_is_the_owners_and_goes_away(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        server = listen(tmp_path / "s")
    finally:
        os.umask(old)
    found = (tmp_path / "s").stat()
    assert stat.S_ISSOCK(found.st_mode) and stat.S_IMODE(found.st_mode) == 0o600
    with pytest.raises(FileError, match="a running guest listens there"):
        listen(tmp_path / "s")
    server.close()
    server.close()
    assert list(tmp_path.iterdir()) == []


def test_only_what_is_ours_is_replaced_or_removed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileError, match="taken"):
        listen(tmp_path / "file")
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(tmp_path / "left"))  # as a killed run leaves it
    server = listen(tmp_path / "left")
    (tmp_path / "left").unlink()
    (tmp_path / "left").write_text("somebody else's")
    server.close()
    assert (tmp_path / "left").read_text() == "somebody else's"
    with pytest.raises(FileError, match="at most 107"):
        listen(tmp_path / ("x" * 120))
    with pytest.raises(FileError, match="cannot listen"):
        listen(tmp_path / "nowhere" / "s")
    with pytest.raises(HostError, match="cannot talk"):
        ControlClient(tmp_path / "nowhere")


def test_requests_round_trip() -> None:
    from vmgraft.vmmhost.control.wire import request_line

    for request in (Request(Op.STATUS), Request(Op.UNLOAD, CLOCK), Request(Op.LOAD), Request(Op.LOAD, "x")):
        assert parse_request(request_line(request).strip()) == request
