"""Trust stores: the certificates and CRLs inside a policy, PEM in and DER out, each checked when the policy is read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any, Final, Literal

from vmgraft.errors import BadSignatureError, PolicyError, UsageError, VmgraftError

#: Most certificates, and most CRLs, in one store.
MAX_STORE: Final = 64

_CERTIFICATE: Final = "CERTIFICATE"
_CRL: Final = "X509 CRL"
_BLOCK: Final = re.compile(r"-----BEGIN ([A-Z0-9 ]{1,32})-----\n([A-Za-z0-9+/=\n]+)-----END ([A-Z0-9 ]{1,32})-----")
_PathOrNone = str | PathLike[str] | None


@dataclass(frozen=True, slots=True)
class TrustStore:
    """Whom a policy trusts to certify keys (``ca``), or to say when a signature was there (``tsa``). All in DER.

    Attributes:
        roots: Trust anchors.
        crls: What they, or authorities below them, have revoked.
        require_crls: A chain counts only with a current CRL for each of its certificates below the root.
    """

    name: str
    type: Literal["ca", "tsa"]
    roots: tuple[bytes, ...]
    crls: tuple[bytes, ...] = ()
    require_crls: bool = False

    @property
    def reference(self) -> str:
        """How trust policies name it."""
        return f"{self.type}:{self.name}"


def read_store(entry: Mapping[str, Any], where: str, file: _PathOrNone = None) -> TrustStore:
    """Return one entry of ``trustStores`` that passed the schema.

    Raises:
        PolicyError: not PEM, a certificate that is malformed or no authority's, a malformed CRL, or CRLs for a ``tsa``.
    """
    reader = _Reader(file, where)
    roots = reader.blocks(entry["certificates"], "certificates", _CERTIFICATE)
    crls = reader.blocks(entry["crls"], "crls", _CRL) if "crls" in entry else ()
    if entry["type"] == "tsa" and ("crls" in entry or "requireCrls" in entry):
        raise reader.refuse("CRLs are looked at for authorities of type ca only", "crls", "leave them out")
    if len(set(roots)) != len(roots):
        raise reader.refuse("a certificate stands twice", "certificates")
    for der in roots:
        reader.check_root(der)
    for der in crls:
        reader.check_crl(der)
    return TrustStore(entry["name"], entry["type"], roots, crls, entry.get("requireCrls", False))


def store_document(
    name: str, kind: Literal["ca", "tsa"], certificates: bytes, crls: bytes = b"", *, require_crls: bool = False
) -> dict[str, Any]:
    """Return an entry of ``trustStores`` for files in PEM or DER; the policy that it goes into checks it.

    Raises:
        UsageError: not text, and not DER.
    """
    entry: dict[str, Any] = {"name": name, "type": kind, "certificates": as_pem(certificates, _CERTIFICATE)}
    if crls:
        entry["crls"] = as_pem(crls, _CRL)
    if require_crls:
        entry["requireCrls"] = True
    return entry


def as_pem(data: bytes, label: str) -> str:
    """Return a file's PEM, or its DER as one PEM block (RFC 7468).

    Raises:
        UsageError: neither.
    """
    import base64

    if data[:1] == b"\x30":  # a SEQUENCE: certificates and CRLs both are one
        text = base64.b64encode(data).decode("ascii")
        lines = [text[start : start + 64] for start in range(0, len(text), 64)]
        return "\n".join([f"-----BEGIN {label}-----", *lines, f"-----END {label}-----", ""])
    try:
        text = data.decode("ascii")
    except UnicodeDecodeError as exc:
        raise UsageError(f"neither PEM nor DER of a {label}") from exc
    return text if text.endswith("\n") else text + "\n"


def pem_blocks(text: str) -> list[tuple[str, bytes]] | None:
    """Return the label and content of each PEM block (RFC 7468), or None where anything else stands between them."""
    import base64
    import binascii

    found, end = [], 0
    text = text.replace("\r\n", "\n")
    for match in _BLOCK.finditer(text):
        if text[end : match.start()].strip() or match[1] != match[3]:
            return None
        try:
            found.append((match[1], base64.b64decode(match[2].replace("\n", ""), validate=True)))
        except binascii.Error:
            return None
        end = match.end()
    return None if text[end:].strip() else found


class _Reader:
    """Carries the place of the store through the checks."""

    def __init__(self, file: _PathOrNone, where: str) -> None:
        self.file = file
        self.where = where

    def refuse(self, message: str, member: str, hint: str | None = None) -> PolicyError:
        return PolicyError(message, file=self.file, field=f"{self.where}.{member}", hint=hint)

    def blocks(self, text: str, member: str, label: str) -> tuple[bytes, ...]:
        found = pem_blocks(text)
        hint = f"only blocks of -----BEGIN {label}-----, without text between them"
        if not found or any(kind != label for kind, _ in found):
            raise self.refuse(f"not PEM blocks of type {label}", member, hint)
        if len(found) > MAX_STORE:
            raise self.refuse(f"more than {MAX_STORE} of them", member)
        return tuple(data for _, data in found)

    def check_root(self, der: bytes) -> None:
        from cryptography import x509

        from vmgraft.signing.certificates import parse_certificate

        try:
            certificate = parse_certificate(der)
            authority = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        except VmgraftError as exc:
            message = "a certificate is malformed" if exc.__cause__ is not None else exc.message
            raise self.refuse(message, "certificates") from exc
        except x509.ExtensionNotFound:
            authority = False
        except ValueError as exc:
            raise self.refuse("a certificate's extensions are malformed", "certificates") from exc
        if not authority:
            name = certificate.subject.rfc4514_string()[:200]
            hint = "name the root (or intermediate) here, and the leaf under trustedIdentities or as a key"
            raise self.refuse(f"{name!r} is not a certificate authority", "certificates", hint)

    def check_crl(self, der: bytes) -> None:
        from vmgraft.signing.revocation import parse_crl

        try:
            parse_crl(der)
        except BadSignatureError as exc:
            raise self.refuse("a CRL is malformed", "crls") from exc
