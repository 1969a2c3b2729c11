"""One started machine of the core engine, with its layer: from an accepted plan to the guest's end."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

from vmgraft.errors import NotBootableError, UsageError
from vmgraft.vmmhost.control.operations import Operations
from vmgraft.vmmhost.control.server import ControlServer
from vmgraft.vmmhost.core.boot import BootSource
from vmgraft.vmmhost.core.contract import EndReason
from vmgraft.vmmhost.core.disk import VerifiedDisk
from vmgraft.vmmhost.core.loaders.contract import DirectBoot
from vmgraft.vmmhost.core.machine import Machine
from vmgraft.vmmhost.core.portmap import FirmwareKind
from vmgraft.vmmhost.core.probe import Engine
from vmgraft.vmmhost.core.screen import COLUMNS, ROWS, TEXT_BASE
from vmgraft.vmmhost.core.services import ServiceTable, repeatable_entropy
from vmgraft.vmmhost.layer.abi import Event
from vmgraft.vmmhost.layer.client import ExtensionHost
from vmgraft.vmmhost.layer.confine import confine_host, host_record, require_host_level
from vmgraft.vmmhost.layer.proxy import State
from vmgraft.vmmhost.layer.zygote import Zygote
from vmgraft.vmmhost.pinning import pinned
from vmgraft.vmmhost.plan import DirectFiles
from vmgraft.vmmhost.setup import Console, LayerLog, Setup
from vmgraft.vmmhost.snapshots.container import SnapshotFile
from vmgraft.vmmhost.snapshots.keeping import bring_back
from vmgraft.vmmhost.supplements.present import Presented
from vmgraft.vmmhost.supplements.wire import present_plan
from vmgraft.vmmhost.tape.record import Recorder, RecordingZygote, require_repeatable
from vmgraft.vmmhost.tape.replay import Replayer, ReplayZygote


class Session(Protocol):
    """An engine's way to carry out a plan."""

    def run(self) -> None:
        """Start, remember, boot, and fill in the report."""


class CoreSession:
    """Carries out a plan with the core's own machine.

    Args:
        setup: What was decided.
        stack: Gets everything that must be closed.
    """

    def __init__(self, setup: Setup, stack: ExitStack) -> None:
        self._setup, self._stack = setup, stack
        self._layer = LayerLog(setup.log.write)
        self._control: ControlServer | None = None
        self._tape: Recorder | Replayer | None = None

    def run(self) -> None:
        """Start the layer and the machine, remember, boot.

        Raises:
            HostError: the guest or a worker cannot be started here.
            CapabilityError: an extension's claims collide with the core, or it imports what it was not granted.
            GraftFormatError: a module is malformed.
            RollbackError: a newer version got ready in the meantime.
            FileError: the control socket cannot be made.
        """
        machine, host = self._start()
        self._setup.remember({proxy.spec.id for proxy in host.proxies if proxy.state is State.RUNNING})
        self._listen(machine, host)
        self._boot(machine, host)

    def _start(self) -> tuple[Machine, ExtensionHost]:
        """Set up the machine, and take every extension to its ready mark: ``on_start`` has returned."""
        setup, stack = self._setup, self._stack
        tape = self._tape = self._open_tape()
        # Before /dev/kvm is opened: no worker can have inherited what the core holds.
        stack.enter_context(pinned(setup.options.pin))  # workers are born to where their zygote is
        zygote = self._zygote()
        machine = stack.enter_context(self._machine(VerifiedDisk(setup.image, setup.tree.check)))
        host = ExtensionHost(
            setup.specs,
            memory=machine.memory,
            audit=self._layer.write,
            stop=lambda detail: machine.stop(self._layer.stop_reason(), detail),
            clock=machine.now_ns,
            time_left=machine.time_left,
            deterministic_seed=setup.options.seed if tape is None else tape.seed,
            zygote=zygote,
            min_isolation=setup.options.require_isolation,
            map_windows=tape is None,  # a recording must hold what was read and written
        )
        stack.callback(host.close)
        host.start()
        host.claim(machine.bus)
        if setup.snapshot is not None:
            self._bring_back(setup.snapshot, machine, host)
        if zygote is not None:
            machine.add_tick(host.tick if tape is None else tape.ticker(host.tick))
        if tape is not None:
            machine.bus.poll_seconds = 0.0  # looks around come where the guest's own steps put them, each time
        if setup.console is not None:
            machine.add_tick(_ConsoleFeed(setup.console, machine).tick)
        return machine, host

    def _bring_back(self, snapshot: SnapshotFile, machine: Machine, host: ExtensionHost) -> None:
        bring_back(snapshot, machine, host)
        kept = {"file": str(snapshot.path), "sha256": snapshot.sha256, "taken": snapshot.taken}
        self._setup.log.write("restore", kept)

    def _open_tape(self) -> Recorder | Replayer | None:
        """Begin a recording, or open the one that is to answer."""
        setup, options = self._setup, self._setup.options
        if options.record is None and options.replay is None:
            return None
        if options.record is not None and options.replay is not None:
            raise UsageError("a run is recorded or replayed: one of the two", field="replay")
        require_repeatable(options.cpu, live=setup.console is not None or options.control is not None)
        tape: Recorder | Replayer
        if options.replay is None:
            tape = Recorder(options.record or Path(), setup.plan, options)
        else:
            tape = Replayer(options.replay, setup.plan, options)
            setup.log.write("replay", {"file": str(options.replay), "sha256": tape.sha256})
        self._stack.callback(tape.close)
        return tape

    def _zygote(self) -> Zygote | None:
        """Return where workers come from, or None where none will be needed."""
        options = self._setup.options
        if not self._setup.specs and options.control is None:
            return None
        if isinstance(self._tape, Replayer):
            return ReplayZygote(self._tape)
        zygote = self._stack.enter_context(Zygote.start())
        return zygote if self._tape is None else RecordingZygote(zygote, self._tape)

    def _listen(self, machine: Machine, host: ExtensionHost) -> None:
        """Open the control socket, which is looked at between guest instructions."""
        path = self._setup.options.control
        if path is None:
            return
        operations = Operations(self._setup, machine, host)
        self._stack.callback(operations.close)
        self._control = ControlServer(path, operations.serve, self._setup.log.write)
        self._stack.callback(self._control.close)
        machine.add_tick(self._control.poll)

    def _boot(self, machine: Machine, host: ExtensionHost) -> None:
        setup, report = self._setup, self._setup.report
        if setup.confine:
            report.confinement = self._confine()
        require_host_level(report.confinement, setup.options.require_isolation)
        engine = {"engine": machine.cpu.engine, "emulated": machine.cpu.emulated, "why": machine.cpu.why}
        setup.log.write("boot", {**engine, **host_record(report.confinement)})
        if setup.snapshot is None:
            host.event(Event.BOOT)
        result = machine.run()
        host.event(Event.RESET if result.reason is EndReason.RESET else Event.SHUTDOWN)
        if isinstance(self._tape, Replayer):
            setup.log.write("replay", self._tape.summary())
        report.result = result
        report.extensions = host.summary()
        report.cells = machine.memory.read(TEXT_BASE, COLUMNS * ROWS * 2)
        report.control = None if self._control is None else dict(self._control.counts)

    def _confine(self) -> list[str]:
        """Give up rights. What a change at run time needs stays: the rollback memory, and the socket's own removal."""
        if self._control is None:
            return confine_host()
        state = self._setup.memory.path
        folders = [] if state is None else [str(state.parent.absolute())]
        return confine_host(write=folders, remove=[*folders, str(self._control.path.parent)])

    def _machine(self, disk: VerifiedDisk) -> Machine:
        setup, options, tape = self._setup, self._setup.options, self._tape
        presented = present_plan(setup.plan, setup.report.verification.statement, disk, setup.log.write)
        seed = options.seed if tape is None else tape.seed
        try:
            return Machine(
                Engine(setup.plan.cpu) if tape is None else Engine.SOFT,
                presented.disk,
                drives=presented.drives,
                direct=_direct(setup.plan.direct, presented, str(options.kernel)),
                firmware=FirmwareKind(options.firmware),
                bios=setup.bios,
                memory_mib=options.memory_mib,
                boot=BootSource(options.boot),
                keys=options.keys,
                timeout=options.timeout,
                until=options.until,
                serial=setup.serial,
                trace=options.trace,
                rtc_epoch=None if tape is None else tape.rtc_epoch,
                services=None if seed is None else ServiceTable(entropy=repeatable_entropy(seed)),
            )
        except NotBootableError as error:
            error.file = error.file or setup.plan.image  # the core knows content, not files
            raise


def _direct(files: DirectFiles | None, presented: Presented, name: str) -> DirectBoot | None:
    """Return the kernel to enter, with what extensions add to its initial RAM disk.

    Raises:
        UsageError: there is such a supplement, but no kernel.
    """
    if files is None and presented.initrd:
        raise UsageError(
            "an extension adds to the initial RAM disk, but the guest starts from its own disk",
            field="supplements",
            hint="name the guest's kernel with --kernel, or run --without-supplements",
        )
    if files is None:
        return None
    return DirectBoot(files.kernel, presented.with_initrd(files.initrd), files.append, name=name)


class _ConsoleFeed:
    """Brings what is typed to the guest's first serial port, as fast as the guest takes it."""

    def __init__(self, console: Console, machine: Machine) -> None:
        self._console, self._machine = console, machine
        self._waiting = b""

    def tick(self, _now: int) -> None:
        """Look for keys; called between guest instructions."""
        if not self._waiting:
            self._waiting = self._console.poll()
        if self._waiting:
            taken = self._machine.board.serial.feed(self._waiting)
            self._waiting = self._waiting[taken:]
        if self._console.escaped:
            self._machine.stop(EndReason.INTERRUPTED, "the escape key of the console")
