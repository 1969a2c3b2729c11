"""What a case of the corpus is: files made from nothing, and what a reader must say about them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Sparse:
    """A file of ``size`` bytes that is a hole but for ``pieces`` (offset → bytes)."""

    size: int
    pieces: Mapping[int, bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Link:
    """A symbolic link."""

    target: str


@dataclass(frozen=True, slots=True)
class Fifo:
    """A named pipe: who opens it for reading and waits, waits for ever."""


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder where a file is expected."""


Content = bytes | bytearray | Sparse | Link | Fifo | Folder


@dataclass(frozen=True, slots=True)
class Expect:
    """What a reader must say.

    Attributes:
        stage: Where the error shows: ``open``, ``content`` (opens, but guest content is refused) or ``sound``.
        error: Class of that error.
        field: Its field: the whole of it, or its beginning up to a dot or bracket.
        message: A part of its text.
        state: The graft's state, where the image opens.
        detail: A part of the state's detail.
        problem: A part of what ``format_problem`` says; None: it is not looked at.
        fact: A part of the metadata as text, for damage that is shown and not refused.
        snapshot: A part of what reading the first snapshot says.
    """

    stage: str
    error: str | None = None
    field: str | None = None
    message: str = ""
    state: str = "none"
    detail: str = ""
    problem: str | None = None
    fact: str = ""
    snapshot: str = ""


@dataclass(frozen=True, slots=True)
class Case:
    """One malformed input; ``make`` returns its files, the image first."""

    name: str
    what: str
    make: Callable[[], Mapping[str, Content]]
    expect: Expect

    @property
    def container(self) -> str:
        """The part of the name before the slash."""
        return self.name.split("/")[0]


def refused(field_name: str | None, message: str, error: str = "MalformedImageError") -> Expect:
    """The image does not even open."""
    return Expect("open", error, field_name, message)


def unreadable(field_name: str | None, message: str, error: str = "MalformedImageError", **more: str) -> Expect:
    """The image opens and can be inspected; its guest content is refused."""
    return Expect("content", error, field_name, message, **more)


def graft(state: str, detail: str = "", problem: str | None = None) -> Expect:
    """The content is fine, the graft is not."""
    return Expect("sound", state=state, detail=detail, problem=problem)


def harmless(fact: str = "", snapshot: str = "") -> Expect:
    """Odd, yet well-formed or only shown; nothing is refused, and it costs no more than other images."""
    return Expect("sound", fact=fact, snapshot=snapshot)


def write_case(case: Case, folder: Path) -> Path:
    """Write the files of a case below ``folder`` and return the image."""
    target = folder / case.name
    target.mkdir(parents=True)
    files = case.make()
    for name, content in files.items():
        _write(target / name, content)
    return target / next(iter(files))


def _write(path: Path, content: Content) -> None:
    if isinstance(content, bytes | bytearray):
        path.write_bytes(content)
    elif isinstance(content, Sparse):
        with path.open("wb") as file:
            file.truncate(content.size)
            for offset, piece in content.pieces.items():
                file.seek(offset)
                file.write(piece)
    elif isinstance(content, Link):
        path.symlink_to(content.target)
    elif isinstance(content, Fifo):
        os.mkfifo(path)
    else:
        path.mkdir()


def index_of(cases: Iterable[Case]) -> dict[str, dict[str, object]]:
    """Return the table of names, what was broken, and what is expected; JSON-able."""
    rows = {}
    for case in cases:
        wanted = {key: value for key, value in asdict(case.expect).items() if value not in ("", None)}
        rows[case.name] = {"what": case.what, "expect": wanted}
    return rows


def poke(data: bytes | bytearray, *changes: tuple[int, bytes]) -> bytes:
    """Return ``data`` with bytes replaced: (offset, bytes) each. A change that changes nothing is a mistake."""
    out = bytearray(data)
    for offset, piece in changes:
        if not 0 <= offset <= len(out) - len(piece) or out[offset : offset + len(piece)] == piece:
            raise ValueError(f"a change at {offset} changes nothing")
        out[offset : offset + len(piece)] = piece
    return bytes(out)
