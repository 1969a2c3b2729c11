#!/usr/bin/env python3
"""Make the golden grafted images of raw and ISO 9660, or compare them: what was released once is readable for ever.

Usage: make_goldens.py [FOLDER]   (the folder of this script by default)
"""

import json
import sys
from hashlib import sha256
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from imagefmt_helpers import iso_bytes, sample_sections  # noqa: E402 - the line above makes it importable

from vmgraft.imagefmt.contract import Placement  # noqa: E402
from vmgraft.imagefmt.graft import attach_sections, open_image  # noqa: E402
from vmgraft.imagefmt.record import Section, SectionKind  # noqa: E402
from vmgraft.imagefmt.sidecar import sidecar_path  # noqa: E402
from vmgraft.imagefmt.tree import digest_content  # noqa: E402

#: Name → (original bytes, placement). zstd's output may change between its versions, so nothing here is compressed.
GOLDENS = {
    "raw/inline.img": (b"golden raw disk\n" * 100, Placement.INLINE),
    "raw/sidecar.img": (b"golden raw disk\n" * 64, Placement.SIDECAR),
    "raw/files.img": (b"golden raw disk with files beside it\n" * 20, Placement.INLINE),
    "iso9660/inline.iso": (iso_bytes(20), Placement.INLINE),
    "iso9660/odd-size.iso": (iso_bytes(20, tail=b"behind the volume"), Placement.INLINE),
    "iso9660/footer-only.iso": (iso_bytes(20, field=b"taken " * 85 + b"!!"), Placement.INLINE),
    "iso9660/sidecar.iso": (iso_bytes(20), Placement.SIDECAR),
}
#: Two pieces of an extension's files, as the golden with files has them.
FILES = (b"#cloud-config\nhostname: golden\n" + b"instance-id: golden\n", b"a second piece")


def make(folder):
    """Write every golden and what a reader must find in it."""
    expected = {}
    for name, (original, placement) in GOLDENS.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        sidecar_path(path).unlink(missing_ok=True)
        path.write_bytes(original)
        with open_image(path) as image:
            content = digest_content(image, flat="always")
        sections = sample_sections(96, compress=False)
        if path.stem == "files":
            sections[3:3] = [Section(SectionKind.FILES, data) for data in FILES]
        attach_sections(path, sections, placement=placement, tree_digest=content.tree_digest)
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
