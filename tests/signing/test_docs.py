"""What the documentation says of this room is what the code does."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from vmgraft.signing.contract import Limits
from vmgraft.signing.integrity import CHECKS
from vmgraft.signing.manifest import LIMIT_NAMES
from vmgraft.signing.policy import LOGGED, OVERRIDABLE, parse_policy
from vmgraft.signing.policylint import check_policy
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


#: Heading in policy.md of the tables that describe a node of the schema, and where the node is in a policy.
NODES = {
    "Top level": (),
    "A trust store": ("trustStores", 0),
    "A trust policy": ("trustPolicies", 0),
    "Levels and overrides": ("trustPolicies", 0, "signatureVerification"),
    "Revocations": ("revocations",),
}
GRANT = ("trustPolicies", 0, "grants", "com.acme.guard")


def field_rows(name):
    """Yield (heading, field, example) of every row of a table that has an example."""
    heading = ""
    for line in (DOCS / name).read_text().splitlines():
        heading = line[3:] if line.startswith("## ") else heading
        example = re.search(r"\| `(\"(\w+)\": .*?)` \|", line)
        if example and line.startswith(f"| `{example[2]}` |"):
            yield heading, example[2], example[1]


def schema_fields():
    """Return the fields that each table must describe."""
    from vmgraft.schemas import load_schema

    top = load_schema("policy")["properties"]
    entry = top["trustPolicies"]["items"]["properties"]
    grant = entry["grants"]["additionalProperties"]["properties"]
    return {
        "Top level": top,
        "A trust store": top["trustStores"]["items"]["properties"],
        "A trust policy": entry | grant | grant["limits"]["properties"],
        "Levels and overrides": entry["signatureVerification"]["properties"],
        "Revocations": top["revocations"]["properties"],
    }


def test_every_field_of_the_schema_has_an_example():
    described: dict[str, list[str]] = {}
    for heading, field, _ in field_rows("policy.md"):
        described.setdefault(heading, []).append(field)
    assert {heading: sorted(fields) for heading, fields in described.items()} == {
        heading: sorted(fields) for heading, fields in schema_fields().items()
    }


def place_of(heading, field):
    """Return where in a policy a field of a table stands."""
    if field in LIMIT_NAMES.values():
        return (*GRANT, "limits")
    if field in ("capabilities", "limits", "minIsolation", "onFault"):
        return GRANT
    return NODES[heading]


@pytest.mark.parametrize(("heading", "field", "example"), list(field_rows("policy.md")))
def test_example_of_each_field_is_accepted(sim, heading, field, example):
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding
    from signing_ca import crl, issue

    root = issue("Root", ca=True)
    texts = {
        "PUBLIC KEY": sim.keys["vendor"].public.pem,
        "CERTIFICATE": root.pem,
        "X509 CRL": x509.load_der_x509_crl(crl(root)).public_bytes(Encoding.PEM),
    }
    for label, pem in texts.items():
        example = example.replace(f'"-----BEGIN {label}-----…"', json.dumps(pem.decode()))
    (text,) = json_blocks("policy.md")
    document = json.loads(text)
    audit = sim.keys["second"].public.pem.decode()
    document["keys"] = [{"name": "acme", "pem": texts["PUBLIC KEY"].decode()}, {"name": "audit", "pem": audit}]
    document["revocations"] = {}
    document["trustPolicies"] = document["trustPolicies"][:1]
    document["trustPolicies"][0]["signatures"] = {"allOf": ["key:acme"]}
    node = document
    for step in place_of(heading, field):
        node = node[step]
    fragment = json.loads("{" + example + "}")
    node |= fragment
    policy = parse_policy(json.dumps(document).encode())
    assert policy.document == document


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
