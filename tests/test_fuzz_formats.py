"""Some damage to a small file of each format, from a seed, and scales that are none."""

import numpy as np
import pytest
from fuzz_formats import Bench, Stored, samples
from helpers.fuzz_slice import outcomes

from flux2_mlx.errors import CheckpointError

COUNT = 8
SCALE_ENDS = ("scale", "scales", "scale_2", "scale_inv", "scale_weight", ".SCB", ".absmax")
VALUES = (np.nan, np.inf, 1e30, 0.0, 1e-45)
# Of what a layer takes and gives, and a marker of two numbers.
UNUSED = ("input_scale", "output_scale", "scaled_fp8")
SCALES = [
    (kind, name)
    for kind, sample in samples().items()
    for name, x in sample.tensors.items()
    if x.info.dtype in ("F32", "BF16") and name.endswith(SCALE_ENDS) and not name.endswith(UNUSED)
]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("formats"))


def test_nothing_bad_comes_of_damage(bench, monkeypatch):
    assert outcomes(bench, COUNT, monkeypatch).keys() == {"identical", "values", "others", "refused"}


@pytest.mark.parametrize(("kind", "name"), SCALES)
def test_a_scale_that_is_none_is_refused(kind, name, bench):
    sample = samples()[kind]
    info, data = sample.tensors[name]
    for value in VALUES:
        values = np.full(len(data) // 4, value, np.float32).tobytes()
        if info.dtype == "BF16":
            values = np.full(len(data) // 2, value, np.float32).view(np.uint16)[1::2].tobytes()
        changed = sample._replace(tensors={**sample.tensors, name: Stored(info, values)})
        with pytest.raises(CheckpointError) as caught:
            bench.read(changed.encoded())
        assert name.rpartition(".")[0].removesuffix(".weight") in str(caught.value)
