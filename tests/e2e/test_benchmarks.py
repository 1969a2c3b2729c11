"""Every benchmark runs in its small setting and reports what it measured; how fast it was is no test's business."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("[!_]*.py"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_it_runs(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, FOLDER / f"{name}.py", "--small", "--json", "--folder", tmp_path],
        check=False, capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["benchmark"] == name
    assert document["results"]
    for result in document["results"]:
        if "rows" in result:
            assert len(result["rows"]) >= 2
            assert all(row["seconds"] > 0 for row in result["rows"])
        else:
            assert result["value"] > 0
    assert list(tmp_path.iterdir()) == []


def test_each_is_described() -> None:
    described = (FOLDER / "README.md").read_text()
    assert all(f"benchmarks/{name}.py" in described for name in SCRIPTS)
