"""Every parser under a coverage-guided fuzzer for some seconds, and proof that the fuzzer would find something."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import fuzz_sparse
import pytest
from fuzz_targets import all_targets

from vmgraft.imagefmt.registry import format_names

SCRIPT = Path(__file__).with_name("fuzz.py")
#: Seconds a target; `make fuzz SECONDS=600` takes longer.
SECONDS = 2


def fuzz(target: str | Path, folder: Path, *more: object, seconds: int = SECONDS) -> tuple[int, str]:
    """Run the script; return its exit code and what it printed."""
    command = [
        sys.executable,
        SCRIPT,
        target,
        "--seconds",
        seconds,
        "--corpus",
        folder / "c",
        "--findings",
        folder / "f",
        *more,
    ]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=200, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("name", all_targets())
def test_nothing_is_found(name: str, tmp_path: Path) -> None:
    code, said = fuzz(name, tmp_path)
    assert code == 0, said
    assert int(re.search(r"(\d+) inputs  ok", said)[1]) >= 10


def test_every_format_is_fuzzed() -> None:
    assert set(format_names()) <= set(all_targets())


def test_every_target_has_seeds() -> None:
    for name, target in all_targets().items():
        names = [seed for seed, _ in target.seeds()]
        assert len(names) >= 2, name
        assert len(set(names)) == len(names), name


PLANTED = {
    # Each byte is found by the coverage that the one before it brought.
    "an exception": (
        "if data[:1] == b'V':\n  if data[1:2] == b'M':\n   if data[2:3] == b'G':\n    raise IndexError(data)",
        "IndexError",
    ),
    "time": ("if data[:1] == b'V':\n  end = time.process_time() + 3\n  while time.process_time() < end: pass", "3.0"),
    "memory": ("if data[:1] == b'V':\n  len(b'x' * (700 << 20))", "MiB"),
}


@pytest.mark.parametrize("kind", PLANTED)
def test_what_is_planted_is_found(kind: str, tmp_path: Path) -> None:
    """A parser with a mistake: an exception behind three bytes, too long, or too much."""
    mistake, sign = PLANTED[kind]
    target = tmp_path / "planted.py"
    target.write_text(f"import time\n\ndef run(data):\n {mistake}\n")
    code, said = fuzz(target, tmp_path, seconds=30)
    assert code == 1, said
    assert sign in said
    (command,) = re.findall(r"reproduce: python (.*)", said)
    again = subprocess.run([sys.executable, *command.split()], capture_output=True, text=True, timeout=60, check=False)
    assert again.returncode == 1


@pytest.mark.parametrize("size", [0, 1, 31, 100, 70_000])
def test_files_and_inputs_are_the_same(size: int, tmp_path: Path) -> None:
    path = tmp_path / "file"
    content = (bytes(range(256)) * 300)[:size] + bytes(40) + b"end"
    for at in (0, 5, 1 << 20, (5 << 31) + 7):
        packed = fuzz_sparse.pack(content, at=at, size=at + len(content) + 9)
        fuzz_sparse.write(packed, path)
        assert path.stat().st_size == at + len(content) + 9
        with path.open("rb") as file:
            file.seek(at)
            assert file.read() == content + bytes(9)
        assert len(packed) < len(content) + 200
