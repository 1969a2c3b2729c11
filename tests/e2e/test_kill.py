"""kill -9 at every change that the installed program makes to the disk: before or after, never between."""

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from faulty_runs import PROGRAM, changes, content, is_grafted, restore, save, traced

from vmgraft.imagefmt.graft import detach_image

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


def kill_each(command: list[str | Path], image: Path, log: Path) -> Iterator[tuple[str, int]]:
    """Run ``command`` once to count its changes, then from the same start once for each, killed right before it."""
    program, start = Path(command[0]), save(image)
    assert traced(program, command[1:], log) == (0, b"")
    points = list(changes(log))
    assert len(points) >= 2, "the program changed nothing"
    for call, number in points:
        restore(image, start)
        inject = ("-e", f"inject={call}:signal=KILL:when={number}")
        assert traced(program, command[1:], log, *inject)[0] == -signal.SIGKILL, (call, number)
        yield call, number


@pytest.mark.parametrize(
    ("image", "placement"),
    [
        ("disk.img", "inline"),
        ("disk.img", "sidecar"),
        ("disc.iso", "inline"),
        ("disk.qcow2", "inline"),
    ],
    indirect=["image"],
)
def test_attach_and_detach_killed_at_every_change(cli, vendor: Path, image: Path, clock: Path, placement: str) -> None:
    before, shown, log = save(image), content(image), image.with_name("trace.log")
    attach = [PROGRAM, "attach", image, clock, "--key", vendor / "acme.key", "--placement", placement]
    for point in kill_each(attach, image, log):
        assert content(image) == shown, point
        if not is_grafted(image):
            cli(*attach[1:])  # what the killed run left behind is no obstacle
            assert is_grafted(image)
        detach_image(image)
        assert save(image) == before, point
    cli(*attach[1:])
    for point in kill_each([PROGRAM, "detach", image], image, log):
        assert content(image) == shown, point
        # 4: there is nothing left to do; 0 also when the repeated detach only sweeps up behind the killed one.
        cli("detach", image, code=4 if save(image) == before else 0)
        assert save(image) == before, point
