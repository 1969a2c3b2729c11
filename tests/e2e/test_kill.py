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

#: Every call that can change a file, its name or its size; those that are never made cost nothing.
CHANGES = "pwrite64,pwritev,fsync,fdatasync,ftruncate,linkat,rename,renameat,renameat2,unlink,unlinkat,copy_file_range"
GRUB = Path("/usr/lib/grub-rescue/grub-rescue-cdrom.iso")


@pytest.fixture(params=["disk.img", "disc.iso", "disk.qcow2"])
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


def traced(program: Path, arguments: list[str | Path], log: Path, *inject: str) -> int:
    """Run vmgraft under strace; return its exit status, negative for a signal."""
    command = ["strace", "-f", "-qq", "-o", log, "-e", f"trace={CHANGES}", *inject, program, *arguments]
    return subprocess.run([str(part) for part in command], check=False, capture_output=True, timeout=120).returncode


def kill_points(log: Path) -> Iterator[tuple[str, int]]:
    """Yield (call, number) for every change of a run; calls of one name are counted from 1."""
    calls = Counter(re.findall(r"^\d+\s+(\w+)\(", log.read_text(), re.MULTILINE))
    for call, count in calls.items():
        yield from ((call, number) for number in range(1, count + 1))


def kill_each(command: list[str | Path], image: Path, before: bytes, log: Path) -> Iterator[tuple[str, int]]:
    """Run ``command`` on ``before`` once to count its changes, then once for each of them, killed right before it."""
    program = Path(command[0])
    image.write_bytes(before)
    assert traced(program, command[1:], log) == 0
    points = list(kill_points(log))
    assert len(points) >= 2, "the program changed nothing"
    for call, number in points:
        image.write_bytes(before)
        inject = ("-e", f"inject={call}:signal=KILL:when={number}")
        assert traced(program, command[1:], log, *inject) == -signal.SIGKILL, (call, number)
        yield call, number


def test_attach_and_detach_killed_at_every_change(cli, vendor: Path, image: Path, clock: Path) -> None:
    program = Path(sys.executable).with_name("vmgraft")
    before, shown, log = image.read_bytes(), content(image), image.with_name("trace.log")
    attach = [program, "attach", image, clock, "--key", vendor / "acme.key"]
    for point in kill_each(attach, image, before, log):
        assert content(image) == shown, point
        if not is_grafted(image):
            cli(*attach[1:])  # what the killed run left behind is no obstacle
            assert is_grafted(image)
        detach_image(image)
        assert image.read_bytes() == before, point
    cli(*attach[1:])
    grafted = image.read_bytes()
    for point in kill_each([program, "detach", image], image, grafted, log):
        assert content(image) == shown, point
        # 4: there is nothing left to do; 0 also when the repeated detach only sweeps up behind the killed one.
        cli("detach", image, code=4 if image.read_bytes() == before else 0)
        assert image.read_bytes() == before, point
