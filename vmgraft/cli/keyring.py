"""The keys of a command line: what was said about them, and how they are opened."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmgraft.signing.signers import Signer


@dataclass(frozen=True, slots=True)
class Keys:
    """What a user says about the keys that sign.

    Attributes:
        references: Paths and URIs, as given with ``--key``.
        certificates: Chains for some of them, as given with ``--certificate``.
        passphrase_file: ``--passphrase-file``.
        passphrase_fd: ``--passphrase-fd``.
    """

    references: tuple[str, ...]
    certificates: tuple[Path, ...]
    passphrase_file: Path | None
    passphrase_fd: int | None

    def __bool__(self) -> bool:
        return bool(self.references or self.certificates)

    def load(self) -> list[Signer]:
        """Open the keys, asking for passphrases where needed, and say on stderr what speaks against them.

        Raises:
            VmgraftError: see ``signers.load_signers``.
        """
        from vmgraft.cli.output import show_warnings
        from vmgraft.cli.passphrase import existing_passphrase
        from vmgraft.signing.signers import load_signers, signing_warnings

        source = existing_passphrase(self.passphrase_file, self.passphrase_fd)
        signers = load_signers(self.references, source, certificates=self.certificates)
        for reference, signer in zip(self.references, signers, strict=True):
            show_warnings(signing_warnings(reference, signer))
        return signers
