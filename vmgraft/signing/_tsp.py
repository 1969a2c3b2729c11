"""The structures of a timestamp: RFC 3161, inside CMS signed data (RFC 5652), in DER.

They are declared here and read by ``cryptography.hazmat.asn1``: bounded by their input, strict about DER, and without
a line of parsing of our own. Certificates and signed attributes are kept as they came (``asn1.TLV``) and parsed where
they are used. A ``SET OF`` under an implicit tag is read as a list, because not every authority sorts it.
"""

from __future__ import annotations

from typing import Annotated, Final

from cryptography.hazmat import asn1
from cryptography.x509 import ObjectIdentifier

#: id-signedData (RFC 5652, 5.1).
SIGNED_DATA: Final = ObjectIdentifier("1.2.840.113549.1.7.2")
#: id-ct-TSTInfo (RFC 3161, 2.4.2).
TST_INFO: Final = ObjectIdentifier("1.2.840.113549.1.9.16.1.4")
#: Signed attributes: contentType and messageDigest (RFC 5652, 11.1 and 11.2).
CONTENT_TYPE: Final = ObjectIdentifier("1.2.840.113549.1.9.3")
MESSAGE_DIGEST: Final = ObjectIdentifier("1.2.840.113549.1.9.4")
#: Signed attributes: id-aa-signingCertificate (RFC 2634, 5.4) and id-aa-signingCertificateV2 (RFC 5035, 3).
SIGNING_CERTIFICATE: Final = ObjectIdentifier("1.2.840.113549.1.9.16.2.12")
SIGNING_CERTIFICATE_V2: Final = ObjectIdentifier("1.2.840.113549.1.9.16.2.47")
#: Tag of a directoryName among GeneralNames: [4], explicit (RFC 5280, 4.2.1.6).
DIRECTORY_NAME: Final = b"\xa4"


@asn1.sequence
class Algorithm:
    """AlgorithmIdentifier; parameters are NULL or absent for every algorithm accepted here."""

    algorithm: ObjectIdentifier
    parameters: asn1.Null | None


@asn1.sequence
class Imprint:
    """MessageImprint (RFC 3161, 2.4.1)."""

    algorithm: Algorithm
    digest: bytes


@asn1.sequence
class Request:
    """TimeStampReq (RFC 3161, 2.4.1), without extensions."""

    version: int
    imprint: Imprint
    policy: ObjectIdentifier | None
    nonce: int | None
    certificates: Annotated[bool, asn1.Default(False)]


@asn1.sequence
class StatusInfo:
    """PKIStatusInfo (RFC 3161, 2.4.2)."""

    status: int
    text: list[str] | None
    failure: asn1.BitString | None


@asn1.sequence
class Attribute:
    """Attribute (RFC 5652, 5.3)."""

    type: ObjectIdentifier
    values: asn1.SetOf[asn1.TLV]


@asn1.sequence
class Content:
    """EncapsulatedContentInfo (RFC 5652, 5.2); the content is never left out of a timestamp."""

    type: ObjectIdentifier
    content: Annotated[bytes, asn1.Explicit(0)]


@asn1.sequence
class IssuerSerial:
    """IssuerAndSerialNumber (RFC 5652, 10.2.4)."""

    issuer: asn1.TLV
    serial: int


@asn1.sequence
class SignerInfo:
    """SignerInfo (RFC 5652, 5.3), naming its certificate by issuer and serial number; attributes are never left out."""

    version: int
    signer: IssuerSerial
    digest: Algorithm
    attributes: Annotated[list[asn1.TLV], asn1.Implicit(0)]
    algorithm: Algorithm
    signature: bytes
    unsigned: Annotated[list[asn1.TLV] | None, asn1.Implicit(1)]


@asn1.sequence
class SignedData:
    """SignedData (RFC 5652, 5.1)."""

    version: int
    digests: asn1.SetOf[asn1.TLV]
    content: Content
    certificates: Annotated[list[asn1.TLV] | None, asn1.Implicit(0)]
    crls: Annotated[list[asn1.TLV] | None, asn1.Implicit(1)]
    signers: asn1.SetOf[SignerInfo]


@asn1.sequence
class Token:
    """TimeStampToken: ContentInfo around SignedData (RFC 3161, 2.4.2)."""

    type: ObjectIdentifier
    content: Annotated[SignedData, asn1.Explicit(0)]


@asn1.sequence
class Response:
    """TimeStampResp (RFC 3161, 2.4.2)."""

    status: StatusInfo
    token: Token | None


@asn1.sequence
class Accuracy:
    """Accuracy (RFC 3161, 2.4.2)."""

    seconds: int | None
    millis: Annotated[int | None, asn1.Implicit(0)]
    micros: Annotated[int | None, asn1.Implicit(1)]


@asn1.sequence
class Extension:
    """Extension (RFC 5280, 4.1)."""

    id: ObjectIdentifier
    critical: Annotated[bool, asn1.Default(False)]
    value: bytes


@asn1.sequence
class TstInfo:
    """TSTInfo (RFC 3161, 2.4.2). ``tsa`` is the subject of the signer's certificate."""

    version: int
    policy: ObjectIdentifier
    imprint: Imprint
    serial: int
    time: asn1.GeneralizedTime
    accuracy: Accuracy | None
    ordering: Annotated[bool, asn1.Default(False)]
    nonce: int | None
    tsa: Annotated[list[asn1.TLV] | None, asn1.Implicit(0)]
    extensions: Annotated[list[Extension] | None, asn1.Implicit(1)]


@asn1.sequence
class IssuerSerialNames:
    """IssuerSerial (RFC 5035, 5): GeneralNames and a serial number."""

    issuer: list[asn1.TLV]
    serial: int


@asn1.sequence
class EssCertificate:
    """ESSCertID (RFC 2634, 5.4.1): a SHA-1 digest."""

    digest: bytes
    issuer: IssuerSerialNames | None


@asn1.sequence
class EssCertificateV2:
    """ESSCertIDv2 (RFC 5035, 4); the algorithm is SHA-256 where it is left out."""

    algorithm: Algorithm | None
    digest: bytes
    issuer: IssuerSerialNames | None


@asn1.sequence
class SigningCertificate:
    """SigningCertificate (RFC 2634, 5.4); the first one names the signer."""

    certificates: list[EssCertificate]
    policies: list[asn1.TLV] | None


@asn1.sequence
class SigningCertificateV2:
    """SigningCertificateV2 (RFC 5035, 3); the first one names the signer."""

    certificates: list[EssCertificateV2]
    policies: list[asn1.TLV] | None


def whole(element: asn1.TLV) -> bytes:
    """Return the DER of an element, tag and length included."""
    return encode(bytes(element.tag_bytes), bytes(element.data))


def signed_bytes(signer: SignerInfo) -> bytes:
    """Return what is signed: the attributes as a ``SET OF`` under its own tag (RFC 5652, 5.4)."""
    return encode(b"\x31", b"".join(whole(element) for element in signer.attributes))


def encode(tag: bytes, content: bytes) -> bytes:
    """Return a DER element (X.690, 8.1.3: the length in its short or long form)."""
    size = len(content)
    if size < 0x80:
        return tag + bytes((size,)) + content
    length = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return tag + bytes((0x80 | len(length),)) + length + content
