"""``vmgraft policy``, in this process."""

from __future__ import annotations

import json
import subprocess
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import pytest

from vmgraft.cli.app import run

CLOCK = str(Path(__file__).resolve().parents[2] / "examples" / "clock")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two keys, a signed image, and a certificate authority made by openssl."""
    folder = tmp_path_factory.mktemp("policy")
    for name in ("vendor", "admin"):
        ok(folder, "keygen", name, "--no-passphrase")
    (folder / "disk.img").write_bytes(bytes(1 << 16))
    ok(folder, "attach", "disk.img", CLOCK, "--key", "vendor.key", "--placement", "sidecar")
    make = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "400",
        "-subj",
    ]
    openssl(folder, *make, "/C=US/O=Acme/CN=Root", "-keyout", "root.key", "-out", "root.pem")
    (folder / "ca.cnf").write_text(
        "[ca]\ndefault_ca=d\n[d]\ndatabase=index.txt\ndefault_md=sha256\ndefault_crl_days=60\ncrlnumber=number\n"
    )
    (folder / "index.txt").touch()
    (folder / "number").write_text("01\n")
    openssl(folder, "openssl", "ca", "-config", "ca.cnf", "-gencrl", "-keyfile", "root.key", "-cert", "root.pem",
            "-out", "root.crl")  # fmt: skip
    return folder


def openssl(folder: Path, *command: str) -> None:
    subprocess.run(command, cwd=folder, check=True, capture_output=True)


@dataclass
class Done:
    stdout: str
    stderr: str


def call(folder: Path, *args: str, code: int = 0) -> Done:
    out, err = StringIO(), StringIO()
    with chdir(folder), redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
        run(list(args))
    assert ended.value.code == code, err.getvalue()
    return Done(out.getvalue(), err.getvalue())


def ok(folder: Path, *args: str) -> Done:
    return call(folder, *args)


def test_init_check_sign_explain(place: Path) -> None:
    ok(place, "policy", "init", "--trust", "vendor.pub", "-o", "bare.json")
    found = json.loads(call(place, "policy", "explain", "disk.img", "--policy", "bare.json", "--json", code=17).stdout)
    assert (found["ok"], found["exitCode"], found["error"]["field"]) == (False, 17, "capabilities")
    (edit,) = next(check for check in found["checks"] if check["name"] == "capabilities")["remedies"][0]["edits"]
    document = json.loads((place / "bare.json").read_text())
    document["trustPolicies"][0]["grants"][edit["path"].rpartition("/")[2]] = edit["value"]
    (place / "full.json").write_text(json.dumps(document))
    shown = ok(place, "policy", "explain", "disk.img", "--policy", "full.json").stdout
    assert "trusted" in shown and "would pass" not in shown
    shown = call(place, "policy", "explain", "disk.img", "--policy", "bare.json", code=17).stdout
    assert "capabilities would pass by any of:" in shown and '{"op": "add"' in shown
    assert "together" not in shown and "note:" not in shown
    bare = json.loads((place / "bare.json").read_text())
    extension = edit["path"].rpartition("/")[2]
    bare["trustPolicies"][0] |= {"minSecurityVersion": {extension: 9}, "rollbackState": "required"}
    (place / "steps.json").write_text(json.dumps(bare))
    shown = call(place, "policy", "explain", "disk.img", "--policy", "steps.json", code=16).stdout
    assert "rollback takes several of these together:\n  - name the rollback memory of this host: --state\n" in shown

    ok(place, "policy", "sign", "full.json", "--key", "admin.key", "-o", "full.dsse")
    checked = ok(place, "policy", "check", "full.dsse", "--policy-key", "admin.pub", "--against", CLOCK, "--json")
    assert len(json.loads(checked.stdout)["signedBy"]) == 1
    ok(place, "policy", "explain", "disk.img", "--policy", "full.dsse", "--policy-key", "admin.pub")
    ok(place, "policy", "sign", "bare.json", "--key", "admin.key", "-o", "bare.dsse")
    signed = ("policy", "explain", "disk.img", "--policy", "bare.dsse", "--policy-key", "admin.pub")
    assert "note: this policy is signed, by SHA256:" in call(place, *signed, code=17).stdout
    (note,) = json.loads(call(place, *signed, "--json", code=17).stdout)["notes"]
    assert "raise its policyVersion above 1, and sign it anew (vmgraft policy sign)" in note
    for policy, more in (
        ("full.dsse", ["--policy-key", "vendor.pub"]),
        ("full.dsse", []),
        ("full.json", ["--policy-key", "admin.pub"]),
        ("full.json", ["--require-signed-policy"]),
    ):
        call(place, "policy", "explain", "disk.img", "--policy", policy, *more, code=18)


def test_init_with_authorities(place: Path) -> None:
    identity = "x509.subject: C=US, O=Acme, CN=Release"
    ok(place, "policy", "init", "--ca", "acme=root.pem", "--crl", "acme=root.crl", "--identity", identity,
       "--tsa", "root.pem", "-o", "ca.json")  # fmt: skip
    document = json.loads((place / "ca.json").read_text())
    assert [store["name"] for store in document["trustStores"]] == ["acme", "root"]
    assert document["trustStores"][0]["requireCrls"] is True
    entry = document["trustPolicies"][0]
    assert entry["trustStores"] == ["ca:acme", "tsa:root"] and entry["trustedIdentities"] == [identity]
    assert entry["signatures"]["anyOf"]["of"] == ["ca:acme"]
    assert "valid" in ok(place, "policy", "check", "ca.json").stdout
    openssl(place, "openssl", "x509", "-in", "root.pem", "-outform", "DER", "-out", "root.der")
    ok(place, "policy", "init", "--ca", "root.der", "--identity", "*", "-o", "der.json")
    assert 'trustedIdentities is "*"' in ok(place, "policy", "check", "der.json").stdout


def test_development_authorities_are_marked_when_a_policy_is_made(place: Path) -> None:
    if not (place / "dev").exists():
        ok(place, "dev-ca", "dev")
    done = ok(place, "policy", "init", "--ca", "dev=dev/root.pem", "--identity", "*", "-o", "try.json")
    assert "warning: ca:dev holds a development authority: anybody may hold its keys\n" in done.stderr
    assert "ca:dev holds a development authority" in ok(place, "policy", "check", "try.json").stdout
    done = ok(place, "policy", "init", "--ca", "root.pem", "--identity", "*", "-o", "real.json")
    assert "warning" not in done.stderr


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["--ca", "root.pem"],
        ["--trust", "vendor.pub", "--identity", "x509.subject: CN=x"],
        ["--ca", "root.pem", "--identity", "Release"],
        ["--ca", "root.pem", "--ca", "other/root.pem", "--identity", "*"],
        ["--ca", "acme=root.pem", "--crl", "root.crl", "--identity", "*"],
        ["--ca", "root.crl", "--identity", "*"],
    ],
)
def test_init_refuses_what_makes_no_policy(place: Path, args: list[str]) -> None:
    done = call(place, "policy", "init", *args, "-o", "never.json", code=2)
    assert "Traceback" not in done.stderr and not (place / "never.json").exists()


def test_import_notary(place: Path) -> None:
    store = place / "truststore" / "x509" / "ca" / "acme"
    store.mkdir(parents=True)
    (store / "root.pem").write_bytes((place / "root.pem").read_bytes())
    entry = {
        "name": "acme", "registryScopes": ["reg.example/app"], "signatureVerification": {"level": "strict"},
        "trustStores": ["ca:acme"], "trustedIdentities": ["x509.subject: C=US, O=Acme, CN=Release"],
    }  # fmt: skip
    (place / "trustpolicy.json").write_text(json.dumps({"version": "1.0", "trustPolicies": [entry]}))
    start = ("policy", "import-notary", "trustpolicy.json", "--trust-store", "truststore", "-o")
    crl = ("--crl", "acme=root.crl")
    assert "trustStores" in call(place, *start, "no.json", code=3).stderr
    assert "registryScopes" in call(place, *start, "no.json", *crl, code=3).stderr
    assert not (place / "no.json").exists()
    call(place, *start, "no.json", *crl, "--scope", "reg.example/app", code=2)
    ok(place, *start, "notary.json", *crl, "--scope", "reg.example/app=name:app-*")
    assert "grants nothing" in ok(place, "policy", "check", "notary.json").stdout
    ok(place, "dev-ca", "notary-dev")
    (store / "root.pem").write_bytes((place / "notary-dev" / "root.pem").read_bytes())
    crl = ("--crl", "acme=notary-dev/crls.pem")
    done = ok(place, *start, "notary-dev.json", *crl, "--scope", "reg.example/app=name:app-*")
    assert "warning: ca:acme holds a development authority" in done.stderr
