"""Another envelope around the same statement: a signature more, whoever made it, or a timestamp.

What is signed does not change, so signatures that are there stay good, and untouched. The steps; the same numbers stand
in the code:

1. an interrupted change of the graft is brought to its end
2. the record is sound, and its envelope well-formed
3. who vouches for the statement as it is: a trusted key, or, said aloud, nobody
4. the new signatures are made, or taken in from a file
5. with the new signatures for ground, statement, payloads and content are checked as a verifier would
6. the record with the new envelope takes the place of the old one, is read back and verified
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

from vmgraft.errors import (
    FileError,
    GraftFormatError,
    PayloadMismatchError,
    UntrustedSignerError,
    UsageError,
    VerificationError,
    VmgraftError,
)
from vmgraft.imagefmt.contract import PROBE, ContentDigest, GraftState, Located, Opening, Progress
from vmgraft.imagefmt.graft import Graft, open_graft, open_image
from vmgraft.imagefmt.record import Section, SectionKind
from vmgraft.imagefmt.replace import finish_change, replace_sections
from vmgraft.signing.bundles import MAX_BUNDLE, Brought, read_signed, with_intermediates
from vmgraft.signing.dsse import Envelope, Signature, parse_envelope, serialise
from vmgraft.signing.files import read_regular
from vmgraft.signing.integrity import Run
from vmgraft.signing.merge import Vouchers, has_signed, signer_of, with_signatures
from vmgraft.signing.signers import make_signature
from vmgraft.vendor.demand import demand, demand_checks
from vmgraft.vendor.inplace import editable, record_digest, same_placement

if TYPE_CHECKING:
    from vmgraft.signing.keys import PublicKey
    from vmgraft.signing.signers import Signer

#: What stays of the old record, byte for byte: all but the envelope; UNDO is made anew.
_KEPT: Final = tuple(kind for kind in SectionKind if kind not in (SectionKind.ENVELOPE, SectionKind.UNDO))


@dataclass(frozen=True, slots=True)
class AmendOptions:
    """How to change an envelope.

    Attributes:
        output: Write the result here and leave the image alone; None works in place.
        opening: How to open the image.
    """

    output: Path | None = None
    opening: Opening = PROBE


@dataclass(frozen=True, slots=True)
class Amended:
    """What was done.

    Attributes:
        path: The image.
        located: The graft in it.
        statement_sha256: Of the statement, which is the same as before.
        added: keyids of the signatures that are new.
        signatures: keyids that the envelope names now, unverified but for those that are new.
        extensions: (id, version) of what the statement covers.
        notes: What the user should know.
    """

    path: Path
    located: Located
    statement_sha256: str
    added: tuple[str, ...]
    signatures: tuple[str, ...]
    extensions: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Proposal:
    """An envelope to be: with signatures by these keys, which vouch for it; none where only a timestamp is new."""

    envelope: Envelope
    publics: tuple[PublicKey, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ProposedGraft:
    """The evidence that a graft would be with another envelope."""

    graft: Graft
    envelope: bytes

    def format_problem(self) -> str | None:
        """As the graft's."""
        return self.graft.format_problem()

    def envelopes(self) -> Sequence[bytes]:
        """The one that is proposed."""
        return (self.envelope,)

    def payload(self, sha256: str) -> bytes:
        """As the graft's."""
        return self.graft.payload(sha256)

    def content(self, flat: bool) -> ContentDigest:
        """As the graft's."""
        return self.graft.content(flat)


def append_signatures(
    image: Path,
    keys: Sequence[Signer],
    options: AmendOptions,
    *,
    trust: Sequence[PublicKey] = (),
    vouch_for_unverified: bool = False,
    progress: Progress | None = None,
) -> Amended:
    """Sign the statement that an image carries once more.

    Args:
        image: A grafted image.
        keys: One signature each.
        options: Where to.
        trust: Keys, one of which must have signed the statement already.
        vouch_for_unverified: Sign although nobody who is known has: the signers alone stand for what they sign.
        progress: Called with (bytes, bytes in all) while the content is read.

    Raises:
        UsageError: no key, one that has signed already, or too many; or it is not said who is to be trusted.
        NoGraftError: the image carries none.
        GraftFormatError: the graft is not sound.
        VerificationError: what is there does not verify, or has expired.
        VmgraftError: see the formats; whatever fails, the image carries what it carried.
    """
    if not keys or len({key.keyid for key in keys}) != len(keys):
        raise UsageError("name each key that is to sign once", field="key")
    refuse_unsure(trust, vouch_for_unverified)

    def propose(graft: Graft, old: Envelope) -> Proposal:
        refuse_signers(old, [key.public for key in keys], graft.image.path)
        if trust:
            demand_trusted(graft, trust)  # 3
        signatures = [make_signature(key, old.pae) for key in keys]  # 4
        new = with_signatures(old, signatures, file=graft.image.path)
        return Proposal(new, tuple(key.public for key in keys))

    return amend(image, propose, options, progress)


def import_signatures(
    image: Path,
    source: Path,
    vouchers: Vouchers,
    options: AmendOptions,
    *,
    intermediates: Sequence[bytes] = (),
    progress: Progress | None = None,
) -> Amended:
    """Take the signatures of an envelope or Sigstore bundle over, if they are over the very statement of the image.

    Args:
        image: A grafted image.
        source: The envelope or bundle.
        vouchers: Who may have made them. Signatures by others, and by keys that have signed already, are left out.
        options: Where to.
        intermediates: DER; certificates that the signers' chains lack.
        progress: Called with (bytes, bytes in all) while the content is read.

    Raises:
        PayloadMismatchError: it is over another statement.
        BadSignatureError: it is malformed, or a signature is not the named key's.
        UntrustedSignerError: none of its signatures is by somebody who was named.
        UsageError: all of them are there already.
        VmgraftError: as :func:`append_signatures`.
    """
    brought = read_signed(read_regular(source, MAX_BUNDLE, what="the signatures", error=FileError), file=source)
    if intermediates:
        brought = with_intermediates(brought, intermediates, file=source)

    def propose(graft: Graft, old: Envelope) -> Proposal:
        return merge(graft, old, brought, vouchers, source)

    return amend(image, propose, options, progress)


def merge(graft: Graft, old: Envelope, brought: Brought, vouchers: Vouchers, source: Path) -> Proposal:
    """Return the envelope with the signatures that somebody vouches for and that are new.

    Raises:
        PayloadMismatchError: they are over another statement.
        VmgraftError: see :func:`import_signatures`.
    """
    there = brought.envelope
    if there.payload != old.payload:
        here, other = (hashlib.sha256(data).hexdigest() for data in (old.payload, there.payload))
        raise PayloadMismatchError(
            f"the signatures are over another statement: {other[:16]}..., and the image carries {here[:16]}...",
            file=source,
            field="payload",
            hint="the image was signed anew since; `vmgraft payload IMAGE -o DIR` writes what it carries now",
        )
    now, notes = datetime.now(UTC), list(brought.notes)
    added: dict[PublicKey, Signature] = {}
    refused: list[VmgraftError] = []
    for index, signature in enumerate(there.signatures):
        try:
            signer = signer_of(there, index, vouchers, now=now, file=source)
        except UntrustedSignerError as exc:
            refused.append(exc)
            continue
        if has_signed(old, signer) or signer in added:
            notes.append(f"{signer.keyid} has signed already: left as it is")
            continue
        added[signer] = dataclasses.replace(signature, keyid=signer.keyid)
    if not added:
        if refused:
            raise refused[0]
        raise UsageError("; ".join(notes) or "no signature is new", file=source, hint="there is nothing to do")
    notes += [f"left out: {exc.message}" for exc in refused]
    new = with_signatures(old, list(added.values()), file=graft.image.path)
    return Proposal(new, tuple(added), tuple(notes))


def amend(
    image: Path,
    propose: Callable[[Graft, Envelope], Proposal],
    options: AmendOptions,
    progress: Progress | None = None,
) -> Amended:
    """Put an envelope in the place of the one that is there.

    Args:
        image: A grafted image.
        propose: From the graft and its envelope to the new one, over the same payload.
        options: Where to.
        progress: Called with (bytes, bytes in all) while the content is read.

    Raises:
        VmgraftError: see :func:`append_signatures`, and what ``propose`` raises.
    """
    with editable(image, options.output) as target:
        finish_change(target, options.opening)  # 1
        with open_image(target, options.opening) as opened:
            graft = open_graft(opened, progress=progress)
            old = sound_envelope(graft)  # 2
            proposal = propose(graft, old)  # 3, 4
            if proposal.envelope.payload != old.payload or proposal.envelope.payload_type != old.payload_type:
                raise VerificationError("a change of the envelope must not change what is signed", file=target)
            data = serialise(proposal.envelope)
            notes = list(proposal.notes)
            extensions: tuple[tuple[str, str], ...] = ()
            if proposal.publics:  # 5
                run = demand(ProposedGraft(graft, data), proposal.publics, file=opened.path)
                statement = run.statement
                if statement is not None:
                    extensions = tuple((entry.id, entry.version) for entry in statement.extensions)
                    notes += [
                        f"the statement says what this release does not understand: {p}" for p in statement.unknown
                    ]
            locator = graft.located.locator
        located = replace_sections(  # 6
            target,
            [Section(SectionKind.ENVELOPE, data, compress=True)],
            old=record_digest(graft),
            placement=same_placement(graft),
            tree_digest=bytes(32) if locator is None else locator.tree_digest,
            keep=_KEPT,
            check=lambda: _read_back(target, data, proposal.publics, options.opening),
            opening=options.opening,
        )
    return Amended(
        options.output or image,
        located,
        hashlib.sha256(old.payload).hexdigest(),
        tuple(key.keyid for key in proposal.publics),
        tuple(signature.keyid for signature in proposal.envelope.signatures),
        extensions,
        tuple(notes),
    )


def sound_envelope(graft: Graft) -> Envelope:
    """Return the envelope of a graft that is whole; nothing in it is trusted.

    Raises:
        GraftFormatError: the record is damaged, or holds none or several.
        BadSignatureError: the envelope is malformed.
    """
    located, path = graft.located, graft.image.path
    problem = graft.format_problem()
    if problem is None and located.state is not GraftState.OK:
        problem = f"{located.state.value}: {located.detail}"
    if problem is not None:
        raise GraftFormatError(
            f"the graft is not intact: {problem}", file=path, hint="`vmgraft inspect` shows what is damaged"
        )
    envelopes = graft.envelopes()
    if len(envelopes) != 1:
        raise GraftFormatError(f"the record holds {len(envelopes)} envelopes and must hold one", file=path)
    return parse_envelope(envelopes[0], file=path)


def refuse_unsure(trust: Sequence[PublicKey], vouch_for_unverified: bool) -> None:
    """Refuse to sign what nobody vouches for, unless that is said aloud.

    Raises:
        UsageError: neither, or both.
    """
    if bool(trust) is vouch_for_unverified:
        raise UsageError(
            "say either whose signature you trust, or that you vouch for what you could not verify",
            field="trust",
            hint="--trust KEY.pub names who signed it before; --vouch-for-unverified does without",
        )


def refuse_signers(envelope: Envelope, publics: Sequence[PublicKey], file: Path) -> None:
    """Refuse keys that have signed already.

    Raises:
        UsageError: one of them has.
    """
    twice = next((key for key in publics if has_signed(envelope, key)), None)
    if twice is not None:
        hint = "a second one by the same key counts for nothing; `vmgraft resign` makes a new statement"
        raise UsageError(f"{twice.keyid} has signed this statement already", file=file, field="key", hint=hint)


def demand_trusted(graft: Graft, trust: Collection[PublicKey]) -> None:
    """Verify the graft as it is: one of the keys has signed it, none that it names wrongly, and nothing was changed.

    Raises:
        VerificationError: it does not verify, or has expired.
        GraftFormatError: it is not sound.
    """
    run = Run(graft, trust, datetime.now(UTC), check_content=True)
    run.integrity()
    demand_checks(run, file=graft.image.path)


def _read_back(path: Path, data: bytes, publics: Sequence[PublicKey], opening: Opening) -> None:
    """Open the image anew: the envelope is the one that was made, and verifies.

    Raises:
        FileError: another one is there.
        VerificationError: it does not verify.
    """
    with open_image(path, opening) as image:
        graft = open_graft(image)
        problem = graft.format_problem()
        if problem is not None or graft.envelopes() != (data,):
            raise FileError(f"what was written reads back differently: {problem or 'the envelope'}", file=path)
        if publics:
            demand(graft, publics, file=path)
