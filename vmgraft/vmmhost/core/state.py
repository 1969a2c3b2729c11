"""What a device remembers, as a document that can be kept: numbers within bounds, and bytes of a known length."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from vmgraft.errors import HostError

#: A device's memory in JSON's terms.
State = dict[str, Any]


class Stateful(Protocol):
    """Whatever can be kept and brought back."""

    def state(self) -> State: ...  # noqa: D102
    def set_state(self, state: State) -> None: ...  # noqa: D102


def refuse(name: str) -> HostError:
    """Return the error for a member of a snapshot that makes no sense."""
    return HostError("the snapshot does not fit this machine", field=name, hint="take a new one from this guest")


def number(state: Mapping[str, Any], name: str, allowed: range) -> int:
    """Return an integer member.

    Raises:
        HostError: when it is missing, no integer, or out of bounds.
    """
    value = state.get(name)
    if type(value) is not int or not allowed.start <= value < allowed.stop:
        raise refuse(name)
    return value


def flag(state: Mapping[str, Any], name: str) -> bool:
    """Return a boolean member.

    Raises:
        HostError: when it is missing or no boolean.
    """
    value = state.get(name)
    if type(value) is not bool:
        raise refuse(name)
    return value


def blob(state: Mapping[str, Any], name: str, length: int) -> bytes:
    """Return a member of ``length`` bytes, written in hex.

    Raises:
        HostError: when it is missing or has another length.
    """
    value = state.get(name)
    if type(value) is not str or len(value) != 2 * length:
        raise refuse(name)
    try:
        return bytes.fromhex(value)
    except ValueError as error:
        raise refuse(name) from error


def part(state: Mapping[str, Any], name: str) -> State:
    """Return a member that is itself a document.

    Raises:
        HostError: when it is missing or something else.
    """
    value = state.get(name)
    if type(value) is not dict:
        raise refuse(name)
    return value


class Remembering:
    """Gives a device :class:`Stateful` for attributes that it names.

    ``REMEMBERED`` tells for each attribute the range of an integer, or the length of a bytearray. The member of the
    document is called like the attribute, without a leading underscore.
    """

    REMEMBERED: ClassVar[Mapping[str, range | int]] = {}

    def state(self) -> State:
        """Return what this device remembers."""
        state: State = {}
        for attribute, shape in self.REMEMBERED.items():
            value = getattr(self, attribute)
            state[attribute.lstrip("_")] = value if isinstance(shape, range) else bytes(value).hex()
        return state

    def set_state(self, state: State) -> None:
        """Remember that instead.

        Raises:
            HostError: when something is missing or out of bounds; nothing was changed then.
        """
        new: dict[str, int | bytearray] = {}
        for attribute, shape in self.REMEMBERED.items():
            name = attribute.lstrip("_")
            new[attribute] = (
                number(state, name, shape) if isinstance(shape, range) else bytearray(blob(state, name, shape))
            )
        for attribute, value in new.items():
            old = getattr(self, attribute)
            if isinstance(value, bytearray) and isinstance(old, bytearray):
                old[:] = value  # others may hold the same buffer
            else:
                setattr(self, attribute, value)
