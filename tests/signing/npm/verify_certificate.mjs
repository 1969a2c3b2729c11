// node verify_certificate.mjs BUNDLE CA.pem TSA.pem: exits 0 when sigstore-js accepts the bundle by its certificate.
// CA.pem: intermediates and root of the signer. TSA.pem: certificate of the authority, and its issuers up to the root.
import { X509Certificate } from "node:crypto";
import { readFileSync } from "node:fs";
import { bundleFromJSON } from "@sigstore/bundle";
import { Verifier, toSignedEntity, toTrustMaterial } from "@sigstore/verify";

const [bundlePath, caPath, tsaPath] = process.argv.slice(2);
const bundle = bundleFromJSON(JSON.parse(readFileSync(bundlePath, "utf8")));

const authority = (path) => {
  const blocks = readFileSync(path, "utf8").match(/-----BEGIN[^-]+-----[^-]+-----END[^-]+-----/g);
  return { certChain: { certificates: blocks.map((pem) => ({ rawBytes: new X509Certificate(pem).raw })) } };
};
const root = {
  certificateAuthorities: [authority(caPath)],
  timestampAuthorities: [authority(tsaPath)],
  tlogs: [],
  ctlogs: [],
};
const thresholds = { ctlogThreshold: 0, tlogThreshold: 0, timestampThreshold: 1 };

try {
  new Verifier(toTrustMaterial(root), thresholds).verify(toSignedEntity(bundle));
  console.log("verified");
} catch (error) {
  console.error(error.message);
  process.exit(1);
}
