"""Options that several commands share, as named decorators."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import click

if TYPE_CHECKING:
    from vmgraft.signing.keys import PublicKey

F = TypeVar("F", bound=Callable[..., Any])

FILE = click.Path(path_type=Path, dir_okay=False)
DIRECTORY = click.Path(path_type=Path, file_okay=False)


class NamedFile(click.Path):
    """A file that must have a name: ``-`` would be taken for a stream, which cannot stand here."""

    def __init__(self) -> None:
        super().__init__(path_type=Path, dir_okay=False)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Refuse ``-``; else as any path."""
        if str(value) == "-":
            self.fail("a file with a name is expected, not '-'; a file of that name is ./- .", param, ctx)
        return super().convert(value, param, ctx)


NAMED_FILE = NamedFile()


def json_option(function: F) -> F:
    """``--json``: exactly one JSON object on stdout, on success and on failure."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object, on success and on failure.")(
        function
    )


def image_argument(function: F) -> F:
    """The image to work on."""
    return click.argument("image", type=FILE)(function)


def opening_options(function: F) -> F:
    """``--image-format`` and ``--root``; the command gets one ``opening``."""

    @functools.wraps(function)
    def command(*args: Any, root: Path | None, image_format: str | None, **kwargs: Any) -> Any:
        from vmgraft.imagefmt.contract import Opening

        return function(*args, opening=Opening(root=root, format=image_format), **kwargs)

    for option in (
        click.option(
            "--root", type=DIRECTORY, help="Folder that backing files must lie in (default: the image's own folder)."
        ),
        click.option(
            "--image-format", type=click.Choice(["qcow2", "iso9660", "vhd", "vmdk", "vdi", "vhdx", "zip", "raw"]),
            help="Format of the image (default: found out). Name it for raw disks whose guest is not trusted.",
        ),
    ):  # fmt: skip
        command = option(command)
    return cast("F", command)


def policy_option(function: F) -> F:
    """``--policy``: the trust policy file; there is no default, since a missing policy means no."""
    return click.option("--policy", "policy_path", type=FILE, required=True, help="The trust policy file.")(function)


def policy_trust_options(function: F) -> F:
    """``--policy-key`` and ``--require-signed-policy``: who must have signed the policy."""
    function = click.option(
        "--require-signed-policy", "signed_policy", is_flag=True, help="Refuse a policy that is not signed."
    )(function)
    return click.option(
        "--policy-key", "policy_keys", type=FILE, multiple=True,
        help="Public key of which one must have signed the policy; repeatable.",
    )(function)  # fmt: skip


@dataclass(frozen=True, slots=True)
class HostTrust:
    """What a host decides by.

    Attributes:
        policy: The trust policy file.
        key_files: Public keys of which one must have signed it.
        signed: Refuse a policy that is not signed.
        state: Where the host remembers; None to remember nothing.
    """

    policy: Path
    key_files: tuple[Path, ...]
    signed: bool
    state: Path | None

    def keys(self) -> tuple[PublicKey, ...]:
        """Read the public keys."""
        from vmgraft.signing.keyfiles import load_public

        return tuple(map(load_public, self.key_files))


def host_trust_options(function: F) -> F:
    """Policy, its signers, and ``--state``: where the host remembers; the command gets one ``trust``.

    The memory is the user's own unless another, or ``none``, is named.
    """

    @functools.wraps(function)
    def command(
        *args: Any, policy_path: Path, policy_keys: tuple[Path, ...], signed_policy: bool, state: str | None,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        from vmgraft.signing.statefile import default_path

        path = default_path() if state is None else None if state == "none" else Path(state)
        return function(*args, trust=HostTrust(policy_path, policy_keys, signed_policy, path), **kwargs)

    for option in (
        click.option(
            "--state", metavar="FILE|none",
            help="Rollback memory of this host (default: ~/.local/state/vmgraft/state.db). none: remember nothing.",
        ),
        policy_trust_options,
        policy_option,
    ):  # fmt: skip
        command = option(command)
    return cast("F", command)


def quiet_option(function: F) -> F:
    """``--quiet``: no progress bar."""
    return click.option("-q", "--quiet", is_flag=True, help="No progress bar.")(function)


def flat_digest_option(function: F) -> F:
    """``--flat-digest``: whether the flat SHA-256 is computed beside the content tree."""
    return click.option(
        "--flat-digest", type=click.Choice(["auto", "always", "never"]), default="auto", show_default=True,
        help="Compute the flat SHA-256 too; auto: up to 16 GiB.",
    )(function)  # fmt: skip


def cpu_option(function: F) -> F:
    """``--cpu``: what executes the guest's instructions."""
    return click.option(
        "--cpu", type=click.Choice(["auto", "kvm", "soft"]), default="auto", show_default=True,
        help="CPU engine; auto: /dev/kvm where it works, else the soft CPU.",
    )(function)  # fmt: skip


def passphrase_options(function: F) -> F:
    """``--passphrase-file`` and ``--passphrase-fd``."""
    function = click.option(
        "--passphrase-fd", type=click.IntRange(0, (1 << 31) - 1), help="Read the passphrase from this open descriptor."
    )(function)
    return click.option("--passphrase-file", type=FILE, help="Read the passphrase from the first line of this file.")(
        function
    )


def keys_option(*, required: bool) -> Callable[[F], F]:
    """``--key``, ``--certificate`` and the passphrase options; the command gets one ``keys`` (``keyring.Keys``)."""

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def command(*args: Any, **kwargs: Any) -> Any:
            from vmgraft.cli.keyring import Keys

            names = ("key_references", "certificates", "passphrase_file", "passphrase_fd")
            return function(*args, keys=Keys(*(kwargs.pop(name) for name in names)), **kwargs)

        for option in (
            passphrase_options,
            click.option(
                "--certificate", "certificates", multiple=True, type=FILE,
                help="PEM chain for one of the keys, leaf first; goes along with its signatures; repeatable.",
            ),
            click.option(
                "--key", "key_references", multiple=True, required=required, metavar="KEY",
                help="Private key: path, file:, pkcs11:, exec: or a KMS URI (see `vmgraft key show`); repeatable.",
            ),
        ):  # fmt: skip
            command = option(command)
        return cast("F", command)

    return decorate


@dataclass(frozen=True, slots=True)
class Signing:
    """What a user says about a new statement and where it goes; None and empty where nothing was said."""

    output: Path | None
    binding: str | None
    placement: str | None
    flat_digest: Literal["auto", "always", "never"] | None
    expires: datetime | None
    trust: tuple[Path, ...]


def signing_options(function: F) -> F:
    """Everything about a new statement; the command gets one ``signing``."""
    names = ("output", "binding", "placement", "flat_digest", "expires", "trust")

    @functools.wraps(function)
    def command(*args: Any, **kwargs: Any) -> Any:
        values = {name: kwargs.pop(name) for name in names}
        if values["expires"] is not None:
            values["expires"] = values["expires"].replace(tzinfo=UTC)
        return function(*args, signing=Signing(**values), **kwargs)

    kept = "; for a graft that is there already: as it was"
    for option in (
        click.option(
            "--trust", multiple=True, type=FILE,
            help="Public key that signed the graft that is there (the --keys are trusted anyway); repeatable.",
        ),
        click.option(
            "--expires", type=click.DateTime(["%Y-%m-%dT%H:%M:%SZ", "%Y-%m-%d"]),
            help="End of validity, UTC (2027-11-22). Default: none" + kept + ".",
        ),
        click.option(
            "--flat-digest", type=click.Choice(["auto", "always", "never"]),
            help="Sign the flat SHA-256 too; auto: up to 16 GiB. Default: auto" + kept + ".",
        ),
        click.option(
            "--placement", type=click.Choice(["auto", "inline", "sidecar"]),
            help="In the file itself, or in IMAGE.vmgraft beside it. Default: auto, inline where it fits" + kept + ".",
        ),
        click.option(
            "--binding", type=click.Choice(["image", "any"]),
            help="What is signed: good for this content only, or portable. Default: image" + kept + ".",
        ),
        click.option("-o", "--output", type=FILE, help="Write the result to a new file and leave IMAGE alone."),
    ):  # fmt: skip
        command = option(command)
    return cast("F", command)
