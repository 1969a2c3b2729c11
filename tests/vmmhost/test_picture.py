"""The picture of a text screen, read by a library of others; its glyphs are those of a ROM of others."""

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vmgraft.cli.console import Outputs, screen_format
from vmgraft.errors import UsageError
from vmgraft.vmmhost.picture import COLOURS, screen_png

BLANK = b" \x07" * 2000
FONT = Path(__file__).resolve().parents[2] / "vmgraft" / "vmmhost" / "data" / "vgafont.bin"


def draw(cells: bytes) -> Image.Image:
    picture = Image.open(io.BytesIO(screen_png(cells)))
    picture.load()
    return picture


def test_an_empty_screen_is_black() -> None:
    picture = draw(BLANK)
    assert (picture.format, picture.size, picture.mode) == ("PNG", (640, 400), "P")
    assert picture.convert("RGB").getcolors() == [(640 * 400, (0, 0, 0))]


def test_every_cell_stands_in_its_place_in_its_colours() -> None:
    """Each of the 256 codes, in each attribute, somewhere on the screen."""
    font = FONT.read_bytes()
    for first in range(0, 256, 8):
        cells = b"".join(bytes(((at * 7 + first) & 0xFF, (at + first * 3) & 0xFF)) for at in range(2000))
        points = draw(cells).load()
        assert points is not None
        for at in range(0, 2000, 37):
            row, column = divmod(at, 80)
            code, attribute = cells[2 * at], cells[2 * at + 1] & 0x7F
            for line in range(16):
                bits = font[code * 16 + line]
                shown = [points[column * 8 + x, row * 16 + line] for x in range(8)]
                assert shown == [attribute & 15 if bits >> (7 - x) & 1 else attribute >> 4 for x in range(8)]


def test_the_palette_is_the_vgas() -> None:
    picture = draw(bytes((0xDB, 0x0E)) * 2000).convert("RGB")
    assert picture.getcolors() == [(640 * 400, (0xFF, 0xFF, 0x55))]
    assert len(COLOURS) == 48


def test_the_glyphs_are_those_of_a_vga_rom() -> None:
    rom = Path("/usr/share/seabios/vgabios-stdvga.bin")  # Debian's seabios
    assert len(FONT.read_bytes()) == 4096
    assert FONT.read_bytes() in rom.read_bytes()


@pytest.mark.parametrize("size", [0, 3999, 4001, 8000])
def test_another_size_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="4000"):
        screen_png(bytes(size))


def test_the_program_saves_text_and_picture(studio: Any) -> None:
    """The example guest writes with the BIOS; the end of both shows the same."""
    studio.graft(studio.wat(studio.ONES))
    command = [sys.executable, "-m", "vmgraft", "run", studio.image, "--policy", studio.policy, "--cpu", "soft"]
    command += ["--state", "none", "--serial", studio.folder / "serial"]
    for name, more in (("a.png", []), ("b.png", ["--screen-format", "text"])):
        (studio.folder / "serial").unlink(missing_ok=True)
        done = subprocess.run([*command, "--screen", studio.folder / name, *more], capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
    text = (studio.folder / "b.png").read_text()
    shown = draw_text(text)
    picture = Image.open(studio.folder / "a.png").convert("L").point(lambda level: 255 if level else 0)
    assert picture.tobytes() == shown.convert("L").point(lambda level: 255 if level else 0).tobytes()
    assert text.strip()


@pytest.mark.parametrize(
    ("name", "asked", "form"),
    [("a.png", None, "png"), ("a", None, "text"), ("a", "png", "png"), ("a.png", "text", "text")],
)
def test_the_form_is_the_one_asked_for_or_the_names(name: str, asked: str | None, form: str) -> None:
    assert screen_format(Path(name), asked) == form


def test_a_picture_does_not_go_where_json_goes() -> None:
    with pytest.raises(UsageError, match="goes to a file"):
        Outputs(screen=Path("-"), form="png", serial=None, as_json=True)


def draw_text(text: str) -> Image.Image:
    cells = bytearray(BLANK)
    for row, line in enumerate(text.rstrip("\n").split("\n")):
        for column, character in enumerate(line):
            cells[2 * (80 * row + column)] = character.encode("cp437")[0]
    return draw(bytes(cells))
