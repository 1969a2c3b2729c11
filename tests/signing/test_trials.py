"""Signatures that do not say whose they are: every key is tried, and what that costs is bounded."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmgraft.errors import UntrustedSignerError
from vmgraft.signing import trials
from vmgraft.signing.dsse import MAX_SIGNATURES, Envelope, Signature, serialise
from vmgraft.signing.judge import judge_signatures
from vmgraft.signing.keys import GENERATED_KINDS, PublicKey, generate
from vmgraft.signing.trials import MAX_HASHED, OVERHEAD, Trials
from vmgraft.signing.vsa import read_summary

KEYS = {kind: generate(kind) for kind in (*GENERATED_KINDS, "p384")}


@pytest.mark.parametrize("kind", KEYS)
def test_a_key_may_have_made_what_it_made(kind):
    key = KEYS[kind]
    for number in range(4 if kind.startswith("rsa") else 40):
        assert key.public.may_have_made(key.sign(b"%d" % number))
    others = {"rsa3072": b"x" * 383, "rsa4096": b"x" * 384, "mldsa65": b"x" * 3308, "ed25519": b"x" * 65}
    others |= {"p256": b"x" * 73, "p384": b"x" * 105}
    assert not key.public.may_have_made(
        others.get(kind, b"x" * {"p256": 73}.get(kind, 105))
    ) and not key.public.may_have_made(b"x" * 8192)


@given(st.binary(max_size=120))
def test_no_signature_is_missed(sig):
    """What is not tried would not verify."""
    for key in KEYS.values():
        assert key.public.may_have_made(sig) or not key.public.verify(b"m", sig)


def test_the_longest_signatures_there_are():
    """Both numbers as long as the group's order, with a sign: 72 and 104 bytes (RFC 3279, 2.2.3)."""
    for kind, longest in (("p256", 72), ("p384", 104)):
        seen = max(len(KEYS[kind].sign(b"m")) for _ in range(200))
        assert seen == longest and KEYS[kind].public.may_have_made(b"x" * longest)


@pytest.fixture
def checks(monkeypatch):
    """Every signature check that is really made."""
    made, verify = [], PublicKey.verify

    def counted(self, message, sig):
        made.append(self.keyid)
        return verify(self, message, sig)

    monkeypatch.setattr(PublicKey, "verify", counted)
    return made


def crowd(count, size):
    """Keys, and an envelope in which nobody whom they are has signed, by the same kind of key."""
    keys = [generate("ed25519") for _ in range(count)]
    stranger = generate("ed25519")
    envelope = Envelope(b"x" * size, ())
    sig = stranger.sign(envelope.pae)
    return [key.public for key in keys], Envelope(envelope.payload, (Signature("", sig),) * MAX_SIGNATURES)


def test_many_keys_and_signatures_over_a_large_statement(checks):
    keys, envelope = crowd(64, 700_000)
    found = judge_signatures(envelope, keys)
    assert not found.valid and len(found.unknown) == MAX_SIGNATURES
    assert len(checks) <= MAX_HASHED // 700_000 < 64 * MAX_SIGNATURES
    assert "signature 0 names no known key" in found.notes[0] and "it needs a keyid" in found.notes[0]


def test_a_statement_of_usual_size_is_tried_with_every_key(checks):
    keys, envelope = crowd(64, 100_000)
    checks.clear()
    found = judge_signatures(envelope, keys)
    assert len(checks) == 64 * MAX_SIGNATURES and not found.notes


def test_keys_of_other_kinds_cost_nothing(checks):
    _, envelope = crowd(1, 700_000)
    checks.clear()
    keys = [KEYS["mldsa65"].public, KEYS["rsa3072"].public, KEYS["rsa4096"].public] * 20
    assert Trials(envelope.pae, 16).signer(envelope.signatures[0].sig, keys) is None and not checks


@pytest.mark.parametrize("place", [0, 8, MAX_SIGNATURES - 1])
def test_what_is_nobodys_takes_nothing_from_the_others(place):
    """A signature without keyid by the last of twenty keys, wherever it stands among others."""
    keys, envelope = crowd(20, 700_000)
    mine = generate("ed25519")
    signatures = list(envelope.signatures)
    signatures[place] = Signature("", mine.sign(envelope.pae))
    found = judge_signatures(Envelope(envelope.payload, tuple(signatures)), [*keys, mine.public])
    assert found.valid == {mine.public}


def test_the_key_that_is_named_is_found_beyond_the_bound(checks):
    keys, envelope = crowd(64, 700_000)
    mine = generate("ed25519")
    named = Signature(mine.keyid, mine.sign(envelope.pae))
    found = judge_signatures(Envelope(envelope.payload, (*envelope.signatures[:-1], named)), [*keys, mine.public])
    assert found.valid == {mine.public}


def test_a_summary_is_searched_within_the_same_bound(checks):
    keys, envelope = crowd(64, 700_000)
    with pytest.raises(UntrustedSignerError, match="not signed by an auditor named here"):
        read_summary(serialise(envelope), keys)
    assert len(checks) <= MAX_HASHED // 700_000


def test_an_auditor_who_is_named_is_tried_first(checks, monkeypatch):
    keys = [generate("ed25519") for _ in range(5)]
    sig = keys[4].sign(b"message")
    publics = [key.public for key in keys]
    assert Trials(b"message", 1).signer(sig, publics, keys[4].keyid) == publics[4]
    assert len(checks) == 2  # one of them by the signer itself
    monkeypatch.setattr(trials, "MAX_HASHED", 2 * (OVERHEAD + 7))
    search = Trials(b"message", 1)
    assert search.signer(sig, publics) is None and search.cut and search.tries == 2
    assert search.signer(sig, publics, keys[4].keyid) == publics[4] and not search.cut


def test_a_short_list_is_tried_whole():
    """The bound is far from what anybody needs: one signature, all the keys that a policy may have."""
    assert MAX_HASHED // (OVERHEAD + (1 << 20)) >= 64
