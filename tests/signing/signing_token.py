"""A SoftHSM token for tests, filled by its own tool."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

MODULE = "/usr/lib/softhsm/libsofthsm2.so"
PIN = "2357"


def softhsm(*arguments: object) -> str:
    command = ["softhsm2-util", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


@dataclass(frozen=True)
class Token:
    """One token of SoftHSM, in a folder of its own."""

    label: str
    folder: Path

    def put(self, label: str, number: str, pem: bytes) -> None:
        """Import an unencrypted PKCS#8 key, both halves."""
        file = self.folder / f"{label}.p8"
        file.write_bytes(pem)
        softhsm("--import", file, "--token", self.label, "--label", label, "--id", number, "--pin", PIN)
        file.unlink()

    def uri(self, key: str, query: str = f"pin-value={PIN}", **path: str) -> str:
        attributes = {"token": self.label, "object": key} | path
        text = ";".join(f"{name}={quote(value, safe='%')}" for name, value in attributes.items())
        return f"pkcs11:{text}?module-path={MODULE}" + (f"&{query}" if query else "")


def make_token(folder: Path, label: str) -> Token:
    """Make a token; the first call decides which configuration this process's SoftHSM reads."""
    config = folder / "softhsm2.conf"
    if not config.exists():
        (folder / "tokens").mkdir()
        config.write_text(f"directories.tokendir = {folder}/tokens\nobjectstore.backend = file\nlog.level = ERROR\n")
    os.environ["SOFTHSM2_CONF"] = str(config)
    softhsm("--init-token", "--free", "--label", label, "--so-pin", "86420", "--pin", PIN)
    return Token(label, folder)
