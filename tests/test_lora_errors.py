"""Files that are no adapter, or a damaged one: one line that says what is wrong and where."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from flux2_mlx.convert.lora import read_adapter
from helpers.adapters import CONFIGS, D, factors, lora, save
from helpers.headers import write

from flux2_mlx.errors import CheckpointError, InputError
from flux2_mlx.weights import TensorInfo

MODULE = "diffusion_model.double_blocks.0.img_attn.proj"
DOWN, UP = f"{MODULE}.lora_A.weight", f"{MODULE}.lora_B.weight"
LORA = lora(MODULE, D)


def refused(path, tensors, match, metadata=None):
    with pytest.raises(CheckpointError, match=match) as caught:
        read_adapter(save(path / "x.safetensors", tensors, metadata)).load(CONFIGS, "x")
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


def without(*keys, of=LORA):
    return {key: x for key, x in of.items() if key not in keys}


def lokr(**shapes):
    return factors(MODULE, **({"lokr_w1": (4, 4), "lokr_w2_a": (16, 2), "lokr_w2_b": (2, 16)} | shapes))


def loha(**shapes):
    names = [f"hada_w{n}_{half}" for n in (1, 2) for half in "ab"]
    return factors(MODULE, **(dict(zip(names, [(D, 2), (2, D)] * 2, strict=True)) | shapes))


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        (without(UP), r"img_attn\.proj\.lora_A\.weight has no lora_B beside it"),
        (without(DOWN), r"img_attn\.proj\.lora_B\.weight has no lora_A beside it"),
        (without(*LORA) | {f"{MODULE}.alpha": np.float32(1)}, "alpha belongs to no change of a layer"),
        ({f"{MODULE}.lokr_w1": np.ones((4, 4), np.float32)}, "lokr_w1 has no lokr_w2 beside it"),
        (without(f"{MODULE}.lokr_w2_b", of=lokr()), "lokr_w1 has no lokr_w2_b beside it"),
        (without(f"{MODULE}.hada_w2_a", of=loha()), "hada_w1_a has no hada_w2_a beside it"),
        (loha(hada_t1=(2, 2)), "has no hada_t2 beside it"),
        (
            {DOWN: np.ones((D, 3), np.float32), UP: np.ones((3, 3 * D), np.float32)},
            r"the factors of diffusion_model\.double_blocks\.0\.img_attn\.proj are stored transposed",
        ),
        (lokr(lokr_w2=(16, 16)), "are no factors of one change of a layer"),
        (LORA | lokr(), "are no factors of one change of a layer"),
        (LORA | {UP: np.ones((D, 4), np.float32)}, r"lora_B\.weight is of shape \[64, 4\] instead of \[64, 3\]"),
        (LORA | factors(MODULE, lora_mid__weight=(2, 3)), r"lora_mid\.weight is of shape \[2, 3\] instead of \[3, 3\]"),
        (LORA | {DOWN: np.ones(D, np.float32)}, r"lora_A\.weight is of shape \[64\] instead of 2 dimensions"),
        (LORA | {DOWN: np.ones((3, D, 3, 3), np.float32)}, r"is of shape \[3, 64, 3, 3\] instead of 2 dimensions"),
        (LORA | {DOWN: np.ones((0, D), np.float32)}, r"is of shape \[0, 64\], which is no factor"),
        (lokr(lokr_w2_a=(16, 3)), r"lokr_w2_a is of shape \[16, 3\] instead of \[16, 2\]"),
        (loha(hada_w2_b=(2, 32)), r"hada_w2_b is of shape \[2, 32\] instead of \[2, 64\]"),
        (
            LORA | factors(MODULE, dora_scale=(3, 1)),
            r"dora_scale is of shape \[3, 1\] instead of \[64, 1\] or \[1, 64\]",
        ),
        (LORA | factors(MODULE, diff_b=(3,)), r"diff_b is of shape \[3\] instead of \[64\]"),
        (LORA | factors(MODULE, alpha=(2,)), r"alpha is of shape \[2\], which is no single number"),
        (LORA | {f"{MODULE}.alpha": np.float32(np.inf)}, "alpha has values that are not finite"),
        (LORA | {UP: np.full((D, 3), np.nan, np.float32)}, r"lora_B\.weight has values that are not finite"),
        (LORA | {UP: np.ones((D, 3), np.int32)}, r"lora_B\.weight is stored as I32, which is not read"),
        (LORA | {f"{MODULE}.lora_E": np.ones((3, 1), np.float32)}, r"lora_E is not understood"),
        (LORA | lora("lora_unet_double_blocks_0_img_attn_proj", D), "are the same layer in two spellings"),
        (
            lora("transformer_blocks.0.attn.to_q", D) | lora("double_blocks.0.img_attn.qkv", 3 * D),
            r"to_q and double_blocks\.0\.img_attn\.qkv are the same layer|qkv and transformer_blocks",
        ),
        (LORA | lora(MODULE, D, ends=("down", "up")), "are the same factor of a layer; remove one"),
        (
            lora(MODULE, D, ends=("A__a", "B__a")) | lora(MODULE, D, ends=("A__b", "B__b")),
            "it holds several adapters, a, b; give",
        ),
        ({}, "it holds no change of a layer of FLUX.2, but no tensors"),
        ({"x.weight": np.ones((2, 2), np.float32)}, r"no change of a layer of FLUX\.2, but x\.weight; give an adapter"),
        (lora("my.own.layer", D), "it holds no change of a layer of FLUX.2"),
        (lora("double_blocks.*.img_attn.proj", D), "it holds no change of a layer of FLUX.2"),
        (lora("double_blocks.00.img_attn.proj", D), "it holds no change of a layer of FLUX.2"),
    ],
)
def test_damaged_adapters(tensors, match, tmp_path):
    refused(tmp_path, tensors, match)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ("{", "its lora_adapter_metadata can't be read"),
        ("[" * 100_000, "its lora_adapter_metadata can't be read"),
        ("[]", "its lora_adapter_metadata holds no JSON object"),
        ('{"r": 1e999}', "its lora_adapter_metadata can't be read"),
        ("{" + " " * 1_000_001, "it has more than 1000000 characters"),
        (
            '{"lora_alpha": 1, "lora_alpha": 8}',
            "its lora_adapter_metadata can't be read: 'lora_alpha' stands there twice",
        ),
        ({"r": 4}, r"img_attn\.proj is of rank 3, but its config says 4"),
        ({"transformer.r": 4, "r": 3}, "is of rank 3, but its config says 4"),
        ({"r": 3, "rank_pattern": {"proj": 2}}, "is of rank 3, but its config says 2"),
        ({"r": "three"}, "its rank is three, which is no finite number"),
        ({"r": 0}, "a rank of 0, which is none"),
        ({"r": 2.5}, r"a rank of 2\.5, which is none"),
        ({"r": True}, "its rank is True"),
        ({"r": 3, "lora_alpha": [1]}, r"its lora_alpha is \[1\]"),
        ({"r": 3, "lora_alpha": 10**400}, "its lora_alpha is 1000"),
        ({"alpha_pattern": [1]}, "its alpha_pattern is no table of layers"),
        ({"alpha_pattern": {"(a+)+b": 1}}, r"its alpha_pattern has '\(a\+\)\+b', which is not understood"),
        ({"peft_type": "OFT"}, "it is an adapter of the kind OFT; only"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is pissa, which .*; save it with PEFT's path_initial"),
        ({"init_lora_weights": "pissa_niter_16"}, "its init_lora_weights is pissa_niter_16, which changes"),
        ({"transformer.init_lora_weights": "olora"}, "its init_lora_weights is olora, which changes"),
        ({"init_lora_weights": "corda"}, "its init_lora_weights is corda, which changes"),
        ({"init_lora_weights": "lora_ga"}, "its init_lora_weights is lora_ga, which changes"),
        ({"use_rslora": "yes"}, "its use_rslora is yes, which is neither true nor false"),
        ({"use_bdlora": {"nblocks": 2}}, "it is of the kind BD-LoRA, which is not run"),
        ({"alora_invocation_tokens": [1]}, "it is of the kind aLoRA, which is not run"),
        ({"init_lora_weights": "loftq"}, "its init_lora_weights is loftq, which .*; give one that was trained"),
    ],
)
def test_what_metadata_say_is_checked(values, match, tmp_path):
    text = values if isinstance(values, str) else json.dumps(values)
    refused(tmp_path, LORA, match, {"lora_adapter_metadata": text})


@pytest.mark.parametrize("text", ["{", "[1]", '{"a": 1}', '{"a": {"b": null}}', "[" * 100_000, "x" * 1_000_001])
def test_what_only_informs_may_be_anything(text, tmp_path):
    metadata = dict.fromkeys(("ss_tag_frequency", "software", "trigger_word", "modelspec.title"), text)
    said = read_adapter(save(tmp_path / "x.safetensors", LORA, metadata)).said
    assert all(len(word) <= 500 for word in (said.title, *said.trigger_words))


def test_transposed_factors_of_a_square_layer_are_told(tmp_path):
    path = save(tmp_path / "x.safetensors", {DOWN: np.ones((D, 3), np.float32), UP: np.ones((3, D), np.float32)})
    with pytest.raises(CheckpointError, match=r"a layer of \[3, 3\] instead of .* and its factors may be transposed"):
        read_adapter(path).check(CONFIGS, "small")


def test_tensors_of_no_layer_are_named(tmp_path):
    norm = "diffusion_model.double_blocks.0.img_attn.norm.query_norm.diff"
    found = read_adapter(save(tmp_path / "x.safetensors", LORA | {norm: np.ones(16, np.float32)}))
    assert found.unknown == (norm,)
    assert found.fates(CONFIGS)[norm] == "(no layer that can be adapted)"
    assert found.fates(CONFIGS)[DOWN] == "transformer.double_blocks.0.img_attn.proj"
    assert found.notes(CONFIGS, "small")[0] == f"it has {norm}, which belongs to no layer that can be adapted"


@pytest.mark.parametrize("end", ["lora_velora_embed", "lora_velora_embed.default"])
def test_what_only_training_uses_is_named(end, tmp_path):
    key = f"{MODULE}.{end}"
    found = read_adapter(save(tmp_path / "x.safetensors", LORA | {key: np.ones(2, np.float32)}))
    assert found.fates(CONFIGS)[key] == "(training only)"
    assert found.notes(CONFIGS, "small") == [f"it has {key}, which nothing but training uses"]
    assert found.load(CONFIGS, "x").layers["transformer"]


def test_what_changes_nothing_is_told(tmp_path):
    zero = {f"{MODULE}.alpha": np.array(0, np.float32)}
    said = "it changes nothing, as its alpha is 0"
    assert said in read_adapter(save(tmp_path / "x.safetensors", LORA | zero)).notes(CONFIGS, "small")
    for other in ({}, zero | factors(MODULE, diff_b=(D,))):
        assert said not in read_adapter(save(tmp_path / "x.safetensors", LORA | other)).notes(CONFIGS, "small")


def test_files_and_folders(tmp_path):
    folder = tmp_path / "adapter"
    with pytest.raises(CheckpointError, match="there is no file or folder"):
        read_adapter(folder)
    with pytest.raises(InputError, match="is no file or folder of a model but a device"):
        read_adapter(Path("/dev/zero"))
    folder.mkdir()
    (folder / "pytorch_lora_weights.bin").touch()
    for source, name in ((folder / "pytorch_lora_weights.bin", None), (folder, "pytorch_lora_weights.bin")):
        with pytest.raises(CheckpointError, match="is a pickle, which could run code"):
            read_adapter(source, name)
    with pytest.raises(CheckpointError, match=r"holds no \.safetensors file, only pickles"):
        read_adapter(folder)
    for name in ("a.safetensors", "b.safetensors"):
        save(folder / name, LORA)
    with pytest.raises(CheckpointError, match=r"holds several files: a\.safetensors, b\.safetensors; give one of them"):
        read_adapter(folder)
    with pytest.raises(CheckpointError, match=r"a\.safetensors is a file, so weight_name='b\.safetensors' is none in"):
        read_adapter(folder / "a.safetensors", "b.safetensors")
    assert read_adapter(folder / "a.safetensors", "a.safetensors").path.name == "a.safetensors"
    assert read_adapter(folder, "b.safetensors").path.name == "b.safetensors"
    outside = save(tmp_path / "x.safetensors", LORA)
    for name in ("../x.safetensors", str(outside), "c.safetensors", ""):
        with pytest.raises(CheckpointError, match="holds no file"):
            read_adapter(folder, name)
    save(folder / "pytorch_lora_weights.safetensors", LORA)
    assert read_adapter(folder).path.name == "pytorch_lora_weights.safetensors"
    (folder / "a.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="is not a safetensors file"):
        read_adapter(folder, "a.safetensors")


def test_a_config_that_is_wrong(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"r": 7, "lora_alpha": 1}')
    twice = save(tmp_path / "b/adapter_model.safetensors", LORA)
    twice.with_name("adapter_config.json").write_text('{"r": 7, "r": 3}')
    with pytest.raises(CheckpointError, match="'r' stands there twice"):
        read_adapter(twice)
    found = read_adapter(save(tmp_path / "adapter_model.safetensors", LORA))
    with pytest.raises(CheckpointError, match="is of rank 3, but its config says 7"):
        found.load(CONFIGS, "x")


def test_there_are_not_too_many_tensors(tmp_path):
    infos = {f"a.{number}": TensorInfo("U8", ()) for number in range(10_001)}
    with pytest.raises(CheckpointError, match="holds 10001 tensors, more than any adapter has"):
        read_adapter(write(tmp_path / "x.safetensors", infos))


def test_nothing_but_the_header_is_read(tmp_path, monkeypatch):
    path = save(tmp_path / "x.safetensors", LORA)
    monkeypatch.setattr(mx, "load", None)
    found = read_adapter(path)
    found.check(CONFIGS, "small")
    assert (found.kinds, found.ranks, found.unknown) == (("LoRA",), (3,), ())
    assert found.fates(CONFIGS)


@pytest.mark.parametrize(("key", "role"), [("use_dora", "magnitude"), ("lora_bias", "bias")])
def test_what_a_config_says_that_all_have_is_missed(key, role, tmp_path):
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.r": 3, f"transformer.{key}": True})}
    refused(tmp_path, LORA, f"has no {role}, which its config says all have", metadata)


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_inits_that_leave_the_base_alone(init, tmp_path):
    metadata = {"lora_adapter_metadata": json.dumps({"r": 3, "init_lora_weights": init})}
    assert read_adapter(save(tmp_path / "x.safetensors", LORA, metadata)).kinds == ("LoRA",)


@pytest.mark.parametrize(
    "key",
    ["base_model.model.proj_out.weight", "base_model.model.proj_out.modules_to_save.default.weight", "proj_out.bias"],
)
def test_whole_weights_of_layers_are_refused(key, tmp_path):
    message = r"holds a whole weight of proj_out \(modules_to_save\), which is not read; save the adapter without"
    refused(tmp_path, LORA | {key: np.ones((D, D), np.float32)}, message)


@pytest.mark.parametrize(
    ("kind", "ends"),
    [
        ("OFT", ["oft_blocks", "alpha"]),
        ("OFT", ["oft_diag"]),
        ("OFT", ["oft_R.weight"]),
        ("BOFT", ["boft_R", "boft_s"]),
        ("GLoRA", ["a1.weight", "a2.weight", "b1.weight", "b2.weight", "alpha"]),
        ("IA3", ["ia3_l"]),
        ("IA3", ["weight", "on_input"]),
        ("VeRA", ["vera_lambda_b", "vera_lambda_d"]),
        ("HRA", ["hra_u"]),
        ("KaSA", ["lora_A.weight", "lora_B.weight", "lora_diag"]),
    ],
)
def test_kinds_that_are_not_run_are_named(kind, ends, tmp_path):
    message = f"it is of the kind {kind}, which is not run; LoRA, LoKr, LoHa, DoRA and full differences are"
    refused(tmp_path, {f"{MODULE}.{end}": np.ones((2, 2), np.float32) for end in ends}, message)


@pytest.mark.parametrize(
    ("key", "missing"),
    [
        ("lora_up.weight", "lora_down"),
        ("lora_down.weight", "lora_up"),
        ("lora_B.group.weight", "lora_A.group"),
        ("lora.down.weight", "lora.up"),
        ("lora_linear_layer.up.weight", "lora_linear_layer.down"),
    ],
)
def test_a_missing_factor_is_spelled_as_the_file_does(key, missing, tmp_path):
    refused(tmp_path, {f"{MODULE}.{key}": np.ones((D, D), np.float32)}, f" has no {missing} beside it")


def test_a_wrong_rank_is_told_with_the_file(tmp_path):
    path = save(tmp_path / "x.safetensors", LORA, {"lora_adapter_metadata": '{"r": 4}'})
    with pytest.raises(CheckpointError, match="is of rank 3, but its config says 4") as caught:
        read_adapter(path).scales()
    assert str(caught.value).startswith(f"{path}: ")
