"""What the converter refuses: a one-line error, and nothing is left beside the target."""

import errno
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest
from helpers.checkpoints import VARIANT, WEIGHTS, convert, edit_weights, read_tensors
from helpers.damage import Damage, edit, fill, remove, resize, weights

from flux2_mlx.checkpoint import Checkpoint
from flux2_mlx.errors import CheckpointError, Flux2Error, InputError
from flux2_mlx.store import converted_folders, find_checkpoint

TRANSFORMER, VAE = WEIGHTS["transformer"], WEIGHTS["vae"]
CONFIGS = {name: f"{name}/config.json" for name in WEIGHTS}
TOKENIZER, SCHEDULER = "tokenizer/tokenizer.json", "scheduler/scheduler_config.json"


@pytest.fixture
def source(official: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(official, tmp_path / "model"))


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "models").mkdir()
    return tmp_path / "models" / "converted"


def contents(folder: Path) -> dict[str, bytes | None]:
    """Everything under a folder, hidden or not; None stands for a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def assert_refused(source: Path, target: Path, match: str, kind: type[Flux2Error] = CheckpointError, **options) -> None:
    """The conversion gives a one-line error and leaves no trace beside the target."""
    before = contents(target.parent) if target.parent.exists() else None
    with pytest.raises(kind, match=match) as caught:
        convert(source, target, **options)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    assert before == (contents(target.parent) if target.parent.exists() else None)


def poison(name: str, key: str, value: float, dtype: mx.Dtype = mx.bfloat16) -> Damage:
    def change(tensors: dict[str, mx.array]) -> None:
        flat = tensors[key].astype(dtype).flatten()
        flat[-1] = value
        tensors[key] = flat.reshape(tensors[key].shape)

    return weights(name, change)


def exchange_offsets(folder: Path) -> None:
    """Let two tensors of different sizes name each other's bytes."""
    data = (folder / VAE).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    a, b = header["bn.num_batches_tracked"], header["bn.running_mean"]
    a["data_offsets"], b["data_offsets"] = b["data_offsets"], a["data_offsets"]
    encoded = json.dumps(header).encode()
    (folder / VAE).write_bytes(struct.pack("<Q", len(encoded)) + encoded + data[8 + length :])


def shard_index(*shards: object) -> Damage:
    text = json.dumps({"weight_map": {str(number): shard for number, shard in enumerate(shards)}})
    return fill("text_encoder/model.safetensors.index.json", text.encode())


def only_pickles(folder: Path) -> None:
    (folder / TRANSFORMER).rename((folder / TRANSFORMER).with_suffix(".bin"))


def repeat_in_second_shard(folder: Path) -> None:
    shutil.copy(folder / WEIGHTS["text_encoder"], folder / "text_encoder/b.safetensors")
    shard_index("model.safetensors", "b.safetensors")(folder)


NOT_SAFETENSORS = "is not a safetensors file"
DAMAGES: dict[str, tuple[Damage, str]] = {
    "no folder": (remove("."), "there is no file or folder"),
    "model_index garbage": (fill("model_index.json", b"\xff\x00"), "model_index.json is not JSON"),
    "model_index list": (fill("model_index.json", b"[]"), "holds no JSON object"),
    "FLUX.1": (edit("model_index.json", _class_name="FluxPipeline"), "holds 'FluxPipeline', not FLUX.2"),
    "a name of two lines": (edit("model_index.json", _class_name="a\nb"), r"holds 'a\\nb', not FLUX.2"),
    "dev, by its guidance": (
        edit(CONFIGS["transformer"], guidance_embeds=True),
        "is not a klein-4b transformer: missing time_guidance_embed",
    ),
    "dev, by its text encoder": (
        edit(CONFIGS["text_encoder"], model_type="mistral3"),
        "text_encoder/config.json: model_type is 'mistral3', klein-4b reads prompts with 'qwen3'",
    ),
    "FLUX.1 transformer": (
        edit(CONFIGS["transformer"], _class_name="FluxTransformer2DModel"),
        "FLUX.2 has 'Flux2Transformer2DModel'",
    ),
    "no transformer": (remove("transformer"), "is incomplete: there is no transformer/config.json; fetch it"),
    "no VAE": (remove("vae"), "is incomplete: there is no vae/config.json; fetch it"),
    "no text encoder": (remove("text_encoder"), "is incomplete: there is no text_encoder/config.json; fetch"),
    "no weights": (remove(TRANSFORMER), "is incomplete: there is no diffusion_pytorch_model.safetensors"),
    "no tokenizer": (remove(TOKENIZER), "there is no tokenizer/tokenizer.json"),
    "tokenizer garbage": (fill(TOKENIZER, b"{}"), "is not a tokenizer file"),
    "no scheduler": (remove("scheduler"), "incomplete: there is no scheduler/scheduler_config.json; fetch"),
    "other scheduler": (edit(SCHEDULER, time_shift_type="linear"), "time_shift_type is 'linear'"),
    "config nonsense": (edit(CONFIGS["transformer"], num_layers="two"), "config.json describes no transformer"),
    "config zero": (edit(CONFIGS["text_encoder"], num_key_value_heads=0), "config.json describes no text_encoder"),
    "config without a size": (
        edit(CONFIGS["text_encoder"], hidden_size=None),
        "takes 192 text features, the encoder gives 12288",
    ),
    "config deep": (fill(CONFIGS["vae"], b"[" * 100_000), "is not JSON"),
    "too few layers": (edit(CONFIGS["text_encoder"], num_hidden_layers=26), "26 layers, but the states of layers"),
    "parts that do not fit": (edit(CONFIGS["text_encoder"], hidden_size=128), "takes 192 text features"),
    "missing shard": (shard_index("a.safetensors", "model.safetensors"), "there is no a.safetensors"),
    "index without shards": (shard_index(), "is incomplete: there is no weight file"),
    "index nonsense": (shard_index(7), "has no weight_map"),
    "index of a list": (
        fill("vae/diffusion_pytorch_model.safetensors.index.json", b'{"weight_map": ["a"]}'),
        "has no weight_map",
    ),
    "repeated tensors": (repeat_in_second_shard, "repeats tensors of another file"),
    "one byte missing": (resize(VAE, -1), "bytes where its header says"),
    "most missing": (lambda folder: os.truncate(folder / TRANSFORMER, 100), NOT_SAFETENSORS),
    "one byte too long": (resize(VAE, 1), "bytes where its header says"),
    "empty file": (fill(VAE, b""), NOT_SAFETENSORS),
    "garbage": (fill(VAE, bytes(range(256)) * 20), NOT_SAFETENSORS),
    "zeros": (fill(VAE, bytes(100)), NOT_SAFETENSORS),
    "wrong offsets": (exchange_offsets, NOT_SAFETENSORS),
    "pickles": (only_pickles, "holds pickles, which could run code"),
    "wrong shape": (
        weights(TRANSFORMER, lambda x: x.update({"proj_out.weight": mx.zeros((16, 63))})),
        r"proj_out.weight is F32 \[16, 63\] instead of F32 \[16, 64\]",
    ),
    "channels last": (
        weights(VAE, lambda x: x.update({"post_quant_conv.weight": mx.zeros((4, 1, 1, 4))})),
        r"post_quant_conv.weight is F32 \[4, 1, 1, 4\] instead of F32 \[4, 4, 1, 1\]",
    ),
    "integers": (
        weights(TRANSFORMER, lambda x: x.update({"proj_out.weight": mx.zeros((16, 64), mx.int8)})),
        "transformer holds weights that are stored as I8",
    ),
    "extra key": (
        weights(TRANSFORMER, lambda x: x.update({"pos_embed.weight": mx.zeros((1,))})),
        "unexpected pos_embed.weight",
    ),
    "missing key": (
        weights(TRANSFORMER, lambda x: x.pop("transformer_blocks.1.attn.add_k_proj.weight")),
        "is not a klein-4b transformer: missing transformer_blocks.1.attn.add_k_proj.weight",
    ),
    "several": (
        weights(VAE, lambda x: (x.pop("quant_conv.bias"), x.update({"quant_conv.b": mx.zeros((8,))}))),
        "missing quant_conv.bias; unexpected quant_conv.b$",
    ),
    "NaN": (poison(TRANSFORMER, "proj_out.weight", mx.nan), "transformer: proj_out.weight is not finite"),
    "NaN in one of three": (
        poison(TRANSFORMER, "transformer_blocks.0.attn.to_k.weight", mx.nan),
        r"transformer: transformer_blocks\.0\.attn\.to_k\.weight is not finite",
    ),
    "NaN in the last file": (poison(VAE, "post_quant_conv.weight", mx.nan), "post_quant_conv.weight is not finite"),
    "infinity": (poison(WEIGHTS["text_encoder"], "model.embed_tokens.weight", mx.inf), "is not finite"),
    "infinity in bfloat16": (
        poison(VAE, "quant_conv.bias", 3.4e38, mx.float32),
        "bias is not finite: .*; fetch it a",
    ),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_sources_are_refused(case, source, target):
    damage, match = DAMAGES[case]
    damage(source)
    assert_refused(source, target, match)


@pytest.mark.parametrize("name", ["model.ckpt", "model.bin", "model.pt"])
def test_a_pickle_is_refused(name, tmp_path, target):
    (tmp_path / name).write_bytes(b"\x80\x04K\x01.")
    assert_refused(tmp_path / name, target, "is a pickle, which could run code")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"quant": "int8"}, "unknown quantization 'int8'; choose one of bf16, qint8, qint6, mixed4, qint4"),
        ({"text_quant": "fp8"}, "unknown quantization 'fp8'"),
        ({"variant": "klein-5b"}, "unknown model 'klein-5b'; choose one of .*klein-4b"),
    ],
    ids=["quant", "text_quant", "variant"],
)
def test_unknown_settings_are_refused(options, match, official, target):
    assert_refused(official, target, match, InputError, **options)


def test_an_existing_target_is_replaced_only_with_force(official, source, target):
    convert(official, target)
    edit_weights(source / TRANSFORMER, lambda x: x.update({"proj_out.weight": mx.zeros_like(x["proj_out.weight"])}))
    assert_refused(source, target, "exists; choose another folder or pass force=True", InputError)
    convert(source, target, force=True)
    assert not read_tensors(target / "transformer/model.safetensors")["final_layer.linear.weight"].any()
    assert [path.name for path in target.parent.iterdir()] == ["converted"]


def test_force_replaces_nothing_but_checkpoints(official, target):
    target.write_text("a letter")
    assert_refused(official, target, "not an MLX checkpoint, so force=True does not", InputError, force=True)
    target.unlink()
    target.mkdir()
    (target / "letter.txt").write_text("a letter")
    assert_refused(official, target, "not an MLX checkpoint, so force=True does not", InputError, force=True)
    assert_refused(official, target, "exists; choose another folder", InputError)


@pytest.mark.parametrize("manifest", ["not even json", "{}", "[]", '{"version": 1}'])
def test_a_folder_with_a_file_of_the_manifest_s_name_is_no_checkpoint(manifest, official, target):
    target.mkdir()
    (target / "flux2.json").write_text(manifest)
    (target / "thesis.txt").write_text("mine")
    assert_refused(official, target, "not an MLX checkpoint, so force=True does not", InputError, force=True)


@pytest.mark.parametrize("name", ["thesis.txt", "images/a.png", "transformer/notes.md", "vae/model/a.safetensors"])
def test_what_someone_keeps_in_a_checkpoint_is_not_replaced_with_it(name, official, target):
    convert(official, target)
    (target / name).parent.mkdir(exist_ok=True)
    (target / name).write_text("mine")
    assert_refused(
        official, target, f"also holds {name.split('/a')[0]}.*, which force=True would remove", InputError, force=True
    )


def test_a_source_inside_the_target_is_kept(official, target):
    convert(official, target)
    shutil.copytree(official, target / "source")
    assert_refused(target / "source", target, "also holds source, which force=True would", InputError, force=True)


def test_a_failed_conversion_keeps_the_old_checkpoint(official, source, target):
    convert(official, target)
    poison(VAE, "bn.running_mean", mx.nan)(source)
    assert_refused(source, target, "is not finite", force=True)


def test_a_disk_that_is_too_small(official, target, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1_500_000))
    assert_refused(
        official, target, r"no space: the model takes 0\.003\d* GB, .*models has 0\.0015 GB free", InputError
    )
    convert(official, target, "qint4", "qint4")


def test_a_disk_that_fills_up(official, target, monkeypatch):
    synced = []

    def fsync(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    assert_refused(official, target, "can't write .*converted: No space left on device", InputError)
    assert len(synced) == 2


def test_a_target_in_no_folder(official, target):
    assert_refused(official, target.parent / "none" / "x", "there is no folder .*none", InputError)
    assert_refused(official, official / "model_index.json" / "x", "there is no folder", InputError)


def test_a_folder_without_permission(official, target, monkeypatch):
    def fail(path, *_):  # the permission bits stop nobody who runs the tests as root
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("flux2_mlx.staging._create_locked", fail)
    assert_refused(official, target, "can't write .*converted: Permission denied", InputError)


@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_an_interrupted_conversion_leaves_nothing(share, official, target):
    def interrupt(done: int, total: int) -> None:
        if done >= share * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(official, target, progress=interrupt)
    assert contents(target.parent) == {}


KILLED = """
import sys, time
from pathlib import Path
from flux2_mlx.convert import Source, write_checkpoint

def wait(done, total):
    if done > total / 2:
        print("half", flush=True)
        time.sleep(60)

source, variant, target = sys.argv[1:]
write_checkpoint(Source.open(Path(source), variant), Path(target), "bf16", "bf16", progress=wait)
"""


def test_a_killed_conversion_leaves_no_target(official, target):
    command = [sys.executable, "-c", KILLED, str(official), VARIANT, str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "half\n"
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not target.exists()
    Checkpoint.open(convert(official, target))


def test_what_a_conversion_to_another_name_left_is_removed_and_nothing_else(official, target):
    yours = [target.parent / name for name in (f".{target.name}.backup", f".{target.name}.x", ".flux2-mlx-convert-me")]
    for folder in yours:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"mine")
        for path in (folder / "model.safetensors", folder):
            os.utime(path, (0, 0))
    command = [sys.executable, "-c", KILLED, str(official), VARIANT, str(target.with_name("other"))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "half\n"
        convert(official, target)
        (live,) = set(target.parent.glob(".flux2-mlx-convert-*")) - set(yours)  # while it lives it is let be
        process.kill()
    assert list(live.rglob("*.safetensors"))
    convert(official, target, force=True)
    assert set(target.parent.iterdir()) == {target, *yours}
    assert all((folder / "model.safetensors").read_bytes() == b"mine" for folder in yours)


def half_replaced(target: Path) -> None:
    """Leave `target` as a conversion with --force does that is killed between its two renames."""
    work = target.with_name(".flux2-mlx-convert-x")
    (work / "new").mkdir(parents=True)
    mark = {"made_by": "flux2-mlx convert", "target": target.name}
    (work / "flux2-mlx-convert.json").write_text(json.dumps(mark))
    target.rename(work / "old")


@pytest.mark.parametrize("start", ["open", "find", "list", "convert", "force"])
def test_an_old_checkpoint_that_was_moved_aside_comes_back(start, official, target, monkeypatch):
    monkeypatch.setenv("FLUX2_MLX_HOME", str(target.parent))
    convert(official, target, name=VARIANT)
    before = contents(target)
    half_replaced(target)
    if start == "convert":
        with pytest.raises(InputError, match="exists; choose another folder or pass force=True"):
            convert(official, target)
    elif start == "force":
        with pytest.raises(InputError, match="unknown quantization"):
            convert(official, target, "q3", force=True)
        poison(VAE, "bn.running_mean", mx.nan)(Path(shutil.copytree(official, target.with_name("source"))))
        with pytest.raises(CheckpointError, match="is not finite"):
            convert(target.with_name("source"), target, force=True)
        assert not list(target.parent.glob(".*"))
    else:
        starts = {
            "open": lambda: Checkpoint.open(target),
            "find": lambda: find_checkpoint(str(target)),
            "list": lambda: converted_folders()[VARIANT] == [target] or pytest.fail("not on the list"),
        }
        starts[start]()
    assert contents(target) == before


def test_a_link_is_followed_and_stays(official, target):
    (target.parent / "disk").mkdir()
    target.symlink_to("disk/model")
    convert(official, target)
    convert(official, target, "qint4", force=True)
    assert target.is_symlink()
    assert Checkpoint.open(target.parent / "disk/model").quant == "qint4"
    assert [path.name for path in (target.parent / "disk").iterdir()] == ["model"]


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_that_appears_meanwhile_is_not_replaced(force, official, target):
    def appear(done: int, total: int) -> None:
        if done == total:
            target.mkdir()
            (target / "letter.txt").write_text("precious")

    with pytest.raises(InputError, match="is not an MLX checkpoint" if force else "exists; choose another"):
        convert(official, target, force=force, progress=appear)
    assert contents(target.parent) == {target.name: None, f"{target.name}/letter.txt": b"precious"}
