"""Programs that sign: openssl in a shell script as the good one, and all kinds of bad ones."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from vmgraft.errors import BadSignatureError, FileError, UsageError
from vmgraft.signing.dsse import MAX_SIGNATURE_BYTES
from vmgraft.signing.keyfiles import PASSPHRASE_VARIABLE, write_keypair
from vmgraft.signing.keys import generate
from vmgraft.signing.signers import load_signer, make_signature


@pytest.fixture
def key(tmp_path):
    key = generate("p256")
    write_keypair(tmp_path / "acme", key, None)
    return key


@pytest.fixture
def program(tmp_path):
    """Writes a shell script and returns the URI that names it."""

    def write(body, query=""):
        path = tmp_path / "sign it"
        path.write_text("#!/bin/sh\n" + body + "\n")
        path.chmod(0o755)
        return f"exec:{tmp_path}/sign%20it?public-key={tmp_path}/acme.pub{query}"

    return write


@pytest.mark.parametrize("kind", ["p256", "p384", "rsa3072", "ed25519"])
def test_openssl_signs(tmp_path, program, kind):
    key = generate(kind)
    private, _ = write_keypair(tmp_path / "acme", key, None)
    digest = "-sha384" if kind == "p384" else "-sha256"
    body = f"exec openssl dgst {digest} -sign '{private}'"
    if kind == "ed25519":
        body = f"cat > '{tmp_path}/m' && exec openssl pkeyutl -sign -rawin -inkey '{private}' -in '{tmp_path}/m'"
    signer = load_signer(program(body))
    assert (signer.public, signer.keyid, signer.certificates) == (key.public, key.keyid, ())
    for message in (b"", b"m", b"long " * 200_000):  # longer than a pipe holds
        if message or kind != "ed25519":  # openssl 3.0 signs no empty file
            assert key.public.verify(message, make_signature(signer, message).sig)


def test_the_program_gets_the_message_alone(tmp_path, key, program, monkeypatch):
    """No argument, no passphrase, and the very bytes on stdin."""
    monkeypatch.setenv(PASSPHRASE_VARIABLE, "secret")
    monkeypatch.setenv("OF_THE_HELPER", "kept")
    signature = tmp_path / "signature"
    message = bytes(range(256)) * 600
    signature.write_bytes(key.sign(message))
    body = f"cd '{tmp_path}'; cat > got; echo $# > count; env > env; cat signature"
    assert load_signer(program(body)).sign(message) == signature.read_bytes()
    assert (tmp_path / "got").read_bytes() == message
    assert (tmp_path / "count").read_text() == "0\n"
    environment = (tmp_path / "env").read_text()
    assert "OF_THE_HELPER=kept" in environment and PASSPHRASE_VARIABLE not in environment


def test_a_program_that_does_not_read(tmp_path, key, program):
    message = b"x" * 1_000_000
    (tmp_path / "signature").write_bytes(key.sign(message))
    assert load_signer(program(f"exec cat '{tmp_path}/signature'")).sign(message)


@pytest.mark.parametrize(
    ("body", "words", "hint"),
    [
        ("cat > /dev/null; echo 'no card in the reader' >&2; exit 3", "ended with 3", "no card in the reader"),
        ("exit 1", "ended with 1", "nothing on stderr"),
        ("kill -9 $$", "killed by signal 9", ""),
        ("cat > /dev/null", "gave no signature", "nothing on stderr"),
        ("exec head -c 100000 /dev/zero", "more than 8192 bytes", "only the signature"),
        ("exec cat /dev/zero", "more than 8192 bytes", "only the signature"),
        ("printf 'a\\033[31mb\\nc' >&2; exit 2", "ended with 2", "a [31mb c"),
        ("head -c 3000000 /dev/zero | tr '\\0' e >&2; echo end >&2; exit 2", "ended with 2", "eend"),
    ],
)
def test_programs_that_fail(key, program, body, words, hint):
    assert MAX_SIGNATURE_BYTES == 8192
    with pytest.raises(FileError, match=words) as caught:
        load_signer(program(body)).sign(b"m")
    assert hint in caught.value.hint and len(caught.value.hint) < 3000
    assert caught.value.file.endswith("sign it")


def test_a_signature_that_comes_with_a_failure_is_not_used(tmp_path, key, program):
    (tmp_path / "signature").write_bytes(key.sign(b"m"))
    with pytest.raises(FileError, match="ended with 1"):
        load_signer(program(f"cat '{tmp_path}/signature'; exit 1")).sign(b"m")


def test_wrong_signatures(tmp_path, key, program):
    from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

    good = key.sign(b"m")
    r, s = decode_dss_signature(good)
    raw = r.to_bytes(32, "big") + s.to_bytes(32, "big")
    for made, hint in ((raw, "DER"), (good + b"\n", "SHA-256"), (key.sign(b"n"), "public key"), (b"x" * 8192, "DER")):
        (tmp_path / "signature").write_bytes(made)
        with pytest.raises(BadSignatureError, match="does not verify") as caught:
            load_signer(program(f"exec cat '{tmp_path}/signature'")).sign(b"m")
        assert hint in caught.value.hint


@pytest.mark.parametrize("body", ["exec sleep 60", "cat >/dev/null; exec >&- 2>&-; exec sleep 60", "sleep 5 & cat"])
def test_a_program_that_takes_too_long(key, program, body):
    begun = time.monotonic()
    with pytest.raises(FileError, match="longer than 1 s") as caught:
        load_signer(program(body, "&timeout=1")).sign(b"m")
    assert "timeout=" in caught.value.hint
    assert time.monotonic() - begun < 10


def test_what_a_late_program_started_is_killed_too(tmp_path, key, program):
    """Where there is no terminal: there the program has a process group of its own."""
    uri = program(f"sleep 60 & echo $! > '{tmp_path}/pid'; exec cat", "&timeout=1")
    code = (
        "import sys\nfrom vmgraft.errors import FileError\nfrom vmgraft.signing.signers import load_signer\n"
        "try:\n    load_signer(sys.argv[1]).sign(b'm')\nexcept FileError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, uri],
        capture_output=True,
        text=True,
        check=True,
        start_new_session=True,
        timeout=20,
    )
    assert "longer than 1 s" in done.stdout
    status = Path(f"/proc/{int((tmp_path / 'pid').read_text())}/status")
    deadline = time.monotonic() + 5
    while status.exists() and "State:\tZ" not in status.read_text():
        assert time.monotonic() < deadline, "it still runs"
        time.sleep(0.02)


def test_no_descriptor_is_left_open(key, program):
    signer = load_signer(program("exec cat /dev/zero"))
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        with pytest.raises(FileError):
            signer.sign(b"m" * 100_000)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize(
    ("uri", "error", "words"),
    [
        ("exec:", UsageError, "absolute path"),
        ("exec:sign?public-key=/x", UsageError, "absolute path"),
        ("exec://host/sign?public-key=/x", UsageError, "names no host"),
        ("exec:/bin/cat", UsageError, "must name the public key"),
        ("exec:/bin/cat?public-key=acme.pub", UsageError, "absolute path"),
        ("exec:/bin/cat?public-key=/x&args=1", UsageError, "unknown attribute 'args'"),
        ("exec:/bin/cat?public-key=/x&public-key=/y", UsageError, "twice"),
        ("exec:/bin/cat?public-key=/x&timeout=0", UsageError, "number of seconds"),
        ("exec:/bin/cat?public-key=/x&timeout=1e3", UsageError, "number of seconds"),
        ("exec:/bin/cat?public-key=/x&timeout=99999999999999", UsageError, "number of seconds"),
        ("exec:/bin/cat%00?public-key=/x", UsageError, "NUL"),
        ("exec:/bin/cat?public-key=/nowhere.pub", FileError, "cannot be read"),
        ("exec:/bin?public-key=/x", FileError, "no program"),
        ("exec:/nowhere?public-key=/x", FileError, "no program"),
        ("exec:/etc/passwd?public-key=/x", FileError, "no program"),
    ],
)
def test_uris_that_make_no_sense(uri, error, words):
    with pytest.raises(error, match=words):
        load_signer(uri)


def test_a_file_that_is_no_program(tmp_path, key, program):
    uri = program("")
    (tmp_path / "sign it").write_bytes(b"\x7fELF but not really")
    with pytest.raises(FileError, match="cannot be run"):
        load_signer(uri).sign(b"m")
