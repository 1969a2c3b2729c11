"""What travels with a signature, and what is signed by somebody who means harm: targets for the fuzzer."""

from __future__ import annotations

import base64
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "signing"))

ROOT = Path(__file__).parents[2]
NOW = datetime(2026, 11, 22, 15, 0, 0, tzinfo=UTC)
_SIGNATURE = b"a signature"
_FIELD = "signatures[0].extension"


@dataclass(frozen=True)
class _World:
    """Everything sound, made once: a chain, a timestamp, a graft, a summary."""

    chain: tuple[bytes, ...]
    authority: Any
    stamp: bytes
    clock: Any
    key: Any
    policy: Any
    statement: bytes
    payloads: dict[str, bytes]
    summary: bytes


@cache
def _world() -> _World:
    import hashlib

    import signing_ca as ca
    from hostile_documents import sound_summary
    from verdict_stamps import Stamps

    from vmgraft.imagefmt.contract import ContentDigest
    from vmgraft.signing.certificates import Authority
    from vmgraft.signing.keys import generate
    from vmgraft.signing.manifest import parse_manifest
    from vmgraft.signing.policy import parse_policy
    from vmgraft.signing.policytools import format_policy, init_policy
    from vmgraft.signing.statement import build_statement
    from vmgraft.signing.timestamps import TimestampAuthority
    from vmgraft.vendor.pack import load_package

    root = ca.issue("Root", ca=True)
    inter = ca.issue("Intermediate", root, ca=True)
    chain = (ca.issue("Release", inter).der, inter.der)
    with tempfile.TemporaryDirectory() as folder:
        stamps = Stamps(Path(folder))
        stamp, clock = stamps(_SIGNATURE, NOW, "tsa"), TimestampAuthority("tsa", (stamps.root("tsa"),))
    package, key = load_package(ROOT / "examples" / "clock"), generate()
    content = ContentDigest(1 << 20, bytes(32), bytes(32), bytes(32))
    parts = [(package.manifest, package.module)]
    statement = build_statement(content, parts, created=NOW - timedelta(days=1))
    payloads = {hashlib.sha256(data).hexdigest(): data for data in parts[0] if data is not None}
    policy = parse_policy(format_policy(init_policy({"acme": key.public}, [parse_manifest(package.manifest)])))
    crl = ca.crl(root)
    authority = Authority("acme", (root.der,), (crl,))
    return _World(chain, authority, stamp, clock, key, policy, statement, payloads, sound_summary())


class _Evidence:
    """A graft with any envelope."""

    def __init__(self, envelope: bytes) -> None:
        self.envelope = envelope

    def format_problem(self) -> None:
        return None

    def envelopes(self) -> list[bytes]:
        return [self.envelope]

    def payload(self, sha256: str) -> bytes:
        from vmgraft.errors import PayloadMismatchError

        if sha256 not in _world().payloads:
            raise PayloadMismatchError("nothing stored hashes to it")
        return _world().payloads[sha256]

    def content(self, flat: bool) -> Any:
        from vmgraft.imagefmt.contract import ContentDigest

        return ContentDigest(1 << 20, bytes(32), bytes(32), bytes(32))


# --- targets -------------------------------------------------------------------------------------------------------


def _material(data: bytes) -> None:
    """The extension of a signature, as the envelope's reader hands it on, and all that is in it."""
    from vmgraft.errors import BadSignatureError
    from vmgraft.schemas import strict_json
    from vmgraft.signing.material import pack_material, parse_material

    document = strict_json(data, file="f", error=BadSignatureError, max_bytes=1 << 20)
    if not isinstance(document, dict):
        return
    found = parse_material(document, field=_FIELD, file="f")
    if found is None:
        return
    if parse_material(pack_material(found), field=_FIELD) != found:
        raise AssertionError("the material reads back differently")
    for token in found.timestamps:
        _quietly(_timestamp, token)
    if found.certificates:
        _certify(found.certificates)


def _certificate(data: bytes) -> None:
    """A leaf under a sound intermediate, and an intermediate under a sound leaf."""
    leaf, inter = _world().chain
    _quietly(_certify, (data, inter))
    _certify((leaf, data))


def _certify(chain: tuple[bytes, ...]) -> None:
    from vmgraft.signing.certificates import certify

    found = certify(chain, [_world().authority], at=NOW, now=NOW)
    if found.key.spki == b"" or found.authority != "acme":
        raise AssertionError("certified by nobody")


def _timestamp(data: bytes) -> None:
    from vmgraft.signing.timestamps import examine_timestamp

    found = examine_timestamp(data, _SIGNATURE, [_world().clock])
    if found.time != NOW:
        raise AssertionError(f"another time was read from a signed one: {found.time}")


def _bundle(data: bytes) -> None:
    from vmgraft.signing.bundles import read_signed
    from vmgraft.signing.dsse import parse_envelope, serialise

    envelope = read_signed(data, file="f").envelope
    if parse_envelope(serialise(envelope)) != envelope:
        raise AssertionError("what was brought in reads back differently")


def _summary(data: bytes) -> None:
    """An auditor's own words: the envelope is always good."""
    from vmgraft.signing.vsa import read_summary, sign_summary

    key = _world().key
    read_summary(sign_summary(data, key), [key.public], file="f")


def _verdict(data: bytes) -> None:
    """A statement well signed by a vendor who means harm: there is always a report."""
    from vmgraft.signing.dsse import PAYLOAD_TYPE, Envelope, Signature, pae, serialise
    from vmgraft.signing.verify import verify_evidence

    world = _world()
    signature = Signature(world.key.keyid, world.key.sign(pae(PAYLOAD_TYPE, data)))
    _judge(serialise(Envelope(data, (signature,))), verify_evidence)


def _unsigned_verdict(data: bytes) -> None:
    """An envelope by nobody: there is always a report, and it is never good news."""
    from vmgraft.signing.verify import verify_evidence

    if _judge(data, verify_evidence):
        raise AssertionError("believed without a signature")


def _judge(envelope: bytes, verify: Callable[..., Any]) -> bool:
    report = verify(_Evidence(envelope), _world().policy, image_name="disk.img", now=NOW)
    if report.ok is not (report.error is None):
        raise AssertionError("a report contradicts itself")
    return bool(report.ok)


def _quietly(action: Callable[[Any], None], argument: Any) -> None:
    from vmgraft.errors import VmgraftError

    try:
        action(argument)
    except VmgraftError:
        return


# --- seeds ---------------------------------------------------------------------------------------------------------


def _extension() -> dict[str, Any]:
    from vmgraft.signing.material import Material, pack_material

    return pack_material(Material(_world().chain, (_world().stamp,))) or {}


def _material_seeds() -> Iterator[tuple[str, bytes]]:
    yield "sound", json.dumps(_extension()).encode()
    yield "empty", json.dumps(_extension() | {"ext": {}}).encode()
    yield "deep", b"[" * 5000


def _certificate_seeds() -> Iterator[tuple[str, bytes]]:
    yield "leaf", _world().chain[0]
    yield "intermediate", _world().chain[1]
    yield "root", _world().authority.roots[0]


def _timestamp_seeds() -> Iterator[tuple[str, bytes]]:
    yield "token", _world().stamp
    yield "cut", _world().stamp[:200]


def _bundle_seeds() -> Iterator[tuple[str, bytes]]:
    from vmgraft.signing.bundles import BUNDLE_TYPES
    from vmgraft.signing.dsse import Envelope, Signature, serialise

    envelope = serialise(Envelope(_world().statement, (Signature("k", b"sig"),)))
    yield "envelope", envelope
    leaf = {"rawBytes": base64.b64encode(_world().chain[0]).decode()}
    materials = {
        "key": {"publicKey": {"hint": "k"}, "tlogEntries": [{"logIndex": "1"}]},
        "leaf": {"certificate": leaf},
        "chain": _extension()["ext"],
    }
    for name, material in materials.items():
        document = {
            "mediaType": BUNDLE_TYPES[-1], "verificationMaterial": material, "dsseEnvelope": json.loads(envelope),
        }  # fmt: skip
        yield name, json.dumps(document).encode()


def _summary_seeds() -> Iterator[tuple[str, bytes]]:
    yield "sound", _world().summary
    yield "empty", b"{}"


def _verdict_seeds() -> Iterator[tuple[str, bytes]]:
    yield "sound", _world().statement
    document = json.loads(_world().statement)
    document["predicate"] |= {"critical": ["binding", "extensions", "expires"], "expires": "2027-01-01T00:00:00Z"}
    yield "more", json.dumps(document).encode()


def _unsigned_seeds() -> Iterator[tuple[str, bytes]]:
    from vmgraft.signing.dsse import Envelope, Signature, serialise

    yield "nobody", serialise(Envelope(_world().statement, (Signature("", b"sig", _extension()),)))
    yield "forged", serialise(Envelope(_world().statement, (Signature(_world().key.keyid, bytes(64)),)))


_WORDS = tuple(
    f'"{word}"'.encode()
    for word in (
        "kind", "ext", "x509CertificateChain", "certificates", "rawBytes", "timestampVerificationData",
        "rfc3161Timestamps", "signedTimestamp", "mediaType", "verificationMaterial", "dsseEnvelope", "publicKey",
        "hint", "certificate", "tlogEntries", "payload", "payloadType", "signatures", "keyid", "sig", "extension",
    )
)  # fmt: skip


def targets(make: Callable[..., Any]) -> dict[str, Any]:
    """Return the targets; ``make`` is the class of a target."""
    packages = ("vmgraft.schemas", "vmgraft.signing")
    return {
        "material": make(_material, _material_seeds, packages, _WORDS),
        "certificate": make(_certificate, _certificate_seeds, packages),
        "timestamp": make(_timestamp, _timestamp_seeds, packages),
        "bundle": make(_bundle, _bundle_seeds, packages, _WORDS),
        "summary": make(_summary, _summary_seeds, packages),
        "verdict": make(_verdict, _verdict_seeds, packages),
        "unsigned-verdict": make(_unsigned_verdict, _unsigned_seeds, packages, _WORDS),
    }
