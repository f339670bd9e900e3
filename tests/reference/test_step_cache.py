"""Step caches against First Block Cache in PyTorch, in whole runs of diffusers' pipeline.

diffusers' own `apply_first_block_cache` fails with FLUX.2, since blocks of its two kinds give different streams. So its
definition, as its documentation and `FirstBlockCacheConfig` state it, is written once more here, for its networks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import Flux2KleinPipeline
from helpers.checkpoints import convert
from helpers.parity import relative_error
from helpers.references import small_pipeline

from flux2_mlx import Flux2Pipeline
from flux2_mlx.config import TextConfig, TransformerConfig

TEXT = TextConfig("qwen3", 16, 24, 27, 151936, (9, 18, 27), 3, 1, 8)
TRANSFORMER = TransformerConfig(2, 3, 2, 48, 16, 16, axes_dims_rope=(2, 6, 4, 4), guidance_embeds=False)
PROMPT = "A cat holding a sign that says hello world"
SETTINGS: dict[str, Any] = {"height": 48, "width": 80, "num_inference_steps": 50, "max_sequence_length": 24}
LATENTS = 1e-4


class FirstBlockCache:
    """Of one kind of pass: what the first block and all others have added to the image's stream, each when all were
    last computed; and how many passes there were, and were skipped."""

    def __init__(self, threshold: float):
        self._threshold = threshold
        self._first: torch.Tensor | None = None
        self._entered = self._others = torch.zeros(0)
        self.passes = self.skipped = 0
        self.skips = False

    def after_first(self, before: torch.Tensor, after: torch.Tensor) -> None:
        self.passes += 1
        added = after - before
        self.skips = False
        if self._first is not None:
            change = (added - self._first).abs().mean() / self._first.abs().mean()
            self.skips = bool(change <= self._threshold)
        self.skipped += self.skips
        if not self.skips:
            self._first = added
        self._entered = after

    def after_last(self, stream: torch.Tensor) -> torch.Tensor:
        """The stream of text and image after the last block, which has done nothing if this pass is skipped."""
        text = stream.shape[1] - self._entered.shape[1]
        if not self.skips:
            self._others = stream[:, text:] - self._entered
            return stream
        return torch.cat([stream[:, :text], self._entered + self._others], dim=1)


@contextmanager
def caching(pipeline: Flux2KleinPipeline, threshold: float, kinds: int) -> Iterator[list[FirstBlockCache]]:
    """Have the pipeline's passes, so many a step, each go through a cache of its kind."""
    caches = [FirstBlockCache(threshold) for _ in range(kinds)]
    network = pipeline.transformer
    blocks = [*network.transformer_blocks, *network.single_transformer_blocks]
    original = {block: block.forward for block in blocks}

    def first(hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        caches.append(caches.pop(0))  # they take turns
        text, image = original[blocks[0]](hidden_states=hidden_states, **kwargs)
        caches[-1].after_first(hidden_states, image)
        return text, image

    def later(block: torch.nn.Module) -> Any:
        def forward(
            hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None, **kwargs: Any
        ) -> Any:
            both = {"hidden_states": hidden_states, "encoder_hidden_states": encoder_hidden_states}
            if not caches[-1].skips:
                left = original[block](**both, **kwargs)
            else:
                left = hidden_states if encoder_hidden_states is None else (encoder_hidden_states, hidden_states)
            return caches[-1].after_last(left) if block is blocks[-1] else left

        return forward

    blocks[0].forward = first
    for block in blocks[1:]:
        block.forward = later(block)
    try:
        yield caches
    finally:
        for block in blocks:
            del block.forward


@pytest.fixture(scope="module")
def pair(qwen3_tokenizer_file, tmp_path_factory) -> tuple[Flux2KleinPipeline, Flux2Pipeline]:
    """The reference pipeline and ours with the same weights, of a base model."""
    folder = tmp_path_factory.mktemp("base")
    reference = small_pipeline(qwen3_tokenizer_file.parent, transformer=TRANSFORMER, text=TEXT, distilled=False)
    reference.save_pretrained(folder / "official")
    converted = convert(folder / "official", folder / "converted", variant="klein-base-4b")
    return reference, Flux2Pipeline.from_pretrained(converted, dtype="float32")


@pytest.mark.parametrize(("guidance", "threshold"), [(4.0, 0.7), (4.0, 0.9), (1.0, 0.8)])
def test_a_run_skips_the_same_passes_and_gives_the_same(pair, guidance, threshold):
    reference, pipe = pair
    kinds = 2 if guidance > 1 else 1
    settings = SETTINGS | {"prompt": PROMPT, "guidance_scale": guidance, "output_type": "latent"}
    with caching(reference, threshold, kinds) as caches:
        expected = reference(generator=torch.Generator("cpu").manual_seed(5), **settings).images
    output = pipe(seed=5, step_cache=threshold, **settings)
    print(output.passes, [cache.skipped for cache in caches])
    assert output.passes.all == sum(cache.passes for cache in caches) == 50 * kinds
    assert 10 < output.passes.skipped == sum(cache.skipped for cache in caches) < 49 * kinds
    assert relative_error(output.images, expected) <= LATENTS
    whole = pipe(seed=5, **settings).images
    assert relative_error(output.images, whole) > 100 * LATENTS
