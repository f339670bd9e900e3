"""`--prompts-file`: lines of text, JSON lines and tables, and the settings that a prompt has of its own."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.cli_runner import PROMPT, SMALL, difference, done, make, pixels, refusal, run

from flux2_mlx import Flux2Pipeline, request
from flux2_mlx.cli.prompts import Prompt, named, read_prompts
from flux2_mlx.errors import InputError
from flux2_mlx.images import read_settings


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def prompts(name, text):
    """What is read from a file of this name and text, by line and otherwise as keywords."""
    Path(name).write_text(text, encoding="utf-8")
    return read_prompts(name)


LINES = ('{"prompt": "red", "seed": 3, "width": 32}', '{"prompt": "blue", "steps": 1, "guidance": 2, "images": 2}')
TABLE = "prompt,seed,width,steps,guidance,images\nred,3,32,,,\nblue,,,1,2.0,2\n"


@pytest.mark.parametrize(
    ("name", "text", "lines"),
    [
        ("a.jsonl", "# a comment\n\n" + "\n".join(LINES), (3, 4)),
        ("a.txt", "\ufeff" + "\r\n\r\n  ".join(LINES), (1, 3)),
        ("a.csv", TABLE, (2, 3)),
        ("a.CSV", "# a comment\n" + TABLE.replace(",", ";").replace("red", '"red"').upper().replace("RED", "red")
         .replace("BLUE", "blue"), (3, 4)),
        ("a.csv", TABLE.replace(",", "\t").replace("\n", ",\n").replace(",\n", "\t\t\n\n"), (3, 5)),
    ],
)  # fmt: skip
def test_settings_of_a_line(name, text, lines):
    first, second = (f"line {line} of {name}" for line in lines)
    assert prompts(name, text) == [
        Prompt("red", first, seed=3, width=32),
        Prompt("blue", second, steps=1, guidance=2, images=2),
    ]


def test_every_setting_of_a_line():
    line = {
        "prompt": "狐\nfox",
        "negative_prompt": "dog",
        "seed": 2**64 - 1,
        "images": 2,
        "size": "64 x 32",
        "steps": 1,
    }
    (prompt,) = prompts("a.jsonl", json.dumps(line | {"guidance": 1.5, "step_cache": 0, "output": "a.png"}))
    assert prompt == Prompt(
        "狐\nfox",
        "line 1 of a.jsonl",
        "dog",
        2**64 - 1,
        2,
        width=64,
        height=32,
        steps=1,
        guidance=1.5,
        step_cache=0,
        output="a.png",
    )


def test_a_cell_may_hold_a_comma_and_lines():
    found = prompts("a.csv", 'prompt,size\n"red, and\nblue",64x32\n# nothing,\ngreen,\n')
    assert [(prompt.text, prompt.width, prompt.line) for prompt in found] == [
        ("red, and\nblue", 64, "line 3 of a.csv"),
        ("green", None, "line 5 of a.csv"),
    ]


@pytest.mark.parametrize(
    "line",
    [
        "{red|blue} fox",
        '{"scene": "a forest", "subjects": [{"type": "fox"}]}',
        '"quoted"',
        '{"scene": 1, "scene": 2}',
        "prompt",
        "prompt, please",
        "seed,steps",
        "[1, 2]",
        "5",
    ],
)
def test_a_line_of_text_is_a_prompt(line):
    """Lists of words in braces, and the JSON that FLUX.2 is prompted with, among them."""
    assert prompts("a.txt", f"# not this\n{line}\n") == [Prompt(line, "line 2 of a.txt")]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": "b", "sed": 1}', "line 2 of a.jsonl has an unknown key 'sed'; known"),
        ("a.jsonl", '{"seed": ' + "1" * 5000 + "}", "line 1 of a.jsonl is no JSON (a number has 5,000 digits, of"),
        ("a.jsonl", '{"prompt": "a"}\nb', "line 2 of a.jsonl is no JSON (Expecting value: line 1 column 1 (char 0));"),
        (
            "a.jsonl",
            '{"prompt": "a", "lora": "x.safetensors:0.5"}',
            "line 1 of a.jsonl has the key 'lora', but all prompts have the same adapters; use --lora",
        ),
        ("a.json", '[\n{"prompt": "a"}]', "line 1 of a.json is no JSON ("),
        ("a.jsonl", "[1]", "line 1 of a.jsonl is no JSON object; write one such as {"),
        ("a.jsonl", "[" * 100_000, "line 1 of a.jsonl is no JSON (it is nested too deeply); write"),
        ("a.jsonl", '{"seed": 1}', "line 1 of a.jsonl: there is no prompt"),
        ("a.jsonl", '{"prompt": " "}', "line 1 of a.jsonl: the prompt is empty; describe the image in words"),
        ("a.jsonl", '{"prompt": ["a"]}', 'line 1 of a.jsonl: prompt must be text, got ["a"]'),
        ("a.jsonl", '{"prompt": "a", "seed": "1"}', 'line 1 of a.jsonl: seed must be a whole number, got "1"'),
        ("a.jsonl", '{"prompt": "a", "seed": 1.5}', "line 1 of a.jsonl: seed must be a whole number, got 1.5"),
        ("a.jsonl", '{"prompt": "a", "seed": true}', "line 1 of a.jsonl: seed must be a whole number, got true"),
        ("a.jsonl", '{"prompt": "a", "seed": -1}', f"line 1 of a.jsonl: seeds must be 0 to {2**64 - 1}, got -1"),
        ("a.jsonl", '{"prompt": "a", "guidance": "4"}', 'line 1 of a.jsonl: guidance must be a number, got "4"'),
        ("a.jsonl", '{"prompt": "a", "guidance": NaN}', "line 1 of a.jsonl: guidance must be a number of 0 or more"),
        ("a.jsonl", '{"prompt": "a", "images": 0}', "line 1 of a.jsonl: images must be 1 or more, got 0"),
        ("a.jsonl", '{"prompt": "a", "images": 100001}', "the number of images must be 1 to 100,000, got 100,001"),
        ("a.jsonl", '{"prompt": "a", "size": "big"}', "line 1 of a.jsonl: size must be such as 1024x768, in place of"),
        ("a.jsonl", '{"prompt": "a", "size": "32x32", "width": 32}', "line 1 of a.jsonl: size must be such as "),
        ("a.jsonl", '\n{"prompt": "a", "width": 1000}', "line 2 of a.jsonl: width 1000 must be a positive multiple of"),
        ("a.jsonl", '{"prompt": "a", "steps": 0}', "line 1 of a.jsonl: steps must be 1 to 1000, got 0"),
        ("a.jsonl", '{"prompt": "a\\u0000"}', "line 1 of a.jsonl: prompt has the control character '\\x00'"),
        ("a.jsonl", '{"prompt": "a\\ud800"}', r"line 1 of a.jsonl: the prompt is not valid text: 'a\ud800'"),
        ("a.jsonl", '{"prompt": "a", "output": "{x}.png"}', "line 1 of a.jsonl: there is no {x} in the name '{x}"),
        ("a.txt", 'red\n{"prompt": "a",}', "line 2 of a.txt is no JSON object ("),
        ("a.txt", '{\n"prompt": "a"\n}', "line 1 of a.txt is no JSON object ("),
        ("a.txt", '{"promt": "a", "seed": 1}', "line 1 of a.txt has an unknown key 'promt'; known are prompt, "),
        ("a.csv", "a red fox\na blue dog\n", "line 1 of a.csv has an unknown column 'a red fox'; known are prompt"),
        ("a.csv", "seed\n1\n", "line 1 of a.csv names no column prompt"),
        ("a.csv", "prompt,seed,seed\na,1,2\n", "line 1 of a.csv names the column seed twice"),
        ("a.csv", "prompt,seed\na,1\nb,x\n", "line 3 of a.csv: seed must be a whole number, got 'x'"),
        ("a.csv", "prompt,seed\n\na, b,1\n", "line 3 of a.csv has 3 cells, but there are 2 columns; quote commas"),
        ("a.csv", "prompt,seed\n,1\n", "line 2 of a.csv: there is no prompt"),
        ("a.csv", 'prompt\n"a\n', "line 2 of a.csv is no line of a table: "),
        ("a.csv", "prompt\n", "a.csv holds no prompt; write one a line"),
        ("a.txt", "# head\nprompt,seed\na,1\n", "a.txt begins with the head of a table, 'prompt,seed'; give it a "),
        ("a.txt", '"Prompt"; steps\n', "a.txt begins with the head of a table, '\"Prompt\"; steps'; give it a name"),
        ("a.jsonl", '{"prompt": "a", "seed": 1, "seed": 2}', "line 1 of a.jsonl is no JSON (seed stands there twice)"),
        ("a.txt", '{"prompt": "a", "prompt": "b"}', "line 1 of a.txt is no JSON object (prompt stands there twice)"),
        ("a.jsonl", '{"prompt": "a", "images": ["狐.png"]}', 'line 1 of a.jsonl: images is how many to make, a whole '
         'number, not ["狐.png"]; pictures to edit are given by -i'),
        ("a.jsonl", '{"prompt": "a", "images": "2"}', "line 1 of a.jsonl: images is how many to make, a whole number"),
        ("a.txt", "# only\n\n# this\n", "a.txt holds no prompt; write one a line"),
    ],
)  # fmt: skip
def test_a_file_that_can_not_be_used(name, text, message):
    Path(name).write_text(text, encoding="utf-8")
    assert refusal("t2i", *SMALL, "--prompts-file", name).startswith(message)


def test_images_that_do_not_go_with_the_seeds():
    Path("a.jsonl").write_text('{"prompt": "a", "images": 3}')
    message = refusal("t2i", *SMALL, "--prompts-file", "a.jsonl", "--seed", "1", "--seed", "2")
    assert message == "line 1 of a.jsonl: 3 images don't go with 2 seeds; give a seed here, or one"


MIXED = """\
{"prompt": "red", "seed": 3}
{"prompt": "blue", "size": "32x48", "images": 2}
{"prompt": "green", "output": "{prompt}-{width}.jpg"}
{"prompt": "white", "height": 48, "width": 32, "steps": 3}
"""


@pytest.fixture
def mixed():
    """The arguments of a run of four prompts with three different settings."""
    Path("mixed.jsonl").write_text(MIXED)
    return ("t2i", *SMALL, "--prompts-file", "mixed.jsonl", "--seed", "10", "-o", "out/")


@pytest.fixture
def runs(monkeypatch):
    """The seeds of each run of the pipeline so far."""
    seeds, run = [], Flux2Pipeline.run

    def recorded(pipe, request, *arguments, **settings):
        seeds.append(request.seeds)
        return run(pipe, request, *arguments, **settings)

    monkeypatch.setattr(Flux2Pipeline, "run", recorded)
    return seeds


NAMES = [
    "out/demo-3-red.png",
    "out/green-64.jpg",
    "out/demo-11-blue.png",
    "out/demo-12-blue.png",
    "out/demo-14-white.png",
]


def test_prompts_of_equal_settings_share_a_run(mixed, runs):
    assert done(*mixed).stdout.splitlines() == NAMES
    assert runs == [(3, 13), (11, 12), (14,)]
    kept = [read_settings(Path(name)) for name in NAMES]
    assert [(x["prompt"], x["seed"], x["width"], x["height"], x["steps"]) for x in kept] == [
        ("red", 3, 64, 64, 2),
        ("green", 13, 64, 64, 2),
        ("blue", 11, 32, 48, 2),
        ("blue", 12, 32, 48, 2),
        ("white", 14, 32, 48, 3),
    ]
    make("--seed", "12", "-W", "32", "-H", "48", "-o", "alone.png", prompt="blue")
    assert difference(NAMES[3], "alone.png") < 0.5
    assert pixels(NAMES[4]).shape == (48, 32, 3)


def test_the_report_says_of_each_image_what_differs(mixed):
    report = json.loads(done(*mixed, "--json", "--quiet").stdout)
    assert report["images"][0] == {"path": NAMES[0], "seed": 3, "prompt": "red", "width": 64, "height": 64, "steps": 2}
    assert [image["path"] for image in report["images"]] == [NAMES[0], NAMES[2], NAMES[3], NAMES[1], NAMES[4]]
    assert report["prompt"] == ["red", "blue", "green", "white"]
    shared = {name: report[name] for name in ("width", "height", "steps", "guidance")}
    assert shared == {"width": None, "height": None, "steps": None, "guidance": 1.0}
    assert [phase["name"] for phase in report["phases"]].count("transformer") == 3
    assert report["seconds"] >= sum(phase["seconds"] for phase in report["phases"])


def test_what_is_there_of_several_runs_is_skipped(mixed, runs, caplog):
    done(*mixed)
    before = {name: (Path(name).read_bytes(), read_settings(Path(name))) for name in NAMES}
    missing = [NAMES[0], NAMES[3]]
    for name in missing:
        Path(name).unlink()
    runs.clear()
    assert done(*mixed, "--skip-existing").stdout.splitlines() == missing
    assert runs == [(3,), (12,)]
    assert caplog.messages == []
    for name, (data, settings) in before.items():
        assert read_settings(Path(name)) == settings
        assert name in missing or Path(name).read_bytes() == data
    report = json.loads(done(*mixed, "--skip-existing", "--json", "--quiet").stdout)
    assert (report["images"], len(report["skipped"])) == ([], 5)


def test_several_runs_that_are_cut_short_keep_what_is_finished(mixed, monkeypatch):
    run_pipe, count = Flux2Pipeline.run, []

    def interrupted(pipe, *arguments, **settings):
        count.append(1)
        if len(count) == 2:
            raise KeyboardInterrupt
        return run_pipe(pipe, *arguments, **settings)

    monkeypatch.setattr(Flux2Pipeline, "run", interrupted)
    result = run(*mixed, "--json", "--quiet")
    report = json.loads(result.stdout)
    assert (result.exit_code, report["interrupted"]) == (130, True)
    assert [image["path"] for image in report["images"]] == NAMES[:2]
    assert sorted(str(path) for path in Path("out").iterdir()) == sorted(NAMES[:2])


def test_an_own_size_does_not_go_with_a_mask():
    from PIL import Image

    Image.new("RGB", (64, 64)).save("in.png")
    Path("a.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "width": 32}')
    message = refusal("i2i", "-m", "demo", "-i", "in.png", "--strength", "0.5", "--prompts-file", "a.jsonl")
    assert message == "line 2 of a.jsonl: an image that is painted over keeps its size; leave width and height out"


def test_a_line_is_named_by_the_library_s_error():
    with pytest.raises(InputError, match=r"^line 2 of a\.txt: it failed$"), named("line 2 of a.txt"):
        raise InputError("it failed")
    with pytest.raises(InputError, match=r"^it failed$"), named(None):
        raise InputError("it failed")


def test_more_images_than_a_run_may_have_are_made_in_several(monkeypatch):
    monkeypatch.setattr(request, "MAX_IMAGES", 2)
    paths = done("t2i", PROMPT, *SMALL, "-n", "5", "--seed", "1", "-o", "a.png").stdout.splitlines()
    assert paths == [f"a-{seed}.png" for seed in range(1, 6)]
    assert np.array_equal(pixels("a-5.png"), pixels(make("--seed", "5", "-o", "b.png")[0]))


@pytest.mark.parametrize("head", ["prompt,seed", "Seed;Prompt", '"prompt"\tseed'])
def test_a_table_on_standard_input(head):
    separator = head.replace('"', "").lower().replace("prompt", "").replace("seed", "")
    row = separator.join(["red", "3"] if head.startswith(("p", '"')) else ["3", "red"])
    result = done("t2i", *SMALL, "--prompts-file", "-", "-o", "a/", stdin=f"# colours\n{head}\n{row}\n")
    assert result.stdout == "a/demo-3-red.png\n"


def test_nothing_on_standard_input():
    message = "standard input holds no prompt; write one a line"
    assert refusal("t2i", *SMALL, "--prompts-file", "-", stdin="\n# nothing\n") == message
