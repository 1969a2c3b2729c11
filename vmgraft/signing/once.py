"""Answers that are found out once, whether they are an answer or an error."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from vmgraft.errors import VmgraftError

_Q = TypeVar("_Q", bound=Hashable)
_A = TypeVar("_A")


class Once(Generic[_Q, _A]):
    """What was found out so far."""

    def __init__(self) -> None:
        self._known: dict[_Q, _A | VmgraftError] = {}

    def __contains__(self, question: _Q) -> bool:
        return question in self._known

    def get(self, question: _Q, answer: Callable[[], _A]) -> _A:
        """Return an answer, which ``answer`` finds out the first time that the question is asked.

        Raises:
            VmgraftError: that came of it, then or now.
        """
        if question not in self._known:
            try:
                self._known[question] = answer()
            except VmgraftError as exc:
                self._known[question] = exc
        found = self._known[question]
        if isinstance(found, VmgraftError):
            raise found
        return found
