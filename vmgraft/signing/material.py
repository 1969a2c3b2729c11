"""What travels beside a signature: its certificates and timestamps. Nothing in it is signed, and nothing is trusted.

It stands in ``signatures[].extension`` of the envelope, in the shape of a Sigstore bundle's verification material
(sigstore/protobuf-specs, protos/sigstore_bundle.proto), so that other tools find it: leaf and intermediates, never the
root, and RFC 3161 timestamps over the signature's bytes.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any, Final

from vmgraft.errors import BadSignatureError

#: DSSE leaves the extension's kind to its users; this one names the JSON form of VerificationMaterial.
KIND: Final = "application/vnd.dev.sigstore.verificationmaterial;version=0.1"
#: Longest chain carried, leaf included.
MAX_CERTIFICATES: Final = 8
#: Largest certificate accepted, in bytes; an ML-DSA-65 one has about 5500.
MAX_CERTIFICATE: Final = 16 << 10
#: Most timestamps of one signature.
MAX_TIMESTAMPS: Final = 4
#: Largest timestamp response accepted, in bytes; it carries a chain of its own.
MAX_TIMESTAMP: Final = 32 << 10

_PathOrNone = str | PathLike[str] | None


@dataclass(frozen=True, slots=True)
class Material:
    """Certificates (DER, leaf first) and timestamps (DER, RFC 3161 TimeStampResp) of one signature."""

    certificates: tuple[bytes, ...] = ()
    timestamps: tuple[bytes, ...] = ()


def pack_material(material: Material) -> dict[str, Any] | None:
    """Return the extension of a signature, or None where there is nothing to carry."""
    if not material.certificates and not material.timestamps:
        return None
    ext: dict[str, Any] = {}
    if material.certificates:
        ext["x509CertificateChain"] = {"certificates": [{"rawBytes": _text(der)} for der in material.certificates]}
    if material.timestamps:
        stamps = [{"signedTimestamp": _text(der)} for der in material.timestamps]
        ext["timestampVerificationData"] = {"rfc3161Timestamps": stamps}
    return {"kind": KIND, "ext": ext}


def parse_material(extension: Mapping[str, Any] | None, *, field: str, file: _PathOrNone = None) -> Material | None:
    """Parse the extension of a signature.

    Args:
        extension: As found in an envelope; None where the signature has none.
        field: Where it stands, for messages.
        file: What to name in the error.

    Returns:
        What it holds; None for an extension of another kind, which is not understood and does no harm.

    Raises:
        BadSignatureError: it says that it is of this kind and is malformed or over a limit.
    """
    if extension is None:
        return Material()
    if extension.get("kind") != KIND:
        return None
    reader = _Reader(file)
    ext = reader.members(extension.get("ext"), f"{field}.ext", {"x509CertificateChain", "timestampVerificationData"})
    reader.members(extension, field, {"kind", "ext"})
    certificates = reader.blobs(
        ext, f"{field}.ext", "x509CertificateChain", ("certificates", "rawBytes"), (MAX_CERTIFICATES, MAX_CERTIFICATE)
    )
    timestamps = reader.blobs(
        ext,
        f"{field}.ext",
        "timestampVerificationData",
        ("rfc3161Timestamps", "signedTimestamp"),
        (MAX_TIMESTAMPS, MAX_TIMESTAMP),
    )
    return Material(certificates, timestamps)


def _text(der: bytes) -> str:
    return base64.b64encode(der).decode("ascii")


class _Reader:
    """Carries the file's name through the parsing."""

    def __init__(self, file: _PathOrNone) -> None:
        self.file = file

    def bad(self, message: str, field: str) -> BadSignatureError:
        return BadSignatureError(message, file=self.file, field=field)

    def members(self, value: Any, field: str, known: set[str]) -> Mapping[str, Any]:
        if not isinstance(value, Mapping):
            raise self.bad("not a JSON object", field)
        unknown = value.keys() - known
        if unknown:
            raise self.bad(f"unknown member {min(unknown)[:64]!r}", field)
        return value

    def blobs(
        self, ext: Mapping[str, Any], where: str, name: str, members: tuple[str, str], limits: tuple[int, int]
    ) -> tuple[bytes, ...]:
        """Return the base64 strings ``ext[name][members[0]][i][members[1]]``, at most (count, size) of them."""
        if name not in ext:
            return ()
        field = f"{where}.{name}"
        entries = self.members(ext[name], field, {members[0]}).get(members[0])
        field = f"{field}.{members[0]}"
        if not isinstance(entries, list) or not 1 <= len(entries) <= limits[0]:
            raise self.bad(f"not a list of 1 to {limits[0]} items", field)
        found = []
        for index, entry in enumerate(entries):
            text = self.members(entry, f"{field}[{index}]", {members[1]}).get(members[1])
            found.append(self.decode(text, limits[1], f"{field}[{index}].{members[1]}"))
        return tuple(found)

    def decode(self, text: Any, limit: int, field: str) -> bytes:
        """Decode canonical standard base64."""
        if not isinstance(text, str) or not text or len(text) > (limit + 2) // 3 * 4:
            raise self.bad(f"not base64 of 1 to {limit} bytes", field)
        try:
            data = base64.b64decode(text.encode("ascii"), validate=True)
        except (binascii.Error, UnicodeEncodeError) as exc:
            raise self.bad("not base64", field) from exc
        if len(data) > limit or _text(data) != text:
            raise self.bad("not canonical base64, or too long", field)
        return data
