"""vmgraft: signed, pluggable extensions for virtual machine monitors, carried in the image's own metadata.

A *vendor* attaches an extension to an image, an *auditor* verifies it, a *host* boots it. All three in one page:

.. code-block:: python

    from pathlib import Path
    from vmgraft import AttachOptions, attach, detach, generate, init_policy, load_package, parse_manifest
    from vmgraft import format_policy, verify_image

    # The vendor: an extension folder, a key, an image.
    clock, key = load_package(Path("examples/clock")), generate("p256")
    attach(Path("disk.qcow2"), [clock], [key], AttachOptions())

    # The host: a policy that trusts the key and grants what the clock declares.
    policy = init_policy({"acme": key.public}, [parse_manifest(clock.manifest)])
    Path("policy.json").write_bytes(format_policy(policy))

    # The auditor: every check, and one verdict.
    report = verify_image(Path("disk.qcow2"), Path("policy.json"))
    assert report.ok, report.checks

    # And back: the file is byte for byte what it was.
    detach(Path("disk.qcow2"))

``Launcher(image, policy, RunOptions()).run()`` boots a verified image; ``open_image`` gives the guest content of any
container; ``convert`` and ``move_graft`` take a graft to another one, ``add_extensions`` and its like change it. Every
failure is a :class:`VmgraftError` with file, offset, field and hint. Names are imported on first use, so that
``import vmgraft`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vmgraft.errors import VmgraftError
    from vmgraft.imagefmt.graft import open_graft, open_image
    from vmgraft.imagefmt.tree import digest_content
    from vmgraft.inspect.diff import diff_images
    from vmgraft.inspect.report import inspect_image
    from vmgraft.inspect.verdict import audit_image, verify_image
    from vmgraft.signing.keyfiles import load_private, load_public
    from vmgraft.signing.keys import generate
    from vmgraft.signing.manifest import parse_manifest
    from vmgraft.signing.policy import load_policy
    from vmgraft.signing.policytools import format_policy, init_policy
    from vmgraft.signing.signers import load_signer
    from vmgraft.signing.state import RollbackState
    from vmgraft.vendor.convert import ConvertOptions, convert
    from vmgraft.vendor.edit import EditOptions, add_extensions, remove_extensions, replace_extensions
    from vmgraft.vendor.graft import AttachOptions, attach, detach
    from vmgraft.vendor.move import MoveOptions, move_graft
    from vmgraft.vendor.pack import load_package
    from vmgraft.vendor.recover import recover
    from vmgraft.vmmhost.launch import Launcher
    from vmgraft.vmmhost.plan import RunOptions

__version__ = "0.1.0"

_PUBLIC = {
    "AttachOptions": "vendor.graft",
    "ConvertOptions": "vendor.convert",
    "EditOptions": "vendor.edit",
    "Launcher": "vmmhost.launch",
    "MoveOptions": "vendor.move",
    "RollbackState": "signing.state",
    "RunOptions": "vmmhost.plan",
    "VmgraftError": "errors",
    "add_extensions": "vendor.edit",
    "attach": "vendor.graft",
    "audit_image": "inspect.verdict",
    "convert": "vendor.convert",
    "detach": "vendor.graft",
    "diff_images": "inspect.diff",
    "digest_content": "imagefmt.tree",
    "format_policy": "signing.policytools",
    "generate": "signing.keys",
    "init_policy": "signing.policytools",
    "inspect_image": "inspect.report",
    "load_package": "vendor.pack",
    "load_policy": "signing.policy",
    "load_private": "signing.keyfiles",
    "load_public": "signing.keyfiles",
    "load_signer": "signing.signers",
    "move_graft": "vendor.move",
    "open_graft": "imagefmt.graft",
    "open_image": "imagefmt.graft",
    "parse_manifest": "signing.manifest",
    "recover": "vendor.recover",
    "remove_extensions": "vendor.edit",
    "replace_extensions": "vendor.edit",
    "verify_image": "inspect.verdict",
}

__all__ = [
    "AttachOptions",
    "ConvertOptions",
    "EditOptions",
    "Launcher",
    "MoveOptions",
    "RollbackState",
    "RunOptions",
    "VmgraftError",
    "add_extensions",
    "attach",
    "audit_image",
    "convert",
    "detach",
    "diff_images",
    "digest_content",
    "format_policy",
    "generate",
    "init_policy",
    "inspect_image",
    "load_package",
    "load_policy",
    "load_private",
    "load_public",
    "load_signer",
    "move_graft",
    "open_graft",
    "open_image",
    "parse_manifest",
    "recover",
    "remove_extensions",
    "replace_extensions",
    "verify_image",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'vmgraft' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"vmgraft.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value
