"""The table of networks against the networks themselves."""

import ast
from dataclasses import fields
from pathlib import Path

import mlx.core as mx
import pytest
from flux2_mlx.convert.parts import LAYOUT
from mlx.utils import tree_flatten

from flux2_mlx import layout
from flux2_mlx.checkpoint import variant_components
from flux2_mlx.components import (
    COMPONENTS,
    PAINTING,
    PARTS,
    WRITING_PARTS,
    by_field,
    by_group,
    geometries,
    network_dtype,
    quantizations,
)
from flux2_mlx.config import VARIANTS, Variant

ROOT = Path(__file__).resolve().parent.parent
# What a variant with every network is made of.
CONFIGS = geometries(VARIANTS["dev"])


@pytest.mark.parametrize("name", COMPONENTS)
def test_a_row_fits_its_network(name):
    row = COMPONENTS[name]
    assert isinstance(CONFIGS[name], row.config)
    assert row.field in {field.name for field in fields(Variant)}
    assert COMPONENTS[row.part].part == row.part
    assert row.group is None or COMPONENTS[row.group].group == row.group
    names = [name for name, _ in tree_flatten(row.module(CONFIGS[name]).parameters())]
    for prefix, (_, count) in row.counts(CONFIGS[name]).items():
        assert len({key[len(prefix) :].partition(".")[0] for key in names if key.startswith(prefix)}) == count
    assert [f"{blocks}." for blocks in row.streamed] in ([], list(row.counts(CONFIGS[name])))


def test_the_parts_of_a_source_are_known_to_the_converter():
    assert tuple(LAYOUT) == PARTS == ("transformer", "text_encoder", "vae")
    assert [name for part in PARTS for name in LAYOUT[part].rules] == list(COMPONENTS)
    assert all(COMPONENTS[name].part == part for part in PARTS for name in LAYOUT[part].rules)
    assert WRITING_PARTS == ("text_encoder",)
    assert (layout.PARTS, layout.WRITING_PARTS) == (PARTS, WRITING_PARTS)
    assert by_group("qint4", "qint8") == {"transformer": "qint4", "text_encoder": "qint8"}


def test_what_images_are_made_with():
    assert PAINTING == ("transformer", "text_encoder", "vae")


@pytest.mark.parametrize(
    ("variant", "more"), [("klein-4b", set()), ("klein-9b", set()), ("dev", {"language_model", "vision"})]
)
def test_the_networks_of_a_variant(variant, more):
    later = {"language_model"} if VARIANTS[variant].text.num_later_layers else set()
    assert set(geometries(VARIANTS[variant])) == set(PAINTING) | later | more
    assert list(variant_components(VARIANTS[variant], "qint8")) == list(geometries(VARIANTS[variant]))
    assert by_field(geometries(VARIANTS[variant])).items() <= vars(VARIANTS[variant]).items()


def test_what_is_quantized_like_the_text_encoder():
    text = dict.fromkeys(("text_encoder", "language_model", "vision"), "qint8")
    assert quantizations("qint4", "qint8") == {"transformer": "qint4", **text, "vae": "bf16"}


def test_only_the_transformer_computes_in_float16():
    assert [name for name in COMPONENTS if network_dtype(name, mx.float16) == mx.float16] == ["transformer"]
    assert {network_dtype(name, mx.float32) for name in COMPONENTS} == {mx.float32}


def tables_of_networks(path: Path) -> list[int]:
    """Lines where a dictionary with three or more networks for keys starts."""
    literals = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Dict)]
    return [node.lineno for node in literals if len(COMPONENTS.keys() & set(map(_constant, node.keys))) >= 3]


def _constant(node: ast.expr | None) -> object:
    return node.value if isinstance(node, ast.Constant) else None


def test_there_is_one_table_of_networks():
    # Besides, `convert` knows what others call them and how their files are told, and two what a user is told of them.
    told = {"diffusers_methods.py", "progress.py", "naming.py", "geometry.py", "identity.py"}
    paths = [path for folder in ("flux2_mlx", "convert") for path in (ROOT / folder).rglob("*.py")]
    assert {path.name for path in paths if tables_of_networks(path)} - told == {"components.py", "parts.py"}
