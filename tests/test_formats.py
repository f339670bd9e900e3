"""The families of formats beside each other: what one packs, no other takes or refuses."""

from functools import partial
from pathlib import Path

import pytest
from flux2_mlx.convert.formats import bitsandbytes, fp8, mlx, nvfp4, quanto, torchao
from flux2_mlx.convert.formats.unreadable import unreadable

from flux2_mlx.weights import Files

GOLDEN = Path(__file__).parent / "golden"
SHAPES = {"qint4.weight": (5, 256), "qint2.weight": (5, 256)}
OWN = {"comfy": {"fp8", "nvfp4"}, "bitsandbytes": {"bitsandbytes"}, "quanto": {"quanto"}, "torchao": {"torchao"}}


@pytest.mark.parametrize("tool", OWN)
def test_a_file_is_of_one_tool(tool):
    files = Files([GOLDEN / f"{tool}.safetensors"])
    families = {
        "fp8": fp8.packed,
        "nvfp4": nvfp4.packed,
        "bitsandbytes": partial(bitsandbytes.packed, read=files.read),
        "quanto": partial(quanto.packed, shapes=SHAPES),
        "torchao": torchao.packed,
        "mlx": mlx.packed,
    }
    found = {name for name, family in families.items() if family(files.infos, files.metadata)}
    assert found == OWN[tool]
    assert unreadable(files.infos, {}) is None
