"""The steps of the demo. Every step calls the program as a user would and shows the command and what it printed."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from vmgraft.demo.assets import example
from vmgraft.demo.images import DATA_OFFSET, make_images
from vmgraft.errors import VmgraftError
from vmgraft.words import counted

#: Exit codes the demo expects of refusals (docs/exit-codes.md).
NO_GRAFT: Final = 4
CONTENT_DIFFERS: Final = 12
#: A step that takes longer than this has hung.
STEP_TIMEOUT_S: Final = 120

Say = Callable[[str], None]


class DemoError(VmgraftError):
    """A step did not end as it must."""

    code = "internal"


@dataclass
class Journey:
    """Runs the demo in a folder.

    Args:
        folder: Empty folder for images, key and policy.
        say: Shows a line.
        cpu: ``auto``, ``kvm`` or ``soft``.
    """

    folder: Path
    say: Say
    cpu: str = "auto"
    #: What was shown to hold, for the closing summary.
    shown: list[str] = field(default_factory=list)
    #: Which CPU engines ran the guests.
    engines: set[str] = field(default_factory=set)

    def run(self) -> None:
        """Go all the way.

        Raises:
            DemoError: a step ended otherwise than it must.
        """
        images = make_images(self.folder)
        before = {image: _sha256(image) for image in images}
        self._title("1. Three bootable images, made on the spot")
        for image in images:
            self.say(f"   {image.name:12} {image.stat().st_size:>9} bytes  sha256 {before[image][:16]}…")
        self._vendor()
        for number, image in enumerate(images):
            self._one_image(image, before[image], full=number == 0)
        self._tamper(images[0])
        self._title("6. Detached: the original files are back")
        for image in images:
            self._detach(image, before[image])

    def _vendor(self) -> None:
        clock = str(example("clock"))
        self._title("2. The vendor's key, and a host's policy that trusts it")
        self._call("keygen", "vendor", "--no-passphrase")
        self._call("policy", "init", "--trust", "vendor.pub", "--grant-all-declared", clock, "-o", "policy.json")
        self._call("verify", "disk.img", "--policy", "policy.json", code=NO_GRAFT)
        self.shown.append("an image without a graft is refused")

    def _one_image(self, image: Path, before: str, *, full: bool) -> None:
        self._title(f"3. {image.name}: graft the clock, look at it, verify it, boot it")
        name = image.name
        self._call("attach", name, str(example("clock")), "--key", "vendor.key")
        if _sha256(image) == before:
            raise DemoError("attach did not change the file", file=image)
        self._call("list", name)
        self._call("inspect", name, head=60 if full else 4)
        self._call("verify", name, "--policy", "policy.json", tail=0 if full else 1)
        boot = ("run", name, "--policy", "policy.json", "--cpu", self.cpu, "--timeout", "30")
        self._title(f"4. {image.name}: what the guest prints without the extension, and with it")
        plain = self._call(*boot, "--without-extensions")
        grafted = self._call(*boot)
        self.engines.update(line.rpartition(" on ")[2] for line in grafted.splitlines() if line.startswith("ended:"))
        _expect(plain, "clock: absent", image)
        _expect(grafted, "clock: 0x", image)
        self.shown.append(f"{name}: booted, the guest found the clock only with the extension")

    def _tamper(self, image: Path) -> None:
        self._title(f"5. One byte of {image.name} changed: refused, nothing is started")
        _flip(image, DATA_OFFSET + 4711)
        self._call("verify", image.name, "--policy", "policy.json", code=CONTENT_DIFFERS)
        self._call("run", image.name, "--policy", "policy.json", "--cpu", self.cpu, code=CONTENT_DIFFERS, tail=1)
        _flip(image, DATA_OFFSET + 4711)
        self.shown.append(f"{image.name}: one changed byte, refused with exit {CONTENT_DIFFERS}")

    def _detach(self, image: Path, before: str) -> None:
        self._call("detach", image.name)
        after = _sha256(image)
        self.say(f"   sha256 before {before}\n   sha256 after  {after}")
        if after != before:
            raise DemoError("detach did not give the original back", file=image)
        self.shown.append(f"{image.name}: detached, sha256 as before")

    def _title(self, text: str) -> None:
        self.say(f"\n== {text}")

    def _environment(self) -> dict[str, str]:
        """Return the environment of every step; what a demo runs is not remembered in the user's own memory."""
        return {**os.environ, "NO_COLOR": "1", "XDG_STATE_HOME": str(self.folder.absolute() / "state")}

    def _call(self, *args: str, code: int = 0, head: int = 40, tail: int = 0) -> str:
        """Run ``vmgraft``, show the first or the last lines of what it printed, and return all of it."""
        self.say("$ vmgraft " + " ".join(_shorten(args, self.folder)))
        try:
            done = subprocess.run(
                [sys.executable, "-m", "vmgraft", *args],
                cwd=self.folder, env=self._environment(), capture_output=True, text=True,
                timeout=STEP_TIMEOUT_S, check=False, errors="replace", stdin=subprocess.DEVNULL,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise DemoError(f"vmgraft {args[0]} did not end within {STEP_TIMEOUT_S} s") from error
        lines = (done.stdout + done.stderr).splitlines()
        shown = lines[-tail:] if tail else lines[:head]
        if tail and len(lines) > tail:
            self.say(f"   … {counted(len(lines) - tail, 'line')} before")
        for line in shown:
            self.say(f"   {line}")
        if not tail and len(lines) > head:
            self.say(f"   … {counted(len(lines) - head, 'more line')}")
        if done.returncode != code:
            hint = next((line.partition("hint:")[2].strip() for line in lines if line.startswith("hint:")), None)
            raise DemoError(f"vmgraft {args[0]} ended with exit {done.returncode}, not {code}", hint=hint)
        if code:
            self.say(f"   (exit {code}, as it must)")
        return "\n".join(lines)


def _shorten(args: Sequence[str], folder: Path) -> list[str]:
    """Return the arguments as a user would type them."""
    return [Path(a).name if a.startswith("/") and not a.startswith(str(folder)) else a for a in args]


def _expect(output: str, text: str, image: Path) -> None:
    """Check that the guest said something."""
    if text not in output:
        raise DemoError(f"the guest did not print {text!r}", file=image)


def _flip(path: Path, offset: int) -> None:
    """Turn one byte of a file over."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0xFF]))


def _sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
