"""Plain helpers for the tests of imagefmt."""

import os
import shutil
import signal
import struct
import subprocess
from hashlib import sha256
from pathlib import Path

from vmgraft.imagefmt.commit import Operation, observing
from vmgraft.imagefmt.graft import attach_sections, open_graft, open_image
from vmgraft.imagefmt.record import Section, SectionKind

SECTOR = 2048
GRUB_ISO = Path("/usr/lib/grub-rescue/grub-rescue-cdrom.iso")
MEMTEST_ISO = Path("/usr/lib/memtest86+/memtest86+x64.iso")
TREE = bytes(range(32))


def sample_sections(module_size=3000, compress=True):
    return [
        Section(SectionKind.ENVELOPE, b'{"payloadType":"x","payload":"","signatures":[]}'),
        Section(SectionKind.MANIFEST, b'{"id":"com.example.sample"}\n' * 20, compress=compress),
        Section(SectionKind.MODULE, sha256(b"module").digest() * (module_size // 32), compress=compress),
        Section(SectionKind.HINTS, b'{"tool":"test"}', critical=False),
    ]


def digest(path):
    return sha256(Path(path).read_bytes()).hexdigest()


def tool(*command, check=True, stdin=None):
    """Run a program that the tests need; that it is missing is a failure, not a skip."""
    assert shutil.which(command[0]), f"{command[0]} is missing: install the packages in requirements/debian.txt"
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, input=stdin, check=False)
    if check:
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done


def both(number, size):
    return number.to_bytes(size, "little") + number.to_bytes(size, "big")


def pvd_bytes(blocks, *, root=18, field=bytes(512)):
    """A primary volume descriptor as ECMA-119, 8.4 lays it out."""
    record = bytearray(34)
    record[0] = 34
    record[2:10] = both(root, 4)
    record[10:18] = both(SECTOR, 4)
    record[25] = 2
    record[28:32] = both(1, 2)
    record[32] = 1
    data = b"\x01CD001\x01\0" + b"LINUX".ljust(32) + b"TEST VOLUME".ljust(32) + bytes(8) + both(blocks, 4) + bytes(32)
    data += (
        both(1, 2) + both(1, 2) + both(SECTOR, 2) + both(10, 4) + struct.pack("<II", 19, 0) + struct.pack(">II", 20, 0)
    )
    data += (
        bytes(record) + b" " * 512 + b" " * 111 + b"2026010100000000\0" + b"0" * 16 + b"\0" + (b"0" * 16 + b"\0") * 2
    )
    data += b"\x01\0" + field
    return data.ljust(SECTOR, b"\0")


TERMINATOR = (b"\xffCD001\x01").ljust(SECTOR, b"\0")


def iso_bytes(blocks=24, tail=b"", **pvd):
    """A minimal ISO 9660 image; ``tail`` stands behind the volume's end."""
    image = bytearray(blocks * SECTOR)
    image[16 * SECTOR : 18 * SECTOR] = pvd_bytes(blocks, **pvd) + TERMINATOR
    image[21 * SECTOR : 22 * SECTOR] = bytes(range(256)) * 8
    return bytes(image) + tail


def attach(path, placement, sections=None):
    return attach_sections(path, sections or sample_sections(), placement=placement, tree_digest=TREE)


def content_of(path):
    with open_image(path) as image:
        return image.read(0, image.virtual_size)


def state_of(path):
    with open_image(path) as image:
        return image.locate().state


def problem_of(path):
    with open_image(path) as image:
        return open_graft(image).format_problem()


def flip(path, offset, mask=0x01):
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ mask]))


def run_and_die(action, after):
    """Run ``action`` in a child that is killed with SIGKILL right after operation number ``after`` (from 1).

    Returns:
        True when it was killed, False when the action came to its end first.
    """
    child = os.fork()
    if child == 0:
        status = 70
        try:
            count = 0

            def observer(_operation: Operation) -> None:
                nonlocal count
                count += 1
                if count == after:
                    os.kill(os.getpid(), signal.SIGKILL)

            with observing(observer):
                action()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0, "the action failed"
    return False


def operations_of(action):
    """Run ``action`` and return the operations it made."""
    seen = []
    with observing(seen.append):
        action()
    return seen
