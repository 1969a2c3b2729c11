"""What ``doctor`` finds: packages are imported, not looked up; programs are named with their path."""

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from vmgraft.cli.commands.doctor import doctor
from vmgraft.vmmhost import doctor as host
from vmgraft.vmmhost.core import seabios


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither measure engines nor start a worker."""
    monkeypatch.setattr(host, "detect", list)
    nothing = {"works": False, "level": None, "mechanisms": [], "reason": "not tried"}
    monkeypatch.setattr(host, "_sandbox", lambda: nothing)


@pytest.mark.parametrize(
    ("body", "said"),
    [("import missing_thing\n", "ModuleNotFoundError"), ("raise OSError('no library')\n", "OSError: no library")],
)
def test_a_broken_package_is_not_ok(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], body: str, said: str
) -> None:
    (tmp_path / "pycdlib.py").write_text(body)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "pycdlib", raising=False)
    found = host.examine()
    assert found["packages"]["pycdlib"] is None
    assert said in found["broken"]["pycdlib"]
    assert found["packages"]["click"]
    assert list(found["broken"]) == ["pycdlib"]
    doctor.callback(as_json=False)  # type: ignore[misc]
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "pycdlib" in line]
    assert line.startswith("--")
    assert f"broken: {said}" in line


def test_programs_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "qemu-system-x86_64"
    program.write_text("")
    program.chmod(0o755)
    bios = tmp_path / "bios-256k.bin"
    bios.write_bytes(bytes(seabios.FLASH_SIZE - 16) + b"\xea" + bytes(15))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(seabios, "BIOS_PATHS", (str(bios),))
    assert host.examine()["programs"] == {"qemu-system-x86_64": str(program), "seabios": str(bios)}
    bios.write_bytes(b"short")
    program.unlink()
    shown = CliRunner().invoke(doctor, ["--json"], standalone_mode=False)
    assert json.loads(shown.output)["programs"] == {"qemu-system-x86_64": None, "seabios": None}
    shown = CliRunner().invoke(doctor, [], standalone_mode=False)
    assert "--  qemu-system-x86_64    not installed" in shown.output
    assert "--  seabios               not installed" in shown.output
