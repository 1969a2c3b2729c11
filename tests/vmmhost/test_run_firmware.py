"""``vmgraft run --firmware seabios`` as a program: what is planned, refused and logged."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from vmgraft.cli.console import Outputs
from vmgraft.errors import VmgraftError
from vmgraft.schemas import validate

BIOS = Path("/usr/share/seabios/bios-256k.bin")
#: Sends "ok", then powers off: mov dx,3f8 / mov al,'o' / out / mov al,'k' / out / mov dx,604 / mov ax,2000 / out / hlt.
GUEST = bytes.fromhex("baf803b06feeb06beeba0406b80020eff4")


@pytest.fixture
def run(studio):
    """Give ``run(*options)``: exit code, report and serial output of the program, which boots a guest under SeaBIOS."""

    def call(*options, **fields):
        studio.boot_code(GUEST)
        studio.graft(studio.wat(studio.ONES), **fields)
        command = [
            sys.executable, "-m", "vmgraft", "run", str(studio.image), "--policy", str(studio.policy), "--cpu", "soft",
            "--firmware", "seabios", "--timeout", "60", "--json", *options,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.returncode, json.loads(done.stdout)

    return call


FREE = {"capabilities": ["log", "pio:0x520-0x527"]}


def test_the_plan_and_the_log_name_the_firmware(run, studio, tmp_path):
    serial = tmp_path / "serial"
    code, report = run("--audit-log", str(studio.audit_log), "--serial", str(serial), **FREE)
    assert code == 0, report
    assert serial.read_bytes() == b"ok"
    plan = next(record for record in studio.log() if record["event"] == "plan")
    text = json.dumps(plan)
    assert hashlib.sha256(BIOS.read_bytes()).hexdigest() in text
    assert '"firmware": "seabios"' in text


def test_claims_are_tried_against_its_ports(run):
    for option in ("--dry-run", "--quiet"):
        code, report = run(option)  # the default claims 0x510, which is fw_cfg
        assert (code, report["error"]["code"]) == (17, "capability-denied")
        assert "core holds 0x510-0x51b" in report["error"]["message"]


def test_a_firmware_file_of_ones_own(run, tmp_path):
    own = tmp_path / "bios.bin"
    own.write_bytes(BIOS.read_bytes())
    assert run("--bios", str(own), **FREE)[0] == 0
    own.write_bytes(b"short")
    code, report = run("--bios", str(own), **FREE)
    assert (code, report["error"]["file"]) == (20, str(own))


def test_a_firmware_file_goes_with_seabios_only(run):
    code, report = run("--firmware", "trap", "--bios", str(BIOS), **FREE)
    assert (code, report["error"]["code"]) == (2, "usage")


def test_what_the_firmware_says_can_be_seen(run, tmp_path):
    debug = tmp_path / "debug"
    code, report = run("--debug", str(debug), **FREE)
    assert code == 0, report
    assert b"Booting from Hard Disk" in debug.read_bytes()
    assert "Booting from Hard Disk" in report["end"]["debug"]
    assert len(report["end"]["debug"]) <= 65536
    validate("report", report, file=None, error=VmgraftError)
    code, report = run("--debug", str(debug), **FREE)
    assert report["error"]["message"] == "the file exists already"


def test_another_engine_keeps_no_debug_output(run, tmp_path):
    code, report = run("--engine", "qemu", "--debug", str(tmp_path / "debug"), **FREE)
    assert (code, report["error"]["code"]) == (2, "usage")
    assert not (tmp_path / "debug").exists()


@pytest.mark.parametrize(("as_json", "shown"), [(False, b"a\x1b\n"), (True, b"")])
def test_debug_output_on_stdout_leaves_the_json_object_alone(capfdbinary, as_json, shown):
    with Outputs(screen=None, serial=None, debug=Path("-"), as_json=as_json) as outputs:
        outputs.write_debug(b"a\x1b\n")
    sys.stdout.flush()
    assert capfdbinary.readouterr().out == shown
