"""How a running guest is shown to people. What comes from the socket is text of another process."""

from __future__ import annotations

from typing import Any, Final

import click

from vmgraft.cli.output import printable
from vmgraft.words import counted

#: Counters beyond this are not ours.
_COUNT_END: Final = 1 << 63


def show_status(status: dict[str, Any]) -> None:
    """Print what runs."""
    emulated = " (emulated)" if status.get("emulated") else ""
    _line("image", status.get("image"))
    _line("policy", status.get("policy"))
    _line("plan", f"sha256:{status.get('planSha256')}")
    _line("engine", f"{status.get('engine')}{emulated}, for {status.get('wallSeconds')} s")
    for item in _objects(status.get("extensions")):
        text = f"{item.get('id')} {item.get('version')}: {item.get('state')}, isolation level {item.get('isolation')}"
        _line("extension", text)


def show_stats(now: dict[str, Any], before: dict[str, Any] | None = None) -> None:
    """Print counters; with an earlier look, what came since in brackets."""
    old = before or {}
    _line("time", f"{now.get('wallSeconds')} s, virtual {_number(now.get('virtualNs')) / 1e9:.3f} s")
    _line("exits", _counts(now.get("exits"), old.get("exits")))
    _line("BIOS calls", _counts(now.get("biosCalls"), old.get("biosCalls")))
    _line("blocks", f"checked {now.get('blocksChecked')}, written {now.get('blocksWritten')}")
    earlier = {item.get("id"): item for item in _objects(old.get("extensions"))}
    for item in _objects(now.get("extensions")):
        show_extension(item, earlier.get(item.get("id")), err=False)


def show_extension(item: dict[str, Any], before: dict[str, Any] | None = None, *, err: bool) -> None:
    """Print one extension's counters on one line."""
    since = "" if before is None else f" (+{_number(item.get('calls')) - _number(before.get('calls'))})"
    words = f"extension {item.get('id')} {item.get('version')}: {item.get('state')}, "
    words += "replayed" if item.get("replayed") is True else f"isolation level {item.get('isolation')}"
    words += f", {counted(_number(item.get('calls')), 'call')}{since}, "
    words += counted(_number(item.get("faults")), "fault")
    timing = item.get("latencyMicroseconds")
    if isinstance(timing, dict) and timing:
        words += ", µs " + " ".join(f"{name} {value}" for name, value in timing.items())
    fuel = item.get("fuel")
    if isinstance(fuel, dict):
        words += f", fuel {_number(fuel.get('total'))} (most {_number(fuel.get('max'))} in a call)"
    metrics = item.get("metrics")
    if isinstance(metrics, dict) and metrics:
        words += ", metrics " + " ".join(f"{name}={value}" for name, value in sorted(metrics.items()))
    click.echo(printable(words), err=err)


def _line(label: str, text: Any) -> None:
    click.echo(f"{label:10}  {printable(str(text))}")


def _counts(now: Any, before: Any) -> str:
    old = before if isinstance(before, dict) else {}
    parts = []
    for name, value in (now if isinstance(now, dict) else {}).items():
        since = f" (+{_number(value) - _number(old.get(name))})" if before is not None else ""
        parts.append(f"{name} {value}{since}")
    return ", ".join(parts) or "none"


def _number(value: Any) -> int:
    return value if isinstance(value, int) and -_COUNT_END <= value < _COUNT_END else 0


def _objects(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
