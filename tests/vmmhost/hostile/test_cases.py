"""Hostile modules, manifests, workers, guests and clients, one row of `cases.json` each, in whole runs.

Each ends as documented and stands in the audit log. The core does on the guest's other ports exactly what it does
without the extension; nothing is left behind.
"""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from hostile_parts import SPIN, Client, boot_of, guest_of, module_of

from vmgraft.cli.exitcodes import EXIT_CODES
from vmgraft.errors import VmgraftError
from vmgraft.signing.manifest import canonical_manifest, parse_manifest
from vmgraft.signing.policytools import format_policy, init_policy
from vmgraft.vmmhost.core.contract import PioEvent
from vmgraft.vmmhost.launch import Launcher, RunReport
from vmgraft.vmmhost.layer.zygote import Zygote
from vmgraft.vmmhost.plan import RunOptions

CASES = json.loads(Path(__file__).with_name("cases.json").read_text())
CULPRIT = "org.example.culprit"
#: Ports of the extension, and the doorbell, which is only there where somebody has hypercalls.
CLAIMED = {*range(0x510, 0x518), *range(0x564, 0x568)}
FAST = {"memoryMiB": 1, "fuelPerCall": 1_000_000, "callMs": 500, "logBytes": 1024}


class Lent(Zygote):
    """A zygote that outlives a run."""

    def __init__(self, inner: Zygote) -> None:
        self.__dict__ = inner.__dict__

    def close(self) -> None:
        """It is needed again."""


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with Zygote.start() as running:
        running.wait_ready()
        yield running


class Run:
    """One run, and what is left of it."""

    def __init__(self, studio: Any, **options: Any) -> None:
        studio.audit_log.unlink(missing_ok=True)
        chosen = RunOptions(
            cpu="soft",
            timeout=options.pop("timeout", 30),
            trace=True,
            audit_log=studio.audit_log,
            seed=b"test",
            **options,
        )
        self.report: RunReport | None = None
        self.code: str | None
        try:
            self.report = Launcher(studio.image, studio.policy, chosen).run()
            self.code = self.report.error
        except VmgraftError as error:
            assert error.message
            self.code = error.code
        self.records = studio.log()

    def trace(self) -> list[PioEvent]:
        """What the guest did with the core."""
        if self.report is None or self.report.result is None:
            return []
        return [event for event in self.report.result.trace if event.port not in CLAIMED]

    def has(self, wanted: dict[str, Any]) -> bool:
        """Tell whether the audit log has such a record; one of the layer names the extension."""
        found = [record for record in self.records if all(record.get(name) == value for name, value in wanted.items())]
        if wanted["event"] in {"fault", "quota", "stop-request", "extension-refused"}:
            return bool(found) and all(record["id"] == CULPRIT for record in found)
        return bool(found)


_base: dict[bytes, list[PioEvent]] = {}


def base_trace(studio: Any, timeout: float, *, extensions: bool) -> list[PioEvent]:
    """What a guest does beside a harmless extension, or without any; the same for each case with that guest."""
    if studio.guest not in _base:
        studio.graft(module_of({"where": "guest"}), limits=FAST)
        _base[studio.guest] = Run(studio, extensions=extensions, timeout=timeout).trace()
    return _base[studio.guest]


def held() -> tuple[list[str], set[int]]:
    """Descriptors and children of this process."""
    children = {int(child) for task in Path("/proc/self/task").iterdir() for child in _words(task / "children")}
    return sorted(entry.name for entry in Path("/proc/self/fd").iterdir()), children


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:  # a thread that ended
        return []


def graft(studio: Any, case: dict[str, Any]) -> None:
    """Attach the extension of a case, and write the policy that goes with it."""
    fields = {"limits": FAST, **case.get("manifest", {})}
    studio.graft(module_of(case), **fields)
    if "granted" in case:
        manifest = canonical_manifest({
            "id": CULPRIT, "version": "1.0", "securityVersion": 1, "abi": "vmgraft/1", "module": "module.wasm",
            "capabilities": case["granted"],
        })  # fmt: skip
        document = init_policy({"vendor": studio.key.public}, [parse_manifest(manifest)])
        studio.policy.write_bytes(format_policy(document))


def carry_out(studio: Any, case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a case."""
    timeout = case.get("timeout", 30)
    if case["where"] == "protocol":
        monkeypatch.setattr("vmgraft.vmmhost.layer.zygote._BOOT", boot_of(case))
    if case["where"] != "control":
        return Run(studio, timeout=timeout)
    client = Client(studio.folder / "guest.sock", case)
    client.start()
    try:
        run = Run(studio, timeout=timeout, control=client.path)
    finally:
        client.join(20)
    assert run.code is None
    assert client.other["ok"] is True
    run.code = client.answer["error"]["code"]
    return run


def test_there_are_enough_cases() -> None:
    names = [case["id"] for case in CASES]
    assert len(set(names)) == len(names) >= 90
    for where, least in (("module", 30), ("manifest", 10), ("protocol", 20), ("guest", 10), ("control", 15)):
        assert sum(case["where"] == where for case in CASES) >= least
    assert {case["expect"]["code"] for case in CASES} - {None} <= set(EXIT_CODES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['where']}: {case['id']}")
def test_case(studio, zygote: Zygote, monkeypatch: pytest.MonkeyPatch, case: dict[str, Any]) -> None:
    if case["where"] != "protocol":
        monkeypatch.setattr("vmgraft.vmmhost.session.Zygote.start", classmethod(lambda _cls: Lent(zygote)))
    if case["where"] == "guest":
        studio.boot_code(guest_of(case["asm"], studio.folder))
    elif case["where"] == "control":
        studio.boot_code(SPIN)
    own_guest = case["where"] in {"guest", "control"}  # the other one asks how many extensions there are
    base = base_trace(studio, 0.3 if case["where"] == "control" else case.get("timeout", 30), extensions=not own_guest)
    graft(studio, case)
    before = held()
    run = carry_out(studio, case, monkeypatch)
    expected = case["expect"]
    assert run.code == expected["code"]
    if expected["audit"] is not None:
        assert run.has(expected["audit"]), run.records
    assert run.records[-1]["event"] in {"end", "error"}
    trace = run.trace()
    if run.report is not None and run.report.result is not None and run.report.result.reason.value == "shutdown":
        assert trace == base or "stopped" in case
    assert trace[: len(base)] == base[: len(trace)]
    assert held() == before
    assert workers_of(zygote) == []


def workers_of(zygote: Zygote) -> list[str]:
    """Workers of a zygote, once the last one had time to be reaped."""
    deadline = time.monotonic() + 5
    path = Path(f"/proc/{zygote.pid}/task/{zygote.pid}/children")
    while (found := path.read_text().split()) and time.monotonic() < deadline:
        time.sleep(0.005)
    return found
