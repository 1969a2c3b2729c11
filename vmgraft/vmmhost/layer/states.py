"""Saving an extension and giving it back what it was: into its successor, or into the same one of a later run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from vmgraft.errors import ExtensionFaultError, PayloadMismatchError
from vmgraft.vmmhost.layer.abi import MASK32, MAX_BUFFER_BYTES, Hook
from vmgraft.vmmhost.layer.protocol import Kind
from vmgraft.vmmhost.layer.proxy import ExtensionProxy


@dataclass(frozen=True, slots=True)
class ExtensionState:
    """One extension as it was when the machine was saved.

    Attributes:
        id: Its id.
        version: Its version, for messages.
        module_sha256: SHA-256 of its module, in hexadecimal: another module does not get the state.
        state: What ``on_snapshot`` gave, at most 64 KiB; None where the module keeps none.
        store: Its keys and values.
        irqs: Interrupt lines that it held up.
    """

    id: str
    version: str
    module_sha256: str
    state: bytes | None = None
    store: Mapping[bytes, bytes] = field(default_factory=dict)
    irqs: frozenset[int] = frozenset()


def save(proxy: ExtensionProxy) -> ExtensionState:
    """Return everything that makes the extension what it is now.

    Raises:
        ExtensionFaultError: as `snapshot`.
    """
    spec = proxy.spec
    state = snapshot(proxy)
    return ExtensionState(spec.id, spec.version, module_digest(proxy), state, proxy.store.items(), proxy.irqs.raised())


def load(proxy: ExtensionProxy, saved: ExtensionState) -> None:
    """Make the extension what it was.

    Raises:
        PayloadMismatchError: the state is of another module.
        ExtensionFaultError: the store does not fit, or as `restore`.
    """
    if saved.module_sha256 != module_digest(proxy):
        message = f"the saved state is of version {saved.version} with another module"
        raise PayloadMismatchError(message, file=proxy.spec.id, hint="load the extension that was saved")
    if not proxy.store.replace(saved.store):
        raise ExtensionFaultError("the saved keys and values are over their bounds", file=proxy.spec.id, field="store")
    if saved.state is not None:
        restore(proxy, saved.state)
    for line in saved.irqs & set(proxy.spec.irqs):
        proxy.irqs.set(line, True)


def module_digest(proxy: ExtensionProxy) -> str:
    """Return the SHA-256 of an extension's module, in hexadecimal."""
    return hashlib.sha256(proxy.spec.module).hexdigest()


def snapshot(proxy: ExtensionProxy) -> bytes | None:
    """Return the module's state; None where it keeps none, or is not there any more.

    Raises:
        ExtensionFaultError: it says that it cannot be saved now, or broke a rule over it.
    """
    if not proxy.has(Hook.SNAPSHOT):
        return None
    reply = proxy.exchange(Hook.SNAPSHOT, Kind.CALL_SNAPSHOT, room=MAX_BUFFER_BYTES)
    if reply is None:
        raise ExtensionFaultError("the extension broke a rule while its state was saved", file=proxy.spec.id)
    length, state = reply[0] & MASK32, reply[1]
    if length == MASK32:
        raise ExtensionFaultError("the extension cannot be saved now", file=proxy.spec.id, hint="try again later")
    if length != len(state):
        raise proxy.broke(f"on_snapshot says {length} bytes and gives {len(state)}")
    return state


def restore(proxy: ExtensionProxy, state: bytes) -> None:
    """Give a module the state that it or its predecessor saved.

    Raises:
        ExtensionFaultError: it has no ``on_restore``, refuses the state, or broke a rule over it.
    """
    if len(state) > MAX_BUFFER_BYTES:
        raise ExtensionFaultError(f"a saved state of {len(state)} bytes is over the bound", file=proxy.spec.id)
    reply = proxy.exchange(Hook.RESTORE, Kind.CALL_RESTORE, value=len(state), data=state)
    if reply is None:
        raise ExtensionFaultError("the extension does not take a saved state", file=proxy.spec.id)
    if reply[0] & MASK32:
        raise ExtensionFaultError(f"on_restore returned {reply[0] & MASK32}", file=proxy.spec.id)
