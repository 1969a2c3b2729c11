"""Keys in SoftHSM, a token that nobody here wrote; openssl is the judge of the signatures."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from signing_token import MODULE, PIN, make_token

from vmgraft.errors import BadSignatureError, FileError, UnsupportedError, UsageError
from vmgraft.signing.keyfiles import PASSPHRASE_VARIABLE, PassphraseSource
from vmgraft.signing.keys import generate
from vmgraft.signing.pkcs11 import pin_is_in
from vmgraft.signing.signers import load_signer, make_signature, signing_warnings

KINDS = ("p256", "p384", "rsa3072", "ed25519")
MESSAGE = b"DSSEv1 28 application/vnd.in-toto+json 2 {}"


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A token with one key of each kind, one key that is in it twice, and one without a public half."""
    before = os.environ.get("SOFTHSM2_CONF")
    folder = tmp_path_factory.mktemp("softhsm")
    token, _empty = make_token(folder, "release keys"), make_token(folder, "empty")
    keys = {kind: generate(kind) for kind in KINDS}
    for number, (kind, key) in enumerate(keys.items(), 0xA1):
        token.put(kind, f"{number:02x}", key.pem(None))
    for number in ("b1", "b2"):
        token.put("twin", number, keys["p256"].pem(None))
    keys["lonely"] = generate("p256")
    token.put("lonely", "c1", keys["lonely"].pem(None))
    remove(token, "lonely", "pkcs11.ObjectClass.PUBLIC_KEY")
    yield token, keys
    if before is None:
        os.environ.pop("SOFTHSM2_CONF")
    else:
        os.environ["SOFTHSM2_CONF"] = before


def remove(token, label, kind="pkcs11.ObjectClass.PRIVATE_KEY"):
    """In a process of its own: logins are per process, and the tests' own are under test."""
    code = (
        "import pkcs11, sys\n"
        "with pkcs11.lib(sys.argv[1]).get_token(token_label=sys.argv[2]).open(rw=True, user_pin=sys.argv[3]) as s:\n"
        f"    where = {{pkcs11.Attribute.CLASS: {kind}, pkcs11.Attribute.LABEL: sys.argv[4]}}\n"
        "    [item.destroy() for item in list(s.get_objects(where))]\n"
    )
    subprocess.run([sys.executable, "-c", code, MODULE, token.label, PIN, label], check=True)


@pytest.fixture(autouse=True)
def no_pin_outside(monkeypatch):
    monkeypatch.delenv(PASSPHRASE_VARIABLE, raising=False)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_signs_and_openssl_agrees(stored, tmp_path, kind):
    token, keys = stored
    signer = load_signer(token.uri(kind))
    assert signer.public == keys[kind].public and signer.certificates == ()
    signature = make_signature(signer, MESSAGE).sig
    names = ("key.pub", "message", "signature")
    public, message, file = (tmp_path / name for name in names)
    for path, data in ((public, keys[kind].public.pem), (message, MESSAGE), (file, signature)):
        path.write_bytes(data)
    digest = "-sha384" if kind == "p384" else "-sha256"
    command = ["openssl", "dgst", digest, "-verify", public, "-signature", file, message]
    if kind == "ed25519":
        command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", public, "-rawin", "-in", message]
        command += ["-sigfile", file]
    subprocess.run(command, check=True, capture_output=True)


def test_ways_to_name_the_key(stored):
    token, keys = stored
    base = f"pkcs11:token=release%20keys;{{}}?module-path={MODULE}&pin-value={PIN}"
    for path in (
        "id=%a1",
        "id=%A1;object=p256",
        "object=p256;type=private",
        "object=twin;id=%B2",
        "model=SoftHSM%20v2;id=%a1",
    ):
        assert load_signer(base.format(path)).public == keys["p256"].public
    with pytest.raises(FileError, match="2 private keys"):
        load_signer(base.format("object=twin"))
    with pytest.raises(FileError, match="no private key"):
        load_signer(base.format("object=p256;id=%A2"))
    with pytest.raises(FileError, match="no token") as caught:
        load_signer(base.format("object=p256;serial=0000"))
    assert "'release keys'" in caught.value.hint and "'empty'" in caught.value.hint
    with pytest.raises(FileError, match="2 tokens"):
        load_signer(f"pkcs11:model=SoftHSM%20v2;object=p256?module-path={MODULE}&pin-value={PIN}")
    with pytest.raises(FileError, match="no private key"):
        load_signer(token.uri("p256", **{"token": "empty"}))


def test_every_source_of_the_pin(stored, tmp_path, monkeypatch):
    token, keys = stored
    (tmp_path / "pin").write_text(PIN + "\n")
    file = tmp_path / "pin"
    for source in (f"file:{file}", f"file://{file}", str(file)):
        assert load_signer(token.uri("p256", f"pin-source={source}")).public == keys["p256"].public
    bare = token.uri("p256", "")
    assert load_signer(bare, PassphraseSource(file=file)).keyid == keys["p256"].keyid
    reading, writing = os.pipe()
    os.write(writing, PIN.encode())
    os.close(writing)
    assert load_signer(bare, PassphraseSource(fd=reading)).keyid == keys["p256"].keyid
    os.close(reading)
    asked = []
    prompt = PassphraseSource(prompt=lambda text: asked.append(text) or PIN)
    assert load_signer(bare, prompt).keyid == keys["p256"].keyid
    assert asked == ["PIN for pkcs11:token=release keys;object=p256: "]
    with pytest.raises(UsageError, match="no PIN") as caught:
        load_signer(bare)
    assert "pin-source" in caught.value.hint
    monkeypatch.setenv(PASSPHRASE_VARIABLE, PIN)
    assert load_signer(bare).keyid == keys["p256"].keyid


def test_wrong_pins(stored, tmp_path):
    token, _ = stored
    for pin in ("000000", "98"):
        with pytest.raises(UsageError, match="does not take this PIN") as caught:
            load_signer(token.uri("p256", f"pin-value={pin}"))
        assert "lock" in caught.value.hint and pin not in str(caught.value)
    (tmp_path / "pin").write_bytes(b"\xff\xfe\n")
    for source in (f"{tmp_path}/pin", f"{tmp_path}/none", "%7C/bin/echo", "pin"):
        with pytest.raises(UsageError):
            load_signer(token.uri("p256", f"pin-source={source}"))
    assert load_signer(token.uri("p256"))  # a right one is still taken


def test_the_public_half_from_a_file(stored, tmp_path):
    token, keys = stored
    with pytest.raises(FileError, match="no public half") as caught:
        load_signer(token.uri("lonely"))
    assert "public-key=" in caught.value.hint
    (tmp_path / "lonely.pub").write_bytes(keys["lonely"].public.pem)
    signer = load_signer(token.uri("lonely", f"pin-value={PIN}&public-key={tmp_path}/lonely.pub"))
    assert signer.public.verify(b"m", signer.sign(b"m"))


def test_another_public_half_is_found_out(stored, tmp_path):
    token, _ = stored
    (tmp_path / "other.pub").write_bytes(generate("p256").public.pem)
    signer = load_signer(token.uri("p256", f"pin-value={PIN}&public-key={tmp_path}/other.pub"))
    with pytest.raises(BadSignatureError, match="does not verify"):
        signer.sign(b"m")


def test_two_keys_of_one_token_take_turns(stored):
    token, keys = stored
    signers = [load_signer(token.uri(kind)) for kind in ("p256", "ed25519")]
    for _ in range(2):
        for signer in signers:
            assert signer.public.verify(MESSAGE, signer.sign(MESSAGE))
    assert [signer.public for signer in signers] == [keys["p256"].public, keys["ed25519"].public]


def test_a_key_that_went_away(stored):
    token, _ = stored
    token.put("passing", "d1", generate("p256").pem(None))
    signer = load_signer(token.uri("passing"))
    remove(token, "passing")
    with pytest.raises(FileError, match="no private key"):
        signer.sign(b"m")


def test_the_pin_is_never_shown(stored):
    token, _ = stored
    signer = load_signer(token.uri("p256"))
    assert PIN not in repr(signer)
    assert pin_is_in(token.uri("p256")) and not pin_is_in(token.uri("p256", "pin-source=file:/x"))
    assert "pin-source" in signing_warnings(token.uri("p256"), signer)[0]
    assert signing_warnings(token.uri("p256", "pin-source=file:/x"), signer) == []


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("pkcs11:", "must name the key"),
        ("pkcs11:object=a", "must name the token"),
        ("pkcs11:token=t", "must name the key"),
        ("pkcs11:token=t;object=a", "must name the PKCS#11 library"),
        ("pkcs11:token=t;object=a?module-path=lib.so", "absolute path"),
        ("pkcs11:token=t;object=a?module-path=/nowhere/lib.so", "no such PKCS#11 library"),
        ("pkcs11:token=t;object=a?module-path=/etc/passwd", "the token refuses"),
        ("pkcs11:token=t;object=a?pin-value=12&SECRET=1", "has an unknown attribute$"),
        ("pkcs11:token=t;object=a?module-name=softhsm2", "unknown attribute 'module-name'"),
        ("pkcs11:token=t;object=a;colour=red?module-path=/x", "unknown attribute 'colour'"),
        ("pkcs11:token=t;object=a;object=b?module-path=/x", "names object twice"),
        ("pkcs11:token=t;id=%01;id=%02?module-path=/x", "names id twice"),
        ("pkcs11:token=t;object=a;type=cert?module-path=/x", "private key signs"),
        ("pkcs11:slot-id=-1;object=a?module-path=/x", "slot-id is a number"),
        ("pkcs11:token=t;object=%zz?module-path=/x", "not escaped"),
        ("pkcs11:token=t;object=a b?module-path=/x", "not escaped"),
        ("pkcs11:token=t;object=%ff?module-path=/x", "not UTF-8"),
        ("pkcs11:token=t;object=%00?module-path=/x", "NUL"),
        ("pkcs11:token=t;object?module-path=/x", "not name=value"),
        ("pkcs11:token=t;object=a?module-path=/x&pin-value=1&pin-source=/y", "both pin-source and pin-value"),
        ("pkcs11:token=t;object=a?module-path=/x#top", "no fragment"),
        ("pkcs11:token=t;object=" + "a" * 5000, "at most"),
    ],
)
def test_uris_that_make_no_sense(stored, uri, words):
    with pytest.raises((UsageError, FileError), match=words):
        load_signer(uri, PassphraseSource(prompt=lambda _: "0000"))


def test_without_the_package(monkeypatch, stored):
    monkeypatch.setitem(sys.modules, "pkcs11", None)
    with pytest.raises(UnsupportedError, match="python-pkcs11") as caught:
        load_signer(stored[0].uri("p256"))
    assert caught.value.hint == "pip install 'vmgraft[hsm]'"


def test_the_package_is_loaded_on_use_only():
    code = (
        "import sys, vmgraft.signing.signers, vmgraft.signing.pkcs11\nprint([m for m in sys.modules if m == 'pkcs11'])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"[]\n"
