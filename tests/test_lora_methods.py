"""Adapters of a pipeline: loaded, chosen, at work in its runs and gone again."""

from contextlib import ExitStack
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from helpers.adapters import D, factors, lora, save
from helpers.checkpoints import SHALLOW_TEXT, SHALLOW_VARIANT, convert

from flux2_mlx import Flux2Pipeline, InputError, request
from flux2_mlx.advice import workload
from flux2_mlx.branches import range_errors
from flux2_mlx.cached_encoder import fingerprint
from flux2_mlx.embedding_cache import EmbeddingCache
from flux2_mlx.errors import CheckpointError, RangeError
from flux2_mlx.layers import check_finite
from flux2_mlx.store import find_adapter

SETTINGS = {"width": 64, "height": 48, "num_inference_steps": 3, "seed": 3, "max_sequence_length": 40}
LAYERS = {"single_blocks.0.linear2": (D, 4 * D), "double_blocks.1.img_attn.proj": (D, D), "txt_in": (D, 3 * 64)}


@pytest.fixture(scope="module")
def folder(small_model, tmp_path_factory):
    official = small_model(text=SHALLOW_TEXT)
    return convert(
        official, tmp_path_factory.mktemp("m") / "m", quant="bf16", text_quant="bf16", variant=SHALLOW_VARIANT
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Adapters by their names; `text` is one of the text encoder."""
    folder, paths = tmp_path_factory.mktemp("adapters"), {}
    for seed, name in enumerate(("first", "second")):
        tensors = {}
        for layer, (outputs, inputs) in LAYERS.items():
            tensors |= lora(f"diffusion_model.{layer}", outputs, inputs, seed=seed)
        paths[name] = save(folder / f"{name}.safetensors", {key: x / 8 for key, x in tensors.items()})
    text = lora("text_encoder.model.layers.0.self_attn.q_proj", 64, 64)
    paths["text"] = save(folder / "text.safetensors", text)
    return paths


def open_pipe(folder, **options) -> Flux2Pipeline:
    return Flux2Pipeline.from_pretrained(folder, dtype="float32", **{"prompt_cache": False, **options})


@pytest.fixture
def pipe(folder):
    return open_pipe(folder)


def latents(pipe, **settings) -> np.ndarray:
    return np.array(pipe("a red box", **SETTINGS | settings, output_type="latent").images)


def test_adapters_change_images_until_they_are_gone(pipe, files):
    plain = latents(pipe)
    pipe.load_lora_weights(files["first"])
    one = latents(pipe)
    pipe.load_lora_weights(str(files["second"]), adapter_name="second", scale=0.5)
    assert pipe.get_active_adapters() == ["default_0", "second"]
    both = latents(pipe)
    pipe.set_adapters("default_0")
    assert np.array_equal(latents(pipe), one)
    pipe.set_adapters(["default_0", "second"], [1.0, 0.5])
    assert np.array_equal(latents(pipe), both)
    pipe.set_adapters(["default_0", "second"], 0)
    assert np.array_equal(latents(pipe), plain)
    pipe.set_adapters([])
    assert pipe.get_active_adapters() == []
    pipe.unload_lora_weights()
    assert np.array_equal(latents(pipe), plain)
    assert [np.linalg.norm(a - b) / np.linalg.norm(b) > 0.01 for a, b in ((one, plain), (both, one))] == [True, True]
    with pytest.raises(InputError, match="adapter_names has 'second'"):
        pipe.set_adapters("second")


def at_work(pipe) -> list[str]:
    return [one.adapter.name for one in pipe.networks.adapters]


def test_adapters_are_off_on_and_deleted_as_diffusers_spells_it(pipe, files):
    plain = latents(pipe)
    pipe.load_lora_weights(files["first"], adapter_name="first")
    pipe.load_lora_weights(files["text"], adapter_name="text", scale=0.5)
    assert pipe.get_list_adapters() == {"transformer": ["first"], "text_encoder": ["text"]}
    pipe.disable_lora()
    assert pipe.get_active_adapters() == ["first", "text"]
    assert np.array_equal(latents(pipe), plain)
    pipe.enable_lora()
    assert [one.scale for one in pipe.networks.adapters] == [1, 0.5]
    pipe.delete_adapters("text")
    assert at_work(pipe) == ["first"]
    pipe.disable_lora()
    pipe.load_lora_weights(files["second"], adapter_name="second")
    assert at_work(pipe) == ["first", "second"]
    pipe.disable_lora()
    pipe.delete_adapters("first")
    assert at_work(pipe) == []
    pipe.enable_lora()
    assert at_work(pipe) == ["second"]
    pipe.delete_adapters(["second"])
    assert (pipe.get_list_adapters(), pipe.get_active_adapters(), pipe.networks.adapter_bytes) == ({}, [], 0)
    with pytest.raises(InputError, match="adapter_names has 'first'; none is loaded"):
        pipe.delete_adapters("first")


def test_a_call_has_a_scale_of_its_own(pipe, files):
    pipe.load_lora_weights(files["first"], adapter_name="first", scale=0.5, steps=(1, 2))
    pipe.load_lora_weights(files["second"], adapter_name="second")
    own = latents(pipe)
    before = pipe.networks
    halved = pipe("a red box", **SETTINGS, output_type="latent", attention_kwargs={"scale": 0.5})
    assert [one["scale"] for one in halved.settings[0]["adapters"]] == [0.25, 0.5]
    assert pipe.networks is before
    assert np.array_equal(latents(pipe), own)
    pipe.set_adapters(["first", "second"], [0.25, 0.5])
    assert np.array_equal(latents(pipe), np.array(halved.images))
    for kwargs in ({"scale": "a"}, {"ip_adapter_masks": 1}, 3):
        with pytest.raises(InputError, match="scale"):
            pipe("a", **SETTINGS, attention_kwargs=kwargs)


def test_the_scale_of_a_call_is_limited_with_that_of_its_adapters(pipe, files):
    pipe.load_lora_weights(files["first"], adapter_name="first", scale=1000)
    with pytest.raises(InputError, match=r"scale 2 and the scale 1000 of .*first.* must be -1000\.0 to 1000"):
        pipe("a", **SETTINGS, attention_kwargs={"scale": 2})


def test_weights_may_be_arrays(pipe, files):
    names = ["first", "second"]
    for name in names:
        pipe.load_lora_weights(files[name], adapter_name=name)
    for weights in (np.array([0.5, 0.25]), mx.array([0.5, 0.25]), (0.5, np.float32(0.25))):
        pipe.set_adapters(names, weights)
        assert [one.scale for one in pipe.networks.adapters] == [0.5, 0.25]
    pipe.set_adapters(names, np.array(2.0))
    assert [one.scale for one in pipe.networks.adapters] == [2, 2]


def test_no_more_are_chosen_than_there_can_be(pipe, files, monkeypatch):
    for name in ("first", "second"):
        pipe.load_lora_weights(files[name], adapter_name=name)
    monkeypatch.setattr(request, "MAX_ADAPTERS", 1)
    pipe.set_adapters("first")
    with pytest.raises(InputError, match="2 adapters are too many; at most 1 can be at work at once"):
        pipe.set_adapters(["first", "second"])
    assert pipe.get_active_adapters() == ["first"]


def test_one_adapter_twice_is_both_times_at_work(pipe, files):
    pipe.load_lora_weights(files["first"], scale=0.75)
    once = latents(pipe)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(files["first"], scale=0.5)
    pipe.load_lora_weights(files["first"], scale=0.25)
    assert np.abs(latents(pipe) - once).max() < 1e-4
    pipe.load_lora_weights(files["first"], scale=-0.75)
    plain = latents(pipe)
    pipe.unload_lora_weights()
    assert np.abs(latents(pipe) - plain).max() < 1e-4


def test_several_adapters_are_put_to_work_together(pipe, files, monkeypatch):
    chosen, choose = [], type(pipe.networks).with_adapters
    monkeypatch.setattr(type(pipe.networks), "with_adapters", lambda *given: chosen.append(given) or choose(*given))
    with find_adapter(files["first"]) as found:
        pipe.use_adapters([(found, 0.5, None)] * 3)
        assert len(chosen) == 1
        assert pipe.get_active_adapters() == ["default_0", "default_1", "default_2"]
        with pytest.raises(InputError, match="101 adapters are too many; at most 100 can be at work at once"):
            pipe.use_adapters([(found, 0.5, None)] * 98)
        monkeypatch.setattr("flux2_mlx.request.MAX_ADAPTERS", 3)
        with pytest.raises(InputError, match="4 adapters are too many"):
            pipe.load_lora_weights(files["first"])


def test_networks_stay_in_memory_when_adapters_change(pipe, files, loads):
    latents(pipe)
    before = len(loads)
    assert before > 0
    pipe.load_lora_weights(files["first"])
    latents(pipe)
    pipe.unload_lora_weights()
    latents(pipe)
    assert len(loads) == before


def test_a_streamed_network_has_the_same_adapters(folder, pipe, files):
    pipe.load_lora_weights(files["first"])
    request = pipe.request(["a red box"], width=64, height=48, steps=2, seed=3, max_sequence_length=40)
    planned = pipe.plan(request)
    phases = [replace(x, resident=1, streamed=1) if x.name == "transformer" else x for x in planned.phases]
    streamed = replace(planned, phases=tuple(phases))
    ours, output = (pipe.run(request, planned=plan, output_type="latent") for plan in (streamed, planned))
    assert ours.timings[1].read > 0
    assert np.array_equal(ours.images, output.images)


def test_an_image_made_in_a_callback_leaves_the_steps_of_adapters_alone(pipe, files):
    pipe.load_lora_weights(files["first"], steps=(2, 3))
    pipe.load_lora_weights(files["second"])
    alone = latents(pipe)

    def make_another(pipe, step, timestep, values):
        if step == 0:
            latents(pipe, seed=4)
        return values

    assert np.array_equal(latents(pipe, callback_on_step_end=make_another), alone)


def test_an_adapter_works_in_its_steps_only(pipe, files):
    plain = latents(pipe)
    seen = {}

    def noted(name):
        return lambda pipe, step, timestep, tensors: seen.setdefault(name, []).append(np.array(tensors["latents"]))

    latents(pipe, callback_on_step_end=noted("plain"))
    pipe.load_lora_weights(files["first"], adapter_name="late", steps=(2, 3))
    latents(pipe, callback_on_step_end=noted("late"))
    pipe.unload_lora_weights()
    pipe.load_lora_weights(files["first"], steps=(1, 1))
    early = latents(pipe, callback_on_step_end=noted("early"))
    assert np.array_equal(early, latents(pipe))
    pipe.set_adapters([])
    assert np.array_equal(latents(pipe), plain)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(files["first"])
    latents(pipe, callback_on_step_end=noted("whole"))
    same = {name: [np.array_equal(a, b) for a, b in zip(seen[name], seen["plain"], strict=True)] for name in seen}
    assert same["late"] == [True, False, False]
    assert np.array_equal(seen["early"][0], seen["whole"][0])
    assert not np.array_equal(seen["early"][1], seen["whole"][1])


def test_texts_are_projected_anew_where_that_layer_changes(pipe, files, tmp_path):
    tensors = lora("diffusion_model.txt_in", *LAYERS["txt_in"])
    path = save(tmp_path / "a.safetensors", tensors)
    plain = latents(pipe)
    pipe.load_lora_weights(path, steps=(3, 3))
    last = latents(pipe)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(path, steps=(1, 3))
    whole = latents(pipe)
    assert not np.array_equal(last, plain)
    assert not np.array_equal(last, whole)


def test_adapters_are_in_memory_at_every_phase(pipe, files):
    work = workload(pipe.request(["a"], width=64, height=48))
    bare, before = pipe.networks.needs(work).plan(pipe.memory_limit), mx.get_active_memory()
    pipe.load_lora_weights(files["first"])
    taken = pipe.networks.adapter_bytes
    assert taken == sum(4 * 3 * sum(shape) for shape in LAYERS.values())
    assert taken <= mx.get_active_memory() - before <= 1.1 * taken + 4096
    planned = pipe.networks.needs(work).plan(pipe.memory_limit)
    assert [x.weights for x in planned.phases] == [x.weights + taken for x in bare.phases]
    assert planned.limit == bare.limit
    small = pipe.networks.needs(work).plan(bare.peak_memory + taken - 1)
    assert small.phase("transformer").streamed or not small.fits


def test_headers_tell_what_adapters_will_take(pipe, files, tmp_path):
    lokr = factors("lycoris_single_blocks_0_linear2", lokr_w1=(4, 4), lokr_w2_a=(D // 4, 2), lokr_w2_b=(2, D))
    dora = lora("transformer.transformer_blocks.0.attn.to_q", D, D) | lora("transformer.norm_out.linear", 2 * D, D)
    dora["transformer.transformer_blocks.0.attn.to_q.lora_magnitude_vector"] = np.ones(D, np.float32)
    paths = [*files.values(), save(tmp_path / "a.safetensors", lokr), save(tmp_path / "b.safetensors", dora)]
    with ExitStack() as held:
        before = mx.get_active_memory()
        found = [held.enter_context(find_adapter(path)) for path in paths]
        expected = pipe.expecting([(one, 1.0, None) for one in found])
        assert mx.get_active_memory() - before < 4096
    assert pipe.networks.adapter_bytes == 0
    for path in paths:
        pipe.load_lora_weights(path)
    assert expected.networks.adapter_bytes == pipe.networks.adapter_bytes > 0


def test_encoded_prompts_are_told_apart_by_adapters_of_the_encoder(folder, files, tmp_path):
    pipe = open_pipe(folder)
    pipe.prompt_cache = EmbeddingCache(tmp_path)
    encoder = pipe.checkpoint.components["text_encoder"]
    plain = np.array(pipe.encode_prompt("a"))
    pipe.load_lora_weights(files["first"])
    assert fingerprint(pipe.checkpoint.components["text_encoder"]) == fingerprint(encoder)
    pipe.load_lora_weights(files["text"], adapter_name="text")
    assert fingerprint(pipe.checkpoint.components["text_encoder"]) != fingerprint(encoder)
    assert not np.array_equal(np.array(pipe.encode_prompt("a")), plain)
    pipe.unload_lora_weights()
    assert np.array_equal(np.array(pipe.encode_prompt("a")), plain)


def test_encoded_prompts_are_told_apart_by_the_config_of_an_adapter(folder, tmp_path):
    pipe = open_pipe(folder)
    pipe.prompt_cache = EmbeddingCache(tmp_path)
    path = save(tmp_path / "adapter_model.safetensors", lora("text_encoder.model.layers.0.self_attn.q_proj", 64, 64))
    encoded = []
    for alpha in (1, 30):
        (tmp_path / "adapter_config.json").write_text(f'{{"r": 3, "lora_alpha": {alpha}}}')
        pipe.load_lora_weights(path)
        encoded.append(np.array(pipe.encode_prompt("a")))
        pipe.unload_lora_weights()
    assert not np.array_equal(*encoded)


def test_images_remember_their_adapters(pipe, files):
    pipe.load_lora_weights(files["first"], scale=0.5, steps=(1, 2))
    settings = pipe("a", **SETTINGS).settings[0]
    (told,) = settings["adapters"]
    assert len(told.pop("sha256")) == 64
    assert told == {"name": "default_0", "source": "first.safetensors", "scale": 0.5, "steps": [1, 2]}
    pipe.unload_lora_weights()
    assert "adapters" not in pipe("a", **SETTINGS).settings[0]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"scale": float("nan")}, "scale must be -1000.0 to 1000.0, got nan"),
        ({"scale": "much"}, "scale must be a number"),
        ({"steps": (2, 1)}, "steps must be a first and a last one from 1 to 1000"),
        ({"steps": 3}, "steps must be a first and a last one from 1 to 1000"),
        ({"adapter_name": 3}, "adapter_name must be text"),
        ({"adapter_name": "taken"}, "there is an adapter 'taken' already"),
        ({"hotswap": True}, "load_lora_weights has no argument 'hotswap'"),
        ({"source": 3}, "an adapter is named by a text or a path, not by int"),
    ],
)
def test_wrong_settings_are_refused(pipe, files, given, said):
    pipe.load_lora_weights(files["first"], adapter_name="taken")
    with pytest.raises(InputError, match=said):
        pipe.load_lora_weights(**{"source": files["second"]} | given)
    assert pipe.get_active_adapters() == ["taken"]


@pytest.mark.parametrize(
    ("names", "weights", "said"),
    [
        (["a"], None, "adapter_names has 'a'; choose each once from taken"),
        (["taken", "taken"], None, "choose each once"),
        ("taken", [1.0, 2.0], "1 adapter has 2 weights"),
        ("taken", ["0.5"], "adapter_weights must be numbers"),
        ("taken", "1", "adapter_weights must be numbers"),
        ("taken", 1e9, "adapter_weights must be"),
        (3, None, "adapter_names must be text"),
    ],
)
def test_wrong_choices_are_refused(pipe, files, names, weights, said):
    pipe.load_lora_weights(files["first"], adapter_name="taken")
    with pytest.raises(InputError, match=said):
        pipe.set_adapters(names, weights)


def test_steps_after_the_last_of_a_run_are_refused(pipe, files):
    pipe.load_lora_weights(files["first"], steps=(5, 9))
    said = r"steps 5-9 of .*first\.safetensors begin after the run's 3 steps"
    with pytest.raises(InputError, match=said):
        latents(pipe)
    with pytest.raises(InputError, match=said):
        pipe.plan(pipe.request(["a"], steps=3))


def test_values_that_are_not_finite_are_blamed_on_adapters(pipe, files, tmp_path):
    tensors = lora("diffusion_model.single_blocks.0.linear2", D, 4 * D)
    path = save(tmp_path / "huge.safetensors", {key: x * np.float32(1e19) for key, x in tensors.items()})
    pipe.load_lora_weights(path, scale=1000)
    with pytest.raises(RangeError, match=r"numbers with the adapters .*huge\.safetensors at work; give a smaller"):
        latents(pipe)


def test_float16_may_overflow_without_adapters_too(pipe, files):
    pipe.load_lora_weights(files["first"])
    said = "float16 with the adapters .* at work; give a smaller scale, or use dtype='bfloat16'"
    with pytest.raises(RangeError, match=said), range_errors(pipe.networks.adapters):
        check_finite(mx.array(np.inf, mx.float16), "transformer")


def test_an_adapter_of_another_model_is_refused(pipe, tmp_path):
    path = save(tmp_path / "a.safetensors", lora("diffusion_model.single_blocks.0.linear2", 2 * D, 8 * D))
    with pytest.raises(CheckpointError):
        pipe.load_lora_weights(path)
    assert pipe.get_active_adapters() == []
