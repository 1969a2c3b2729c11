#!/usr/bin/env python3
"""Make the golden grafted VHDX images, or compare them: what was released once is readable for ever.

Usage: make_goldens.py [FOLDER]   (the folder of this script by default)

The images are kept compressed; a golden is the file in it.
"""

import json
import lzma
import sys
import tempfile
from hashlib import sha256
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]

from imagefmt_helpers import sample_sections  # noqa: E402 - the line above makes it importable
from vhdx_testkit import MIB, disk, entry, simple  # noqa: E402

from vmgraft.imagefmt.contract import Placement  # noqa: E402
from vmgraft.imagefmt.graft import attach_sections, open_image  # noqa: E402
from vmgraft.imagefmt.sidecar import sidecar_path  # noqa: E402
from vmgraft.imagefmt.tree import digest_content  # noqa: E402


def odd(path):
    """A last block that the file holds in part, in a file that is not made of whole MiB."""
    return disk(
        path,
        [0, entry(4 * MIB)],
        [b"golden" * 99],
        size=2 * MIB + 1024,
        block=2 * MIB,
        places=[(4 * MIB + 5000, b"\0")],
    )


#: Name → (maker of the original, placement). zstd's output may change between its versions: no section is compressed.
GOLDENS = {
    "inline.vhdx": (simple, Placement.INLINE),
    "odd-size.vhdx": (odd, Placement.INLINE),
    "sidecar.vhdx": (simple, Placement.SIDECAR),
}


def make(folder):
    """Write every golden and what a reader must find in it."""
    expected = {}
    for name, (maker, placement) in GOLDENS.items():
        with tempfile.TemporaryDirectory(dir=folder) as work:
            path = maker(Path(work) / name)
            original = path.read_bytes()
            with open_image(path) as image:
                content = digest_content(image, flat="always")
            sections = sample_sections(96, compress=False)
            attach_sections(path, sections, placement=placement, tree_digest=content.tree_digest)
            (folder / f"{name}.xz").write_bytes(lzma.compress(path.read_bytes()))
            if placement is Placement.SIDECAR:
                (folder / sidecar_path(path).name).write_bytes(sidecar_path(path).read_bytes())
        expected[name] = {
            "placement": placement.value,
            "originalSha256": sha256(original).hexdigest(),
            "virtualSize": content.virtual_size,
            "treeDigest": content.tree_digest.hex(),
            "rootHash": content.root_hash.hex(),
            "flat": content.flat.hex(),
        }
    (folder / "expected.json").write_text(json.dumps(expected, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
