"""Keys of the reference's configs: what changes the result is refused by name, what does not is let pass."""

import dataclasses
import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel
from flux2_mlx.convert import Source, options
from helpers.checkpoints import VARIANT, save_dev, save_small
from transformers import Mistral3Config, MistralConfig, PixtralVisionConfig, Qwen3Config

from flux2_mlx.errors import CheckpointError

INDEX, SCHEDULER = "model_index.json", "scheduler/scheduler_config.json"
TRANSFORMER, TEXT, VAE = (f"{name}/config.json" for name in ("transformer", "text_encoder", "vae"))
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 1024}
REMOVED = object()


@pytest.fixture(scope="module")
def klein(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small(tmp_path_factory.mktemp("official") / "klein")


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("official") / "dev"
    save_dev(folder)
    return folder


def change(folder: Path, file: str, key: str, value: Any) -> None:
    """Set `section.key` of a JSON file, or take it out."""
    values = json.loads((folder / file).read_text())
    *sections, last = key.split(".")
    inner = values
    for name in sections:
        inner = inner[name]
    inner[last] = value
    if value is REMOVED:
        del inner[last]
    (folder / file).write_text(json.dumps(values))


def opened(source: Path, tmp_path: Path, variant: str, *changes: tuple[str, str, Any]) -> Source:
    copy = Path(shutil.copytree(source, tmp_path / "model"))
    for file, key, value in changes:
        change(copy, file, key, value)
    return Source.open(copy, variant)


def refused(source: Path, tmp_path: Path, variant: str, file: str, key: str, value: Any, named: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        opened(source, tmp_path, variant, (file, key, value))
    message = str(caught.value)
    assert f"{file}: {named} is " in message
    assert "FLUX.2 has " in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        (SCHEDULER, "shift_terminal", 0.02),
        (SCHEDULER, "use_karras_sigmas", True),
        (SCHEDULER, "use_exponential_sigmas", True),
        (SCHEDULER, "use_beta_sigmas", True),
        (SCHEDULER, "use_flow_sigmas", True),
        (SCHEDULER, "invert_sigmas", True),
        (SCHEDULER, "stochastic_sampling", True),
        (SCHEDULER, "time_shift_type", "linear"),
        (SCHEDULER, "use_dynamic_shifting", False),
        (SCHEDULER, "num_train_timesteps", 500),
        (SCHEDULER, "_class_name", "FlowMatchHeunDiscreteScheduler"),
        (TRANSFORMER, "_class_name", "FluxTransformer2DModel"),
        (TRANSFORMER, "patch_size", 2),
        (TRANSFORMER, "out_channels", 32),
        (VAE, "_class_name", "AutoencoderKL"),
        (VAE, "in_channels", 4),
        (VAE, "out_channels", 4),
        (VAE, "act_fn", "gelu"),
        (VAE, "use_quant_conv", False),
        (VAE, "use_post_quant_conv", False),
        (VAE, "mid_block_add_attention", False),
        (VAE, "down_block_types", ["DownEncoderBlock2D"] * 3 + ["AttnDownEncoderBlock2D"]),
        (VAE, "down_block_types", ["DownEncoderBlock2D"] * 3),
        (VAE, "up_block_types", "UpDecoderBlock2D"),
        (TEXT, "attention_bias", True),
        (TEXT, "hidden_act", "gelu"),
        (TEXT, "mlp_bias", True),
        (TEXT, "use_sliding_window", True),
        (TEXT, "layer_types", ["full_attention"] * 28 + ["sliding_attention"]),
        (TEXT, "partial_rotary_factor", 0.5),
        (TEXT, "per_layer_config", {"3": {"num_attention_heads": 2}}),
        (TEXT, "final_logit_softcapping", 30.0),
        (INDEX, "scheduler", ["diffusers", "FlowMatchHeunDiscreteScheduler"]),
        (INDEX, "transformer", ["diffusers", "FluxTransformer2DModel"]),
        (INDEX, "vae", ["diffusers", "AutoencoderKL"]),
    ],
)
def test_what_changes_the_result_is_refused(file, key, value, klein, tmp_path):
    refused(klein, tmp_path, VARIANT, file, key, value, key)


@pytest.mark.parametrize("kind", ["yarn", "linear", "dynamic", "llama3", "longrope", "axial", None, 7])
@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("named", ["rope_type", "type"])
def test_scaled_rotations_are_refused(kind, key, named, klein, tmp_path):
    rope = {"rope_theta": 1e6, "factor": 4.0, named: kind}
    refused(klein, tmp_path, VARIANT, TEXT, key, rope, f"{key}.rope_type")


def test_other_rotations_are_refused(klein, tmp_path):
    rope = {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5}
    refused(klein, tmp_path, VARIANT, TEXT, "rope_parameters", rope, "rope_parameters.partial_rotary_factor")


def test_rotations_by_layer_are_refused(klein, tmp_path):
    rope = {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}
    with pytest.raises(CheckpointError, match=r"config.json: rope_parameters is .*, not those of one rotation"):
        opened(klein, tmp_path, VARIANT, (TEXT, "rope_parameters", rope))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("text_config.hidden_act", "gelu"),
        ("text_config.model_type", "ministral"),
        ("text_config.attention_bias", True),
        ("text_config.sliding_window", 4096),
        ("text_config.layer_types", ["sliding_attention"] * 33),
        ("text_config.partial_rotary_factor", 0.25),
        ("text_config.quantization", {"group_size": 32, "bits": 4, "mode": "mxfp4"}),
        ("vision_config.hidden_act", "gelu"),
        ("vision_config.hidden_act", REMOVED),
        ("vision_config.model_type", "clip_vision_model"),
        ("vision_config.num_channels", 4),
        ("vision_config.head_dim", 8),
        ("projector_hidden_act", "relu"),
        ("multimodal_projector_bias", True),
        ("vision_feature_layer", -2),
        ("vision_feature_layer", [-2, -1]),
        ("image_token_index", 12),
        ("spatial_merge_size", 2.5),
    ],
)
def test_refusals_of_dev_name_the_section(key, value, dev, tmp_path):
    named = f"{key}, which is left out," if value is REMOVED else key
    refused(dev, tmp_path, "dev", TEXT, key, value, named)


@pytest.mark.parametrize("section", ["text_config", "vision_config"])
@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_scaled_rotations_of_dev_are_refused(section, key, dev, tmp_path):
    refused(dev, tmp_path, "dev", TEXT, f"{section}.{key}", YARN, f"{section}.{key}.rope_type")


def test_a_scheduler_that_says_nothing_of_shifting_has_a_fixed_one(klein, tmp_path):
    named = "use_dynamic_shifting, which is left out,"
    refused(klein, tmp_path, VARIANT, SCHEDULER, "use_dynamic_shifting", REMOVED, named)


HARMLESS = [
    (SCHEDULER, "shift", 1.0),
    (SCHEDULER, "base_shift", 0.1),
    (SCHEDULER, "max_shift", 9.0),
    (SCHEDULER, "base_image_seq_len", 1),
    (SCHEDULER, "max_image_seq_len", 2),
    (SCHEDULER, "shift_terminal", 0.0),
    (SCHEDULER, "use_karras_sigmas", None),
    (SCHEDULER, "time_shift_type", REMOVED),
    (TRANSFORMER, "out_channels", 16),
    (TRANSFORMER, "out_channels", 0),
    (TRANSFORMER, "out_channels", REMOVED),
    (TRANSFORMER, "patch_size", REMOVED),
    (TRANSFORMER, "eps", REMOVED),
    (TRANSFORMER, "mlp_ratio", 3),
    (VAE, "scaling_factor", 0.3611),
    (VAE, "shift_factor", 0.1159),
    (VAE, "force_upcast", False),
    (VAE, "sample_size", [512, 512]),
    (VAE, "batch_norm_momentum", 0.5),
    (VAE, "act_fn", "swish"),
    (VAE, "decoder_block_out_channels", REMOVED),
    (VAE, "down_block_types", REMOVED),
    (TEXT, "max_position_embeddings", 1),
    (TEXT, "sliding_window", 4),
    (TEXT, "max_window_layers", 3),
    (TEXT, "attention_dropout", 0.5),
    (TEXT, "use_cache", False),
    (TEXT, "initializer_range", 1.0),
    (TEXT, "architectures", ["Qwen3Model"]),
    (TEXT, "torch_dtype", "float16"),
    (TEXT, "layer_types", REMOVED),
    (TEXT, "hidden_act", REMOVED),
    (TEXT, "rope_scaling", None),
    (TEXT, "rope_scaling", {}),
    (TEXT, "_name_or_path", "somewhere"),
    (INDEX, "scheduler", [None, None]),
    (INDEX, "safety_checker", [None, None]),
]


@pytest.mark.parametrize(("file", "key", "value"), HARMLESS)
def test_what_changes_nothing_is_let_pass_without_a_word(file, key, value, klein, tmp_path):
    source = opened(klein, tmp_path, VARIANT, (file, key, value))
    assert source.configs == Source.open(klein, VARIANT).configs
    assert not source.notes


@pytest.mark.parametrize(
    ("changes", "theta"),
    [
        ([("rope_parameters", REMOVED), ("rope_theta", 5e5), ("rope_scaling", None)], 5e5),
        ([("rope_parameters", {"rope_type": "default"}), ("rope_theta", 5e5)], 5e5),
        ([("rope_parameters", {"rope_type": "default", "rope_theta": 5e5}), ("rope_theta", 3)], 5e5),
        ([("rope_scaling", {"type": "default"}), ("rope_theta", 5e5)], 5e5),
        ([("rope_parameters", REMOVED)], 1e4),
        ([("rope_parameters", None)], 1e4),
    ],
)
def test_the_base_of_the_rotation_is_the_one_that_transformers_reads(changes, theta, klein, tmp_path):
    copy = Path(shutil.copytree(klein, tmp_path / "model"))
    for key, value in changes:
        change(copy, TEXT, key, value)
    assert Qwen3Config.from_pretrained(copy / "text_encoder").rope_parameters["rope_theta"] == theta
    assert Source.open(copy, VARIANT).configs["text_encoder"].rope_theta == theta


def test_sizes_that_are_left_out_are_those_of_the_reference(dev, klein, tmp_path):
    def defaults(function: Callable) -> dict[str, Any]:
        return {name: x.default for name, x in inspect.signature(function).parameters.items()}

    for table, reference in [
        (options.TRANSFORMER, defaults(Flux2Transformer2DModel.__init__)),
        (options.VAE, defaults(AutoencoderKLFlux2.__init__)),
        (options.SCHEDULER, defaults(FlowMatchEulerDiscreteScheduler.__init__)),
        (options.QWEN3, Qwen3Config().to_dict()),
        (options.MISTRAL, MistralConfig().to_dict()),
        (options.PIXTRAL, PixtralVisionConfig().to_dict()),
        (options.MISTRAL3, Mistral3Config().to_dict()),
    ]:
        assert table.defaults == {key: reference[key] for key in table.defaults}
    config = opened(dev, tmp_path, "dev", (TEXT, "text_config.head_dim", REMOVED)).configs["text_encoder"]
    assert config.head_dim == config.hidden_size // config.num_attention_heads


@pytest.mark.parametrize(
    ("table", "reference"),
    [
        (options.TRANSFORMER, Flux2Transformer2DModel),
        (options.VAE, AutoencoderKLFlux2),
        (options.SCHEDULER, FlowMatchEulerDiscreteScheduler),
        (options.QWEN3, Qwen3Config),
        (options.MISTRAL, MistralConfig),
        (options.PIXTRAL, PixtralVisionConfig),
        (options.MISTRAL3, Mistral3Config),
    ],
    ids=lambda value: getattr(value, "__name__", "table"),
)
def test_every_key_of_the_reference_is_in_one_list(table, reference):
    if dataclasses.is_dataclass(reference):
        keys = {field.name for field in dataclasses.fields(reference) if field.init}
    else:
        keys = inspect.signature(reference.__init__).parameters.keys() - {"self"}
    assert keys - table.read - table.fixed.keys() - table.harmless == set()
    assert not table.harmless & (table.read | table.fixed.keys())
    assert not table.read & table.fixed.keys()


def test_a_key_that_the_reference_ignores_is_told(dev, klein, tmp_path):
    odd = ((VAE, "lr_warmup", 7), (VAE, "\x1b[31m" + "x" * 500, 1), (VAE, "other", None))
    (note,) = opened(klein, tmp_path, VARIANT, *odd).notes
    assert "vae/config.json: unknown keys are ignored, as the reference does: 'lr_warmup', '\\x1b" in note
    assert len(note) < 300 + len(str(tmp_path))
    shutil.rmtree(tmp_path / "model")
    (note,) = opened(dev, tmp_path, "dev", (TEXT, "vision_config.glow", 1)).notes
    assert "'vision_config.glow'" in note


@pytest.mark.parametrize("shape", ["klein-4b", "dev"])
def test_folders_as_the_reference_saves_them_pass_without_a_word(shape, klein, dev):
    assert not Source.open({"klein-4b": klein, "dev": dev}[shape], shape).notes
