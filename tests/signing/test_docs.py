"""What the documentation says of this room is what the code does."""

from __future__ import annotations

import json
import re
from pathlib import Path

from vmgraft.signing.contract import Limits
from vmgraft.signing.integrity import CHECKS
from vmgraft.signing.manifest import LIMIT_NAMES
from vmgraft.signing.policy import LOGGED, OVERRIDABLE, parse_policy
from vmgraft.signing.policytools import check_policy
from vmgraft.signing.statement import parse_statement

DOCS = Path(__file__).resolve().parents[2] / "docs"


def json_blocks(name):
    return re.findall(r"```json\n(.*?)```", (DOCS / name).read_text(), re.DOTALL)


def rows(name, first_column):
    return [line.split("|")[1:-1] for line in (DOCS / name).read_text().splitlines() if re.match(first_column, line)]


def test_example_policy_loads():
    (text,) = json_blocks("policy.md")
    policy = parse_policy(text.encode())
    assert [entry.name for entry in policy.trust_policies] == ["acme-appliances", "everything-else"]
    assert check_policy(policy) == ["acme-appliances: only logs: expiry"]


def test_every_field_of_the_schema_is_described():
    from vmgraft.schemas import load_schema

    text = (DOCS / "policy.md").read_text()
    schema = load_schema("policy")
    entry = schema["properties"]["trustPolicies"]["items"]
    grant = entry["properties"]["grants"]["additionalProperties"]
    nodes = (schema, entry, grant, grant["properties"]["limits"], schema["properties"]["revocations"])
    names = {name for node in nodes for name in node["properties"]}
    assert {name for name in names if f"`{name}`" not in text} == set()


def test_defaults_of_limits():
    defaults = {cells[0].strip(" `"): int(cells[1]) for cells in rows("policy.md", r"\| `\w+` \| \d+ \|")}
    assert defaults == {key: getattr(Limits(), name) for name, key in LIMIT_NAMES.items()}


def test_table_of_levels():
    seen = set()
    for cells in rows("policy.md", r"\| `\w+`( `\w+`)* \| (enforce|log) \|"):
        strict, permissive, audit, overridable = (cell.strip() for cell in cells[1:])
        for name in re.findall(r"`(\w+)`", cells[0]):
            seen.add(name)
            for level, action in (("strict", strict), ("permissive", permissive), ("audit", audit)):
                assert (name in LOGGED[level]) is (action == "log")
            assert (name in OVERRIDABLE) is (overridable == "yes")
    assert seen == set(CHECKS)


def test_table_of_checks():
    numbered = [(int(c[0]), re.match(r" `(\w+)`", c[1])[1]) for c in rows("signing.md", r"\| \d+ \|")]
    assert numbered == list(enumerate(CHECKS, 1))


def test_example_statement_has_the_documented_form():
    statement, envelope = json_blocks("signing.md")
    assert sorted(json.loads(envelope)) == ["payload", "payloadType", "signatures"]
    document = json.loads(re.sub(r'"(\.\.\.|<flat.*?>)"', '"' + "0" * 64 + '"', statement))
    parsed = parse_statement(json.dumps(document).encode())
    assert parsed.unknown == () and parsed.image.virtual_size == 10 << 30
