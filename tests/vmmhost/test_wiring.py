"""What the launcher was told reaches those it is for: worker, bus, boot, policy and log."""

import dataclasses
import hashlib
import json
import shutil
import types
from pathlib import Path
from typing import Any

import pytest
from assembling import GUESTS, booting, nasm
from click.testing import CliRunner

from vmgraft.cli.app import cli
from vmgraft.errors import HostError, NotBootableError, RequiredExtensionError
from vmgraft.signing.contract import Limits, VerifiedExtension
from vmgraft.vmmhost import launch, report, session
from vmgraft.vmmhost.core.contract import EndReason
from vmgraft.vmmhost.core.disk import VerifiedDisk
from vmgraft.vmmhost.core.machine import Machine
from vmgraft.vmmhost.core.probe import Engine
from vmgraft.vmmhost.launch import Launcher, core_digest
from vmgraft.vmmhost.layer import link, readiness, spec
from vmgraft.vmmhost.layer.zygote import Zygote
from vmgraft.vmmhost.plan import RunOptions, to_spec

CORE = Path(launch.__file__).parent
GRUB_ISO = Path("/usr/lib/grub-rescue/grub-rescue-cdrom.iso")
CULPRIT = "org.example.culprit"
#: Reads its config, asks for ticks, answers hypercalls with four bytes of the config and port 510h with its ticks.
TELLER = """
  (global $ticks (mut i32) (i32.const 0))
  (data (i32.const 256) "tick")
  (func (export "on_start") (param i32) (result i32)
    (call $log (i32.const 0) (call $config (i32.const 0) (local.get 0) (i32.const 0)))
    (call $set_tick (i64.const 20000000)) (i32.const 0))
  (func (export "on_tick") (param i64)
    (call $log (i32.const 256) (i32.const 4))
    (global.set $ticks (i32.add (global.get $ticks) (i32.const 1))))
  (func (export "on_pio_read") (param i32 i32) (result i64) (i64.extend_i32_u (global.get $ticks)))
  (func (export "on_hypercall") (param i32 i32 i32 i32 i32) (result i64)
    (i64.extend_i32_u (i32.load (local.get 1))))"""
TELLER_IMPORTS = """
  (import "vmgraft" "config_read" (func $config (param i32 i32 i32) (result i32)))
  (import "vmgraft" "log" (func $log (param i32 i32)))
  (import "vmgraft" "set_tick" (func $set_tick (param i64)))"""


def launcher(studio, image: Path | None = None, **chosen: Any) -> Launcher:
    options = RunOptions(**({"cpu": "soft", "timeout": 60, "audit_log": studio.audit_log} | chosen))
    studio.audit_log.unlink(missing_ok=True)
    return Launcher(image or studio.image, studio.policy, options)


def change_grant(studio, **members: Any) -> None:
    """Set members of the extension's grant."""
    document = json.loads(studio.policy.read_text())
    document["trustPolicies"][0]["grants"][CULPRIT].update(members)
    studio.policy.write_text(json.dumps(document))


def events(studio) -> list[str]:
    return [record["event"] for record in studio.log()]


# --- to the worker ---------------------------------------------------------------------------------------------------


def test_config_ticks_and_every_hypercall_reach_the_module(studio, cpu: str) -> None:
    studio.boot_code(nasm(GUESTS / "wiring.asm")[:510])
    capabilities = ["log", "tick", "pio:0x510-0x517", "hypercall:16-17"]
    studio.graft(studio.wat(TELLER, TELLER_IMPORTS), config="wired up", capabilities=capabilities)
    result = launcher(studio, cpu=cpu).run().result
    assert result is not None
    assert result.reason is EndReason.SHUTDOWN
    assert result.serial == b"wired up!t"
    logged = [record["text"] for record in studio.log() if record["event"] == "log"]
    assert logged[:3] == ["wired up", "tick", "tick"]
    assert set(logged[1:]) == {"tick"}


FLAGS = ["log", "now", "random", "tick", "stop", "kv", "metric"]
EVERYTHING = VerifiedExtension(
    id="org.example.everything",
    version="2.3.4",
    manifest={"config": "größe = 7", "onFault": "stop", "limits": {"memoryMiB": 99}, "capabilities": ["stop"]},
    module=b"\0asm the module",
    module_sha256="ab" * 32,
    capabilities=(
        "log", "now", "random", "tick", "stop", "pio:0x510-0x517", "pio:0x600-0x600", "mmio:0xd0000+0x1000",
        "mmio:0xd2000+0x800", "hypercall:16-17", "hypercall:40-49", "guest:0x10000+0x1000:rw", "guest:0x20000+0x10:r",
        "kv", "metric", "irq:5", "irq:11", "service:rtc:chain", "service:disk", "service:rtc", "service:console:chain",
    ),
    limits=Limits(memory_mib=3, fuel_per_call=4000, call_ms=50, calls_per_second=600, log_bytes=700),
    on_fault="restart(8)",
    isolation=2,
)  # fmt: skip
AS_SPEC = spec.ExtensionSpec(
    id="org.example.everything",
    version="2.3.4",
    module=b"\0asm the module",
    config="größe = 7".encode(),
    limits=spec.LayerLimits(memory_mib=3, fuel_per_call=4000, call_ms=50, calls_per_second=600, log_bytes=700),
    on_fault="restart(8)",
    pio=(spec.PioRange(0x510, 0x517), spec.PioRange(0x600, 0x600)),
    mmio=(spec.MmioRange(0xD0000, 0x1000), spec.MmioRange(0xD2000, 0x800)),
    hypercalls=(spec.HypercallRange(16, 17), spec.HypercallRange(40, 49)),
    windows=(spec.GuestWindow(0x10000, 0x1000, writable=True), spec.GuestWindow(0x20000, 0x10, writable=False)),
    log=True,
    now=True,
    random=True,
    tick=True,
    stop=True,
    min_isolation=2,
    kv=True,
    metric=True,
    irqs=(5, 11),
    services=(spec.ServiceUse("rtc"), spec.ServiceUse("console", chain=True), spec.ServiceUse("disk")),
)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(spec.ExtensionSpec)])
def test_every_field_of_a_verified_extension_is_handed_on(field: str) -> None:
    made, default = to_spec(EVERYTHING), dict.fromkeys(FLAGS, False)
    assert made is not None
    assert getattr(made, field) == getattr(AS_SPEC, field)
    bare = to_spec(dataclasses.replace(EVERYTHING, capabilities=(), manifest={}, isolation=0))
    assert bare is not None
    nothing: dict[str, Any] = dict.fromkeys(("pio", "mmio", "hypercalls", "windows", "irqs", "services"), ())
    expected = {"config": b"", "min_isolation": 0, **nothing, **default}
    assert getattr(bare, field) == expected.get(field, getattr(AS_SPEC, field))


@pytest.mark.parametrize("flag", FLAGS)
def test_a_capability_opens_nothing_but_itself(flag: str) -> None:
    made = to_spec(dataclasses.replace(EVERYTHING, capabilities=(flag,)))
    assert made is not None
    assert [name for name in FLAGS if getattr(made, name)] == [flag]
    assert not made.pio + made.mmio + made.hypercalls + made.windows + made.irqs + made.services


def test_without_a_module_there_is_nothing_to_run() -> None:
    assert to_spec(dataclasses.replace(EVERYTHING, module=None)) is None


@pytest.mark.parametrize("demanded", [0, 1, 2, 3])
def test_the_isolation_that_the_policy_demands(studio, monkeypatch, demanded: int) -> None:
    """On a host that reaches level 1 only; the worker is told too, so that it refuses before it sees the module."""
    studio.graft(studio.wat(studio.ONES))
    change_grant(studio, minIsolation=demanded)
    told: list[int] = []
    real = link.setup

    def note(message: Any) -> bytes:
        told.append(message.min_isolation)
        return real(message._replace(min_isolation=0))

    monkeypatch.setattr(link, "setup", note)
    monkeypatch.setattr(readiness, "level_of", lambda _mechanisms: 1)
    if demanded <= 1:
        report = launcher(studio).run()
        assert [item["isolation"] for item in report.extensions] == [1]
        assert "boot" in events(studio)
    else:
        with pytest.raises(HostError, match=f"level 1 is below the {demanded} that the policy demands"):
            launcher(studio).run()
        assert events(studio)[-1] == "error"
        assert "boot" not in events(studio)
    assert told == [demanded]


def test_the_worker_refuses_by_itself(studio, monkeypatch) -> None:
    """What the worker is told is more than any kernel gives: it says so, though the host would not mind."""
    studio.graft(studio.wat(studio.ONES))
    real = link.setup
    monkeypatch.setattr(link, "setup", lambda message: real(message._replace(min_isolation=4)))
    with pytest.raises(HostError, match="below the 4"):
        launcher(studio).run()
    assert "extension-refused" in events(studio)
    assert "boot" not in events(studio)


# --- to the boot -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("boot", "drive"), [("disk", 0x80), ("cdrom", 0xE0), ("auto", 0xE0)])
def test_a_hybrid_image_boots_as_what_was_asked_for(studio, monkeypatch, boot: str, drive: int) -> None:
    image = Path(shutil.copyfile(GRUB_ISO, studio.folder / "grub.iso"))
    studio.graft(studio.wat(studio.ONES), image)
    drives: list[int] = []
    real = Machine.run

    def note(machine: Machine) -> Any:
        drives.append(machine.plan.drive)
        return real(machine)

    monkeypatch.setattr(Machine, "run", note)
    report = launcher(studio, image, boot=boot, until="GRUB").run()
    assert drives == [drive]
    assert report.result is not None
    assert report.result.reason is EndReason.UNTIL
    assert next(record for record in studio.log() if record["event"] == "plan")["plan"]["boot"] == boot


def test_a_disk_does_not_boot_as_a_cd(studio) -> None:
    studio.graft(studio.wat(studio.ONES))
    with pytest.raises(NotBootableError):
        launcher(studio, boot="cdrom").run()
    assert "boot" not in events(studio)


# --- without extensions ----------------------------------------------------------------------------------------------


def test_extensions_are_left_out_when_asked(studio, monkeypatch) -> None:
    studio.graft(studio.wat(studio.ONES, '(import "vmgraft" "log" (func (param i32 i32)))'))
    loaded = launcher(studio).run()
    assert loaded.result is not None
    assert b"extensions: 1" in loaded.result.serial
    assert "extension-start" in events(studio)
    monkeypatch.setattr(Zygote, "start", lambda: pytest.fail("the layer was started"))
    bare = launcher(studio, extensions=False).run()
    assert bare.result is not None
    assert b"extensions: none" in bare.result.serial
    assert bare.extensions == []
    assert bare.plan is not None
    assert bare.plan.extensions == ()
    assert events(studio) == ["start", "verification", "plan", "boot", "end"]


def test_required_extensions_cannot_be_left_out(studio, monkeypatch) -> None:
    studio.graft(studio.wat(studio.ONES))
    document = json.loads(studio.policy.read_text())
    document["trustPolicies"][0]["requireExtensions"] = [CULPRIT]
    studio.policy.write_text(json.dumps(document))
    assert launcher(studio).run().error is None
    monkeypatch.setattr(session, "Machine", lambda *_a, **_k: pytest.fail("a machine was made"))
    for attempt in ("plan", "run"):
        with pytest.raises(RequiredExtensionError, match=f"requires {CULPRIT}") as caught:
            getattr(launcher(studio, extensions=False), attempt)()
        assert "--without-extensions" in (caught.value.hint or "")
    assert events(studio) == ["start", "error"]
    assert studio.log()[-1]["code"] == "required-extension-missing"


def test_without_extensions_the_trace_is_the_bare_machines(studio) -> None:
    studio.graft(studio.wat(studio.ONES))
    result = launcher(studio, extensions=False, trace=True).run().result
    disk = VerifiedDisk(booting(studio.guest), lambda _index, _block: True)
    with Machine(Engine.SOFT, disk, trace=True, rtc_epoch=0, timeout=60) as machine:
        bare = machine.run()
    assert result is not None
    assert (result.reason, result.serial) == (bare.reason, bare.serial)
    assert result.trace_dropped == bare.trace_dropped == 0
    assert len(bare.trace) > 50
    assert result.trace == bare.trace
    # With the extension it differs where the guest meets it, and so would the test.
    loaded = launcher(studio, trace=True).run().result
    assert loaded is not None
    assert loaded.trace != bare.trace


# --- to the log ------------------------------------------------------------------------------------------------------


@pytest.fixture
def core_copy(tmp_path: Path, monkeypatch) -> Path:
    """A copy of the core's files, which is taken for the real ones."""
    copy = tmp_path / "copy"
    for folder in ("core", "data"):
        shutil.copytree(CORE / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(report, "resources", types.SimpleNamespace(files=lambda _name: copy))
    return copy


def test_the_log_names_the_core_that_ran(studio, core_copy: Path, monkeypatch) -> None:
    studio.graft(studio.wat(studio.ONES))
    seen = []
    for change in ("", "# changed\n"):
        with (core_copy / "core" / "bus.py").open("a") as file:
            file.write(change)
        launcher(studio).run()
        start = studio.log()[0]
        assert start["event"] == "start"
        assert start["coreSha256"] == core_digest()
        seen.append(start["coreSha256"])
    monkeypatch.undo()
    assert seen[0] == core_digest()
    assert seen[0] != seen[1]


def test_any_change_to_the_core_changes_its_digest(core_copy: Path) -> None:
    digests = {core_digest()}
    files = sorted(path for path in core_copy.rglob("*") if path.suffix in (".py", ".bin"))
    assert {path.suffix for path in files} == {".py", ".bin"}
    assert len(files) > 20
    for path in files:
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]) if data else b"#")
        digests.add(core_digest())
        path.write_bytes(data)
    path.rename(path.with_stem("other"))
    digests.add(core_digest())
    path.with_stem("other").unlink()
    digests.add(core_digest())
    assert len(digests) == len(files) + 3
    assert all(len(digest) == 64 for digest in digests)


def test_the_plan_in_the_log_is_the_one_of_a_dry_run(studio) -> None:
    studio.graft(studio.wat(studio.ONES))
    launcher(studio, boot="disk", memory_mib=32).run()
    record = next(record for record in studio.log() if record["event"] == "plan")
    canonical = json.dumps(record["plan"], sort_keys=True, separators=(",", ":"))
    assert record["sha256"] == hashlib.sha256(canonical.encode()).hexdigest()
    assert [item["id"] for item in record["plan"]["extensions"]] == [CULPRIT]
    arguments = ["run", studio.image, "--policy", studio.policy, "--cpu", "soft", "--dry-run", "--json"]
    digests = []
    for options in (["--boot", "disk", "--memory", "32"], ["--boot", "auto", "--memory", "32"], ["--memory", "33"]):
        result = CliRunner().invoke(cli, [*map(str, arguments), *options], standalone_mode=False)
        assert result.exception is None
        digests.append(json.loads(result.stdout)["plan"]["planSha256"])
    assert digests[0] == record["sha256"]
    assert len(set(digests)) == 3
