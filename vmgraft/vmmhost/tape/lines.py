"""The lines of a recording: JSON arrays, each an event, between a header and an end that counts and hashes them all.

``["spawn", W, NAMESPACES]``, ``["send", W, HEX]``, ``["digest", W, SHA256]`` (a piece of a module that was sent),
``["recv", W, HEX]``, ``["late", W, WAY]`` and ``["gone", W, WAY]`` (what the host met in place of a packet),
``["seen", W, HEX]`` (how the worker looked from outside), ``["exit", W, STATUS]``, ``["kill", W]``, and
``["at", N]``: what follows happened at the N-th look around.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from vmgraft.errors import FileError
from vmgraft.vmmhost.layer.protocol import WORKER_RECV_BYTES, Kind
from vmgraft.vmmhost.plan import LaunchPlan, RunOptions

VERSION: Final = 1
#: Name of the header's member that says what the file is.
MARK: Final = "vmgraftRecording"
#: Longest line, in bytes: the hexadecimal form of the largest packet either side sends, with room for its frame.
MAX_LINE: Final = 4 * WORKER_RECV_BYTES
#: Longest recording, in bytes.
MAX_FILE: Final = 1 << 30
#: Most workers one recording knows: 64 extensions with 99 restarts each (docs/extensions.md).
MAX_WORKERS: Final = 64 * 100
_HEX: Final = re.compile(r"(?:[0-9a-f]{2})*\Z")
_WAYS: Final = ("send", "recv")

#: Whole numbers by what they are, with the first that is too large.
_WHOLE: Final = {"worker": MAX_WORKERS, "number": 1 << 63, "bits": 1 << 32}
#: What stands behind the name of each event.
_SHAPES: Final[dict[str, tuple[str, ...]]] = {
    "at": ("number",), "end": ("number", "hex"), "spawn": ("worker", "bits"), "send": ("worker", "hex"),
    "digest": ("worker", "hex"), "recv": ("worker", "hex"), "late": ("worker", "way"), "gone": ("worker", "way"),
    "exit": ("worker", "ending"), "seen": ("worker", "hex"), "kill": ("worker",),
}  # fmt: skip

Event = tuple[Any, ...]


def binding(plan: LaunchPlan, options: RunOptions) -> dict[str, Any]:
    """Return what a recording is bound to: content, statement, modules, and whatever shapes the machine."""
    shown = plan.to_dict()
    names = (
        "statementSha256", "memoryMiB", "boot", "firmware", "firmwareSha256", "direct", "supplements",
    )  # fmt: skip
    modules = {item["id"]: item["moduleSha256"] for item in shown["extensions"]}
    # In the order in which they are compared: other extensions come with another statement and other supplements.
    first = {"contentTree": shown["contentTree"], "modules": modules}
    return {**first, **{name: shown[name] for name in names}, "keys": options.keys}


def event_line(event: Event) -> bytes:
    """Return an event as it is written."""
    return json.dumps(event, separators=(",", ":")).encode() + b"\n"


def sent_event(worker: int, packet: bytes) -> Event:
    """Return the event of a packet that the host sent; of a module's bytes only their digest is kept."""
    if packet[:1] == bytes((Kind.MODULE,)):
        return ("digest", worker, hashlib.sha256(packet).hexdigest())
    return ("send", worker, packet.hex())


def parse_event(line: bytes, path: Path, number: int) -> Event:
    """Check one line.

    Raises:
        FileError: it is no event of a recording.
    """
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        event = None
    if not line.endswith(b"\n") or len(line) > MAX_LINE or not isinstance(event, list) or not _is_event(event):
        raise FileError("not an event of a recording", file=path, field=f"line {number}")
    return tuple(event)


def _is_event(event: Sequence[Any]) -> bool:
    shape = _SHAPES.get(event[0]) if event and isinstance(event[0], str) else None
    return shape is not None and len(event) == 1 + len(shape) and all(map(_fits, shape, event[1:]))


def _fits(shape: str, value: Any) -> bool:
    """Tell whether a member is what its place asks for."""
    if shape in _WHOLE:
        return type(value) is int and 0 <= value < _WHOLE[shape]
    if shape == "ending":
        return value is None or (type(value) is int and 0 <= value < 1 << 16)
    if shape == "way":
        return value in _WAYS
    return isinstance(value, str) and len(value) <= 2 * WORKER_RECV_BYTES and _HEX.match(value) is not None
