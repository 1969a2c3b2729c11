"""What an image carries, as found. What the file claims stands below ``unverified``; nothing is a verdict."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from vmgraft.errors import FileError, GraftFormatError, NoGraftError, VmgraftError
from vmgraft.imagefmt.contract import PROBE, GraftState, Image, Located, Opening, Placement
from vmgraft.imagefmt.graft import Graft, open_image
from vmgraft.imagefmt.journal import locate_graft
from vmgraft.imagefmt.partitions import describe
from vmgraft.imagefmt.sidecar import sidecar_path
from vmgraft.schemas import strict_json
from vmgraft.signing.dsse import parse_envelope


def inspect_image(path: Path, opening: Opening = PROBE) -> dict[str, Any]:
    """Describe an image and its graft without trusting either.

    Args:
        path: Any image of a known format.
        opening: How to open the image.

    Returns:
        ``image``: what this program measured. ``graft``: its state, and ``recordFile``, the name of the file beside the
        image that holds the record, if one does. ``unverified``: what the file says of itself: ``virtualSize``,
        ``backingChain``, ``backingProblem``, ``container``, ``partitions`` (None where the content is no disk), and
        with a graft ``locator``, ``sections``, ``envelopes``, ``manifests``, ``hints``.

    Raises:
        FileError: when the file is unreadable or of no known format.
    """
    with open_image(path, opening) as image:
        located = locate_graft(image)
        room = image.room()
        report: dict[str, Any] = {
            "image": {
                "path": str(path),
                "fileSize": _file_size(path),
                "format": image.format_name,
                "room": {"inline": room.inline, "reserve": room.reserve, "reason": room.reason},
            },
            "graft": {
                "state": located.state.value,
                "detail": located.detail,
                "recordFile": _record_file(image.path, located),
            },
            "unverified": {
                "virtualSize": image.virtual_size,
                **_backing(image),
                "container": image.metadata(),
                "partitions": describe(image) if image.is_disk else None,
            },
        }
        if located.state is not GraftState.NONE:
            report["unverified"].update(_claims(Graft(image, located=located)))
    return report


def _record_file(image: Path, located: Located) -> str | None:
    """Return the name of the sidecar or journal that is or should be there for the record; None for inline ones."""
    if located.record_file is not None:
        return located.record_file.name
    if located.locator is None or located.locator.placement is not Placement.SIDECAR:
        return None
    return sidecar_path(image).name


def _backing(image: Image) -> dict[str, Any]:
    """Return the files below an image; where they cannot be opened, the reason. Facts do not depend on them."""
    try:
        return {"backingChain": [str(item) for item in image.backing_chain()], "backingProblem": None}
    except FileError as error:
        return {"backingChain": [], "backingProblem": error.message}


def _file_size(path: Path) -> int:
    """Return the size of the file, or of the block device, in bytes."""
    try:
        with path.open("rb") as file:
            return file.seek(0, os.SEEK_END)
    except OSError as error:
        raise FileError(f"the file cannot be read: {error.strerror}", file=path, hint="was it moved?") from error


def list_extensions(path: Path, opening: Opening = PROBE) -> dict[str, Any]:
    """Return ``{state, detail, recordFile, unverified: {placement, extensions: [...]}}`` of an image; nothing verified.

    The extensions stand in the order in which they are stored, which is the one in which they were signed.

    Raises:
        NoGraftError: the image carries none.
        FileError: when the file is unreadable or of no known format.
    """
    report = inspect_image(path, opening)
    if report["graft"]["state"] == GraftState.NONE.value:
        raise NoGraftError("the image carries no graft", file=path, hint="`vmgraft attach` puts one in")
    keep = ("id", "version", "securityVersion", "title", "vendor", "capabilities", "supplements")
    return {
        **report["graft"],
        "unverified": {
            "placement": (report["unverified"]["locator"] or {}).get("placement"),
            "extensions": [
                {name: entry["manifest"].get(name) for name in keep} if "manifest" in entry else entry
                for entry in report["unverified"]["manifests"]
            ],
        },
    }


def state_warnings(image: Image) -> list[str]:
    """Say in words when the bytes that vmgraft reads may not be all that another program shows; else nothing."""
    located = locate_graft(image)
    if located.record_file is not None:
        return [f"{image.path.name}: {located.detail}"]
    if located.state in (GraftState.NONE, GraftState.OK):
        return []
    return [f"{image.path.name}: graft state {located.state.value}: {located.detail or 'not intact'}"]


def _locator(located: Located) -> dict[str, Any] | None:
    """Return where the locator stands and what it says, or None where there is none."""
    if located.locator is None:
        return None
    return {
        "placement": located.locator.placement.value,
        "offset": located.locator_offset,
        "recordSize": located.locator.record_size,
    }


def _claims(graft: Graft) -> dict[str, Any]:
    """Return what the record says; parts that cannot be read carry ``error`` instead."""
    return {
        "locator": _locator(graft.located),
        "formatProblem": graft.format_problem(),
        "sections": _sections(graft),
        "envelopes": [_envelope(data) for data in graft.envelopes()],
        "manifests": [_manifest(data) for data in graft.manifests()],
        "hints": None if graft.hints() is None else _json(graft.hints() or b""),
    }


def _sections(graft: Graft) -> list[dict[str, Any]]:
    """Return the section table."""
    if graft.record is None:
        return []
    return [
        {
            "kind": section.name,
            "critical": section.critical,
            "compressed": section.compressed,
            "offset": section.offset,
            "storedSize": section.stored_size,
            "rawSize": section.raw_size,
            "sha256": section.raw_sha256.hex(),
        }
        for section in graft.record.sections
    ]


def _envelope(data: bytes) -> dict[str, Any]:
    """Return the signatures and the statement of an envelope for display."""
    try:
        envelope = parse_envelope(data)
    except VmgraftError as error:
        return {"error": str(error)}
    shown: dict[str, Any] = {
        "signatures": [{"keyid": signature.keyid, "bytes": len(signature.sig)} for signature in envelope.signatures]
    }
    shown["statement"] = _json(envelope.payload)
    return shown


def _manifest(data: bytes) -> dict[str, Any]:
    """Return a manifest for display."""
    parsed = _json(data)
    return {"manifest": parsed} if isinstance(parsed, dict) and "error" not in parsed else {"error": "not readable"}


def _json(data: bytes) -> Any:
    """Parse JSON for display; never raises."""
    try:
        return strict_json(data, file=None, error=GraftFormatError, max_bytes=1 << 20)
    except VmgraftError as error:
        return {"error": str(error)}
