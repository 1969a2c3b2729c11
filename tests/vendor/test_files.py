"""Further files of an extension: packed, signed, carried along by every edit, verified, extracted."""

import hashlib
import json
import os
import sys
from pathlib import Path

import pytest
from vendor_testkit import carried, package, run, verifies

from vmgraft.errors import FileError, GraftFormatError, PayloadMismatchError, UsageError
from vmgraft.imagefmt.contract import Placement
from vmgraft.imagefmt.graft import attach_sections, detach_image, open_graft, open_image
from vmgraft.imagefmt.record import Section, SectionKind
from vmgraft.inspect.extractfiles import extract_files
from vmgraft.signing import signedfiles, supplements
from vmgraft.signing.manifest import canonical_manifest, parse_manifest
from vmgraft.signing.policy import parse_policy
from vmgraft.signing.policytools import format_policy, init_policy
from vmgraft.signing.verify import verify_evidence
from vmgraft.vendor import packfiles
from vmgraft.vendor.convert import ConvertOptions, convert
from vmgraft.vendor.edit import EditOptions, add_extensions, remove_extensions, replace_extensions
from vmgraft.vendor.graft import AttachOptions, attach, detach
from vmgraft.vendor.pack import Package, load_package
from vmgraft.vendor.resign import ResignOptions, resign

HEAD = 'id = "com.example.seed"\nversion = "1"\nsecurityVersion = 1\nabi = "vmgraft/1"\n'
ISO = 'capabilities = ["supplement:iso"]\n[[supplements]]\nkind = "iso"\nlabel = "CIDATA"\n'
USER_DATA = b"#cloud-config\nhostname: grafted\n"
PLAIN = EditOptions()


@pytest.fixture
def folder(tmp_path):
    """An extension of two files and a program, without a module."""
    base = tmp_path / "seed-ext"
    (base / "seed" / "bin").mkdir(parents=True)
    (base / "seed" / "user-data").write_bytes(USER_DATA)
    (base / "seed" / "meta-data").write_bytes(b"")
    program = base / "seed" / "bin" / "hello.sh"
    program.write_bytes(b"#!/bin/sh\n")
    program.chmod(0o755)
    (base / "manifest.toml").write_text(HEAD + ISO + 'root = "seed"\n')
    return base


def write(folder, text):
    (folder / "manifest.toml").write_text(HEAD + text)
    return folder


def graft_of(path, check):
    with open_image(path) as image:
        return check(open_graft(image))


def contents(path):
    """The files an image carries, by path, as the verifier hands them out."""
    from datetime import UTC, datetime

    def check(graft):
        manifests = [parse_manifest(data) for data in graft.manifests()]
        policy = parse_policy(format_policy(init_policy({"acme": check.key.public}, manifests)))
        report = verify_evidence(graft, policy, image_name="x", now=datetime.now(UTC))
        assert report.ok, report.checks
        return {
            f"{item.id.rsplit('.')[-1]}:{entry.path}": item.files.read(entry.path)
            for item in report.extensions
            if item.files is not None
            for entry in item.files.entries
        }

    check.key = contents.key
    return graft_of(path, check)


SEED = {"seed:seed/bin/hello.sh": b"#!/bin/sh\n", "seed:seed/meta-data": b"", "seed:seed/user-data": USER_DATA}


# --- packing --------------------------------------------------------------------------------------------------------


def test_a_folder_stands_for_what_is_in_it_and_every_file_is_listed(folder):
    packed = load_package(folder)
    manifest = parse_manifest(packed.manifest)
    assert [(entry.path, entry.size, entry.executable) for entry in manifest.files] == [
        ("seed/bin/hello.sh", 10, True), ("seed/meta-data", 0, False), ("seed/user-data", len(USER_DATA), False),
    ]  # fmt: skip
    assert [entry.sha256 for entry in manifest.files][2] == hashlib.sha256(USER_DATA).hexdigest()
    assert packed.files == (b"#!/bin/sh\n" + USER_DATA,)
    assert packed.module is None
    (volume,) = supplements.supplements_of(manifest.document)
    assert volume.files == (
        ("bin/hello.sh", "seed/bin/hello.sh"), ("meta-data", "seed/meta-data"), ("user-data", "seed/user-data"),
    )  # fmt: skip


def test_a_file_is_stored_once_however_often_it_is_named(folder):
    text = 'files = ["seed/user-data", "seed"]\n' + ISO + 'files = ["seed/user-data"]\n'
    packed = load_package(write(folder, text))
    assert [entry.path for entry in parse_manifest(packed.manifest).files] == [
        "seed/user-data", "seed/bin/hello.sh", "seed/meta-data",
    ]  # fmt: skip


def test_long_streams_are_cut_into_pieces_and_read_across_them(folder, raw, acme, monkeypatch):
    for module in (packfiles, supplements, signedfiles):
        monkeypatch.setattr(module, "PIECE", 16)
    packed = load_package(folder)
    assert [len(piece) for piece in packed.files] == [16, 16, 10]
    attach(raw, [packed], [acme], AttachOptions())
    contents.key = acme
    assert contents(raw) == SEED


@pytest.mark.parametrize(
    ("text", "field", "words"),
    [
        ('files = ["/etc/passwd"]', "files[0].path", "not a path"),
        ('files = ["../seed-ext/seed/user-data"]', "files[0].path", "not a path"),
        ('files = ["seed/../seed/user-data"]', "files[0].path", "not a path"),
        ('files = ["seed//user-data"]', "files[0].path", "not a path"),
        ('files = ["seed/none"]', "files", "cannot be read"),
        ('files = ["seed\\\\user-data"]', "files[0].path", "not a path"),
        ('files = ["a\\u0000b"]', "files[0].path", "not a path"),
        ('files = [7]', "files", "list of paths"),
        ('files = "seed"', "files", "list of paths"),
        ('files = []', "files", "no file"),
        ('files = [{path = "seed/user-data", size = 1, sha256 = "0"}]', "files", "list of paths"),
        ('supplements = 3', "supplements", "list of tables"),
        ('supplements = [3]', "supplements", "list of tables"),
        ('[[supplements]]\nkind = "iso"\nlabel = "cidata"\nroot = "seed"', "supplements[0].label", ""),
        ('files = ["seed"]\n[[supplements]]\nkind = "tape"\nroot = "seed"', "supplements[0].kind", "one of"),
        ('[[supplements]]\nkind = "iso"\nlabel = "A"\nroot = "seed"', "supplements[0]", "not declared"),
        (ISO + 'root = "seed"\nfiles = ["manifest.toml"]', "supplements[0].files", "not below"),
        (ISO + 'files = ["seed"]\noffset = 3', "supplements[0]", "offset"),
        (ISO + 'files = ["seed"]\n[[supplements]]\nkind = "iso"\nlabel = "CIDATA"\nfiles = ["seed"]',
         "supplements", "same label"),
        ('capabilities = ["supplement:blocks"]\n[[supplements]]\nkind = "blocks"\noffset = 4\nfile = "seed/meta-data"',
         "supplements[0].file", "empty"),
        ('capabilities = ["supplement:blocks"]\n[[supplements]]\nkind = "blocks"\noffset = -1\nfile = "seed/user-data"',
         "supplements[0].offset", ""),
        ('capabilities = ["supplement:blocks"]\n'
         '[[supplements]]\nkind = "blocks"\noffset = 4\nfile = "seed/user-data"\n'
         '[[supplements]]\nkind = "blocks"\noffset = 5\nfile = "seed/bin/hello.sh"', "supplements", "overlap"),
    ],
)  # fmt: skip
def test_what_is_no_list_of_files_is_refused(folder, text, field, words):
    with pytest.raises((UsageError, FileError)) as caught:
        load_package(write(folder, text))
    assert words in str(caught.value)
    assert caught.value.field == field
    assert caught.value.file


@pytest.mark.parametrize("kind", ["file", "folder", "fifo", "outside"])
def test_nothing_is_read_through_a_link_or_from_a_device(folder, kind):
    if kind == "file":
        (folder / "seed" / "link").symlink_to("/etc/hostname")
    elif kind == "folder":
        (folder / "seed" / "link").symlink_to("/etc")
    elif kind == "fifo":
        os.mkfifo(folder / "seed" / "pipe")
    else:
        (folder / "way").symlink_to("seed")
        write(folder, 'files = ["way/user-data"]')
    with pytest.raises(FileError, match=r"link|regular"):
        load_package(folder)


def test_too_many_and_too_large(folder, monkeypatch):
    for number in range(1025):
        (folder / "seed" / f"f{number}").touch()
    with pytest.raises(UsageError, match="1028 files"):
        load_package(folder)
    monkeypatch.setattr(packfiles, "MAX_FILES", 2000)
    monkeypatch.setattr(packfiles, "MAX_FILES_BYTES", 20)
    write(folder, 'files = ["seed/bin", "seed/user-data"]')
    with pytest.raises(FileError, match="more than 20 bytes"):
        load_package(folder)


def test_1024_files_fit_into_a_manifest(folder, raw, acme):
    base = folder / "seed" / "a-folder-with-a-name-of-forty-characters"
    base.mkdir()
    for number in range(1021):
        (base / f"file-with-a-longer-name-{number:04}").write_bytes(b"%d" % number)
    attach(raw, [load_package(folder)], [acme], AttachOptions(placement=Placement.SIDECAR))
    contents.key = acme
    assert len(contents(raw)) == 1024


# --- what travels ---------------------------------------------------------------------------------------------------


def test_files_are_signed_and_come_along_with_every_change(folder, image, acme, tmp_path):
    contents.key = acme
    before = image.read_bytes()
    attach(image, [load_package(folder)], [acme], AttachOptions())
    assert contents(image) == SEED
    assert carried(image).statement.subjects.keys() >= {"com.example.seed/1/files.0"}
    add_extensions(image, [package("b")], [acme], PLAIN)
    assert contents(image) == SEED
    resign(image, [acme], ResignOptions())
    assert contents(image) == SEED
    other = tmp_path / "moved.qcow2"
    if image.suffix != ".iso":
        convert(image, other, ConvertOptions(format="qcow2"))
        assert contents(other) == SEED
    (folder / "seed" / "user-data").write_bytes(b"new")
    replace_extensions(image, [load_package(folder)], [acme], PLAIN)
    assert contents(image) == SEED | {"seed:seed/user-data": b"new"}
    assert graft_of(image, lambda graft: len(graft.record.of_kind(SectionKind.FILES))) == 1  # the old ones are gone
    remove_extensions(image, ["com.example.seed"], [acme], PLAIN)
    assert contents(image) == {}
    assert graft_of(image, lambda graft: graft.record.of_kind(SectionKind.FILES)) == ()
    detach(image)
    assert image.read_bytes() == before


def test_two_extensions_with_the_same_files_store_them_once(folder, raw, acme):
    one = load_package(folder)
    document = json.loads(one.manifest) | {"id": "com.example.twin"}
    document["supplements"][0]["label"] = "TWIN"
    twin = Package("com.example.twin", "1", canonical_manifest(document), None, one.files)
    attach(raw, [one, twin], [acme], AttachOptions())
    contents.key = acme
    assert len(contents(raw)) == 2 * len(SEED)
    assert graft_of(raw, lambda graft: len(graft.record.of_kind(SectionKind.FILES))) == 1


def clashing(folder, acme, change):
    one = load_package(folder)
    document = json.loads(one.manifest) | {"id": "com.example.twin"}
    change(document)
    return [one, Package("com.example.twin", "1", canonical_manifest(document), None, one.files)]


def test_two_volumes_of_one_label_are_not_signed(folder, raw, acme):
    with pytest.raises(UsageError, match="both show a volume labelled CIDATA"):
        attach(raw, clashing(folder, acme, lambda document: None), [acme], AttachOptions())


def test_two_extensions_over_the_same_bytes_are_not_signed(folder, raw, acme):
    text = 'capabilities = ["supplement:blocks"]\n[[supplements]]\nkind = "blocks"\noffset = 4\nfile = "seed/user-data"'
    write(folder, text)

    def change(document):
        document["supplements"][0]["offset"] = 4 + len(USER_DATA) - 1

    with pytest.raises(UsageError, match="both lay blocks over byte 35"):
        attach(raw, clashing(folder, acme, change), [acme], AttachOptions())
    packages = clashing(folder, acme, lambda document: document["supplements"][0].update(offset=4 + len(USER_DATA)))
    attach(raw, packages, [acme], AttachOptions())
    assert verifies(raw, acme)


# --- what is not as signed ------------------------------------------------------------------------------------------


def put(path, change):
    """Put the image's own sections back in, changed."""
    with open_image(path) as image:
        graft = open_graft(image)
        sections = [
            Section(SectionKind(item.kind), graft.record.raw(item))
            for item in graft.record.sections
            if item.kind != SectionKind.UNDO
        ]
        tree = graft.located.locator.tree_digest
    detach_image(path)
    attach_sections(path, change(sections), tree_digest=tree)


def payload_check(path, key):
    from datetime import UTC, datetime

    from vmgraft.signing.verify import self_check

    def check(graft):
        report = self_check(graft, [key.public], now=datetime.now(UTC))
        return next(item for item in report.checks if item.name == "payloads"), report.error

    return graft_of(path, check)


def other_files(data):
    return lambda sections: [
        Section(SectionKind.FILES, data) if item.kind is SectionKind.FILES else item for item in sections
    ]


@pytest.mark.parametrize(
    "change",
    [
        lambda sections: [item for item in sections if item.kind is not SectionKind.FILES],
        other_files(b"#!/bin/sh\n" + USER_DATA.replace(b"grafted", b"pwned!!")),
        other_files(b"#!/bin/sh\n" + USER_DATA + b"x"),
        other_files(b""),
    ],
    ids=["gone", "changed", "longer", "empty"],
)
def test_files_that_are_not_the_signed_ones_fail_the_payloads(folder, raw, acme, change, tmp_path):
    attach(raw, [load_package(folder)], [acme], AttachOptions())
    put(raw, change)
    check, error = payload_check(raw, acme)
    assert (check.status.value, error) == ("fail", "payload-mismatch")
    with pytest.raises(PayloadMismatchError):
        extract_files(raw, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not [item for item in tmp_path.iterdir() if item.name.startswith(".vmgraft-")]


def signed_lie(folder, acme, change):
    """A package whose manifest was bent before it was signed."""
    packed = load_package(folder)
    document = json.loads(packed.manifest)
    change(document["files"])
    return Package(packed.id, packed.version, canonical_manifest(document), None, packed.files)


def test_a_signer_who_lists_another_digest_is_refused(folder, raw, acme):
    packed = signed_lie(folder, acme, lambda files: files[2].update(sha256="0" * 64))
    with pytest.raises(Exception, match="are not those that the manifest lists"):
        attach(raw, [packed], [acme], AttachOptions())
    assert graft_state(raw) == "none"


def graft_state(path):
    with open_image(path) as image:
        return image.locate().state.value


def test_a_signer_who_lists_other_sizes_is_refused(folder, raw, acme):
    packed = signed_lie(folder, acme, lambda files: files[2].update(size=5))
    with pytest.raises(UsageError, match="lists 15 bytes of files, and 42 are given"):
        attach(raw, [packed], [acme], AttachOptions())


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ([("a", 1), ("a", 1)], "twice"),
        ([("a", 1), ("a/b", 1)], "folder of another"),
        ([("a", 200 << 20), ("b", 100 << 20)], "at most 268435456"),
        ([("../a", 1)], "not a path"),
        ([("/a", 1)], "not a path"),
        ([("a/./b", 1)], "not a path"),
        ([("a/b/c/d/e/f/g/h", 1)], "not a path"),
        ([("a.", 1)], "not a path"),
        ([("a" * 65, 1)], "not a path"),
        ([("a\n", 1)], "not a path"),
    ],
)
def test_hostile_lists_of_files(files, words):
    document = {
        "id": "a.b", "version": "1", "securityVersion": 0, "abi": "vmgraft/1",
        "files": [{"path": path, "size": size, "sha256": "0" * 64} for path, size in files],
    }  # fmt: skip
    with pytest.raises(GraftFormatError, match=words):
        parse_manifest(json.dumps(document).encode())


# --- extract --------------------------------------------------------------------------------------------------------


def test_extract_writes_them_below_a_new_folder_and_never_over_anything(folder, raw, acme, tmp_path):
    attach(raw, [load_package(folder)], [acme], AttachOptions())
    out = tmp_path / "deep" / "out"
    written = extract_files(raw, out)
    assert written == (out / "seed/bin/hello.sh", out / "seed/meta-data", out / "seed/user-data")
    assert (out / "seed" / "user-data").read_bytes() == USER_DATA
    assert os.access(out / "seed" / "bin" / "hello.sh", os.X_OK)
    assert not (out / "seed" / "user-data").stat().st_mode & 0o111
    with pytest.raises(FileError, match="something already"):
        extract_files(raw, out)
    link = tmp_path / "link"
    (tmp_path / "empty").mkdir()
    link.symlink_to(tmp_path / "empty")
    with pytest.raises(FileError, match="something already"):
        extract_files(raw, link)
    extract_files(raw, tmp_path / "empty")
    assert (tmp_path / "empty" / "seed" / "user-data").read_bytes() == USER_DATA


def test_extract_by_the_program(folder, raw, acme, tmp_path):
    attach(raw, [load_package(folder), package("b")], [acme], AttachOptions())
    program = (sys.executable, "-m", "vmgraft", "extract", raw, "files")
    out = run(*program, "-o", tmp_path / "out", "--extension", "com.example.seed")
    assert out.splitlines()[-1] == f"wrote {tmp_path}/out/seed/user-data"
    with pytest.raises(UsageError, match="has no files"):
        extract_files(raw, tmp_path / "none", extension="com.example.b")


def test_an_image_without_files(raw, acme, tmp_path):
    attach(raw, [package("b")], [acme], AttachOptions())
    with pytest.raises(UsageError, match="no extension has files"):
        extract_files(raw, tmp_path / "out")
    assert not Path(tmp_path / "out").exists()


def test_files_are_among_what_is_signed_elsewhere(folder, raw, acme, other, tmp_path):
    from vmgraft.vendor.ceremony import CeremonyOptions, Offered, attach_signatures, write_payload

    packed = load_package(folder)
    write_payload(raw, [packed], AttachOptions(), tmp_path / "payload")
    message = (tmp_path / "payload" / "payload.pae").read_bytes()
    (tmp_path / "sig").write_bytes(acme.sign(message))
    offered = [Offered(tmp_path / "sig", acme.public)]
    lacking = Package(packed.id, packed.version, packed.manifest, None)
    with pytest.raises(PayloadMismatchError):
        attach_signatures(raw, [lacking], tmp_path / "payload", offered, CeremonyOptions())
    assert graft_state(raw) == "none"
    attach_signatures(raw, [packed], tmp_path / "payload", offered, CeremonyOptions())
    contents.key = acme
    assert contents(raw) == SEED


def test_files_stay_when_a_signature_is_added(folder, raw, acme, other):
    from vmgraft.vendor.amend import AmendOptions, append_signatures

    attach(raw, [load_package(folder)], [acme], AttachOptions())
    append_signatures(raw, [other], AmendOptions(), trust=(acme.public,))
    contents.key = other
    assert contents(raw) == SEED
