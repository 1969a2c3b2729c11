"""Taking a snapshot of a running guest, and bringing it back before a guest runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol

from vmgraft.errors import HostError, VmgraftError
from vmgraft.vmmhost.control.wire import Later
from vmgraft.vmmhost.core.machine import Machine
from vmgraft.vmmhost.layer.proxy import State
from vmgraft.vmmhost.layer.states import ExtensionState
from vmgraft.vmmhost.plan import LaunchPlan
from vmgraft.vmmhost.snapshots.container import SnapshotFile, machine_bindings, pieces
from vmgraft.vmmhost.snapshots.extensions import SECTION, pack, unpack


class Layer(Protocol):
    """The extensions of a machine, as far as they are kept."""

    def summary(self) -> list[dict[str, Any]]: ...  # noqa: D102
    def snapshot(self) -> tuple[ExtensionState, ...]: ...  # noqa: D102
    def restore(self, states: Sequence[ExtensionState]) -> None: ...  # noqa: D102


class Keeping:
    """Writes snapshots of one running guest into files that are open already.

    Args:
        machine: The machine.
        layer: Its extensions.
        audit: Takes (event, fields) for the audit log.
    """

    def __init__(self, machine: Machine, layer: Layer, audit: Callable[[str, dict[str, Any]], None]) -> None:
        self._machine, self._layer, self._audit = machine, layer, audit
        self._open: set[int] = set()

    def ask(self, plan: LaunchPlan, fd: int) -> Later:
        """Have a snapshot written to ``fd`` once the guest rests, which is soon; the descriptor is duplicated.

        Raises:
            HostError: the guest cannot be kept now.
        """
        self._check()
        own = os.dup(fd)
        self._open.add(own)
        later = Later(dropped=lambda: self._close(own))

        def act() -> None:
            if later.given_up:
                return
            try:
                later.outcome = self._keep(plan, own)
            except VmgraftError as error:
                later.outcome = error
            except MemoryError:
                later.outcome = HostError("there is no memory for a copy of the guest", field="snapshot")
            except OSError as error:
                later.outcome = HostError(f"the snapshot cannot be written: {error.strerror}", field="snapshot")
            finally:
                self._close(own)

        self._machine.at_rest(act)
        return later

    def _check(self) -> None:
        for item in self._layer.summary():
            if item["state"] != State.RUNNING.value:
                message = f"{item['id']} does not run any more: the guest that is kept would not be this one"
                raise HostError(message, field="snapshot", hint="unload or replace it first")

    def _keep(self, plan: LaunchPlan, fd: int) -> dict[str, Any]:
        self._check()  # again: a fault may have come in between
        states = pack(self._layer.snapshot())
        machine = self._machine.save(machine_bindings(plan), {SECTION: states})
        size, digest = 0, b""
        for piece in pieces(plan, self._machine.cpu.engine, machine):
            _write(fd, piece)
            size, digest = size + len(piece), piece
        done = {"bytes": size, "sha256": digest.hex()}
        self._audit("snapshot", done)
        return done

    def _close(self, fd: int) -> None:
        if fd in self._open:
            self._open.discard(fd)
            os.close(fd)

    def close(self) -> None:
        """Give up what the guest did not come to rest for; may be called twice."""
        for fd in tuple(self._open):
            with suppress(OSError):
                self._close(fd)


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def bring_back(snapshot: SnapshotFile, machine: Machine, layer: Layer) -> None:
    """Make a machine that has not run, and its started extensions, what they were.

    Raises:
        HostError: the snapshot does not fit, or is damaged.
        VmgraftError: an extension does not take its state back. The machine must not be run then.
    """
    try:
        extra = machine.load(snapshot.machine, snapshot.bindings)
        if set(extra) != {SECTION}:
            raise HostError("the snapshot is damaged: sections that no program writes", field="sections")
        layer.restore(unpack(extra[SECTION]))
    except VmgraftError as error:
        error.file = error.file or str(snapshot.path)
        raise
