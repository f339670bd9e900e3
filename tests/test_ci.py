"""Continuous integration: its files are valid, and name what exists."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml
from helpers.project import PYPROJECT, ROOT, commands, understand

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.y*ml"))


def jobs() -> dict[str, dict]:
    """The jobs of all workflows by their names."""
    return {name: job for path in WORKFLOWS for name, job in yaml.safe_load(path.read_text())["jobs"].items()}


def scripts(job: dict) -> list[str]:
    return [step["run"] for step in job["steps"] if "run" in step]


def test_there_is_a_workflow_for_every_push():
    assert WORKFLOWS
    for path in WORKFLOWS:
        workflow = yaml.safe_load(path.read_text())
        assert {"push", "pull_request"} <= set(workflow[True])  # what YAML takes `on` for
        assert workflow["permissions"] == {"contents": "read"}


@pytest.mark.parametrize(("name", "job"), jobs().items())
def test_a_job_runs_something_for_a_bounded_time(name, job):
    assert job["runs-on"]
    assert job["timeout-minutes"] <= 90
    for step in job["steps"]:
        assert len({"run", "uses"} & set(step)) == 1
        assert re.fullmatch(r"actions/[\w-]+@v\d+", step.get("uses", "actions/none@v1"))
    assert scripts(job)


@pytest.mark.parametrize(("name", "job"), jobs().items())
def test_what_a_job_runs_exists(name, job):
    for script in scripts(job):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True, timeout=60)
        for command, *arguments in commands(script):
            understand(command, arguments)
        assert all((ROOT / path).is_file() for path in re.findall(r"\bbash (\S+)", script))


def test_the_oldest_python_and_a_new_one_are_tried():
    versions = jobs()["linux"]["strategy"]["matrix"]["python"]
    oldest = PYPROJECT["project"]["requires-python"].removeprefix(">=")
    assert versions[0] == oldest
    assert [tuple(map(int, version.split("."))) for version in versions][-1] >= (3, 14)


def test_a_mac_runs_the_tests_and_then_the_gpu():
    job = jobs()["mac"]
    assert job["runs-on"].startswith("macos-")
    assert scripts(job)[0] == "bash .ci/run"
    assert [command for script in scripts(job) for command, *_ in commands(script)] == ["t2i", "doctor"]


def test_the_check_is_a_script():
    path = Path(ROOT, ".ci", "run")
    subprocess.run(["bash", "-n", path], check=True, timeout=60)
