"""Parts of models of other sizes, which are told by their names, what they are and what is needed."""

import re
from pathlib import Path

import pytest
from flux2_mlx.convert import assembled, assembly
from helpers.cli_runner import done
from helpers.headers import write
from helpers.listings import listing, prefixed

from flux2_mlx.components import geometries
from flux2_mlx.config import VARIANTS
from flux2_mlx.errors import CheckpointError
from flux2_mlx.store import demo_folder

DEMO = demo_folder()


def sizes(te: str, variant: str | None, base: str | None = None, vae: str = "klein-9b") -> None:
    nine, other = geometries(VARIANTS["klein-9b"]), geometries(VARIANTS[te])
    configs = {"text_encoder": other["text_encoder"], "vae": geometries(VARIANTS[vae])["vae"]}
    configs |= {} if base else {"transformer": nine["transformer"]}
    places = {name: Path(f"{name}.safetensors") for name in configs}
    assembly._check_sizes(
        Path("x"), geometries(VARIANTS[base]) if base else {}, configs, places, assembly._named(variant, None)
    )


@pytest.mark.parametrize("variant", [None, "klein-9b"])
def test_parts_of_one_size_fit(variant):
    sizes("klein-9b", variant)
    sizes("klein-base-9b", variant, "klein-9b")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("klein-4b", "klein-9b"), "text_encoder.safetensors is the text encoder Qwen3-4B; klein-9b has Qwen3-8B"),
        (("dev", None), "coder Mistral-Small-3.2-24B; klein-9b, klein-base-9b or klein-9b-kv has Qwen3-8B"),
        (("klein-4b", None, "klein-9b"), "text_encoder.safetensors is the text encoder Qwen3-4B; klein-9b, klein-base"),
        (("klein-4b", "klein-4b"), "transformer.safetensors is the transformer of klein-9b, klein-base-9b or klein-9b"),
        (("klein-9b", "klein-9b", None, "demo"), "vae.safetensors is the VAE of demo; give that of klein-9b"),
        (("klein-9b", None, "demo", "demo"), "text_encoder.safetensors is the text encoder of klein-9b, klein-base-9b"),
    ],
)
def test_the_part_of_another_size_is_named(arguments, message):
    with pytest.raises(CheckpointError, match=re.escape(message)):
        sizes(*arguments)


def test_one_file_of_parts_of_two_sizes(folder):
    parts = {"diffusion_model.": "transformer_klein-4b_bfl", "text_encoders.qwen3_8b.": "qwen3-8b", "vae.": "ae_bfl"}
    both = write(
        folder / "x.safetensors", {k: x for p, name in parts.items() for k, x in prefixed(listing(name), p).items()}
    )
    message = f"{both} holds the text encoder Qwen3-8B; klein-4b or klein-base-4b has Qwen3-4B, give that"
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        assembled(both, {})
    told = done("info", both).stdout
    assert (
        "parts are of different models: the transformer of klein-4b or klein-base-4b, the text encoder of klein-9b"
        in told
    )
    assert message in told


@pytest.mark.parametrize(("name", "part"), [("qwen3-8b", "text encoder"), ("ae_bfl", "VAE")])
def test_a_part_alone_is_no_model(name, part, folder):
    """Of several models, of which it says nothing to name one."""
    place = write(folder / "x.safetensors", listing(name))
    others = "VAE" if part == "text encoder" else "text encoder"
    message = (
        f"{place} holds only the {part} of a model; say where its transformer and {others} are, or give it as a part"
    )
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}"):
        assembled(place, {})


def test_parts_of_other_sizes_are_refused(folder):
    header = write(folder / "x.safetensors", listing("transformer_klein-4b_bfl"))
    other = "demo; give that of klein-4b or klein-base-4b"
    with pytest.raises(CheckpointError, match=f"{DEMO} is the text encoder of {other}"):
        assembled(header, {"text_encoder": DEMO})
    with pytest.raises(CheckpointError, match=f"{DEMO / 'text_encoder'} is the text encoder of {other}"):
        assembled(DEMO, {"transformer": header})
