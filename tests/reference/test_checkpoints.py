"""The small models that the other tests use are what the reference classes save."""

import json

import mlx.core as mx
import pytest
from helpers import checkpoints, references
from helpers.checkpoints import WEIGHTS, read_tensors

MAKERS = {
    "klein": (checkpoints.save_small, references.save_small),
    "dev": (checkpoints.save_dev, references.make_dev_source),
}
# The reference dev is in float32 and its pipeline is never saved as a whole.
OTHER = {"dtype"}


@pytest.mark.parametrize("model", MAKERS)
def test_configs_names_and_shapes_are_those_of_the_references(model, tmp_path):
    ours, theirs = (tmp_path / name for name in ("ours", "theirs"))
    for folder, save in zip((ours, theirs), MAKERS[model], strict=True):
        save(folder)
    for file in ("model_index.json", "scheduler/scheduler_config.json", *(f"{name}/config.json" for name in WEIGHTS)):
        values, expected = (json.loads((folder / file).read_text()) for folder in (ours, theirs))
        assert values.keys() == expected.keys()
        assert {key for key in values if values[key] != expected[key]} <= OTHER, file
    for file in WEIGHTS.values():
        values, expected = (read_tensors(folder / file) for folder in (ours, theirs))
        assert {name: x.shape for name, x in values.items()} == {name: x.shape for name, x in expected.items()}
        for name, x in values.items():
            if x.size > 1000:
                spread, other = (mx.std(y.astype(mx.float32)).item() for y in (x, expected[name]))
                assert spread == pytest.approx(other, rel=0.1), name
