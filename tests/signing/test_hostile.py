"""Strict reading of everything that comes from elsewhere: one clear error each, in bounded time and memory."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import signing_ca as ca
from hostile_documents import (
    FILE,
    FLOODS,
    ODD_NUMBERS,
    ODD_STRINGS,
    SPELLINGS,
    SPOIL,
    envelope_over,
    leaves,
    put,
    readers,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from vmgraft.errors import VmgraftError
from vmgraft.signing.dsse import MAX_SIGNATURES, Envelope, Signature, pae, serialise
from vmgraft.signing.integrity import Run
from vmgraft.signing.keys import PrivateKey, public_from_key
from vmgraft.signing.material import MAX_CERTIFICATES, Material, pack_material

KINDS = (
    "envelope", "material", "statement", "manifest", "policy", "signed policy", "bundle", "summary", "signed summary",
)  # fmt: skip
#: What is put into a document, beside any bytes.
TOKENS = [b'"', b"{", b"}", b"[]", b",", b":", b"null", b"1e9", b"\\u0000", b"\\", b"=", b"\x00", "\u202e".encode()]
#: Generous: seconds of processor time for one document, and bytes of memory for each byte that may be read.
SECONDS = 6.0
BYTES_PER_BYTE = 60


@pytest.fixture(scope="module")
def known(sim):
    return readers(sim)


def refused(reader, data: bytes) -> VmgraftError:
    """Read; demand one error of the right class, with the file, that fits on a screen and is safe to print."""
    started = time.process_time()
    with pytest.raises(VmgraftError) as caught:
        reader.read(data)
    assert time.process_time() - started < SECONDS
    error = caught.value
    assert type(error) in (reader.error if isinstance(reader.error, tuple) else (reader.error,))
    assert error.file == FILE
    assert error.message
    for text in (str(error), error.hint or ""):
        assert len(text) < 700
        assert text.isprintable(), text
    return error


def test_all_kinds_are_here_and_sound(known):
    assert set(known) == set(KINDS)
    for reader in known.values():
        assert reader.read(reader.sound) is not None
        assert len(reader.sound) < reader.limit


@pytest.mark.parametrize("how", SPOIL)
@pytest.mark.parametrize("kind", KINDS)
def test_spoiled(known, kind, how):
    reader, (spoil, word) = known[kind], SPOIL[how]
    data = spoil(reader.sound)
    error = refused(reader, data)
    assert word in error.message or (len(data) > reader.limit and is_about_size(error))


def is_about_size(error: VmgraftError) -> bool:
    return "more than" in error.message or "at most" in error.message


@pytest.mark.parametrize("how", FLOODS)
@pytest.mark.parametrize("kind", ["envelope", "statement", "manifest", "policy", "bundle"])
def test_floods_end_in_time(known, kind, how):
    """As many bytes as are read at all of what costs most, and of the rest up to 1 MiB."""
    reader = known[kind]
    size = reader.limit if how in ("objects", "names") else min(reader.limit, 1 << 20)
    data = FLOODS[how](reader.sound, size)
    assert size * 0.8 < len(data) <= size
    if (kind, how) == ("bundle", "unknown members of the sound one"):
        assert reader.read(data).envelope.signatures  # bundles of other programs may hold what we do not know
    else:
        refused(reader, data)


_MEASURE = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from conftest import Simulator
from hostile_documents import FLOODS, readers
from vmgraft.errors import VmgraftError
from vmgraft.signing.keys import generate
known = readers(Simulator({name: generate() for name in ("vendor", "second")}))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for reader in known.values():
    for data in (b"{}", b"[" * 100):  # what is imported on use
        try:
            reader.read(data)
        except VmgraftError:
            pass
for kind in ("statement", "policy"):
    reader = known[kind]
    before = peak()
    for flood in (FLOODS["objects"], FLOODS["names"], FLOODS["one string of escapes"]):
        try:
            reader.read(flood(reader.sound, reader.limit))
        except VmgraftError:
            pass
    print(reader.limit, (peak() - before) * 1024)
"""


def test_floods_take_memory_in_proportion():
    """In a process of its own, smallest limits first, so that its peak tells."""
    command = [sys.executable, "-c", _MEASURE, str(Path(__file__).parent)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=100)
    grown = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(grown) == 2
    for limit, peak in grown:
        assert peak < (16 << 20) + BYTES_PER_BYTE * limit, grown


@pytest.mark.parametrize("kind", KINDS)
def test_one_byte_too_many(known, kind):
    reader = known[kind]
    room = 1 if kind != "signed summary" else 3  # base64 has steps of three
    assert is_about_size(refused(reader, reader.sound + b" " * (reader.limit + room - len(reader.sound))))


# --- every place ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("odd", ODD_STRINGS)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("signed policy", "summary")])
def test_every_string(known, kind, odd):
    reader = known[kind]
    document = json.loads(reader.sound)
    places = [(p, value) for p, value in leaves(document) if isinstance(value, str) and p[-1] not in reader.free]
    if odd == "a line break behind":  # PEM ends with one, and a description has lines
        places = [(path, value) for path, value in places if path[-1] not in ("pem", "certificates", "description")]
    assert len(places) >= 2
    wrong = []
    for path, value in places:
        try:
            refused(reader, put(document, path, ODD_STRINGS[odd](value)))
        except pytest.fail.Exception:
            wrong.append(path)
    assert wrong == []


@pytest.mark.parametrize("odd", ODD_NUMBERS)
@pytest.mark.parametrize("kind", ["manifest", "policy"])
def test_every_number(known, kind, odd):
    reader = known[kind]
    document = json.loads(reader.sound)
    places = [path for path, value in leaves(document) if isinstance(value, int)]
    assert len(places) >= 2
    for path in places:
        refused(reader, put(document, path, ODD_NUMBERS[odd]))


# --- base64 --------------------------------------------------------------------------------------------------------

CERTIFICATE = ("signatures", 0, "extension", "ext", "x509CertificateChain", "certificates", 0, "rawBytes")
STAMP = ("signatures", 0, "extension", "ext", "timestampVerificationData", "rfc3161Timestamps", 0, "signedTimestamp")
ENCODED = [
    ("envelope", ("payload",)),
    ("envelope", ("signatures", 0, "sig")),
    ("envelope", ("signatures", 1, "sig")),
    ("material", CERTIFICATE),
    ("material", STAMP),
    ("signed policy", ("payload",)),
    ("signed policy", ("signatures", 0, "sig")),
    ("bundle", ("dsseEnvelope", "payload")),
    ("bundle", ("dsseEnvelope", "signatures", 0, "sig")),
    ("bundle", ("verificationMaterial", "x509CertificateChain", "certificates", 0, "rawBytes")),
    ("summary", ("payload",)),
    ("summary", ("signatures", 0, "sig")),
]


@pytest.mark.parametrize("how", SPELLINGS)
@pytest.mark.parametrize(("kind", "path"), ENCODED, ids=lambda item: str(item[-1]) if isinstance(item, tuple) else item)
def test_base64_has_one_spelling(known, kind, path, how):
    reader = known[kind]
    document = json.loads(reader.sound)
    text = dict(leaves(document))[path]
    spelled = SPELLINGS[how](text)
    assert spelled != text
    if spelled == "" and kind in ("envelope", "bundle", "summary") and path[-1] == "payload":
        return  # an empty payload is a payload; what it says is the statement's business
    refused(reader, put(document, path, spelled))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_bent_bytes(known, kind, data):
    """Bytes changed, cut out and put in, anywhere: it is read, or refused as everything else is."""
    reader = known[kind]
    bent = bytearray(reader.sound)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(bent)))
        bent[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3) | st.sampled_from(TOKENS))
    try:
        reader.read(bytes(bent))
    except VmgraftError:
        refused(reader, bytes(bent))


# --- nothing is parsed before it is verified -----------------------------------------------------------------------

BOMBS = {
    "brackets": b"[" * 700_000,
    "open objects": b'{"a":' * 140_000,
    "members": b"{" + b'"a":0,' * 110_000 + b'"a":0}',
    "digits": b"9" * 700_000,
    "quotes": b'"' + b'\\"' * 350_000,
    "sound but for its size": None,
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_nothing_is_parsed_before_it_is_verified(sim, monkeypatch, bomb):
    """A bomb under a bad signature: exit code 10, at once, and no parser has seen a byte of it."""
    payload = BOMBS[bomb] or sim.statement([sim.manifest()])[0] + b" " * 700_000
    evidence, seen = sim.graft(), []
    evidence.stored = [envelope_over(sim, payload, forged=True)]
    loads, step = json.loads, Run._statement
    monkeypatch.setattr(json, "loads", lambda text, **options: seen.append(len(text)) or loads(text, **options))
    monkeypatch.setattr(Run, "_statement", lambda run: seen.append("statement") or step(run))
    policy = sim.policy()
    seen.clear()
    started = time.process_time()
    report = sim.verify(evidence, policy)
    spent = time.process_time() - started
    assert (report.error, report.statement, report.extensions) == ("bad-signature", None, ())
    assert seen == [len(evidence.stored[0])]  # the envelope, once, and nothing else
    assert spent < 1
    # The same bytes, well signed: now they are read, and refused for what they are.
    if BOMBS[bomb] is not None:
        evidence.stored = [envelope_over(sim, payload, forged=False)]
        started = time.process_time()
        assert sim.verify(evidence, policy).error == "graft-format"
        assert time.process_time() - started < SECONDS
        assert "statement" in seen


def test_a_signed_policy_is_not_parsed_before_it_is_verified(sim, known, monkeypatch):
    reader, seen, loads = known["signed policy"], [], json.loads
    document = json.loads(reader.sound)
    document["signatures"][0]["sig"] = document["signatures"][0]["sig"][:-8] + "AAAAAAA="
    monkeypatch.setattr(json, "loads", lambda text, **options: seen.append(len(text)) or loads(text, **options))
    data = json.dumps(document).encode()
    refused(reader, data)
    assert seen == [len(data)]


def test_chains_that_lead_in_circles_cost_little(sim):
    """As many certificates as there may be, each of them by each other's name, before four stores of four roots."""
    stores = [
        {"name": f"ca{n}", "type": "ca", "certificates": "".join(ca.issue("I", ca=True).pem.decode() for _ in range(4))}
        for n in range(4)
    ]
    names = [f"ca:{store['name']}" for store in stores]
    entry = {"trustStores": names, "trustedIdentities": ["*"]}
    policy = sim.policy(entry=entry, top={"trustStores": stores})
    above = ca.issue("I", ca=True)
    others = tuple(ca.issue("I", above, ca=True, days=(-10 - n, 300 + n)).der for n in range(MAX_CERTIFICATES - 1))
    statement = sim.statement([sim.manifest()])[0]
    message = pae("application/vnd.in-toto+json", statement)
    signatures = []
    for _ in range(MAX_SIGNATURES):
        leaf = ca.issue("Release", above)
        key = PrivateKey(public_from_key(leaf.key.public_key()), leaf.key)
        packed = pack_material(Material((leaf.der, *others)))
        signatures.append(Signature(key.keyid, key.sign(message), packed))
    evidence = sim.graft()
    evidence.stored = [serialise(Envelope(statement, tuple(signatures)))]
    started = time.process_time()
    report = sim.verify(evidence, policy)
    assert time.process_time() - started < SECONDS
    assert (report.error, report.statement) == ("untrusted-signer", None)
