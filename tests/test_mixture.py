"""Layers of `mixed4`: which have 8 bits, what the config says of them, and networks that are stored so."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from flux2_mlx.convert import requantize
from helpers.checkpoints import TRANSFORMER, convert, edit_json
from helpers.cli_runner import done, run
from mlx.utils import tree_flatten

from flux2_mlx.checkpoint import Checkpoint, Component, variant_components
from flux2_mlx.components import COMPONENTS
from flux2_mlx.config import VARIANTS
from flux2_mlx.errors import CheckpointError, InputError
from flux2_mlx.footprints import footprint, loaded_footprint
from flux2_mlx.mixture import BUDGET, Calibration, finer_layers
from flux2_mlx.quantization import bits_of, layer_bits, quant_of
from flux2_mlx.store import calibration, mixture
from flux2_mlx.streaming import Reading, load_streamed
from flux2_mlx.transformer import image_ids, rope_table, text_ids

LAST = "single_blocks.1.linear2"  # of the small transformer, which is first by place


def stored(quant: str = "mixed4", ranking=None, config=TRANSFORMER) -> Component:
    return Component("transformer", config, None, ()).quantized(quant, ranking)


@pytest.fixture(scope="module")
def plain(official, tmp_path_factory):
    """All of it in bfloat16."""
    return convert(official, tmp_path_factory.mktemp("plain") / "plain")


@pytest.fixture(scope="module")
def mixed(plain, tmp_path_factory):
    """The same in `mixed4`, with one layer of a double block in 8 bits."""
    folder = tmp_path_factory.mktemp("mixed") / "mixed"
    chosen = Calibration(("double_blocks.1.txt_attn.proj",), {"prompts": 2, "side": 256, "steps": 4})
    requantize(Checkpoint.open(plain), folder, "mixed4", "mixed4", calibration=chosen)
    return folder


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "demo"])
def test_released_transformers_have_less_than_5_bits_a_weight(name):
    component = variant_components(VARIANTS[name], "mixed4")["transformer"]
    weights = sum(np.prod(x.shape) for x in replace(component, quantization=None).infos.values())
    assert 4.7 < 8 * component.nbytes / weights < 5


def test_all_that_belongs_to_no_block_has_8_bits():
    for name, component in variant_components(VARIANTS["dev"], "mixed4").items():
        layers = layer_bits(component.quantization, component.infos)
        streamed = COMPONENTS[name].streamed
        assert {bits for layer, bits in layers.items() if not layer.startswith(streamed)} <= {8}
        share = {bits for layer, bits in layers.items() if streamed and layer.startswith(streamed)}
        assert share == ({4, 8} if streamed else set())


def test_the_last_blocks_of_a_transformer_come_first_and_the_first_ones_of_a_language_model():
    components = variant_components(VARIANTS["klein-4b"], "mixed4")
    finer = {
        name: [layer for layer, bits in layer_bits(part.quantization, part.infos).items() if bits == 8]
        for name, part in components.items()
    }
    last = {f"single_blocks.{block}.linear{number}" for block in (18, 19) for number in (1, 2)}
    assert {x for x in finer["transformer"] if "blocks" in x} == last | {"double_blocks.4.txt_mlp.2"}
    assert {x.split(".")[1] for x in finer["text_encoder"] if x.startswith("layers.")} == {"0", "1"}


def test_a_ranking_is_followed_as_far_as_the_budget_goes():
    shapes = {f"single_blocks.{number}.linear1": (64, 64) for number in range(40)}
    shapes["single_blocks.40.linear2"] = (640, 64)
    room = int((BUDGET - 4.5) / 4 * 50)
    ranking = ["single_blocks.40.linear2", *(f"single_blocks.{number}.linear1" for number in range(9, -1, -1))]
    assert finer_layers("transformer", shapes, ranking) == ranking[1 : 1 + room]
    assert finer_layers("transformer", shapes, ["unknown", *ranking[3:5]]) == ranking[3:5]


def test_what_is_stored_mixed_stays_as_it_is():
    other = stored(ranking=["double_blocks.0.img_attn.proj"])
    assert other != stored()
    assert other.quantized("mixed4") == other
    assert quant_of(other.quantization) == "mixed4"
    assert other.quantized("qint4") == stored("qint4")


@pytest.mark.parametrize(
    "value",
    [
        {"group_size": 64, "bits": 6, "mode": "affine"},
        {"group_size": 64, "bits": 4, "mode": "affine"},
        {"group_size": 64, "bits": 8.0, "mode": "affine"},
        {"group_size": 32, "bits": 8, "mode": "affine"},
        {"group_size": 64, "bits": 8, "mode": "mxfp8"},
        {"group_size": 64, "bits": 8},
        {"group_size": 64, "bits": 8, "mode": "affine", "quantize_input": True},
        {},
        [],
        True,
        8,
        None,
    ],
)
def test_other_parameters_of_a_layer_are_refused(value):
    component = stored()
    changed = replace(component, quantization=component.quantization | {LAST: value})
    with pytest.raises(CheckpointError, match=rf"quantization\.'{LAST}' is .*, not false or of 8 bits"):
        changed.build()


@pytest.mark.parametrize("quant", ["qint8", "qint6"])
def test_only_4_bits_are_mixed(quant):
    component = stored(quant)
    finer = {"group_size": 64, "bits": 8, "mode": "affine"}
    with pytest.raises(CheckpointError, match=r"not false$"):
        replace(component, quantization=component.quantization | {LAST: finer}).build()


@pytest.mark.parametrize("layer", ["single_blocks.9.linear1", "double_blocks", "img_in.weight", "", "vae"])
def test_a_layer_that_is_not_there_is_refused(layer):
    component = stored()
    finer = {"group_size": 64, "bits": 8, "mode": "affine"}
    with pytest.raises(CheckpointError, match=re.escape(f"quantization.{layer!r} is of no layer")):
        replace(component, quantization=component.quantization | {layer: finer}).build()


def test_a_manifest_that_says_something_else_is_refused(mixed, tmp_path):
    folder = Path(shutil.copytree(mixed, tmp_path / "copy"))
    edit_json(folder / "flux2.json", quantization={"transformer": "qint4", "text_encoder": "mixed4"})
    with pytest.raises(CheckpointError, match="says qint4 where the transformer is stored"):
        Checkpoint.open(folder)


def test_a_layer_that_is_not_there_is_told_with_its_file(mixed, tmp_path):
    folder = Path(shutil.copytree(mixed, tmp_path / "copy"))
    edit_json(folder / "flux2.json", files=None)
    config = folder / "transformer" / "config.json"
    said = json.loads(config.read_text())["quantization"]
    edit_json(config, quantization=said | {"vae": {"group_size": 64, "bits": 8, "mode": "affine"}})
    message = f"{config} describes no transformer: quantization.'vae' is of no layer of this network"
    with pytest.raises(CheckpointError, match=re.escape(message)):
        Checkpoint.open(folder)


def test_quantized_at_loading_it_equals_what_is_stored(plain, tmp_path, models):
    requantize(Checkpoint.open(plain), tmp_path / "a", "mixed4", "mixed4")
    now, before = (Checkpoint.open(folder).components["transformer"] for folder in (tmp_path / "a", plain))
    weights = [dict(tree_flatten(x.parameters())) for x in (now.load(mx.float32), before.load(mx.float32, "mixed4"))]
    assert weights[0].keys() == weights[1].keys()
    assert all(mx.array_equal(weights[0][name], weights[1][name]).item() for name in weights[0])


def test_the_source_gives_the_same_bytes(official, plain, tmp_path):
    requantize(Checkpoint.open(plain), tmp_path / "a", "mixed4")
    convert(official, tmp_path / "b", "mixed4", None, name="small")
    folders = tmp_path / "a", tmp_path / "b"
    weights = [{x.relative_to(f): x.read_bytes() for x in f.rglob("*.safetensors")} for f in folders]
    assert weights[0] == weights[1]


def outputs(network, config) -> np.ndarray:
    keys = map(mx.random.key, range(2))
    widths = config.in_channels, config.joint_attention_dim
    img, txt = (mx.random.normal((1, 16, width), key=key) for width, key in zip(widths, keys, strict=True))
    rope = rope_table(np.concatenate([text_ids(16), image_ids(4, 4)]), config)
    return np.array(network(img, network.txt_in(txt), mx.array([0.7]), rope))


@pytest.mark.parametrize("resident", [0, 1, 3])
def test_streamed_blocks_have_the_bits_of_each(mixed, resident):
    component = Checkpoint.open(mixed).components["transformer"]
    expected = outputs(component.load(mx.float32), component.config)
    streamed = load_streamed(component, mx.float32, resident, Reading())
    for _ in range(2):
        np.testing.assert_array_equal(outputs(streamed, component.config), expected)


def test_layers_equal_those_of_the_numbers_that_they_stand_for(mixed):
    component = Checkpoint.open(mixed).components["transformer"]
    packed = component.load(mx.float32)
    dense = replace(component, quantization=None).build()
    weights = dict(tree_flatten(packed.parameters()))
    names = dict(tree_flatten(dense.parameters()))
    plain = [(name, unpacked(weights, component, name)) for name in names]
    dense.load_weights(plain)
    a, b = outputs(packed, component.config), outputs(dense, component.config)
    assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)


def unpacked(weights, component, name) -> mx.array:
    layer = name.removesuffix(".weight")
    if f"{layer}.scales" not in weights:
        return weights[name].astype(mx.float32)
    scales, biases = (weights[f"{layer}.{part}"].astype(mx.float32) for part in ("scales", "biases"))
    return mx.dequantize(weights[name], scales, biases, 64, bits_of(component.quantization, layer))


def test_memory_is_that_of_each_layer(mixed, plain):
    component = Checkpoint.open(mixed).components["transformer"]
    module = component.load(mx.bfloat16)
    assert footprint(component, mx.bfloat16).all == sum(x.nbytes for _, x in tree_flatten(module.parameters()))
    loaded = loaded_footprint(Checkpoint.open(plain).components["transformer"], "mixed4", mx.bfloat16)
    assert loaded.all == footprint(stored(), mx.bfloat16).all


@pytest.mark.parametrize(
    ("before", "after"), [("qint8", "mixed4"), ("mixed4", "qint4"), ("qint8", "qint6"), ("qint6", "qint4")]
)
def test_fewer_bits_of_few(before, after, plain, tmp_path, caplog):
    requantize(Checkpoint.open(plain), tmp_path / "a", before, before)
    requantize(Checkpoint.open(tmp_path / "a"), tmp_path / "b", after, after)
    few, made = Checkpoint.open(tmp_path / "a"), Checkpoint.open(tmp_path / "b")
    assert made.quants == (after, after)
    told = r"already: in .* (?:its weights|the weights of (\d+) of (\d+) layers) change by (.*)% of their size"
    changes = [match.groups() for match in re.finditer(told, caplog.text)]
    for (some, whole, change), name in zip(changes, ("transformer", "text_encoder", "language_model"), strict=True):
        old, new = few.components[name], made.components[name]
        kept, layers = same_layers(old, new)
        assert (some, whole) == ((str(layers - len(kept)), str(layers)) if kept else (None, None))
        assert float(change) > (6 if after in ("qint4", "mixed4") else 1)  # of what changes, not of all
        for tensor in (f"{layer}.{part}" for layer in kept for part in ("weight", "scales", "biases")):
            assert mx.array_equal(*(next(iter(x.tensors.read([tensor]))) for x in (old, new)))


def same_layers(old: Component, new: Component) -> tuple[list[str], int]:
    """The layers that have as many bits in both, and how many layers have few."""
    before, after = (layer_bits(x.quantization, x.infos) for x in (old, new))
    return [layer for layer, bits in after.items() if bits == before[layer]], len(after)


@pytest.mark.parametrize(("before", "after"), [("qint8", "mixed4"), ("qint8", "qint4"), ("mixed4", "qint4")])
def test_weights_made_from_few_bits_have_a_fingerprint_of_their_own(before, after, plain, tmp_path):
    source = Checkpoint.open(plain)
    ranking = ["single_blocks.2.linear2"]
    measured = Calibration(tuple(ranking), {"prompts": 1}) if before == "mixed4" else None
    requantize(source, tmp_path / "a", before, "qint8", calibration=measured)
    few = Checkpoint.open(tmp_path / "a")
    requantize(few, tmp_path / "b", after, "qint8")
    requantize(few, tmp_path / "c", before, "qint4")
    made, other_text = (Checkpoint.open(tmp_path / name).source for name in "bc")
    assert len({x["fingerprint"] for x in (source.source, few.source, made, other_text)}) == 3 + bool(measured)
    assert ("calibration" in few.source, "calibration" in made) == (bool(measured), False)
    assert other_text.get("calibration") == few.source.get("calibration")


@pytest.mark.parametrize(("before", "after"), [("qint6", "mixed4"), ("mixed4", "qint6"), ("qint4", "mixed4")])
def test_no_layer_gets_more_bits(before, after, plain, tmp_path):
    requantize(Checkpoint.open(plain), tmp_path / "a", before, before)
    with pytest.raises(InputError, match=f"stored as {before}, and would gain nothing as {after}"):
        requantize(Checkpoint.open(tmp_path / "a"), tmp_path / "b", after, after)


def test_the_choice_and_how_it_was_made_are_told(mixed, plain, models, tmp_path):
    checkpoint = Checkpoint.open(mixed)
    said = json.loads((mixed / "transformer" / "config.json").read_text())["quantization"]
    assert said["double_blocks.1.txt_attn.proj"] == {"group_size": 64, "bits": 8, "mode": "affine"}
    assert LAST not in said
    assert calibration(checkpoint) == {"prompts": 2, "side": 256, "steps": 4}
    counts = mixture(checkpoint)
    told = run("info", str(mixed), "--json")
    assert json.loads(told.stdout)["layers"] == {str(bits): count for bits, count in counts.items()}
    line = f"transformer: {counts[4]} layers in 4 bits and {counts[8]} layers in 8 bits"
    assert f"{line}, calibrated by 2 prompts at 256 pixels" in done("info", str(mixed)).stdout
    assert mixture(Checkpoint.open(plain)) == {}
    assert calibration(Checkpoint.open(plain)) is None
    assert done("models", "verify", str(mixed)).stdout.endswith("all good\n")
