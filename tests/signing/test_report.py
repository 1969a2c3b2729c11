from __future__ import annotations

import json

import pytest

from vmgraft.errors import VmgraftError
from vmgraft.schemas import validate
from vmgraft.signing.contract import Status
from vmgraft.signing.integrity import CHECKS
from vmgraft.signing.report import report_document


@pytest.mark.parametrize("signers", [["vendor"], ["stranger"]])
def test_report_is_one_json_object_of_its_schema(sim, signers):
    report = sim.verify(sim.graft(signers=signers))
    document = json.loads(
        json.dumps(report_document(report) | {"exitCode": 0 if report.ok else 11, "image": "disk.qcow2"})
    )
    validate("report", document, file=None, error=VmgraftError)
    assert [check["name"] for check in document["checks"]] == list(CHECKS)
    assert document["ok"] is report.ok
    if report.ok:
        assert document["error"] is None
        assert document["extensions"][0]["limits"]["memoryMiB"] == 8
        assert document["statement"]["predicate"]["binding"] == "image"
    else:
        assert document["error"]["code"] == report.error == "untrusted-signer"
        assert document["error"]["field"] == "authenticity"
        assert document["extensions"] == [] and document["statement"] is None
        assert any(check["status"] == Status.SKIP.value for check in document["checks"])
