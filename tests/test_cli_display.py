"""Pictures in a terminal: what is written, read back as terminals read it."""

import base64
import io
import os
import re

import numpy as np
import pytest
from PIL import Image

from flux2_mlx.cli import display
from flux2_mlx.cli.display import Display, blocks, fitted, iterm2, kitty, protocol, sheet, sixel


def picture(width: int, height: int, colours: int = 16) -> Image.Image:
    """Random rectangles of few colours, which sixels in hundredths hold exactly."""
    rng = np.random.default_rng(0)
    palette = (np.round(rng.integers(0, 101, (colours, 3)) * 2.55)).astype(np.uint8)
    numbers = np.kron(rng.integers(0, colours, (-(-height // 5), -(-width // 7))), np.ones((5, 7), int))
    return Image.fromarray(palette[numbers[:height, :width]])


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM": "xterm-ghostty"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "ghostty"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, "iterm2"),
        ({"TERM": "xterm-256color", "LC_TERMINAL": "iTerm2"}, "iterm2"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm"}, "iterm2"),
        ({"TERM": "foot"}, "sixel"),
        ({"TERM": "mlterm-256color"}, "sixel"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "Apple_Terminal"}, "blocks"),
        ({"TERM": "tmux-256color", "TERM_PROGRAM": "iTerm.app", "KITTY_WINDOW_ID": "1"}, "blocks"),
        ({"TERM": "xterm-kitty", "TMUX": "/tmp/tmux-1/default,1,0"}, "blocks"),
        ({"TERM": "screen"}, "blocks"),
        ({}, "blocks"),
    ],
)
def test_the_protocol_is_told_by_the_environment(environ, expected):
    assert protocol(environ) == expected


@pytest.mark.parametrize("size", [1, 3072, 3073, 9000])
def test_kitty_gets_a_png_in_pieces(size):
    data = np.random.default_rng(0).bytes(size)
    pieces = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", kitty(data, 30, 12))
    assert kitty(data, 30, 12) == "".join(f"\x1b_G{keys};{text}\x1b\\" for keys, text in pieces)
    assert base64.b64decode("".join(text for _, text in pieces)) == data
    assert all(len(text) <= 4096 and len(text) % 4 == 0 for _, text in pieces)
    first, *others = (keys.split(",") for keys, _ in pieces)
    assert {"a=T", "f=100", "c=30", "r=12", "C=1", "q=2"} < set(first)  # the cursor stays, and nothing is answered
    assert [keys[-1] for keys in (first, *others)] == ["m=1"] * len(others) + ["m=0"]
    assert all(keys == [keys[-1]] for keys in others)


def test_kitty_replaces_the_picture_of_the_same_number():
    numbers = {re.search(r"i=(\d+),p=(\d+)", kitty(data, 3, 2)).groups() for data in (b"a", b"b")}
    assert len(numbers) == 1


def test_iterm2_gets_a_png():
    data = png(picture(40, 30))
    told, text = re.fullmatch(r"\x1b\]1337;File=([^:]*):([^\x07]*)\x07", iterm2(data, 20, 8)).groups()
    assert base64.b64decode(text) == data
    assert told == f"inline=1;size={len(data)};width=20;height=8;preserveAspectRatio=1"


def decoded_sixels(text: str) -> np.ndarray:
    """The image that a terminal makes of sixels, white where nothing is painted."""
    width, height, body = re.fullmatch(r'\x1bPq"1;1;(\d+);(\d+)(.*)\x1b\\', text, re.DOTALL).groups()
    image = np.full((int(height) + 5, int(width), 3), 255, np.uint8)
    colours, colour, x, y = {}, None, 0, 0
    for number, rgb, count, bits, move in re.findall(r"#(\d+)(?:;2;([\d;]+))?|(?:!(\d+))?([?-~])|([$-])", body):
        if number:
            colour = int(number)
            if rgb:
                colours[colour] = [round(int(share) * 2.55) for share in rgb.split(";")]
        elif bits:
            for _ in range(int(count or 1)):
                for row in range(6):
                    if (ord(bits) - 63) >> row & 1:
                        image[y + row, x] = colours[colour]
                x += 1
        else:
            x, y = 0, y + 6 * (move == "-")
    return image[: int(height)]


@pytest.mark.parametrize("size", [(24, 18), (31, 17), (1, 1)])
def test_sixels_hold_the_picture(size):
    image = picture(*size)
    assert np.array_equal(decoded_sixels(sixel(image)), np.asarray(image))


def test_sixels_of_many_colours_are_near():
    gradient = np.stack(np.meshgrid(np.arange(0, 256, 4), np.arange(0, 256, 4)), -1)
    pixels = np.concatenate([gradient, gradient[..., :1]], -1).astype(np.uint8)
    near = decoded_sixels(sixel(Image.fromarray(pixels))).astype(int) - pixels
    assert np.abs(near).mean() < 10


@pytest.mark.parametrize("true_colour", [True, False])
def test_half_blocks_have_two_pixels_a_character(true_colour):
    pixels = np.array([[[255, 0, 0]] * 2 + [[0, 0, 255]], [[0, 255, 0]] * 2 + [[255] * 3]], np.uint8)
    (line,) = blocks(Image.fromarray(pixels), 3, 1, true_colour)
    red, green, blue, white = ("2;255;0;0", "2;0;255;0", "2;0;0;255", "2;255;255;255")
    if not true_colour:
        red, green, blue, white = ("5;196", "5;46", "5;21", "5;231")
    assert line == f"\x1b[38;{red};48;{green}m▀▀\x1b[38;{blue};48;{white}m▀\x1b[0m"


def test_pictures_keep_their_shape_in_characters():
    assert fitted(Image.new("RGB", (1024, 1024)), 79, 20, (8, 16)) == (40, 20)
    assert fitted(Image.new("RGB", (2048, 512)), 79, 20, (8, 16)) == (79, 10)
    assert fitted(Image.new("RGB", (16, 1024)), 79, 20, (8, 16)) == (1, 20)


def test_several_pictures_lie_side_by_side():
    images = [Image.new("RGB", (4, 2), colour) for colour in ("red", "lime", "blue")]
    whole = sheet(images)
    assert whole.size == (8, 4)
    assert [whole.getpixel(place) for place in ((0, 0), (4, 0), (0, 2))] == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    assert sheet(images[:1]) is images[0]


def test_the_next_picture_takes_the_place_of_the_last():
    stream = io.StringIO()
    shown = Display(stream, {})
    shown.show([picture(32, 32)])
    first = stream.getvalue()
    rows = int(re.search(r"\x1b\[(\d+)A\x1b7", first)[1])
    assert first.startswith("\n" * rows + f"\x1b[{rows}A\x1b7")
    assert first.endswith(f"\x1b8\x1b[{rows}B")
    shown.show([picture(32, 32)])
    assert "\n" not in stream.getvalue()[len(first) :]  # nothing scrolls
    shown.leave()
    before = len(stream.getvalue())
    shown.show([picture(32, 32)])
    assert stream.getvalue()[before:].startswith("\n" * rows)


@pytest.mark.parametrize("term", ["xterm-kitty", "foot", "xterm"])
def test_all_protocols_leave_the_cursor_below_the_picture(term):
    stream = io.StringIO()
    Display(stream, {"TERM": term}).show([picture(64, 32)])
    (up,), (down,) = re.findall(r"\x1b\[(\d+)A", stream.getvalue()), re.findall(r"\x1b\[(\d+)B$", stream.getvalue())
    assert up == down
    assert stream.getvalue().count("\x1b7") == stream.getvalue().count("\x1b8") == 1


def test_a_terminal_without_half_blocks_gets_spaces():
    data = io.BytesIO()
    stream = io.TextIOWrapper(data, encoding="ascii", errors="backslashreplace")
    Display(stream, {}).show([picture(32, 32)])
    assert b"\\u2580" not in data.getvalue()
    assert re.search(rb"\x1b\[38;5;\d+;48;5;\d+m +", data.getvalue())


class Interrupted(io.StringIO):
    """Ctrl-C comes in the middle of the first sequence."""

    def write(self, text: str) -> int:
        if "\x1b7" in text and not self.getvalue().count("\x1b7"):
            super().write(text[: len(text) // 2])
            raise KeyboardInterrupt
        return super().write(text)


@pytest.mark.parametrize("term", ["xterm-kitty", "foot", "xterm"])
def test_a_terminal_is_itself_again_after_an_interrupt(term):
    stream = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        Display(stream, {"TERM": term}).show([picture(64, 32)])
    assert re.search(r"\x1b\\\x1b\[0m\x1b8\x1b\[\d+B\n$", stream.getvalue())


def test_a_stream_that_is_no_terminal_has_a_usual_size():
    with open(os.devnull, "w", encoding="utf-8") as stream:
        assert display._terminal(stream) == (24, 80, (8, 16))
