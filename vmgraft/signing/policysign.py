"""Signed policies: a policy inside a DSSE envelope, believed only when a key named from elsewhere signed it.

The envelope is that of a graft with a media type of its own, so that neither can be taken for the other. A host that
is told policy keys accepts nothing unsigned, and no version lower than one it has seen under the same key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Final, Protocol

from vmgraft.errors import BadSignatureError, PolicyError, UsageError
from vmgraft.signing.dsse import MAX_ENVELOPE, Envelope, Signature, pae, parse_envelope, serialise
from vmgraft.signing.files import read_regular
from vmgraft.signing.keys import PublicKey
from vmgraft.signing.memory import PolicyMemory

#: Media type of a policy in DSSE.
POLICY_TYPE: Final = "application/vnd.vmgraft.policy+json"

_PathOrNone = str | PathLike[str] | None
_HINT: Final = "name the key that signs your policies: --policy-key KEY.pub"


class PolicySigner(Protocol):
    """Anything that can sign; every signer of ``signers`` is one."""

    @property
    def public(self) -> PublicKey: ...  # noqa: D102
    def sign(self, message: bytes) -> bytes: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class PolicyTrust:
    """What is demanded of a policy file before a word of it counts.

    Attributes:
        keys: Keys of which one must have signed it; naming any means that it must be signed.
        required: Refuse an unsigned policy.
        memory: Where the highest versions seen are kept; None compares with nothing.
    """

    keys: tuple[PublicKey, ...] = ()
    required: bool = False
    memory: PolicyMemory | None = None

    def check_unsigned(self, file: _PathOrNone) -> None:
        """Raise where an unsigned policy is not enough.

        Raises:
            PolicyError: it is not.
        """
        if self.required or self.keys:
            raise PolicyError("the policy is not signed", file=file, hint="sign it with: vmgraft policy sign")

    def check_version(self, version: int, signed_by: Sequence[str], file: _PathOrNone) -> None:
        """Raise where a signed policy is older than one seen before.

        Raises:
            PolicyError: it is.
            VmgraftError: the memory cannot be read.
        """
        if self.memory is None:
            return
        for signer in signed_by:
            seen = self.memory.policy_version(signer)
            if seen is not None and version < seen:
                raise PolicyError(
                    f"policy version {version} is older than {seen}, which was seen under {signer}",
                    file=file,
                    field="policyVersion",
                    hint="use the newest policy; a newer edition of an old text needs a higher policyVersion",
                )


def is_wrapped(document: Any) -> bool:
    """Tell whether a parsed file is a DSSE envelope rather than a policy."""
    return isinstance(document, dict) and "payloadType" in document


def read_policy_file(path: Path) -> bytes:
    """Return the bytes of a policy file that is to be signed.

    Raises:
        PolicyError: it cannot be read, or is a link.
    """
    from vmgraft.signing.policy import MAX_POLICY

    return read_regular(path, MAX_POLICY, what="the policy", error=PolicyError, follow=False)


def sign_policy(data: bytes, signers: Sequence[PolicySigner], *, file: _PathOrNone = None) -> bytes:
    """Return a policy wrapped in an envelope that each signer has signed. The bytes are signed as they are.

    Args:
        data: The bytes of a policy file that ``parse_policy`` accepts.
        signers: At least one.
        file: What to name in errors.

    Raises:
        UsageError: no signer, or the envelope would be over 1 MiB.
        PolicyError: the bytes are no valid policy.
    """
    from vmgraft.signing.policy import parse_policy

    if not signers:
        raise UsageError("a signed policy needs at least one key", field="key")
    parse_policy(data, file=file)
    message = pae(POLICY_TYPE, data)
    signatures = tuple(Signature(signer.public.keyid, signer.sign(message)) for signer in signers)
    wrapped = serialise(Envelope(data, signatures, POLICY_TYPE)) + b"\n"
    if len(wrapped) > MAX_ENVELOPE:
        raise UsageError(f"the signed policy would have {len(wrapped)} bytes, more than {MAX_ENVELOPE}")
    return wrapped


def unwrap_policy(data: bytes, trust: PolicyTrust, file: _PathOrNone = None) -> tuple[bytes, tuple[str, ...]]:
    """Return the bytes of a signed policy, and the keyids of the trusted keys that signed them.

    Raises:
        PolicyError: the envelope is malformed or holds something else, no key was named, or none of them signed.
    """
    if not trust.keys:
        raise PolicyError("the policy is signed, and no key to check it with was named", file=file, hint=_HINT)
    try:
        envelope = parse_envelope(data, file=file, payload_type=POLICY_TYPE)
    except BadSignatureError as exc:
        raise PolicyError(exc.message, file=file, field=exc.field, hint=exc.hint) from exc
    message = envelope.pae
    signed_by = tuple(
        sorted(key.keyid for key in trust.keys if any(key.verify(message, item.sig) for item in envelope.signatures))
    )
    if not signed_by:
        named = ", ".join(item.keyid or "no keyid" for item in envelope.signatures)
        wanted = ", ".join(key.keyid for key in trust.keys)
        problem = f"the policy is not signed by {wanted} (it names {named})"
        raise PolicyError(problem, file=file, field="signatures", hint="get the policy from whoever holds that key")
    return envelope.payload, signed_by
