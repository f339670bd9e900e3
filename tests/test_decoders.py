"""Decoders in place of a model's own: what they change, what they take, and where they come from."""

import gc

import mlx.core as mx
import numpy as np
import pytest
from helpers.cli_runner import PROMPT
from helpers.decoders import NARROW, save_narrow, save_tiny
from helpers.headers import write
from helpers.hub_client import using
from helpers.hub_server import HubServer
from PIL import Image

from flux2_mlx import Flux2Pipeline
from flux2_mlx.errors import CheckpointError, DownloadError, InputError
from flux2_mlx.files import file_sha256
from flux2_mlx.store import find_decoder
from flux2_mlx.vae import TinyVAEConfig
from flux2_mlx.weights import TensorInfo

SIZE = {"width": 32, "height": 16, "num_inference_steps": 2, "seed": 3}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoders")
    return {"tiny": save_tiny(folder / "tiny.safetensors"), "narrow": save_narrow(folder / "narrow.safetensors")}


def opened(**settings) -> Flux2Pipeline:
    pipe = Flux2Pipeline.from_pretrained("demo", progress=False, prompt_cache=False, keep=False, **settings)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def plain():
    return opened()


@pytest.fixture(scope="module", params=["tiny", "narrow"])
def other(request, files):
    return opened(decoder=files[request.param])


def gradient(width: int, height: int) -> Image.Image:
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([across, down, 255 - across], -1).astype(np.uint8))


def test_only_the_decoding_differs(plain, other):
    ours, theirs = (pipe(PROMPT, **SIZE, output_type="latent") for pipe in (plain, other))
    assert np.array_equal(ours.images, theirs.images)
    pictures = [pipe(PROMPT, **SIZE, output_type="np").images for pipe in (plain, other)]
    assert not np.allclose(*pictures, atol=0.05)
    assert np.allclose(other.decode(theirs, "np"), pictures[1], atol=1e-5)


def test_pictures_are_encoded_by_the_models_own_encoder(plain, other):
    edit = {"image": gradient(64, 64), "strength": 0.6, "num_inference_steps": 2, "seed": 3, "output_type": "latent"}
    assert np.array_equal(plain(PROMPT, **edit).images, other(PROMPT, **edit).images)


def test_what_a_mask_keeps_is_the_original(other):
    image, mask = gradient(64, 64), Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    (made,) = other(PROMPT, image=image, mask_image=mask, num_inference_steps=2, seed=1).images
    kept = np.asarray(mask) == 0
    assert np.array_equal(np.asarray(made)[kept], np.asarray(image)[kept])
    assert not np.array_equal(np.asarray(made), np.asarray(image))


def test_its_memory_is_planned_by_its_own_cost(plain, other):
    request = other.request([PROMPT], width=48, height=32, steps=1, seed=1)
    planned = other.plan(request).phase("vae").peak_memory
    assert planned != plain.plan(request).phase("vae").peak_memory
    other.release()
    gc.collect()
    held = mx.get_active_memory()  # by other tests
    (peak,) = (phase.peak_memory for phase in other.run(request).timings if phase.name == "vae")
    assert peak - held <= planned <= 1.2 * (peak - held)


def test_it_works_with_a_transformer_in_float16(files):
    ours, half = (opened(decoder=files["tiny"], dtype=dtype) for dtype in ("float32", "float16"))
    assert half.networks.dtype_of("vae") == mx.bfloat16
    whole, rounded = (pipe(PROMPT, **SIZE, output_type="np").images for pipe in (ours, half))
    assert 0 < np.abs(whole - rounded).mean() < 0.05


def test_it_works_with_a_streamed_transformer(files):
    pipe = opened(decoder=files["narrow"])
    request = pipe.request([PROMPT], width=16, height=16, steps=2, seed=3)
    expected = pipe.run(request, output_type="np").images
    pipe.memory_limit = pipe.plan(request).phase("transformer").peak_memory - 1
    assert pipe.plan(request).phase("transformer").streamed > 0
    assert np.allclose(pipe.run(request, output_type="np").images, expected, atol=1e-5)


def test_images_remember_it(plain, other, files):
    (told,) = other(PROMPT, **SIZE).settings
    assert told["decoder"]["name"] in ("tiny.safetensors", "narrow.safetensors")
    assert len(told["decoder"]["sha256"]) == 64
    assert "decoder" not in plain(PROMPT, **SIZE).settings[0]


def test_one_of_other_latents_is_refused(tmp_path):
    path = save_tiny(tmp_path / "taef2.safetensors", 32)
    with pytest.raises(
        InputError, match=r"decoder 'taef2.safetensors' is for latents of 32 channels for 8×8 pixels, n"
    ):
        opened(decoder=path)


@pytest.mark.parametrize("wrong", [3, "", ["taef2"]])
def test_a_decoder_has_a_name(wrong):
    with pytest.raises(InputError, match="decoder must be small, taef2 or a file, got "):
        opened(decoder=wrong)


def test_what_is_no_decoder_is_refused(tmp_path):
    write(tmp_path / "other.safetensors", {"a.weight": TensorInfo("F16", (2, 2))})
    with pytest.raises(CheckpointError, match=r"other\.safetensors"):
        find_decoder(tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="there is no file or folder"):
        find_decoder(tmp_path / "none.safetensors")


def test_a_folder_that_holds_one_is_as_good_as_the_file(tmp_path, files):
    (tmp_path / "there").mkdir()
    save_tiny(tmp_path / "there" / "tiny.safetensors")
    assert find_decoder(tmp_path / "there").settings == find_decoder(files["tiny"]).settings


def test_one_in_several_files_is_refused(tmp_path):
    tensors = mx.load(str(save_tiny(tmp_path / "tiny.safetensors")))
    (tmp_path / "tiny.safetensors").unlink()
    for number, names in enumerate((list(tensors)[:20], list(tensors)[20:]), 1):
        part = {name: tensors[name] for name in names}
        mx.save_safetensors(str(tmp_path / f"tiny-0000{number}-of-00002.safetensors"), part)
    for place in (tmp_path, tmp_path / "tiny-00001-of-00002.safetensors"):
        with pytest.raises(CheckpointError, match="is 2 files, and a decoder is one; give a single file"):
            find_decoder(place)


def test_one_of_other_latents_is_not_fetched(tmp_path):
    wide = save_tiny(tmp_path / "wide.safetensors", 32, whole=True).read_bytes()
    told = pytest.raises(InputError, match="decoder 'taef2' is for latents of 32 channels")
    repos = {"madebyollin/taef2": {"taef2.safetensors": wide}}
    with HubServer(repos) as hub, using(hub, tmp_path / "cache"), told:
        opened(decoder="taef2")
    assert not list((tmp_path / "cache").rglob("taef2.safetensors"))


def test_one_of_the_hub_works(tmp_path):
    tiny = save_tiny(tmp_path / "tiny.safetensors", whole=True)
    repos = {"madebyollin/taef2": {"taef2.safetensors": tiny.read_bytes()}}
    with HubServer(repos) as hub, using(hub, tmp_path / "cache"):
        pipes = opened(decoder="taef2"), opened(decoder=tiny)
    ours, theirs = (pipe(PROMPT, **SIZE, output_type="np").images for pipe in pipes)
    assert np.array_equal(ours, theirs)


def test_whole_numbers_are_no_weights(tmp_path):
    path = save_tiny(tmp_path / "tiny.safetensors")
    tensors = mx.load(str(path))
    mx.save_safetensors(str(path), tensors | {"7.weight": mx.zeros((64, 64, 3, 3), mx.int32)})
    with pytest.raises(
        CheckpointError, match=r"is not TAEF2's decoder: 7\.weight is I32 \[64, 64, 3, 3\] instead of F16"
    ):
        find_decoder(path)


def test_one_that_is_damaged_is_refused_when_it_is_read(tmp_path):
    path = save_tiny(tmp_path / "tiny.safetensors")
    tensors = mx.load(str(path))
    mx.save_safetensors(str(path), tensors | {"7.weight": mx.full((64, 64, 3, 3), mx.nan, mx.float16)})
    pipe = opened(decoder=path)
    with pytest.raises(CheckpointError, match=r"tiny\.safetensors is damaged: decoder\.up\.0\.weight has values"):
        pipe(PROMPT, **SIZE)


def test_names_are_fetched_once_with_their_licence_told(tmp_path, files):
    tiny = save_tiny(tmp_path / "taef2.safetensors", whole=True).read_bytes()
    repos = {
        "madebyollin/taef2": {"taef2.safetensors": tiny, "README.md": b"#"},
        "black-forest-labs/FLUX.2-small-decoder": {
            "diffusion_pytorch_model.safetensors": files["narrow"].read_bytes(),
            "full_encoder_small_decoder.safetensors": b"other",
        },
    }
    heard, told = [], []
    with HubServer(repos) as hub, using(hub, tmp_path / "cache"):
        for name in ("taef2", "small"):
            for _ in range(2):
                found = find_decoder(name, announce=heard.append, progress=lambda *x: told.append(x))
                assert (found.name, found.origin) == (name, name)
                assert found.settings == {"name": name, "sha256": file_sha256(found.path)}
    assert [(x.repo_id, x.licence) for x in heard] == list(zip(repos, ("MIT", "Apache-2.0"), strict=True))
    assert told[-1][2] == "download"
    assert "full_encoder_small_decoder.safetensors" not in hub.fetched
    assert found.config == NARROW


def test_a_file_of_a_repo_is_asked_for_by_name(tmp_path):
    files = {"a.safetensors": save_tiny(tmp_path / "a.safetensors").read_bytes(), "b.safetensors": b"{}"}
    with HubServer({"me/decoders": files}) as hub, using(hub, tmp_path / "cache"):
        found = find_decoder("me/decoders:a.safetensors")
        assert found.settings["name"] == "me/decoders:a.safetensors"
        assert find_decoder(found.path).settings == found.settings
        assert isinstance(found.config, TinyVAEConfig)
        with pytest.raises(
            DownloadError, match=r"me/decoders is no decoder's file; give me/decoders:a\.safetensors, me"
        ):
            find_decoder("me/decoders")
        with pytest.raises(CheckpointError, match=r"me/decoders:b\.safetensors"):
            find_decoder("me/decoders:b.safetensors")
