"""The wheel: built, looked into, installed in a clean environment, and its demo run there."""

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.whl")
    return path


def test_the_wheel_carries_its_data(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        "vmgraft/py.typed",
        "vmgraft/data/examples/clock/module.wasm",
        "vmgraft/data/examples/clock/manifest.toml",
        "vmgraft/data/examples/guest/guest.bin",
        "vmgraft/vmmhost/data/trapbios.bin",
        "vmgraft/schemas/policy.schema.json",
        "vmgraft/vendor/template/extension.c",
    }
    assert wanted <= names
    assert not [name for name in names if name.split("/")[0] in ("tests", "docs", "benchmarks")]


@pytest.mark.slow
def test_the_installed_wheel_runs_its_demo(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", f"{wheel}[all]"]
    subprocess.run(pip, check=True)
    program = str(tmp_path / "venv" / "bin" / "vmgraft")
    done = subprocess.run([program, "demo", "--cpu", "soft"], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    shown = done.stdout.split("== Shown")[1]
    assert shown.count("ok ") == 8
    assert "guests ran on soft" in shown
