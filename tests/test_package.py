"""What `flux2_mlx` itself offers: its public names, which it imports when they are asked for, and its types."""

import ast
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest

import flux2_mlx

LAZY = ("Edit", "Flux2Output", "Flux2Pipeline", "Plan", "Progress", "Request", "Writer")


def names_for_checkers() -> dict[str, str]:
    """The module of each name that only a type checker imports."""
    tree = ast.parse(Path(flux2_mlx.__file__).read_text(encoding="utf-8"))
    blocks = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    imports = [node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(node.module) for node in imports for alias in node.names}


def test_dir_lists_the_public_names():
    assert {*LAZY, "CheckpointError", "Flux2Error", "InputError", "__version__"} <= set(dir(flux2_mlx))
    assert sorted(dir(flux2_mlx)) == sorted({*flux2_mlx.__all__, "__version__"})


@pytest.mark.parametrize("name", LAZY)
def test_a_name_is_what_a_type_checker_takes_it_for(name):
    found = getattr(flux2_mlx, name)
    assert found.__name__ == name
    assert found is getattr(import_module(f"flux2_mlx.{names_for_checkers()[name]}"), name)


def test_a_type_checker_knows_no_more_names():
    assert sorted(names_for_checkers()) == sorted(LAZY)
    assert flux2_mlx.__version__ == version("flux2-mlx")


def test_another_name_is_none():
    with pytest.raises(AttributeError, match="'flux2_mlx' has no attribute 'Pipeline'"):
        flux2_mlx.Pipeline  # noqa: B018


def test_the_package_says_that_it_is_typed():
    assert (Path(flux2_mlx.__file__).parent / "py.typed").is_file()
