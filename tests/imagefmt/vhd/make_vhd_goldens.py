#!/usr/bin/env python3
"""Make the golden grafted VHDs: what was released once is readable for ever.

Usage: make_vhd_goldens.py [FOLDER]   (``goldens`` beside this script by default)
"""

import json
import sys
from hashlib import sha256
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from imagefmt_helpers import sample_sections  # noqa: E402 - the line above makes it importable
from vhd_testkit import dynamic, fixed  # noqa: E402

from vmgraft.imagefmt.contract import Placement  # noqa: E402
from vmgraft.imagefmt.graft import attach_sections, open_image  # noqa: E402
from vmgraft.imagefmt.sidecar import sidecar_path  # noqa: E402
from vmgraft.imagefmt.tree import digest_content  # noqa: E402

#: Name → original bytes.
GOLDENS = {
    "dynamic.vhd": dynamic({3: b"golden block\n" * 200, 1: b"another\n" * 512}, 65536),
    "fixed.vhd": fixed(b"golden fixed disk\n".ljust(32) * 128),
}


def make(folder):
    """Write every golden and what a reader must find in it. Nothing is compressed: zstd's output may change."""
    expected = {}
    for name, original in GOLDENS.items():
        path = folder / name
        sidecar_path(path).unlink(missing_ok=True)
        path.write_bytes(original)
        with open_image(path) as image:
            content = digest_content(image, flat="always")
        sections = sample_sections(96, compress=False)
        attach_sections(path, sections, placement=Placement.AUTO, tree_digest=content.tree_digest)
        expected[name] = {
            "originalSha256": sha256(original).hexdigest(),
            "virtualSize": content.virtual_size,
            "treeDigest": content.tree_digest.hex(),
            "flat": content.flat.hex(),
        }
    (folder / "expected.json").write_text(json.dumps(expected, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "goldens")
