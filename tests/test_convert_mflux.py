"""The built-in model as mflux saves it, whole, plain and quantized: names and shapes are those that mflux wrote."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from flux2_mlx.convert import assembled, check_source, said_of
from flux2_mlx.convert.dialects import DIFFUSERS, filled, templated
from flux2_mlx.convert.geometry import choose, titles
from flux2_mlx.convert.rules import join_rows
from helpers.cli_runner import done
from helpers.hub_client import REPO, using
from helpers.hub_server import HubServer

from flux2_mlx.config import VARIANTS
from flux2_mlx.errors import CheckpointError
from flux2_mlx.store import demo_folder

GOLDEN = Path(__file__).parent / "golden" / "mflux.txt"
DEMO, NOISE = demo_folder(), "norm_out.linear.bias"
PARTS = ("transformer", "text_encoder", "vae")
RENAMED = {
    "embed.timestep_embedder.": "embed.",
    "attn.to_out.0.": "attn.to_out.",
    "attentions.0.to_out.0.": "attentions.0.to_out.",
}
Weights = dict[str, mx.array]


def stored(folder: Path, part: str) -> Weights:
    return mx.load(str(folder / part / "model.safetensors"))


def theirs(part: str) -> Weights:
    """A part of the built-in model by mflux's names."""
    weights = stored(DEMO, part)
    if part == "transformer":
        weights = {name: x for ours, array in weights.items() for name, x in renamed(ours, array).items()}
    if part == "text_encoder":
        weights |= {"norm.weight": mx.ones(128, mx.bfloat16), "rotary_emb.inv_freq": mx.ones(16)}
    for name in list(weights):
        for old, new in RENAMED.items():
            weights[name.replace(old, new)] = weights.pop(name)
            name = name.replace(old, new)
    return weights


def renamed(ours: str, array: mx.array) -> Weights:
    template, numbers = templated(ours)
    spelling = DIFFUSERS.table[template][0]
    names = [filled(name, numbers) for name in spelling.templates]
    # What else there is, copying and exchanging halves, undoes itself.
    parts = mx.split(array, len(names)) if spelling.rule is join_rows else [spelling.rule(*names).apply(array)]
    return dict(zip(names, parts, strict=True))


def quantized(weights: Weights, bits: int) -> Weights:
    """As `nn.quantize` leaves them."""
    found: Weights = {}
    for name, array in weights.items():
        if array.ndim == 2 and array.shape[1] % 64 == 0:
            ends = ("weight", "scales", "biases")
            found |= dict(zip((name.replace("weight", x) for x in ends), mx.quantize(array, 64, bits), strict=True))
        else:
            found[name] = array
    return found


def saved(folder: Path, bits: int | None = None, version: str = "0.24.0", **more: Weights) -> Path:
    """What mflux saves at `folder`."""
    said = {"quantization_level": str(bits), "mflux_version": version}
    for part in PARTS:
        (folder / part).mkdir(parents=True)
        weights = theirs(part) | more.get(part, {})
        weights = quantized(weights, bits) if bits else weights
        half, names = len(weights) // 2, sorted(weights)
        places = {name: f"{int(number >= half)}.safetensors" for number, name in enumerate(names)}
        for file in ("0.safetensors", "1.safetensors"):
            mx.save_safetensors(str(folder / part / file), {x: weights[x] for x in names if places[x] == file}, said)
        (folder / part / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": said, "weight_map": places})
        )
    shutil.copytree(DEMO / "tokenizer", folder / "tokenizer")
    return folder


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLUX2_MLX_HOME", str(tmp_path / "models"))
    return tmp_path


def same(made: Path, wanted: Callable[[str], Weights]) -> bool:
    pairs = [(stored(made, part), wanted(part)) for part in PARTS]
    return all(x.keys() == y.keys() and all(mx.array_equal(x[k], y[k]).item() for k in x) for x, y in pairs)


def test_names_and_shapes_are_those_that_mflux_wrote():
    lines = [line.split() for line in GOLDEN.read_text().splitlines() if line[0] != "#"]
    listed = {name: tuple(map(int, shape.split("x"))) for name, shape in lines}
    found = {f"{part}/{name}": x.shape for part in PARTS for name, x in theirs(part).items()}
    assert found | {f"transformer/{NOISE}": (256,)} == listed


def test_what_mflux_saved_is_the_model(folder):
    done("convert", saved(folder / "mine"), "made", "--text-quant", "bf16")
    assert same(folder / "made", lambda part: stored(DEMO, part))


@pytest.mark.parametrize("bits", [3, 8])
def test_quantized_ones_are_what_they_stand_for(bits, folder):
    done("convert", saved(folder / "mine", bits), "made", "-q", "bf16", "--text-quant", "bf16")

    def wanted(part: str) -> Weights:
        weights = stored(DEMO, part)
        for name, x in weights.items():
            if x.ndim == 2 and x.shape[1] % 64 == 0:
                packed = [y.astype(mx.float32) if y.dtype != mx.uint32 else y for y in mx.quantize(x, 64, bits)]
                weights[name] = mx.dequantize(*packed, 64, bits).astype(mx.bfloat16)
        return weights

    assert same(folder / "made", wanted)


def test_what_it_is_is_told(folder):
    text = done("info", saved(folder / "mine", 4)).stdout
    assert "transformer, text encoder and VAE of FLUX.2 demo" in text
    assert "MLX 4-bit" in text
    assert "stored as qint4, the text encoder as qint4" in text
    assert "missing" not in text


def test_its_bits_are_kept(folder):
    source = assembled(saved(folder / "mine", 8), {})
    assert source.quants(None, None) == ("qint8", "qint8")
    assert source.tokenizer == folder / "mine/tokenizer"


@pytest.mark.parametrize("bits", [None, 8])
def test_random_numbers_that_an_old_one_saved_are_left_out(bits, folder):
    noise = {NOISE: mx.ones(256, mx.bfloat16)}
    old, new = (
        assembled(saved(folder / x, bits, x, transformer=y), {}) for x, y in (("0.15.4", noise), ("0.16.0", {}))
    )
    check_source(old, "bf16", "bf16")
    assert old.parts["transformer"].tensors.infos == new.parts["transformer"].tensors.infos
    assert old.quants(None, None) == new.quants(None, None)
    with pytest.raises(CheckpointError, match=f"unexpected {NOISE}"):
        assembled(saved(folder / "odd", bits, "0.16.0", transformer=noise), {})


def test_a_record_says_which_model_it_is(folder):
    rows = [VARIANTS["klein-9b"], VARIANTS["klein-base-9b"], VARIANTS["klein-9b-kv"]]
    assert said_of(folder) == {}
    for record, expected in (
        ({"model_name": "flux2-klein-base-9b", "base_model": None}, "klein-base-9b"),
        ({"model_name": "someone/mine", "base_model": "flux2-klein-9b"}, "klein-9b"),
        ({"model_name": "flux2-klein-9b-kv", "base_model": 1}, "klein-9b-kv"),
    ):
        (folder / "mflux_model.json").write_text(json.dumps(record))
        assert choose(rows, titles(said_of(folder), "mine"), None, "x").name == expected


def test_a_file_that_is_missing_is_named(folder):
    (saved(folder / "mine") / "vae/1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"vae is incomplete: there is no 1\.safetensors"):
        assembled(folder / "mine", {})


def test_a_repo_of_the_hub_is_told_as_a_folder_is(tmp_path, models):
    folder = saved(tmp_path / "saved", 8)
    local = json.loads(done("info", folder, "--variant", "demo", "--json").stdout)
    with HubServer({REPO: folder}) as hub, using(hub, tmp_path / "home"):
        found = json.loads(done("info", REPO, "--variant", "demo", "--json").stdout)
        assert not any(name.startswith("tokenizer") for name in hub.fetched)
    assert {**found, "file": None, "conversion": None} == {**local, "file": None, "conversion": None}
