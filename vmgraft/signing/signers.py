"""Anything that can sign, by one reference: a path or a URI.

======================== ==============================================================
``PATH`` ``file:``       a PEM key file (``keyfiles``)
``pkcs11:``              a token or HSM (RFC 7512; ``pkcs11``)
``exec:``                a program that signs (``execsigner``)
``awskms:`` ``gcpkms:``  a key management service, through securesystemslib (``kms``)
``azurekms:`` ``hv:``
======================== ==============================================================

Whatever signs, the signature is verified with the public key before it is used. Certificates come from files beside the
key and travel with its signatures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from vmgraft.errors import UsageError
from vmgraft.signing.dsse import Signature
from vmgraft.signing.keyfiles import OTHER_SCHEMES, PassphraseSource, load_private
from vmgraft.signing.material import Material, pack_material

if TYPE_CHECKING:
    from vmgraft.signing.keys import PublicKey

_Reference = str | PathLike[str]


class Signer(Protocol):
    """A key that signs, wherever it is kept; ``keys.PrivateKey`` is one."""

    @property
    def public(self) -> PublicKey:
        """The public half."""

    @property
    def keyid(self) -> str:
        """The keyid of the public half."""

    @property
    def certificates(self) -> tuple[bytes, ...]:
        """The certificates that travel with its signatures: DER, leaf first, no root; empty for a bare key."""

    def sign(self, message: bytes) -> bytes:
        """Sign a message, and verify the signature before handing it out.

        Raises:
            BadSignatureError: what came back does not verify.
            VmgraftError: it cannot sign.
        """


@dataclass(frozen=True, slots=True)
class CertifiedSigner:
    """A signer, and the certificates for its key."""

    signer: Signer
    certificates: tuple[bytes, ...]

    @property
    def public(self) -> PublicKey:
        """The public half."""
        return self.signer.public

    @property
    def keyid(self) -> str:
        """The keyid of the public half."""
        return self.signer.keyid

    def sign(self, message: bytes) -> bytes:
        """Sign a message with the signer."""
        return self.signer.sign(message)


def load_signer(
    reference: _Reference, passphrase: PassphraseSource | None = None, *, certificates: Path | None = None
) -> Signer:
    """Open the key that ``--key`` names.

    Args:
        reference: Path or URI, see the table above.
        passphrase: Where passphrases and PINs come from; None looks at the environment only.
        certificates: PEM file with the chain of this key, leaf first.

    Raises:
        UsageError: the reference makes no sense, the passphrase or PIN is wrong or missing, or the certificate is for
            another key.
        UnsupportedError: a package is missing, or what holds the key cannot sign as needed.
        FileError: what holds the key cannot be read or found.
        ExpiredError: the certificate is not valid now.
    """
    signer = _open(fspath(reference), passphrase)
    return signer if certificates is None else _certify(signer, certificates, _read_chain(certificates))


def load_signers(
    references: Sequence[_Reference], passphrase: PassphraseSource | None = None, *, certificates: Sequence[Path] = ()
) -> list[Signer]:
    """Open several keys, and give each chain to the key that its leaf certifies.

    Args:
        references: Paths or URIs.
        passphrase: Where passphrases and PINs come from.
        certificates: PEM files, one chain each, in any order.

    Raises:
        UsageError: a chain is for none of the keys, or two are for one.
        VmgraftError: see :func:`load_signer`.
    """
    chains = {path: _read_chain(path) for path in certificates}  # before anybody is asked for a passphrase
    if len(chains) != len(certificates):
        raise UsageError("the same certificate file is given twice", field="certificate", hint="name each once")
    signers = [_open(fspath(reference), passphrase) for reference in references]
    for path, chain in chains.items():
        place = _place(signers, path, chain)
        signers[place] = _certify(signers[place], path, chain)
    return signers


def make_signature(signer: Signer, message: bytes) -> Signature:
    """Sign, and return the envelope's entry: keyid, signature, and certificates where there are any.

    Args:
        signer: The key.
        message: The pre-authentication encoding (``dsse.pae``).

    Raises:
        BadSignatureError: the signature does not verify.
        VmgraftError: it cannot sign.
    """
    sig = signer.public.check_made(message, signer.sign(message), by="the signer")
    return Signature(signer.keyid, sig, pack_material(Material(tuple(signer.certificates))))


def signing_warnings(reference: _Reference, signer: Signer) -> list[str]:
    """Say what speaks against signing with this key in this way."""
    notes = [] if signer.public.warning is None else [signer.public.warning]
    if fspath(reference).lower().startswith("pkcs11:"):
        from vmgraft.signing.pkcs11 import pin_is_in

        if pin_is_in(fspath(reference)):
            notes.append("pin-value: others see the PIN in the list of processes; pin-source=file:/path hides it")
    if signer.certificates:
        from vmgraft.signing.chains import chain_warnings

        notes += chain_warnings(signer.certificates)
    return notes


def _open(reference: str, passphrase: PassphraseSource | None) -> Signer:
    found = OTHER_SCHEMES.match(reference)
    match found[1].lower() if found else "file":
        case "file":
            return load_private(reference, passphrase)
        case "pkcs11":
            from vmgraft.signing.pkcs11 import open_token

            return open_token(reference, passphrase)
        case "exec":
            from vmgraft.signing.execsigner import open_program

            return open_program(reference)
        case _:
            from vmgraft.signing.kms import open_service

            return open_service(reference)


def _read_chain(path: Path) -> tuple[bytes, ...]:
    from vmgraft.signing.chains import read_chain

    return read_chain(path)


def _place(signers: Sequence[Signer], path: Path, chain: tuple[bytes, ...]) -> int:
    """Return the index of the key that a chain is for."""
    from vmgraft.signing.certificates import leaf_key

    leaf = leaf_key(chain)
    for place, signer in enumerate(signers):
        if signer.public == leaf:
            if signer.certificates:
                raise UsageError(f"a second chain for {leaf.keyid}", file=path, field="certificate", hint="name one")
            return place
    keyids = ", ".join(signer.keyid for signer in signers)
    raise UsageError(
        f"the certificate is for {leaf.keyid}, and no such key signs",
        file=path,
        field="certificate",
        hint=f"the keys given are {keyids}",
    )


def _certify(signer: Signer, path: Path, chain: tuple[bytes, ...]) -> Signer:
    _place([signer], path, chain)
    return CertifiedSigner(signer, chain)
