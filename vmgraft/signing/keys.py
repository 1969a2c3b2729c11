"""Keys: generate, name, sign, verify. Files are in ``keyfiles``.

======== ======================================= =========================================
kind     algorithm                               signature
======== ======================================= =========================================
p256     ECDSA P-256, SHA-256                    DER (RFC 3279, 2.2.3), about 71 bytes
p384     ECDSA P-384, SHA-384 (with a warning)   DER, about 103 bytes
ed25519  Ed25519 (RFC 8032)                      64 bytes
rsa      RSA PKCS#1 v1.5, SHA-256, 3072-8192 bit  384 bytes and more
mldsa65  ML-DSA-65, empty context (FIPS 204)     3309 bytes
======== ======================================= =========================================
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass, field
from os import PathLike
from typing import TYPE_CHECKING, Literal

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa

from vmgraft.errors import BadSignatureError, FileError, UnsupportedError, UsageError, VmgraftError
from vmgraft.signing.barekey import BareKey
from vmgraft.signing.pkcs8 import costly, encrypt_pkcs8
from vmgraft.words import counted

try:
    from cryptography.hazmat.primitives.asymmetric import mldsa
except ImportError:  # cryptography before 48
    mldsa = None  # type: ignore[assignment]

if TYPE_CHECKING:
    _Public = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey | rsa.RSAPublicKey | mldsa.MLDSA65PublicKey
    _Private = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey | mldsa.MLDSA65PrivateKey

Kind = Literal["p256", "p384", "ed25519", "rsa", "mldsa65"]
#: What ``generate`` makes.
GENERATED_KINDS = ("p256", "p384", "ed25519", "rsa3072", "rsa4096", "mldsa65")
#: Smallest RSA modulus accepted (NIST SP 800-57 part 1, table 2: 128-bit strength), in bits.
MIN_RSA_BITS = 3072
#: Largest RSA modulus accepted, in bits: verification time grows with its square.
MAX_RSA_BITS = 8192
#: Length of an ML-DSA-65 signature, in bytes (FIPS 204, table 2).
MLDSA65_SIGNATURE = 3309
#: Largest PEM accepted, in bytes.
MAX_PEM = 64 * 1024

_PUBLIC_LABEL = b"-----BEGIN PUBLIC KEY-----"
_PathOrNone = str | PathLike[str] | None


def _classify(key: object, file: _PathOrNone, error: type[VmgraftError]) -> Kind:
    """Return the kind of a public key, or refuse it."""
    hint = "use ECDSA P-256, Ed25519, RSA of 3072 to 8192 bits, or ML-DSA-65"
    if isinstance(key, ec.EllipticCurvePublicKey):
        if isinstance(key.curve, ec.SECP256R1):
            return "p256"
        if isinstance(key.curve, ec.SECP384R1):
            return "p384"
        raise error(f"the curve {key.curve.name} is not accepted", file=file, hint=hint)
    if isinstance(key, rsa.RSAPublicKey):
        if not MIN_RSA_BITS <= key.key_size <= MAX_RSA_BITS:
            raise error(f"an RSA key of {key.key_size} bits is not accepted", file=file, hint=hint)
        return "rsa"
    if isinstance(key, ed25519.Ed25519PublicKey):
        return "ed25519"
    if mldsa is not None and isinstance(key, mldsa.MLDSA65PublicKey):
        return "mldsa65"
    raise error("a key of this algorithm is not accepted", file=file, hint=hint)


@dataclass(frozen=True, slots=True)
class PublicKey:
    """A public key. Two are equal when their SubjectPublicKeyInfo is, however they were written down.

    Attributes:
        spki: SubjectPublicKeyInfo (RFC 5280, 4.1), DER, re-encoded from the parsed key.
        kind: Algorithm.
        keyid: ``SHA256:`` and unpadded base64, see ``keyid()``.
    """

    spki: bytes
    kind: Kind = field(compare=False)
    keyid: str = field(compare=False)
    _key: _Public = field(compare=False, repr=False)

    @property
    def pem(self) -> bytes:
        """The key as PEM SubjectPublicKeyInfo."""
        encoding, form = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        return self._key.public_bytes(encoding, form)

    @property
    def bits(self) -> int:
        """Size as ``ssh-keygen -l`` counts it: the field of a curve, the modulus of RSA; of ML-DSA the encoded key."""
        key = self._key
        if isinstance(key, ec.EllipticCurvePublicKey | rsa.RSAPublicKey):
            return key.key_size
        return 8 * len(key.public_bytes_raw())

    @property
    def warning(self) -> str | None:
        """What speaks against this kind of key, or None."""
        if self.kind == "p384":
            return f"{self.keyid} is a P-384 key: not every verifier of these signatures takes it"
        return None

    def may_have_made(self, signature: bytes) -> bool:
        """Tell whether a signature is as long as this key's are; that costs nothing."""
        if self.kind in ("p256", "p384"):
            return len(signature) <= 2 * ((self.bits + 7) // 8) + 8  # SEQUENCE, and two INTEGERs with a sign each
        if self.kind == "rsa":
            return len(signature) == (self.bits + 7) // 8
        return len(signature) == (64 if self.kind == "ed25519" else MLDSA65_SIGNATURE)

    def verify(self, message: bytes, signature: bytes) -> bool:
        """Tell whether the signature over the message is this key's."""
        key = self._key
        try:
            if isinstance(key, ec.EllipticCurvePublicKey):
                key.verify(signature, message, _ecdsa(key.curve))
            elif isinstance(key, rsa.RSAPublicKey):
                key.verify(signature, message, padding.PKCS1v15(), hashes.SHA256())
            else:
                key.verify(signature, message)
        except InvalidSignature:
            return False
        return True

    def check_made(self, message: bytes, signature: bytes, *, by: str) -> bytes:
        """Return a signature that something else has just made with this key, or refuse it.

        Args:
            message: What was to be signed.
            signature: What came back.
            by: Who made it, for the message.

        Raises:
            BadSignatureError: it does not verify.
        """
        if self.verify(message, signature):
            return signature
        key, hint = self._key, "is the public key given the one of the key that signs?"
        if isinstance(key, ec.EllipticCurvePublicKey):
            digest = "SHA-384" if self.kind == "p384" else "SHA-256"
            hint = f"ECDSA over {digest} of the whole message, in DER (ECDSA-Sig-Value); {hint}"
            if len(signature) == 2 * ((key.key_size + 7) // 8):
                hint = "it is as long as r and s side by side; they are expected in DER (ECDSA-Sig-Value)"
        elif isinstance(key, rsa.RSAPublicKey):
            hint = f"PKCS#1 v1.5 over SHA-256 of the whole message, not PSS; {hint}"
        raise BadSignatureError(
            f"the signature of {counted(len(signature), 'byte')} that {by} made does not verify with {self.keyid}",
            field="key",
            hint=hint,
        )


def _ecdsa(curve: ec.EllipticCurve) -> ec.ECDSA:
    return ec.ECDSA(hashes.SHA384() if isinstance(curve, ec.SECP384R1) else hashes.SHA256())


@dataclass(frozen=True, slots=True)
class PrivateKey(BareKey):
    """A private key and its public half."""

    public: PublicKey
    _key: _Private = field(repr=False)

    def sign(self, message: bytes) -> bytes:
        """Sign a message and check the signature before handing it out.

        Raises:
            VmgraftError: the signature just made does not verify.
        """
        key = self._key
        if isinstance(key, ec.EllipticCurvePrivateKey):
            signature = key.sign(message, _ecdsa(key.curve))
        elif isinstance(key, rsa.RSAPrivateKey):
            signature = key.sign(message, padding.PKCS1v15(), hashes.SHA256())
        else:
            signature = key.sign(message)
        if not self.public.verify(message, signature):
            raise VmgraftError("the signature just made does not verify")
        return signature

    def pem(self, passphrase: bytes | None) -> bytes:
        """Return the key as PEM PKCS#8 (RFC 5958), encrypted (``pkcs8``) unless ``passphrase`` is None."""
        form, none = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        if passphrase is None:
            return self._key.private_bytes(serialization.Encoding.PEM, form, none)
        return encrypt_pkcs8(self._key.private_bytes(serialization.Encoding.DER, form, none), passphrase)


def _wrap_public(key: object, file: _PathOrNone, error: type[VmgraftError]) -> PublicKey:
    kind = _classify(key, file, error)
    accepted: _Public = key  # type: ignore[assignment]
    spki = accepted.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return PublicKey(spki, kind, _keyid(accepted, spki), accepted)


def _keyid(key: _Public, spki: bytes) -> str:
    """Hash the OpenSSH wire form (RFC 4253, 6.6), as ``ssh-keygen -lf``; for ML-DSA, which has none, the SPKI."""
    blob = spki
    if isinstance(key, ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey | rsa.RSAPublicKey):
        line = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        blob = base64.b64decode(line.split()[1])
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode("ascii").rstrip("=")


def keyid(public: PublicKey) -> str:
    """Return the name of a key: its OpenSSH fingerprint, ``SHA256:...``.

    ML-DSA keys have no OpenSSH form yet; for them it is the SHA-256 of the SubjectPublicKeyInfo, written the same way.
    """
    return public.keyid


def generate(kind: str = "p256") -> PrivateKey:
    """Make a key.

    Args:
        kind: One of ``GENERATED_KINDS``.

    Raises:
        UsageError: there is no such kind.
        UnsupportedError: the installed ``cryptography`` cannot make it.
    """
    key: _Private
    match kind:
        case "p256":
            key = ec.generate_private_key(ec.SECP256R1())
        case "ed25519":
            key = ed25519.Ed25519PrivateKey.generate()
        case "p384":
            key = ec.generate_private_key(ec.SECP384R1())
        case "rsa3072" | "rsa4096":
            key = rsa.generate_private_key(public_exponent=65537, key_size=int(kind.removeprefix("rsa")))
        case "mldsa65":
            key = _generate_mldsa65()
        case _:
            raise UsageError(f"no key type {kind!r}", hint="one of " + ", ".join(GENERATED_KINDS))
    return PrivateKey(_wrap_public(key.public_key(), None, UnsupportedError), key)


def _generate_mldsa65() -> mldsa.MLDSA65PrivateKey:
    if mldsa is None:
        raise UnsupportedError("the installed cryptography has no ML-DSA", hint="pip install 'cryptography>=48'")
    try:
        return mldsa.MLDSA65PrivateKey.generate()
    except UnsupportedAlgorithm as exc:
        raise UnsupportedError("the cryptography installed was built without ML-DSA") from exc


def public_from_pem(data: bytes, *, file: _PathOrNone = None, error: type[VmgraftError] = FileError) -> PublicKey:
    """Parse one PEM ``PUBLIC KEY`` block (SubjectPublicKeyInfo).

    Raises:
        VmgraftError: (of class ``error``) not exactly one such block, or a key of a kind or size not accepted.
    """
    if len(data) > MAX_PEM:
        raise error(f"a key file has at most {MAX_PEM} bytes", file=file)
    if b"PRIVATE KEY-----" in data:
        raise error("this is a private key", file=file, hint="name the .pub file")
    if data.count(b"-----BEGIN ") != 1 or _PUBLIC_LABEL not in data:
        hint = "an OpenSSH key converts with: ssh-keygen -e -m PKCS8 -f KEY.pub"
        raise error("not one PEM block of type PUBLIC KEY", file=file, hint=hint)
    try:
        key = serialization.load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm) as exc:
        raise error("the public key cannot be parsed", file=file) from exc
    return _wrap_public(key, file, error)


def public_from_key(key: object, *, file: _PathOrNone = None, error: type[VmgraftError] = FileError) -> PublicKey:
    """Wrap a public key object of ``cryptography``.

    Raises:
        VmgraftError: (of class ``error``) a key of a kind or size not accepted.
    """
    return _wrap_public(key, file, error)


def is_encrypted(data: bytes) -> bool:
    """Tell whether a PEM private key needs a passphrase."""
    return b"-----BEGIN ENCRYPTED PRIVATE KEY-----" in data or b"Proc-Type: 4,ENCRYPTED" in data


def private_from_pem(data: bytes, passphrase: bytes | None, *, file: _PathOrNone = None) -> PrivateKey:
    """Parse a PEM private key, PKCS#8 or one of its older forms.

    Args:
        data: The PEM.
        passphrase: Needed, and used, only when the key is encrypted.
        file: What to name in the error.

    Raises:
        UsageError: wrong passphrase, or none.
        FileError: not a private key, or one of a kind or size not accepted.
    """
    if len(data) > MAX_PEM:
        raise FileError(f"a key file has at most {MAX_PEM} bytes", file=file)
    if b"PRIVATE KEY-----" not in data:
        raise FileError("not a PEM private key", file=file, hint="make one with: vmgraft keygen PREFIX")
    encrypted = is_encrypted(data)
    if encrypted and not passphrase:
        raise UsageError("the key is encrypted and no passphrase was given", file=file)
    problem = costly(data) if encrypted else None
    if problem is not None:
        raise FileError(problem, file=file, hint="openssl pkcs8 -topk8 -iter 600000 writes the key anew")
    try:
        key = serialization.load_pem_private_key(data, passphrase if encrypted else None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as exc:
        if encrypted:  # a wrong passphrase decrypts to anything, now and then to what looks like a padding
            raise UsageError("the passphrase does not open this key, or the file is damaged", file=file) from exc
        raise FileError("the private key cannot be parsed", file=file) from exc
    accepted: _Private = key  # type: ignore[assignment]
    public = _wrap_public(accepted.public_key(), file, FileError)
    return PrivateKey(public, accepted)
