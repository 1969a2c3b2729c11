"""Which keys really signed an envelope: keys that are known, and keys that a chain beside the signature certifies.

Only signatures are looked at here, and the certificates beside them: those are the one thing that is parsed before it
is verified, within the bounds of ``material``. What the signed bytes say does not matter yet.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING

from vmgraft.errors import BadSignatureError, UntrustedSignerError
from vmgraft.signing.dsse import Envelope, Signature
from vmgraft.signing.effort import SPENT, Budget, Effort
from vmgraft.signing.keys import PublicKey
from vmgraft.signing.material import Material, parse_material
from vmgraft.signing.trials import Trials
from vmgraft.signing.truststores import TrustStore

if TYPE_CHECKING:
    from vmgraft.signing.certificates import CertifiedKey


@dataclass(frozen=True, slots=True)
class Certified:
    """A valid signature by the leaf of a chain that leads to an authority of the policy, at whatever time.

    Attributes:
        index: Which signature of the envelope it is.
        signature: Its bytes.
        material: What travels beside it.
        paths: What each authority with a path says about the leaf, judged now.
    """

    index: int
    key: PublicKey
    signature: bytes
    material: Material
    paths: tuple[CertifiedKey, ...]


@dataclass(frozen=True, slots=True)
class Signers:
    """What the signatures of one envelope amount to.

    Attributes:
        valid: Distinct known keys with a valid signature.
        certified: Valid signatures by keys that an authority certifies.
        refuted: Sentences about signatures that name a known key and do not verify with it.
        misnamed: Sentences about signatures that contradict themselves: under a keyid that is not the key's, not by the
            key of their own certificate, or with certificates that are malformed. They do not count.
        unknown: Sentences about signatures by keys nobody here knows; they do not count and do no harm.
        notes: Sentences about what is odd beside a signature that counts.
        budget: What the certificates have cost so far; what is still to be judged adds to it.
    """

    valid: frozenset[PublicKey] = frozenset()
    certified: tuple[Certified, ...] = ()
    refuted: tuple[str, ...] = ()
    misnamed: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    budget: Budget = field(default_factory=Budget, compare=False)

    @property
    def believed(self) -> frozenset[PublicKey]:
        """Every key with a valid signature for which somebody the policy knows stands."""
        return self.valid | {item.key for item in self.certified}


def judge_signatures(
    envelope: Envelope, keys: Iterable[PublicKey], authorities: Sequence[TrustStore] = (), now: datetime | None = None
) -> Signers:
    """Check every signature; a keyid only helps to find the key, and never stands for it.

    Args:
        envelope: The envelope.
        keys: Keys that are known.
        authorities: Stores of type ``ca``; without any, what travels beside a signature is not looked at.
        now: The time to judge certificates by; needed with authorities.
    """
    count = max(1, len(envelope.signatures))
    trials = Trials(envelope.pae, count)
    bench = _Bench(trials.message, {key.keyid: key for key in keys}, authorities, now, Budget(count), trials)
    for index, signature in enumerate(envelope.signatures):
        bench.judge(index, signature)
    return Signers(
        frozenset(bench.valid),
        tuple(bench.certified),
        tuple(bench.refuted),
        tuple(bench.misnamed),
        tuple(bench.unknown),
        tuple(bench.notes),
        bench.budget,
    )


@dataclass(slots=True)
class _Bench:
    """Collects verdicts over the signatures of one message."""

    message: bytes
    known: dict[str, PublicKey]
    authorities: Sequence[TrustStore]
    now: datetime | None
    budget: Budget
    trials: Trials
    valid: set[PublicKey] = field(default_factory=set)
    certified: list[Certified] = field(default_factory=list)
    refuted: list[str] = field(default_factory=list)
    misnamed: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def judge(self, index: int, signature: Signature) -> None:
        """Sort one signature into the lists."""
        named = self.known.get(signature.keyid)
        if named is not None:
            if not named.verify(self.message, signature.sig):
                self.refuted.append(f"signature {index} names {named.keyid} and is not its")
                return
            signer: PublicKey | None = named
        else:
            signer = self.trials.signer(signature.sig, self.known.values())
            if self.trials.cut:
                text = "not every one was tried on so large a statement: it needs a keyid"
                self.notes.append(f"signature {index} names no known key, and {text}")
            if signer is not None and signature.keyid:
                text = f"signature {index} is by {signer.keyid} and names {signature.keyid}: not counted"
                self.misnamed.append(text)
                return
        if signer is not None:
            self.valid.add(signer)
        if self.authorities and self.now is not None and signature.extension is not None:
            self.chain(index, signature, signer, self.now)
        elif signer is None:
            self.unknown.append(f"signature {index} is by an unknown key ({signature.keyid or 'no keyid'})")

    def chain(self, index: int, signature: Signature, signer: PublicKey | None, now: datetime) -> None:
        """Look at the certificates beside a signature; trouble with them takes nothing from a known key's signature."""
        against, foreign = (self.misnamed, self.unknown) if signer is None else (self.notes, self.notes)
        try:
            material = parse_material(signature.extension, field=f"signatures[{index}].extension", file="envelope")
            if material is None or not material.certificates:
                what = "carries an extension of an unknown kind" if material is None else "carries no certificate"
                foreign.append(f"signature {index} {what} ({signature.keyid or 'no keyid'})")
                return
            from vmgraft.signing.certificates import leaf_key

            leaf = leaf_key(material.certificates)
            # One signature is one key's: with ECDSA, others can be computed that it verifies with too.
            mine = leaf.verify(self.message, signature.sig) if signer is None else leaf == signer
            if not mine:
                against.append(f"signature {index} is not by the key of the certificate beside it: not counted")
            elif signature.keyid not in ("", leaf.keyid):
                against.append(f"signature {index} is by {leaf.keyid} and names {signature.keyid}: not counted")
            else:
                paths = self.budget.once(index, material.certificates, partial(self.paths, index, material, now))
                self.certified.append(Certified(index, leaf, signature.sig, material, paths))
        except BadSignatureError as exc:
            against.append(f"signature {index}: {exc.message}: not counted")
        except UntrustedSignerError as exc:
            foreign.append(f"signature {index}: {exc.message}")

    def paths(self, index: int, material: Material, now: datetime, effort: Effort) -> tuple[CertifiedKey, ...]:
        """Return what each authority says about the chain of a signature.

        Raises:
            BadSignatureError: a certificate is malformed.
            UntrustedSignerError: no authority has a path.
        """
        found, problems = [], []
        for store in self.authorities:
            try:
                found.append(certify_under(store, material, effort, at=now, now=now))
            except UntrustedSignerError as exc:
                problems.append(exc.message)
            if effort.spent:
                break
        if not found:
            raise UntrustedSignerError("; ".join(dict.fromkeys(problems)))
        if effort.spent:
            self.notes.append(f"signature {index}: not every trust store was asked about its certificate: {SPENT}")
        return tuple(found)


def certify_under(
    store: TrustStore, material: Material, effort: Effort, *, at: datetime, now: datetime
) -> CertifiedKey:
    """Validate a chain to one trust store.

    Raises:
        BadSignatureError: a certificate is malformed.
        UntrustedSignerError: no path leads to it, at no time.
    """
    from vmgraft.signing.certificates import Authority, certify

    authority = Authority(store.name, store.roots, store.crls, store.require_crls)
    return certify(material.certificates, [authority], at=at, now=now, effort=effort)
