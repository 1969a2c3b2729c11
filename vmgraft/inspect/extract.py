"""``extract``: a part of the graft, as the bytes that are stored."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from vmgraft.errors import GraftFormatError, UsageError
from vmgraft.imagefmt.contract import PROBE, Opening
from vmgraft.imagefmt.graft import open_graft, open_image
from vmgraft.signing.dsse import parse_envelope
from vmgraft.signing.statement import parse_statement

PARTS: Final = ("statement", "envelope", "manifest", "module", "record")


def extract_part(path: Path, part: str, *, extension: str | None = None, opening: Opening = PROBE) -> bytes:
    """Return a part of the graft; nothing is verified.

    Args:
        path: The image.
        part: One of ``PARTS``.
        extension: Id of the extension, needed for ``manifest`` and ``module`` when the image carries several.
        opening: How to open the image.

    Raises:
        NoGraftError: the image carries none.
        GraftFormatError: the part is missing or damaged.
        UsageError: no such extension, or it is not said which.
    """
    with open_image(path, opening) as image:
        graft = open_graft(image)
        if part == "record":
            if graft.located.record is None:
                raise GraftFormatError(f"no record to extract: {graft.located.detail}", file=path, field="record")
            return graft.located.record.read_all()
        envelopes = graft.envelopes()
        if not envelopes:
            raise GraftFormatError(graft.format_problem() or "the record has no envelope", file=path, field="envelope")
        if part == "envelope":
            return envelopes[0]
        statement = parse_envelope(envelopes[0], file=path).payload
        if part == "statement":
            return statement
        return graft.payload(_subject_digest(statement, part, extension, path))


def _subject_digest(statement: bytes, part: str, extension: str | None, path: Path) -> str:
    """Return the SHA-256 that the statement names for a manifest or module."""
    parsed = parse_statement(statement, file=path)
    chosen = [entry for entry in parsed.extensions if extension in (None, entry.id)]
    if len(chosen) != 1:
        ids = ", ".join(entry.id for entry in parsed.extensions)
        raise UsageError("say which extension with --extension ID", file=path, hint=f"the image carries {ids}")
    name = chosen[0].manifest if part == "manifest" else chosen[0].module
    if name is None:
        raise UsageError(f"{chosen[0].id} has no module", file=path)
    return parsed.subjects[name]["sha256"]
