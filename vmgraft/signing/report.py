"""The JSON form of a report, as schema ``report`` describes it."""

from __future__ import annotations

from typing import Any

from vmgraft.signing.contract import Limits, Report, VerifiedExtension
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


def report_document(report: Report) -> dict[str, Any]:
    """Return a report as JSON-able data; the command line adds ``image`` and ``exitCode``."""
    return {
        "ok": report.ok,
        "error": report.error,
        "checks": [check.to_dict() for check in report.checks],
        "policy": report.policy,
        "signers": list(report.signers),
        "statement": report.statement,
        "extensions": [_extension(extension) for extension in report.extensions],
        "warnings": list(report.warnings),
    }
