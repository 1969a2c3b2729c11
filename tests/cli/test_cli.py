"""The command line: help, JSON on success and failure, errors without tracebacks, colours, completion."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from vmgraft.cli.app import COMMANDS, cli
from vmgraft.cli.console import visible
from vmgraft.cli.output import human_size, printable

PROGRAM = str(Path(sys.executable).with_name("vmgraft"))


def call(*args: str, env: dict[str, str] | None = None, **kwargs: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [PROGRAM, *args], capture_output=True, text=True, check=False, env={**os.environ, **(env or {})}, **kwargs
    )
    assert "Traceback" not in done.stderr
    return done


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str) -> None:
    result = CliRunner().invoke(cli, [command, "--help"])
    assert result.exit_code == 0
    assert f"Example: vmgraft {command}" in " ".join(result.output.split())


def test_the_overview_names_the_commands_as_they_name_themselves() -> None:
    overview = CliRunner().invoke(cli, ["--help"]).output
    for name in COMMANDS:
        assert f"  {name} " in overview


def test_mistyped_commands_get_a_suggestion() -> None:
    done = call("verfy", "x")
    assert done.returncode == 2
    assert "Did you mean 'verify'?" in done.stderr


@pytest.mark.parametrize(
    ("args", "code", "name"),
    [
        (["inspect", "nowhere.img"], 3, "file"),
        (["verify", "nowhere.img", "--policy", "p.json"], 18, "policy-invalid"),
        (["inspect"], 2, "usage"),
        (["attach", "x", "--key", "k"], 2, "usage"),
        (["new", "/proc/self/nope"], 3, "file"),
        (["check-log", "nowhere"], 3, "file"),
    ],
)
def test_failures_are_one_json_object(tmp_path: Path, args: list[str], code: int, name: str) -> None:
    done = call(*args, "--json", cwd=tmp_path)
    document = json.loads(done.stdout)
    assert (done.returncode, document["exitCode"], document["ok"]) == (code, code, False)
    assert document["error"]["code"] == name
    assert document["error"]["message"]


def test_errors_for_people_have_a_hint_and_no_stdout(tmp_path: Path) -> None:
    (tmp_path / "plain.img").write_bytes(b"x" * 1000)
    done = call("list", "plain.img", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr.splitlines()[0].startswith("error: ")
    assert done.stderr.splitlines()[1].startswith("hint: ")


def test_colours_respect_no_color(tmp_path: Path) -> None:
    assert "\x1b[" in call("--color", "always", "list", "nowhere").stderr
    assert "\x1b[" not in call("list", "nowhere", env={"NO_COLOR": "1"}).stderr
    assert "\x1b[" not in call("--color", "never", "list", "nowhere").stderr


def test_shell_completion_script() -> None:
    done = call(env={"_VMGRAFT_COMPLETE": "bash_source"})
    assert done.returncode == 0
    assert "_vmgraft_completion" in done.stdout


def test_examples_can_be_copied_from_a_narrow_terminal() -> None:
    lines = call("policy", "init", "--help", env={"COLUMNS": "60"}).stdout.splitlines()
    example = "vmgraft policy init --trust acme.pub --grant-all-declared ./clock -o policy.json"
    assert f"  Example: {example}" in lines


def test_keys_are_never_overwritten_and_private(tmp_path: Path) -> None:
    assert call("keygen", "k", "--no-passphrase", cwd=tmp_path).returncode == 0
    assert (tmp_path / "k.key").stat().st_mode & 0o777 == 0o600
    before = (tmp_path / "k.key").read_bytes()
    assert call("keygen", "k", "--no-passphrase", cwd=tmp_path).returncode == 3
    assert (tmp_path / "k.key").read_bytes() == before


def test_keys_are_encrypted_unless_asked_otherwise(tmp_path: Path) -> None:
    done = call("keygen", "k", cwd=tmp_path, stdin=subprocess.DEVNULL)
    assert done.returncode == 2
    assert "--no-passphrase" in done.stderr
    (tmp_path / "pw").write_text("correct horse\n")
    assert call("keygen", "k", "--passphrase-file", "pw", cwd=tmp_path).returncode == 0
    assert b"ENCRYPTED PRIVATE KEY" in (tmp_path / "k.key").read_bytes()
    (tmp_path / "disk.img").write_bytes(b"x" * 1000)
    clock = str(Path(__file__).resolve().parents[2] / "examples" / "clock")
    wrong = call("attach", "disk.img", clock, "--key", "k.key", cwd=tmp_path, env={"VMGRAFT_PASSPHRASE": "wrong"})
    assert wrong.returncode == 2
    assert (tmp_path / "disk.img").read_bytes() == b"x" * 1000
    right = call("attach", "disk.img", clock, "--key", "k.key", "--passphrase-file", "pw", cwd=tmp_path)
    assert right.returncode == 0


def test_what_files_and_guests_say_cannot_drive_a_terminal() -> None:
    assert printable("a\x1b[2Jb\u202ec") == "a\\x1b[2Jb\\u202ec"
    assert visible(b"ok\r\n\x1b]0;x\x07") == "ok\r\n\\x1b]0;x\\x07"


def test_sizes() -> None:
    assert [human_size(n) for n in (0, 512, 1536, 1 << 20, 5 << 40)] == ["0 B", "512 B", "1.5 KiB", "1 MiB", "5 TiB"]


def test_a_bug_is_reported_as_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from vmgraft.cli import app

    monkeypatch.setitem(app.COMMANDS, "list", ("no_such_module", "x", "y"))
    with pytest.raises(SystemExit) as ended:
        app.run(["list", "x", "--json"])
    document = json.loads(capsys.readouterr().out)
    assert (ended.value.code, document["exitCode"], document["error"]["code"]) == (1, 1, "internal")
    assert "bug" in document["error"]["hint"]


def test_image_formats_offered_are_those_registered() -> None:
    from vmgraft.imagefmt.registry import format_names

    offered = CliRunner().invoke(cli, ["verify", "x", "--policy", "y", "--image-format", "nothing"]).output
    assert all(f"'{name}'" in offered for name in format_names())
