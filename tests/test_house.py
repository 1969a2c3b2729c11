"""The house itself: names, sizes, start-up, documents."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted((ROOT / "vmgraft").rglob("*.py"))


def test_no_root_folder_shadows_the_standard_library() -> None:
    names = {path.name for path in ROOT.iterdir() if path.is_dir()} | {path.stem for path in ROOT.glob("*.py")}
    assert "vmgraft" in names
    assert not names & set(sys.stdlib_module_names)


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_stay_small(module: Path) -> None:
    assert len(module.read_text().splitlines()) <= 400


def test_help_imports_no_room() -> None:
    code = (
        "import sys, json\n"
        "from vmgraft.cli.app import cli\n"
        "try: cli.main(['--help'], standalone_mode=False)\n"
        "finally: print('\\n' + json.dumps(sorted(m for m in sys.modules if m.split('.')[0] in "
        "('numpy', 'rich', 'jsonschema', 'cryptography', 'construct', 'wasmtime', 'pycdlib', 'unicorn'))))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == []
    assert "attach" in done.stdout


def test_every_error_code_has_an_exit_code_and_a_line_in_the_docs() -> None:
    import vmgraft.errors as errors
    from vmgraft.cli.exitcodes import EXIT_CODES

    codes = {c.code for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.VmgraftError)}
    assert codes <= set(EXIT_CODES)
    table = (ROOT / "docs" / "exit-codes.md").read_text()
    for code, number in EXIT_CODES.items():
        assert any(line.startswith(f"| {number} |") and f"`{code}`" in line for line in table.splitlines()), code


def test_the_manual_in_the_package_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import textwrap

    import vmgraft

    code = vmgraft.__doc__.split(".. code-block:: python\n")[1].split("\n``Launcher")[0]
    disk = tmp_path / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(disk), "4M"], check=True)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    before = disk.read_bytes()
    monkeypatch.chdir(tmp_path)
    exec(compile(textwrap.dedent(code), "manual", "exec"), {})  # noqa: S102 - our own manual
    assert disk.read_bytes() == before
    assert (tmp_path / "policy.json").exists()


def test_public_names_exist_and_are_imported_on_use() -> None:
    import vmgraft

    assert vmgraft.__all__ == sorted(vmgraft._PUBLIC)
    for name in vmgraft.__all__:
        assert getattr(vmgraft, name).__name__ == name
    with pytest.raises(AttributeError):
        vmgraft.nothing  # noqa: B018 - the access is the test
