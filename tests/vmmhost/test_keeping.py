"""When a guest may be kept, and what its snapshot is bound to."""

from pathlib import Path
from typing import Any

import pytest

from vmgraft.errors import HostError
from vmgraft.vmmhost.snapshots.container import _BOUND, binding, machine_bindings
from vmgraft.vmmhost.snapshots.keeping import Keeping


class Machine:
    """Rests when the test says so, and must not be saved."""

    def __init__(self) -> None:
        self.acts: list[Any] = []

    def at_rest(self, act: Any) -> None:
        self.acts.append(act)

    def save(self, *_: Any) -> bytes:
        raise AssertionError("the machine was kept")


class Layer:
    """One extension in some state."""

    state = "running"

    def summary(self) -> list[dict[str, Any]]:
        return [{"id": "org.example.one", "state": self.state}]

    def snapshot(self) -> tuple[Any, ...]:
        raise AssertionError("the extensions were asked")


class Plan:
    """A launch plan with one extension."""

    def __init__(self, **change: Any) -> None:
        self._extension = {
            "id": "org.example.one", "version": "1", "moduleSha256": "00", "capabilities": ["pio:0x510-0x517"],
        } | change  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        return {**dict.fromkeys(_BOUND, "same"), "extensions": [self._extension]}


@pytest.mark.parametrize("state", ["detached", "stopped"])
def test_a_fault_between_the_question_and_the_rest(tmp_path: Any, state: str) -> None:
    """A guest whose extension has gone is not the one that was to be kept; nothing is written of it."""
    machine, layer, noted = Machine(), Layer(), []
    keeping = Keeping(machine, layer, lambda event, fields: noted.append(event))  # type: ignore[arg-type]
    with (tmp_path / "snap").open("wb") as file:
        later = keeping.ask(Plan(), file.fileno())  # type: ignore[arg-type]
        descriptors = len(list(Path("/proc/self/fd").iterdir()))
        assert later.outcome is None
        layer.state = state
        machine.acts[0]()
        assert len(list(Path("/proc/self/fd").iterdir())) == descriptors - 1
        assert isinstance(later.outcome, HostError)
        assert "does not run any more" in later.outcome.message
        with pytest.raises(HostError, match="does not run any more"):
            keeping.ask(Plan(), file.fileno())  # type: ignore[arg-type]
    assert ((tmp_path / "snap").read_bytes(), noted, len(machine.acts)) == (b"", [], 1)


@pytest.mark.parametrize(
    "change",
    [
        {"capabilities": ["pio:0x510-0x517", "stop"]},
        {"capabilities": []},
        {"moduleSha256": "01"},
        {"version": "2"},
        {"id": "org.example.two"},
    ],
)
def test_a_snapshot_is_bound_to_each_extension_and_its_rights(change: dict[str, Any]) -> None:
    one, other = Plan(), Plan(**change)
    assert binding(one) == binding(Plan())  # type: ignore[arg-type]
    assert binding(one) != binding(other)  # type: ignore[arg-type]
    assert machine_bindings(one) != machine_bindings(other)  # type: ignore[arg-type]
