"""Fetches QEMU's own sample images, which tests/e2e/test_samples.py opens, from Debian's source package of QEMU.

    python tests/e2e/fetch_qemu_samples.py      prints the folder that holds them

Apt checks the signatures. It works on lists and a cache of its own, so neither root nor a ``deb-src`` line is needed.
The samples are kept in the user's cache folder: only the first call needs the network.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

#: The release whose qemu-img the tests judge by, and where its sources and keys are.
SOURCES = """\
Types: deb-src
URIs: http://deb.debian.org/debian
Suites: bookworm
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
"""
INSIDE = "tests/qemu-iotests/sample_images/"
#: No sample is longer than this when packed (bytes).
MAX_PACKED = 1 << 20


def cache_folder() -> Path:
    """Return where the samples are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "vmgraft-tests"


def samples_folder() -> Path:
    """Return the folder with the samples, as ``*.bz2``; fetch them if they are not there yet.

    Raises:
        RuntimeError: they cannot be fetched; the message says why.
    """
    cache = cache_folder()
    samples = cache / "qemu-samples-bookworm"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not samples.is_dir():
            with tempfile.TemporaryDirectory(dir=cache) as work:
                _unpack(_download(Path(work)), Path(work) / "samples")
                (Path(work) / "samples").rename(samples)
    return samples


def _download(work: Path) -> Path:
    """Return the upstream tarball of Debian's QEMU, checked by apt."""
    if shutil.which("apt-get") is None:
        raise RuntimeError("there is no apt-get: the samples come from Debian's source package of QEMU")
    (work / "only.sources").write_text(SOURCES)
    for folder in ("lists/partial", "cache/archives/partial", "none"):
        (work / folder).mkdir(parents=True)
    settings = {
        "Dir::Etc::SourceList": work / "only.sources",
        "Dir::Etc::SourceParts": work / "none",
        "Dir::State::Lists": work / "lists",
        "Dir::Cache": work / "cache",
        "APT::Sandbox::User": "root",  # the folder is ours; another user could not write into it
        "Acquire::Retries": "3",
        "APT::Update::Error-Mode": "any",  # no network is an error, not a warning
    }
    options = [part for key, value in settings.items() for part in ("-o", f"{key}={value}")]
    for command in (["update"], ["source", "--download-only", "--only-source", "qemu"]):
        done = subprocess.run(
            ["apt-get", "-q", *options, *command], check=False, capture_output=True, text=True, cwd=work, timeout=600
        )
        if done.returncode:
            raise RuntimeError(f"apt-get {command[0]} failed:\n{done.stdout}{done.stderr}")
    found = list(work.glob("qemu_*.orig.tar.xz"))
    if len(found) != 1:
        raise RuntimeError("apt-get source left no tarball of QEMU")
    return found[0]


def _unpack(tarball: Path, target: Path) -> None:
    """Write the packed samples, and nothing else of the tarball."""
    target.mkdir()
    with tarfile.open(tarball, "r:xz") as archive:
        for member in archive:
            name = member.name.partition("/")[2]
            if not name.startswith(INSIDE) or not name.endswith(".bz2") or not member.isfile():
                continue
            stream = archive.extractfile(member)
            if stream is None or member.size > MAX_PACKED:
                raise RuntimeError(f"{member.name} is not the small file it should be")
            (target / Path(name).name).write_bytes(stream.read())
    if not any(target.iterdir()):
        raise RuntimeError(f"{tarball.name} holds no sample images")


if __name__ == "__main__":
    try:
        print(samples_folder())
    except (RuntimeError, OSError, subprocess.TimeoutExpired) as problem:
        sys.exit(f"QEMU's sample images could not be fetched: {problem}")
