"""One table of certificate chains and what OpenSSL, GnuTLS and we say of them; where we differ, the reason is given.

OpenSSL 3.0 checks paths and knows no purpose ``codeSigning``; GnuTLS checks that purpose too.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest
import signing_ca as ca
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID as Usage
from cryptography.x509.oid import NameOID

from vmgraft.errors import UntrustedSignerError
from vmgraft.signing.certificates import Authority, certify

WIDE = (-4000, 4000)  # GnuTLS judges by the clock
RSA_2048 = rsa.generate_private_key(public_exponent=65537, key_size=2048)
ENCIPHER = {"digital_signature": False, "key_encipherment": True}
Chain = tuple[ca.Entity, ...]  # leaf, intermediates, root


def issue(common: str, issuer: ca.Entity | None = None, **options: object) -> ca.Entity:
    return ca.issue(common, issuer, **({"days": WIDE} | options))


def authority(common: str = "I", issuer: ca.Entity | None = None, *extra: x509.ExtensionType, **options: object):
    constraints = tuple((one, isinstance(one, x509.NameConstraints)) for one in extra)
    return issue(common, issuer, ca=True, extra=constraints, **options)


ROOT = authority("Root")


def under(inter: ca.Entity, root: ca.Entity = ROOT, **leaf: object) -> Chain:
    return issue("Release", inter, **leaf), inter, root


def under_root(**options: object) -> Chain:
    root = authority("Root", **options)
    return under(authority("I", root), root)


def usages(*oids: x509.ObjectIdentifier) -> ca.Entity:
    return authority("I", ROOT, x509.ExtendedKeyUsage(oids))


def named(permitted: list[x509.GeneralName] | None, excluded: list[x509.GeneralName] | None, **leaf: object) -> Chain:
    return under(authority("I", ROOT, x509.NameConstraints(permitted, excluded)), **leaf)


def mail(text: str) -> tuple[x509.GeneralName, ...]:
    return (x509.RFC822Name(text),)


def link(text: str) -> tuple[x509.GeneralName, ...]:
    return (x509.UniformResourceIdentifier(text),)


def folder(organisation: str) -> x509.DirectoryName:
    pairs = ((NameOID.COUNTRY_NAME, "US"), (NameOID.ORGANIZATION_NAME, organisation))
    return x509.DirectoryName(x509.Name([x509.NameAttribute(oid, value) for oid, value in pairs]))


def mailbox_in_subject(mailbox: str, base: str) -> Chain:
    """A leaf without alternative names, and with an emailAddress in its subject."""
    inter = authority("I", ROOT, x509.NameConstraints([x509.RFC822Name(base)], None))
    good = issue("Release", inter)
    name = x509.Name([*good.cert.subject, x509.NameAttribute(NameOID.EMAIL_ADDRESS, mailbox)])
    builder = x509.CertificateBuilder(
        inter.cert.subject, name, good.key.public_key(), x509.random_serial_number(),
        good.cert.not_valid_before_utc, good.cert.not_valid_after_utc,
    )  # fmt: skip
    for extension in good.cert.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    return ca.Entity(builder.sign(inter.key, ca.hashes.SHA256()), good.key), inter, ROOT


def deep(length: int, root: ca.Entity = ROOT) -> Chain:
    chain: list[ca.Entity] = [root]
    for number in range(length):
        chain.insert(0, authority(f"I{number}", chain[0]))
    return issue("Release", chain[0]), *chain


def limited(path_length: int) -> Chain:
    return deep(2, authority("Root", path_length=path_length))


def critical(entity: ca.Entity | None) -> Chain:
    odd = ((x509.UnrecognizedExtension(x509.ObjectIdentifier("1.3.6.1.4.1.55555.1"), b"\x05\x00"), True),)
    if entity is None:
        return issue("Release", ROOT, extra=odd), ROOT
    return under(issue("I", ROOT, ca=True, extra=odd))


def twice_signed() -> Chain:
    """Two certificates of one intermediate, the first of them under a root that nobody trusts."""
    key = ec.generate_private_key(ec.SECP256R1())
    stranger = authority("Stranger")
    return issue("Release", authority("I", ROOT, key=key)), authority("I", stranger, key=key), authority(
        "I", ROOT, key=key
    ), ROOT  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A chain, and who takes it; ``why`` where we are alone."""

    chain: Callable[[], Chain]
    ours: bool
    openssl: bool
    gnutls: bool | None = None  #: None: the same as OpenSSL
    why: str = ""


def good(chain: Callable[[], Chain], *, why: str = "", gnutls: bool = True, openssl: bool = True) -> Case:
    return Case(chain, True, openssl, gnutls, why)


def bad(chain: Callable[[], Chain], *, openssl: bool = False, gnutls: bool = False, why: str = "") -> Case:
    return Case(chain, False, openssl, gnutls, why)


NO_PURPOSE = "OpenSSL 3.0 knows no codeSigning"
STRICT = "refused here, taken elsewhere"
NOT_LOOKED_AT = "GnuTLS does not apply constraints of this kind"
UNSUPPORTED = "constraints the library cannot apply are refused"
TABLE = {
    "under the root": good(lambda: (issue("Release", ROOT), ROOT)),
    "one intermediate": good(lambda: under(authority("I", ROOT))),
    "five intermediates": good(lambda: deep(5)),
    "seven intermediates": bad(lambda: deep(7), openssl=True, gnutls=True, why=STRICT),
    "cross-signed": good(twice_signed, openssl=False, gnutls=False, why="they follow the first certificate of a name"),
    "path length of the root kept": good(lambda: limited(2)),
    "path length of the root exceeded": bad(lambda: limited(1)),
    "path length 0 with an intermediate": bad(lambda: limited(0)),
    "intermediate for codeSigning": good(lambda: under(usages(Usage.CODE_SIGNING))),
    "intermediate for any purpose": good(
        lambda: under(usages(Usage.ANY_EXTENDED_KEY_USAGE)), gnutls=False, why="RFC 5280, 4.2.1.12 allows it"
    ),
    "intermediate for TLS clients": bad(lambda: under(usages(Usage.CLIENT_AUTH)), openssl=True, why=NO_PURPOSE),
    "intermediate for time stamping": bad(lambda: under(usages(Usage.TIME_STAMPING)), openssl=True, why=NO_PURPOSE),
    "leaf for codeSigning and more": good(
        lambda: (issue("R", ROOT, usages=(Usage.CLIENT_AUTH, Usage.CODE_SIGNING)), ROOT)
    ),
    "leaf for TLS servers": bad(
        lambda: (issue("R", ROOT, usages=(Usage.SERVER_AUTH,)), ROOT), openssl=True, why=NO_PURPOSE
    ),
    "leaf for any purpose": bad(
        lambda: (issue("R", ROOT, usages=(Usage.ANY_EXTENDED_KEY_USAGE,)), ROOT), openssl=True, gnutls=True, why=STRICT
    ),
    "leaf without purpose": bad(lambda: (issue("R", ROOT, usages=None), ROOT), openssl=True, gnutls=True, why=STRICT),
    "leaf may not sign": bad(
        lambda: (issue("R", ROOT, usage=ENCIPHER), ROOT), openssl=True, gnutls=True, why=STRICT
    ),
    "leaf is an authority": bad(lambda: (authority("R", ROOT), ROOT), openssl=True, gnutls=True, why=STRICT),
    "leaf is trusted itself": bad(lambda: (issue("R"),) * 2, openssl=True, why=STRICT),
    "intermediate is no authority": bad(lambda: under(issue("I", ROOT))),
    "intermediate without basic constraints": bad(lambda: under(issue("I", ROOT, basic=False))),
    "intermediate may not certify": bad(lambda: under(authority("I", ROOT, usage={"key_cert_sign": False}))),
    "intermediate missing": bad(lambda: (issue("Release", authority("I", ROOT)), ROOT)),
    "intermediate by another root": bad(lambda: under(authority("I", authority("Root")))),
    "intermediate expired": bad(lambda: under(authority("I", ROOT, days=(-300, -200)))),
    "intermediate not yet valid": bad(lambda: under(authority("I", ROOT, days=(3000, 4000)))),
    "leaf expired": bad(lambda: (issue("R", ROOT, days=(-300, -200)), ROOT)),
    "leaf not yet valid": bad(lambda: (issue("R", ROOT, days=(3000, 4000)), ROOT)),
    "root expired": bad(lambda: under_root(days=(-300, -200))),
    "RSA 2048 leaf": bad(lambda: (issue("R", ROOT, key=RSA_2048), ROOT), openssl=True, gnutls=True, why=STRICT),
    "RSA 2048 intermediate": bad(
        lambda: under(authority("I", ROOT, key=RSA_2048)), openssl=True, gnutls=True, why=STRICT
    ),
    "RSA 2048 root": bad(
        lambda: under_root(key=RSA_2048),
        openssl=True, gnutls=True, why=STRICT,
    ),
    "unknown critical extension of the leaf": bad(lambda: critical(None)),
    "unknown critical extension of the intermediate": bad(lambda: critical(ROOT)),
    "mailbox permitted": good(lambda: named(list(mail("acme.example")), None, names=mail("a@acme.example"))),
    "mailbox not permitted": bad(lambda: named(list(mail("acme.example")), None, names=mail("a@evil.example"))),
    "mailbox of a longer host": bad(lambda: named(list(mail("acme.example")), None, names=mail("a@x.acme.example"))),
    "mailbox excluded": bad(lambda: named(None, list(mail("evil.example")), names=mail("a@evil.example"))),
    "mailbox in the subject permitted": good(lambda: mailbox_in_subject("a@acme.example", "acme.example")),
    "mailbox in the subject not permitted": bad(
        lambda: mailbox_in_subject("a@evil.example", "acme.example")
    ),
    "DNS name permitted": good(
        lambda: named([x509.DNSName("acme.example")], None, names=(x509.DNSName("a.acme.example"),))
    ),
    "DNS name that only ends alike": bad(
        lambda: named([x509.DNSName("acme.example")], None, names=(x509.DNSName("evilacme.example"),))
    ),
    "constraint on links kept": bad(
        lambda: named(list(link("acme.example")), None, names=link("https://acme.example/x")),
        openssl=True, gnutls=True, why=UNSUPPORTED,
    ),
    "constraint on links broken": bad(
        lambda: named(list(link("acme.example")), None, names=link("https://evil.example/x")),
        gnutls=True, why=NOT_LOOKED_AT,
    ),
    "constraint on directory names kept": bad(
        lambda: named([folder("Acme")], None), openssl=True, gnutls=True, why=UNSUPPORTED
    ),
    "constraint on directory names broken": bad(
        lambda: named([folder("Other")], None), gnutls=True, why=NOT_LOOKED_AT
    ),
    "directory name excluded": bad(lambda: named(None, [folder("Acme")])),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_table(tmp_path: Path, name: str) -> None:
    case = TABLE[name]
    chain = case.chain()
    said = (_ours(chain), _openssl(tmp_path, chain), _gnutls(tmp_path, chain))
    assert said == (case.ours, case.openssl, case.gnutls)
    assert bool(case.why) is (len(set(said)) > 1), "a difference has a reason"


@pytest.mark.parametrize("kind", ["dns", "folder", "mailbox"])
def test_name_constraints_hold_where_they_are_not_critical(kind: str) -> None:
    """RFC 5280 has them critical always; one that is not is no invitation."""
    constraint = {"dns": x509.DNSName("acme.example"), "folder": folder("Other"), "mailbox": mail("acme.example")[0]}
    extension = x509.NameConstraints([constraint[kind]], None)
    inter = issue("I", ROOT, ca=True, extra=((extension, False),))
    names = (x509.DNSName("evil.example"), x509.RFC822Name("a@evil.example"))
    assert not _ours(under(inter, names=names))


def test_the_table_is_large() -> None:
    assert len(TABLE) >= 45 and sum(case.ours for case in TABLE.values()) >= 10


def _ours(chain: Chain) -> bool:
    trust = Authority("acme", (chain[-1].der,))
    now = datetime.now(UTC)
    try:
        found = certify([entity.der for entity in chain[:-1]], [trust], at=now, now=now)
    except UntrustedSignerError:
        return False
    return found.expired is None


def _openssl(tmp_path: Path, chain: Chain) -> bool:
    (tmp_path / "root.pem").write_bytes(chain[-1].pem)
    (tmp_path / "rest.pem").write_bytes(b"".join(entity.pem for entity in chain[1:]))
    (tmp_path / "leaf.pem").write_bytes(chain[0].pem)
    command = ["openssl", "verify", "-x509_strict", "-trusted", "root.pem", "-untrusted", "rest.pem", "leaf.pem"]
    return subprocess.run(command, cwd=tmp_path, check=False, capture_output=True).returncode == 0


def _gnutls(tmp_path: Path, chain: Chain) -> bool:
    (tmp_path / "root.pem").write_bytes(chain[-1].pem)
    (tmp_path / "chain.pem").write_bytes(b"".join(entity.pem for entity in chain[:-1]))
    command = [
        "certtool", "--verify", "--load-ca-certificate", "root.pem", "--infile", "chain.pem",
        "--verify-purpose", Usage.CODE_SIGNING.dotted_string,
    ]  # fmt: skip
    return subprocess.run(command, cwd=tmp_path, check=False, capture_output=True).returncode == 0


# --- chains that openssl made


def openssl_chain(folder: Path, digest: str) -> tuple[bytes, bytes]:
    """A root and a leaf by ``openssl``, the leaf signed with a digest; in DER."""
    (folder / "ca.cnf").write_text(
        "[req]\ndistinguished_name=dn\n[dn]\n[root]\nbasicConstraints=critical,CA:true\nsubjectKeyIdentifier=hash\n"
        "keyUsage=critical,keyCertSign,cRLSign\n"
        "[leaf]\nbasicConstraints=critical,CA:false\nkeyUsage=critical,digitalSignature\nextendedKeyUsage=codeSigning\n"
        "subjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\n"
    )
    new = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-config", "ca.cnf"]
    for command in (
        ["req", "-x509", *new, "-keyout", "r.key", "-out", "r.pem", "-subj", "/O=Acme/CN=Root", "-extensions", "root"],
        ["req", *new, "-keyout", "l.key", "-out", "l.csr", "-subj", "/C=US/O=Acme/CN=Release"],
        ["x509", "-req", "-in", "l.csr", "-CA", "r.pem", "-CAkey", "r.key", "-CAcreateserial", "-out", "l.pem",
         f"-{digest}", "-extfile", "ca.cnf", "-extensions", "leaf"],
    ):  # fmt: skip
        subprocess.run(["openssl", *command], cwd=folder, check=True, capture_output=True)
    pem = [x509.load_pem_x509_certificate((folder / name).read_bytes()) for name in ("r.pem", "l.pem")]
    return pem[0].public_bytes(Encoding.DER), pem[1].public_bytes(Encoding.DER)


@pytest.mark.parametrize(("digest", "taken"), [("sha256", True), ("sha512", True), ("sha1", False)])
def test_what_openssl_issued(tmp_path: Path, digest: str, taken: bool) -> None:
    root, leaf = openssl_chain(tmp_path, digest)
    now = datetime.now(UTC)
    if taken:
        found = certify([leaf], [Authority("acme", (root,))], at=now, now=now)
        assert found.name == "CN=Release,O=Acme,C=US" and found.expired is None
    else:
        with pytest.raises(UntrustedSignerError):
            certify([leaf], [Authority("acme", (root,))], at=now, now=now)


def test_reasons_are_sentences() -> None:
    """What the library says of its own structures is not passed on."""
    for name in ("intermediate for TLS clients", "unknown critical extension of the leaf", "mailbox not permitted"):
        chain = TABLE[name].chain()
        with pytest.raises(UntrustedSignerError) as caught:
            certify([one.der for one in chain[:-1]], [Authority("a", (chain[-1].der,))], at=ca.NOW, now=ca.NOW)
        assert "<Certificate" not in caught.value.message and "ValueError" not in caught.value.message
        assert "candidates exhausted" not in caught.value.message and len(caught.value.message) < 400
