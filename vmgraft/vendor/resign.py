"""A new statement over what an image carries: renewed validity, other keys. The old signature is checked first.

The steps; the same numbers stand in the code:

1. an interrupted change of the graft is brought to its end
2. the old graft is sound, and its envelope verifies under a trusted key
3. the old statement is in force; one that has expired passes only where that was said, and this is written down
4. the content is read once and compared with the old statement
5. the new statement is signed
6. the new graft takes the place of the old one, is read back and verified
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmgraft.errors import ExpiredError, GraftFormatError, UsageError
from vmgraft.imagefmt.contract import PROBE, ContentDigest, Opening, Progress
from vmgraft.imagefmt.graft import Graft, open_graft, open_image
from vmgraft.imagefmt.record import Section, SectionKind
from vmgraft.imagefmt.replace import finish_change, replace_sections
from vmgraft.imagefmt.treesection import kept_tree
from vmgraft.signing.statement import CONTENT_SUBJECT, Statement
from vmgraft.signing.times import format_time
from vmgraft.vendor.graft import Attached
from vmgraft.vendor.inplace import editable, record_digest, same_placement
from vmgraft.vendor.oldgraft import OldGraft, check_content, read_old_graft
from vmgraft.vendor.seal import Terms, lay_out, make_statement, preflight, sign, verify_written

if TYPE_CHECKING:
    from vmgraft.signing.keys import PublicKey
    from vmgraft.signing.signers import Signer
    from vmgraft.vendor.pack import Package


@dataclass(frozen=True, slots=True)
class ResignOptions:
    """How to sign anew.

    Attributes:
        output: Write the result here and leave the image alone; None works in place.
        trust: Public keys, one of which must have signed the old statement; the signing keys count too.
        expires: End of validity; None keeps that of the old statement.
        accept_expired: Let the old statement be one that has expired.
        opening: How to open the image.
    """

    output: Path | None = None
    trust: tuple[PublicKey, ...] = ()
    expires: datetime | None = None
    accept_expired: bool = False
    opening: Opening = PROBE


@dataclass(frozen=True, slots=True)
class Resigned:
    """What was done.

    Attributes:
        attached: The new graft.
        extensions: What it covers, in load order.
        dropped_signers: keyids of the old envelope that have not signed the new statement, as it claims them.
        expires: End of validity now, or None.
        accepted_expired: When the old statement expired, where it had; None where it was in force.
    """

    attached: Attached
    extensions: tuple[Package, ...]
    dropped_signers: tuple[str, ...]
    expires: datetime | None
    accepted_expired: datetime | None


def resign(image: Path, keys: Sequence[Signer], options: ResignOptions, progress: Progress | None = None) -> Resigned:
    """Sign what an image carries anew: same extensions, same binding, a statement made now.

    Args:
        image: A grafted image.
        keys: One signature each.
        options: Whom to trust, and the new end.
        progress: Called with (bytes, bytes in all) while the content is read.

    Raises:
        NoGraftError: the image carries none.
        GraftFormatError: the graft is not intact.
        ExpiredError: the old statement has expired, and that was not accepted.
        VerificationError: it does not verify under the keys.
        UsageError: no key, or an end in the past.
        VmgraftError: see the formats; whatever fails, the image carries what it carried.
    """
    if not keys:
        raise UsageError("a new statement needs a key", field="key", hint="name a --key")
    trusted = {key.public for key in keys} | set(options.trust)
    now = datetime.now(UTC)
    with editable(image, options.output) as target:
        finish_change(target, options.opening)  # 1
        with open_image(target, options.opening) as opened:
            graft = open_graft(opened, progress=progress)
            old = read_old_graft(graft, trusted, now=now, renewed=True)  # 2
            expired = _expired(old.statement, now, options, opened.path)  # 3
            terms = Terms(old.statement.binding, options.expires or old.statement.expires)
            preflight(old.packages, keys, terms, now)
            content = _compared_content(graft, old, trusted, now)  # 4
            record = _history(graft, now, expired)
            sector_size = opened.sector_size
            trees = kept_tree(graft)
        statement = make_statement(old.packages, content, terms, created=now, sector_size=sector_size)  # 5
        located = replace_sections(  # 6
            target,
            [*_with_history(lay_out(old.packages, sign(statement, keys)), record), *trees],
            old=record_digest(graft),
            placement=same_placement(graft),
            tree_digest=content.tree_digest,
            check=lambda: verify_written(target, keys, options.opening),
            opening=options.opening,
        )
    keyids = tuple(key.keyid for key in keys)
    digest = hashlib.sha256(statement).hexdigest()
    attached = Attached(options.output or image, located, digest, content, keyids)
    dropped = tuple(item for item in old.signers if item not in keyids)
    return Resigned(attached, old.packages, dropped, terms.expires, expired)


def _expired(statement: Statement, now: datetime, options: ResignOptions, file: Path) -> datetime | None:
    """Return when the old statement expired, if it has; ``read_old_graft`` has refused one from the future.

    Raises:
        ExpiredError: it has, and that was not accepted.
        UsageError: it was accepted, and there is no new end.
    """
    end = statement.expires
    if end is None or now < end:
        return None
    if not options.accept_expired:
        raise ExpiredError(
            f"the old statement expired at {format_time(end)}",
            file=file,
            field="expires",
            hint="--accept-expired signs what it covers all the same, and writes that into the image's hints",
        )
    if options.expires is None:
        raise UsageError(
            f"the old statement expired at {format_time(end)}, and no new end is named", field="expires",
            hint="--expires names it, for example 2027-11-22",
        )  # fmt: skip
    return end


def _compared_content(graft: Graft, old: OldGraft, trusted: set[PublicKey], now: datetime) -> ContentDigest:
    """Read the content once and compare it; the flat digest is signed again exactly where it was."""
    had_flat = CONTENT_SUBJECT in old.statement.subjects
    content = graft.content(had_flat)
    check_content(graft, trusted, now)
    return content if had_flat else dataclasses.replace(content, flat=None)


def _history(graft: Graft, now: datetime, expired: datetime | None) -> dict[str, Any]:
    """Return what the unsigned hints say of this: what was signed anew, and that it had expired where it had."""
    envelopes = graft.envelopes()
    if len(envelopes) != 1:
        raise GraftFormatError("the record must hold one envelope", file=graft.image.path)
    history: dict[str, Any] = {
        "resigned": format_time(now),
        "replacedEnvelopeSha256": hashlib.sha256(envelopes[0]).hexdigest(),
    }
    if expired is not None:
        history["acceptedExpired"] = format_time(expired)
    return history


def _with_history(sections: Sequence[Section], history: dict[str, Any]) -> list[Section]:
    """Return the sections with more in the hints, which ``lay_out`` has made."""
    result = []
    for section in sections:
        if section.kind is SectionKind.HINTS and isinstance(section.raw, bytes):
            hints = json.loads(section.raw) | history
            section = dataclasses.replace(section, raw=json.dumps(hints, sort_keys=True).encode())  # noqa: PLW2901
        result.append(section)
    return result
