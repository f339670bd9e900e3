"""What the headers of files are told to be: every variant, naming, prefix and format, adapters, and strangers."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from flux2_mlx.convert import assembled, conversion, identify, loose_tensors
from flux2_mlx.convert.formats import plain as plain_files
from flux2_mlx.convert.geometry import titles
from flux2_mlx.convert.identity import MODEL, Conversion
from helpers.headers import (
    NUMBER,
    Headers,
    by_mlx,
    by_quanto,
    by_torchao,
    cast,
    declared,
    in_blocks,
    in_int8,
    in_nf4,
    in_nvfp4,
    is_mlp,
    is_no_text_attention,
    plain,
    scaled,
    write,
    write_gguf,
)
from helpers.listings import listing, prefixed, renamed, text_only

from flux2_mlx.checkpoint import Checkpoint
from flux2_mlx.config import VARIANTS
from flux2_mlx.weights import TensorInfo

FOUR, NINE, DEV = ("klein-4b", "klein-base-4b"), ("klein-9b", "klein-base-9b", "klein-9b-kv"), ("dev",)
ALL = (*FOUR, *NINE, *DEV)
COMFY, DIFFUSION = "model.diffusion_model.", "diffusion_model."
SIZES = {"klein-4b": FOUR, "klein-9b": NINE, "dev": DEV}
# The bytes of section A.7 of the facts, as `bf16`, `qint8` and `qint4`.
BYTES = {
    "klein-4b": (7_751_089_152, 4_117_773_312, 2_414_361_600, 2_180_004_864),
    "klein-9b": (18_157_162_496, 9_646_002_176, 5_602_693_120, 5_106_716_672),
    "dev": (64_446_562_304, 34_237_251_584, 19_703_988_224, 18_125_619_200),
    "qwen3-4b": (8_044_936_192, 4_274_056_192, 2_591_747_072, 2_262_920_192),
    "qwen3-8b": (16_381_470_720, 8_702_945_280, 5_490_108_416, 4_607_731_712),
    "mistral3-24b": (48_022_722_560, 25_513_072_640, 15_229_163_520, 13_507_926_016),
}
QUANTS = ("bf16", "qint8", "mixed4", "qint4")
ORIGINAL, TRANSFORMERS = "the original release", "transformers"


def transformer(size, naming="bfl"):
    return listing(f"transformer_{size}_{naming}")


def old_scales(infos, **options):
    """fp8 as ComfyUI first had it, with a tensor that marks the set."""
    marker = {"scaled_fp8": TensorInfo("F8_E4M3", (2,))}
    return scaled(infos, beside=lambda shape: {".scale_weight": NUMBER, ".scale_input": NUMBER}, **options) | marker


def marked(infos):
    """fp8 with a tensor of each layer that says so."""
    said = {".weight_scale": NUMBER, ".comfy_quant": TensorInfo("U8", (27,))}
    return scaled(infos, beside=lambda shape: said)


def in_rows(infos, format):
    dtype, scales = {
        "int8_tensorwise": ("I8", lambda shape: TensorInfo("F32", (shape[0], 1))),
        "mxfp8": ("F8_E4M3", lambda shape: TensorInfo("U8", (shape[0] + -shape[0] % 128, shape[1] // 32))),
    }[format]
    return scaled(infos, dtype=dtype, beside=lambda shape: {".weight_scale": scales(shape)})


def split(infos):
    """The projections of double blocks apart, as some files have them."""
    found = {}
    for name, info in infos.items():
        for x in "qkv" if name.endswith(".qkv.weight") else ():
            found[name.replace(".qkv.", f".{x}_proj.")] = replace(info, shape=(info.shape[0] // 3, info.shape[1]))
        if not name.endswith(".qkv.weight"):
            found[name] = info
    return found


def scales_as_weights(infos):
    return renamed(infos, [("_norm.scale", "_norm.weight")])


def llama(size):
    """A text encoder as llama.cpp names it."""
    pairs = [
        *(("model.layers.", "blk."), ("model.embed_tokens.", "token_embd."), ("model.norm.", "output_norm.")),
        *(("lm_head.", "output."), ("self_attn.o_proj", "attn_output"), ("self_attn.", "attn_"), ("_proj.", ".")),
        *(("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ffn_norm"), ("mlp.", "ffn_")),
    ]
    infos = listing(size)
    return renamed(text_only(infos) if "mistral" in size else infos, pairs)


def everything():
    """A file of all parts of klein-4b."""
    return (
        prefixed(transformer("klein-4b"), COMFY)
        | prefixed(listing("ae_bfl"), "vae.")
        | prefixed(listing("qwen3-4b"), "text_encoders.qwen3_4b.transformer.")
    )


def case(name, infos, variants, format="bf16", *, naming=ORIGINAL, prefix="", quant="bf16", said=None, file=""):
    """A row of the table: a header, and the right answers."""
    answers = (variants, format.split(), naming, prefix, quant)
    return pytest.param(infos, said or {}, file, answers, id=name)


def packed_by_others():
    for size, rows in SIZES.items():
        for naming, saver in (("bfl", ORIGINAL), ("diffusers", "diffusers")):
            infos, more = transformer(size, naming), {"naming": saver}
            nf4, torchao = in_nf4(infos), by_torchao(infos)
            yield case(f"{size} {naming} nf4", nf4, rows, "bitsandbytes_nf4 bf16", quant="qint4", **more)
            yield case(f"{size} {naming} int8", in_int8(infos), rows, "bitsandbytes_int8 bf16", quant="qint8", **more)
            for dtype, kind in (("I8", "qint8"), ("F8_E4M3", "qfloat8_e4m3fn")):
                told = f"quanto_{kind} bf16"
                yield case(f"{size} {naming} {kind}", by_quanto(infos, dtype), rows, told, quant="qint8", **more)
            told = "torchao_int8 bf16"
            yield case(f"{size} {naming} torchao", torchao[0], rows, told, quant="qint8", said=torchao[1], **more)
            for bits in (4, 8):
                said = {"quantization": json.dumps({"bits": bits, "group_size": 64})}
                told, quant = f"MLX_{bits}-bit bf16", f"qint{bits}"
                yield case(
                    f"{size} {naming} mlx {bits}", by_mlx(infos, bits), rows, told, quant=quant, said=said, **more
                )
    yield case(
        "qwen3-8b nf4", in_nf4(listing("qwen3-8b")), NINE, "bitsandbytes_nf4 bf16", quant="qint4", naming=TRANSFORMERS
    )


def transformers():
    for size, rows in SIZES.items():
        bfl, diffusers = transformer(size), transformer(size, "diffusers")
        yield case(f"{size} original", bfl, rows)
        yield case(f"{size} comfy", prefixed(bfl, COMFY), rows, prefix=COMFY)
        yield case(f"{size} other prefix", prefixed(bfl, DIFFUSION), rows, prefix=DIFFUSION)
        yield case(f"{size} norms as weights", scales_as_weights(bfl), rows)
        yield case(f"{size} split", split(bfl), rows)
        yield case(f"{size} diffusers", diffusers, rows, naming="diffusers")
        yield case(f"{size} fp32", cast(bfl, "F32"), rows, "fp32")
        yield case(f"{size} fp16 comfy", cast(prefixed(bfl, COMFY), "F16"), rows, "fp16", prefix=COMFY)
        fp8 = scaled(bfl)
        said = declared(fp8, "float8_e4m3fn")
        yield case(f"{size} fp8", fp8, rows, "fp8 bf16", quant="qint8", said=said)
        comfy = prefixed(fp8, COMFY)
        yield case(f"{size} fp8 comfy", comfy, rows, "fp8 bf16", prefix=COMFY, quant="qint8", said=said)
        yield case(f"{size} fp8 old", old_scales(bfl), rows, "fp8 bf16", quant="qint8")
        yield case(f"{size} fp8 marked", marked(bfl), rows, "fp8 bf16", quant="qint8")
        yield case(f"{size} fp8 diffusers", scaled(diffusers), rows, "fp8 bf16", naming="diffusers", quant="qint8")
        yield case(f"{size} fp8 split", scaled(split(bfl)), rows, "fp8 bf16", quant="qint8")
        yield case(f"{size} fp8 cast", cast(bfl, "F8_E4M3"), rows, "fp8", quant="qint8")
        yield case(f"{size} e5m2 cast", cast(bfl, "F8_E5M2", in_blocks), rows, "fp8 bf16", quant="qint8")
        nvfp4 = in_nvfp4(bfl)
        yield case(
            f"{size} nvfp4", nvfp4, rows, "nvfp4 bf16", quant="qint4", said=declared(nvfp4, "nvfp4", ".weight_scale_2")
        )
        for format, kind in (("int8_tensorwise", "int8"), ("mxfp8", "mxfp8")):
            infos = in_rows(bfl, format)
            yield case(f"{size} {kind}", infos, rows, f"{kind} bf16", quant="qint8", said=declared(infos, format))
    mixed = scaled(transformer("dev"), is_mlp)
    yield case("dev fp8mixed", mixed, DEV, "fp8 bf16", quant="qint8", said=declared(mixed, "float8_e4m3fn"))
    four = transformer("klein-4b")
    yield case("klein-4b in its file's name", four, FOUR[:1], file="flux-2-klein-4b.safetensors")
    yield case("klein-base-4b in its file's name", four, FOUR[1:], file="flux-2-klein-base-4b.safetensors")
    nine, title = transformer("klein-9b"), {"modelspec.title": "FLUX.2 klein 9b kv"}
    yield case("klein-9b-kv in its metadata", nine, NINE[2:], said=title, file="klein-base-9b.safetensors")


def encoders_and_vaes():
    for size, rows in (("qwen3-4b", FOUR), ("qwen3-8b", NINE), ("mistral3-24b", DEV)):
        infos, naming = listing(size), "Mistral on disk" if size == "mistral3-24b" else TRANSFORMERS
        yield case(size, infos, rows, naming=naming)
        yield case(f"{size} fp8", scaled(infos), rows, "fp8 bf16", naming=naming, quant="qint8")
        yield case(f"{size} fp8 old", old_scales(infos), rows, "fp8 bf16", naming=naming, quant="qint8")
        without = {name.removeprefix("model."): info for name, info in text_only(infos).items()}
        yield case(f"{size} without a head", without, rows, naming="transformers without a head")
        yield case(f"{size} in llama.cpp's naming", llama(size), rows, naming=LLAMA[size])
    new = "Mistral of transformers since 4.52"
    yield case("mistral3-24b new", listing("mistral3-24b_new_naming"), DEV, naming=new)
    tekken = text_only(listing("mistral3-24b"), 30) | {"tekken_model": TensorInfo("U8", (19_000_000,))}
    yield case("mistral3-24b of ComfyUI", tekken, DEV, naming=TRANSFORMERS)
    yield case("vae", listing("vae_diffusers"), ALL, naming="diffusers")
    yield case("vae prefixed", prefixed(listing("vae_diffusers"), "vae."), ALL, naming="diffusers", prefix="vae.")
    yield case("small decoder", listing("vae_small_decoder_diffusers"), ALL, naming="diffusers")
    yield case("ae", listing("ae_bfl"), ALL, "fp32")
    yield case("ae first stage", prefixed(listing("ae_bfl"), "first_stage_model."), ALL, "fp32", prefix=STAGE)


LLAMA = {"qwen3-4b": "llama.cpp", "qwen3-8b": "llama.cpp", "mistral3-24b": "llama.cpp, with permuted heads"}
STAGE = "first_stage_model."


@pytest.mark.parametrize(
    ("infos", "said", "file", "answers"), [*transformers(), *encoders_and_vaes(), *packed_by_others()]
)
def test_parts_of_models(infos, said, file, answers):
    found = identify(plain(infos, said), "x", titles(said, file))
    (part,) = found.parts
    assert found.kind == MODEL
    told = (found.variant,) if found.variant else found.variants
    assert (told, [x.replace(" ", "_") for x in found.formats], part.naming, part.prefix, found.quant) == answers
    assert (found.advice, part.problem) == (None, None)
    stored = infos.infos if isinstance(infos, Headers) else infos
    assert found.nbytes == sum(info.nbytes for info in stored.values())
    assert found.nbytes == part.nbytes + sum(info.nbytes for name, info in stored.items() if name == "tekken_model")
    assert math.isclose(sum(found.formats.values()), 1)
    tokenizer = () if "tekken_model" in stored else ("tokenizer",)
    assert found.missing == (*(x for x in ("transformer", "text_encoder", "vae") if x != part.name), *tokenizer)


@pytest.mark.parametrize("name", [*SIZES, "qwen3-4b", "qwen3-8b", "mistral3-24b"])
def test_sizes_when_converted(name):
    infos = transformer(name) if name in SIZES else listing(name)
    for stored in (infos, scaled(infos), cast(infos, "F32")):
        (part,) = identify(plain(stored), "x").parts
        expected = dict(zip(QUANTS, BYTES[name], strict=True))
        assert part.converted == expected | {"qint6": (expected["qint8"] + expected["qint4"]) // 2}


def test_the_official_fp8_file_has_this_size():
    found = identify(plain(scaled(transformer("klein-4b"))), "x")
    assert found.nbytes == 4_070_588_032
    assert found.parts[0].precision == {
        "double blocks": {"fp8": 40},
        "single blocks": {"fp8": 40},
        "modulation": {"bf16": 3},
        "final layer": {"bf16": 2},
        "embedders": {"bf16": 4},
        "norms and biases": {"bf16": 60},
    }


def test_the_mixed_files_of_dev():
    mixed, nvfp4 = scaled(transformer("dev"), is_mlp), in_nvfp4(transformer("dev"), is_no_text_attention)
    assert len(nvfp4) == 731
    (part,) = identify(plain(mixed), "x").parts
    assert part.precision["double blocks"] == {"bf16": 32, "fp8": 32}
    assert part.precision["single blocks"] == {"fp8": 96}
    (part,) = identify(plain(nvfp4, declared(nvfp4, "nvfp4", ".weight_scale_2")), "x").parts
    assert part.precision["double blocks"] == {"nvfp4": 48, "bf16": 16}
    assert (part.tensors, part.precision["single blocks"]) == (299, {"nvfp4": 96})


@pytest.mark.parametrize(
    ("in_four", "in_eight", "quant"),
    [
        (lambda name: name == "double_blocks.0.img_attn.proj.weight", lambda name: False, "bf16"),
        (lambda name: ".linear1." in name, lambda name: ".linear2." in name, "qint8"),  # 48% in 4 bits, 15% in 8
        (lambda name: "blocks" in name and "_attn." not in name, lambda name: "_attn." in name, "qint4"),
    ],
    ids=["one layer in 4 bits", "half in 4 and 8 bits", "most in 4 bits"],
)
def test_bits_are_those_of_most_weights(in_four, in_eight, quant):
    infos = in_nvfp4(scaled(transformer("klein-4b"), in_eight), in_four)
    said = {name.removesuffix(".weight_scale_2"): "nvfp4" for name in infos if name.endswith(".weight_scale_2")}
    said |= {name.removesuffix(".weight"): "float8_e4m3fn" for name, info in infos.items() if info.dtype == "F8_E4M3"}
    said = {name: {"format": format} for name, format in said.items() if not name.endswith("_scale")}
    assert identify(plain(infos, {"_quantization_metadata": json.dumps({"layers": said})}), "x").quant == quant


def test_precision_of_an_encoder():
    (part,) = identify(plain(scaled(listing("mistral3-24b"), lambda name: ".mlp." in name)), "x").parts
    assert part.precision == {
        "layers": {"bf16": 160, "fp8": 120},
        "embedding": {"bf16": 1},
        "head": {"bf16": 1},
        "vision": {"bf16": 172},
        "norms and biases": {"bf16": 131},
    }


@pytest.mark.parametrize(
    ("kind", "quant"), [("Q2_K", "qint4"), ("Q4_K", "qint4"), ("Q5_K", "qint8"), ("Q6_K", "qint8"), ("Q8_0", "qint8")]
)
@pytest.mark.parametrize(
    ("infos", "rows"),
    [
        (transformer("klein-4b"), FOUR),
        (transformer("klein-9b"), NINE),
        (transformer("dev"), DEV),
        (llama("qwen3-8b"), NINE),
        (llama("mistral3-24b"), DEV),
    ],
    ids=["klein-4b", "klein-9b", "dev", "qwen3-8b", "mistral3-24b"],
)
def test_gguf_files(kind, quant, infos, rows, tmp_path):
    path = write_gguf(tmp_path / "x.gguf", infos, kind)
    tensors, metadata = plain_files([path])
    found = identify(tensors, "x", titles(metadata))
    assert (found.variants, found.quant) == (rows, quant)
    assert {*found.formats} == {kind, "bf16", "fp32"}
    assert 0 <= path.stat().st_size - found.nbytes < 100_000


def test_a_file_of_all_parts():
    found = identify(plain(everything()), "x", ["klein 4b"])
    assert (found.name, found.variant) == ("transformer, text encoder and VAE of FLUX.2 klein-4b", "klein-4b")
    assert {part.name: part.prefix for part in found.parts} == {
        "transformer": COMFY,
        "vae": "vae.",
        "text_encoder": "text_encoders.qwen3_4b.transformer.",
    }
    assert found.missing == ("tokenizer",)


def test_parts_of_different_models():
    found = identify(plain(transformer("klein-4b") | listing("qwen3-8b")), "x")
    assert (found.kind, found.variants) == (MODEL, ())
    assert found.advice == (
        "its parts are of different models: the transformer of klein-4b or klein-base-4b, the text encoder of klein-9b "
        "or klein-base-9b or klein-9b-kv"
    )


def test_what_a_conversion_fetches(tmp_path):
    path = write(tmp_path / "klein-4b.safetensors", transformer("klein-4b"))
    repo = VARIANTS["klein-4b"].repo
    fetched = dict.fromkeys(("text_encoder", "vae", "tokenizer"), repo)
    assert conversion(path, None, []) == Conversion({"transformer": path} | fetched, "bf16", "qint8")


@pytest.mark.parametrize("other", ["klein-9b", "dev", "demo"])
def test_models_of_other_families_complete_none(other, tmp_path):
    path = write(tmp_path / "klein-4b.safetensors", everything())
    converted = Checkpoint.outline(VARIANTS[other], "bf16", "bf16")
    assert conversion(path, None, [converted]).places["tokenizer"] == VARIANTS["klein-4b"].repo
    relative = Checkpoint.outline(VARIANTS["klein-base-4b"], "bf16", "bf16")
    assert assembled(path, {}, others=[converted, relative]).places["tokenizer"] == Path("tokenizer")


@pytest.mark.parametrize("name", ["klein-4b", "klein-9b", "dev"])
@pytest.mark.parametrize("naming", ["bfl", "diffusers"])
@pytest.mark.parametrize("bits", [4, 8])
def test_mlx_files_are_read_without_a_config_by_the_model_that_fits(name, naming, bits, tmp_path):
    path = write(tmp_path / f"{name}.safetensors", by_mlx(transformer(name, naming), bits))
    fetched = dict.fromkeys(("text_encoder", "vae", "tokenizer"), VARIANTS[name].repo)
    assert conversion(path, None, []) == Conversion({"transformer": path} | fetched, f"qint{bits}", f"qint{bits}")
    tensors, _ = loose_tensors(path, None)
    assert identify(tensors, "x", [name]).variant == name
    assert {*tensors.kinds.values()} == {f"MLX {bits}-bit"}


def test_why_it_can_not_be_converted(tmp_path):
    path = write(tmp_path / "qwen3-8b.safetensors", listing("qwen3-8b"))
    refusal = conversion(path, None, []).refusal
    assert refusal.startswith(f"{path} holds only the text encoder of a model; say where its transformer and VAE are")
