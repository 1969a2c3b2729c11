"""The file that tells the libvirt hook what to hold domains to."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from vmgraft.errors import UsageError
from vmgraft.signing.files import read_regular

DEFAULT_CONFIG: Final = Path("/etc/vmgraft/libvirt-hook.toml")
_MAX_CONFIG: Final = 64 << 10


@dataclass(frozen=True, slots=True)
class HookConfig:
    """What domains are held to.

    Attributes:
        policy: The trust policy.
        policy_keys: Keys of which one must have signed it.
        signed_policy: Refuse an unsigned policy.
        state: Rollback memory to compare with; it is only read.
        root: Folder that backing files must lie in; None for each image's own.
        trusted_sockets: Sockets of `vmgraft serve` that domains may have disks on.
        exempt: Names of domains that are not looked at.
        allow_commandline: Accept domains with QEMU arguments of their own.
    """

    policy: Path
    policy_keys: tuple[Path, ...] = ()
    signed_policy: bool = False
    state: Path | None = None
    root: Path | None = None
    trusted_sockets: frozenset[Path] = frozenset()
    exempt: frozenset[str] = frozenset()
    allow_commandline: bool = False


def load_config(path: Path) -> HookConfig:
    """Read the file; relative paths in it are taken from its own folder.

    Raises:
        UsageError: it is missing, malformed, or says something that is not known.
    """
    data = read_regular(path, _MAX_CONFIG, what="the hook's configuration", error=UsageError)
    try:
        document = tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise UsageError(f"not valid TOML: {error}", file=path) from error
    reader = _Reader(path, document)
    policy = reader.path("policy")
    if policy is None:
        raise UsageError("it names no policy", file=path, field="policy", hint='policy = "policy.json"')
    config = HookConfig(
        policy=policy,
        policy_keys=tuple(reader.paths("policyKeys")),
        signed_policy=reader.flag("requireSignedPolicy"),
        state=reader.path("state"),
        root=reader.path("root"),
        trusted_sockets=frozenset(reader.paths("trustedSockets")),
        exempt=frozenset(reader.texts("exempt")),
        allow_commandline=reader.flag("allowCommandline"),
    )
    reader.end()
    return config


class _Reader:
    """Takes members out of a document, each with its type."""

    def __init__(self, file: Path, document: dict[str, Any]) -> None:
        self._file, self._document = file, document

    def flag(self, name: str) -> bool:
        value = self._document.pop(name, False)
        if not isinstance(value, bool):
            raise self._wrong(name, "true or false")
        return value

    def path(self, name: str) -> Path | None:
        value = self._document.pop(name, None)
        if value is None:
            return None
        if not isinstance(value, str) or not value or "\0" in value:
            raise self._wrong(name, "a path")
        return self._file.parent / value

    def paths(self, name: str) -> list[Path]:
        return [self._file.parent / text for text in self.texts(name)]

    def texts(self, name: str) -> list[str]:
        value = self._document.pop(name, [])
        if not isinstance(value, list) or not all(isinstance(item, str) and "\0" not in item for item in value):
            raise self._wrong(name, "a list of texts")
        return value

    def end(self) -> None:
        for name in self._document:
            raise UsageError(f"{name!r} is not known", file=self._file, field=name[:64], hint="see docs/qemu.md")

    def _wrong(self, name: str, wanted: str) -> UsageError:
        return UsageError(f"{wanted} is expected", file=self._file, field=name)
