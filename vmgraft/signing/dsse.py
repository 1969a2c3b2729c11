"""DSSE envelopes: the bytes that are signed, and the JSON that carries them with their signatures.

Dead Simple Signing Envelope 1.0.2, protocol.md (PAE) and envelope.md (JSON). Reading is strict: whatever two readers
could take for different envelopes is refused.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any

from vmgraft.errors import BadSignatureError
from vmgraft.schemas import strict_json

#: Media type of an in-toto Statement in DSSE (in-toto attestation spec v1, envelope.md).
PAYLOAD_TYPE = "application/vnd.in-toto+json"
#: Largest envelope accepted, in bytes.
MAX_ENVELOPE = 1024 * 1024
#: Most signatures accepted in one envelope.
MAX_SIGNATURES = 16
#: Largest signature accepted, in bytes; ML-DSA-65 has 3309, RSA-8192 has 1024.
MAX_SIGNATURE_BYTES = 8192
#: Longest keyid accepted, in characters.
MAX_KEYID = 256

_STANDARD = re.compile(r"[A-Za-z0-9+/]*={0,2}")
_URL_SAFE = re.compile(r"[A-Za-z0-9_-]*={0,2}")
_KEYID = re.compile(r"[!-~]*")
_PathOrNone = str | PathLike[str] | None


@dataclass(frozen=True, slots=True)
class Signature:
    """One signature of an envelope. ``keyid`` is a hint and never trusted; ``extension`` is not signed."""

    keyid: str
    sig: bytes
    extension: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Envelope:
    """A DSSE envelope. ``payload`` holds the very bytes that the signatures are over."""

    payload: bytes
    signatures: tuple[Signature, ...]
    payload_type: str = PAYLOAD_TYPE

    @property
    def pae(self) -> bytes:
        """The bytes that get signed."""
        return pae(self.payload_type, self.payload)


def pae(payload_type: str, payload: bytes) -> bytes:
    """Return the pre-authentication encoding (DSSE protocol.md, "Signature Definition"); lengths are in bytes."""
    kind = payload_type.encode("utf-8")
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def serialise(envelope: Envelope) -> bytes:
    """Return the JSON of an envelope: sorted keys, no spaces, standard base64."""
    document = {
        "payload": base64.b64encode(envelope.payload).decode("ascii"),
        "payloadType": envelope.payload_type,
        "signatures": [_signature_document(signature) for signature in envelope.signatures],
    }
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode("ascii")


def _signature_document(signature: Signature) -> dict[str, Any]:
    document: dict[str, Any] = {"keyid": signature.keyid, "sig": base64.b64encode(signature.sig).decode("ascii")}
    if signature.extension is not None:
        document["extension"] = dict(signature.extension)
    return document


def parse_envelope(data: bytes, *, file: _PathOrNone = None, payload_type: str = PAYLOAD_TYPE) -> Envelope:
    """Parse an envelope as it stands in a record; nothing in the result is trusted.

    Args:
        data: JSON, at most 1 MiB, with 1 to 16 signatures; base64 standard or URL-safe, padded and canonical.
        file: What to name in the error.
        payload_type: The media type it must hold.

    Raises:
        BadSignatureError: the bytes are not one well-formed envelope, or hold something else.
    """
    document = strict_json(data, file=file, error=BadSignatureError, max_bytes=MAX_ENVELOPE)
    _members(document, {"payload", "payloadType", "signatures"}, set(), "envelope", file)
    if document["payloadType"] != payload_type:
        raise BadSignatureError(f"not {payload_type}", file=file, field="payloadType")
    payload = _decode(document["payload"], MAX_ENVELOPE, "payload", file)
    entries = document["signatures"]
    if not isinstance(entries, list) or not 1 <= len(entries) <= MAX_SIGNATURES:
        raise BadSignatureError(f"not a list of 1 to {MAX_SIGNATURES} signatures", file=file, field="signatures")
    signatures = tuple(_signature(entry, f"signatures[{i}]", file) for i, entry in enumerate(entries))
    return Envelope(payload, signatures, payload_type)


def _members(document: Any, required: set[str], optional: set[str], field: str, file: _PathOrNone) -> None:
    if not isinstance(document, dict):
        raise BadSignatureError("not a JSON object", file=file, field=field)
    missing, unknown = required - document.keys(), document.keys() - required - optional
    if missing:
        raise BadSignatureError(f"the member {min(missing)!r} is missing", file=file, field=field)
    if unknown:
        raise BadSignatureError(f"unknown member {min(unknown)[:64]!r}", file=file, field=field)


def _signature(entry: Any, field: str, file: _PathOrNone) -> Signature:
    _members(entry, {"sig"}, {"keyid", "extension"}, field, file)
    keyid, extension = entry.get("keyid", ""), entry.get("extension")
    if not isinstance(keyid, str) or len(keyid) > MAX_KEYID or _KEYID.fullmatch(keyid) is None:
        raise BadSignatureError("not a short line of ASCII", file=file, field=f"{field}.keyid")
    if "extension" in entry and not isinstance(extension, dict):
        raise BadSignatureError("not a JSON object", file=file, field=f"{field}.extension")
    sig = _decode(entry["sig"], MAX_SIGNATURE_BYTES, f"{field}.sig", file)
    if not sig:
        raise BadSignatureError("the signature is empty", file=file, field=f"{field}.sig")
    return Signature(keyid, sig, extension)


def _decode(text: Any, limit: int, field: str, file: _PathOrNone) -> bytes:
    """Decode canonical base64: one alphabet, right padding, unused bits zero."""
    if not isinstance(text, str):
        raise BadSignatureError("not a string", file=file, field=field)
    if len(text) > (limit + 2) // 3 * 4:
        raise BadSignatureError(f"longer than {limit} bytes", file=file, field=field)
    if _STANDARD.fullmatch(text):
        standard = text
    elif _URL_SAFE.fullmatch(text):
        standard = text.replace("-", "+").replace("_", "/")
    else:
        raise BadSignatureError("not base64", file=file, field=field)
    try:
        data = base64.b64decode(standard, validate=True)
    except binascii.Error as exc:
        raise BadSignatureError("not base64", file=file, field=field) from exc
    if len(data) > limit:
        raise BadSignatureError(f"longer than {limit} bytes", file=file, field=field)
    if base64.b64encode(data).decode("ascii") != standard:
        raise BadSignatureError("not canonical base64", file=file, field=field)
    return data
