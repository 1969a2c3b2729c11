"""``run``: verify, plan, and hand over to a session that starts layer and guest; in that order, from one open image."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from vmgraft import __version__
from vmgraft.errors import ContentMismatchError, RequiredExtensionError, UnsupportedError, UsageError
from vmgraft.imagefmt.contract import Image, Progress
from vmgraft.imagefmt.graft import Graft, open_graft, open_image
from vmgraft.signing.contract import Report
from vmgraft.signing.policy import Policy
from vmgraft.vmmhost.audit import AuditLog
from vmgraft.vmmhost.core.machine import END_SIGNALS
from vmgraft.vmmhost.core.portmap import FirmwareKind
from vmgraft.vmmhost.core.seabios import FirmwareImage, load_firmware
from vmgraft.vmmhost.layer.spec import ExtensionSpec
from vmgraft.vmmhost.plan import LaunchPlan, RunOptions, check_claims, read_direct, statement_digest, to_spec
from vmgraft.vmmhost.remember import RunMemory
from vmgraft.vmmhost.report import RunReport, core_digest, ending_fields, failure_fields, verdict_fields
from vmgraft.vmmhost.session import CoreSession, Session
from vmgraft.vmmhost.setup import Console, Setup
from vmgraft.vmmhost.snapshots.container import SnapshotFile, check_engine, read_snapshot
from vmgraft.vmmhost.supplements.compose import compose
from vmgraft.vmmhost.supplements.present import check_label, check_supplements
from vmgraft.vmmhost.verification import content_checked, verify_for_use

__all__ = ["Launcher", "RunReport", "core_digest"]


class Launcher:
    """Runs one image once.

    Args:
        image: Path of the image.
        policy: Path of the trust policy.
        options: How to boot.
        serial: Gets every byte the guest sends to its first serial port.
        console: Gives what the guest receives there.
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
        console: Console | None = None,
        progress: Progress | None = None,
        judged: Callable[[Report], None] | None = None,
        confine: bool = False,
    ) -> None:
        self._path, self._policy_path, self._options = image, policy, options
        self._serial, self._console, self._confine = serial, console, confine
        self._progress, self._judged = progress, judged
        self._bios: FirmwareImage | None = None
        self._snapshot: SnapshotFile | None = None

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
        # A replay teaches nothing: what answers is a file, and no module got ready.
        with RunMemory(self._options.state, raising=self._options.replay is None) as memory:
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
                log.write("error", failure_fields(error))
            raise
        log.write("error" if report.result is None else "end", ending_fields(report))
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
        log.write("verification", verdict_fields(report.verification))
        self._tell(report.verification)
        if report.plan is None or graft.tree is None:
            return report
        log.write("plan", {"sha256": report.plan.digest, "plan": report.plan.to_dict()})
        setup = Setup(
            self._options, report, report.plan, image, graft, graft.tree, policy, memory, _specs(report.plan), log,
            self._serial, self._console, self._confine, self._bios, self._snapshot,
        )  # fmt: skip
        try:
            _session(setup, stack).run()
        except ContentMismatchError as error:
            error.file = error.file or str(self._path)  # a disk knows its blocks, not its file
            raise
        return report

    def _verify(self, image: Image, graft: Graft, policy: Policy, memory: RunMemory) -> RunReport:
        """Verify, and plan when that went well."""
        now = datetime.now(UTC)
        verdict = verify_for_use(
            graft, policy, image_name=self._path.name, now=now, memory=memory.state, verify_all=self._options.verify_all
        )
        report = RunReport(verdict, until=self._options.until)
        if verdict.ok and graft.tree is not None:
            self._allow_bare(policy, verdict)
            if self._options.engine == "qemu":
                from vmgraft.vmmhost.qemu.claims import check_options

                check_options(self._options)
            if self._options.engine == "core" and self._options.firmware == FirmwareKind.SEABIOS:
                self._bios = load_firmware(self._options.bios)
            elif self._options.bios is not None:
                raise UsageError("a firmware file goes with --firmware seabios and the core engine")
            report.plan = LaunchPlan(
                image=str(self._path),
                format=image.format_name,
                virtual_size=image.virtual_size,
                tree_digest=graft.tree.tree_digest.hex(),
                content_check=content_checked(graft),
                statement_sha256=statement_digest(graft),
                policy=verdict.policy,
                signers=verdict.signers,
                memory_mib=self._options.memory_mib,
                boot=self._options.boot,
                cpu=self._options.cpu,
                extensions=verdict.extensions if self._options.extensions else (),
                engine=self._options.engine,
                firmware=self._options.firmware,
                supplements=self._options.supplements and self._options.extensions,
                direct=read_direct(self._options),
                union=compose(self._options.layers, policy, memory=memory.state) if self._options.layers else None,
                firmware_sha256=None if self._bios is None else self._bios.sha256,
                video_bios_sha256=None if self._bios is None else self._bios.video_sha256,
            )
            report.plan = self._resume(report.plan)
        return report

    def _resume(self, plan: LaunchPlan) -> LaunchPlan:
        """Read the snapshot to go on from, if there is one: it must belong to what was verified."""
        options = self._options
        if options.restore is None:
            return plan
        if options.engine != "core" or options.record is not None or options.replay is not None:
            message = "a snapshot goes with the core engine, and with no recording"
            raise UsageError(message, field="restore", hint="leave the other out")
        self._snapshot = read_snapshot(options.restore, plan)
        cpu = check_engine(options.cpu, self._snapshot.engine, options.restore)
        return replace(plan, cpu=cpu, restore_sha256=self._snapshot.sha256)

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


def _session(setup: Setup, stack: ExitStack) -> Session:
    """Return the session of the engine that was asked for; another's code is loaded only then."""
    if setup.options.engine == "qemu":
        from vmgraft.vmmhost.qemu.session import QemuSession

        return QemuSession(setup, stack)
    return CoreSession(setup, stack)


def _specs(plan: LaunchPlan) -> list[ExtensionSpec]:
    """Return what the layer is told of a plan's extensions, with every claim tried.

    Raises:
        CapabilityError: a claim collides with the core or another claim.
    """
    specs = [spec for spec in map(to_spec, plan.extensions) if spec is not None]
    if plan.engine == "core":  # another engine has other devices, and says itself what it cannot give
        check_claims(specs, plan.memory_mib, plan.firmware)
    elif plan.engine == "qemu":
        from vmgraft.vmmhost.qemu.claims import check_specs

        check_specs(specs)
    if plan.supplements:
        check_supplements(plan.extensions, plan.virtual_size, kernel=plan.direct is not None)
        if plan.union is not None:
            check_label(plan.extensions, plan.union.label)
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
