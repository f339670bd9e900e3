"""What `t2i` writes: images, their names and settings, JSON, progress."""

import json
import logging
import re
import shutil

import numpy as np
import pytest
from helpers.checkpoints import convert, save_dev
from helpers.cli_runner import DEMO, PROMPT, SMALL, difference, done, make, pixels, process, refusal, run
from PIL import Image

from flux2_mlx import Flux2Pipeline, __version__
from flux2_mlx.images import read_settings
from flux2_mlx.vae import VAE

REPORT = {
    "images", "model", "quant", "text_quant", "dtype", "prompt", "upsampled_prompt", "width", "height", "steps",
    "guidance", "phases", "seconds", "peak_memory",
}  # fmt: skip
PHASES = ["text_encoder", "transformer", "vae"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def report(*arguments, prompt=PROMPT):
    result = done("t2i", prompt, *SMALL, "--json", *arguments)
    assert result.stdout.count("\n") == 1
    return json.loads(result.stdout)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.png", "PNG"),
        ("a.jpg", "JPEG"),
        ("a.jpeg", "JPEG"),
        ("a.webp", "WEBP"),
        ("A.PNG", "PNG"),
        ("狐 b.png", "PNG"),
    ],
)
def test_writes_the_format_that_the_name_says(folder, name, kind):
    assert done("t2i", PROMPT, *SMALL, "-o", name).stdout == f"{name}\n"
    with Image.open(name) as image:
        assert (image.format, image.mode, image.size) == (kind, "RGB", (64, 64))
    assert [path.name for path in folder.iterdir()] == [name]


def test_what_is_decoded_is_saved_before_the_next(folder, monkeypatch):
    decode, calls = VAE.decode, []

    def interrupted(*arguments):
        calls.append([path.name for path in folder.iterdir()])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return decode(*arguments)

    monkeypatch.setattr(VAE, "decode", interrupted)
    assert run("t2i", PROMPT, *SMALL, "-n", "3", "--seed", "4", "-o", "a.png").exit_code == 130
    assert calls[:2] == [[], ["a-4.png"]]
    assert read_settings(folder / "a-4.png")["seed"] == 4


def test_width_and_height_are_not_mixed_up():
    make("-W", "96", "-H", "32", "-o", "a.png")
    assert pixels("a.png").shape == (32, 96, 3)


def test_defaults_are_those_of_the_model():
    result = done("t2i", PROMPT, "-m", "demo", "-o", "a.png", "--json")
    values = json.loads(result.stdout)
    assert [values[name] for name in ("width", "height", "steps", "guidance")] == [128, 128, 8, 1.0]
    assert [values[name] for name in ("quant", "text_quant")] == ["bf16", "bf16"]
    assert pixels("a.png").shape == (128, 128, 3)


def test_a_file_is_named_after_model_and_seed():
    assert [str(path) for path in make("--seed", "7")] == ["demo-7.png"]


def test_output_may_be_a_folder(folder):
    (folder / "out").mkdir()
    assert [str(path) for path in make("--seed", "7", "-o", "out")] == ["out/demo-7.png"]


def test_a_model_folder_lends_its_name_even_as_a_dot(folder, monkeypatch):
    shutil.copytree(DEMO, folder / "mine")
    monkeypatch.chdir(folder / "mine")
    assert [path.name for path in make("-m", ".", "--seed", "7")] == ["mine-7.png"]


def test_a_model_folder_gives_what_the_built_in_model_gives(folder):
    shutil.copytree(DEMO, folder / "mine")
    make("--seed", "7", "-o", "a.png")
    make("--seed", "7", "-o", "b.png", "-m", "mine")
    assert np.array_equal(pixels("a.png"), pixels("b.png"))


def test_images_of_one_run_equal_single_runs():
    several = make("--seed", "7", "-n", "3", "-o", "some.png")
    assert [str(path) for path in several] == ["some-7.png", "some-8.png", "some-9.png"]
    for seed, path in enumerate(several, 7):
        make("--seed", seed, "-o", "single.png", "--force")
        assert difference(path, "single.png") < 0.5
        assert read_settings(path) == read_settings("single.png")
    assert difference(*several[:2]) > 5


@pytest.mark.parametrize("source", ["prompts.txt", "-"])
def test_prompts_of_a_file_are_taken_in_order(folder, source):
    text = "\ufeffa small red circle\n\n  a large blue square \r\n狐狸\n"
    (folder / "prompts.txt").write_text(text, encoding="utf-8")
    stdin = text.encode() if source == "-" else None
    result = done("t2i", *SMALL, "--prompts-file", source, "--seed", "5", "-n", "2", stdin=stdin)
    words = ["a-small-red-circle", "a-large-blue-square", "狐狸"]
    names = [f"demo-{seed}-{words[(seed - 5) // 2]}.png" for seed in range(5, 11)]
    assert result.stdout.splitlines() == names
    prompts = [read_settings(name)["prompt"] for name in names]
    assert prompts == [p for p in ("a small red circle", "a large blue square", "狐狸") for _ in range(2)]
    make("--seed", "7", "-o", "single.png", prompt="a large blue square")
    assert difference(names[2], "single.png") < 0.5
    assert difference(names[3], "single.png") > 5


def test_a_seed_gives_the_same_file_every_time():
    make("--seed", "7", "-o", "a.png")
    make("--seed", "7", "-o", "b.png")
    make("--seed", "8", "-o", "c.png")
    with open("a.png", "rb") as a, open("b.png", "rb") as b:
        assert a.read() == b.read()
    assert not np.array_equal(pixels("a.png"), pixels("c.png"))


def test_without_a_seed_every_run_differs_and_says_its_seed():
    (first,), (second,) = make(), make()
    seeds = [read_settings(path)["seed"] for path in (first, second)]
    assert [str(first), str(second)] == [f"demo-{seed}.png" for seed in seeds]
    assert seeds[0] != seeds[1]
    make("--seed", seeds[0], "-o", "again.png")
    assert np.array_equal(pixels(first), pixels("again.png"))


def test_the_largest_seed_works():
    assert read_settings(make("--seed", 2**64 - 1)[0])["seed"] == 2**64 - 1


def test_steps_and_quantization_change_the_image():
    make("--seed", "7", "-o", "a.png")
    make("--seed", "7", "-o", "b.png", "-s", "3")
    make("--seed", "7", "-o", "c.png", "-q", "qint4")
    assert not np.array_equal(pixels("a.png"), pixels("b.png"))
    assert not np.array_equal(pixels("a.png"), pixels("c.png"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_dtype_is_taken_and_told(dtype):
    assert report("--dtype", dtype, "--seed", "7", "-o", "a.png")["dtype"] == dtype
    assert read_settings("a.png")["dtype"] == dtype
    make("--dtype", "float32", "--seed", "7", "-o", "b.png")
    assert np.array_equal(pixels("a.png"), pixels("b.png")) == (dtype == "float32")
    assert difference("a.png", "b.png") < 2


def test_force_replaces_an_image(folder):
    (folder / "a.png").write_text("old")
    make("-o", "a.png", "--force")
    assert pixels("a.png").shape == (64, 64, 3)


@pytest.mark.parametrize("prompt", [PROMPT, "雪の中の赤い狐", 'a "quoted" prompt\nof two lines 🦊'])
def test_a_png_carries_its_settings_for_us_and_for_other_tools(prompt):
    make("--seed", "7", "-o", "a.png", prompt=prompt)
    with Image.open("a.png") as image:
        assert set(image.text) == {"parameters", "flux2-mlx"}
        assert image.text["parameters"] == (
            f"{prompt}\nSteps: 2, Sampler: Euler, CFG scale: 1.0, Seed: 7, Size: 64x64, Model: demo, "
            f"Version: flux2-mlx {__version__}"
        )
        settings = json.loads(image.text["flux2-mlx"])
    assert settings.pop("fingerprint")
    assert settings.pop("dtype") in ("float32", "bfloat16")
    assert settings.pop("machine").keys() == {"chip", "mlx", "system", "tf32"}
    assert settings == {
        "prompt": prompt,
        "upsampled_prompt": None,
        "model": "demo",
        "variant": "demo",
        "quant": "bf16",
        "text_quant": "bf16",
        "width": 64,
        "height": 64,
        "steps": 2,
        "guidance": 1.0,
        "seed": 7,
        "version": __version__,
    }


def test_checkpoint_also_saves_an_image_every_n_steps(folder):
    assert [str(path) for path in make("-s", "5", "--checkpoint", "2", "-o", "a.png")] == ["a.png"]
    names = ["a-step-002.png", "a-step-004.png", "a.png"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert {pixels(name).shape for name in names} == {(64, 64, 3)}
    assert len({pixels(name).tobytes() for name in names}) == 3


def test_the_image_of_the_first_step_is_where_it_points():
    make("--seed", "7", "-s", "3", "--checkpoint", "1", "-o", "a.png")
    make("--seed", "7", "-s", "1", "-o", "b.png")
    assert difference("a-step-001.png", "b.png") < 0.5


def test_no_memory_is_kept_for_images_between_steps_where_there_are_none():
    pipe = Flux2Pipeline.from_pretrained("demo", prompt_cache=False)
    limit = pipe.plan(pipe.request([PROMPT], width=128, height=96, steps=2)).peak_memory
    words = ("-W", "128", "-H", "96", "-s", "2", "--memory-limit", str(limit), "-o", "a.png")
    make(*words, "--checkpoint", "2")
    message = refusal("t2i", PROMPT, "-m", "demo", *words, "--checkpoint", "1", "--quiet", "--force")
    assert message.endswith("; without images between the steps it would fit")


def test_checkpoints_of_several_images_carry_their_seeds(folder):
    make("--checkpoint", "1", "-n", "2", "--seed", "7", "-o", "a.webp")
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["a-7-step-001.webp", "a-7.webp", "a-8-step-001.webp", "a-8.webp"]


def test_json_is_one_object_with_the_documented_keys():
    values = report("--seed", "7", "-n", "2", "-q", "qint4", "-o", "a.png")
    assert set(values) == REPORT
    assert values["images"] == [{"path": "a-7.png", "seed": 7}, {"path": "a-8.png", "seed": 8}]
    expected = {"model": "demo", "quant": "qint4", "text_quant": "qint4", "prompt": PROMPT, "width": 64, "height": 64}
    assert {name: values[name] for name in expected} == expected
    assert (values["steps"], values["guidance"], values["upsampled_prompt"]) == (2, 1.0, None)
    assert [phase["name"] for phase in values["phases"]] == PHASES
    for phase in values["phases"]:
        assert set(phase) == {"name", "seconds", "peak_memory"}
        assert phase["seconds"] > 0
        assert phase["peak_memory"] > 0
    assert values["peak_memory"] == max(phase["peak_memory"] for phase in values["phases"])
    assert values["seconds"] >= sum(phase["seconds"] for phase in values["phases"])


def test_json_of_several_prompts_lists_them(folder):
    (folder / "prompts.txt").write_text("red\n狐\n", encoding="utf-8")
    result = done("t2i", *SMALL, "--json", "--prompts-file", "prompts.txt")
    assert '"prompt": ["red", "狐"]' in result.stdout
    assert len(json.loads(result.stdout)["images"]) == 2


def test_progress_is_a_bar_for_each_phase_on_stderr():
    result = done("t2i", PROMPT, *SMALL, "-n", "2", "-o", "a.png", "--seed", "7")
    assert result.stdout == "a-7.png\na-8.png\n"
    last = {}
    for label, line in re.findall(r"(text encoder|denoising|decoding):([^\r\n]*)", result.stderr):
        last[label] = line
    assert list(last) == ["text encoder", "denoising", "decoding"]
    for line, total in zip(last.values(), (1, 2, 2), strict=True):
        assert "100%" in line
        assert f" {total}/{total}" in line


@pytest.mark.parametrize("extra", [[], ["--json"], ["--checkpoint", "1"]])
def test_quiet_leaves_stderr_empty(extra):
    logger = logging.getLogger("flux2_mlx")
    level = logger.level
    assert done("t2i", PROMPT, *SMALL, "--quiet", "-o", "a.png", *extra).stderr == ""
    assert logger.level == level


@pytest.mark.parametrize("extra", [[], ["--json"]])
def test_profile_is_a_table_on_stderr(extra):
    result = done("t2i", PROMPT, *SMALL, "--quiet", "--profile", "-o", "a.png", *extra)
    assert result.stdout.count("\n") == 1
    rows = re.findall(r"^(\w+(?: \w+)?) +[\d.]+ s +[\d.]+ GiB peak$", result.stderr, re.M)
    assert rows == [*PHASES, "whole run"]
    assert result.stderr.count("\n") == 4


def test_a_guidance_that_has_no_effect_is_said():
    arguments = ("t2i", PROMPT, *SMALL, "--seed", "7")
    assert "demo is distilled and ignores --guidance\n" in done(*arguments, "-g", "4", "-o", "a.png").stderr
    assert "ignores" not in done(*arguments, "-o", "b.png").stderr
    assert done(*arguments, "-g", "4", "-o", "c.png", "--quiet").stderr == ""
    assert np.array_equal(pixels("a.png"), pixels("b.png"))


def test_an_embedded_guidance_has_an_effect(folder):
    save_dev(folder / "official")
    made = ("t2i", PROMPT, "-m", convert(folder / "official", folder / "dev", variant="dev"), *SMALL[2:], "--seed", "7")
    assert "ignores" not in done(*made, "-g", "3", "-o", "a.png").stderr
    done(*made, "-o", "b.png")
    assert not np.array_equal(pixels("a.png"), pixels("b.png"))


def test_a_prompt_longer_than_the_model_reads_is_said_in_one_line():
    arguments = ("t2i", "a red circle\n" * 40, *SMALL)
    result = process(*arguments, "-o", "a.png")
    assert result.returncode == 0
    lines = [line for line in re.split(r"[\r\n]+", result.stderr) if "tokens" in line]
    assert len(lines) == 1
    assert re.fullmatch(r"the prompt takes \d+ tokens, the model sees the first 48: a red circle a red .*…", lines[0])
    assert process(*arguments, "-o", "b.png", "--quiet").stderr == ""
