"""Whether a statement's security versions go back behind what was seen, or suspiciously far ahead of it."""

from __future__ import annotations

from dataclasses import dataclass

from vmgraft.signing.memory import Memory
from vmgraft.signing.policymodel import TrustPolicy
from vmgraft.signing.statement import Statement


@dataclass(frozen=True, slots=True)
class Found:
    """What is wrong, or None; what would make it pass; and what could not be compared."""

    problem: str | None
    hint: str | None = None
    notes: tuple[str, ...] = ()


def rollback_problem(statement: Statement, entry: TrustPolicy, memory: Memory | None) -> Found:
    """Compare each extension with ``minSecurityVersion``, and with the highest version seen under this trust policy.

    A first sight has nothing to be compared with, so ``maxAdvance`` says nothing about it.

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
        seen = None if memory is None else memory.highest(entry.name, extension.id)
        if seen is None:
            continue
        advance = entry.max_advance.get(extension.id)
        if version < seen:
            problems.append(f"{name}, {seen} was accepted here before")
            hints.append(f"vmgraft state reset {entry.name} {extension.id}, if going back is meant")
        elif advance is not None and version > seen + advance:
            problems.append(f"{name}, a jump from {seen} by more than {advance}")
            hints.append(f"a higher maxAdvance for {extension.id}, if the jump is meant")
    unchecked = memory is None and any(item.id in entry.max_advance for item in statement.extensions)
    notes = ("maxAdvance is not checked: there is no rollback memory",) if unchecked else ()
    return Found("; ".join(problems) or None, "; ".join(hints) or None, notes)
