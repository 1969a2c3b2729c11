"""What a host remembers between runs, as the verifier asks for it; ``state`` keeps it. No I/O here."""

from __future__ import annotations

from typing import Protocol


class Memory(Protocol):
    """The highest security versions that were accepted and ran.

    An answer that cannot be given is an error (of any ``VmgraftError`` class), never None: None says "not seen yet".
    """

    def highest(self, policy: str, extension: str) -> int | None:
        """Return the highest security version seen of an extension under a trust policy, or None for none yet."""


class PolicyMemory(Protocol):
    """The highest versions of signed policies that were in force."""

    def policy_version(self, signer: str) -> int | None:
        """Return the highest ``policyVersion`` seen under a signer's keyid, or None for none yet."""
