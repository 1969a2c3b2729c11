"""Virtio devices and read-ahead through the whole of ``vmgraft run``: signed, verified, granted, in a confined host."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from assembling import GUESTS, nasm

from vmgraft.errors import GraftFormatError
from vmgraft.imagefmt.contract import Opening
from vmgraft.signing import virtio as signed
from vmgraft.signing.manifest import manifest_from
from vmgraft.vendor.pack import load_package
from vmgraft.vmmhost.launch import Launcher
from vmgraft.vmmhost.layer import virtioshape
from vmgraft.vmmhost.plan import RunOptions

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def graft(studio):
    """Give ``graft(guest, *examples)``: an image that boots a guest, with examples that a policy grants in full."""

    def build(guest, *names):
        studio.image.write_bytes(nasm(GUESTS / f"{guest}.asm").ljust(4 << 20, b"\0"))
        studio.attach(*(load_package(EXAMPLES / name) for name in names))
        return studio

    return build


def options(studio, **changes):
    return RunOptions(
        cpu="soft", timeout=60, opening=Opening(root=studio.folder), audit_log=studio.audit_log, **changes
    )


def test_the_program_runs_a_console_with_everything_confined(graft):
    studio = graft("virtioconsole", "virtioconsole", "readahead")
    command = [
        sys.executable, "-m", "vmgraft", "run", str(studio.image), "--policy", str(studio.policy), "--cpu", "soft",
        "--audit-log", str(studio.audit_log), "--timeout", "60", "--json",
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    records = studio.log()
    assert [record["text"] for record in records if record["event"] == "log"] == ["first line", "the second"]
    assert not [record for record in records if record["event"] == "fault"]
    ends = {record["id"]: record for record in records if record["event"] == "extension-end"}
    assert ends["org.vmgraft.readahead"]["metrics"]["asked"] > 0  # and so there was a thread in the confined host
    (boot,) = [record for record in records if record["event"] == "boot"]
    assert "seccomp" in boot["host"]


def test_a_recorded_run_comes_out_the_same(graft, tmp_path):
    studio = graft("virtiorng", "virtiorng")
    tape = tmp_path / "tape"
    live = Launcher(studio.image, studio.policy, options(studio, record=tape)).run()
    studio.audit_log.unlink()
    again = Launcher(studio.image, studio.policy, options(studio, replay=tape)).run()
    assert len(live.result.serial) == 49
    assert again.result.serial == live.result.serial
    assert again.result.virtual_ns == live.result.virtual_ns


DEVICE = {"device": 4, "mmio": "0xd0000", "irq": 5, "queues": [64]}
CLAIMS = ["mmio:0xd0000+0x1000", "irq:5", "guest:0x10000+0x1000:rw"]


def manifest(virtio=None, claims=CLAIMS, **fields):
    return {
        "id": "org.example.test", "version": "1", "securityVersion": 1, "abi": "vmgraft/1", "module": "module.wasm",
        "capabilities": claims, "virtio": {**DEVICE, **(virtio or {})}, **fields,
    }  # fmt: skip


def test_a_manifest_with_a_device():
    assert manifest_from(manifest()).document["virtio"] == DEVICE
    assert manifest_from(manifest({"features": [0, 23], "queues": [1] * 8}))


@pytest.mark.parametrize(
    ("virtio", "claims", "words"),
    [
        ({"mmio": "0xd0e04"}, CLAIMS, "not inside a declared range"),
        ({"mmio": "0xd0002"}, CLAIMS, "not inside a declared range"),
        ({"mmio": "0xffffffffffffffff"}, CLAIMS, "not inside a declared range"),
        ({}, CLAIMS[1:], "not inside a declared range"),
        ({"irq": 6}, CLAIMS, "line is not declared"),
        ({}, [*CLAIMS[:2], "guest:0x10000+0x1000:r"], "no writable window"),
        ({"device": 0}, CLAIMS, ""),
        ({"queues": []}, CLAIMS, ""),
        ({"queues": [3]}, CLAIMS, ""),
        ({"queues": [512]}, CLAIMS, ""),
        ({"queues": [8] * 9}, CLAIMS, ""),
        ({"features": [24]}, CLAIMS, ""),
        ({"mmio": 0xD0000}, CLAIMS, ""),
        ({"more": 1}, CLAIMS, ""),
    ],
)
def test_a_manifest_whose_device_makes_no_sense(virtio, claims, words):
    with pytest.raises(GraftFormatError) as caught:
        manifest_from(manifest(virtio, claims))
    assert words in caught.value.message
    assert caught.value.field.startswith("virtio")


def test_signer_and_host_mean_the_same_registers():
    assert signed.REGISTER_BYTES == virtioshape.BLOCK_BYTES


def test_a_device_needs_a_module():
    document = manifest()
    del document["module"]
    with pytest.raises(GraftFormatError, match="needs a module"):
        manifest_from(document)


def test_a_module_that_is_no_device_is_refused(studio):
    studio.graft(studio.wat(""), virtio=DEVICE, capabilities=CLAIMS)
    with pytest.raises(GraftFormatError, match="no on_virtio_queue"):
        Launcher(studio.image, studio.policy, options(studio)).run()
    events = [json.loads(line)["event"] for line in studio.audit_log.read_text().splitlines()]
    assert events[-3:] == ["extension-refused", "extension-end", "error"]
