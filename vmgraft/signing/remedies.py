"""What would make a failed check pass, check by check. See ``explain``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

from vmgraft.errors import VmgraftError
from vmgraft.signing.capabilities import covered
from vmgraft.signing.contract import Check
from vmgraft.signing.judgement import Judgement
from vmgraft.signing.policymodel import TrustPolicy
from vmgraft.signing.rollback import highest_seen
from vmgraft.signing.rules import label
from vmgraft.signing.times import format_time

#: How long a new end of the policy is proposed for.
_EXTENSION: Final = timedelta(days=90)


@dataclass(frozen=True, slots=True)
class Remedy:
    """One way to make a check pass.

    Attributes:
        text: What to do, one sentence.
        edits: Operations of JSON Patch (RFC 6902) on the policy; empty where it is not the policy that must change.
    """

    text: str
    edits: tuple[dict[str, Any], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {"text": self.text, "edits": list(self.edits)}


def remedies(check: Check, judgement: Judgement) -> Iterator[Remedy]:
    """Return the ways to make a failed check pass, the one that changes least first."""
    maker = _MAKERS.get(check.name)
    if maker is None:
        yield Remedy(_FIXED[check.name])
    else:
        yield from maker(judgement)


#: Checks that no policy can change.
_FIXED: Final[Mapping[str, str]] = {
    "format": "get the image again, or graft it again: the record is damaged",
    "envelope": "get the image again, or graft it again: the record holds no usable envelope",
    "signature": "get the image again from its vendor: the envelope was altered after it was signed",
    "statement": "let the vendor graft again: what was signed is no statement this release understands",
    "payloads": "get the image again: a manifest or module is not the one that was signed",
    "content": "get the image again, or let the vendor sign this content: it is not the one that was signed",
    "conflicts": "let the vendor change an extension: two of them claim the same range, and no policy can share it",
}


def _add(path: str, value: Any) -> dict[str, Any]:
    return {"op": "add", "path": path, "value": value}


def _escape(name: str) -> str:
    """Return a member's name as a reference token (RFC 6901, 3)."""
    return name.replace("~", "~0").replace("/", "~1")


def _at(judgement: Judgement, entry: TrustPolicy) -> str:
    """Return where a trust policy stands in the file."""
    return f"/trustPolicies/{judgement.policy.trust_policies.index(entry)}"


def _member(judgement: Judgement, entry: TrustPolicy, name: str) -> Any:
    return judgement.policy.document["trustPolicies"][judgement.policy.trust_policies.index(entry)].get(name)


def _append(judgement: Judgement, entry: TrustPolicy, name: str, value: str) -> dict[str, Any]:
    """Return the edit that adds to a list of a trust policy, which may not be there."""
    where = f"{_at(judgement, entry)}/{name}"
    return _add(f"{where}/-", value) if _member(judgement, entry, name) is not None else _add(where, [value])


def _log(judgement: Judgement, check: str) -> Remedy:
    """Return the last resort: to have a failure logged only."""
    entry = judgement.run.policy
    edits: tuple[dict[str, Any], ...] = ()
    if entry is not None:
        where = f"{_at(judgement, entry)}/signatureVerification/override"
        edits = (_add(f"{where}/{check}", "log") if entry.override else _add(where, {check: "log"}),)
    return Remedy(f"have {check} logged only: weaker for every image of this trust policy", edits)


# --- authenticity


def _scope(judgement: Judgement) -> Iterator[Remedy]:
    statement = judgement.run.statement
    ids = [] if statement is None else [entry.id for entry in statement.extensions]
    for entry in judgement.policy.trust_policies:
        near = any(scope.reach(judgement.image_name, judgement.tree) for scope in entry.image_scopes)
        edits = [] if near else [_append(judgement, entry, "imageScopes", f"name:{judgement.image_name}")]
        edits += [
            _append(judgement, entry, "extensionScopes", extension)
            for extension in dict.fromkeys(ids)
            if not entry.in_scope(extension)
        ]
        if edits:
            yield Remedy(f"let the trust policy {entry.name} speak about this image and its extensions", tuple(edits))
    if judgement.tied:
        yield Remedy(
            "give one of the trust policies that tie a closer image scope, or take the image out of the others"
        )


def _authenticity(judgement: Judgement) -> Iterator[Remedy]:
    run, entry = judgement.run, judgement.run.policy
    if entry is None:
        yield from _unknown_signers(judgement)
        return
    missing = entry.signatures.missing(judgement.standing.signed)
    if missing:
        yield Remedy(f"add signatures by {', '.join(missing)} to the image: vmgraft sign --append")
    yield from _identities(judgement, entry)
    yield from _stores(judgement, entry)
    named = {place for place in entry.signatures.signatories if not isinstance(place, str)}
    part = "/signatures/anyOf/of/-" if entry.signatures.any_of else None
    for key in sorted(run.signers.valid - named, key=label):
        if part is not None:
            edit = _add(_at(judgement, entry) + part, f"key:{key.keyid}")
            yield Remedy(f"let the signature by {key.keyid} count in {entry.name}", (edit,))
        else:
            yield Remedy(f"name {key.keyid}, which has signed, in the rule of {entry.name}")


def _identities(judgement: Judgement, entry: TrustPolicy) -> Iterator[Remedy]:
    """Return edits that accept the identities of certificates by authorities that are trusted here."""
    for item in judgement.run.signers.certified:
        for path in item.paths:
            if f"ca:{path.authority}" in entry.trust_stores and not entry.accepts(path.subject, path.sans):
                texts = [f"x509.subject: {path.name}", *(f"x509.san: {san}" for san in path.sans)]
                for text in texts:
                    edit = _append(judgement, entry, "trustedIdentities", text)
                    yield Remedy(f"accept the certificate for {text!r} in {entry.name}", (edit,))


def _stores(judgement: Judgement, entry: TrustPolicy) -> Iterator[Remedy]:
    """Say which authorities, trusted elsewhere in the policy, certify a signature."""
    for item in judgement.run.signers.certified:
        names = [f"ca:{path.authority}" for path in item.paths]
        if not any(name in entry.trust_stores for name in names):
            yield Remedy(f"name {' or '.join(names)}, which certifies {item.paths[0].name!r}, in {entry.name}")


def _unknown_signers(judgement: Judgement) -> Iterator[Remedy]:
    envelope = judgement.run.envelope
    for index, signature in enumerate(() if envelope is None else envelope.signatures):
        keyid = signature.keyid or "a key that it does not name"
        text = f"signature {index} says that it is by {keyid}: get that public key from its owner, add it to 'keys'"
        text += ", and name it under 'signatures'"
        if signature.extension is not None:
            text += "; or add the root of the certificate beside it to 'trustStores'"
        yield Remedy(text)


# --- freshness


def _expiry(judgement: Judgement) -> Iterator[Remedy]:
    if judgement.standing.expired:
        entry = judgement.run.policy
        stores = () if entry is None else judgement.policy.timestampers(entry)
        where = ", ".join(store.reference for store in stores) or "an authority that the policy would have to name"
        yield Remedy(f"have the signature timestamped while the certificate is valid, by {where}; or sign it again")
    else:
        yield Remedy("let the vendor sign again with a later end: vmgraft resign")
    yield _log(judgement, "expiry")


def _revocation(judgement: Judgement) -> Iterator[Remedy]:
    yield Remedy("let the vendor sign again, with what is not revoked")
    yield _log(judgement, "revocation")


def _rollback(judgement: Judgement) -> Iterator[Remedy]:
    statement, entry = judgement.run.statement, judgement.run.policy
    if statement is None or entry is None:
        return
    yield Remedy("use a release of the extension with a higher security version")
    for extension in statement.extensions:
        lowest = entry.min_security_version.get(extension.id, 0)
        highest, own = _seen(judgement, entry, extension.id)
        advance = entry.max_advance.get(extension.id)
        if extension.security_version < lowest:
            path = f"{_at(judgement, entry)}/minSecurityVersion/{_escape(extension.id)}"
            edit = {"op": "replace", "path": path, "value": extension.security_version}
            yield Remedy(f"accept security version {extension.security_version} of {extension.id} again", (edit,))
        if highest is not None and extension.security_version < highest[0]:
            yield Remedy(f"forget what ran here: vmgraft state reset {highest[1]} {extension.id}")
        elif own is not None and advance is not None and extension.security_version > own + advance:
            path = f"{_at(judgement, entry)}/maxAdvance/{_escape(extension.id)}"
            edit = {"op": "replace", "path": path, "value": extension.security_version - own}
            yield Remedy(f"let {extension.id} advance that far", (edit,))
    if judgement.memory is None and entry.needs_state:
        yield Remedy("name the rollback memory of this host: --state")


def _seen(judgement: Judgement, entry: TrustPolicy, extension: str) -> tuple[tuple[int, str] | None, int | None]:
    """Return the highest version that ran, with whose it is, and the one that ``maxAdvance`` counts from.

    A memory that cannot answer has said so in the check already.
    """
    try:
        highest = highest_seen(judgement.policy, extension, judgement.memory)
        if judgement.memory is None or highest is None:
            return None, None
        own = judgement.memory.highest(entry.name, extension)
    except VmgraftError:
        return None, None
    return highest, highest[0] if own is None else own


# --- policy


def _policy(judgement: Judgement) -> Iterator[Remedy]:
    later = format_time(judgement.run.now + _EXTENSION)
    edits = (
        {"op": "replace", "path": "/expires", "value": later},
        {"op": "replace", "path": "/policyVersion", "value": judgement.policy.policy_version + 1},
    )
    yield Remedy("use a newer edition of the policy, or give this one a new end", edits)


def _binding(judgement: Judgement) -> Iterator[Remedy]:
    entry = judgement.run.policy
    if entry is not None:
        yield Remedy("let the vendor bind the statement to this image: --binding image")
        edit = _add(f"{_at(judgement, entry)}/binding", "any")
        yield Remedy(f"accept portable statements in {entry.name}", (edit,))


def _capabilities(judgement: Judgement) -> Iterator[Remedy]:
    entry = judgement.run.policy
    if entry is None:
        return
    edits: list[dict[str, Any]] = []
    texts = []
    for found in judgement.run.found:
        granted = entry.grants[found.entry.id].capabilities if found.entry.id in entry.grants else ()
        denied = [str(claim) for claim in found.manifest.capabilities if not covered(granted, claim)]
        if denied:
            edits += _grant(judgement, entry, found.entry.id, denied)
            texts.append(f"{', '.join(denied)} to {found.entry.id}")
    yield Remedy(f"grant {'; '.join(texts)}", tuple(edits))


def _grant(judgement: Judgement, entry: TrustPolicy, extension: str, denied: list[str]) -> Iterator[dict[str, Any]]:
    """Return the edits that add capabilities to a grant, which may not be there."""
    grants, where = _member(judgement, entry, "grants"), f"{_at(judgement, entry)}/grants"
    place = f"{where}/{_escape(extension)}"
    if grants is None:
        yield _add(where, {extension: {"capabilities": denied}})
    elif extension not in grants:
        yield _add(place, {"capabilities": denied})
    elif "capabilities" not in grants[extension]:
        yield _add(f"{place}/capabilities", denied)
    else:
        yield from (_add(f"{place}/capabilities/-", text) for text in denied)


def _required(judgement: Judgement) -> Iterator[Remedy]:
    statement, entry = judgement.run.statement, judgement.run.policy
    if statement is None or entry is None:
        return
    present = {extension.id for extension in statement.extensions}
    missing = [(i, name) for i, name in enumerate(entry.require_extensions) if name not in present]
    yield Remedy(f"attach {', '.join(name for _, name in missing)}: vmgraft attach --add")
    where = f"{_at(judgement, entry)}/requireExtensions"
    edits = tuple({"op": "remove", "path": f"{where}/{index}"} for index, _ in reversed(missing))
    yield Remedy(f"do without them in {entry.name}", edits)


_MAKERS: Final[Mapping[str, Callable[[Judgement], Iterator[Remedy]]]] = {
    "scope": _scope,
    "authenticity": _authenticity,
    "expiry": _expiry,
    "revocation": _revocation,
    "rollback": _rollback,
    "policy": _policy,
    "binding": _binding,
    "capabilities": _capabilities,
    "required": _required,
}
