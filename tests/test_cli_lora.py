"""`--lora`: adapters of a command line, and of an image that is made again."""

from hashlib import sha256
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers.adapters import save_for_demo
from helpers.cli_runner import PROMPT, SMALL, done, make, pixels, refusal, run

from flux2_mlx.cli import loras
from flux2_mlx.cli.loras import Lora
from flux2_mlx.errors import InputError
from flux2_mlx.images import read_settings


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_for_demo(tmp_path / "a.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    ("text", "lora"),
    [
        ("a.safetensors", Lora("a.safetensors")),
        ("a.safetensors:0.5", Lora("a.safetensors", 0.5)),
        ("some/folder:-1", Lora("some/folder", -1.0)),
        ("owner/name:a.safetensors", Lora("owner/name:a.safetensors")),
        ("owner/name:a.safetensors:.8", Lora("owner/name:a.safetensors", 0.8)),
        ("owner/name:a.safetensors:-1e-1", Lora("owner/name:a.safetensors", -0.1)),
        ("owner/name:folder", Lora("owner/name:folder")),
        ("C:/x.safetensors:0", Lora("C:/x.safetensors", 0.0)),
        ("C:/x.safetensors", Lora("C:/x.safetensors")),
        (
            "https://huggingface.co/a/b/blob/main/c.safetensors:2",
            Lora("https://huggingface.co/a/b/blob/main/c.safetensors", 2.0),
        ),
        ("style:1", Lora("style:1")),
        ("style:1:0.5", Lora("style:1", 0.5)),
    ],
)
def test_a_number_at_the_end_is_the_scale(folder, text, lora):
    (folder / "style:1").touch()
    assert loras.read([text], None) == (lora,)


@pytest.mark.parametrize("scale", ["٠.٨", "1_0", "0,8", "abc", "", "nan", "-inf", "1.2.3", "+"])
def test_another_scale_is_refused(scale):
    with pytest.raises(InputError) as caught:
        loras.read([f"a.safetensors:{scale}"], None)
    said = f"--lora 'a.safetensors:{scale}': the scale {scale!r} is no number; write a.safetensors:0.8, say"
    assert str(caught.value) == said


def test_a_repo_with_a_scale_that_is_no_number():
    with pytest.raises(InputError, match="the scale '0,8' is no number"):
        loras.read(["owner/name:0,8"], None)


@pytest.mark.parametrize(("text", "steps"), [("1-4", (1, 4)), ("3", (3, 3)), ("4-1", (4, 1))])
def test_steps_are_a_range(text, steps):
    assert loras.read(["a"], text) == (Lora("a", 1.0, steps),)


@pytest.mark.parametrize("text", ["", "1-", "١-٢", "a-b", "-1", "1-2-3"])
def test_other_steps_are_refused(text):
    with pytest.raises(InputError, match="is no range of steps"):
        loras.read(["a"], text)


def test_an_adapter_changes_the_image_and_a_replay_finds_it(folder):
    make("--seed", "7", "-o", "plain.png")
    make("--seed", "7", "-o", "one.png", "--lora", "a.safetensors:0.5", "--lora-steps", "2-2")
    assert not np.array_equal(pixels("one.png"), pixels("plain.png"))
    (told,) = read_settings(folder / "one.png")["adapters"]
    assert (told["source"], told["scale"], told["steps"]) == ("a.safetensors", 0.5, [2, 2])
    assert run("t2i", "--replay", "one.png", "-o", "again.png").exit_code == 0
    assert np.array_equal(pixels("again.png"), pixels("one.png"))
    assert run("t2i", "--replay", "one.png", "-o", "given.png", "--lora", "a.safetensors").exit_code == 0
    assert np.array_equal(pixels("given.png"), pixels("one.png"))
    make("--seed", "7", "-o", "none.png", "--lora", "a.safetensors:0")
    assert np.array_equal(pixels("none.png"), pixels("plain.png"))
    (folder / "a.safetensors").unlink()
    said = refusal("t2i", "--replay", "one.png", "-o", "third.png")
    assert said.startswith(f"the adapter a.safetensors of SHA-256 {told['sha256']}, which one.png was made with, is ne")
    assert said.endswith("name it with --lora")


def test_an_adapter_given_again_has_what_the_image_tells_of_it(folder, caplog):
    (folder / "b.safetensors").write_bytes((folder / "a.safetensors").read_bytes() + b"b")
    (folder / "c.safetensors").write_bytes((folder / "a.safetensors").read_bytes() + b"c")
    told = [
        {
            "name": name,
            "source": f"{name}.safetensors",
            "sha256": sha256((folder / f"{name}.safetensors").read_bytes()).hexdigest(),
            "scale": scale,
            "steps": steps,
        }
        for name, scale, steps in (("a", 0.5, [2, 3]), ("b", 0.25, None))
    ]
    image = folder / "x.png"

    def chosen(*texts, steps=None):
        return [
            (Path(x.source).name, x.scale, x.steps)
            for x in loras.remembered(told, image, None, loras.read(texts, steps))
        ]

    (folder / "a.safetensors").rename(folder / "moved.safetensors")
    other = ("b.safetensors", 0.25, None)
    assert chosen("moved.safetensors") == [("moved.safetensors", 0.5, (2, 3)), other]
    assert chosen("moved.safetensors:1") == [("moved.safetensors", 1.0, (2, 3)), other]
    assert chosen("moved.safetensors", steps="1") == [("moved.safetensors", 0.5, (1, 1)), other]
    assert chosen("c.safetensors", "moved.safetensors")[1:] == [other, ("c.safetensors", 1.0, None)]
    assert not caplog.messages
    assert chosen("c.safetensors") == [("c.safetensors", 1.0, None)]
    assert "x.png are replaced by those of --lora: a.safetensors, b.safetensors" in caplog.text
    (folder / "b.safetensors").unlink()
    with pytest.raises(InputError, match=r"the adapters a\.safetensors of .*, b\.safetensors of .* name them with"):
        chosen()


def test_steps_are_those_of_the_adapters_of_an_image(folder):
    image, sha256_of_a = folder / "x.png", sha256((folder / "a.safetensors").read_bytes()).hexdigest()
    told = {"name": "a", "source": "a.safetensors", "sha256": sha256_of_a, "scale": 0.5, "steps": [2, 3]}
    (found,) = loras.remembered([told], image, None, steps="1-2")
    assert (found.scale, found.steps) == (0.5, (1, 2))
    make("--seed", "7", "-o", "a.png", "--lora", "a.safetensors")
    done("t2i", "--replay", "a.png", "-o", "b.png", "--lora-steps", "1-2")
    assert read_settings(folder / "b.png")["adapters"][0]["steps"] == [1, 2]
    with pytest.raises(InputError, match=r"--lora-steps 1-2 needs adapters, and .*x\.png has none; give"):
        loras.remembered([], image, None, steps="1-2")


def test_what_an_image_tells_of_an_adapter_may_be_damaged(folder):
    told = {"name": "a", "source": "a.safetensors", "sha256": "0" * 64, "scale": 0.5}
    with pytest.raises(InputError, match=r"x\.png are damaged: steps of a\.safetensors is \[\]"):
        loras.remembered([told | {"steps": []}], folder / "x.png", None)
    for changes in ({"source": "a" * 5000}, {"source": 5000 * "a", "origin": 5000 * "b"}, {"scale": "a" * 5000}):
        with pytest.raises(InputError) as caught:
            loras.remembered([told | changes], folder / "x.png", None)
        assert len(str(caught.value)) < 900


def test_an_image_tells_of_no_more_adapters_than_there_can_be(folder):
    with pytest.raises(InputError, match="101 adapters are too many; at most 100"):
        loras.remembered([{}] * 101, folder / "x.png", None)


def test_an_image_that_is_there_was_made_with_other_adapters(caplog):
    make("--seed", "7", "-o", "a.png")
    run("t2i", PROMPT, *SMALL, "--seed", "7", "-o", "a.png", "--lora", "a.safetensors", "--skip-existing")
    assert "was made with another set of adapters" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--lora", "b.safetensors"), "there is no file or folder b.safetensors"),
        (("--lora", ""), "--lora is empty; give a file, a folder"),
        (("--lora", "a.safetensors") * 101, "101 adapters are too many; at most 100 can be at work at once"),
        (("--lora-steps", "1-2"), "--lora-steps 1-2 needs adapters"),
        (("--lora", "a.safetensors", "--lora-steps", "2-1"), "steps must be a first and a last one"),
        (("--lora", "a.safetensors:5000"), "scale must be -1000.0 to 1000.0"),
    ],
)
def test_what_is_no_adapter_is_refused(arguments, said):
    assert said in refusal("t2i", PROMPT, *SMALL, "-o", "b.png", *arguments)


@pytest.mark.parametrize(
    ("words", "prompt", "is_told"),
    [
        ({"trigger_word": "t0y"}, "a ring", True),
        ({"trigger_word": "t0y"}, "a T0Y ring", False),
        ({"modelspec.trigger_phrase": "t0y, sks dog"}, "an sks dog", False),
        ({"trigger_word": '["t0y", "sks"]'}, "a ring", True),
        ({"trigger_word": '["t0y", "sks"]'}, "sks", False),
        ({"trigger_word": "None"}, "a ring", False),
        ({}, "a ring", False),
    ],
)
def test_a_prompt_without_a_trigger_word(words, prompt, is_told, folder):
    infos = mx.load("a.safetensors")
    mx.save_safetensors("b.safetensors", infos, words)
    said = done("t2i", prompt, *SMALL, "-s", "1", "-o", "b.png", "--lora", "b.safetensors").stderr
    assert ("b.safetensors: the prompt has none of its trigger words, t0y" in said) is is_told


def test_a_long_trigger_is_cut(folder):
    mx.save_safetensors("b.safetensors", mx.load("a.safetensors"), {"trigger_phrase": "t0y " * 100})
    said = done("t2i", "a ring", *SMALL, "-s", "1", "-o", "b.png", "--lora", "b.safetensors").stderr
    (line,) = (line for line in said.splitlines() if "trigger" in line)
    assert line.endswith("t0y …")
    assert len(line) < 160
