#!/usr/bin/env python3
"""Make the golden grafted archives: what was released once is readable for ever.

Usage: make_zip_goldens.py [FOLDER]   (``goldens`` beside this script by default)
"""

import json
import sys
from hashlib import sha256
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from imagefmt_helpers import sample_sections  # noqa: E402 - the line above makes it importable
from zip_testkit import by_hand  # noqa: E402

from vmgraft.imagefmt.contract import Placement  # noqa: E402
from vmgraft.imagefmt.graft import attach_sections, open_image  # noqa: E402
from vmgraft.imagefmt.sidecar import sidecar_path  # noqa: E402
from vmgraft.imagefmt.tree import digest_content  # noqa: E402

#: Name → (original bytes, placement).
GOLDENS = {
    "inline.zip": (by_hand(comment=b"golden"), Placement.INLINE),
    "sidecar.zip": (by_hand(), Placement.SIDECAR),
    "zip64.zip": (by_hand(wide=True), Placement.INLINE),
    "launcher.jar": (by_hand(prefix=b"#!/bin/sh\nexec java -jar $0\n"), Placement.INLINE),
}


def make(folder):
    """Write every golden and what a reader must find in it. Nothing is compressed: zstd's output may change."""
    expected = {}
    for name, (original, placement) in GOLDENS.items():
        path = folder / name
        sidecar_path(path).unlink(missing_ok=True)
        path.write_bytes(original)
        with open_image(path) as image:
            content = digest_content(image, flat="always")
        sections = sample_sections(96, compress=False)
        attach_sections(path, sections, placement=placement, tree_digest=content.tree_digest)
        expected[name] = {
            "placement": placement.value,
            "originalSha256": sha256(original).hexdigest(),
            "virtualSize": content.virtual_size,
            "treeDigest": content.tree_digest.hex(),
            "flat": content.flat.hex(),
        }
    (folder / "expected.json").write_text(json.dumps(expected, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "goldens")
