"""``run --kernel``: the operator's kernel in place of what the verified disk boots."""

from __future__ import annotations

import hashlib
import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vmgraft.errors import NotBootableError
from vmgraft.vmmhost.core.contract import EndReason
from vmgraft.vmmhost.launch import Launcher
from vmgraft.vmmhost.plan import RunOptions

#: Sends the first bytes of the command line and of the first module to COM1, then powers off through port 604h.
CODE = bytes.fromhex(
    "8b7310 b909000000 66baf803 f36e"  # mov esi, [ebx+16]; mov ecx, 9; mov dx, 3f8h; rep outsb
    "8b4318 8b30 b907000000 f36e"  # mov eax, [ebx+24]; mov esi, [eax]; mov ecx, 7; rep outsb
    "66ba0406 66b80020 66ef faf4"
)


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    """A multiboot kernel with the addresses in its header."""
    address = 0x100000
    header = struct.pack("<III", 0x1BADB002, 0x10003, -(0x1BADB002 + 0x10003) & 0xFFFFFFFF)
    header += struct.pack("<5I", address, address, 0, 0, address + 32)
    path = tmp_path / "kernel.bin"
    path.write_bytes(header + CODE)
    return path


@pytest.fixture
def initrd(tmp_path: Path) -> Path:
    path = tmp_path / "initrd.img"
    path.write_bytes(b"ramdisk")
    return path


def options(studio: Any, kernel: Path, **others: Any) -> RunOptions:
    return RunOptions(cpu="soft", kernel=kernel, audit_log=studio.audit_log, timeout=30, **others)


def test_a_kernel_is_entered_and_named_by_digest(studio: Any, kernel: Path, initrd: Path) -> None:
    studio.graft(studio.wat(studio.ONES))
    chosen = options(studio, kernel, initrd=initrd, append="quiet=yes")
    report = Launcher(studio.image, studio.policy, chosen).run()
    assert report.result is not None
    assert report.result.reason is EndReason.SHUTDOWN, report.result.detail
    assert report.result.serial == b"quiet=yesramdisk"
    plan = next(record["plan"] for record in studio.log() if record["event"] == "plan")
    assert hashlib.sha256(kernel.read_bytes()).hexdigest() in json.dumps(plan)
    assert hashlib.sha256(b"ramdisk").hexdigest() in json.dumps(plan)
    boot = next(record for record in studio.log() if record["event"] == "boot")
    assert (boot["engine"], boot["why"]) == ("soft", "asked for")


def test_the_disk_need_not_boot(studio: Any, kernel: Path) -> None:
    studio.guest = bytes(512)
    studio.graft(studio.wat(studio.ONES))
    result = Launcher(studio.image, studio.policy, options(studio, kernel, append="x" * 9)).run().result
    assert result is not None
    assert result.serial.startswith(b"x" * 9)


def test_a_file_that_is_no_kernel_is_named(studio: Any, kernel: Path) -> None:
    kernel.write_bytes(b"#!/bin/sh\n")
    studio.graft(studio.wat(studio.ONES))
    with pytest.raises(NotBootableError, match="no multiboot, PVH or Linux kernel") as caught:
        Launcher(studio.image, studio.policy, options(studio, kernel)).run()
    assert caught.value.file == str(kernel)
    assert studio.log()[-1]["code"] == "not-bootable"


def test_the_program_takes_a_kernel(studio: Any, kernel: Path, initrd: Path) -> None:
    studio.graft(studio.wat(studio.ONES))
    command = ["run", studio.image, "--policy", studio.policy, "--cpu", "soft", "--kernel", kernel, "--initrd", initrd]
    done = subprocess.run(
        [sys.executable, "-m", "vmgraft", *map(str, command), "--append", "some text", "--quiet"],
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, b"some textramdisk"), done.stderr


def test_a_guest_that_this_engine_cannot_run_is_told_where_it_can(
    studio: Any, kernel: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Loads an empty descriptor table for exceptions with an error code, then faults: as Linux on the soft CPU."""
    from vmgraft.cli.console import Outputs
    from vmgraft.cli.runview import finish_run

    # mov eax, cr0; or eax, 80000000h; mov cr3, zeros; mov cr0, eax: the next instruction has no page
    fault = bytes.fromhex("b800005000 0f22d8 0f20c0 0d00000080 0f22c0 f4".replace(" ", ""))
    kernel.write_bytes(kernel.read_bytes().replace(CODE, fault))
    studio.graft(studio.wat(studio.ONES))
    report = Launcher(studio.image, studio.policy, options(studio, kernel)).run()
    assert report.result is not None
    if report.result.reason is not EndReason.ERROR:
        pytest.fail(f"{report.result.reason}: {report.result.detail}")
    with Outputs(screen=None, serial=None, as_json=False) as outputs:
        assert finish_run(report, studio.image, outputs, as_json=False) == 20
    assert "--engine qemu" in capsys.readouterr().err
