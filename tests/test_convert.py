"""What the converter writes, and how it tells the variants apart."""

import hashlib
import json
import re
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from flux2_mlx.convert import Source, assembled, write
from flux2_mlx.convert import folder as written
from helpers.checkpoints import (
    LARGE_TRANSFORMER,
    SHALLOW_TEXT,
    SHALLOW_VARIANT,
    TEXT,
    VARIANT,
    WEIGHTS,
    convert,
    edit_json,
    edit_weights,
    save_small,
)
from mlx.utils import tree_flatten
from safetensors import deserialize, safe_open

from flux2_mlx import __version__
from flux2_mlx.checkpoint import Checkpoint, sealed
from flux2_mlx.config import VARIANTS, Variant
from flux2_mlx.errors import CheckpointError
from flux2_mlx.quantization import quantize_array

COMPONENTS = ["transformer", "text_encoder", "language_model", "vae"]
FILES = {name: f"{name}/model.safetensors" for name in COMPONENTS}


@pytest.fixture(scope="module")
def converted(official: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The official model in ours, in bfloat16; not to be changed."""
    return convert(official, tmp_path_factory.mktemp("converted") / "model")


def load_file(path: Path) -> dict[str, mx.array]:
    """The tensors of a file, read without MLX's reader."""
    return {key: array_of(values) for key, values in deserialize(path.read_bytes())}


def array_of(values: dict) -> mx.array:
    kind = values["dtype"]
    stored_as = np.uint16 if kind == "BF16" else {"F16": "<f2", "F32": "<f4", "I64": "<i8", "U32": "<u4"}[kind]
    array = mx.array(np.frombuffer(values["data"], stored_as).reshape(values["shape"]))
    return array.view(mx.bfloat16) if kind == "BF16" else array


def rounded(x: mx.array) -> mx.array:
    """The nearest bfloat16, the even one of two, without MLX."""
    bits = np.array(x.astype(mx.float32)).view(np.uint32)
    return mx.array((bits + 0x7FFF + (bits >> 16 & 1) >> 16).astype(np.uint16)).view(mx.bfloat16)


def stored(folder: Path) -> dict[str, mx.array]:
    """Every tensor of an MLX checkpoint."""
    files = sorted(folder.glob("*/*.safetensors"))
    return {f"{file.parent.name}.{key}": tensor for file in files for key, tensor in load_file(file).items()}


def assert_same(ours: dict[str, mx.array], others: dict[str, mx.array]) -> None:
    assert ours.keys() == others.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == others[name].dtype, name
        assert mx.array_equal(tensor, others[name]), name


def test_the_folder(official, converted):
    files = {str(path.relative_to(converted)) for path in converted.rglob("*") if path.is_file()}
    configs = {f"{name}/config.json" for name in FILES}
    copies = {"tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json", "scheduler/scheduler_config.json"}
    assert files == {"flux2.json", "tensors.json", *FILES.values(), *configs, *copies}
    for file in copies:
        assert (converted / file).read_bytes() == (official / file).read_bytes()
    for file in FILES.values():
        with safe_open(converted / file, "np") as weights:
            assert weights.metadata() == {"format": "mlx", "flux2-mlx": "1"}


def raw_tensors(path: Path) -> dict[str, bytes]:
    """The bytes of every tensor in a file."""
    return {key: bytes(values["data"]) for key, values in deserialize(path.read_bytes())}


def test_the_manifest(official, tmp_path):
    folder = convert(official, tmp_path / "m", "qint4", None, variant="klein-base-4b", name="me/finetune")
    manifest = json.loads((folder / "flux2.json").read_text())
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    assert manifest == sealed(manifest)
    assert len(manifest.pop("sha256")) == 64
    assert manifest.pop("files") == {
        name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for name, path in paths.items()
        if name != "flux2.json"
    }
    hashes = json.loads((folder / "tensors.json").read_text())
    assert hashes == {
        file: {key: hashlib.sha256(data).hexdigest() for key, data in raw_tensors(folder / file).items()}
        for file in FILES.values()
    }
    assert manifest == {
        "format_version": 1,
        "variant": "klein-base-4b",
        "components": COMPONENTS,
        "quantization": {"transformer": "qint4", "text_encoder": "qint4"},
        "source": {"name": "me/finetune", "fingerprint": Source.open(official, "klein-base-4b").fingerprint},
        "version": __version__,
    }
    plain = convert(official, tmp_path / "n", "bf16", None)
    manifest = json.loads((plain / "flux2.json").read_text())
    assert manifest["quantization"] == {"transformer": "bf16", "text_encoder": "qint8"}
    assert manifest["source"]["name"] == official.name


def test_bfloat16_weights_are_kept_bit_for_bit(official, converted):
    theirs, ours = load_file(official / WEIGHTS["transformer"]), load_file(converted / FILES["transformer"])
    assert mx.array_equal(
        ours["single_blocks.1.linear1.weight"], theirs["single_transformer_blocks.1.attn.to_qkv_mlp_proj.weight"]
    )
    attention = "transformer_blocks.1.attn"
    joined = mx.concatenate([theirs[f"{attention}.add_{x}_proj.weight"] for x in "qkv"])
    assert mx.array_equal(ours["double_blocks.1.txt_attn.qkv.weight"], joined)
    scale, shift = mx.split(theirs["norm_out.linear.weight"], 2)
    assert mx.array_equal(ours["final_layer.adaLN_modulation.1.weight"], mx.concatenate([shift, scale]))
    theirs, ours = load_file(official / WEIGHTS["vae"]), load_file(converted / FILES["vae"])
    kernel = theirs["decoder.conv_in.weight"]
    assert mx.array_equal(ours["decoder.conv_in.weight"], kernel.transpose(0, 2, 3, 1))


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
def test_other_floats_are_rounded_once(dtype, source, tmp_path):
    def spread(tensors: dict[str, mx.array]) -> None:
        """Values between those of bfloat16, halfway cases among them."""
        for name, x in tensors.items():
            if mx.issubdtype(x.dtype, mx.floating):
                noise = mx.random.randint(0, 5, x.shape, key=mx.random.key(0)) / 4
                tensors[name] = (x.astype(mx.float32) * (1 + 2.0**-7 * noise)).astype(dtype)

    for file in WEIGHTS.values():
        edit_weights(source / file, spread)
    ours = stored(convert(source, tmp_path / "out"))
    assert {tensor.dtype for tensor in ours.values()} == {mx.bfloat16}
    theirs = load_file(source / WEIGHTS["text_encoder"])
    assert theirs["model.norm.weight"].dtype == dtype
    for name in ("embed_tokens.weight", "layers.26.mlp.down_proj.weight", "layers.0.self_attn.q_norm.weight"):
        assert mx.array_equal(ours[f"text_encoder.{name}"], rounded(theirs[f"model.{name}"]))
    theirs = load_file(source / WEIGHTS["vae"])
    assert mx.array_equal(ours["vae.bn.running_var"], rounded(theirs["bn.running_var"]))


@pytest.mark.parametrize("tied", [True, False])
def test_the_later_text_layers_are_kept_apart(tied, source, tmp_path):
    head = mx.full((TEXT.vocab_size, 64), 0.5)
    edit_weights(source / WEIGHTS["text_encoder"], lambda x: x.update({"lm_head.weight": head}))
    edit_json(source / "text_encoder/config.json", tie_word_embeddings=tied)
    theirs = load_file(source / WEIGHTS["text_encoder"])
    folder = convert(source, tmp_path / "out")
    encoder, later = (load_file(folder / FILES[name]) for name in ("text_encoder", "language_model"))
    places = {f"model.{name}": tensor for name, tensor in encoder.items()}
    for name, tensor in later.items():
        number = re.match(r"layers\.(\d+)\.", name)
        if number:
            name = f"layers.{27 + int(number[1])}.{name[number.end() :]}"
        places[name if name == "lm_head.weight" else f"model.{name}"] = tensor
    assert len(places) == len(encoder) + len(later)
    assert_same(places, {name: rounded(x) for name, x in theirs.items() if name in places})
    assert theirs.keys() - places.keys() == ({"lm_head.weight"} if tied else set())
    for name in ("text_encoder", "language_model"):
        config = json.loads((folder / name / "config.json").read_text())
        assert (config["num_hidden_layers"], config["out_layers"]) == (27, [9, 18, 27])
        assert (config["num_later_layers"], config["tie_word_embeddings"]) == (2, tied)


def test_only_the_needed_text_layers_are_kept_where_no_text_is_generated(tmp_path):
    source = save_small(tmp_path / "model", text=SHALLOW_TEXT)
    edit_weights(
        source / WEIGHTS["text_encoder"], lambda x: x.update({"lm_head.weight": mx.zeros((TEXT.vocab_size, 64))})
    )
    theirs = load_file(source / WEIGHTS["text_encoder"])
    assert {"model.layers.4.mlp.up_proj.weight", "model.norm.weight"} <= theirs.keys()
    folder = convert(source, tmp_path / "out", variant=SHALLOW_VARIANT)
    ours = load_file(folder / FILES["text_encoder"])
    needed = {key for key in theirs if key.startswith("model.") and key != "model.norm.weight"}
    needed = {key for key in needed if not key.startswith(("model.layers.3.", "model.layers.4."))}
    assert {f"model.{key}" for key in ours} == needed
    assert not (folder / "language_model").exists()
    config = json.loads((folder / "text_encoder/config.json").read_text())
    assert (config["num_hidden_layers"], config["out_layers"], config["num_later_layers"]) == (3, [1, 2, 3], 0)


def test_sharded_sources(official, converted, tmp_path):
    sharded = save_small(tmp_path / "sharded", shards=3)
    for name, file in WEIGHTS.items():
        assert not (sharded / file).exists()
        assert len(list((sharded / name).glob("*-of-*.safetensors"))) > 1
    assert_same(stored(convert(sharded, tmp_path / "out")), stored(converted))


def test_sharded_output(official, converted, tmp_path, monkeypatch):
    monkeypatch.setattr(written, "_SHARD_BYTES", 300_000)
    folder = convert(official, tmp_path / "out")
    shards = sorted(path.name for path in (folder / "transformer").glob("*.safetensors"))
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    assert len(shards) >= 3
    assert_same(stored(folder), stored(converted))
    index = json.loads((folder / "transformer/model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(shards)
    assert index["weight_map"].keys() == load_file(converted / FILES["transformer"]).keys()
    assert index["metadata"]["total_size"] == sum(
        x.nbytes for x in load_file(converted / FILES["transformer"]).values()
    )
    mine, other = (Checkpoint.open(f).components["transformer"].load(mx.float32) for f in (folder, converted))
    for (name, a), (_, b) in zip(tree_flatten(mine.parameters()), tree_flatten(other.parameters()), strict=True):
        assert mx.array_equal(a, b), name


@pytest.mark.parametrize(("quant", "bits", "error"), [("qint8", 8, 0.005), ("qint4", 4, 0.08)])
def test_quantized(quant, bits, error, converted, official, tmp_path):
    folder = convert(official, tmp_path / "out", quant, quant)
    statement = {"group_size": 64, "bits": bits, "mode": "affine"}
    for name, spared in {"transformer": {"img_in": False}, "text_encoder": {}, "language_model": {}}.items():
        config = json.loads((folder / f"{name}/config.json").read_text())
        assert config["quantization"] == {**statement, **spared}
    assert "quantization" not in json.loads((folder / "vae/config.json").read_text())
    assert (folder / FILES["vae"]).read_bytes() == (converted / FILES["vae"]).read_bytes()

    plain, packed = (mx.load(str(f / FILES["transformer"])) for f in (converted, folder))
    layers = {name.removesuffix(".scales") for name in packed if name.endswith(".scales")}
    assert layers == {k.removesuffix(".weight") for k, x in plain.items() if x.ndim == 2 and k != "img_in.weight"}
    for name, weight in plain.items():
        layer = name.removesuffix(".weight")
        if layer not in layers:
            assert mx.array_equal(packed[name], weight)
            continue
        for part, array in quantize_array(weight, bits).items():
            assert packed[f"{layer}.{part}"].dtype == array.dtype
            assert mx.array_equal(packed[f"{layer}.{part}"], array)
        scales, biases = (packed[f"{layer}.{part}"].astype(mx.float32) for part in ("scales", "biases"))
        restored = mx.dequantize(packed[name], scales, biases, group_size=64, bits=bits)
        assert mx.linalg.norm(restored - weight) <= error * mx.linalg.norm(weight.astype(mx.float32))
    checkpoint = Checkpoint.open(folder)
    assert (checkpoint.quant, checkpoint.text_quant) == (quant, quant)


@pytest.mark.parametrize("quant", ["bf16", "qint8"])
def test_converting_twice_gives_the_same_files(quant, official, tmp_path):
    source = Source.open(official, VARIANT)
    for folder in (tmp_path / "a", tmp_path / "b"):
        write.write_checkpoint(source, folder, quant)
    files = {path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file()}
    assert len(files) == 13
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_fingerprints(official, source, tmp_path):
    def fingerprint(folder: Path) -> str:
        return Source.open(folder, VARIANT).fingerprint

    assert fingerprint(source) == fingerprint(official)
    other = save_small(tmp_path / "finetune", seed=1)
    assert fingerprint(other) != fingerprint(official)
    changed = "model.layers.20.mlp.up_proj.weight"
    edit_weights(source / WEIGHTS["text_encoder"], lambda x: x.update({changed: x[changed] * 1.01}))
    assert fingerprint(source) != fingerprint(official)


def test_a_fingerprint_has_something_of_every_tensor(source, monkeypatch):
    monkeypatch.setattr("flux2_mlx.convert.sources._PIECES", 1)
    monkeypatch.setattr("flux2_mlx.convert.sources._PIECE_BYTES", 64)
    before = Source.open(source, VARIANT).fingerprint
    for name in list(mx.load(str(source / WEIGHTS["vae"])))[::20]:
        edit_weights(source / WEIGHTS["vae"], lambda x, name=name: x.update({name: x[name] + 1}))
        after = Source.open(source, VARIANT).fingerprint
        assert after != before, name
        before = after


def test_parts_that_are_given_count_in_a_fingerprint(official, source):
    edit_weights(source / WEIGHTS["vae"], lambda x: x.update({"quant_conv.bias": x["quant_conv.bias"] + 1}))
    (source / "tokenizer/tokenizer.json").write_text((source / "tokenizer/tokenizer.json").read_text() + " ")
    ways = ({}, {"tokenizer": source / "tokenizer"}, {"tokenizer": official / "tokenizer"})
    found = [assembled(official, way, VARIANT).fingerprint for way in ways]
    assert len({*found}) == len(ways)


def test_progress(official, tmp_path):
    reports = []
    folder = convert(official, tmp_path / "out", "qint8", progress=lambda *report: reports.append(report))
    assert reports == sorted(reports)
    assert {total for _, total in reports} == {reports[-1][0]}
    assert reports[-1][0] == sum(tensor.nbytes for tensor in stored(folder).values())


@pytest.mark.parametrize(("quant", "tensors"), [("bf16", 4), ("qint8", 8)])
def test_memory_is_a_few_tensors(quant, tensors, tmp_path):
    folder = save_small(tmp_path / "large", transformer=LARGE_TRANSFORMER)
    source = Source.open(folder, VARIANT)
    largest = max(x.nbytes for part in source.parts.values() for x in part.tensors.infos.values())
    whole = (folder / WEIGHTS["transformer"]).stat().st_size
    assert whole > 30_000_000
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    write.write_checkpoint(source, tmp_path / "out", quant, quant)
    peak = mx.get_peak_memory() - before
    print(f"{quant}: peak {peak / largest:.1f} times the largest tensor, {peak / whole:.2f} of the transformer")
    assert peak <= tensors * largest
    assert mx.get_active_memory() - before < largest


def official_config(folder: Path, row: Variant) -> None:
    """Give a model the published geometry of `row`; its weights, which opening does not look at, stay small."""
    edit_json(folder / "transformer/config.json", **row.transformer.to_dict())
    edit_json(folder / "vae/config.json", **row.vae.to_dict())
    for name in ("hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "num_key_value_heads"):
        edit_json(folder / "text_encoder/config.json", **{name: getattr(row.text, name)})


@pytest.mark.parametrize(
    ("size", "pipeline", "distilled", "expected"),
    [
        ("4b", "Flux2KleinPipeline", True, "klein-4b"),
        ("4b", "Flux2KleinPipeline", False, "klein-base-4b"),
        ("4b", "Flux2KleinPipeline", None, "klein-base-4b"),
        ("9b", "Flux2KleinPipeline", True, "klein-9b"),
        ("9b", "Flux2KleinPipeline", None, "klein-base-9b"),
        ("9b", "Flux2KleinKVPipeline", None, "klein-9b-kv"),
        ("9b", "Flux2KleinKVPipeline", True, "klein-9b-kv"),
        ("4b", "Flux2KleinInpaintPipeline", True, "klein-4b"),
        ("4b", "Flux2KleinInpaintPipeline", None, "klein-base-4b"),
        ("9b", "Flux2KleinModularPipeline", None, "klein-9b"),
        ("9b", "Flux2KleinBaseModularPipeline", None, "klein-base-9b"),
    ],
)
def test_the_variant_is_detected(size, pipeline, distilled, expected, source):
    official_config(source, VARIANTS[f"klein-{size}"])
    edit_json(source / "model_index.json", _class_name=pipeline, is_distilled=distilled)
    opened = Source.open(source)
    assert opened.variant is VARIANTS[expected]
    assert opened.configs["transformer"] == opened.variant.transformer
    assert opened.configs["vae"] == opened.variant.vae
    assert opened.configs["text_encoder"].output_size == opened.variant.text.output_size


def test_without_an_index_the_name_of_the_folder_tells(source):
    official_config(source, VARIANTS["klein-9b"])
    (source / "model_index.json").unlink()
    with pytest.raises(CheckpointError, match=r"name it with variant=NAME \(klein-9b, klein-base-9b, klein-9b-kv\)"):
        Source.open(source)
    assert Source.open(source.rename(source.parent / "my-klein-base-9B")).variant.name == "klein-base-9b"


def test_a_named_variant_overrules_the_index(source):
    official_config(source, VARIANTS["klein-9b"])
    assert Source.open(source, "klein-9b-kv").variant.name == "klein-9b-kv"


def test_an_ambiguous_variant_must_be_named(source):
    with pytest.raises(
        CheckpointError, match=r"can't tell which model .*/source is; name it with variant=NAME \(.*klein-4b"
    ):
        Source.open(source)
    official_config(source, VARIANTS["klein-4b"])
    edit_json(source / "model_index.json", _class_name="Flux2KleinKVPipeline")
    with pytest.raises(CheckpointError, match=r"name it with variant=NAME \(klein-4b, klein-base-4b\)"):
        Source.open(source)


def test_a_contradicting_variant_is_refused(source):
    official_config(source, VARIANTS["klein-4b"])
    with pytest.raises(CheckpointError, match="can't be klein-9b: its geometry is that of klein-4b, klein-base-4b"):
        Source.open(source, "klein-9b")


def test_parts_of_different_variants_are_refused(source):
    official_config(source, VARIANTS["klein-4b"])
    text = {"hidden_size": 4096, "intermediate_size": 12288}
    edit_json(source / "text_encoder/config.json", **text)
    with pytest.raises(
        CheckpointError, match="klein-4b: the transformer takes 7680 text features, the encoder gives 12288"
    ):
        Source.open(source)
