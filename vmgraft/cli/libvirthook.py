"""``vmgraft-libvirt-hook``: the program that libvirt asks before it starts a domain.

libvirt runs ``/etc/libvirt/hooks/qemu NAME OPERATION SUB-OPERATION EXTRA`` with the domain's XML on the standard input;
when it ends with anything but 0 the domain is not started, and what it printed on the standard error is the reason
(libvirt, "Hooks for specific system management").
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

from vmgraft.cli.exitcodes import INTERNAL, INTERRUPTED, OK, USAGE, exit_code

if TYPE_CHECKING:
    from vmgraft.imagefmt.contract import Image, Opening
    from vmgraft.signing.contract import Report
    from vmgraft.vmmhost.qemu.domain import DomainDisk
    from vmgraft.vmmhost.qemu.hookconfig import HookConfig

#: Names another configuration; libvirt's own environment decides, so only who runs libvirt can set it.
VARIABLE: Final = "VMGRAFT_LIBVIRT_HOOK"
_ARGUMENTS: Final = 3


def main() -> NoReturn:
    """Run the program; every end but 0 refuses the domain."""
    try:
        sys.exit(run(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def run(arguments: list[str]) -> int:
    """Look at a domain that is about to be prepared; return the exit code."""
    from vmgraft.errors import VmgraftError

    if len(arguments) < _ARGUMENTS:
        return _refuse("vmgraft-libvirt-hook: to be run by libvirt, as /etc/libvirt/hooks/qemu", USAGE)
    name, operation, step = arguments[:_ARGUMENTS]
    if (operation, step) != ("prepare", "begin"):
        return OK
    try:
        _check(name)
    except VmgraftError as error:
        hint = f" ({error.hint})" if error.hint else ""
        return _refuse(f"vmgraft: domain {name} refused: {error.code}: {error}{hint}", exit_code(error.code))
    except _RefusedError as refused:
        return _refuse(f"vmgraft: domain {name} refused: {refused}", exit_code(refused.code))
    except Exception as error:  # noqa: BLE001 - the last line: whatever goes wrong, the domain does not start
        return _refuse(f"vmgraft: domain {name} refused: internal: {type(error).__name__}: {error}", INTERNAL)
    return OK


def _check(name: str) -> None:
    """Raise for a domain that must not be started."""
    from vmgraft.errors import UnsupportedError
    from vmgraft.vmmhost.qemu.domain import MAX_XML, parse_domain
    from vmgraft.vmmhost.qemu.hookconfig import DEFAULT_CONFIG, load_config

    config = load_config(Path(os.environ.get(VARIABLE) or DEFAULT_CONFIG))
    if name in config.exempt:
        return
    domain = parse_domain(sys.stdin.buffer.read(MAX_XML + 1))
    if domain.commandline and not config.allow_commandline:
        raise UnsupportedError("its XML has arguments for QEMU, which may be disks", hint="allowCommandline = true")
    for disk in domain.disks:
        _check_disk(disk, config)


def _check_disk(disk: DomainDisk, config: HookConfig) -> None:
    """Raise for a disk that the policy does not accept."""
    from vmgraft.imagefmt.contract import Opening
    from vmgraft.imagefmt.graft import open_image
    from vmgraft.vmmhost.qemu.domain import check_source, check_view, image_format

    path = check_source(disk, config.trusted_sockets)
    if path is None:
        return
    with open_image(path, Opening(root=config.root)) as probed:
        found = probed.format_name
    opening = Opening(root=config.root, format=image_format(disk, found))
    with open_image(path, opening) as image:
        check_view(disk, image.virtual_size, _below(image, opening))
    report = _verify(path, opening, config)
    if not report.ok:
        raise _RefusedError(report, f"{disk.label}, {path}")


def _below(image: Image, opening: Opening) -> list[tuple[Path, str]]:
    """Return the files that an image reads through, nearest first, each with the format it is read in."""
    from vmgraft.imagefmt.contract import Opening
    from vmgraft.imagefmt.graft import open_image

    found: list[tuple[Path, str]] = []
    named = image.metadata().get("backing") or {}
    for path in image.backing_chain():
        format_name = named.get("format") or "qcow2"  # what does not say so is read only if it is that
        found.append((path, format_name))
        named = {}
        if format_name == "qcow2":
            with open_image(path, Opening(root=opening.root, format=format_name)) as next_one:
                named = next_one.metadata().get("backing") or {}
    return found


def _verify(path: Path, opening: Opening, config: HookConfig) -> Report:
    from vmgraft.inspect.verdict import verify_image
    from vmgraft.signing.keyfiles import load_public
    from vmgraft.signing.policy import PolicyTrust
    from vmgraft.signing.state import RollbackState, policy_trust

    keys = tuple(map(load_public, config.policy_keys))
    if config.state is None:
        return verify_image(path, config.policy, opening=opening, trust=PolicyTrust(keys, config.signed_policy))
    with RollbackState(config.state, writable=False) as memory:
        trust = policy_trust(memory, keys, required=config.signed_policy)
        return verify_image(path, config.policy, opening=opening, trust=trust, memory=memory)


def _refuse(text: str, code: int) -> int:
    from vmgraft.cli.output import printable

    sys.stderr.write(printable(text) + "\n")
    return code


class _RefusedError(Exception):
    """A disk that the policy does not accept."""

    def __init__(self, report: Report, where: str) -> None:
        from vmgraft.signing.report import error_document

        document = error_document(report) or {}
        self.code = str(document.get("code"))
        hint = f" ({document['hint']})" if document.get("hint") else ""
        super().__init__(f"{self.code}: {where}: {document.get('message')}{hint}")
