"""What tells which model it is: the transformer, its `model_index.json`, metadata and names, and no other part."""

import json
from dataclasses import replace

import pytest
from flux2_mlx.convert import assembled
from helpers.checkpoints import write_tokenizer
from helpers.cli_runner import done
from helpers.headers import header, write, write_gguf
from helpers.hub_client import using
from helpers.hub_server import HubServer
from helpers.listings import listing
from helpers.official_configs import autoencoder, qwen3, transformer_2d

from flux2_mlx.config import VARIANTS
from flux2_mlx.errors import CheckpointError
from flux2_mlx.store import conversion, demo_folder
from flux2_mlx.store.parts import Remote, files_of

pytestmark = pytest.mark.usefixtures("folder")
FOUR, BASE = VARIANTS["klein-4b"], VARIANTS["klein-base-4b"]
DEMO = demo_folder()


def whole(folder, distilled):
    """A model of klein-4b's size in the layout of diffusers, without payload."""
    index = {"_class_name": "Flux2KleinPipeline", "is_distilled": distilled}
    parts = {
        "transformer": (transformer_2d(FOUR.transformer), "transformer_klein-4b_diffusers"),
        "text_encoder": (qwen3(FOUR.text), "qwen3-4b"),
        "vae": (autoencoder(FOUR.vae), "vae_diffusers"),
    }
    for name, (config, names) in parts.items():
        stem = "model" if name == "text_encoder" else "diffusion_pytorch_model"
        write(folder / name / f"{stem}.safetensors", listing(names))
        (folder / name / "config.json").write_text(json.dumps(config))
    schedule = folder / "scheduler" / "scheduler_config.json"
    schedule.parent.mkdir()
    schedule.write_bytes((DEMO / "scheduler" / "scheduler_config.json").read_bytes())
    write_tokenizer(folder / "tokenizer")
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def others(folder):
    """Parts whose names and metadata speak of other models."""
    title = {"modelspec.title": "Qwen3 4B Base"}
    return {
        "text_encoder": write(folder / "te" / "klein-base-4b.safetensors", listing("qwen3-4b"), title),
        "vae": write(folder / "vae" / "klein-9b-kv-vae.safetensors", listing("ae_bfl")),
    }


def fox(folder, name="red-fox"):
    return write(folder / "files" / f"{name}.safetensors", listing("transformer_klein-4b_bfl"))


@pytest.mark.parametrize(("distilled", "row"), [(True, FOUR), (False, BASE)])
@pytest.mark.parametrize("given", [("vae",), ("text_encoder",), ("text_encoder", "vae")])
def test_a_whole_model_stays_what_it_is_with_other_parts(distilled, row, given, others, folder):
    place = whole(folder / "klein-base-9b-fox", distilled)
    assert assembled(place, {name: others[name] for name in given}).variant == row


def test_a_checkpoint_stays_what_it_is_with_other_parts(monkeypatch):
    monkeypatch.setitem(VARIANTS, "another", replace(VARIANTS["demo"], name="another"))
    assert assembled(DEMO, {"vae": DEMO / "vae"}).variant.name == "demo"


def test_parts_of_several_models_do_not_tell(others, folder):
    given = others | {"tokenizer": write_tokenizer(folder / "tokenizer")}
    with pytest.raises(CheckpointError, match=r"can't tell which model .*red-fox.safetensors is"):
        assembled(fox(folder), given)
    assert assembled(fox(folder, "flux-2-klein-4b"), given).variant == FOUR
    assert assembled(others["text_encoder"], {**given, "transformer": fox(folder, "flux-2-klein-4b")}).variant == FOUR


@pytest.mark.parametrize("inside", ["", "transformer", "transformer/diffusion_pytorch_model.safetensors"])
def test_the_index_of_a_transformer_comes_before_names(inside, others, folder):
    place = whole(folder / "klein-4b", distilled=False) / inside
    given = others | {"tokenizer": folder / "klein-4b" / "tokenizer", "transformer": place}
    assert assembled(others["text_encoder"], given).variant == BASE
    assert assembled(whole(folder / "other", distilled=True), {"transformer": place}).variant == BASE


def test_a_transformer_takes_the_place_of_a_model_s(others, folder, monkeypatch):
    given = others | {"tokenizer": write_tokenizer(folder / "tokenizer")}
    for row in (FOUR, BASE):
        assert assembled(fox(folder), given, replaced=row).variant == row
    assert assembled(fox(folder, "flux-2-klein-base-4b"), given, replaced=FOUR).variant == BASE
    place = whole(folder / "fox", distilled=False) / "transformer"
    assert assembled(others["vae"], given | {"transformer": place}, replaced=FOUR).variant == BASE
    with pytest.raises(
        CheckpointError, match=r"red-fox\.safetensors is the transformer of klein-4b or klein-base-4b; gi"
    ):
        assembled(fox(folder), given, replaced=VARIANTS["klein-9b"])
    wanted = []
    monkeypatch.setattr(conversion, "make_checkpoint", lambda *args, **_: wanted.append(args[2]))
    parts = {"transformer": str(place)}
    for said, own in ((None, parts), ("klein-base-4b", parts), (None, {})):
        conversion.convert_model("klein-4b", folder / "made", variant=said, parts=own)
    assert [(x.variant, x.replaced) for x in wanted] == [(None, FOUR), ("klein-base-4b", FOUR), ("klein-4b", FOUR)]


def test_without_an_index_the_name_of_the_folder_tells(others, folder):
    place = whole(folder / "klein-base-4b-fox", distilled=True)
    (place / "model_index.json").unlink()
    assert assembled(whole(folder / "other", distilled=True), {"transformer": place}).variant == BASE


def test_the_index_of_a_repo_comes_before_its_name(folder):
    place = whole(folder / "fox", distilled=False)
    names = [path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()]
    for path, part in (("", "transformer"), ("transformer", None)):
        files = files_of(Remote("me/klein-4b", path), part, names)
        assert {*files} == {"model_index.json", *(x for x in names if x.startswith("transformer/"))}
    assert "model_index.json" not in files_of(Remote("me/klein-4b"), "vae", names)


def test_a_transformer_on_the_hub_is_told_by_its_index(folder):
    file, index = "transformer/diffusion_pytorch_model.safetensors", b'{"_class_name": "Flux2KleinPipeline"}'
    infos = listing("transformer_klein-4b_bfl")
    weights = {file: header(infos) + bytes(2**17), "model_index.json": index}
    with HubServer({"me/klein-4b": weights}) as hub, using(hub, folder / "home"):
        size = len(header(infos)) + sum(info.nbytes for info in infos.values())
        listed = [hub.repos["me/klein-4b"].sibling(name) for name in weights]
        listed[0] |= (
            {"size": size, "lfs": listed[0]["lfs"] | {"size": size}} if listed[0].get("lfs") else {"size": size}
        )
        hub.publish({"sha": hub.repos["me/klein-4b"].commit, "siblings": listed})
        first = done("info", "me/klein-4b:transformer").stdout.splitlines()[0]
    assert first == "me/klein-4b:transformer: transformer of FLUX.2 klein-base-4b"


def test_an_encoder_is_told_to_be_for_all_models_that_it_fits(folder):
    path = write_gguf(folder / "Qwen3-4B-Base-Q8_0.gguf", listing("qwen3-4b"), "Q8_0")
    lines = done("info", path).stdout.splitlines()
    assert lines[0] == f"{path}: text encoder of FLUX.2"
    assert "for        klein-4b or klein-base-4b" in lines
