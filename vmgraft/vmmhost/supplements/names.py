"""Names of files on a volume: three for each, since ISO 9660 itself has room for few characters only.

* Rock Ridge (IEEE P1282): the name itself, which Linux, GRUB and others show.
* Joliet: up to 64 characters of UCS-2 without ``* / : ; ? \\`` (Joliet specification, 1995), which Windows shows.
* ISO 9660 (ECMA-119, 7.4 to 7.6): d-characters, A to Z, 0 to 9 and ``_``, one dot in files, at most 30 of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

#: Longest identifiers: ECMA-119, 7.5.1 and 7.6.3; two characters are kept free for the version of a file.
_ISO_FILE: Final = 28
_ISO_FOLDER: Final = 28
_ISO_EXTENSION: Final = 8
_JOLIET: Final = 64
_NOT_D: Final = re.compile(r"[^A-Z0-9_]")
_NOT_JOLIET: Final = re.compile(r"[\x00-\x1f*/:;?\\]|[^\x00-\uffff]|[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class VolumeName:
    """The names of one file or folder within its folder."""

    rock_ridge: str
    joliet: str
    iso: str


def volume_names(names: Iterable[tuple[str, bool]]) -> dict[str, VolumeName]:
    """Return the three names of everything in one folder, none of them given twice; equal input, equal names.

    Args:
        names: Name, and whether it is a folder.
    """
    result: dict[str, VolumeName] = {}
    iso_names, joliet_names = _Names(), _Names()
    for name, folder in sorted(names):
        iso = iso_names.take(name, _iso_folder if folder else _iso_file)
        joliet = joliet_names.take(name, _joliet)
        result[name] = VolumeName(name, joliet, iso if folder else iso + ";1")
    return result


class _Names:
    """What is taken in one folder, folders and files counted together, case ignored."""

    def __init__(self) -> None:
        self._taken: set[str] = set()
        #: For each shape with room for a number: the lowest that may be free. Thousands may share one shape.
        self._next: dict[str, int] = {}

    def take(self, name: str, shape: Callable[[str, str], str]) -> str:
        """Return the first of a name's shapes that nobody has: as it is, then with ``_1``, ``_2`` … behind."""
        shaped = shape(name, "")
        digits = 0
        while not self._add(shaped):
            digits += 1
            alike = shape(name, "_" + "0" * digits)
            number = self._next.get(alike, 10 ** (digits - 1))
            while number < 10**digits and not self._add(shaped := shape(name, f"_{number}")):
                number += 1
            self._next[alike] = number + 1
            if number < 10**digits:
                break
        return shaped

    def _add(self, shaped: str) -> bool:
        key = shaped.rstrip(".").upper()
        if key in self._taken:
            return False
        self._taken.add(key)
        return True


def _iso_folder(name: str, suffix: str) -> str:
    return _NOT_D.sub("_", name.upper())[: _ISO_FOLDER - len(suffix)] + suffix


def _iso_file(name: str, suffix: str) -> str:
    base, dot, extension = name.upper().rpartition(".")
    if not dot or not base:
        base, extension = name.upper(), ""
    extension = _NOT_D.sub("_", extension)[:_ISO_EXTENSION]
    return _NOT_D.sub("_", base)[: _ISO_FILE - len(extension) - len(suffix)] + suffix + "." + extension


def _joliet(name: str, suffix: str) -> str:
    """Cut to 64 bytes of UTF-8, the library's measure; so it is never more than 64 characters."""
    clean = _NOT_JOLIET.sub("_", name).encode()[: _JOLIET - len(suffix)]
    return clean.decode(errors="ignore") + suffix
