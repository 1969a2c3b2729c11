"""The JSON form of a report, as schema ``report`` describes it."""

from __future__ import annotations

from typing import Any

from vmgraft.errors import VerificationError
from vmgraft.signing.contract import Check, Limits, Report, Status, VerifiedExtension
from vmgraft.signing.manifest import LIMIT_NAMES


def limits_document(limits: Limits) -> dict[str, int]:
    """Return quotas under the names they have in manifests and policies."""
    return {key: getattr(limits, name) for name, key in LIMIT_NAMES.items()}


def _extension(extension: VerifiedExtension) -> dict[str, Any]:
    return {
        "id": extension.id,
        "version": extension.version,
        "moduleSha256": extension.module_sha256,
        "capabilities": list(extension.capabilities),
        "limits": limits_document(extension.limits),
        "onFault": extension.on_fault,
        "minIsolation": extension.isolation,
    }


def deciding_check(report: Report) -> Check | None:
    """Return the failed check that decided, or None: nothing failed, or a check that must be made was not."""
    return next((check for check in report.checks if check.status is Status.FAIL), None)


def error_document(report: Report) -> dict[str, Any] | None:
    """Return the deciding failure in the form every error has, ``field`` being the check's name; None when ok."""
    if report.ok:
        return None
    failed = deciding_check(report)
    return {
        "code": report.error or VerificationError.code,
        "message": "a check that must be made was not" if failed is None else failed.detail,
        "file": None,
        "offset": None,
        "field": None if failed is None else failed.name,
        "hint": None if failed is None else failed.hint,
    }


def report_document(report: Report) -> dict[str, Any]:
    """Return a report as JSON-able data; the command line adds ``image`` and ``exitCode``."""
    return {
        "ok": report.ok,
        "error": error_document(report),
        "checks": [check.to_dict() for check in report.checks],
        "policy": report.policy,
        "signers": list(report.signers),
        "signerNames": dict(report.named),
        "certified": [signer.to_dict() for signer in report.certified],
        "statement": report.statement,
        "extensions": [_extension(extension) for extension in report.extensions],
        "warnings": list(report.warnings),
    }
