"""Which of the valid signatures count under one trust policy, and what is wrong with those that would.

Certificates are judged now, and where they have expired, at a trusted timestamp: a signature outlives its certificate
when a timestamp authority that the trust policy names saw it while the certificate was good. Revocation is not undone
by a timestamp.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING

from vmgraft.errors import UntrustedSignerError, VmgraftError
from vmgraft.signing.contract import CertifiedSigner
from vmgraft.signing.effort import Budget
from vmgraft.signing.judge import Certified, Signers, certify_under
from vmgraft.signing.policymodel import Policy, TrustPolicy
from vmgraft.signing.rules import Vouch
from vmgraft.signing.times import CLOCK_SKEW, format_time, later

if TYPE_CHECKING:
    from vmgraft.signing.certificates import CertifiedKey
    from vmgraft.signing.timestamps import Timestamp


@dataclass(slots=True)
class Standing:
    """What the signatures are worth under one trust policy.

    Attributes:
        signed: Every signature that the policy's signatories could count, expired and revoked ones included.
        expired: Which of them have expired, and why.
        revoked: Which of them are revoked, and why.
        unmet: Sentences about signatures with a trusted chain that do not count here.
        notes: Warnings.
        certified: What certificates say about the keys.
    """

    signed: set[Vouch] = field(default_factory=set)
    expired: dict[Vouch, str] = field(default_factory=dict)
    revoked: dict[Vouch, str] = field(default_factory=dict)
    unmet: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    certified: dict[Vouch, CertifiedSigner] = field(default_factory=dict)


def take_stand(signers: Signers, policy: Policy, entry: TrustPolicy, now: datetime) -> Standing:
    """Judge valid signatures under a trust policy."""
    judge = _Judge(policy, entry, now, signers.budget)
    standing = judge.standing
    standing.signed |= {Vouch(key) for key in signers.valid}
    for item in signers.certified:
        judge.certified(item)
    for vouch in standing.signed:
        if vouch.key.keyid in policy.revocations.keys:
            standing.revoked[vouch] = f"the key {vouch.key.keyid} is revoked"
    return standing


@dataclass(slots=True)
class _Judge:
    """Adds signatures with a chain to what the others are worth."""

    policy: Policy
    entry: TrustPolicy
    now: datetime
    budget: Budget
    standing: Standing = field(default_factory=Standing)

    def certified(self, item: Certified) -> None:
        """Add one signature, once for each authority that counts here."""
        here = [path for path in item.paths if f"ca:{path.authority}" in self.entry.trust_stores]
        name = item.paths[0].name
        if not here:
            known = ", ".join(f"ca:{path.authority}" for path in item.paths)
            text = f"the certificate of {name!r} is by {known}, which {self.entry.name} does not trust"
            self.standing.unmet.append(text)
            return
        if not self.entry.accepts(here[0].subject, here[0].sans):
            also = f" ({', '.join(here[0].sans)})" if here[0].sans else ""
            self.standing.unmet.append(f"the certificate is for {name!r}{also}, whom {self.entry.name} does not name")
            return
        for path in here:
            self.path(item, path)

    def path(self, item: Certified, path: CertifiedKey) -> None:
        """Add one signature with a path to one authority that counts here."""
        standing, vouch, seen = self.standing, Vouch(item.key, path.authority), None
        if path.expired is not None and item.material.timestamps:
            path, seen = self.at_proven_time(item, path)
        if path.expired is None:
            standing.expired.pop(vouch, None)
        elif vouch not in standing.signed:
            standing.expired[vouch] = path.expired
        standing.signed.add(vouch)
        if path.revoked is not None:
            standing.revoked[vouch] = path.revoked
        standing.notes += [note for note in path.warnings if note not in standing.notes]
        standing.certified[vouch] = CertifiedSigner(
            keyid=item.key.keyid,
            authority=path.authority,
            subject=path.name,
            sans=path.sans,
            not_after=format_time(path.not_after),
            timestamp=None if seen is None else format_time(seen.time),
            timestamp_authority=None if seen is None else seen.authority,
        )

    def at_proven_time(self, item: Certified, path: CertifiedKey) -> tuple[CertifiedKey, Timestamp | None]:
        """Judge an expired chain again, at the first trusted timestamp that falls into its validity."""
        store = self.policy.stores[f"ca:{path.authority}"]
        for stamp in self.times(item):
            try:
                judged = partial(certify_under, store, item.material, at=stamp.time, now=self.now)
                again = self.budget.once(item.index, (store.name, item.material.certificates, stamp.time), judged)
            except UntrustedSignerError as exc:
                self.standing.notes.append(f"signature {item.index} at the time of its timestamp: {exc.message}")
                break
            if again.expired is None:
                return again, stamp
        return path, None

    def times(self, item: Certified) -> list[Timestamp]:
        """Return what trusted timestamp authorities say about when they saw a signature, in order of time."""
        from vmgraft.signing.timestamps import TimestampAuthority, examine_timestamp

        where, notes = f"the timestamp of signature {item.index}", self.standing.notes
        stores = self.policy.timestampers(self.entry)
        if not stores:
            notes.append(f"{where} is not looked at: the trust policy names no timestamp authority")
            return []
        authorities = [TimestampAuthority(store.name, store.roots) for store in stores]
        times: list[Timestamp] = []
        for token in item.material.timestamps:
            question = (token, item.signature, tuple(store.reference for store in stores))
            try:
                examined = partial(examine_timestamp, token, item.signature, authorities)
                stamp = self.budget.once(item.index, question, examined)
            except VmgraftError as exc:
                notes.append(f"{where} does not count: {exc.message}")
                continue
            if stamp.time > later(self.now, CLOCK_SKEW):
                notes.append(f"{where} does not count: it is from the future ({format_time(stamp.time)})")
            else:
                times.append(stamp)
                notes += [note for note in stamp.warnings if note not in notes]
        return sorted(times, key=lambda stamp: stamp.time)


def reasons(problems: Mapping[Vouch, str], vouches: set[Vouch]) -> str:
    """Return the reasons for some signatures, each once, in a fixed order."""
    return "; ".join(sorted({problems[vouch] for vouch in vouches}))
