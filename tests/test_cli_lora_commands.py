"""`lora inspect`, `lora list`, `lora convert`, and adapters folded in by `convert`."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from flux2_mlx.convert.lora import read_adapter
from helpers.adapters import factors, lora, save
from helpers.cli_runner import DEMO, done, refusal, run
from helpers.hub_client import using
from helpers.hub_server import HubServer

from flux2_mlx import Flux2Pipeline
from flux2_mlx.checkpoint import Checkpoint
from flux2_mlx.config import VARIANTS

LAYER = "double_blocks.0.img_attn.qkv"
WIDTH = VARIANTS["demo"].transformer.hidden_size
SHAPE = (3 * WIDTH, WIDTH)
TENSORS = lora(f"diffusion_model.{LAYER}", *SHAPE, rank=4)
SAID = {
    "ss_network_module": "made.up",
    "modelspec.title": "To\x1b[31my",
    "trigger_word": "t0\u202ey",
    "lora_alpha": "8",
}
FLUX1 = lora("diffusion_model.double_blocks.0.img_mod.lin", 18432, 3072)
REPO, FILE = "me/style", "sub/style.safetensors"

pytestmark = pytest.mark.usefixtures("models")


@pytest.fixture
def file():
    return save(Path("style.safetensors"), TENSORS, SAID)


def values(*arguments):
    return json.loads(done("lora", *arguments, "--json").stdout)


def kohya():
    module = f"lora_unet_{LAYER.replace('.', '_')}"
    return lora(module, *SHAPE, rank=4, ends=("down", "up")) | {f"{module}.alpha": np.array(2, np.float32)}


def test_inspect_shows_all_that_is_known(file):
    rows = done("lora", "inspect", file).stdout.splitlines()
    title, trigger = "To\\x1b[31my", "t0\\u202ey"
    assert rows == [
        "style.safetensors: LoRA for FLUX.2 demo",
        f"title      {title}",
        "trainer    not known",
        f"trigger    {trigger}",
        "stored     8.2 kB; 2 F32",
        "names      as of the original release",
        "rank       4",
        "alpha      8",
        "times      2",
        "layers     1 of the transformer",
        "said       lora_alpha: 8",
        f"said       modelspec.title: {title}",
        "said       ss_network_module: made.up",
        f"said       trigger_word: {trigger}",
        f"diffusion_model.{LAYER}  transformer.{LAYER}: LoRA of rank 4",
    ]


def test_inspect_as_json(file):
    found = values("inspect", file)
    assert (found["models"], found["kinds"], found["trigger_words"]) == (["demo"], ["LoRA"], ["t0\u202ey"])
    (module,) = found["modules"]
    assert module == {
        "name": f"diffusion_model.{LAYER}",
        "layer": f"transformer.{LAYER}",
        "kind": "LoRA",
        "rank": 4,
        "alpha": 8,
        "scale": 2,
    }


def test_inspect_of_another_geometry_and_of_what_is_no_layer():
    tensors = lora("single_blocks.0.linear2", 40, 160) | lora("other", 2, 2)
    save(Path("x.safetensors"), tensors)
    rows = done("lora", "inspect", "x.safetensors").stdout.splitlines()
    assert rows[0] == "x.safetensors: LoRA for a FLUX.2 of other sizes"
    assert "note       it has 1 layers of FLUX.2, but no model of the table has all of them in these sizes" in rows
    assert [row.split()[0] for row in rows[-2:]] == ["other.lora_A.weight", "other.lora_B.weight"]


def test_adapters_of_other_models_are_named():
    save(Path("x.safetensors"), FLUX1)
    assert refusal("lora", "inspect", "x.safetensors") == (
        "x.safetensors: it is an adapter for FLUX.1; give one for FLUX.2"
    )
    assert "there is no file or folder nothing.safetensors" in refusal("lora", "inspect", "nothing.safetensors")


def test_list_has_the_folder_and_the_cache(models, file):
    save(models / "loras" / "sub" / "a.safetensors", TENSORS, SAID)
    save(models / "loras" / "b.safetensors", FLUX1)
    (models / "loras" / "c.safetensors").write_bytes(b"none")
    with HubServer({REPO: {FILE: file.read_bytes(), "README.md": b"#"}}) as hub, using(hub, models / "home"):
        assert [row["source"] for row in values("list")["adapters"]] == [
            str(models / "loras" / name) for name in ("b.safetensors", "c.safetensors", "sub/a.safetensors")
        ]
        done("lora", "convert", f"{REPO}:{FILE}", "made.safetensors")
        found = values("list")
        rows = done("lora", "list").stdout.splitlines()
    assert found["folder"] == str(models / "loras")
    assert found["adapters"][-1]["source"] == f"{REPO}:{FILE}"
    assert found["adapters"][-1]["ranks"] == [4]
    problems = [row["problem"] for row in found["adapters"]]
    assert problems[0].startswith("it is an adapter for FLUX.1")
    assert "is not a safetensors file" in problems[1]
    assert problems[2:] == [None, None]
    assert rows[-2].split(maxsplit=3)[3] == "LoRA of rank 4 for FLUX.2 demo, trigger words: t0\\u202ey"
    assert rows[-1] == f"4 adapters; those of your own belong in {models / 'loras'}"
    (other,) = (row.split() for row in done("models").stdout.splitlines() if " loras " in row)
    assert (other[0], other[-1]) == ("other", "adapters")


def test_list_has_one(models):
    save(models / "loras" / "a.safetensors", TENSORS).rename(models / "loras" / "a.SAFETENSORS")
    (models / "loras" / "._a.safetensors").write_bytes(b"Mac OS X")
    assert [row["source"] for row in values("list")["adapters"]] == [str(models / "loras" / "a.SAFETENSORS")]
    assert done("lora", "list").stdout.splitlines()[-1].startswith("1 adapter; those of your own")


def test_nothing_but_the_header_and_alpha_is_fetched(models):
    tensors = kohya() | lora("lora_unet_single_blocks_0_linear1", 9 * WIDTH, WIDTH, 64, ("down", "up"))
    large = save(Path("large.safetensors"), tensors)
    with HubServer({REPO: {FILE: large.read_bytes()}}) as hub, using(hub, models / "home"):
        found = values("inspect", REPO)
        sent = hub.sent[FILE]
    assert found["source"] == REPO
    assert {module["alpha"] for module in found["modules"]} == {2, 64}
    assert sent < 70_000 < large.stat().st_size


def test_an_adapter_of_another_model_is_not_fetched(models):
    large = save(Path("large.safetensors"), FLUX1).read_bytes()
    with HubServer({REPO: {FILE: large}}) as hub, using(hub, models / "home"):
        assert "me/style:sub/style.safetensors: it is an adapter for FLUX.1" in refusal(
            "lora", "convert", REPO, "made.safetensors"
        )
        assert hub.sent[FILE] < len(large) // 2


def test_a_pipeline_takes_one_from_the_hub(models, file):
    pipe = Flux2Pipeline.from_pretrained("demo")
    with HubServer({REPO: {FILE: file.read_bytes()}}) as hub, using(hub, models / "home"):
        pipe.load_lora_weights(REPO, weight_name=FILE)
    assert pipe.networks.adapters[0].adapter.sha256 == read_adapter(file).sha256


def test_convert_says_what_became_of_it(file):
    result = done("lora", "convert", file, "made")
    assert (result.stdout, result.stderr.splitlines()[1:]) == ("made/pytorch_lora_weights.safetensors\n", [])
    assert refusal("lora", "convert", file, "made").endswith(
        "exists; choose another name or pass --force to replace it"
    )
    done("lora", "convert", file, "made", "--force", "--quiet")
    tensors = factors(f"diffusion_model.{LAYER}", lokr_w1=(4, 4), lokr_w2=(SHAPE[0] // 4, WIDTH // 4))
    save(Path("lokr.safetensors"), tensors)
    said = done("lora", "convert", "lokr.safetensors", "lokr").stderr
    assert said.splitlines()[-1] == "LoKr became LoRA factors of the same product, whose rank is higher"


def weights(folder, name="transformer"):
    return Checkpoint.open(Path(folder)).components[name]


def changed_names(first, second):
    """The tensors of the transformers of two checkpoints that are not the same."""
    names, pair = weights(first).infos, [weights(folder).tensors for folder in (first, second)]
    arrays = zip(names, *(tensors.read(names) for tensors in pair), strict=True)
    return [name for name, a, b in arrays if not mx.array_equal(a, b).item()]


def test_convert_folds_adapters_into_the_weights(file):
    done("convert", "demo", "made", "--lora", f"{file.absolute()}:0.5", "--lora", "style.safetensors:-0.25", "--quiet")
    name = f"{LAYER}.weight"
    (before,), (after,) = (weights(folder).tensors.read([name]) for folder in (DEMO, "made"))
    down, up = TENSORS.values()
    wanted = np.array(before.astype(mx.float32)) + 0.25 * 2 * up @ down
    np.testing.assert_allclose(np.array(after.astype(mx.float32)), wanted, rtol=2**-8, atol=1e-6)
    assert changed_names(DEMO, "made") == [name]
    sha256 = read_adapter(file).sha256
    source, former = (json.loads((Path(x) / "flux2.json").read_text())["source"] for x in ("made", DEMO))
    assert source.pop("adapters") == [
        {"source": "style.safetensors", "sha256": sha256, "scale": scale} for scale in (0.5, -0.25)
    ]
    assert source["name"] == former["name"]
    assert source["fingerprint"] != former["fingerprint"]
    shown = json.loads(done("info", "./made", "--json").stdout)
    assert (shown["official"], [x["scale"] for x in shown["adapters"]]) == (False, [0.5, -0.25])
    assert "with the adapters style.safetensors × 0.5, style.safetensors × -0.25" in done("info", "./made").stdout


def test_folding_comes_before_quantizing(file):
    done("convert", "demo", "bf16", "--lora", file, "--quiet")
    done("convert", "demo", "one", "--lora", file, "-q", "qint8", "--quiet")
    done("convert", "./bf16", "two", "-q", "qint8", "--quiet")
    one, two = weights("one"), weights("two")
    assert one.quantization == two.quantization is not None
    assert changed_names("one", "two") == []
    said = refusal("convert", "./one", "three", "--lora", file)
    assert said.endswith("in 8 bits, which no adapter is folded into; convert the original, or a checkpoint in bf16")


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (lora("single_blocks.0.linear2", 3072, 12288), "is a LoRA for klein-4b or klein-base-4b, which can't be used"),
        (TENSORS | factors(f"diffusion_model.{LAYER}", diff_b=SHAPE[:1]), "changes the bias of"),
    ],
)
def test_what_can_not_be_folded_is_refused_before_anything_is_written(tensors, said):
    save(Path("x.safetensors"), tensors)
    assert said in refusal("convert", "demo", "made", "--lora", "x.safetensors")


@pytest.mark.parametrize(
    ("scale", "factor", "said"),
    [
        ("5000", 1, "the scale of style.safetensors must be -1000.0 to 1000.0, got 5000"),
        ("1e999", 1, "the scale of style.safetensors must be -1000.0 to 1000.0, got inf"),
        ("1000", 1e19, f"{LAYER} with style.safetensors × 1000 has values that are not finite numbers"),
    ],
)
def test_what_would_not_be_finite_is_not_folded(scale, factor, said):
    save(Path("style.safetensors"), {name: x * np.float32(factor) for name, x in TENSORS.items()})
    assert said in refusal("convert", "demo", "made", "--lora", f"style.safetensors:{scale}")
    assert not Path("made").exists()


def test_a_folder_of_a_diffusers_model_is_folded_too(official, tmp_path):
    tensors = lora("transformer.transformer_blocks.0.attn.to_out.0", 64, 64)
    save(Path("x.safetensors"), tensors)
    arguments = ("convert", official, "made", "--variant", "klein-4b", "--text-quant", "bf16", "--quiet")
    assert run(*arguments).exit_code == 0
    done(*arguments[:2], "folded", *arguments[3:], "--lora", "x.safetensors")
    name = "double_blocks.0.img_attn.proj.weight"
    assert changed_names("made", "folded") == [name]


def test_a_repo_is_fetched_for_adapters_that_fit_it(models, official):
    bad = save(Path("bad.safetensors"), lora("transformer.transformer_blocks.7.attn.to_out.0", 64, 64))
    good = save(Path("good.safetensors"), lora("transformer.transformer_blocks.0.attn.to_out.0", 64, 64))
    command = ("convert", "org/small", "made", "--variant", "klein-4b", "--quiet", "--lora")
    with HubServer({"org/small": official}) as hub, using(hub, models / "home"):
        assert "bad.safetensors is a LoRA of another model than klein-4b" in refusal(*command, bad)
        weights_of_it = "transformer/diffusion_pytorch_model.safetensors"
        assert hub.sent[weights_of_it] < (official / weights_of_it).stat().st_size
        done(*command, good)
    (told,) = Checkpoint.open(Path("made")).folded
    assert (told["source"], told["scale"]) == ("good.safetensors", 1.0)


def test_info_of_an_adapter_points_here(file):
    rows = done("info", file).stdout.splitlines()
    assert rows[0].startswith("style.safetensors: a LoRA")
    assert "more       flux2-mlx lora inspect style.safetensors" in rows


def test_what_is_written_of_an_adapter_drives_no_terminal(file):
    save(file, lora("single_blocks.0.linear2", 40, 160), SAID)
    said = done("lora", "convert", file, "made.safetensors").stderr
    assert "it is for no model that is known here" in said
    metadata = read_adapter(Path("made.safetensors")).files.metadata
    assert (metadata["modelspec.title"], metadata["modelspec.trigger_phrase"]) == ("To[31my", "t0y")
