"""The example folders: from the installed package, or from the source tree of an editable install."""

from __future__ import annotations

from pathlib import Path

import vmgraft
from vmgraft.errors import FileError


def example(name: str) -> Path:
    """Return the folder of an example that ships with the package (``clock`` or ``guest``).

    Raises:
        FileError: neither place has it.
    """
    package = Path(vmgraft.__file__).resolve().parent
    for folder in (package / "data" / "examples" / name, package.parent / "examples" / name):
        if folder.is_dir():
            return folder
    raise FileError("the example is not installed", file=package / "data" / "examples" / name, hint="reinstall vmgraft")
