"""The disk is full, or fails, at every change that the installed program makes: said clearly, and nothing is lost."""

import errno
import os
from pathlib import Path

import pytest
from faulty_runs import PROGRAM, changes, content, is_grafted, restore, save, traced

from vmgraft.imagefmt.graft import detach_image

#: Calls that a full disk refuses; any other failure is one of the disk itself.
NEED_ROOM = ("pwrite64", "linkat", "link", "rename", "renameat")


@pytest.fixture(params=["disk.img", "disk.qcow2", "disk.vhd"])
def image(request, tmp_path: Path, guest: Path, tool) -> Path:
    path = tmp_path / request.param
    form = {".img": "raw", ".qcow2": "qcow2", ".vhd": "vpc"}[path.suffix]
    tool("qemu-img", "convert", "-f", "raw", "-O", form, guest, path)
    return path


def test_every_change_of_attach_and_detach_fails(cli, vendor: Path, image: Path, clock: Path) -> None:
    before, shown, log = save(image), content(image), image.with_name("trace.log")
    attach = ["attach", image, clock, "--key", vendor / "acme.key"]
    for command in (attach, ["detach", image]):
        start = save(image)
        assert traced(PROGRAM, command, log) == (0, b"")
        points, end = list(changes(log)), save(image)
        assert len(points) >= 2
        for call, number in points:
            restore(image, start)
            reason = "ENOSPC" if call in NEED_ROOM else "EIO"
            code, said = traced(PROGRAM, command, log, "-e", f"inject={call}:error={reason}:when={number}")
            point = (command[0], call, number)
            assert b"Traceback" not in said
            assert content(image) == shown, point
            if code == 0:  # only what the program can do without
                assert save(image) == end, point
                continue
            assert code == 3, (point, said)
            lines = said.decode().splitlines()
            assert [line.split(":")[0] for line in lines] in (["error"], ["error", "hint"]), lines
            assert os.strerror(getattr(errno, reason)) in lines[0], point
            # As before, or as after; a retry takes it to the end either way.
            if command is attach and not is_grafted(image):
                cli(*attach)
            elif command is not attach and save(image) != before:
                cli("detach", image)
            if command is attach:
                detach_image(image)
            assert save(image) == before, point
        restore(image, end)
    assert save(image) == before
