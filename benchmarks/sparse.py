"""The content digest of a huge file with little data, against a dense file with as much."""

import random

from _measure import GIB, MIB, PROGRAM, TIB, Bench, Runner, dense_file


def main() -> None:
    bench = Bench("sparse", "content digest of a sparse file")
    data, whole = (16 * MIB, 4 * GIB) if bench.small else (512 * MIB, TIB)
    with bench.folder() as folder:
        dense = dense_file(folder / "dense.img", data)
        peers, ours = {}, Runner()
        peers[f"dense, {data // MIB} MiB"] = ours.peer(PROGRAM, "digest", "-q", "--flat-digest", "never", dense)
        for piece in (MIB, MIB // 16):
            count = data // piece
            stride, chance = whole // count, random.Random(piece)
            offsets = [number * stride + chance.randrange(stride // piece) * piece for number in range(count)]
            path = dense_file(folder / f"sparse-{piece}.img", whole, at=offsets, piece=piece)
            name = f"as much in {whole // GIB} GiB, pieces of {piece // 1024} KiB"
            peers[name] = ours.peer(PROGRAM, "digest", "-q", "--flat-digest", "never", path)
        bench.compare("digest of scattered data", peers)
        bench.fact("peak memory of vmgraft", ours.peak / MIB, "MiB")
    bench.end()


if __name__ == "__main__":
    main()
