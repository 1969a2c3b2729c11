"""``export``: the signatures of an image in forms that other tools verify."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from vmgraft.errors import FileError, UsageError
from vmgraft.imagefmt.contract import PROBE, Opening
from vmgraft.inspect.extract import extract_part
from vmgraft.signing.dsse import parse_envelope
from vmgraft.signing.export import export_bundle, export_openssl
from vmgraft.signing.files import write_new
from vmgraft.signing.keyfiles import load_public

FORMATS: Final = ("bundle", "openssl")


def export_image(
    path: Path, form: str, output: Path, publics: Sequence[Path], *, opening: Opening = PROBE
) -> list[Path]:
    """Write Sigstore bundles, or files and a script for OpenSSL, into a folder.

    Args:
        path: The image.
        form: ``bundle`` or ``openssl``.
        output: Folder, created if missing; existing files are not overwritten.
        publics: Public keys of the signers, put beside the script; without them it takes keys as arguments.
        opening: How to open the image.

    Returns:
        The files written.

    Raises:
        NoGraftError: the image carries none.
        UsageError: no such format, or keys with a format that holds none.
        FileError: a file exists or cannot be written.
    """
    if form not in FORMATS:
        raise UsageError(f"no export format {form!r}", field="format", hint="one of " + ", ".join(FORMATS))
    if form != "openssl" and publics:
        raise UsageError("public keys go with the format openssl only", field="key", hint="leave out --key")
    envelope = parse_envelope(extract_part(path, "envelope", opening=opening), file=path)
    if form == "openssl":
        files = export_openssl(envelope, [load_public(public) for public in publics])
    else:
        files = export_bundle(envelope)
    return _write_all(output, files)


def _write_all(folder: Path, files: Sequence[tuple[str, bytes]]) -> list[Path]:
    """Write new files, all of them or none; scripts become executable."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"cannot make the folder: {error.strerror}", file=folder, hint="name another") from error
    written: list[Path] = []
    try:
        for name, data in files:
            write_new(folder / name, data, what="the export", mode=0o777 if name.endswith(".sh") else 0o666)
            written.append(folder / name)
    except BaseException:
        for path in written:
            path.unlink(missing_ok=True)
        raise
    return written
