"""The README beside bytes to be signed: for a person at another machine, who may not have this program."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vmgraft.signing.times import format_time

if TYPE_CHECKING:
    from vmgraft.signing.statement import Statement

_TEXT: Final = """\
Bytes to be signed
==================

payload.pae     the exact bytes to sign, {pae_size} of them
                sha256 {pae_sha256}
statement.json  what they say: payload.pae is a line "DSSEv1 ..." in front of this file
                sha256 {statement_sha256}

Compare the digests with those that the person who made these files reads to you, and look at the statement:

{summary}
Sign
----
The signature is over the whole of payload.pae, hashed once by the algorithm itself. Choose the line for the key:

ECDSA P-256, RSA   openssl dgst -sha256 -sign KEY.pem -out signature.bin payload.pae
ECDSA P-384        openssl dgst -sha384 -sign KEY.pem -out signature.bin payload.pae
Ed25519            openssl pkeyutl -sign -rawin -inkey KEY.pem -in payload.pae -out signature.bin
ML-DSA-65          the same as Ed25519, with openssl 3.5 or later

In an HSM, through PKCS #11, for ECDSA P-256 (-sha384 for P-384):

    openssl dgst -sha256 -binary -out digest.bin payload.pae
    pkcs11-tool --module MODULE.so --login --sign --id ID --mechanism ECDSA \\
        --input-file digest.bin --output-file signature.bin

For RSA the mechanism is SHA256-RSA-PKCS, with payload.pae itself as --input-file.

Taken are raw signatures and base64 of them, for ECDSA both DER and r and s side by side. RSA is PKCS #1 v1.5, not PSS.

Give back
---------
signature.bin, the public key, and the certificates if there are any. A public key comes out of a private one with

    openssl pkey -in KEY.pem -pubout -out signer.pub

Then, where the image is, repeating the three options for each signer:

    vmgraft attach-signature IMAGE {extensions} --payload THIS_FOLDER \\
        --signature signature.bin --public-key signer.pub [--certificate chain.pem]
"""
_UNVERIFIED: Final = """\
    NOT VERIFIED: no signature that is there was checked. Whoever signs vouches for
    every line of it alone.

"""


def describe(
    statement: Statement, *, pae_size: int, pae_sha256: str, statement_sha256: str, grafted: bool, unverified: bool
) -> str:
    """Return the README for a statement: one that was just made or verified, or one that nobody has vouched for."""
    return _TEXT.format(
        pae_size=pae_size,
        pae_sha256=pae_sha256,
        statement_sha256=statement_sha256,
        summary=(_UNVERIFIED if unverified else "") + _summary(statement),
        extensions="" if grafted else "EXTENSION...",
    ).replace("IMAGE  --payload", "IMAGE --payload")


def _summary(statement: Statement) -> str:
    lines = [f"extension   {entry.id} {entry.version}" for entry in statement.extensions]
    if statement.image is None:
        lines.append("content     any: the extensions may be carried to every image")
    else:
        lines.append(f"content     {statement.image.virtual_size} bytes, tree {statement.image.tree_digest.hex()}")
    lines.append(f"created     {format_time(statement.created)}")
    lines.append(f"expires     {'never' if statement.expires is None else format_time(statement.expires)}")
    return "".join(f"    {line}\n" for line in lines)
