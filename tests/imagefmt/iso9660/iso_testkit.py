"""Makers of real ISO images for the tests of this folder."""

import os

from imagefmt_helpers import SECTOR, tool

FIELD = 34035
MAKERS = {"genisoimage": ["genisoimage", "-quiet"], "xorriso": ["xorriso", "-as", "mkisofs", "-quiet"]}


def make_tree(folder):
    """Some files, a long name among them."""
    tree = folder / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "hello.txt").write_text("hello\n")
    (tree / "sub" / "a long name with spaces.bin").write_bytes(os.urandom(300_000))
    return tree


def make_iso(path, tree, *options, maker="genisoimage"):
    tool(*MAKERS[maker], "-R", "-J", "-V", "SAMPLE", *options, "-o", path, tree)
    return path


def volume_size(path):
    """Bytes of the volume, as the primary descriptor says."""
    with open(path, "rb") as file:
        file.seek(16 * SECTOR + 80)
        return int.from_bytes(file.read(4), "little") * SECTOR


def write_at(path, offset, data):
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)
