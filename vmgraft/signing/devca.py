"""A certificate authority for trying things out: root, intermediate, code signer, timestamp authority, CRLs.

Its private keys lie unencrypted in a folder, so nothing signed under it is worth any trust. Every name in its
certificates says so, and every report about a chain to it says so too (``paths.is_development``).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vmgraft.errors import FileError, UsageError
from vmgraft.signing.files import write_new
from vmgraft.signing.keys import GENERATED_KINDS, generate
from vmgraft.signing.paths import DEVELOPMENT

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes

#: How long the certificates are good, by default and at most, in days.
DEFAULT_DAYS: Final = 90
MAX_DAYS: Final = 825
#: Mailbox in the code signer's certificate; .invalid is nobody's domain (RFC 2606, 2).
MAILBOX: Final = "release@development.invalid"
#: Certificates begin this long ago, for clocks that differ.
_BEFORE: Final = timedelta(minutes=5)

_TSA_CONFIG: Final = """# DEVELOPMENT ONLY: a timestamp authority, to be run inside this folder:
#   openssl ts -reply -config tsa.cnf -queryfile REQUEST -out RESPONSE
[ tsa ]
default_tsa = development
[ development ]
serial = tsa.serial
signer_cert = tsa.pem
certs = tsa.pem
signer_key = tsa.key
signer_digest = sha256
default_policy = 1.3.6.1.4.1.0.1
digests = sha256, sha384, sha512
accuracy = secs:1
ordering = no
tsa_name = yes
ess_cert_id_chain = no
ess_cert_id_alg = sha256
"""


@dataclass(frozen=True, slots=True)
class DevelopmentCa:
    """What was written.

    Attributes:
        folder: The folder.
        files: Its files, private ones included.
        keyid: keyid of the code signer.
        subject: Subject of the code signer, as policies name it.
        mailbox: Its subject alternative name, without ``email:``.
        not_after: When the certificates, and the CRLs, end.
    """

    folder: Path
    files: tuple[Path, ...]
    keyid: str
    subject: str
    mailbox: str
    not_after: datetime


@dataclass(slots=True)
class _Entity:
    """A certificate in the making."""

    name: x509.Name
    public: CertificatePublicKeyTypes
    issuer: _Entity | None = None
    key: ec.EllipticCurvePrivateKey | None = None
    certificate: x509.Certificate = field(init=False)

    @property
    def pem(self) -> bytes:
        from cryptography.hazmat.primitives.serialization import Encoding

        return self.certificate.public_bytes(Encoding.PEM)


def make_development_ca(
    folder: str | os.PathLike[str], *, kind: str = "p256", days: int = DEFAULT_DAYS, now: datetime | None = None
) -> DevelopmentCa:
    """Make an authority in a new folder.

    Args:
        folder: The folder; it must not exist.
        kind: Type of the code signer's key, one of ``GENERATED_KINDS``; the authorities use P-256.
        days: How long everything is good.
        now: The time it begins; None asks the clock.

    Raises:
        UsageError: no such type, or ``days`` out of range.
        FileError: the folder exists or cannot be written; nothing is left behind.
    """
    if kind not in GENERATED_KINDS:
        raise UsageError(f"no key type {kind!r}", field="type", hint="one of " + ", ".join(GENERATED_KINDS))
    if not 1 <= days <= MAX_DAYS:
        raise UsageError(f"{days} is not a number of days from 1 to {MAX_DAYS}", field="days")
    start = (datetime.now(UTC) if now is None else now).replace(microsecond=0)
    end = start + timedelta(days=days)
    signer = generate(kind)
    files, subject = _files(signer.pem(None), signer.public.pem, (start - _BEFORE, end))
    path = Path(folder)
    written = _write(path, files)
    return DevelopmentCa(path, written, signer.keyid, subject, MAILBOX, end)


def _files(private: bytes, public: bytes, validity: tuple[datetime, datetime]) -> tuple[dict[str, bytes], str]:
    """Return the content of every file, and the code signer's subject."""
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    root = _authority("Root", None, validity, path_length=1)
    inter = _authority("Intermediate", root, validity, path_length=0)
    leaf_public: Any = load_pem_public_key(public)
    leaf = _Entity(_name("Release"), leaf_public, inter)
    _certify(leaf, validity, _leaf_extensions(stamping=False))
    tsa = _with_key("Timestamps", root)
    _certify(tsa, validity, _leaf_extensions(stamping=True))
    crls = _crl(root, validity) + _crl(inter, validity)
    files = {
        "README": _readme(),
        "root.pem": root.pem,
        "intermediate.pem": inter.pem,
        "release.pem": leaf.pem + inter.pem,
        "release.pub": public,
        "tsa.pem": tsa.pem,
        "crls.pem": crls,
        "tsa.cnf": _TSA_CONFIG.encode(),
        "tsa.serial": b"01\n",
        "root.key": _private(root),
        "intermediate.key": _private(inter),
        "tsa.key": _private(tsa),
        "release.key": private,
    }
    return files, ", ".join(leaf.name.rfc4514_string().split(","))


def _readme() -> bytes:
    return (
        b"DEVELOPMENT ONLY. The keys in this folder are not encrypted and prove nothing about anybody.\n\n"
        b"release.key  release.pem    code signer: its key, and its certificate with the intermediate's\n"
        b"root.pem     crls.pem       what a policy's trust store of type ca holds\n"
        b"tsa.pem      tsa.cnf        timestamp authority; root.pem is also what a store of type tsa holds\n"
        b"root.key     intermediate.key  tsa.key    the authorities' keys\n\n"
        b"openssl verify -CAfile root.pem -untrusted intermediate.pem -CRLfile crls.pem -crl_check_all release.pem\n"
    )


# --- certificates --------------------------------------------------------------------------------------------------


def _name(common: str) -> x509.Name:
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    pairs = ((NameOID.ORGANIZATION_NAME, DEVELOPMENT), (NameOID.COMMON_NAME, f"DEVELOPMENT ONLY {common}"))
    return x509.Name([x509.NameAttribute(oid, value) for oid, value in pairs])


def _with_key(common: str, issuer: _Entity | None) -> _Entity:
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    return _Entity(_name(common), key.public_key(), issuer, key)


def _authority(
    common: str, issuer: _Entity | None, validity: tuple[datetime, datetime], *, path_length: int
) -> _Entity:
    from cryptography import x509

    entity = _with_key(common, issuer)
    _certify(
        entity,
        validity,
        [(x509.BasicConstraints(True, path_length), True), (_usage("key_cert_sign", "crl_sign"), True)],
    )
    return entity


def _leaf_extensions(*, stamping: bool) -> list[tuple[x509.ExtensionType, bool]]:
    from cryptography import x509
    from cryptography.x509.oid import ExtendedKeyUsageOID

    found: list[tuple[x509.ExtensionType, bool]] = [
        (x509.BasicConstraints(False, None), True),
        (_usage("digital_signature"), True),
    ]
    if stamping:  # critical and alone: RFC 3161, 2.3
        return [*found, (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.TIME_STAMPING]), True)]
    usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING])
    return [*found, (usage, False), (x509.SubjectAlternativeName([x509.RFC822Name(MAILBOX)]), False)]


def _usage(*granted: str) -> x509.KeyUsage:
    from cryptography import x509

    names = (
        "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
        "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
    )  # fmt: skip
    return x509.KeyUsage(**{name: name in granted for name in names})


def _certify(
    entity: _Entity, validity: tuple[datetime, datetime], extensions: Sequence[tuple[x509.ExtensionType, bool]]
) -> None:
    """Make the certificate of an entity; an authority without an issuer signs its own."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes

    issuer = entity.issuer or entity
    key, above = _key_of(issuer), issuer.public
    builder = (
        x509.CertificateBuilder()
        .subject_name(entity.name)
        .issuer_name(issuer.name)
        .public_key(entity.public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(validity[0])
        .not_valid_after(validity[1])
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(entity.public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(above), critical=False)  # type: ignore[arg-type]  # P-256
    )
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical=critical)
    entity.certificate = builder.sign(key, hashes.SHA256())


def _crl(issuer: _Entity, validity: tuple[datetime, datetime]) -> bytes:
    """Return a CRL that revokes nothing."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.serialization import Encoding

    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.public)  # type: ignore[arg-type]  # P-256
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(issuer.name)
        .last_update(validity[0])
        .next_update(validity[1])
        .add_extension(identifier, critical=False)
        .add_extension(x509.CRLNumber(1), critical=False)
    )
    return builder.sign(_key_of(issuer), hashes.SHA256()).public_bytes(Encoding.PEM)


def _key_of(entity: _Entity) -> ec.EllipticCurvePrivateKey:
    if entity.key is None:
        raise UsageError(f"{entity.name.rfc4514_string()!r} has no key to sign with")
    return entity.key


def _private(entity: _Entity) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    return _key_of(entity).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


# --- files ---------------------------------------------------------------------------------------------------------


def _write(folder: Path, files: dict[str, bytes]) -> tuple[Path, ...]:
    try:
        folder.mkdir()
    except OSError as exc:
        hint = "name a folder that does not exist yet, inside one that does"
        raise FileError(f"the folder cannot be made: {exc.strerror}", file=folder, hint=hint) from exc
    written: list[Path] = []
    try:
        for name, data in files.items():
            private = name.endswith(".key")
            write_new(folder / name, data, what="a development file", mode=0o600 if private else 0o644)
            written.append(folder / name)
    except BaseException:
        for path in written:
            path.unlink(missing_ok=True)
        folder.rmdir()
        raise
    return tuple(written)
