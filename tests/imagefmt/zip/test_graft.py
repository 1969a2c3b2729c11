"""Attach and detach: the archive comes back, every program reads on, every state is told, no crash hurts."""

import shutil
import stat
import subprocess
import zipfile

import pytest
from imagefmt_helpers import (
    attach,
    content_of,
    flip,
    operations_of,
    problem_of,
    run_and_die,
    sample_sections,
    state_of,
    tool,
)
from zip_testkit import KINDS, archive, by_hand, many, noise

from vmgraft.errors import FileError, GraftFormatError, ImageInUseError, UsageError
from vmgraft.imagefmt.commit import Writer
from vmgraft.imagefmt.contract import GraftState, Placement
from vmgraft.imagefmt.graft import attach_sections, detach_image, open_graft, open_image
from vmgraft.imagefmt.record import Section, SectionKind
from vmgraft.imagefmt.sidecar import sidecar_path

INLINE, SIDECAR = Placement.INLINE, Placement.SIDECAR
LARGE = [*sample_sections(), Section(SectionKind.FILES, noise(300_000))]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "a.jar"
    path.write_bytes(archive())
    return path


def is_grafted(path, pristine):
    return state_of(path) is GraftState.OK and problem_of(path) is None and content_of(path) == pristine


@pytest.mark.parametrize("placement", [INLINE, SIDECAR])
@pytest.mark.parametrize("kind", KINDS)
def test_attach_and_detach(path, kind, placement):
    path.write_bytes(KINDS[kind])
    located = attach(path, placement)
    assert located.locator.placement is placement
    assert sidecar_path(path).exists() is (placement is SIDECAR)
    assert is_grafted(path, KINDS[kind])
    assert path.read_bytes().startswith(KINDS[kind])  # nothing of the archive is touched
    detach_image(path)
    assert path.read_bytes() == KINDS[kind]
    assert not sidecar_path(path).exists()


@pytest.mark.parametrize("sections", [sample_sections(), LARGE], ids=["small", "large"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_program_reads_on(tmp_path, path, kind, sections):
    """What a program says of the archive before, it says after; the record may be longer than what it searches."""
    path.write_bytes(KINDS[kind])
    before = zipfile.ZipFile(path).namelist() if kind != "zip64, extensible" else None
    programs = [
        ("unzip", "-tq", path),
        ("zipinfo", "-1", path),
        ("bsdtar", "-tf", path),
        ("7z", "t", path),
        ("jar", "tf", path),
    ]
    # Java's start is slow; and it searches for the end as the others do.
    chosen = programs if kind in ("plain", "zip64", "launcher, not counted") else programs[:4]
    answers = [tool(*command, check=False) for command in chosen]
    attach(path, INLINE, sections)
    for command, answer in zip(chosen, answers, strict=True):
        again = tool(*command, check=False)
        assert again.returncode == answer.returncode, (command, again.stdout, again.stderr)
        if command[0] in ("zipinfo", "bsdtar", "jar"):
            assert again.stdout == answer.stdout
    assert answers[0].returncode in (0, 1)  # 1: unzip notes bytes before the first entry
    if before is not None:
        with zipfile.ZipFile(path) as outside:
            assert outside.namelist() == before
            assert outside.testzip() is None


def test_a_stream_of_it_is_read(path):
    attach(path, INLINE)
    with path.open("rb") as stream:
        done = subprocess.run(["bsdtar", "-tf", "-"], stdin=stream, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["a.txt", "b/c.bin"]


def test_the_layout(path):
    """docs/zip.md, independently of the package."""
    content = archive()
    attach(path, INLINE, LARGE)
    data = path.read_bytes()
    start = content.rfind(b"PK\1\2", 0, content.rfind(b"PK\1\2"))  # two entries
    tail = len(content) - start
    directory = int.from_bytes(data[-6:-2], "little")
    assert directory == len(data) - tail
    locator = data[directory - 128 : directory]
    assert locator.startswith(b"VMGRAFT\0")
    record = int.from_bytes(locator[16:24], "little")
    size = int.from_bytes(locator[24:32], "little")
    assert record == -(-len(content) // 512) * 512
    assert data[record : record + 8] == b"VMGRAFT\0"
    assert int.from_bytes(locator[96:104], "little") == len(content)
    assert (directory - 128) % 512 == 0
    assert (directory - 128) // 4096 == (len(data) - 1) // 4096  # one page: one write cannot be cut by a signal
    assert not any(data[len(content) : record])
    assert not any(data[record + size : directory - 128])
    assert data[directory:-6] == content[start:-6]


def test_a_file_in_use(path):
    with open_image(path, writable=True), pytest.raises(ImageInUseError):
        attach(path, INLINE)


def test_mode_and_owner_stay(path):
    path.chmod(0o750)
    inode = path.stat().st_ino
    attach(path, INLINE)
    assert stat.S_IMODE(path.stat().st_mode) == 0o750
    assert path.stat().st_ino == inode


def test_a_graft_in_an_entry_is_not_the_outer_archives(tmp_path, path):
    attach(path, INLINE)
    outer = tmp_path / "outer.zip"
    outer.write_bytes(archive({"first": b"x", "inner.jar": path.read_bytes()}, method=0))
    assert state_of(outer) is GraftState.NONE
    attach(outer, INLINE)
    detach_image(outer)
    with zipfile.ZipFile(outer) as opened:
        assert opened.read("inner.jar") == path.read_bytes()


# --- other programs change it --------------------------------------------------------------------------------------

#: Programs that write a new file: what they leave is what they make of the archive without a graft.
REWRITES = {
    "zip adds": ("zip", "-q", "{}", "extra.txt"),
    "zip deletes": ("zip", "-q", "-d", "{}", "a.txt"),
    "zip -A": ("zip", "-q", "-A", "{}"),
    "7z adds": ("7z", "a", "-tzip", "{}", "extra.txt"),
    "jar uf": ("jar", "uf", "{}", "extra.txt"),
}


@pytest.mark.parametrize("operation", REWRITES)
def test_programs_that_write_a_new_archive_drop_the_graft(tmp_path, path, monkeypatch, operation):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "extra.txt").write_text("extra")
    plain = tmp_path / "plain.jar"
    shutil.copy(path, plain)
    attach(path, INLINE)
    for target in (path, plain):
        tool(*(part.format(target) for part in REWRITES[operation]))
    assert state_of(path) is GraftState.NONE
    with zipfile.ZipFile(path) as one, zipfile.ZipFile(plain) as other:
        assert sorted(one.namelist()) == sorted(other.namelist())


def test_a_program_that_appends_leaves_an_orphan(path):
    """Python's zipfile writes over the second directory and puts a new one behind the new entry."""
    attach(path, INLINE)
    with zipfile.ZipFile(path, "a") as opened:
        opened.writestr("new.txt", noise(5000))
    changed = path.read_bytes()
    with open_image(path) as image:
        assert image.locate().state is GraftState.ORPHANED
        assert "added to the archive" in image.locate().detail
        assert image.read(0, 1 << 20) == changed
    with pytest.raises(GraftFormatError, match="added to the archive") as caught:
        detach_image(path)
    assert caught.value.hint
    assert path.read_bytes() == changed
    attach(path, INLINE)  # on top of it, as on any archive
    assert is_grafted(path, changed)
    detach_image(path)
    assert path.read_bytes() == changed


def test_a_changed_comment_is_not_lost_in_silence(path):
    attach(path, INLINE)
    with zipfile.ZipFile(path, "a") as opened:
        opened.comment = b"new comment"
    changed = path.read_bytes()
    assert state_of(path) is GraftState.DAMAGED
    with pytest.raises(UsageError, match="comment"):
        detach_image(path)
    assert path.read_bytes() == changed


# --- states --------------------------------------------------------------------------------------------------------


def test_a_file_that_grew(path):
    content = archive()
    attach(path, INLINE)
    with path.open("ab") as file:
        file.write(b"appended")
    assert state_of(path) is GraftState.GROWN
    assert content_of(path) == content
    with pytest.raises(UsageError, match="lost"):
        detach_image(path)


def test_a_file_that_was_cut(path):
    content = archive()
    attach(path, INLINE, LARGE)
    whole = path.read_bytes()
    for size in (len(whole) - 1, len(whole) - 30):
        path.write_bytes(whole[:size])
        assert state_of(path) is GraftState.CUT
        assert content_of(path) == content
        assert problem_of(path)
        detach_image(path)
        assert path.read_bytes() == content
    path.write_bytes(whole[: len(whole) - 4096])  # the locator is gone
    with pytest.raises(FileError, match="was cut"):
        state_of(path)


@pytest.mark.parametrize(
    ("place", "state"),
    [
        ("record", GraftState.OVERWRITTEN),
        ("padding", GraftState.DAMAGED),
        ("locator", GraftState.DAMAGED),
        ("directory", GraftState.DAMAGED),
        ("end record", GraftState.DAMAGED),
        ("original directory", GraftState.DAMAGED),
        ("original end", GraftState.DAMAGED),
    ],
)
def test_damage(path, place, state):
    content = archive()
    directory = content.rfind(b"PK\1\2")
    attach(path, INLINE)
    size = path.stat().st_size
    with open_image(path) as image:
        located = image.locate()
    offsets = {
        "record": located.locator.record_offset + located.locator.record_size - 1,
        "padding": located.locator.record_offset - 1,
        "locator": located.locator_offset + 40,
        "directory": size - 60,
        "end record": size - 2,
        "original directory": directory + 10,
        "original end": len(content) - 1,
    }
    flip(path, offsets[place])
    assert state_of(path) is state
    assert problem_of(path)
    damaged = path.read_bytes()
    if place in ("record", "padding"):
        detach_image(path)
        assert path.read_bytes() == content
    elif place != "end record":
        with pytest.raises((GraftFormatError, UsageError)):
            detach_image(path)
        assert path.read_bytes() == damaged


def test_lost_swapped_and_stale_sidecars(tmp_path, path):
    content = archive()
    attach(path, SIDECAR)
    own = sidecar_path(path).read_bytes()
    other = tmp_path / "other.jar"
    other.write_bytes(content)
    attach_sections(other, sample_sections(), placement=SIDECAR, tree_digest=bytes(32))
    sidecar_path(path).write_bytes(sidecar_path(other).read_bytes())
    assert state_of(path) is GraftState.SWAPPED
    detach_image(other)
    attach(other, SIDECAR, sample_sections(640))
    sidecar_path(path).write_bytes(sidecar_path(other).read_bytes())
    assert state_of(path) is GraftState.STALE
    sidecar_path(path).write_bytes(own[:-1])
    assert state_of(path) is GraftState.CUT
    sidecar_path(path).unlink()
    assert state_of(path) is GraftState.NO_RECORD
    detach_image(path)
    assert path.read_bytes() == content


def test_a_sidecar_left_behind(path):
    content = archive()
    attach(path, SIDECAR)
    path.write_bytes(content)
    assert state_of(path) is GraftState.ORPHANED
    detach_image(path)
    assert not sidecar_path(path).exists()
    assert path.read_bytes() == content


# --- crashes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", [INLINE, SIDECAR])
@pytest.mark.parametrize("kind", ["plain", "zip64", "launcher, not counted"])
def test_kill_during_attach_and_detach(path, kind, placement):
    content, names = KINDS[kind], None
    for action in ("attach", "detach"):
        for after in range(1, 60):
            path.write_bytes(content)
            names = zipfile.ZipFile(path).namelist()
            sidecar_path(path).unlink(missing_ok=True)
            if action == "detach":
                attach(path, placement, LARGE)
            run = (lambda: attach(path, placement, LARGE)) if action == "attach" else (lambda: detach_image(path))
            killed = run_and_die(run, after)
            assert zipfile.ZipFile(path).namelist() == names  # other programs read it at every moment
            assert content_of(path) == content
            assert state_of(path) in (GraftState.NONE, GraftState.OK, GraftState.CUT, GraftState.ORPHANED)
            if state_of(path) is GraftState.CUT:
                assert problem_of(path)
                left = path.read_bytes()
                with open_image(path, writable=True) as image:
                    assert image.recovered
                assert path.read_bytes() == content
                path.write_bytes(left)
            if state_of(path) is not GraftState.OK:
                attach(path, placement, LARGE)
            assert is_grafted(path, content)
            detach_image(path)
            assert path.read_bytes() == content
            assert not sidecar_path(path).exists()
            if not killed:
                break
        else:
            raise AssertionError(f"{action} never came to its end")


@pytest.mark.parametrize("content", [archive(), many(2000)], ids=["short tail", "long tail"])
def test_power_loss_at_every_step(path, content):
    """The file ends inside the first write, or any sectors of the later ones are lost."""
    path.write_bytes(content)
    operations = [item for item in operations_of(lambda: attach(path, INLINE, LARGE)) if item.file == path]
    assert [item.name for item in operations if item.name != "write"] == ["sync"] * 3
    final, flushed, epoch, seen = path.read_bytes(), content, [], 0
    for item in operations:
        if item.name == "write":
            epoch.append(item)
            continue
        whole = replay(flushed, epoch)
        for torn in torn_states(flushed, epoch, whole):
            path.write_bytes(torn)
            assert state_of(path) is (GraftState.OK if torn == final else GraftState.CUT)
            assert content_of(path) == content
            if torn != final:
                assert problem_of(path)
                attach(path, INLINE)
            assert is_grafted(path, content)
            detach_image(path)
            assert path.read_bytes() == content
            seen += 1
        flushed, epoch = whole, []
    assert flushed == final
    assert seen > 12


def replay(base, operations):
    data = bytearray(base)
    for item in operations:
        data[len(data) :] = bytes(max(0, item.offset - len(data)))
        data[item.offset : item.offset + len(item.data)] = item.data
    return bytes(data)


def torn_states(base, epoch, whole):
    """Some of the files that a group of writes can leave behind when it reaches the disk in part."""
    start = epoch[0].offset
    if len(base) < len(whole):  # the write that gives the file its size: cut at a sector
        yield from (
            whole[:size] for size in range(start + 512, len(whole), max(512, (len(whole) - start) // 4096 * 512))
        )
        return
    sectors = range(start, max(item.offset + len(item.data) for item in epoch), 512)
    for at in sectors[:: max(1, len(sectors) // 6)]:
        for kept, other in ((base, whole), (whole, base)):
            yield kept[:at] + other[at : at + 512] + kept[at + 512 :]


@pytest.mark.parametrize(("placement", "writes"), [(INLINE, 3), (SIDECAR, 3)])
def test_no_space_left(path, monkeypatch, placement, writes):
    """ENOSPC at every write, of the sidecar and of the archive: both are as before."""
    content, real = archive(), Writer.write
    for fail_at in range(1, 10):
        calls = []

        def write(self, offset, data, *, fail_at=fail_at, calls=calls):
            calls.append(offset)
            if len(calls) == fail_at:
                real(self, offset, data[: len(data) // 2])
                raise FileError("no space left on device", file=self.file)
            real(self, offset, data)

        monkeypatch.setattr(Writer, "write", write)
        try:
            attach(path, placement, LARGE)
        except FileError as problem:
            assert "no space" in str(problem)
            assert path.read_bytes() == content
            assert not sidecar_path(path).exists()
            continue
        finally:
            monkeypatch.setattr(Writer, "write", real)
        assert fail_at == len(calls) + 1 == writes + 1
        return
    raise AssertionError("attach never came to its end")


def test_a_write_that_is_cut_by_a_signal(path):
    """Kill inside the one write that is longer than a page: told, read, and cleared away."""
    content = many()
    path.write_bytes(content)
    operations = [item for item in operations_of(lambda: attach(path, INLINE, LARGE)) if item.name == "write"]
    first = operations[0]
    assert len(first.data) > 4096
    for size in range((first.offset // 4096 + 1) * 4096, first.offset + len(first.data), 16384):
        path.write_bytes(content.ljust(first.offset, b"\0") + first.data[: size - first.offset])
        assert state_of(path) is GraftState.CUT
        assert content_of(path) == content
        with open_image(path, writable=True) as image:
            assert image.recovered
        assert path.read_bytes() == content


def test_graft_of_the_greatest_record_is_streamed(path):
    """Memory stays small: the record is written and read in pieces."""
    large = [*sample_sections(), Section(SectionKind.FILES, noise(20 << 20, 4), compress=False)]
    attach(path, INLINE, large)
    with open_image(path) as image:
        graft = open_graft(image)
        assert graft.format_problem() is None
        assert graft.located.record.size > 20 << 20
    assert zipfile.ZipFile(path).testzip() is None
    detach_image(path)
    assert path.read_bytes() == archive()


def test_by_hand_archives_are_what_programs_read(path):
    """The test kit itself: unzip accepts what it lays out."""
    path.write_bytes(by_hand(wide=True, mixed=True, comment=b"x"))
    tool("unzip", "-tq", path)
