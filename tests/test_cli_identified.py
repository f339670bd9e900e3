"""`info` of files and folders of weights, here and on the Hub."""

import json
import shutil
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import pytest
from helpers.cli_runner import done, error_line, refusal, run
from helpers.headers import NUMBER, cast, declared, header, in_nf4, lora, scaled, write, write_gguf
from helpers.hub_client import REPO, using
from helpers.hub_server import HubServer
from helpers.listings import listing, prefixed

from flux2_mlx.store import demo_folder
from flux2_mlx.weights import TensorInfo, write_safetensors

pytestmark = pytest.mark.usefixtures("models")
FOUR = listing("transformer_klein-4b_bfl")
FP8 = scaled(FOUR)
SAID = declared(FP8, "float8_e4m3fn")
PREFIX = "model.diffusion_model."
LORA = lora("diffusion_model.double_blocks.0.img_attn.qkv", 4096, 12288)
FLUX1 = {name: TensorInfo("F16", (1, 1)) for name in ("double_blocks.0.img_mod.lin.weight", "img_in.weight")}
FLUX1_LORA = lora("diffusion_model.single_blocks.3.linear1", 3072, 21504)
SDXL_LORA = lora("lora_unet_input_blocks_4_1_transformer_blocks_2_attn1_to_q", 640, 640)
UNSCALED = {"a.weight": TensorInfo("F8_E4M3", (2, 2)), "a.scale_w": NUMBER}
TABLE = """\
flux-2-klein-4b-fp8.safetensors: transformer of FLUX.2 klein-4b
stored     4.071 GB; 95% fp8, 5% bf16
GB              tensors   stored     bf16    qint8    qint6   mixed4    qint4  names as of
transformer         149    4.071    7.751    4.118    3.149    2.414    2.180  the original release, \
after model.diffusion_model.
transformer    double blocks: 40 fp8
transformer    single blocks: 40 fp8
transformer    modulation: 3 bf16
transformer    final layer: 2 bf16
transformer    embedders: 4 bf16
transformer    norms and biases: 60 bf16
missing    text encoder, VAE, tokenizer
"""


def values(*arguments):
    return json.loads(done("info", *arguments, "--json").stdout)


def test_a_file_in_a_table():
    write(Path("flux-2-klein-4b-fp8.safetensors"), prefixed(FP8, PREFIX), SAID)
    text = done("info", "flux-2-klein-4b-fp8.safetensors").stdout
    assert text.startswith(TABLE)
    assert text.removeprefix(TABLE) == (
        "convert    text encoder, VAE, tokenizer from black-forest-labs/FLUX.2-klein-4B (Apache-2.0 licence); stored "
        "as qint8, the text encoder as qint8\n"
    )


def test_a_file_as_json():
    write(Path("x.safetensors"), FP8, SAID)
    found = values("x.safetensors")
    assert {
        key: found[key] for key in ("file", "kind", "variant", "variants", "bytes", "missing", "quant", "advice")
    } == {
        "file": "x.safetensors",
        "kind": "model",
        "variant": None,
        "variants": ["klein-4b", "klein-base-4b"],
        "bytes": 4_070_588_032,
        "missing": ["text_encoder", "vae", "tokenizer"],
        "quant": "qint8",
        "advice": None,
    }
    assert found["parts"]["transformer"]["converted"]["qint8"] == 4_117_773_312
    assert found["conversion"]["places"] == {}
    assert values("x.safetensors", "--variant", "klein-base-4b")["variant"] == "klein-base-4b"
    result = run("info", "x.safetensors", "--variant", "dev")
    assert result.exit_code == 1
    assert "x.safetensors can't be dev: its geometry is that of klein-4b" in error_line(result.stderr)


def test_the_licence_of_what_would_be_fetched_is_told():
    write(Path("klein-9b-fp8.safetensors"), listing("transformer_klein-9b_bfl"))
    assert (
        "from black-forest-labs/FLUX.2-klein-9B (FLUX non-commercial licence, gated); "
        in done("info", "klein-9b-fp8.safetensors").stdout
    )


def test_what_is_missing_is_taken_from_a_converted_model(models):
    shutil.copytree(demo_folder(), models / "mine-bf16")
    shutil.copy(demo_folder() / "transformer" / "model.safetensors", "x.safetensors")
    text = done("info", "x.safetensors").stdout
    place = models / "mine-bf16"
    assert text.splitlines()[0] == "x.safetensors: transformer of FLUX.2 demo"
    told = [f"text encoder from {place}/text_encoder", f"VAE from {place}/vae", f"tokenizer from {place}/tokenizer"]
    assert text.splitlines()[-1] == f"convert    {'; '.join(told)}; stored as bf16, the text encoder as bf16"
    places = values("x.safetensors")["conversion"]["places"]
    assert places["transformer"] == "x.safetensors"
    assert places["vae"] == f"{place}/vae"
    assert done("info", "x.safetensors", "-q", "qint8").stdout.startswith("x.safetensors: a demo of another source")


def test_what_is_missing_is_taken_from_where_a_conversion_takes_it(models):
    shutil.copytree(demo_folder(), models / "b-official")
    done("convert", "demo", models / "a-mine", "--vae", demo_folder() / "vae", "--text-quant", "bf16", "--quiet")
    shutil.copy(demo_folder() / "transformer" / "model.safetensors", "x.safetensors")
    done("convert", "x.safetensors", "made", "--quiet")
    taken = json.loads(Path("made/flux2.json").read_text())["source"]["parts"]
    assert taken == {name: values("x.safetensors")["conversion"]["places"][name] for name in taken}
    assert taken["vae"] == f"{models / 'b-official' / 'vae'}"


@pytest.mark.parametrize(
    ("infos", "first", "last"),
    [
        (listing("qwen3-4b"), "x.safetensors: text encoder of FLUX.2", "TARGET --text-encoder FILE"),
        (listing("ae_bfl"), "x.safetensors: VAE of FLUX.2", "TARGET --vae FILE"),
        (cast(LORA, "F16"), "x.safetensors: a LoRA (names as of the original release)", "is none itself"),
        (SDXL_LORA, "x.safetensors: a LoRA (names as of kohya)", "it is for Stable Diffusion XL, not for FLUX.2"),
        (FLUX1_LORA, "x.safetensors: a LoRA (names as of the original release)", "it is for FLUX.1, not for FLUX.2"),
        (FLUX1, "x.safetensors: FLUX.1 schnell", "give one of its models"),
        (FLUX1 | UNSCALED, "x.safetensors: FLUX.1 schnell", "give one of its models"),
        ({"a.wscales": TensorInfo("F16", (2, 2))}, "x.safetensors: a quantized model", "GGUF file of the model"),
    ],
)
def test_parts_adapters_and_strangers(infos, first, last):
    write(Path("x.safetensors"), infos)
    lines = done("info", "x.safetensors").stdout.splitlines()
    assert (lines[0], lines[-1][-len(last) :]) == (first, last)
    assert values("x.safetensors")["file"] == "x.safetensors"


def test_an_adapter_among_the_tensors_of_a_model_is_told():
    write(Path("x.safetensors"), prefixed(FOUR, PREFIX) | lora("lora_unet_single_blocks_3_linear1", 3072, 27648))
    lines = done("info", "x.safetensors").stdout.splitlines()
    assert lines[0] == "x.safetensors: the transformer of a FLUX.2 model, with an adapter"
    told = "2 tensors of an adapter, lora_unet_single_blocks_3_linear1.lora_A.weight first, which are not applied here"
    assert lines[-1] == f"note       it holds {told}; save it without them, and give the adapter in a file of its own"
    assert told in refusal("convert", "x.safetensors", "made")


def test_a_folder_of_a_part():
    write(Path("encoder/model.safetensors"), listing("qwen3-8b"))
    assert done("info", "./encoder").stdout.startswith("./encoder: text encoder of FLUX.2\n")


@pytest.mark.parametrize("data", [b"", b"x" * 9, b"\xff" * 100, b"\x02\0\0\0\0\0\0\0{}", b"version https://git-lfs"])
def test_damaged_files_are_refused_in_one_line(data):
    Path("x.safetensors").write_bytes(data)
    refusal("info", "x.safetensors")


def test_pickles_are_not_opened():
    Path("x.ckpt").write_bytes(b"cos\nsystem\n(S'touch y'\ntR.")
    assert "is a pickle, which could run code" in refusal("info", "x.ckpt")


@pytest.fixture
def home(tmp_path):
    return tmp_path / "home"


@pytest.fixture
def files():
    data = header(prefixed(FP8, PREFIX), SAID)
    return {"a/flux-2-klein-4b-fp8.safetensors": data + bytes(100_000), "README.md": b"", "x.bin": b"GGUF"}


@pytest.fixture
def hub(files, home):
    with HubServer({REPO: files}) as server, using(server, home):
        name = "a/flux-2-klein-4b-fp8.safetensors"
        size = len(header(prefixed(FP8, PREFIX), SAID)) + 4_070_588_032
        entry = server.repos[REPO].sibling(name)
        entry |= {"size": size, "lfs": entry["lfs"] | {"size": size}} if entry.get("lfs") else {"size": size}
        siblings = [entry, *({"rfilename": other, "size": 1, "blobId": "0" * 40} for other in ("README.md", "x.bin"))]
        server.publish({"sha": server.repos[REPO].commit, "siblings": siblings})
        yield server


def test_of_a_file_on_the_hub_nothing_but_its_header_is_fetched(hub, home):
    for name in (REPO, f"{REPO}:a/flux-2-klein-4b-fp8.safetensors"):
        lines = done("info", name).stdout.splitlines()
        assert lines[0] == f"{name}: transformer of FLUX.2 klein-4b"
        assert lines[1] == "stored     4.071 GB; 95% fp8, 5% bf16"
        assert lines[-1] == "convert    fetch it first; its weights become qint8"
    assert values(REPO)["conversion"] is None
    assert sum(hub.sent.values()) <= 3 * 2**16
    assert not home.exists() or not [*home.rglob("*.safetensors")]


def test_files_of_the_hub_that_can_not_be_told(hub):
    assert refusal("info", f"{REPO}:b.safetensors") == (
        f"{REPO} has no file of weights 'b.safetensors'; give one as {REPO}:a/flux-2-klein-4b-fp8.safetensors"
    )
    for name in ("x.bin", "../x.safetensors", "/x.safetensors", "a.ckpt"):
        assert "download it and give its path" in refusal("info", f"{REPO}:{name}")
    assert "--quant is about one model" in run("info", f"{REPO}:b.safetensors", "-q", "qint8").stderr


def test_repos_of_several_files_of_none_and_of_whole_models(official, home):
    several = {f"{name}.safetensors": header(LORA) for name in "abcdefg"}
    repos = {REPO: several, "org/none": {"x.txt": b""}, "org/whole": official}
    with HubServer(repos) as hub, using(hub, home):
        assert refusal("info", REPO) == (
            "org/model holds several files of weights: a.safetensors, b.safetensors, c.safetensors, d.safetensors, "
            "e.safetensors and 2 more; give one as org/model:FILE"
        )
        assert refusal("info", "org/none").startswith("org/none has no file of weights and")
        assert refusal("info", "org/nothing").startswith("unknown repo id 'org/nothing'")
        hub.fail(500)
        assert "answers HTTP 500" in refusal("info", f"{REPO}:a.safetensors")


def in_fp8(source: Path) -> None:
    """Round the matrices of a model's transformer to fp8, without scales."""
    file = source / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = mx.load(str(file))
    mx.eval(tensors)
    infos = {name: TensorInfo("F8_E4M3" if x.ndim == 2 else "BF16", x.shape) for name, x in tensors.items()}
    packed = (mx.to_fp8(x) if x.ndim == 2 else x for x in tensors.values())
    write_safetensors(file, infos, packed, {}, lambda count: None)


def test_a_whole_model_on_the_hub_is_told_like_files_of_one(source, home):
    in_fp8(source)
    said = ("org/model", "--variant", "klein-4b")
    with HubServer({"org/model": source}) as hub, using(hub, home):
        lines = done("info", *said).stdout.splitlines()
        assert lines[0] == "org/model: transformer, text encoder and VAE of FLUX.2 klein-4b"
        assert any(line.startswith("transformer    double blocks: ") and line.endswith(" fp8") for line in lines)
        assert any(line.startswith("text encoder   layers: ") and line.endswith(" bf16") for line in lines)
        assert lines[-1] == "convert    stored as qint8, the text encoder as qint8"
        assert not any("tokenizer" in name for name in hub.fetched)
        done("convert", *said, "made", "--quiet")
        assert json.loads(Path("made/flux2.json").read_text())["quantization"]["transformer"] == "qint8"
        shutil.rmtree("made")
        here = done("info", source, *said[1:]).stdout.splitlines()
        assert here == [lines[0].replace("org/model", str(source)), *lines[1:]]
        planned = done("info", source, *said[1:], "-W", 256).stdout
        assert "with qint8, text encoder qint8, computed in" in planned
    (source / "model_index.json").unlink()
    with HubServer({"org/model": source}) as hub, using(hub, home.with_name("other")):
        again = done("info", *said).stdout.splitlines()
        assert again[2:] == lines[2:]


def test_a_file_that_is_in_the_cache_is_not_asked_for(home):
    with HubServer({REPO: {"a.safetensors": header(LORA) + bytes(sum(x.nbytes for x in LORA.values()))}}) as hub:
        with using(hub, home):
            from huggingface_hub import hf_hub_download

            hf_hub_download(REPO, "a.safetensors")
        with using(hub, home, offline=True):
            assert done("info", f"{REPO}:a.safetensors").stdout.startswith(f"{REPO}:a.safetensors: a LoRA")
            assert "offline mode is on" in refusal("info", f"{REPO}:b.safetensors")


def in_mlx() -> tuple[dict[str, mx.array], bytes]:
    """The built-in transformer in 4 bits, and the config that says so."""
    packed: dict[str, mx.array] = {}
    for name, array in mx.load(str(demo_folder() / "transformer" / "model.safetensors")).items():
        if array.ndim < 2:
            packed[name] = array
        else:
            parts = zip(("weight", "scales", "biases"), mx.quantize(array, group_size=32, bits=4), strict=True)
            packed |= {name.replace("weight", part): x for part, x in parts}
    return packed, json.dumps({"quantization": {"group_size": 32, "bits": 4}}).encode()


def bytes_of(tensors: dict[str, mx.array]) -> bytes:
    mx.save_safetensors("saved.safetensors", tensors)
    return Path("saved.safetensors").read_bytes()


def test_what_says_how_weights_are_packed_is_fetched_with_their_headers(home):
    packed, config = in_mlx()
    halves = [dict([*packed.items()][half::2]) for half in (0, 1)]
    listed = {name: f"{number}.safetensors" for number, half in enumerate(halves) for name in half}
    index = {"metadata": {"mflux_version": "0.20.0", "quantization_level": "4"}, "weight_map": listed}
    part = {f"transformer/{number}.safetensors": bytes_of(half) for number, half in enumerate(halves)}
    whole, twice = bytes_of(packed), bytes_of({name: x.astype(mx.float32) for name, x in packed.items()})
    repos = {
        "org/root": {"fox.safetensors": whole, "config.json": config},
        "org/folder": {"transformer/model.safetensors": whole, "transformer/config.json": config, "config.json": b"{}"},
        "org/mflux": {**part, "transformer/model.safetensors.index.json": json.dumps(index).encode()},
        "org/both": {"transformer/a.safetensors": whole, "transformer/config.json": config, "b.safetensors": twice},
    }
    with HubServer(repos) as hub, using(hub, home):
        for repo in (*repos, "org/folder:transformer/model.safetensors"):
            told = values(repo)
            assert (told["name"], next(iter(told["formats"]))) == ("transformer of FLUX.2 demo", "MLX 4-bit")
        assert not [*home.rglob("*.safetensors")]
        done("convert", "demo", "made", "--transformer", "org/both", "--quiet")
        assert not any(name.endswith("b.safetensors") for name in hub.fetched)


def test_a_damaged_header_of_the_hub_is_said_of_the_repo(home):
    with HubServer({REPO: {"a.safetensors": b"\xff" * 70_000}}) as hub, using(hub, home):
        message = refusal("info", REPO)
    assert message.startswith(f"{REPO} is not a safetensors file")


@pytest.fixture
def sparse(home):
    """Gives a hub whose repo holds a local file that takes no space."""

    @contextmanager
    def serving(path):
        def answer(handler):
            first, last = map(int, handler.headers["Range"].removeprefix("bytes=").split("-"))
            with path.open("rb") as file:
                file.seek(first)
                data = file.read(last + 1 - first)
            handler.answer(206, {"Content-Range": f"bytes {first}-{last}/*", "Content-Length": len(data)}, data)
            hub.sent[path.name] += len(data)

        with HubServer({REPO: {path.name: b""}}) as hub, using(hub, home):
            siblings = [{"rfilename": path.name, "size": path.stat().st_size, "blobId": "0" * 40}]
            hub.publish({"sha": hub.repos[REPO].commit, "siblings": siblings})
            hub.script(path.name, answer)
            yield hub

    return serving


def test_what_bitsandbytes_says_in_small_tensors_is_fetched_with_the_header(sparse):
    path = write(Path("a.safetensors"), in_nf4(FOUR, lambda name: name.startswith("double_blocks.0.")))
    with sparse(path) as hub:
        lines = done("info", REPO).stdout.splitlines()
        assert lines[0] == f"{REPO}: transformer of FLUX.2"
        assert lines[1:] == [*done("info", "a.safetensors").stdout.splitlines()[1:-1], lines[-1]]
    assert any("nf4" in line for line in lines)
    assert hub.sent[path.name] < 2 * 2**16


def test_a_gguf_file_on_the_hub(sparse):
    path = write_gguf(Path("flux-2-klein-4b-Q4_K_M.gguf"), FOUR, "Q4_K")
    with sparse(path) as hub:
        lines = done("info", f"{REPO}:{path.name}").stdout.splitlines()
    assert lines[:2] == [
        f"{REPO}:{path.name}: transformer of FLUX.2 klein-4b",
        "stored     2.460 GB; 95% Q4_K, 5% bf16",
    ]
    assert hub.sent[path.name] <= 2**16


def test_a_gguf_file():
    write_gguf(Path("flux-2-klein-4b-Q4_K_M.gguf"), FOUR, "Q4_K")
    lines = done("info", "flux-2-klein-4b-Q4_K_M.gguf").stdout.splitlines()
    assert lines[0] == "flux-2-klein-4b-Q4_K_M.gguf: transformer of FLUX.2 klein-4b"
    assert lines[1] == "stored     2.460 GB; 95% Q4_K, 5% bf16"
    assert "transformer    double blocks: 40 Q4_K" in lines
    assert values("flux-2-klein-4b-Q4_K_M.gguf")["quant"] == "qint4"
