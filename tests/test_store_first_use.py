"""What is fetched of a model that can't work, and what a first use checks, from a hub on the loopback interface."""

import shutil
from types import SimpleNamespace

import mlx.core as mx
import pytest
from helpers.checkpoints import TRANSFORMER, VARIANT, WEIGHTS, edit_json, edit_weights, save_tensors
from helpers.cli_runner import done, refusal
from helpers.hub_client import REPO, partial, storage, using
from helpers.hub_server import HubServer

import flux2_mlx.hub
from flux2_mlx import Flux2Pipeline
from flux2_mlx.checkpoint import Checkpoint
from flux2_mlx.errors import CheckpointError, InputError
from flux2_mlx.store import find_checkpoint
from flux2_mlx.store.acquisition import acquire
from flux2_mlx.store.first_use import Fetching
from flux2_mlx.store.sources import Wanted

pytestmark = pytest.mark.usefixtures("models")
START = 65_536  # bytes of a file of weights that are read for its header
NAMED = {"variant": VARIANT}


def refused(source, home, kind=(CheckpointError, InputError), act=None, **options):
    """The line that a repo is refused with, after a look at what was fetched of it: no more than headers."""
    with HubServer({REPO: source}) as hub, using(hub, home):
        with pytest.raises(kind) as caught:
            act() if act else find_checkpoint(REPO, **options)
        for name, count in hub.sent.items():
            assert count <= START or not name.endswith(".safetensors"), name
        assert sum(count for name, count in hub.sent.items() if name.endswith(".safetensors")) <= 3 * START
    assert "\n" not in str(caught.value)
    assert not list(home.rglob("*.incomplete"))
    assert not list(home.rglob("*.safetensors"))
    assert str(home) not in str(caught.value) or "no space" in str(caught.value)
    assert "/tmp/" not in str(caught.value).replace(str(home.parent), "")
    return str(caught.value)


def test_flux_1(source, home):
    edit_json(source / "model_index.json", _class_name="FluxPipeline")
    assert refused(source, home, **NAMED).startswith(f"{REPO} holds 'FluxPipeline', not FLUX.2")


@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
def test_a_quantized_save(part, source, home):
    edit_json(source / part / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    message = refused(source, home, **NAMED)
    assert message.startswith(f"{REPO}")
    assert "bitsandbytes" in message


def test_no_tokenizer(source, home):
    (source / "tokenizer/tokenizer.json").unlink()
    for named in (NAMED, {}):
        message = refused(source, home, **named)
        assert message.startswith(f"{REPO} is incomplete: there is no tokenizer/tokenizer.json; add that of the model ")


def test_a_tokenizer_of_another_model(source, home):
    edit_json(source / "tokenizer/tokenizer.json", added_tokens=[])
    assert "tokenizer" in refused(source, home, **NAMED)


def test_an_unknown_variant(source, home):
    assert refused(source, home).startswith(f"can't tell which model {REPO} is; name it with variant=NAME (")


def test_other_tensors_than_the_config_asks_for(source, home):
    edit_weights(source / WEIGHTS["vae"], lambda tensors: tensors.pop("decoder.conv_in.weight"))
    expected = f"{REPO}/vae is not a {VARIANT} vae: missing decoder.conv_in.weight"
    assert refused(source, home, **NAMED) == expected


def test_weights_that_are_none(source, home):
    (source / WEIGHTS["vae"]).write_bytes(b"\xff" * 100_000)
    assert refused(source, home, **NAMED).startswith(f"{REPO}/{WEIGHTS['vae']} is not a safetensors file: the header ")


def test_weights_longer_than_their_header_says(source, home):
    with (source / WEIGHTS["vae"]).open("ab") as file:
        file.write(b"0" * 10)
    message = refused(source, home, **NAMED)
    assert message.startswith(f"{REPO}/{WEIGHTS['vae']} has ")


def free_space(monkeypatch, free):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))


def listed_size(source):
    with HubServer({REPO: source}) as hub:
        return sum(len(data) for data in hub.repos[REPO].files.values())


def test_too_little_disk_for_the_conversion_beside_the_download(source, home, models, monkeypatch):
    free_space(monkeypatch, listed_size(source) + 1_000_000)
    message = refused(source, home, InputError, **NAMED)
    assert message.startswith(f"no space: fetching the rest of {REPO} takes 0.0")
    assert f" and converting it 0.00227 GB in {models}, the disk of {home / 'hub'} has 0.0" in message
    assert message.endswith("; make room, or set HF_HOME or FLUX2_MLX_HOME to a folder on another disk")


def test_just_enough_disk(source, home, monkeypatch):
    told = []
    with HubServer({REPO: source}) as hub, using(hub, home):
        find_checkpoint(REPO, **NAMED, announce=told.append)
    needed = told[0].downloads[0].remaining + told[0].converted
    shutil.rmtree(home)
    shutil.rmtree(told[0].target)
    free_space(monkeypatch, needed - 1)
    refused(source, home, InputError, **NAMED)
    free_space(monkeypatch, needed)
    with HubServer({REPO: source}) as hub, using(hub, home):
        find_checkpoint(REPO, **NAMED)


def test_disks_of_their_own_need_room_each(source, home, models, monkeypatch):
    models.mkdir()
    monkeypatch.setattr("flux2_mlx.store.first_use._disk", str)
    small = {models: 1_000_000}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=small.get(path, 10**9)))
    message = refused(source, home, InputError, **NAMED)
    assert message.startswith(f"no space: converting it 0.00227 GB in {models}, the disk of {models} has 0.001 GB free")


def test_too_little_memory_for_any_image(source, home):
    def act():
        Flux2Pipeline.from_pretrained(REPO, **NAMED, memory_limit="1kB")

    message = refused(source, home, InputError, act)
    assert message.endswith("the limit is 0.000954 MiB; no size fits; choose a smaller model or a higher limit")


def test_too_little_memory_for_the_run_that_is_asked_for(source, home):
    with HubServer({REPO: source}) as hub, using(hub, home):
        arguments = (
            "t2i",
            "red",
            "-m",
            REPO,
            "--variant",
            VARIANT,
            "-W",
            "512",
            "-H",
            "512",
            "--memory-limit",
            "40MiB",
        )
        message = refusal(*arguments, "--quiet")
        assert sum(count for name, count in hub.sent.items() if name.endswith(".safetensors")) <= 3 * START
    assert " the limit is 40 MiB; " in message


def test_a_long_header_is_read_to_its_end(source, home, monkeypatch):
    monkeypatch.setattr(flux2_mlx.hub.outline, "_START", 16)
    edit_weights(source / WEIGHTS["vae"], lambda tensors: tensors.pop("decoder.conv_in.weight"))
    with HubServer({REPO: source}) as hub, using(hub, home):
        with pytest.raises(CheckpointError, match=r"missing decoder\.conv_in\.weight"):
            find_checkpoint(REPO, **NAMED)
        for name in WEIGHTS.values():
            length = 8 + int.from_bytes((source / name).read_bytes()[:8], "little")
            assert hub.sent[name] == length


def test_a_server_that_knows_no_ranges(source, home):
    def whole(handler):
        data = (source / WEIGHTS["transformer"]).read_bytes()
        handler.answer(200, {"Content-Length": len(data)}, data)

    with HubServer({REPO: source}) as hub, using(hub, home):
        hub.script(WEIGHTS["transformer"], whole)
        assert Checkpoint.open(find_checkpoint(REPO, **NAMED)).variant.name == VARIANT


def test_weights_that_a_conversion_does_not_read_are_not_fetched(source, home):
    save_tensors(source / "text_encoder/consolidated.safetensors", {"x": mx.zeros((100_000,))})
    told = []
    with HubServer({REPO: source}) as hub, using(hub, home):
        find_checkpoint(REPO, **NAMED, announce=told.append)
        assert hub.sent["text_encoder/consolidated.safetensors"] <= START
    assert "text_encoder/consolidated.safetensors" not in told[0].downloads[0].files


def test_what_is_told_is_what_happens(source, home, models):
    told, reports = [], []
    with HubServer({REPO: source}) as hub, using(hub, home):
        hub.cards[REPO] = {"license": "other", "license_name": "flux-dev"}
        blobs = storage(home) / "blobs"
        blobs.mkdir(parents=True)
        partial(hub, home, WEIGHTS["transformer"]).write_bytes((source / WEIGHTS["transformer"]).read_bytes()[:400_000])
        options = {"announce": told.append, "progress": lambda *report: reports.append(report)}
        target = find_checkpoint(REPO, **NAMED, **options)
        repo = hub.repos[REPO]
    (use,) = told
    total = sum(blob.size for blob in use.downloads[0].files.values())
    assert (use.downloads[0].licence, use.target, use.keep_source) == ("flux-dev", target, True)
    assert (use.downloads[0].size, use.downloads[0].present, use.downloads[0].storage) == (
        total,
        400_000,
        storage(home),
    )
    weights = [path.stat().st_size for path in target.rglob("*.safetensors")]
    assert 0 <= sum(weights) - use.converted < 100_000  # headers
    assert use.staying == use.converted + total
    assert {what for *_, what in reports} == {"download", "convert"}
    fetching = [report[:2] for report in reports if report[2] == "download"]
    assert fetching[-1] == (total, total)
    assert set(repo.files) >= set(use.downloads[0].files)


def test_a_text_only_use_checks_and_fetches_what_it_needs(source, home):
    edit_weights(source / WEIGHTS["transformer"], lambda tensors: tensors.clear())
    told = []
    with HubServer({REPO: source}) as hub, using(hub, home):
        find_checkpoint(REPO, **NAMED, text_only=True, announce=told.append)
        assert WEIGHTS["transformer"] not in hub.sent
    assert [name for name in told[0].downloads[0].files if name.endswith(".safetensors")] == [WEIGHTS["text_encoder"]]


def test_what_a_check_raises_comes_before_any_weight(source, home):
    def check(checkpoint):
        assert checkpoint.fitted_variant.transformer == TRANSFORMER
        raise InputError("no")

    assert refused(source, home, InputError, **NAMED, check=check) == "no"


def test_convert_checks_too(source, home, tmp_path):
    edit_json(source / "model_index.json", _class_name="FluxPipeline")
    with HubServer({REPO: source}) as hub, using(hub, home):
        assert refusal("convert", REPO, "mine", "--quiet").startswith(f"{REPO} holds 'FluxPipeline'")
        assert not [name for name in hub.sent if name.endswith(".safetensors") and hub.sent[name] > START]
    edit_json(source / "model_index.json", _class_name="Flux2KleinPipeline")
    with HubServer({REPO: source}) as hub, using(hub, home):
        assert done("convert", REPO, "mine", "--variant", VARIANT, "--quiet").stdout == "mine\n"


def test_a_complete_copy_in_the_cache_is_announced_as_there(source, home, tmp_path):
    told = []
    with HubServer({REPO: source}) as hub, using(hub, home):
        for target in (tmp_path / "a", tmp_path / "b"):
            acquire(REPO, target.joinpath, Wanted(VARIANT, "bf16", "bf16"), Fetching(announce=told.append))
    assert [use.downloads[0].present for use in told] == [0, told[0].downloads[0].size]
    assert told[1].removed == told[1].downloads[0].remaining == 0
