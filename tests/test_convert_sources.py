"""Folders that people have: which of them are read, and what is said of those that are not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from flux2_mlx.convert import Source, assembled, is_loose, loose_files, write_checkpoint
from helpers.checkpoints import SHALLOW_TEXT, WEIGHTS, edit_json, edit_weights, read_tensors, save_dev, save_tensors
from helpers.stored import in_groups

from flux2_mlx.checkpoint import Checkpoint
from flux2_mlx.errors import CheckpointError
from flux2_mlx.store import find_checkpoint

TRANSFORMER, TEXT, VAE = WEIGHTS.values()
LINEAR = "transformer_blocks.0.attn.to_q.weight"
UNQUANTIZED = "give the model that it was made from, which becomes qint8 or qint4 here"
Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def official(small_model):
    return small_model(text=SHALLOW_TEXT)


def fingerprinted(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("model*.safetensors")}


def convert_folder(source: Path, target: Path) -> Path:
    write_checkpoint(Source.open(source, "demo"), target, "bf16", "bf16")
    Checkpoint.open(target)
    return target


def convert(source: Path, target: Path) -> dict[str, bytes]:
    """The weights of what `source` is converted to."""
    return fingerprinted(convert_folder(source, target))


def renamed(variant: str) -> Change:
    """As `save_pretrained(variant=…)` names a file."""

    def change(folder: Path) -> None:
        for path in WEIGHTS.values():
            file = folder / path
            file.rename(file.with_name(f"{file.stem}.{variant}.safetensors"))

    return change


def sharded(name: str, index: str | None = None) -> Change:
    """In three files whose `name` has the place of their numbers, with an index of the name `index` or none."""

    def change(folder: Path) -> None:
        for path in WEIGHTS.values():
            file = folder / path
            tensors, shards = read_tensors(file), {}
            file.unlink()
            for number in range(3):
                part = {key: tensors[key] for key in sorted(tensors)[number::3]}
                shard = name.format(stem=file.stem, numbers=f"{number + 1:05}-of-00003")
                save_tensors(file.with_name(shard), part)
                shards |= dict.fromkeys(part, shard)
            if index:
                file.with_name(index.format(stem=file.stem)).write_text(json.dumps({"weight_map": shards}))

    return change


def headless(folder: Path) -> None:
    """As a decoder alone is saved."""

    def strip(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    edit_weights(folder / TEXT, strip)


def with_sidecars(folder: Path) -> None:
    for path in (TRANSFORMER, TEXT, VAE):
        file = folder / path
        file.with_name(f"._{file.name}").write_bytes(b"\0\5\26\7")
        file.with_name(f"._{file.stem}-00001-of-00003.safetensors").write_bytes(b"\0\5\26\7")


READ: dict[str, Change] = {
    "fp16 names": renamed("fp16"),
    "bf16 names": renamed("bf16"),
    "numbered": sharded("{stem}-{numbers}.safetensors"),
    "numbered fp16": sharded("{stem}.fp16-{numbers}.safetensors"),
    "numbered fp16 as of old": sharded("{stem}-{numbers}.fp16.safetensors"),
    "indexed": sharded("{stem}-{numbers}.safetensors", "{stem}.safetensors.index.json"),
    "indexed bf16": sharded("{stem}.bf16-{numbers}.safetensors", "{stem}.safetensors.index.bf16.json"),
    "no head": headless,
    "sidecars": with_sidecars,
}


@pytest.mark.parametrize("case", READ)
def test_a_folder_that_is_read_gives_the_same_weights(case, official, source, tmp_path):
    READ[case](source)
    assert convert(source, tmp_path / "changed") == convert(official, tmp_path / "plain")


def test_the_naming_of_the_original_release_in_a_folder(official, source, tmp_path):
    release = mx.load(str(convert_folder(source, tmp_path / "release") / "transformer/model.safetensors"))
    save_tensors(source / TRANSFORMER, release)
    assert convert(source, tmp_path / "changed") == convert(official, tmp_path / "plain")


def test_shapes_that_weights_do_not_have_are_those_of_the_config(official, source, tmp_path):
    stored, weight = in_groups((64, 64))
    plain = Path(shutil.copytree(official, tmp_path / "model in 16 bits"))
    edit_weights(plain / TRANSFORMER, lambda x: x.update({LINEAR: weight}))
    packed = {f"{LINEAR}.{end}": x for end, x in stored.items()}
    edit_weights(source / TRANSFORMER, lambda x: (x.pop(LINEAR), x.update(packed)))
    assert convert(source, tmp_path / "packed") == convert(plain, tmp_path / "plain")
    edit_json(source / "transformer/config.json", num_attention_heads=3)
    with pytest.raises(CheckpointError, match="groups of 32 values, which"):
        Source.open(source, "demo")


def test_what_is_wrong_with_packed_weights_is_said_with_their_file(source, tmp_path):
    stored, _ = in_groups((64, 64))
    packed = {f"{LINEAR}.{end}": x for end, x in stored.items()} | {f"{LINEAR}._scale": mx.full((128, 1), mx.nan)}
    edit_weights(source / TRANSFORMER, lambda x: (x.pop(LINEAR), x.update(packed)))
    with pytest.raises(CheckpointError) as caught:
        convert(source, tmp_path / "packed")
    assert str(caught.value).startswith(f"{source / 'transformer'}: {LINEAR}._scale has values that are not finite")


def test_full_precision_comes_before_half(source):
    shutil.copy(source / TRANSFORMER, source / "transformer/diffusion_pytorch_model.fp16.safetensors")
    assert Source.open(source, "demo").files["transformer"] == [source / TRANSFORMER]


def tensors(path: str, added: Callable[[dict], object]) -> Change:
    return lambda folder: edit_weights(folder / path, added)


def config(part: str, **changes: object) -> Change:
    return lambda folder: edit_json(folder / part, **changes)


def quantized(part: str, how: str) -> str:
    return f"{{folder}}/{part} holds weights that are {how}, which are not read; {UNQUANTIZED}"


def pointer(folder: Path) -> None:
    (folder / TRANSFORMER).write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'ab' * 32}\nsize 9\n")


def gguf(folder: Path) -> None:
    (folder / TRANSFORMER).rename(folder / "transformer/flux-Q4_K_M.gguf")


def gap(folder: Path) -> None:
    READ["numbered"](folder)
    (folder / "transformer/diffusion_pytorch_model-00002-of-00003.safetensors").unlink()


MXFP4 = {"group_size": 32, "bits": 4, "mode": "mxfp4"}
FP8 = {LINEAR.replace("weight", "weight_scale"): mx.ones((1,))}
REFUSED: dict[str, tuple[Change, str]] = {
    "a scale of fp8": (
        tensors(TRANSFORMER, lambda x: x.update(FP8)),
        f"{LINEAR} is BF16 [64, 64], and its file has {next(iter(FP8))}; fetch or make the file again",
    ),
    "int8": (
        tensors(TEXT, lambda x: x.update({"model.layers.0.mlp.up_proj.weight": mx.ones((4, 4), mx.int8)})),
        quantized("text_encoder", "stored as I8"),
    ),
    "half of bitsandbytes": (
        tensors(TRANSFORMER, lambda x: x.update({f"{LINEAR}.absmax": mx.ones((2,))})),
        f"{LINEAR}.absmax belongs to no weight of the file; fetch the file again",
    ),
    "half of quanto": (
        tensors(TRANSFORMER, lambda x: x.update({f"{LINEAR}._data": x.pop(LINEAR)})),
        f"{LINEAR}._data is BF16 instead of I8 or F8_E4M3 or F8_E5M2",
    ),
    "GPTQ text encoder": (
        config("text_encoder/config.json", compression_config={"quant_method": "gptq"}),
        "{folder}/text_encoder is quantized as GPTQ or AWQ, which can't be read; fetch a bf16, fp8 or GGUF file of the "
        "model",
    ),
    "no method": (
        config("vae/config.json", quantization_config={"bits": 4}),
        quantized("vae", "quantized by an unknown method"),
    ),
    "MLX by its config": (
        config("text_encoder/config.json", quantization=MXFP4),
        "model.safetensors: its config.json says quantization, and no weight is packed; give a complete copy",
    ),
    "mlx-lm": (
        config("text_encoder/config.json", quantization=MXFP4, quantization_config=MXFP4),
        "model.safetensors: its config.json says quantization, and no weight is packed; give a complete copy",
    ),
    "GGUF": (
        gguf,
        "{folder}/transformer has no .safetensors files; give one of its GGUF files instead of the folder",
    ),
    "no index and no config": (
        lambda folder: [(folder / name).unlink() for name in ("model_index.json", "vae/config.json")],
        "it has no model_index.json; copy that of the model that it was made from into it",
    ),
    "a transformer of no index that is another's": (
        lambda folder: [
            (folder / "model_index.json").unlink(),
            edit_json(folder / "transformer" / "config.json", _class_name="FluxTransformer2DModel"),
        ],
        "{folder}/transformer/config.json: transformer is 'FluxTransformer2DModel', FLUX.2 has "
        "'Flux2Transformer2DModel', and nothing else is implemented",
    ),
    "Git LFS pointer": (pointer, "it is a Git LFS pointer; fetch the file itself with `git lfs pull`"),
    "a gap": (
        gap,
        "transformer is incomplete: there is no diffusion_pytorch_model-00002-of-00003.safetensors; fetch it again, or "
        "give a complete copy",
    ),
    "no VAE": (
        lambda folder: shutil.rmtree(folder / "vae"),
        "{folder} is incomplete: there is no vae/config.json; fetch it again, or give a complete copy",
    ),
    "no scheduler": (
        lambda folder: shutil.rmtree(folder / "scheduler"),
        "{folder} is incomplete: there is no scheduler/scheduler_config.json; fetch it again, or give a complete copy",
    ),
    "no tokenizer.json": (
        lambda folder: (folder / "tokenizer/tokenizer.json").unlink(),
        "{folder} is incomplete: there is no tokenizer/tokenizer.json; add that of the model that it was made from, in "
        "a local copy of a repo",
    ),
    "FLUX.1": (
        config("model_index.json", _class_name="FluxPipeline"),
        "{folder} holds 'FluxPipeline', not FLUX.2; give a model of that family",
    ),
}


@pytest.mark.parametrize("variant", ["demo", None])
@pytest.mark.parametrize("case", REFUSED)
def test_a_folder_that_is_not_read_says_why_and_what_to_do(case, variant, source):
    """Before it asks for a variant, with which it would not be read either."""
    change, message = REFUSED[case]
    change(source)
    with pytest.raises(CheckpointError) as caught:
        Source.open(source, variant)
    assert str(caught.value).endswith(message.format(folder=source))


@pytest.mark.parametrize("form", ["../../outside/x.safetensors", "{outside}", "./x.safetensors", "sub/x.safetensors"])
def test_an_index_does_not_lead_out_of_its_folder(form, source, tmp_path):
    outside = tmp_path / "outside/x.safetensors"
    for path in (outside, source / "transformer/x.safetensors", source / "transformer/sub/x.safetensors"):
        path.parent.mkdir(exist_ok=True)
        shutil.copy(source / TRANSFORMER, path)
    (source / TRANSFORMER).unlink()
    index = source / "transformer/diffusion_pytorch_model.safetensors.index.json"
    name = form.format(outside=outside)
    index.write_text(json.dumps({"weight_map": {LINEAR: name}}))
    with pytest.raises(CheckpointError, match=f"{index} names '.*', which is no file of its folder$"):
        Source.open(source, "demo")
    index.write_text(json.dumps({"weight_map": {LINEAR: "x.safetensors"}}))
    Source.open(source, "demo")


def test_where_the_model_may_be_that_is_not_here(source):
    for given, place in (
        (source / "transformer", f"it is a part of {source}, give that"),
        (source.parent, f"give {source}"),
    ):
        with pytest.raises(CheckpointError) as caught:
            Source.open(given, "demo")
        assert str(caught.value).endswith(f" it has no model_index.json; {place}")


def test_a_folder_of_several_files_of_weights(tmp_path):
    for name in ("b.gguf", "a.safetensors"):
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=r"and holds several files of weights: a\.safetensors, b\.gguf"):
        find_checkpoint(tmp_path)


def test_a_model_without_an_index(source):
    """Nothing but that and the schedule is lacking, and the variant is asked for where no name tells it."""
    expected = Source.open(source, "demo")
    (source / "model_index.json").unlink()
    shutil.rmtree(source / "scheduler")
    found = Source.open(source, "demo")
    assert (found.variant, found.configs, found.files) == (expected.variant, expected.configs, expected.files)
    assert json.loads(found.schedule.read_bytes())["shift"] == 3.0
    assert assembled(source, {}, "demo").files == expected.files
    assert not is_loose(source)
    with pytest.raises(CheckpointError, match=f"^can't tell which model {source} is; name it with variant=NAME"):
        Source.open(source)


@pytest.mark.parametrize("distilled", [None, False, True])
def test_the_class_of_dev_settles_that_it_is_dev(distilled, tmp_path):
    save_dev(tmp_path)  # its geometry is that of no variant
    edit_json(tmp_path / "model_index.json", is_distilled=distilled)
    assert Source.open(tmp_path).variant.name == "dev"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("flux.ckpt", "a pickle, which could run code"),
        ("flux.sft", "named neither .safetensors nor .gguf"),
    ],
)
def test_a_single_file(name, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(b"GGUF")
    with pytest.raises(CheckpointError) as caught:
        find_checkpoint(name)
    way_out = "give a .safetensors or .gguf file, a folder in the diffusers layout or a repo id"
    assert str(caught.value) == f"{name} is {kind}; {way_out}"


def test_a_file_of_weights_that_is_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("flux.safetensors").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"^flux\.safetensors is not a safetensors file: "):
        find_checkpoint("flux.safetensors")


def test_what_compiling_puts_inside_of_names(official, tmp_path):
    source = Path(shutil.copytree(official, tmp_path / "source"))

    def compile(tensors: dict[str, mx.array]) -> None:
        for name in [name for name in tensors if "blocks.0." in name]:
            tensors[name.replace("blocks.0.", "blocks.0._orig_mod.")] = tensors.pop(name)

    edit_weights(source / TRANSFORMER, compile)
    assert convert(source, tmp_path / "made") == convert(official, tmp_path / "plain")
    edit_weights(source / TRANSFORMER, lambda x: x.update({LINEAR: x[LINEAR.replace("0.", "0._orig_mod.", 1)]}))
    with pytest.raises(CheckpointError, match=f"{TRANSFORMER} has two tensors of one name"):
        Source.open(source, "demo")


def test_which_of_two_sets_in_a_folder_is_asked(tmp_path):
    whole, *halves = names = [f"model-0000{n}-of-0000{count}.safetensors" for n, count in ((1, 1), (1, 2), (2, 2))]
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=f"several sets of weights, {whole} and {halves[0]}; give one of these"):
        loose_files(tmp_path)
    assert loose_files(tmp_path / whole) == [tmp_path / whole]
    assert loose_files(tmp_path / halves[1]) == [tmp_path / name for name in halves]
    (tmp_path / whole).unlink()
    assert loose_files(tmp_path) == [tmp_path / name for name in halves]
