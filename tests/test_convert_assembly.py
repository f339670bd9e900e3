"""Models that are put together from files and folders of their parts."""

import json
import os
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from flux2_mlx.convert import assembled, write_checkpoint
from helpers.cli_runner import PROMPT, SMALL, done, refusal
from helpers.stored import in_groups
from PIL import Image

from flux2_mlx import Flux2Pipeline
from flux2_mlx.checkpoint import Checkpoint
from flux2_mlx.errors import CheckpointError, InputError
from flux2_mlx.store import demo_folder, sources

pytestmark = pytest.mark.usefixtures("folder")
DEMO = demo_folder()
PREFIX = "model.diffusion_model."


def stored(part: str) -> dict[str, mx.array]:
    """The tensors of a network of the built-in model."""
    return mx.load(str(DEMO / part / "model.safetensors"))


def saved(path: Path, **parts: dict[str, mx.array]) -> Path:
    """A file of tensors, each part with what its names begin with."""
    tensors = {prefix + name: array for prefix, part in parts.items() for name, array in part.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(path), tensors)
    return path


def first(vae: dict[str, mx.array]) -> dict[str, mx.array]:
    """A VAE with its convolutions as PyTorch has them."""
    return {name: x.transpose(0, 3, 1, 2) if x.ndim == 4 else x for name, x in vae.items()}


def text(encoder: dict[str, mx.array]) -> dict[str, mx.array]:
    return {f"model.{name}": array for name, array in encoder.items()}


def halved(tensors: dict[str, mx.array]) -> list[dict[str, mx.array]]:
    return [dict([*tensors.items()][half::2]) for half in (0, 1)]


@pytest.fixture
def transformer(folder):
    return saved(folder / "files" / "red-fox.safetensors", **{PREFIX: stored("transformer")})


@pytest.fixture
def converted(folder):
    """The built-in model among the converted ones."""
    return shutil.copytree(DEMO, folder / "models" / "mine-bf16")


def same_weights(folder: Path, other: Path = DEMO) -> bool:
    mine, theirs = Checkpoint.open(folder), Checkpoint.open(other)
    assert mine.components.keys() == theirs.components.keys()
    for name in mine.components:
        ours, wanted = (
            {k: v for p in x.components[name].files for k, v in mx.load(str(p)).items()} for x in (mine, theirs)
        )
        assert ours.keys() == wanted.keys()
        if not all(mx.array_equal(ours[key], wanted[key]).item() for key in ours):
            return False
    return True


def test_a_file_takes_the_place_of_a_part(transformer, folder):
    done("convert", "demo", "made", "--transformer", transformer, "--text-quant", "bf16")
    assert same_weights(folder / "made")
    other = {name: x + 1 if name.endswith("img_in.weight") else x for name, x in stored("transformer").items()}
    done(
        "convert",
        "demo",
        "other",
        "--transformer",
        saved(folder / "b.safetensors", **{"": other}),
        "--text-quant",
        "bf16",
    )
    assert not same_weights(folder / "other")


def test_a_file_alone_is_completed_by_a_converted_model(transformer, converted, folder, caplog):
    done("convert", transformer, "made", "--text-quant", "bf16")
    assert caplog.messages == [f"{transformer} has no text encoder, VAE and tokenizer; taken from {converted}"]
    assert same_weights(folder / "made")


def test_where_parts_were_taken_from_is_kept(transformer, converted, folder):
    vae = saved(folder / "vae.safetensors", **{"": first(stored("vae"))})
    done("convert", transformer, "made", "--text-quant", "bf16", "--vae", vae)
    stamp = json.loads((folder / "made" / "flux2.json").read_text())["source"]
    places = {name: str(converted / name) for name in ("text_encoder", "tokenizer")}
    assert stamp["parts"] == {"vae": str(vae), **places}
    shown = done("info", "made").stdout
    assert f"its text encoder from {converted / 'text_encoder'}\n" in shown
    assert f"its VAE from {vae}\n" in shown


def test_a_file_is_a_model_for_all_commands(transformer, converted, folder, caplog, monkeypatch):
    opened, open_source = [], sources.open_source
    monkeypatch.setattr(sources, "open_source", lambda *a, **k: opened.append(a) or open_source(*a, **k))
    done("t2i", PROMPT, *SMALL, "-m", transformer, "--text-quant", "bf16", "--seed", "1", "-o", "a.png")
    assert len(opened) == len(caplog.messages) == 1
    done("t2i", PROMPT, "-m", "demo", *SMALL, "--seed", "1", "-o", "b.png")
    assert Image.open("a.png").tobytes() == Image.open("b.png").tobytes()
    assert "demo" in done("info", transformer).stdout


def test_a_file_is_opened_from_python(transformer, converted, folder):
    settings = {"text_quant": "bf16", "progress": False}
    pipe = Flux2Pipeline.from_single_file(transformer, **settings)
    assert pipe.checkpoint.origins["text_encoder"] == str(converted / "text_encoder")
    assert Flux2Pipeline.from_pretrained(transformer, **settings).checkpoint.folder == pipe.checkpoint.folder
    for source in ("demo", str(converted)):
        with pytest.raises(InputError, match=rf"no file of weights; write from_pretrained\('{source}'\)"):
            Flux2Pipeline.from_single_file(source)
    with pytest.raises(InputError, match="from_single_file has no argument 'config'; leave it out"):
        Flux2Pipeline.from_single_file(transformer, config="black-forest-labs/FLUX.2-dev")


def test_what_a_file_lacks_is_said(transformer):
    message = refusal("convert", transformer, "made")
    assert message.startswith(
        f"{transformer} holds only the transformer of a demo; say where its text encoder, VAE and "
    )


def test_all_parts_are_given(transformer, folder):
    encoder = saved(folder / "encoder" / "model.safetensors", **{"": text(stored("text_encoder"))})
    vae = saved(folder / "vae.safetensors", **{"": first(stored("vae"))})
    arguments = ("--text-encoder", encoder.parent, "--vae", vae, "--tokenizer", DEMO)
    done("convert", transformer, "made", *arguments, "--text-quant", "bf16")
    assert same_weights(folder / "made")
    assert (folder / "made" / "scheduler" / "scheduler_config.json").is_file()


def test_one_file_has_all_parts(folder):
    parts = {PREFIX: stored("transformer"), "vae.": first(stored("vae")), "text_encoder.": text(stored("text_encoder"))}
    whole = saved(folder / "whole.safetensors", **parts)
    done("convert", whole, "made", "--tokenizer", DEMO, "--text-quant", "bf16")
    assert same_weights(folder / "made")


LAYERS = ("qkv.weight", "linear1.weight")


def in_fp8(folder: Path, weights: dict[str, mx.array], ends=LAYERS) -> tuple[Path, dict[str, mx.array]]:
    """A transformer with layers of blocks in fp8 and scales, as ComfyUI reads it, and what they stand for."""
    packed, plain, header = {}, dict(weights), {}
    for name, array in weights.items():
        packed[name] = array
        if name.endswith(ends) and "blocks" in name:
            scale = mx.abs(array).max().astype(mx.float32) / 448
            packed[name] = mx.to_fp8(array / scale)
            packed[name.replace("weight", "weight_scale")] = scale
            plain[name] = (mx.from_fp8(packed[name], mx.float32) * scale).astype(mx.bfloat16)
            header[name] = "F8_E4M3"
    return typed(saved(folder / "fp8.safetensors", **{"": packed}), header), plain


def typed(path: Path, dtypes: dict[str, str]) -> Path:
    """A file whose header names other dtypes for tensors of bytes."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    for name, dtype in dtypes.items():
        header[name]["dtype"] = dtype
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data[start:])
    return path


def test_blocks_in_fp8(folder):
    path, plain = in_fp8(folder, stored("transformer"))
    done("convert", "demo", "made", "--transformer", path, "-q", "bf16", "--text-quant", "bf16")
    made = mx.load(str(folder / "made" / "transformer" / "model.safetensors"))
    assert made.keys() == plain.keys()
    assert all(mx.array_equal(made[name], plain[name]).item() for name in made)


def test_shapes_that_weights_do_not_have_are_those_of_the_model_that_fits(folder):
    weights, name = dict(stored("transformer")), "double_blocks.0.img_attn.proj.weight"
    groups, weight = in_groups(weights[name].shape)
    packed = {key: x for key, x in weights.items() if key != name} | {f"{name}.{end}": x for end, x in groups.items()}
    path = saved(folder / "quanto.safetensors", **{"": packed})
    done("convert", "demo", "made", "--transformer", path, "-q", "bf16", "--text-quant", "bf16")
    made = mx.load(str(folder / "made" / "transformer" / "model.safetensors"))
    assert mx.array_equal(made[name], weight.astype(mx.bfloat16)).item()
    with pytest.raises(CheckpointError, match="can't be klein-9b: its geometry is that of demo"):
        assembled(path, {}, "klein-9b")


@pytest.mark.parametrize(("asked", "stored_as"), [((), "qint8"), (("-q", "bf16"), "bf16"), (("-q", "qint4"), "qint4")])
def test_fewer_bits_stay_fewer(asked, stored_as, folder, caplog):
    weights = dict(stored("transformer"))
    path, _ = in_fp8(folder, weights, (*LAYERS, "proj.weight", "0.weight", "2.weight", "linear2.weight"))
    done("convert", "demo", "made", "--transformer", path, "--text-quant", "bf16", *asked)
    assert Checkpoint.open(folder / "made").quant == stored_as
    own = f"the transformer of {DEMO} is not used; taken from {path}"
    assert caplog.messages == [own] + [f"{path} holds the transformer in few bits, which becomes qint8"] * (not asked)


def test_what_is_taken_stays_as_it_is_stored(transformer, folder):
    (folder / "models").mkdir()
    write_checkpoint(assembled(DEMO, {}), folder / "models" / "q", "bf16", "qint4")
    done("convert", transformer, "made")
    assert Checkpoint.open(folder / "made").text_quant == "qint4"


def test_a_transformer_is_never_another_model_s(converted, folder):
    vae = saved(folder / "vae.safetensors", **{"": first(stored("vae"))})
    message = refusal("convert", vae, "made", "--variant", "demo")
    assert message.startswith(
        f"{vae} holds only the VAE of a demo; say where its transformer, text encoder and tokenizer"
    )


def test_a_file_is_converted_once_whatever_else_is(transformer, converted, folder):
    options = ("--text-quant", "bf16", "--seed", "1", "--force", "-o", "a.png")
    arguments = ("t2i", PROMPT, *SMALL, "-m", transformer, *options)
    done(*arguments)
    before = sorted(path.name for path in (folder / "models").glob("*-*"))
    shutil.copytree(DEMO, folder / "models" / "aaa-bf16")
    done(*arguments)
    assert sorted(path.name for path in (folder / "models").glob("*-*")) == sorted([*before, "aaa-bf16"])


def test_all_files_of_a_set_are_read(folder):
    weights = stored("transformer")
    names = sorted(weights)
    for number, part in enumerate((names[::2], names[1::2]), 1):
        saved(folder / f"model-0000{number}-of-00002.safetensors", **{"": {name: weights[name] for name in part}})
    done("convert", "demo", "made", "--transformer", "model-00002-of-00002.safetensors", "--text-quant", "bf16")
    assert same_weights(folder / "made")
    (folder / "model-00001-of-00002.safetensors").unlink()
    message = refusal("convert", "demo", "other", "--transformer", "model-00002-of-00002.safetensors")
    assert "there is no model-00001-of-00002.safetensors" in message


@pytest.mark.parametrize("has_index", [True, False])
def test_a_set_in_a_folder_of_its_own(has_index, converted, folder):
    halves = {f"my-ft-0000{n}-of-00002.safetensors": names for n, names in enumerate(halved(stored("transformer")), 1)}
    for name, tensors in halves.items():
        saved(folder / "set" / name, **{PREFIX: tensors})
    index = folder / "set" / "my-ft.safetensors.index.json"
    if has_index:
        listed = {PREFIX + tensor: name for name, tensors in halves.items() for tensor in tensors}
        index.write_text(json.dumps({"weight_map": listed}))
    for number, place in enumerate([index.parent, index][: 1 + has_index]):
        assert assembled(DEMO, {"transformer": place}).parts["transformer"].files == [index.parent / x for x in halves]
        done("convert", place, f"made{number}", "--quiet")
        assert same_weights(folder / f"made{number}")
        assert done("info", place).stdout.startswith(f"{place}: transformer of FLUX.2 demo\n")
    (index.parent / "my-ft-00001-of-00002.safetensors").unlink()
    assert "there is no my-ft-00001-of-00002.safetensors; fetch" in refusal("convert", index.parent, "other")
    saved(index.parent / "other.safetensors", **{PREFIX: stored("transformer")})
    assert "several files of weights" in refusal("convert", "demo", "other", "--transformer", index.parent)


def test_mlx_weights_with_their_config(folder):
    weights, packed = stored("transformer"), {}
    for name, array in weights.items():
        packed[name] = array
        if name.endswith("linear1.weight"):
            parts = dict(zip(("weight", "scales", "biases"), mx.quantize(array, group_size=64, bits=4), strict=True))
            packed |= {name.replace("weight", part): x for part, x in parts.items()}
    path = saved(folder / "mlx" / "model.safetensors", **{"": packed})
    (path.parent / "config.json").write_text('{"quantization": {"group_size": 64, "bits": 4}}')
    done("convert", "demo", "made", "--transformer", path, "-q", "bf16", "--text-quant", "bf16")
    assert not same_weights(folder / "made")
    made = mx.load(str(folder / "made" / "transformer" / "model.safetensors"))
    name = next(name for name in weights if name.endswith("linear1.weight"))
    parts = [packed[name.replace("weight", part)] for part in ("weight", "scales", "biases")]
    expected = mx.dequantize(
        *[x if x.dtype == mx.uint32 else x.astype(mx.float32) for x in parts], group_size=64, bits=4
    )
    assert mx.array_equal(made[name], expected.astype(mx.bfloat16)).item()


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae"])
@pytest.mark.parametrize("inside", [False, True])
def test_a_part_of_a_converted_model_is_read_as_stored(part, inside, folder):
    option = f"--{part.replace('_', '-')}"
    place = DEMO / part if inside else DEMO
    done("convert", "demo", "made", option, place, "--text-quant", "bf16")
    assert same_weights(folder / "made")


def test_the_quantized_part_of_a_converted_model_stays_as_it_is(transformer, folder):
    write_checkpoint(assembled(DEMO, {}), folder / "q", "bf16", "qint4")
    done("convert", transformer, "made", *(f"--{x}={folder / 'q'}" for x in ("text-encoder", "vae", "tokenizer")))
    name = "text_encoder/model.safetensors"
    assert (folder / "made" / name).read_bytes() == (folder / "q" / name).read_bytes()
    assert done("info", folder / "q" / "text_encoder").stdout.startswith(f"{folder}/q/text_encoder: text encoder of F")
    assert "VAE of FLUX.2 demo" in done("info", DEMO / "vae").stdout


def test_a_part_of_a_whole_diffusers_folder_is_taken(folder):
    saved(folder / "fox" / "vae" / "diffusion_pytorch_model.safetensors", **{"": first(stored("vae"))})
    index = {"_class_name": "Flux2KleinPipeline", "is_distilled": True}
    (folder / "fox" / "model_index.json").write_text(json.dumps(index))
    done("convert", "demo", "made", "--vae", "fox", "--text-quant", "bf16")
    assert same_weights(folder / "made")
    assert refusal("convert", "demo", "other", "--text-encoder", "fox").startswith("there is no file or folder fox/te")


def test_what_a_converted_model_has_only_to_write_text_is_no_painter(folder):
    encoder = saved(folder / "te.safetensors", **{"": text(stored("text_encoder"))})
    write_checkpoint(assembled(encoder, {"tokenizer": DEMO}, text_only=True), folder / "writer", "bf16", "bf16")
    assert refusal("convert", "demo", "made", "--vae", "writer") == "writer has no VAE; give another model's"


def test_one_missing_part_is_asked_for(transformer):
    encoder = saved(transformer.with_name("te.safetensors"), **{"": text(stored("text_encoder"))})
    message = refusal("convert", encoder, "made", "--vae", DEMO, "--transformer", DEMO)
    assert message == f"{encoder} holds only the text encoder of a demo; say where its tokenizer is"


def test_a_file_of_weights_has_the_name_of_one(transformer, folder):
    transformer.rename("noext")
    message = refusal("convert", "demo", "made", "--transformer", "noext")
    assert message == "noext is named neither .safetensors nor .gguf; give such a file, or rename it"


def test_the_wrong_part_is_told(transformer, folder):
    vae = saved(folder / "vae.safetensors", **{"": first(stored("vae"))})
    message = refusal("convert", "demo", "made", "--transformer", vae)
    assert message == f"{vae} holds the VAE of a model, not its transformer"


@pytest.mark.parametrize("name", ["img_in.weight", "double_blocks.0.img_attn.qkv.weight", "final_layer.linear.weight"])
def test_a_tensor_that_is_missing_is_named(name, folder):
    left = {key: array for key, array in stored("transformer").items() if key != name}
    path = saved(folder / "less.safetensors", **{"": left})
    assert name in refusal("convert", "demo", "made", "--transformer", path)


def test_a_text_encoder_in_other_bits_is_not_taken(transformer, folder):
    (folder / "models").mkdir()
    quantized = folder / "models" / "q"
    write_checkpoint(assembled(DEMO, {}), quantized, "bf16", "qint4")
    message = refusal("convert", transformer, "made", "--text-quant", "qint8")
    assert message.startswith(f"{quantized / 'text_encoder'} is stored in 4 bits, which gain nothing as 8")


def test_damage_to_what_is_taken_is_seen(transformer, folder):
    (folder / "models").mkdir()
    done("convert", "demo", "models/mine", "--transformer", transformer, "--text-quant", "bf16")
    path = folder / "models" / "mine" / "text_encoder" / "model.safetensors"
    data, status = bytearray(path.read_bytes()), path.stat()
    data[-3] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert "is damaged, convert the model again" in refusal("convert", transformer, "made", "--text-quant", "bf16")


@pytest.mark.parametrize("given", [{"transformer": Path("none.safetensors")}, {"tokenizer": Path("none")}])
def test_what_is_not_there(given):
    with pytest.raises((CheckpointError, InputError), match="none"):
        assembled(DEMO, given)


def test_what_is_given_in_place_of_all_that_a_file_has_is_told(folder):
    own, other = (saved(folder / f"{x}.safetensors", **{"": text(stored("text_encoder"))}) for x in "ab")
    parts = {"transformer": DEMO, "vae": DEMO, "tokenizer": DEMO}
    note = f"the text encoder of {own} is not used; taken from {other}"
    assert assembled(own, {**parts, "text_encoder": other}).notes == (note,)
    assert assembled(own, {**parts, "text_encoder": own}).notes == ()
