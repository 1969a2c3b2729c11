"""sigstore-js, the outside maker and judge of bundles: installed once per set of versions, kept in the user's cache."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

NPM = Path(__file__).parent / "npm"


def install() -> Path:
    """Return a folder with sigstore-js and our scripts."""
    for program in ("npm", "node"):
        assert shutil.which(program), f"{program} is missing: apt-get install npm nodejs"
    lock = (NPM / "package-lock.json").read_bytes()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vmgraft-tests"
    folder = cache / f"sigstore-{hashlib.sha256(lock).hexdigest()[:16]}"
    if not (folder / "installed").exists():
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("package.json", "package-lock.json"):
            shutil.copy(NPM / name, folder)
        command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=240)
        (folder / "installed").touch()
    for script in NPM.glob("*.mjs"):
        shutil.copy(script, folder)
    return folder
