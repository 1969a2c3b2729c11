"""Add, replace, remove: the order, what must be intact before anything is signed again, and the way back."""

import contextlib
import dataclasses
import shutil
from datetime import UTC, datetime, timedelta
from hashlib import sha256

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vendor_testkit import carried, files_of, package, verifies

from vmgraft.errors import (
    BadSignatureError,
    ContentMismatchError,
    ExpiredError,
    FileError,
    GraftFormatError,
    ImageInUseError,
    NoGraftError,
    NoRoomError,
    PayloadMismatchError,
    RollbackError,
    UnsupportedError,
    UntrustedSignerError,
    UsageError,
)
from vmgraft.imagefmt.contract import Placement
from vmgraft.imagefmt.graft import attach_sections, detach_image, open_graft, open_image
from vmgraft.imagefmt.journal import journal_path
from vmgraft.imagefmt.record import Section, SectionKind
from vmgraft.imagefmt.sidecar import sidecar_path
from vmgraft.signing.dsse import Envelope, Signature, parse_envelope, serialise
from vmgraft.signing.statement import CONTENT_SUBJECT, build_statement
from vmgraft.vendor import edit, graft, seal
from vmgraft.vendor.edit import EditOptions, add_extensions, carried_versions, remove_extensions, replace_extensions
from vmgraft.vendor.graft import AttachOptions, attach, detach
from vmgraft.vendor.seal import sign

PLAIN = EditOptions()


def graft_in(path, key, *names, **options):
    return attach(path, [package(name) for name in names], [key], AttachOptions(**options))


# --- the order ------------------------------------------------------------------------------------------------------


def test_the_order_is_that_of_the_statement(image, acme):
    clean = image.read_bytes()
    graft_in(image, acme, "b", "a")
    done = add_extensions(image, [package("d"), package("c", module=False)], [acme], PLAIN)
    assert carried(image).extensions == [("b", "1"), ("a", "1"), ("d", "1"), ("c", "1")]
    assert [item.id for item in done.extensions] == list(carried_versions(image))
    assert verifies(image, acme)
    replace_extensions(image, [package("e"), package("a", "2")], [acme], PLAIN)
    assert carried(image).extensions == [("b", "1"), ("a", "2"), ("d", "1"), ("c", "1"), ("e", "1")]
    remove_extensions(image, ["com.example.b", "com.example.d"], [acme], PLAIN)
    assert carried(image).extensions == [("a", "2"), ("c", "1"), ("e", "1")]
    assert verifies(image, acme)
    detach(image)
    assert files_of(image.parent) == {image.name: clean}


@pytest.mark.parametrize("placement", [Placement.INLINE, Placement.SIDECAR])
def test_placement_is_kept_unless_said_otherwise(image, acme, placement):
    graft_in(image, acme, "a", placement=placement)
    add_extensions(image, [package("b")], [acme], PLAIN)
    assert carried(image).placement == placement.value
    for wanted in (Placement.SIDECAR, Placement.INLINE):
        replace_extensions(image, [package("b", "2")], [acme], EditOptions(placement=wanted))
        assert carried(image).placement == wanted.value
        assert sidecar_path(image).exists() == (wanted is Placement.SIDECAR)
        assert verifies(image, acme) and not journal_path(image).exists()


def test_what_the_statement_says_is_kept_unless_said_otherwise(raw, acme):
    soon, later = (datetime.now(UTC).replace(microsecond=0) + timedelta(days=n) for n in (1, 2))
    graft_in(raw, acme, "a", expires=soon, flat="always")
    add_extensions(raw, [package("b")], [acme], PLAIN)
    found = carried(raw).statement
    assert (found.expires, found.binding, CONTENT_SUBJECT in found.subjects) == (soon, "image", True)
    replace_extensions(raw, [package("b", "2")], [acme], EditOptions(expires=later, flat="never"))
    found = carried(raw).statement
    assert (found.expires, CONTENT_SUBJECT in found.subjects) == (later, False)
    add_extensions(raw, [package("c")], [acme], PLAIN)
    assert CONTENT_SUBJECT not in carried(raw).statement.subjects
    add_extensions(raw, [package("d")], [acme], EditOptions(binding="any"))
    assert carried(raw).statement.binding == "any" and carried(raw).statement.image is None
    add_extensions(raw, [package("e")], [acme], PLAIN)
    assert carried(raw).statement.binding == "any"
    add_extensions(raw, [package("f")], [acme], EditOptions(binding="image"))
    assert carried(raw).statement.binding == "image" and CONTENT_SUBJECT in carried(raw).statement.subjects
    assert verifies(raw, acme)


def test_a_copy_is_edited_and_the_image_left_alone(image, acme):
    graft_in(image, acme, "a", placement=Placement.SIDECAR)
    before, output = files_of(image.parent), image.with_name(f"out{image.suffix}")
    done = add_extensions(image, [package("b")], [acme], EditOptions(output=output))
    assert done.attached.path == output
    assert carried(output).extensions == [("a", "1"), ("b", "1")] and verifies(output, acme)
    after = files_of(image.parent)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {output.name, sidecar_path(output).name}
    with pytest.raises(FileError, match="exists"):
        add_extensions(image, [package("b")], [acme], EditOptions(output=output))


def test_up_to_64_extensions(raw, acme):
    graft_in(raw, acme, *(f"n{number}" for number in range(63)))
    add_extensions(raw, [package("last")], [acme], PLAIN)
    assert len(carried(raw).extensions) == 64 and verifies(raw, acme)
    before = files_of(raw.parent)
    with pytest.raises(UsageError, match="65 extensions, at most 64"):
        add_extensions(raw, [package("toomany")], [acme], PLAIN)
    assert files_of(raw.parent) == before
    remove_extensions(raw, [f"com.example.n{number}" for number in range(63)], [acme], PLAIN)
    assert carried(raw).extensions == [("last", "1")]


def test_limits_are_told_before_the_content_is_read(raw, acme, monkeypatch):
    monkeypatch.setattr(graft, "open_image", None)
    with pytest.raises(UsageError, match="65 extensions, at most 64"):
        graft_in(raw, acme, *(f"n{number}" for number in range(65)))
    with pytest.raises(UsageError, match="17 keys, at most 16"):
        attach(raw, [package("a")], [acme] * 17, AttachOptions())


def test_no_room_inline_is_told_before_the_content_is_read(raw, acme, monkeypatch):
    noise = b"".join(sha256(number.to_bytes(4, "little")).digest() for number in range(33_000))
    big = package("big")
    big = dataclasses.replace(big, module=big.module + bytes([0, 0xE0, 0xB5, 0x40, 0]) + noise)
    monkeypatch.setattr(graft, "digest_content", None)
    before = files_of(raw.parent)
    with pytest.raises(NoRoomError, match="bytes or more does not fit inline"):
        attach(raw, [big], [acme], AttachOptions(placement=Placement.INLINE))
    assert files_of(raw.parent) == before


# --- requests that make no sense ------------------------------------------------------------------------------------


def refused(path, error, match, action):
    """``action`` is refused with this error and nothing of the folder changes."""
    before = files_of(path.parent)
    with pytest.raises(error, match=match) as caught:
        action()
    assert files_of(path.parent) == before
    assert caught.value.hint
    return caught.value


def test_requests_that_make_no_sense(raw, acme):
    clock = package("clock", capabilities=["pio:0x510-0x517"])
    attach(raw, [package("a"), clock], [acme], AttachOptions())
    clash = package("clash", capabilities=["pio:0x516-0x520"])
    error = refused(raw, UsageError, "carries com.example.a 1 already",
                    lambda: add_extensions(raw, [package("a", "2")], [acme], PLAIN))  # fmt: skip
    assert "--replace" in error.hint
    refused(raw, UsageError, "x is given twice",
            lambda: add_extensions(raw, [package("x"), package("x", "2")], [acme], PLAIN))  # fmt: skip
    refused(raw, UsageError, "given twice",
            lambda: replace_extensions(raw, [package("a"), package("a", "2")], [acme], PLAIN))  # fmt: skip
    error = refused(raw, UsageError, "does not carry com.example.b",
                    lambda: remove_extensions(raw, ["com.example.b"], [acme], PLAIN))  # fmt: skip
    assert "com.example.clock" in error.hint
    refused(raw, UsageError, "no extension would be left",
            lambda: remove_extensions(raw, list(carried_versions(raw)), [acme], PLAIN))  # fmt: skip
    refused(raw, UsageError, "needs a key", lambda: add_extensions(raw, [package("b")], [], PLAIN))
    before = files_of(raw.parent)
    with pytest.raises(UsageError, match="overlap"):
        add_extensions(raw, [clash], [acme], PLAIN)
    assert files_of(raw.parent) == before
    past = EditOptions(expires=datetime.now(UTC) - timedelta(seconds=1))
    refused(raw, UsageError, "past", lambda: add_extensions(raw, [package("b")], [acme], past))
    remove_extensions(raw, ["com.example.clock"], [acme], PLAIN)
    add_extensions(raw, [clash], [acme], PLAIN)  # the range is free now


def test_an_image_without_a_graft(raw, acme):
    refused(raw, NoGraftError, "no graft", lambda: add_extensions(raw, [package("a")], [acme], PLAIN))


@pytest.mark.parametrize("numbers", [{"security": 4, "generation": 7}, {"security": 5, "generation": 6}])
def test_no_way_down_unless_it_is_asked_for(raw, acme, numbers):
    attach(raw, [package("a", security=5, generation=7)], [acme], AttachOptions())
    older = package("a", "0", **numbers)
    error = refused(raw, RollbackError, "would go down", lambda: replace_extensions(raw, [older], [acme], PLAIN))
    assert "--allow-downgrade" in error.hint
    replace_extensions(raw, [package("a", "2", security=5, generation=8)], [acme], PLAIN)
    replace_extensions(raw, [older], [acme], EditOptions(allow_downgrade=True))
    assert carried(raw).extensions == [("a", "0")]


def test_a_record_that_does_not_fit_where_it_was_asked_to_go(tmp_path, templates, acme):
    path = tmp_path / "image" / "disk.qcow2"
    path.parent.mkdir()
    shutil.copy(templates / "disk.qcow2", path)
    graft_in(path, acme, "a")
    noise = b"".join(bytes([n * 7 % 256, n * 13 % 251, n * 31 % 241, n % 239]) for n in range(30_000))
    big = package("big")
    big = dataclasses.replace(big, module=big.module + bytes([0, 0xE0, 0xA7, 0x12, 0]) + noise[:300_000])
    inline = EditOptions(placement=Placement.INLINE)
    before = files_of(path.parent)
    with pytest.raises(NoRoomError):
        add_extensions(path, [big], [acme], inline)
    assert files_of(path.parent) == before
    add_extensions(path, [big], [acme], PLAIN)
    assert carried(path).placement == "sidecar" and verifies(path, acme)


# --- the old graft must be intact -----------------------------------------------------------------------------------


def test_only_what_a_trusted_key_signed_is_signed_again(raw, acme, other):
    graft_in(raw, acme, "a")
    error = refused(raw, UntrustedSignerError, "not signed again",
                    lambda: add_extensions(raw, [package("b")], [other], PLAIN))  # fmt: skip
    assert "--trust" in error.hint and acme.keyid in error.hint
    trusting = EditOptions(trust=(acme.public,))
    done = add_extensions(raw, [package("b")], [other], trusting)
    assert done.dropped_signers == (acme.keyid,) and done.attached.keyids == (other.keyid,)
    assert verifies(raw, other) and not verifies(raw, acme)
    refused(raw, UntrustedSignerError, "unknown key", lambda: add_extensions(raw, [package("c")], [acme], PLAIN))


def test_one_trusted_signature_of_several_is_enough(raw, acme, other):
    attach(raw, [package("a")], [acme, other], AttachOptions())
    done = add_extensions(raw, [package("b")], [other], PLAIN)
    assert done.dropped_signers == (acme.keyid,)
    done = add_extensions(raw, [package("c")], [acme, other], PLAIN)
    assert done.dropped_signers == () and verifies(raw, acme, other)


def forged(path, make_envelope=lambda old: old, change=lambda sections: sections, placement=Placement.AUTO):
    """Put another graft in, made of the old one's parts."""
    with open_image(path) as image:
        found = open_graft(image)
        record = found.record
        sections = [
            Section(SectionKind(item.kind), record.raw(item)) for item in record.sections if item.name != "UNDO"
        ]
        tree = found.located.locator.tree_digest
    old = next(item.raw for item in sections if item.kind is SectionKind.ENVELOPE)
    sections = [
        Section(item.kind, make_envelope(old)) if item.kind is SectionKind.ENVELOPE else item for item in sections
    ]
    detach_image(path)
    attach_sections(path, change(sections), placement=placement, tree_digest=tree)


def test_a_signature_that_is_not_good(raw, acme):
    graft_in(raw, acme, "a")

    def spoil(envelope):
        parsed = parse_envelope(envelope)
        return serialise(Envelope(parsed.payload, (Signature(acme.keyid, bytes(64)),)))

    forged(raw, spoil)
    refused(raw, BadSignatureError, "not signed again", lambda: add_extensions(raw, [package("b")], [acme], PLAIN))


def test_a_payload_that_is_not_the_signed_one(raw, acme):
    attach(raw, [package("a"), package("z")], [acme], AttachOptions())

    def swap(sections):
        return [
            Section(item.kind, package("evil").module) if item.kind is SectionKind.MODULE else item for item in sections
        ]

    forged(raw, change=swap)
    refused(raw, PayloadMismatchError, "not signed again", lambda: add_extensions(raw, [package("b")], [acme], PLAIN))
    # Not even to take the bad one out: nothing of a graft that does not verify is signed.
    refused(raw, PayloadMismatchError, "payloads", lambda: remove_extensions(raw, ["com.example.a"], [acme], PLAIN))


def test_content_that_is_not_the_signed_one(raw, acme):
    graft_in(raw, acme, "a")
    with raw.open("r+b") as file:
        file.write(b"changed")
    refused(raw, ContentMismatchError, "not signed again", lambda: add_extensions(raw, [package("b")], [acme], PLAIN))


def test_a_portable_graft_on_changed_content(raw, acme):
    graft_in(raw, acme, "a", binding="any")
    with raw.open("r+b") as file:
        file.write(b"changed")
    add_extensions(raw, [package("b")], [acme], PLAIN)
    assert verifies(raw, acme)


@pytest.mark.parametrize("placement", [Placement.INLINE, Placement.SIDECAR])
def test_a_record_that_is_damaged(image, acme, placement):
    graft_in(image, acme, "a", placement=placement)
    with open_image(image) as opened:
        record = opened.locate().record.read_all()
    holder = sidecar_path(image) if placement is Placement.SIDECAR else image
    data = bytearray(holder.read_bytes())
    start = bytes(data).rfind(record) + len(record) - 30  # inside the hints
    data[start] ^= 1
    holder.write_bytes(data)
    refused(
        image,
        GraftFormatError,
        "format: the old graft is not signed again: (?!format)",
        lambda: add_extensions(image, [package("b")], [acme], PLAIN),
    )


def test_a_statement_that_is_over(raw, acme, monkeypatch):
    class Later(datetime):
        @classmethod
        def now(cls, zone=None):
            return datetime.now(zone) + timedelta(days=2)

    graft_in(raw, acme, "a", expires=datetime.now(UTC) + timedelta(days=1))
    for module in (edit, seal):
        monkeypatch.setattr(module, "datetime", Later)
    error = refused(raw, ExpiredError, "expired at", lambda: add_extensions(raw, [package("b")], [acme], PLAIN))
    assert "--expires" in error.hint
    renewed = EditOptions(expires=datetime.now(UTC) + timedelta(days=9))
    add_extensions(raw, [package("b")], [acme], renewed)
    assert carried(raw).statement.expires == renewed.expires.replace(microsecond=0)


def test_a_statement_that_is_not_valid_yet(raw, acme):
    graft_in(raw, acme, "a")

    def from_the_future(envelope):
        old = package("a")
        with open_image(raw) as image:
            content = open_graft(image).content(flat=False)
        statement = build_statement(
            content, [(old.manifest, old.module)], created=datetime.now(UTC) + timedelta(days=1)
        )
        return sign(statement, [acme])

    forged(raw, from_the_future)
    error = refused(raw, ExpiredError, "not valid before", lambda: add_extensions(raw, [package("b")], [acme], PLAIN))
    assert "clock" in error.hint


def test_a_statement_with_members_of_a_later_release(raw, acme):
    graft_in(raw, acme, "a")

    def extended(envelope):
        payload = parse_envelope(envelope).payload
        return sign(payload.replace(b'"formatVersion"', b'"aNewIdea":{"x":"1"},"formatVersion"'), [acme])

    forged(raw, extended)
    refused(raw, UnsupportedError, "aNewIdea", lambda: add_extensions(raw, [package("b")], [acme], PLAIN))


def test_files_that_no_statement_names_stay_behind(raw, acme):
    graft_in(raw, acme, "a")
    forged(raw, change=lambda sections: [*sections, Section(SectionKind.FILES, b"data" * 100, compress=True)])
    add_extensions(raw, [package("b")], [acme], PLAIN)
    with open_image(raw) as image:
        assert open_graft(image).record.of_kind(SectionKind.FILES) == ()
    assert verifies(raw, acme)


# --- what goes wrong on the way -------------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", [KeyboardInterrupt(), PayloadMismatchError("no"), OSError(28, "full")])
@pytest.mark.parametrize("copy", [False, True])
def test_a_failure_brings_the_old_graft_back(image, acme, monkeypatch, problem, copy):
    graft_in(image, acme, "a")
    before = files_of(image.parent)

    def fail(*_args):
        raise problem

    monkeypatch.setattr(edit, "verify_written", fail)
    options = EditOptions(output=image.with_name("out") if copy else None)
    with pytest.raises(type(problem)):
        add_extensions(image, [package("b")], [acme], options)
    assert files_of(image.parent) == before


def test_an_image_in_use_is_not_touched(tmp_path, templates, acme):
    path = tmp_path / "image" / "disk.qcow2"
    path.parent.mkdir()
    shutil.copy(templates / "disk.qcow2", path)
    graft_in(path, acme, "a")
    before = files_of(path.parent)
    with contextlib.ExitStack() as stack:
        stack.enter_context(open_image(path, writable=True))
        with pytest.raises(ImageInUseError):
            add_extensions(path, [package("b")], [acme], PLAIN)
    assert files_of(path.parent) == before


def test_another_edit_in_between_is_noticed(raw, acme, monkeypatch):
    """Two vendors at once: the second does not take back what the first has done."""
    graft_in(raw, acme, "a")
    real = edit.make_statement
    calls = []

    def interfere(*args, **named):
        if not calls:
            calls.append(1)
            add_extensions(raw, [package("first")], [acme], PLAIN)
        return real(*args, **named)

    monkeypatch.setattr(edit, "make_statement", interfere)
    with pytest.raises(UsageError, match="somebody else"):
        add_extensions(raw, [package("second")], [acme], PLAIN)
    assert carried(raw).extensions == [("a", "1"), ("first", "1")] and verifies(raw, acme)


# --- against a model ------------------------------------------------------------------------------------------------

NAMES = st.sampled_from(["a", "b", "c", "d"])
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["add", "replace", "remove"]),
        st.lists(NAMES, min_size=1, max_size=3, unique=True),
        st.sampled_from([None, Placement.INLINE, Placement.SIDECAR]),
    ),
    max_size=6,
)


def expected(model, action, names, version):
    """What a list does; None where the request is to be refused."""
    present = [name for name, _ in model]
    if action == "add":
        return None if set(names) & set(present) else [*model, *((name, version) for name in names)]
    if action == "replace":
        kept = [(name, version if name in names else old) for name, old in model]
        return [*kept, *((name, version) for name in names if name not in present)]
    left = [item for item in model if item[0] not in names]
    return left if left and set(names) <= set(present) else None


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS, suffix=st.sampled_from(["disk.img", "disk.qcow2", "disc.iso"]))
def test_sequences_against_a_list(tmp_path, templates, acme, steps, suffix):
    folder = tmp_path / "model"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    path = folder / suffix
    shutil.copy(templates / suffix, path)
    clean = path.read_bytes()
    graft_in(path, acme, "a", "b")
    model = [("a", "1"), ("b", "1")]
    actions = {"add": add_extensions, "replace": replace_extensions}
    for number, (action, names, placement) in enumerate(steps):
        version, options = str(number + 2), EditOptions(placement=placement)
        wanted = expected(model, action, names, version)
        try:
            if action == "remove":
                remove_extensions(path, [f"com.example.{name}" for name in names], [acme], options)
            else:
                actions[action](path, [package(name, version) for name in names], [acme], options)
            done = True
        except UsageError:
            done = False
        assert done == (wanted is not None)
        model = model if wanted is None else wanted
        assert carried(path).extensions == model
    assert verifies(path, acme)
    detach(path)
    assert files_of(folder) == {path.name: clean}


def test_a_name_too_long_for_the_journal_is_told_at_once(raw, acme, monkeypatch):
    path = raw.rename(raw.parent / ("n" * 240 + ".img"))
    graft_in(path, acme, "a")
    before = files_of(path.parent)
    with monkeypatch.context() as patch, pytest.raises(FileError, match="File name too long") as caught:
        patch.setattr(edit, "open_image", None)  # nothing is read before
        add_extensions(path, [package("b")], [acme], PLAIN)
    assert "shorter name, or use -o OUT" in caught.value.hint
    assert files_of(path.parent) == before
    output = raw.parent / "short.img"
    add_extensions(path, [package("b")], [acme], EditOptions(output=output))
    assert carried(output).extensions == [("a", "1"), ("b", "1")]
