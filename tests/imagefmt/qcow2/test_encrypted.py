"""Encrypted images: content refused, ciphertext digested as it is stored."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import pytest
from qcow2_testkit import MIB, make, pattern, raw_base, run

from vmgraft.errors import UnsupportedError, UsageError
from vmgraft.imagefmt.contract import GraftState, Image, Kind, Opening
from vmgraft.imagefmt.graft import open_image
from vmgraft.imagefmt.tree import digest_content

#: One worker makes the images, which takes QEMU seconds.
pytestmark = pytest.mark.xdist_group("qcow2-encrypted")

SECRET = ("--object", "secret,id=s,data=correct horse")
CIPHERTEXT = Opening(ciphertext=True)


def _img(*args: object) -> None:
    """Run qemu-img; under load its benchmark of the key derivation sometimes fails, which is no fault of the image."""
    for left in reversed(range(20)):
        done = run(*args, check=False)
        if done.returncode == 0:
            return
        assert left and "CPU usage" in done.stderr, done.stderr
        time.sleep(0.05)


def _make(folder: Path, kind: str) -> bytes:
    """An encrypted qcow2 image over ``base.raw``, with a snapshot, and changes after that."""
    path = folder / f"{kind}.qcow2"
    raw_base(folder)
    options = f"encrypt.format={kind},encrypt.key-secret=s" + (",encrypt.iter-time=10" if kind == "luks" else "")
    _img("qemu-img", "create", "-q", *SECRET, "-f", "qcow2", "-o", options, "-b", "base.raw", "-F", "raw", path, "4M")
    opened = f"driver=qcow2,encrypt.format={kind},encrypt.key-secret=s,file.filename={path}"
    write = ["-c", "write -P 7 64k 200k", "-c", "write -P 1 2M 1k", "-c", "write -z 3M 128k"]
    run("qemu-io", *SECRET, *write, "--image-opts", opened)
    run("qemu-img", "snapshot", *SECRET, "-q", "-c", "one", "--image-opts", opened)
    run("qemu-io", *SECRET, "-c", "write -P 9 64k 200k", "--image-opts", opened)
    return path.read_bytes()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return {kind: _make(tmp_path_factory.mktemp(kind), kind) for kind in ("luks", "aes")}


def put(folder: Path, data: bytes) -> Path:
    raw_base(folder)
    path = folder / "x.qcow2"
    path.write_bytes(data)
    return path


def stored(folder: Path, data: bytes, *snapshot: str) -> bytes:
    """The clusters as they are stored: what QEMU shows of a copy whose header speaks neither of keys nor of a base."""
    plain = bytearray(data)
    plain[32:36] = bytes(4)
    plain[8:20] = bytes(12)
    for magic in (b"\x05\x37\xbe\x77", b"\xe2\x79\x2a\xca"):  # key material, backing format: unknown ones instead
        at = plain.find(magic, 104, 65536)
        if at >= 0:
            plain[at : at + 4] = b"\x11\x11\x11\x11"
    path, out = folder / "plain.qcow2", folder / "plain.raw"
    path.write_bytes(plain)
    run("qemu-img", "convert", "-f", "qcow2", *snapshot, "-O", "raw", path, out)
    return out.read_bytes()


def _read_all(image: Image) -> bytes:
    return image.read(0, image.virtual_size)


@pytest.mark.parametrize("kind", ["luks", "aes"])
def test_ciphertext_is_what_is_stored(tmp_path: Path, made: dict[str, bytes], kind: str) -> None:
    """Holes are zeros: the backing file is not stored in this image, and not encrypted with its key."""
    path = put(tmp_path, made[kind])
    expected = stored(tmp_path, made[kind])
    assert any(expected[64 << 10 : 264 << 10])
    assert b"\x09" * 512 not in expected
    assert not any(expected[: 64 << 10])
    with open_image(path, CIPHERTEXT) as image:
        assert _read_all(image) == expected
        assert digest_content(image).flat == hashlib.sha256(expected).digest()
        assert sum(e.length for e in image.extents() if e.kind is Kind.DATA) < MIB
        assert [one.name for one in image.backing_chain()] == ["base.raw"]


@pytest.mark.parametrize("kind", ["luks", "aes"])
def test_the_ciphertext_of_a_snapshot(tmp_path: Path, made: dict[str, bytes], kind: str) -> None:
    path = put(tmp_path, made[kind])
    with open_image(path, Opening(ciphertext=True, snapshot="one")) as image:
        then = _read_all(image)
    assert then == stored(tmp_path, made[kind], "-l", "one") != stored(tmp_path, made[kind])


@pytest.mark.parametrize("kind", ["luks", "aes"])
def test_content_is_refused_and_facts_are_shown(tmp_path: Path, made: dict[str, bytes], kind: str) -> None:
    path = put(tmp_path, made[kind])
    with open_image(path) as image:
        assert image.metadata()["encryption"] == kind.upper()
        assert [one["name"] for one in image.metadata()["snapshots"]] == ["one"]
        assert image.locate().state is GraftState.NONE
        assert [one.name for one in image.backing_chain()] == ["base.raw"]
        with pytest.raises(UnsupportedError, match=kind.upper()) as caught:
            image.read(0, 1)
        assert "--ciphertext" in str(caught.value.hint)
        with pytest.raises(UnsupportedError):
            list(image.extents())


@pytest.mark.parametrize(("bit", "word"), [(1, "dirty"), (2, "corrupt")])
def test_damaged_images_are_refused_all_the_same(tmp_path: Path, made: dict[str, bytes], bit: int, word: str) -> None:
    data = bytearray(made["luks"])
    data[79] = bit
    with open_image(put(tmp_path, data), CIPHERTEXT) as image, pytest.raises(UnsupportedError, match=word):
        image.read(0, 1)


def test_plain_images_have_no_ciphertext(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not encrypted"):
        open_image(pattern(make(tmp_path / "x.qcow2")), CIPHERTEXT)
    raw_base(tmp_path)
    for opening in (CIPHERTEXT, Opening(ciphertext=True, format="raw")):
        with pytest.raises(UsageError, match="not encrypted"):
            open_image(tmp_path / "base.raw", opening)


def test_luks_files_are_digested_as_bytes(tmp_path: Path) -> None:
    path = tmp_path / "x.luks"
    _img("qemu-img", "create", "-q", *SECRET, "-f", "luks", "-o", "key-secret=s,iter-time=10", path, "1M")
    with pytest.raises(UnsupportedError, match="LUKS") as caught:
        open_image(path)
    assert "--ciphertext" in str(caught.value.hint)
    for opening in (CIPHERTEXT, Opening(ciphertext=True, format="raw")):
        with open_image(path, opening) as image:
            assert image.format_name == "raw"
            assert _read_all(image) == path.read_bytes()
    with pytest.raises(UsageError, match="reading only"):
        open_image(path, CIPHERTEXT, writable=True)
