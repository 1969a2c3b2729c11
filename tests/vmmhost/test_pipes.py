"""Files of the operator's that are pipes: refused at once, never waited for."""

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vmgraft.errors import VmgraftError
from vmgraft.vmmhost.audit import check_chain
from vmgraft.vmmhost.control.client import read_record
from vmgraft.vmmhost.launch import Launcher
from vmgraft.vmmhost.plan import RunOptions


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


def refused(act: Callable[[], Any], pipe: Path) -> None:
    """Hold that ``act`` raises one error about the pipe; whoever waited for it is let go after a while."""
    freed = threading.Timer(5, lambda: os.close(os.open(pipe, os.O_RDWR)))
    freed.start()
    try:
        with pytest.raises(VmgraftError) as caught:
            act()
        assert freed.is_alive(), "it waited"
    finally:
        freed.cancel()
        freed.join()
    assert caught.value.file == str(pipe)


@pytest.mark.parametrize("option", ["kernel", "initrd", "bios", "replay", "restore"])
def test_no_run_waits_for_a_pipe(studio: Any, pipe: Path, option: str) -> None:
    studio.graft(studio.wat(studio.ONES))
    chosen: dict[str, Any] = {"cpu": "soft", "timeout": 10, option: pipe}
    if option == "initrd":
        chosen["kernel"] = studio.image
    if option == "bios":
        chosen["firmware"] = "seabios"
    refused(lambda: Launcher(studio.image, studio.policy, RunOptions(**chosen)).run(), pipe)


@pytest.mark.parametrize("read", [check_chain, read_record])
def test_no_reader_waits_for_a_pipe(pipe: Path, read: Callable[[Path], Any]) -> None:
    refused(lambda: read(pipe), pipe)
