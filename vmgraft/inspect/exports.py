"""``export``: the signatures of an image in forms that other tools verify."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from vmgraft.errors import UsageError
from vmgraft.imagefmt.contract import PROBE, Opening
from vmgraft.inspect.extract import extract_part
from vmgraft.signing.dsse import parse_envelope
from vmgraft.signing.export import export_bundle, export_openssl
from vmgraft.signing.files import write_folder
from vmgraft.signing.keyfiles import load_public

FORMATS: Final = ("bundle", "openssl")


def export_image(
    path: Path, form: str, output: Path, publics: Sequence[Path], *, bare: bool = False, opening: Opening = PROBE
) -> list[Path]:
    """Write Sigstore bundles, or files and a script for OpenSSL, into a folder.

    Args:
        path: The image.
        form: ``bundle`` or ``openssl``.
        output: Folder, created if missing; existing files are not overwritten.
        publics: Public keys of the signers, put beside the script; without them it takes keys as arguments.
        bare: For bundles: name keys only, without certificates and timestamps.
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
    if form != "bundle" and bare:
        raise UsageError("only bundles can be bare", field="bare", hint="leave out --bare")
    envelope = parse_envelope(extract_part(path, "envelope", opening=opening), file=path)
    if form == "openssl":
        files = export_openssl(envelope, [load_public(public) for public in publics], file=path)
    else:
        files = export_bundle(envelope, bare=bare, file=path)
    return write_folder(output, files, what="the export")
