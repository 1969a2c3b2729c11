"""Attach and detach that end half-way: nothing lost, nothing left behind, nothing of others touched."""

import json
import os
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from vmgraft.errors import FileError, ImageInUseError, UsageError, VerificationError, VmgraftError
from vmgraft.imagefmt.contract import GraftState, Placement
from vmgraft.imagefmt.graft import open_image
from vmgraft.imagefmt.sidecar import sidecar_path
from vmgraft.signing.keys import PrivateKey, generate
from vmgraft.vendor import graft, workcopy
from vmgraft.vendor.graft import AttachOptions, attach, detach
from vmgraft.vendor.pack import load_package

CLOCK = Path(__file__).resolve().parents[2] / "examples" / "clock"
CONTENT = b"content!" * 1000


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture(scope="module")
def key() -> PrivateKey:
    return generate("ed25519")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def graft_clock(disk: Path, key: PrivateKey, **options: object) -> Path:
    return attach(disk, [load_package(CLOCK)], [key], AttachOptions(**options)).path  # type: ignore[arg-type]


# --- the output -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", [KeyboardInterrupt(), VerificationError("no"), OSError(28, "full")])
@pytest.mark.parametrize("placement", [Placement.INLINE, Placement.SIDECAR])
def test_a_failure_leaves_no_output(
    disk: Path, key: PrivateKey, monkeypatch: pytest.MonkeyPatch, problem: BaseException, placement: Placement
) -> None:
    def fail(*_args: object) -> None:
        raise problem

    monkeypatch.setattr(graft, "_verify_written", fail)
    with pytest.raises(type(problem)):
        graft_clock(disk, key, output=disk.with_name("out.img"), placement=placement)
    assert names(disk.parent) == ["disk.img"]
    with pytest.raises(type(problem)):
        graft_clock(disk, key, placement=placement)
    assert names(disk.parent) == ["disk.img"] and disk.read_bytes() == CONTENT


def test_the_output_has_its_name_only_when_it_is_verified(
    disk: Path, key: PrivateKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    real = graft._verify_written

    def look(*args: object) -> None:
        seen.append(names(disk.parent))
        real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(graft, "_verify_written", look)
    graft_clock(disk, key, output=disk.with_name("out.img"), placement=Placement.SIDECAR)
    assert not {"out.img", "out.img.vmgraft"} & set(seen[0])
    assert names(disk.parent) == ["disk.img", "out.img", "out.img.vmgraft"]


@pytest.mark.parametrize("taken", ["out.img", "out.img.vmgraft"])
def test_files_that_have_the_name_already_are_not_touched(disk: Path, key: PrivateKey, taken: str) -> None:
    precious = disk.with_name(taken)
    precious.write_bytes(b"precious")
    with pytest.raises(FileError, match="exists"):
        graft_clock(disk, key, output=disk.with_name("out.img"))
    precious.unlink()
    precious.symlink_to("nowhere")
    with pytest.raises(FileError, match="exists"):
        graft_clock(disk, key, output=disk.with_name("out.img"))
    assert precious.is_symlink() and names(disk.parent) == sorted(["disk.img", taken])


@pytest.mark.parametrize("taken", ["out.img", "out.img.vmgraft"])
def test_names_taken_in_the_meantime_are_not_touched(
    disk: Path, key: PrivateKey, monkeypatch: pytest.MonkeyPatch, taken: str
) -> None:
    monkeypatch.setattr(graft, "_verify_written", lambda *_: disk.with_name(taken).write_bytes(b"precious"))
    with pytest.raises(FileError, match=r"cannot be put in place|exists"):
        graft_clock(disk, key, output=disk.with_name("out.img"), placement=Placement.SIDECAR)
    assert disk.with_name(taken).read_bytes() == b"precious"
    assert names(disk.parent) == sorted(["disk.img", taken])


def test_file_systems_without_links(disk: Path, key: PrivateKey, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_named: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    output, other = disk.with_name("out.img"), disk.with_name("other.img")
    with monkeypatch.context() as patch:
        patch.setattr(workcopy, "copy_file", shutil.copyfile)
        patch.setattr(workcopy.os, "link", refuse)
        graft_clock(disk, key, output=output)
        patch.setattr(graft, "_verify_written", lambda *_: other.write_bytes(b"precious"))
        with pytest.raises(FileError, match="exists"):
            graft_clock(disk, key, output=other)
    assert detach(output).read_bytes() == CONTENT and other.read_bytes() == b"precious"


@pytest.mark.parametrize("placement", [Placement.INLINE, Placement.SIDECAR])
def test_symbolic_links_to_images(disk: Path, key: PrivateKey, tmp_path: Path, placement: Placement) -> None:
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / "link.img"
    link.symlink_to(disk)
    graft_clock(link, key, placement=placement)
    assert link.is_symlink() and names(link.parent) == ["link.img"]
    original = detach(link, output=tmp_path / "links" / "original.img")
    assert original.read_bytes() == CONTENT and names(link.parent) == ["link.img", "original.img"]
    detach(link)
    assert disk.read_bytes() == CONTENT and link.is_symlink()


def test_errors_name_the_output_and_not_the_temporary_file(disk: Path, key: PrivateKey) -> None:
    missing = disk.with_name("nowhere") / "out.img"
    with pytest.raises(FileError) as caught:
        graft_clock(disk, key, output=missing)
    assert caught.value.file == str(missing.parent) and caught.value.hint
    output = disk.with_name("out.img")
    with pytest.raises(VmgraftError) as again:
        detach(disk, output=output)
    assert Path(again.value.file or "") == output and ".tmp" not in str(again.value)


def test_kill_leaves_at_most_a_hidden_file(disk: Path, key: PrivateKey, tmp_path: Path) -> None:
    """SIGKILL at many moments: the output is there, whole and verified, or it is not there."""
    big = tmp_path / "big.img"
    with big.open("wb") as file:
        file.truncate(24 << 20)
        file.write(os.urandom(1 << 20))
    before = big.read_bytes()
    (tmp_path / "k.key").write_bytes(key.pem(None))
    program = [str(Path(sys.executable).with_name("vmgraft")), "attach", "big.img", str(CLOCK), "--key", "k.key"]
    for delay in (0.15, 0.3, 0.45, 0.6, 0.8):
        done = subprocess.Popen(
            [*program, "-o", "out.img"], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(delay)
        done.kill()
        done.wait()
        assert big.read_bytes() == before
        if (tmp_path / "out.img").exists():
            assert detach(tmp_path / "out.img").read_bytes() == before
            (tmp_path / "out.img").unlink()
        for path in tmp_path.glob(".vmgraft-*.tmp*"):
            path.unlink()
        assert names(tmp_path) == ["big.img", "disk.img", "k.key"]


# --- in place -------------------------------------------------------------------------------------------------------


def test_a_graft_that_cannot_be_taken_back_is_told(
    disk: Path, key: PrivateKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: object) -> None:
        raise VerificationError("it differs")

    def busy(*_args: object, **_named: object) -> None:
        raise ImageInUseError("the image is in use", hint="stop the guest")

    monkeypatch.setattr(graft, "_verify_written", fail)
    with monkeypatch.context() as patch:
        patch.setattr(graft, "detach_image", busy)
        with pytest.raises(FileError, match="it differs; and the graft could not be taken away") as caught:
            graft_clock(disk, key)
    assert caught.value.hint == "run `vmgraft detach` on it; stop the guest"
    assert detach(disk).read_bytes() == CONTENT


def test_content_that_changes_while_it_is_grafted(disk: Path, key: PrivateKey, monkeypatch: pytest.MonkeyPatch) -> None:
    real = graft.attach_sections

    def change(*args: object, **named: object) -> object:
        with disk.open("r+b") as file:
            file.write(b"CHANGED!")
        return real(*args, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(graft, "attach_sections", change)
    with pytest.raises(VerificationError, match="content"):
        graft_clock(disk, key)
    assert disk.read_bytes() == b"CHANGED!" + CONTENT[8:]


def test_the_leavings_of_a_graft_are_no_graft(disk: Path, key: PrivateKey) -> None:
    """A sidecar whose image was put back from a copy is an orphan: attach says how things stand and goes on."""
    qcow2 = disk.with_name("disk.qcow2")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(qcow2), "1M"], check=True)
    clean = qcow2.read_bytes()
    graft_clock(qcow2, key, placement=Placement.SIDECAR)
    qcow2.write_bytes(clean)
    with open_image(qcow2) as image:
        assert image.locate().state is GraftState.ORPHANED
    graft_clock(qcow2, key, placement=Placement.SIDECAR)
    with open_image(qcow2) as image:
        assert image.locate().state is GraftState.OK
    assert detach(qcow2).read_bytes() == clean and not sidecar_path(qcow2).exists()


def test_what_can_never_be_signed_is_refused_before_the_image_is_read(
    disk: Path, key: PrivateKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graft, "open_image", None)
    package = load_package(CLOCK)
    with pytest.raises(UsageError, match="past"):
        graft_clock(disk, key, expires=datetime.now(UTC) - timedelta(seconds=1))
    with pytest.raises(UsageError, match="clock is given twice"):
        attach(disk, [package, package], [key], AttachOptions())
    with pytest.raises(UsageError, match="key is given twice"):
        attach(disk, [package], [key, key], AttachOptions())
    with pytest.raises(UsageError, match="at least one"):
        attach(disk, [], [key], AttachOptions())


# --- extension folders ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "x = " + "[" * 5000,
        "securityVersion = " + "1" * 5000,
        "capabilities = [1979-05-27, 1979-05-27]",
        "securityVersion = 1979-05-27T07:32:00Z",
        "config = 25:99:99",
        ".".join("a" * 3000) + " = 1",
        "securityVersion = nan",
        "capabilities = [[[]], {}]",
    ],
    ids=lambda line: line[:20],
)
def test_hostile_manifests_are_usage_errors(tmp_path: Path, line: str) -> None:
    folder = Path(shutil.copytree(CLOCK, tmp_path / "clock"))
    name = line.partition(" ")[0]
    kept = [old for old in (folder / "manifest.toml").read_text().splitlines() if not old.startswith(name + " ")]
    (folder / "manifest.toml").write_text("\n".join([line, *kept]))
    with pytest.raises(UsageError) as caught:
        load_package(folder)
    assert caught.value.file == str(folder / "manifest.toml")


def test_files_of_a_folder_that_are_links_or_missing(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(CLOCK, tmp_path / "clock"))
    (folder / "module.wasm").rename(tmp_path / "elsewhere.wasm")
    with pytest.raises(FileError, match="not there") as missing:
        load_package(folder)
    assert missing.value.hint == "run `make` there"
    (folder / "module.wasm").symlink_to(tmp_path / "elsewhere.wasm")
    with pytest.raises(FileError, match="symbolic link"):
        load_package(folder)
    (folder / "manifest.toml").rename(tmp_path / "elsewhere.toml")
    (folder / "manifest.toml").symlink_to(tmp_path / "elsewhere.toml")
    with pytest.raises(FileError, match="symbolic link"):
        load_package(folder)


def test_recipes_name_a_size_that_qemu_takes(tmp_path: Path, key: PrivateKey) -> None:
    """QEMU wants whole sectors; the file behind an odd size is followed by zeros, which is what the guest sees."""
    odd = tmp_path / "odd.img"
    odd.write_bytes(os.urandom(5000))
    shutil.copy(odd, tmp_path / "before.img")
    (tmp_path / "k.key").write_bytes(key.pem(None))
    done = subprocess.run(
        [str(Path(sys.executable).with_name("vmgraft")), "attach", "odd.img", str(CLOCK), "--key", "k.key"],
        cwd=tmp_path, check=True, capture_output=True, text=True,
    )  # fmt: skip
    recipe = next(line for line in done.stdout.splitlines() if line.strip().startswith("qemu-img ")).split()[-1]
    before = "driver=raw,file.driver=file,file.filename=before.img"
    command = ["qemu-img", "compare", "--image-opts", recipe, before]
    compared = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True)
    assert compared.returncode == 0, compared.stderr
    info = subprocess.run(
        ["qemu-img", "info", "--output=json", "--image-opts", recipe], cwd=tmp_path, check=True, capture_output=True
    )
    assert json.loads(info.stdout)["virtual-size"] == 5120
