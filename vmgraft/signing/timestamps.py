"""RFC 3161 timestamps over a signature: asked for, received, and verified, so that it outlives its certificate.

What is stamped is the signature's raw bytes (``sig`` of the envelope, decoded), as Sigstore does. The steps of
verification, in order; the same numbers stand in the code. Certificates and structure are read first, bounded and
strictly; the statement of time is read only after its signature was verified.

1. the response is granted and well-formed, with one signer
2. the signed attributes hold, once each: the content's type, its digest, and the digest of the signer's certificate
3. the signature over the attributes is by that certificate's key
4. the statement of time is about the signature's bytes, hashed with SHA-256, SHA-384 or SHA-512
5. the certificate is for time stamping alone, and leads to a trusted root at the time stated
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from os import PathLike, fspath
from typing import TYPE_CHECKING, Final

from vmgraft.errors import BadSignatureError, FileError, UntrustedSignerError, UsageError
from vmgraft.signing.effort import SPENT, Effort
from vmgraft.signing.material import MAX_TIMESTAMP

if TYPE_CHECKING:
    from http.client import HTTPResponse
    from urllib.request import OpenerDirector

    from cryptography.x509 import Certificate

#: Media types of question and answer over HTTP (RFC 3161, 3.4).
QUERY_TYPE: Final = "application/timestamp-query"
REPLY_TYPE: Final = "application/timestamp-reply"
#: Size of the nonce in a request; with its sign it fits 64 bits, which every authority takes.
NONCE_BITS: Final = 63
#: Longest wait for a connection, and for an answer, in seconds.
TIMEOUT: Final = 20.0

_FIELD: Final = "timestamp"
_PathOrNone = str | PathLike[str] | None


@dataclass(frozen=True, slots=True)
class TimestampAuthority:
    """A timestamp authority that a policy trusts; ``roots`` are its trust anchors in DER."""

    name: str
    roots: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Timestamp:
    """What a verified timestamp says.

    Attributes:
        time: The signature was there by then: the time stated, plus how vague it is.
        authority: Name of the trusted authority; empty where none was asked about.
        signer: Subject of the certificate that signed it, as text (RFC 4514).
        warnings: That it is a development authority.
    """

    time: datetime
    authority: str
    signer: str
    warnings: tuple[str, ...] = ()


def verify_timestamp(token: bytes, signature: bytes, authorities: Sequence[TimestampAuthority]) -> datetime:
    """Return when a signature was there, on the word of a trusted authority; see ``examine_timestamp``."""
    return examine_timestamp(token, signature, authorities).time


def examine_timestamp(
    token: bytes, signature: bytes, authorities: Sequence[TimestampAuthority], effort: Effort | None = None
) -> Timestamp:
    """Verify a timestamp.

    Args:
        token: DER, a TimeStampResp or the TimeStampToken in it.
        signature: The bytes that it must be over.
        authorities: Whom to trust; the first with a path counts.
        effort: What this adds to, where it is one timestamp of several.

    Raises:
        BadSignatureError: malformed, not over these bytes, or not signed by the certificate it names.
        UntrustedSignerError: the certificate leads to no trusted root at the time stated, or is not for time stamping.
    """
    from vmgraft.signing._token import latest, open_token
    from vmgraft.signing.paths import TIME_STAMPING, load_roots, validate

    effort = effort or Effort()
    if effort.spent:
        raise UntrustedSignerError(SPENT, field=_FIELD)
    info, chain = open_token(token, signature)
    stated, signer = info.time.as_datetime(), chain[0].subject.rfc4514_string()
    reasons = []
    for authority in authorities:  # 5
        path = validate(chain, load_roots(authority.roots), stated, TIME_STAMPING, effort)
        if isinstance(path, str):
            reasons.append(f"{authority.name}: {path}")
            continue
        return Timestamp(latest(info), authority.name, signer, _development(authority.name, path))
    why = "; ".join(reasons) or "the policy trusts no timestamp authority here"
    hint = "add the authority's root to the policy's trustStores, as type tsa"
    raise UntrustedSignerError(f"no trusted path for the timestamp of {signer!r}: {why}", field=_FIELD, hint=hint)


def make_request(signature: bytes, *, algorithm: str = "sha256") -> bytes:
    """Return a TimeStampReq over a signature: with a fresh nonce, asking for the certificates.

    Args:
        signature: What to stamp.
        algorithm: ``sha256``, ``sha384`` or ``sha512``.

    Raises:
        UsageError: nothing to stamp, or another algorithm.
    """
    from cryptography.hazmat import asn1
    from cryptography.x509 import ObjectIdentifier

    from vmgraft.signing import _tsp as tsp
    from vmgraft.signing._token import HASHES

    oid = next((oid for oid, name in HASHES.items() if name == algorithm), None)
    if oid is None or not signature:
        raise UsageError("a timestamp is over a signature, by sha256, sha384 or sha512", field=_FIELD)
    kind = tsp.Algorithm(algorithm=ObjectIdentifier(oid), parameters=asn1.Null())
    imprint = tsp.Imprint(algorithm=kind, digest=hashlib.new(algorithm, signature).digest())
    nonce = secrets.randbits(NONCE_BITS)
    return asn1.encode_der(tsp.Request(version=1, imprint=imprint, policy=None, nonce=nonce, certificates=True))


def accept_response(
    response: bytes, request: bytes, signature: bytes, *, file: _PathOrNone = None
) -> tuple[bytes, Timestamp]:
    """Check the answer to a request before it is stored.

    Whether the authority is trusted is for ``examine_timestamp``: a vendor need not hold the policies of its customers.

    Args:
        response: What the authority sent: a TimeStampResp, or the TimeStampToken in it.
        request: The TimeStampReq it was asked with.
        signature: What both must be over.
        file: What to name in the error.

    Returns:
        The TimeStampResp in DER, to be stored, and what it says.

    Raises:
        BadSignatureError: malformed, refused by the authority, over other bytes, or the answer to another request.
    """
    try:
        return _accepted(response, request, signature)
    except BadSignatureError as exc:
        exc.file = exc.file or (None if file is None else fspath(file))
        raise


def _accepted(response: bytes, request: bytes, signature: bytes) -> tuple[bytes, Timestamp]:
    from cryptography.hazmat import asn1

    from vmgraft.signing import _tsp as tsp
    from vmgraft.signing._token import HASHES, bad, is_token, latest, open_token

    try:
        asked = asn1.decode_der(tsp.Request, request)
    except ValueError as exc:
        raise bad("the request is malformed", "make a new one") from exc
    algorithm = HASHES.get(asked.imprint.algorithm.algorithm.dotted_string)
    if algorithm is None or hashlib.new(algorithm, signature).digest() != asked.imprint.digest:
        raise bad("the request is not over this signature", "was the image signed again meanwhile?")
    info, chain = open_token(response, signature)
    if info.imprint.digest != asked.imprint.digest:
        raise bad("the answer uses another digest than was asked for")
    if asked.nonce is not None and info.nonce != asked.nonce:
        raise bad("the answer is not to this request: the nonces differ", "an old answer cannot be used again")
    stored = response
    if is_token(response):
        status = asn1.encode_der(tsp.StatusInfo(status=0, text=None, failure=None))
        stored = tsp.encode(b"\x30", status + response)
    if len(stored) > MAX_TIMESTAMP:
        raise bad(f"longer than {MAX_TIMESTAMP} bytes")
    signer = chain[0].subject.rfc4514_string()
    return stored, Timestamp(latest(info), "", signer, _development(signer, chain))


def _development(name: str, path: Sequence[Certificate]) -> tuple[str, ...]:
    from vmgraft.signing.paths import is_development

    if not is_development(path):
        return ()
    return (f"the timestamp authority {name} is a development one: anybody may hold its keys",)


def fetch(url: str, request: bytes, *, timeout: float = TIMEOUT) -> bytes:
    """Ask an authority over HTTP (RFC 3161, 3.4) and return what it answers; nothing of that is checked yet.

    Redirects are not followed: the authority is the one that was named. Proxies are those of the environment.

    Args:
        url: ``http:`` or ``https:``.
        request: A TimeStampReq.
        timeout: Seconds to wait for a connection, and then for the whole answer.

    Raises:
        UsageError: another kind of address.
        FileError: not reachable, or its answer is no timestamp, or too long.
    """
    from http.client import HTTPException
    from urllib.error import HTTPError
    from urllib.request import Request

    if not _is_http(url):
        raise UsageError(f"{url[:200]!r} is no address of a timestamp authority", hint="http://tsa.example/tsr")
    headers = {"Content-Type": QUERY_TYPE, "Accept": REPLY_TYPE, "User-Agent": "vmgraft"}
    try:
        # The opener knows http and https alone, and the address was checked.
        with _opener().open(Request(url, request, headers), timeout=timeout) as answer:  # noqa: S310
            kind, body = str(answer.headers.get_content_type()), _read(answer, timeout)
    except HTTPError as exc:
        exc.close()
        raise FileError(f"the timestamp authority answers {exc.code} {exc.reason}"[:300], file=url) from exc
    except (OSError, HTTPException, ValueError) as exc:
        why = str(getattr(exc, "reason", exc) or type(exc).__name__)
        raise FileError(f"the timestamp authority cannot be asked: {why}"[:300], file=url, hint=_HINT) from exc
    if kind != REPLY_TYPE:
        raise FileError(f"the timestamp authority answers with {kind[:80]!r}, not with a timestamp", file=url)
    if len(body) > MAX_TIMESTAMP:
        raise FileError(f"the timestamp authority answers with more than {MAX_TIMESTAMP} bytes", file=url)
    return body


_HINT: Final = "or write the request to a file, have it answered elsewhere, and read the answer from a file"


def _read(answer: HTTPResponse, timeout: float) -> bytes:
    """Return at most one byte more than is accepted.

    Raises:
        TimeoutError: the answer drips in.
        IncompleteRead: it is shorter than announced.
    """
    import time
    from http.client import IncompleteRead

    body, end = b"", time.monotonic() + timeout
    while len(body) <= MAX_TIMESTAMP and (chunk := answer.read1(MAX_TIMESTAMP + 1 - len(body))):
        body += chunk
        if time.monotonic() > end:
            raise TimeoutError("the answer takes too long")
    if len(body) <= MAX_TIMESTAMP and answer.length:
        raise IncompleteRead(body, answer.length)
    return body


def _is_http(url: str) -> bool:
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return False
    return parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.username is None and url.isprintable()


def _opener() -> OpenerDirector:
    """Return an opener that knows HTTP and HTTPS and follows no redirect."""
    from urllib import request

    opener = request.OpenerDirector()
    for handler in (
        request.ProxyHandler(), request.HTTPHandler(), request.HTTPSHandler(),
        request.HTTPDefaultErrorHandler(), request.HTTPErrorProcessor(),
    ):  # fmt: skip
        opener.add_handler(handler)
    return opener
