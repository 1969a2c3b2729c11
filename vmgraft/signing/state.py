"""What a host remembers, so that an old signed thing cannot come back: the highest versions that ran.

Kept per trust policy and extension: the highest security version and generation. Kept per key that signs policies: the
highest policy version, and whether the key is pinned. Every number only rises; ``reset`` is the one way down. The
database is ``statedb``, and the rules for its file are in ``statefile``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from vmgraft.errors import PolicyError, RollbackError, StateError, UsageError
from vmgraft.signing.keys import PublicKey, public_from_pem
from vmgraft.signing.policysign import PolicyTrust
from vmgraft.signing.statedb import LAYOUT, MAX_NUMBER, StateDatabase, create_database
from vmgraft.signing.times import format_time


@dataclass(frozen=True, slots=True)
class Ran:
    """An extension that reached its ready mark."""

    extension: str
    security_version: int
    generation: int


@dataclass(frozen=True, slots=True)
class Seen:
    """The highest versions of one extension that ran under a trust policy.

    Attributes:
        statement: SHA-256 of the signed statement that raised them, in hex.
        raised: When, as in ``2026-11-22T15:00:00Z``.
    """

    policy: str
    extension: str
    security_version: int
    generation: int
    statement: str
    raised: str

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "policy": self.policy,
            "extension": self.extension,
            "securityVersion": self.security_version,
            "generation": self.generation,
            "statementSha256": self.statement,
            "raised": self.raised,
        }


@dataclass(frozen=True, slots=True)
class SeenPolicy:
    """The highest version of the signed policies of one key. ``sha256`` is of the policy's bytes, in hex."""

    signer: str
    version: int
    sha256: str
    raised: str

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {"signer": self.signer, "policyVersion": self.version, "sha256": self.sha256, "raised": self.raised}


class RollbackState:
    """An open rollback memory; a context manager. It is a ``Memory`` and a ``PolicyMemory`` of the verifier.

    Args:
        path: The database, which must exist; see :func:`create_state`.
        writable: Whether it may be raised; an auditor only reads.

    Raises:
        StateError: missing, not the user's alone, damaged, of another layout, or in use for too long.
    """

    def __init__(self, path: Path, *, writable: bool = True) -> None:
        self.path = path
        self._db = StateDatabase(path, writable=writable)

    def close(self) -> None:
        """Close the database; may be called twice."""
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    # --- reading

    def highest(self, policy: str, extension: str) -> int | None:
        """Return the highest security version of an extension that ran under a trust policy, or None for none yet.

        Raises:
            StateError: the memory cannot be read, or is damaged.
        """
        seen = self.seen(policy, extension)
        return None if seen is None else seen.security_version

    def seen(self, policy: str, extension: str) -> Seen | None:
        """Return what is remembered of an extension under a trust policy, or None.

        Raises:
            StateError: the memory cannot be read, or is damaged.
        """
        with self._db.guard():
            rows = self._db.rows("extensions", {"policy": policy, "extension": extension})
        return Seen(*rows[0]) if rows else None

    def policy_version(self, signer: str) -> int | None:
        """Return the highest version of a signed policy of a key (by its keyid), or None for none yet.

        Raises:
            StateError: the memory cannot be read, or is damaged.
        """
        with self._db.guard():
            rows = self._db.rows("policies", {"signer": signer})
        return SeenPolicy(*rows[0]).version if rows else None

    def pinned(self) -> tuple[PublicKey, ...]:
        """Return the pinned policy keys: where there is one, only policies that one of them signed are accepted.

        Raises:
            StateError: the memory cannot be read, or is damaged.
        """
        with self._db.guard():
            rows = self._db.rows("pins")
        return tuple(public_from_pem(row[1].encode(), file=self.path, error=StateError) for row in rows)

    def extensions(self) -> tuple[Seen, ...]:
        """Return everything remembered of extensions, sorted.

        Raises:
            StateError: the memory cannot be read, or is damaged.
        """
        with self._db.guard():
            return tuple(Seen(*row) for row in self._db.rows("extensions"))

    def export(self) -> dict[str, Any]:
        """Return everything as JSON-able data, read at one point in time.

        Raises:
            StateError: the memory cannot be read, or is damaged.
        """
        with self._db.guard(), self._db.transaction("BEGIN"):
            return {
                "layout": LAYOUT,
                "extensions": [Seen(*row).to_dict() for row in self._db.rows("extensions")],
                "policies": [SeenPolicy(*row).to_dict() for row in self._db.rows("policies")],
                "pinnedPolicyKeys": [{"keyid": row[0], "pinned": row[2]} for row in self._db.rows("pins")],
            }

    # --- raising

    def raise_to(self, policy: str, ran: Sequence[Ran], *, statement: str, when: datetime) -> tuple[Seen, ...]:
        """Remember what reached its ready mark: all of it or nothing, and no number ever falls.

        Args:
            policy: Name of the trust policy that accepted it.
            ran: The extensions.
            statement: SHA-256 of the signed statement, in hex.
            when: The time.

        Returns:
            What was raised; empty where all of it was known.

        Raises:
            RollbackError: another process raised one higher since this one was judged. Nothing is raised then.
            StateError: the memory cannot be read or written, or is damaged.
        """
        raised = []
        with self._db.guard(), self._db.transaction("BEGIN IMMEDIATE"):
            for item in ran:
                rows = self._db.rows("extensions", {"policy": policy, "extension": item.extension})
                old = Seen(*rows[0]) if rows else None
                new = _higher(policy, item, old, (statement, format_time(when)), self.path)
                if new is not None:
                    self._db.put("extensions", astuple(new))
                    raised.append(new)
        if raised:
            self._db.fold()
        return tuple(raised)

    def raise_policy(self, signers: Sequence[str], version: int, sha256: str, *, when: datetime) -> bool:
        """Remember that a signed policy was in force.

        Args:
            signers: keyids of the trusted keys that signed it.
            version: Its ``policyVersion``.
            sha256: SHA-256 of its bytes, in hex.
            when: The time.

        Returns:
            Whether anything was raised.

        Raises:
            PolicyError: another process saw a higher version since this one was judged.
            StateError: the memory cannot be read or written, or is damaged.
        """
        raised = False
        with self._db.guard(), self._db.transaction("BEGIN IMMEDIATE"):
            for signer in signers:
                rows = self._db.rows("policies", {"signer": signer})
                old = SeenPolicy(*rows[0]).version if rows else -1
                if old > version:
                    message = f"policy version {version} is older than {old}, which was seen under {signer}"
                    raise PolicyError(message, field="policyVersion", hint="use the newest policy")
                if old < version:
                    self._db.put("policies", (signer, _number(version, self.path), sha256, format_time(when)))
                    raised = True
        if raised:
            self._db.fold()
        return raised

    def pin(self, key: PublicKey, *, when: datetime) -> None:
        """Accept signed policies only from now on, and only by pinned keys.

        Raises:
            StateError: the memory cannot be written, or is damaged.
        """
        with self._db.guard(), self._db.transaction("BEGIN IMMEDIATE"):
            if not self._db.rows("pins", {"signer": key.keyid}):
                self._db.put("pins", (key.keyid, key.pem.decode("ascii"), format_time(when)))
        self._db.fold()

    # --- the way down

    def reset(self, policy: str, extension: str) -> Seen:
        """Forget an extension under a trust policy: any version of it may run again.

        Returns:
            What was forgotten.

        Raises:
            UsageError: there is nothing to forget.
            StateError: the memory cannot be written, or is damaged.
        """
        (row,) = self._forget(("extensions",), {"policy": policy, "extension": extension})
        return Seen(*row)

    def reset_signer(self, signer: str) -> None:
        """Forget a key that signs policies: its pin, and the highest version of its policies.

        Raises:
            UsageError: there is nothing to forget.
            StateError: the memory cannot be written, or is damaged.
        """
        self._forget(("policies", "pins"), {"signer": signer})

    def _forget(self, tables: Sequence[str], where: Mapping[str, str]) -> list[tuple[Any, ...]]:
        with self._db.guard(), self._db.transaction("BEGIN IMMEDIATE"):
            found = [row for table in tables for row in self._db.rows(table, where)]
            if not found:
                what = " under ".join(reversed([*where.values()]))
                raise UsageError(f"nothing is remembered of {what}", file=self.path, hint="see: vmgraft state show")
            for table in tables:
                self._db.delete(table, where)
        self._db.fold()
        return found


def policy_trust(state: RollbackState | None, keys: Sequence[PublicKey] = (), *, required: bool = False) -> PolicyTrust:
    """Return what is demanded of a policy file: the pinned keys rule, and keys named for one run only narrow them.

    Args:
        state: The rollback memory, or None.
        keys: Keys of which one must have signed the policy.
        required: Refuse an unsigned policy.

    Raises:
        PolicyError: none of the keys named is pinned, though others are.
        StateError: the memory cannot be read.
    """
    pinned = () if state is None else state.pinned()
    both = tuple(key for key in keys if key in pinned)
    if keys and pinned and not both:
        names = ", ".join(key.keyid for key in pinned)
        hint = "vmgraft state pin adds a key, vmgraft state reset --policy-key KEYID removes one"
        raise PolicyError(f"none of the policy keys named is pinned on this host; pinned: {names}", hint=hint)
    return PolicyTrust(both or pinned or tuple(keys), required, state)


def create_state(path: Path) -> bool:
    """Make an empty rollback memory, with its folders.

    Returns:
        False where there was one already; it is left as it is.

    Raises:
        StateError: it cannot be made.
    """
    return create_database(path)


def _higher(policy: str, ran: Ran, old: Seen | None, raised: tuple[str, str], path: Path) -> Seen | None:
    """Return what to remember now, or None where nothing rises."""
    security, generation = _number(ran.security_version, path), _number(ran.generation, path)
    if old is not None:
        if security < old.security_version:
            raise RollbackError(
                f"{ran.extension} has security version {security}, and {old.security_version} has run here meanwhile",
                file=path,
                hint="use the newer release of the extension",
            )
        if security == old.security_version and generation <= old.generation:
            return None
        generation = max(generation, old.generation)
    return Seen(policy, ran.extension, security, generation, *raised)


def _number(value: int, path: Path) -> int:
    if not 0 <= value <= MAX_NUMBER:
        raise StateError(f"{value} is not a version that can be remembered", file=path)
    return value
