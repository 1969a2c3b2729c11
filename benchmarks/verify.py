"""Verifications a second through the library, content digest given, against the bare primitive and `openssl speed`.

One verification is everything a host does with a graft of one extension: parse the envelope, check its signature, parse
statement and manifest, hash the payloads, apply the policy.
"""

import hashlib
import re
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from _measure import Bench

from vmgraft.errors import PayloadMismatchError
from vmgraft.imagefmt.contract import ContentDigest
from vmgraft.signing.dsse import PAYLOAD_TYPE, Envelope, Signature, pae, serialise
from vmgraft.signing.keys import PrivateKey, generate
from vmgraft.signing.manifest import parse_manifest
from vmgraft.signing.policy import parse_policy
from vmgraft.signing.policytools import format_policy, init_policy
from vmgraft.signing.statement import build_statement
from vmgraft.signing.verify import verify_evidence
from vmgraft.vendor.pack import load_package

CLOCK = Path(__file__).resolve().parent.parent / "examples" / "clock"
CREATED, NOW = datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 2, 1, tzinfo=UTC)
CONTENT = ContentDigest(1 << 30, bytes(32), bytes(32), bytes(32))


class Evidence:
    """A graft in memory; the content's digest was taken before."""

    def __init__(self, envelope: bytes, payloads: dict[str, bytes]) -> None:
        self.envelope = envelope
        self.stored = payloads

    def format_problem(self) -> str | None:
        return None

    def envelopes(self) -> list[bytes]:
        return [self.envelope]

    def payload(self, sha256: str) -> bytes:
        if sha256 not in self.stored:
            raise PayloadMismatchError("nothing stored hashes to it")
        return self.stored[sha256]

    def content(self, flat: bool) -> ContentDigest:
        return CONTENT


def verifier(key: PrivateKey, count: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return what verifies one graft so many times, and what checks the bare signature as often."""
    package = load_package(CLOCK)
    statement = build_statement(CONTENT, [(package.manifest, package.module)], created=CREATED)
    message = pae(PAYLOAD_TYPE, statement)
    signature = key.sign(message)
    envelope = serialise(Envelope(statement, (Signature(key.keyid, signature),)))
    parts = [part for part in (package.manifest, package.module) if part is not None]
    evidence = Evidence(envelope, {hashlib.sha256(part).hexdigest(): part for part in parts})
    policy = parse_policy(format_policy(init_policy({"acme": key.public}, [parse_manifest(package.manifest)])))

    def whole() -> None:
        for _ in range(count):
            report = verify_evidence(evidence, policy, image_name="disk.qcow2", now=NOW)
            if not report.ok:
                raise SystemExit(f"the graft does not verify: {report.error}")

    def bare() -> None:
        for _ in range(count):
            if not key.public.verify(message, signature):
                raise SystemExit("the signature does not verify")

    return whole, bare


def openssl_speed(seconds: int) -> float:
    """Return how often `openssl speed` verifies with P-256 in a second of processor time."""
    command = ["openssl", "speed", "-mr", "-seconds", str(seconds), "ecdsap256"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    # A line of -mr for ECDSA: "+F4:<curve>:<bits>:<signatures a second>:<verifications a second>".
    found = re.search(r"^\+F4:\d+:256:[0-9.]+:([0-9.]+)$", done.stdout, re.MULTILINE)
    if found is None:
        raise SystemExit(f"openssl speed printed no figure: {done.stdout!r}")
    return float(found[1])


def rate(run: Callable[[], None], count: int) -> float:
    """Return how often something is done in a second of processor time."""
    started = time.process_time()
    run()
    return count / (time.process_time() - started)


def main() -> None:
    bench = Bench("verify", "verifications of a graft through the library, in one process")
    count = 20 if bench.small else 1000
    for kind in ("p256", "ed25519", "rsa3072", "mldsa65"):
        whole, bare = verifier(generate(kind), count)
        bench.compare(f"{count} verifications, {kind}", {"bare signature": bare, "vmgraft": whole})
        if kind == "p256":
            rounds = 1 if bench.small else 5
            pairs = [(rate(whole, count), openssl_speed(1)) for _ in range(rounds)]
            ours, theirs = (sorted(figures)[rounds // 2] for figures in zip(*pairs, strict=True))
            bench.fact("vmgraft, p256, on one processor", ours, "verifications a second")
            bench.fact("openssl speed ecdsap256, on one processor", theirs, "verifications a second")
    bench.end()


if __name__ == "__main__":
    main()
