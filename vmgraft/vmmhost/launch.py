"""``run``: verify, plan, start the unprivileged layer, start the guest; in that order, from one open image."""

from __future__ import annotations

import hashlib
import json
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from types import FrameType
from typing import Any, Final

from vmgraft import __version__
from vmgraft.errors import NotBootableError, RequiredExtensionError, UnsupportedError, VmgraftError
from vmgraft.imagefmt.contract import Image, Progress
from vmgraft.imagefmt.graft import Graft, open_graft, open_image
from vmgraft.signing.contract import Report
from vmgraft.signing.policy import Policy
from vmgraft.signing.verify import verify_evidence
from vmgraft.vmmhost.audit import AuditLog
from vmgraft.vmmhost.core.boot import BootSource
from vmgraft.vmmhost.core.contract import EndReason
from vmgraft.vmmhost.core.disk import VerifiedDisk
from vmgraft.vmmhost.core.machine import END_SIGNALS, Machine, MachineResult
from vmgraft.vmmhost.core.probe import Engine
from vmgraft.vmmhost.layer.abi import Event
from vmgraft.vmmhost.layer.client import ExtensionHost
from vmgraft.vmmhost.layer.proxy import State
from vmgraft.vmmhost.layer.sandbox import confine_host
from vmgraft.vmmhost.layer.spec import ExtensionSpec
from vmgraft.vmmhost.layer.zygote import Zygote
from vmgraft.vmmhost.plan import LaunchPlan, RunOptions, check_claims, to_spec
from vmgraft.vmmhost.remember import RunMemory

#: Ends of a guest that are failures, as error codes (docs/exit-codes.md).
_FAILURES: Final = {
    EndReason.FAULT: "extension-fault",
    EndReason.DISK: "content-mismatch",
    EndReason.ERROR: "host",
    EndReason.INTERRUPTED: "interrupted",
}


@dataclass(slots=True)
class RunReport:
    """What happened, as far as it went. ``plan`` and ``result`` stay None when verification refused the image."""

    verification: Report
    plan: LaunchPlan | None = None
    result: MachineResult | None = None
    extensions: list[dict[str, Any]] = field(default_factory=list)
    confinement: list[str] = field(default_factory=list)
    audit_head: str | None = None
    until: str | None = None
    memory: dict[str, Any] | None = None

    @property
    def error(self) -> str | None:
        """The error code this run amounts to, or None."""
        if not self.verification.ok:
            return self.verification.error
        if self.result is None:
            return None
        if self.result.reason in _FAILURES:
            return _FAILURES[self.result.reason]
        return "expectation" if self.until is not None and not self.result.until_seen else None


class Launcher:
    """Runs one image once.

    Args:
        image: Path of the image.
        policy: Path of the trust policy.
        options: How to boot.
        serial: Gets every byte the guest sends to its first serial port.
        progress: Called while the content is verified.
        judged: Gets the verdict before anything is started because of it; a report of ``run`` comes only at the end.
        confine: Give up the rights of this process that the run does not need, once it is set up. Cannot be undone, so
            only programs that end with the run ask for it.
    """

    def __init__(
        self,
        image: Path,
        policy: Path,
        options: RunOptions,
        *,
        serial: Callable[[bytes], None] | None = None,
        progress: Progress | None = None,
        judged: Callable[[Report], None] | None = None,
        confine: bool = False,
    ) -> None:
        self._path, self._policy_path, self._options = image, policy, options
        self._serial, self._progress, self._judged, self._confine = serial, progress, judged, confine
        self._stop_requested = False

    def plan(self) -> RunReport:
        """Verify and plan; start nothing (``--dry-run``).

        Raises:
            VmgraftError: as :meth:`run`, for what can be found out without starting.
        """
        with RunMemory(self._options.state, raising=False) as memory:
            policy = self._policy(memory)
            with open_image(self._path, self._options.opening) as image:
                report = self._verify(image, open_graft(image, progress=self._progress), policy, memory)
        report.memory = memory.to_dict()
        self._tell(report.verification)
        if report.plan is not None:
            _specs(report.plan)
        return report

    def run(self) -> RunReport:
        """Verify, plan and boot.

        Raises:
            PolicyError: the policy cannot be used.
            StateError: the rollback memory cannot be used.
            RollbackError: a newer version of an extension got ready on this host in the meantime.
            NoGraftError: the image carries no graft.
            FileError: the image or the audit log cannot be used.
            CapabilityError: an extension's claims collide with the core, or it imports what it was not granted.
            GraftFormatError: a module is malformed.
            HostError: the guest cannot be started here.
        """
        with RunMemory(self._options.state) as memory:
            policy = self._policy(memory)
            with closing(AuditLog(self._options.audit_log)) as log, _orderly_signals():
                return self._logged(log, policy, memory)

    def _policy(self, memory: RunMemory) -> Policy:
        options = self._options
        return memory.load_policy(self._policy_path, options.policy_keys, required=options.signed_policy)

    def _logged(self, log: AuditLog, policy: Policy, memory: RunMemory) -> RunReport:
        """Run, and let the log say how it began and ended, however that was."""
        log.write("start", self._beginning())
        try:
            with ExitStack() as stack:
                report = self._run(stack, log, policy, memory)
        except BaseException as error:
            if not log.broken:
                log.write("error", _failure(error))
            raise
        log.write("error" if report.result is None else "end", _ending(report))
        report.audit_head, report.memory = log.head, memory.to_dict()
        return report

    def _beginning(self) -> dict[str, Any]:
        """Return what the first line of the audit log says."""
        return {
            "image": str(self._path),
            "policyFile": str(self._policy_path),
            "vmgraft": __version__,
            "coreSha256": core_digest(),
        }

    def _run(self, stack: ExitStack, log: AuditLog, policy: Policy, memory: RunMemory) -> RunReport:
        image = stack.enter_context(open_image(self._path, self._options.opening))
        if not image.is_disk:
            raise UnsupportedError(
                f"{image.format_name} is no disk format: there is nothing to boot",
                file=self._path,
                hint="`vmgraft verify` checks it",
            )
        graft = open_graft(image, progress=self._progress)
        report = self._verify(image, graft, policy, memory)
        log.write("verification", _verdict(report.verification))
        self._tell(report.verification)
        if report.plan is None or graft.tree is None:
            return report
        log.write("plan", {"sha256": report.plan.digest, "plan": report.plan.to_dict()})
        machine, host = self._start(stack, log, VerifiedDisk(image, graft.tree.check), _specs(report.plan))
        self._remember(log, report, host, memory)
        self._boot(log, report, machine, host)
        return report

    def _verify(self, image: Image, graft: Graft, policy: Policy, memory: RunMemory) -> RunReport:
        """Verify, and plan when that went well."""
        now = datetime.now(UTC)
        verdict = verify_evidence(graft, policy, image_name=self._path.name, now=now, memory=memory.state)
        report = RunReport(verdict, until=self._options.until)
        if verdict.ok and graft.tree is None:
            # A statement that is not bound to this content: read it now, so that blocks can be checked when used.
            graft.content(flat=False)
        if verdict.ok and graft.tree is not None:
            self._allow_bare(policy, verdict)
            report.plan = LaunchPlan(
                image=str(self._path),
                format=image.format_name,
                virtual_size=image.virtual_size,
                tree_digest=graft.tree.tree_digest.hex(),
                statement_sha256=_statement_digest(graft),
                policy=verdict.policy,
                signers=verdict.signers,
                memory_mib=self._options.memory_mib,
                boot=self._options.boot,
                cpu=self._options.cpu,
                extensions=verdict.extensions if self._options.extensions else (),
            )
        return report

    def _tell(self, verdict: Report) -> None:
        if self._judged is not None:
            self._judged(verdict)

    def _allow_bare(self, policy: Policy, verdict: Report) -> None:
        """Refuse to leave out extensions that the policy requires."""
        if self._options.extensions:
            return
        entry = next((item for item in policy.trust_policies if item.name == verdict.policy), None)
        if entry is not None and entry.require_extensions:
            raise RequiredExtensionError(
                f"the policy requires {', '.join(entry.require_extensions)}",
                file=self._path,
                hint="run without --without-extensions",
            )

    def _start(
        self, stack: ExitStack, log: AuditLog, disk: VerifiedDisk, specs: list[ExtensionSpec]
    ) -> tuple[Machine, ExtensionHost]:
        """Set up the machine, and take every extension to its ready mark: ``on_start`` has returned."""
        # Before /dev/kvm is opened: no worker can have inherited what the core holds.
        zygote = stack.enter_context(Zygote.start()) if specs else None
        machine = stack.enter_context(self._machine(disk))
        host = ExtensionHost(
            specs,
            memory=machine.memory,
            audit=lambda event, detail: self._audit(log, event, detail),
            stop=lambda detail: machine.stop(self._stop_reason(), detail),
            clock=machine.now_ns,
            time_left=machine.time_left,
            deterministic_seed=self._options.seed,
            zygote=zygote,
        )
        stack.callback(host.close)
        host.start()
        host.claim(machine.bus)
        machine.add_tick(host.tick)
        return machine, host

    def _remember(self, log: AuditLog, report: RunReport, host: ExtensionHost, memory: RunMemory) -> None:
        """Remember what is ready: before the guest's first instruction, and before this process gives up its rights."""
        if report.plan is None:
            return
        ready = {proxy.spec.id for proxy in host.proxies if proxy.state is State.RUNNING}
        memory.remember(report.verification, report.plan.extensions, ready, report.plan.statement_sha256)
        if memory.path is not None:
            log.write("remember", memory.to_dict() or {})

    def _boot(self, log: AuditLog, report: RunReport, machine: Machine, host: ExtensionHost) -> None:
        if self._confine:
            report.confinement = confine_host()
        log.write("boot", {"engine": machine.cpu.engine, "emulated": machine.cpu.emulated, "host": report.confinement})
        host.event(Event.BOOT)
        result = machine.run()
        host.event(Event.RESET if result.reason is EndReason.RESET else Event.SHUTDOWN)
        report.result = result
        report.extensions = host.summary()

    def _machine(self, disk: VerifiedDisk) -> Machine:
        options = self._options
        try:
            return Machine(
                Engine(options.cpu),
                disk,
                memory_mib=options.memory_mib,
                boot=BootSource(options.boot),
                keys=options.keys,
                timeout=options.timeout,
                until=options.until,
                serial=self._serial,
                trace=options.trace,
            )
        except NotBootableError as error:
            error.file = str(self._path)  # the core knows content, not files
            raise

    def _audit(self, log: AuditLog, event: str, detail: dict[str, Any]) -> None:
        """Write an event of the layer; remember whether a stop was asked for or is a penalty."""
        self._stop_requested = event == "stop-request"
        log.write(event, detail)

    def _stop_reason(self) -> EndReason:
        return EndReason.SHUTDOWN if self._stop_requested else EndReason.FAULT


def _specs(plan: LaunchPlan) -> list[ExtensionSpec]:
    """Return what the layer is told of a plan's extensions, with every claim tried.

    Raises:
        CapabilityError: a claim collides with the core or another claim.
    """
    specs = [spec for spec in map(to_spec, plan.extensions) if spec is not None]
    check_claims(specs, plan.memory_mib)
    return specs


@contextmanager
def _orderly_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP unwind as Ctrl-C does, where nobody handles them: workers are ended, the log is closed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def unwind(number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    taken = [number for number in END_SIGNALS if signal.getsignal(number) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, unwind)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def _verdict(report: Report) -> dict[str, Any]:
    """Return what the audit log says of the verification."""
    checks = [check.to_dict() for check in report.checks]
    return {"ok": report.ok, "error": report.error, "checks": checks, "warnings": list(report.warnings)}


def _failure(error: BaseException) -> dict[str, Any]:
    """Return what the audit log says of a run that an exception ended."""
    if isinstance(error, VmgraftError):
        return error.to_dict()
    codes = {KeyboardInterrupt: "interrupted", OSError: "file"}
    code = next((code for kind, code in codes.items() if isinstance(error, kind)), "internal")
    return {"code": code, "message": f"{type(error).__name__}: {error}"}


def _ending(report: RunReport) -> dict[str, Any]:
    """Return what the audit log says of a run's end."""
    result = report.result
    if result is None:
        return {"code": report.error, "message": "the verification refused the image; nothing was started"}
    return {
        "reason": result.reason.value,
        "detail": result.detail,
        "wallSeconds": round(result.wall_seconds, 3),
        "exits": result.exits,
        "blocksChecked": result.blocks_checked,
        "blocksWritten": result.blocks_written,
    }


def _statement_digest(graft: Graft) -> str:
    """Return the SHA-256 of the signed statement."""
    from vmgraft.signing.dsse import parse_envelope

    return hashlib.sha256(parse_envelope(graft.envelopes()[0]).payload).hexdigest()


def core_digest() -> str:
    """Return the SHA-256 over names and contents of the privileged core's own files, its ROM among them."""
    root = resources.files("vmgraft.vmmhost")
    digest = hashlib.sha256()
    for folder in ("core", "data"):
        base = Path(str(root / folder))
        for path in sorted(item for item in base.rglob("*") if item.suffix in (".py", ".bin")):
            digest.update(json.dumps([str(path.relative_to(base.parent)), path.stat().st_size]).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()
