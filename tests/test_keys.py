"""Names, shapes and sizes of the full-size networks, none of which is allocated.

`keys/` lists the released files: name, shape, dtype; `{0-4}` in a name stands for the numbers 0 to 4.
"""

import math
import re
from pathlib import Path
from types import ModuleType

import mlx.core as mx
import pytest
from flux2_mlx.convert import text, transformer, vae

from flux2_mlx.checkpoint import Component, TensorInfo, module_tensors
from flux2_mlx.config import VARIANTS, VAEConfig
from flux2_mlx.quantization import statement

KEYS = Path(__file__).parent / "keys"
RULES = {"transformer": transformer, "text_encoder": text, "vae": vae}
DEV, KLEIN_4B, KLEIN_9B = (VARIANTS[name] for name in ("dev", "klein-4b", "klein-9b"))
SMALL_DECODER = VAEConfig(decoder_block_out_channels=(96, 192, 384, 384))
# Source listing: component, geometry, tensors that are read, tensors that are dropped.
SOURCES = {
    "transformer_dev_diffusers": ("transformer", DEV.transformer, 331, 0),
    "transformer_klein-4b_diffusers": ("transformer", KLEIN_4B.transformer, 169, 0),
    "transformer_klein-9b_diffusers": ("transformer", KLEIN_9B.transformer, 233, 0),
    "qwen3-4b": ("text_encoder", KLEIN_4B.text, 298, 100),
    "qwen3-8b": ("text_encoder", KLEIN_9B.text, 298, 101),
    "vae_diffusers": ("vae", VAEConfig(), 250, 1),
    "vae_small_decoder_diffusers": ("vae", SMALL_DECODER, 250, 1),
}
# Bytes as bfloat16, 8 and 4 bits. The released VAE has 2 bytes more: a counter, which is dropped.
_4B = (7_751_089_152, 4_117_773_312, 2_180_004_864)
_9B = (18_157_162_496, 9_646_002_176, 5_106_716_672)
_QWEN3_4B = (6_228_176_384, 3_308_854_784, 1_751_883_264)
_QWEN3_8B = (11_663_767_040, 6_196_590_080, 3_280_762_368)
SIZES = {
    ("transformer", "klein-4b"): _4B,
    ("transformer", "klein-base-4b"): _4B,
    ("transformer", "klein-9b"): _9B,
    ("transformer", "klein-base-9b"): _9B,
    ("transformer", "klein-9b-kv"): _9B,
    ("transformer", "dev"): (64_446_562_304, 34_237_251_584, 18_125_619_200),
    ("text_encoder", "klein-4b"): _QWEN3_4B,
    ("text_encoder", "klein-base-4b"): _QWEN3_4B,
    ("text_encoder", "klein-9b"): _QWEN3_8B,
    ("text_encoder", "klein-base-9b"): _QWEN3_8B,
    ("text_encoder", "klein-9b-kv"): _QWEN3_8B,
    **{("vae", name): (168_092_742,) * 3 for name in VARIANTS if name != "demo"},
}


@pytest.fixture(autouse=True)
def _nothing_allocated():
    """Fail if the test put more than a few random keys into memory."""
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    yield
    assert mx.get_peak_memory() - before < 100_000


def listing(name: str) -> dict[str, TensorInfo]:
    tensors = {}
    for line in (KEYS / f"{name}.tsv").read_text().splitlines():
        key, shape, dtype = line.split("\t")
        tensor = TensorInfo(dtype, tuple(int(size) for size in shape.split("x")) if shape != "scalar" else ())
        numbers = re.search(r"\{(\d+)-(\d+)\}", key)
        for number in range(int(numbers[1]), int(numbers[2]) + 1) if numbers else [None]:
            tensors[key if numbers is None else key.replace(numbers[0], str(number))] = tensor
    return tensors


def build(component: str, config, quant: str = "bf16") -> Component:
    plain = Component(component, config, None, ())
    shapes = {name: tensor.shape for name, tensor in module_tensors(plain.build()).items()}
    layers = [(name.removesuffix(".weight"), shape) for name, shape in shapes.items() if len(shape) == 2]
    return Component(component, config, statement(quant, component, layers), ())


def what_rules_read(rules: ModuleType, component: Component) -> dict[str, TensorInfo]:
    """Source tensors that the rules ask for; each may be asked for once."""
    read: dict[str, TensorInfo] = {}
    for name, tensor in module_tensors(component.build()).items():
        rule = rules.rule_for(name, tensor.shape)
        for source in rule.sources:
            assert source not in read, f"{source} is read twice"
            read[source] = TensorInfo("BF16", rule.source_shape(tensor.shape))
    return read


@pytest.mark.parametrize("source", SOURCES)
def test_rules_read_the_released_files(source):
    component, config, read, dropped = SOURCES[source]
    released = listing(source)
    kept = {name: x for name, x in released.items() if not RULES[component].is_dropped(name, config)}
    assert (len(kept), len(released) - len(kept)) == (read, dropped)
    assert what_rules_read(RULES[component], build(component, config)) == kept


@pytest.mark.parametrize(("source", "last_layer", "head"), [("qwen3-4b", 35, False), ("qwen3-8b", 35, True)])
def test_dropped_text_tensors(source, last_layer, head):
    _, config, *_ = SOURCES[source]
    dropped = {name for name in listing(source) if text.is_dropped(name, config)}
    layers = {int(name.split(".")[2]) for name in dropped if name.startswith("model.layers.")}
    assert layers == set(range(27, last_layer + 1))
    others = {name for name in dropped if not name.startswith("model.layers.")}
    assert others == {"model.norm.weight"} | ({"lm_head.weight"} if head else set())


@pytest.mark.parametrize("source", ["vae_diffusers", "vae_small_decoder_diffusers"])
def test_dropped_vae_tensors(source):
    assert [name for name in listing(source) if vae.is_dropped(name, VAEConfig())] == ["bn.num_batches_tracked"]


@pytest.mark.parametrize("variant", ["dev", "klein-4b", "klein-9b"])
def test_transformer_names_are_those_of_the_original_release(variant):
    component = build("transformer", VARIANTS[variant].transformer)
    assert module_tensors(component.build()) == listing(f"transformer_{variant}_bfl")


@pytest.mark.parametrize("quant", ["bf16", "qint8", "qint4"])
@pytest.mark.parametrize(("component", "variant"), SIZES)
def test_sizes(component, variant, quant):
    row = VARIANTS[variant]
    config = {"transformer": row.transformer, "text_encoder": row.text, "vae": row.vae}[component]
    expected = SIZES[component, variant][["bf16", "qint8", "qint4"].index(quant)]
    assert build(component, config, quant).nbytes == expected


def test_size_of_the_small_decoder():
    assert build("vae", SMALL_DECODER).nbytes == 124_746_694


def test_unquantized_sizes_are_two_bytes_a_parameter():
    for source, (component, config, *_) in SOURCES.items():
        kept = [x for name, x in listing(source).items() if not RULES[component].is_dropped(name, config)]
        assert build(component, config).nbytes == 2 * sum(math.prod(x.shape) for x in kept)
