"""Wrong signatures of every kind are refused, by us and by openssl; a thing that is allowed is allowed by both."""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
from negative_vectors import MESSAGE, Vector, all_vectors, encode_check

from vmgraft.signing.dsse import Envelope, Signature, pae, serialise
from vmgraft.signing.keys import generate

VECTORS = all_vectors()
#: What openssl 3.0 has no ML-DSA for.
ASKED = [vector for vector in VECTORS if vector.key.kind != "mldsa65"]


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector.name)
def test_vector(vector: Vector) -> None:
    assert vector.key.verify(MESSAGE, vector.signature) is vector.valid


def openssl(vector: Vector, folder, number: int) -> bool:
    """Ask `openssl`: True for verified, False for anything else it ends with."""
    names = [folder / f"{number}.{kind}" for kind in ("pem", "sig", "msg")]
    for path, data in zip(names, (vector.key.pem, vector.signature, MESSAGE), strict=True):
        path.write_bytes(data)
    key, sig, message = map(str, names)
    # Not `openssl dgst`: that one reads no more of a signature than the key's size, and never sees what stands behind.
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", key, "-rawin", "-in", message, "-sigfile", sig]
    if vector.key.kind != "ed25519":
        command += ["-digest", "sha384" if vector.key.kind == "p384" else "sha256"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=30)
    assert (done.returncode == 0) is ("Signature Verified Successfully" in done.stdout)
    return done.returncode == 0


def test_openssl_says_the_same(tmp_path):
    with ThreadPoolExecutor(2) as pool:
        said = list(pool.map(lambda item: openssl(item[1], tmp_path, item[0]), enumerate(ASKED)))
    assert [v.name for v, answer in zip(ASKED, said, strict=True) if answer is not v.valid] == []


def test_there_are_enough_of_each_kind():
    assert encode_check()
    for kind in ("p256", "p384", "ed25519", "rsa", "mldsa65"):
        mine = [vector for vector in VECTORS if vector.key.kind == kind]
        assert sum(vector.valid for vector in mine) >= 1
        assert sum(not vector.valid for vector in mine) >= 25
        assert len({vector.name for vector in mine}) == len(mine)


#: Ways to spoil any signature at all, in an envelope whose statement is fine.
SPOILED = {
    "cut": lambda sig: sig[:-1],
    "longer": lambda sig: sig + b"\0",
    "reversed": lambda sig: sig[::-1],
    "zeros": lambda sig: bytes(len(sig)),
    "one byte": lambda sig: sig[:1],
    "ten times": lambda sig: (sig * 10)[:8192],
}


@pytest.mark.parametrize("how", SPOILED)
@pytest.mark.parametrize("name", ["vendor", "second", "rsa", "pq"])
def test_in_an_envelope_it_is_a_bad_signature(sim, name, how):
    evidence, key = sim.graft(signers=[name]), sim.keys[name]
    statement = sim.statement([sim.manifest()])[0]
    sig = SPOILED[how](key.sign(pae("application/vnd.in-toto+json", statement)))
    evidence.stored = [serialise(Envelope(statement, (Signature(key.keyid, sig),)))]
    report = sim.verify(evidence, sim.policy(name))
    assert report.error == "bad-signature" and report.statement is None


@pytest.mark.parametrize("kind", ["p256", "ed25519", "rsa3072", "mldsa65"])
def test_the_other_signature_of_ecdsa_takes_no_second_place(sim, kind):
    """Two different good signatures by one key are still one signer."""
    key = generate(kind)
    sim.keys["twice"] = key
    try:
        statement, payloads = sim.statement([sim.manifest()])
        message = pae("application/vnd.in-toto+json", statement)
        evidence = sim.graft()
        signatures = tuple(Signature(keyid, key.sign(message)) for keyid in (key.keyid, "", key.keyid))
        evidence.stored, evidence.payloads = [serialise(Envelope(statement, signatures))], payloads
        names = ["twice", "vendor"]
        rule = {"signatures": {"anyOf": {"minimumMatches": 2, "of": [f"key:{name}" for name in names]}}}
        assert sim.verify(evidence, sim.policy(*names, entry=rule)).error == "untrusted-signer"
    finally:
        del sim.keys["twice"]
