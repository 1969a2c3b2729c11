"""How much there is in a certificate: counted on its DER, before any of it becomes objects.

A certificate of 16 KiB has room for thousands of names, and each is held against each name constraint above it. What
has more than any certificate needs is refused; the rest says here what it may cost (``effort``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

#: Most subject alternative names of one certificate.
MAX_NAMES: Final = 100
#: Most subtrees in the name constraints of one certificate, permitted and excluded together.
MAX_CONSTRAINTS: Final = 100
#: Most attributes in a subject, and in an issuer's name.
MAX_ATTRIBUTES: Final = 50
#: Most DER elements of one certificate, what extensions hold included; one of a web server has about 150.
MAX_ELEMENTS: Final = 1500

_OCTETS: Final = 0x04
_NAMES_OID: Final = bytes.fromhex("551d11")
_CONSTRAINTS_OID: Final = bytes.fromhex("551d1e")
_ISSUER: Final = 2  # the place of the issuer behind the version, among tbsCertificate's members (RFC 5280, 4.1)
_SUBJECT: Final = 4
_VERSION: Final = 0xA0
_EXTENSIONS: Final = 0xA3

#: Where an element begins, where its content begins, and where both end.
_Element = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Weight:
    """What was counted.

    Attributes:
        issuer: The issuer's name in DER.
        subject: The subject's.
        names: What constraints of authorities above may be held against: alternative names, attributes of the subject.
        constraints: Subtrees of its own name constraints.
        problem: What there is too much of, or None.
    """

    issuer: bytes
    subject: bytes
    names: int
    constraints: int
    problem: str | None


@lru_cache(maxsize=512)
def weigh(certificate: x509.Certificate) -> Weight:
    """Count what is in a certificate that was loaded, so that its frame is DER."""
    data = certificate.public_bytes(Encoding.DER)
    whole = _inside(data, (0, 0, len(data)))[0]
    parts = _inside(data, _inside(data, whole)[0])
    shift = int(data[parts[0][0]] == _VERSION)  # certificates of version 1 do not say so
    issuer, subject = parts[shift + _ISSUER], parts[shift + _SUBJECT]
    names, constraints = _extension_names(data, parts)
    attributes = [_two_levels(data, part, MAX_ATTRIBUTES) for part in (issuer, subject)]
    problem = None
    if names > MAX_NAMES:
        problem = f"more than {MAX_NAMES} subject alternative names"
    elif constraints > MAX_CONSTRAINTS:
        problem = f"more than {MAX_CONSTRAINTS} name constraints"
    elif max(attributes) > MAX_ATTRIBUTES:
        problem = f"a name of more than {MAX_ATTRIBUTES} attributes"
    elif _all(data, MAX_ELEMENTS) > MAX_ELEMENTS:
        problem = f"more than {MAX_ELEMENTS} elements"
    named = data[subject[0] : subject[2]]
    return Weight(data[issuer[0] : issuer[2]], named, names + attributes[1], constraints, problem)


def _extension_names(data: bytes, parts: Sequence[_Element]) -> tuple[int, int]:
    """Return how many alternative names and how many subtrees of name constraints there are."""
    names = constraints = 0
    for part in parts:
        if data[part[0]] != _EXTENSIONS:
            continue
        for extension in _inside(data, _inside(data, part)[0]):
            oid, *_, value = _inside(data, extension)
            found = data[oid[1] : oid[2]]
            try:
                if found == _NAMES_OID:
                    names += _count(data, _inside(data, value)[0], MAX_NAMES)
                elif found == _CONSTRAINTS_OID:
                    constraints += _two_levels(data, _inside(data, value)[0], MAX_CONSTRAINTS)
            except (ValueError, IndexError):
                continue  # the library refuses it before it looks at any of the names
    return names, constraints


def _elements(data: bytes, frame: _Element) -> Iterator[_Element]:
    """Return the elements of a frame.

    Raises:
        ValueError: not DER.
    """
    at, end = frame[1], frame[2]
    while at < end:
        start = at
        tag = data[at]
        at += 1
        if tag & 0x1F == 0x1F:  # a tag of several bytes
            while at < end and data[at] & 0x80:
                at += 1
            at += 1
        if at >= end:
            raise ValueError("an element without a length")
        size = data[at]
        at += 1
        if size & 0x80:
            width = size & 0x7F
            if not 1 <= width <= 4 or at + width > end:
                raise ValueError("a length that is none in DER")
            size = int.from_bytes(data[at : at + width], "big")
            at += width
        if at + size > end:
            raise ValueError("an element that ends behind its frame")
        yield start, at, at + size
        at += size


def _inside(data: bytes, frame: _Element) -> list[_Element]:
    return list(_elements(data, frame))


def _count(data: bytes, frame: _Element, limit: int) -> int:
    """Return how many elements a frame has, at most one more than a limit."""
    return sum(1 for _ in islice(_elements(data, frame), limit + 1))


def _two_levels(data: bytes, frame: _Element, limit: int) -> int:
    """Return how many elements the elements of a frame have, no further than needed."""
    found = 0
    for element in _elements(data, frame):
        found += max(1, _count(data, element, limit))
        if found > limit:
            break
    return found


def _all(data: bytes, limit: int) -> int:
    """Return how many elements there are at every depth, no further than needed.

    Octet strings are looked into, as that is where extensions are. One that holds something else counts as much as
    could be hidden in it.
    """
    found, frames = 0, [(0, 0, len(data))]
    while frames and found <= limit:
        frame = frames.pop()
        try:
            for element in _elements(data, frame):
                found += 1
                if found > limit:
                    break
                if data[element[0]] & 0x20 or data[element[0]] == _OCTETS:
                    frames.append(element)
        except ValueError:
            found += (frame[2] - frame[1]) // 2
    return found
