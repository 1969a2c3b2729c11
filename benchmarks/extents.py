"""The extents of a fully mapped qcow2 against qemu-img map."""

import subprocess

from _measure import GIB, MIB, PYTHON, Bench, Runner

_LIST = """
import sys
from vmgraft.imagefmt.graft import open_image
with open_image(sys.argv[1]) as image:
    print(sum(1 for _ in image.extents()))
"""


def main() -> None:
    bench = Bench("extents", "extents of a fully mapped qcow2")
    size = (4 if bench.small else 1024) * GIB
    with bench.folder() as folder:
        path = folder / "mapped.qcow2"
        create = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", str(path), str(size)]
        subprocess.run(create, check=True)
        ours, peers = Runner(), Runner()
        bench.compare(
            f"extents of {size // GIB} GiB",
            {
                "qemu-img map": peers.peer("qemu-img", "map", "--output=json", path),
                "vmgraft": ours.peer(PYTHON, "-c", _LIST, path),
            },
        )
        bench.fact("peak memory of vmgraft", ours.peak / MIB, "MiB")
    bench.end()


if __name__ == "__main__":
    main()
