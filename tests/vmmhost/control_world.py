"""A guest with a control socket, run in a thread, and images of one content with different grafts."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from click.testing import CliRunner

from vmgraft.cli.app import run
from vmgraft.errors import HostError
from vmgraft.signing.manifest import canonical_manifest, parse_manifest
from vmgraft.signing.policytools import format_policy, init_policy
from vmgraft.vendor.graft import AttachOptions, attach
from vmgraft.vendor.pack import Package
from vmgraft.vmmhost.control.client import ControlClient
from vmgraft.vmmhost.control.wire import Op
from vmgraft.vmmhost.launch import Launcher, RunReport
from vmgraft.vmmhost.plan import RunOptions

#: Reads ports 510h and 520h for ever.
READ_BOTH = bytes.fromhex("ba1005 ec ba2005 ec ebf6".replace(" ", ""))
CLOCK, ALARM = "org.example.clock", "org.example.alarm"


class World:
    """Images of one content with different grafts, by one vendor, and a policy that grants all of it."""

    def __init__(self, studio: Any, **policy: Any) -> None:
        self.studio, self.folder = studio, studio.folder
        studio.boot_code(READ_BOTH)
        self.module = studio.wat(studio.ONES)
        self.socket = self.folder / "guest.sock"
        self.image = self.make("disk.img", self.package(CLOCK))
        granted = (self.package(CLOCK), self.package(ALARM, "pio:0x516-0x527"))
        wanted = [parse_manifest(package.manifest) for package in granted]
        document = init_policy({"vendor": studio.key.public}, wanted)
        document["trustPolicies"][0].update(policy)
        studio.policy.write_bytes(format_policy(document))

    def package(self, name: str, claim: str | None = None, *, version: int = 1, module: bytes | None = None) -> Package:
        claims = [claim or ("pio:0x510-0x517" if name == CLOCK else "pio:0x520-0x527")]
        manifest = canonical_manifest({
            "id": name, "version": f"{version}.0", "securityVersion": version, "abi": "vmgraft/1",
            "module": "module.wasm", "onFault": "detach", "capabilities": claims,
            "limits": {"memoryMiB": 1, "fuelPerCall": 1_000_000, "callMs": 500, "logBytes": 1024},
        })  # fmt: skip
        return Package(name, f"{version}.0", manifest, module or self.module)

    def make(self, name: str, *packages: Package, code: bytes = b"", key: Any = None) -> Path:
        image = self.folder / name
        image.write_bytes((code or self.studio.guest).ljust(1 << 20, b"\0"))
        attach(image, list(packages), [key or self.studio.key], AttachOptions())
        return image

    @contextmanager
    def guest(self, **chosen: Any) -> Iterator[tuple[ControlClient, list[RunReport]]]:
        """Run the guest in a thread; give a client, and where its report will be."""
        options: dict[str, Any] = {
            "cpu": "soft", "timeout": 60, "audit_log": self.studio.audit_log, "control": self.socket, **chosen,
        }  # fmt: skip
        log: Path = options["audit_log"]
        reports: list[RunReport] = []
        failed: list[BaseException] = []

        def work() -> None:
            try:
                reports.append(Launcher(self.image, self.studio.policy, RunOptions(**options)).run())
            except BaseException as error:
                failed.append(error)
                raise

        thread = threading.Thread(target=work)
        thread.start()
        try:
            while '"event": "boot"' not in (log.read_text() if log.exists() else ""):
                assert not failed, failed
                time.sleep(0.005)
            with ControlClient(self.socket, seconds=30) as client:
                yield client, reports
        finally:
            if thread.is_alive():
                with suppress(HostError), ControlClient(self.socket, seconds=30) as client:  # it may be over just now
                    client.ask(Op.STOP)
            thread.join(30)
        assert reports and not self.socket.exists()

    def requests(self) -> list[dict[str, Any]]:
        return [record for record in self.studio.log() if record["event"] == "control"]


class Done(NamedTuple):
    """What the program printed."""

    stdout: bytes
    stderr: bytes


def vmgraft(*args: str | Path, code: int = 0) -> Done:
    """Run the command line in this process, which saves a second each time."""
    with CliRunner().isolation() as streams:
        with pytest.raises(SystemExit) as ended:
            run(list(map(str, args)))
        sys.stdout.flush()
        done = Done(streams[0].getvalue(), streams[1].getvalue())
    assert (ended.value.code or 0) == code, done
    return done
