"""Whether a statement's security versions go back behind what was seen, or suspiciously far ahead of it."""

from __future__ import annotations

from dataclasses import dataclass

from vmgraft.signing.memory import Memory
from vmgraft.signing.policymodel import Policy, TrustPolicy
from vmgraft.signing.statement import Statement


@dataclass(frozen=True, slots=True)
class Found:
    """What is wrong, or None; what would make it pass; and what could not be compared."""

    problem: str | None
    hint: str | None = None
    notes: tuple[str, ...] = ()


def highest_seen(policy: Policy, extension: str, memory: Memory | None) -> tuple[int, str] | None:
    """Return the highest version of an extension that ran under this policy file, and the trust policy it ran under.

    Every trust policy that speaks about the extension is asked: which of them applies depends on the image's name, and
    whoever can rename an image must not choose what it is compared with.

    Raises:
        VmgraftError: the memory cannot answer.
    """
    if memory is None:
        return None
    names = [entry.name for entry in policy.trust_policies if entry.in_scope(extension)]
    seen = [(version, name) for name in names if (version := memory.highest(name, extension)) is not None]
    return max(seen, default=None)


def rollback_problem(statement: Statement, policy: Policy, entry: TrustPolicy, memory: Memory | None) -> Found:
    """Compare each extension with ``minSecurityVersion``, and with the highest version seen under this policy file.

    ``maxAdvance`` counts from what was seen under the trust policy itself, or else under another one. A first sight
    under all of them has nothing to be compared with.

    Raises:
        VmgraftError: the memory cannot answer.
    """
    problems, hints = [], []
    if memory is None and entry.needs_state:
        problems.append("the policy demands rollback memory, and there is none")
        hints.append("name the state of this host with --state")
    for extension in statement.extensions:
        version, name = extension.security_version, f"{extension.id} has security version {extension.security_version}"
        lowest = entry.min_security_version.get(extension.id, 0)
        if version < lowest:
            problems.append(f"{name}, {lowest} is the lowest")
        highest = highest_seen(policy, extension.id, memory)
        if memory is None or highest is None:
            continue
        (seen, owner), advance = highest, entry.max_advance.get(extension.id)
        own = memory.highest(entry.name, extension.id)
        base = seen if own is None else own
        if version < seen:
            under = "" if owner == entry.name else f" under {owner}"
            problems.append(f"{name}, {seen} was accepted here before{under}")
            hints.append(f"vmgraft state reset {owner} {extension.id}, if going back is meant")
        elif advance is not None and version > base + advance:
            problems.append(f"{name}, a jump from {base} by more than {advance}")
            hints.append(f"a higher maxAdvance for {extension.id}, if the jump is meant")
    unchecked = memory is None and any(item.id in entry.max_advance for item in statement.extensions)
    notes = ("maxAdvance is not checked: there is no rollback memory",) if unchecked else ()
    return Found("; ".join(problems) or None, "; ".join(hints) or None, notes)
