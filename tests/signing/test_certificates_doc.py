"""docs/certificates.md: its commands run, and its numbers are those of the code."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from vmgraft.signing import material, paths
from vmgraft.signing._token import MAX_ACCURACY
from vmgraft.signing.devca import DEFAULT_DAYS
from vmgraft.signing.revocation import SOON

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "certificates.md").read_text()


def test_the_walk_works(tmp_path: Path) -> None:
    (script,) = re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "disk.qcow2", "1M"], cwd=tmp_path, check=True)
    shutil.copytree(ROOT / "examples" / "clock", tmp_path / "clock")
    program = f'set -eu\nvmgraft() {{ "{sys.executable}" -m vmgraft "$@"; }}\n{script}'
    done = subprocess.run(["sh", "-c", program], cwd=tmp_path, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "development CA: anybody may hold its keys" in done.stdout + done.stderr
    assert "trusted  disk.qcow2" in done.stdout


def test_the_numbers() -> None:
    assert (
        f"At most {material.MAX_CERTIFICATES} certificates of {material.MAX_CERTIFICATE >> 10} KiB and "
        f"{material.MAX_TIMESTAMPS} timestamps of {material.MAX_TIMESTAMP >> 10} KiB." in TEXT
    )
    assert f"at most {paths.MAX_DEPTH} of them" in TEXT and f"RSA of {paths.MIN_RSA_BITS} bits" in TEXT
    assert f"within {SOON.days} days" in TEXT and f"`--days` ({DEFAULT_DAYS})" in TEXT
    assert MAX_ACCURACY.total_seconds() == 3600 and "an hour at most" in TEXT
    assert material.KIND in TEXT
