"""Whose signature it is that comes from elsewhere: a key that was named, or a certificate under a root that was."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime, timedelta

import pytest
import signing_ca as ca
from openssl_tsa import Tsa, tsa_leaf

from vmgraft.errors import BadSignatureError, ExpiredError, FileError, UntrustedSignerError, UsageError
from vmgraft.signing.dsse import MAX_ENVELOPE, Signature, parse_envelope
from vmgraft.signing.keys import public_from_key
from vmgraft.signing.material import Material, pack_material
from vmgraft.signing.merge import Vouchers, load_certificates, signer_of, with_signatures
from vmgraft.signing.timestamps import make_request

WIDE = (-4000, 4000)
ROOT = ca.issue("Root", ca=True, days=WIDE)
OTHER = ca.issue("Other Root", ca=True, days=WIDE)
INTER = ca.issue("Intermediate", ROOT, ca=True, days=WIDE)
TSA_ROOT = ca.issue("TSA Root", ca=True, days=WIDE)
TSA_LEAF = tsa_leaf(TSA_ROOT, days=WIDE)


def certified(sim, leaf, *, stamps=(), keyid=""):
    """The usual envelope, signed by the key of a certificate, under a keyid of another program."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    envelope = parse_envelope(sim.graft().stored[0])
    sig = leaf.key.sign(envelope.pae, ec.ECDSA(hashes.SHA256()))
    extension = pack_material(Material((leaf.der, INTER.der), tuple(stamps)))
    return dataclasses.replace(envelope, signatures=(Signature(keyid, sig, extension),))


def judge(envelope, vouchers, now=None):
    return signer_of(envelope, 0, vouchers, now=now or datetime.now(UTC))


def test_a_named_key(sim):
    envelope = parse_envelope(sim.graft().stored[0])
    vendor, stranger = sim.keys["vendor"].public, sim.keys["stranger"].public
    assert judge(envelope, Vouchers((stranger, vendor))) == vendor
    with pytest.raises(UntrustedSignerError, match="nobody named"):
        judge(envelope, Vouchers((stranger,)))
    renamed = dataclasses.replace(envelope.signatures[0], keyid=stranger.keyid)
    with pytest.raises(BadSignatureError, match="is not its"):
        judge(dataclasses.replace(envelope, signatures=(renamed,)), Vouchers((stranger,)))


def test_a_certificate_under_a_named_root(sim):
    leaf = ca.issue("Release", INTER, days=WIDE)
    envelope = certified(sim, leaf, keyid="whatever")
    assert judge(envelope, Vouchers(roots=(OTHER.der, ROOT.der))) == public_from_key(leaf.key.public_key())
    with pytest.raises(UntrustedSignerError, match="no trusted path"):
        judge(envelope, Vouchers(roots=(OTHER.der,)))
    with pytest.raises(UntrustedSignerError) as caught:
        judge(envelope, Vouchers((sim.keys["vendor"].public,)))
    assert "--ca" in caught.value.hint


def test_what_a_chain_lacks_is_said_with_its_option(sim):
    leaf = ca.issue("Release", INTER, days=WIDE)
    whole = certified(sim, leaf)
    alone = dataclasses.replace(whole.signatures[0], extension=pack_material(Material((leaf.der,))))
    with pytest.raises(UntrustedSignerError, match="signature 0: no trusted path") as caught:
        signer_of(
            dataclasses.replace(whole, signatures=(alone,)), 0, Vouchers(roots=(ROOT.der,)), now=ca.NOW, file="x.json"
        )
    assert caught.value.file == "x.json"
    assert "--intermediates" in caught.value.hint and "CN=Intermediate" in caught.value.hint
    namesake = ca.issue("Root", ca=True, days=WIDE)
    with pytest.raises(UntrustedSignerError) as caught:
        judge(whole, Vouchers(roots=(namesake.der,)))
    assert "--ca" in caught.value.hint and "--intermediates" not in caught.value.hint


def test_a_certificate_for_something_else(sim):
    server = ca.issue("Server", INTER, days=WIDE, usages=(ca.ExtendedKeyUsageOID.SERVER_AUTH,))
    with pytest.raises(UntrustedSignerError):
        judge(certified(sim, server), Vouchers(roots=(ROOT.der,)))


def test_a_certificate_beside_a_signature_of_another_key(sim):
    envelope = certified(sim, ca.issue("Release", INTER, days=WIDE))
    stolen = ca.issue("Victim", INTER, days=WIDE)
    extension = pack_material(Material((stolen.der, INTER.der)))
    swapped = dataclasses.replace(envelope.signatures[0], extension=extension)
    with pytest.raises(BadSignatureError, match="not by the key of the certificate"):
        judge(dataclasses.replace(envelope, signatures=(swapped,)), Vouchers(roots=(ROOT.der,)))


def test_an_expired_certificate_needs_a_timestamp_from_before(sim, tmp_path):
    (tmp_path / "serial").write_text("01")
    leaf = ca.issue("Release", INTER, days=WIDE)
    plain = certified(sim, leaf)
    stamp = Tsa(tmp_path, TSA_LEAF).reply(make_request(plain.signatures[0].sig))
    extension = pack_material(Material((leaf.der, INTER.der), (stamp,)))
    stamped = dataclasses.replace(plain, signatures=(dataclasses.replace(plain.signatures[0], extension=extension),))
    roots, late = (ROOT.der,), ca.NOW + timedelta(days=4100)
    for envelope, vouchers in (
        (plain, Vouchers(roots=roots, tsa_roots=(TSA_ROOT.der,))),
        (stamped, Vouchers(roots=roots)),
        (stamped, Vouchers(roots=roots, tsa_roots=(OTHER.der,))),
    ):
        with pytest.raises(ExpiredError, match="expired"):
            judge(envelope, vouchers, now=late)
    assert judge(stamped, Vouchers(roots=roots, tsa_roots=(TSA_ROOT.der,)), now=late)


def test_a_timestamp_from_the_future_proves_nothing(sim, tmp_path):
    """The authority's clock is ahead of ours: a certificate that begins later would be good by it."""
    (tmp_path / "serial").write_text("01")
    ahead = datetime.now(UTC) - ca.NOW
    leaf = ca.issue("Release", INTER, days=(ahead.days - 20, 4000))
    plain = certified(sim, leaf)
    stamp = Tsa(tmp_path, TSA_LEAF).reply(make_request(plain.signatures[0].sig))
    extension = pack_material(Material((leaf.der, INTER.der), (stamp,)))
    stamped = dataclasses.replace(plain, signatures=(dataclasses.replace(plain.signatures[0], extension=extension),))
    vouchers = Vouchers(roots=(ROOT.der,), tsa_roots=(TSA_ROOT.der,))
    with pytest.raises(ExpiredError, match="not valid before"):
        judge(stamped, vouchers, now=datetime.now(UTC) - timedelta(days=30))
    assert judge(stamped, vouchers)


def test_an_envelope_that_would_be_too_long(sim):
    envelope = parse_envelope(sim.graft().stored[0])
    long = Signature("x", b"\0", {"kind": "y", "pad": "a" * MAX_ENVELOPE})
    with pytest.raises(UsageError, match="cannot be stored"):
        with_signatures(envelope, [long])


def test_roots_from_files(tmp_path):
    (tmp_path / "roots.pem").write_bytes(ROOT.pem + OTHER.pem)
    assert load_certificates([tmp_path / "roots.pem"]) == (ROOT.der, OTHER.der)
    assert load_certificates([]) == ()
    (tmp_path / "junk.pem").write_text("junk")
    with pytest.raises(FileError):
        load_certificates([tmp_path / "junk.pem"])
