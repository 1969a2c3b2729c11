"""Timestamp authorities for any moment: the statement of time is made here, signed data and attributes by openssl."""

from __future__ import annotations

import hashlib
import subprocess
from datetime import datetime
from pathlib import Path

import signing_ca as ca
from cryptography import x509
from cryptography.hazmat import asn1
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID

from vmgraft.signing import _tsp as tsp


class Stamps:
    """Calls make a TimeStampToken; ``root`` gives the certificate to trust for an authority."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._made: dict[tuple[bytes, datetime, str], bytes] = {}
        self._authorities: dict[str, tuple[ca.Entity, ca.Entity]] = {}
        self._beside: dict[str, list[str]] = {}

    def __call__(self, signature: bytes, when: datetime, name: str) -> bytes:
        """Return a token over a signature; each is made once."""
        at = (signature, when, name)
        if at not in self._made:
            self._made[at] = self._token(signature, when, name)
        return self._made[at]

    def root(self, name: str) -> bytes:
        return self._authority(name)[0].der

    def _authority(self, name: str) -> tuple[ca.Entity, ca.Entity]:
        """``maze`` calls itself like ``tsa``, and sends along certificates that certify each other."""
        if name not in self._authorities:
            called = "tsa" if name == "maze" else name
            root = ca.issue(f"Time root of {called}", ca=True, days=(-2000, 4000))
            usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.TIME_STAMPING])
            leaf = ca.issue(f"Time of {name}", root, usages=None, extra=((usage, True),), days=(-1000, 2000))
            self._authorities[name] = (root, leaf)
            if name == "maze":
                days = [(-2000 + n, 4000) for n in range(7)]
                ring = [ca.issue("Time root of tsa", root, ca=True, key=root.key, days=each) for each in days]
                (self.folder / "ring.pem").write_bytes(b"".join(entity.pem for entity in ring))
                self._beside[name] = ["-certfile", str(self.folder / "ring.pem")]
            pem = leaf.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
            (self.folder / f"{name}.pem").write_bytes(leaf.pem + pem)
        return self._authorities[name]

    def _token(self, signature: bytes, when: datetime, name: str) -> bytes:
        self._authority(name)
        kind = tsp.Algorithm(algorithm=x509.ObjectIdentifier("2.16.840.1.101.3.4.2.1"), parameters=asn1.Null())
        info = tsp.TstInfo(
            version=1,
            policy=x509.ObjectIdentifier("1.2.3.4.1"),
            imprint=tsp.Imprint(algorithm=kind, digest=hashlib.sha256(signature).digest()),
            serial=len(self._made) + 1,
            time=asn1.GeneralizedTime(when),
            accuracy=None,
            ordering=False,
            nonce=None,
            tsa=None,
            extensions=None,
        )
        command = [
            "openssl", "cms", "-sign", "-binary", "-nodetach", "-cades", "-nosmimecap", "-outform", "DER",
            "-econtent_type", "1.2.840.113549.1.9.16.1.4", "-signer", str(self.folder / f"{name}.pem"),
            *self._beside.get(name, ()),
        ]  # fmt: skip
        return subprocess.run(command, input=asn1.encode_der(info), capture_output=True, check=True).stdout
