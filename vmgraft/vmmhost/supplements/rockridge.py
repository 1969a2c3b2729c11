"""What a directory record says beyond ISO 9660: System Use Sharing Protocol and Rock Ridge, as far as needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

#: Continuation areas of one record that are followed, and their size.
_MAX_AREAS: Final = 16
_MAX_AREA: Final = 4096
#: Longest name and link that Linux has (NAME_MAX, PATH_MAX).
_MAX_NAME: Final = 255
_MAX_LINK: Final = 4095
_RECORD: Final = 33
#: Flags of NM and of a component of SL (IEEE P1282, 4.1.3.1 and 4.1.4).
_CONTINUE, _CURRENT, _PARENT, _ROOT = 1, 2, 4, 8


@dataclass(frozen=True, slots=True)
class Attributes:
    """Facts of one record; None where it does not say.

    Attributes:
        name: The name's bytes.
        mode: POSIX file mode.
        link: Target of a symbolic link.
        child: Block of the folder that this record stands for.
        relocated: Whether the folder's real place is elsewhere.
        compressed: Whether the bytes are compressed (zisofs).
    """

    name: bytes | None = None
    mode: int | None = None
    link: str | None = None
    child: int | None = None
    relocated: bool = False
    compressed: bool = False


#: (block, offset in it, length) -> bytes of a continuation area.
Fetch = Callable[[int, int, int], bytes]


def skip_of(root: bytes) -> int:
    """Return how many bytes to skip in each record's system use area; -1 where there is no Rock Ridge.

    Args:
        root: The beginning of the root folder.
    """
    if len(root) <= _RECORD or len(root) < root[0]:
        return -1
    used = root[_RECORD + root[32] + (root[32] + 1) % 2 : root[0]]
    is_sp = used[:4] == b"SP\x07\x01" and used[4:6] == b"\xbe\xef" and len(used) >= 7
    return used[6] if is_sp else -1


def system_use(area: bytes, fetch: Fetch) -> Attributes:
    """Return what a system use area says, continuation areas included.

    Raises:
        ValueError: it is malformed or over a limit.
    """
    parts = _Parts()
    for _ in range(_MAX_AREAS):
        following = _entries(area, parts)
        if following is None:
            return parts.done()
        block, offset, length = following
        if length > _MAX_AREA or offset >= _MAX_AREA:
            raise ValueError(f"a continuation area of {length} bytes")
        area = fetch(block, offset, length)
    raise ValueError(f"more than {_MAX_AREAS} continuation areas")


def _entries(area: bytes, parts: _Parts) -> tuple[int, int, int] | None:
    """Take the entries of one area; return where it goes on, or None."""
    following = None
    position = 0
    while position + 4 <= len(area):
        kind, length = area[position : position + 2], area[position + 2]
        if kind[:1] == b"\0":
            break
        if length < 4 or position + length > len(area):
            raise ValueError(f"an entry of {length} bytes")
        body = area[position + 4 : position + length]
        if kind == b"ST":
            break
        if kind == b"CE":
            following = (_number(body, 0), _number(body, 8), _number(body, 16))
        else:
            parts.take(kind, body)
        position += length
    return following


def _number(body: bytes, offset: int) -> int:
    """Return a number that is recorded in both byte orders (ECMA-119, 7.3.3); the little-endian one counts."""
    if len(body) < offset + 4:
        raise ValueError("an entry that is too short")
    return int.from_bytes(body[offset : offset + 4], "little")


class _Parts:
    """Collects the entries of one record."""

    def __init__(self) -> None:
        self._name = b""
        self._has_name = self._has_link = self._glue = False
        self._link: list[str] = []
        self._mode: int | None = None
        self._child: int | None = None
        self._relocated = self._compressed = False

    def take(self, kind: bytes, body: bytes) -> None:
        match kind:
            case b"NM" if body and not body[0] & (_CURRENT | _PARENT):
                self._has_name = True
                self._name += body[1:]
            case b"PX":
                self._mode = _number(body, 0) & 0xFFFF
            case b"SL" if body:
                self._has_link = True
                self._components(body[1:])
            case b"CL":
                self._child = _number(body, 0)
            case b"RE":
                self._relocated = True
            case b"ZF":
                self._compressed = True
            case _:
                pass
        if len(self._name) > _MAX_NAME or sum(map(len, self._link)) > _MAX_LINK:
            raise ValueError("a name or link that is too long")

    def _components(self, data: bytes) -> None:
        """Take components of a link; one may go on in the next entry."""
        while data:
            if len(data) < 2 or len(data) < 2 + data[1]:
                raise ValueError("a component of a link that is too short")
            flags, text = data[0], data[2 : 2 + data[1]].decode("utf-8", "replace")
            data = data[2 + data[1] :]
            text = {_CURRENT: ".", _PARENT: "..", _ROOT: ""}.get(flags & ~_CONTINUE, text)
            if self._glue:
                self._link[-1] += text
            else:
                self._link.append(text)
            self._glue = bool(flags & _CONTINUE)

    def done(self) -> Attributes:
        link = "/".join(self._link) if self._link != [""] else "/"
        if self._has_link and (not link or "\0" in link):
            raise ValueError("a link to nothing")
        return Attributes(
            self._name if self._has_name else None,
            self._mode,
            link if self._has_link else None,
            self._child,
            self._relocated,
            self._compressed,
        )
