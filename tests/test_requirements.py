"""What is said, in one line, where Python, the system or MLX is not one that the program can run with."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest
from helpers.cli_runner import error_line

import flux2_mlx
from flux2_mlx import requirements
from flux2_mlx.errors import RequirementError

PACKAGE = Path(flux2_mlx.__file__).parent
# What `python -m flux2_mlx` reads before it knows that Python is new enough.
READ_FIRST = ("__init__", "__main__", "errors", "requirements")
# An `mlx` that can't be loaded, as MLX is without its backend, and none at all.
NO_BACKEND = "raise ImportError('libmlx.so: cannot open shared object file: No such file or directory', name='core')"


def pretend(monkeypatch, platform="darwin", machine="arm64", release="24.6.0", python=(3, 11, 0)):
    """Be another system, as far as `check` looks."""
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(sys, "version_info", python)
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(machine=machine, release=release))


def command(tmp_path, code, *arguments):
    """`python -m flux2_mlx` after `code` has changed Python."""
    script = f"import os, sys, runpy, types\n{code}\nsys.argv[1:] = {list(arguments)}\nrunpy.run_module('flux2_mlx')\n"
    script = script.replace("run_module('flux2_mlx')", "run_module('flux2_mlx', run_name='__main__')")
    return subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("name", READ_FIRST)
def test_an_old_python_can_read_what_tells_it(name):
    ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"), feature_version=(3, 6))


@pytest.mark.parametrize("name", READ_FIRST)
def test_nothing_in_it_is_evaluated_that_old_pythons_lack(name):
    """`list[str]` and `X | None` can be read, but fail when the function is defined."""
    tree = ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    hints = [hint for f in functions for hint in (f.returns, *(x.annotation for x in f.args.args)) if hint]
    assert all(isinstance(hint, ast.Name | ast.Constant) for hint in hints)


@pytest.mark.parametrize(
    "system",
    [
        {},
        {"release": "23.0.0"},
        {"release": "25.1.0", "python": (3, 14, 1)},
        {"platform": "linux", "machine": "x86_64", "release": "6.8.0"},
        {"platform": "linux", "machine": "aarch64", "release": "6.8.0"},
    ],
)
def test_what_will_do(system, monkeypatch):
    pretend(monkeypatch, **system)
    requirements.check()


@pytest.mark.parametrize(
    ("system", "message"),
    [
        (
            {"python": (3, 9, 6)},
            r"Python 3\.11 or later is needed, and \S+ is 3\.9; use another one, .*",
        ),
        ({"python": (3, 10, 13)}, r"Python 3\.11 or later is needed, and \S+ is 3\.10; .*"),
        ({"machine": "x86_64"}, r"a Mac with Apple Silicon is needed, and on it a Python for arm64, .* runs as x86_64"),
        ({"release": "22.6.0"}, r"macOS 14 or later is needed, and this is an older one \(Darwin 22\.6\.0\)"),
        ({"platform": "win32"}, r"a Mac with Apple Silicon is needed, or Linux, and this is win32"),
    ],
)
def test_what_will_not_do(system, message, monkeypatch):
    pretend(monkeypatch, **system)
    with pytest.raises(RequirementError, match=f"^{message}$"):
        requirements.check()


def test_the_command_says_it_before_it_reads_anything_else(tmp_path):
    code = "sys.version_info = (3, 9, 6, 'final', 0)\nsys.modules['flux2_mlx.cli'] = None"
    result = command(tmp_path, code, "t2i", "a red fox")
    assert (result.returncode, result.stdout) == (1, "")
    assert re.match(r"Python 3\.11 or later is needed, and ", error_line(result.stderr))


@pytest.mark.parametrize("name", ["Flux2Pipeline", "Writer"])
def test_python_says_it_too(name, monkeypatch):
    pretend(monkeypatch, machine="x86_64")
    with pytest.raises(RequirementError, match="runs as x86_64"):
        getattr(flux2_mlx, name)


@pytest.mark.parametrize("version", ["0.32.4", "0.32.11", "0.32.5.dev20260901"])
def test_versions_of_mlx_that_will_do(version):
    requirements.check_mlx(version)


@pytest.mark.parametrize("version", ["0.31.9", "0.32.0", "0.32.3", "0.33.0", "0.33", "1.0.0"])
def test_versions_of_mlx_that_will_not_do(version):
    message = re.escape(f'MLX {version} can\'t be used; install the right one: pip install "mlx>=0.32.4,<0.33"')
    with pytest.raises(RequirementError, match=f"^{message}$"):
        requirements.check_mlx(version)


def test_the_versions_are_those_of_the_package():
    text = (PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8")
    project = tomllib.loads(text)["project"]
    assert project["requires-python"] == ">={}.{}".format(*requirements.PYTHON)
    wanted = requirements.mlx_range().removeprefix("mlx")
    everything = [*project["dependencies"], *project["optional-dependencies"]["cuda"]]
    found = [re.fullmatch(r"mlx(\[\w+\])?(\S+);.*", line) for line in everything]
    assert [match[2] for match in found if match] == [wanted] * 3
    requirements.check_mlx(mx.__version__)


@pytest.mark.parametrize("code", [NO_BACKEND, None])
def test_a_command_without_mlx_says_so(code, tmp_path):
    """As on Linux after `pip install mlx` without its backend, and where there is no MLX at all."""
    (tmp_path / "mlx").mkdir()
    if code:
        (tmp_path / "mlx" / "__init__.py").touch()
        (tmp_path / "mlx" / "core.py").write_text(code)
    hidden = "" if code else "sys.modules['mlx'] = None"
    result = command(tmp_path, f"sys.path.insert(0, '{tmp_path}')\n{hidden}", "t2i", "a red fox", "-m", "demo")
    assert (result.returncode, result.stdout) == (1, ""), result.stderr
    message = error_line(result.stderr)
    assert message.startswith("MLX can't be loaded (")
    wanted = "mlx" if sys.platform == "darwin" else "mlx[cpu]"
    assert message.endswith(f'); install it: pip install "{wanted}>=0.32.4,<0.33"')


def test_a_command_with_another_mlx_says_so(tmp_path):
    code = "import mlx.core as mx; mx.__version__ = '0.32.1'"
    result = command(tmp_path, code, "t2i", "a red fox", "-m", "demo")
    assert (result.returncode, result.stdout) == (1, "")
    assert error_line(result.stderr).startswith("MLX 0.32.1 can't be used; ")


def test_other_imports_that_fail_are_not_taken_for_it(monkeypatch):
    error = ImportError("cannot import name 'x' from 'flux2_mlx.y'", name="flux2_mlx.y")
    with pytest.raises(ImportError) as raised, requirements.mlx_needed():
        raise error
    assert raised.value is error


def test_help_needs_no_mlx(tmp_path):
    result = command(tmp_path, "sys.modules['mlx'] = None", "t2i", "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("Usage: ")


@pytest.mark.parametrize(("value", "code"), [("cpu", 0), ("", 0), ("gpu", 1), ("0", 1)])
def test_the_environment_chooses_the_device(value, code, tmp_path):
    script = "import mlx.core as mx, flux2_mlx.device; print(mx.default_device())"
    environment = os.environ | {"FLUX2_MLX_DEVICE": value}
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == code, result.stderr
    if code:
        assert f"InputError: FLUX2_MLX_DEVICE is '{value}'; it can be cpu, or unset" in result.stderr
    else:
        assert result.stdout == f"Device({'cpu' if value or not mx.is_available(mx.gpu) else 'gpu'}, 0)\n"
