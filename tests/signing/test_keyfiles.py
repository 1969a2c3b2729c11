from __future__ import annotations

import os
import stat
import subprocess

import pytest

from vmgraft.errors import FileError, UsageError
from vmgraft.signing.keyfiles import (
    PASSPHRASE_VARIABLE,
    PassphraseSource,
    key_path,
    load_private,
    load_public,
    write_keypair,
)
from vmgraft.signing.keys import generate


@pytest.fixture(autouse=True)
def no_passphrase_outside(monkeypatch):
    monkeypatch.delenv(PASSPHRASE_VARIABLE, raising=False)


@pytest.fixture
def sealed(tmp_path):
    key = generate("ed25519")
    return key, *write_keypair(tmp_path / "acme", key, b"correct horse")


def test_files_and_modes(sealed):
    key, private, public = sealed
    assert (private.name, public.name) == ("acme.key", "acme.pub")
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert private.read_bytes().startswith(b"-----BEGIN ENCRYPTED PRIVATE KEY-----")
    assert load_public(public) == load_public(public.read_bytes()) == key.public


def test_openssl_opens_what_we_wrote(sealed):
    _, private, public = sealed
    command = ["openssl", "pkey", "-in", private, "-passin", "pass:correct horse", "-pubout"]
    assert subprocess.run(command, capture_output=True, check=True).stdout == public.read_bytes()


def test_never_overwritten(sealed, tmp_path):
    key, private, _ = sealed
    before = private.read_bytes()
    with pytest.raises(FileError, match="exists") as caught:
        write_keypair(tmp_path / "acme", generate(), None)
    assert "never overwritten" in caught.value.hint
    assert private.read_bytes() == before
    (tmp_path / "half.pub").write_text("mine")
    with pytest.raises(FileError):
        write_keypair(tmp_path / "half", key, None)
    assert not (tmp_path / "half.key").exists()
    (tmp_path / "link.key").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileError):
        write_keypair(tmp_path / "link", key, None)
    assert not (tmp_path / "elsewhere").exists()


def test_every_source_of_a_passphrase(sealed, tmp_path, monkeypatch):
    key, private, _ = sealed
    file = tmp_path / "pass"
    file.write_text("correct horse\r\nsecond line\n")
    assert load_private(private, PassphraseSource(file=file)).public == key.public
    reading, writing = os.pipe()
    os.write(writing, b"correct horse")
    os.close(writing)
    assert load_private(private, PassphraseSource(fd=reading)).public == key.public
    os.close(reading)
    asked = []
    source = PassphraseSource(prompt=lambda text: asked.append(text) or "correct horse")
    assert load_private(private, source).public == key.public
    assert str(private) in asked[0]
    monkeypatch.setenv(PASSPHRASE_VARIABLE, "correct horse")
    assert load_private(private).public == key.public
    assert load_private(private, source).public == key.public and len(asked) == 1
    with pytest.raises(UsageError):
        load_private(private, PassphraseSource(environment=False))


def test_passphrase_of_the_file_wins_over_the_environment(sealed, tmp_path, monkeypatch):
    _, private, _ = sealed
    monkeypatch.setenv(PASSPHRASE_VARIABLE, "correct horse")
    (tmp_path / "pass").write_text("wrong")
    with pytest.raises(UsageError, match="does not open") as caught:
        load_private(private, PassphraseSource(file=tmp_path / "pass"))
    assert caught.value.file == str(private)


def test_bad_sources(sealed, tmp_path):
    _, private, _ = sealed
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "long").write_text("x" * 5000)
    for source in (
        PassphraseSource(file=tmp_path / "empty"),
        PassphraseSource(file=tmp_path / "long"),
        PassphraseSource(file=tmp_path / "missing"),
        PassphraseSource(file=tmp_path),
        PassphraseSource(fd=987),
        PassphraseSource(fd=-1),
        PassphraseSource(prompt=lambda _: ""),
    ):
        with pytest.raises(UsageError):
            load_private(private, source)


def test_no_passphrase_needed_none_asked(tmp_path):
    key = generate()
    private, _ = write_keypair(tmp_path / "plain", key, None)
    source = PassphraseSource(prompt=lambda _: pytest.fail("asked"))
    assert load_private(private, source).public == key.public


def test_missing_passphrase_says_how_to_give_one(sealed):
    with pytest.raises(UsageError, match="no passphrase") as caught:
        load_private(sealed[1])
    assert PASSPHRASE_VARIABLE in caught.value.hint


def test_file_uris(sealed, tmp_path, monkeypatch):
    key, _, public = sealed
    assert load_public(f"file://{public}") == load_public(f"file:{public}") == key.public
    odd = tmp_path / "a b%.pub"
    public.rename(odd)
    assert load_public(f"file://{tmp_path}/a%20b%25.pub") == key.public
    monkeypatch.chdir(tmp_path)
    assert key_path("file:acme.key") == key_path("acme.key")
    for bad in ("file://host/acme.key", "file:", "file:///a?b", "file:///a%00b"):
        with pytest.raises(UsageError):
            key_path(bad)
    for later in ("pkcs11:token=a", "awskms:///x", "exec:/bin/sign"):
        with pytest.raises(UsageError, match="does not name a key file") as caught:
            load_public(later)
        assert "sign with --key" in caught.value.hint


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "big").write_bytes(b"x" * 100_000)
    for path in (tmp_path, tmp_path / "missing", tmp_path / "pipe", tmp_path / "big", "/dev/zero"):
        with pytest.raises(FileError):
            load_public(path)
        with pytest.raises(FileError):
            load_private(path)
