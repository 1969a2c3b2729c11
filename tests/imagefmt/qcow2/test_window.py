"""libvirt reads the first 33,280 bytes of an image: extensions and backing file name must stay within them."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from qcow2_testkit import MIB, attach, detach, extensions, make, noise, open_qcow2, put_extensions, run

from vmgraft.imagefmt.contract import GraftState, Placement

#: VIR_STORAGE_MAX_HEADER, and where extensions end at the latest so that a name of 1,023 bytes fits behind them.
LIBVIRT_READS = 33_280
EXTENSIONS_END = 32_257
GRAFT = 0x564D4772


def _ends(path: Path) -> tuple[int, int]:
    """Return where the graft's extension and the backing file name end."""
    head = path.read_bytes()[:MIB]
    version, name_at, name_size = struct.unpack(">IQI", head[4:20])
    at = 72 if version == 2 else struct.unpack(">I", head[100:104])[0]
    graft = 0
    for magic, data in extensions(path):
        at += 8 + (len(data) + 7 & ~7)
        graft = at if magic == GRAFT else graft
    assert head[at : at + 8] == bytes(8), "an end mark follows"
    return graft, name_at + name_size


def _image(folder: Path, version: int, cluster: int, name: int) -> Path:
    path = make(folder / "x.qcow2", version=version, cluster=cluster)
    if name:
        text = ("d/" * 512)[: name - 1] + "r"
        run("qemu-img", "rebase", "-q", "-u", "-b", text, "-F", "raw", path)
    return path


@pytest.mark.parametrize("name", [0, 8, 200, 1023])
@pytest.mark.parametrize("cluster", [32768, 65536, 2 * MIB])
@pytest.mark.parametrize("version", [2, 3])
def test_the_longest_inline_record(tmp_path: Path, version: int, cluster: int, name: int) -> None:
    path = _image(tmp_path, version, cluster, name)
    before = path.read_bytes()
    with open_qcow2(path) as image:
        room = image.room().inline
    located = attach(path, size=room, placement=Placement.INLINE)
    assert located.record is not None and located.record.size == room
    graft, name_end = _ends(path)
    assert 0 < graft < EXTENSIONS_END
    assert name_end <= min(LIBVIRT_READS, cluster)
    shown = run("qemu-img", "info", "-U", path).stdout
    assert ("backing file:" in shown) is (name > 0)
    # A name set later, as long as names can be, stays within the window too.
    run("qemu-img", "rebase", "-q", "-u", "-b", "d/" * 511 + "r", "-F", "raw", path)
    graft, name_end = _ends(path)
    assert graft < EXTENSIONS_END and name_end <= min(LIBVIRT_READS, cluster)
    with open_qcow2(path) as image:
        assert image.locate().state is GraftState.OK
    if name == 1023:
        run("qemu-img", "rebase", "-q", "-u", "-b", ("d/" * 512)[:1022] + "r", "-F", "raw", path)
        detach(path)
        assert path.read_bytes() == before


@pytest.mark.parametrize("others", [12_000, 31_600, 40_000])
def test_beside_long_extensions_of_others(tmp_path: Path, others: int) -> None:
    """Where others leave little room within the window the record goes into a sidecar, or nowhere."""
    path = make(tmp_path / "x.qcow2")
    put_extensions(path, [*extensions(path), (0x11111111, noise(others))])
    before = path.read_bytes()
    with open_qcow2(path) as image:
        room = image.room().inline
    assert (room > 0) is (others == 12_000)
    if others == 12_000:
        located = attach(path, size=room + 8)
        assert located.locator is not None and located.locator.placement is Placement.SIDECAR
        assert _ends(path)[0] < EXTENSIONS_END
        detach(path)
    assert path.read_bytes() == before
