"""How much work the certificates of one envelope may cause: they are judged before anybody is trusted.

Same-named certificates make mazes in which a path is sought among very many. The library gives up on one chain after
some hundred signatures; here the sum over all chains, timestamps, trust stores and moments is bounded too. So is the
work that name constraints make, each of which is held against every name below it. Every signature has a share of its
own: anybody can put a signature with a maze into an envelope, and that must not keep the others from counting.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from vmgraft.errors import BadSignatureError, UntrustedSignerError

#: Most steps for one envelope: validations begun, and authorities tried on the way to a root, at one signature check
#: each at most, and a step more for every thousand comparisons of a name with a constraint. Each of sixteen signatures
#: (``dsse.MAX_SIGNATURES``) has 150; one with two intermediates takes four under each trust store that may have issued
#: them, so even thirty-two of those are all asked.
MAX_STEPS: Final = 2400
#: How many comparisons of a name with a name constraint are worth a step; they take a tenth of a millisecond.
COMPARISONS: Final = 1000
#: The reason given from then on; it begins like the library's own.
SPENT: Final = "Exceeded maximum effort for the certificates of one signature"

_T = TypeVar("_T")


@dataclass(slots=True)
class Effort:
    """Counts the work for one signature.

    Attributes:
        limit: Most steps.
        steps: Steps taken.
        spent: Nothing more is judged; what is left is not trusted.
    """

    limit: int = MAX_STEPS
    steps: int = 0
    spent: bool = False

    def step(self, cost: int = 1) -> bool:
        """Count a step, or one that is worth several; False when it must not be taken."""
        if not self.spent:
            self.spent = self.steps + cost > self.limit
            self.steps += 0 if self.spent else cost
        return not self.spent


@dataclass(slots=True)
class Budget:
    """The work for one envelope: a share for each signature, and what was found out, so that it is found out once.

    Attributes:
        signatures: How many signatures there are to share it.
        refused: How many questions were not answered for good, since a share did not last.
    """

    signatures: int = 1
    refused: int = 0
    _shares: dict[int, Effort] = field(default_factory=dict)
    _known: dict[Hashable, Any] = field(default_factory=dict)

    def share(self, index: int) -> Effort:
        """Return what one signature may cost, less what it has cost."""
        if not 0 <= index < self.signatures:
            raise ValueError("no such signature")
        return self._shares.setdefault(index, Effort(MAX_STEPS // self.signatures))

    @property
    def steps(self) -> int:
        """Steps taken for all signatures."""
        return sum(share.steps for share in self._shares.values())

    def once(self, index: int, question: Hashable, answer: Callable[[Effort], _T]) -> _T:
        """Return an answer that may have been given before, or raise the error that it was.

        An answer for which the share of its signature did not last is not kept: the same question may be asked for
        another signature, at the expense of that one.

        Args:
            index: The signature whose share the answer may use up.
            question: What names the answer.
            answer: Finds it out.

        Raises:
            BadSignatureError: that was the answer.
            UntrustedSignerError: so was that.
        """
        found: _T | BadSignatureError | UntrustedSignerError
        if question in self._known:
            found = self._known[question]
        else:
            share = self.share(index)
            try:
                found = answer(share)
            except (BadSignatureError, UntrustedSignerError) as exc:
                found = exc
            if share.spent:
                self.refused += 1
            else:
                self._known[question] = found
        if isinstance(found, (BadSignatureError, UntrustedSignerError)):
            raise type(found)(found.message, file=found.file, field=found.field, hint=found.hint)
        return found
