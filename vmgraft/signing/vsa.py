"""Verification summaries: what an auditor found, for others to rely on (SLSA 1.0, verification_summary v1).

A summary is an in-toto Statement in a DSSE envelope, like a graft's statement and told from it by its predicate type.
Its subjects are the guest content alone: the flat SHA-256 where it was computed, and the SHA-256 of the content's
fs-verity descriptor, which is what ``fsverity digest`` prints. docs/vsa.md says what it stands for, and what never.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from os import PathLike
from typing import Any, Final

from vmgraft import __version__
from vmgraft.errors import (
    BadSignatureError,
    ExpiredError,
    RevokedError,
    UntrustedSignerError,
    UsageError,
    VmgraftError,
)
from vmgraft.schemas import strict_json, validate
from vmgraft.signing.contract import ContentNames, Report, Status
from vmgraft.signing.dsse import MAX_ENVELOPE, PAYLOAD_TYPE, Envelope, Signature, pae, parse_envelope, serialise
from vmgraft.signing.keys import PublicKey
from vmgraft.signing.material import parse_material
from vmgraft.signing.policymodel import LOGGED, Policy
from vmgraft.signing.policysign import PolicySigner
from vmgraft.signing.statement import CONTENT_SUBJECT, STATEMENT_TYPE
from vmgraft.signing.times import CLOCK_SKEW, format_time, later, parse_time
from vmgraft.signing.trials import Trials

#: https://slsa.dev/spec/v1.0/verification_summary
SUMMARY_TYPE: Final = "https://slsa.dev/verification_summary/v1"
#: Subject whose SHA-256 is the fs-verity digest of the content (the SHA-256 of its 256-byte descriptor).
TREE_SUBJECT: Final = "guest-content/fs-verity-descriptor"
#: The level of an image for which nothing failed that any policy could have only logged.
STRICT: Final = "VMGRAFT_STRICT"
#: How old a summary may be where nobody says otherwise.
MAX_AGE: Final = timedelta(days=7)

_PathOrNone = str | PathLike[str] | None


@dataclass(frozen=True, slots=True)
class Summary:
    """A summary whose signature by a named auditor was verified.

    Attributes:
        auditor: keyid of the key that signed it.
        verifier: URI by which the auditor goes.
        policy: SHA-256 of the trust policy's bytes, in hex; ``trust_policy`` is the name of its entry that applied.
        statement: SHA-256 of the graft's statement, in hex; None where the auditor found none.
        tree: fs-verity digest of the content.
        flat: Flat SHA-256 of the content, where the auditor computed it.
        levels: What it is said to reach; where it passed, one level alone: that of the trust policy that applied, or a
            weaker one, which lets pass what its overrides have let pass.
    """

    auditor: str
    verifier: str
    time: datetime
    policy: str
    trust_policy: str | None
    statement: str | None
    tree: bytes
    flat: bytes | None
    passed: bool
    levels: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SummaryDemand:
    """A summary to rely on, and what is demanded of it.

    Attributes:
        data: The bytes of the file.
        auditors: Keys that are named by the caller; empty for those that the policy names.
        max_age: How old it may be.
        file: What to name in errors.
    """

    data: bytes
    auditors: tuple[PublicKey, ...] = ()
    max_age: timedelta = MAX_AGE
    file: _PathOrNone = None

    def accept(self, policy: Policy, statement: bytes, now: datetime) -> Summary:
        """Return the summary if it says, recently and by a named auditor, that this statement passed this policy.

        Args:
            policy: The trust policy in use here.
            statement: The payload of the graft's envelope.
            now: The time to judge by.

        Raises:
            BadSignatureError: malformed, or no summary.
            UntrustedSignerError: no auditor is named, none of them signed it, the policy lets that key sign images, it
                says FAILED or another level than the policy demands, or it speaks about another policy or statement.
            ExpiredError: too old, or from the future.
            RevokedError: the policy revokes the auditor's key.
        """
        summary = read_summary(self.data, self._named(policy), file=self.file)
        problem: VmgraftError | None = None
        if summary.auditor in policy.revocations.keys:
            problem = RevokedError(f"the auditor's key {summary.auditor} is revoked", file=self.file)
        elif (owner := _signer_under(policy, summary.auditor)) is not None:
            message = f"the auditor's key {summary.auditor} may sign images itself, under the trust policy {owner}"
            hint = "nobody's word stands for a rule that names the same key; an auditor needs a key of its own"
            problem = UntrustedSignerError(message, file=self.file, field="signatures", hint=hint)
        elif not summary.passed:
            problem = UntrustedSignerError("the auditor refused this image", file=self.file, field="verificationResult")
        elif summary.policy != policy.sha256:
            message = f"the auditor used another policy (sha256:{summary.policy})"
            hint = f"ask for a summary under this one, sha256:{policy.sha256}"
            problem = UntrustedSignerError(message, file=self.file, field="policy", hint=hint)
        elif (level := _demanded(policy, summary.trust_policy)) is not None and summary.levels != (_name(level),):
            said = ", ".join(summary.levels)[:200]
            message = f"it says PASSED, and {said}; the trust policy {summary.trust_policy} demands {_name(level)}"
            hint = "a weaker level means that a check failed, and that an override has only logged it"
            problem = UntrustedSignerError(message, file=self.file, field="verifiedLevels", hint=hint)
        elif summary.statement != hashlib.sha256(statement).hexdigest():
            message = "the auditor saw another statement than the one in this image"
            problem = UntrustedSignerError(message, file=self.file, field="inputAttestations")
        elif summary.time > later(now, CLOCK_SKEW):
            problem = ExpiredError(f"it is from the future: {format_time(summary.time)}", file=self.file)
        elif now - summary.time > self.max_age:
            message = f"it is of {format_time(summary.time)}, and may be {_age(self.max_age)} old"
            problem = ExpiredError(message, file=self.file, hint="ask for a new one, or allow more with --vsa-max-age")
        if problem is not None:
            raise problem
        return summary

    def _named(self, policy: Policy) -> tuple[PublicKey, ...]:
        """Return who may speak: whom the policy names rules, and keys named here only narrow that."""
        both = tuple(key for key in self.auditors if key in policy.auditors)
        named = both if policy.auditors and self.auditors else policy.auditors or self.auditors
        if not named:
            why = "none of the auditors named is one of the policy's" if self.auditors else "no auditor is named"
            hint = '--vsa-trust AUDITOR.pub, or "auditors" in the policy'
            raise UntrustedSignerError(f"a summary counts for nothing here: {why}", file=self.file, hint=hint)
        return named


def _age(age: timedelta) -> str:
    """Return a duration as ``--vsa-max-age`` takes it."""
    seconds = int(age.total_seconds())
    units = (("d", 86400), ("h", 3600), ("m", 60), ("s", 1))
    unit, size = next((unit, size) for unit, size in units if seconds % size == 0)
    return f"{seconds // size}{unit}"


def check_verifier(uri: str) -> None:
    """Refuse what is no absolute URI, before much is read for nothing.

    Raises:
        UsageError: it is none.
    """
    if len(uri) > 512 or re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*:[!-~]+", uri) is None:
        hint = "as in https://audit.example/vmgraft"
        raise UsageError(f"{uri[:64]!r} is no absolute URI", field="verifier-id", hint=hint)


def build_summary(
    report: Report, policy: Policy, content: ContentNames, *, statement: bytes | None, verifier: str, now: datetime
) -> bytes:
    """Return the statement that says how a verification ended.

    Args:
        report: The verdict.
        policy: The policy it was reached under.
        content: Digests of the guest content, read for it.
        statement: The payload of the graft's envelope, or None where there is none to name.
        verifier: URI by which the auditor goes.
        now: The time of the verification.

    Raises:
        UsageError: ``verifier`` is no absolute URI.
    """
    tree = content.tree_digest.hex()
    subjects = [{"name": TREE_SUBJECT, "digest": {"sha256": tree}}]
    if content.flat is not None:
        subjects.insert(0, {"name": CONTENT_SUBJECT, "digest": {"sha256": content.flat.hex()}})
    level = _reached(policy, report)
    used: dict[str, Any] = {"uri": f"vmgraft:policy:sha256:{policy.sha256}", "digest": {"sha256": policy.sha256}}
    if report.policy is not None:
        used["name"] = report.policy
    inputs = []
    if statement is not None:
        inputs.append({"uri": "vmgraft:statement", "digest": {"sha256": hashlib.sha256(statement).hexdigest()}})
    passed = report.ok and level is not None and statement is not None
    document = {
        "_type": STATEMENT_TYPE,
        "subject": subjects,
        "predicateType": SUMMARY_TYPE,
        "predicate": {
            "verifier": {"id": verifier, "version": {"vmgraft": __version__}},
            "timeVerified": format_time(now),
            "resourceUri": f"vmgraft:tree:sha256:{tree}",
            "policy": used,
            "inputAttestations": inputs,
            "verificationResult": "PASSED" if passed else "FAILED",
            "verifiedLevels": [_name(level)] if passed and level is not None else ["FAILED"],
        },
    }
    validate("summary", document, file=None, error=UsageError)
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode("utf-8")


def _name(level: str) -> str:
    return f"VMGRAFT_{level.upper()}"


def _demanded(policy: Policy, name: str | None) -> str | None:
    """Return the level of a trust policy, whatever its overrides; None where there is no such trust policy."""
    return next((entry.level for entry in policy.trust_policies if entry.name == name), None)


def _reached(policy: Policy, report: Report) -> str | None:
    """Return the level of the trust policy, or the next weaker one that would have let pass what only warns."""
    demanded, weaker = _demanded(policy, report.policy), list(LOGGED)  # the strictest first
    if demanded is None:
        return None
    warned = {check.name for check in report.checks if check.status is Status.WARN}
    return next((level for level in weaker[weaker.index(demanded) :] if warned <= LOGGED[level]), None)


def _signer_under(policy: Policy, keyid: str) -> str | None:
    """Return the first trust policy that lets a key sign images, or None."""
    entries = policy.trust_policies
    return next((entry.name for entry in entries if any(key.keyid == keyid for key in entry.signatures.keys)), None)


def refuse_signer(auditor: str, auditors: Sequence[PublicKey], envelope: Envelope) -> None:
    """Refuse the word of an auditor who is one of the image's signers, by key or by certificate, about that image.

    A ``ca:`` in the rule may stand for the auditor's own key, and only what is beside the signatures shows it.

    Args:
        auditor: keyid of the auditor's key.
        auditors: Where that key is.
        envelope: The graft's envelope.

    Raises:
        UntrustedSignerError: the auditor has signed it, or a certificate for the auditor's key is in it.
    """
    own = next(key for key in auditors if key.keyid == auditor)
    trials = Trials(envelope.pae, len(envelope.signatures))
    for index, item in enumerate(envelope.signatures):
        signed = trials.signer(item.sig, [own]) is not None
        if signed or own in _certified(item):
            how = f"signature {index} is by it" if signed else f"a certificate for it is beside signature {index}"
            hint = "nobody's word stands for a rule that the same key helps to fill; an auditor needs a key of its own"
            message = f"the auditor's key {auditor} signs images itself: {how}"
            raise UntrustedSignerError(message, field="signatures", hint=hint)


def _certified(signature: Signature) -> Iterator[PublicKey]:
    """Return the keys that the certificates beside a signature are for; what cannot be read certifies nobody."""
    from vmgraft.signing.certificates import leaf_key

    try:
        material = parse_material(signature.extension, field="extension")
    except BadSignatureError:
        return
    for der in () if material is None else material.certificates:
        with suppress(BadSignatureError, UntrustedSignerError):
            yield leaf_key([der])


def sign_summary(statement: bytes, signer: PolicySigner) -> bytes:
    """Return a summary in its envelope, ready for a file."""
    sig = signer.sign(pae(PAYLOAD_TYPE, statement))
    return serialise(Envelope(statement, (Signature(signer.public.keyid, sig),))) + b"\n"


def read_summary(data: bytes, auditors: Sequence[PublicKey], *, file: _PathOrNone = None) -> Summary:
    """Return a summary that one of the auditors signed; nothing of it is parsed before that is known.

    Raises:
        BadSignatureError: malformed, or another kind of statement.
        UntrustedSignerError: none of the auditors signed it.
    """
    if len(data) > MAX_ENVELOPE:
        raise BadSignatureError(f"a summary has at most {MAX_ENVELOPE} bytes", file=file)
    envelope = parse_envelope(data, file=file)
    message = envelope.pae
    trials = Trials(message, len(envelope.signatures))
    signers = {trials.signer(item.sig, auditors, item.keyid) for item in envelope.signatures}
    signer = next((key for key in auditors if key in signers), None)
    if signer is None:
        wanted = ", ".join(key.keyid for key in auditors)
        raise UntrustedSignerError(f"the summary is not signed by an auditor named here ({wanted})", file=file)
    document = strict_json(envelope.payload, file=file, error=BadSignatureError, max_bytes=MAX_ENVELOPE)
    validate("summary", document, file=file, error=BadSignatureError)
    return _summary(document, signer.keyid, file)


def _summary(document: dict[str, Any], auditor: str, file: _PathOrNone) -> Summary:
    subjects: dict[str, str] = {}
    for subject in document["subject"]:
        if subject["name"] in subjects:
            raise BadSignatureError(f"the subject {subject['name']!r} stands twice", file=file, field="subject")
        subjects[subject["name"]] = subject["digest"]["sha256"]
    predicate = document["predicate"]
    tree = subjects.get(TREE_SUBJECT)
    if tree is None or predicate["resourceUri"] != f"vmgraft:tree:sha256:{tree}":
        message = "it does not name one guest content, as a subject and as its resource"
        raise BadSignatureError(message, file=file, field="subject")
    inputs = predicate["inputAttestations"]
    if len(inputs) > 1:
        raise BadSignatureError("it names several statements", file=file, field="inputAttestations")
    flat = subjects.get(CONTENT_SUBJECT)
    return Summary(
        auditor=auditor,
        verifier=predicate["verifier"]["id"],
        time=parse_time(predicate["timeVerified"], file=file, field="timeVerified", error=BadSignatureError),
        policy=predicate["policy"]["digest"]["sha256"],
        trust_policy=predicate["policy"].get("name"),
        statement=inputs[0]["digest"]["sha256"] if inputs else None,
        tree=bytes.fromhex(tree),
        flat=None if flat is None else bytes.fromhex(flat),
        passed=predicate["verificationResult"] == "PASSED",
        levels=tuple(predicate["verifiedLevels"]),
    )
