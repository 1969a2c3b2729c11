"""What is fuzzed: every parser that reads bytes nobody vouches for, and what it is started from."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import fuzz_signing
import fuzz_sparse

sys.path.insert(0, str(Path(__file__).parents[1] / "corpus"))

import corpus_graft as lay
import corpus_record
from corpus_all import MODULES, all_cases
from corpus_model import Sparse

from vmgraft.errors import GraftFormatError, VmgraftError
from vmgraft.imagefmt.contract import Image, Opening, Placement
from vmgraft.imagefmt.graft import Graft, attach_sections, detach_image, open_image
from vmgraft.imagefmt.record import Section, SectionKind
from vmgraft.imagefmt.registry import format_names
from vmgraft.imagefmt.tree import digest_content

ROOT = Path(__file__).parents[2]
#: Guest content up to this size is digested, and extents are followed up to this many.
_MAX_DIGEST = 64 << 20
_MAX_EXTENTS = 100_000
#: CPU seconds of the longest step of the last input: opening, detaching and attaching are each a run of the program.
longest = [0.0]
_SECTIONS = [Section(SectionKind.ENVELOPE, b"{}"), Section(SectionKind.MANIFEST, b"{}")]


@dataclass(frozen=True, slots=True)
class Target:
    """Something to fuzz.

    Attributes:
        run: Takes an input; a ``VmgraftError`` is a good answer, any other exception is a finding.
        seeds: Inputs to begin with, by name.
        packages: What of our code is instrumented, beside the facade.
        words: Tokens worth inserting.
    """

    run: Callable[[bytes], None]
    seeds: Callable[[], Iterator[tuple[str, bytes]]]
    packages: tuple[str, ...] = ()
    words: tuple[bytes, ...] = ()


def _folder() -> Path:
    """The folder for scratch files; fuzz.py names it."""
    return Path(os.environ["VMGRAFT_FUZZ_FOLDER"])


@contextmanager
def step() -> Iterator[None]:
    """Take the time of a step."""
    start = time.process_time()
    try:
        yield
    finally:
        longest[0] = max(longest[0], time.process_time() - start)


# --- images --------------------------------------------------------------------------------------------------------


def use(path: Path, opening: Opening) -> None:
    """Do all that a reader does."""
    with step(), open_image(path, opening) as image:
        located = image.locate()
        graft = Graft(image, located=located)
        graft.format_problem()
        graft.envelopes()
        graft.manifests()
        graft.hints()
        image.metadata()
        image.room()
        image.recovery_undo()
        if _is_readable(image):
            _check_content(image)


def _is_readable(image: Image) -> bool:
    """Look at the content: a refusal ends it here, and is fine."""
    try:
        image.read(0, 4096)
        image.read(max(0, image.virtual_size - 4096), 8192)
        image.backing_chain()
    except VmgraftError:
        return False
    return True


def _check_content(image: Image) -> None:
    end = 0
    for count, extent in enumerate(image.extents()):
        if extent.start != end or extent.length <= 0:
            raise AssertionError(f"extents with a gap at {end}: {extent}")
        end += extent.length
        if count > _MAX_EXTENTS:
            return
    if end != image.virtual_size:
        raise AssertionError(f"extents end at {end} of {image.virtual_size}")
    if end <= _MAX_DIGEST:
        digest_content(image, flat="never")


def change(path: Path, opening: Opening) -> None:
    """Detach what is there, then attach and detach: refused without a trace, or undone without one."""
    before = path.read_bytes() if path.stat().st_size <= _MAX_DIGEST else None
    try:
        with step():
            detach_image(path, opening)
    except VmgraftError:
        _same(path, before, "a refused detach")
    before = None if before is None else path.read_bytes()
    try:
        with step():
            attach_sections(path, _SECTIONS, placement=Placement.AUTO, tree_digest=bytes(32), opening=opening)
    except VmgraftError:
        _same(path, before, "a refused attach")
        return
    detach_image(path, opening)
    _same(path, before, "attach and detach")


def _same(path: Path, before: bytes | None, what: str) -> None:
    if before is not None and path.read_bytes() != before:
        raise AssertionError(f"{what} changed the image")


def _image_target(name: str) -> Target:
    opening = Opening(format=name)

    def run(data: bytes) -> None:
        path = _folder() / "image"
        fuzz_sparse.write(data, path)
        path.with_name("image.vmgraft").unlink(missing_ok=True)
        try:
            use(path, opening)
        except VmgraftError:
            return
        finally:
            if len(data) % 4 == 0:  # writing costs more than reading
                _quietly(change, path, opening)

    packages = (f"vmgraft.imagefmt.{name}", "vmgraft.imagefmt.partitions")
    return Target(run, lambda: _image_seeds(name), packages, (lay.MAGIC, b"VMGQNOTE"))


def _quietly(action: Callable[[Path, Opening], None], path: Path, opening: Opening) -> None:
    try:
        action(path, opening)
    except VmgraftError:
        return


def _image_seeds(name: str) -> Iterator[tuple[str, bytes]]:
    """The corpus and the goldens of a container."""
    short = "iso" if name == "iso9660" else name
    graft = ("record", "locator", "undo") if name == "raw" else ()
    for case in all_cases():
        if case.container == short or case.container in graft:
            content = next(iter(case.make().values()))
            packed = _packed(content)
            if packed is not None:
                yield case.name.replace("/", "-"), packed
    for module in MODULES:
        for file, data in module.samples().items():
            yield f"sample-{file}", fuzz_sparse.pack(data)
    for golden in sorted((ROOT / "tests" / "imagefmt" / "goldens" / name).glob("*")):
        yield f"golden-{golden.name}", fuzz_sparse.pack(golden.read_bytes())


def _packed(content: object) -> bytes | None:
    """Return a file of the corpus as an input, where it is not too long to be worth it."""
    if isinstance(content, Sparse):
        packed = fuzz_sparse.pack_pieces(sorted(content.pieces.items()), content.size)
    elif isinstance(content, bytes | bytearray):
        packed = fuzz_sparse.pack(bytes(content))
    else:
        return None
    return packed if len(packed) <= 1 << 16 else None


def _probe(data: bytes) -> None:
    from vmgraft.imagefmt.registry import detect

    path = _folder() / "image"
    fuzz_sparse.write(data, path)
    detect(path)


# --- our own structures --------------------------------------------------------------------------------------------


def _record(data: bytes) -> None:
    from vmgraft.imagefmt.record import parse_record

    record = parse_record(data, file="f", offset=0)
    for section in record.sections:
        try:
            record.raw(section)
        except GraftFormatError:
            continue
    record.undo()


def _sealed_record(data: bytes) -> None:
    """The same with the digest of header and table put right, which no fuzzer would find."""
    count = int.from_bytes(data[28:32], "little")
    start = int.from_bytes(data[12:16], "little")
    end = start + 96 * min(count, 256)
    if len(data) >= 64:
        head = data[:16] + len(data).to_bytes(8, "little") + data[24:32]
        data = head + lay.digest(head + bytes(32) + data[64:end]) + data[64:]
    _record(data)


def _locator(data: bytes) -> None:
    from vmgraft.imagefmt.locator import pack_locator, parse_locator

    head = data[:120]
    found = parse_locator(head + lay.digest(head)[:8], file="f", offset=0)
    if data[10:12] == b"\0\0" and pack_locator(found)[:120] != head:
        raise AssertionError("a locator reads back differently")


def _undo(data: bytes) -> None:
    from vmgraft.imagefmt.undo import pack_undo, parse_undo

    if pack_undo(parse_undo(data, file="f", offset=0)) != data:
        raise AssertionError("an undo reads back differently")


def _sidecar(data: bytes) -> None:
    path = _folder() / "side.img"
    path.write_bytes(corpus_record.DISK)
    fuzz_sparse.write(data, path.with_name("side.img.vmgraft"))
    use(path, Opening(format="raw"))


def _envelope(data: bytes) -> None:
    from vmgraft.signing.dsse import parse_envelope, serialise

    parse_envelope(serialise(parse_envelope(data)))


def _statement(data: bytes) -> None:
    from vmgraft.signing.statement import parse_statement

    parse_statement(data)


def _manifest(data: bytes) -> None:
    from vmgraft.signing.manifest import parse_manifest

    parse_manifest(data)


def _iso_tree(data: bytes) -> None:
    from vmgraft.imagefmt.blob import BytesBlob
    from vmgraft.vmmhost.supplements.iso import VolumeFile
    from vmgraft.vmmhost.supplements.isotree import read_tree
    from vmgraft.vmmhost.supplements.media import ReadOnlyDisk
    from vmgraft.vmmhost.supplements.union import merge

    # The system area in front of the descriptors says nothing and only makes the inputs longer.
    tree = read_tree(ReadOnlyDisk(BytesBlob(bytes(32768) + data)), name="f")
    for node in tree.values():
        if isinstance(node, VolumeFile):
            node.data.read(0, min(node.data.size, 4096))
    merge([("f", tree), ("g", tree)])


def _iso_tree_seeds() -> Iterator[tuple[str, bytes]]:
    from datetime import UTC, datetime

    from vmgraft.imagefmt.blob import BytesBlob
    from vmgraft.vmmhost.supplements.iso import Link, Node, VolumeFile, build_volume

    tree: dict[str, Node] = {"a/b": VolumeFile(BytesBlob(b"file"), executable=True), "n" * 200: Link("../" * 90 + "x")}
    for name, more in (("plain", {}), ("whiteouts", {"a/.wh.b": VolumeFile(BytesBlob(b""))})):
        volume = build_volume("FUZZ", tree | more, created=datetime(2026, 1, 1, tzinfo=UTC))
        yield name, volume.read(32768, volume.size)


def _policy(data: bytes) -> None:
    from vmgraft.signing.policy import parse_policy

    parse_policy(data, file="f")


@cache
def _signed() -> dict[str, bytes]:
    """A manifest, statement, envelope and policy of an example, made as a vendor makes them."""
    from datetime import UTC, datetime

    from vmgraft.imagefmt.contract import ContentDigest
    from vmgraft.signing.dsse import Envelope, Signature, serialise
    from vmgraft.signing.keys import generate
    from vmgraft.signing.policytools import format_policy, init_policy
    from vmgraft.signing.statement import build_statement
    from vmgraft.vendor.pack import load_package

    package, public = load_package(ROOT / "examples" / "clock"), generate().public
    content = ContentDigest(1 << 20, bytes(32), bytes(32), bytes(32))
    created = datetime(2026, 1, 1, tzinfo=UTC)
    statement = build_statement(content, [(package.manifest, package.module)], created=created)
    return {
        "manifest": package.manifest,
        "statement": statement,
        "envelope": serialise(Envelope(statement, (Signature("0" * 64, bytes(64)),))),
        "policy": format_policy(init_policy({"acme": public})),
    }


def _json_target(name: str, run: Callable[[bytes], None]) -> Target:
    def seeds() -> Iterator[tuple[str, bytes]]:
        from vmgraft.vendor.pack import load_package

        yield "sound", _signed()[name]
        if name == "manifest":
            yield "files", load_package(ROOT / "examples" / "cloudinit").manifest
        yield "deep", b"[" * 5000
        yield "numbers", b'{"a":1e999,"b":-0,"c":NaN,"d":' + b"9" * 400 + b"}"
        yield "text", b'{"a":"\\ud800","a":"\xff\xfe"}'

    modules = ("dsse", "statement", "manifest", "policy", "times", "scopes", "capabilities", "supplements")
    packages = ("vmgraft.schemas", *(f"vmgraft.signing.{module}" for module in modules))
    return Target(run, seeds, packages, tuple(_words(name)))


def _words(name: str) -> Iterator[bytes]:
    """The member names of a schema."""
    from vmgraft.schemas import SCHEMAS, load_schema

    def names(node: object) -> Iterator[str]:
        if isinstance(node, dict):
            yield from node.get("properties", {})
            for value in node.values():
                yield from names(value)
        elif isinstance(node, list):
            for value in node:
                yield from names(value)

    found = (
        sorted(set(names(load_schema(name)))) if name in SCHEMAS else ["payload", "payloadType", "signatures", "keyid"]
    )
    return (f'"{word}"'.encode() for word in found)


def _record_seeds() -> Iterator[tuple[str, bytes]]:
    yield "sound", lay.record(corpus_record.PARTS)
    for case in all_cases():
        if case.container == "record":
            data = next(iter(case.make().values()))
            if isinstance(data, bytes) and len(data) > corpus_record.HEAD + 128:
                yield case.name.replace("/", "-"), data[corpus_record.HEAD + 128 : -128].rstrip(b"\0")


def _undo_seeds() -> Iterator[tuple[str, bytes]]:
    yield "plain", lay.undo(5000)
    yield "full", lay.undo(5000, [(b"a", 1), (b"volume_space_size", -5)], [(34035, bytes(128)), (40000, b"x")])


def _locator_seeds() -> Iterator[tuple[str, bytes]]:
    yield "inline", lay.locator(bytes(500), offset=8320, file_size=5000)
    yield "sidecar", lay.locator(bytes(500), flags=lay.SIDECAR, file_size=5000)


def _sidecar_seeds() -> Iterator[tuple[str, bytes]]:
    yield "sound", fuzz_sparse.pack(corpus_record.sidecar(lay.record(corpus_record.PARTS)))
    yield "huge", fuzz_sparse.pack(corpus_record.sidecar(lay.record(corpus_record.PARTS)), size=1 << 40)


def _probe_seeds() -> Iterator[tuple[str, bytes]]:
    for name in format_names():
        yield from ((f"{name}-{file}", data) for file, data in list(_image_seeds(name))[:3])


def all_targets() -> dict[str, Target]:
    """Return every target: one a registered container, and one a structure."""
    images = {name: _image_target(name) for name in format_names()}
    magic = (lay.MAGIC,)
    ours = {
        "probe": Target(_probe, _probe_seeds),
        "record": Target(_record, _record_seeds, words=magic),
        "sealed-record": Target(_sealed_record, _record_seeds, words=(lay.MAGIC, b"\x28\xb5\x2f\xfd")),
        "locator": Target(_locator, _locator_seeds),
        "undo": Target(_undo, _undo_seeds),
        "sidecar": Target(_sidecar, _sidecar_seeds, ("vmgraft.imagefmt.raw",), magic),
        "envelope": _json_target("envelope", _envelope),
        "statement": _json_target("statement", _statement),
        "manifest": _json_target("manifest", _manifest),
        "policy": _json_target("policy", _policy),
        "iso-tree": Target(
            _iso_tree, _iso_tree_seeds, ("vmgraft.vmmhost.supplements",), (b"CD001", b"NM", b"PX", b"CE")
        ),
    }
    return images | ours | fuzz_signing.targets(Target)
