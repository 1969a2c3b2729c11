"""Ways to make a check pass, and the edits of the policy that some of them are, each tried before it is proposed.

An edit is an operation of JSON Patch (RFC 6902) on the policy document. It is applied to a copy, the copy is read as
any policy is, and the graft is judged under it: so what is said of an edit was found out, and not supposed. All tries
together may cost what one verification may.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from vmgraft.errors import PolicyError
from vmgraft.signing.contract import Check, Status
from vmgraft.signing.judgement import Judgement
from vmgraft.signing.policy import parse_policy
from vmgraft.signing.policymodel import Policy, TrustPolicy
from vmgraft.signing.verify import judge_again

Edit = dict[str, Any]

#: Why an edit was not tried to its end.
UNTRIED: Final = "the certificates beside the signatures cost too much"


@dataclass(frozen=True, slots=True)
class Remedy:
    """One way to make a check pass.

    Attributes:
        text: What to do, one sentence.
        edits: Operations of JSON Patch (RFC 6902) on the policy; empty where it is not the policy that must change.
        alone: Whether the check passes by this alone. False: others are needed too. None: it was not tried, since what
            is to be done lies outside the policy, or since that would cost too much.
        sure: Proposed only if the check passes by this alone.
    """

    text: str
    edits: tuple[Edit, ...] = ()
    alone: bool | None = None
    sure: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {"text": self.text, "edits": list(self.edits), "alone": self.alone}


def parts(causes: Sequence[Sequence[Remedy]]) -> list[Remedy]:
    """Return the remedies of several causes; where there is more than one cause, none of them is enough alone."""
    found = [remedy for cause in causes for remedy in cause]
    return found if len(causes) < 2 else [replace(remedy, alone=False) for remedy in found]


# --- edits


def add(path: str, value: Any) -> Edit:
    """Return the operation that adds a member, or an item where the path ends with an index or ``-``."""
    return {"op": "add", "path": path, "value": value}


def change(path: str, value: Any) -> Edit:
    """Return the operation that gives a member another value."""
    return {"op": "replace", "path": path, "value": value}


def remove(path: str, indexes: Iterable[int]) -> tuple[Edit, ...]:
    """Return the operations that remove items of a list, the last first: indexes shift."""
    return tuple({"op": "remove", "path": f"{path}/{index}"} for index in sorted(indexes, reverse=True))


def escape(name: str) -> str:
    """Return a member's name as a reference token (RFC 6901, 3)."""
    return name.replace("~", "~0").replace("/", "~1")


def at(judgement: Judgement, entry: TrustPolicy) -> str:
    """Return where a trust policy stands in the file."""
    return f"/trustPolicies/{judgement.policy.trust_policies.index(entry)}"


def member(judgement: Judgement, entry: TrustPolicy, name: str) -> Any:
    """Return what the file says under a name of a trust policy, or None."""
    return judgement.policy.document["trustPolicies"][judgement.policy.trust_policies.index(entry)].get(name)


def append(judgement: Judgement, entry: TrustPolicy, name: str, values: Sequence[str]) -> list[Edit]:
    """Return the edits that add to a list of a trust policy, which may not be there."""
    where = f"{at(judgement, entry)}/{name}"
    if not values:
        return []
    if member(judgement, entry, name) is None:
        return [add(where, list(values))]
    return [add(f"{where}/-", value) for value in values]


def log(judgement: Judgement, check: Check) -> tuple[Remedy, ...]:
    """Return the last resort, where it is not what the policy says already: to have a failure logged only."""
    entry = judgement.run.policy
    if entry is None or entry.logs(check.name):
        return ()
    where = f"{at(judgement, entry)}/signatureVerification/override"
    edit = add(f"{where}/{check.name}", "log") if entry.override else add(where, {check.name: "log"})
    text = f"have {check.name} logged only: weaker for every image of {entry.name}"
    return (Remedy(text, (edit,), sure=True),)


# --- trying


def apply_edits(document: Any, edits: Sequence[Edit]) -> Any:
    """Return a copy of a document with edits applied: ``add``, ``replace`` and ``remove``, to places that are there."""
    changed = copy.deepcopy(document)
    for edit in edits:
        *steps, last = (token.replace("~1", "/").replace("~0", "~") for token in edit["path"].split("/")[1:])
        node = changed
        for step in steps:
            node = node[int(step)] if isinstance(node, list) else node[step]
        value = copy.deepcopy(edit.get("value"))
        if edit["op"] == "remove":
            del node[int(last) if isinstance(node, list) else last]
        elif isinstance(node, list) and edit["op"] == "add":
            node.insert(len(node) if last == "-" else int(last), value)
        else:
            node[int(last) if isinstance(node, list) else last] = value
    return changed


def tried(remedy: Remedy, check: Check, judgement: Judgement) -> Remedy | None:
    """Return a remedy with what comes of its edits, or None where it is not to be proposed.

    Edits that would make the policy invalid are taken out, and the sentence says why.
    """
    if not remedy.edits:
        return remedy
    try:
        policy = _edited(judgement.policy, remedy.edits)
    except PolicyError as exc:
        why = exc.message if exc.field is None else f"{exc.field}: {exc.message}"
        text = f"{remedy.text}; that takes another change first, for the policy would be invalid ({why})"
        return None if remedy.sure else replace(remedy, text=text, edits=(), alone=None)
    budget = judgement.run.signers.budget
    refused = budget.refused
    alone: bool | None = _passes(check, judgement, policy)
    if not alone and budget.refused > refused:  # a signature that was not looked at may be the one that counts
        return None if remedy.sure else replace(remedy, text=f"{remedy.text}; not tried: {UNTRIED}", alone=None)
    return None if remedy.sure and not alone else replace(remedy, alone=alone)


def _edited(policy: Policy, edits: Sequence[Edit]) -> Policy:
    """Return the policy with edits applied.

    Raises:
        PolicyError: it would be invalid.
    """
    data = json.dumps(apply_edits(policy.document, edits)).encode("ascii")
    return parse_policy(data, signed_by=policy.signed_by)


def _passes(check: Check, judgement: Judgement, policy: Policy) -> bool:
    """Tell whether a check that did not pass does so under another policy; one that failed may also be logged."""
    found = judge_again(judgement, policy).run.checks.get(check.name)
    good = (Status.PASS, Status.WARN) if check.status is Status.FAIL else (Status.PASS,)
    return found is not None and found.status in good
