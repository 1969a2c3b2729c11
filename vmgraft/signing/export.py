"""Envelopes in the form that other verifiers take: Sigstore bundles, and plain files for ``openssl``."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Any

from vmgraft.errors import UntrustedSignerError
from vmgraft.signing.dsse import Envelope
from vmgraft.signing.keys import PublicKey

#: Media type of a Sigstore bundle v0.3 (sigstore/protobuf-specs, protos/sigstore_bundle.proto).
BUNDLE_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"


def export_bundle(envelope: Envelope) -> list[tuple[str, bytes]]:
    """Return one Sigstore bundle per signature, since a bundle may carry only one.

    The key is named by its keyid as hint; members of a signature beside ``sig`` and ``keyid`` are left out.

    Returns:
        File names (``signature-1.sigstore.json`` ...) and bytes.
    """
    files = []
    for number, signature in enumerate(envelope.signatures, 1):
        bundle: dict[str, Any] = {
            "mediaType": BUNDLE_TYPE,
            "verificationMaterial": {
                "publicKey": {"hint": signature.keyid},
                "tlogEntries": [],
                "timestampVerificationData": {"rfc3161Timestamps": []},
            },
            "dsseEnvelope": {
                "payload": base64.b64encode(envelope.payload).decode("ascii"),
                "payloadType": envelope.payload_type,
                "signatures": [{"sig": base64.b64encode(signature.sig).decode("ascii"), "keyid": signature.keyid}],
            },
        }
        files.append((f"signature-{number}.sigstore.json", json.dumps(bundle, indent=1).encode("ascii") + b"\n"))
    return files


def export_openssl(envelope: Envelope, public_keys: Sequence[PublicKey] = ()) -> list[tuple[str, bytes]]:
    """Return the files with which ``openssl`` and a shell alone can check the signatures.

    ``statement.json`` is what was signed, ``pae.bin`` the exact bytes under the signature, ``signature-N.bin`` the raw
    signatures, ``key-N.pem`` the public key of signature N where it was given, and ``verify.sh`` checks all of it.

    Args:
        envelope: The envelope.
        public_keys: Keys to put beside the signatures they made. A key that travels with a signature proves nothing
            about who made it; ``verify.sh KEY.pem`` checks against a key from elsewhere.

    Raises:
        UntrustedSignerError: keys were given, and none of them made any of the signatures.
    """
    files = [("statement.json", envelope.payload), ("pae.bin", envelope.pae)]
    matched = 0
    for number, signature in enumerate(envelope.signatures, 1):
        files.append((f"signature-{number}.bin", signature.sig))
        signer = next((key for key in public_keys if key.verify(envelope.pae, signature.sig)), None)
        if signer is not None:
            files.append((f"key-{number}.pem", signer.pem))
            matched += 1
    if public_keys and not matched:
        names = ", ".join(key.keyid for key in public_keys)
        raise UntrustedSignerError(f"none of the signatures was made by {names}")
    head = f"DSSEv1 {len(envelope.payload_type.encode())} {envelope.payload_type}"
    script = _SCRIPT.replace("@HEAD@", head).replace("@COUNT@", str(len(envelope.signatures)))
    files.append(("verify.sh", script.encode("ascii")))
    return files


_SCRIPT = """#!/bin/sh
# Checks signatures with nothing but openssl and a shell.
#   sh verify.sh            every signature-N.bin that has a key-N.pem beside it
#   sh verify.sh KEY.pem    that at least one signature was made by KEY.pem: use this with a key you got elsewhere
# Exit codes: 0 verified, 1 not verified, 2 nothing to verify with.
set -u
trusted=
if [ $# -gt 0 ]; then
    trusted=$(realpath -- "$1") && [ -r "$trusted" ] || { echo "cannot read $1" >&2; exit 2; }
fi
cd -- "$(dirname -- "$0")" || exit 2

# pae.bin must be the DSSE encoding of statement.json, or the signature would be over something else.
size=$(wc -c < statement.json | tr -d ' ')
{ printf '%s %s ' '@HEAD@' "$size"; cat statement.json; } | cmp -s - pae.bin || {
    echo "FAILED: pae.bin does not encode statement.json" >&2
    exit 1
}

check() { # KEY SIGNATURE
    kind=$(openssl pkey -pubin -in "$1" -noout -text 2>/dev/null) || {
        echo "this openssl cannot read the key $1 (ML-DSA needs openssl 3.5)" >&2
        return 1
    }
    case $kind in
        *ED25519*|*ML-DSA*)
            openssl pkeyutl -verify -pubin -inkey "$1" -rawin -in pae.bin -sigfile "$2" >/dev/null 2>&1 ;;
        *secp384r1*)
            openssl dgst -sha384 -verify "$1" -signature "$2" pae.bin >/dev/null 2>&1 ;;
        *)
            openssl dgst -sha256 -verify "$1" -signature "$2" pae.bin >/dev/null 2>&1 ;;
    esac
}

good=0
bad=0
n=1
while [ "$n" -le @COUNT@ ]; do
    key=${trusted:-key-$n.pem}
    if [ ! -f "$key" ]; then
        echo "signature $n: no key to check it with"
    elif check "$key" "signature-$n.bin"; then
        echo "signature $n: verified with $key"
        good=$((good + 1))
    else
        echo "signature $n: NOT verified with $key" >&2
        bad=$((bad + 1))
    fi
    n=$((n + 1))
done
[ -n "$trusted" ] && [ "$good" -gt 0 ] && exit 0
[ "$bad" -gt 0 ] && exit 1
[ "$good" -gt 0 ] && exit 0
echo "no key: sh verify.sh KEY.pem" >&2
exit 2
"""
