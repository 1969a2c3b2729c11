"""The graft that is to be edited: read, and verified before anything in it is signed again."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Final

from vmgraft.errors import (
    BadSignatureError,
    ContentMismatchError,
    ExpiredError,
    GraftFormatError,
    PayloadMismatchError,
    UnsupportedError,
    UntrustedSignerError,
    VerificationError,
    VmgraftError,
)
from vmgraft.imagefmt.contract import GraftState
from vmgraft.imagefmt.graft import Graft
from vmgraft.signing.contract import Check, Status
from vmgraft.signing.dsse import Envelope
from vmgraft.signing.integrity import Run, expiry_problem
from vmgraft.signing.statement import Statement
from vmgraft.vendor.demand import said_once
from vmgraft.vendor.pack import Package

if TYPE_CHECKING:
    from vmgraft.signing.keys import PublicKey

#: What must have been found good before the content is read.
_GROUND: Final = ("format", "envelope", "signature", "statement", "payloads")
_FAMILIES: Final[dict[str, type[VmgraftError]]] = {
    cls.code: cls
    for cls in (GraftFormatError, BadSignatureError, UntrustedSignerError, PayloadMismatchError, ContentMismatchError)
}
_HINTS: Final = {
    "format": "`vmgraft inspect` shows what is damaged; `vmgraft recover` mends what can be mended",
    "payloads": "detach, and attach all extensions anew from their sources",
    "content": "if the content was changed on purpose: detach, and attach all extensions anew",
}


@dataclass(frozen=True, slots=True)
class OldGraft:
    """A graft that a trusted key has signed, with payloads as signed; the content is still to be compared.

    Attributes:
        statement: Its statement.
        packages: Its extensions in load order, the very bytes that were signed.
        signers: The keyids that its envelope names.
    """

    statement: Statement
    packages: tuple[Package, ...]
    signers: tuple[str, ...]


def read_old_graft(graft: Graft, trusted: Collection[PublicKey], *, now: datetime, renewed: bool) -> OldGraft:
    """Verify all of a graft but the content.

    Args:
        graft: The graft as found.
        trusted: Keys, one of which must have signed it.
        now: The time to judge by.
        renewed: Whether the new statement gets an end of validity of its own. Only then may the old one be over: a
            signer who names a new end knows that there was one.

    Raises:
        GraftFormatError: it is not sound.
        VerificationError: the signature, the signer, a payload or the time is not good.
        UnsupportedError: the statement says things that this release would lose.
    """
    run = _run(graft, trusted, now, check_content=False)
    _refuse_failed(run, _GROUND, graft)
    if graft.located.state is not GraftState.OK or run.envelope is None or run.statement is None:
        raise GraftFormatError(f"{graft.located.state.value}: {graft.located.detail}", file=graft.image.path)
    statement = run.statement
    _refuse_out_of_time(statement, now, renewed, graft)
    if statement.unknown:
        raise UnsupportedError(
            f"the statement says what this release does not understand: {', '.join(statement.unknown)}",
            file=graft.image.path,
            field="statement",
            hint="a new statement would lose it; use the release that made it, or attach all extensions anew",
        )
    packages = tuple(
        Package(
            id=found.entry.id,
            version=found.entry.version,
            manifest=graft.payload(statement.subjects[found.entry.manifest]["sha256"]),
            module=found.module,
            files=tuple(graft.payload(statement.subjects[name]["sha256"]) for name in found.entry.files),
        )
        for found in run.found
    )
    return OldGraft(statement, packages, _signers(run.envelope))


def check_content(graft: Graft, trusted: Collection[PublicKey], now: datetime) -> None:
    """Compare the content, which has been read already, with the statement.

    Raises:
        ContentMismatchError: it is not what was signed.
    """
    run = _run(graft, trusted, now, check_content=True)
    bound = run.statement is not None and run.statement.image is not None
    _refuse_failed(run, (*_GROUND, "content") if bound else _GROUND, graft)


def _run(graft: Graft, trusted: Collection[PublicKey], now: datetime, *, check_content: bool) -> Run:
    run = Run(graft, trusted, now, check_content)
    run.integrity()
    return run


def _refuse_failed(run: Run, names: Collection[str], graft: Graft) -> None:
    """Raise the first failure; a check that was not made is one too."""
    for check in run.checks.values():
        if check.status is Status.FAIL:
            raise _failure(check, run.envelope, graft)
    missing = [name for name in names if name not in run.checks or run.checks[name].status is not Status.PASS]
    if missing:
        raise VerificationError(f"the old graft could not be checked ({missing[0]})", file=graft.image.path)


def _failure(check: Check, envelope: Envelope | None, graft: Graft) -> VmgraftError:
    family = _FAMILIES.get(check.error or "", VerificationError)
    hint = _HINTS.get(check.name, check.hint)
    if family is UntrustedSignerError:
        named = ", ".join(_signers(envelope)) if envelope is not None else ""
        hint = f"trust the signer's public key with --trust KEY.pub, or sign with it; the old statement names {named}"
    message = f"the old graft is not signed again: {said_once(check, graft.image.path)}"
    return family(message, file=graft.image.path, field=check.name, hint=hint)


def _signers(envelope: Envelope) -> tuple[str, ...]:
    return tuple(signature.keyid or "no keyid" for signature in envelope.signatures)


def _refuse_out_of_time(statement: Statement, now: datetime, renewed: bool, graft: Graft) -> None:
    problem = expiry_problem(statement, now)
    over = statement.expires is not None and now >= statement.expires
    if problem is None or (over and renewed and statement.created <= now):
        return
    raise ExpiredError(
        f"the old graft is not signed again: its statement is {problem}",
        file=graft.image.path,
        field="expires",
        hint="--expires names a new end of validity" if over else "is the clock right?",
    )
