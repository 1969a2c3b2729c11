"""How an extension can break a rule, and the words for it."""

from __future__ import annotations

from enum import StrEnum

from vmgraft.errors import ExtensionFaultError


class FaultKind(StrEnum):
    """The ``kind`` of a ``fault`` record in the audit log."""

    TRAP = "trap"  #: the module trapped, or handed an import something out of range
    FUEL = "fuel"  #: one call used more than ``fuelPerCall``
    DEADLINE = "deadline"  #: one call, or the start, took too long
    DIED = "died"  #: the worker process ended
    PROTOCOL = "protocol"  #: the worker sent what the protocol does not allow
    WINDOW = "window"  #: guest memory outside the granted windows
    QUOTA = "quota"  #: more requests in one call than the host serves
    ANSWER = "answer"  #: the answer to a service or a snapshot is out of its range
    ISOLATION = "isolation"  #: the worker is not locked in as it says
    START = "start"  #: ``on_start`` returned an error


class WorkerFaultError(ExtensionFaultError):
    """An extension broke a rule.

    Attributes:
        kind: Which rule.
    """

    def __init__(self, kind: FaultKind, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind
