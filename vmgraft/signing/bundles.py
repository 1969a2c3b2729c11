"""Signatures made elsewhere, read in: a DSSE envelope, or a Sigstore bundle as cosign and its relatives write it.

Bundles: sigstore/protobuf-specs, protos/sigstore_bundle.proto, JSON form. A bundle holds one envelope with one
signature, and either names a key or carries a certificate. Nothing in the result is trusted.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any, Final

from vmgraft.errors import BadSignatureError, UnsupportedError
from vmgraft.schemas import strict_json
from vmgraft.signing.dsse import MAX_ENVELOPE, Envelope, Signature, parse_envelope
from vmgraft.signing.material import KIND, MAX_CERTIFICATES, Material, pack_material, parse_material

if TYPE_CHECKING:
    from cryptography import x509

#: Largest file accepted, in bytes: an envelope, certificates, and the log's entries, which repeat the envelope.
MAX_BUNDLE: Final = 4 * MAX_ENVELOPE
#: ``mediaType`` of bundles v0.1, v0.2 and v0.3; the last changed its form after its first release.
BUNDLE_TYPES: Final = (
    *(f"application/vnd.dev.sigstore.bundle+json;version=0.{minor}" for minor in (1, 2, 3)),
    "application/vnd.dev.sigstore.bundle.v0.3+json",
)

_KEY_FORMS: Final = ("publicKey", "certificate", "x509CertificateChain")
_PathOrNone = str | PathLike[str] | None


@dataclass(frozen=True, slots=True)
class Brought:
    """What a file brought: an envelope, and sentences about what of the file is left behind."""

    envelope: Envelope
    notes: tuple[str, ...] = ()


def read_signed(data: bytes, *, file: _PathOrNone = None) -> Brought:
    """Parse an envelope or a bundle.

    Args:
        data: JSON, at most 4 MiB.
        file: What to name in the error.

    Returns:
        The envelope; certificates and timestamps stand beside its signatures as ``material`` describes them.

    Raises:
        BadSignatureError: malformed, or neither of the two.
        UnsupportedError: a bundle of another version, or one that is over a plain message.
    """
    document = strict_json(data, file=file, error=BadSignatureError, max_bytes=MAX_BUNDLE)
    if not isinstance(document, dict):
        raise BadSignatureError("not a JSON object", file=file)
    if "mediaType" in document:
        return _read_bundle(document, file)
    if "payloadType" not in document:
        hint = "cosign writes a bundle with --new-bundle-format, or with --bundle from release 3 on"
        raise BadSignatureError("neither a DSSE envelope nor a Sigstore bundle", file=file, hint=hint)
    envelope = parse_envelope(data, file=file)
    for index, signature in enumerate(envelope.signatures):
        parse_material(signature.extension, field=f"signatures[{index}].extension", file=file)
    return Brought(envelope)


def _read_bundle(document: Mapping[str, Any], file: _PathOrNone) -> Brought:
    if document["mediaType"] not in BUNDLE_TYPES:
        kind = str(document["mediaType"])[:80]
        raise UnsupportedError(f"{kind!r} is no bundle of v0.1 to v0.3", file=file, field="mediaType")
    if "dsseEnvelope" not in document:
        hint = "sign the statement as an attestation (cosign attest-blob), not as a plain file"
        raise UnsupportedError("the bundle holds no DSSE envelope", file=file, field="dsseEnvelope", hint=hint)
    stored = json.dumps(document["dsseEnvelope"]).encode("ascii")
    envelope = parse_envelope(stored, file=file)
    if len(envelope.signatures) != 1:
        raise BadSignatureError("a bundle holds one signature", file=file, field="dsseEnvelope.signatures")
    material = document.get("verificationMaterial")
    if not isinstance(material, dict):
        raise BadSignatureError("not a JSON object", file=file, field="verificationMaterial")
    extension = pack_material(_material(material, file))
    signature = dataclasses.replace(envelope.signatures[0], extension=extension)
    entries = material.get("tlogEntries")
    notes = () if not entries else ("the bundle's transparency log entries do not go along: nothing here checks them",)
    return Brought(Envelope(envelope.payload, (signature,), envelope.payload_type), notes)


def _material(document: Mapping[str, Any], file: _PathOrNone) -> Material:
    """Return certificates and timestamps, through the same strict reader that envelopes get."""
    named = [name for name in _KEY_FORMS if name in document]
    if len(named) != 1:
        forms = ", ".join(_KEY_FORMS)
        raise BadSignatureError(f"exactly one of {forms} must be there", file=file, field="verificationMaterial")
    ext: dict[str, Any] = {}
    if named[0] == "certificate":
        ext["x509CertificateChain"] = {"certificates": [document["certificate"]]}
    elif named[0] == "x509CertificateChain":
        ext["x509CertificateChain"] = document["x509CertificateChain"]
    stamps = document.get("timestampVerificationData")
    if stamps not in (None, {}, {"rfc3161Timestamps": []}):
        ext["timestampVerificationData"] = stamps
    if not ext:
        return Material()
    found = parse_material({"kind": KIND, "ext": ext}, field="verificationMaterial", file=file)
    return Material() if found is None else Material(_without_root(found.certificates, file), found.timestamps)


def _parsed(der: bytes, file: _PathOrNone) -> x509.Certificate:
    """Parse a certificate, and name the file that brought it where it is none."""
    from vmgraft.signing.paths import parse_certificate

    try:
        return parse_certificate(der)
    except BadSignatureError as exc:
        exc.file = None if file is None else fspath(file)
        raise


def _without_root(chain: tuple[bytes, ...], file: _PathOrNone) -> tuple[bytes, ...]:
    """Leave out a root at the end of a chain: it never travels, verifiers have their own."""
    if len(chain) < 2:
        return chain
    last = _parsed(chain[-1], file)
    return chain[:-1] if last.subject == last.issuer else chain


def with_intermediates(brought: Brought, intermediates: Sequence[bytes], *, file: _PathOrNone = None) -> Brought:
    """Complete chains: a bundle v0.3 holds the leaf alone, and its signer's intermediates come another way.

    Args:
        brought: What a file brought.
        intermediates: DER; those that issued something in a chain go along, in order, and no root does.
        file: What to name in the error: the file that brought the chains.

    Raises:
        BadSignatureError: a certificate is malformed.
    """
    signatures = []
    for index, signature in enumerate(brought.envelope.signatures):
        material = signature_material(signature, index, file=file)
        if material.certificates:
            completed = Material(_completed(material.certificates, intermediates, file), material.timestamps)
            signature = dataclasses.replace(signature, extension=pack_material(completed))  # noqa: PLW2901
        signatures.append(signature)
    return dataclasses.replace(brought, envelope=dataclasses.replace(brought.envelope, signatures=tuple(signatures)))


def _completed(chain: tuple[bytes, ...], intermediates: Sequence[bytes], file: _PathOrNone) -> tuple[bytes, ...]:
    from vmgraft.signing.paths import parse_certificate

    issuers = {parse_certificate(der).subject: der for der in intermediates}
    while len(chain) < MAX_CERTIFICATES:
        last = _parsed(chain[-1], file)
        following = issuers.get(last.issuer)
        if last.subject == last.issuer or following is None or following in chain:
            break
        chain = (*chain, following)
    return _without_root(chain, file)


def signature_material(signature: Signature, index: int, *, file: _PathOrNone = None) -> Material:
    """Return what stands beside a signature; nothing where it is of a kind that is not understood.

    Raises:
        BadSignatureError: it is malformed.
    """
    return parse_material(signature.extension, field=f"signatures[{index}].extension", file=file) or Material()
