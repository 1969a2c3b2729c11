"""Every change of a running guest is judged by the trust policy that the guest was started under."""

import json
import os
import socket
import threading
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from control_world import ALARM, CLOCK, World

from vmgraft.errors import CapabilityError, RollbackError, UntrustedSignerError, UsageError
from vmgraft.signing.policytools import format_policy
from vmgraft.signing.state import RollbackState, create_state
from vmgraft.vendor.graft import AttachOptions, attach
from vmgraft.vendor.pack import load_package
from vmgraft.vmmhost.control import server
from vmgraft.vmmhost.control.client import ControlClient
from vmgraft.vmmhost.control.server import ControlServer
from vmgraft.vmmhost.control.wire import Later, Op, Request, request_line
from vmgraft.vmmhost.launch import Launcher
from vmgraft.vmmhost.plan import RunOptions


@pytest.fixture
def world(studio: Any) -> World:
    return World(studio)


def running(client: ControlClient) -> dict[str, str]:
    return {item["id"]: item["version"] for item in client.ask(Op.STATUS)["extensions"]}


def started(world: World, name: str) -> int:
    return sum(record["event"] == "extension-start" and record["id"] == name for record in lines(world))


def lines(world: World) -> list[dict[str, Any]]:
    return [json.loads(line) for line in world.studio.audit_log.read_text().splitlines()]


def edit(world: World, **members: Any) -> None:
    document = json.loads(world.studio.policy.read_bytes())
    document["trustPolicies"][0].update(members)
    world.studio.policy.write_bytes(format_policy(document))


def split(world: World, **other: Any) -> None:
    """Make two trust policies of one: ``strict`` speaks about the clock, ``other`` about the alarm."""
    document = json.loads(world.studio.policy.read_bytes())
    (first,) = document["trustPolicies"]
    second = deepcopy(first)
    first.update(name="strict", extensionScopes=[CLOCK])
    second.update(name="other", extensionScopes=[ALARM], **other)
    document["trustPolicies"] = [first, second]
    world.studio.policy.write_bytes(format_policy(document))


@pytest.mark.parametrize("other", [{}, {"signatureVerification": {"level": "audit"}, "minSecurityVersion": {ALARM: 9}}])
def test_a_record_that_satisfies_another_trust_policy_is_refused(world: World, other: dict[str, Any]) -> None:
    split(world, **other)
    both = world.make("both.img", world.package(CLOCK), world.package(ALARM))
    options = RunOptions(cpu="soft", timeout=5)
    assert Launcher(both, world.studio.policy, options).plan().error == UntrustedSignerError.code, "at the start, too"
    alarm = world.make("alarm.img", world.package(ALARM))
    with world.guest() as (client, _reports):
        with pytest.raises(UntrustedSignerError, match=r"under the trust policy strict, .* satisfies other") as caught:
            client.offer(Op.LOAD, alarm)
        assert caught.value.field == "policy"
        assert running(client) == {CLOCK: "1.0"}
        assert client.offer(Op.REPLACE, world.make("new.img", world.package(CLOCK, version=2)))["version"] == "2.0"
    assert started(world, ALARM) == 0


def test_what_the_running_policy_demands_holds_for_a_change(world: World) -> None:
    edit(world, minSecurityVersion={ALARM: 3})
    with world.guest() as (client, _reports):
        with pytest.raises(RollbackError, match="3 is the lowest"):
            client.offer(Op.LOAD, world.make("old.img", world.package(ALARM, version=2)))
        client.offer(Op.LOAD, world.make("new.img", world.package(ALARM, version=3)))
        assert running(client) == {CLOCK: "1.0", ALARM: "3.0"}


@pytest.mark.parametrize("before", [False, True])
def test_content_that_must_have_been_read_is_not_taken_by_its_tree(
    world: World, monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    """The verdict over a change rests on a tree only where that of the start could."""
    if before:
        edit(world, contentCheck="before-start")
    world.image.unlink()
    for name, package in (("disk.img", world.package(CLOCK)), ("alarm.img", world.package(ALARM))):
        image = world.folder / name
        image.write_bytes(world.studio.guest.ljust(1 << 20, b"\0"))
        attach(image, [package], [world.studio.key], AttachOptions(tree=True))
    with world.guest() as (client, _reports):
        client.offer(Op.LOAD, world.folder / "alarm.img")
    verdicts = [record for record in lines(world) if record["event"] == "verification"]
    details = [next(c["detail"] for c in record["checks"] if c["name"] == "content") for record in verdicts]
    assert len(details) == 2
    assert details[0] == details[1]
    plan = next(record["plan"] for record in lines(world) if record["event"] == "plan")
    assert plan["contentCheck"] == ("before-start" if before else "first-read")


def test_a_jump_too_far_ahead_is_refused(world: World) -> None:
    edit(world, maxAdvance={CLOCK: 2})
    state = world.folder / "state" / "state.db"
    with world.guest(state=state) as (client, _reports):
        with pytest.raises(RollbackError, match="a jump from 1 by more than 2"):
            client.offer(Op.REPLACE, world.make("far.img", world.package(CLOCK, version=9)))
        assert started(world, CLOCK) == 1
        client.offer(Op.REPLACE, world.make("near.img", world.package(CLOCK, version=3)))
        assert running(client) == {CLOCK: "3.0"}


def test_a_policy_that_demands_a_memory_has_it_for_a_change(world: World) -> None:
    edit(world, rollbackState="required")
    state = world.folder / "state" / "state.db"
    create_state(state)
    with world.guest(state=state) as (client, _reports):
        client.offer(Op.LOAD, world.make("alarm.img", world.package(ALARM)))
        assert running(client) == {CLOCK: "1.0", ALARM: "1.0"}


def test_what_a_newer_run_raised_is_seen_before_a_worker_starts(world: World) -> None:
    state = world.folder / "state" / "state.db"
    with world.guest(state=state) as (client, _reports):
        other = Launcher(
            world.make("newer.img", world.package(ALARM, version=7)), world.studio.policy,
            RunOptions(cpu="soft", timeout=0.2, state=state),
        )  # fmt: skip
        assert other.run().error is None
        with pytest.raises(RollbackError, match="7 was accepted here before"):
            client.offer(Op.LOAD, world.make("old.img", world.package(ALARM, version=6)))
    assert started(world, ALARM) == 0, "so it never had a window either"


def test_without_a_memory_the_run_remembers_what_ran_in_it(world: World) -> None:
    new = world.make("new.img", world.package(CLOCK, version=2))
    old = world.make("old.img", world.package(CLOCK, version=1))
    with world.guest() as (client, _reports):
        client.offer(Op.REPLACE, new)
        with pytest.raises(RollbackError, match="runs with security version 2"):
            client.offer(Op.REPLACE, old)
        client.ask(Op.UNLOAD, CLOCK)
        with pytest.raises(RollbackError, match="ran here with security version 2, and this has 1"):
            client.offer(Op.LOAD, old)
        client.offer(Op.LOAD, new)
        assert running(client) == {CLOCK: "2.0"}


@pytest.mark.parametrize(
    ("mine", "theirs", "words"),
    [
        ("pio:0x510-0x517", "pio:0x516-0x527", CLOCK),
        ("guest:0x5000+0x1000:rw", "guest:0x5800+0x1000:rw", CLOCK),
        ("pio:0x510-0x517", "pio:0x60-0x61", "0x60"),
    ],
)
def test_claims_are_tried_before_a_worker_starts(studio: Any, mine: str, theirs: str, words: str) -> None:
    """Windows too: which two extensions may not share is the same as in one record."""
    world = World(studio)
    world.image.unlink()
    world.image = world.make("disk.img", world.package(CLOCK, mine))
    document = json.loads(studio.policy.read_bytes())
    for grant, claim in ((CLOCK, mine), (ALARM, theirs)):
        document["trustPolicies"][0]["grants"][grant]["capabilities"] = [claim]
    studio.policy.write_bytes(format_policy(document))
    state = world.folder / "state" / "state.db"
    with world.guest(state=state) as (client, _reports):
        with pytest.raises(CapabilityError, match=words):
            client.offer(Op.LOAD, world.make("alarm.img", world.package(ALARM, theirs, version=4)))
        assert running(client) == {CLOCK: "1.0"}
    assert started(world, ALARM) == 0
    memory = RollbackState(state)
    try:
        name = document["trustPolicies"][0]["name"]
        assert (memory.highest(name, CLOCK), memory.highest(name, ALARM)) == (1, None)
    finally:
        memory.close()


@pytest.mark.parametrize("op", [Op.LOAD, Op.REPLACE])
def test_what_adds_to_the_disk_comes_with_the_start_only(world: World, op: Op) -> None:
    name = ALARM if op is Op.LOAD else CLOCK
    folder = world.folder / "seed"
    (folder / "seed").mkdir(parents=True)
    (folder / "seed" / "user-data").write_bytes(b"hello\n")
    (folder / "module.wasm").write_bytes(world.module)
    (folder / "manifest.toml").write_text(f"""
id = "{name}"
version = "2.0"
securityVersion = 2
abi = "vmgraft/1"
module = "module.wasm"
capabilities = ["supplement:iso"]
[[supplements]]
kind = "iso"
label = "CIDATA"
root = "seed"
""")
    document = json.loads(world.studio.policy.read_bytes())
    document["trustPolicies"][0]["grants"][name]["capabilities"].append("supplement:iso")
    world.studio.policy.write_bytes(format_policy(document))
    offered = world.make("seed.img", load_package(folder))
    with world.guest() as (client, _reports):
        with pytest.raises(UsageError, match=f"{name} adds to the disk"):
            client.offer(op, offered)
        assert running(client) == {CLOCK: "1.0"}
    assert started(world, name) == (0 if op is Op.LOAD else 1)


def test_who_waits_for_a_guest_that_never_rests_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dropped: list[bool] = []
    later = Later(dropped=lambda: dropped.append(True))
    served = ControlServer(tmp_path / "s", lambda _request, _fd: later, lambda _event, _detail: None)
    fd = os.memfd_create("snapshot", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(10)
            client.connect(str(tmp_path / "s"))
            socket.send_fds(client, [request_line(Request(Op.SNAPSHOT))], [fd])
            served.poll()
            served.poll()
            assert not later.given_up
            monkeypatch.setattr(server, "IDLE_SECONDS", -1.0)
            served.poll()
            monkeypatch.undo()
            served.poll()
            answer = json.loads(client.recv(4096))
            assert "does not come to rest" in answer["error"]["message"]
            assert client.recv(4096) == b"", "and dropped"
    finally:
        os.close(fd)
        served.close()
    assert later.given_up and dropped == [True]
    assert served.counts == {"done": 0, "refused": 1, "turnedAway": 0}


@pytest.mark.parametrize("cpu", ["soft", "kvm"])
def test_a_window_over_the_guests_own_code_comes_and_goes(world: World, cpu: str) -> None:
    """The page that the guest executes becomes a file and plain memory again, and it notices nothing."""
    if cpu == "kvm" and not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("no /dev/kvm here")
    claim = "guest:0x7000+0x1000:rw"
    document = json.loads(world.studio.policy.read_bytes())
    document["trustPolicies"][0]["grants"][ALARM]["capabilities"] = [claim]
    world.studio.policy.write_bytes(format_policy(document))
    offered = world.make("window.img", world.package(ALARM, claim))
    seen: list[int] = []

    def change() -> None:
        while not world.socket.exists():
            time.sleep(0.005)
        with ControlClient(world.socket, seconds=20) as client:
            try:
                for _ in range(3):
                    client.offer(Op.LOAD, offered)
                    client.ask(Op.UNLOAD, ALARM)
                seen.append(client.ask(Op.STATS)["extensions"][0]["calls"])
                time.sleep(0.3)
                seen.append(client.ask(Op.STATS)["extensions"][0]["calls"])
            finally:
                client.ask(Op.STOP)

    other = threading.Thread(target=change)  # KVM wants the main thread for itself
    other.start()
    options = RunOptions(cpu=cpu, timeout=30, audit_log=world.studio.audit_log, control=world.socket)
    report = Launcher(world.image, world.studio.policy, options).run()
    other.join(30)
    assert report.result is not None and report.result.reason.value == "shutdown"
    assert len(seen) == 2 and seen[1] > seen[0] > 0, "the guest goes on"
