"""Timestamps beside signatures: asked for over HTTP or through files, answered by openssl."""

import json
import sys
from pathlib import Path

import pytest
from vendor_testkit import carried, files_of, package, verifies

sys.path.append(str(Path(__file__).resolve().parents[1] / "signing"))

import signing_ca as ca
from openssl_tsa import Tsa, serve, tsa_leaf

from vmgraft.errors import BadSignatureError, FileError, UnsupportedError, UntrustedSignerError, UsageError
from vmgraft.imagefmt.contract import PROBE
from vmgraft.signing.bundles import signature_material
from vmgraft.signing.dsse import Envelope, Signature, parse_envelope, serialise
from vmgraft.signing.material import MAX_TIMESTAMPS
from vmgraft.signing.timestamps import TimestampAuthority, verify_timestamp
from vmgraft.vendor import seal
from vmgraft.vendor.amend import AmendOptions, Proposal, amend
from vmgraft.vendor.graft import AttachOptions, attach, detach
from vmgraft.vendor.stamp import stamp_offline, stamp_online, write_request

WIDE = (-4000, 4000)
ROOT = ca.issue("TSA Root", ca=True, days=WIDE)
LEAF = tsa_leaf(ROOT, days=WIDE)
OTHER = ca.issue("Other Root", ca=True, days=WIDE)
PLAIN = AmendOptions()


@pytest.fixture
def tsa(tmp_path):
    folder = tmp_path / "tsa"
    folder.mkdir()
    (folder / "serial").write_text("01")
    return Tsa(folder, LEAF)


@pytest.fixture
def grafted(raw, acme, other):
    attach(raw, [package("a")], [acme, other], AttachOptions())
    return raw


def stamps_of(image):
    return [
        (signature, signature_material(signature, index).timestamps)
        for index, signature in enumerate(parse_envelope(carried(image).envelope).signatures)
    ]


def answer(tsa):
    return lambda _headers, body: (200, {"Content-Type": "application/timestamp-reply"}, tsa.reply(body))


def refused(image, error, call, match=None):
    before = files_of(image.parent)
    with pytest.raises(error, match=match) as caught:
        call()
    assert files_of(image.parent) == before
    return caught.value


def test_over_http(image, acme, tsa):
    clean = files_of(image.parent)
    attach(image, [package("a")], [acme], AttachOptions())
    before = parse_envelope(carried(image).envelope)
    with serve(answer(tsa)) as url:
        done = stamp_online(image, url, PLAIN, roots=(ROOT.der,))
    ((signature, (token,)),) = stamps_of(image)
    after = parse_envelope(carried(image).envelope)
    assert after.payload == before.payload and signature.sig == before.signatures[0].sig
    assert verify_timestamp(token, signature.sig, [TimestampAuthority("tsa", (ROOT.der,))]) == done.stamps[0].time
    assert [stamp.keyid for stamp in done.stamps] == [acme.keyid] and "CN=TSA" in done.stamps[0].signer
    assert tsa.openssl_verifies(token, signature.sig, ROOT)
    assert verifies(image, acme)
    detach(image)
    assert files_of(image.parent) == clean


def test_each_signature_once_and_again_when_named(grafted, acme, other, tsa):
    with serve(answer(tsa)) as url:
        assert len(stamp_online(grafted, url, PLAIN).stamps) == 2
        error = refused(grafted, UsageError, lambda: stamp_online(grafted, url, PLAIN), "already")
        assert "--signer" in error.hint
        for _ in range(MAX_TIMESTAMPS - 1):
            stamp_online(grafted, url, PLAIN, keyids=[other.keyid])
        assert [len(tokens) for _, tokens in stamps_of(grafted)] == [1, MAX_TIMESTAMPS]
        refused(grafted, UsageError, lambda: stamp_online(grafted, url, PLAIN, keyids=[other.keyid]), "as many")
        refused(grafted, UsageError, lambda: stamp_online(grafted, url, PLAIN, keyids=["SHA256:x"]), "no signature")


def test_an_authority_that_is_not_the_one_expected(grafted, tsa):
    with serve(answer(tsa)) as url:
        refused(grafted, UntrustedSignerError, lambda: stamp_online(grafted, url, PLAIN, roots=(OTHER.der,)))
    with serve(lambda _headers, _body: (500, {}, b"")) as url:
        refused(grafted, FileError, lambda: stamp_online(grafted, url, PLAIN), "500")


def test_an_old_answer_cannot_be_used_again(grafted, acme, tsa):
    kept = []

    def replay(_headers, body):
        kept.append(tsa.reply(body))
        return 200, {"Content-Type": "application/timestamp-reply"}, kept[0]

    with serve(replay) as url:
        stamp_online(grafted, url, PLAIN, keyids=[acme.keyid])
        refused(grafted, BadSignatureError, lambda: stamp_online(grafted, url, PLAIN, keyids=[acme.keyid]), "nonces")


def test_through_files(grafted, other, tsa, tmp_path):
    request, response, target = tmp_path / "q.tsq", tmp_path / "r.tsr", tmp_path / "stamped.img"
    before = files_of(grafted.parent)
    assert write_request(grafted, request, PROBE, keyids=[other.keyid]) == other.keyid
    response.write_bytes(tsa.reply(request.read_bytes()))
    done = stamp_offline(grafted, request, response, AmendOptions(target), roots=(ROOT.der,))
    assert files_of(grafted.parent) == before and done.amended.path == target
    assert [len(tokens) for _, tokens in stamps_of(target)] == [0, 1]
    stamped = target.read_bytes()
    with pytest.raises(UsageError, match="stands beside the signature already"):
        stamp_offline(target, request, response, PLAIN)
    assert target.read_bytes() == stamped
    with pytest.raises(FileError, match="exists"):
        write_request(grafted, request, PROBE, keyids=[other.keyid])


def test_a_request_is_about_one_signature(grafted, acme, tmp_path):
    with pytest.raises(UsageError, match="there are 2"):
        write_request(grafted, tmp_path / "q", PROBE)
    with pytest.raises(UsageError, match="no signature"):
        write_request(grafted, tmp_path / "q", PROBE, keyids=["SHA256:x"])
    assert not (tmp_path / "q").exists()


def test_files_that_do_not_belong_together(grafted, acme, other, tsa, tmp_path):
    first, second, response = tmp_path / "1.tsq", tmp_path / "2.tsq", tmp_path / "r.tsr"
    write_request(grafted, first, PROBE, keyids=[acme.keyid])
    write_request(grafted, second, PROBE, keyids=[other.keyid])
    response.write_bytes(tsa.reply(first.read_bytes()))
    refused(grafted, BadSignatureError, lambda: stamp_offline(grafted, second, response, PLAIN))
    for name in (first, response):
        kept = name.read_bytes()
        for junk in (b"", b"junk", kept[:-1], bytes(100_000)):
            name.write_bytes(junk)
            error = (BadSignatureError, UsageError, FileError)
            refused(grafted, error, lambda: stamp_offline(grafted, first, response, PLAIN))
        name.write_bytes(kept)
    stamp_offline(grafted, first, response, PLAIN)


def test_what_is_not_understood_is_not_lost(grafted, acme, tsa):
    def strange(_graft, old):
        first = old.signatures[0]
        odd = Signature(first.keyid, first.sig, {"kind": "of another program"})
        return Proposal(Envelope(old.payload, (odd, *old.signatures[1:])))

    amend(grafted, strange, PLAIN)
    with serve(answer(tsa)) as url:
        refused(grafted, UnsupportedError, lambda: stamp_online(grafted, url, PLAIN, keyids=[acme.keyid]))


def test_an_amendment_never_changes_what_is_signed(grafted, acme):
    from vmgraft.errors import VerificationError

    def other_payload(_graft, old):
        document = json.loads(old.payload)
        return Proposal(parse_envelope(seal.sign(json.dumps(document).encode(), [acme])))

    refused(grafted, VerificationError, lambda: amend(grafted, other_payload, PLAIN), "must not change")
    assert serialise(parse_envelope(carried(grafted).envelope)) == carried(grafted).envelope
