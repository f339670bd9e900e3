"""What image files are called: `-o` with folders and placeholders, and names that would be the same."""

from pathlib import Path

import pytest
from helpers.cli_runner import PROMPT, SMALL, done, refusal, run, tree
from PIL import Image

from flux2_mlx.errors import InputError
from flux2_mlx.image_names import expanded, paths, slug
from flux2_mlx.images import read_settings

SLUG = "a-small-red-circle-on-a-blue-background"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def made(*arguments, prompt=PROMPT):
    """The names that `t2i` with small settings prints, after a look that they are the files that there are."""
    found = done("t2i", prompt, *SMALL, "--seed", "7", *arguments).stdout.splitlines()
    assert sorted(found) == [name for name in tree() if Path(name).is_file()]
    return found


@pytest.mark.parametrize(
    ("output", "name"),
    [
        ("out/", "out/demo-7.png"),
        ("out/new/", "out/new/demo-7.png"),
        ("out/{seed}-{prompt}.png", f"out/7-{SLUG}.png"),
        ("{model}/{width}x{height}/{steps}.webp", "demo/96x64/2.webp"),
        ("{model}/", "demo/demo-7.png"),
        ("out/a.jpg", "out/a.jpg"),
        ("{index}.png", "1.png"),
        ("a{{b}}.png", "a{b}.png"),
    ],
)
def test_a_name_makes_what_it_says(output, name):
    assert made("-W", "96", "-o", output) == [name]


def test_the_size_is_that_of_the_image_that_is_made(folder):
    Image.new("RGB", (100, 70)).save("in.png")
    Image.new("L", (100, 70), "white").save("mask.png")
    arguments = ("i2i", PROMPT, "-m", "demo", "-s", "1", "-i", "in.png", "-o", "{width}x{height}.png", "--quiet")
    assert done(*arguments).stdout == "96x64.png\n"
    assert done(*arguments, "--mask", "mask.png").stdout == "100x70.png\n"


def test_defaults_of_a_model_folder_are_in_the_name(folder, monkeypatch):
    """They are known when it is open."""
    import shutil

    from helpers.cli_runner import DEMO

    shutil.copytree(DEMO, folder / "mine")
    result = done("t2i", PROMPT, "-m", "mine", "-s", "1", "-o", "{model}-{width}.png")
    assert result.stdout == "mine-128.png\n"
    assert "mine-128.png exists" in run("t2i", PROMPT, "-m", "mine", "-s", "1", "-o", "{model}-{width}.png").stderr


def test_a_folder_with_braces_in_its_name(folder):
    (folder / "{a}").mkdir()
    assert made("-o", "{a}") == ["{a}/demo-7.png"]


def test_a_name_below_the_home_folder(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder / "me"))
    for output, name in (("~/new/", "me/new/demo-7.png"), ("~/{seed}.png", "me/7.png"), ("a~.png", "a~.png")):
        done("t2i", PROMPT, *SMALL, "--seed", "7", "-o", output)
        assert (folder / name).is_file()


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (
            "{colour}.png",
            "there is no {colour} in the name '{colour}.png'; use {seed}, {prompt}, {model}, {index}, {width}, "
            "{height}, {steps}, or {{ for a brace",
        ),
        ("{}.png", "there is no {} in the name"),
        ("{seed:09}.png", "the name '{seed:09}.png' gives seed a format, which it can't have; write {seed}"),
        ("{seed!r}.png", "the name '{seed!r}.png' gives seed a format, which it can't have; write {seed}"),
        ("{seed.real}.png", "there is no {seed.real} in the name"),
        ("{seed.png", "can't read the name '{seed.png': expected '}' before end of string; write {{ and }} for braces"),
        ("seed}.png", "can't read the name 'seed}.png': Single '}' encountered in format string; write {{ and }}"),
        ("out/{prompt}", f"can't write out/{SLUG}: the name must end in .png"),
    ],
)
def test_a_name_that_can_not_be_read(output, message):
    assert refusal("t2i", PROMPT, *SMALL, "-o", output).startswith(message)


def test_a_run_that_makes_nothing_leaves_no_folder():
    assert "too large" in refusal("t2i", PROMPT, *SMALL, "-W", "1600000", "-o", "out/a.png")


def test_images_between_the_steps_are_in_the_folder_too():
    done("t2i", PROMPT, *SMALL, "--checkpoint", "1", "-o", "out/a.png")
    assert list(tree()) == ["out", "out/a-step-001.png", "out/a.png"]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("A red fox, in snow!", "a-red-fox-in-snow"),
        ("don't (stop)", "dont-stop"),
        ("雪の中の 赤い狐", "雪の中の-赤い狐"),
        ("Größe: ½ Meter", "größe-½-meter"),
        ("हिन्दी में लोमड़ी", "हिन्दी-में-लोमड़ी"),
        ("ثعلب أحمر", "ثعلب-أحمر"),
        ("Cafe\u0301", "café"),
        ("../../etc/passwd", "etc-passwd"),
        (".hidden", "hidden"),
        ("-o --force", "o-force"),
        ("a\nb\tc\x1b[31m\u202e", "a-b-c-31m"),
        ("CON", "image-con"),
        ("lpt1", "image-lpt1"),
        ("🦊\ufe0f ❄️", "image"),
        ("", "image"),
        ("word " * 100, "-".join(["word"] * 12)),
        ("x" * 300, "x" * 60),
        ("狐" * 300, "狐" * 40),
        ("𠀀" * 300, "𠀀" * 30),
        ("\udcff", "image"),
    ],
)
def test_a_prompt_as_a_name(text, name):
    assert slug(text) == name
    assert len(name.encode()) <= 120


def test_values_are_put_in_as_they_are():
    values = dict.fromkeys(("seed", "model", "index", "width", "height", "steps"), "{prompt}") | {"prompt": "{seed}"}
    assert expanded("{seed}{prompt}", values) == "{prompt}{seed}"


def named(template, *images, listed=False, keep=True):
    """The names for images of these seeds and prompts."""
    values = [{"seed": str(seed), "prompt": prompt, "model": "demo", "index": str(place)}
              for place, (seed, prompt) in enumerate(images, 1)]  # fmt: skip
    return [str(path) for path in paths([template] * len(images), values, listed=listed, keep=keep)]


@pytest.mark.parametrize(
    ("template", "images", "expected"),
    [
        ("a.png", [(1, "x")], ["a.png"]),
        ("a.png", [(1, "x"), (2, "x")], ["a-1.png", "a-2.png"]),
        ("a.png", [(1, "x"), (1, "y")], ["a-x.png", "a-y.png"]),
        ("a.png", [(1, "x"), (2, "x"), (1, "y"), (2, "y")], ["a-1-x.png", "a-2-x.png", "a-1-y.png", "a-2-y.png"]),
        ("a.png", [(1, "x"), (1, "x")], ["a.png", "a-2.png"]),
        ("{prompt}.png", [(1, "x"), (2, "x"), (1, "y")], ["x-1.png", "x-2.png", "y.png"]),
        ("{index}.png", [(1, "x"), (1, "x")], ["1.png", "2.png"]),
        ("{prompt}.png", [(1, "café"), (2, "cafe\u0301")], ["café-1.png", "cafe\u0301-2.png"]),
        ("{prompt}.png", [(1, "ß"), (2, "ss")], ["ß-1.png", "ss-2.png"]),
        (None, [(1, "x"), (1, "x")], ["demo-1.png", "demo-1-2.png"]),
    ],
)
def test_names_are_told_apart(template, images, expected):
    assert named(template, *images) == expected


def test_numbers_go_round_each_other_and_what_is_there(folder):
    (folder / "demo-1-x.png").touch()
    images = [(1, "x"), (1, "x"), (1, "y")]
    assert named(None, *images, listed=True, keep=False) == ["demo-1-x-2.png", "demo-1-x-3.png", "demo-1-y.png"]
    assert named(None, *images, listed=True, keep=True) == ["demo-1-x.png", "demo-1-x-2.png", "demo-1-y.png"]


def test_an_unknown_placeholder_of_one_image():
    with pytest.raises(InputError, match=r"^there is no \{a\} in the name '\{a\}\.png'"):
        named("{a}.png", (1, "x"))


def test_several_seeds_are_an_image_each():
    assert made("-o", "a.png", "--seed", "3") == ["a-7.png", "a-3.png"]
    assert [read_settings(Path(name))["seed"] for name in ("a-7.png", "a-3.png")] == [7, 3]


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("--seed", "5"), ["demo-5-red.png", "demo-6-blue.png"]),
        (("--seed", "5", "--same-seed"), ["demo-5-red.png", "demo-5-blue.png"]),
        (
            ("--seed", "5", "--same-seed", "-n", "2"),
            ["demo-5-red.png", "demo-6-red.png", "demo-5-blue.png", "demo-6-blue.png"],
        ),
        (
            ("--seed", "9", "--seed", "5"),
            ["demo-9-red.png", "demo-5-red.png", "demo-9-blue.png", "demo-5-blue.png"],
        ),
        (("--seed", "5", "-o", "a.png"), ["a-5.png", "a-6.png"]),
        (("--seed", "5", "--same-seed", "-o", "a.png"), ["a-red.png", "a-blue.png"]),
    ],
)
def test_seeds_of_several_prompts(arguments, names):
    result = done("t2i", *SMALL, "--prompts-file", "-", *arguments, stdin="red\nblue\n")
    assert result.stdout.splitlines() == names
    kept = [read_settings(Path(name)) for name in names]
    if "-o" not in arguments:
        assert [f"demo-{image['seed']}-{image['prompt']}.png" for image in kept] == names


def test_a_seed_has_its_own_image_among_others():
    done("t2i", PROMPT, *SMALL, "--seed", "9", "--seed", "4", "-o", "a.png")
    done("t2i", PROMPT, *SMALL, "--seed", "4", "-o", "b.png")
    assert read_settings(Path("a-4.png")) == read_settings(Path("b.png"))
    done("t2i", "--replay", "a-4.png", "-o", "c.png")
    assert Path("b.png").read_bytes() == Path("c.png").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--seed", "1", "--seed", "1"), "--seed 1 is given twice, which would be the same image; leave one out"),
        (("--seed", "1", "--seed", "2", "-n", "3"), "2 seeds are so many images of a prompt; leave out -n 3, or give"),
        (("--seed", "1", "--seed", "-2"), f"seeds must be 0 to {2**64 - 1}, got -2"),
    ],
)
def test_seeds_that_can_not_be_used(arguments, message):
    assert refusal("t2i", PROMPT, *SMALL, *arguments).startswith(message)


def test_the_largest_seed_is_one_of_several():
    assert made("--seed", 2**64 - 1, "-o", "a.png") == ["a-7.png", f"a-{2**64 - 1}.png"]


def test_a_prompt_from_standard_input():
    done("t2i", "-", *SMALL, "-o", "a.png", stdin="a red ring\nwith a star\n")
    assert read_settings(Path("a.png"))["prompt"] == "a red ring\nwith a star"
    assert refusal("t2i", "-", *SMALL, stdin=" \n") == "the prompt is empty; describe the image in words"
    assert refusal("t2i", "-", *SMALL, stdin="a\x1b[2J").startswith("line 1 of - has the control character '\\x1b'")
    assert refusal("t2i", "-", *SMALL, stdin=b"\xff") == "can't read -: it is not UTF-8 text"
