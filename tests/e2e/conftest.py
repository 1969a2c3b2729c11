"""Runs the installed program, as a user would."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(sys.executable).with_name("vmgraft")
CLOCK = ROOT / "examples" / "clock"
ENTROPY = ROOT / "examples" / "entropy"
GUEST = ROOT / "examples" / "guest" / "guest.bin"


class Cli:
    """Calls ``vmgraft`` and checks its exit code; a traceback is always a failure."""

    def __init__(self, cwd: Path) -> None:
        self.cwd = cwd
        self.env = {**os.environ, "NO_COLOR": "1"}

    def __call__(self, *args: str | Path, code: int = 0, timeout: float = 120, **kwargs: Any) -> str:
        done = subprocess.run(
            [str(PROGRAM), *map(str, args)],
            check=False, capture_output=True, text=True, cwd=self.cwd, env=self.env, timeout=timeout, **kwargs,
        )  # fmt: skip
        assert "Traceback" not in done.stderr, done.stderr
        assert done.returncode == code, f"exit {done.returncode}, wanted {code}\n{done.stdout}\n{done.stderr}"
        self.stderr = done.stderr
        return done.stdout

    def json(self, *args: str | Path, code: int = 0, timeout: float = 120) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self(*args, "--json", code=code, timeout=timeout))
        assert document["exitCode"] == code
        assert document["ok"] is (code == 0)
        return document


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    return Cli(tmp_path)


@pytest.fixture
def vendor(cli: Cli, tmp_path: Path) -> Path:
    """A vendor's key and a policy that trusts it and grants what the two examples declare."""
    cli("keygen", tmp_path / "acme", "--no-passphrase")
    cli(
        "policy", "init", "--trust", tmp_path / "acme.pub",
        "--grant-all-declared", CLOCK, "--grant-all-declared", ENTROPY, "-o", tmp_path / "policy.json",
    )  # fmt: skip
    return tmp_path


@pytest.fixture
def sha256() -> Callable[[Path], str]:
    """The SHA-256 of a file."""

    def digest(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    return digest


@pytest.fixture
def clock() -> Path:
    return CLOCK


@pytest.fixture
def entropy() -> Path:
    return ENTROPY


@pytest.fixture
def guest() -> Path:
    return GUEST


@pytest.fixture(scope="session")
def kvm() -> None:
    """Skips where /dev/kvm does not work; any other engine trouble is a failure."""
    done = subprocess.run([str(PROGRAM), "doctor", "--json"], capture_output=True, text=True, check=False)
    (engine,) = (item for item in json.loads(done.stdout)["engines"] if item["name"] == "kvm")
    if not engine["usable"]:
        pytest.skip(f"no working /dev/kvm: {engine['reason']}")


@pytest.fixture
def tool() -> Callable[..., str]:
    """Runs an outside program and returns what it printed."""

    def run(*args: str | Path, code: int | None = 0) -> str:
        done = subprocess.run([str(a) for a in args], check=False, capture_output=True, text=True, timeout=300)
        assert code is None or done.returncode == code, f"{args}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    return run
