"""Opening an image and locating its graft through the library, in every container."""

import contextlib
import subprocess
import time
import zipfile
from pathlib import Path

from _measure import MIB, PYTHON, Bench, dense_file

_FIRST = """
import sys, time
started = time.perf_counter()
from vmgraft.imagefmt.graft import open_image
with open_image(sys.argv[1]) as image:
    image.locate()
print(time.perf_counter() - started)
"""


def look(path: Path) -> None:
    from vmgraft.imagefmt.graft import open_image

    with open_image(path) as image:
        image.locate()


def make(folder: Path, name: str, raw: Path) -> Path:
    """Make a grafted image: an ISO of a folder, an archive, a disk by our own convert."""
    from vmgraft.imagefmt.graft import attach_sections
    from vmgraft.imagefmt.record import Section, SectionKind
    from vmgraft.vendor.convert import ConvertOptions, convert

    path = folder / f"disk.{name}"
    if name == "iso9660":
        (folder / "tree").mkdir()
        (folder / "tree" / "file").write_bytes(b"content" * 1000)
        subprocess.run(["xorriso", "-as", "mkisofs", "-quiet", "-o", str(path), str(folder / "tree")], check=True)
    elif name == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("file", b"content" * 1000)
    else:
        convert(raw, path, ConvertOptions(format=name))
    attach_sections(path, [Section(SectionKind.ENVELOPE, b"{}")], tree_digest=bytes(32))
    return path


def main() -> None:
    from vmgraft.imagefmt.registry import format_names

    bench = Bench("opening", "open an image and locate its graft")
    with bench.folder() as folder:
        raw = dense_file(folder / "content", 64 * MIB, at=[0, 32 * MIB])
        peers, first = {}, {}
        for name in format_names():
            path = make(folder, name, raw)
            peers[name] = lambda path=path: look(path)
            if bench.small and first:
                continue
            done = subprocess.run([PYTHON, "-c", _FIRST, str(path)], check=True, capture_output=True, text=True)
            first[name] = float(done.stdout)
        bench.compare("open and locate", peers, rounds=51)
        for name, seconds in first.items():
            bench.fact(f"first one in a process, with imports: {name}", seconds * 1e3, "ms")
        with contextlib.suppress(FileNotFoundError):
            started = time.perf_counter()
            subprocess.run(["qemu-img", "info", str(folder / "disk.qcow2")], check=True, capture_output=True)
            bench.fact("for comparison: qemu-img info", (time.perf_counter() - started) * 1e3, "ms")
    bench.end()


if __name__ == "__main__":
    main()
