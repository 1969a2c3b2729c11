"""Timestamps for signatures that an image carries, from an authority on the network or through files.

A timestamp says that a signature was there at a time, so that it outlives its certificate. Nothing is signed for it by
the vendor; whether the authority is believed is for each policy to say, and can be checked here with its root.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from vmgraft.errors import FileError, UnsupportedError, UsageError
from vmgraft.imagefmt.contract import Opening
from vmgraft.imagefmt.graft import Graft, open_graft, open_image
from vmgraft.signing.dsse import Envelope, Signature
from vmgraft.signing.files import read_regular, write_new
from vmgraft.signing.material import MAX_TIMESTAMP, MAX_TIMESTAMPS, Material, pack_material, parse_material
from vmgraft.signing.merge import checked
from vmgraft.signing.timestamps import (
    TimestampAuthority,
    accept_response,
    examine_timestamp,
    fetch,
    make_request,
)
from vmgraft.vendor.amend import Amended, AmendOptions, Proposal, amend, sound_envelope


@dataclass(frozen=True, slots=True)
class Stamp:
    """One timestamp that was added: on whose signature, when, and who says so."""

    keyid: str
    time: datetime
    signer: str
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Stamped:
    """What was done."""

    amended: Amended
    stamps: tuple[Stamp, ...]


def stamp_online(
    image: Path, url: str, options: AmendOptions, *, keyids: Sequence[str] = (), roots: tuple[bytes, ...] = ()
) -> Stamped:
    """Have signatures stamped by an authority, over HTTP.

    Args:
        image: A grafted image.
        url: Address of the authority.
        options: Where to.
        keyids: Whose signatures; none: those that have no timestamp yet.
        roots: DER; where there are any, the authority must lead to one of them.

    Raises:
        UsageError: nothing to stamp, or no such signature.
        FileError: the authority cannot be asked.
        BadSignatureError: its answer is not good.
        UntrustedSignerError: it leads to none of the roots.
        VmgraftError: see ``amend``; whatever fails, the image carries what it carried.
    """
    stamps: list[Stamp] = []

    def propose(graft: Graft, old: Envelope) -> Proposal:
        new = list(old.signatures)
        for index in _chosen(old, keyids, graft.image.path):
            request = make_request(new[index].sig)
            response = fetch(url, request)
            new[index] = _stamped(new[index], index, (response, request), roots=roots, stamps=stamps, source=url)
        return Proposal(checked(dataclasses.replace(old, signatures=tuple(new)), file=graft.image.path))

    return Stamped(amend(image, propose, options), tuple(stamps))


def write_request(image: Path, target: Path, opening: Opening, *, keyids: Sequence[str] = ()) -> str:
    """Write the request for one signature into a file, to be answered elsewhere; the image is only read.

    Args:
        image: A grafted image.
        target: The new file, DER.
        opening: How to open the image.
        keyids: Whose signature; none: the only one without a timestamp.

    Returns:
        The keyid of the signature that it is about.

    Raises:
        UsageError: not exactly one signature is meant.
        FileError: the file is there already, or cannot be written.
    """
    with open_image(image, opening) as opened:
        envelope = sound_envelope(open_graft(opened))
    chosen = _chosen(envelope, keyids, image)
    if len(chosen) != 1:
        named = ", ".join(envelope.signatures[index].keyid or "no keyid" for index in chosen)
        raise UsageError(
            f"a request is about one signature, and there are {len(chosen)}: {named}", file=image,
            hint="--signer KEYID names one",
        )  # fmt: skip
    signature = envelope.signatures[chosen[0]]
    write_new(target, make_request(signature.sig), what="the request")
    return signature.keyid


def stamp_offline(
    image: Path, request: Path, response: Path, options: AmendOptions, *, roots: tuple[bytes, ...] = ()
) -> Stamped:
    """Add the answer to a request that was written earlier.

    Args:
        image: The image that the request was written for.
        request: The file with the request.
        response: The file with the answer.
        options: Where to.
        roots: As for :func:`stamp_online`.

    Raises:
        UsageError: the request is about no signature of this image, which may have been signed anew.
        VmgraftError: as :func:`stamp_online`.
    """
    asked = read_regular(request, MAX_TIMESTAMP, what="the request", error=FileError)
    answer = read_regular(response, MAX_TIMESTAMP, what="the answer", error=FileError)
    if len(asked) > MAX_TIMESTAMP or len(answer) > MAX_TIMESTAMP:
        raise FileError(f"more than {MAX_TIMESTAMP} bytes", file=request if len(asked) > MAX_TIMESTAMP else response)
    stamps: list[Stamp] = []

    def propose(graft: Graft, old: Envelope) -> Proposal:
        index = next((i for i, signature in enumerate(old.signatures) if _is_about(asked, signature.sig)), None)
        if index is None:
            hint = "was the image signed anew meanwhile? Write a new request"
            raise UsageError("the request is about no signature of this image", file=request, hint=hint)
        new = list(old.signatures)
        new[index] = _stamped(new[index], index, (answer, asked), roots=roots, stamps=stamps, source=str(response))
        return Proposal(checked(dataclasses.replace(old, signatures=tuple(new)), file=graft.image.path))

    return Stamped(amend(image, propose, options), tuple(stamps))


def _is_about(request: bytes, signature: bytes) -> bool:
    """Find the signature a request is for; ``accept_response`` then parses it, and compares in earnest."""
    return any(hashlib.new(name, signature).digest() in request for name in ("sha256", "sha384", "sha512"))


def _chosen(envelope: Envelope, keyids: Iterable[str], file: Path) -> list[int]:
    """Return the places of the signatures that are meant."""
    wanted = list(keyids)
    carried = [signature.keyid for signature in envelope.signatures]
    missing = [keyid for keyid in wanted if keyid not in carried]
    if missing:
        raise UsageError(
            f"there is no signature by {', '.join(missing)}", file=file, field="signer",
            hint=f"the envelope names {', '.join(keyid or 'no keyid' for keyid in carried)}",
        )  # fmt: skip
    if wanted:
        return [index for index, keyid in enumerate(carried) if keyid in wanted]
    chosen = [
        index for index, signature in enumerate(envelope.signatures) if not _material(signature, index, file).timestamps
    ]
    if not chosen:
        hint = "--signer KEYID adds another to one of them"
        raise UsageError("every signature has a timestamp already", file=file, field="signer", hint=hint)
    return chosen


def _material(signature: Signature, index: int, file: str | Path) -> Material:
    """Return what stands beside a signature.

    Raises:
        UnsupportedError: it is of a kind that is not understood, and would be lost.
    """
    field = f"signatures[{index}].extension"
    material = parse_material(signature.extension, field=field, file=file)
    if material is None:
        raise UnsupportedError("something that is not understood stands beside the signature", file=file, field=field)
    return material


def _stamped(
    signature: Signature,
    index: int,
    exchange: tuple[bytes, bytes],
    *,
    roots: tuple[bytes, ...],
    stamps: list[Stamp],
    source: str,
) -> Signature:
    """Return the signature with the answer of an exchange (answer, request) beside it, once that is checked."""
    material = _material(signature, index, source)
    if len(material.timestamps) >= MAX_TIMESTAMPS:
        raise UsageError(f"the signature has {MAX_TIMESTAMPS} timestamps already, as many as allowed", field="signer")
    token, stamp = accept_response(*exchange, signature.sig, file=source)
    answer = exchange[0]
    if token in material.timestamps or any(stored.endswith(answer) for stored in material.timestamps):
        raise UsageError("this timestamp stands beside the signature already", file=source, field="signer")
    if roots:
        stamp = examine_timestamp(token, signature.sig, [TimestampAuthority("--tsa-ca", roots)])
    stamps.append(Stamp(signature.keyid, stamp.time, stamp.signer, stamp.warnings))
    extension = pack_material(Material(material.certificates, (*material.timestamps, token)))
    return dataclasses.replace(signature, extension=extension)
