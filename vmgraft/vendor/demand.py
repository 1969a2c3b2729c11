"""From the verdicts of a verification to one error: what must hold before a key's signature goes into an image."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

from vmgraft.errors import (
    BadSignatureError,
    ContentMismatchError,
    ExpiredError,
    GraftFormatError,
    PayloadMismatchError,
    UntrustedSignerError,
    VerificationError,
    VmgraftError,
)
from vmgraft.signing.contract import Check, Evidence, Status
from vmgraft.signing.integrity import Run, expiry_problem

if TYPE_CHECKING:
    from vmgraft.signing.keys import PublicKey

_FAMILIES: Final[dict[str, type[VmgraftError]]] = {
    cls.code: cls
    for cls in (GraftFormatError, BadSignatureError, UntrustedSignerError, PayloadMismatchError, ContentMismatchError)
}
#: What must have been checked; ``content`` too where the statement is bound to one.
_GROUND: Final = ("format", "envelope", "signature", "statement", "payloads")
_HINTS: Final = {
    "payloads": "what is signed must be what is there",
    "content": "the statement is about another content, or this one was changed since",
    "authenticity": "--trust names the public key of who signed it",
}


def demand(evidence: Evidence, publics: Sequence[PublicKey], *, file: Path) -> Run:
    """Verify a graft that keys have signed: each of them, the payloads, the content, the time.

    Args:
        evidence: The graft, or what is to become one.
        publics: Every one of these keys must have signed.
        file: What to name in the error.

    Returns:
        What was found out.

    Raises:
        VmgraftError: of the family of the first check that failed.
    """
    run = Run(evidence, publics, datetime.now(UTC), check_content=True)
    run.integrity()
    demand_checks(run, file=file)
    missing = [key.keyid for key in publics if key not in run.signers.valid]
    if missing:
        raise UntrustedSignerError(f"there is no signature by {', '.join(missing)}", file=file, field="signature")
    return run


def said_once(check: Check, file: Path) -> str:
    """Return what a failed check says, for an error that names the file and the check itself."""
    return re.sub(rf"{re.escape(str(file))}(?:, payload)?(?:, |: )", "", check.detail)


def demand_checks(run: Run, *, file: Path) -> None:
    """Raise the first failure; a check that was not made is one too, and so is a statement that is not in force.

    Raises:
        VmgraftError: of the family of the check.
    """
    for check in run.checks.values():
        if check.status is Status.FAIL:
            family = _FAMILIES.get(check.error or "", VerificationError)
            hint = _HINTS.get(check.name, check.hint)
            raise family(said_once(check, file), file=file, field=check.name, hint=hint)
    bound = run.statement is not None and run.statement.image is not None
    for name in (*_GROUND, "content") if bound else _GROUND:
        if name not in run.checks or run.checks[name].status is not Status.PASS:
            raise VerificationError(f"it could not be checked ({name})", file=file, field=name)
    if run.statement is None:
        raise VerificationError("there is no statement", file=file)
    problem = expiry_problem(run.statement, run.now)
    if problem is not None:
        hint = "`vmgraft resign` makes a new statement" if "expired" in problem else "is the clock right?"
        raise ExpiredError(f"the statement is {problem}", file=file, field="expires", hint=hint)
