"""What would make the check ``authenticity`` pass: other signatures, or a policy that counts those that are there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from vmgraft.errors import PolicyError
from vmgraft.signing.contract import Check
from vmgraft.signing.identities import parse_identity
from vmgraft.signing.judgement import Judgement
from vmgraft.signing.patches import Remedy, add, append, at
from vmgraft.signing.policymodel import TrustPolicy
from vmgraft.signing.rules import Signatory, filled, label

if TYPE_CHECKING:
    from vmgraft.signing.certificates import CertifiedKey

#: Most names of certificates that are proposed: one certificate can have hundreds.
_MAX_NAMES: Final = 12


def authenticity(judgement: Judgement, _check: Check) -> Iterator[Remedy]:
    """Return the ways to have enough trusted signatures."""
    entry = judgement.run.policy
    if entry is None:
        yield from _unknown_signers(judgement)
        return
    yield from _missing(judgement, entry)
    yield from _identities(judgement, entry)
    yield from _stores(judgement, entry)
    yield from _named(judgement, entry)


def _missing(judgement: Judgement, entry: TrustPolicy) -> Iterator[Remedy]:
    """Say whose signatures the rule lacks."""
    rule, signed = entry.signatures, judgement.standing.signed

    def lacking(places: frozenset[Signatory]) -> list[str]:
        free = (place for place in places if not any(vouch.fills(place) for vouch in signed))
        return [_signatory(judgement, place) for place in sorted(free, key=label)]

    texts, must = [], lacking(rule.all_of)
    if must:
        texts.append(f"by {', '.join(must)}")
    more, others = rule.minimum - filled(sorted(rule.any_of, key=label), signed), lacking(rule.any_of)
    if more > 0 and others:
        texts.append(f"by {more} of {', '.join(others)}" if len(others) > more else f"by {', '.join(others)}")
    if not texts:
        texts.append("by more different keys, since one key fills one place")
    yield Remedy(f"add signatures {', and '.join(texts)} to the image: vmgraft sign --append")


def _signatory(judgement: Judgement, place: Signatory) -> str:
    """Name a place of the rule; a signature by a revoked key would be of no use."""
    revoked = not isinstance(place, str) and place.keyid in judgement.policy.revocations.keys
    return f"{label(place)} (revoked: the rule needs another)" if revoked else label(place)


def _identities(judgement: Judgement, entry: TrustPolicy) -> Iterator[Remedy]:
    """Return edits that accept the identities of certificates by authorities that are trusted here."""
    texts: list[str] = []
    for item in judgement.run.signers.certified:
        for path in item.paths:
            if f"ca:{path.authority}" not in entry.trust_stores or entry.accepts(path.subject, path.sans):
                continue
            usable = _nameable(path)
            if not usable:
                yield Remedy(
                    f"let the signer have a certificate that a policy can name: no entry of trustedIdentities means "
                    f"the one for {path.name[:200]!r}, as a whole and alone"
                )
            texts += [text for text in usable if text not in texts]
    for text in texts[:_MAX_NAMES]:
        edits = append(judgement, entry, "trustedIdentities", [text])
        yield Remedy(f"accept the certificate for {text!r} in {entry.name}", tuple(edits))


def _nameable(path: CertifiedKey) -> list[str]:
    """Return the entries of ``trustedIdentities`` that mean a certificate: not every name can stand there."""
    found = []
    for text in (f"x509.subject: {path.name}", *(f"x509.san: {san}" for san in path.sans[:_MAX_NAMES])):
        try:
            if parse_identity(text, field="trustedIdentities").matches(path.subject, path.sans):
                found.append(text)
        except PolicyError:
            continue
    return found


def _stores(judgement: Judgement, entry: TrustPolicy) -> Iterator[Remedy]:
    """Say which authorities, trusted elsewhere in the policy, certify a signature."""
    for item in judgement.run.signers.certified:
        names = [f"ca:{path.authority}" for path in item.paths]
        if not any(name in entry.trust_stores for name in names):
            what = f"{' or '.join(names)}, which certifies {item.paths[0].name[:200]!r}"
            yield Remedy(f"name {what}, under trustStores and signatures of {entry.name}")


def _named(judgement: Judgement, entry: TrustPolicy) -> Iterator[Remedy]:
    """Return what would let known keys count that have signed, and that the rule does not name."""
    rule, revoked = entry.signatures, judgement.policy.revocations.keys
    short = filled(sorted(rule.any_of, key=label), judgement.standing.signed) < rule.minimum
    for key in sorted(judgement.run.signers.valid - rule.keys, key=label):
        if key.keyid in revoked:
            continue
        if short:
            edit = add(f"{at(judgement, entry)}/signatures/anyOf/of/-", f"key:{key.keyid}")
            yield Remedy(f"let the signature by {key.keyid} count in {entry.name}", (edit,))
        else:
            yield Remedy(f"name {key.keyid}, which has signed, in the rule of {entry.name}")


def _unknown_signers(judgement: Judgement) -> Iterator[Remedy]:
    envelope = judgement.run.envelope
    for index, signature in enumerate(() if envelope is None else envelope.signatures):
        keyid = signature.keyid or "a key that it does not name"
        if signature.keyid in judgement.policy.revocations.keys:
            yield Remedy(f"let somebody else sign: signature {index} says that it is by {keyid}, which is revoked")
            continue
        text = f"signature {index} says that it is by {keyid}: get that public key from its owner, add it to 'keys'"
        text += ", and name it under 'signatures'"
        if signature.extension is not None:
            text += "; or let a certificate be beside it that leads to a root under 'trustStores', and add the root if "
            text += "it is only that which is missing"
        yield Remedy(text)
