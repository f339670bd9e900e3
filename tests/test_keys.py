"""Names, shapes and sizes of the full-size networks, none of which is allocated."""

import math
from dataclasses import replace

import pytest
from flux2_mlx.convert.naming import read
from flux2_mlx.convert.parts import LAYOUT
from helpers import listings
from helpers.mlx_state import nothing_allocated
from helpers.source_rules import rules_for

from flux2_mlx.checkpoint import Component, variant_sizes
from flux2_mlx.config import VARIANTS, Config, VAEConfig, Variant
from flux2_mlx.loading import module_tensors
from flux2_mlx.weights import TensorInfo

DEV, KLEIN_4B, KLEIN_9B = (VARIANTS[name] for name in ("dev", "klein-4b", "klein-9b"))
SMALL_DECODER = VAEConfig(decoder_block_out_channels=(96, 192, 384, 384))


def text_parts(row: Variant) -> dict[str, Config]:
    """What is made from the folder of the text encoder."""
    parts = {"text_encoder": row.text, "language_model": row.text}
    return parts if row.vision is None else parts | {"vision": row.vision}


# Source listing: the components made from it with their geometry, tensors that are read, tensors that are dropped.
SOURCES = {
    "transformer_dev_diffusers": ({"transformer": DEV.transformer}, 331, 0),
    "transformer_klein-4b_diffusers": ({"transformer": KLEIN_4B.transformer}, 169, 0),
    "transformer_klein-9b_diffusers": ({"transformer": KLEIN_9B.transformer}, 233, 0),
    "qwen3-4b": (text_parts(KLEIN_4B), 398, 0),
    "qwen3-8b": (text_parts(KLEIN_9B), 399, 0),
    "mistral3-24b": (text_parts(DEV), 585, 0),
    "mistral3-24b_new_naming": (text_parts(DEV), 585, 0),
    "vae_diffusers": ({"vae": VAEConfig()}, 250, 1),
    "vae_small_decoder_diffusers": ({"vae": SMALL_DECODER}, 250, 1),
}
TEXT_SOURCES = [source for source, (parts, *_) in SOURCES.items() if "text_encoder" in parts]
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
    ("text_encoder", "dev"): (34_687_508_480, 18_428_026_880, 9_756_303_360),
    **{("vae", name): (168_092_742,) * 3 for name in VARIANTS if name != "demo"},
}
# All text parts of dev together.
DEV_TEXT = (48_022_722_560, 25_513_072_640, 13_507_926_016)
QUANTS = ("bf16", "qint8", "qint4")


@pytest.fixture(autouse=True)
def _nothing_allocated():
    with nothing_allocated():
        yield


def listing(name: str) -> dict[str, TensorInfo]:
    """The tensors of a listing; those of a text encoder by the names that Qwen3 has and rules read."""
    tensors = listings.listing(name)
    (reading,) = read(tensors, name).values()
    return reading.infos if reading.part == "text_encoder" else tensors


def kept(source: str) -> dict[str, TensorInfo]:
    """The tensors of a listing that have a place in our checkpoint."""
    component, config = next(iter(SOURCES[source][0].items()))
    return {name: tensor for name, tensor in listing(source).items() if not LAYOUT[component].is_dropped(name, config)}


def build(component: str, config: Config, quant: str = "bf16") -> Component:
    return Component(component, config, None, ()).quantized(quant)


def what_rules_read(parts: dict[str, Config]) -> dict[str, TensorInfo]:
    """Source tensors that the rules of these components ask for; each may be asked for once."""
    read: dict[str, TensorInfo] = {}
    for component, config in parts.items():
        for name, tensor in module_tensors(build(component, config).build()).items():
            rule = rules_for(component, config)(name, tensor.shape)
            for source in rule.sources:
                assert source not in read, f"{source} is read twice"
                read[source] = TensorInfo("BF16", rule.source_shape(tensor.shape))
    return read


@pytest.mark.parametrize("source", SOURCES)
def test_rules_read_the_released_files(source):
    parts, read, dropped = SOURCES[source]
    found = kept(source)
    assert (len(found), len(listing(source)) - len(found)) == (read, dropped)
    assert what_rules_read(parts) == found


@pytest.mark.parametrize(
    ("source", "row", "first", "last"),
    [("qwen3-4b", KLEIN_4B, 27, 35), ("qwen3-8b", KLEIN_9B, 27, 35), ("mistral3-24b", DEV, 30, 39)],
)
def test_the_encoder_and_the_later_layers_meet(source, row, first, last):
    encoder, later = (what_rules_read({name: row.text}) for name in ("text_encoder", "language_model"))
    layers = [{int(name.split(".")[2]) for name in part if ".layers." in name} for part in (encoder, later)]
    assert layers == [set(range(first)), set(range(first, last + 1))]
    assert [sum(".layers." not in name for name in part) for part in (encoder, later)] == [
        1,
        1 if row.text.tie_word_embeddings else 2,
    ]


@pytest.mark.parametrize("source", TEXT_SOURCES)
def test_what_only_generates_text_is_dropped_where_it_is_not_kept(source):
    config = replace(SOURCES[source][0]["text_encoder"], num_later_layers=0)
    names = {name for name in listing(source) if name.startswith(("model.", "lm_head."))}
    left = {name for name in names if not LAYOUT["text_encoder"].is_dropped(name, config)}
    assert left == set(what_rules_read({"text_encoder": config}))
    others = {name for name in names - left if ".layers." not in name}
    assert others == {"model.norm.weight"} | (names & {"lm_head.weight"})


@pytest.mark.parametrize("later", [0, 9])
def test_a_head_that_repeats_the_embedding_is_dropped(later):
    tied, untied = (replace(row.text, num_later_layers=later) for row in (KLEIN_4B, KLEIN_9B))
    is_dropped = LAYOUT["text_encoder"].is_dropped
    assert is_dropped("lm_head.weight", tied)
    assert is_dropped("lm_head.weight", untied) == (later == 0)


@pytest.mark.parametrize("source", ["vae_diffusers", "vae_small_decoder_diffusers"])
def test_dropped_vae_tensors(source):
    assert [name for name in listing(source) if LAYOUT["vae"].is_dropped(name, VAEConfig())] == [
        "bn.num_batches_tracked"
    ]


@pytest.mark.parametrize("variant", ["dev", "klein-4b", "klein-9b"])
def test_transformer_names_are_those_of_the_original_release(variant):
    component = build("transformer", VARIANTS[variant].transformer)
    assert module_tensors(component.build()) == listing(f"transformer_{variant}_bfl")


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize(("component", "variant"), SIZES)
def test_sizes(component, variant, quant):
    row = VARIANTS[variant]
    config = {"transformer": row.transformer, "text_encoder": row.text, "vae": row.vae}[component]
    expected = SIZES[component, variant][QUANTS.index(quant)]
    assert build(component, config, quant).nbytes == expected


@pytest.mark.parametrize("quant", QUANTS)
def test_size_of_all_text_parts_of_dev(quant):
    sizes = [build(component, config, quant).nbytes for component, config in text_parts(DEV).items()]
    assert sum(sizes) == DEV_TEXT[QUANTS.index(quant)]
    listed = variant_sizes(DEV, "bf16", quant)
    assert [listed[component] for component in text_parts(DEV)] == sizes


def test_size_of_the_small_decoder():
    assert build("vae", SMALL_DECODER).nbytes == 124_746_694


def test_unquantized_sizes_are_two_bytes_a_parameter():
    for source, (parts, *_) in SOURCES.items():
        size = sum(build(component, config).nbytes for component, config in parts.items())
        assert size == 2 * sum(math.prod(tensor.shape) for tensor in kept(source).values())


@pytest.mark.parametrize(("quant", "bits"), [("qint8", 8), ("qint4", 4)])
@pytest.mark.parametrize("source", TEXT_SOURCES)
def test_quantized_sizes_of_text_parts(source, quant, bits):
    """A quantized weight has a scale and a bias of two bytes for 64 values; norms and convolutions are left alone."""

    def size(shape: tuple[int, ...]) -> int:
        count = math.prod(shape)
        return count * bits // 8 + 4 * count // 64 if len(shape) == 2 and shape[1] % 64 == 0 else 2 * count

    parts = SOURCES[source][0]
    total = sum(build(component, config, quant).nbytes for component, config in parts.items())
    assert total == sum(size(tensor.shape) for tensor in kept(source).values())
