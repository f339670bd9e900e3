"""--decoder and --preview-decoder: what images may have fetched or opened, and when anything is fetched."""

import json
from pathlib import Path

import pytest
from helpers.cli_runner import PROMPT, done, error_line, refusal, run
from helpers.decoders import save_tiny
from helpers.hub_client import using
from helpers.hub_server import HubServer
from helpers.remembered import remember

from flux2_mlx import Flux2Pipeline
from flux2_mlx.files import file_sha256
from flux2_mlx.images import read_settings

SMALL = ("t2i", PROMPT, "-m", "demo", "-W", "32", "-H", "32", "--seed", "7", "--no-cache", "-s", "2")
RUN = (*SMALL, "-o", "a.png")
AGAIN = ("t2i", "--replay", "a.png", "-o", "b.png", "--no-cache")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def hub(tmp_path):
    """The Hub has TAEF2, though for the latents of the demo, the same elsewhere, and one for other latents."""
    kept = tmp_path / "kept"
    kept.mkdir()
    content = save_tiny(kept / "tiny.safetensors", whole=True).read_bytes()
    repos = {
        "madebyollin/taef2": {"taef2.safetensors": content},
        "some/repo": {"x.safetensors": content, "wide.safetensors": save_tiny(kept / "w.safetensors", 32).read_bytes()},
    }
    with HubServer(repos) as server, using(server, tmp_path / "cache"):
        yield server


def cached() -> list[str]:
    """The weights that were fetched."""
    return sorted(path.name for path in Path("cache").rglob("snapshots/*/*.safetensors"))


@pytest.mark.parametrize(
    "told",
    [
        "some/repo:x.safetensors",
        "https://huggingface.co/some/repo/blob/main/x.safetensors",
        "kept/tiny.safetensors",
        "full",
        {"name": "some/repo:x.safetensors", "sha256": "0" * 64},
        {"name": "kept/tiny.safetensors", "sha256": "0" * 64},
        {"name": "a\0b", "sha256": "0" * 64},
        {"name": "", "sha256": "0" * 64},
    ],
)
def test_an_image_has_nothing_fetched_or_opened_that_is_not_known_here(folder, hub, told):
    done(*RUN)
    remember("evil.png", decoder=told)
    message = refusal("t2i", "--replay", "evil.png", "-o", "b.png")
    assert message.startswith("the decoder ")
    assert message.endswith("name it with --decoder")
    assert hub.requests == []


@pytest.mark.parametrize("told", [{"path": "x"}, {"name": "taef2"}, {"name": 3, "sha256": "0" * 64}, 3])
def test_damaged_settings_of_a_decoder_are_refused(folder, told):
    done(*RUN)
    remember("evil.png", decoder=told)
    assert refusal("t2i", "--replay", "evil.png", "-o", "b.png").startswith("the settings in evil.png are damaged: ")


def test_a_decoder_from_the_hub_is_found_in_its_cache(folder, hub):
    done(*RUN, "--decoder", "some/repo:x.safetensors")
    assert read_settings(Path("a.png"))["decoder"]["name"] == "some/repo:x.safetensors"
    hub.requests.clear()
    done(*AGAIN)
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    assert hub.requests == []


@pytest.mark.parametrize("place", ["beside", "home"])
def test_a_decoder_is_found_beside_the_image_and_in_the_models_folder(folder, place):
    tiny = save_tiny(folder / "tiny.safetensors")
    done(*RUN, "--decoder", "tiny.safetensors")
    (folder / place).mkdir()
    tiny.rename(folder / place / tiny.name)
    if place == "beside":
        Path("a.png").rename("beside/a.png")
        done("t2i", "--replay", "beside/a.png", "-o", "b.png", "--no-cache")
    else:
        done(*AGAIN, "--models-dir", "home")


def test_a_decoder_may_be_larger_than_an_image(folder, monkeypatch):
    save_tiny(folder / "tiny.safetensors")
    done(*RUN, "--decoder", "tiny.safetensors")
    monkeypatch.setattr("flux2_mlx.images.MAX_INPUT_BYTES", 100_000)
    done(*AGAIN)


def test_other_weights_of_a_known_decoder_are_told(folder, hub):
    done(*RUN, "--decoder", "taef2")
    assert "other weights" not in done(*AGAIN).stderr
    told = read_settings(Path("a.png"))["decoder"]
    remember("other.png", decoder=told | {"sha256": "0" * 64})
    again = ("t2i", "--replay", "other.png", "--no-cache", "--force", "-o", "b.png")
    line = "decoder taef2 has other weights than when the image was made, so the new one will differ\n"
    assert done(*again).stderr.count(line) == 1
    assert "other weights" not in done(*again, "--decoder", "taef2").stderr


def test_the_models_own_decoder_can_be_asked_for_again(folder):
    save_tiny(folder / "tiny.safetensors")
    done(*RUN)
    done(*SMALL, "-o", "tiny.png", "--decoder", "tiny.safetensors")
    (folder / "tiny.safetensors").unlink()
    done("t2i", "--replay", "tiny.png", "--decoder", "full", "-o", "b.png", "--no-cache")
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    done(*SMALL, "-o", "c.png", "--decoder", "full")
    assert Path("a.png").read_bytes() == Path("c.png").read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("-o", "there.png", "--decoder", "taef2"), "there.png exists"),
        (("-W", "30", "--decoder", "taef2"), "width"),
        (("-o", "there.png", "--checkpoint", "1", "--preview-decoder", "taef2"), "there.png exists"),
        (("--decoder", "some/repo:wide.safetensors"), "is for latents of 32 channels"),
        (("--memory-limit", "1MB", "--decoder", "taef2"), "no size fits"),
    ],
)
def test_the_rest_of_the_job_is_checked_before_a_decoder_is_fetched(folder, hub, options, message):
    Path("there.png").write_bytes(b"x")
    result = run(*RUN, *options)
    assert result.exit_code == 1
    assert message in error_line(result.stderr)
    assert cached() == []


def test_a_decoder_for_finished_images_and_previews_is_fetched_once(folder, hub):
    options = ("--decoder", "taef2", "--preview-decoder", "taef2", "--checkpoint", "1")
    assert done(*RUN, *options).stderr.count("decoder taef2: ") == 1
    assert cached() == ["taef2.safetensors"]
    assert Path("a-step-001.png").is_file()


@pytest.mark.parametrize("options", [("--preview",), ("--preview", "--quiet"), ("--checkpoint", "2")])
def test_nothing_is_fetched_or_planned_for_previews_that_nobody_sees(folder, hub, options, monkeypatch):
    planned, plan = [], Flux2Pipeline.plan

    def noted(*given, previews, **named):
        planned.append(previews)
        return plan(*given, previews=previews, **named)

    monkeypatch.setattr(Flux2Pipeline, "plan", noted)
    done(*RUN, *options, "--preview-decoder", "taef2")
    assert hub.requests == []
    assert planned == [False]


def test_a_checkpoint_behind_the_last_step_is_told(folder):
    line = "--checkpoint 2 saves nothing, as images take 2 steps\n"
    assert done(*RUN, "--checkpoint", "2").stderr.count(line) == 1
    assert "saves nothing" not in done(*SMALL, "-o", "b.png", "--checkpoint", "1").stderr


def test_a_file_that_can_be_no_decoder_is_called_so(folder):
    Path("notes.txt").write_text("x")
    assert refusal(*RUN, "--decoder", "notes.txt").startswith("notes.txt is named neither .safetensors nor .gguf;")


def test_a_report_tells_the_decoder(folder):
    tiny = save_tiny(folder / "tiny.safetensors")
    report = json.loads(done(*RUN, "--decoder", "tiny.safetensors", "--json").stdout)
    assert report["decoder"] == {"name": tiny.name, "sha256": file_sha256(tiny)}


def test_an_image_that_stays_is_said_to_be_made_with_another_decoder(folder, caplog):
    save_tiny(folder / "tiny.safetensors")
    done(*RUN, "--decoder", "tiny.safetensors")
    done(*RUN, "--skip-existing", "--decoder", "tiny.safetensors")
    assert caplog.messages == []
    done(*RUN, "--skip-existing")
    assert caplog.messages == ["a.png is left as it is, but was made with another decoder"]
