"""Signing in two parts: openssl signs what `payload` wrote, and nothing that differs from it gets in."""

import base64
import dataclasses
import json
import os
import subprocess
from datetime import UTC, datetime, timedelta
from hashlib import sha256

import pytest
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from vendor_testkit import carried, files_of, package, run, verifies

from vmgraft.errors import (
    BadSignatureError,
    ContentMismatchError,
    ExpiredError,
    FileError,
    GraftFormatError,
    NoGraftError,
    PayloadMismatchError,
    UntrustedSignerError,
    UsageError,
)
from vmgraft.imagefmt.contract import Placement
from vmgraft.signing.dsse import pae, parse_envelope
from vmgraft.signing.keyfiles import load_public
from vmgraft.signing.keys import generate
from vmgraft.vendor import ceremony
from vmgraft.vendor.ceremony import CeremonyOptions, Offered, attach_signatures, write_carried_payload, write_payload
from vmgraft.vendor.graft import AttachOptions, attach, detach

PLAIN = CeremonyOptions()
TOKEN_IDS = {"p256": "01", "p384": "02", "rsa": "03"}
_SOFTHSM = "/usr/lib/softhsm/libsofthsm2.so"
KINDS = {
    "p256": ["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"],
    "p384": ["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-384"],
    "ed25519": ["-algorithm", "ED25519"],
    "rsa": ["-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:3072"],
}


@pytest.fixture(scope="session")
def signers(tmp_path_factory):
    """A key of each kind, made by openssl; nothing here ever reads the private halves."""
    folder = tmp_path_factory.mktemp("elsewhere")
    for kind, options in KINDS.items():
        run("openssl", "genpkey", *options, "-out", folder / f"{kind}.key")
        run("openssl", "pkey", "-in", folder / f"{kind}.key", "-pubout", "-out", folder / f"{kind}.pub")
    return folder


def sign_elsewhere(signers, kind, folder, name="payload.pae"):
    """The lines of the README, word for word."""
    readme = (folder / "README.txt").read_text()
    label = {"p256": "ECDSA P-256", "rsa": "ECDSA P-256", "p384": "ECDSA P-384", "ed25519": "Ed25519"}[kind]
    (line,) = [line for line in readme.splitlines() if line.startswith(label)]
    command = (
        line[line.index("openssl") :].replace("payload.pae", name).replace("KEY.pem", str(signers / f"{kind}.key"))
    )
    run("sh", "-c", f"cd {folder} && {command.replace('signature.bin', f'{kind}.bin')}")
    return folder / f"{kind}.bin"


def offer(signers, kind, signature, **options):
    return Offered(signature, load_public(signers / f"{kind}.pub"), **options)


def written(image, tmp_path, *names, **options):
    folder = tmp_path / "to-sign"
    made = write_payload(image, [package(name) for name in names], AttachOptions(**options), folder)
    return folder, made


# --- there and back -------------------------------------------------------------------------------------------------


def test_there_and_back(image, tmp_path, signers):
    clean = files_of(image.parent)
    folder, made = written(image, tmp_path, "a", "b")
    assert files_of(image.parent) == clean
    assert [path.name for path in made.files] == ["statement.json", "payload.pae", "README.txt"]
    assert made.pae_sha256 == sha256((folder / "payload.pae").read_bytes()).hexdigest()
    offered = [offer(signers, kind, sign_elsewhere(signers, kind, folder)) for kind in ("p256", "ed25519")]
    # The order of the statement is that of loading, in whatever order the folders are named.
    done = attach_signatures(image, [package("b"), package("a")], folder, offered, PLAIN)
    found = carried(image)
    assert found.extensions == [("a", "1"), ("b", "1")]
    envelope = parse_envelope(found.envelope)
    assert envelope.payload == (folder / "statement.json").read_bytes()
    assert [s.keyid for s in envelope.signatures] == [item.public.keyid for item in offered] == list(done.added)
    assert done.statement_sha256 == made.statement_sha256
    detach(image)
    assert files_of(image.parent) == clean


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_key(raw, tmp_path, signers, kind):
    folder, _ = written(raw, tmp_path, "a")
    signature = sign_elsewhere(signers, kind, folder)
    attach_signatures(raw, [package("a")], folder, [offer(signers, kind, signature)], PLAIN)
    (stored,) = parse_envelope(carried(raw).envelope).signatures
    assert stored.sig == signature.read_bytes()


@pytest.mark.parametrize("kind", ["p256", "p384"])
@pytest.mark.parametrize("form", ["pairs", "base64", "base64 of pairs"])
def test_forms_of_a_signature(raw, tmp_path, signers, kind, form):
    folder, _ = written(raw, tmp_path, "a")
    path = sign_elsewhere(signers, kind, folder)
    der = data = path.read_bytes()
    if "pairs" in form:
        size = {"p256": 32, "p384": 48}[kind]
        data = b"".join(number.to_bytes(size, "big") for number in decode_dss_signature(der))
    if "base64" in form:
        data = base64.encodebytes(data)
    path.write_bytes(data)
    attach_signatures(raw, [package("a")], folder, [offer(signers, kind, path)], PLAIN)
    (stored,) = parse_envelope(carried(raw).envelope).signatures
    assert decode_dss_signature(stored.sig) == decode_dss_signature(der)


def test_output_and_placement(raw, tmp_path, signers):
    clean = raw.read_bytes()
    folder, _ = written(raw, tmp_path, "a", binding="any")
    offered = [offer(signers, "p256", sign_elsewhere(signers, "p256", folder))]
    target = tmp_path / "out.img"
    attach_signatures(raw, [package("a")], folder, offered, CeremonyOptions(target, Placement.SIDECAR))
    assert raw.read_bytes() == clean
    assert carried(target).placement == "sidecar" and carried(target).statement.image is None


def test_another_signature_for_a_graft_that_is_there(image, tmp_path, signers, acme):
    attach(image, [package("a")], [acme], AttachOptions())
    before = parse_envelope(carried(image).envelope)
    folder = tmp_path / "to-sign"
    made = write_carried_payload(image, folder, trust=[acme.public])
    assert made.extensions == (("com.example.a", "1"),)
    offered = [offer(signers, "rsa", sign_elsewhere(signers, "rsa", folder))]
    with pytest.raises(PayloadMismatchError):
        attach_signatures(image, [package("a", "2")], folder, offered, PLAIN)
    attach_signatures(image, [package("a")], folder, offered, PLAIN)
    after = parse_envelope(carried(image).envelope)
    assert after.payload == before.payload and after.signatures[:1] == before.signatures
    assert after.signatures[1].keyid == offered[0].public.keyid
    assert verifies(image, acme)
    with pytest.raises(UsageError, match="has signed already"):
        attach_signatures(image, [], folder, offered, PLAIN)


@pytest.fixture(scope="session")
def token(tmp_path_factory, signers):
    """A SoftHSM token that holds the keys made by openssl; its programs get it through their own environment."""
    folder = tmp_path_factory.mktemp("token")
    (folder / "tokens").mkdir()
    config = folder / "softhsm2.conf"
    config.write_text(f"directories.tokendir = {folder}/tokens\nobjectstore.backend = file\nlog.level = ERROR\n")
    environment = {**os.environ, "SOFTHSM2_CONF": str(config)}

    def call(*command, cwd=folder):
        done = subprocess.run(
            [*map(str, command)], check=False, capture_output=True, text=True, env=environment, cwd=cwd
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"

    call("softhsm2-util", "--init-token", "--free", "--label", "t", "--so-pin", "86420", "--pin", "2357")
    for kind, number in TOKEN_IDS.items():
        key = ["--import", signers / f"{kind}.key", "--label", kind, "--id", number]
        call("softhsm2-util", *key, "--token", "t", "--pin", "2357")
    return call


@pytest.mark.parametrize("kind", ["p256", "p384", "rsa"])
def test_a_token_signs_by_the_readme(raw, tmp_path, signers, token, kind):
    folder, _ = written(raw, tmp_path, "a")
    text = (folder / "README.txt").read_text()
    end = "--output-file signature.bin"
    lines = text[text.index("openssl dgst -sha256 -binary") : text.index(end) + len(end)].replace("\\\n", " ")
    told = {"--id ID": f"--id {TOKEN_IDS[kind]}", "MODULE.so": _SOFTHSM, end: f"{end} --pin 2357"}
    told |= {
        "p384": {"-sha256": "-sha384"},
        "rsa": {"ECDSA": "SHA256-RSA-PKCS", "file digest.bin": "file payload.pae"},
    }.get(kind, {})
    for name, value in told.items():
        assert name in lines
        lines = lines.replace(name, value)
    token("sh", "-e", "-c", lines, cwd=folder)
    assert len((folder / "signature.bin").read_bytes()) == {"p256": 64, "p384": 96, "rsa": 384}[kind]
    attach_signatures(raw, [package("a")], folder, [offer(signers, kind, folder / "signature.bin")], PLAIN)
    (stored,) = parse_envelope(carried(raw).envelope).signatures
    assert stored.keyid == load_public(signers / f"{kind}.pub").keyid


# --- what does not get in -------------------------------------------------------------------------------------------


def refused(image, error, match, *arguments, **options):
    clean = files_of(image.parent)
    with pytest.raises(error, match=match or None) as caught:
        attach_signatures(image, *arguments, **options)
    assert files_of(image.parent) == clean
    return caught.value


@pytest.fixture
def session(raw, tmp_path, signers):
    """A payload and its signature, and what attach_signatures is called with."""
    folder, _ = written(raw, tmp_path, "a", "b", expires=datetime.now(UTC) + timedelta(days=1))
    return raw, folder, [offer(signers, "p256", sign_elsewhere(signers, "p256", folder))]


BOTH = [package("a"), package("b")]


def test_another_content(session):
    image, folder, offered = session
    data = bytearray(image.read_bytes())
    data[70_000] ^= 1
    image.write_bytes(data)
    refused(image, ContentMismatchError, "content tree", BOTH, folder, offered, PLAIN)


@pytest.mark.parametrize(
    ("packages", "error"),
    [
        ([package("a", "2"), package("b")], PayloadMismatchError),
        ([package("a")], PayloadMismatchError),
        ([*BOTH, package("c")], PayloadMismatchError),
        ([*BOTH, package("a")], PayloadMismatchError),
        ([], UsageError),
    ],
)
def test_other_extensions(session, packages, error):
    image, folder, offered = session
    refused(image, error, "", packages, folder, offered, PLAIN)


def test_a_changed_module_under_the_same_manifest(session):
    image, folder, offered = session
    bad = dataclasses.replace(BOTH[1], module=BOTH[1].module + b"\0")
    refused(image, PayloadMismatchError, "payloads", [BOTH[0], bad], folder, offered, PLAIN)


@pytest.mark.parametrize("name", ["statement.json", "payload.pae", "p256.bin"])
def test_any_changed_file(session, name):
    image, folder, offered = session
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    error = refused(image, BadSignatureError, "", BOTH, folder, offered, PLAIN)
    assert error.hint and error.file


def test_the_statement_signed_without_its_type(session, signers):
    image, folder, offered = session
    sign_elsewhere(signers, "p256", folder, name="statement.json")
    error = refused(image, BadSignatureError, "signed the statement alone", BOTH, folder, offered, PLAIN)
    assert "payload.pae" in error.hint


def test_another_key_and_pss(session, signers):
    image, folder, offered = session
    swapped = [dataclasses.replace(offered[0], public=load_public(signers / "ed25519.pub"))]
    refused(image, BadSignatureError, "does not verify", BOTH, folder, swapped, PLAIN)
    pss = ["-sigopt", "rsa_padding_mode:pss"]
    run(
        "openssl", "dgst", "-sha256", *pss, "-sign", signers / "rsa.key", "-out", folder / "pss", folder / "payload.pae"
    )
    error = refused(image, BadSignatureError, "", BOTH, folder, [offer(signers, "rsa", folder / "pss")], PLAIN)
    assert "not PSS" in error.hint


@pytest.mark.parametrize("statement", [b"", b"{}", b"[" * 500_000, b'{"a":1,"a":2}', b"\xff"])
def test_bytes_that_are_no_statement_though_signed(raw, tmp_path, statement):
    """The key is the right one: what it signed is read only then, and within bounds."""
    key, folder = generate("p256"), tmp_path / "to-sign"
    folder.mkdir()
    message = pae("application/vnd.in-toto+json", statement)
    for name, data in (("statement.json", statement), ("payload.pae", message), ("sig", key.sign(message))):
        (folder / name).write_bytes(data)
    offered = [Offered(folder / "sig", key.public)]
    refused(raw, GraftFormatError, "statement", [package("a")], folder, offered, PLAIN)
    (folder / "sig").write_bytes(generate("p256").sign(message))
    refused(raw, BadSignatureError, "does not verify", [package("a")], folder, offered, PLAIN)


def test_the_same_signer_twice_or_none(session):
    image, folder, offered = session
    refused(image, UsageError, "once", BOTH, folder, [*offered, *offered], PLAIN)
    refused(image, UsageError, "once", BOTH, folder, [], PLAIN)


def test_files_that_are_no_signatures(session, tmp_path):
    image, folder, offered = session
    for content in (b"", b"\0" * 100_000, b"=", "é".encode() * 50):
        offered[0].signature.write_bytes(content)
        refused(image, (BadSignatureError, FileError), "", BOTH, folder, offered, PLAIN)
    offered[0].signature.unlink()
    refused(image, FileError, "cannot be read", BOTH, folder, offered, PLAIN)


def test_a_statement_that_expired_meanwhile(session, monkeypatch):
    image, folder, offered = session
    late = datetime.now(UTC) + timedelta(days=2)

    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return late

    monkeypatch.setattr("vmgraft.vendor.demand.datetime", Clock)
    refused(image, ExpiredError, "expired", BOTH, folder, offered, PLAIN)


def test_a_statement_for_another_image_that_was_grafted(session, acme):
    image, folder, offered = session
    attach(image, BOTH, [acme], AttachOptions())
    error = refused(image, PayloadMismatchError, "another statement", BOTH, folder, offered, PLAIN)
    assert "payload" in error.hint


def test_a_failure_after_writing_takes_the_graft_away(session, monkeypatch):
    image, folder, offered = session
    calls = []
    real = ceremony.demand

    def fail_second(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(ceremony, "demand", fail_second)
    refused(image, KeyboardInterrupt, "", BOTH, folder, offered, PLAIN)
    assert len(calls) == 2


# --- writing the payload --------------------------------------------------------------------------------------------


def test_nothing_is_written_that_could_never_be_signed(raw, tmp_path, acme):
    folder = tmp_path / "to-sign"
    past = datetime.now(UTC) - timedelta(days=1)
    for packages, options in (
        ([package("a"), package("a")], AttachOptions()),
        ([], AttachOptions()),
        ([package("a")], AttachOptions(expires=past)),
    ):
        with pytest.raises(UsageError):
            write_payload(raw, packages, options, folder)
    with pytest.raises(NoGraftError):
        write_carried_payload(raw, folder, trust=[acme.public])
    attach(raw, [package("a")], [acme], AttachOptions())
    with pytest.raises(UsageError, match="carries a graft"):
        write_payload(raw, [package("b")], AttachOptions(), folder)
    assert not folder.exists()


def test_files_are_never_overwritten(raw, tmp_path):
    folder, _ = written(raw, tmp_path, "a")
    (folder / "statement.json").unlink()
    kept = files_of(folder)
    with pytest.raises(FileError, match="exists"):
        write_payload(raw, [package("a")], AttachOptions(), folder)
    assert files_of(folder) == kept


def test_a_carried_statement_must_be_trusted_or_vouched_for(raw, tmp_path, acme, other):
    attach(raw, [package("a")], [acme], AttachOptions())
    folder = tmp_path / "to-sign"
    for options in ({}, {"trust": [acme.public], "vouch_for_unverified": True}):
        with pytest.raises(UsageError, match="trust"):
            write_carried_payload(raw, folder, **options)
    with pytest.raises(UntrustedSignerError):
        write_carried_payload(raw, folder, trust=[other.public])
    assert not folder.exists()
    write_carried_payload(raw, folder, trust=[acme.public, other.public])
    assert "NOT VERIFIED" not in (folder / "README.txt").read_text()
    write_carried_payload(raw, tmp_path / "second", vouch_for_unverified=True)
    assert "NOT VERIFIED" in (tmp_path / "second" / "README.txt").read_text()


def test_the_readme_says_what_is_signed(raw, tmp_path):
    folder, made = written(raw, tmp_path, "a", expires=datetime(2096, 1, 2, tzinfo=UTC))
    text = (folder / "README.txt").read_text()
    tree = json.loads((folder / "statement.json").read_bytes())["predicate"]["image"]["contentTree"]["digest"]
    for part in ("com.example.a 1", tree, "2096-01-02T00:00:00Z", made.statement_sha256, made.pae_sha256):
        assert part in text
    assert max(map(len, text.splitlines())) <= 120


def test_mldsa_from_elsewhere(raw, tmp_path):
    """No openssl here knows ML-DSA: this one is signed by the library, and only its form is tested."""
    key = generate("mldsa65")
    folder, _ = written(raw, tmp_path, "a")
    signature = tmp_path / "pq.bin"
    signature.write_bytes(base64.b64encode(key.sign((folder / "payload.pae").read_bytes())))
    attach_signatures(raw, [package("a")], folder, [Offered(signature, key.public)], PLAIN)
    assert verifies(raw, key)


def test_openssl_agrees_on_what_was_stored(raw, tmp_path, signers):
    folder, _ = written(raw, tmp_path, "a")
    attach_signatures(
        raw, [package("a")], folder, [offer(signers, "p256", sign_elsewhere(signers, "p256", folder))], PLAIN
    )
    envelope = parse_envelope(carried(raw).envelope)
    (tmp_path / "pae").write_bytes(envelope.pae)
    (tmp_path / "sig").write_bytes(envelope.signatures[0].sig)
    command = ["openssl", "dgst", "-sha256", "-verify", signers / "p256.pub", "-signature", "sig", "pae"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == "Verified OK\n"
