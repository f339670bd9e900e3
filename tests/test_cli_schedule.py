"""`--sigmas` and `--preset`: noise levels of a command line, those of adapters, and of an image that is made again."""

import json
from pathlib import Path

import numpy as np
import pytest
from flux2_mlx.convert.lora.presets import Preset, preset
from helpers.adapters import lora, save, save_for_demo
from helpers.cli_runner import PROMPT, done, make, pixels, refusal, run
from PIL import Image, PngImagePlugin

from flux2_mlx import Flux2Pipeline, store
from flux2_mlx.errors import CheckpointError
from flux2_mlx.images import read_settings

FREE = ("-m", "demo", "-W", "64", "-H", "64", "--seed", "7")  # `make`'s settings, but for its steps
FAST = {"sigmas": [1.0, 0.4], "guidance_scale": 2.5, "preferred weight": 0.8}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_for_demo(tmp_path / "a.safetensors")
    return tmp_path


def remembered(name: str) -> tuple:
    settings = read_settings(name)
    return tuple(settings.get(key) for key in ("steps", "guidance", "sigmas", "shift_steps"))


def test_sigmas_are_taken_remembered_and_replayed():
    done("t2i", PROMPT, *FREE, "-o", "a.png", "--sigmas", "1, .4")
    assert remembered("a.png") == (2, 1.0, [1.0, 0.4], 2)
    make("--seed", "7", "-o", "even.png")
    assert not np.array_equal(pixels("a.png"), pixels("even.png"))
    assert remembered("even.png") == (2, 1.0, None, None)
    done("t2i", "--replay", "a.png", "-o", "again.png")
    assert np.array_equal(pixels("again.png"), pixels("a.png"))
    done("t2i", "--replay", "a.png", "-s", "3", "-o", "three.png")
    assert remembered("three.png") == (3, 1.0, None, None)
    done("t2i", "--replay", "a.png", "--sigmas", "0.9", "-o", "one.png")
    assert remembered("one.png") == (1, 1.0, [0.9], 1)


def test_an_image_of_python_is_replayed_with_its_shift():
    pipe = Flux2Pipeline.from_pretrained("demo", prompt_cache=False)
    pipe(PROMPT, sigmas=[1.0, 0.4], width=64, height=64, seed=7).save("a.png")
    assert remembered("a.png") == (2, 1.0, [1.0, 0.4], 50)
    done("t2i", "--replay", "a.png", "-o", "again.png")
    assert np.array_equal(pixels("again.png"), pixels("a.png"))


def test_an_image_that_is_there_has_other_noise_levels(caplog):
    make("--seed", "7", "-o", "a.png")
    run("t2i", PROMPT, *FREE, "-o", "a.png", "--sigmas", "1,0.4", "--skip-existing")
    assert "was made with another set of noise levels" in caplog.text


def test_a_preset_is_that_of_the_adapter(folder):
    (folder / "a.json").write_text(json.dumps(FAST))
    result = done("t2i", PROMPT, *FREE, "-o", "a.png", "--lora", "a.safetensors", "--preset", "turbo")
    assert "--preset turbo: guidance 2.5 and sigmas 1.0,0.4, from a.json" in result.stderr
    assert remembered("a.png") == (2, 2.5, [1.0, 0.4], 2)
    assert "ignores --guidance" not in result.stderr
    again = done("t2i", "--replay", "a.png", "--preset", "turbo", "-g", "1", "-o", "b.png")
    assert "--preset turbo: sigmas 1.0,0.4, from a.json" in again.stderr
    assert remembered("b.png") == (2, 1.0, [1.0, 0.4], 2)
    own = done("t2i", PROMPT, *FREE, "-s", "3", "-o", "c.png", "--lora", "a.safetensors", "--preset", "turbo")
    assert "--preset turbo: guidance 2.5, from a.json" in own.stderr
    assert remembered("c.png") == (3, 2.5, None, None)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--sigmas", "1,a"), "--sigmas 1,a is no list of noise levels"),
        (("--sigmas", "١"), "is no list of noise levels"),
        (("--sigmas", ""), "is no list of noise levels"),
        (("--sigmas", "1,0.5", "-s", "3"), "3 steps don't go with 2 sigmas"),
        (("--sigmas", "0.5,0.7"), "sigmas must fall from at most 1 to above 0, got 0.5, 0.7"),
        (("--sigmas", "1.2,0.7"), "sigmas must fall from at most 1 to above 0"),
        (("--sigmas", "1,0"), "sigmas must fall from at most 1 to above 0"),
        (("--sigmas", "1,nan"), "sigmas must fall from at most 1 to above 0"),
        (("--preset", "turbo"), "--preset turbo is of an adapter; give that with --lora"),
        (("--preset", "turbo", "--lora", "a.safetensors"), "nothing is known for --preset turbo of a.safetensors"),
    ],
)
def test_other_noise_levels_are_refused(arguments, said):
    assert said in refusal("t2i", PROMPT, *FREE, "-o", "b.png", *arguments)


def test_steps_of_a_prompt_are_as_many_as_noise_levels(folder):
    (folder / "p.jsonl").write_text('{"prompt": "a", "steps": 3}\n')
    said = refusal("t2i", "--prompts-file", "p.jsonl", *FREE, "-o", "b.png", "--sigmas", "1,0.5")
    assert said == "line 1 of p.jsonl: 3 steps don't go with 2 sigmas; leave out one of them"


def test_two_presets_are_refused(folder):
    (folder / "a.json").write_text('{"steps": 4}')
    (folder / "a.safetensors").rename(folder / "b.safetensors")
    save(folder / "a.safetensors", lora("diffusion_model.single_blocks.0.linear2", 8, 8))
    (folder / "b.json").write_text('{"steps": 8}')
    loras = ("--lora", "a.safetensors", "--lora", "b.safetensors")
    assert "could be that of a.json, b.json" in refusal("t2i", PROMPT, *FREE, *loras, "--preset", "turbo")


@pytest.mark.parametrize("sigmas", [[1, "a"], [[1]], "1", 0.5])
def test_damaged_noise_levels_are_told(sigmas, folder):
    make("--seed", "7", "-o", "a.png")
    settings = read_settings("a.png") | {"sigmas": sigmas}
    info = PngImagePlugin.PngInfo()
    info.add_itxt("flux2-mlx", json.dumps(settings))
    Image.new("RGB", (16, 16)).save("b.png", pnginfo=info)
    assert "the settings in b.png are damaged: sigmas is " in refusal("t2i", "--replay", "b.png", "-o", "c.png")


@pytest.mark.parametrize("name", ["flux.2-turbo-lora.safetensors", "Flux_2-Turbo-LoRA_comfyui.safetensors"])
def test_published_adapters_have_what_their_card_says(name, tmp_path):
    found = preset(tmp_path / name)
    assert (found.steps, found.guidance, len(found.sigmas)) == (8, 2.5, 8)
    assert (found.sigmas[0], found.sigmas[-1]) == (1.0, 0.00031)
    (tmp_path / name).with_suffix(".json").write_text('{"num_inference_steps": 4, "guidance": 1}')
    assert preset(tmp_path / name) == Preset((tmp_path / name).with_suffix(".json").name, None, 4, 1.0)
    assert preset(tmp_path / "other.safetensors") is None
    assert preset(tmp_path / "other.safetensors", Path(name).stem).steps == 8


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "holds no JSON object"),
        ("{", "is not JSON"),
        ('{"sigmas": "1,2"}', "sigmas must be a list of numbers"),
        ('{"sigmas": []}', "sigmas must be a list of numbers"),
        ('{"sigmas": [1, true]}', "sigmas must be a list of numbers"),
        ('{"sigmas": [0.5, 1]}', "sigmas must fall"),
        ('{"sigmas": [1, 0.5], "steps": 8}', "there are 2 sigmas for 8 steps"),
        ('{"steps": 4, "steps": 8}', "'steps' stands there twice"),
        ('{"steps": 0}', "steps must be 1 to 1000, got 0"),
        ('{"steps": 4.5}', "steps must be 1 to 1000"),
        ('{"steps": 4, "num_inference_steps": 8}', "steps 4 and num_inference_steps 8 disagree; leave out one"),
        ('{"guidance": -1}', "guidance must be a number from 0 to 1000"),
        ('{"guidance": "much"}', "guidance must be a number"),
    ],
)
def test_what_is_beside_an_adapter_and_no_setting_is_told(text, said, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(CheckpointError, match=said):
        preset(tmp_path / "a.safetensors")


def test_a_preset_that_is_not_used_is_told(folder):
    said = "a.safetensors is made for 2 steps and a guidance of 2.5, as a.json says; --preset turbo sets that"
    (folder / "a.json").write_text(json.dumps(FAST))
    free = ("t2i", PROMPT, *FREE, "-W", "16", "-H", "16", "--lora", "a.safetensors")
    assert said in done(*free, "-o", "a.png").stderr.splitlines()
    for number, given in enumerate([("-s", "1"), ("-g", "1"), ("--sigmas", "1"), ("--preset", "turbo"), ("--quiet",)]):
        assert "is made for" not in done(*free, *given, "-o", f"{number}.png").stderr
    (folder / "a.json").write_text('{"steps": 20000}')
    assert "is made for" not in done(*free, "-s", "1", "-o", "b.png").stderr
    (folder / "a.json").write_text('{"guidance": 1.5}')
    assert (
        "preset     a guidance of 1.5, as a.json says; --preset turbo sets that"
        in done("lora", "inspect", "a.safetensors").stdout.splitlines()
    )


def test_a_preset_takes_one_look_at_an_adapter(folder, monkeypatch):
    looks, look = [], store.find_adapter
    monkeypatch.setattr(store, "find_adapter", lambda *given: looks.append(given) or look(*given))
    (folder / "a.json").write_text(json.dumps(FAST))
    done("t2i", PROMPT, *FREE, "-o", "a.png", "--lora", "a.safetensors", "--preset", "turbo")
    assert looks == [("a.safetensors",)]
