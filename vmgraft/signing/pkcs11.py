"""Keys in a token or HSM: ``pkcs11:`` URIs (RFC 7512) over PKCS#11.

``pkcs11:token=release;object=acme?module-path=/usr/lib/softhsm/libsofthsm2.so&pin-source=file:/run/pin``

The token is asked for one signature at a time: opened, logged in, closed. It signs what was hashed here, so that the
plain mechanisms every token has are enough (PKCS#11 v3.0, current mechanisms):

======== =================== ==================================================
kind     mechanism           what the token gets
======== =================== ==================================================
ECDSA    CKM_ECDSA (2.3.6)   the hash; r and s come back and are put into DER
RSA      CKM_RSA_PKCS (2.1.6) DigestInfo of the hash (RFC 8017, 9.2)
Ed25519  CKM_EDDSA (2.3.14)  the message
======== =================== ==================================================
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

from vmgraft.errors import FileError, UnsupportedError, UsageError, VmgraftError
from vmgraft.signing.barekey import BareKey
from vmgraft.signing.keyfiles import PASSPHRASE_VARIABLE, PassphraseSource, key_path, load_public
from vmgraft.signing.keyuri import absolute_path, decode_bytes, read_attributes, split_uri

if TYPE_CHECKING:
    from vmgraft.signing.keys import PublicKey

#: Path attributes that choose the token (RFC 7512, 2.3), and the property of the token or slot that each compares.
_TOKEN: Final = {"token": "label", "manufacturer": "manufacturer_id", "model": "model", "serial": "serial"}
_SLOT: Final = {"slot-id": "slot_id", "slot-description": "slot_description", "slot-manufacturer": "manufacturer_id"}
_OBJECT: Final = ("object", "id", "type")
#: Query attributes of RFC 7512, 2.4 that are used, and one of ours: tokens need not keep the public half.
_QUERY: Final = ("module-path", "pin-source", "pin-value", "public-key")
#: Most objects looked at that have the label and id asked for.
_MAX_OBJECTS: Final = 16
#: DigestInfo of SHA-256 up to the hash itself (RFC 8017, 9.2, note 1).
_DIGEST_INFO: Final = bytes.fromhex("3031300d060960864801650304020105000420")


@dataclass(frozen=True, slots=True)
class _Uri:
    """A ``pkcs11:`` URI, decoded."""

    path: dict[str, str]
    object_id: bytes | None
    query: dict[str, str] = field(repr=False)

    @property
    def name(self) -> str:
        """Where the key is said to be, without anything secret."""
        parts = [f"{name}={value}" for name, value in self.path.items()]
        return "pkcs11:" + ";".join(parts)


@dataclass(frozen=True, slots=True)
class TokenSigner(BareKey):
    """A key in a token.

    Attributes:
        public: Its public half.
    """

    public: PublicKey
    _uri: _Uri = field(repr=False)
    _pin: str = field(repr=False)

    def sign(self, message: bytes) -> bytes:
        """Have the token sign.

        Raises:
            FileError: the token is gone, or refuses.
            UsageError: the PIN is no longer right.
            BadSignatureError: what it gave does not verify.
        """
        with _session(self._uri, self._pin) as session:
            made = _sign(_private_key(session, self._uri), self.public, message)
        return self.public.check_made(message, made, by=self._uri.name)


def open_token(reference: str, passphrase: PassphraseSource | None = None) -> TokenSigner:
    """Return the signer that a ``pkcs11:`` URI names, having logged in and found the key.

    Args:
        reference: The URI; it must name ``module-path`` and choose exactly one token and one key.
        passphrase: Where the PIN comes from when the URI names neither ``pin-source`` nor ``pin-value``.

    Raises:
        UsageError: the URI makes no sense, or the PIN is wrong or missing.
        FileError: no such module, token or key, more than one, or a token that refuses.
        UnsupportedError: python-pkcs11 is not installed.
    """
    uri = _parse(reference)
    _api()
    pin = _pin(uri, passphrase or PassphraseSource())
    with _session(uri, pin) as session:
        key = _private_key(session, uri)
        public = _public_key(session, key, uri)
    if public.kind == "mldsa65":
        raise UnsupportedError("ML-DSA keys in tokens cannot sign here", field="key", hint="use a key file, or exec:")
    return TokenSigner(public, uri, pin)


def pin_is_in(reference: str) -> bool:
    """Tell whether a URI holds the PIN itself."""
    return "pin-value" in _parse(reference).query


# --- the URI -------------------------------------------------------------------------------------------------------


def _parse(reference: str) -> _Uri:
    text, query = split_uri(reference, _QUERY)
    parts = text.split(";") if text else []
    raw_id = next((part[3:] for part in parts if part.startswith("id=")), None)
    others = [part for part in parts if not part.startswith("id=")]
    path = read_attributes(others, (*_TOKEN, *_SLOT, *_OBJECT), "pkcs11")
    if len(parts) - len(others) > 1:
        raise UsageError("the pkcs11: URI names id twice", field="key")
    object_id = None if raw_id is None else decode_bytes(raw_id, "id")
    if path.get("type", "private") != "private":
        raise UsageError("a private key signs", field="key", hint="type=private, or no type")
    if object_id is None and "object" not in path:
        raise UsageError("the pkcs11: URI must name the key", field="key", hint="object=LABEL or id=%01")
    if not path.keys() & {*_TOKEN, *_SLOT}:
        raise UsageError("the pkcs11: URI must name the token", field="key", hint="token=LABEL or serial=NUMBER")
    if "slot-id" in path and not (path["slot-id"].isascii() and path["slot-id"].isdecimal()):
        raise UsageError("slot-id is a number", field="key")
    if "module-path" not in query:
        hint = "?module-path=/usr/lib/softhsm/libsofthsm2.so, or the library of your HSM"
        raise UsageError("the pkcs11: URI must name the PKCS#11 library", field="key", hint=hint)
    if "pin-source" in query and "pin-value" in query:
        raise UsageError("the pkcs11: URI names both pin-source and pin-value", field="key", hint="one of them")
    return _Uri(path, object_id, query)


def _pin(uri: _Uri, passphrase: PassphraseSource) -> str:
    """Return the PIN; ``pin-source`` is a path or a ``file:`` URI, never a command."""
    if "pin-value" in uri.query:
        return uri.query["pin-value"]
    source = uri.query.get("pin-source")
    if source is not None:
        if source.startswith("|"):
            raise UsageError("pin-source cannot be a command here", field="key", hint="pin-source=file:/path")
        path = absolute_path(str(key_path(source)), "pin-source")
        pin = PassphraseSource(file=path).get("PIN")
    else:
        pin = passphrase.get(f"PIN for {uri.name}: ")
    if pin is None:
        hint = f"pin-source=file:/path in the URI, --passphrase-file, --passphrase-fd or {PASSPHRASE_VARIABLE}"
        raise UsageError(f"no PIN for {uri.name}", field="key", hint=hint)
    try:
        return pin.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise UsageError("the PIN is not UTF-8", field="key") from exc


# --- the token -----------------------------------------------------------------------------------------------------


def _api() -> ModuleType:
    try:
        import pkcs11
    except ImportError as exc:
        hint = "pip install 'vmgraft[hsm]'"
        raise UnsupportedError("pkcs11: keys need the package python-pkcs11", field="key", hint=hint) from exc
    return pkcs11


@contextmanager
def _session(uri: _Uri, pin: str) -> Iterator[Any]:
    """Yield a session that is logged in; what the token refuses becomes our error."""
    api = _api()
    module = absolute_path(uri.query["module-path"], "module-path")
    if not module.is_file():
        raise FileError("there is no such PKCS#11 library", file=module, field="key", hint="module-path in the URI")
    try:
        token = _token(api.lib(str(module)), uri, module)
        with token.open(rw=False, user_pin=pin) as session:
            yield session
    except api.PKCS11Error as exc:
        raise _refusal(exc, uri) from exc


def _refusal(exc: Exception, uri: _Uri) -> VmgraftError:
    """Turn an error of the token into ours."""
    api, name = _api(), type(exc).__name__
    if isinstance(exc, api.PinIncorrect | api.PinInvalid | api.PinLenRange):
        hint = "tokens lock themselves after a few wrong PINs"
        return UsageError(f"the token does not take this PIN ({name})", file=uri.name, field="key", hint=hint)
    if isinstance(exc, api.PinLocked):
        return FileError("the token's PIN is locked", file=uri.name, field="key", hint="its officer can unlock it")
    words = f"{name}: {exc}" if str(exc) else name
    return FileError(f"the token refuses: {words[:300]}", file=uri.name, field="key")


def _token(library: Any, uri: _Uri, module: Path) -> Any:
    """Return the one token that the URI describes."""
    found, seen = [], []
    for slot in library.get_slots(token_present=True):
        token = slot.get_token()
        if _api().TokenFlag.TOKEN_INITIALIZED not in token.flags:
            continue
        facts = {name: getattr(token, attribute) for name, attribute in _TOKEN.items()}
        facts |= {name: getattr(slot, attribute) for name, attribute in _SLOT.items()}
        shown = {name: _text(value) for name, value in facts.items()}
        seen.append(shown["token"])
        if all(shown[name] == value for name, value in uri.path.items() if name in shown):
            found.append(token)
    if len(found) != 1:
        hint = "the library knows the tokens: " + (", ".join(map(repr, seen[:16])) or "none")
        count = "no token" if not found else f"{len(found)} tokens"
        raise FileError(f"{module} has {count} that {uri.name} describes", field="key", hint=hint)
    return found[0]


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace").rstrip("\0 ") if isinstance(value, bytes) else str(value)


def _search(session: Any, kind: Any, label: str | None, object_id: bytes | None) -> list[Any]:
    """Return the objects of a class with a label and an id, each where it is not None."""
    api = _api()
    template = {api.Attribute.CLASS: kind}
    if label is not None:
        template[api.Attribute.LABEL] = label
    if object_id is not None:
        template[api.Attribute.ID] = object_id
    found = []
    for item in session.get_objects(template):
        found.append(item)
        if len(found) >= _MAX_OBJECTS:
            break
    return found


def _private_key(session: Any, uri: _Uri) -> Any:
    """Return the one private key that the URI describes."""
    found = _search(session, _api().ObjectClass.PRIVATE_KEY, uri.path.get("object"), uri.object_id)
    if len(found) != 1:
        count = "no private key" if not found else f"{len(found)} private keys"
        hint = "object= and id= together must name one; `pkcs11-tool --list-objects --login` lists what there is"
        raise FileError(f"the token has {count} of that name", file=uri.name, field="key", hint=hint)
    return found[0]


def _public_key(session: Any, key: Any, uri: _Uri) -> PublicKey:
    """Return the public half: from the file named, else from the token's key or certificate with the same id."""
    from vmgraft.signing.tokenobjects import from_certificate, from_public_key, from_rsa_private_key

    api = _api()
    if "public-key" in uri.query:
        return load_public(absolute_path(uri.query["public-key"], "public-key"))
    label, object_id = _attribute(key, api.Attribute.LABEL), _attribute(key, api.Attribute.ID)
    names = (None, object_id) if object_id else (label, None)
    if key.key_type == api.KeyType.RSA:
        return from_rsa_private_key(key, uri.name)
    for item in _search(session, api.ObjectClass.PUBLIC_KEY, *names):
        return from_public_key(item, uri.name)
    for item in _search(session, api.ObjectClass.CERTIFICATE, *names):
        return from_certificate(item, uri.name)
    hint = "name it in the URI: &public-key=/path/to/key.pub"
    raise FileError("the token keeps no public half of this key", file=uri.name, field="key", hint=hint)


def _attribute(item: Any, attribute: Any) -> Any:
    """Return an attribute, or None where the object lacks it."""
    try:
        return item[attribute]
    except _api().AttributeTypeInvalid:
        return None


def _sign(key: Any, public: PublicKey, message: bytes) -> bytes:
    from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

    mechanism = _api().Mechanism
    if public.kind == "rsa":
        digest_info = _DIGEST_INFO + hashlib.sha256(message).digest()
        return bytes(key.sign(digest_info, mechanism=mechanism.RSA_PKCS))
    if public.kind == "ed25519":
        return bytes(key.sign(message, mechanism=mechanism.EDDSA))
    digest = hashlib.sha384 if public.kind == "p384" else hashlib.sha256
    pair = bytes(key.sign(digest(message).digest(), mechanism=mechanism.ECDSA))
    half = len(pair) // 2
    return encode_dss_signature(int.from_bytes(pair[:half], "big"), int.from_bytes(pair[half:], "big"))
