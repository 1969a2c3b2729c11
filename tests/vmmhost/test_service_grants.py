"""Services and interrupt lines from the manifest to the guest: declared, granted, or refused before anything starts."""

from __future__ import annotations

import json

import pytest

from vmgraft.errors import CapabilityError
from vmgraft.vmmhost.launch import Launcher
from vmgraft.vmmhost.layer import protocol
from vmgraft.vmmhost.layer.protocol import Call, Kind, Setup
from vmgraft.vmmhost.layer.spec import ExtensionSpec, HypercallRange, PioRange, ServiceUse
from vmgraft.vmmhost.plan import RunOptions, check_claims
from vmgraft.vmmhost.tape.lines import event_line, parse_event, sent_event

CONSOLE = """(func (export "on_service") (param i32 i64 i64) (result i64)
    (call $set (i32.const 0) (i32.const 1)) (i64.const 1)) (data (i32.const 0) "*")"""
SET = '(import "vmgraft" "set_buffer" (func $set (param i32 i32)))'


def launcher(studio, cpu):
    studio.audit_log.unlink(missing_ok=True)
    return Launcher(studio.image, studio.policy, RunOptions(cpu=cpu, timeout=60, audit_log=studio.audit_log))


def grant(studio, *capabilities):
    document = json.loads(studio.policy.read_text())
    document["trustPolicies"][0]["grants"]["org.example.culprit"]["capabilities"] = list(capabilities)
    document["trustPolicies"][0]["signatureVerification"] = {"level": "strict", "override": {"capabilities": "log"}}
    studio.policy.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("declared", "granted", "stars"),
    [
        ("service:console", "service:console", True),
        ("service:console:chain", "service:console", True),
        ("service:console:chain", "service:console:chain", True),
        ("service:console", "service:console:chain", False),
        ("service:console", "log", False),
    ],
)
def test_a_service_is_served_when_it_is_granted(studio, cpu, declared, granted, stars):
    studio.graft(studio.wat(CONSOLE, SET), capabilities=[declared])
    grant(studio, granted)
    result = launcher(studio, cpu).run().result
    assert (set(result.serial) == {ord("*")}) is stars
    assert (b"vmgraft guest" in result.serial) is not stars


@pytest.mark.parametrize(
    "two",
    [
        {"services": (ServiceUse("rtc"),)},
        {"irqs": (5,)},
        {"irqs": (0,)},
        {"irqs": (4,)},
        {"hypercalls": (HypercallRange(15, 16),)},
    ],
)
def test_what_collides_is_found_before_anything_is_started(two):
    one = ExtensionSpec("org.example.one", "1", b"", services=(ServiceUse("rtc"),), irqs=(5,))
    with pytest.raises(CapabilityError, match=r"org\.example\.two"):
        check_claims([one, ExtensionSpec("org.example.two", "1", b"", **two)], 16)


def test_chains_and_other_lines_do_not_collide():
    one = ExtensionSpec("org.example.one", "1", b"", services=(ServiceUse("rtc"),), irqs=(5,))
    chain = (ServiceUse("rtc", chain=True), ServiceUse("time"))
    two = ExtensionSpec("org.example.two", "1", b"", services=chain, irqs=(7,), pio=(PioRange(0x510, 0x510),))
    check_claims([one, two], 16)


@pytest.mark.parametrize(
    "packet",
    [
        protocol.call(Call(Kind.CALL_SERVICE, 2, 1, 0, 4096, 0, (4096, 0, 0, 0), bytes(4096))),
        protocol.setup(Setup(0, bytes(4096), 1, 1, 0, 1000, 1, 0, bytes(32))),
        protocol.frame(Kind.DATA, 1, 0, bytes(4096)),
    ],
    ids=["service", "setup", "data"],
)
def test_the_largest_packets_fit_a_recording(tmp_path, packet):
    line = event_line(sent_event(0, packet))
    assert parse_event(line, tmp_path, 1) == ("send", 0, packet.hex())
