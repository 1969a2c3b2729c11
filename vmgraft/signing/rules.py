"""Who must sign: public keys, and authorities that certify them. Counted is by distinct public key, and nothing else.

A rule lists *signatories*: a public key, or the name of a trust store (``ca:`` in the policy), which stands for any key
that a chain to that store certifies under an accepted identity. One key fills one place, whatever its names, its
certificates and the number of its signatures; one place is filled by one key.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from vmgraft.signing.keys import PublicKey
from vmgraft.words import counted

#: A public key, or the name of a trust store of type ``ca``.
Signatory = PublicKey | str


@dataclass(frozen=True, slots=True)
class Vouch:
    """A valid signature by a key, and why it counts.

    Attributes:
        key: The key that made it.
        authority: Name of the trust store whose chain certifies the key; None where the policy lists the key itself.
    """

    key: PublicKey
    authority: str | None = None

    def fills(self, place: Signatory) -> bool:
        """Tell whether this may stand in the place of a signatory."""
        return place == (self.key if self.authority is None else self.authority)


def label(signatory: Signatory) -> str:
    """Return how a signatory is named in messages: ``SHA256:...`` or ``ca:NAME``."""
    return f"ca:{signatory}" if isinstance(signatory, str) else signatory.keyid


@dataclass(frozen=True, slots=True)
class SignatureRule:
    """Each of ``all_of`` must have signed, with a key of its own, and so must ``minimum`` of ``any_of``."""

    all_of: frozenset[Signatory]
    any_of: frozenset[Signatory]
    minimum: int

    @property
    def signatories(self) -> frozenset[Signatory]:
        """Everything the rule names."""
        return self.all_of | self.any_of

    @property
    def keys(self) -> frozenset[PublicKey]:
        """Every key the rule names."""
        return frozenset(item for item in self.signatories if isinstance(item, PublicKey))

    @property
    def authorities(self) -> frozenset[str]:
        """Every trust store the rule names."""
        return frozenset(item for item in self.signatories if isinstance(item, str))

    def names(self, vouch: Vouch) -> bool:
        """Tell whether a signature is one that the rule asks for."""
        return any(vouch.fills(place) for place in self.signatories)

    def problem(self, signed: Collection[Vouch]) -> str | None:
        """Say why these signatures do not satisfy the rule, or None when they do."""
        if not self.signatories:
            return "the rule names no key"
        places = sorted(self.all_of, key=label)
        missing = [place for place in places if not any(vouch.fills(place) for vouch in signed)]
        if missing:
            return "not signed by " + ", ".join(map(label, missing))
        if filled(places, signed) < len(places):
            return "different keys must have signed for each of " + ", ".join(map(label, places))
        found = filled(sorted(self.any_of, key=label), signed)
        if found < self.minimum:
            return f"signed by {found} of the {counted(len(self.any_of), 'key')} of which {self.minimum} must sign"
        return None

    def missing(self, signed: Collection[Vouch]) -> tuple[str, ...]:
        """Name the signatories that could still make the rule hold, in the order of their labels."""
        open_places = {place for place in self.all_of if not any(vouch.fills(place) for vouch in signed)}
        if filled(sorted(self.any_of, key=label), signed) < self.minimum:
            open_places |= {place for place in self.any_of if not any(vouch.fills(place) for vouch in signed)}
        return tuple(sorted(map(label, open_places)))


def filled(places: Sequence[Signatory], signed: Collection[Vouch]) -> int:
    """Return how many places distinct keys can fill at once: a maximum matching (by augmenting paths, Kuhn 1955)."""
    wanted = {place: {vouch.key for vouch in signed if vouch.fills(place)} for place in places}
    holder: dict[PublicKey, Signatory] = {}

    def seat(place: Signatory, tried: set[PublicKey]) -> bool:
        for key in sorted(wanted[place] - tried, key=lambda item: item.spki):
            tried.add(key)
            if key not in holder or seat(holder[key], tried):
                holder[key] = place
                return True
        return False

    return sum(seat(place, set()) for place in places)
