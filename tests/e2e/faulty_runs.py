"""Runs the installed program under strace, which lets the changes it makes to the disk fail, or kills it before one."""

import hashlib
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from vmgraft.imagefmt.contract import GraftState
from vmgraft.imagefmt.graft import open_graft, open_image
from vmgraft.imagefmt.sidecar import sidecar_path

PROGRAM = Path(sys.executable).with_name("vmgraft")
#: Every call that can change a file, its name or its size; "?" lets strace pass over those that a processor lacks.
CHANGES = (
    "?pwrite64,?pwritev,?fsync,?fdatasync,?ftruncate,?link,?linkat,?rename,?renameat,?renameat2,?unlink,?unlinkat,"
    "?copy_file_range"
)


def content(path: Path) -> str:
    with open_image(path) as image:
        return hashlib.sha256(image.read(0, image.virtual_size)).hexdigest()


def is_grafted(path: Path) -> bool:
    """Whether there is a sound graft; anything between that and none at all fails the test."""
    with open_image(path) as image:
        state = image.locate().state
        assert state in (GraftState.NONE, GraftState.OK)
        return state is GraftState.OK and open_graft(image).format_problem() is None


def traced(program: Path, arguments: list[str | Path], log: Path, *inject: str) -> tuple[int, bytes]:
    """Run vmgraft under strace; return its exit status, negative for a signal, and what it complained of."""
    command = ["strace", "-f", "-qq", "-o", log, "-e", f"trace={CHANGES}", *inject, program, *arguments]
    done = subprocess.run([str(part) for part in command], check=False, capture_output=True, timeout=120)
    return done.returncode, done.stderr


def changes(log: Path) -> Iterator[tuple[str, int]]:
    """Yield (call, number) for every change of a run; calls of one name are counted from 1."""
    calls = Counter(re.findall(r"^\d+\s+(\w+)\(", log.read_text(), re.MULTILINE))
    for call, count in calls.items():
        yield from ((call, number) for number in range(1, count + 1))


def save(image: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in (image, sidecar_path(image)) if path.exists()}


def restore(image: Path, saved: dict[Path, bytes]) -> None:
    sidecar_path(image).unlink(missing_ok=True)
    for path, data in saved.items():
        path.write_bytes(data)
