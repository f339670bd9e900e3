"""What a job asks of its model is checked once, planned once, and both before anything is fetched or converted."""

from collections import Counter

import pytest
from helpers.checkpoints import VARIANT
from helpers.cli_runner import PROMPT, SMALL, done, refusal
from helpers.hub_client import REPO, using
from helpers.hub_server import HubServer

from flux2_mlx import preparation
from flux2_mlx.checkpoint import Component
from flux2_mlx.memory import Needs
from flux2_mlx.request import Request

pytestmark = pytest.mark.usefixtures("folder")


@pytest.fixture
def calls(monkeypatch):
    """How often each thing was done that a run needs once."""
    counts = Counter()

    def counted(name, function):
        def call(*given, **named):
            counts[name] += 1
            return function(*given, **named)

        return call

    monkeypatch.setattr(Request, "checked", counted("checked", Request.checked))
    monkeypatch.setattr(Needs, "plan", counted("planned", Needs.plan))
    monkeypatch.setattr(preparation, "find_checkpoint", counted("opened", preparation.find_checkpoint))
    return counts


def test_a_run_is_checked_and_planned_once(calls):
    done("t2i", PROMPT, "-m", "demo", *SMALL, "-n", "3")
    assert calls == {"checked": 1, "planned": 1, "opened": 1}


def test_so_is_an_edit(calls, folder):
    done("t2i", PROMPT, "-m", "demo", "-W", "64", "-H", "64", "-s", "1", "-o", "a.png")
    calls.clear()
    done("i2i", PROMPT, "-m", "demo", "-i", "a.png", "-s", "1", "-o", "b.png")
    assert calls == {"checked": 1, "planned": 1, "opened": 1}


def test_and_each_run_of_several(calls, folder):
    (folder / "list.jsonl").write_text(
        '{"prompt": "a", "steps": 1}\n{"prompt": "b", "steps": 2}\n{"prompt": "c", "steps": 1}\n'
    )
    done("t2i", "--prompts-file", "list.jsonl", "-m", "demo", "-W", "64", "-H", "64", "-o", "images/")
    assert calls == {"checked": 2, "planned": 2, "opened": 1}


def test_several_runs_load_each_network_once(folder, monkeypatch):
    loaded, load = Counter(), Component.load

    def counted(component, *given, **named):
        loaded[component.name] += 1
        return load(component, *given, **named)

    monkeypatch.setattr(Component, "load", counted)
    (folder / "list.jsonl").write_text("".join(f'{{"prompt": "{x}", "steps": {n}}}\n' for n, x in enumerate("abc", 1)))
    done("t2i", "--prompts-file", "list.jsonl", "-m", "demo", "-W", "64", "-H", "64", "-o", "images/")
    assert loaded == {"text_encoder": 1, "transformer": 1, "vae": 1}


def test_what_is_there_already_is_not_planned(calls, folder):
    arguments = ("t2i", PROMPT, "-m", "demo", *SMALL, "--seed", "1", "-o", "a.png", "--skip-existing")
    done(*arguments)
    calls.clear()
    assert done(*arguments).stdout == ""
    assert calls == {"checked": 1, "opened": 1}


def test_a_folder_that_would_not_fit_is_not_converted(folder, official, monkeypatch):
    monkeypatch.setattr("flux2_mlx.store.acquisition.write_checkpoint", lambda *_, **__: pytest.fail("converted"))
    arguments = ("-m", official, "--variant", VARIANT, "-W", "64", "-H", "64", "--memory-limit", "1MB")
    assert " needs " in refusal("t2i", PROMPT, *arguments)
    assert not (folder / "models").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-W", "1000"], "width 1000 must be"),
        (["-s", "0"], "steps must be 1 to"),
        (["-o", "a.bmp"], "can't write a.bmp: "),
    ],
)
def test_a_repo_is_not_fetched_for_a_wrong_setting(arguments, message, official, tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    with HubServer({REPO: official}) as hub, using(hub, home):
        assert refusal("t2i", PROMPT, "-m", REPO, "--variant", VARIANT, *arguments).startswith(message)
    assert not list(home.rglob("*.safetensors"))
