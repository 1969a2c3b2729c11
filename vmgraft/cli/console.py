"""Where a guest's serial port and screen go. Files are opened before the run, since the host gives up that right."""

from __future__ import annotations

import os
import stat
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
    """Opens the files of ``--screen``, ``--serial`` and ``--debug``; a context manager.

    Args:
        screen: File, ``-`` for stdout, or None.
        form: ``text`` or ``png``; None goes by the file's name.
        terminal: Shows what the guest sends to the serial port, instead of a file or stdout.
        serial: File, ``-`` for stdout, or None for stdout unless JSON is printed there.
        as_json: Keep stdout for the JSON object.
        debug: File, ``-`` for stdout, or None, for what came out of the debug ports.

    Raises:
        FileError: a file exists already or cannot be created.
    """

    def __init__(
        self,
        *,
        screen: Path | None,
        serial: Path | None,
        as_json: bool,
        debug: Path | None = None,
        form: str | None = None,
        terminal: Terminal | None = None,
    ) -> None:
        self._form = screen_format(screen, form)
        if screen is not None and str(screen) == "-" and self._form == "png" and (as_json or interactive(sys.stdout)):
            raise UsageError("a picture goes to a file", hint="--screen FILE.png")
        self._terminal = terminal
        self._files: list[tuple[Path, BinaryIO]] = []
        self._devices: list[BinaryIO] = []
        #: Set once the guest has run: only then do the files stay.
        self.started = False
        self.screen_wanted, self._as_json = screen is not None, as_json
        self._screen = self._open(screen)
        self._serial = self._open(serial)
        self._debug, self._debug_wanted = self._open(debug), debug is not None
        self._to_terminal = not as_json and (serial is None or str(serial) == "-")
        self.serial_sink: Callable[[bytes], None] | None = self._write_serial

    def _open(self, path: Path | None) -> BinaryIO | None:
        if path is None or str(path) == "-":
            return None
        device = _device(path)
        if device is not None:
            self._devices.append(device)
            return device
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

    def write_debug(self, data: bytes) -> None:
        """Write what came out of the debug ports where it was asked for."""
        if self._debug is not None:
            self._debug.write(data)
        elif self._debug_wanted and not self._as_json and interactive(sys.stdout):
            click.echo(visible(data), nl=False)
        elif self._debug_wanted and not self._as_json:
            write_stdout(data)

    def close(self) -> None:
        """Close the files; when no guest ran, take them away again."""
        for path, file in self._files:
            file.close()
            if not self.started:
                with suppress(OSError):
                    path.unlink(missing_ok=True)
        self._files.clear()
        for device in self._devices:
            device.close()
        self._devices.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _device(path: Path) -> BinaryIO | None:
    """Open a character device, such as /dev/null, which is there before and stays; None for anything else.

    Raises:
        FileError: it cannot be opened.
        UsageError: it is a terminal, which would get the guest's bytes as they are.
    """
    if not path.is_char_device():
        return None
    try:
        fd = os.open(path, os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise FileError(f"cannot open: {error.strerror}", file=path) from error
    if stat.S_ISCHR(os.fstat(fd).st_mode) and not os.isatty(fd):
        os.set_blocking(fd, True)
        return os.fdopen(fd, "wb")
    os.close(fd)
    raise UsageError("a terminal gets no output as it is", file=path, hint="- shows it in a harmless form")


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
