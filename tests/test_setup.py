"""`scripts/setup.sh`: what it says where it can't set up, and that it does nothing twice, with stand-ins."""

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "setup.sh"
# A Python that is new or not, makes an environment of itself, and whose pip says what it was asked to do.
PYTHON = """#!/bin/sh
case $* in
  -c*) exit {old} ;;
  "-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
  "-m pip"*) echo "$*" >>calls; [ -e broken ] && echo "WARNING: x" && echo "ERROR: no route" && exit 1; exit 0 ;;
  -V) echo "Python 3.9.6" ;;
esac
"""


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def project(tmp_path):
    (tmp_path / "scripts").mkdir()
    shutil.copy(SCRIPT, tmp_path / "scripts")
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    tools = tmp_path / "tools"
    for name in ("bash", "sh", "dirname", "cat", "cksum", "grep", "tail", "rm", "mkdir", "cp"):
        executable(tools / name, f'#!/bin/sh\nexec {shutil.which(name)} "$@"\n')
    executable(tools / "python3", PYTHON.format(old=0))
    return tmp_path


def setup(project: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {"PATH": str(project / "tools"), "HOME": os.devnull}
    command = [shutil.which("bash"), str(project / "scripts" / "setup.sh"), *arguments]
    return subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, timeout=60, check=False)


def installs(project: Path) -> list[str]:
    calls = project / "calls"
    return [line.split()[-1] for line in calls.read_text().splitlines()] if calls.exists() else []


def test_it_installs_once_and_again_when_the_project_changes(project):
    for _ in range(2):
        assert setup(project).returncode == 0
    assert installs(project) == ["."]
    (project / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    assert setup(project).returncode == 0
    assert installs(project) == [".", "."]


def test_the_tests_need_more_than_the_tool(project):
    for arguments in ((), ("dev",), ("test",), ("test",), ("dev",), ()):
        assert setup(project, *arguments).returncode == 0
    assert installs(project) == [".", ".[dev]", ".[test]"]


def test_another_argument_is_told(project):
    result = setup(project, "tests")
    assert (result.returncode, result.stderr) == (1, "setup: unknown argument 'tests'; give dev, test or nothing\n")
    assert not (project / ".venv").exists()


def test_an_old_python_is_told(project):
    executable(project / "tools" / "python3", PYTHON.format(old=1))
    result = setup(project)
    assert (result.returncode, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("setup: needs Python 3.11 or later with venv, found Python 3.9.6; install one (brew install")
    assert not (project / ".venv").exists()


def test_uv_finds_a_python_where_there_is_none(project):
    executable(project / "tools" / "python3", PYTHON.format(old=1))
    executable(project / "tools" / "uv.python", PYTHON.format(old=0))
    made = 'mkdir -p .venv/bin; cp "$0.python" .venv/bin/python'
    executable(project / "tools" / "uv", f'#!/bin/sh\necho "uv $*" >>calls; {made}\n')
    assert setup(project).returncode == 0
    assert (project / "calls").read_text().splitlines()[0].startswith("uv venv -q --clear --seed --python 3.13")


def test_what_pip_says_is_one_line_and_it_is_tried_again(project):
    (project / "broken").touch()
    for _ in range(2):
        result = setup(project)
        assert result.returncode == 1
        assert result.stderr.splitlines()[1:] == [
            "setup: can't install .: no route (all of it is in .venv/install.log; without a network nothing can be "
            "installed)"
        ]
    (project / "broken").unlink()
    assert setup(project).returncode == 0
    assert installs(project) == [".", ".", "."]
