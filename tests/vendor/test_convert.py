"""Convert: the graft goes along and verifies, nothing half-done ever has a name, and what cannot be kept is refused."""

import os
import random
import signal
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest

from vmgraft.errors import (
    ContentMismatchError,
    FileError,
    GraftFormatError,
    ImageInUseError,
    NoRoomError,
    UnsupportedError,
    UsageError,
)
from vmgraft.imagefmt import locks
from vmgraft.imagefmt.commit import Operation, observing
from vmgraft.imagefmt.contract import GraftState, Opening, Placement
from vmgraft.imagefmt.graft import open_graft, open_image
from vmgraft.imagefmt.record import SectionKind
from vmgraft.imagefmt.sidecar import sidecar_path
from vmgraft.imagefmt.tree import digest_content
from vmgraft.imagefmt.write import writable_formats
from vmgraft.imagefmt.write.base import WriteOptions
from vmgraft.signing.keys import generate
from vmgraft.signing.verify import self_check
from vmgraft.vendor import convert as convert_module
from vmgraft.vendor.convert import ConvertOptions, convert
from vmgraft.vendor.graft import AttachOptions, attach, detach
from vmgraft.vendor.pack import load_package

CLOCK = Path(__file__).resolve().parents[2] / "examples" / "clock"
KEY = generate("p256")
MIB = 1 << 20
DISKS = [name for name in writable_formats() if name != "iso9660"]
CARRIED = (SectionKind.ENVELOPE, SectionKind.MANIFEST, SectionKind.MODULE, SectionKind.HINTS)


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A raw disk with data, a hole, and an odd number of sectors."""
    path = tmp_path / "plain.raw"
    noise = random.Random(9)
    with path.open("wb") as file:
        file.truncate(5 * MIB + 3 * 512)
        for offset in (0, MIB - 7, 3 * MIB, 5 * MIB + 1000):
            file.seek(offset)
            file.write(noise.randbytes(300))
    return path


@pytest.fixture
def disk(plain: Path) -> Path:
    """The same, grafted."""
    path = plain.with_name("disk.raw")
    path.write_bytes(plain.read_bytes())
    attach(path, [load_package(CLOCK)], [KEY], AttachOptions())
    return path


def verifies(path: Path, opening: Opening | None = None) -> bool:
    with open_image(path, opening or Opening()) as image:
        return self_check(open_graft(image), [KEY.public], now=datetime.now(UTC)).ok


def carried(path: Path) -> list[tuple[int, bytes]]:
    with open_image(path) as image:
        record = open_graft(image).record
        assert record is not None
        return [(section.kind, record.raw(section)) for section in record.of_kind(*CARRIED)]


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("name", DISKS)
def test_there_and_back(disk: Path, plain: Path, tmp_path: Path, name: str) -> None:
    there, back = tmp_path / f"there.{name}", tmp_path / "back.raw"
    done = convert(disk, there, ConvertOptions())
    assert (done.path, done.format, done.virtual_size, done.dropped) == (there, name, plain.stat().st_size, None)
    assert done.located is not None
    assert done.located.state is GraftState.OK
    assert verifies(there)
    assert carried(there) == carried(disk)
    convert(there, back, ConvertOptions())
    assert verifies(back)
    detach(back)
    assert back.read_bytes() == plain.read_bytes()
    detach(there)
    with open_image(there) as image:
        assert digest_content(image).tree_digest == done.tree_digest
        assert image.locate().state is GraftState.NONE


@pytest.mark.parametrize("placement", [Placement.INLINE, Placement.SIDECAR])
@pytest.mark.parametrize("name", ["raw", "qcow2"])
def test_placement(disk: Path, tmp_path: Path, name: str, placement: Placement) -> None:
    out = tmp_path / f"out.{name}"
    done = convert(disk, out, ConvertOptions(placement=placement))
    assert done.located is not None
    assert done.located.locator is not None
    assert done.located.locator.placement is placement
    assert sidecar_path(out).exists() == (placement is Placement.SIDECAR)
    assert verifies(out)
    again = convert(out, tmp_path / "again.qcow2", ConvertOptions())  # a sidecar is a source like any other
    assert again.tree_digest == done.tree_digest
    assert verifies(again.path)


def test_options_of_qcow2(disk: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.qcow2"
    convert(disk, out, ConvertOptions(write=WriteOptions(4096, compress=True)))
    assert verifies(out)
    subprocess.run(["qemu-img", "check", "-q", out], check=True)
    with open_image(out) as image:
        assert image.metadata()["clusterSize"] == 4096


def test_an_iso_stays_an_iso(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "file").write_bytes(b"text" * 1000)
    iso = tmp_path / "disc.iso"
    subprocess.run(["xorriso", "-as", "mkisofs", "-quiet", "-o", iso, tmp_path / "tree"], check=True)
    original = iso.read_bytes()
    attach(iso, [load_package(CLOCK)], [KEY], AttachOptions())
    convert(iso, tmp_path / "disc.qcow2", ConvertOptions())
    assert verifies(tmp_path / "disc.qcow2")
    convert(tmp_path / "disc.qcow2", tmp_path / "back.iso", ConvertOptions())
    assert verifies(tmp_path / "back.iso")
    detach(tmp_path / "back.iso")
    assert (tmp_path / "back.iso").read_bytes() == original
    with pytest.raises(UsageError, match="taken for something else"):
        convert(iso, tmp_path / "disc.img", ConvertOptions())
    assert not (tmp_path / "disc.img").exists()
    done = convert(iso, tmp_path / "disc.img", ConvertOptions(format="raw"))
    assert "--image-format raw" in done.warnings[0]
    assert verifies(done.path, Opening(format="raw"))


def test_an_iso_of_an_odd_length_fits_into_an_iso_only(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "file").write_bytes(b"text")
    iso = tmp_path / "disc.iso"
    subprocess.run(["xorriso", "-as", "mkisofs", "-quiet", "-o", iso, tmp_path / "tree"], check=True)
    with iso.open("ab") as file:
        file.write(b"odd")
    for name in ("raw", "qcow2"):
        with pytest.raises(UnsupportedError, match="whole number of 512-byte sectors"):
            convert(iso, tmp_path / "out", ConvertOptions(format=name))
    convert(iso, tmp_path / "out.iso", ConvertOptions())
    assert (tmp_path / "out.iso").read_bytes() == iso.read_bytes()
    assert files(tmp_path) == {"tree", "disc.iso", "out.iso"}


def test_no_disk_no_volume_no_format(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="no ISO 9660 volume, so it cannot be written as an ISO") as caught:
        convert(plain, tmp_path / "out.iso", ConvertOptions())
    assert caught.value.file == str(plain) and caught.value.hint == "name another suffix or -O raw"
    begun = tmp_path / "begun.raw"
    begun.write_bytes(bytes(16 * 2048) + b"\1CD001\1" + bytes(100_000))
    with pytest.raises(UnsupportedError, match=r"no ISO 9660 volume \(logical blocks of 0 bytes") as caught:
        convert(begun, tmp_path / "out.iso", ConvertOptions(opening=Opening(format="raw")))
    assert caught.value.file == str(begun)
    begun.unlink()
    with pytest.raises(UsageError, match="suffix"):
        convert(plain, tmp_path / "out", ConvertOptions())
    with pytest.raises(FileError, match="no such folder"):
        convert(plain, tmp_path / "none" / "out.raw", ConvertOptions())
    assert files(tmp_path) == {"plain.raw"}


def test_archives_are_no_disks(tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("file", "text")
    for name in ("raw", "qcow2"):
        with pytest.raises(UnsupportedError, match="no disk"):
            convert(tmp_path / "a.zip", tmp_path / "out", ConvertOptions(format=name))
    with pytest.raises(UsageError, match="cannot be made"):
        convert(tmp_path / "a.zip", tmp_path / "out", ConvertOptions(format="zip"))
    assert files(tmp_path) == {"a.zip"}


@pytest.mark.parametrize("taken", ["out.qcow2", "out.qcow2.vmgraft", "disk.raw"])
def test_nothing_is_overwritten(disk: Path, tmp_path: Path, taken: str) -> None:
    path = tmp_path / taken
    if path != disk:
        path.write_bytes(b"precious")
    before = path.read_bytes()
    target = disk if path == disk else tmp_path / "out.qcow2"
    with pytest.raises(FileError, match="exists already"):
        convert(disk, target, ConvertOptions())
    assert path.read_bytes() == before


def test_other_content_than_signed_is_refused(disk: Path, tmp_path: Path) -> None:
    with disk.open("r+b") as file:
        file.seek(2 * MIB)
        file.write(b"x")
    before = files(tmp_path)
    with pytest.raises(ContentMismatchError, match="not the one that the graft was signed for"):
        convert(disk, tmp_path / "out.qcow2", ConvertOptions())
    assert files(tmp_path) == before
    done = convert(disk, tmp_path / "out.qcow2", ConvertOptions(drop_grafts=True))
    assert (done.located, done.dropped) == (None, GraftState.OK)
    with open_image(done.path) as image:
        assert image.locate().state is GraftState.NONE
        assert image.read(2 * MIB, 1) == b"x"


def test_a_portable_graft_is_bound_to_nothing(plain: Path, tmp_path: Path) -> None:
    attach(plain, [load_package(CLOCK)], [KEY], AttachOptions(binding="any"))
    with plain.open("r+b") as file:
        file.seek(2 * MIB)
        file.write(b"x")
    convert(plain, tmp_path / "out.qcow2", ConvertOptions())
    assert verifies(tmp_path / "out.qcow2")


def test_a_damaged_graft_is_not_carried_along(disk: Path, tmp_path: Path) -> None:
    with open_image(disk) as image:
        locator = image.locate().locator
    assert locator is not None
    with disk.open("r+b") as file:
        file.seek(locator.record_offset + locator.record_size - 1)
        file.write(b"\xff")
    before = files(tmp_path)
    with pytest.raises(GraftFormatError, match="not intact") as caught:
        convert(disk, tmp_path / "out.qcow2", ConvertOptions())
    assert "--drop-grafts" in str(caught.value.hint)
    assert files(tmp_path) == before
    done = convert(disk, tmp_path / "out.qcow2", ConvertOptions(drop_grafts=True))
    assert done.dropped is GraftState.OVERWRITTEN


def test_no_room_leaves_nothing_behind(disk: Path, tmp_path: Path) -> None:
    before = files(tmp_path)
    options = ConvertOptions(placement=Placement.INLINE, write=WriteOptions(cluster_size=512))
    with pytest.raises(NoRoomError) as caught:
        convert(disk, tmp_path / "out.qcow2", options)
    assert ".vmgraft-" not in str(caught.value)
    assert files(tmp_path) == before


def test_content_that_looks_like_a_graft_is_refused_by_flat_formats(disk: Path, tmp_path: Path) -> None:
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", disk, tmp_path / "nested.qcow2"], check=True)
    with pytest.raises(UnsupportedError, match="looks like a grafted raw image"):
        convert(tmp_path / "nested.qcow2", tmp_path / "out.raw", ConvertOptions())
    convert(tmp_path / "nested.qcow2", tmp_path / "out.vdi", ConvertOptions())


def test_a_guest_cannot_pass_its_disk_off_as_a_container(disk: Path, tmp_path: Path) -> None:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "inner.qcow2", "1M"], check=True)
    (tmp_path / "outer.raw").write_bytes((tmp_path / "inner.qcow2").read_bytes().ljust(MIB, b"\0"))
    source = tmp_path / "outer.raw"
    opening = Opening(format="raw")
    done = convert(source, tmp_path / "out.raw", ConvertOptions(opening=opening))
    assert "taken for something else (qcow2)" in done.warnings[0]
    assert (tmp_path / "out.raw").read_bytes() == source.read_bytes()
    done = convert(source, tmp_path / "out.qcow2", ConvertOptions(opening=opening))
    assert not done.warnings


def test_backing_files_are_merged_in(plain: Path, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    top = tmp_path / "top.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", plain.name, top], check=True)
    subprocess.run(["qemu-io", "-c", "write -P 7 2M 64k", top], check=True, capture_output=True)
    attach(top, [load_package(CLOCK)], [KEY], AttachOptions())
    convert(top, tmp_path / "out.vmdk", ConvertOptions())
    assert verifies(tmp_path / "out.vmdk")
    with open_image(tmp_path / "out.vmdk") as image:
        assert image.backing_chain() == ()
    subprocess.run(["qemu-img", "compare", "-q", "-F", "vmdk", top, tmp_path / "out.vmdk"], check=True)
    moved = plain.rename(tmp_path / "base" / plain.name)
    with pytest.raises(FileError, match=moved.name):
        convert(top, tmp_path / "no.vmdk", ConvertOptions())


def test_a_source_in_use_is_refused_and_kept_from_writers(disk: Path, tmp_path: Path) -> None:
    write_open = ["qemu-io", "-f", "raw", disk]
    with subprocess.Popen(write_open, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdin is not None
        assert writer.stdout is not None
        writer.stdin.write("read 0 512\n")
        writer.stdin.flush()
        assert "read 512/512" in writer.stdout.readline()
        with pytest.raises(ImageInUseError, match="another process writes"):
            convert(disk, tmp_path / "out.qcow2", ConvertOptions())
        writer.stdin.close()
    said = []

    def try_to_write(done: int, total: int) -> None:
        if not said:
            answer = subprocess.run([*write_open, "-c", "write 0 512"], check=False, capture_output=True, text=True)
            said.append(answer.stderr)
            with pytest.raises(ImageInUseError):
                detach(disk)

    convert(disk, tmp_path / "out.qcow2", ConvertOptions(), try_to_write)
    assert "lock" in said[0]
    fd = os.open(disk, os.O_RDONLY)
    with locks.writers_kept_out(fd, file=disk):  # two readers do not mind each other
        convert(disk, tmp_path / "out.vdi", ConvertOptions())
    os.close(fd)
    detach(disk)


def test_what_reads_back_differently_gets_no_name(disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files(tmp_path)
    attach_sections = convert_module.attach_sections

    def damaging(path: Path, *args: object, **kwargs: object) -> object:
        located = attach_sections(path, *args, **kwargs)
        subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 1 0 512", path], check=True, capture_output=True)
        return located

    monkeypatch.setattr(convert_module, "attach_sections", damaging)
    with pytest.raises(FileError, match="content of the new image reads back differently") as caught:
        convert(disk, tmp_path / "out.qcow2", ConvertOptions())
    assert caught.value.file == str(tmp_path / "out.qcow2")
    assert files(tmp_path) == before


def test_permissions_are_the_sources(disk: Path, tmp_path: Path) -> None:
    for mode, wanted in ((0o600, 0o600), (0o640, 0o640), (0o444, 0o644)):
        disk.chmod(mode)
        out = tmp_path / f"{mode:o}.qcow2"
        convert(disk, out, ConvertOptions())
        assert out.stat().st_mode & 0o777 == wanted


def test_progress_covers_writing_and_reading_back(disk: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    convert(disk, tmp_path / "out.qcow2", ConvertOptions(), lambda done, total: calls.append((done, total)))
    total = 2 * (5 * MIB + 3 * 512)
    assert {call[1] for call in calls} == {total}
    assert calls == sorted(calls)
    assert calls[-1] == (total, total)
    assert (total // 2, total) in calls


def test_an_interrupt_takes_everything_back(disk: Path, tmp_path: Path) -> None:
    before = files(tmp_path)
    for moment in (0.0, 0.5, 0.9):

        def stop(done: int, total: int, moment: float = moment) -> None:
            if done >= moment * total:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            convert(disk, tmp_path / "out.qcow2", ConvertOptions(), stop)
        assert files(tmp_path) == before


def die_after(count: int, action) -> bool:
    """Run ``action`` in a child that is killed after its operation number ``count``; say whether it was."""
    child = os.fork()
    if child == 0:
        seen = 0

        def observer(_operation: Operation) -> None:
            nonlocal seen
            seen += 1
            if seen == count:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            with observing(observer):
                action()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("placement", [Placement.INLINE, Placement.SIDECAR])
def test_kill_at_every_operation(disk: Path, tmp_path: Path, placement: Placement) -> None:
    out, source = tmp_path / "out.qcow2", disk.read_bytes()
    before, named = files(tmp_path), 0
    for count in range(1, 200):
        killed = die_after(count, lambda: convert(disk, out, ConvertOptions(placement=placement)))
        new = files(tmp_path) - before
        assert all(name.startswith((".vmgraft-", "out.qcow2")) for name in new)
        if out.name in new:
            named += 1
            assert verifies(out)
        elif named:
            raise AssertionError("a name was taken back")
        for name in new:
            (tmp_path / name).unlink()
        if not killed:
            break
    else:
        raise AssertionError("convert never came to its end")
    assert named >= 1
    assert count > 10
    assert disk.read_bytes() == source
