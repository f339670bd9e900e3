"""What results depend on besides the settings: chip, system, MLX, TF32; and what is said of it. Stand-ins for GPUs."""

import logging
import os
import platform
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from helpers.checkpoints import SHALLOW_TEXT, SHALLOW_VARIANT, convert
from helpers.cli_runner import PROMPT, done, make, refusal, run
from helpers.device_messages import OUT_OF_MEMORY
from helpers.remembered import remember

from flux2_mlx import Flux2Pipeline, device, preparation
from flux2_mlx.device import GIB, computing_dtype, cuts_float32, machine, memory_reason
from flux2_mlx.errors import InputError
from flux2_mlx.images import read_settings
from flux2_mlx.networks import Networks

OTHERS = {"chip": "Apple M5", "system": "macOS 26.2", "mlx": "0.32.1", "tf32": True}


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """A folder of the test's own, and a process that has not multiplied yet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLX_ENABLE_TF32", "")
    monkeypatch.delenv("MLX_ENABLE_TF32")
    for cached in (device._is_product_cut, device._warn_of_tf32):
        cached.cache_clear()
    yield
    for cached in (device._is_product_cut, device._warn_of_tf32):
        cached.cache_clear()


def pretend(monkeypatch, chip, metal=True, **info):
    """Be the GPU of this name."""
    monkeypatch.setattr(device, "on_gpu", lambda: True)
    monkeypatch.setattr(device, "on_metal", lambda: metal)
    monkeypatch.setattr(mx, "device_info", lambda of=None: {"device_name": chip} | info)


class TF32:
    """Matrix units that cut the numbers of a product to 10 bits, unless the environment says otherwise at the first
    product."""

    def __init__(self, monkeypatch):
        self.products, self._cuts, self._multiply = 0, None, mx.array.__matmul__
        monkeypatch.setattr(mx.array, "__matmul__", lambda x, y: self.multiply(x, y))

    def multiply(self, x, y):
        self.products += 1
        if self._cuts is None:
            self._cuts = os.environ.get("MLX_ENABLE_TF32", "1") != "0"
        return self._multiply(*map(self._cut, (x, y)) if self._cuts else (x, y))

    def _cut(self, x):
        bits = np.array(x.astype(mx.float32)).view(np.uint32) & np.uint32(0xFFFFE000)
        return mx.array(bits.view(np.float32))


def test_a_cpu_cuts_nothing():
    assert cuts_float32() is False
    assert computing_dtype("float32") == mx.float32
    assert "MLX_ENABLE_TF32" not in os.environ


def test_float32_that_is_asked_for_is_no_tf32(monkeypatch, caplog):
    pretend(monkeypatch, "Apple M5")
    TF32(monkeypatch)
    assert computing_dtype("float32") == mx.float32
    assert (os.environ["MLX_ENABLE_TF32"], cuts_float32(), caplog.messages) == ("0", False, [])


@pytest.mark.parametrize("name", [None, "bfloat16", "float16"])
def test_other_dtypes_leave_tf32_alone(name, monkeypatch):
    pretend(monkeypatch, "Apple M5")
    units = TF32(monkeypatch)
    computing_dtype(name)
    assert "MLX_ENABLE_TF32" not in os.environ
    assert units.products == 0
    assert cuts_float32() is True


@pytest.mark.parametrize("early", [True, False])
def test_where_it_is_too_late_a_warning_says_so_once(early, monkeypatch, caplog):
    """MLX has multiplied before, or the user's environment wants TF32."""
    pretend(monkeypatch, "Apple M5")
    TF32(monkeypatch)
    if early:
        mx.eval(mx.ones((2, 2)) @ mx.ones((2, 2)))
    else:
        monkeypatch.setenv("MLX_ENABLE_TF32", "1")
    with caplog.at_level(logging.WARNING):
        computing_dtype("float32")
        computing_dtype("float32")
    assert caplog.messages == [
        "float32 is cut to TF32 here; set MLX_ENABLE_TF32=0 in the environment before Python starts"
    ]
    assert os.environ["MLX_ENABLE_TF32"] == ("0" if early else "1")
    assert cuts_float32() is True


def on_m5(monkeypatch):
    """Be an M5 whose commands end before they compute."""
    memory = {"memory_size": 64 * GIB, "max_recommended_working_set_size": 48 * GIB}
    pretend(monkeypatch, "Apple M5", **memory)

    def ended(*_, **__):
        raise InputError("enough")

    monkeypatch.setattr(Flux2Pipeline, "run", ended)
    return TF32(monkeypatch)


@pytest.mark.parametrize("then", [False, True])
def test_the_first_product_comes_after_what_a_replay_computes_in_is_known(then, monkeypatch):
    make("--seed", "1", "--dtype", "float32", "-o", "a.png")
    remember("b.png", machine={"tf32": then})
    units = on_m5(monkeypatch)
    result = run("t2i", "--replay", "b.png", "-o", "c.png")
    assert result.stderr.splitlines()[-1] == "Error: enough"
    assert (os.environ["MLX_ENABLE_TF32"], cuts_float32()) == ("0", False)
    assert ("made with float32 cut to TF32, and here it is whole float32" in result.stderr) == then
    assert units.products > 0


def test_a_replay_in_16_bits_leaves_tf32_alone(monkeypatch):
    make("--seed", "1", "--dtype", "float32", "-o", "a.png")
    remember("b.png", machine={"tf32": False})
    on_m5(monkeypatch)
    result = run("t2i", "--replay", "b.png", "--dtype", "bfloat16", "-o", "c.png")
    assert "b.png was made with whole float32, and here it is float32 cut to TF32" in result.stderr
    assert "MLX_ENABLE_TF32" not in os.environ


@pytest.mark.parametrize(("dtype", "differs"), [("float32", False), ("bfloat16", True), (["float32"], True)])
def test_what_is_said_of_an_image_is_what_a_replay_would_be(dtype, differs, monkeypatch):
    make("--seed", "1", "-o", "a.png")
    remember("b.png", machine={"tf32": False}, dtype=dtype)
    on_m5(monkeypatch)
    assert ("here it is float32 cut to TF32" in done("info", "b.png").stderr) == differs


def test_a_gpu_that_fails_to_show_it_costs_no_image(monkeypatch):
    make("--seed", "1", "-o", "a.png")
    remember("b.png", machine={"tf32": True, "chip": "Apple M5"})
    pretend(monkeypatch, "Apple M5")

    def failing(x, y):
        raise RuntimeError(OUT_OF_MEMORY)

    with monkeypatch.context() as patch:
        patch.setattr(mx.array, "__matmul__", failing)
        assert machine()["tf32"] is None
        assert computing_dtype("float32") == mx.float32
        assert done("info", "b.png").stderr == ""
    assert machine()["tf32"] is False


def test_a_pipeline_asks_for_whole_float32(monkeypatch):
    asked = []
    monkeypatch.setattr("flux2_mlx.networks.computing_dtype", lambda name: asked.append(name) or mx.float32)
    Flux2Pipeline.from_pretrained("demo", dtype="float32")
    assert asked == ["float32"]


@pytest.mark.parametrize(
    ("mac", "name", "release", "expected"),
    [
        ("15.6.1", "Darwin", "24.6.0", "macOS 15.6.1"),
        ("", "Linux", "6.8.0-45-mine", "Linux 6.8.0"),
        ("", "Linux", "5.15.167.4-microsoft-standard-WSL2", "Linux 5.15.167"),
    ],
)
def test_the_system_is_named_by_its_version(mac, name, release, expected, monkeypatch):
    monkeypatch.setattr(platform, "mac_ver", lambda: (mac, ("", "", ""), ""))
    monkeypatch.setattr(platform, "system", lambda: name)
    monkeypatch.setattr(platform, "release", lambda: release)
    assert device.system() == expected


def test_an_image_says_what_it_was_made_on():
    here = {"chip": device.chip(), "system": device.system(), "mlx": mx.__version__, "tf32": False}
    (path,) = make("--seed", "1", "-o", "a.png")
    assert read_settings(path)["machine"] == here == machine()
    output = Flux2Pipeline.from_pretrained("demo", prompt_cache=False)(PROMPT, width=64, height=64, seed=1)
    assert output.settings[0]["machine"] == here


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"mlx": "0.32.1"}, "MLX 0.32.1, and here it is MLX {mlx}"),
        ({"chip": "Apple M5"}, "Apple M5, and here it is {chip}"),
        ({"tf32": True}, "float32 cut to TF32, and here it is whole float32"),
        (
            OTHERS,
            "Apple M5, macOS 26.2, MLX 0.32.1, float32 cut to TF32, and here it is {chip}, {system}, MLX {mlx}",
        ),
    ],
)
def test_it_is_said_that_an_image_was_made_elsewhere(other, said):
    make("--seed", "1", "-o", "a.png")
    remember("b.png", machine=machine() | other)
    line = f"b.png was made with {said.format(**machine())}"
    result = done("info", "b.png")
    assert f"machine chip: {other.get('chip', machine()['chip'])}\n" in result.stdout
    assert len(result.stderr.splitlines()) == 1
    for shown in (result.stderr, done("t2i", "--replay", "b.png", "-o", "c.png", "--force").stderr):
        assert shown.splitlines()[0].startswith(line), shown
        assert shown.splitlines()[0].endswith("so a new one may differ a little")
    assert "differ" not in done("t2i", "--replay", "b.png", "-o", "c.png", "--force", "--quiet").stderr


@pytest.mark.parametrize("known", [None, {}, {"chip": None}, "here"])
def test_nothing_is_said_of_a_machine_that_is_the_same_or_not_known(known):
    make("--seed", "1", "-o", "a.png")
    remember("b.png", machine=machine() if known == "here" else known)
    assert done("info", "b.png").stderr == ""
    assert "differ" not in done("t2i", "--replay", "b.png", "-o", "c.png").stderr


def test_a_machine_that_is_none_is_damage():
    make("--seed", "1", "-o", "a.png")
    remember("b.png", machine=["Apple M5"])
    assert refusal("t2i", "--replay", "b.png") == "the settings in b.png are damaged: machine is ['Apple M5']"
    assert run("info", "b.png").exit_code == 0


@pytest.mark.parametrize(
    ("chip", "quant", "enough", "hinted"),
    [
        ("Apple M1", "qint4", True, True),
        ("Apple M2 Pro", "qint4", True, True),
        ("Apple M2 Pro", "qint4", False, False),
        ("Apple M2 Pro", "qint8", True, False),
        ("Apple M3", "qint4", True, False),
        ("Apple M2 Max", "mixed4", True, True),
        ("Apple M2 Max", "qint6", True, False),
    ],
)
def test_old_chips_are_faster_with_16_bits(chip, quant, enough, hinted, monkeypatch):
    # The pictures are a CPU's, so only what is said is another chip's.
    monkeypatch.setattr(preparation, "is_slow_with_qint4", lambda: device._WITHOUT_BFLOAT16.match(chip) is not None)
    monkeypatch.setattr(device, "chip", lambda: chip)
    if not enough:
        whole = Networks.needs
        small = 4_500_000  # bytes, in which 16 bits would be streamed

        def limited(networks, work):
            plan = whole(networks, work).plan
            return SimpleNamespace(plan=lambda limit: plan(small if networks.quant == "bf16" else limit))

        monkeypatch.setattr(Networks, "needs", limited)
    result = done("t2i", PROMPT, "-m", "demo", "-W", "64", "-H", "64", "-s", "1", "-q", quant, "-o", "a.png")
    hint = f"on {chip} -q bf16 is faster than {quant}, and there is memory enough for it"
    assert (hint in result.stderr.splitlines()) == hinted


@pytest.mark.parametrize("stored", ["bf16", "qint4"])
def test_what_is_said_of_4_bits_can_be_done(stored, small_model, tmp_path, monkeypatch):
    """A folder has the bits that it has."""
    monkeypatch.setattr(preparation, "is_slow_with_qint4", lambda: True)
    convert(small_model(text=SHALLOW_TEXT), tmp_path / "model", stored, stored, variant=SHALLOW_VARIANT)
    arguments = ("t2i", PROMPT, "-m", "./model", "-W", "64", "-H", "64", "-s", "1", "-o", "a.png", "--force")
    line = f"on {device.chip()} -q bf16 is faster than qint4, and there is memory enough for it"
    if stored == "bf16":
        assert line in done(*arguments, "-q", "qint4").stderr.splitlines()
        assert "faster" not in done(*arguments, "-q", "bf16").stderr
    else:
        told = done(*arguments, "-q", "qint4").stderr.splitlines()
        assert f"{line}; download or convert the model with that" in told
        assert "stored as qint4" in refusal(*arguments, "-q", "bf16")


@pytest.mark.parametrize(
    ("chip", "metal", "slow"), [("Apple M1 Max", True, True), ("Apple M4", True, False), ("Apple M1", False, False)]
)
def test_which_chips_are_slow_with_4_bits(chip, metal, slow, monkeypatch):
    pretend(monkeypatch, chip, metal)
    assert device.is_slow_with_qint4() is slow


def test_the_reason_for_the_limit(monkeypatch):
    sizes = {"memory_size": 16 * GIB, "max_recommended_working_set_size": int(10.67 * GIB)}
    pretend(monkeypatch, "Apple M2", **sizes)
    assert (
        memory_reason() == "of the 16 GiB of this Mac 6 GiB are kept for the system (Metal recommends at most 10.7 GiB)"
    )
    pretend(monkeypatch, "NVIDIA H100", metal=False, total_memory=80 * GIB)
    assert memory_reason() == "of the 80 GiB of this GPU a tenth is left for what the libraries need"
    monkeypatch.setattr(device, "on_metal", lambda: False)
    monkeypatch.setattr(device, "on_gpu", lambda: False)
    assert memory_reason() == "all of this machine's memory, as no GPU is used"


def test_info_gives_the_reason_of_a_limit_that_is_the_default():
    line = f"that limit is the default: {memory_reason()}; --memory-limit sets another"
    assert done("info", "klein-4b").stdout.splitlines()[-1] == line
    line = f"the default limit of a run's memory is {device.device_memory() / GIB:.3g} GiB: {memory_reason()}; "
    assert done("info").stdout.splitlines()[-1] == f"{line}--memory-limit sets another"
    assert "that limit is" not in done("info", "klein-4b", "--memory-limit", "12GB").stdout
