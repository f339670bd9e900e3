"""What is printed never drives the terminal, whoever it comes from, and error lines have a length."""

import json
import logging
import os
import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from helpers.cli_runner import PROMPT, SMALL, done, error_line, refusal, run
from PIL import Image, PngImagePlugin

from flux2_mlx.cli.main import cli
from flux2_mlx.cli.progress import Stream, Warnings, notice
from flux2_mlx.cli.terminal import in_flags, line, print_result, printable, to_json
from flux2_mlx.errors import InputError

HOSTILE = "\x1b]0;title\x07\x1b[31mred\r\x08\x9b2J\u202egnp.\u2066\x7f"
UNSAFE = re.compile(r"[^\t\n -~\u00a0-\uffff]|[\u200e\u200f\u061c\u2028-\u202e\u2066-\u2069]")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "convert it with quant='qint8', text_quant='qint4', which fits",
            "convert it with -q qint8 --text-quant qint4, which fits",
        ),
        ("one with text_quant='qint4', or", "one with --text-quant qint4, or"),
        ("use dtype='bfloat16'; memory_limit='7.5GiB'", "use --dtype bfloat16; --memory-limit 7.5GiB"),
        ("pass force=True, or replace=True to replace it", "pass --force, or --force to replace it"),
        ("name it with variant=NAME (a, b), or model=NAME", "name it with --variant (a, b), or -m"),
        ("use Enforce=True, or variant=NAMES", "use Enforce=True, or variant=NAMES"),
        ("with models_dir; `flux2_mlx.verification.verify`", "with --models-dir; `flux2-mlx models verify`"),
        ("choose a lower memory_limit, or text_quant", "choose a lower --memory-limit, or --text-quant"),
        ("can't read memory_limit.png, ./memory_limit or my_memory_limit", None),
        ("my_quant='qint8' and quant=8 stay", "my_quant='qint8' and quant=8 stay"),
    ],
)
def test_settings_of_messages_become_flags(message, expected):
    assert in_flags(message) == (expected or message)


def test_an_error_of_the_library_names_flags(monkeypatch):
    def refuse(*settings, **others):
        raise InputError("choose one converted with text_quant='qint4'")

    monkeypatch.setattr("flux2_mlx.store.resolve", refuse)
    assert refusal("download", "demo") == "choose one converted with --text-quant qint4"


@pytest.fixture
def terminal(monkeypatch):
    """Standard output is a terminal."""
    from click.testing import _NamedTextIOWrapper

    monkeypatch.setattr(_NamedTextIOWrapper, "isatty", lambda stream: True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a red fox", "a red fox"),
        ("雪の狐 🦊 é ثعلب 👩‍🎨\n\tsecond line", "雪の狐 🦊 é ثعلب 👩‍🎨\n\tsecond line"),
        ("\x1b[31m\x07\x9b\x7f\0", r"\x1b[31m\x07\x9b\x7f\x00"),
        ("\u202egnp.\u2066\u200f\u2028", r"\u202egnp.\u2066\u200f\u2028"),
        ("a\udcff\ud800", r"a\udcff\ud800"),
    ],
)
def test_what_drives_a_terminal_is_escaped(text, expected):
    assert printable(text) == expected
    assert printable(expected) == expected


def test_a_line_is_one_and_has_a_length():
    assert line(" a\n  b\r\n\tc\u2028d ") == "a b c d"
    assert line("a" * 1000) == "a" * 1000
    long = line("start" + "\x1b" * 10_000 + "end")
    assert len(long) == 1000
    assert (long[:5], long[-3:], long.count("…"), "\x1b" in long) == ("start", "end", 1, False)


@pytest.mark.parametrize("text", ["a\x1b\x9b\x7f\u202e\u2028\udcff\t\n", "雪 é 🦊"])
def test_json_is_safe_and_the_same(text):
    written = to_json({text: [text, 1.5, None]})
    assert json.loads(written) == {text: [text, 1.5, None]}
    assert not UNSAFE.search(written.replace("🦊", ""))
    assert "\n" not in written
    assert ("雪" in text) == ("雪" in written)


@pytest.mark.parametrize(
    "arguments",
    [
        ("t2i", PROMPT, "-m", HOSTILE),
        ("t2i", PROMPT, *SMALL, "-o", f"{HOSTILE}.bmp"),
        ("t2i", PROMPT, *SMALL, "--prompts-file", HOSTILE),
        ("t2i", *SMALL, "--prompts-file", HOSTILE),
        ("t2i", "--replay", HOSTILE),
        ("i2i", PROMPT, "-i", HOSTILE),
        ("convert", HOSTILE, "target"),
        ("convert", "x", f"{HOSTILE}/{HOSTILE}"),
        ("download", HOSTILE),
        ("info", HOSTILE),
        ("t2i", PROMPT, "-W", HOSTILE),
        ("t2i", PROMPT, "-q", HOSTILE),
        ("t2i", PROMPT, f"--{HOSTILE}"),
        (HOSTILE,),
        (f"--{HOSTILE}",),
        ("t2i", PROMPT, "--models-dir", HOSTILE, "-m", HOSTILE),
    ],
)
def test_arguments_do_not_drive_the_terminal(arguments):
    result = run(*arguments)
    assert result.exit_code in (1, 2)
    assert not UNSAFE.search(result.output), result.output


def test_settings_of_a_stranger_do_not_drive_the_terminal():
    info = PngImagePlugin.PngInfo()
    info.add_itxt("flux2-mlx", json.dumps({"prompt": "a", "upsampled_prompt": {HOSTILE: HOSTILE * 1000}}))
    Image.new("RGB", (64, 64)).save("a.png", pnginfo=info)
    message = error_line(run("t2i", "--replay", "a.png").stderr)
    assert message.startswith("the settings in a.png are damaged: upsampled_prompt is ")
    assert len(message) <= 1000
    assert not UNSAFE.search(message)


@pytest.mark.parametrize("error", [InputError(HOSTILE), OSError(5, HOSTILE, HOSTILE), OSError(HOSTILE)])
def test_errors_do_not_drive_the_terminal(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("flux2_mlx.request.check_words", fail)
    assert not UNSAFE.search(error_line(run("t2i", PROMPT).stderr))


def test_notices_warnings_and_streamed_text_do_not_drive_the_terminal(capsys):
    notice(HOSTILE, False)
    Warnings().emit(logging.LogRecord("a", logging.WARNING, "", 1, "%s\n%s", (HOSTILE, HOSTILE), None))
    with Stream(False) as stream:
        stream.show(0, "a\n")
        stream.show(0, f"a\n{HOSTILE}")
    out, err = capsys.readouterr()
    assert out == ""
    assert not UNSAFE.search(err)
    assert err.count("\\x1b[31mred") == 4
    assert err.count("\n") == 4


def shown(result):
    """What `print_result` writes to standard output."""
    command = type(cli)("group")
    command.add_command(type(cli.commands["info"])("show", callback=lambda: print_result(result)))
    return CliRunner().invoke(command, ["show"], catch_exceptions=False).stdout_bytes


@pytest.mark.parametrize("name", [b"a\x1b[31m.png", b"a\xff.png", "雪\u202e.png".encode()])
def test_a_program_gets_a_path_byte_for_byte(name):
    assert shown(Path(os.fsdecode(name))) == name + b"\n"
    assert shown(os.fsdecode(name)) == name + b"\n"


@pytest.mark.usefixtures("terminal")
def test_a_terminal_gets_what_is_printable():
    assert shown(Path("a\x1b[31m\udcff.png")) == rb"a\x1b[31m\udcff.png" + b"\n"
    assert shown("two\nlines\x1b雪") == "two\nlines\\x1b雪\n".encode()


def test_output_for_a_program_is_json(folder):
    models = folder / "models\x9b\u202e"
    written = done("cache", "--models-dir", models, "--json").stdout
    assert json.loads(written)["folder"] == str(models / "prompts")
    assert not UNSAFE.search(written)
