"""What would make a failed check pass, check by check. See ``explain``.

Here are integrity, scope and what the policy says of extensions; ``signerremedies`` has authenticity, ``timeremedies``
expiry, revocation and rollback.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Final

from vmgraft.errors import PolicyError, UntrustedSignerError
from vmgraft.signing.capabilities import covered
from vmgraft.signing.contract import Check
from vmgraft.signing.judgement import Judgement
from vmgraft.signing.patches import Edit, Remedy, add, append, at, change, escape, member, remove, tried
from vmgraft.signing.policymodel import OVERRIDABLE, TrustPolicy
from vmgraft.signing.scopes import ImageScope, Reach
from vmgraft.signing.signerremedies import authenticity
from vmgraft.signing.timeremedies import expiry, revocation, rollback
from vmgraft.signing.times import format_time, later

__all__ = ["Remedy", "remedies"]

#: How long a new end of the policy is proposed for.
_EXTENSION: Final = timedelta(days=90)
#: Most remedies of one check; each edit is tried, so this also bounds the work.
MAX_REMEDIES: Final = 32


def remedies(check: Check, judgement: Judgement) -> tuple[Remedy, ...]:
    """Return the ways to make a failed check pass, the one that changes least first, at most ``MAX_REMEDIES``."""
    maker = _MAKERS.get(check.name)
    if maker is None:
        return (Remedy(_FIXED[check.name]),)
    made = [*maker(judgement, check)]
    found = [done for remedy in made[:MAX_REMEDIES] if (done := tried(remedy, check, judgement)) is not None]
    if len(made) > MAX_REMEDIES:
        found.append(Remedy(f"or one of {len(made) - MAX_REMEDIES} more of this kind"))
    return tuple(found)


#: Checks that no policy can change.
_FIXED: Final[Mapping[str, str]] = {
    "format": "get the image again, or graft it again: the record is damaged",
    "envelope": "get the image again, or graft it again: the record holds no usable envelope",
    "signature": "get the image again from its vendor: the envelope was altered after it was signed",
    "statement": "let the vendor graft again: what was signed is no statement this release understands",
    "payloads": "get the image again; or, if it is as the vendor made it, let the vendor graft again: a manifest or "
    "module is not the one that was signed",
    "content": "get the image again, or let the vendor sign this content: it is not the one that was signed",
    "conflicts": "let the vendor change an extension: two of them claim the same range, and no policy can share it",
}


# --- scope


def _scope(judgement: Judgement, check: Check) -> Iterator[Remedy]:
    statement, policies = judgement.run.statement, judgement.policy.trust_policies
    if statement is None or check.error not in (UntrustedSignerError.code, PolicyError.code):
        yield Remedy("let the content be read: some trust policy names images by it")
        return
    ids = list(dict.fromkeys(entry.id for entry in statement.extensions))
    reaches = {
        entry.name: max(scope.reach(judgement.image_name, judgement.tree) for scope in entry.image_scopes)
        for entry in policies
    }
    best = max(reaches.values())
    near = [entry for entry in policies if reaches[entry.name] == best is not Reach.NONE]
    found = []
    if judgement.tied:
        near = [entry for entry in near if all(entry.in_scope(item) for item in ids)]
        closer = None if best is Reach.EXACT else _image_scope(judgement, Reach(best + 1))
        for entry in near if closer is not None else ():
            edits = append(judgement, entry, "imageScopes", [closer or ""])
            found.append(_speaks(entry, near, edits, f"let {entry.name} decide here, by a closer image scope"))
        names = ", ".join(entry.name for entry in near)
        yield from _ranked(found, Remedy(f"take this image out of the image scopes of all but one of {names}"))
        return
    for entry in policies:
        edits = append(judgement, entry, "extensionScopes", [item for item in ids if not entry.in_scope(item)])
        if entry not in near:
            closer = _image_scope(judgement, max(best, Reach.GLOB))
            if closer is None:
                continue
            edits = append(judgement, entry, "imageScopes", [closer]) + edits
        if edits:
            text = f"let the trust policy {entry.name} speak about this image and its extensions"
            found.append(_speaks(entry, near, edits, text))
    yield from _ranked(found, Remedy("write a trust policy for this image and its extensions"))


def _speaks(entry: TrustPolicy, near: Sequence[TrustPolicy], edits: Sequence[Edit], text: str) -> tuple[int, Remedy]:
    """Return the remedy that lets a trust policy decide, what that takes from whom, and its rank: the milder first.

    Args:
        entry: The trust policy that is to decide.
        near: Those whose image scopes mean the image now.
        edits: What makes it do so.
        text: The same in words.
    """
    others = [other for other in near if other is not entry]
    lost = [name for name in OVERRIDABLE if entry.logs(name) and any(not other.logs(name) for other in others)]
    text += f" (level {entry.level}"
    if others:
        text += ", in place of " + ", ".join(f"{other.name}, level {other.level}" for other in others)
    text += ")"
    if lost:
        text += f"; weaker: it only logs {', '.join(lost)}"
    if any(edit["value"].startswith("name:") for edit in edits if "/imageScopes" in edit["path"]):
        text += "; a name: scope fits every image of that file name"
    moved = entry not in near
    rank = 2 + moved if lost else int(moved)
    return rank, Remedy(text, tuple(edits), sure=True)


def _ranked(found: Iterable[tuple[int, Remedy]], other: Remedy) -> Iterator[Remedy]:
    """Return remedies by rank; those by which the level falls come last, behind the one that is no edit."""
    ordered = sorted(found, key=lambda item: item[0])
    yield from (remedy for rank, remedy in ordered if rank < 2)
    yield other
    yield from (remedy for rank, remedy in ordered if rank >= 2)


def _image_scope(judgement: Judgement, reach: Reach) -> str | None:
    """Return a scope that fits this image alone, at least as close as asked for; None where there is none to write."""
    name = judgement.image_name
    text = f"name:{glob.escape(name)}"
    if reach <= Reach.GLOB and name.isprintable() and len(text) <= 260:
        scope = ImageScope(text)
        if scope.reach(name, None) is Reach.GLOB:
            return text
    return None if judgement.tree is None else f"tree:sha256:{judgement.tree.hex()}"


# --- policy


def _policy(judgement: Judgement, _check: Check) -> Iterator[Remedy]:
    end = format_time(later(judgement.run.now, _EXTENSION))
    edits = (change("/expires", end), change("/policyVersion", judgement.policy.policy_version + 1))
    yield Remedy("use a newer edition of the policy")
    yield Remedy(f"give this one a new end: {end}", edits)


def _binding(judgement: Judgement, _check: Check) -> Iterator[Remedy]:
    entry = judgement.run.policy
    if entry is not None:
        yield Remedy("let the vendor bind the statement to this image: --binding image")
        edit = add(f"{at(judgement, entry)}/binding", "any")
        yield Remedy(f"accept portable statements in {entry.name}", (edit,))


def _capabilities(judgement: Judgement, _check: Check) -> Iterator[Remedy]:
    entry = judgement.run.policy
    if entry is None:
        return
    denied: dict[str, list[str]] = {}
    for found in judgement.run.found:
        granted = entry.grants[found.entry.id].capabilities if found.entry.id in entry.grants else ()
        claims = [str(claim) for claim in found.manifest.capabilities if not covered(granted, claim)]
        if claims:
            denied[found.entry.id] = list(dict.fromkeys(claims))
    text = "; ".join(f"{', '.join(claims)} to {extension}" for extension, claims in denied.items())
    yield Remedy(f"grant {text}", tuple(_grants(judgement, entry, denied)))


def _grants(judgement: Judgement, entry: TrustPolicy, denied: Mapping[str, list[str]]) -> Iterator[Edit]:
    """Return the edits that add capabilities to grants, which may not be there."""
    grants, where = member(judgement, entry, "grants"), f"{at(judgement, entry)}/grants"
    if grants is None:
        yield add(where, {extension: {"capabilities": claims} for extension, claims in denied.items()})
        return
    for extension, claims in denied.items():
        place = f"{where}/{escape(extension)}"
        if extension not in grants:
            yield add(place, {"capabilities": claims})
        elif "capabilities" not in grants[extension]:
            yield add(f"{place}/capabilities", claims)
        else:
            yield from (add(f"{place}/capabilities/-", claim) for claim in claims)


def _required(judgement: Judgement, _check: Check) -> Iterator[Remedy]:
    statement, entry = judgement.run.statement, judgement.run.policy
    if statement is None or entry is None:
        return
    present = {extension.id for extension in statement.extensions}
    missing = [(i, name) for i, name in enumerate(entry.require_extensions) if name not in present]
    names = ", ".join(name for _, name in missing)
    yield Remedy(f"attach {names}: vmgraft attach --add")
    edits = remove(f"{at(judgement, entry)}/requireExtensions", [index for index, _ in missing])
    yield Remedy(f"do without {names} in {entry.name}", edits)


_MAKERS: Final[Mapping[str, Callable[[Judgement, Check], Iterable[Remedy]]]] = {
    "scope": _scope,
    "authenticity": authenticity,
    "expiry": expiry,
    "revocation": revocation,
    "rollback": rollback,
    "policy": _policy,
    "binding": _binding,
    "capabilities": _capabilities,
    "required": _required,
}
