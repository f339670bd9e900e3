"""From a checkpoint in bfloat16 to one with fewer bits: the very bytes that its source would have given."""

import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest
from flux2_mlx.convert import folder as written
from flux2_mlx.convert import requantize
from helpers.checkpoints import LARGE_TRANSFORMER, VARIANT, convert, edit_json, save_dev
from helpers.cli_runner import done, refusal, run
from helpers.hub_client import REPO, using
from helpers.hub_server import HubServer

from flux2_mlx.checkpoint import Checkpoint, Component
from flux2_mlx.errors import CheckpointError, InputError
from flux2_mlx.quantization import quantize_array
from flux2_mlx.store import find_checkpoint

PAIRS = [("qint8", "qint8"), ("qint4", "qint4"), ("qint4", "bf16"), ("bf16", "qint8")]


@pytest.fixture(scope="module")
def plain(official, tmp_path_factory):
    """All of it in bfloat16."""
    return convert(official, tmp_path_factory.mktemp("plain") / "plain")


@pytest.fixture
def folder(tmp_path, models):
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".last-used"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.mark.parametrize(("quant", "text_quant"), PAIRS)
def test_the_same_bytes_as_from_the_source(quant, text_quant, official, plain, folder):
    requantize(Checkpoint.open(plain), folder / "a", quant, text_quant)
    assert contents(folder / "a") == contents(convert(official, folder / "b", quant, text_quant, name="small"))


def test_the_same_of_dev_in_shards(folder, monkeypatch):
    monkeypatch.setattr(written, "_SHARD_BYTES", 200_000)
    save_dev(folder / "dev")
    base = convert(folder / "dev", folder / "base", variant="dev")
    assert len(list(base.rglob("*.safetensors"))) > 4
    requantize(Checkpoint.open(base), folder / "a", "qint8", "qint4")
    assert contents(folder / "a") == contents(convert(folder / "dev", folder / "b", "qint8", "qint4", variant="dev"))


def test_what_has_the_bits_already_is_copied(official, folder):
    half = convert(official, folder / "half", "bf16", "qint8")
    requantize(Checkpoint.open(half), folder / "a", "qint8")
    assert contents(folder / "a") == contents(convert(official, folder / "b", "qint8", "qint8"))


@pytest.mark.parametrize(
    ("stored", "wanted", "what"),
    [
        (
            ("qint4", "qint4"),
            ("qint8", None),
            "transformer of {} is stored as qint4, and would gain nothing as qint8",
        ),
        (
            ("qint4", "qint4"),
            ("bf16", None),
            "transformer of {} is stored as qint4, and would gain nothing as bf16",
        ),
        (
            ("bf16", "qint8"),
            ("qint8", "bf16"),
            "text encoder of {} is stored as qint8, and would gain nothing as bf16",
        ),
    ],
)
def test_what_is_quantized_gains_nothing_from_more_bits(stored, wanted, what, official, folder):
    base = convert(official, folder / "base", *stored)
    options = ["-q", wanted[0], *(["--text-quant", wanted[1]] if wanted[1] else [])]
    message = refusal("convert", base, "mine", *options, "--quiet")
    assert message == f"the {what.format(base)}; convert the original, or a checkpoint in bf16"
    assert not Path("mine").exists()


def test_fewer_bits_of_what_is_quantized_and_what_is_lost(small_model, folder, caplog):
    official = small_model()
    base = convert(official, folder / "base", "qint8", "qint8")
    caplog.clear()
    requantize(Checkpoint.open(base), folder / "made", "qint4", "qint4")
    told = r"/{} is stored in 8 bits already: in 4 its weights change by (\d+\.\d)% of their size; of the original"
    for part, message in zip(("transformer", "text_encoder", "language_model"), caplog.messages, strict=True):
        assert 5 < float(re.search(told.format(part), message)[1]) < 15  # of normal random numbers 4 bits change 9
    made, direct = Checkpoint.open(folder / "made"), Checkpoint.open(convert(official, folder / "b", "qint4", "qint4"))
    assert (made.quant, made.text_quant) == ("qint4", "qint4")
    for name, component in made.components.items():
        assert component.infos == direct.components[name].infos
    weight = "double_blocks.0.img_mlp.0.weight"
    eight, four = (plainly(x.components["transformer"], weight) for x in (Checkpoint.open(base), made))
    codes, *rest = quantize_array(eight, 4).values()
    assert mx.array_equal(four, mx.dequantize(codes, *(x.astype(mx.float32) for x in rest), 64, 4))


def plainly(component: Component, name: str) -> mx.array:
    """A quantized weight as it counts."""
    layer, tensors = name.removesuffix(".weight"), component.tensors
    codes, *rest = tensors.read([f"{layer}.{end}" for end in ("weight", "scales", "biases")])
    bits = component.quantization["bits"]
    return mx.dequantize(codes, *(x.astype(mx.float32) for x in rest), 64, bits)


def test_nothing_to_do(plain):
    stored = "stored as bf16 with the text encoder as bf16"
    message = f"{plain} is an MLX checkpoint already, {stored}; use it as it is, or ask for less"
    assert refusal("convert", plain, "mine") == message
    assert refusal("convert", plain, "mine", "-q", "bf16", "--text-quant", "bf16") == message


def test_another_model_than_it_is(plain):
    message = f"{plain} holds {VARIANT}, not dev; leave the variant out, or choose another model"
    assert refusal("convert", plain, "mine", "-q", "qint8", "--variant", "dev") == message


def test_a_text_encoder_that_stays_is_spoken_of(official, folder, caplog):
    half = convert(official, folder / "half", "bf16", "qint8")
    requantize(Checkpoint.open(half), folder / "a", "qint4")
    (message,) = caplog.messages
    assert message == (
        f"the text encoder of {half} stays qint8; qint4 of the original is better than what could be made of that"
    )
    caplog.clear()
    requantize(Checkpoint.open(half), folder / "b", "qint4", "qint8")
    requantize(Checkpoint.open(half), folder / "c", "qint8")
    assert caplog.messages == []


def test_the_command_line(plain, folder):
    result = done("convert", plain, "mine", "-q", "qint8")
    assert result.stdout == "mine\n"
    assert "converting: 100% of " in result.stderr
    opened = Checkpoint.open(Path("mine"))
    assert (opened.quant, opened.text_quant, opened.variant.name) == ("qint8", "qint8", VARIANT)
    assert done("models", "verify", "mine", "--quiet").stdout == "mine: 13 files, all good\n"
    assert run("convert", plain, "mine", "-q", "qint4").exit_code == 1
    assert done("convert", plain, "mine", "-q", "qint4", "--force").exit_code == 0


def test_a_changed_checkpoint_is_not_quantized(plain, folder):
    damaged = shutil.copytree(plain, folder / "damaged")
    with (damaged / "transformer/model.safetensors").open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"\0\0")
    with pytest.raises(CheckpointError, match=r"transformer/model.safetensors: is not what was converted"):
        requantize(Checkpoint.open(damaged), folder / "a", "qint8")
    assert not (folder / "a").exists()


def test_one_without_hashes(plain, folder):
    old = shutil.copytree(plain, folder / "old")
    edit_json(old / "flux2.json", files=None)
    (old / "tensors.json").unlink()
    requantize(Checkpoint.open(old), folder / "a", "qint8")
    requantize(Checkpoint.open(plain), folder / "b", "qint8")
    assert contents(folder / "a") == contents(folder / "b")


def test_a_converted_model_is_not_fetched_again(official, folder, models):
    with HubServer({REPO: official}) as hub, using(hub, folder / "home"):
        find_checkpoint(REPO, variant=VARIANT, keep_source=False)
        hub.requests.clear()
        target = find_checkpoint(REPO, variant=VARIANT, quant="qint8")
        assert hub.requests == []
        assert target == models / "org--model-qint8"
        (models / "org--model-bf16").rename(folder / "aside")
        other = models / "org--model-qint4"
        assert find_checkpoint(REPO, variant=VARIANT, quant="qint4") == other
        assert hub.requests  # 4 bits can't be made from 8
        fresh = convert(official, folder / "fresh", "qint8", None, name=REPO)
    assert contents(target) == contents(fresh)


def test_memory_is_that_of_a_tensor_at_a_time(small_model, folder):
    opened = Checkpoint.open(convert(small_model(transformer=LARGE_TRANSFORMER), folder / "plain"))
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    requantize(opened, folder / "a", "qint8")
    assert mx.get_peak_memory() - before < 20_000_000  # of 38 MB
    assert mx.get_active_memory() - before < 1_000_000


def test_a_full_disk_is_told_before_anything_is_read(plain, folder, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match=r"^no space: the model takes "):
        requantize(Checkpoint.open(plain), folder / "a", "qint8")
    assert json.loads((plain / "flux2.json").read_text())["quantization"] == {
        "transformer": "bf16",
        "text_encoder": "bf16",
    }
