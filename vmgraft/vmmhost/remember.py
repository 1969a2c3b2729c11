"""What a run remembers for the runs after it: which versions reached their ready mark on this host."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from vmgraft.errors import StateError
from vmgraft.signing import statefile
from vmgraft.signing.contract import Report, Status, VerifiedExtension
from vmgraft.signing.keys import PublicKey
from vmgraft.signing.policy import Policy, load_policy
from vmgraft.signing.state import Ran, RollbackState, create_state, policy_trust
from vmgraft.vmmhost.supplements.compose import Shown


class RunMemory:
    """The rollback memory as one run uses it; a context manager.

    It is opened before the policy is read and closed before the guest's first instruction, so that nothing the guest
    brings down could take it along.

    Args:
        path: The database, or None to remember nothing.
        raising: Whether this run may raise and create it; a dry run only reads.

    Raises:
        StateError: it cannot be used.
    """

    def __init__(self, path: Path | None, *, raising: bool = True) -> None:
        self.path, self._raising = path, raising
        #: Whether it was made for this run, so that nothing could be compared.
        self.created = False
        #: What was raised, in JSON form.
        self.raised: list[dict[str, Any]] = []
        self.state: RollbackState | None = None
        if path is not None and statefile.exists(path):
            self.state = RollbackState(path, writable=raising)

    def load_policy(self, path: Path, keys: tuple[PublicKey, ...] = (), *, required: bool = False) -> Policy:
        """Load the trust policy as the memory demands it, and remember its version where it is a signed one.

        Args:
            path: The policy file.
            keys: Keys of which one must have signed it.
            required: Refuse an unsigned policy.

        Raises:
            PolicyError: the policy cannot be used, or is older than one seen before.
            StateError: the memory cannot be used, or is missing where the policy demands one.
        """
        policy = load_policy(path, policy_trust(self.state, keys, required=required))
        if self.path is not None and self.state is None:
            self._begin(self.path, policy)
        if self.state is not None and self._raising and policy.signed_by:
            self.state.raise_policy(policy.signed_by, policy.policy_version, policy.sha256, when=datetime.now(UTC))
        return policy

    def _begin(self, path: Path, policy: Policy) -> None:
        """Make a memory where there is none, unless the policy counts on one: then its loss must not go unseen."""
        wanting = [entry.name for entry in policy.trust_policies if entry.needs_state]
        if wanting:
            raise StateError(
                f"there is no rollback memory, and {', '.join(wanting)} in the policy demands one",
                file=path,
                hint="a new host begins one with: vmgraft state init; on any other, bring it back from a backup",
            )
        if self._raising:
            self.created = create_state(path)
            self.state = RollbackState(path)

    def remember(
        self,
        verdict: Report,
        extensions: Collection[VerifiedExtension],
        ready: Collection[str],
        sha256: str,
        shown: Collection[Shown] = (),
    ) -> None:
        """Raise what is remembered to the versions that are ready now, then close the memory.

        A run in which a failure was only logged teaches nothing: what is let pass must not set the mark for the others.

        Args:
            verdict: The verification that accepted the image.
            extensions: The extensions of this run.
            ready: Ids of those whose module is running.
            sha256: SHA-256 of the signed statement, in hex.
            shown: Further images of which the guest sees files.

        Raises:
            RollbackError: a newer version got ready since this one was verified.
            StateError: the memory cannot be written.
        """
        counting = {item.id for item in extensions if item.module is None or item.id in ready}
        self.raise_to(verdict, counting, sha256)
        raised = self.raised
        for layer in shown:
            self.raise_to(layer.verdict, layer.extensions, layer.statement_sha256)
            raised = [*raised, *(entry for entry in self.raised if entry not in raised)]
        self.raised = raised
        self.close()

    def raise_to(self, verdict: Report, counting: Collection[str], sha256: str) -> None:
        """Raise what is remembered of the extensions named, unless a failure was only logged.

        Args:
            verdict: The verification that accepted them.
            counting: Their ids.
            sha256: SHA-256 of the signed statement, in hex.

        Raises:
            RollbackError: a newer version got ready since this one was verified.
            StateError: the memory cannot be written.
        """
        if self.state is None or not self._raising or verdict.policy is None or verdict.statement is None:
            return
        clean = all(check.status is not Status.WARN for check in verdict.checks)
        ran = [
            Ran(entry["id"], int(entry["securityVersion"]), int(entry["generation"]))
            for entry in verdict.statement["predicate"]["extensions"]
            if entry["id"] in counting
        ]
        if ran and clean:
            raised = self.state.raise_to(verdict.policy, ran, statement=sha256, when=datetime.now(UTC))
            self.raised = [seen.to_dict() for seen in raised]

    @contextmanager
    def reopened(self) -> Iterator[None]:
        """Open the memory again for a change to a running guest, and close it after.

        Raises:
            StateError: it cannot be used.
        """
        if self.path is not None and self.state is None:
            self.state = RollbackState(self.path, writable=self._raising)
        try:
            yield
        finally:
            self.close()

    def to_dict(self) -> dict[str, Any] | None:
        """Return what the run report says of it, or None where nothing is remembered."""
        if self.path is None:
            return None
        return {"file": str(self.path), "created": self.created, "raised": self.raised}

    def close(self) -> None:
        """Close the database; may be called twice."""
        if self.state is not None:
            self.state.close()
            self.state = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()
