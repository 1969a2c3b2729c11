"""``export``: the signatures of an image in forms that other tools verify."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from vmgraft.errors import FileError
from vmgraft.inspect.extract import extract_part
from vmgraft.signing.dsse import parse_envelope
from vmgraft.signing.export import export_bundle, export_openssl
from vmgraft.signing.keyfiles import load_public

FORMATS: Final = ("bundle", "openssl")


def export_image(
    path: Path, form: str, output: Path, publics: Sequence[Path], *, root: Path | None = None
) -> list[Path]:
    """Write Sigstore bundles, or files and a script for OpenSSL, into a folder.

    Args:
        path: The image.
        form: ``bundle`` or ``openssl``.
        output: Folder, created if missing; existing files are not overwritten.
        publics: Public keys of the signers, put beside the script; without them it takes keys as arguments.
        root: Folder that backing files must lie in.

    Returns:
        The files written.

    Raises:
        NoGraftError: the image carries none.
        FileError: a file exists or cannot be written.
    """

    envelope = parse_envelope(extract_part(path, "envelope", root=root), file=path)
    if form == "openssl":
        files = export_openssl(envelope, [load_public(public) for public in publics])
    else:
        files = export_bundle(envelope)
    return [_write(output, name, data) for name, data in files]


def _write(folder: Path, name: str, data: bytes) -> Path:
    """Write one new file; scripts become executable."""
    path = folder / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            file.write(data)
        if name.endswith(".sh"):
            path.chmod(0o755)
    except OSError as error:
        raise FileError(f"cannot write: {error.strerror}", file=path) from error
    return path
