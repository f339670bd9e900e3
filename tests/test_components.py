"""The table of networks against the networks themselves."""

import ast
from dataclasses import fields
from pathlib import Path

import mlx.core as mx
import pytest
from flux2_mlx.convert.parts import LAYOUT
from mlx.utils import tree_flatten

from flux2_mlx.checkpoint import variant_components
from flux2_mlx.components import (
    COMPONENTS,
    PAINTING,
    PARTS,
    WRITING_PARTS,
    by_field,
    by_group,
    geometries,
    in_phase,
    label,
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
    assert row.geometry in {field.name for field in fields(Variant)}
    assert COMPONENTS[row.part].part == row.part
    assert row.group is None or COMPONENTS[row.group].group == row.group
    names = [name for name, _ in tree_flatten(row.module(CONFIGS[name]).parameters())]
    for prefix, (_, count) in row.counts(CONFIGS[name]).items():
        assert len({key[len(prefix) :].partition(".")[0] for key in names if key.startswith(prefix)}) == count
    assert all(f"{name}.weight" in names for name in row.looked_up)
    assert row.labels.keys() <= set(row.phases)
    assert [f"{blocks}." for blocks in row.streamed] in ([], list(row.counts(CONFIGS[name])))


def test_the_parts_of_a_source_are_known_to_the_converter():
    assert tuple(LAYOUT) == PARTS == ("transformer", "text_encoder", "vae")
    assert [name for part in PARTS for name in LAYOUT[part].rules] == list(COMPONENTS)
    assert all(COMPONENTS[name].part == part for part in PARTS for name in LAYOUT[part].rules)
    assert WRITING_PARTS == ("text_encoder",)
    assert by_group("qint4", "qint8") == {"transformer": "qint4", "text_encoder": "qint8"}


def test_what_users_are_told_of_phases():
    told = {phase: label(phase) for name in PAINTING for phase in COMPONENTS[name].phases}
    assert told == {
        "text_encoder": "text encoder",
        "language_model": "language model",
        "vae_encoder": "references",
        "transformer": "denoising",
        "vae": "decoding",
    }
    assert label("vision") == "vision tower"


def test_which_components_a_phase_needs():
    assert in_phase("language_model") == ("text_encoder", "language_model")
    assert in_phase("vae_encoder") == in_phase("vae") == ("vae",)
    assert in_phase("vision") == ("vision",)


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


def names_in(node: ast.AST) -> set[str]:
    """The components that are named anywhere in a piece of code, as texts or as names of arguments."""
    pieces = list(ast.walk(node))
    texts = {piece.value for piece in pieces if isinstance(piece, ast.Constant) and isinstance(piece.value, str)}
    return (texts | {piece.arg for piece in pieces if isinstance(piece, ast.keyword) and piece.arg}) & COMPONENTS.keys()


def compared_in(node: ast.If | ast.Match) -> set[str]:
    """The components that the branches of a chain are chosen by."""
    if isinstance(node, ast.Match):
        return set().union(*(names_in(case.pattern) for case in node.cases))
    after = node.orelse[0] if len(node.orelse) == 1 else None
    return names_in(node.test) | (compared_in(after) if isinstance(after, ast.If) else set())


def tables_of_components(code: str) -> list[int]:
    """The lines where an expression, or a chain of branches, starts that names three or more components."""
    found = []
    if sum(name in code for name in COMPONENTS) < 3:  # which is most files, and soon seen
        return found
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.expr):
            found += [node.lineno] if len(names_in(node)) >= 3 else []
        elif isinstance(node, ast.If | ast.Match):
            found += [node.lineno] if len(compared_in(node)) >= 3 else []
    return sorted(set(found))


@pytest.mark.parametrize(
    "code",
    [
        "NAMES = {'transformer': 1, 'text_encoder': 2, 'vae': 3}",
        "NAMES = 'transformer', 'language_model', 'vae'",
        "NAMES = ['transformer', 'text_encoder', 'vision']",
        "NAMES = {'transformer', 'text_encoder', 'vae'}",
        "NAMES = (('transformer', 1), ('text_encoder', 2), ('vae', 3))",
        "NAMES = dict(transformer=1, text_encoder=2, vae=3)",
        "NAMES = dict.fromkeys(['transformer', 'vision']) | {'vae': 2}",
        "found = name == 'transformer' or name == 'text_encoder' or name == 'vae'",
        "found = 1 if name == 'transformer' else 2 if name == 'vision' else 3 if name == 'vae' else 4",
        "if name == 'transformer':\n    a()\nelif name == 'vision':\n    b()\nelif name == 'vae':\n    c()",
        "match name:\n    case 'transformer':\n        a()\n    case 'vision' | 'vae':\n        b()",
    ],
)
def test_a_table_of_components_is_seen(code):
    assert tables_of_components(code) == [1]


def test_two_components_are_no_table():
    assert tables_of_components("a = {'transformer': 1, 'vae': 2}\nb = 'vision'") == []


# Where the components are named besides their own table, and why.
TABLES = {
    "flux2_mlx/components.py": "the table itself",
    "convert/parts.py": "what is true of the parts of others' models, which only `convert` knows",
    "convert/dialects.py": "each of others' namings says which part it is of",
    "flux2_mlx/durations.py": "how often a run passes through each network, which is a fact of runs",
}


def test_there_is_one_table_of_components():
    paths = [path for folder in ("flux2_mlx", "convert") for path in (ROOT / folder).rglob("*.py")]
    code = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}
    found = {path: tables_of_components(text) for path, text in code.items()}
    assert {path: lines for path, lines in found.items() if lines and path not in TABLES} == {}
    assert all(found[path] for path in TABLES), "there is no table any more"
