"""What would make the checks of freshness pass: ``expiry``, ``revocation`` and ``rollback``. Each cause has its own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from vmgraft.errors import RollbackError, VmgraftError
from vmgraft.signing.contract import Check
from vmgraft.signing.judgement import Judgement
from vmgraft.signing.patches import Remedy, add, append, at, change, escape, log, parts, remove
from vmgraft.signing.policymodel import TrustPolicy
from vmgraft.signing.rollback import highest_seen
from vmgraft.signing.rules import Vouch
from vmgraft.signing.statement import ExtensionEntry, Statement
from vmgraft.signing.times import CLOCK_SKEW, format_time, later

if TYPE_CHECKING:
    from vmgraft.signing.certificates import CertifiedKey
    from vmgraft.signing.judge import Certified

# --- expiry


def expiry(judgement: Judgement, check: Check) -> Iterator[Remedy]:
    """Return what helps against a statement, and against certificates, out of their time."""
    statement, now = judgement.run.statement, judgement.run.now
    causes: list[list[Remedy]] = []
    if statement is not None and statement.created > later(now, CLOCK_SKEW):
        causes.append([_wait(judgement, f"the statement says that it was made at {format_time(statement.created)}")])
    elif statement is not None and statement.expires is not None and now >= statement.expires:
        how = "vmgraft resign --accept-expired --expires END"
        causes.append([Remedy(f"let the vendor sign again with a later end of the statement: {how}")])
    causes += [list(_certificate(judgement, *found)) for found in _expired(judgement)]
    yield from parts(causes)
    yield from log(judgement, check)


def _wait(judgement: Judgement, what: str) -> Remedy:
    """Return what helps against something from the future; signing again does not."""
    return Remedy(f"wait until then, or look at this host's clock, which says {format_time(judgement.run.now)}: {what}")


def _paths(judgement: Judgement, vouches: Iterable[Vouch]) -> Iterator[tuple[Certified, CertifiedKey]]:
    """Return the signatures that are meant, each with what its authority says now."""
    wanted = set(vouches)
    for item in judgement.run.signers.certified:
        yield from ((item, path) for path in item.paths if Vouch(item.key, path.authority) in wanted)


def _expired(judgement: Judgement) -> list[tuple[Certified, CertifiedKey]]:
    """Return the certified signatures without which the rule does not hold, and that are out of their time."""
    standing, entry = judgement.standing, judgement.run.policy
    if entry is None:
        return []
    # As the check itself has it: where expiry is only logged, revoked signatures make up for nothing.
    signed = standing.signed - (judgement._gone("revocation") if entry.logs("expiry") else set())
    expired = signed & standing.expired.keys()
    if judgement._lost(signed, expired) is None:
        return []
    needed = {vouch for vouch in expired if judgement.rule.names(vouch)} or expired
    found = {path.name: (item, path) for item, path in _paths(judgement, needed) if path.expired is not None}
    return list(found.values())


def _certificate(judgement: Judgement, item: Certified, path: CertifiedKey) -> Iterator[Remedy]:
    entry, why = judgement.run.policy, path.expired or ""
    if path.not_after >= judgement.run.now:  # then it has not begun
        yield _wait(judgement, why)
        return
    if entry is not None and item.material.timestamps:
        for reference in _other_timestampers(judgement, entry):
            edits = append(judgement, entry, "trustStores", [reference])
            yield Remedy(f"believe the timestamps of {reference} in {entry.name}", tuple(edits), sure=True)
    stores = () if entry is None else judgement.policy.timestampers(entry)
    where = ", ".join(store.reference for store in stores) or "an authority that the policy would have to name"
    yield Remedy(
        f"let the vendor sign again with a certificate that is valid ({why}), and have that signature timestamped by "
        f"{where}, so that it outlives the certificate: vmgraft timestamp"
    )


def _other_timestampers(judgement: Judgement, entry: TrustPolicy) -> list[str]:
    stores = judgement.policy.stores
    return [name for name, store in stores.items() if store.type == "tsa" and name not in entry.trust_stores]


# --- revocation


def revocation(judgement: Judgement, check: Check) -> Iterator[Remedy]:
    """Return what helps against each thing that is revoked, and against revocation lists that nobody can rely on."""
    statement = judgement.run.statement
    if statement is None:
        return
    causes = [_revoked_statement(judgement), _revoked_payloads(judgement, statement)]
    causes += _revoked_generations(judgement, statement) + _revoked_signers(judgement)
    yield from parts([cause for cause in causes if cause])
    yield from log(judgement, check)


def _listed(judgement: Judgement, name: str) -> list[str]:
    listed: list[str] = judgement.policy.document.get("revocations", {}).get(name, [])
    return listed


def _off(judgement: Judgement, name: str, what: str, indexes: Sequence[int]) -> Remedy:
    """Return the remedy that takes items off a list of revocations."""
    text = f"take {what} off revocations.{name}, if it is there by mistake"
    return Remedy(text, remove(f"/revocations/{name}", indexes))


def _revoked_statement(judgement: Judgement) -> list[Remedy]:
    payload = b"" if judgement.run.envelope is None else judgement.run.envelope.payload
    digest = hashlib.sha256(payload).hexdigest()
    listed = _listed(judgement, "statements")
    indexes = [index for index, text in enumerate(listed) if text.removeprefix("sha256:") == digest]
    if not indexes:
        return []
    text = "let the vendor make another statement, if what it covers is still good: vmgraft resign"
    return [Remedy(text), _off(judgement, "statements", "this statement", indexes)]


def _revoked_payloads(judgement: Judgement, statement: Statement) -> list[Remedy]:
    listed = [text.removeprefix("sha256:") for text in _listed(judgement, "payloads")]
    signed = {digests["sha256"]: name for name, digests in statement.subjects.items() if "sha256" in digests}
    tree = judgement.tree if statement.image is None else statement.image.tree_digest
    if tree is not None:
        signed.setdefault(tree.hex(), "the content")
    indexes = [index for index, digest in enumerate(listed) if digest in signed]
    if not indexes:
        return []
    what = ", ".join(sorted({signed[listed[index]] for index in indexes}))
    text = f"let the vendor sign another image or release, without what is revoked: {what}"
    return [Remedy(text), _off(judgement, "payloads", what, indexes)]


def _revoked_generations(judgement: Judgement, statement: Statement) -> list[list[Remedy]]:
    causes = []
    for extension in statement.extensions:
        lowest = judgement.policy.revocations.min_generation.get(extension.id, 0)
        if extension.generation < lowest:
            edit = change(f"/revocations/minGeneration/{escape(extension.id)}", extension.generation)
            causes.append([
                Remedy(f"use a release of {extension.id} of generation {lowest} or later"),
                Remedy(f"accept generation {extension.generation} of {extension.id} again", (edit,)),
            ])  # fmt: skip
    return causes


def _revoked_signers(judgement: Judgement) -> list[list[Remedy]]:
    """Return a cause for each key, certificate and authority that takes away a signature which is needed."""
    standing, policy = judgement.standing, judgement.policy
    if not judgement._revoked_signers():
        return []
    gone = standing.signed & standing.revoked.keys()
    gone = {vouch for vouch in gone if judgement.rule.names(vouch)} or gone
    causes = [
        [
            Remedy(f"let the image be signed by a key that is not revoked, in place of {keyid}"),
            _off(judgement, "keys", keyid, _key_indexes(judgement, keyid)),
        ]
        for keyid in sorted({vouch.key.keyid for vouch in gone} & policy.revocations.keys)
    ]
    reasons = {path.revoked: path for _, path in _paths(judgement, gone) if path.revoked is not None}
    return causes + [[_chain(judgement, path, why)] for why, path in sorted(reasons.items())]


def _key_indexes(judgement: Judgement, keyid: str) -> list[int]:
    """Return where a key stands under ``revocations.keys``, by whatever name."""
    names = {keyid, f"key:{keyid}", *(f"key:{key.name}" for key in judgement.policy.keys if key.key.keyid == keyid)}
    return [index for index, text in enumerate(_listed(judgement, "keys")) if text in names]


def _chain(judgement: Judgement, path: CertifiedKey, why: str) -> Remedy:
    """Tell a certificate that is revoked from a list that does not say so: the beginnings are those of ``revocation``.

    Names of certificates come later in the sentence, so nobody can choose how it begins.
    """
    if why.startswith("the certificate of "):
        return Remedy(f"let the image be signed with a certificate that is not revoked: {why}")
    stores = judgement.policy.document["trustStores"]
    index = next(i for i, store in enumerate(stores) if (store["type"], store["name"]) == ("ca", path.authority))
    return Remedy(f"put a current CRL of that issuer into trustStores[{index}].crls (ca:{path.authority}): {why}")


# --- rollback


def rollback(judgement: Judgement, check: Check) -> Iterator[Remedy]:
    """Return what helps against a security version that is too low, and against one that is too far ahead."""
    statement, entry = judgement.run.statement, judgement.run.policy
    if statement is None or entry is None:
        return
    if check.error != RollbackError.code:
        yield Remedy("mend the rollback memory of this host, or bring back a backup: docs/state.md says how")
        return
    causes = []
    if judgement.memory is None and entry.needs_state:
        edit = add(f"{at(judgement, entry)}/rollbackState", "optional")
        name = Remedy("name the rollback memory of this host: --state")
        causes.append([name, Remedy(f"do without rollback memory in {entry.name}", (edit,))])
    causes += [cause for extension in statement.extensions if (cause := _version(judgement, entry, extension))]
    yield from parts(causes)


def _version(judgement: Judgement, entry: TrustPolicy, extension: ExtensionEntry) -> list[Remedy]:
    """Return what helps against the security version of one extension; nothing where it is good."""
    version, name = extension.security_version, extension.id
    lowest = entry.min_security_version.get(name, 0)
    seen, base = _seen(judgement, entry, name)
    floor, highest = max(lowest, *seen.values(), 0), max(seen.values(), default=0)
    advance = entry.max_advance.get(name)
    reach = None if advance is None or base is None else base + advance
    where = at(judgement, entry)
    ways = []
    if version < lowest:
        edit = change(f"{where}/minSecurityVersion/{escape(name)}", version)
        ways.append(Remedy(f"accept security version {version} of {name} again", (edit,)))
    if version < highest:
        who = [owner for owner, ran in seen.items() if ran > version]
        commands = ", ".join(f"vmgraft state reset {owner} {name}" for owner in who)
        ways.append(Remedy(f"forget what ran here: {commands}"))
    elif reach is not None and base is not None and version > reach:
        edit = change(f"{where}/maxAdvance/{escape(name)}", version - base)
        ways.append(Remedy(f"let {name} advance that far, from {base} to {version}", (edit,)))
    if not ways:
        return []
    if len(ways) > 1:
        ways = [replace(way, alone=False) for way in ways]
    return [_release(name, version, floor, reach), *ways]


def _release(name: str, version: int, floor: int, reach: int | None) -> Remedy:
    """Say which release would do, where one can."""
    if reach is not None and reach < floor:
        return Remedy(
            f"change the policy first, for no release of {name} can pass: its security version would have to be at "
            f"least {floor} and, by maxAdvance, at most {reach}"
        )
    if reach is not None and version > reach:
        return Remedy(f"use a release of {name} within reach: a security version from {floor} to {reach}")
    upto = "" if reach is None else f" and at most {reach}"
    return Remedy(f"use a release of {name} with a higher security version: at least {floor}{upto}")


def _seen(judgement: Judgement, entry: TrustPolicy, extension: str) -> tuple[dict[str, int], int | None]:
    """Return the versions that ran, by trust policy, and the one that ``maxAdvance`` counts from.

    A memory that cannot answer has failed the check already.
    """
    memory, policy = judgement.memory, judgement.policy
    try:
        highest = highest_seen(policy, extension, memory)
        if memory is None or highest is None:
            return {}, None
        names = [item.name for item in policy.trust_policies if item.in_scope(extension)]
        found = {name: ran for name in names if (ran := memory.highest(name, extension)) is not None}
    except VmgraftError:
        return {}, None
    return found, found.get(entry.name, highest[0])
