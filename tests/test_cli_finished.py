"""What a run of many images leaves behind when it is cut short, and what the next one makes of that."""

import json
from pathlib import Path

import pytest
from helpers.cli_runner import PROMPT, SMALL, done, make, refusal, run, tree
from PIL import Image

from flux2_mlx import Flux2Pipeline, memory
from flux2_mlx.checkpoint import Component
from flux2_mlx.images import read_settings
from flux2_mlx.run import Run


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLUX2_MLX_HOME", str(tmp_path.with_name(f"{tmp_path.name}-models")))
    monkeypatch.setattr(memory, "_TOKENS_PER_PASS", 1)  # an image a pass
    return tmp_path


@pytest.fixture
def cut(monkeypatch):
    """Let something be raised in place of the denoising of an image; None: nothing any more."""
    whole, planned = Run._stepped, {}

    def cut_at(place: int | None, error: BaseException | None = None) -> None:
        planned.clear()
        planned[place] = error

    def stepped(run, steps, images, *further):
        tokens = whole(run, steps, images, *further)
        for place in images:
            if place in planned:
                raise planned[place]
        return tokens

    monkeypatch.setattr(Run, "_stepped", stepped)
    return cut_at


ARGUMENTS = ("t2i", PROMPT, *SMALL, "-n", "4", "--seed", "4", "-o", "a.png")


@pytest.mark.parametrize(
    ("error", "code"), [(KeyboardInterrupt(), 130), (OSError(28, "No space left on device"), 1), (MemoryError(), None)]
)
def test_what_is_finished_stays_and_is_named(error, code, cut):
    cut(2, error)
    if code is None:
        with pytest.raises(MemoryError):
            run(*ARGUMENTS)
    else:
        result = run(*ARGUMENTS)
        assert (result.exit_code, result.stdout) == (code, "a-4.png\na-5.png\n"), result.output
    assert list(tree()) == ["a-4.png", "a-5.png"]
    assert [read_settings(path)["seed"] for path in ("a-4.png", "a-5.png")] == [4, 5]


def test_what_is_finished_is_in_the_report(cut):
    cut(2, KeyboardInterrupt())
    result = run(*ARGUMENTS, "--json", "--quiet")
    report = json.loads(result.stdout)
    assert (result.exit_code, report["interrupted"]) == (130, True)
    assert report["images"] == [{"path": "a-4.png", "seed": 4}, {"path": "a-5.png", "seed": 5}]
    assert [phase["name"] for phase in report["phases"]] == ["text_encoder", "transformer", "vae"]


def test_a_report_of_nothing_is_not_printed(cut):
    cut(0, KeyboardInterrupt())
    assert run(*ARGUMENTS, "--json", "--quiet").stdout == ""


def test_a_second_run_makes_what_is_missing(caplog):
    expected = [path.read_bytes() for path in make("-n", "4", "--seed", "4", "-o", "b.png")]
    for place in (0, 2):
        Path(f"a-{4 + place}.png").write_bytes(expected[place])
    result = done(*ARGUMENTS, "--skip-existing")
    assert result.stdout == "a-5.png\na-7.png\n"
    assert "is left as it is" not in caplog.text
    assert [Path(f"a-{seed}.png").read_bytes() for seed in range(4, 8)] == expected


def test_a_second_run_with_several_prompts_keeps_them_apart():
    Path("prompts.txt").write_text("a red ring\na blue star\na white square\n")
    arguments = ("t2i", *SMALL, "--prompts-file", "prompts.txt", "-n", "2", "--seed", "1", "--json", "--quiet", "-o")
    first = json.loads(done(*arguments, "a.png").stdout)
    expected = {image["path"]: Path(image["path"]).read_bytes() for image in first["images"]}
    for seed in (2, 3, 6):
        Path(f"a-{seed}.png").unlink()
    second = json.loads(done(*arguments, "a.png", "--skip-existing").stdout)
    assert [image["seed"] for image in second["images"]] == [2, 3, 6]
    assert [image["seed"] for image in second["skipped"]] == [1, 4, 5]
    assert second["prompt"] == ["a red ring", "a blue star", "a white square"]
    assert {path: Path(path).read_bytes() for path in expected} == expected


def test_nothing_is_loaded_where_nothing_is_missing(monkeypatch):
    make("--seed", "4", "-o", "a.png")
    monkeypatch.setattr(Component, "load", None)
    arguments = ("t2i", PROMPT, *SMALL, "--seed", "4", "-o", "a.png", "--skip-existing")
    assert done(*arguments, "--quiet").output == ""
    report = json.loads(done(*arguments, "--json", "--quiet").stdout)
    assert (report["images"], report["skipped"]) == ([], [{"path": "a.png", "seed": 4}])


@pytest.mark.parametrize(
    ("arguments", "changed"),
    [
        (("t2i", "a star", "--seed", "4"), "prompt"),
        (("t2i", PROMPT, "--seed", "5"), "seed"),
        (("t2i", PROMPT, "--seed", "4", "-W", "32", "-s", "3"), "width, steps"),
        (("t2i", PROMPT, "--seed", "4", "--text-quant", "qint8"), "quant of the text encoder"),
        (("i2i", PROMPT, "--seed", "4", "-i", "in.png"), "pictures"),
    ],
)
def test_what_is_skipped_but_was_made_from_something_else_is_told(arguments, changed, caplog):
    Image.new("RGB", (64, 64), "teal").save("in.png")
    make("--seed", "4", "-o", "a.png")
    assert done(*arguments[:2], *SMALL, *arguments[2:], "-o", "a.png", "--skip-existing").stdout == ""
    assert caplog.messages == [f"a.png is left as it is, but was made with another {changed}"]


def test_what_is_skipped_and_does_not_say_what_it_is_is_told(caplog):
    make("--seed", "4", "-o", "a.png", "--no-metadata")
    arguments = ("t2i", PROMPT, *SMALL, "--seed", "4", "-o", "a.png", "--skip-existing")
    done(*arguments)
    assert caplog.messages == ["a.png is left as it is, but does not say what it was made from"]
    caplog.clear()
    done(*arguments, "--no-metadata")
    assert caplog.messages == []


def test_an_empty_file_is_not_finished(caplog):
    (expected,) = make("--seed", "4", "-o", "b.png")
    Path("a.png").touch()
    arguments = ("t2i", PROMPT, *SMALL, "--seed", "4", "-o", "a.png", "--skip-existing")
    assert done(*arguments).stdout == "a.png\n"
    assert caplog.messages == ["a.png is empty and is made again"]
    assert Path("a.png").read_bytes() == expected.read_bytes()
    assert sorted(tree()) == ["a.png", "b.png"]


@pytest.mark.parametrize("damage", [lambda data: data[:-400], lambda data: data[:10], lambda data: b"my notes"])
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_what_is_no_whole_image_is_neither_finished_nor_replaced(suffix, damage, monkeypatch):
    (path,) = make("--seed", "4", "-o", f"a.{suffix}")
    path.write_bytes(damage(path.read_bytes()))
    before = tree()
    monkeypatch.setattr(Component, "load", None)
    message = refusal("t2i", PROMPT, *SMALL, "--seed", "4", "-o", f"a.{suffix}", "--skip-existing")
    assert message.startswith(f"can't read a.{suffix}: ")
    assert message.endswith("; remove it to have it made again")
    assert tree() == before


def test_images_between_the_steps_that_are_there_are_skipped_too(cut):
    cut(1, KeyboardInterrupt())
    arguments = ("t2i", PROMPT, *SMALL, "-n", "2", "--seed", "4", "--checkpoint", "1", "-o", "a.png")
    assert run(*arguments).exit_code == 130
    before = tree()
    assert list(before) == ["a-4-step-001.png", "a-4.png", "a-5-step-001.png"]
    cut(None)
    assert done(*arguments, "--skip-existing").stdout == "a-5.png\n"
    assert {name: data for name, data in tree().items() if name != "a-5.png"} == before


def test_force_and_skip_existing_exclude_each_other():
    result = run(*ARGUMENTS, "--force", "--skip-existing")
    assert result.exit_code == 2
    assert "give one of them" in result.stderr


def appearing(monkeypatch, *names: str) -> None:
    """Let another program write files just before a run's first image is saved."""
    run = Flux2Pipeline.run

    def late(pipe, *arguments, **settings):
        for name in names:
            Path(name).write_text("another program's")
        return run(pipe, *arguments, **settings)

    monkeypatch.setattr(Flux2Pipeline, "run", late)


def test_a_file_that_appears_during_the_run_stays_and_so_does_the_image(monkeypatch, caplog):
    appearing(monkeypatch, "a.png", "a-2.png")
    result = done("t2i", PROMPT, *SMALL, "--seed", "4", "-o", "a.png")
    assert result.stdout == "a-3.png\n"
    assert "a.png has appeared meanwhile and stays as it is; the image is a-3.png" in caplog.text
    assert Path("a.png").read_text() == Path("a-2.png").read_text() == "another program's"
    assert read_settings("a-3.png")["seed"] == 4


def test_the_report_names_the_file_that_was_really_written(monkeypatch):
    appearing(monkeypatch, "a.png")
    report = json.loads(done("t2i", PROMPT, *SMALL, "--seed", "4", "-o", "a.png", "--json", "--quiet").stdout)
    assert report["images"] == [{"path": "a-2.png", "seed": 4}]


def test_with_force_it_is_replaced(monkeypatch):
    appearing(monkeypatch, "a.png")
    assert done("t2i", PROMPT, *SMALL, "--seed", "4", "-o", "a.png", "--force").stdout == "a.png\n"
    assert read_settings("a.png")["seed"] == 4


def test_images_between_the_steps_replace_nothing_either(monkeypatch):
    appearing(monkeypatch, "a-step-001.png")
    done("t2i", PROMPT, *SMALL, "--seed", "4", "--checkpoint", "1", "-o", "a.png")
    assert Path("a-step-001.png").read_text() == "another program's"
    assert Path("a-step-001-2.png").is_file()


def test_a_name_that_is_not_given_is_a_free_one(folder):
    assert make("--seed", "4") == [Path("demo-4.png")]
    assert make("--seed", "4") == [Path("demo-4-2.png")]
    assert make("--seed", "4", "-n", "2") == [Path("demo-4-3.png"), Path("demo-5.png")]
    (folder / "out").mkdir()
    assert [make("--seed", "4", "-o", "out") for _ in range(2)] == [
        [Path("out/demo-4.png")],
        [Path("out/demo-4-2.png")],
    ]
    assert make("--seed", "4", "--force") == [Path("demo-4.png")]
    assert refusal("t2i", PROMPT, *SMALL, "--seed", "4", "-o", "demo-4.png").startswith("demo-4.png exists")


def test_an_edit_that_is_cut_short_leaves_what_is_finished(cut):
    Image.new("RGB", (64, 64), "teal").save("in.png")
    cut(1, KeyboardInterrupt())
    result = run("i2i", PROMPT, "-m", "demo", "-s", "2", "-i", "in.png", "-n", "3", "--seed", "4", "-o", "a.png")
    assert (result.exit_code, result.stdout) == (130, "a-4.png\n"), result.output
