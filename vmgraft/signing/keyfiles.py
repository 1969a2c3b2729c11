"""Key files: PKCS#8 PEM for the private half, SubjectPublicKeyInfo PEM for the public half, and passphrases."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from urllib.parse import unquote, urlsplit

from vmgraft.errors import FileError, UsageError
from vmgraft.signing.files import read_regular, write_new
from vmgraft.signing.keys import MAX_PEM, PrivateKey, PublicKey, is_encrypted, private_from_pem, public_from_pem

#: Environment variable looked at when neither a passphrase file nor a descriptor was named.
PASSPHRASE_VARIABLE = "VMGRAFT_PASSPHRASE"  # noqa: S105 - the name of a variable
#: Longest passphrase accepted, in bytes.
MAX_PASSPHRASE = 1024

#: What ``--key`` takes beside paths and ``file:`` URIs (``signers``).
OTHER_SCHEMES = re.compile(r"(pkcs11|awskms|gcpkms|azurekms|hv|exec):", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class PassphraseSource:
    """Where a passphrase comes from: the file, else the descriptor, else the environment, else the prompt.

    Attributes:
        file: File whose first line is the passphrase.
        fd: Descriptor to read it from.
        environment: Look at ``VMGRAFT_PASSPHRASE``.
        prompt: Called with a sentence to show; returns what was typed.
    """

    file: str | PathLike[str] | None = None
    fd: int | None = None
    environment: bool = True
    prompt: Callable[[str], str] | None = None
    _read: dict[int, bytes] = field(default_factory=dict, repr=False, compare=False)

    def get(self, purpose: str) -> bytes | None:
        """Return the passphrase as UTF-8, or None where no source has one.

        Args:
            purpose: The sentence to prompt with.

        Raises:
            UsageError: the source named is empty, too long or cannot be read.
        """
        if self.file is not None:
            return _first_line(self.file)
        if self.fd is not None:
            if self.fd not in self._read:  # a pipe can be read once, and several keys may ask
                self._read[self.fd] = _first_line(self.fd)
            return self._read[self.fd]
        value = os.environb.get(PASSPHRASE_VARIABLE.encode()) if self.environment else None
        if value is None and self.prompt is not None:
            value = self.prompt(purpose).encode("utf-8")
        return None if value is None else _usable(value, None)


def _usable(value: bytes, file: str | PathLike[str] | None) -> bytes:
    if not value or len(value) > MAX_PASSPHRASE:
        raise UsageError(f"a passphrase has 1 to {MAX_PASSPHRASE} bytes", file=file)
    return value


def _first_line(source: str | PathLike[str] | int) -> bytes:
    name = f"descriptor {source}" if isinstance(source, int) else os.fspath(source)
    if isinstance(source, int) and source < 0:
        raise UsageError("a descriptor is not negative", file=name)
    try:
        with open(source, "rb", closefd=not isinstance(source, int), buffering=0) as stream:
            data = b""
            while b"\n" not in data and len(data) <= MAX_PASSPHRASE + 2:
                chunk = stream.read(MAX_PASSPHRASE)
                if not chunk:
                    break
                data += chunk
    except OSError as exc:
        raise UsageError(f"the passphrase cannot be read: {exc.strerror}", file=name) from exc
    return _usable(data.split(b"\n", 1)[0].removesuffix(b"\r"), name)


def key_path(reference: str | PathLike[str]) -> Path:
    """Return the path that ``--key`` names: a path as it is, or a ``file:`` URI (RFC 8089).

    Raises:
        UsageError: a ``file:`` URI with a host, query or fragment, or without a path; or a key that is no file.
    """
    text = os.fspath(reference)
    try:
        os.fsencode(text)
    except UnicodeEncodeError as exc:
        raise UsageError("a file name cannot hold lone surrogates", field="key") from exc
    if "\0" in text:
        raise UsageError("a file name cannot hold a NUL", field="key")
    if OTHER_SCHEMES.match(text):
        scheme = text.split(":", 1)[0].lower()
        hint = f"{scheme}: keys sign with --key; name a public key's file here (a file of that name: ./{scheme}:...)"
        raise UsageError(f"{scheme}: does not name a key file", field="key", hint=hint)
    if not text.lower().startswith("file:"):
        return Path(text)
    parts = urlsplit(text)
    if parts.netloc not in ("", "localhost") or parts.query or parts.fragment or not parts.path:
        raise UsageError(f"{text!r} does not name a local file", field="key", hint="file:/path/to/key")
    path = unquote(parts.path)
    if "\0" in path:
        raise UsageError("a file name cannot hold a NUL", field="key")
    return Path(path)


def _read_key(path: Path) -> bytes:
    try:
        return read_regular(path, MAX_PEM, what="the key", error=FileError)
    except FileError as exc:
        if isinstance(exc.__cause__, FileNotFoundError):
            exc.hint = "make a pair with: vmgraft keygen PREFIX"
        raise


def load_private(reference: str | PathLike[str], passphrase: PassphraseSource | None = None) -> PrivateKey:
    """Load a private key; the passphrase is asked for only when the key is encrypted.

    Args:
        reference: Path or ``file:`` URI.
        passphrase: Where the passphrase comes from; None looks at the environment only.

    Raises:
        UsageError: wrong passphrase, or none.
        FileError: not readable, not a private key, or one of a kind not accepted.
    """
    path = key_path(reference)
    data = _read_key(path)
    secret = None
    if is_encrypted(data):
        secret = (passphrase or PassphraseSource()).get(f"Passphrase for {path}: ")
        if secret is None:
            hint = f"--passphrase-file, --passphrase-fd or {PASSPHRASE_VARIABLE}"
            raise UsageError("the key is encrypted and no passphrase was given", file=path, hint=hint)
    return private_from_pem(data, secret, file=path)


def load_public(source: str | PathLike[str] | bytes) -> PublicKey:
    """Load a public key from PEM bytes, or from a path or ``file:`` URI.

    Raises:
        FileError: not readable, not a public key, or one of a kind not accepted.
    """
    if isinstance(source, bytes):
        return public_from_pem(source)
    path = key_path(source)
    return public_from_pem(_read_key(path), file=path)


def write_keypair(prefix: str | PathLike[str], key: PrivateKey, passphrase: bytes | None) -> tuple[Path, Path]:
    """Write ``PREFIX.key`` (mode 0600) and ``PREFIX.pub``; neither may exist.

    Args:
        prefix: Path without ending.
        key: The key.
        passphrase: Encrypts the private key; None writes it in the clear.

    Returns:
        The two paths.

    Raises:
        FileError: a file exists or cannot be written; nothing is left behind.
    """
    private, public = Path(f"{os.fspath(prefix)}.key"), Path(f"{os.fspath(prefix)}.pub")
    write_new(private, key.pem(passphrase), what="the key", mode=0o600)
    try:
        write_new(public, key.public.pem, what="the key", mode=0o644)
    except BaseException:
        private.unlink()
        raise
    return private, public
