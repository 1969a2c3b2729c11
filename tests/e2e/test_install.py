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


def test_the_wheel_brings_both_programs(wheel: Path, tmp_path: Path) -> None:
    """The hook is started by libvirt under the name of another file: what counts is that it is installed at all."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "unpacked")
    (declared,) = (tmp_path / "unpacked").glob("*.dist-info/entry_points.txt")
    lines = declared.read_text().splitlines()
    scripts = dict(line.split(" = ") for line in lines if " = " in line)
    assert scripts.keys() == {"vmgraft", "vmgraft-libvirt-hook"}
    paths = [str(tmp_path / "unpacked"), *sys.path]
    for target, said in (("vmgraft", ""), ("vmgraft-libvirt-hook", "to be run by libvirt")):
        module, function = scripts[target].split(":")
        code = f"import sys; from {module} import {function}; sys.argv[1:] = []; sys.exit({function}())"
        done = subprocess.run(
            [sys.executable, "-S", "-c", f"import sys; sys.path[:0] = {paths!r}; {code}"],
            capture_output=True, text=True, check=False, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode in (0, 2), done.stderr
        assert said in done.stderr
        assert "Traceback" not in done.stderr


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
