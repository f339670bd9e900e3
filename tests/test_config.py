"""Configs that ask for too much or hold nonsense: one line, before anything is built."""

import json
import os
import shutil
import tracemalloc
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from flux2_mlx.convert import Source
from helpers.checkpoints import SHALLOW_TEXT, SHALLOW_VARIANT, convert, save_dev, save_small

from flux2_mlx.checkpoint import Checkpoint, Component
from flux2_mlx.components import COMPONENTS
from flux2_mlx.config import MAX_LAYERS, VARIANTS
from flux2_mlx.errors import CheckpointError

NONSENSE = [
    "two", "", "\x1b[31m" + "x" * 10_000, True, None, 0, -1, -(2**31), 2**31, 2**63, 10**400, 1.5, 1e308, float("nan"),
    float("inf"), [], [[]], [0], [-1], ["a"], [1e9], [10**9], [1] * 10_000, {}, {"a": 1},
]  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model in the official layout."""
    return save_small(tmp_path_factory.mktemp("official") / "model", text=SHALLOW_TEXT)


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole small dev, which has every network."""
    folder = tmp_path_factory.mktemp("official") / "dev"
    save_dev(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(official: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(official, tmp_path_factory.mktemp("converted") / "dev", "qint8", "qint8", variant="dev")


def linked(folder: Path, copy: Path) -> Path:
    """A copy that shares the files' bytes; a file that is changed is written anew."""
    return Path(shutil.copytree(folder, copy, copy_function=os.link))


def write(path: Path, values: Any) -> None:
    path.unlink()
    path.write_text(json.dumps(values))


def one_line(error: BaseException) -> bool:
    return "\n" not in str(error) and len(str(error)) < 1000


def passes_or_says_so(call: Callable[[], object]) -> bool:
    try:
        call()
    except CheckpointError as error:
        return one_line(error)
    return True


def keys(values: dict[str, Any], before: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every key of a config, those of its sections included."""
    found = []
    for key, value in values.items():
        found += [(*before, key), *(keys(value, (*before, key)) if isinstance(value, dict) else ())]
    return found


def replaced(values: dict[str, Any], key: tuple[str, ...], value: Any) -> dict[str, Any]:
    if not key:
        return value
    return values | {key[0]: replaced(values[key[0]], key[1:], value)}


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the networks that are built."""
    names, build = [], Component.build

    def count(self: Component):
        names.append(self.name)
        return build(self)

    monkeypatch.setattr(Component, "build", count)
    return names


@pytest.mark.parametrize("part", COMPONENTS)
@pytest.mark.parametrize("value", NONSENSE, ids=lambda value: repr(value)[:20])
def test_nonsense_in_a_checkpoint_is_one_line(part, value, checkpoint, tmp_path):
    copy = linked(checkpoint, tmp_path / "copy")
    values = json.loads((copy / part / "config.json").read_text())
    for key in keys(values):
        write(copy / part / "config.json", replaced(values, key, value))
        assert passes_or_says_so(lambda: Checkpoint.open(copy)), key


@pytest.mark.parametrize("value", NONSENSE, ids=lambda value: repr(value)[:20])
@pytest.mark.parametrize(
    ("model", "part"),
    [*(("source", part) for part in ("transformer", "vae", "scheduler", "")), ("official", "text_encoder")],
    ids=lambda name: name or "model_index",
)
def test_nonsense_in_a_source_is_one_line(model, part, value, request, tmp_path):
    copy = linked(request.getfixturevalue(model), tmp_path / "copy")
    variant = {"source": SHALLOW_VARIANT, "official": "dev"}[model]
    name = {"scheduler": "scheduler_config.json", "": "model_index.json"}.get(part, "config.json")
    values = json.loads((copy / part / name).read_text())
    for key in keys(values):
        write(copy / part / name, replaced(values, key, value))
        assert passes_or_says_so(lambda: Source.open(copy, variant).check()), key


@pytest.mark.parametrize(
    ("part", "key"),
    [
        ("transformer", "num_layers"),
        ("transformer", "num_single_layers"),
        ("text_encoder", "num_hidden_layers"),
        ("vae", "layers_per_block"),
    ],
)
@pytest.mark.parametrize("count", [1_000_000, MAX_LAYERS])
def test_blocks_that_a_source_has_no_weights_for_are_not_built(part, key, count, source, built, tmp_path):
    copy = linked(source, tmp_path / "copy")
    values = json.loads((copy / part / "config.json").read_text())
    write(copy / part / "config.json", values | {key: count, "layer_types": None})
    variant = "klein-4b" if part == "text_encoder" else SHALLOW_VARIANT
    target = tmp_path / "converted"
    with pytest.raises(CheckpointError, match=f"{part}/config.json.*{key} is {count}, ") as caught:
        convert(copy, target, variant=variant)
    assert one_line(caught.value)
    assert part not in built
    assert not target.exists()


@pytest.mark.parametrize(
    ("part", "key"),
    [
        ("transformer", "num_layers"),
        ("transformer", "num_single_layers"),
        ("language_model", "num_later_layers"),
        ("vision", "num_hidden_layers"),
        ("vae", "layers_per_block"),
    ],
)
@pytest.mark.parametrize("count", [1_000_000, MAX_LAYERS])
def test_blocks_that_a_checkpoint_has_no_weights_for_are_not_built(part, key, count, checkpoint, built, tmp_path):
    copy = linked(checkpoint, tmp_path / "copy")
    values = json.loads((copy / part / "config.json").read_text())
    write(copy / part / "config.json", values | {key: count})
    with pytest.raises(CheckpointError, match=f"{part}/config.json.*{key} is {count}, ") as caught:
        Checkpoint.open(copy)
    assert one_line(caught.value)
    assert part not in built


def test_levels_and_states_that_a_checkpoint_has_no_weights_for_are_not_built(checkpoint, built, tmp_path):
    copy = linked(checkpoint, tmp_path / "copy")
    values = json.loads((copy / "vae/config.json").read_text())
    write(copy / "vae/config.json", values | {"block_out_channels": [4] * 200})
    with pytest.raises(CheckpointError, match="the length of block_out_channels is 200, but the files hold 4"):
        Checkpoint.open(copy)
    assert "vae" not in built
    built.clear()
    copy = linked(checkpoint, tmp_path / "other")
    values = json.loads((copy / "text_encoder/config.json").read_text())
    changes = {"out_layers": list(range(1, 201)), "num_hidden_layers": 200}
    write(copy / "text_encoder/config.json", values | changes)
    with pytest.raises(CheckpointError, match="features"):  # more than the transformer takes
        Checkpoint.open(copy)
    assert "text_encoder" not in built


@pytest.mark.parametrize(
    "key",
    ["hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim"],
)
@pytest.mark.parametrize("value", [2**24, 2**20])
def test_huge_sizes_take_no_memory(key, value, checkpoint, tmp_path):
    copy = linked(checkpoint, tmp_path / "copy")
    values = json.loads((copy / "text_encoder/config.json").read_text())
    write(copy / "text_encoder/config.json", values | {key: value})
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError) as caught:
            Checkpoint.open(copy)
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()
    assert one_line(caught.value)


@pytest.mark.parametrize(
    ("part", "key", "value", "match"),
    [
        ("transformer", "guidance_embeds", "false", "guidance_embeds is 'false', not true or false"),
        ("transformer", "num_layers", 2.0, "num_layers is 2.0, not a whole number from 0 to 256"),
        ("transformer", "rope_theta", "2000", "rope_theta is '2000', not a number above 0"),
        ("transformer", "axes_dims_rope", [8, 8, 8, "8"], "an item of axes_dims_rope is '8', not a whole number"),
        ("transformer", "rope_scaling", {"rope_type": "yarn"}, r"unknown keys \['rope_scaling'\]"),
        ("transformer", "quantization", {"group_size": 64, "bits": 8}, "quantization.mode is None, none of"),
        ("transformer", "quantization", {"group_size": 32, "bits": 8, "mode": "affine"}, "group_size is 32, none of"),
        ("transformer", "quantization", {"group_size": 64, "bits": 3, "mode": "affine"}, "bits is 3, none of"),
        ("text_encoder", "model_type", "llama", "'llama' is none of qwen3, mistral3"),
        ("text_encoder", "out_layers", [30, 20, 30], "are not in ascending order"),
        ("text_encoder", "head_dim", 15, "the head dimension 15 is not even"),
        ("vision", "num_attention_heads", 5, "64 features do not divide into 5 heads"),
        ("vae", "block_out_channels", [], "block_out_channels is .*, not a list of some whole numbers"),
        ("vae", "patch_size", [2], r"patch_size is \(2,\), not a list of 2 whole numbers"),
    ],
)
def test_what_is_wrong_in_a_checkpoint_is_named(part, key, value, match, checkpoint, tmp_path):
    copy = linked(checkpoint, tmp_path / "copy")
    values = json.loads((copy / part / "config.json").read_text())
    write(copy / part / "config.json", values | {key: value})
    with pytest.raises(CheckpointError, match=f"{part}/config.json describes no {part}: .*{match}"):
        Checkpoint.open(copy)


def test_types_in_a_section_are_named_with_it(official, tmp_path):
    for number, (section, key) in enumerate([("text_config", "hidden_size"), ("vision_config", "patch_size")]):
        copy = linked(official, tmp_path / str(number))
        values = json.loads((copy / "text_encoder/config.json").read_text())
        write(copy / "text_encoder/config.json", replaced(values, (section, key), "many"))
        with pytest.raises(CheckpointError, match=f"config.json describes no .*: {section}.{key} is 'many', not a"):
            Source.open(copy, "dev")


@pytest.mark.parametrize("part", ["transformer", "text", "vision", "vae"])
def test_whole_numbers_that_mlx_has_not_are_refused(part):
    config = getattr(VARIANTS["dev"], part)
    numbers = [field.name for field in fields(config) if field.type is float]
    assert numbers
    for name in numbers:
        with pytest.raises(CheckpointError, match=f"{name} is 9223372036854775808, not a number"):
            type(config).from_dict(config.to_dict() | {name: 2**63})
