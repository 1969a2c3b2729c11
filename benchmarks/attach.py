"""Attach and detach, without the digest, of a huge image against a small one: the size must not matter."""

import subprocess
from pathlib import Path

from _measure import GIB, MIB, TIB, Bench, dense_file


def graft(path: Path) -> None:
    """Attach 16 KiB and detach them again."""
    from vmgraft.imagefmt.graft import attach_sections, detach_image
    from vmgraft.imagefmt.record import Section, SectionKind

    attach_sections(path, [Section(SectionKind.ENVELOPE, bytes(range(256)) * 64)], tree_digest=bytes(32))
    detach_image(path)


def main() -> None:
    bench = Bench("attach", "attach and detach without the digest")
    sizes = (MIB, GIB) if bench.small else (GIB, TIB)
    with bench.folder() as folder:
        for name in ("raw", "qcow2"):
            peers = {}
            for size in sizes:
                path = folder / f"{size}.{name}"
                offsets = [number * (size // 16) for number in range(16)]
                raw = dense_file(folder / "content", size, at=offsets, piece=65536)
                subprocess.run(["qemu-img", "convert", "-O", name, str(raw), str(path)], check=True)
                peers[f"{size // MIB} MiB {name}"] = lambda path=path: graft(path)
            bench.compare(f"attach and detach, {name}", peers, rounds=15)
    bench.end()


if __name__ == "__main__":
    main()
