"""Sources that change while they are converted: nothing is made of two models."""

from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np
import pytest
from flux2_mlx.convert.formats.gguf import Gguf
from helpers.checkpoints import VARIANT, WEIGHTS, convert, save_small

from flux2_mlx.copying import Copied, new_buffers
from flux2_mlx.errors import CheckpointError
from flux2_mlx.store import convert_model
from flux2_mlx.weights import Files


def changed(path: Path) -> Path:
    """Another file of the same names, shapes and size beside a file of weights; its values are others."""
    other, data = path.with_name("other.safetensors"), bytearray(path.read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    other.write_bytes(data)
    return other


@pytest.mark.parametrize("quant", ["bf16", "qint8"])
@pytest.mark.parametrize("part", ["transformer", "vae"])  # the VAE comes last, so that nothing of it is read again
def test_a_source_that_is_replaced_by_another_of_its_size(quant, part, tmp_path):
    source = save_small(tmp_path / "source")
    file = source / WEIGHTS[part]
    other = changed(file)

    def replace(done: int, total: int) -> None:
        if done > (total // 9 if part == "transformer" else total - 1) and other.exists():
            other.replace(file)

    with pytest.raises(CheckpointError, match=f"{file} was changed while it was read"):
        convert(source, tmp_path / "out", quant, progress=replace)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("quant", ["bf16", "qint8"])
def test_a_checkpoint_that_is_replaced_when_its_hashes_are_known(quant, tmp_path):
    stored = convert(save_small(tmp_path / "source"), tmp_path / "bf16")
    file = stored / "transformer/model.safetensors"
    other = changed(file)

    def replace(done: int, total: int, step: str) -> None:
        if done > total * 6 // 10 and other.exists():
            other.replace(file)

    with pytest.raises(CheckpointError, match=f"{file} was changed while it was read"):
        convert_model(str(stored), tmp_path / "out", quant=quant, text_quant="qint8", progress=replace)
    assert not (tmp_path / "out").exists()


def write_gguf(path: Path, seed: int) -> Path:
    writer = gguf.GGUFWriter(path, "flux")
    values = np.random.default_rng(seed).standard_normal((4, 64), np.float32)
    writer.add_tensor("plain", values.astype(np.float16))
    writer.add_tensor("packed", gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0), raw_dtype=8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_that_is_replaced_when_its_header_was_read(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", 0)
    opened = Gguf([path])
    write_gguf(tmp_path / "b.gguf", 1).replace(path)
    for reading in (Copied((opened.range_of("plain"),)).pieces(new_buffers()), opened.read(["packed"])):
        with pytest.raises(CheckpointError, match=r"a\.gguf was changed while it was read"):
            mx.eval(next(reading))


@pytest.mark.parametrize("stored", [False, True])
def test_an_adapter_that_is_replaced_while_it_is_folded_in(stored, tmp_path):
    source = save_small(tmp_path / "source")
    source = convert(source, tmp_path / "bf16") if stored else source
    file, other = (lora(tmp_path / name, seed) for seed, name in enumerate(("a.safetensors", "b.safetensors")))

    def replace(done: int, total: int, step: str) -> None:
        if other.exists():
            other.replace(file)

    with pytest.raises(CheckpointError, match=f"{file} was changed while it was read"):
        convert_model(str(source), tmp_path / "out", variant=VARIANT, adapters=[(str(file), 1.0)], progress=replace)
    assert not (tmp_path / "out").exists()


def lora(path: Path, seed: int) -> Path:
    keys = mx.random.split(mx.random.key(seed))
    name = "diffusion_model.double_blocks.0.img_attn.proj"
    factors = {"lora_A": mx.random.normal((2, 64), key=keys[0]), "lora_B": mx.random.normal((64, 2), key=keys[1])}
    mx.save_safetensors(str(path), {f"{name}.{end}.weight": x for end, x in factors.items()})
    return path


def test_a_file_that_is_replaced_when_its_header_was_read(tmp_path):
    """By one with the same names and shapes, as a model that is streamed and was converted anew."""
    paths = [tmp_path / name for name in ("a.safetensors", "b.safetensors")]
    for number, path in enumerate(paths):
        mx.save_safetensors(str(path), {"x": mx.full((8,), number), "y": mx.full((8,), number)})
    files = Files(paths[:1])
    assert files.infos.keys() == {"x", "y"}
    reading = files.read(["x", "y"])
    assert next(reading).tolist() == [0] * 8
    paths[1].replace(paths[0])
    with pytest.raises(CheckpointError, match=r"a\.safetensors was changed while it was read"):
        mx.eval(*reading)
    with pytest.raises(CheckpointError, match=r"a\.safetensors was changed while it was read"):
        next(files.read(["x"]))
