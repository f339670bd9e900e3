"""`--step-cache`: what a command line skips, says and remembers."""

import json
from pathlib import Path

import pytest
from helpers.cli_runner import PROMPT, done, make, pixels, refusal
from PIL import Image

from flux2_mlx.images import read_settings

SMALL = ("-m", "demo", "-W", "48", "-H", "32", "-s", "8", "--seed", "7")
CACHED = (*SMALL, "--step-cache", "0.2")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_it_is_said_remembered_and_repeated():
    run = done("t2i", PROMPT, *CACHED, "-o", "a.png", "--json", "--profile")
    report = json.loads(run.stdout)
    skipped = report["passes"]["skipped"]
    assert 0 < skipped < 7
    assert report["passes"] == {"all": 8, "skipped": skipped, "unread": 0}
    assert report["step_cache"] == read_settings(Path("a.png"))["step_cache"] == 0.2
    assert f"the step cache skipped {skipped} of 8 passes through the transformer\n" in run.stderr
    again = done("t2i", "--replay", "a.png", "-o", "b.png")
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    assert "the step cache skipped" in again.stderr
    assert "step cache: 0.2\n" in done("info", "a.png").stdout


def test_without_it_nothing_is_said_of_it():
    run = done("t2i", PROMPT, *SMALL, "-o", "a.png", "--json")
    assert not {"passes", "step_cache"} & {*json.loads(run.stdout)}
    assert "step cache" not in run.stderr
    assert "step_cache" not in read_settings(Path("a.png"))
    done("t2i", PROMPT, *CACHED, "-o", "b.png")
    assert (pixels("a.png") != pixels("b.png")).any()
    done("t2i", "--replay", "b.png", "--step-cache", "0", "-o", "c.png")
    assert Path("a.png").read_bytes() == Path("c.png").read_bytes()
    assert "the step cache" not in done("t2i", PROMPT, *CACHED, "-o", "d.png", "--quiet").stderr


@pytest.mark.parametrize("command", ["i2i", "outpaint"])
def test_pictures(command):
    Image.new("RGB", (64, 64), "teal").save("p.png")
    given = ("-i", "p.png", PROMPT) if command == "i2i" else ("p.png", "--left", "32")
    run = done(command, *given, "-m", "demo", "-s", "4", "--seed", "1", "--step-cache", "1e9", "-o", "a.png")
    assert "the step cache skipped 3 of 4 passes" in run.stderr


def test_an_image_of_another_threshold_is_another_image(caplog):
    make(*SMALL, "-o", "a.png")
    done("t2i", PROMPT, *SMALL, "-o", "a.png", "--skip-existing")
    assert not caplog.messages
    done("t2i", PROMPT, *CACHED, "-o", "a.png", "--skip-existing")
    assert caplog.messages == ["a.png is left as it is, but was made with another step cache"]


def test_models_of_few_steps_refuse_it_before_anything_is_fetched():
    said = refusal("t2i", PROMPT, "-m", "klein-4b", "--step-cache", "0.1")
    assert said == (
        "klein-4b is distilled to 4 steps, which differ too much for a step cache to skip any; leave it out, or "
        "choose one of demo, klein-base-4b, klein-base-9b, dev"
    )
    assert "step_cache must be a number of 0 or more, got -1.0" in refusal(
        "t2i", PROMPT, "-m", "demo", "--step-cache", "-1"
    )


def test_a_prompt_of_a_file_may_have_its_own():
    lines = ('{"prompt": "a fox", "step_cache": 1e9}', '{"prompt": "a fox"}', '{"prompt": "a fox", "step_cache": 0}')
    Path("a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    done("t2i", "--prompts-file", "a.jsonl", *CACHED, "-o", "{index}.png")
    remembered = [read_settings(path).get("step_cache") for path in sorted(Path().glob("*.png"))]
    assert remembered == [1e9, 0.2, None]
    refused = refusal("t2i", "--prompts-file", "a.jsonl", "-m", "klein-4b", "-o", "{index}.png")
    assert refused.startswith("line 1 of a.jsonl: klein-4b is distilled to 4 steps")
