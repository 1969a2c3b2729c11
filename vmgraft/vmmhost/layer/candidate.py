"""An extension that is tried beside a running guest: until it belongs to the set, it cannot end the guest."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vmgraft.vmmhost.layer.surroundings import Surroundings


class Candidate:
    """The stop switch and the audit log as a candidate has them.

    What it asks for before `admit` is held back: a penalty is dropped with it, since a candidate with a fault is
    refused, and its own request takes effect once it is in the set.

    Args:
        around: What the extensions of the machine share.
    """

    def __init__(self, around: Surroundings) -> None:
        self._real = around
        self._admitted = False
        self._request: dict[str, Any] | None = None
        self._reason: str | None = None
        #: What its proxy is handed.
        self.around = replace(around, stop=self._stop, audit=self._audit)

    def _stop(self, reason: str) -> None:
        if self._admitted:
            self._real.stop(reason)
        elif self._request is not None:
            self._reason = reason

    def _audit(self, event: str, fields: dict[str, Any]) -> None:
        if not self._admitted and event == "stop-request":
            self._request = fields
            return
        if not self._admitted and event == "fault" and fields.get("action") == "stop":
            fields = {**fields, "action": "refuse"}
        self._real.audit(event, fields)

    def admit(self) -> None:
        """Let it stop the guest from now on; if it asked for that already, now is the time."""
        self._admitted = True
        if self._request is not None and self._reason is not None:
            self._real.audit("stop-request", self._request)  # right before: it tells what the stop is for
            self._real.stop(self._reason)
