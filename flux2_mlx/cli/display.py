"""Pictures in a terminal, in place above what is written next: by kitty's protocol, iTerm2's, sixels or half blocks."""

import base64
import fcntl
import io
import os
import struct
import termios
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from itertools import groupby
from typing import TYPE_CHECKING, TextIO

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

_ID = 1816  # of the one picture that kitty is to keep, which another one of this number replaces
_CHUNK = 4096  # bytes of base64 that kitty takes at a time
_SAVE, _RESTORE = "\x1b7", "\x1b8"  # the place of the cursor
_END = "\x1b\\\x1b[0m"  # of a sequence that was cut short, and of its colours
_CELL = 8, 16  # pixels of a character where the terminal does not tell
_MOST_ROWS = 24
_HALF = "▀"
_COLOURS = 128  # of sixels; more take longer and are hardly seen
_SIXELS = ("foot", "mlterm", "contour", "yaft", "sixel")  # what the names of terminals begin or end with
_MULTIPLEXERS = ("tmux", "screen")


def protocol(environ: Mapping[str, str]) -> str:
    """How the terminal of these variables shows pictures: `kitty`, `iterm2`, `sixel` or `blocks`.

    Nothing is asked of the terminal, whose answer might never come, or come to a later program. Of what a multiplexer
    is shown in nothing is known.
    """
    term, program = environ.get("TERM", ""), environ.get("TERM_PROGRAM", "")
    if "TMUX" in environ or "STY" in environ or term.startswith(_MULTIPLEXERS):
        return "blocks"
    if "KITTY_WINDOW_ID" in environ or term in ("xterm-kitty", "xterm-ghostty") or program == "ghostty":
        return "kitty"
    if program in ("iTerm.app", "WezTerm") or environ.get("LC_TERMINAL") == "iTerm2" or "WEZTERM_PANE" in environ:
        return "iterm2"
    return "sixel" if term.startswith(_SIXELS) or term.endswith(_SIXELS) else "blocks"


def kitty(png: bytes, columns: int, rows: int) -> str:
    """What has kitty and Ghostty show a PNG over so many characters, and leave the cursor where it is."""
    data = base64.b64encode(png).decode()
    chunks = [data[start : start + _CHUNK] for start in range(0, len(data), _CHUNK)]
    head = f"a=T,f=100,i={_ID},p=1,c={columns},r={rows},C=1,q=2,"
    last = len(chunks) - 1
    return "".join(
        f"\x1b_G{'' if number else head}m={int(number < last)};{chunk}\x1b\\" for number, chunk in enumerate(chunks)
    )


def iterm2(png: bytes, columns: int, rows: int) -> str:
    """What has iTerm2 and WezTerm show a PNG over so many characters."""
    settings = f"inline=1;size={len(png)};width={columns};height={rows};preserveAspectRatio=1"
    return f"\x1b]1337;File={settings}:{base64.b64encode(png).decode()}\x07"


def sixel(image: "Image.Image") -> str:
    """An image as sixels, in colours of its own."""
    from PIL import Image

    indexed = image.convert("RGB").quantize(_COLOURS, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    palette = indexed.getpalette() or []
    pixels = np.asarray(indexed)
    shares = {
        colour: [round(value / 2.55) for value in palette[3 * colour :][:3]] for colour in np.unique(pixels).tolist()
    }
    table = "".join(f"#{colour};2;{red};{green};{blue}" for colour, (red, green, blue) in shares.items())
    bands = "-".join("$".join(_band(pixels[top : top + 6])) for top in range(0, len(pixels), 6))
    return f'\x1bPq"1;1;{image.width};{image.height}{table}{bands}\x1b\\'


def _band(rows: np.ndarray) -> Iterator[str]:
    """Up to six rows of pixels, colour by colour: for each column which of the rows have it, lowest bit first."""
    weights = 1 << np.arange(len(rows))
    for colour in np.unique(rows):
        bits = weights @ (rows == colour)
        starts = np.flatnonzero(np.diff(bits, prepend=-1))
        counts = np.diff(starts, append=len(bits))
        yield f"#{colour}" + "".join(map(_repeated, bits[starts].tolist(), counts.tolist()))


def _repeated(bits: int, count: int) -> str:
    return f"!{count}{chr(63 + bits)}" if count > 3 else chr(63 + bits) * count


def blocks(image: "Image.Image", columns: int, rows: int, true_colour: bool = True) -> list[str]:
    """Lines of half blocks, two pixels to a character, in 24 bits or else in xterm's 256 colours."""
    small = image.convert("RGB").resize((columns, 2 * rows))
    pixels = [tuple(small.tobytes()[i : i + 3]) for i in range(0, 6 * columns * rows, 3)]
    coded: Callable[[int, int, int], str] = _true if true_colour else _of_256
    lines = []
    for top in range(0, len(pixels), 2 * columns):
        upper, lower = pixels[top : top + columns], pixels[top + columns : top + 2 * columns]
        pairs = groupby(zip(upper, lower, strict=True))
        cells = (f"\x1b[38;{coded(*up)};48;{coded(*low)}m{_HALF * len(list(run))}" for (up, low), run in pairs)
        lines.append("".join(cells) + "\x1b[0m")
    return lines


def _true(red: int, green: int, blue: int) -> str:
    return f"2;{red};{green};{blue}"


@cache
def _of_256(red: int, green: int, blue: int) -> str:
    """The nearest of the 6×6×6 colours, whose levels are 0, 95, 135, …, 255."""
    r, g, b = (0 if x < 48 else max(1, (x - 35) // 40) for x in (red, green, blue))
    return f"5;{16 + 36 * r + 6 * g + b}"


def sheet(images: "Sequence[Image.Image]") -> "Image.Image":
    """Several images of one size as one, in about as many columns as rows."""
    from PIL import Image

    if len(images) == 1:
        return images[0]
    width, height = images[0].size
    across = round(len(images) ** 0.5 + 0.499)
    whole = Image.new("RGB", (across * width, -(-len(images) // across) * height))
    for place, image in enumerate(images):
        whole.paste(image, (place % across * width, place // across * height))
    return whole


def fitted(image: "Image.Image", columns: int, rows: int, cell: tuple[int, int]) -> tuple[int, int]:
    """Columns and rows of characters of `cell` pixels that an image fills, within so many of each."""
    width, height = image.size
    scale = min(columns * cell[0] / width, rows * cell[1] / height)
    return max(1, round(width * scale / cell[0])), max(1, round(height * scale / cell[1]))


class Display:
    """A picture on a terminal, which the next one replaces as long as nothing else is written below it.

    Everything is written between two lines, at whose beginning the cursor is and is left.
    """

    def __init__(self, stream: TextIO, environ: Mapping[str, str] = os.environ):
        self._stream = stream
        self._protocol = protocol(environ)
        self._true_colour = environ.get("COLORTERM", "") in ("truecolor", "24bit")
        self._has_half_blocks = _has_half_blocks(stream)
        self._rows = 0  # of the picture above the cursor that may be replaced

    def leave(self) -> None:
        """Have the picture stay where it is, since the lines below it are someone else's now."""
        self._rows = 0

    def show(self, images: "Sequence[Image.Image]") -> None:
        """Show images, in place of what was shown last."""
        image = sheet(images)
        lines, across, cell = _terminal(self._stream)
        columns, rows = fitted(image, across - 1, min(_MOST_ROWS, lines - 4), cell)
        if rows != self._rows:
            self._write("\n" * rows)
            self._rows = rows
        drawn = self._drawn(image, columns, rows, cell)
        try:
            self._write(f"\x1b[{rows}A{_SAVE}{drawn}{_RESTORE}\x1b[{rows}B")
        except BaseException:  # Ctrl-C, too, may come in the middle of a sequence
            self._write(f"{_END}{_RESTORE}\x1b[{rows}B\n")
            raise

    def _drawn(self, image: "Image.Image", columns: int, rows: int, cell: tuple[int, int]) -> str:
        if self._protocol == "blocks":
            lines = "\x1b[1B\r".join(blocks(image, columns, rows, self._true_colour))
            return lines if self._has_half_blocks else lines.replace(_HALF, " ")  # whose ground is the lower pixel
        size = columns * cell[0], rows * cell[1]
        if self._protocol == "sixel":
            return sixel(image.resize(size))
        if image.width > size[0]:
            image = image.resize(size)
        png = io.BytesIO()
        image.save(png, "PNG", compress_level=1)
        return (kitty if self._protocol == "kitty" else iterm2)(png.getvalue(), columns, rows)

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def _has_half_blocks(stream: TextIO) -> bool:
    try:
        _HALF.encode(stream.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _terminal(stream: TextIO) -> tuple[int, int, tuple[int, int]]:
    """Lines and columns of a terminal, and the pixels of a character."""
    try:
        told = fcntl.ioctl(stream.fileno(), termios.TIOCGWINSZ, bytes(8))
    except (OSError, ValueError):  # a stream that is none
        told = bytes(8)
    lines, columns, width, height = struct.unpack("HHHH", told)
    lines, columns = lines or 24, columns or 80
    return lines, columns, (width // columns, height // lines) if width and height else _CELL
