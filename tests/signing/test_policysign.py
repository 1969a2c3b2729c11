"""Signed policies: believed only when a key named from elsewhere signed them, and never going back."""

from __future__ import annotations

import base64
import json
import subprocess

import pytest

from vmgraft.errors import PolicyError, StateError, UsageError
from vmgraft.signing.dsse import Envelope, Signature, pae, parse_envelope, serialise
from vmgraft.signing.policy import PolicyTrust, load_policy
from vmgraft.signing.policysign import POLICY_TYPE, sign_policy, unwrap_policy
from vmgraft.signing.policytools import format_policy


class Versions:
    def __init__(self, **seen):
        self.seen = seen

    def policy_version(self, signer):
        return self.seen.get("version")


class Broken:
    def policy_version(self, signer):
        raise StateError("the memory cannot be read")


@pytest.fixture
def plain(sim):
    return format_policy(sim.policy_document() | {"policyVersion": 7})


@pytest.fixture
def load(tmp_path):
    def load(data, *keys, **options):
        path = tmp_path / "policy"
        path.write_bytes(data)
        return load_policy(path, PolicyTrust(tuple(key.public for key in keys), **options))

    return load


def test_signed_policy_is_the_policy(sim, plain, load):
    admin, vendor = sim.keys["second"], sim.keys["vendor"]
    policy = load(sign_policy(plain, [admin]), admin)
    assert policy.signed_by == (admin.keyid,) and policy.policy_version == 7
    assert policy.sha256 == load(plain).sha256
    assert sim.verify(sim.graft(), policy).ok
    both = load(sign_policy(plain, [admin, vendor]), admin, vendor, sim.keys["third"])
    assert set(both.signed_by) == {admin.keyid, vendor.keyid}


@pytest.mark.parametrize(
    ("signer", "trusted", "options", "part"),
    [
        (None, [], {"required": True}, "is not signed"),
        (None, ["second"], {}, "is not signed"),
        ("second", [], {}, "no key to check it with"),
        ("second", [], {"required": True}, "no key to check it with"),
        ("second", ["vendor"], {}, "not signed by"),
        ("second", ["second"], {"memory": Versions(version=8)}, "older than 8"),
        ("second", ["second"], {"memory": Versions(version=7)}, None),
        ("second", ["second"], {"memory": Versions()}, None),
        ("second", ["vendor", "second"], {"required": True}, None),
        (None, [], {}, None),
        (None, [], {"memory": Versions(version=8)}, None),
    ],
)
def test_what_is_demanded(sim, plain, load, signer, trusted, options, part):
    data = plain if signer is None else sign_policy(plain, [sim.keys[signer]])
    keys = [sim.keys[name] for name in trusted]
    if part is None:
        assert load(data, *keys, **options).policy_version == 7
        return
    with pytest.raises(PolicyError, match=part) as caught:
        load(data, *keys, **options)
    assert caught.value.hint and caught.value.file


def test_memory_that_cannot_answer_is_no_yes(sim, plain, load):
    with pytest.raises(StateError):
        load(sign_policy(plain, [sim.keys["vendor"]]), sim.keys["vendor"], memory=Broken())


def test_key_in_the_policy_itself_proves_nothing(sim, plain, load):
    """The vendor's key stands in the policy, and does not make its signature over a policy count."""
    with pytest.raises(PolicyError, match="not signed by"):
        load(sign_policy(plain, [sim.keys["vendor"]]), sim.keys["second"])


def test_graft_and_policy_cannot_be_taken_for_each_other(sim, plain):
    vendor = sim.keys["vendor"]
    trust = PolicyTrust((vendor.public,))
    wrapped = sign_policy(plain, [vendor])
    evidence = sim.graft()
    with pytest.raises(PolicyError, match=r"not application/vnd\.vmgraft\.policy"):
        unwrap_policy(evidence.stored[0], trust)
    evidence.stored = [wrapped]
    assert sim.verify(evidence).error == "bad-signature"
    # the same payload, signed as an in-toto statement and relabelled
    relabelled = Signature(vendor.keyid, vendor.sign(pae("application/vnd.in-toto+json", plain)))
    with pytest.raises(PolicyError, match="not signed by"):
        unwrap_policy(serialise(Envelope(plain, (relabelled,), POLICY_TYPE)), trust)


def test_no_byte_of_a_signed_policy_can_change(sim, plain, load):
    vendor = sim.keys["vendor"]
    wrapped = sign_policy(plain, [vendor])
    start = wrapped.index(b'"payload"') + 11
    for position in [*range(start, start + 400, 7), *range(len(wrapped) - 120, len(wrapped) - 6)]:
        changed = bytearray(wrapped)
        changed[position] ^= 1
        try:
            policy = load(bytes(changed), vendor)
        except PolicyError:
            continue
        assert policy.sha256 == load(plain).sha256, position  # the keyid is a hint


def test_nothing_is_parsed_before_it_is_verified(sim, plain, monkeypatch):
    bomb = b"[" * 100_000
    signature = Signature(sim.keys["vendor"].keyid, sim.keys["vendor"].sign(b"something else"))
    monkeypatch.setattr("vmgraft.signing.policy.parse_policy", lambda *a, **k: pytest.fail("parsed"))
    with pytest.raises(PolicyError, match="not signed by"):
        unwrap_policy(serialise(Envelope(bomb, (signature,), POLICY_TYPE)), PolicyTrust((sim.keys["vendor"].public,)))


def test_only_valid_policies_are_signed(sim, plain):
    with pytest.raises(UsageError, match="at least one key"):
        sign_policy(plain, [])
    with pytest.raises(PolicyError, match="trustPolicies"):
        sign_policy(b'{"version": "1.0", "policyVersion": 1, "keys": [], "trustPolicies": []}', [sim.keys["vendor"]])
    document = json.loads(plain) | {"trustStores": []}
    document["keys"] *= 1
    document["trustPolicies"] = [document["trustPolicies"][0] | {"name": f"p{i}"} for i in range(64)]
    for entry in document["trustPolicies"]:
        entry["imageScopes"] = [f"name:{'x' * 200}{i}" for i in range(64)]
    with pytest.raises(UsageError, match="more than 1048576"):
        sign_policy(format_policy(document), [sim.keys["vendor"]])


def test_openssl_verifies_a_signed_policy(sim, plain, tmp_path):
    envelope = parse_envelope(sign_policy(plain, [sim.keys["vendor"]]), payload_type=POLICY_TYPE)
    head = f"DSSEv1 {len(POLICY_TYPE)} {POLICY_TYPE} {len(plain)} ".encode()
    (tmp_path / "pae").write_bytes(head + plain)
    (tmp_path / "sig").write_bytes(envelope.signatures[0].sig)
    (tmp_path / "pub").write_bytes(sim.keys["vendor"].public.pem)
    command = ["openssl", "dgst", "-sha256", "-verify", "pub", "-signature", "sig", "pae"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, check=True).stdout == b"Verified OK\n"


def test_envelope_of_a_policy_is_read_strictly(sim, plain):
    trust = PolicyTrust((sim.keys["vendor"].public,))
    document = json.loads(sign_policy(plain, [sim.keys["vendor"]]))
    for change in (
        {"payload": document["payload"] + "\n"},
        {"payload": base64.b64encode(plain).decode() + "="},
        {"signatures": []},
        {"signatures": document["signatures"] * 17},
        {"extra": 1},
    ):
        with pytest.raises(PolicyError):
            unwrap_policy(json.dumps(document | change).encode(), trust)
