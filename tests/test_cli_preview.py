"""--preview, --preview-decoder and --decoder on the command line."""

import json
import re

import numpy as np
import pytest
from helpers.cli_runner import PROMPT, done, refusal, run
from helpers.decoders import save_tiny
from helpers.hub_client import using
from helpers.hub_server import HubServer
from PIL import Image

from flux2_mlx.files import file_sha256
from flux2_mlx.images import read_settings

SMALL = ("t2i", PROMPT, "-m", "demo", "-W", "32", "-H", "32", "--seed", "7", "--no-cache")
RUN = (*SMALL, "-s", "3", "-o", "a.png")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def terminal(monkeypatch):
    """Output goes to a terminal of which nothing but its being one is known."""
    from click.testing import _NamedTextIOWrapper

    monkeypatch.setattr(_NamedTextIOWrapper, "isatty", lambda stream: True)
    for name in ("TMUX", "STY", "KITTY_WINDOW_ID", "WEZTERM_PANE", "LC_TERMINAL", "TERM_PROGRAM", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


@pytest.fixture
def taef2(tmp_path):
    """The Hub has TAEF2, though for the latents of the demo."""
    content = save_tiny(tmp_path / "there.safetensors", whole=True).read_bytes()
    with HubServer({"madebyollin/taef2": {"taef2.safetensors": content}}) as hub, using(hub, tmp_path / "cache"):
        yield hub


def drawn(stderr: str) -> int:
    """How many pictures were drawn."""
    return stderr.count("\x1b7")


def test_a_picture_is_drawn_after_every_step(terminal):
    stderr = done(*RUN, "--preview").stderr
    assert drawn(stderr) == 3
    assert "▀" in stderr
    first, *others = re.split(r"(?=\x1b\[\d+A\x1b7)", stderr)
    assert first.endswith("\n" * 5)
    assert not any("\n\n" in other.partition("\x1b8")[0] for other in others)  # one in the place of the other


def test_a_terminal_with_pictures_gets_pictures(terminal, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-kitty")
    stderr = done(*RUN, "--preview").stderr
    assert drawn(stderr) == stderr.count("\x1b_Ga=T") == 3


def test_a_picture_stays_when_others_lines_are_below_it(terminal, folder):
    (folder / "prompts.jsonl").write_text('{"prompt": "a", "width": 32}\n{"prompt": "b", "width": 16}\n')
    options = ("-m", "demo", "-H", "32", "--seed", "7", "-s", "2", "-o", "{index}.png", "--no-cache")
    stderr = done("t2i", "--prompts-file", "prompts.jsonl", *options, "--preview").stderr
    before = re.split(r"\x1b\[\d+A\x1b7", stderr)[:-1]
    assert [part.endswith("\n" * 5) for part in before] == [True, False, True, False]


@pytest.mark.parametrize("options", [(), ("--json",)], ids=["plain", "json"])
def test_without_a_terminal_nothing_is_drawn_and_one_line_says_so(options):
    result = done(*RUN, "--preview", *options)
    assert drawn(result.stderr) == 0
    assert result.stderr.count("--preview shows nothing, as stderr is no terminal\n") == 1
    assert json.loads(result.stdout)["images"] if options else result.stdout == "a.png\n"


def test_a_dumb_terminal_gets_a_line_and_no_pictures(terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    stderr = done(*RUN, "--preview").stderr
    assert drawn(stderr) == 0
    assert stderr.count("--preview shows nothing, as this terminal is dumb\n") == 1


def test_quiet_is_quiet(terminal):
    assert done(*RUN, "--preview", "--quiet").stderr == ""


def test_the_image_is_the_same_with_a_preview(terminal, folder):
    done(*RUN, "--preview")
    done(*RUN[:-1], "b.png")
    assert (folder / "a.png").read_bytes() == (folder / "b.png").read_bytes()


def test_checkpoints_are_made_as_is_said(folder, taef2):
    images = {}
    for kind in ("full", "linear", "taef2"):
        stderr = done(*RUN[:-1], f"{kind}.png", "--checkpoint", "2", "--preview-decoder", kind).stderr
        images[kind] = np.asarray(Image.open(folder / f"{kind}-step-002.png"), int)
        assert images[kind].shape == (32, 32, 3)
        assert ("decoder taef2: " in stderr) == (kind == "taef2")
    assert re.search(r"decoder taef2: .* from .*madebyollin/taef2 \(MIT\)", stderr)
    done(*RUN, "--checkpoint", "2")
    assert np.array_equal(np.asarray(Image.open(folder / "a-step-002.png")), images["full"])
    assert not np.array_equal(images["linear"], images["full"])
    assert not np.array_equal(images["taef2"], images["full"])
    assert (folder / "taef2.png").read_bytes() == (folder / "full.png").read_bytes()


def test_a_decoder_is_remembered_and_used_again(folder, taef2):
    done(*RUN, "--decoder", "taef2")
    told = read_settings(folder / "a.png")["decoder"]
    assert told == {"name": "taef2", "sha256": file_sha256(folder / "there.safetensors")}
    done("t2i", "--replay", "a.png", "-o", "b.png", "--no-cache")
    assert (folder / "a.png").read_bytes() == (folder / "b.png").read_bytes()
    report = json.loads(done(*RUN[:-1], "c.png", "--decoder", "taef2", "--json").stdout)
    assert report["decoder"] == told
    done(*RUN[:-1], "d.png")
    assert "decoder" not in read_settings(folder / "d.png")
    assert not np.array_equal(np.asarray(Image.open("a.png")), np.asarray(Image.open("d.png")))


def test_the_file_of_a_decoder_is_found_again_by_its_content(folder):
    save_tiny(folder / "tiny.safetensors")
    done(*RUN, "--decoder", "tiny.safetensors")
    done("t2i", "--replay", "a.png", "-o", "b.png", "--no-cache")
    assert (folder / "a.png").read_bytes() == (folder / "b.png").read_bytes()
    (folder / "tiny.safetensors").write_bytes(b"other")
    told = refusal("t2i", "--replay", "a.png", "-o", "c.png")
    assert told.startswith(
        "the decoder 'tiny.safetensors', which a.png was made with, is neither beside it nor here, nor in the"
    )
    assert told.endswith("name it with --decoder")


def test_what_is_no_decoder_for_the_model_is_refused(folder):
    save_tiny(folder / "wide.safetensors", 32)
    assert refusal(*RUN, "--decoder", "wide.safetensors").startswith("decoder 'wide.safetensors' is for latents of 32")
    assert refusal(*RUN, "--decoder", "large") == "there is no file or folder large"


def test_what_makes_previews_is_of_no_use_without_any(folder):
    result = run(*RUN, "--preview-decoder", "taef2")
    assert result.exit_code == 2
    assert "--preview-decoder is about --preview and --checkpoint; give one of them besides" in result.stderr
