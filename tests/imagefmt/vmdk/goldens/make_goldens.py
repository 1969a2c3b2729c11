#!/usr/bin/env python3
"""Make the golden grafted VMDK images: what was released once is readable for ever.

Usage: make_goldens.py [FOLDER]   (the folder of this script by default)
"""

import json
import sys
from hashlib import sha256
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]

from imagefmt_helpers import sample_sections  # noqa: E402 - the line above makes it importable
from vmdk_testkit import small_image  # noqa: E402

from vmgraft.imagefmt.contract import Placement  # noqa: E402
from vmgraft.imagefmt.graft import attach_sections, open_image  # noqa: E402
from vmgraft.imagefmt.tree import digest_content  # noqa: E402

#: Name → function that makes the original, placement. Nothing is compressed: zstd's output may change.
GOLDENS = {
    "inline.vmdk": (lambda path: small_image(path, overhead=40), Placement.INLINE),
    "sidecar.vmdk": (lambda path: small_image(path, overhead=40), Placement.SIDECAR),
    "no-place.vmdk": (lambda path: small_image(path, overhead=31), Placement.SIDECAR),
}


def make(folder):
    """Write every golden and what a reader must find in it."""
    expected = {}
    for name, (make_original, placement) in GOLDENS.items():
        path = make_original(folder / name)
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
