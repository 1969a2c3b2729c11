"""``keygen`` and ``key show``, and passphrases as users give them: typed, in a file, by descriptor, by environment."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = str(Path(sys.executable).with_name("vmgraft"))
PLAIN = {name: value for name, value in os.environ.items() if name != "VMGRAFT_PASSPHRASE"}


def call(*args: object, code: int = 0, **kwargs: object) -> subprocess.CompletedProcess[str]:
    options = {"env": PLAIN, "stdin": subprocess.DEVNULL} | kwargs
    done = subprocess.run([PROGRAM, *map(str, args)], capture_output=True, text=True, check=False, **options)
    assert "Traceback" not in done.stderr
    assert done.returncode == code, done.stdout + done.stderr
    return done


def type_at(args: list[object], answers: list[str]) -> tuple[int, str]:
    """Run the program on a terminal and answer each question with a line; return its exit code and the screen."""
    child, terminal = pty.fork()
    if child == 0:
        os.execve(PROGRAM, [PROGRAM, *map(str, args)], PLAIN)  # noqa: S606 - no shell is needed
    screen, seen, waiting, limit = b"", 0, list(answers), time.monotonic() + 30
    while time.monotonic() < limit:
        if not select.select([terminal], [], [], 1)[0]:
            continue
        try:
            chunk = os.read(terminal, 4096)
        except OSError:  # the program has ended
            break
        screen += chunk
        if waiting and screen[seen:].rstrip(b" ").endswith(b":"):
            seen = len(screen)
            time.sleep(0.1)  # until the echo is off: what comes before is thrown away
            os.write(terminal, waiting.pop(0).encode() + b"\n")
    else:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(terminal)
    return os.waitstatus_to_exitcode(status), screen.decode()


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    (tmp_path / "pass").write_text("correct horse\n")
    call("keygen", tmp_path / "acme", "--passphrase-file", tmp_path / "pass")
    return tmp_path / "acme.key"


def test_typed_passphrases(tmp_path: Path) -> None:
    code, screen = type_at(["keygen", tmp_path / "acme"], ["correct horse", "correct horse"])
    assert code == 0 and "private key" in screen and "correct horse" not in screen
    code, screen = type_at(["key", "show", tmp_path / "acme.key"], ["correct horse"])
    assert code == 0 and "(encrypted)" in screen and "SHA256:" in screen and "correct horse" not in screen
    code, screen = type_at(["key", "show", tmp_path / "acme.key"], ["battery staple"])
    assert code == 2 and "does not open this key" in screen


def test_a_new_passphrase_is_typed_twice_alike(tmp_path: Path) -> None:
    code, screen = type_at(["keygen", tmp_path / "acme"], ["one", "another", "third", "third"])
    assert code == 0 and "match" in screen
    code, _ = type_at(["key", "show", tmp_path / "acme.key"], ["third"])
    assert code == 0


def test_file_descriptor_environment(sealed: Path, tmp_path: Path) -> None:
    call("key", "show", sealed, "--passphrase-file", tmp_path / "pass")
    with (tmp_path / "pass").open() as file:
        number = file.fileno()
        call("key", "show", sealed, "--passphrase-fd", number, pass_fds=(number,))
    call("key", "show", sealed, env=PLAIN | {"VMGRAFT_PASSPHRASE": "correct horse"})
    wrong = call("key", "show", sealed, env=PLAIN | {"VMGRAFT_PASSPHRASE": "Correct horse"}, code=2)
    assert "does not open" in wrong.stderr
    missing = call("key", "show", sealed, code=2)
    assert "VMGRAFT_PASSPHRASE" in missing.stderr


def test_a_passphrase_for_a_key_that_needs_none(tmp_path: Path) -> None:
    """It is not looked at: several keys may share the options, and some of them need one."""
    call("keygen", tmp_path / "plain", "--no-passphrase")
    shown = call("key", "show", tmp_path / "plain.key", "--passphrase-file", tmp_path / "nowhere")
    assert "not encrypted" in shown.stdout
    assert "whoever reads it can sign" in shown.stderr


@pytest.mark.parametrize("kind", ["p384", "rsa4096"])
def test_more_kinds(tmp_path: Path, kind: str) -> None:
    made = call("keygen", tmp_path / "acme", "--type", kind, "--no-passphrase", "--json")
    keyid = json.loads(made.stdout)["keyid"]
    (shown,) = json.loads(call("key", "show", tmp_path / "acme.pub", "--json").stdout)["keys"]
    assert shown["keyid"] == keyid and shown["bits"] == int(kind.lstrip("prsa"))
    assert ("P-384" in made.stderr) is (kind == "p384")


def test_several_at_once_and_one_object_on_failure(tmp_path: Path) -> None:
    call("keygen", tmp_path / "a", "--no-passphrase")
    call("keygen", tmp_path / "b", "--no-passphrase", "--type", "ed25519")
    document = json.loads(call("key", "show", tmp_path / "a.pub", tmp_path / "b.key", "--json").stdout)
    assert [item["what"] for item in document["keys"]] == ["public key", "private key"]
    error = json.loads(call("key", "show", tmp_path / "a.pub", "nowhere.pub", "--json", code=3).stdout)
    assert error["error"]["code"] == "file" and "keys" not in error
    uri = "pkcs11:token=x;object=y?module-path=/nowhere.so&pin-value=2357"
    refused = call("key", "show", uri, code=3)
    assert "no such PKCS#11 library" in refused.stderr and "2357" not in refused.stderr
