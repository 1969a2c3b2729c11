"""Envelopes in the form that other verifiers take: Sigstore bundles, and plain files for ``openssl``."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from os import PathLike
from typing import Any

from vmgraft.errors import UntrustedSignerError
from vmgraft.signing.bundles import signature_material
from vmgraft.signing.dsse import Envelope
from vmgraft.signing.keys import PublicKey
from vmgraft.signing.material import Material

#: Media type of a Sigstore bundle v0.3 (sigstore/protobuf-specs, protos/sigstore_bundle.proto).
BUNDLE_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"


def export_bundle(
    envelope: Envelope, *, bare: bool = False, file: str | PathLike[str] | None = None
) -> list[tuple[str, bytes]]:
    """Return one Sigstore bundle per signature, since a bundle may carry only one.

    A certificate stands in it, or else the key is named by its keyid as hint; timestamps go along. A bundle v0.3 holds
    the leaf alone, so intermediates are written beside it, for the verifier's trust material.

    Args:
        envelope: The envelope.
        bare: Name the key in every bundle, and leave certificates and timestamps out.
        file: What to name in the error.

    Returns:
        File names (``signature-1.sigstore.json``, ``signature-1.intermediates.pem`` ...) and bytes.

    Raises:
        BadSignatureError: what stands beside a signature is malformed.
    """
    files = []
    for number, signature in enumerate(envelope.signatures, 1):
        material = Material() if bare else signature_material(signature, number - 1, file=file)
        bundle: dict[str, Any] = {
            "mediaType": BUNDLE_TYPE,
            "verificationMaterial": {
                **_named(material, signature.keyid),
                "tlogEntries": [],
                "timestampVerificationData": {
                    "rfc3161Timestamps": [{"signedTimestamp": _text(stamp)} for stamp in material.timestamps]
                },
            },
            "dsseEnvelope": {
                "payload": _text(envelope.payload),
                "payloadType": envelope.payload_type,
                "signatures": [{"sig": _text(signature.sig), "keyid": signature.keyid}],
            },
        }
        files.append((f"signature-{number}.sigstore.json", json.dumps(bundle, indent=1).encode("ascii") + b"\n"))
        if len(material.certificates) > 1:
            files.append((f"signature-{number}.intermediates.pem", _pem(material.certificates[1:])))
    return files


def _named(material: Material, keyid: str) -> dict[str, Any]:
    """Return the one member that says who signed."""
    if material.certificates:
        return {"certificate": {"rawBytes": _text(material.certificates[0])}}
    return {"publicKey": {"hint": keyid}}


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _pem(certificates: Sequence[bytes]) -> bytes:
    from vmgraft.signing.truststores import as_pem

    return "".join(as_pem(der, "CERTIFICATE") for der in certificates).encode("ascii")


def export_openssl(
    envelope: Envelope, public_keys: Sequence[PublicKey] = (), *, file: str | PathLike[str] | None = None
) -> list[tuple[str, bytes]]:
    """Return the files with which ``openssl`` and a shell alone can check the signatures.

    ``statement.json`` is what was signed, ``pae.bin`` the exact bytes under the signature, ``signature-N.bin`` the raw
    signatures, ``key-N.pem`` the public key of signature N where it was given, ``chain-N.pem`` its certificates, leaf
    first, ``timestamp-N-M.tsr`` its timestamps, and ``verify.sh`` checks all of it.

    Args:
        envelope: The envelope.
        public_keys: Keys to put beside the signatures they made. A key that travels with a signature proves nothing
            about who made it; ``verify.sh KEY.pem`` checks against a key from elsewhere, ``verify.sh --ca ROOT.pem``
            against an authority.
        file: What to name in the error.

    Raises:
        UntrustedSignerError: keys were given, and none of them made any of the signatures.
        BadSignatureError: what stands beside a signature is malformed.
    """
    files = [("statement.json", envelope.payload), ("pae.bin", envelope.pae)]
    matched = 0
    for number, signature in enumerate(envelope.signatures, 1):
        files.append((f"signature-{number}.bin", signature.sig))
        signer = next((key for key in public_keys if key.verify(envelope.pae, signature.sig)), None)
        if signer is not None:
            files.append((f"key-{number}.pem", signer.pem))
            matched += 1
        material = signature_material(signature, number - 1, file=file)
        if material.certificates:
            files.append((f"chain-{number}.pem", _pem(material.certificates)))
        for place, stamp in enumerate(material.timestamps, 1):
            files.append((f"timestamp-{number}-{place}.tsr", stamp))
    if public_keys and not matched:
        names = ", ".join(key.keyid for key in public_keys)
        raise UntrustedSignerError(f"none of the signatures was made by {names}", file=file)
    head = f"DSSEv1 {len(envelope.payload_type.encode())} {envelope.payload_type}"
    script = _SCRIPT.replace("@HEAD@", head).replace("@COUNT@", str(len(envelope.signatures)))
    files.append(("verify.sh", script.encode("ascii")))
    return files


_SCRIPT = """#!/bin/sh
# Checks signatures with nothing but openssl and a shell.
#   sh verify.sh                  every signature-N.bin that has a key-N.pem beside it
#   sh verify.sh KEY.pem          that at least one signature was made by KEY.pem: a key you got elsewhere
#   sh verify.sh --ca ROOT.pem [--tsa-ca TSA.pem]
#                                 that at least one was made by the leaf of a chain-N.pem that leads to ROOT.pem, now,
#                                 or when a timestamp by an authority under TSA.pem says; revocation is not looked at
# Exit codes: 0 verified, 1 not verified, 2 nothing to verify with, or a signature that this openssl cannot check.
set -u
absolute() { realpath -- "$1" && [ -r "$1" ] || { echo "cannot read $1" >&2; exit 2; }; }
trusted= root= stamps=
while [ $# -gt 0 ]; do
    case $1 in
        --ca) [ $# -gt 1 ] || exit 2; root=$(absolute "$2") || exit 2; shift ;;
        --tsa-ca) [ $# -gt 1 ] || exit 2; stamps=$(absolute "$2") || exit 2; shift ;;
        *) trusted=$(absolute "$1") || exit 2 ;;
    esac
    shift
done
cd -- "$(dirname -- "$0")" || exit 2

# pae.bin must be the DSSE encoding of statement.json, or the signature would be over something else.
size=$(wc -c < statement.json | tr -d ' ')
{ printf '%s %s ' '@HEAD@' "$size"; cat statement.json; } | cmp -s - pae.bin || {
    echo "FAILED: pae.bin does not encode statement.json" >&2
    exit 1
}

raw=
openssl pkeyutl -help 2>&1 | grep -q -e '-rawin' && raw=yes

digest() { # HASH KEY SIGNATURE
    if [ -n "$raw" ]; then
        openssl pkeyutl -verify -pubin -inkey "$2" -rawin -digest "$1" -in pae.bin -sigfile "$3" >/dev/null 2>&1
        return
    fi
    # Before openssl 3.0. dgst does not look at what stands behind a signature, so the length is compared here.
    case $kind in
        *Modulus:*)
            size=$(printf '%s\\n' "$kind" | sed -n 's/.*Key: (\\([0-9]*\\) bit.*/\\1/p')
            size=$((${size:-0} / 8)) ;;
        *) size=$(($(od -A n -t u1 -j 1 -N 1 "$3") + 2)) ;;
    esac
    [ "$(wc -c < "$3")" -eq "$size" ] && openssl dgst "-$1" -verify "$2" -signature "$3" pae.bin >/dev/null 2>&1
}

check() { # KEY SIGNATURE: 0 verified, 1 not, 3 not to be checked with this openssl
    kind=$(openssl pkey -pubin -in "$1" -noout -text 2>/dev/null) || {
        # The DER of every ML-DSA-65 key begins so (RFC 9881): it is not that the key is damaged.
        grep -q '^MIIHsjALBglghkgBZQMEAxID' "$1" && return 3
        echo "the key $1 cannot be read" >&2
        return 1
    }
    case $kind in
        *ED25519*|*ML-DSA*)
            openssl pkeyutl -verify -pubin -inkey "$1" -rawin -in pae.bin -sigfile "$2" >/dev/null 2>&1 ;;
        *secp384r1*)
            digest sha384 "$1" "$2" ;;
        *)
            digest sha256 "$1" "$2" ;;
    esac
}

foreign() { # CHAIN: the beginning of an ML-DSA-65 key, where that is the leaf's and this openssl does not know it
    openssl x509 -in "$1" -noout -text 2>/dev/null |
        grep -q -e 'Key Algorithm: 2[.]16[.]840[.]1[.]101[.]3[.]4[.]3[.]18' -e 'Key Algorithm: ML-DSA-65' || return 1
    echo MIIHsjALBglghkgBZQMEAxID
}

leads() { # CHAIN [OPTION...]: to ROOT.pem and to no other root of this machine
    chain=$1
    shift
    SSL_CERT_DIR=/dev/null SSL_CERT_FILE=/dev/null openssl verify -no-CApath "$@" \\
        -CAfile "$root" -untrusted "$chain" "$chain" >/dev/null 2>&1
}

certified() { # NUMBER
    chain=chain-$1.pem
    openssl x509 -in "$chain" -noout -ext extendedKeyUsage 2>/dev/null | grep -q 'Code Signing' || return 1
    leads "$chain" && return 0
    [ -n "$stamps" ] || return 1
    for stamp in timestamp-"$1"-*.tsr; do
        [ -f "$stamp" ] || continue
        SSL_CERT_DIR=/dev/null SSL_CERT_FILE=/dev/null openssl ts -verify -data "signature-$1.bin" -in "$stamp" \\
            -CAfile "$stamps" >/dev/null 2>&1 || continue
        when=$(openssl ts -reply -in "$stamp" -text 2>/dev/null | sed -n 's/^Time stamp: //p')
        when=$(date -u -d "$when" +%s) || continue
        leads "$chain" -attime "$when" && return 0
    done
    return 1
}

leaf=
trap '[ -z "$leaf" ] || rm -f -- "$leaf"' EXIT
[ -z "$root" ] || leaf=$(mktemp) || exit 2
good=0
bad=0
skipped=0
n=1
while [ "$n" -le @COUNT@ ]; do
    key=${trusted:-key-$n.pem}
    named=$key
    if [ -n "$root" ] && [ -f "chain-$n.pem" ]; then
        key=$leaf
        named=chain-$n.pem
        openssl x509 -in "$named" -noout -pubkey > "$key" 2>/dev/null || foreign "$named" > "$key"
    elif [ -n "$root" ]; then
        key=
    fi
    if [ ! -f "$key" ]; then
        echo "signature $n: nothing to check it with"
        n=$((n + 1))
        continue
    fi
    check "$key" "signature-$n.bin"
    said=$?
    if [ "$said" -eq 3 ]; then
        echo "signature $n: could not be checked here: it is by an ML-DSA key, which needs openssl 3.5" >&2
        skipped=$((skipped + 1))
    elif [ "$said" -eq 0 ] && { [ -z "$root" ] || certified "$n"; }; then
        echo "signature $n: verified with $named"
        good=$((good + 1))
    else
        echo "signature $n: NOT verified with $named" >&2
        bad=$((bad + 1))
    fi
    n=$((n + 1))
done
[ -n "$trusted$root" ] && [ "$good" -gt 0 ] && exit 0
[ "$bad" -gt 0 ] && exit 1
[ "$skipped" -gt 0 ] && exit 2
[ "$good" -gt 0 ] && exit 0
echo "no key: sh verify.sh KEY.pem" >&2
exit 2
"""
