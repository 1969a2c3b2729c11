"""kill -9 at every change that the installed program makes to the disk: before or after, never between."""

import hashlib
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmgraft.imagefmt.contract import GraftState
from vmgraft.imagefmt.graft import detach_image, open_graft, open_image
from vmgraft.imagefmt.sidecar import sidecar_path

#: Every call that can change a file, its name or its size; "?" lets strace pass over those that a processor lacks.
CHANGES = (
    "?pwrite64,?pwritev,?fsync,?fdatasync,?ftruncate,?link,?linkat,?rename,?renameat,?renameat2,?unlink,?unlinkat,"
    "?copy_file_range"
)
GRUB = Path("/usr/lib/grub-rescue/grub-rescue-cdrom.iso")


@pytest.fixture
def image(request, tmp_path: Path, guest: Path, tool) -> Path:
    path = tmp_path / request.param
    if path.suffix == ".iso":
        shutil.copy(GRUB, path)
    elif path.suffix == ".qcow2":
        tool("qemu-img", "convert", "-f", "raw", "-O", "qcow2", guest, path)
    else:
        path.write_bytes(guest.read_bytes().ljust(70_000, b"\x5a"))
    return path


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


def kill_points(log: Path) -> Iterator[tuple[str, int]]:
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


def kill_each(command: list[str | Path], image: Path, log: Path) -> Iterator[tuple[str, int]]:
    """Run ``command`` once to count its changes, then from the same start once for each, killed right before it."""
    program, start = Path(command[0]), save(image)
    assert traced(program, command[1:], log) == (0, b"")
    points = list(kill_points(log))
    assert len(points) >= 2, "the program changed nothing"
    for call, number in points:
        restore(image, start)
        inject = ("-e", f"inject={call}:signal=KILL:when={number}")
        assert traced(program, command[1:], log, *inject)[0] == -signal.SIGKILL, (call, number)
        yield call, number


@pytest.mark.parametrize(
    ("image", "placement"),
    [("disk.img", "inline"), ("disk.img", "sidecar"), ("disc.iso", "inline"), ("disk.qcow2", "inline")],
    indirect=["image"],
)
def test_attach_and_detach_killed_at_every_change(cli, vendor: Path, image: Path, clock: Path, placement: str) -> None:
    program = Path(sys.executable).with_name("vmgraft")
    before, shown, log = save(image), content(image), image.with_name("trace.log")
    attach = [program, "attach", image, clock, "--key", vendor / "acme.key", "--placement", placement]
    for point in kill_each(attach, image, log):
        assert content(image) == shown, point
        if not is_grafted(image):
            cli(*attach[1:])  # what the killed run left behind is no obstacle
            assert is_grafted(image)
        detach_image(image)
        assert save(image) == before, point
    cli(*attach[1:])
    for point in kill_each([program, "detach", image], image, log):
        assert content(image) == shown, point
        # 4: there is nothing left to do; 0 also when the repeated detach only sweeps up behind the killed one.
        cli("detach", image, code=4 if save(image) == before else 0)
        assert save(image) == before, point
