"""Converting with our own writers against qemu-img convert, with what each of the two still has to do.

Nobody may trust a copy that was not read back, and a bound graft needs the digest of what was read. Our path hashes
while it copies; with qemu-img as the data path both digests are further passes. Both sides flush to the disk here.
"""

from pathlib import Path

from _measure import GIB, MIB, PROGRAM, PYTHON, Bench, Runner, dense_file

_COPY = """
import sys
from pathlib import Path
from vmgraft.imagefmt.commit import Writer, atomic_output
from vmgraft.imagefmt.graft import open_image
from vmgraft.imagefmt.write import get_writer
from vmgraft.imagefmt.write.base import NO_CHOICES
from vmgraft.imagefmt.write.copy import write_content
path = Path(sys.argv[3])
with open_image(sys.argv[1]) as image, atomic_output(path, replace=True) as fd:
    write_content(image, get_writer(sys.argv[2])(Writer(fd, file=path), image.virtual_size, NO_CHOICES, path.name))
"""
_QEMU_NAMES = {"vhd": "vpc"}


def measure(bench: Bench, runner: Runner, source: Path, name: str) -> None:
    """Compare the bare data paths, then the whole of convert with what qemu-img and two digests take."""
    other = _QEMU_NAMES.get(name, name)
    target = source.with_name("out")
    peers = Runner()

    def whole() -> None:
        target.unlink(missing_ok=True)
        runner(PROGRAM, "convert", "-q", "-O", name, source, target)

    def by_qemu() -> None:
        by_qemu_alone()
        for path in (source, target):
            peers(PROGRAM, "digest", "-q", "--flat-digest", "never", path)

    def by_qemu_alone() -> None:
        target.unlink(missing_ok=True)
        peers("qemu-img", "convert", "-t", "writeback", "-O", other, source, target)

    bench.compare(
        f"{source.name} to {name}",
        {
            "own writer, digest on the way": lambda: runner(PYTHON, "-c", _COPY, source, name, target),
            "qemu-img convert alone": by_qemu_alone,
            "vmgraft convert, all of it": whole,
            "qemu-img convert and two digests": by_qemu,
        },
        rounds=3,
    )
    target.unlink()


def main() -> None:
    bench = Bench("convert", "convert against qemu-img convert")
    size = (16 * MIB, 64 * MIB) if bench.small else (GIB, 64 * GIB)
    with bench.folder() as folder:
        dense = dense_file(folder / "dense", size[0])
        offsets = [number * (size[1] // 64) for number in range(64)]
        sparse = dense_file(folder / "sparse", size[1], at=offsets, piece=size[0] // 256)
        runner = Runner()
        for name in ("qcow2",) if bench.small else ("raw", "qcow2", "vhdx", "vmdk", "vhd", "vdi"):
            for source in (dense, sparse):
                measure(bench, runner, source, name)
        bench.fact("peak memory of vmgraft", runner.peak / MIB, "MiB")
    bench.end()


if __name__ == "__main__":
    main()
