"""A timestamp authority for tests: ``openssl ts`` behind a function, and behind HTTP."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import signing_ca as ca
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID

STAMPING = ExtendedKeyUsageOID.TIME_STAMPING

CONFIG = """
[ tsa ]
default_tsa = the_tsa
[ the_tsa ]
serial = {folder}/serial
signer_digest = {digest}
default_policy = 1.2.3.4.1
digests = sha256, sha384, sha512
accuracy = {accuracy}
tsa_name = yes
ess_cert_id_alg = {ess}
ess_cert_id_chain = {chain}
"""


def tsa_leaf(issuer: ca.Entity, common: str = "TSA", *, critical: bool = True, **options: object) -> ca.Entity:
    """A certificate for time stamping; ``signing_ca.issue`` makes the usage of code signers not critical."""
    usages = options.pop("usages", (STAMPING,))
    extra = ((x509.ExtendedKeyUsage(usages), critical),) if usages else ()
    return ca.issue(common, issuer, usages=None, extra=extra, **options)


@dataclass
class Tsa:
    """An authority: who signs, and what else it sends along."""

    folder: Path
    signer: ca.Entity
    chain: tuple[ca.Entity, ...] = ()
    digest: str = "sha256"
    ess: str = "sha256"
    accuracy: str = "secs:1"
    ess_chain: str = "no"

    def reply(self, query: bytes, *options: str) -> bytes:
        """Answer a TimeStampReq as ``openssl ts -reply`` does; the time is that of the clock."""
        form = {"folder": self.folder, "digest": self.digest, "ess": self.ess, "accuracy": self.accuracy}
        (self.folder / "tsa.cnf").write_text(CONFIG.format(**form, chain=self.ess_chain))
        (self.folder / "signer.pem").write_bytes(self.signer.pem)
        key = self.signer.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        (self.folder / "signer.key").write_bytes(key)
        (self.folder / "chain.pem").write_bytes(b"".join(entity.pem for entity in self.chain))
        (self.folder / "q.tsq").write_bytes(query)
        command = [
            "openssl", "ts", "-reply", "-config", "tsa.cnf", "-queryfile", "q.tsq", "-signer", "signer.pem",
            "-inkey", "signer.key", "-out", "r.tsr", *(["-chain", "chain.pem"] if self.chain else []), *options,
        ]  # fmt: skip
        subprocess.run(command, cwd=self.folder, check=True, capture_output=True)
        return (self.folder / "r.tsr").read_bytes()

    def openssl_verifies(self, response: bytes, data: bytes, root: ca.Entity) -> bool:
        """Ask ``openssl ts -verify``."""
        (self.folder / "v.tsr").write_bytes(response)
        (self.folder / "v.dat").write_bytes(data)
        (self.folder / "v.pem").write_bytes(root.pem)
        command = ["openssl", "ts", "-verify", "-data", "v.dat", "-in", "v.tsr", "-CAfile", "v.pem"]
        return subprocess.run(command, cwd=self.folder, check=False, capture_output=True).returncode == 0


@contextmanager
def serve(answer: object) -> Iterator[str]:
    """Serve HTTP on the loopback; ``answer`` gets the body and returns (status, headers, body)."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            status, headers, data = answer(self.headers, body)  # type: ignore[operator]
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_args: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/tsr"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
