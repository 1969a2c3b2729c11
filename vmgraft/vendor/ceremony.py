"""Signing in two parts: the bytes to sign are written out, signed where the key is, and brought back.

Before a signature from elsewhere is attached, everything that is signed is compared with what is there:

1. the folder is as it was written: ``payload.pae`` encodes ``statement.json``
2. each signature is the named key's, over these bytes
3. statement, extensions and content, read anew, are the signed ones, and the statement is in force
4. the extensions given are those of the statement, no more and no fewer
5. the graft is written, read back and verified

An image that carries the statement already gets the signatures beside those that it has (``amend``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

from vmgraft.errors import BadSignatureError, FileError, PayloadMismatchError, UsageError
from vmgraft.imagefmt.contract import PROBE, ContentDigest, GraftState, Image, Opening, Placement, Progress
from vmgraft.imagefmt.graft import Graft, attach_sections, open_graft, open_image
from vmgraft.imagefmt.journal import locate_graft
from vmgraft.imagefmt.tree import digest_content
from vmgraft.signing.bundles import Brought
from vmgraft.signing.dsse import MAX_ENVELOPE, PAYLOAD_TYPE, Envelope, Signature, pae, serialise
from vmgraft.signing.files import read_regular, write_folder
from vmgraft.signing.material import Material, pack_material
from vmgraft.signing.merge import MAX_SIGNATURE_FILE, Vouchers, checked, made_elsewhere
from vmgraft.signing.statement import Statement, parse_statement
from vmgraft.vendor.amend import (
    Amended,
    AmendOptions,
    Proposal,
    amend,
    demand_trusted,
    merge,
    refuse_unsure,
    sound_envelope,
)
from vmgraft.vendor.demand import demand
from vmgraft.vendor.graft import AttachOptions, refuse_grafted, taken_back_on_failure
from vmgraft.vendor.howto import describe
from vmgraft.vendor.inplace import editable
from vmgraft.vendor.pack import Package
from vmgraft.vendor.seal import Terms, check_terms, lay_out, make_statement

if TYPE_CHECKING:
    from vmgraft.signing.keys import PublicKey

STATEMENT: Final = "statement.json"
PAYLOAD: Final = "payload.pae"
README: Final = "README.txt"


@dataclass(frozen=True, slots=True)
class Payload:
    """What was written: the files, and the digests that the two sides compare."""

    files: tuple[Path, ...]
    statement_sha256: str
    pae_sha256: str
    extensions: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Offered:
    """A signature made elsewhere: its file, the key that made it, and that key's certificates (DER, leaf first)."""

    signature: Path
    public: PublicKey
    certificates: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class CeremonyOptions:
    """Where a fresh graft goes, and how the image is opened; a graft that is there stays where it is."""

    output: Path | None = None
    placement: Placement = Placement.AUTO
    opening: Opening = PROBE


# --- out -----------------------------------------------------------------------------------------------------------


def write_payload(
    image: Path, packages: Sequence[Package], options: AttachOptions, folder: Path, progress: Progress | None = None
) -> Payload:
    """Write the bytes to sign for extensions that are to be attached. The image is only read.

    Args:
        image: The image, which must carry no graft.
        packages: The extensions, in the order the host will load them.
        options: Binding, flat digest, end of validity, and how to open the image; the rest is not looked at.
        folder: Where to; made if missing.
        progress: Called with (bytes, bytes in all) while the content is read.

    Raises:
        UsageError: it could never be signed, or the image carries a graft.
        FileError: a file is there already, or cannot be read or written.
    """
    now, terms = datetime.now(UTC), Terms(options.binding, options.expires)
    check_terms(packages, terms, now)
    refuse_grafted(image, options.opening)
    with open_image(image, options.opening) as opened:
        content = digest_content(opened, flat=options.flat, progress=progress)
        statement = make_statement(packages, content, terms, created=now, sector_size=opened.sector_size)
    return _write(folder, statement, grafted=False, unverified=False)


def write_carried_payload(
    image: Path,
    folder: Path,
    *,
    trust: Sequence[PublicKey] = (),
    vouch_for_unverified: bool = False,
    opening: Opening = PROBE,
    progress: Progress | None = None,
) -> Payload:
    """Write the bytes to sign for another signature over the statement that an image carries.

    Args:
        image: A grafted image.
        folder: Where to; made if missing.
        trust: Keys, one of which must have signed it already.
        vouch_for_unverified: Write it although nobody who is known has signed it.
        opening: How to open the image.
        progress: Called with (bytes, bytes in all) while the content is read.

    Raises:
        UsageError: it is not said whom to trust.
        NoGraftError: the image carries none.
        GraftFormatError: the graft is not sound.
        VerificationError: it does not verify, or has expired.
        FileError: a file is there already, or cannot be read or written.
    """
    refuse_unsure(trust, vouch_for_unverified)
    with open_image(image, opening) as opened:
        graft = open_graft(opened, progress=progress)
        envelope = sound_envelope(graft)
        if trust:
            demand_trusted(graft, trust)
    return _write(folder, envelope.payload, grafted=True, unverified=not trust)


def _write(folder: Path, payload: bytes, *, grafted: bool, unverified: bool) -> Payload:
    statement, message = parse_statement(payload, file=STATEMENT), pae(PAYLOAD_TYPE, payload)
    digests = {
        "statement_sha256": hashlib.sha256(payload).hexdigest(),
        "pae_sha256": hashlib.sha256(message).hexdigest(),
    }
    text = describe(statement, pae_size=len(message), grafted=grafted, unverified=unverified, **digests)
    parts = ((STATEMENT, payload), (PAYLOAD, message), (README, text.encode()))
    files = write_folder(folder, parts, what="the payload")
    return Payload(tuple(files), extensions=_listed(statement), **digests)


def _listed(statement: Statement) -> tuple[tuple[str, str], ...]:
    return tuple((entry.id, entry.version) for entry in statement.extensions)


# --- and back ------------------------------------------------------------------------------------------------------


def attach_signatures(
    image: Path,
    packages: Sequence[Package],
    folder: Path,
    offered: Sequence[Offered],
    options: CeremonyOptions,
    *,
    progress: Progress | None = None,
) -> Amended:
    """Attach extensions with signatures that were made elsewhere, or add those to a graft that is there.

    Args:
        image: The image that the payload was written for.
        packages: The extensions; for an image that carries them already they may be left out.
        folder: What ``write_payload`` has written.
        offered: The signatures.
        options: Where to.
        progress: Called with (bytes, bytes in all) while the content is read.

    Raises:
        BadSignatureError: a signature is not the named key's, or the folder was changed.
        PayloadMismatchError: the extensions, or the statement of the image, are others than those that were signed.
        ContentMismatchError: the content is.
        ExpiredError: the statement has expired meanwhile.
        UsageError: no signature, a key twice, or no extensions.
        VmgraftError: see the formats; whatever fails, the image is as it was.
    """
    if not offered or len({item.public for item in offered}) != len(offered):
        raise UsageError("name each signer once, with --signature and --public-key", field="signature")
    envelope = _signed_elsewhere(folder, offered)  # 1, 2
    publics = tuple(item.public for item in offered)
    if _is_grafted(image, options.opening):
        vouchers = Vouchers(publics)

        def propose(graft: Graft, old: Envelope) -> Proposal:
            _find_packages(graft, packages)
            return merge(graft, old, Brought(envelope), vouchers, folder / STATEMENT)

        return amend(image, propose, AmendOptions(options.output, options.opening), progress)
    return _attach_fresh(image, packages, envelope, publics, options, progress=progress)


def assign_chains(publics: Sequence[PublicKey], paths: Sequence[Path]) -> list[tuple[bytes, ...]]:
    """Return the chain of each key, empty for a bare one.

    Args:
        publics: The keys.
        paths: PEM files, one chain each, in any order.

    Raises:
        UsageError: a chain is for none of the keys, or two are for one.
        FileError: it cannot be read, or is no chain for signing code.
        ExpiredError: the certificate is not valid now.
    """
    from vmgraft.signing.certificates import leaf_key
    from vmgraft.signing.chains import read_chain

    chains: dict[PublicKey, tuple[bytes, ...]] = {}
    for path in paths:
        chain = read_chain(path)
        leaf = leaf_key(chain)
        if leaf not in publics or leaf in chains:
            what = "is a second one for" if leaf in chains else "is for another key,"
            hint = "name one chain, at most, for each --public-key"
            raise UsageError(f"the chain {what} {leaf.keyid}", file=path, field="certificate", hint=hint)
        chains[leaf] = chain
    return [chains.get(public, ()) for public in publics]


def _signed_elsewhere(folder: Path, offered: Sequence[Offered]) -> Envelope:
    """Return the folder's statement in an envelope with the signatures, each verified."""
    statement = _read(folder / STATEMENT, MAX_ENVELOPE, "the statement")
    envelope = Envelope(statement, ())
    message = _read(folder / PAYLOAD, len(envelope.pae), "the payload")
    if message != envelope.pae:
        raise BadSignatureError(
            f"{PAYLOAD} does not encode {STATEMENT}: one of them was changed", file=folder / PAYLOAD,
            hint="bring back the very files that were written",
        )  # fmt: skip
    signatures = []
    for item in offered:
        data = _read(item.signature, MAX_SIGNATURE_FILE, "the signature")
        sig = made_elsewhere(item.public, envelope, data, file=item.signature)
        signatures.append(Signature(item.public.keyid, sig, pack_material(Material(item.certificates))))
    return checked(Envelope(statement, tuple(signatures)), file=folder)


def _read(path: Path, limit: int, what: str) -> bytes:
    data = read_regular(path, limit, what=what, error=FileError)
    if len(data) > limit:
        raise FileError(f"{what} is longer than {limit} bytes", file=path)
    return data


def _is_grafted(image: Path, opening: Opening) -> bool:
    with open_image(image, opening) as opened:
        return locate_graft(opened).state not in (GraftState.NONE, GraftState.ORPHANED)


def _find_packages(graft: Graft, packages: Sequence[Package]) -> None:
    """Refuse extensions that a graft does not hold, byte for byte."""
    for package in packages:
        for data in (package.manifest, package.module, *package.files):
            if data is not None:
                graft.payload(hashlib.sha256(data).hexdigest())


@dataclass(slots=True)
class _Draft:
    """The evidence that an image would be, once attached."""

    image: Image
    packages: Sequence[Package]
    envelope: bytes
    progress: Progress | None
    _content: ContentDigest | None = None

    def format_problem(self) -> str | None:
        return None

    def envelopes(self) -> Sequence[bytes]:
        return (self.envelope,)

    def payload(self, sha256: str) -> bytes:
        for package in self.packages:
            for data in (package.manifest, package.module, *package.files):
                if data is not None and hashlib.sha256(data).hexdigest() == sha256:
                    return data
        raise PayloadMismatchError(f"no extension given has the signed part sha256:{sha256}")

    def content(self, flat: bool) -> ContentDigest:
        if self._content is None or (flat and self._content.flat is None):
            wanted: Final = "always" if flat else "never"
            self._content = digest_content(self.image, flat=wanted, progress=self.progress)
        return self._content


def _attach_fresh(
    image: Path,
    packages: Sequence[Package],
    envelope: Envelope,
    publics: tuple[PublicKey, ...],
    options: CeremonyOptions,
    *,
    progress: Progress | None,
) -> Amended:
    if not packages:
        hint = "name the folders of the extensions that were signed"
        raise UsageError("the image carries no graft, and no extension is given", file=image, hint=hint)
    refuse_grafted(image, options.opening)
    data = serialise(envelope)
    with editable(image, options.output) as target:
        with open_image(target, options.opening) as opened:
            draft = _Draft(opened, packages, data, progress)
            run = demand(draft, publics, file=opened.path)  # 3
            statement = parse_statement(envelope.payload, file=STATEMENT)
            ordered = _in_order(statement, packages, image)  # 4
            tree_digest = draft.content(flat=False).tree_digest
        located = attach_sections(  # 5
            target,
            lay_out(ordered, data),
            placement=options.placement,
            tree_digest=tree_digest,
            opening=options.opening,
        )
        with (
            taken_back_on_failure(target, AttachOptions(output=options.output, opening=options.opening)),
            open_image(target, options.opening) as written,
        ):
            demand(open_graft(written), publics, file=target)
    keyids = tuple(key.keyid for key in publics)
    notes = tuple(f"in the statement, not understood: {name}" for name in (run.statement or statement).unknown)
    digest = hashlib.sha256(envelope.payload).hexdigest()
    return Amended(options.output or image, located, digest, keyids, keyids, _listed(statement), notes)


def _in_order(statement: Statement, packages: Sequence[Package], image: Path) -> list[Package]:
    """Return the packages in the order of the statement, which is that of loading.

    Raises:
        PayloadMismatchError: one is not in it, or is given twice.
    """
    given = {package.id: package for package in packages}
    extra = sorted(given.keys() - {entry.id for entry in statement.extensions})
    if extra or len(given) != len(packages):
        what = f"{', '.join(extra)} is not in the signed statement" if extra else "an extension is given twice"
        raise PayloadMismatchError(what, file=image, field="extensions", hint="give exactly those that were signed")
    return [given[entry.id] for entry in statement.extensions]
