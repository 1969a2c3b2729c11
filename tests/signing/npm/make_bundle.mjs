// node make_bundle.mjs STATEMENT KEY.pem OUT HINT [CERTIFICATE.pem [chain]]: signs a statement and writes a bundle, v0.3,
// or v0.2 where "chain" is said; the encoding, the signature and the bundle are all made by node and sigstore-js.
import { createPrivateKey, sign, X509Certificate } from "node:crypto";
import { readFileSync, writeFileSync } from "node:fs";
import { bundleToJSON, toDSSEBundle } from "@sigstore/bundle";
import { dsse } from "@sigstore/core";

const [statementPath, keyPath, out, keyHint, certificatePath, chain] = process.argv.slice(2);
const artifact = readFileSync(statementPath);
const artifactType = "application/vnd.in-toto+json";
const key = createPrivateKey(readFileSync(keyPath));
const digest = key.asymmetricKeyType === "ed25519" ? null : "sha256";
const signature = sign(digest, dsse.preAuthEncoding(artifactType, artifact), key);
const certificate = certificatePath ? new X509Certificate(readFileSync(certificatePath)).raw : undefined;
const options = { artifact, artifactType, signature, keyHint, certificate, certificateChain: chain === "chain" };
writeFileSync(out, JSON.stringify(bundleToJSON(toDSSEBundle(options))));
