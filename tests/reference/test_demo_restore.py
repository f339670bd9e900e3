"""The shipped weights of the demonstration model pass back into its PyTorch parts unchanged."""

from importlib.resources import files
from pathlib import Path

import mlx.core as mx
import pytest
from export_stage import export
from flux2_mlx.convert import Source, write_checkpoint
from restore_stage import restore

SHIPPED = Path(str(files("flux2_mlx.demo")))


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    work = tmp_path_factory.mktemp("work")
    restore(work)
    export(work, work / "diffusers")
    write_checkpoint(Source.open(work / "diffusers", "demo"), work / "mlx", text_quant="bf16")
    return work / "mlx"


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae"])
def test_exporting_the_restored_weights_gives_the_same(converted, part):
    assert (converted / part / "config.json").read_bytes() == (SHIPPED / part / "config.json").read_bytes()
    ours, shipped = (mx.load(str(folder / part / "model.safetensors")) for folder in (converted, SHIPPED))
    assert ours.keys() == shipped.keys()
    for name, array in shipped.items():
        assert ours[name].dtype == array.dtype
        assert mx.array_equal(ours[name], array), name
