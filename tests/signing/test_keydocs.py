"""docs/keys.md says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

from vmgraft.signing import execsigner, keyinfo, kms, pkcs8, pkcs11
from vmgraft.signing.dsse import MAX_SIGNATURE_BYTES
from vmgraft.signing.keyfiles import OTHER_SCHEMES
from vmgraft.signing.keys import GENERATED_KINDS, generate

DOCS = Path(__file__).resolve().parents[2] / "docs"
KEYS = (DOCS / "keys.md").read_text()


def test_every_type_is_in_the_table():
    table = (DOCS / "signing.md").read_text().split("## Keys")[1].split("Each signs alone")[0]
    first = "".join(line.split("|")[1] for line in table.splitlines()[4:] if line.startswith("|"))
    assert re.findall(r"`(\w+)`", first) == list(GENERATED_KINDS)


def test_every_scheme_is_described():
    for scheme in ("file", "pkcs11", "exec", "awskms", "gcpkms", "azurekms", "hv"):
        assert f"`{scheme}:" in KEYS
        assert scheme == "file" or OTHER_SCHEMES.match(f"{scheme}:x")


def test_kinds_of_the_services():
    rows = re.findall(r"(?m)^\| `(\w+):[^|]*\| ([^|]*) \|", KEYS.split("## Key management services")[1])
    assert {scheme: tuple(re.findall(r"`(\w+)`", kinds)) for scheme, kinds in rows} == kms._KINDS


def test_attributes_of_tokens():
    table = KEYS.split("| attribute | |")[1].split("\n\n")[0]
    first = "".join(line.split("|")[1] for line in table.splitlines() if line.count("|") > 2)
    named = set(re.findall(r"`[?&]?([a-z-]+)`", first))
    assert named == {*pkcs11._TOKEN, *pkcs11._SLOT, *pkcs11._OBJECT, *pkcs11._QUERY}


def test_numbers():
    for number in (pkcs8.ROUNDS, pkcs8.FEW_ROUNDS, pkcs8.MAX_ROUNDS):
        assert f"{number:,}" in KEYS
    assert f"({execsigner.DEFAULT_TIMEOUT}, at most {execsigner.MAX_TIMEOUT})" in KEYS
    assert f"At most {MAX_SIGNATURE_BYTES} bytes" in KEYS


def test_members_of_the_json_form():
    members = keyinfo.KeyInfo("acme.pub", "public key", generate().public).to_dict()
    sentence = KEYS.split("`--json` prints `keys`")[1].split("\n\n")[0]
    assert re.findall(r"`(\w+)`", sentence) == list(members)
