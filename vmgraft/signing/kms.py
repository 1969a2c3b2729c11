"""Keys in a key management service: ``awskms:``, ``gcpkms:``, ``azurekms:``, ``hv:``, through securesystemslib.

The URIs are those of securesystemslib, with one attribute of ours behind: ``?public-key=/path/to/key.pub``. Without it
the service is asked for the public key. Credentials are those of each service's own SDK, from its usual environment.
"""

from __future__ import annotations

import importlib
import re
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

from vmgraft.errors import FileError, UnsupportedError, UsageError, VmgraftError
from vmgraft.signing.barekey import BareKey
from vmgraft.signing.dsse import MAX_SIGNATURE_BYTES
from vmgraft.signing.keyfiles import load_public
from vmgraft.signing.keyuri import absolute_path, split_uri

if TYPE_CHECKING:
    from vmgraft.signing.keys import Kind, PublicKey

#: What securesystemslib calls our kinds: key type and scheme (securesystemslib/signer/_constants.py). RSA is PKCS#1
#: v1.5, where its own default is PSS.
_SCHEMES: Final[dict[Kind, tuple[str, str]]] = {
    "p256": ("ecdsa", "ecdsa-sha2-nistp256"),
    "p384": ("ecdsa", "ecdsa-sha2-nistp384"),
    "ed25519": ("ed25519", "ed25519"),
    "rsa": ("rsa", "rsa-pkcs1v15-sha256"),
}
#: What each service's signer can sign with (securesystemslib 1.6, the signers' own tables).
_KINDS: Final[dict[str, tuple[Kind, ...]]] = {
    "awskms": ("p256", "p384", "rsa"),
    "gcpkms": ("p256", "p384", "rsa"),
    "azurekms": ("p256", "p384"),
    "hv": ("ed25519",),
}
#: The shape of each URI behind the scheme.
_SHAPES: Final = {
    "awskms": (re.compile(r"[A-Za-z0-9:/_-]{1,2048}"), "awskms:KEY-ID, an ARN or alias/NAME"),
    "gcpkms": (
        re.compile(r"projects/[^/]+/locations/[^/]+/keyRings/[^/]+/cryptoKeys/[^/]+/cryptoKeyVersions/[^/]+"),
        "gcpkms:projects/P/locations/L/keyRings/R/cryptoKeys/K/cryptoKeyVersions/V",
    ),
    "azurekms": (
        re.compile(r"//([A-Za-z0-9-]{1,127})\.vault\.azure\.net/keys/([A-Za-z0-9-]{1,127})/([A-Za-z0-9]{1,64})"),
        "azurekms://VAULT.vault.azure.net/keys/KEY/VERSION",
    ),
    "hv": (re.compile(r"([A-Za-z0-9_.-]{1,256})/([0-9]{1,9})"), "hv:KEY/VERSION"),
}
#: Module and base class of what each SDK raises; taken when the SDK is loaded.
_SDK_ERRORS: Final = (
    ("securesystemslib.exceptions", "UnsupportedAlgorithmError"),
    ("securesystemslib.exceptions", "UnsupportedLibraryError"),
    ("securesystemslib.signer._azure_signer", "UnsupportedKeyType"),
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("google.api_core.exceptions", "GoogleAPIError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("azure.core.exceptions", "AzureError"),
    ("hvac.exceptions", "VaultError"),
)


class _Made(Protocol):
    """A signature of securesystemslib."""

    signature: str


class _Remote(Protocol):
    """A signer of securesystemslib."""

    def sign(self, payload: bytes) -> _Made: ...


@dataclass(frozen=True, slots=True)
class ServiceSigner(BareKey):
    """A key in a key management service.

    Attributes:
        public: Its public half.
        name: Its URI.
    """

    public: PublicKey
    name: str
    _remote: _Remote = field(repr=False)

    def sign(self, message: bytes) -> bytes:
        """Have the service sign.

        Raises:
            FileError: it cannot be reached, or refuses.
            BadSignatureError: what it gave does not verify.
        """
        try:
            made = bytes.fromhex(self._remote.sign(message).signature)
        except _errors() as exc:
            raise _refusal(exc, self.name) from exc
        if len(made) > MAX_SIGNATURE_BYTES:
            raise FileError(f"the service gave more than {MAX_SIGNATURE_BYTES} bytes", file=self.name, field="key")
        return self.public.check_made(message, made, by=self.name)


def open_service(reference: str) -> ServiceSigner:
    """Return the signer that a URI names.

    Args:
        reference: The URI; with ``public-key=PATH`` nothing is asked of the service yet.

    Raises:
        UsageError: the URI makes no sense, or the public key is of a kind that the service does not sign with.
        UnsupportedError: securesystemslib or the service's SDK is not installed.
        FileError: the service cannot be reached or refuses, or the public key cannot be read.
    """
    scheme = reference.split(":", 1)[0].lower()
    path, query = split_uri(reference, ("public-key",))
    shape, example = _SHAPES[scheme]
    found = shape.fullmatch(path)
    if found is None:
        raise UsageError(f"not a {scheme}: URI", field="key", hint=example + ", then perhaps ?public-key=/path")
    name = f"{scheme}:{path}"
    api = _api(scheme)
    try:
        if "public-key" in query:
            public = load_public(absolute_path(query["public-key"], "public-key"))
        else:
            public = _fetch(api, scheme, path, found)
        if public.kind not in _KINDS[scheme]:
            kinds = ", ".join(_KINDS[scheme])
            message = f"{scheme}: does not sign with a key of kind {public.kind}"
            raise UsageError(message, file=name, field="key", hint=f"it does with {kinds}")
        remote = api.SIGNER_FOR_URI_SCHEME[scheme].from_priv_key_uri(name, _describe(api, public))
    except _errors() as exc:
        raise _refusal(exc, name) from exc
    return ServiceSigner(public, name, cast("_Remote", remote))


def _fetch(api: Any, scheme: str, path: str, found: re.Match[str]) -> PublicKey:
    """Ask the service for the public half."""
    from vmgraft.signing.keys import MAX_PEM, public_from_key

    service = api.SIGNER_FOR_URI_SCHEME[scheme]
    arguments = {"azurekms": found.groups()[:2], "hv": found.groups()[:1]}.get(scheme, (path,))
    uri, key = service.import_(*arguments)
    # These two name the newest version only; another one must not be taken for it.
    if scheme in ("azurekms", "hv") and uri != f"{scheme}:{path}":
        hint = f"use {uri}, or name the public key of the version: ?public-key=/path"
        raise UsageError("the service shows the newest version's public key only", field="key", hint=hint)
    text = key.keyval["public"]
    if key.keytype == "ed25519":
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

        return public_from_key(Ed25519PublicKey.from_public_bytes(bytes.fromhex(text)), file=f"{scheme}:{path}")
    return load_public(text.encode("ascii")[: MAX_PEM + 1])


def _describe(api: Any, public: PublicKey) -> Any:
    """Return the key in securesystemslib's terms, with the scheme that we verify."""
    key_type, scheme = _SCHEMES[public.kind]
    text = public.spki[-32:].hex() if public.kind == "ed25519" else public.pem.decode("ascii")
    return api.SSlibKey(public.keyid, key_type, scheme, {"public": text})


def _api(scheme: str) -> Any:
    try:
        return importlib.import_module("securesystemslib.signer")
    except ImportError as exc:
        raise _missing(scheme) from exc


def _missing(scheme: str) -> UnsupportedError:
    hint = "pip install 'vmgraft[kms]'"
    return UnsupportedError(f"{scheme}: keys need securesystemslib and the service's SDK", field="key", hint=hint)


def _errors() -> tuple[type[Exception], ...]:
    """Return what the SDKs that are loaded raise. Network errors are OSErrors; odd answers end in the other four."""
    found: list[type[Exception]] = [OSError, ValueError, LookupError, AttributeError, TypeError]
    for module, name in _SDK_ERRORS:
        error = getattr(sys.modules.get(module), name, None)
        if isinstance(error, type) and issubclass(error, Exception):
            found.append(error)
    return tuple(found)


def _refusal(exc: Exception, name: str) -> VmgraftError:
    if type(exc).__name__ == "UnsupportedLibraryError":
        return _missing(name.split(":", 1)[0])
    words = " ".join(f"{type(exc).__name__}: {exc}".split())
    hint = "are the service's credentials and region in the environment, and may they sign with this key?"
    return FileError(f"the service cannot sign: {words[:400]}", file=name, field="key", hint=hint)
