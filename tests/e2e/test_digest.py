"""The content digests are what fsverity and veritysetup print."""

import os
import random
from pathlib import Path

import pytest

BLOCK = 65536


def sparse(path: Path, size: int, data: list[tuple[int, bytes]]) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
        for offset, chunk in data:
            file.seek(offset)
            file.write(chunk)
    return path


def oracle(path: Path, tool) -> tuple[str, str]:
    """Return (fs-verity digest, dm-verity root hash) of a file; the latter of a copy padded to whole blocks."""
    digest = tool("fsverity", "digest", "--block-size=65536", path).split()[0].removeprefix("sha256:")
    size = path.stat().st_size
    os.truncate(path, -(-size // BLOCK) * BLOCK)
    hashes = path.with_suffix(".hashes")
    said = tool(
        "veritysetup", "format", "--no-superblock", "--salt=-", "--data-block-size=65536", "--hash-block-size=65536",
        path, hashes,
    )  # fmt: skip
    os.truncate(path, size)
    return digest, next(line.split()[-1] for line in said.splitlines() if line.startswith("Root hash"))


@pytest.mark.parametrize("size", [512, 65536, 66048, 200 * 1024, 2049 * BLOCK + 1024])
def test_raw_of_any_size(cli, tmp_path: Path, tool, size: int) -> None:
    data = random.Random(size).randbytes(min(size, 100_000))
    path = sparse(tmp_path / "disk.img", size, [(0, data), (size - len(data) // 2, data[: len(data) // 2])])
    digest, root = oracle(path, tool)
    tree = cli.json("digest", path)["tree"]
    assert (tree["digest"], tree["rootHash"], tree["blockSize"]) == (digest, root, BLOCK)


def test_beyond_four_gib_in_raw_and_qcow2(cli, tmp_path: Path, tool) -> None:
    size = (4 << 30) + 5 * BLOCK + 512
    path = sparse(tmp_path / "big.img", size, [(0, b"start"), ((2 << 30) + 7, b"two"), (size - 100, b"end")])
    digest, root = oracle(path, tool)
    qcow2 = tmp_path / "big.qcow2"
    tool("qemu-img", "convert", "-O", "qcow2", path, qcow2)
    for image in (path, qcow2):
        tree = cli.json("digest", image, "--flat-digest", "never")["tree"]
        assert (tree["digest"], tree["rootHash"]) == (digest, root)
    with path.open("r+b") as file:
        file.seek((4 << 30) + 12345)
        file.write(b"x")
    assert cli.json("digest", path, "--flat-digest", "never")["tree"]["digest"] != digest
