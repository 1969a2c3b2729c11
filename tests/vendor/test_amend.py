"""More signatures and timestamps around one statement, and a new statement over the same extensions."""

import dataclasses
import json
import os
import re
from datetime import UTC, datetime, timedelta

import pytest
from vendor_testkit import carried, files_of, package, verifies

from vmgraft.errors import (
    BadSignatureError,
    ContentMismatchError,
    ExpiredError,
    GraftFormatError,
    NoGraftError,
    PayloadMismatchError,
    UntrustedSignerError,
    UsageError,
    VmgraftError,
)
from vmgraft.imagefmt import replace
from vmgraft.imagefmt.contract import Placement
from vmgraft.imagefmt.graft import attach_sections, detach_image, open_graft, open_image
from vmgraft.imagefmt.journal import journal_path
from vmgraft.imagefmt.record import SectionKind
from vmgraft.signing.dsse import MAX_SIGNATURES, Envelope, Signature, parse_envelope, serialise
from vmgraft.signing.export import export_bundle
from vmgraft.signing.keys import generate
from vmgraft.signing.merge import Vouchers
from vmgraft.signing.statement import build_statement
from vmgraft.vendor import amend, resign, seal
from vmgraft.vendor.amend import AmendOptions, append_signatures, import_signatures
from vmgraft.vendor.graft import AttachOptions, attach, detach
from vmgraft.vendor.resign import ResignOptions

PLAIN = AmendOptions()


def envelope_of(image):
    return parse_envelope(carried(image).envelope)


def hints_of(image):
    with open_image(image) as opened:
        return json.loads(open_graft(opened).hints())


def sections_of(image):
    with open_image(image) as opened:
        record = open_graft(opened).record
        return {
            (s.kind, s.raw_sha256) for s in record.sections if s.kind not in (SectionKind.ENVELOPE, SectionKind.UNDO)
        }


@pytest.fixture
def grafted(raw, acme):
    attach(raw, [package("a"), package("b", module=False)], [acme], AttachOptions())
    return raw


def refused(image, error, call, match=None):
    """The call fails, and every file beside the image is as it was."""
    before = files_of(image.parent)
    with pytest.raises(error, match=match) as caught:
        call()
    assert files_of(image.parent) == before
    return caught.value


def with_envelope(image, envelope, packages):
    """Put a graft with any envelope into a clean image."""
    attach_sections(image, seal.lay_out(packages, serialise(envelope)), tree_digest=bytes(32))


# --- sign --append --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", [Placement.INLINE, Placement.SIDECAR])
def test_append_leaves_all_else_alone(image, acme, other, placement):
    attach(image, [package("a")], [acme], AttachOptions(placement=placement))
    before, kept = carried(image), sections_of(image)
    done = append_signatures(image, [other], PLAIN, trust=[acme.public])
    after = carried(image)
    old, new = parse_envelope(before.envelope), parse_envelope(after.envelope)
    assert new.payload == old.payload and new.signatures[:-1] == old.signatures
    assert (after.placement, after.state) == (before.placement, "ok")
    assert sections_of(image) == kept
    assert done.added == (other.keyid,) and done.signatures == (acme.keyid, other.keyid)
    assert done.extensions == (("com.example.a", "1"),)
    assert verifies(image, acme, other)
    assert not journal_path(image).exists()


def test_append_then_detach_gives_the_original_back(image, acme, other):
    clean = files_of(image.parent)
    attach(image, [package("a")], [acme], AttachOptions())
    append_signatures(image, [other, generate("p256")], PLAIN, trust=[acme.public])
    detach(image)
    assert files_of(image.parent) == clean


def test_append_to_a_copy(grafted, acme, other, tmp_path):
    before = files_of(grafted.parent)
    target = tmp_path / "signed.img"
    done = append_signatures(grafted, [other], AmendOptions(target), trust=[acme.public])
    assert files_of(grafted.parent) == before and done.path == target
    assert verifies(target, acme, other) and not verifies(grafted, other)


def test_append_needs_somebody_to_trust(grafted, acme, other):
    key = generate("p256")
    refused(grafted, UsageError, lambda: append_signatures(grafted, [key], PLAIN), "trust")
    both = {"trust": [acme.public], "vouch_for_unverified": True}
    refused(grafted, UsageError, lambda: append_signatures(grafted, [key], PLAIN, **both))
    refused(grafted, UntrustedSignerError, lambda: append_signatures(grafted, [key], PLAIN, trust=[other.public]))
    append_signatures(grafted, [key], PLAIN, vouch_for_unverified=True)
    assert verifies(grafted, acme, key)


def test_append_refuses_a_signer_twice(grafted, acme, other):
    trust = {"trust": [acme.public]}
    refused(grafted, UsageError, lambda: append_signatures(grafted, [acme], PLAIN, **trust), "already")
    refused(grafted, UsageError, lambda: append_signatures(grafted, [other, other], PLAIN, **trust))
    refused(grafted, UsageError, lambda: append_signatures(grafted, [], PLAIN, **trust))


def test_append_up_to_the_limit(raw, acme):
    keys = [generate("ed25519") for _ in range(MAX_SIGNATURES)]
    attach(raw, [package("a")], [acme], AttachOptions())
    refused(raw, UsageError, lambda: append_signatures(raw, keys, PLAIN, trust=[acme.public]), "at most 16")
    append_signatures(raw, keys[1:], PLAIN, trust=[acme.public])
    assert len(envelope_of(raw).signatures) == MAX_SIGNATURES


@pytest.mark.parametrize("vouch", [False, True])
def test_append_compares_the_content(grafted, acme, other, vouch):
    data = bytearray(grafted.read_bytes())
    data[70_000] ^= 1
    grafted.write_bytes(data)
    who = {"vouch_for_unverified": True} if vouch else {"trust": [acme.public]}
    refused(grafted, ContentMismatchError, lambda: append_signatures(grafted, [other], PLAIN, **who))


@pytest.mark.parametrize("vouch", [False, True])
def test_append_compares_the_payloads(raw, acme, other, vouch):
    parts = [(p.manifest, p.module) for p in (package("a"),)]
    statement = build_statement(None, parts, created=datetime.now(UTC), binding="any")
    swapped = dataclasses.replace(package("a"), module=package("a").module + b"\0")
    with_envelope(raw, parse_envelope(seal.sign(statement, [acme])), [swapped])
    who = {"vouch_for_unverified": True} if vouch else {"trust": [acme.public]}
    for call in (lambda: append_signatures(raw, [other], PLAIN, **who), lambda: anew(raw, acme)):
        error = refused(raw, PayloadMismatchError, call)
        assert error.field == "payloads" and error.file == str(raw)  # and each is said once
        assert len(re.findall("payloads?:", str(error))) == str(error).count(str(raw)) == 1
        assert "no stored payload has this digest" in error.message


def test_append_to_an_expired_statement(raw, acme, other):
    make_expired(raw, acme)
    error = refused(raw, ExpiredError, lambda: append_signatures(raw, [other], PLAIN, trust=[acme.public]))
    assert "resign" in error.hint


def test_append_beside_a_signature_that_names_its_key_wrongly(raw, acme, other):
    parts = [(package("a").manifest, package("a").module)]
    statement = build_statement(None, parts, created=datetime.now(UTC), binding="any")
    good = parse_envelope(seal.sign(statement, [acme]))
    forged = Envelope(statement, (*good.signatures, Signature(other.keyid, bytes(64))))
    with_envelope(raw, forged, [package("a")])
    refused(raw, BadSignatureError, lambda: append_signatures(raw, [other], PLAIN, trust=[acme.public]), "is not its")


def test_nothing_to_append_to(raw, acme, other):
    refused(raw, NoGraftError, lambda: append_signatures(raw, [other], PLAIN, trust=[acme.public]))


def test_append_to_a_damaged_record(grafted, acme, other):
    data = bytearray(grafted.read_bytes())
    place = data.index(b"vmgraft", 1 << 20)  # the hints: in the clear, and under no signature
    data[place] ^= 1
    grafted.write_bytes(data)
    refused(grafted, GraftFormatError, lambda: append_signatures(grafted, [other], PLAIN, trust=[acme.public]))


@pytest.mark.parametrize("step", ["put_in", "check_written", "remove_journal"])
def test_a_failure_on_the_way_leaves_the_old_envelope(grafted, acme, other, monkeypatch, step):
    before = carried(grafted).envelope
    real = getattr(replace, step)
    calls = []

    def fail_once(*arguments):
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(replace, step, fail_once)
    with pytest.raises(KeyboardInterrupt):
        append_signatures(grafted, [other], PLAIN, trust=[acme.public])
    assert carried(grafted).envelope == before and verifies(grafted, acme)
    assert not journal_path(grafted).exists()


@pytest.mark.parametrize(
    ("step", "signed"), [("write_journal", False), ("put_in", False), ("check_written", True), ("remove_journal", True)]
)
def test_a_kill_leaves_the_old_envelope_or_the_new_one(image, acme, other, monkeypatch, step, signed):
    """The process ends at once when it comes to a step; readers see one of the two, and the next change works."""
    clean = files_of(image.parent)
    attach(image, [package("a")], [acme], AttachOptions())
    child = os.fork()
    if child == 0:
        try:
            setattr(replace, step, lambda *_arguments: os._exit(9))
            append_signatures(image, [other], PLAIN, trust=[acme.public])
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert verifies(image, acme) and verifies(image, other) is signed
    third = generate("p256")
    append_signatures(image, [third], PLAIN, trust=[acme.public])
    assert verifies(image, acme, third) and verifies(image, other) is signed
    assert not journal_path(image).exists()
    detach(image)
    assert files_of(image.parent) == clean


def test_what_reads_back_differently_is_taken_back(grafted, acme, other, monkeypatch):
    def not_good(*_arguments, **_options):
        raise VmgraftError("not good")

    monkeypatch.setattr(amend, "_read_back", not_good)
    before = carried(grafted).envelope
    with pytest.raises(VmgraftError, match="not good"):
        append_signatures(grafted, [other], PLAIN, trust=[acme.public])
    assert carried(grafted).envelope == before


# --- import ---------------------------------------------------------------------------------------------------------


def signed_elsewhere(image, tmp_path, *keys, keyid=None, bundle=False):
    """An envelope, or the first bundle of it, as another program might write them."""
    payload = envelope_of(image).payload
    envelope = parse_envelope(seal.sign(payload, keys))
    if keyid is not None:
        named = tuple(dataclasses.replace(s, keyid=keyid) for s in envelope.signatures)
        envelope = dataclasses.replace(envelope, signatures=named)
    path = tmp_path / "elsewhere.json"
    path.write_bytes(export_bundle(envelope)[0][1] if bundle else serialise(envelope))
    return path


@pytest.mark.parametrize("bundle", [False, True])
@pytest.mark.parametrize("keyid", [None, "", "key-1"])
def test_import_names_the_key_as_it_is_named_here(grafted, acme, other, tmp_path, keyid, bundle):
    source = signed_elsewhere(grafted, tmp_path, other, keyid=keyid, bundle=bundle)
    kept = sections_of(grafted)
    done = import_signatures(grafted, source, Vouchers((other.public,)), PLAIN)
    assert done.added == (other.keyid,) and sections_of(grafted) == kept
    assert [s.keyid for s in envelope_of(grafted).signatures] == [acme.keyid, other.keyid]
    assert verifies(grafted, acme, other)


def test_import_takes_what_is_new_and_vouched_for(grafted, acme, other, tmp_path):
    stranger = generate("p256")
    source = signed_elsewhere(grafted, tmp_path, acme, stranger, other)
    done = import_signatures(grafted, source, Vouchers((other.public, acme.public)), PLAIN)
    assert done.added == (other.keyid,)
    assert any("already" in note for note in done.notes) and any(stranger.keyid in note for note in done.notes)
    vouchers = Vouchers((other.public, acme.public))
    refused(grafted, UntrustedSignerError, lambda: import_signatures(grafted, source, vouchers, PLAIN))


def test_import_refuses(grafted, acme, other, tmp_path):
    vouchers = Vouchers((other.public,))
    mine = signed_elsewhere(grafted, tmp_path, acme)
    refused(grafted, UntrustedSignerError, lambda: import_signatures(grafted, mine, vouchers, PLAIN), "nobody named")
    again = Vouchers((acme.public,))
    refused(grafted, UsageError, lambda: import_signatures(grafted, mine, again, PLAIN), "signed already")
    document = json.loads(signed_elsewhere(grafted, tmp_path, other).read_text())
    document["signatures"][0]["sig"] = "AAAA"
    mine.write_text(json.dumps(document))
    refused(grafted, BadSignatureError, lambda: import_signatures(grafted, mine, vouchers, PLAIN), "is not its")
    mine.write_bytes(serialise(parse_envelope(seal.sign(envelope_of(grafted).payload + b" ", [other]))))
    refused(grafted, PayloadMismatchError, lambda: import_signatures(grafted, mine, vouchers, PLAIN), "another")
    mine.write_bytes(b"{" * 100_000)
    refused(grafted, BadSignatureError, lambda: import_signatures(grafted, mine, vouchers, PLAIN))


# --- resign ---------------------------------------------------------------------------------------------------------


def make_expired(image, key, *, future=False):
    parts = [(package("a").manifest, package("a").module)]
    now = datetime.now(UTC)
    created, expires = (now + timedelta(days=1), None) if future else (now - timedelta(days=9), now - timedelta(days=1))
    statement = build_statement(None, parts, created=created, expires=expires, binding="any")
    with_envelope(image, parse_envelope(seal.sign(statement, [key])), [package("a")])
    return expires


def anew(image, key, **options):
    return resign.resign(image, [key], ResignOptions(**options))


def test_resign_makes_a_new_statement(image, acme, other):
    clean = files_of(image.parent)
    attach(image, [package("b"), package("a")], [acme], AttachOptions(flat="never"))
    old = carried(image)
    end = datetime(2096, 1, 1, tzinfo=UTC)
    done = anew(image, other, trust=(acme.public,), expires=end)
    new = carried(image)
    assert new.extensions == old.extensions and new.statement.image == old.statement.image
    assert new.statement.subjects == old.statement.subjects and new.placement == old.placement
    assert new.statement.expires == end == done.expires and new.statement.created >= old.statement.created
    assert done.dropped_signers == (acme.keyid,) and done.accepted_expired is None
    assert "acceptedExpired" not in hints_of(image) and "resigned" in hints_of(image)
    assert verifies(image, other) and not verifies(image, acme)
    detach(image)
    assert files_of(image.parent) == clean


def test_resign_keeps_the_end_unless_told(raw, acme):
    end = datetime(2096, 1, 1, tzinfo=UTC)
    attach(raw, [package("a")], [acme], AttachOptions(expires=end))
    assert anew(raw, acme).expires == end == carried(raw).statement.expires


def test_resign_checks_the_old_signature(grafted, other, acme):
    refused(grafted, UntrustedSignerError, lambda: anew(grafted, other))
    refused(grafted, UsageError, lambda: resign.resign(grafted, [], ResignOptions(trust=(acme.public,))))
    data = bytearray(grafted.read_bytes())
    data[70_000] ^= 1
    grafted.write_bytes(data)
    refused(grafted, ContentMismatchError, lambda: anew(grafted, acme))


def test_resign_of_an_expired_statement_is_said_aloud_and_written_down(raw, acme):
    end = make_expired(raw, acme)
    later = datetime(2096, 1, 1, tzinfo=UTC)
    error = refused(raw, ExpiredError, lambda: anew(raw, acme, expires=later), "expired at")
    assert "--accept-expired" in error.hint
    refused(raw, UsageError, lambda: anew(raw, acme, accept_expired=True), "no new end")
    done = anew(raw, acme, accept_expired=True, expires=later)
    assert done.accepted_expired == end.replace(microsecond=0)
    assert hints_of(raw)["acceptedExpired"] == f"{end:%Y-%m-%dT%H:%M:%SZ}"
    assert verifies(raw, acme)
    anew(raw, acme)
    assert "acceptedExpired" not in hints_of(raw)


def test_expired_does_not_excuse_a_stranger(raw, acme, other):
    make_expired(raw, acme)
    later = datetime(2096, 1, 1, tzinfo=UTC)
    refused(raw, UntrustedSignerError, lambda: anew(raw, other, accept_expired=True, expires=later))


def test_resign_never_takes_a_statement_from_the_future(raw, acme):
    make_expired(raw, acme, future=True)
    refused(raw, ExpiredError, lambda: anew(raw, acme, accept_expired=True), "not valid before")


def test_resign_failure_brings_the_old_one_back(grafted, acme, monkeypatch):
    before = carried(grafted).envelope

    def not_good(*_arguments):
        raise VmgraftError("not good")

    monkeypatch.setattr(resign, "verify_written", not_good)
    with pytest.raises(VmgraftError, match="not good"):
        anew(grafted, acme)
    assert carried(grafted).envelope == before


def test_an_interrupted_change_is_finished_first(grafted, acme, other, tmp_path):
    """As after a kill between detach and attach: the image carries nothing, the journal the old graft."""
    before = carried(grafted)
    with open_image(grafted, writable=True) as opened:
        replace.write_journal(opened, opened.locate())
    kept = journal_path(grafted).read_bytes()
    detach_image(grafted)
    journal_path(grafted).write_bytes(kept)
    append_signatures(grafted, [other], PLAIN, trust=[acme.public])
    assert parse_envelope(carried(grafted).envelope).payload == parse_envelope(before.envelope).payload
    assert verifies(grafted, acme, other) and not journal_path(grafted).exists()


def test_the_program_says_that_an_expired_statement_was_accepted(raw, acme, tmp_path, capsys):
    from vmgraft.cli.app import cli

    end = make_expired(raw, acme)
    (tmp_path / "acme.key").write_bytes(acme.pem(None))
    command = ["resign", str(raw), "--key", str(tmp_path / "acme.key"), "--expires", "2096-01-01", "--accept-expired"]
    cli.main(command, standalone_mode=False)
    shown = capsys.readouterr()
    assert f"expired at {end:%Y-%m-%dT%H:%M:%SZ}, and was accepted" in shown.err
    assert "2096-01-01T00:00:00Z" in shown.out
    cli.main(["inspect", str(raw)], standalone_mode=False)
    assert f"acceptedExpired: {end:%Y-%m-%dT%H:%M:%SZ}" in capsys.readouterr().out
