"""The error families of vmgraft, told apart by whose fault they are.

Every error carries a message and, where they are known, the file, the byte offset and the field it is about, and a
hint that says what would make it pass. Only the command line turns a family into an exit code
(``vmgraft/cli/exitcodes.py``); libraries raise and never print.
"""

from __future__ import annotations

from os import PathLike, fspath
from typing import Any, ClassVar


class VmgraftError(Exception):
    """Base of everything vmgraft raises on purpose.

    Args:
        message: One sentence, no trailing full stop needed.
        file: Path of the file at fault.
        offset: Byte offset in that file.
        field: Name of the field, in the words of its specification.
        hint: What the user can do about it.
    """

    code: ClassVar[str] = "internal"

    def __init__(
        self,
        message: str,
        *,
        file: str | PathLike[str] | None = None,
        offset: int | None = None,
        field: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.file = None if file is None else fspath(file)
        self.offset = offset
        self.field = field
        self.hint = hint

    def __str__(self) -> str:
        where = [] if self.file is None else [self.file]
        if self.offset is not None:
            where.append(f"offset {self.offset}")
        if self.field is not None:
            where.append(self.field)
        return f"{', '.join(where)}: {self.message}" if where else self.message

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form: ``code``, ``message``, ``file``, ``offset``, ``field``, ``hint``."""
        return {
            "code": self.code,
            "message": self.message,
            "file": self.file,
            "offset": self.offset,
            "field": self.field,
            "hint": self.hint,
        }


# --- the caller's input -------------------------------------------------------------------------------------------


class UsageError(VmgraftError):
    """The request itself makes no sense."""

    code = "usage"


# --- the file ------------------------------------------------------------------------------------------------------


class FileError(VmgraftError):
    """A file cannot be read, written or understood."""

    code = "file"


class UnsupportedError(FileError):
    """The file is well-formed but uses something this version refuses to handle."""

    code = "unsupported"


class MalformedImageError(FileError):
    """A container violates its own specification."""

    code = "malformed-image"


class ImageInUseError(FileError):
    """Another process holds the image open."""

    code = "image-in-use"


class NoGraftError(VmgraftError):
    """The image carries no graft."""

    code = "no-graft"


class GraftFormatError(VmgraftError):
    """The graft record or its locator is malformed, damaged or over a limit."""

    code = "graft-format"


class NoRoomError(GraftFormatError):
    """The record does not fit where it was asked to go."""

    code = "no-room"


# --- the signer, and the policy ------------------------------------------------------------------------------------


class VerificationError(VmgraftError):
    """Something was read well and is not to be trusted."""

    code = "verification"


class BadSignatureError(VerificationError):
    """An envelope or signature is not valid."""

    code = "bad-signature"


class UntrustedSignerError(VerificationError):
    """The signer is not trusted, or too few trusted signers signed."""

    code = "untrusted-signer"


class ContentMismatchError(VerificationError):
    """The guest content is not what was signed."""

    code = "content-mismatch"


class PayloadMismatchError(VerificationError):
    """A manifest or module is not what was signed."""

    code = "payload-mismatch"


class ExpiredError(VerificationError):
    """The statement or a certificate is expired or not yet valid."""

    code = "expired"


class RevokedError(VerificationError):
    """A key, statement, payload or generation was revoked."""

    code = "revoked"


class RollbackError(VerificationError):
    """The security version is below what was accepted before, or demanded."""

    code = "rollback"


class CapabilityError(VerificationError):
    """An extension claims what the policy does not grant."""

    code = "capability-denied"


class PolicyError(VerificationError):
    """The trust policy or trust store is invalid."""

    code = "policy-invalid"


class StateError(PolicyError):
    """The rollback memory of this host cannot be read, written or believed."""

    code = "state-invalid"


class RequiredExtensionError(VerificationError):
    """An extension that the policy requires is missing."""

    code = "required-extension-missing"


# --- the host ------------------------------------------------------------------------------------------------------


class HostError(VmgraftError):
    """The host cannot start or continue a guest here."""

    code = "host"


class EngineUnavailableError(HostError):
    """The CPU engine asked for does not work on this machine."""

    code = "engine-unavailable"


class NotBootableError(HostError):
    """The guest content holds nothing that this host can boot."""

    code = "not-bootable"


class ExtensionFaultError(HostError):
    """An extension broke a rule and the guest was stopped for it."""

    code = "extension-fault"


class ExpectationError(HostError):
    """The guest ended without showing what ``--until`` asked for."""

    code = "expectation"
