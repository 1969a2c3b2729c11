"""Turns one row of verdicts.json into a graft, a policy, a memory and a time, and asks the verifier.

What the words of the table mean is written down at the functions here; docs/policy.md says what the checks do.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

import signing_ca as ca
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from verdict_stamps import Stamps

from vmgraft.cli.exitcodes import exit_code
from vmgraft.errors import FileError, VmgraftError
from vmgraft.signing.contract import Report, Status
from vmgraft.signing.dsse import Envelope, Signature, pae, parse_envelope, serialise
from vmgraft.signing.keys import PrivateKey, private_from_pem
from vmgraft.signing.material import Material, pack_material
from vmgraft.signing.policy import PolicyTrust, load_policy
from vmgraft.signing.policysign import sign_policy
from vmgraft.signing.policytools import format_policy
from vmgraft.signing.verify import verify_evidence
from vmgraft.signing.vsa import SummaryDemand, build_summary, sign_summary

TABLE: dict[str, Any] = json.loads(Path(__file__).with_name("verdicts.json").read_text("utf-8"))
#: What stands under ``failed`` where the policy file itself is refused, before any check.
POLICY_FILE = "policy file"
#: And where an auditor's summary is refused.
SUMMARY_FILE = "summary"


@dataclass(frozen=True)
class Verdict:
    """What came out: the exit code, the checks that failed and that only warn, and what was said."""

    exit: int
    failed: list[str]
    warned: list[str]
    said: str
    signers: tuple[str, ...] = ()


# --- certificates --------------------------------------------------------------------------------------------------


@cache
def entities() -> dict[str, ca.Entity]:
    """The certificates that the table names, each bent in one way."""
    root = ca.issue("Root", ca=True, days=(-2000, 4000))
    inter = ca.issue("Intermediate", root, ca=True, path_length=0, days=(-1000, 2000))
    deep = ca.issue("Below", inter, ca=True, days=(-1000, 2000))
    other = ca.issue("Root", ca=True, organisation="Other", days=(-2000, 4000))
    impostor = ca.issue("Root", ca=True, days=(-2000, 4000))
    past = ca.issue("Past", root, ca=True, days=(-400, -20))
    acme_only = x509.NameConstraints([x509.DNSName("acme.example")], None)
    narrow = ca.issue("Narrow", root, ca=True, extra=((acme_only, True),), days=(-1000, 2000))
    dev = ca.issue("Try", ca=True, organisation="DEVELOPMENT ONLY (vmgraft dev-ca)", days=(-2000, 4000))
    mail = (x509.RFC822Name("release@acme.example"), x509.UniformResourceIdentifier("https://acme.example/release"))
    leaf = ca.issue("Release", inter, names=mail, days=(-100, 1500))
    maze = {
        f"maze-{n}": ca.issue("Root", impostor, ca=True, key=impostor.key, days=(-2000 + n, 4000)) for n in range(7)
    }
    return maze | {
        "root": root, "inter": inter, "deep": deep, "other": other, "impostor": impostor, "past": past,
        "narrow": narrow, "dev": dev, "leaf": leaf,
        "leaf-again": ca.issue("Release", inter, names=mail, key=leaf.key, days=(-50, 1500)),
        "leaf-second": ca.issue("Release", inter, names=mail, days=(-100, 1500)),
        "leaf-other": ca.issue("Release", other, names=mail, days=(-100, 1500)),
        "leaf-other-same-key": ca.issue("Release", other, names=mail, key=leaf.key, days=(-100, 1500)),
        "leaf-impostor": ca.issue("Release", impostor, names=mail, days=(-100, 1500)),
        "leaf-dev": ca.issue("Release", dev, names=mail, days=(-100, 1500)),
        "leaf-expired": ca.issue("Release", inter, names=mail, days=(-100, -5)),
        "leaf-early": ca.issue("Release", inter, names=mail, days=(5, 100)),
        "leaf-intern": ca.issue("Intern", inter, names=(x509.RFC822Name("intern@acme.example"),), days=(-100, 1500)),
        "leaf-server": ca.issue("Release", inter, usages=(x509.ExtendedKeyUsageOID.SERVER_AUTH,), days=(-100, 1500)),
        "leaf-no-usage": ca.issue("Release", inter, usages=None, days=(-100, 1500)),
        "leaf-encipher": ca.issue("Release", inter, usage={"digital_signature": False}, days=(-100, 1500)),
        "leaf-of-past": ca.issue("Release", past, days=(-100, 1500)),
        "leaf-too-deep": ca.issue("Release", deep, days=(-100, 1500)),
        "leaf-outside": ca.issue("Release", narrow, names=(x509.DNSName("evil.example"),), days=(-100, 1500)),
        "leaf-inside": ca.issue("Release", narrow, names=(x509.DNSName("a.acme.example"),), days=(-100, 1500)),
        "leaf-soon": ca.issue("Release", inter, names=mail, days=(-100, 10)),
    }  # fmt: skip


@cache
def crls() -> dict[str, bytes]:
    """The revocation lists that the table names."""
    known = entities()
    root, inter = known["root"], known["inter"]
    return {
        "root": ca.crl(root), "inter": ca.crl(inter),
        "inter-revoked": ca.crl(root, inter), "leaf-revoked": ca.crl(inter, known["leaf"]),
        "inter-stale": ca.crl(inter, days=(-60, -1)), "root-stale": ca.crl(root, days=(-60, -1)),
        "inter-future": ca.crl(inter, days=(1, 60)),
        "inter-forged": ca.crl(inter, key=known["other"].key),
        "leaf-again-revoked": ca.crl(inter, known["leaf-again"]),
    }  # fmt: skip


def _pem(label: str, blobs: Sequence[bytes]) -> str:
    blocks = [base64.encodebytes(blob).decode() for blob in blobs]
    return "".join(f"-----BEGIN {label}-----\n{block}-----END {label}-----\n" for block in blocks)


def _wrapped(entity: ca.Entity) -> PrivateKey:
    return private_from_pem(entity.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), None)


# --- one row -------------------------------------------------------------------------------------------------------


class Memory:
    """``{"default com.acme.clock": 3}``; the word ``unreadable`` in its place cannot answer."""

    def __init__(self, seen: Mapping[str, int] | str) -> None:
        self.seen = seen

    def highest(self, policy: str, extension: str) -> int | None:
        if isinstance(self.seen, str):
            raise FileError("the state cannot be read", file="state.db")
        return self.seen.get(f"{policy} {extension}")

    def policy_version(self, signer: str) -> int | None:
        if isinstance(self.seen, str):
            raise FileError("the state cannot be read", file="state.db")
        return self.seen.get("policy")


class World:
    """What all rows share: the keys of the simulator, and where policies are written."""

    def __init__(self, sim: Any, evidence_type: Any, folder: Path, stamp: Stamps) -> None:
        self.sim = sim
        self.evidence_type = evidence_type
        self.folder = folder
        self.stamp = stamp
        self.made: dict[str, bytes] = {}

    def judge(self, row: Mapping[str, Any]) -> Verdict:
        """Return what the verifier says about a row."""
        evidence, names = self.graft(row.get("graft", {}))
        memory = Memory(row["memory"]) if "memory" in row else None
        try:
            policy = self.policy(row.get("policy", {}), names, memory)
        except VmgraftError as exc:
            return Verdict(exit_code(exc.code), [POLICY_FILE], [], f"{exc} {exc.hint}")
        if "summary" in row:
            return self.rely(row["summary"], row, policy, evidence)
        options = {"image_name": row.get("image", "acme-1.qcow2"), "now": self.time(row.get("at", "+0d"))}
        report = verify_evidence(evidence, policy, memory=memory, check_content=row.get("reads", True), **options)
        return self.verdict(report)

    def rely(self, words: Mapping[str, Any], row: Mapping[str, Any], policy: Any, evidence: Any) -> Verdict:
        """Let an auditor (``by``) judge what it is given (``policy``, ``graft``, ``at``), and rely on what it says."""
        seen, names = self.graft(words.get("graft", row.get("graft", {})))
        theirs = self.policy(words["policy"], names, None) if "policy" in words else policy
        when = self.time(words.get("at", "+0d"))
        report = verify_evidence(seen, theirs, image_name="acme-1.qcow2", now=when)
        statement = parse_envelope(seen.stored[0]).payload
        found = build_summary(
            report, theirs, seen.names, statement=statement, verifier="https://audit.example/", now=when
        )
        data = sign_summary(found, self.key(words["by"]))
        if words.get("instead"):  # the auditor's signature over something else
            data = seen.stored[0]
        trusted = tuple(self.key(name).public for name in words.get("trusted", ()))
        demand = SummaryDemand(data, trusted, file="summary.json")
        try:
            demand.accept(policy, parse_envelope(evidence.stored[0]).payload, self.time(row.get("at", "+0d")))
        except VmgraftError as exc:
            return Verdict(exit_code(exc.code), [SUMMARY_FILE], [], f"{exc} {exc.hint}")
        return Verdict(0, [], [], "")

    def verdict(self, report: Report) -> Verdict:
        code = exit_code(report.error)
        if report.ok is not (code == 0):
            raise AssertionError("a report must not contradict itself")
        by = {status: [check.name for check in report.checks if check.status is status] for status in Status}
        said = " | ".join([check.detail for check in report.checks] + list(report.warnings))
        return Verdict(code, by[Status.FAIL], by[Status.WARN], said, report.signers)

    def time(self, text: str) -> datetime:
        """``+30d``, ``-2h`` or ``+4m``: so long after or before the moment of the simulator."""
        number, unit = re.fullmatch(r"([+-]\d+)([dhm])", text).groups()
        return self.sim.now + timedelta(**{{"d": "days", "h": "hours", "m": "minutes"}[unit]: int(number)})

    def key(self, name: str) -> PrivateKey:
        """A key of the simulator, or that of a certificate."""
        return self.sim.keys[name] if name in self.sim.keys else _wrapped(entities()[name])

    # --- the graft

    def graft(self, words: Mapping[str, Any]) -> tuple[Any, dict[str, str]]:
        """Make what an image would hand over, and the digests that a policy may name."""
        manifests = [self.sim.manifest(**item) for item in words.get("extensions", [{}])]
        options = {"binding": words.get("binding", "image"), "created": self.time(words.get("created", "-1d"))}
        expires = words.get("expires", "+30d")
        options["expires"] = None if expires is None else self.time(expires)
        statement, payloads = self.sim.statement(manifests, **options)
        if "statement" in words:
            document = json.loads(statement)
            for path, value in words["statement"].items():
                _bend(document, path, value)
            statement = json.dumps(document).encode()
        statement = words.get("raw", "").encode() or statement
        signatures = [self.signature(statement, item) for item in words.get("signatures", ["vendor"])]
        evidence = self.evidence_type([serialise(Envelope(statement, tuple(signatures)))], payloads)
        self.damage(evidence, words.get("damage"))
        names = {"statement": hashlib.sha256(statement).hexdigest(), "tree": evidence.names.tree_digest.hex()}
        names |= {"manifest" if data.startswith(b"{") else "module": digest for digest, data in payloads.items()}
        return evidence, names

    def signature(self, statement: bytes, words: str | Mapping[str, Any]) -> Signature:
        """Sign: the name of a key, or ``by``, ``keyid`` (a text, or ``of:NAME``), ``over``, ``chain``, ``stamps``.

        With ``copy``, it is the very signature that this key has made before; ``behind`` is hex that follows it.
        """
        words = {"by": words} if isinstance(words, str) else words
        key = self.key(words["by"])
        message = pae("application/vnd.in-toto+json", words["over"].encode() if "over" in words else statement)
        sig, keyid = self.made[words["by"]] if words.get("copy") else key.sign(message), words.get("keyid", key.keyid)
        self.made[words["by"]] = sig
        sig += bytes.fromhex(words.get("behind", ""))
        if keyid.startswith("of:"):
            keyid = self.key(keyid[3:]).keyid
        chain = tuple(entities()[name].der for name in words.get("chain", ()))
        if words.get("bad certificate"):
            chain = (chain[0][:-1], *chain[1:])
        stamps = tuple(
            self.stamp(b"another" if "other" in stamp else sig, self.time(stamp["at"]), stamp.get("by", "tsa"))
            for stamp in words.get("stamps", ())
        )
        extension = words.get("extension", pack_material(Material(chain, stamps)))
        return Signature(keyid, sig, extension)

    def damage(self, evidence: Any, what: str | None) -> None:
        """Break the graft, behind its signer's back."""
        match what:
            case None:
                return
            case "record":
                evidence.problem = "the section table is cut"
            case "no envelope":
                evidence.stored = []
            case "two envelopes":
                evidence.stored = evidence.stored * 2
            case "envelope":
                evidence.stored = [b"{" + evidence.stored[0]]
            case "signature":
                document = json.loads(evidence.stored[0])
                text = document["signatures"][0]["sig"]
                document["signatures"][0]["sig"] = ("A" if text[20] != "A" else "B").join([text[:20], text[21:]])
                evidence.stored = [json.dumps(document).encode()]
            case "no signatures":
                evidence.stored = [json.dumps(json.loads(evidence.stored[0]) | {"signatures": []}).encode()]
            case "payload type":
                evidence.stored = [evidence.stored[0].replace(b"in-toto+json", b"in-toto+xml")]
            case "module" | "manifest":
                chosen = [d for d, data in evidence.payloads.items() if data.startswith(b"{") is (what == "manifest")]
                evidence.payloads |= dict.fromkeys(chosen, b"something else")
            case "payloads missing":
                evidence.payloads.clear()
            case "content tree":
                evidence.names = replace(evidence.names, root_hash=bytes(32))
            case "content size":
                evidence.names = replace(evidence.names, virtual_size=512)
            case "content hash":
                evidence.names = replace(evidence.names, flat=bytes(32))
            case _:
                raise AssertionError(what)

    # --- the policy

    def policy(self, words: str | Mapping[str, Any], names: Mapping[str, str], memory: Memory | None) -> Any:
        """Make and load the policy: ``is`` names one of ``policies``, ``entry`` replaces members of its first entry."""
        words = {"is": words} if isinstance(words, str) else words
        base = TABLE["policies"].get(words.get("is", ""), {})
        keys = words.get("keys", base.get("keys", ["vendor"]))
        manifests = [self.sim.manifest(**item) for item in words.get("grants", [{}])]
        document = self.sim.policy_document(*keys, manifests=manifests)
        first = document["trustPolicies"][0] | {"minSecurityVersion": {}}
        first |= base.get("entry", {}) | words.get("entry", {})
        document["trustPolicies"] = [first, *(first | more for more in words.get("more", []))]
        document |= base.get("top", {}) | words.get("top", {})
        if "expires" in words:
            document["expires"] = self.time(words["expires"]).strftime("%Y-%m-%dT%H:%M:%SZ")
        stores = words.get("stores", base.get("stores", []))
        if stores:
            document["trustStores"] = [self.store(store) for store in stores]
        text = format_policy(document).decode()
        text = re.sub(r"\$\{(\w+)\}", lambda match: names[match[1]], text)
        text = re.sub(r"\$\{keyid:([\w-]+)\}", lambda match: self.key(match[1]).keyid, text)
        return self.load(text.encode(), words, memory)

    def store(self, words: Mapping[str, Any]) -> dict[str, Any]:
        """``{"name", "type", "roots": [certificate], "crls": [list], "requireCrls"}``."""
        clock = words["type"] == "tsa"
        roots = [self.stamp.root(name) if clock else entities()[name].der for name in words["roots"]]
        store: dict[str, Any] = {"name": words["name"], "type": words["type"]}
        store["certificates"] = _pem("CERTIFICATE", roots)
        if "crls" in words:
            store["crls"] = _pem("X509 CRL", [crls()[name] for name in words["crls"]])
        return store | ({"requireCrls": words["requireCrls"]} if "requireCrls" in words else {})

    def load(self, data: bytes, words: Mapping[str, Any], memory: Memory | None) -> Any:
        """Sign the policy by ``signed by`` where asked, and load it as a host does that trusts ``policy keys``."""
        if "signed by" in words:
            data = sign_policy(data, [self.key(name) for name in words["signed by"]])
        if words.get("tampered"):
            data = data.replace(b'"payload":"', b'"payload":"ICAg', 1)
        path = self.folder / "policy.json"
        path.write_bytes(data)
        trusted = tuple(self.key(name).public for name in words.get("policy keys", ()))
        return load_policy(path, PolicyTrust(trusted, words.get("signature required", False), memory))


def _bend(document: dict[str, Any], path: str, value: Any) -> None:
    """Set the member at a path like ``predicate.extensions.0.abi``; null takes it away, ``+`` appends."""
    *steps, last = path.split(".")
    node: Any = document
    for step in steps:
        node = node[int(step)] if isinstance(node, list) else node[step]
    if last == "+":
        node.append(value)
    elif value is None:
        del node[int(last) if isinstance(node, list) else last]
    else:
        node[int(last) if isinstance(node, list) else last] = value
