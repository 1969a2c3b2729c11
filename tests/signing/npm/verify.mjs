// node verify.mjs BUNDLE KEY.pem HINT: exits 0 when sigstore-js accepts the bundle with this one key.
import { createPublicKey } from "node:crypto";
import { readFileSync } from "node:fs";
import { bundleFromJSON } from "@sigstore/bundle";
import { Verifier, toSignedEntity, toTrustMaterial } from "@sigstore/verify";

const [bundlePath, keyPath, hint] = process.argv.slice(2);
const bundle = bundleFromJSON(JSON.parse(readFileSync(bundlePath, "utf8")));
const publicKey = createPublicKey(readFileSync(keyPath));

const findKey = (wanted) => {
  if (wanted !== hint) throw new Error(`no key for ${wanted}`);
  return { publicKey, validFor: () => true };
};
const root = { certificateAuthorities: [], timestampAuthorities: [], tlogs: [], ctlogs: [] };
const thresholds = { ctlogThreshold: 0, tlogThreshold: 0, timestampThreshold: 0 };

try {
  new Verifier(toTrustMaterial(root, findKey), thresholds).verify(toSignedEntity(bundle));
  console.log("verified");
} catch (error) {
  console.error(error.message);
  process.exit(1);
}
