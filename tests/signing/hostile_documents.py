"""Documents bent by somebody who wants a reader to stumble: sound ones, and ways to spoil any JSON."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import signing_ca as ca

from vmgraft.errors import (
    BadSignatureError,
    GraftFormatError,
    PolicyError,
    UnsupportedError,
    UntrustedSignerError,
    VmgraftError,
)
from vmgraft.signing.bundles import BUNDLE_TYPES, MAX_BUNDLE, read_signed
from vmgraft.signing.dsse import MAX_ENVELOPE, Envelope, Signature, pae, parse_envelope, serialise
from vmgraft.signing.manifest import MAX_MANIFEST, canonical_manifest, parse_manifest
from vmgraft.signing.material import Material, pack_material, parse_material
from vmgraft.signing.policy import MAX_POLICY, parse_policy
from vmgraft.signing.policysign import PolicyTrust, sign_policy, unwrap_policy
from vmgraft.signing.policytools import format_policy
from vmgraft.signing.statement import MAX_STATEMENT, STATEMENT_TYPE, parse_statement
from vmgraft.signing.vsa import SUMMARY_TYPE, read_summary, sign_summary

#: What an error names as the file.
FILE = "hostile.json"


@dataclass(frozen=True)
class Reader:
    """One kind of document: a sound one, what reads it, how it refuses, and the largest it takes in bytes."""

    sound: bytes
    read: Callable[[bytes], Any]
    error: type[VmgraftError] | tuple[type[VmgraftError], ...]
    limit: int
    #: Places (their last steps) that odd strings are right in.
    free: tuple[str, ...] = ()


def readers(sim: Any) -> dict[str, Reader]:
    """Return every reader of a document that nobody vouches for."""
    statement, _ = sim.statement([sim.manifest()])
    chain = tuple(entity.der for entity in (ca.issue("Release", ca.issue("Root", ca=True)),))
    signed = sim.envelope(statement, "vendor", "second")
    carrying = Envelope(statement, (Signature("k", b"sig", pack_material(Material(chain, (b"stamp",)))),))
    document = sim.policy_document("vendor", "second", expires=sim.now)
    document["trustStores"] = [{"name": "acme", "type": "ca", "certificates": ca.issue("Root", ca=True).pem.decode()}]
    entry = document["trustPolicies"][0]
    entry |= {"trustStores": ["ca:acme"], "trustedIdentities": ["x509.subject: C=US, O=Acme"]}
    policy = format_policy(document)
    trust = PolicyTrust((sim.keys["vendor"].public,))

    def envelope(data: bytes) -> Envelope:
        return parse_envelope(data, file=FILE)

    def material(data: bytes) -> Material | None:
        extension = envelope(data).signatures[0].extension
        return parse_material(extension, field="signatures[0].extension", file=FILE)

    return {
        "envelope": Reader(serialise(signed), envelope, BadSignatureError, MAX_ENVELOPE),
        # What stands around the material is the envelope's business; another kind is not understood and does no harm.
        "material": Reader(
            serialise(carrying), material, BadSignatureError, MAX_ENVELOPE, ("kind", "payload", "keyid", "sig"),
        ),
        "statement": Reader(statement, lambda data: parse_statement(data, file=FILE), GraftFormatError, MAX_STATEMENT),
        "manifest": Reader(
            canonical_manifest(sim.manifest(description="A clock.", onFault="detach")),
            lambda data: parse_manifest(data, file=FILE), GraftFormatError, MAX_MANIFEST,
        ),
        "policy": Reader(policy, lambda data: parse_policy(data, file=FILE), PolicyError, MAX_POLICY),
        "signed policy": Reader(
            sign_policy(policy, [sim.keys["vendor"]]), lambda data: unwrap_policy(data, trust, FILE), PolicyError,
            MAX_ENVELOPE,
        ),
        "bundle": Reader(
            bundle(statement, chain), lambda data: read_signed(data, file=FILE), (BadSignatureError, UnsupportedError),
            MAX_BUNDLE, ("hint",),
        ),
        **_summaries(sim),
    }  # fmt: skip


def bundle(statement: bytes, chain: tuple[bytes, ...]) -> bytes:
    """A Sigstore bundle with a chain and a timestamp, none of which anybody checked."""
    found = pack_material(Material(chain, (b"stamp",))) or {}
    envelope = json.loads(serialise(Envelope(statement, (Signature("k", b"sig"),))))
    document = {"mediaType": BUNDLE_TYPES[-1], "verificationMaterial": found["ext"], "dsseEnvelope": envelope}
    return json.dumps(document).encode()


def sound_summary() -> bytes:
    """The statement of a verification summary."""
    digest = {"sha256": "0" * 64}
    document = {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": "guest-content/fs-verity-descriptor", "digest": digest}],
        "predicateType": SUMMARY_TYPE,
        "predicate": {
            "verifier": {"id": "https://audit.example/"}, "timeVerified": "2026-11-22T15:00:00Z",
            "resourceUri": "vmgraft:tree:sha256:" + "0" * 64, "policy": {"uri": "vmgraft:policy", "digest": digest},
            "inputAttestations": [{"uri": "vmgraft:statement", "digest": digest}],
            "verificationResult": "PASSED", "verifiedLevels": ["VMGRAFT_STRICT"],
        },
    }  # fmt: skip
    return json.dumps(document).encode()


def _summaries(sim: Any) -> dict[str, Reader]:
    """A summary as it is found, and what an auditor has signed in it."""
    auditor = sim.keys["second"]  # its signatures are all of one length
    data = sound_summary()

    def read(found: bytes) -> Any:
        return read_summary(found, [auditor.public], file=FILE)

    room = (MAX_ENVELOPE - len(sign_summary(b"", auditor))) // 4 * 3
    return {
        # One that is well-formed and was altered is just signed by nobody known.
        "summary": Reader(sign_summary(data, auditor), read, (BadSignatureError, UntrustedSignerError), MAX_ENVELOPE),
        "signed summary": Reader(data, lambda found: read(sign_summary(found, auditor)), BadSignatureError, room),
    }


# --- any JSON ------------------------------------------------------------------------------------------------------


def _with(member: bytes) -> Callable[[bytes], bytes]:
    """Put a member in front of the others."""
    return lambda sound: b"{" + member + b"," + sound.strip()[1:]


def _first_name(sound: bytes) -> bytes:
    return json.dumps(next(iter(json.loads(sound)))).encode()


def _first_name_escaped(sound: bytes) -> bytes:
    name = next(iter(json.loads(sound)))
    return f'"\\u{ord(name[0]):04x}{name[1:]}"'.encode()


#: What is done to any document, and a word that the refusal must have.
SPOIL: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "a name twice": (lambda sound: _with(_first_name(sound) + b":null")(sound), "stands twice"),
    "a name twice, once escaped": (lambda sound: _with(_first_name_escaped(sound) + b":null")(sound), "stands twice"),
    "a name twice, further in": (_with(b'"x":{"y":1,"y":1}'), "stands twice"),
    "nested arrays": (_with(b'"x":' + b"[" * 20 + b"]" * 20), "nested"),
    "nested objects": (_with(b'"x":' + b'{"a":' * 20 + b"1" + b"}" * 20), "nested"),
    "a thousand times nested": (lambda sound: b"[" * 1000 + sound + b"]" * 1000, "nested"),
    "nested to the limit of size": (lambda _: b"[" * 50_000, "nested"),
    "nested and never closed": (lambda _: b'{"a":[' * 10_000, "nested"),
    "a number of 400 digits": (_with(b'"x":' + b"9" * 400), "20 digits"),
    "a number of 50 000 digits": (_with(b'"x":-' + b"9" * 50_000), "20 digits"),
    "a huge exponent": (_with(b'"x":1e999999999'), "not an integer"),
    "a fraction": (_with(b'"x":1.0'), "not an integer"),
    "a fraction of 50 000 digits": (_with(b'"x":0.' + b"3" * 50_000), "not an integer"),
    "NaN": (_with(b'"x":NaN'), "not JSON"),
    "Infinity": (_with(b'"x":-Infinity'), "not JSON"),
    "hexadecimal": (_with(b'"x":0x10'), "not JSON"),
    "a leading zero": (_with(b'"x":010'), "not JSON"),
    "a lone surrogate": (_with(b'"x":"\\ud800"'), "surrogate"),
    "a lone low surrogate": (_with(b'"x":"a\\udfffb"'), "surrogate"),
    "surrogates the wrong way round": (_with(b'"x":"\\udc00\\ud800"'), "surrogate"),
    "a lone surrogate as a name": (_with(b'"\\udbff":1'), "surrogate"),
    "a surrogate in UTF-8": (_with(b'"x":"\xed\xa0\x80"'), "UTF-8"),
    "an overlong NUL": (_with(b'"x":"\xc0\x80"'), "UTF-8"),
    "a code point beyond Unicode": (_with(b'"x":"\xf4\x90\x80\x80"'), "UTF-8"),
    "a NUL in a string": (_with(b'"x":"a\0b"'), "not JSON"),
    "a NUL in front": (lambda sound: b"\0" + sound, "not JSON"),
    "a NUL behind": (lambda sound: sound.strip() + b"\0", "not JSON"),
    "a line break in a string": (_with(b'"x":"a\nb"'), "not JSON"),
    "an escape there is none of": (_with(b'"x":"\\x41"'), "not JSON"),
    "a string of 10 MB": (_with(b'"x":"' + b"a" * 10_000_000 + b'"'), "more than"),
    "10 MB of spaces": (lambda sound: sound + b" " * 10_000_000, "more than"),
    "a byte order mark": (lambda sound: b"\xef\xbb\xbf" + sound, "byte order mark"),
    "UTF-16": (lambda sound: sound.decode().encode("utf-16"), "UTF-8"),
    "UTF-16 without a mark": (lambda sound: sound.decode().encode("utf-16-le"), "not JSON"),
    "Latin-1": (_with('"x":"ü"'.encode("latin-1")), "UTF-8"),
    "a comment": (lambda sound: b"/* */" + sound, "not JSON"),
    "a comma behind": (lambda sound: sound.strip()[:-1] + b",}", "not JSON"),
    "single quotes": (lambda sound: sound.replace(b'"', b"'"), "not JSON"),
    "two documents": (lambda sound: sound + sound, "not JSON"),
    "cut": (lambda sound: sound[: len(sound) // 2], "not JSON"),
    "nothing": (lambda _: b"", "not JSON"),
    "spaces": (lambda _: b"  \n", "not JSON"),
    "null": (lambda _: b"null", ""),
    "a string": (lambda _: b'"x"', ""),
    "a number": (lambda _: b"7", ""),
    "in a list": (lambda sound: b"[" + sound + b"]", ""),
    "no members": (lambda _: b"{}", ""),
    "a member of the prototype": (lambda _: b'{"__proto__":{},"__class__":1}', ""),
    "a name of a line break and escapes": (lambda _: b'{"\\n\\u001b[2J\\u202e":1}', ""),
    "quotes without end": (lambda _: b'{"' + b'\\"' * 25_000, "not JSON"),
    "backslashes": (lambda _: b"\\" * 50_000, "not JSON"),
}


# --- as much as the limit of size allows ---------------------------------------------------------------------------


def _fill(head: bytes, unit: bytes, tail: bytes, limit: int) -> bytes:
    return head + unit * ((limit - len(head) - len(tail)) // len(unit)) + tail


def _members(sound: bytes, limit: int) -> bytes:
    """A sound document with as many unknown members as there is room for."""
    body = sound.strip()[1:]
    return b"{" + b"".join(b'"_%06x":{},' % n for n in range((limit - len(body) - 1) // 13)) + body


#: Documents that fill the limit of size with what costs most to look at; each takes the limit, and is refused.
FLOODS: dict[str, Callable[[bytes, int], bytes]] = {
    "brackets": lambda _, limit: b"[" + b"[]," * ((limit - 4) // 3) + b"[]]",
    "objects": lambda _, limit: b"[" + b"{}," * ((limit - 4) // 3) + b"{}]",
    "numbers": lambda _, limit: b"[" + b"1," * ((limit - 3) // 2) + b"1]",
    "strings": lambda _, limit: b"[" + b'"",' * ((limit - 4) // 3) + b'""]',
    "names": lambda _, limit: b"{" + b"".join(b'"%06x":0,' % n for n in range((limit - 12) // 11)) + b'"x":0}',
    "one string": lambda _, limit: b'"' + b"a" * (limit - 2) + b'"',
    "one string of escapes": lambda _, limit: b'"' + b"\\u0041" * ((limit - 2) // 6) + b'"',
    "one string of quotes": lambda _, limit: b'"' + b'\\"' * ((limit - 2) // 2) + b'"',
    "signatures": lambda _, limit: _fill(b'{"payload":"","payloadType":"","signatures":[{}', b",{}", b"]}", limit),
    "unknown members of the sound one": _members,
}


# --- any place -----------------------------------------------------------------------------------------------------


def leaves(document: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Yield the place and value of each string, number and truth value."""
    if isinstance(document, dict | list):
        for key, value in document.items() if isinstance(document, dict) else enumerate(document):
            yield from leaves(value, (*path, key))
    else:
        yield path, document


def put(document: Any, path: tuple[str | int, ...], value: Any) -> bytes:
    """Return a copy of a document with one value replaced."""
    copy = json.loads(json.dumps(document))
    node = copy
    for step in path[:-1]:
        node = node[step]
    node[path[-1]] = value
    return json.dumps(copy).encode()


#: What takes the place of every string; none of it is ever right.
ODD_STRINGS: dict[str, Callable[[str], Any]] = {
    "a NUL behind": lambda text: text + "\0",
    "an escape of the terminal": lambda text: text + "\x1b[2J",
    "a line break behind": lambda text: text + "\n",
    "very long": lambda text: text + "a" * 40_000,
    "a list of it": lambda text: [text],
    "null": lambda _: None,
    "a number": lambda _: 1,
}
#: And of every number.
ODD_NUMBERS: dict[str, Any] = {"negative": -1, "2 to the 64": 2**64, "as text": "1", "true": True, "null": None}


# --- base64 --------------------------------------------------------------------------------------------------------


def _unused_bits(text: str) -> str:
    """Set a bit that padding leaves unused; where there is none, make room for one."""
    body = text.rstrip("=")
    if body == text:
        return text + "AB=="
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    return body[:-1] + alphabet[alphabet.index(body[-1]) | 1] + "=" * (len(text) - len(body))


#: Spellings of the same bytes (or nearly) that are not the canonical one.
SPELLINGS: dict[str, Callable[[str], str]] = {
    "no padding": lambda text: text.rstrip("=") if text.endswith("=") else text[:-1],
    "too much padding": lambda text: text + "=",
    "four more signs of padding": lambda text: text + "====",
    "padding in front": lambda text: "=" + text,
    "padding in the middle": lambda text: text[:4] + "=" + text[4:],
    "unused bits set": _unused_bits,
    "a line break behind": lambda text: text + "\n",
    "a line break in the middle": lambda text: text[:4] + "\n" + text[4:],
    "a space": lambda text: text[:4] + " " + text[4:],
    "a NUL behind": lambda text: text + "\0",
    "both alphabets": lambda text: "+-/_" + text,
    "a sign of no alphabet": lambda text: text[:4] + "!" + text[5:],
    "letters that only look so": lambda text: "\uff21" + text[1:],
    "digits of another script": lambda text: "\u0661" + text[1:],
    "hexadecimal": lambda text: "\\x" + base64.b64decode(text).hex(),
    "as a URL": lambda text: "data:;base64," + text,
    "nothing": lambda _: "",
}


def envelope_over(sim: Any, payload: bytes, *, forged: bool) -> bytes:
    """An envelope over any bytes, with the vendor's signature over them, or over others."""
    key = sim.keys["vendor"]
    signature = key.sign(pae("application/vnd.in-toto+json", b"{}" if forged else payload))
    return serialise(Envelope(payload, (Signature(key.keyid, signature),)))
