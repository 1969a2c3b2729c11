"""Volumes read, laid over one another and written as one; judged by what others make and read."""

import json
import os
import random
import subprocess
import sys
from contextlib import closing
from datetime import UTC, datetime

import pytest

from vmgraft.errors import MalformedImageError, UnsupportedError, UsageError, VmgraftError
from vmgraft.imagefmt.blob import BytesBlob
from vmgraft.imagefmt.contract import Opening
from vmgraft.signing.keys import generate
from vmgraft.signing.manifest import parse_manifest
from vmgraft.signing.policytools import format_policy, init_policy
from vmgraft.signing.state import Ran, RollbackState, create_state
from vmgraft.vendor.graft import AttachOptions, attach
from vmgraft.vendor.pack import load_package
from vmgraft.vmmhost.supplements import isotree
from vmgraft.vmmhost.supplements.iso import Folder, Link, VolumeFile, build_volume
from vmgraft.vmmhost.supplements.isotree import _Reader, _Record, has_volume, read_tree
from vmgraft.vmmhost.supplements.media import ReadOnlyDisk
from vmgraft.vmmhost.supplements.present import EPOCH
from vmgraft.vmmhost.supplements.rockridge import Attributes
from vmgraft.vmmhost.supplements.union import merge

LONG = "n" * 200 + ".txt"


def run(*command, check=True):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done


def plant(folder):
    """Files whose names and places are trouble."""
    files = {
        "plain.txt": b"plain", "empty": b"", LONG: b"long", "UPPER.TXT": b"upper", "two.dots.tar": b"dots",
        "bin/tool": b"#!/bin/sh\n", "1/2/3/4/5/6/7/8/9/10/deep": b"deep" * 3000, "1/2/3/4/5/6/7/8/other": b"other",
        "grün": b"utf-8",
    }  # fmt: skip
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    (folder / "bin" / "tool").chmod(0o755)
    (folder / "none").mkdir()
    (folder / "link").symlink_to("../" * 60 + "etc/" + "x" * 200 + "/y")
    (folder / "abs").symlink_to("/etc/./passwd")
    return folder


def disk_of(path):
    return ReadOnlyDisk(BytesBlob(path.read_bytes()))


def flat(tree):
    """A tree as (path → bytes, link or None)."""
    return {
        path: node.data.read(0, node.data.size) if isinstance(node, VolumeFile) else getattr(node, "target", None)
        for path, node in tree.items()
    }


def on_disk(folder):
    found = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        data = path.read_bytes() if path.is_file() and not path.is_symlink() else None
        found[name] = os.readlink(path) if path.is_symlink() else data  # noqa: PTH115 - Path tidies targets
    return found


# --- reading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "maker",
    [
        ("xorriso", "-as", "mkisofs", "-quiet", "-o"),
        ("xorriso", "-as", "mkisofs", "-quiet", "-J", "-joliet-long", "-o"),
        ("genisoimage", "-quiet", "-R", "-allow-limited-size", "-o"),
        ("genisoimage", "-quiet", "-R", "-J", "-joliet-long", "-o"),
    ],
    ids=["xorriso", "xorriso-joliet", "genisoimage", "genisoimage-joliet"],
)
def test_volumes_of_other_makers_read_as_their_files(maker, tmp_path):
    source = plant(tmp_path / "source")
    run(*maker, tmp_path / "made.iso", source)
    tree = read_tree(disk_of(tmp_path / "made.iso"), name="made.iso")
    found = flat(tree)
    assert found == on_disk(source)
    assert tree["bin/tool"].executable and not tree["plain.txt"].executable


def test_joliet_names_where_there_are_no_others(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "A longer name, ünd more.text").write_bytes(b"1")
    run("genisoimage", "-quiet", "-J", "-o", tmp_path / "made.iso", source)
    assert flat(read_tree(disk_of(tmp_path / "made.iso"), name="x")) == {"A longer name, ünd more.text": b"1"}


def test_plain_names_where_there_are_no_others(tmp_path):
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "sub" / "readme.txt").write_bytes(b"1")
    (source / "noext").write_bytes(b"2")
    run("genisoimage", "-quiet", "-o", tmp_path / "made.iso", source)
    assert flat(read_tree(disk_of(tmp_path / "made.iso"), name="x")) == {
        "SUB": None, "SUB/README.TXT": b"1", "NOEXT": b"2",
    }  # fmt: skip


def test_our_own_volumes_come_back(tmp_path):
    tree = {
        "a/b": VolumeFile(BytesBlob(b"x" * 5000), executable=True), LONG: VolumeFile(BytesBlob(b"")),
        "l": Link("a/b"), "e": Folder(), "/".join("abcdefghijkl"): VolumeFile(BytesBlob(b"deep")),
    }  # fmt: skip
    blob = build_volume("OWN", {path: node for path, node in tree.items() if path != "a/b"}, created=EPOCH)
    found = read_tree(ReadOnlyDisk(blob), name="own")
    assert flat(found)[LONG] == b"" and flat(found)["l"] == "a/b"
    assert flat(found)["/".join("abcdefghijkl")] == b"deep"
    again = build_volume("OWN", found, created=EPOCH)
    assert again.sha256 == blob.sha256


def test_a_file_of_several_extents(tmp_path):
    """Two records, the first with the multi-extent flag, as writers cut files of more than 4 GiB."""
    files = {"a": VolumeFile(BytesBlob(b"A" * 2048)), "b": VolumeFile(BytesBlob(b"B" * 9))}
    blob = bytearray(build_volume("TWO", files, created=EPOCH).read_all())
    first = blob.index(b"A.;1") - 33
    second = blob.index(b"B.;1") - 33
    blob[first + 25] |= 0x80
    tree = read_tree(ReadOnlyDisk(BytesBlob(bytes(blob))), name="two")
    assert flat(tree) == {"b": b"A" * 2048 + b"B" * 9}
    assert tree["b"].data.read(2040, 12) == b"A" * 8 + b"B" * 4
    blob[second + 25] |= 0x80
    with pytest.raises(MalformedImageError, match="no last part"):
        read_tree(ReadOnlyDisk(BytesBlob(bytes(blob))), name="two")


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    source = plant(folder / "source")
    run("genisoimage", "-quiet", "-R", "-J", "-joliet-long", "-allow-limited-size", "-o", folder / "made.iso", source)
    return (folder / "made.iso").read_bytes()


def spoil(sound, offset, data):
    return ReadOnlyDisk(BytesBlob(sound[:offset] + data + sound[offset + len(data) :]))


def test_what_is_no_volume(sound):
    assert has_volume(ReadOnlyDisk(BytesBlob(sound)))
    assert not has_volume(ReadOnlyDisk(BytesBlob(bytes(100))))
    assert not has_volume(ReadOnlyDisk(BytesBlob(bytes(1 << 20))))
    for data in (bytes(1 << 20), sound[:40000]):
        with pytest.raises(MalformedImageError):
            read_tree(ReadOnlyDisk(BytesBlob(data)), name="x")


def test_a_folder_inside_itself_is_refused(sound):
    root = int.from_bytes(sound[32768 + 158 : 32768 + 162], "little") * 2048
    child = sound.index(b"BIN", root) - 33
    with pytest.raises(MalformedImageError, match="inside itself"):
        read_tree(spoil(sound, child + 2, sound[32768 + 158 : 32768 + 162]), name="x")


@pytest.mark.parametrize(
    ("at", "value", "error", "words"),
    [
        (2, b"\xff\xff\xff\x7f", MalformedImageError, "not inside the disk"),
        (10, b"\xff\xff\xff\xff", MalformedImageError, "not inside the disk"),
        (26, b"\x01", UnsupportedError, "interleaved"),
        (0, b"\x22", MalformedImageError, "record that is too short|Rock Ridge"),
        (32, b"\xff", MalformedImageError, "too short"),
    ],
)
def test_a_hostile_record(sound, at, value, error, words):
    root = int.from_bytes(sound[32768 + 158 : 32768 + 162], "little") * 2048
    record = sound.index(b"PLAIN.TXT;1", root) - 33
    with pytest.raises(error, match=words):
        read_tree(spoil(sound, record + at, value), name="x")


@pytest.mark.parametrize(
    ("old", "new", "error", "words"),
    [
        (b"plain.txt", b"plain/txt", MalformedImageError, "no name of a file"),
        (b"plain.txt", b"plain\0txt", MalformedImageError, "no name of a file"),
        (b"plain.txt", b"UPPER.TXT", MalformedImageError, "stands twice"),
    ],
)
def test_hostile_names(sound, old, new, error, words):
    with pytest.raises(error, match=words):
        read_tree(ReadOnlyDisk(BytesBlob(sound.replace(old, new))), name="x")


def test_devices_are_not_carried_along(sound, tmp_path):
    place = sound.index(b"PX", sound.index(b"PLAIN.TXT;1"))
    mode = (0o060644).to_bytes(4, "little")
    with pytest.raises(UnsupportedError, match="no regular file"):
        read_tree(spoil(sound, place + 4, mode), name="x")


def test_whatever_is_spoilt_ends_in_one_error_of_ours(sound):
    rng, refused = random.Random(11), 0
    head = len(sound) - 40000
    for _ in range(400):
        data = bytearray(sound)
        for _ in range(rng.randint(1, 6)):
            data[rng.randrange(32768, head if rng.random() < 0.8 else len(sound))] = rng.choice([0, 1, 0x7F, 0x80, 255])
        try:
            for node in read_tree(ReadOnlyDisk(BytesBlob(bytes(data))), name="x").values():
                if isinstance(node, VolumeFile):
                    node.data.read(0, min(node.data.size, 4096))
        except VmgraftError:
            refused += 1
    assert 0 < refused < 400


def test_a_volume_that_shows_its_bytes_again_and_again_is_refused(sound):
    """Small on its disk, and without end for whoever copies its files."""
    for copies in (16, 17):
        disk = ReadOnlyDisk(BytesBlob(sound))
        leaf = _Reader(disk, "x")
        part = _Record(0, disk.size, 0, b"x", Attributes())
        if copies == 17:
            with pytest.raises(MalformedImageError, match="16 times as many bytes"):
                leaf._leaf("x", part, ((0, disk.size),) * copies)
        else:
            assert leaf._leaf("x", part, ((0, disk.size),) * copies).data.size == 16 * disk.size


def test_a_file_in_more_parts_than_files_have_is_refused(sound, monkeypatch):
    root = int.from_bytes(sound[32768 + 158 : 32768 + 162], "little") * 2048
    record = sound.index(b"PLAIN.TXT;1", root) - 33
    monkeypatch.setattr(isotree, "_MAX_PARTS", 1)
    read_tree(ReadOnlyDisk(BytesBlob(sound)), name="x")
    with pytest.raises(MalformedImageError, match="more than 1 parts"):
        read_tree(spoil(sound, record + 25, b"\x80"), name="x")


def test_bounds_of_what_is_read(sound, monkeypatch):
    disk = ReadOnlyDisk(BytesBlob(sound))
    for name, limit, error, words in (
        ("_MAX_PATHS", 50, UnsupportedError, "characters of paths"),
        ("_MAX_AREAS", 1, MalformedImageError, "continuation areas"),
        ("MAX_ENTRIES", 3, UnsupportedError, "files and folders"),
    ):
        with monkeypatch.context() as patched, pytest.raises(error, match=words):
            patched.setattr(isotree, name, limit)
            read_tree(disk, name="x")


def test_a_volume_larger_than_any_disc_is_not_written():
    class Endless:
        size = (1 << 32) - 1

        def read(self, offset, length):
            raise AssertionError("nothing of it is to be read")

    tree = {f"f{number}": VolumeFile(Endless()) for number in range(33)}
    with pytest.raises(UsageError, match="at most 137438953472 allowed"):
        build_volume("X", tree, created=datetime(2026, 1, 1, tzinfo=UTC))


# --- laying over ----------------------------------------------------------------------------------------------------


def tree_of(files):
    return {path: Folder() if data is None else VolumeFile(BytesBlob(data)) for path, data in files.items()}


def test_a_later_layer_wins_and_whiteouts_take_away():
    base = tree_of({"a": b"1", "d": None, "d/x": b"2", "d/y": b"3", "e": None, "e/z": b"4", "f": b"5", "g/h": b"6"})
    top = tree_of({
        "a": b"new", "d/.wh.x": b"", "d/w": b"7", "e": None, "e/.wh..wh..opq": b"", "e/q": b"8",
        "f/now-a-folder": b"9", "g": b"now a file", ".wh.none": b"",
    })  # fmt: skip
    assert flat(merge([("base", base), ("top", top)])) == {
        "a": b"new", "d": None, "d/y": b"3", "d/w": b"7", "e": None, "e/q": b"8", "f": None, "f/now-a-folder": b"9",
        "g": b"now a file",
    }  # fmt: skip


@pytest.mark.parametrize("name", [".wh.", ".wh..wh.other", "d/.wh..", ".wh.x/y"])
def test_whiteouts_that_mean_nothing(name):
    with pytest.raises(MalformedImageError, match="whiteout"):
        merge([("base", tree_of({name: b""}))])


class Nested:
    """The same rules done naively, on nested dictionaries."""

    def __init__(self):
        self.root = {}

    def apply(self, layer):
        for path in sorted(layer, key=lambda path: (not path.rpartition("/")[2].startswith(".wh."), path)):
            *steps, last = path.split("/")
            if last == ".wh..wh..opq":
                self.walk(steps).clear()
            elif last.startswith(".wh."):
                self.walk(steps).pop(last[4:], None)
        for path, data in sorted(layer.items()):
            *steps, last = path.split("/")
            here = self.walk(steps)
            if last.startswith(".wh."):
                continue
            if data is None:
                if not isinstance(here.get(last), dict):
                    here[last] = {}
            else:
                here[last] = data

    def walk(self, steps):
        here = self.root
        for step in steps:
            if not isinstance(here.get(step), dict):
                here[step] = {}
            here = here[step]
        return here

    def flat(self, here=None, prefix=""):
        found = {}
        for name, item in (self.root if here is None else here).items():
            found[prefix + name] = None if isinstance(item, dict) else item
            if isinstance(item, dict):
                found |= self.flat(item, prefix + name + "/")
        return found


def test_any_layers_agree_with_the_rules_done_naively():
    rng = random.Random(3)
    for _ in range(300):
        model, layers = Nested(), []
        for number in range(rng.randint(1, 4)):
            files = {}
            for _ in range(rng.randint(1, 7)):
                path = "/".join(rng.choice("abc") for _ in range(rng.randint(1, 3)))
                kind = rng.random()
                folder = path.rpartition("/")[0]
                if kind < 0.15:
                    files[f"{folder}/.wh.{rng.choice('abc')}".lstrip("/")] = b""
                elif kind < 0.2:
                    files[f"{folder}/.wh..wh..opq".lstrip("/")] = b""
                else:
                    files[path] = None if kind < 0.4 else b"%d" % number
            for path in list(files):  # a layer is a file tree: nothing lies below a file
                steps = path.split("/")
                for depth in range(1, len(steps)):
                    files["/".join(steps[:depth])] = None
            layers.append(files)
            model.apply(files)
        whole = merge([(str(index), tree_of(files)) for index, files in enumerate(layers)])
        named = {"/".join(path.split("/")[:depth]) for path in whole for depth in range(1, path.count("/") + 1)}
        assert flat(whole) | dict.fromkeys(named - whole.keys()) == model.flat(), layers


# --- the program ----------------------------------------------------------------------------------------------------


class World:
    """Signed layers and a policy that trusts their signer."""

    def __init__(self, folder):
        self.folder, self.key = folder, generate("p256")
        self.policy = folder / "policy.json"
        self.extension = folder / "extension"
        (self.extension / "over").mkdir(parents=True)
        (self.extension / "over" / "added").write_bytes(b"by the extension")
        (self.extension / "manifest.toml").write_text(
            'id = "org.example.layer"\nversion = "1"\nsecurityVersion = 1\nabi = "vmgraft/1"\n'
            'capabilities = ["supplement:iso"]\n[[supplements]]\nkind = "iso"\nlabel = "OVER"\nroot = "over"\n'
        )
        self.package = load_package(self.extension)
        document = init_policy({"vendor": self.key.public}, [parse_manifest(self.package.manifest)])
        self.policy.write_bytes(format_policy(document))

    def layer(self, name, files, key=None):
        source = self.folder / f"{name}.d"
        for path, data in files.items():
            (source / path).parent.mkdir(parents=True, exist_ok=True)
            (source / path).write_bytes(data)
        run("xorriso", "-as", "mkisofs", "-quiet", "-o", self.folder / name, source)
        attach(self.folder / name, [self.package], [key or self.key], AttachOptions(opening=Opening(root=self.folder)))
        return self.folder / name

    def compose(self, *layers, output="out.iso", state="none"):
        return run(
            sys.executable, "-m", "vmgraft", "compose", *layers, "-o", self.folder / output, "--policy", self.policy,
            "--state", state, "--json", check=False,
        )  # fmt: skip


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def unpacked(volume, folder):
    folder.mkdir()
    run("bsdtar", "-xf", volume, "-C", folder)
    run("chmod", "-R", "u+w", folder)
    return on_disk(folder)


def test_the_program_composes_verified_layers(world, tmp_path):
    base = world.layer("base.iso", {"etc/a": b"base", "etc/b": b"base", "gone": b"x"})
    top = world.layer("top.iso", {"etc/a": b"top", ".wh.gone": b""})
    raw = tmp_path / "plain.img"
    raw.write_bytes(os.urandom(100_000))
    attach(raw, [world.package], [world.key], AttachOptions(opening=Opening(root=tmp_path)))
    done = world.compose(base, top, raw)
    assert done.returncode == 0, done.stdout
    told = json.loads(done.stdout)
    assert [item["image"] for item in told["layers"]] == [str(base), str(top), str(raw)]
    assert unpacked(tmp_path / "out.iso", tmp_path / "out") == {
        "etc": None, "etc/a": b"top", "etc/b": b"base", "added": b"by the extension",
    }  # fmt: skip
    assert "Volume id: UNION" in run("isoinfo", "-d", "-i", tmp_path / "out.iso").stdout
    world.compose(base, top, raw, output="again.iso")
    assert (tmp_path / "again.iso").read_bytes() == (tmp_path / "out.iso").read_bytes()
    streamed = subprocess.run(
        [sys.executable, "-m", "vmgraft", "compose", base, top, raw, "-o", "-", "--policy", world.policy,
         "--state", "none"],
        check=False, capture_output=True, cwd=tmp_path,
    )  # fmt: skip
    assert streamed.stdout == (tmp_path / "out.iso").read_bytes() and not (tmp_path / "-").exists()
    assert b"composed  -  (" in streamed.stderr
    taken = world.compose(base)
    assert taken.returncode == 3
    assert "the file exists already" in taken.stdout


@pytest.mark.parametrize("kind", ["bare", "stranger", "changed", "no-files", "not-granted"])
def test_a_layer_that_is_not_as_the_policy_demands_is_refused(world, tmp_path, kind):
    base = world.layer("base.iso", {"a": b"base"})
    if kind == "bare":
        run("xorriso", "-as", "mkisofs", "-quiet", "-o", tmp_path / "bad", tmp_path / "base.iso.d")
    elif kind == "stranger":
        world.layer("bad", {"a": b"evil"}, key=generate("p256"))
    elif kind == "changed":
        bad = bytearray(world.layer("bad", {"a": b"marker to change"}).read_bytes())
        bad[bad.index(b"marker to change")] ^= 1
        (tmp_path / "bad").write_bytes(bad)
    elif kind == "no-files":
        (world.extension / "manifest.toml").write_text(
            'id = "org.example.layer"\nversion = "1"\nsecurityVersion = 1\nabi = "vmgraft/1"\n'
        )
        (tmp_path / "bad").write_bytes(bytes(100_000))
        attach(
            tmp_path / "bad",
            [load_package(world.extension)],
            [world.key],
            AttachOptions(opening=Opening(root=tmp_path)),
        )
    else:
        world.layer("bad", {"a": b"more"})
        document = json.loads(world.policy.read_text())
        document["trustPolicies"][0]["grants"]["org.example.layer"]["capabilities"] = []
        world.policy.write_text(json.dumps(document))
        base = tmp_path / "bad"
    done = world.compose(base, tmp_path / "bad")
    codes = {"bare": 4, "stranger": 11, "changed": 12, "no-files": 3, "not-granted": 17}
    assert done.returncode == codes[kind], done.stdout
    assert json.loads(done.stdout)["error"]["file"].endswith("bad")
    assert not (tmp_path / "out.iso").exists()


def test_a_layer_older_than_what_ran_here_is_refused(world, tmp_path):
    base = world.layer("base.iso", {"a": b"base"})
    create_state(tmp_path / "state.db")
    with closing(RollbackState(tmp_path / "state.db")) as memory:
        memory.raise_to("default", [Ran("org.example.layer", 2, 1)], statement="0" * 64, when=datetime.now(UTC))
    before = (tmp_path / "state.db").read_bytes()
    done = world.compose(base, state=tmp_path / "state.db")
    assert done.returncode == 16, done.stdout
    assert json.loads(done.stdout)["error"]["file"] == str(base)
    assert not (tmp_path / "out.iso").exists()
    assert (tmp_path / "state.db").read_bytes() == before
