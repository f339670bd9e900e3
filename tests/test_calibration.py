"""What 4 bits of each layer change in a model's images, and a conversion that follows it."""

import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from helpers.checkpoints import SHALLOW_TEXT, SHALLOW_VARIANT, convert, save_small
from helpers.cli_runner import refusal, run

from flux2_mlx import calibration
from flux2_mlx.base_pipeline import BasePipeline
from flux2_mlx.calibration import calibrated, image_errors
from flux2_mlx.checkpoint import Checkpoint
from flux2_mlx.config import TransformerConfig
from flux2_mlx.errors import InputError
from flux2_mlx.mixture import finer_layers
from flux2_mlx.networks import Networks
from flux2_mlx.quantization import GROUP_SIZE

CONFIG = TransformerConfig(1, 2, 2, 192, 32, 16, axes_dims_rope=(8, 8, 8, 8), guidance_embeds=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model in bfloat16."""
    source = save_small(tmp_path_factory.mktemp("source") / "a", transformer=CONFIG, text=SHALLOW_TEXT)
    return convert(source, tmp_path_factory.mktemp("plain") / "plain", variant=SHALLOW_VARIANT)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """One prompt, one token and one step, and three layers beside the plain image."""
    for name, value in {"PROMPTS": ("a",), "SIDE": 32, "STEPS": 1, "_TOGETHER": (4, 2)}.items():
        monkeypatch.setattr(calibration, name, value)


def latents(checkpoint: Checkpoint) -> np.ndarray:
    pipe = BasePipeline(Networks.open(checkpoint, dtype="float32"))
    request = pipe.request(["a"], width=32, height=32, steps=1, guidance=1.0, seed=0)
    return np.asarray(pipe.run(request, output_type="latent").images[0])


def with_4_bits(checkpoint: Checkpoint, layer: str) -> Checkpoint:
    """The model with the numbers that 4 bits of one layer stand for, in its place."""

    class Changed:
        has_steps, identity, arrays, nbytes = False, "changed", (), 0

        def at(self, step):
            return False

        def beside(self, name, module):
            if name == layer:
                packed = mx.quantize(module.weight.astype(mx.float32), GROUP_SIZE, 4)
                module.weight = mx.dequantize(*packed, GROUP_SIZE, 4)
            return module

    parts = checkpoint.components
    return replace(checkpoint, components=parts | {"transformer": replace(parts["transformer"], adapters=Changed())})


def test_each_layer_is_tried_by_itself(folder):
    checkpoint = Checkpoint.open(folder)
    heard = []
    errors = image_errors(checkpoint, progress=lambda *numbers: heard.append(numbers))
    blocks = [
        x.removesuffix(".weight")
        for x, t in checkpoint.components["transformer"].infos.items()
        if "_blocks." in x and len(t.shape) == 2
    ]
    assert [*errors] == blocks
    assert heard == [(number, 4) for number in range(1, 5)]
    clean = latents(checkpoint)
    for layer in ("double_blocks.0.txt_attn.qkv", "single_blocks.0.linear1", "single_blocks.1.linear2"):
        changed = latents(with_4_bits(checkpoint, layer))
        expected = np.square(changed - clean).sum() / np.square(clean).sum()
        assert errors[layer] == pytest.approx(expected, rel=0.02)
        assert errors[layer] > 0


def test_the_same_each_time_however_many_share_a_pass_and_what_is_streamed(folder, monkeypatch):
    checkpoint = Checkpoint.open(folder)
    errors = image_errors(checkpoint)
    assert image_errors(checkpoint) == errors
    monkeypatch.setattr(calibration, "_TOGETHER", (2,))
    assert image_errors(checkpoint) == pytest.approx(errors, rel=1e-3)


def test_too_little_memory_is_refused(folder, monkeypatch):
    """Weights that are tried count in the plan."""
    monkeypatch.setattr(calibration._Trials, "nbytes", property(lambda _: 2**40))
    with pytest.raises(InputError, match=r"needs 1\.02e\+03 GiB, the limit is 1 GiB; "):
        calibrated(Checkpoint.open(folder), memory_limit="1GiB")


def test_the_ranking_is_by_error_for_each_weight(folder, monkeypatch):
    monkeypatch.setattr(
        calibration,
        "image_errors",
        lambda *_: {
            "double_blocks.0.img_attn.proj": 1.0,
            "single_blocks.0.linear1": 5.0,
            "single_blocks.1.linear2": 5.0,
        },
    )
    found = calibrated(Checkpoint.open(folder))
    assert found.ranking == ("single_blocks.1.linear2", "double_blocks.0.img_attn.proj", "single_blocks.0.linear1")
    assert found.measured == {"prompts": 1, "side": 32, "steps": 1}


def test_a_conversion_follows_it(folder, tmp_path, models):
    target = tmp_path / "mixed"
    result = run("convert", folder, target, "-q", "mixed4", "--calibrate")
    assert (result.exit_code, result.stdout) == (0, f"{target}\n"), result.output
    assert "calibrating: 100%, 4/4" in result.stderr
    made, plain = Checkpoint.open(target), Checkpoint.open(folder)
    part = plain.components["transformer"]
    shapes = {name.removesuffix(".weight"): x.shape for name, x in part.infos.items() if len(x.shape) == 2}
    finer = finer_layers("transformer", shapes, calibrated(plain).ranking)
    said = json.loads((target / "transformer" / "config.json").read_text())["quantization"]
    assert {layer for layer, own in said.items() if isinstance(own, dict)} == set(finer)
    assert made.source["calibration"] == {"prompts": 1, "side": 32, "steps": 1}
    assert made.source["fingerprint"] != plain.source["fingerprint"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("-q", "qint4"), "--calibrate is for -q mixed4 of a model as it is"),
        ((), "--calibrate is for -q mixed4 of a model as it is"),
        (("-q", "mixed4", "--lora", "x.safetensors"), "--calibrate is for -q mixed4 of a model as it is"),
        (("-q", "mixed4", "--vae", "x"), "--calibrate is for -q mixed4 of a model as it is"),
    ],
)
def test_it_is_for_mixed_bits_of_a_model_as_it_is(options, said, folder, tmp_path, models):
    result = run("convert", folder, tmp_path / "a", "--calibrate", *options)
    assert result.exit_code == 2
    assert said in result.stderr


def test_only_a_checkpoint_in_16_bits_is_calibrated(official, folder, tmp_path, models):
    said = refusal("convert", official, tmp_path / "a", "-q", "mixed4", "--calibrate", "--variant", "klein-4b")
    assert said.endswith("is no MLX checkpoint, which alone is calibrated; convert it with -q bf16, and give that")
    run("convert", folder, tmp_path / "b", "-q", "qint8")
    said = refusal("convert", tmp_path / "b", tmp_path / "c", "-q", "mixed4", "--calibrate")
    assert said == f"{tmp_path / 'b'} has no transformer in bf16, which is what can be calibrated"
