"""Language models that write and see: what they are said to need, and that they stay within a limit."""

import gc
import json
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers.checkpoints import write_dev_tokenizer
from helpers.mlx_state import plan_ratios
from mlx.utils import tree_flatten
from PIL import Image

from flux2_mlx import upsampling
from flux2_mlx.checkpoint import FORMAT_VERSION, MANIFEST, Component
from flux2_mlx.config import TextConfig, VisionConfig
from flux2_mlx.errors import InputError
from flux2_mlx.output import Phase
from flux2_mlx.upsampling import Writer

# 20 MB in bfloat16, and 9 MB.
TEXT = TextConfig("mistral3", 256, 1024, 7, 288, (1, 2, 7), 4, 2, 64, 1e-5, 1e9, num_later_layers=3)
VISION = VisionConfig(256, 256, 1024, 4, 4, image_size=280)
SHORT = {"max_new_tokens": 12, "temperature": 1.0, "seed": 7}


@pytest.fixture(autouse=True)
def _short_system_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would be hundreds of byte tokens."""
    for name in ("UPSAMPLE_I2I", "DESCRIBE"):
        monkeypatch.setattr(upsampling, name, name[:12])


@pytest.fixture(scope="module", params=["bf16", "qint8"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random weights that holds a language model alone."""
    folder, quant = tmp_path_factory.mktemp("models") / request.param, request.param
    for name, config in {"text_encoder": TEXT, "language_model": TEXT, "vision": VISION}.items():
        part = Component(name, config, None, ()).quantized(quant)
        (folder / name).mkdir(parents=True)
        statement = {"quantization": part.quantization} if part.quantization else {}
        (folder / name / "config.json").write_text(json.dumps(config.to_dict() | statement))
        weights = {
            key: x if x.dtype == mx.uint32 else x.astype(mx.bfloat16)
            for key, x in tree_flatten(part.build().parameters())
        }
        mx.save_safetensors(str(folder / name / "model.safetensors"), weights)
    write_dev_tokenizer(folder / "tokenizer")
    manifest = {
        "format_version": FORMAT_VERSION,
        "variant": "dev",
        "quantization": {"transformer": "bf16", "text_encoder": quant},
        "source": {},
        "components": ["text_encoder", "language_model", "vision"],
    }
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (280, 200, 3), dtype=np.uint8))


def open_writer(folder: Path, limit: int | None = None) -> Writer:
    return Writer.from_pretrained(folder, dtype="float32", memory_limit=limit)


def plan_of(writer: Writer, monkeypatch: pytest.MonkeyPatch, images: list[Image.Image]):
    """The plan of `describe(images)`."""
    plans, check = [], upsampling.checked_writing_plan

    def record(networks, writing, limit):
        plans.append(check(networks, writing, limit))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(upsampling, "checked_writing_plan", record)
        with pytest.raises(KeyboardInterrupt):
            writer.describe(images, **SHORT)
    return plans[0]


def test_the_plan_is_near_what_writing_takes_and_never_below(folder, picture, monkeypatch):
    writer = open_writer(folder)
    planned = plan_of(writer, monkeypatch, [picture])
    assert [phase.name for phase in planned.phases] == ["vision", "language_model"]

    def run() -> list[Phase]:
        writer.timings.clear()
        writer.describe([picture], **SHORT)
        return list(writer.timings)

    ratios = plan_ratios(planned, run, 1.15, attempts=20)
    assert all(1 <= ratio <= 1.15 for ratio in ratios.values()), ratios


def test_a_limit_changes_memory_and_not_the_text(folder, picture, monkeypatch, caplog):
    free, picture = open_writer(folder), picture.resize((60, 50))
    expected = free.describe([picture], **SHORT)
    limit = plan_of(free, monkeypatch, [picture]).peak_memory * 3 // 4
    writer = open_writer(folder, limit)
    gc.collect()
    base = mx.get_active_memory()
    assert "of the language model" not in caplog.text
    assert writer.describe([picture], **SHORT) == expected
    assert "of the language model do not fit into memory and are read for every word" in caplog.text
    assert max(phase.peak_memory for phase in free.timings) - base > limit
    assert max(phase.peak_memory for phase in writer.timings) - base <= limit
    read = writer.timings[-1]
    assert read.read > 10 * read.streamed > 0  # once for every word


@pytest.mark.parametrize("resident", [0, 3, 7, 8, 9])
def test_streamed_layers_give_the_same_logits(folder, resident, monkeypatch):
    writer = open_writer(folder)
    planned = plan_of(writer, monkeypatch, [Image.new("RGB", (30, 30))])
    phase = planned.phase("language_model")
    streamed = replace(phase, resident=resident, streamed=1)
    tokens = mx.array([[5, 9, 30]])
    whole, parts = (writer.networks.load_language_model(x) for x in (phase, streamed))
    caches = whole.make_cache(), parts.make_cache()
    assert len(caches[0]) == len(caches[1]) == 10
    for ids in (tokens, tokens[:, :1]):
        ours, expected = parts(ids, caches[1]), whole(ids, caches[0])
        assert np.array_equal(np.array(ours), np.array(expected))


def test_what_does_not_fit_is_refused_before_anything_is_loaded(folder, picture, monkeypatch):
    monkeypatch.setattr(Component, "load", None)
    with pytest.raises(
        InputError, match=r"the (vision tower|language model) needs [\d.]+ MiB, the limit is .* MiB; choose a"
    ):
        open_writer(folder, 10**6).describe([picture], **SHORT)


def test_a_picture_is_looked_at_once_for_all_prompts(folder, picture, monkeypatch):
    looked = []
    look = upsampling.Writer._look
    monkeypatch.setattr(
        upsampling.Writer, "_look", lambda writer, images: looked.append(images) or look(writer, images)
    )
    answers = open_writer(folder).upsample(["a fox", "a dog"], [picture], **SHORT)
    assert len(looked[0]) == 1
    assert len(set(answers)) == 2
