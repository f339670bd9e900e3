"""Weights of `set_adapters` that are left out, or given by the network that is changed, as diffusers has them."""

import pytest
from helpers.adapters import lora, save
from helpers.cli_runner import DEMO

from flux2_mlx import Flux2Pipeline, InputError
from flux2_mlx.checkpoint import Checkpoint

LAYERS = {"transformer": "single_blocks.0.linear2", "text_encoder": "layers.0.self_attn.q_proj"}


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    """One with an adapter of each network, and one of `both`, loaded."""
    folder = tmp_path_factory.mktemp("adapters")
    pipe = Flux2Pipeline.from_pretrained(DEMO, prompt_cache=False)
    components = Checkpoint.open(DEMO).components
    made = {}
    for network, layer in LAYERS.items():
        start = "diffusion_model" if network == "transformer" else "text_encoder.model"
        made[network] = lora(f"{start}.{layer}", *components[network].quantized("bf16").infos[f"{layer}.weight"].shape)
    made["both"] = made["transformer"] | made["text_encoder"]
    for name, tensors in made.items():
        pipe.load_lora_weights(save(folder / f"{name}.safetensors", tensors), adapter_name=name)
    return pipe


@pytest.mark.parametrize(
    ("names", "weights", "scales"),
    [
        (["transformer", "both"], [None, 0.5], [1, 0.5]),
        (["transformer", "both"], [{"transformer": 0.25}, 0.5], [0.25, 0.5]),
        (["transformer", "text_encoder"], {"transformer": 0.25, "vae": 3}, [0.25, 1]),
        ("both", {"transformer": 0.5, "text_encoder": 0.5}, [0.5]),
        ("both", {"text_encoder": None}, [1]),
        ("both", {}, [1]),
    ],
)
def test_weights_are_scales(pipe, names, weights, scales):
    pipe.set_adapters(names, weights)
    assert [one.scale for one in pipe.networks.adapters] == scales


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        (
            {"transformer": 0.5},
            "would have both change text_encoder by 1 and transformer by 0.5; give one",
        ),
        ({"unet": 0.5}, "adapter_weights has 'unet', which is none of "),
        ([{"transformer": {"blocks": 1}}], "adapter_weights must be a number, got dict"),
        ({"vae": 1e9}, "adapter_weights must be -1000.0 to 1000.0, got 1e\\+09"),
        ({"transformer": "0.5"}, "adapter_weights must be numbers, got '0.5'"),
        ({}.keys(), "adapter_weights must be a number"),
    ],
)
def test_what_is_no_scale_is_refused(pipe, weights, said):
    pipe.set_adapters("transformer", 0.125)
    with pytest.raises(InputError, match=said):
        pipe.set_adapters("both", weights)
    assert [one.scale for one in pipe.networks.adapters] == [0.125]
