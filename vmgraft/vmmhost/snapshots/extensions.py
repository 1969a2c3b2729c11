"""The states of extensions as one section of a snapshot: JSON, every length and number bounded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final

from vmgraft.errors import HostError
from vmgraft.schemas import strict_json
from vmgraft.vmmhost.layer.abi import MAX_BUFFER_BYTES, MAX_KEY_BYTES, MAX_VALUE_BYTES
from vmgraft.vmmhost.layer.states import ExtensionState
from vmgraft.vmmhost.layer.store import STORE_KEYS

#: Name of the section.
SECTION: Final = "extensions"
#: Extensions at a time (docs/format.md), and bytes for one: state and store in hexadecimal, with room for the words.
_MOST: Final = 64
_ONE_MAX: Final = 512 << 10
_NAME_MAX: Final = 255
_LINES: Final = 16


def pack(states: Sequence[ExtensionState]) -> bytes:
    """Return the section."""
    return json.dumps([_document(state) for state in states]).encode()


def _document(state: ExtensionState) -> dict[str, Any]:
    return {
        "id": state.id,
        "version": state.version,
        "moduleSha256": state.module_sha256,
        "state": None if state.state is None else state.state.hex(),
        "store": [[key.hex(), value.hex()] for key, value in state.store.items()],
        "irqs": sorted(state.irqs),
    }


def unpack(raw: bytes) -> tuple[ExtensionState, ...]:
    """Return the states in a section.

    Raises:
        HostError: it makes no sense.
    """
    listed = strict_json(raw, file=None, error=HostError, max_bytes=_MOST * _ONE_MAX)
    if not isinstance(listed, list) or len(listed) > _MOST:
        raise _bad("no list of extensions")
    states = tuple(map(_state, listed))
    if len({state.id for state in states}) != len(states):
        raise _bad("an extension that is there twice")
    return states


def _state(item: Any) -> ExtensionState:
    if not isinstance(item, dict):
        raise _bad("an extension that is no object")
    texts = [item.get(name) for name in ("id", "version", "moduleSha256")]
    store, irqs, state = item.get("store"), item.get("irqs"), item.get("state")
    if not all(isinstance(text, str) and len(text) <= _NAME_MAX for text in texts):
        raise _bad("an extension without a name")
    if not isinstance(store, list) or len(store) > STORE_KEYS or not isinstance(irqs, list) or len(irqs) > _LINES:
        raise _bad("a store or interrupt lines that are none")
    if not all(type(line) is int and 0 <= line < _LINES for line in irqs):
        raise _bad("an interrupt line that does not exist")
    kept: dict[bytes, bytes] = {}
    for pair in store:
        if not isinstance(pair, list) or len(pair) != 2:
            raise _bad("a key without a value")
        kept[_bytes(pair[0], MAX_KEY_BYTES)] = _bytes(pair[1], MAX_VALUE_BYTES)
    name, version, digest = map(str, texts)
    told = None if state is None else _bytes(state, MAX_BUFFER_BYTES)
    return ExtensionState(name, version, digest, told, kept, frozenset(irqs))


def _bytes(text: Any, limit: int) -> bytes:
    if not isinstance(text, str) or len(text) > 2 * limit:
        raise _bad("bytes that are too many or none")
    try:
        return bytes.fromhex(text)
    except ValueError as error:
        raise _bad("bytes that are no hexadecimal") from error


def _bad(what: str) -> HostError:
    return HostError(f"the snapshot is damaged: {what}", field=SECTION)
