"""Messages are one line, whatever they quote."""

import importlib
import inspect
import json
import pickle
import pkgutil
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from flux2_mlx.convert import Source, write_checkpoint
from helpers.checkpoints import SHALLOW_TEXT, SHALLOW_VARIANT, edit_json, save_small

import flux2_mlx
from flux2_mlx import errors
from flux2_mlx.errors import CheckpointError, Flux2Error
from flux2_mlx.json_files import read_json
from flux2_mlx.verification import Problem

ENDS = ["\n", "\r\n", "\r", "\v", "\f", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"]
KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type)]


def made(kind: type[Flux2Error], message: str, other: object) -> Flux2Error:
    """An error with something `other` in place of whatever else it is made from."""
    count = len(inspect.signature(kind.__init__).parameters) - 2 if inspect.isfunction(kind.__init__) else 0
    return kind(message, *[other] * count)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model in the official layout; not to be changed."""
    return save_small(tmp_path_factory.mktemp("official") / "model", text=SHALLOW_TEXT)


@pytest.mark.parametrize("end", ENDS, ids=ascii)
@pytest.mark.parametrize("kind", KINDS)
def test_every_message_is_one_line(kind, end):
    message = str(made(kind, f"can't read a{end}b", ""))
    assert message.rstrip() == f"can't read a{ascii(end)[1:-1]}b"
    assert message.splitlines() == [message]


def test_a_message_without_line_ends_stays_as_it_is():
    assert str(Flux2Error("Füchse\tim Schnee \x1b[0m")) == "Füchse\tim Schnee \x1b[0m"
    assert (str(Flux2Error()), Flux2Error("a", 1).args) == ("", ("a", 1))


def kinds(base: type[Flux2Error]) -> Iterator[type[Flux2Error]]:
    """A class of errors and all that are made from it in this package."""
    yield base
    for kind in base.__subclasses__():
        yield from (one for one in kinds(kind) if one.__module__.startswith("flux2_mlx."))


def test_every_error_reaches_another_process_with_its_message():
    for module in pkgutil.walk_packages(flux2_mlx.__path__, "flux2_mlx."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    found = list(kinds(Flux2Error))
    assert {"MissingPartsError", "UnindexedError", "MissingError"} <= {kind.__name__ for kind in found}
    for kind in found:
        error = made(kind, "no\nsuch file", lambda: 0)  # which can't be pickled
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again)) == (kind, str(error))
        assert str(again).startswith("no\\nsuch file")


@pytest.mark.parametrize("end", ENDS, ids=ascii)
def test_a_problem_is_one_line(end):
    text = str(Problem(f"vae/model{end}.safetensors", f"bn{end}", f"is not{end}"))
    assert text.splitlines() == [text]


FOREIGN = [
    ("text_encoder/config.json", "model_type", "q\nwen"),
    ("text_encoder/config.json", "model_type", "q" * 5000),
    ("text_encoder/config.json", "layer_types", ["a\nb"]),
    ("text_encoder/config.json", "hidden_act", "a\u2028b"),
    ("text_encoder/config.json", "num_hidden_layers", "a\nb"),
    ("transformer/config.json", "_class_name", "a\nb"),
    ("transformer/config.json", "num_layers", "a\nb"),
    ("vae/config.json", "act_fn", "a\nb"),
    ("vae/config.json", "down_block_types", ["a\rb"]),
    ("scheduler/scheduler_config.json", "time_shift_type", "a\nb"),
    ("model_index.json", "_class_name", "a\nb"),
    ("model_index.json", "vae", ["diffusers", "a\nb"]),
]


@pytest.mark.parametrize(("file", "key", "value"), FOREIGN)
def test_foreign_values_are_quoted(file, key, value, source, tmp_path):
    copy = Path(shutil.copytree(source, tmp_path / "model"))
    edit_json(copy / file, **{key: value})
    with pytest.raises(CheckpointError) as caught:
        Source.open(copy, SHALLOW_VARIANT)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 300 + len(str(copy))


def test_names_of_tensors_and_folders_are_quoted(source, tmp_path):
    copy = Path(shutil.copytree(source, tmp_path / "a\nmodel"))
    file = copy / "vae/diffusion_pytorch_model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["a\nname"] = header.pop("quant_conv.bias")
    header = json.dumps(header).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    target = tmp_path / "converted"
    for use in (
        lambda: write_checkpoint(Source.open(copy, SHALLOW_VARIANT), target),
        lambda: read_json(copy / "none.json"),
        lambda: Source.open(copy / "none"),
    ):
        with pytest.raises(CheckpointError) as caught:
            use()
        assert len(str(caught.value).splitlines()) == 1
        assert "a\\n" in str(caught.value)
