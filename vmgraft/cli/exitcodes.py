"""The one table from an error's ``code`` to the exit code of the program."""

from __future__ import annotations

from typing import Final

OK: Final = 0
INTERNAL: Final = 1
USAGE: Final = 2
INTERRUPTED: Final = 130
#: The reader of stdout went away: what a shell shows for a program that SIGPIPE (13) ended.
BROKEN_PIPE: Final = 128 + 13

#: ``VmgraftError.code`` → exit code. docs/exit-codes.md explains each for users; a test keeps the two equal.
EXIT_CODES: Final[dict[str, int]] = {
    "internal": INTERNAL,
    "usage": USAGE,
    "file": 3,
    "unsupported": 3,
    "malformed-image": 3,
    "image-in-use": 3,
    "no-graft": 4,
    "graft-format": 5,
    "no-room": 5,
    "verification": 10,
    "bad-signature": 10,
    "untrusted-signer": 11,
    "content-mismatch": 12,
    "payload-mismatch": 13,
    "expired": 14,
    "revoked": 15,
    "rollback": 16,
    "capability-denied": 17,
    "policy-invalid": 18,
    "state-invalid": 18,
    "required-extension-missing": 19,
    "host": 20,
    "engine-unavailable": 20,
    "not-bootable": 20,
    "extension-fault": 21,
    "expectation": 22,
    "interrupted": INTERRUPTED,
}


def exit_code(code: str | None) -> int:
    """Return the exit code for an error code; unknown codes count as internal errors."""
    return OK if code is None else EXIT_CODES.get(code, INTERNAL)
