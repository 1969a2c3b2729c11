"""The content digest against sha256sum and openssl, on a dense raw file in the page cache."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from _measure import compare

from vmgraft.imagefmt.graft import open_image
from vmgraft.imagefmt.tree import digest_content


def main() -> None:
    size = int(sys.argv[1]) if len(sys.argv) > 1 else 1 << 30
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dense.img"
        chunk = os.urandom(1 << 20)
        with path.open("wb") as file:
            for number in range(size >> 20):
                file.write(number.to_bytes(8, "little") + chunk[8:])

        def tree() -> None:
            with open_image(path) as image:
                digest_content(image, flat="never")

        compare(
            f"digest of {size >> 20} MiB, {os.cpu_count()} CPUs",
            {
                "content tree": tree,
                "sha256sum": lambda: subprocess.run(["sha256sum", path], check=True, capture_output=True),
                "openssl dgst -sha256": lambda: subprocess.run(
                    ["openssl", "dgst", "-sha256", path], check=True, capture_output=True
                ),
            },
            rounds=3,
        )


if __name__ == "__main__":
    main()
