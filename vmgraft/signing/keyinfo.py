"""What a key or certificate is, for people: kind, size, names, and what speaks against it. Nothing secret is in it."""

from __future__ import annotations

import hashlib
import stat
from dataclasses import dataclass
from datetime import UTC, datetime
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmgraft.errors import FileError, VmgraftError
from vmgraft.signing.chains import chain_warnings, parse_chain, read_chain
from vmgraft.signing.files import read_regular
from vmgraft.signing.keyfiles import OTHER_SCHEMES, PassphraseSource, key_path, load_private
from vmgraft.signing.keys import MAX_PEM, is_encrypted, public_from_pem
from vmgraft.signing.pkcs8 import FEW_ROUNDS, pbkdf2_rounds
from vmgraft.signing.times import format_time
from vmgraft.words import counted

if TYPE_CHECKING:
    from cryptography import x509

    from vmgraft.signing.keys import PublicKey


@dataclass(frozen=True, slots=True)
class CertificateInfo:
    """What a certificate says; nothing of it is verified.

    Attributes:
        subject: RFC 4514 text, as is ``issuer``.
        serial: In hex.
        sans: Subject alternative names, ``kind:value``.
        sha256: Over the DER, in hex.
    """

    subject: str
    issuer: str
    serial: str
    not_before: datetime
    not_after: datetime
    sans: tuple[str, ...]
    authority: bool
    sha256: str

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "subject": self.subject,
            "issuer": self.issuer,
            "serial": self.serial,
            "notBefore": format_time(self.not_before),
            "notAfter": format_time(self.not_after),
            "subjectAlternativeNames": list(self.sans),
            "authority": self.authority,
            "sha256": self.sha256,
        }


@dataclass(frozen=True, slots=True)
class KeyInfo:
    """One key, and where it was found.

    Attributes:
        source: The reference.
        what: ``public key``, ``private key``, ``certificate``, or the scheme of a URI.
        public: The key, or its public half; None for a certificate whose key is of a kind not accepted.
        encrypted: Whether a private key file is; None for anything else.
        certificate: What the certificate says.
        warnings: What speaks against it.
    """

    source: str
    what: str
    public: PublicKey | None
    encrypted: bool | None = None
    certificate: CertificateInfo | None = None
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        key = self.public
        return {
            "source": self.source,
            "what": self.what,
            "kind": None if key is None else key.kind,
            "bits": None if key is None else key.bits,
            "keyid": None if key is None else key.keyid,
            "spkiSha256": None if key is None else hashlib.sha256(key.spki).hexdigest(),
            "encrypted": self.encrypted,
            "certificate": None if self.certificate is None else self.certificate.to_dict(),
            "warnings": list(self.warnings),
        }


def describe_key(
    reference: str | PathLike[str], passphrase: PassphraseSource | None = None, *, now: datetime | None = None
) -> list[KeyInfo]:
    """Describe a key file, certificate file or key URI.

    Args:
        reference: Path or URI, as ``signers.load_signer``; also a public key, or a PEM file of certificates.
        passphrase: Where passphrases and PINs come from; None looks at the environment only.
        now: The time by which certificates are judged; None is the present.

    Returns:
        One entry, or one for each certificate of a file.

    Raises:
        VmgraftError: not readable, none of these, or of a kind not accepted.
    """
    text = fspath(reference)
    found = OTHER_SCHEMES.match(text)
    if found:
        from vmgraft.signing.signers import load_signer, signing_warnings

        signer = load_signer(text, passphrase)
        source = text.partition("?")[0]  # a PIN may stand behind it
        return [KeyInfo(source, found[1].lower(), signer.public, warnings=tuple(signing_warnings(text, signer)))]
    path = key_path(text)
    data = read_regular(path, MAX_PEM, what="the key", error=FileError)
    if b"-----BEGIN CERTIFICATE-----" in data:
        return _describe_chain(path, datetime.now(UTC) if now is None else now)
    if b"PRIVATE KEY-----" in data:
        public = load_private(path, passphrase).public
        notes = (*_private_warnings(path, data), *_key_warnings(public))
        return [KeyInfo(text, "private key", public, encrypted=is_encrypted(data), warnings=notes)]
    public = public_from_pem(data, file=path)
    return [KeyInfo(text, "public key", public, warnings=_key_warnings(public))]


def _key_warnings(public: PublicKey) -> tuple[str, ...]:
    return () if public.warning is None else (public.warning,)


def _private_warnings(path: Path, data: bytes) -> list[str]:
    notes = []
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        notes.append(f"others may read or write this file: chmod 600 {path}")
    if not is_encrypted(data):
        notes.append("the file is not encrypted: whoever reads it can sign")
        return notes
    rounds = pbkdf2_rounds(data)
    if rounds is not None and rounds < FEW_ROUNDS:
        notes.append(
            f"the passphrase is stretched by {counted(rounds, 'round')} of PBKDF2 only: it must be long to be of use"
        )
    return notes


def _describe_chain(path: Path, now: datetime) -> list[KeyInfo]:
    """Describe each certificate; the first also says whether the file would do for ``--certificate``."""
    found = []
    for place, certificate in enumerate(parse_chain(path)):
        der = _der(certificate)
        notes: list[str] = []
        try:
            public = _public(certificate, path)
            notes += _key_warnings(public)
        except VmgraftError as exc:
            public = None
            notes.append(exc.message)
        notes += chain_warnings((der,), now=now)
        if place == 0:
            try:
                read_chain(path, now=now)
            except VmgraftError as exc:
                notes.append(f"not for --certificate: {exc.message}")
        found.append(KeyInfo(str(path), "certificate", public, None, _certificate_info(certificate), tuple(notes)))
    return found


def _public(certificate: x509.Certificate, path: Path) -> PublicKey:
    from cryptography.exceptions import UnsupportedAlgorithm

    from vmgraft.signing.keys import public_from_key

    try:
        return public_from_key(certificate.public_key(), file=path)
    except (ValueError, UnsupportedAlgorithm) as exc:
        raise FileError("the certificate's key cannot be read", file=path) from exc


def _certificate_info(certificate: x509.Certificate) -> CertificateInfo:
    from cryptography import x509

    from vmgraft.signing.identities import alternative_names

    try:
        authority = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError):
        authority = False
    return CertificateInfo(
        subject=certificate.subject.rfc4514_string(),
        issuer=certificate.issuer.rfc4514_string(),
        serial=f"{certificate.serial_number:x}",
        not_before=certificate.not_valid_before_utc,
        not_after=certificate.not_valid_after_utc,
        sans=alternative_names(certificate),
        authority=authority,
        sha256=hashlib.sha256(_der(certificate)).hexdigest(),
    )


def _der(certificate: x509.Certificate) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding

    return certificate.public_bytes(Encoding.DER)
