"""Reads a trust policy of the Notary Project and says the same in ours, or which field cannot be said.

Notary Project specifications, trust-store-trust-policy.md, version 1.0: OCI policies (``registryScopes``) and blob
policies (``globalPolicy``). The trust store is the folder tree of that document, ``x509/TYPE/NAME/*``. Nothing is
dropped silently: a field that has no counterpart, or whose counterpart would be weaker, ends the import.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Final, Literal, NoReturn, cast

from vmgraft.errors import FileError, PolicyError, UnsupportedError
from vmgraft.schemas import strict_json
from vmgraft.signing.files import read_regular
from vmgraft.signing.policy import parse_policy
from vmgraft.signing.policytools import format_policy
from vmgraft.signing.truststores import as_pem, store_document

#: Largest file of a trust policy or store accepted, in bytes.
MAX_FILE: Final = 1 << 20
#: Most files in one trust store.
MAX_FILES: Final = 64

_TOP: Final = {"version", "trustPolicies"}
_ENTRY: Final = {"name", "registryScopes", "globalPolicy", "signatureVerification", "trustStores", "trustedIdentities"}
_VERIFICATION: Final = {"level", "override", "verifyTimestamp"}
#: What each level does with each check (trust-store-trust-policy.md, "Signature Verification details").
_LEVELS: Final[Mapping[str, frozenset[str]]] = {
    "strict": frozenset(),
    "permissive": frozenset({"authenticTimestamp", "expiry", "revocation"}),
    "audit": frozenset({"authenticity", "authenticTimestamp", "expiry", "revocation"}),
}
_CHECKS: Final = ("authenticity", "authenticTimestamp", "expiry", "revocation")
_SUFFIXES: Final = (".crt", ".cer", ".pem")

_PathOrNone = str | PathLike[str] | None


def import_notary(
    data: bytes,
    trust_store: Path,
    *,
    scopes: Mapping[str, str] | None = None,
    crls: Mapping[str, bytes] | None = None,
    file: _PathOrNone = None,
) -> dict[str, Any]:
    """Return our policy for a Notary Project trust policy.

    The result grants nothing to any extension, since the other side has no word for that.

    Args:
        data: ``trustpolicy.json``, ``trustpolicy.oci.json`` or ``trustpolicy.blob.json``.
        trust_store: The folder that holds ``x509``.
        scopes: Image scope for each registry scope other than ``*``.
        crls: PEM or DER by name of the ``ca`` store; needed where revocation is enforced: nobody is asked online.
        file: What to name in errors.

    Raises:
        UnsupportedError: a field cannot be expressed; ``field`` names it.
        PolicyError: not a Notary Project trust policy.
        FileError: a trust store cannot be read.
    """
    document = strict_json(data, file=file, error=PolicyError, max_bytes=MAX_FILE)
    reader = _Notary(file, trust_store, dict(scopes or {}), dict(crls or {}))
    reader.members(document, _TOP, "the trust policy")
    if document.get("version") != "1.0":
        reader.cannot("only version 1.0 is known", "version")
    entries = document.get("trustPolicies")
    if not isinstance(entries, list) or not 1 <= len(entries) <= 64:
        raise PolicyError("not a list of 1 to 64 trust policies", file=file, field="trustPolicies")
    policies = [reader.entry(entry, f"trustPolicies[{index}]") for index, entry in enumerate(entries)]
    unused = sorted((reader.scopes.keys() - reader.mapped) | (reader.crls.keys() - {name for _, name in reader.wanted}))
    if unused:
        raise UnsupportedError(f"{unused[0]!r} stands nowhere in the trust policy", file=file)
    result: dict[str, Any] = {
        "version": "1.0", "policyVersion": 1, "keys": [],
        "trustStores": list(reader.stores()), "trustPolicies": policies,
    }  # fmt: skip
    parse_policy(format_policy(result), file=file)
    return result


@dataclass(slots=True)
class _Notary:
    """Carries the file's name, and what the entries need."""

    file: _PathOrNone
    folder: Path
    scopes: dict[str, str]
    crls: dict[str, bytes]
    mapped: set[str] = field(default_factory=set)
    #: Stores named by some entry, and whether revocation is enforced in one of them.
    wanted: dict[tuple[str, str], bool] = field(default_factory=dict)

    def cannot(self, message: str, where: str, hint: str | None = None) -> NoReturn:
        raise UnsupportedError(f"cannot be expressed: {message}", file=self.file, field=where, hint=hint)

    def members(self, value: Any, known: set[str], where: str) -> None:
        if not isinstance(value, dict):
            raise PolicyError("not a JSON object", file=self.file, field=where)
        unknown = sorted(value.keys() - known)
        if unknown:
            self.cannot(f"the field {unknown[0][:64]!r} is not known", where)

    def texts(self, value: Any, where: str) -> list[str]:
        if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
            raise PolicyError("not a list of strings", file=self.file, field=where)
        return cast("list[str]", value)

    def entry(self, entry: Any, where: str) -> dict[str, Any]:
        """Return one trust policy."""
        self.members(entry, _ENTRY, where)
        override = self.verification(entry.get("signatureVerification"), f"{where}.signatureVerification")
        references = self.references(entry, where, enforced=override.get("revocation") != "log")
        level: dict[str, Any] = {"level": "strict"}
        if override:
            level["override"] = override
        authorities = [reference for reference in references if reference.startswith("ca:")]
        if not authorities:
            self.cannot("there is no trust store of type ca", f"{where}.trustStores")
        return {
            "name": entry.get("name"),
            "imageScopes": self.image_scopes(entry, where),
            "extensionScopes": ["*"],
            "signatureVerification": level,
            "trustStores": references,
            "trustedIdentities": self.identities(entry.get("trustedIdentities"), f"{where}.trustedIdentities"),
            "signatures": {"anyOf": {"minimumMatches": 1, "of": authorities}},
            "binding": "image",
            "grants": {},
        }

    def verification(self, value: Any, where: str) -> dict[str, str]:
        """Return the override that makes ``strict`` log what the entry only logs."""
        self.members(value, _VERIFICATION, where)
        level, override = value.get("level"), value.get("override", {})
        if level == "skip":
            self.cannot("nothing is ever accepted unverified", f"{where}.level", "take this entry out")
        if not isinstance(level, str) or level not in _LEVELS:
            self.cannot(f"the level {level!r} is not known", f"{where}.level")
        self.members(override, set(_CHECKS), f"{where}.override")
        action = {check: "log" if check in _LEVELS[level] else "enforce" for check in _CHECKS}
        for check, wanted in override.items():
            if wanted not in ("enforce", "log"):
                self.cannot(f"{wanted!r} is not enforce or log", f"{where}.override.{check}")
            action[check] = wanted
        if action["expiry"] != action["authenticTimestamp"]:
            self.cannot(
                "expiry and authenticTimestamp are one check here",
                f"{where}.override",
                "give both the same action",
            )
        return {check: "log" for check in ("authenticity", "expiry", "revocation") if action[check] == "log"}

    def references(self, entry: dict[str, Any], where: str, *, enforced: bool) -> list[str]:
        """Return the trust stores of an entry, and remember that they are wanted."""
        references = self.texts(entry.get("trustStores"), f"{where}.trustStores")
        for reference in references:
            kind, _, name = reference.partition(":")
            if kind not in ("ca", "tsa"):
                self.cannot(f"trust stores of type {kind[:32]!r}", f"{where}.trustStores")
            self.wanted[kind, name] = self.wanted.get((kind, name), False) or (enforced and kind == "ca")
            if enforced and kind == "ca" and name not in self.crls:
                hint = f"give the CRLs with --crl {name}=FILE, or have revocation logged only"
                self.cannot(f"revocation is enforced, and {reference} has no CRL", f"{where}.trustStores", hint)
        verification = entry["signatureVerification"]
        stamps = any(reference.startswith("tsa:") for reference in references)
        if stamps and verification.get("verifyTimestamp", "always") != "afterCertExpiry":
            hint = '"verifyTimestamp": "afterCertExpiry" is what is done here'
            self.cannot("a timestamp beside every signature", f"{where}.signatureVerification.verifyTimestamp", hint)
        return references

    def image_scopes(self, entry: dict[str, Any], where: str) -> list[str]:
        """Return the image scopes for an entry's registry scopes."""
        if "globalPolicy" in entry and "registryScopes" not in entry:
            if entry["globalPolicy"] is not True:
                self.cannot("a blob policy that is chosen by its name", f"{where}.globalPolicy")
            return ["*"]
        if "globalPolicy" in entry:
            self.cannot("both registryScopes and globalPolicy", f"{where}.globalPolicy")
        found = []
        for scope in self.texts(entry.get("registryScopes"), f"{where}.registryScopes"):
            if scope == "*":
                found.append("*")
            elif scope in self.scopes:
                self.mapped.add(scope)
                found.append(self.scopes[scope])
            else:
                hint = f"say which images it stands for: --scope {scope}=name:GLOB"
                self.cannot(f"{scope[:200]!r} names a registry, not an image", f"{where}.registryScopes", hint)
        return list(dict.fromkeys(found))

    def identities(self, value: Any, where: str) -> list[str]:
        """Return whose certificates count."""
        identities = self.texts(value, where)
        for identity in identities:
            if identity != "*" and not identity.startswith("x509.subject:"):
                self.cannot(f"{identity[:200]!r} is neither '*' nor x509.subject", where)
        return identities

    def stores(self) -> Iterator[dict[str, Any]]:
        """Return the trust stores wanted, with their certificates."""
        for (kind, name), enforced in self.wanted.items():
            pem = self.certificates(kind, name)
            crls = self.crls.get(name, b"") if kind == "ca" else b""
            which = cast("Literal['ca', 'tsa']", kind)
            yield store_document(name, which, pem, crls, require_crls=enforced)

    def certificates(self, kind: str, name: str) -> bytes:
        """Return every certificate of a store, as PEM."""
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            raise PolicyError(f"{name[:64]!r} is not the name of a trust store", file=self.file, field="trustStores")
        folder = self.folder / "x509" / kind / name
        try:
            files = sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES)
        except OSError as exc:
            raise FileError(f"the trust store cannot be read: {exc.strerror}", file=folder) from exc
        if not 1 <= len(files) <= MAX_FILES:
            raise FileError(f"a trust store has 1 to {MAX_FILES} files {', '.join(_SUFFIXES)}", file=folder)
        parts = []
        for path in files:
            data = read_regular(path, MAX_FILE, what="the certificate", error=FileError)
            if len(data) > MAX_FILE:
                raise FileError(f"the certificate has more than {MAX_FILE} bytes", file=path)
            parts.append(as_pem(data, "CERTIFICATE"))
        return "".join(parts).encode("ascii")
