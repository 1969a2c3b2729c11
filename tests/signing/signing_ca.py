"""A small certificate authority for tests: every field can be bent."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

NOW = datetime(2026, 11, 22, 15, 0, 0, tzinfo=UTC)
CODE_SIGNING = ExtendedKeyUsageOID.CODE_SIGNING


def subject(common: str, organisation: str = "Acme") -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.COUNTRY_NAME, "US"),
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, organisation),
            x509.NameAttribute(NameOID.COMMON_NAME, common),
        ]
    )


@dataclass
class Entity:
    """A certificate and its key."""

    cert: x509.Certificate
    key: Any
    revoked: list[int] = field(default_factory=list)

    @property
    def der(self) -> bytes:
        return self.cert.public_bytes(Encoding.DER)

    @property
    def pem(self) -> bytes:
        return self.cert.public_bytes(Encoding.PEM)


def issue(
    common: str,
    issuer: Entity | None = None,
    *,
    ca: bool = False,
    path_length: int | None = None,
    usages: tuple[x509.ObjectIdentifier, ...] | None = (CODE_SIGNING,),
    days: tuple[int, int] = (-10, 365),
    extra: tuple[tuple[x509.ExtensionType, bool], ...] = (),
    key: Any = None,
    digest: hashes.HashAlgorithm | None = None,
    basic: bool = True,
    usage: dict[str, bool] | None = None,
    organisation: str = "Acme",
    names: tuple[x509.GeneralName, ...] = (),
) -> Entity:
    key = key or ec.generate_private_key(ec.SECP256R1())
    signer = issuer.key if issuer else key
    flags = {
        "digital_signature": not ca, "content_commitment": False, "key_encipherment": False, "data_encipherment": False,
        "key_agreement": False, "key_cert_sign": ca, "crl_sign": ca, "encipher_only": False, "decipher_only": False,
    } | (usage or {})  # fmt: skip
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject(common, organisation))
        .issuer_name(issuer.cert.subject if issuer else subject(common, organisation))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW + timedelta(days=days[0]))
        .not_valid_after(NOW + timedelta(days=days[1]))
        .add_extension(x509.KeyUsage(**flags), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
    )
    if basic:
        builder = builder.add_extension(x509.BasicConstraints(ca, path_length), critical=True)
    if usages and not ca:
        builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    for extension, critical in extra:
        builder = builder.add_extension(extension, critical=critical)
    return Entity(builder.sign(signer, digest or hashes.SHA256()), key)


def crl(
    issuer: Entity,
    *revoked: Entity,
    days: tuple[int, int] = (-1, 60),
    extra: tuple[tuple[x509.ExtensionType, bool], ...] = (),
    key: Any = None,
    digest: hashes.HashAlgorithm | None = None,
    entry_extra: tuple[x509.ExtensionType, ...] = (),
    revoked_on: timedelta = timedelta(days=-2),
) -> bytes:
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(issuer.cert.subject)
        .last_update(NOW + timedelta(days=days[0]))
        .next_update(NOW + timedelta(days=days[1]))
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.key.public_key()), critical=False)
        .add_extension(x509.CRLNumber(1), critical=False)
    )
    for extension, critical in extra:
        builder = builder.add_extension(extension, critical=critical)
    for entity in revoked:
        entry = x509.RevokedCertificateBuilder().serial_number(entity.cert.serial_number)
        entry = entry.revocation_date(NOW + revoked_on)
        for reason in entry_extra:
            entry = entry.add_extension(reason, critical=False)
        builder = builder.add_revoked_certificate(entry.build())
    return builder.sign(key or issuer.key, digest or hashes.SHA256()).public_bytes(Encoding.DER)
