"""What a request does: looking at a running guest, and changing its extensions after a whole verification.

The policy is the one that was loaded when the guest was started; its expiry is judged anew, at the time of the
request. The content is that of the running image. The rollback memory is opened again for every change.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Protocol

from vmgraft.errors import (
    CapabilityError,
    HostError,
    PolicyError,
    RequiredExtensionError,
    RollbackError,
    UntrustedSignerError,
    UsageError,
    VmgraftError,
)
from vmgraft.signing.capabilities import first_overlap, parse_capability
from vmgraft.signing.contract import Report, Status, VerifiedExtension
from vmgraft.signing.policy import TrustPolicy
from vmgraft.signing.verify import verify_evidence
from vmgraft.vmmhost.control.offer import OfferedGraft
from vmgraft.vmmhost.control.wire import Later, Op, Request, check_fillable, error_kind
from vmgraft.vmmhost.core.contract import EndReason
from vmgraft.vmmhost.core.machine import Machine
from vmgraft.vmmhost.core.screen import COLUMNS, ROWS, TEXT_BASE
from vmgraft.vmmhost.layer.spec import ExtensionSpec
from vmgraft.vmmhost.layer.states import ExtensionState
from vmgraft.vmmhost.plan import check_claims, statement_digest, to_spec
from vmgraft.vmmhost.report import verdict_fields
from vmgraft.vmmhost.setup import Setup
from vmgraft.vmmhost.snapshots.keeping import Keeping

#: Extensions that may run at a time: as many as one image carries (docs/format.md).
MAX_RUNNING: Final = 64


class Layer(Protocol):
    """The extensions of a running machine. Each change raises a VmgraftError and leaves all as it was, or is done."""

    def load(self, spec: ExtensionSpec, ready: Callable[[], None]) -> None: ...  # noqa: D102
    def unload(self, extension_id: str) -> None: ...  # noqa: D102
    def replace(self, spec: ExtensionSpec, ready: Callable[[], None]) -> None: ...  # noqa: D102
    def summary(self) -> list[dict[str, Any]]: ...  # noqa: D102
    def snapshot(self) -> tuple[ExtensionState, ...]: ...  # noqa: D102
    def restore(self, states: Sequence[ExtensionState]) -> None: ...  # noqa: D102


class Operations:
    """Answers requests about one running guest.

    Args:
        setup: What it was started with; its report's plan follows every change.
        machine: The machine.
        layer: Its extensions.
    """

    def __init__(self, setup: Setup, machine: Machine, layer: Layer) -> None:
        self._setup, self._machine, self._layer = setup, machine, layer
        self._plan = setup.plan
        #: The highest security version of each extension that ran in this guest, with or without a rollback memory.
        self._ran = {item.id: _security_version(item) for item in setup.plan.extensions}
        self._began = time.monotonic()
        self._keeping = Keeping(machine, layer, setup.log.write)

    def close(self) -> None:
        """Give up what waits for the guest to rest; may be called twice."""
        self._keeping.close()

    def serve(self, request: Request, fd: int | None) -> dict[str, Any] | Later:
        """Do what is asked and return what to answer.

        Raises:
            VmgraftError: it was refused, and nothing has changed.
        """
        try:
            return self._serve(request, fd)
        except OSError as error:
            raise HostError(f"the system refused: {error.strerror or error}", field=request.op.value) from error

    def _serve(self, request: Request, fd: int | None) -> dict[str, Any] | Later:
        looks = {Op.STATUS: self._status, Op.STATS: self._stats, Op.SCREEN: self._screen}
        if request.op in looks:
            return looks[request.op]()
        match request.op:
            case Op.STOP:
                self._machine.stop(EndReason.SHUTDOWN, "stopped through the control socket")
                return {}
            case Op.UNLOAD:
                return self._unload(request.id or "")
        if fd is None:
            raise UsageError(f"{request.op.value} comes with a descriptor", field="record")
        if request.op is Op.SNAPSHOT:
            check_fillable(fd)
            return self._keeping.ask(self._plan, fd)
        return self._change(request, fd)

    # --- looking ----------------------------------------------------------------------------------------------------

    def _status(self) -> dict[str, Any]:
        cpu, names = self._machine.cpu, ("id", "version", "state", "isolation")
        return {
            "image": self._plan.image,
            "policy": self._plan.policy,
            "planSha256": self._plan.digest,
            "auditHead": self._setup.log.head,
            "engine": cpu.engine,
            "emulated": cpu.emulated,
            "wallSeconds": round(time.monotonic() - self._began, 3),
            "virtualNs": self._machine.now_ns(),
            "extensions": [{name: item[name] for name in names} for item in self._layer.summary()],
        }

    def _stats(self) -> dict[str, Any]:
        machine = self._machine
        return {
            "wallSeconds": round(time.monotonic() - self._began, 3),
            "virtualNs": machine.now_ns(),
            "exits": dict(machine.cpu.exits),
            "biosCalls": dict(machine.firmware.calls),
            "blocksChecked": sum(use.blocks_checked for use in machine.uses()),
            "blocksWritten": sum(use.blocks_written for use in machine.uses()),
            "extensions": self._layer.summary(),
        }

    def _screen(self) -> dict[str, Any]:
        cells = self._machine.memory.read(TEXT_BASE, COLUMNS * ROWS * 2)
        return {"lines": self._machine.screen.lines(), "cells": base64.b64encode(cells).decode()}

    # --- changing ---------------------------------------------------------------------------------------------------

    def _unload(self, name: str) -> dict[str, Any]:
        running = self._running(name)
        if name in self._entry().require_extensions:
            raise RequiredExtensionError(f"the policy requires {name}", field="id", hint="replace it instead")
        if running.module is None:
            raise UsageError(f"{name} has no module: nothing of it runs", field="id")
        self._layer.unload(name)
        return self._changed([item for item in self._plan.extensions if item.id != name], self._plan.statement_sha256)

    def _change(self, request: Request, fd: int) -> dict[str, Any]:
        """Load or replace one extension of the record that was offered."""
        setup = self._setup
        offered, entry = OfferedGraft(setup.graft, fd), self._entry()
        with setup.memory.reopened():
            verdict = verify_evidence(
                offered,
                setup.policy,
                image_name=Path(self._plan.image).name,
                now=datetime.now(UTC),
                memory=setup.memory.state,
                # What the guest reads is held against it, block by block; but the policy may demand that all was read.
                tree=None if entry.read_before else setup.tree,
            )
            setup.log.write("verification", {"request": request.op.value, **verdict_fields(verdict)})
            if not verdict.ok:
                raise _refused(verdict)
            if verdict.policy != entry.name:
                raise UntrustedSignerError(
                    f"the guest runs under the trust policy {entry.name}, and this record satisfies {verdict.policy}",
                    field="policy",
                    hint="an extension of another trust policy goes with a guest that is started under that one",
                )
            chosen = self._choose(request, verdict)
            spec = self._spec(request, chosen)
            digest = statement_digest(offered)
            change = self._layer.load if request.op is Op.LOAD else self._layer.replace
            change(spec, lambda: self._remember(verdict, chosen, digest))
        self._ran[chosen.id] = _security_version(chosen)
        others = [item for item in self._plan.extensions if item.id != chosen.id]
        return {"id": chosen.id, "version": chosen.version, **self._changed([*others, chosen], digest)}

    def _choose(self, request: Request, verdict: Report) -> VerifiedExtension:
        """Return the extension of the record that the request is about."""
        found = [item for item in verdict.extensions if request.id in (None, item.id)]
        if len(found) != 1:
            offered = ", ".join(item.id for item in verdict.extensions)
            raise UsageError("say which extension of the record", field="id", hint=f"it carries {offered}")
        chosen = found[0]
        if request.op is Op.LOAD:
            if any(item.id == chosen.id for item in self._plan.extensions):
                raise UsageError(f"{chosen.id} runs already", field="id", hint="replace it")
            if len(self._plan.extensions) >= MAX_RUNNING:
                raise UsageError(f"{MAX_RUNNING} extensions are the most that run at a time", field="id")
        else:
            self._running(chosen.id)
        highest, new = self._ran.get(chosen.id, 0), _security_version(chosen)
        if new < highest:
            words = "ran here" if request.op is Op.LOAD else "runs"
            raise RollbackError(f"{chosen.id} {words} with security version {highest}, and this has {new}", field="id")
        return chosen

    def _spec(self, request: Request, chosen: VerifiedExtension) -> ExtensionSpec:
        """Return what the layer is told, with every claim tried beside those of the others.

        Raises:
            CapabilityError: a claim collides.
            UsageError: the extension is not one that can come to a running guest.
        """
        spec = to_spec(chosen)
        if spec is None or chosen.manifest.get("supplements"):
            words = "has no module" if spec is None else "adds to the disk"
            raise UsageError(f"{chosen.id} {words}", field="id", hint="start the guest with it")
        if request.op is Op.REPLACE and self._running(chosen.id).module is None:
            raise UsageError(f"{chosen.id} runs without a module", field="id", hint="start the guest with the new one")
        together = [*(item for item in self._plan.extensions if item.id != chosen.id), chosen]
        _check_overlap(together)
        specs = [item for item in map(to_spec, together) if item is not None]
        check_claims(specs, self._plan.memory_mib, self._plan.firmware)
        return spec

    def _remember(self, verdict: Report, chosen: VerifiedExtension, digest: str) -> None:
        """Remember that it got ready; where a newer one did in the meantime, the change is refused."""
        memory = self._setup.memory
        memory.raise_to(verdict, {chosen.id}, digest)
        if memory.path is not None:
            self._setup.log.write("remember", memory.to_dict() or {})

    def _changed(self, extensions: list[VerifiedExtension], digest: str) -> dict[str, Any]:
        """Note what runs from now on."""
        self._plan = replace(self._plan, extensions=tuple(extensions), statement_sha256=digest)
        self._setup.report.plan = self._plan
        self._setup.log.write("plan", {"sha256": self._plan.digest, "plan": self._plan.to_dict()})
        return {"planSha256": self._plan.digest}

    def _running(self, name: str) -> VerifiedExtension:
        for item in self._plan.extensions:
            if item.id == name:
                return item
        raise UsageError(f"{name} does not run here", field="id", hint="`vmgraft ctl SOCKET status` lists what runs")

    def _entry(self) -> TrustPolicy:
        """Return the trust policy that the guest was started under: every change is judged by this one."""
        for entry in self._setup.policy.trust_policies:
            if entry.name == self._plan.policy:
                return entry
        raise PolicyError(f"the guest runs under no trust policy that is known: {self._plan.policy}", field="policy")


def _check_overlap(extensions: Sequence[VerifiedExtension]) -> None:
    """Refuse two claims on one range, guest windows included, as the verification of one record does (``conflicts``).

    Raises:
        CapabilityError: there are two.
    """
    claims = [(item.id, parse_capability(text)) for item in extensions for text in item.capabilities]
    clash = first_overlap([claim for _, claim in claims])
    if clash is not None:
        (one, a), (other, b) = claims[clash[0]], claims[clash[1]]
        raise CapabilityError(f"{one} claims {a} and {other} claims {b}", field="capabilities")


def _security_version(item: VerifiedExtension) -> int:
    return int(item.manifest.get("securityVersion", 0))


def _refused(verdict: Report) -> VmgraftError:
    """Return the error that a verdict amounts to, in the words of the check that decided."""
    check = next((item for item in verdict.checks if item.status is Status.FAIL and item.error == verdict.error), None)
    kind = error_kind(verdict.error)
    if check is None:
        return kind("the record is refused", field="record")
    return kind(check.detail, field=check.name, hint=check.hint)
