"""Encrypted key files: openssl opens what is written and says how it is made; hostile ones cost no time."""

from __future__ import annotations

import base64
import re
import subprocess
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmgraft.errors import FileError
from vmgraft.signing.keys import generate, private_from_pem
from vmgraft.signing.pkcs8 import MAX_OLD_ROUNDS, MAX_ROUNDS, ROUNDS, costly, encrypt_pkcs8, pbkdf2_rounds


def openssl(*arguments, data):
    return subprocess.run(["openssl", *arguments], input=data, capture_output=True, check=True).stdout


@pytest.mark.parametrize("kind", ["p256", "rsa3072", "ed25519"])
def test_openssl_opens_it_and_sees_how_it_is_made(kind):
    key = generate(kind)
    pem = key.pem("pässword".encode())
    assert openssl("pkey", "-passin", "pass:pässword", "-pubout", data=pem) == key.public.pem
    listing = openssl("asn1parse", data=pem).decode()
    for name in ("PBES2", "PBKDF2", "hmacWithSHA256", "aes-256-cbc"):
        assert f":{name}" in listing
    assert int(re.findall(r"INTEGER +:([0-9A-F]+)", listing)[0], 16) == ROUNDS == 600_000


def test_no_two_alike():
    assert encrypt_pkcs8(b"key", b"pass", rounds=1) != encrypt_pkcs8(b"key", b"pass", rounds=1)


def test_every_length_is_padded():
    key = generate("ed25519").pem(None)
    der = openssl("pkey", "-outform", "DER", data=key)
    for rounds in (1, 127, 128, 255, 256, 70_000):
        sealed = encrypt_pkcs8(der, b"x", rounds=rounds)
        assert pbkdf2_rounds(sealed) == rounds
        assert openssl("pkey", "-passin", "pass:x", data=sealed) == key


def test_rounds_of_keys_made_elsewhere():
    plain = generate("p256").pem(None)
    for options, rounds in (
        ([], 2048),
        (["-iter", "31415"], 31415),
        (["-scrypt"], None),
        (["-v1", "PBE-SHA1-3DES"], None),
    ):
        sealed = openssl("pkcs8", "-topk8", *options, "-passout", "pass:x", data=plain)
        assert pbkdf2_rounds(sealed) == rounds
        assert private_from_pem(sealed, b"x").pem(None) == plain
    assert pbkdf2_rounds(plain) is None


@pytest.mark.parametrize(
    ("n", "r", "p", "good"),
    [(16384, 8, 1, True), (16384, 12, 1, True), (65536, 9, 1, False), (1 << 20, 1, 1, False), (16, 1, 17, False),
     (16, 1, 16, True), (2, 1 << 30, 1, False), (16, 1, 1 << 20, False)],
)  # fmt: skip
def test_scrypt_is_bounded(tmp_path, n, r, p, good):
    """openssl writes what may be opened; of what may not, it would not write all."""
    if good:
        plain = generate("ed25519").pem(None)
        options = ["-scrypt", "-scrypt_N", str(n), "-scrypt_r", str(r), "-scrypt_p", str(p)]
        sealed = openssl("pkcs8", "-topk8", *options, "-passout", "pass:x", data=plain)
        assert costly(sealed) is None
        assert private_from_pem(sealed, b"x").pem(None) == plain
        return
    numbers = "".join(f"{name}=INTEGER:{value}\n" for name, value in (("n", n), ("r", r), ("p", p)))
    (tmp_path / "key.cnf").write_text(
        "asn1=SEQUENCE:key\n[key]\nscheme=SEQUENCE:scheme\nsealed=FORMAT:HEX,OCTETSTRING:" + "00" * 48 + "\n"
        "[scheme]\noid=OID:PBES2\nbody=SEQUENCE:body\n[body]\nkdf=SEQUENCE:kdf\ncipher=SEQUENCE:cipher\n"
        "[kdf]\noid=OID:1.3.6.1.4.1.11591.4.11\nbody=SEQUENCE:scrypt\n"
        f"[scrypt]\nsalt=FORMAT:HEX,OCTETSTRING:{'00' * 16}\n{numbers}"
        f"[cipher]\noid=OID:aes-256-cbc\niv=FORMAT:HEX,OCTETSTRING:{'00' * 16}\n"
    )
    openssl("asn1parse", "-genconf", str(tmp_path / "key.cnf"), "-noout", "-out", str(tmp_path / "key.der"), data=b"")
    pem = b"-----BEGIN ENCRYPTED PRIVATE KEY-----\n" + base64.encodebytes((tmp_path / "key.der").read_bytes())
    pem += b"-----END ENCRYPTED PRIVATE KEY-----\n"
    begun = time.monotonic()
    with pytest.raises(FileError, match="stretched by scrypt") as caught:
        private_from_pem(pem, b"x", file="acme.key")
    assert caught.value.file == "acme.key" and time.monotonic() - begun < 1


def test_a_file_that_would_take_hours():
    sealed = openssl("pkcs8", "-topk8", "-iter", "1", "-passout", "pass:x", data=generate("p256").pem(None))
    der = base64.b64decode(b"".join(sealed.splitlines()[1:-1]))
    place = der.index(b"\x02\x01\x01\x30")  # the INTEGER before the SEQUENCE of the function
    for rounds in (MAX_ROUNDS + 1, 2**31 - 1):
        count = rounds.to_bytes(4, "big")
        grown = bytearray(der[:place] + b"\x02\x04" + count + der[place + 3 :])
        for at in range(place):  # every enclosing length grows by three
            if grown[at] == 0x30 and grown[at + 1] < 0x80 and at + 2 + grown[at + 1] + 3 >= place + 6:
                grown[at + 1] += 3
        grown[2] += 3  # the outermost one has a long form: 30 81 xx
        pem = b"-----BEGIN ENCRYPTED PRIVATE KEY-----\n" + base64.encodebytes(bytes(grown))
        pem += b"-----END ENCRYPTED PRIVATE KEY-----\n"
        assert pbkdf2_rounds(pem) == rounds
        begun = time.monotonic()
        with pytest.raises(FileError, match="rounds of PBKDF2") as caught:
            private_from_pem(pem, b"x", file="acme.key")
        assert caught.value.file == "acme.key" and time.monotonic() - begun < 2


def old_style(folder, oid, rounds):
    """An encrypted key of PBES1 or PKCS#12, as anybody can write one."""
    (folder / "key.cnf").write_text(
        "asn1=SEQUENCE:key\n[key]\nscheme=SEQUENCE:scheme\nsealed=FORMAT:HEX,OCTETSTRING:" + "00" * 48 + "\n"
        f"[scheme]\noid=OID:{oid}\nbody=SEQUENCE:body\n[body]\nsalt=FORMAT:HEX,OCTETSTRING:{'00' * 8}\n"
        f"rounds=INTEGER:{rounds}\n"
    )
    openssl("asn1parse", "-genconf", str(folder / "key.cnf"), "-noout", "-out", str(folder / "key.der"), data=b"")
    return base64.encodebytes((folder / "key.der").read_bytes())


PBES1, PKCS12, UNHEARD_OF = "1.2.840.113549.1.5.3", "1.2.840.113549.1.12.1.3", "1.3.6.1.4.1.99999.1"
HEAD, TAIL = b"-----BEGIN ENCRYPTED PRIVATE KEY-----\n", b"-----END ENCRYPTED PRIVATE KEY-----\n"


@pytest.mark.parametrize("oid", [PBES1, PKCS12, UNHEARD_OF])
@pytest.mark.parametrize("rounds", [MAX_OLD_ROUNDS + 1, 2**31, 2**31 - 1, 1 << 200])
def test_older_schemes_are_bounded_too(tmp_path, oid, rounds):
    body = old_style(tmp_path, oid, rounds)
    key = HEAD + body + TAIL
    begun = time.monotonic()
    for pem in (key, b"Bag Attributes: <none>\n" + key, key + key, generate("p256").public.pem + key):
        with pytest.raises(FileError, match="rounds of PBES1 or PKCS#12") as caught:
            private_from_pem(pem, b"x", file="acme.key")
        assert caught.value.file == "acme.key" and "openssl pkcs8 -topk8" in caught.value.hint
    assert time.monotonic() - begun < 1


@pytest.mark.parametrize("rounds", [0, -1])
def test_a_key_without_rounds(tmp_path, rounds):
    with pytest.raises(FileError, match="cannot be read"):
        private_from_pem(HEAD + old_style(tmp_path, PKCS12, rounds) + TAIL, b"x")


def test_older_schemes_with_sensible_rounds_are_read():
    plain = generate("p256").pem(None)
    for rounds in ("1", "2048", "100000"):
        sealed = openssl("pkcs8", "-topk8", "-v1", "PBE-SHA1-3DES", "-iter", rounds, "-passout", "pass:x", data=plain)
        assert costly(sealed) is None and private_from_pem(sealed, b"x").pem(None) == plain
        assert private_from_pem(b"Bag Attributes: <none>\n" + sealed, b"x").pem(None) == plain


@pytest.mark.parametrize(
    "pem",
    [
        HEAD, HEAD + TAIL, HEAD + b"!" + TAIL, HEAD + b"MAA=\n" + TAIL, HEAD + b"MIAwAA==\n" + TAIL,
        HEAD + b"Proc-Type: 4,ENCRYPTED\n\nMAA=\n" + TAIL, HEAD + HEAD + b"MAA=\n" + TAIL,
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_not_tried(pem):
    with pytest.raises(FileError, match="how the key is encrypted cannot be read"):
        private_from_pem(pem, b"x", file="acme.key")


@given(st.binary(max_size=120))
def test_anything_else_has_no_rounds(data):
    for body in (data, base64.b64encode(data)):
        pem = b"-----BEGIN ENCRYPTED PRIVATE KEY-----\n" + body + b"\n-----END ENCRYPTED PRIVATE KEY-----\n"
        found = pbkdf2_rounds(pem)
        assert found is None or isinstance(found, int)
