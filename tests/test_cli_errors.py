"""Every wrong input to `t2i` is one line on stderr, exit code 1 and no file."""

import errno
import json
import os
import shutil

import pytest
from helpers.cli_runner import DEMO, PROMPT, SMALL, error_line, make, process, refusal, run, tree
from PIL import Image

from flux2_mlx.config import VARIANTS


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLUX2_MLX_HOME", str(tmp_path / "models"))
    monkeypatch.setattr("flux2_mlx.hub.fetch", lambda *_, **__: pytest.fail("asked for a download"))
    return tmp_path


@pytest.fixture
def damaged(folder):
    """A copy of the demo model, for a test to damage."""
    shutil.copytree(DEMO, folder / "model")
    return folder / "model"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-W", "1000"], "width 1000 must be a positive multiple of 16; nearest are 992 and 1008"),
        (["-H", "65"], "height 65 must be a positive multiple of 16"),
        (["-W", "0"], "width 0 must be a positive multiple of 16; the smallest is 16"),
        (["-H", "-64"], "height -64 must be a positive multiple of 16"),
        (["-W", "1600000"], "size 1600000×64 is too large; the limit is 16777216 pixels, such as 4096×4096"),
        (["-W", "1" + "0" * 40], f"size 1{'0' * 40}×64 is too large"),
        (["-s", "0"], "steps must be 1 to 1000, got 0"),
        (["-s", "-1"], "steps must be 1 to 1000, got -1"),
        (["-s", "1001"], "steps must be 1 to 1000, got 1001"),
        (["-g", "nan"], "guidance must be a number of 0 or more, got nan"),
        (["-g", "inf"], "guidance must be a number of 0 or more, got inf"),
        (["-g", "-1"], "guidance must be a number of 0 or more, got -1.0"),
        (["--seed", "-1"], f"seeds must be 0 to {2**64 - 1}, got -1"),
        (["--seed", str(2**64)], f"seeds must be 0 to {2**64 - 1}, got {2**64}"),
        (["--seed", str(2**64 - 1), "-n", "2"], f"seeds must be 0 to {2**64 - 1}, got {2**64}"),
        (["-n", "0"], "the number of images must be 1 to 100,000, got 0"),
        (["-n", "-3"], "the number of images must be 1 to 100,000, got -3"),
        (["-n", "100001"], "the number of images must be 1 to 100,000, got 100,001"),
    ],
)
@pytest.mark.parametrize("model", ["demo", "klein-9b"])
def test_a_wrong_setting_is_told_before_anything_is_fetched(model, arguments, message):
    assert refusal("t2i", PROMPT, *SMALL, "-m", model, *arguments).startswith(message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory-limit", "nonsense"], "--memory-limit must be a size such as 12GB"),
        (["--memory-limit", "12"], "12 bytes of memory are too few for any run; did you mean 12GB?"),
        (["--memory-limit", "1GB"], "the transformer needs "),
        (["--interpret", "none.png"], "can't read none.png: No such file or directory"),
        (["--interpret", "a.png", "--vision-model", "klein-4b"], "klein-4b has no language model that sees images; "),
        (["--models-dir", "a.png/models"], "can't write a.png/models/klein-9b-bf16: Not a directory"),
        (["--models-dir", "lost"], "can't write lost/klein-9b-bf16: No such file or directory"),
    ],
)
def test_what_is_wrong_is_told_before_a_download(folder, arguments, message):
    Image.new("RGB", (64, 64)).save("a.png")
    (folder / "lost").symlink_to("disk/of/models")
    assert refusal("t2i", PROMPT, *SMALL, "-m", "klein-9b", *arguments).startswith(message)


def test_a_wrong_limit_of_the_cache_is_told_before_a_download(monkeypatch):
    monkeypatch.setenv("FLUX2_MLX_CACHE_BYTES", "abc")
    message = refusal("t2i", PROMPT, *SMALL, "-m", "klein-9b")
    assert message == "FLUX2_MLX_CACHE_BYTES must be a number of bytes, got 'abc'"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt is empty; describe the image in words"),
        (" \n\t\u3000", "the prompt is empty; describe the image in words"),
        ("a" * 100_000, "a prompt of 100000 characters is too long; the limit is 10000, and the model reads its first"),
        ("a \udcff", r"the prompt is not valid text: 'a \udcff'"),
    ],
)
def test_a_prompt_that_can_not_be_used(prompt, message):
    assert refusal("t2i", prompt, *SMALL).startswith(message)


def test_the_longest_prompt_works():
    make("-o", "a.png", prompt="a" * 10_000)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "can't read prompts.txt: No such file or directory"),
        (b"", "prompts.txt holds no prompt; write one a line"),
        (b"\xef\xbb\xbf\n  \n\n", "prompts.txt holds no prompt; write one a line"),
        (b"a red fox\n\xff\xfe\n", "can't read prompts.txt: it is not UTF-8 text"),
        (
            "\ta fox\n".encode("utf-16-le"),
            "line 1 of prompts.txt has the control character '\\x00'; write it as",
        ),
        (b"a red\tfox\r\na blue \x1bdog\n", "line 2 of prompts.txt has the control character '\\x1b'; write it as"),
        (b"red\n" + b"a" * 10_001 + b"\n", "line 2 of prompts.txt: a prompt of 10001 characters is too long"),
        (b"red\n" * 100_001, "the number of images must be 1 to 100,000, got 100,001"),
    ],
)
def test_a_file_of_prompts_that_can_not_be_used(folder, data, message):
    if data is not None:
        (folder / "prompts.txt").write_bytes(data)
    assert refusal("t2i", *SMALL, "--prompts-file", "prompts.txt").startswith(message)


def test_a_folder_is_no_file_of_prompts(folder):
    assert refusal("t2i", *SMALL, "--prompts-file", folder) == f"can't read {folder}: Is a directory"


def test_nothing_on_standard_input():
    assert refusal("t2i", *SMALL, "--prompts-file", "-", stdin="") == "standard input holds no prompt; write one a line"


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("a.bmp", "can't write a.bmp: the name must end in .png, .jpg, .jpeg, .webp, or in / to be a folder"),
        ("missing", "can't write missing: the name must end in .png, .jpg, .jpeg, .webp, or in / to be a folder"),
        ("old.png/a.png", "can't write old.png/a.png: old.png is not a folder"),
        ("old.png/new/a.png", "can't write old.png/new/a.png: old.png is not a folder"),
        ("old.png/", "can't write old.png/demo-7.png: old.png is not a folder"),
        ("old.png", "old.png exists; choose another name or pass --force to replace it"),
        ("a" * 300 + ".png", f"{'a' * 300}.png: File name too long"),
    ],
)
def test_an_output_that_can_not_be_written(folder, output, message):
    (folder / "old.png").write_text("old")
    assert refusal("t2i", PROMPT, *SMALL, "--seed", "7", "-o", output) == message


def test_one_of_several_images_that_exists(folder):
    (folder / "a-8.png").write_text("old")
    assert refusal("t2i", PROMPT, *SMALL, "-n", "3", "--seed", "7", "-o", "a.png").startswith("a-8.png exists;")


def test_a_checkpoint_image_that_exists(folder):
    (folder / "a-step-001.png").write_text("old")
    arguments = ("t2i", PROMPT, *SMALL, "-o", "a.png", "--checkpoint", "1")
    assert refusal(*arguments).startswith("a-step-001.png exists; choose another name or pass --force")
    make("-o", "a.png", "--checkpoint", "1", "--force")
    with Image.open("a-step-001.png") as image:
        assert image.size == (64, 64)


def test_a_folder_without_permission_to_write(folder, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert refusal("t2i", PROMPT, *SMALL, "-o", "a.png") == "can't write a.png: no permission to write in ."


@pytest.mark.parametrize(("name", "kind", "limit"), [("a.webp", "WEBP", 16383), ("a.jpg", "JPEG", 65500)])
def test_a_size_that_the_format_does_not_hold_is_told_before_the_work(name, kind, limit, monkeypatch):
    monkeypatch.setattr("flux2_mlx.pipeline.Flux2Pipeline.run", lambda *_, **__: pytest.fail("started to work"))
    message = refusal("t2i", PROMPT, *SMALL, "-W", "16", "-H", str(limit // 16 * 16 + 16), "-o", name)
    assert message == f"can't write {name}: {kind} has at most {limit} pixels a side; choose .png"


def test_a_full_disk_leaves_no_part_of_an_image(monkeypatch):
    def fail(image, file, **options):
        file.write(b"some bytes")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Image.Image, "save", fail)
    message = refusal("t2i", PROMPT, *SMALL, "--quiet", "--no-cache", "-o", "a.png")
    assert message == "can't write a.png: No space left on device"


@pytest.mark.parametrize("model", ["nonsense", "a b"])
def test_an_unknown_model_lists_the_models(model):
    message = refusal("t2i", PROMPT, "-m", model)
    assert message == (
        f"there is no model or folder {model!r}; choose one of {', '.join(VARIANTS)}, a Hugging Face repo id or a "
        "model folder"
    )


def test_a_home_folder_of_nobody(monkeypatch):
    message = refusal("t2i", PROMPT, *SMALL, "-m", "~nosuchuser/x")
    assert message == "can't tell whose home folder '~nosuchuser/x' starts with; write the folder in full"
    monkeypatch.setenv("FLUX2_MLX_HOME", "~nosuchuser/models")
    assert "'~nosuchuser/models'" in refusal("t2i", PROMPT, *SMALL)


def test_a_folder_that_holds_no_model(folder):
    (folder / "model").mkdir()
    assert "model is no model folder" in refusal("t2i", PROMPT, *SMALL, "-m", "model")
    assert ". is no model folder" in refusal("t2i", PROMPT, *SMALL, "-m", ".")
    assert refusal("t2i", PROMPT, *SMALL, "-m", "").startswith("'' is no model's name; choose one of demo, ")


@pytest.mark.parametrize("component", ["transformer", "text_encoder", "vae"])
@pytest.mark.parametrize("count", [-1, 5])
def test_a_weight_file_of_another_length(damaged, component, count):
    path = damaged / component / "model.safetensors"
    size = path.stat().st_size
    os.truncate(path, size + count)
    message = refusal("t2i", PROMPT, *SMALL, "-m", "model")
    expected = f"model/{component}/model.safetensors has {size + count} bytes where its header says {size}"
    assert message.startswith(expected)


def test_a_checkpoint_of_another_format_version(damaged):
    manifest = json.loads((damaged / "flux2.json").read_text())
    (damaged / "flux2.json").write_text(json.dumps(manifest | {"format_version": 99}))
    message = refusal("t2i", PROMPT, *SMALL, "-m", "model")
    assert message.startswith("model has format version 99, this version of flux2-mlx reads 1; convert the model again")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("flux2.json", b"{", "model/flux2.json is not JSON"),
        ("flux2.json", b"[]", "model/flux2.json holds no JSON object"),
        ("flux2.json", b'{"format_version": 1}', "model/flux2.json is damaged"),
        ("vae/config.json", None, "can't read model/vae/config.json: No such file or directory"),
        ("vae/config.json", b"\xff", "model/vae/config.json is not JSON"),
        ("transformer/config.json", b"{}", "model/transformer/config.json describes no transformer: missing key"),
        ("transformer/model.safetensors", b"", "model/transformer/model.safetensors is not a safetensors file"),
        ("transformer/model.safetensors", b"a" * 100, "model/transformer/model.safetensors is not a safetensors file"),
        ("transformer/model.safetensors", None, "model/transformer is damaged, convert the model again: missing "),
        ("tokenizer/tokenizer.json", None, "model is incomplete: there is no model/tokenizer/tokenizer.json"),
        ("tokenizer/tokenizer.json", b"{}", "model/tokenizer/tokenizer.json is not a tokenizer file"),
    ],
)
def test_a_damaged_model(damaged, name, data, message):
    (damaged / name).unlink()
    if data is not None:
        (damaged / name).write_bytes(data)
    assert refusal("t2i", PROMPT, *SMALL, "-m", "model").startswith(message)


def test_errors_reach_a_real_terminal_as_one_line(folder):
    result = process("t2i", PROMPT, "-m", "demo", "-W", "100", environment=os.environ)
    assert (result.returncode, result.stdout) == (1, "")
    assert error_line(result.stderr) == "width 100 must be a positive multiple of 16; nearest are 96 and 112"
    assert tree() == {}


def test_a_file_as_models_folder_is_wrong_usage(folder):
    (folder / "file").write_text("")
    result = run("t2i", PROMPT, "-m", "org/model", "--models-dir", "file")
    assert result.exit_code == 2
    assert result.stderr.endswith("Directory 'file' is a file.\n")
