"""How much work the certificates of one envelope may cause: they are judged before anybody is trusted.

Same-named certificates make mazes in which a path is sought among very many. The library gives up on one chain after
some hundred signatures; here the sum over all chains, timestamps, trust stores and moments is bounded too.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from vmgraft.errors import BadSignatureError, UntrustedSignerError

#: Most steps for one envelope: validations begun, and authorities tried on the way to a root, at one signature check
#: each at most. Sixteen signatures (``dsse.MAX_SIGNATURES``) with an intermediate under thirty-two stores take 1,040.
MAX_STEPS: Final = 1200
#: The reason given from then on; it begins like the library's own.
SPENT: Final = "Exceeded maximum effort for the certificates of one envelope"

_T = TypeVar("_T")


@dataclass(slots=True)
class Effort:
    """Counts the work for one envelope, and keeps what was found out so that it is found out once.

    Attributes:
        steps: Steps taken.
        validations: Path validations begun.
        spent: Nothing more is judged; what is left is not trusted.
    """

    steps: int = 0
    validations: int = 0
    spent: bool = False
    _known: dict[Hashable, Any] = field(default_factory=dict)

    def begin(self) -> bool:
        """Count a validation; False when it must not be made."""
        if self.step():
            self.validations += 1
        return not self.spent

    def step(self) -> bool:
        """Count a step; False when it must not be taken."""
        if not self.spent:
            self.steps += 1
            self.spent = self.steps > MAX_STEPS
        return not self.spent

    def once(self, question: Hashable, answer: Callable[[], _T]) -> _T:
        """Return an answer that may have been given before, or raise the error that it was.

        Raises:
            BadSignatureError: that was the answer.
            UntrustedSignerError: so was that.
        """
        if question not in self._known:
            try:
                self._known[question] = answer()
            except (BadSignatureError, UntrustedSignerError) as exc:
                self._known[question] = exc
        found: _T | BadSignatureError | UntrustedSignerError = self._known[question]
        if isinstance(found, (BadSignatureError, UntrustedSignerError)):
            raise type(found)(found.message, file=found.file, field=found.field, hint=found.hint)
        return found
