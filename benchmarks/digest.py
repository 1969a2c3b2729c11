"""The content digest against sha256sum and openssl, on a dense raw file in the page cache."""

from _measure import GIB, MIB, PROGRAM, Bench, Runner, dense_file


def main() -> None:
    bench = Bench("digest", "content digest of a dense file")
    size = 64 * MIB if bench.small else 4 * GIB
    with bench.folder() as folder:
        path = dense_file(folder / "dense.img", size)
        ours, peers = Runner(), Runner()
        bench.compare(
            f"digest of {size // MIB} MiB",
            {
                "vmgraft digest": ours.peer(PROGRAM, "digest", "-q", "--flat-digest", "never", path),
                "sha256sum": peers.peer("sha256sum", path),
                "openssl dgst -sha256": peers.peer("openssl", "dgst", "-sha256", path),
            },
        )
        bench.fact("peak memory of vmgraft", ours.peak / MIB, "MiB")
    bench.end()


if __name__ == "__main__":
    main()
