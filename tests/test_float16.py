"""float16 with activations too large for it: what guards a run, and what is said if that is not enough."""

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.cli_runner import PROMPT, SMALL, refusal
from helpers.mlx_state import randomized
from mlx.utils import tree_map

from flux2_mlx import Flux2Pipeline, RangeError, layers, networks
from flux2_mlx.checkpoint import Component
from flux2_mlx.config import TransformerConfig
from flux2_mlx.layers import FLOAT16_MAX, cast
from flux2_mlx.memory import Workload
from flux2_mlx.transformer import Flux2Transformer, blocks, headroom, image_ids, model, rope_table, text_ids

CONFIG = TransformerConfig(2, 2, 2, 64, 32, 16, axes_dims_rope=(8, 8, 8, 8), guidance_embeds=False)
TEXT, HEIGHT, WIDTH = 7, 3, 4
Change = Callable[[nn.Module], None]


def relative_error(a: mx.array, b: mx.array) -> float:
    a, b = (np.array(x.astype(mx.float32), dtype=np.float64) for x in (a, b))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def is_finite(x: mx.array) -> bool:
    return bool(mx.isfinite(x).all())


def unguard(monkeypatch: pytest.MonkeyPatch) -> None:
    """float16 as any other dtype."""
    for module in (blocks, model):
        for name in ("clipped", "in_units"):
            monkeypatch.setattr(module, name, lambda x: x, raising=False)
    monkeypatch.setattr(blocks, "gated_sum", lambda x, gate, update: x + gate * update)
    monkeypatch.setattr(blocks, "swiglu", layers.swiglu)
    monkeypatch.setattr(blocks, "unit", lambda dtype: 1)


def updates(network: Flux2Transformer, factor: int = 2**18) -> None:
    for block in network.double_blocks:
        for layer in (block.img_attn.proj, block.txt_attn.proj, block.img_mlp[2], block.txt_mlp[2]):
            layer.weight *= factor
    for block in network.single_blocks:
        block.linear2.weight *= factor


def streams(network: Flux2Transformer) -> None:
    D = CONFIG.hidden_size
    updates(network, 2**14)
    network.single_stream_modulation.lin.weight[2 * D :] *= 2**9
    for modulation in (network.double_stream_modulation_img, network.double_stream_modulation_txt):
        for gate in (slice(2 * D, 3 * D), slice(5 * D, 6 * D)):
            modulation.lin.weight[gate] *= 2**9


def hidden(network: Flux2Transformer) -> None:
    for block in network.double_blocks:
        for layer in (block.img_mlp[0], block.txt_mlp[0]):
            layer.weight *= 2**8
    for block in network.single_blocks:
        block.linear1.weight[3 * CONFIG.hidden_size :] *= 2**8


def projections(network: Flux2Transformer) -> None:
    for block in network.double_blocks:
        for layer in (block.img_attn.qkv, block.txt_attn.qkv, block.img_mlp[0], block.txt_mlp[0]):
            layer.weight *= 2**17
    for block in network.single_blocks:
        block.linear1.weight *= 2**17


def transformer(dtype: mx.Dtype, change: Change = lambda network: None) -> Flux2Transformer:
    """The same weights in any dtype: values that bfloat16 and float16 hold, too."""
    network = randomized(Flux2Transformer(CONFIG))
    change(network)
    network.update(tree_map(lambda x: mx.clip(x, -60000, 60000).astype(mx.bfloat16), network.parameters()))
    network.set_dtype(dtype)
    return network


def velocity(network: Flux2Transformer, references: bool = False) -> mx.array:
    mx.random.seed(1)
    dtype, features = network.img_in.weight.dtype, CONFIG.joint_attention_dim
    img, txt = (mx.random.normal((2, n, C)).astype(dtype) for n, C in ((HEIGHT * WIDTH, 16), (TEXT, features)))
    past = network.read(img[:1, :6], rope_table(image_ids(2, 3, 10), CONFIG)) if references else None
    rope = rope_table(np.concatenate([text_ids(TEXT), image_ids(HEIGHT, WIDTH)]), CONFIG)
    return network(img, network.txt_in(txt), mx.array([0.5]), rope, past=past)


@pytest.mark.parametrize("references", [False, True])
@pytest.mark.parametrize("change", [streams, updates, hidden])
def test_a_transformer_with_large_activations_equals_float32(change, references, monkeypatch):
    exact = velocity(transformer(mx.float32, change), references)
    half = velocity(transformer(mx.float16, change), references)
    assert half.dtype == mx.float16
    # bfloat16 has an error of 0.02, and float16 with usual activations one of 0.0007.
    assert relative_error(half, exact) <= 0.005
    unguard(monkeypatch)
    assert not is_finite(velocity(transformer(mx.float16, change), references))


def test_projections_beyond_the_range_stay_numbers(monkeypatch):
    assert is_finite(velocity(transformer(mx.float16, projections)))
    unguard(monkeypatch)
    assert not is_finite(velocity(transformer(mx.float16, projections)))


def test_usual_activations_lose_nothing(monkeypatch):
    exact = velocity(transformer(mx.float32))
    guarded = relative_error(velocity(transformer(mx.float16)), exact)
    unguard(monkeypatch)
    assert guarded <= 1.1 * relative_error(velocity(transformer(mx.float16)), exact)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("change", [lambda network: None, streams, hidden])
def test_other_dtypes_are_computed_as_without_a_guard(change, dtype, monkeypatch):
    network = transformer(dtype, change)
    guarded = velocity(network, True)
    unguard(monkeypatch)
    assert mx.array_equal(velocity(network, True), guarded)
    assert guarded.dtype == dtype


def test_the_largest_values_of_float16_stay_finite():
    x, one = mx.array([65504.0, -65504.0, 60000.0, 1.0], mx.float16), mx.ones(4, mx.float16)
    infinity = mx.array([np.inf, np.inf, -np.inf, np.inf], mx.float16)
    assert headroom.clipped(infinity).tolist() == [65504, 65504, -65504, 65504]
    assert headroom.in_units(x * 2).tolist() == [2047, -2047, 2047, 0.0625]
    assert headroom.gated_sum(x, one, infinity).tolist() == [65504, 0, -5504, 65504]
    assert headroom.gated_sum(x, one * 0, infinity).tolist() == x.tolist()
    assert headroom.swiglu(infinity, infinity).tolist() == [65504, 65504, 0, 65504]
    assert headroom.swiglu(-infinity, infinity)[0].item() == 0
    assert cast(mx.array([1e30, -1e30, 0.5], mx.bfloat16), mx.float16).tolist() == [65504, -65504, 0.5]


def spoil(monkeypatch: pytest.MonkeyPatch, name: str, change: Change) -> None:
    """Let `change` be made to each network `name` that is loaded."""
    load = Component.load

    def changed(component: Component, *arguments) -> nn.Module:
        network = load(component, *arguments)
        if component.name == name:
            change(network)
        return network

    monkeypatch.setattr(Component, "load", changed)


def demo(dtype: str, **settings) -> Flux2Pipeline:
    return Flux2Pipeline.from_pretrained("demo", dtype=dtype, prompt_cache=False, **settings)


def large_hidden_states(encoder: nn.Module) -> None:
    """As in Qwen3 and Mistral: large inside an MLP, while what comes out is not."""
    for layer in encoder.layers:
        layer.mlp.gate_proj.weight *= 2**8
        layer.mlp.up_proj.weight *= 2**8
        layer.mlp.down_proj.weight *= 2.0**-14


def test_a_text_encoder_with_large_activations_equals_float32(monkeypatch):
    spoil(monkeypatch, "text_encoder", large_hidden_states)
    exact, half = (demo(dtype).encode_prompt(PROMPT) for dtype in ("float32", "float16"))
    assert half.dtype == mx.float16
    assert mx.abs(exact).max() < FLOAT16_MAX
    assert relative_error(half, exact) <= 0.02  # that of bfloat16
    monkeypatch.setattr(networks, "network_dtype", lambda name, dtype: dtype)
    with pytest.raises(RangeError, match="the computation overflowed float16"):
        demo("float16").encode_prompt(PROMPT)


def large_embeddings(encoder: nn.Module) -> None:
    encoder.embed_tokens.weight *= 1e8


def test_text_states_beyond_the_range_are_put_at_its_end(monkeypatch):
    spoil(monkeypatch, "text_encoder", large_embeddings)
    states = demo("float16").encode_prompt(PROMPT)
    assert mx.abs(states).max() == FLOAT16_MAX


def test_given_text_states_are_put_there_too():
    pipe = demo("float16")
    embeds = np.array(demo("float32").encode_prompt(PROMPT)) * 1e8
    images = pipe(prompt_embeds=embeds, width=32, height=32, num_inference_steps=1, seed=7, output_type="np").images
    assert np.isfinite(images).all()


def test_an_image_in_float16_is_that_in_float32():
    settings = {"seed": 7, "output_type": "np"}
    exact, half = (demo(dtype)(PROMPT, **settings).images for dtype in ("float32", "float16"))
    levels = 255 * np.abs(half - exact)
    assert levels.mean() <= 0.5  # measured: 0.2 in the mean and 2.1 at most, as the autoencoder is in bfloat16
    assert levels.max() <= 6
    assert levels.max() > 0


def too_large(network: Flux2Transformer) -> None:
    """Beyond what the guard is for."""
    network.single_stream_modulation.lin.weight *= 1e9


def broken(network: Flux2Transformer) -> None:
    network.img_in.weight *= np.nan


def test_an_overflow_is_told_at_the_first_step(monkeypatch):
    spoil(monkeypatch, "transformer", too_large)
    heard = []
    pipe = demo("float16")
    request = pipe.request([PROMPT], width=32, height=32, steps=4)
    with pytest.raises(RangeError, match="the computation overflowed float16; use dtype='bfloat16'"):
        pipe.run(request, on_progress=lambda progress: heard.append(progress.step))
    assert set(heard) == {None}
    assert np.isfinite(demo("bfloat16")(PROMPT, width=32, height=32, output_type="np").images).all()


def test_an_overflow_leaves_no_image(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spoil(monkeypatch, "transformer", too_large)
    message = refusal("t2i", PROMPT, *SMALL, "--dtype", "float16", "--quiet", "--checkpoint", "1", "-o", "a.png")
    assert message == "the computation overflowed float16; use --dtype bfloat16"


def test_what_is_no_number_in_another_dtype_is_not_blamed_on_float16(monkeypatch):
    spoil(monkeypatch, "transformer", broken)
    with pytest.raises(RangeError, match=r"^the transformer gave values that are not finite numbers; "):
        demo("float32")(PROMPT, width=32, height=32)


def test_only_the_transformer_is_in_float16(monkeypatch):
    dtypes = {}
    load = Component.load

    def recorded(component: Component, dtype: mx.Dtype, *arguments) -> nn.Module:
        dtypes[component.name] = dtype
        return load(component, dtype, *arguments)

    monkeypatch.setattr(Component, "load", recorded)
    demo("float16")(PROMPT, width=32, height=32, num_inference_steps=1)
    assert dtypes == {"text_encoder": mx.bfloat16, "transformer": mx.float16, "vae": mx.bfloat16}


def test_blocks_read_from_disk_give_the_same_image():
    settings = {"width": 32, "height": 32, "seed": 7, "output_type": "np"}
    pipe = demo("float16", memory_limit="4.5MB")
    assert pipe.plan(pipe.request([PROMPT], width=32, height=32)).phase("transformer").streamed > 0
    np.testing.assert_array_equal(pipe(PROMPT, **settings).images, demo("float16")(PROMPT, **settings).images)


def test_a_plan_is_that_of_bfloat16():
    work = Workload(128, 128, 48)
    narrow, wide = (demo(dtype).networks.needs(work).plan(2**40) for dtype in ("float16", "bfloat16"))
    assert narrow == wide
