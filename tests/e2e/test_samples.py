"""QEMU's own sample images: opened or refused as they deserve, read as QEMU reads them, grafted and given back."""

from __future__ import annotations

import bz2
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path

import pytest

from vmgraft.errors import FileError, MalformedImageError, UnsupportedError
from vmgraft.imagefmt.contract import GraftState, Opening
from vmgraft.imagefmt.graft import attach_sections, detach_image, open_image
from vmgraft.imagefmt.record import Section, SectionKind
from vmgraft.imagefmt.tree import build_tree

MIB = 1 << 20
#: No sample is longer than this when unpacked.
MAX_UNPACKED = 512 * MIB
Tool = Callable[..., str]


@dataclass(frozen=True)
class Sample:
    """What is known of one sample.

    Attributes:
        sha256: First 16 hexadecimal digits of the packed file's SHA-256.
        container: Our name of its format; "" for those that are recognised and refused.
        driver: QEMU's name of its format.
        error: What opening and reading it ends in: a class, and words of the message.
    """

    sha256: str
    container: str
    driver: str
    error: tuple[type[FileError], str] | None = None


def _refused(sha256: str, driver: str, name: str) -> Sample:
    return Sample(sha256, "", driver, (UnsupportedError, f"^{name} is not supported"))


SAMPLES = {
    "afl5.img": Sample("2dbc1f999a91c800", "vhd", "vpc", (MalformedImageError, "dynamic header")),
    "afl9.vmdk": Sample("aecb495195ef784f", "vmdk", "vmdk", (MalformedImageError, "transfer")),
    "d2v-zerofilled.vhd": Sample("6de88bcb838c1974", "vhd", "vpc"),
    "empty.bochs": _refused("e3fa92ab39d21ade", "bochs", "Bochs"),
    "grub_mbr.raw": Sample("3b345e2d9368041c", "raw", "raw"),
    "hyperv2012r2-dynamic.vhd": Sample("c474d8de9a2119e3", "vhd", "vpc"),
    # Its log must be replayed first, which changes the file: see the last test.
    "iotest-dirtylog-10G-4M.vhdx": Sample("f294ddc9a9ab2a62", "vhdx", "vhdx", (UnsupportedError, "log")),
    "iotest-dynamic-1G.vhdx": Sample("cfce08049d21b21f", "vhdx", "vhdx"),
    "iotest-version3.vmdk": Sample("924c05b1a1cf61cf", "vmdk", "vmdk"),
    "parallels-v1": _refused("a25c45993f13ea5a", "parallels", "Parallels"),
    "parallels-v2": _refused("637abc4b890a3e3f", "parallels", "Parallels"),
    "parallels-with-bitmap": _refused("d94e6c37a444ac56", "parallels", "Parallels"),
    "simple-dmg.dmg": _refused("13447673c3efdf90", "dmg", "DMG"),
    "simple-pattern.cloop": _refused("d1b036529416c0a6", "cloop", "cloop"),
    "test-disk2vhd.vhdx": Sample("56a82a227c072410", "vhdx", "vhdx"),
    "virtualpc-dynamic.vhd": Sample("357e90c1e97f7db4", "vhd", "vpc"),
}


@pytest.fixture(scope="module")
def samples() -> Path:
    """The folder with the packed samples; without a network and without the user's cache this fails."""
    script = Path(__file__).with_name("fetch_qemu_samples.py")
    done = subprocess.run([sys.executable, str(script)], check=False, capture_output=True, text=True, timeout=1200)
    if done.returncode:
        pytest.fail(done.stderr)
    return Path(done.stdout.strip())


def _unpack(samples: Path, name: str, target: Path) -> Path:
    """Write a sample with its zeros as holes."""
    packed = samples / f"{name}.bz2"
    with packed.open("rb") as file:
        assert file_digest(file, "sha256").hexdigest().startswith(SAMPLES[name].sha256), "not the sample we know"
    with bz2.open(packed) as source, target.open("wb") as file:
        while chunk := source.read(MIB):
            if chunk.count(0) == len(chunk):
                file.seek(len(chunk), 1)
            else:
                file.write(chunk)
            assert file.tell() <= MAX_UNPACKED
        file.truncate()
    return target


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def test_the_table_names_every_sample(samples: Path) -> None:
    assert {path.stem for path in samples.glob("*.bz2")} == set(SAMPLES)


@pytest.mark.parametrize("name", SAMPLES)
def test_sample(samples: Path, tmp_path: Path, tool: Tool, name: str) -> None:
    sample = SAMPLES[name]
    path = _unpack(samples, name, tmp_path / name)
    if sample.error is not None:
        error, words = sample.error
        with pytest.raises(error) as caught, open_image(path) as image:
            list(image.extents())
        assert re.search(words, caught.value.message)
        assert caught.value.file == str(path)
        return
    _check_content_and_graft(path, sample, tool)


def _check_content_and_graft(path: Path, sample: Sample, tool: Tool) -> None:
    raw = path.with_name("converted.raw")
    tool("qemu-img", "convert", "-f", sample.driver, "-O", "raw", path, raw)
    with open_image(path) as image, open_image(raw, Opening(format="raw")) as converted:
        assert image.format_name == sample.container
        assert image.virtual_size == converted.virtual_size
        tree = build_tree(image)
        assert tree.tree_digest == build_tree(converted).tree_digest
    before = _sha256(path)
    plain = Path(shutil.copy(path, path.with_name("plain")))
    sections = [Section(SectionKind.ENVELOPE, b'{"a": "graft"}' * 100)]
    assert attach_sections(path, sections, tree_digest=tree.tree_digest).state is GraftState.OK
    _qemu_is_content(path, plain, sample, tool)
    with open_image(path) as image:
        assert build_tree(image).tree_digest == tree.tree_digest
    detach_image(path)
    assert _sha256(path) == before
    assert not path.with_name(path.name + ".vmgraft").exists()


def _qemu_is_content(path: Path, plain: Path, sample: Sample, tool: Tool) -> None:
    """Let QEMU check the grafted image and compare it; a raw one has a trailer that QEMU shows, so its head counts."""
    if sample.container == "raw":
        assert path.read_bytes()[: plain.stat().st_size] == plain.read_bytes()
        return
    if sample.driver != "vpc":  # QEMU has no check for it
        tool("qemu-img", "check", "-q", "-f", sample.driver, path)
    tool("qemu-img", "compare", "-q", "-f", sample.driver, "-F", sample.driver, path, plain)


def test_a_replayed_log_makes_the_image_readable(samples: Path, tmp_path: Path, tool: Tool) -> None:
    name = "iotest-dirtylog-10G-4M.vhdx"
    path = _unpack(samples, name, tmp_path / name)
    tool("qemu-img", "check", "-q", "-r", "all", "-f", "vhdx", path)
    _check_content_and_graft(path, SAMPLES[name], tool)
