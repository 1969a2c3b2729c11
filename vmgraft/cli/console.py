"""Where a guest's serial port and screen go. Files are opened before the run, since the host gives up that right."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO, Self

import click

from vmgraft.cli.files import write_stdout
from vmgraft.cli.output import interactive, printable
from vmgraft.errors import FileError, UsageError

if TYPE_CHECKING:
    from vmgraft.cli.terminal import Terminal

#: Bytes a guest may send to a terminal as they are; the rest is shown as escapes, since it could drive the terminal.
_HARMLESS = frozenset(range(0x20, 0x7F)) | {0x08, 0x09, 0x0A, 0x0D}


class Outputs:
    """Opens the files of ``--screen`` and ``--serial``; a context manager.

    Args:
        screen: File, ``-`` for stdout, or None.
        form: ``text`` or ``png``; None goes by the file's name.
        terminal: Shows what the guest sends to the serial port, instead of a file or stdout.
        serial: File, ``-`` for stdout, or None for stdout unless JSON is printed there.
        as_json: Keep stdout for the JSON object.

    Raises:
        FileError: a file exists already or cannot be created.
    """

    def __init__(
        self,
        *,
        screen: Path | None,
        serial: Path | None,
        as_json: bool,
        form: str | None = None,
        terminal: Terminal | None = None,
    ) -> None:
        self._form = screen_format(screen, form)
        if screen is not None and str(screen) == "-" and self._form == "png" and (as_json or interactive(sys.stdout)):
            raise UsageError("a picture goes to a file", hint="--screen FILE.png")
        self._terminal = terminal
        self._files: list[tuple[Path, BinaryIO]] = []
        #: Set once the guest has run: only then do the files stay.
        self.started = False
        self.screen_wanted, self._as_json = screen is not None, as_json
        self._screen = self._open(screen)
        self._serial = self._open(serial)
        self._to_terminal = not as_json and (serial is None or str(serial) == "-")
        self.serial_sink: Callable[[bytes], None] | None = self._write_serial

    def _open(self, path: Path | None) -> BinaryIO | None:
        if path is None or str(path) == "-":
            return None
        try:
            file = path.open("xb")
        except FileExistsError as error:
            self.close()
            raise FileError("the file exists already", file=path, hint="name a new file") from error
        except OSError as error:
            self.close()
            raise FileError(f"cannot create: {error.strerror}", file=path, hint="is there such a folder?") from error
        self._files.append((path, file))
        return file

    def _write_serial(self, data: bytes) -> None:
        if self._serial is not None:
            self._serial.write(data)
            self.started = True
        elif self._terminal is not None:
            self._terminal.show(data)
        elif self._to_terminal and interactive(sys.stdout):
            sys.stdout.write(visible(data))
            sys.stdout.flush()
        elif self._to_terminal:
            write_stdout(data)

    def write_screen(self, lines: tuple[str, ...], cells: bytes | None) -> None:
        """Write the screen where it was asked for: its lines, or a picture of its cells."""
        if self._screen is not None:
            self._screen.write(screen_bytes(lines, cells, self._form))
        elif self.screen_wanted and self._form == "png":
            write_stdout(screen_bytes(lines, cells, self._form))
        elif self.screen_wanted and not self._as_json:
            text = screen_bytes(lines, cells, "text").decode()
            click.echo("\n".join(map(printable, text.split("\n"))), nl=False)

    def close(self) -> None:
        """Close the files; when no guest ran, take them away again."""
        for path, file in self._files:
            file.close()
            if not self.started:
                with suppress(OSError):
                    path.unlink(missing_ok=True)
        self._files.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def visible(data: bytes) -> str:
    """Return guest output for a terminal: escape sequences and other control bytes become ``\\xNN``."""
    return "".join(chr(byte) if byte in _HARMLESS else f"\\x{byte:02x}" for byte in data)


def screen_format(path: Path | None, form: str | None) -> str:
    """Return how a screen is to be saved: as asked for, or by the file's name."""
    return form or ("png" if path is not None and path.suffix.lower() == ".png" else "text")


def screen_bytes(lines: Sequence[str], cells: bytes | None, form: str) -> bytes:
    """Return a screen as it is saved.

    Raises:
        UsageError: a picture is wanted, and there are only lines.
        ValueError: the cells are not those of one screen.
    """
    if form == "text":
        return ("\n".join(lines).rstrip("\n") + "\n").encode()
    if cells is None:
        raise UsageError("this engine shows no text screen to draw", hint="--screen-format text")
    from vmgraft.vmmhost.picture import screen_png

    return screen_png(cells)
