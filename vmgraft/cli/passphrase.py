"""Where the command line gets passphrases from."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from vmgraft.cli.output import interactive
from vmgraft.errors import UsageError
from vmgraft.signing.keyfiles import PassphraseSource


def existing_passphrase(file: Path | None, fd: int | None) -> PassphraseSource:
    """Return the source for a key that exists: file, descriptor, environment, then a prompt on a terminal."""
    return PassphraseSource(file=file, fd=fd, prompt=_ask if interactive(sys.stdin) else None)


def new_passphrase(file: Path | None, fd: int | None) -> bytes:
    """Return the passphrase for a new key; a typed one is asked for twice.

    Raises:
        UsageError: when there is no passphrase and no terminal to ask on.
    """
    prompt = _ask_twice if interactive(sys.stdin) else None
    passphrase = PassphraseSource(file=file, fd=fd, prompt=prompt).get("New passphrase")
    if passphrase is None:
        raise UsageError(
            "no passphrase for the new key",
            hint="--passphrase-file, --passphrase-fd, VMGRAFT_PASSPHRASE, or --no-passphrase for an unencrypted key",
        )
    return passphrase


def _ask(purpose: str) -> str:
    answer: str = click.prompt(purpose.rstrip(": "), hide_input=True, err=True)
    return answer


def _ask_twice(purpose: str) -> str:
    answer: str = click.prompt(purpose, hide_input=True, confirmation_prompt=True, err=True)
    return answer
