"""Our checkpoint folder: strict opening, and loading."""

import json
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from helpers.checkpoints import LARGE_TRANSFORMER, TEXT, TRANSFORMER, VAE, VARIANT, convert, save_small
from helpers.damage import Damage, edit, fill, remove, resize, weights
from mlx.utils import tree_flatten

from flux2_mlx import Flux2Pipeline, checkpoint
from flux2_mlx.checkpoint import Checkpoint, Component, is_checkpoint
from flux2_mlx.errors import CheckpointError
from flux2_mlx.weights import TensorInfo, read_header

PACKED, TEXT_WEIGHTS, VAE_WEIGHTS = (f"{name}/model.safetensors" for name in ("transformer", "text_encoder", "vae"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in bfloat16; not to be changed."""
    folder = tmp_path_factory.mktemp("plain")
    return convert(save_small(folder / "official"), folder / "converted")


@pytest.fixture(scope="module")
def mixed(plain: Path) -> Path:
    """The same with an 8 bit transformer and a 4 bit text encoder; not to be changed."""
    return convert(plain.with_name("official"), plain.with_name("mixed"), "qint8", "qint4")


@pytest.fixture
def folder(mixed: Path, tmp_path: Path) -> Path:
    """A copy of `mixed` to damage."""
    return Path(shutil.copytree(mixed, tmp_path / "checkpoint"))


def put(name: str, key: str, tensor: mx.array | None) -> Damage:
    """Set a tensor, or take it out."""
    return weights(name, lambda x: x.pop(key) if tensor is None else x.update({key: tensor}))


def other_model(folder: Path) -> None:
    """A VAE that is complete in itself, but has twice the channels."""
    sizes = {"vae": replace(VAE, latent_channels=8), "transformer": replace(TRANSFORMER, in_channels=32)}
    other = convert(save_small(folder.with_name("official"), **sizes), folder.with_name("other"))
    shutil.rmtree(folder / "vae")
    shutil.copytree(other / "vae", folder / "vae")


def reworded(name: str, before: str, after: str) -> Damage:
    """Put `after` in the place of the last `before`, or of the first if that is a brace, as in a text editor."""

    def change(folder: Path) -> None:
        text = (folder / name).read_text()
        place = text.index(before) if before == "{" else text.rindex(before)
        (folder / name).write_text(text[:place] + after + text[place + len(before) :])

    return change


QUANTS = {"transformer": "qint8", "text_encoder": "qint4"}
NOT_SAFETENSORS = "vae/model.safetensors is not a safetensors file"
CONFIG = "transformer/config.json"
DAMAGES: dict[str, tuple[Damage, str]] = {
    "manifest garbage": (fill("flux2.json", b"{"), "flux2.json is not JSON"),
    "manifest list": (fill("flux2.json", b"[1]"), "flux2.json holds no JSON object"),
    "other version": (edit("flux2.json", format_version=2), "has format version 2, this version .* reads 1"),
    "version of two lines": (edit("flux2.json", format_version="1\n2"), r"has format version '1\\n2', this"),
    "no encoder listed": (edit("flux2.json", components=["transformer", "vae"]), "it lists no text_encoder"),
    "changed without a word": (
        reworded("flux2.json", '"klein-4b"', '"klein-base-4b"'),
        "flux2.json was changed after the conversion; convert the model again",
    ),
    "other digest": (reworded("flux2.json", '"sha256": "', '"sha256": "0'), "flux2.json was changed after"),
    "digest nonsense": (reworded("flux2.json", '"sha256": "', '"sha256": 7, "a": "'), "flux2.json was changed after"),
    "nested": (reworded("flux2.json", "{", '{"a":' + '{"a":' * 980 + "1" + "}" * 980 + ","), "flux2.json "),
    "no version": (edit("flux2.json", format_version=None), "has format version None"),
    "unknown variant": (edit("flux2.json", variant="flux3"), "flux2.json is damaged: unknown model 'flux3'"),
    "no variant": (edit("flux2.json", variant=None), "flux2.json is damaged: 'variant'"),
    "no quantization": (edit("flux2.json", quantization=None), "flux2.json is damaged: 'quantization'"),
    "no source": (edit("flux2.json", source=None), "flux2.json is damaged: 'source'"),
    "source nonsense": (edit("flux2.json", source=[1]), "flux2.json is damaged"),
    "unknown quantization": (edit("flux2.json", quantization=QUANTS | {"transformer": "q8"}), "is damaged: 'q8'"),
    "other quantization": (
        edit("flux2.json", quantization=QUANTS | {"text_encoder": "bf16"}),
        "it says bf16 where the text_encoder is stored as qint4",
    ),
    "no config": (remove(CONFIG), "can't read .*transformer/config.json: No such file"),
    "config garbage": (fill(CONFIG, b"\xff"), "config.json is not JSON"),
    "config nonsense": (edit(CONFIG, num_layers="two"), "config.json describes no transformer"),
    "config without a size": (edit(CONFIG, num_layers=None), "missing .* 'num_layers'"),
    "statement nonsense": (edit(CONFIG, quantization="8"), "config.json describes no transformer"),
    "no statement": (edit(CONFIG, quantization=None), "it says qint8 where the transformer is stored as bf16"),
    "other bits": (
        edit(CONFIG, quantization={"group_size": 64, "bits": 4, "mode": "affine", "img_in": False}),
        "it says qint8 where the transformer is stored as qint4",
    ),
    "layer not spared": (
        edit(CONFIG, quantization={"group_size": 64, "bits": 8, "mode": "affine"}),
        "config.json describes no transformer",
    ),
    "other mode": (
        edit(CONFIG, quantization={"group_size": 64, "bits": 8, "mode": "mxfp8", "img_in": False}),
        r"transformer/config.json describes no transformer: quantization.mode is 'mxfp8', none of \('affine',\)",
    ),
    "a mode of its own for a layer": (
        edit(CONFIG, quantization={"group_size": 64, "bits": 8, "mode": "affine", "img_in": {"mode": "mxfp8"}}),
        r"quantization.'img_in' is {'mode': 'mxfp8'}, not false",
    ),
    "mlx-lm's second statement": (
        edit(CONFIG, quantization_config={"group_size": 32, "bits": 4, "mode": "mxfp4"}),
        r"describes no transformer: unknown keys \['quantization_config'\]",
    ),
    "one more layer": (edit(CONFIG, num_single_layers=3), "missing single_blocks.2.linear1.weight"),
    "part of another model": (other_model, "takes 16 channels a token, the VAE gives 32"),
    "no tokenizer": (remove("tokenizer"), "is incomplete: there is no .*tokenizer.json"),
    "tokenizer garbage": (fill("tokenizer/tokenizer.json", b"{}"), "is not a tokenizer file"),
    "no VAE": (remove("vae"), "can't read .*vae/config.json"),
    "no weights": (remove(PACKED), "missing img_in.weight; missing txt_in.weight; .* and 89 more"),
    "one byte missing": (resize(PACKED, -1), r"model.safetensors has \d+ bytes where its header says \d+"),
    "one byte too long": (resize(VAE_WEIGHTS, 1), r"model.safetensors has \d+ bytes where its header says \d+"),
    "half missing": (resize(TEXT_WEIGHTS, -500_000), r"has \d+ bytes where its header says \d+"),
    "empty": (fill(VAE_WEIGHTS, b""), NOT_SAFETENSORS),
    "garbage": (fill(VAE_WEIGHTS, b"\x00\xff" * 999), NOT_SAFETENSORS),
    "second copy": (
        lambda folder: shutil.copy(folder / PACKED, folder / "transformer/model (1).safetensors"),
        "repeats tensors of another file",
    ),
    "missing key": (
        put(PACKED, "img_in.weight", None),
        "/transformer is damaged, convert the model again: missing img_in.w",
    ),
    "missing scales": (
        put(PACKED, "txt_in.scales", None),
        "is damaged, convert the model again: missing txt_in.scales$",
    ),
    "extra key": (
        put(VAE_WEIGHTS, "lora", mx.zeros((1,))),
        "/vae is damaged, convert the model again: unexpected lora$",
    ),
    "wrong shape": (
        put(PACKED, "img_in.weight", mx.zeros((16, 64), mx.bfloat16)),
        r"img_in.weight is BF16 \[16, 64\] instead of BF16 \[64, 16\]",
    ),
    "wrong dtype": (
        put(VAE_WEIGHTS, "bn.running_var", mx.zeros((16,))),
        r"bn.running_var is F32 \[16\] instead of BF16",
    ),
    "unpacked weight": (
        put(TEXT_WEIGHTS, "embed_tokens.weight", mx.zeros((272, 64), mx.bfloat16)),
        r"embed_tokens.weight is BF16 \[272, 64\] instead of U32 \[272, 8\]",
    ),
    "several": (
        weights(VAE_WEIGHTS, lambda x: (x.pop("quant_conv.bias"), x.update({"a": x.pop("quant_conv.weight")}))),
        "damaged, convert the model again: missing quant_conv.weight; missing quant_conv.bias; unexpected a$",
    ),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damage_is_found_at_opening(case, folder):
    damage, match = DAMAGES[case]
    damage(folder)
    with pytest.raises(CheckpointError, match=match) as caught:
        Flux2Pipeline.from_pretrained(folder)
    assert "\n" not in str(caught.value)


SMALL_FILES = (
    *(f"{name}/config.json" for name in ("transformer", "text_encoder", "vae")),
    *("tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json", "scheduler/scheduler_config.json"),
)


@pytest.mark.parametrize("name", [*SMALL_FILES, "tensors.json"])
def test_a_small_file_that_was_changed_by_hand(name, folder):
    (folder / name).write_bytes((folder / name).read_bytes() + b"\n")
    match = rf"{name} is not what was converted; convert the model again \(also where this was done on purpose\)$"
    with pytest.raises(CheckpointError, match=match):
        Checkpoint.open(folder)
    edit("flux2.json", files=None)(folder)  # there were none once
    Checkpoint.open(folder)


def test_a_change_of_the_same_size(folder):
    path = folder / "scheduler/scheduler_config.json"
    path.write_bytes(path.read_bytes().replace(b"3.0", b"4.0"))
    with pytest.raises(CheckpointError, match=r"scheduler_config.json is not what was converted"):
        Checkpoint.open(folder)


def test_small_files_that_are_gone_or_new(folder):
    new = folder / "tokenizer/special_tokens_map.json"
    new.write_text("{}")
    with pytest.raises(CheckpointError, match=r"special_tokens_map.json was not there after the conversion; remove"):
        Checkpoint.open(folder)
    new.unlink()
    Checkpoint.open(folder)
    (folder / "tokenizer/tokenizer_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer_config.json is missing; convert the model again"):
        Checkpoint.open(folder)


def test_a_folder_without_manifest_is_no_checkpoint(folder):
    assert is_checkpoint(folder)
    (folder / "flux2.json").unlink()
    assert not is_checkpoint(folder)
    with pytest.raises(CheckpointError, match=r"is not an MLX checkpoint: it has no flux2\.json"):
        Checkpoint.open(folder)


def test_open(mixed):
    checkpoint = Checkpoint.open(mixed)
    assert (checkpoint.variant.name, checkpoint.quant, checkpoint.text_quant) == (VARIANT, "qint8", "qint4")
    assert checkpoint.source["name"] == "official"
    configs = {name: component.config for name, component in checkpoint.components.items()}
    assert (configs["transformer"], configs["vae"]) == (TRANSFORMER, VAE)
    sizes = ("hidden_size", "num_hidden_layers", "out_layers", "rope_theta")
    assert [getattr(configs["text_encoder"], name) for name in sizes] == [getattr(TEXT, name) for name in sizes]
    assert checkpoint.tokenizer_file == mixed / "tokenizer/tokenizer.json"
    for name, component in checkpoint.components.items():
        assert component.nbytes == sum(x.nbytes for x in read_header(mixed / name / "model.safetensors").values())


def test_opening_builds_each_network_once(mixed, monkeypatch):
    checkpoint._infos.cache_clear()
    built = []
    build = Component.build
    monkeypatch.setattr(Component, "build", lambda component: built.append(component.name) or build(component))
    checkpoint._infos.cache_clear()
    components = Checkpoint.open(mixed).components
    assert sorted(built) == sorted(components)


def test_read_header(tmp_path):
    header = json.dumps(
        {
            "__metadata__": {"a": "b"},
            "x": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]},
            "y": {"dtype": "U32", "shape": [], "data_offsets": [12, 16]},
        }
    ).encode()
    file = tmp_path / "x.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    assert read_header(file) == {"x": TensorInfo("BF16", (2, 3)), "y": TensorInfo("U32", ())}
    assert [tensor.nbytes for tensor in read_header(file).values()] == [12, 4]


def not_a_header(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"1234567",
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 3) + b"{}",
        not_a_header(b"[]"),
        not_a_header(b"[" * 100_000),
        not_a_header(b"\xff\xfe"),
        not_a_header(b'{"x": []}'),
        not_a_header(b'{"x": {"dtype": "F32", "shape": [1]}}'),
        not_a_header(b'{"x": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}}') + bytes(4),
        not_a_header(b'{"x": {"dtype": "F32", "shape": ["a"], "data_offsets": [0, 4]}}') + bytes(4),
        not_a_header(b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}}') + bytes(8),
        not_a_header(b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": []}}'),
    ],
    ids=lambda data: repr(data[:60]),
)
def test_read_header_of_something_else(data, tmp_path):
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(CheckpointError, match="x is not a safetensors file: "):
        read_header(tmp_path / "x")


def test_read_header_of_nothing(tmp_path):
    with pytest.raises(CheckpointError, match=r"can't read .*none: No such file or directory"):
        read_header(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"can't read .*: Is a directory"):
        read_header(tmp_path)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_loading_casts_all_that_is_not_packed_but_matrices_under_float32(dtype, plain, mixed):
    for folder, kinds in ((plain, set()), (mixed, {mx.uint32})):
        module = Checkpoint.open(folder).components["transformer"].load(dtype)
        arrays = dict(tree_flatten(module.parameters())).values()
        matrix = mx.bfloat16 if dtype == mx.float32 else dtype
        assert {array.dtype for array in arrays if array.ndim == 2} - {mx.uint32} == {matrix}
        assert {array.dtype for array in arrays} == kinds | {matrix, dtype}
    stored = mx.load(str(plain / VAE_WEIGHTS))
    loaded = dict(tree_flatten(Checkpoint.open(plain).components["vae"].load(dtype).parameters()))
    assert loaded.keys() == stored.keys()
    assert all(mx.array_equal(array, stored[name].astype(dtype)) for name, array in loaded.items())


@pytest.mark.parametrize("kind", ["plain", "mixed"])
def test_narrow_matrices_compute_what_widened_ones_do(kind, request):
    components = Checkpoint.open(request.getfixturevalue(kind)).components
    ids = mx.arange(12)[None]
    narrow, wide = (components["text_encoder"].load(mx.float32) for _ in range(2))
    wide.set_dtype(mx.float32)
    states = narrow(ids, ids < 9)
    assert states.dtype == mx.float32
    assert mx.array_equal(states, wide(ids, ids < 9))
    narrow, wide = (components["transformer"].load(mx.float32) for _ in range(2))
    wide.set_dtype(mx.float32)
    config = narrow.config
    tokens, text = mx.random.normal((1, 9, config.in_channels)), mx.random.normal((1, 5, config.hidden_size))
    rope = mx.ones((14, 2, config.attention_head_dim))
    velocity, expected = (network(tokens, text, mx.array([0.5]), rope) for network in (narrow, wide))
    assert velocity.dtype == mx.float32
    assert mx.array_equal(velocity, expected)


@pytest.mark.parametrize("quant", ["qint8", "qint4"])
@pytest.mark.parametrize("name", ["transformer", "text_encoder"])
def test_quantizing_at_loading_equals_a_quantized_checkpoint(name, quant, plain, tmp_path):
    stored = convert(plain.with_name("official"), tmp_path / "quantized", quant, quant)
    at_loading = Checkpoint.open(plain).components[name].load(mx.bfloat16, quant)
    before = Checkpoint.open(stored).components[name].load(mx.bfloat16)
    pairs = zip(tree_flatten(at_loading.parameters()), tree_flatten(before.parameters()), strict=True)
    kinds = set()
    for (key, a), (other_key, b) in pairs:
        assert key == other_key
        assert a.dtype == b.dtype
        assert mx.array_equal(a, b), key
        kinds.add(a.dtype)
    assert kinds == {mx.bfloat16, mx.uint32}


def test_the_vae_is_never_quantized(plain):
    vae = Checkpoint.open(plain).components["vae"]
    assert vae.quantized("qint8") == vae
    assert {array.dtype for _, array in tree_flatten(vae.load(mx.bfloat16, "qint8").parameters())} == {mx.bfloat16}


def test_loading_takes_little_more_memory_than_the_weights(tmp_path):
    folder = convert(save_small(tmp_path / "official", transformer=LARGE_TRANSFORMER), tmp_path / "converted")
    component = Checkpoint.open(folder).components["transformer"]
    largest = max(x.nbytes for x in read_header(folder / PACKED).values())
    # A cast needs one stored tensor beside the new ones; quantizing one takes its codes in 32 bits and its float32.
    for dtype, quant, size, tensors in (
        (mx.bfloat16, None, component.nbytes, 1),
        (mx.float16, None, component.nbytes, 1),
        (mx.float32, None, component.nbytes, 1),
        (mx.bfloat16, "qint8", component.quantized("qint8").nbytes, 7),
    ):
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        module = component.load(dtype, quant)
        peak, held = mx.get_peak_memory() - before, mx.get_active_memory() - before
        print(f"{dtype} {quant}: {size} bytes of weights, {held} held, peak {(peak - size) / largest:.2f} tensors more")
        assert size <= held <= size + 0.1 * largest
        assert peak <= size + tensors * largest
        del module


@pytest.mark.parametrize("options", [{}, {"quant": "qint8", "text_quant": "qint8"}])
def test_a_run_builds_a_network_once_to_know_its_tensors(options, monkeypatch):
    built, build = [], Component.build
    monkeypatch.setattr(Component, "build", lambda component: built.append(component.name) or build(component))
    checkpoint._infos.cache_clear()
    pipe = Flux2Pipeline.from_pretrained("demo", dtype="float32", prompt_cache=False, **options)
    for _ in range(2):
        pipe("a fox", width=32, height=32, num_inference_steps=1)
    assert len(built) == 3 + 3  # and once to be loaded
