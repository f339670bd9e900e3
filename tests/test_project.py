"""Rules of the project that no single module can keep: layers, packaging, dependencies, the README."""

import ast
import importlib
import itertools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import readme_tables
from helpers.project import PYPROJECT, ROOT, commands, understand
from helpers.slow import SLOW

import flux2_mlx
from flux2_mlx.cli.main import cli

# The house of CONTRIBUTING.md: a module imports only from storeys below its own and from rooms of its own storey that
# stand left of its room; a package may import from itself.
STOREYS = {
    "facts": ("errors", "config", "layout", "wording", "requirements", "chips", "device", "noise", "scheduler"),
    "files": (
        "files", "json_files", "exclusion", "settings", "copying", "weights", "staging", "images", "image_names",
        "colors", "references", "hub", "demo", "embedding_cache",
    ),
    "networks": ("layers", "loading", "balance", "adapters", "transformer", "vae", "text", "low_ranks", "branches"),
    "models": (
        "components", "quantization", "mixture", "checkpoint", "decoders", "memory", "streaming", "footprints", "kept",
        "networks",
        "verification", "convert", "store",
    ),
    "runs": (
        "request", "output", "step_cache", "sampling", "metering", "advice", "durations", "arguments", "latents",
        "cached_encoder", "unfinished", "upsampling", "previews", "provenance", "run", "progress_bar", "lora_methods",
        "diffusers_methods", "base_pipeline", "inputs", "preparation", "calibration", "pipeline",
    ),
    "faces": ("doctor", "benchmark", "cli", "__main__"),
}  # fmt: skip
ROOMS = {room: place for place, room in enumerate(itertools.chain.from_iterable(STOREYS.values()))}
# What the command line may know beside public names: facts, names of models, what a run is asked for, files of images.
OF_THE_CLI = {*STOREYS["facts"], "pipeline", "store", "request", "images"}
# And what only some of its modules may, since they are about that.
OF_ONE_MODULE = {
    "bench": {"benchmark"},
    "cache": {"embedding_cache"},
    "convert": {"calibration"},
    "doctor": {"doctor"},
    "draft": {"image_names", "provenance"},
    "frames": {"image_names"},
    "info": {"verification"},
    "models": {"verification"},
    "painting": {"embedding_cache"},
    "pictures": {"references"},
    "prompts": {"files", "json_files"},
    "replay": {"files"},
    "report": {"provenance"},
}
MAX_LINES = 400


def product_files() -> dict[str, Path]:
    """Every source file of the product by its module's name; packages end in `.__init__`."""
    found = {}
    for folder, package in (("flux2_mlx", "flux2_mlx"), ("convert", "flux2_mlx.convert")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            found[".".join([package, *path.relative_to(ROOT / folder).with_suffix("").parts])] = path
    return found


FILES = product_files()


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(module: str, tree: ast.AST) -> Iterator[str]:
    """Absolute names of what `module` imports anywhere in it; a name imported from a module may be its submodule."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            source = ".".join([*base, *filter(None, [node.module])])
            yield from (f"{source}.{alias.name}" for alias in node.names)


def test_there_are_files_to_check():
    assert {"flux2_mlx.__init__", "flux2_mlx.pipeline", "flux2_mlx.cli.main", "flux2_mlx.convert.rules"} <= set(FILES)


def own_names(module: str) -> set[str]:
    """The rooms of ours that `module` imports from, but for its own, and the public names of the package."""
    names = {name.split(".")[1] for name in imported(module, parse(FILES[module])) if name.startswith("flux2_mlx.")}
    return names - {module.split(".")[1], "__version__"}


def rooms(module: str) -> set[str]:
    """The rooms that `module` imports from; a public name counts as the room that it comes from."""
    return {flux2_mlx._LAZY.get(name, name) for name in own_names(module)}


def test_every_module_has_a_room():
    found = {name.split(".")[1] for name in FILES} - {"__init__"}
    assert sorted(found) == sorted(itertools.chain.from_iterable(STOREYS.values()))


def test_the_map_for_contributors_names_each_room_once_and_in_its_storey():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    *storeys, top = re.split(
        r"^\d\. |On top stand", text.partition("The house\n")[2].partition("How data")[0], flags=re.M
    )[1:]
    for storey, place in zip([*storeys, top], STOREYS, strict=True):
        named = [name.rstrip("/") for name in re.findall(r"`(\w+/?)`", storey)]
        assert sorted(named) == sorted(STOREYS[place])


@pytest.mark.parametrize("module", [name for name in FILES if name != "flux2_mlx.__init__"])
def test_imports_go_down_or_left(module):
    home = module.split(".")[1]
    above = {room for room in rooms(module) if ROOMS[room] >= ROOMS[home]}
    assert not above, f"{module} imports from {above}, which {home} may not"


@pytest.mark.parametrize("module", [name for name in FILES if name.split(".")[1] in STOREYS["facts"]])
def test_facts_know_no_files_and_no_network(module):
    names = {name.split(".")[0] for name in imported(module, parse(FILES[module]))}
    assert not names & {"PIL", "gguf", "huggingface_hub", "http", "io", "safetensors", "shutil", "socket", "tokenizers"}
    assert rooms(module) <= set(STOREYS["facts"])


@pytest.mark.parametrize("module", [name for name in FILES if name.split(".")[1] not in ("store", "hub", "convert")])
def test_only_the_store_calls_the_hub_and_the_converter(module):
    assert not rooms(module) & {"hub", "convert"}


@pytest.mark.parametrize("module", [name for name in FILES if name.split(".")[1] == "cli"])
def test_the_command_line_knows_the_public_face_only(module):
    """Types count, too: who names a room's class depends on what that room looks like. Public names are free."""
    assert own_names(module) <= OF_THE_CLI | OF_ONE_MODULE.get(module.split(".")[-1], set()) | set(flux2_mlx.__all__)


@pytest.mark.parametrize("module", FILES)
def test_no_import_of_what_only_tests_have(module):
    names = {name.split(".")[0] for name in imported(module, parse(FILES[module]))}
    assert not names & {"torch", "diffusers", "transformers", "accelerate", "pytest", "convert", "tests"}


@pytest.mark.parametrize("path", sorted((ROOT / "tests").glob("*.py")), ids=lambda path: path.stem)
def test_only_reference_tests_import_pytorch(path):
    torch = ("torch", "diffusers", "transformers", "safetensors.torch", "helpers.references", "helpers.parity")
    names = imported(path.stem, parse(path))
    assert [name for name in names if f"{name}.".startswith(tuple(f"{root}." for root in torch))] == []


@pytest.mark.parametrize("module", FILES)
def test_what_generates_text_is_imported_only_where_it_is_used(module):
    tree = parse(FILES[module])
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lazy = {node for function in functions for node in ast.walk(function)}
    eager = ast.Module([n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom) and n not in lazy], [])
    assert "mlx_lm" not in {name.split(".")[0] for name in imported(module, eager)}


def test_slow_files_are_there():
    """A name that is none would mark nothing."""
    assert {path.stem for path in (ROOT / "tests").glob("test_*.py")} >= SLOW


def sentences(tree: ast.Module) -> Iterator[str]:
    """The texts in a module that are more than a word and no docstrings."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    bodies = [node.body[0] for node in ast.walk(tree) if isinstance(node, documented) and node.body]
    docstrings = {body.value for body in bodies if isinstance(body, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docstrings:
            yield from [node.value] if " " in node.value else []


@pytest.mark.parametrize("module", [name for name in FILES if name.split(".")[1] != "cli"])
def test_messages_of_the_library_name_settings_and_no_flags(module):
    flag = re.compile(r"(?<![\w-])(--[a-z]|-[a-zA-Z]\b)|flux2-mlx models")
    assert [text for text in sentences(parse(FILES[module])) if flag.search(text)] == []


def test_a_run_imports_only_what_it_needs(tmp_path):
    script = """
import sys
from flux2_mlx import Flux2Pipeline
from flux2_mlx.cli.main import cli
cli(["info"], standalone_mode=False)
cli(["info", "klein-4b"], standalone_mode=False)
Flux2Pipeline.from_pretrained("demo")("red", width=16, height=16, num_inference_steps=1)
spared = ("torch", "diffusers", "transformers", "mlx_lm", "flux2_mlx.hub", "flux2_mlx.convert")
print([name for name in spared if name in sys.modules])
"""
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert (result.returncode, result.stdout.splitlines()[-1:]) == (0, ["[]"]), result.stderr


@pytest.mark.parametrize("folder", ["flux2_mlx", "convert", "scripts", "tests"])
def test_files_stay_readable(folder):
    lines = {path: path.read_text(encoding="utf-8").count("\n") for path in (ROOT / folder).rglob("*.py")}
    long = {str(path.relative_to(ROOT)): count for path, count in lines.items() if count >= MAX_LINES}
    assert not long, "split them"


def test_every_package_is_listed():
    packages = {name.removesuffix(".__init__") for name in FILES if name.endswith(".__init__")}
    assert sorted(PYPROJECT["tool"]["setuptools"]["packages"]) == sorted(packages)
    for name, path in FILES.items():
        assert (path.parent / "__init__.py").is_file(), f"{name} is in no package"


def test_no_folder_stands_in_the_way_of_the_mapped_package():
    assert PYPROJECT["tool"]["setuptools"]["package-dir"] == {"flux2_mlx.convert": "convert"}
    assert not (ROOT / "flux2_mlx" / "convert").exists()
    assert not hasattr(flux2_mlx, "convert") or hasattr(flux2_mlx.convert, "__path__")


def test_every_data_file_is_in_the_wheel():
    shipped = set()
    for package, patterns in PYPROJECT["tool"]["setuptools"]["package-data"].items():
        folder = ROOT.joinpath(*package.split("."))
        shipped |= {path for pattern in patterns for path in folder.glob(pattern)}
    data = [path for folder in ("flux2_mlx", "convert") for path in (ROOT / folder).rglob("*") if path.is_file()]
    data = {path for path in data if path.suffix not in (".py", ".pyc") and not path.name.startswith(".")}
    assert data - shipped == set()
    assert ROOT / "flux2_mlx" / "demo" / "flux2.json" in shipped


def test_the_version_is_in_one_place():
    version = PYPROJECT["project"]["version"]
    assert flux2_mlx.__version__ == version, "install the project again"
    assert [name for name, path in FILES.items() if version in path.read_text(encoding="utf-8")] == []


def test_pre_commit_runs_the_same_ruff():
    config = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    (revision,) = re.findall(r"rev: v(\S+)", config)
    assert f"ruff=={revision}" in PYPROJECT["project"]["optional-dependencies"]["dev"]


def readme_blocks(*languages: str) -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"^```(?:{'|'.join(languages)})\n(.*?)^```", text, re.S | re.M)


def test_the_readme_begins_with_an_image_and_then_the_tests():
    first, second, *_ = (block.strip() for block in readme_blocks("bash", "sh", "shell", "console"))
    setup = "bash scripts/setup.sh"
    assert re.fullmatch(rf"{setup} && \.venv/bin/flux2-mlx t2i .* -m demo .*\.png", first)
    assert second == f"{setup} test && .venv/bin/python -m pytest -n 2 --dist loadfile"


def test_the_tables_of_the_readme_are_the_code_s():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    start, end = readme_tables.MARKS
    shown = text.partition(start)[2].partition(end)[0]
    assert shown == f"\n{readme_tables.tables()}\n", "run scripts/readme_tables.py --readme README.md"


def test_python_in_the_readme_compiles_and_its_imports_exist():
    blocks = readme_blocks("python", "py")
    assert blocks
    for block in blocks:
        tree = ast.parse(block)
        compile(tree, "README.md", "exec")
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "flux2_mlx":
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names)


def test_commands_in_the_readme_are_understood():
    found = [arguments for block in readme_blocks("bash", "sh", "shell", "console") for arguments in commands(block)]
    assert found
    for name, *arguments in found:
        understand(name, arguments)


@pytest.mark.parametrize("name", [None, *cli.commands])
def test_commands_in_the_help_are_understood(name):
    found = commands((cli if name is None else cli.commands[name]).help)
    assert found
    for command, *arguments in found:
        understand(command, arguments)
