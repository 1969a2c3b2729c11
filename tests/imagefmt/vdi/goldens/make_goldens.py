#!/usr/bin/env python3
"""Make the golden grafted VDI images: what was released once is readable for ever.

Usage: make_goldens.py [FOLDER]   (the folder of this script by default)
"""

import json
import sys
from hashlib import sha256
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]

from imagefmt_helpers import sample_sections  # noqa: E402 - the line above makes it importable
from vdi_testkit import small_image  # noqa: E402

from vmgraft.imagefmt.contract import Placement  # noqa: E402
from vmgraft.imagefmt.graft import attach_sections, open_image  # noqa: E402
from vmgraft.imagefmt.tree import digest_content  # noqa: E402

#: Name → bytes before the block map, comment, placement. Nothing is compressed: zstd's output may change.
GOLDENS = {
    "inline.vdi": (4096, b"", Placement.INLINE),
    "sidecar.vdi": (0, b"", Placement.SIDECAR),
    "comment-taken.vdi": (0, b"a comment", Placement.SIDECAR),
}


def make(folder):
    """Write every golden and what a reader must find in it."""
    expected = {}
    for name, (gap, comment, placement) in GOLDENS.items():
        path = small_image(folder / name, gap=gap, comment=comment)
        original = path.read_bytes()
        with open_image(path) as image:
            content = digest_content(image, flat="always")
        attach_sections(path, sample_sections(96, compress=False), placement=placement, tree_digest=content.tree_digest)
        expected[name] = {
            "placement": placement.value,
            "originalSha256": sha256(original).hexdigest(),
            "treeDigest": content.tree_digest.hex(),
            "flat": content.flat.hex(),
        }
    (folder / "expected.json").write_text(json.dumps(expected, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
