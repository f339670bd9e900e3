"""Prompt upsampling and image description by the language models that come with FLUX.2."""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from .checkpoint import Checkpoint, network_dtype
from .convert import find_checkpoint
from .errors import CheckpointError, InputError
from .layers import activation_dtype
from .quantization import loadable_quant
from .text import LanguageModel
from .text.generation import embed, generate, image_placeholder
from .text.pixtral import preprocess
from .text.prompts import DESCRIBE, UPSAMPLE_I2I, UPSAMPLE_T2I, mistral_image_chat

TEMPERATURE = 0.15
MAX_NEW_TOKENS = 512
# Images are shown to the language model at no more than this area, as in the reference.
_MAX_AREA = 768 * 768
# Hears the number of the answer and its text so far.
OnText = Callable[[int, str], None]


@dataclass(frozen=True)
class Writer:
    """Rewrites prompts and describes images with the language model of a checkpoint, which is in memory only while
    it writes."""

    checkpoint: Checkpoint
    text_quant: str
    dtype: mx.Dtype

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike, *, text_quant: str | None = None, dtype: str | None = None, **options: Any
    ) -> "Writer":
        """Open the language model of a model; its transformer and VAE need not be there.

        Args:
            source: as for `Flux2Pipeline.from_pretrained`; fetched and converted first if need be. Of the released
                models, dev's sees images.
            text_quant: `bf16`, `qint8` or `qint4`; None: as stored, or 8 bit when converting.
            dtype: `float32`, `bfloat16` or `float16` for activations; None: the device's own. With `float16` it is
                `bfloat16`, as hidden states of language models overflow the other.
            options: further ones of `find_checkpoint`.
        """
        checkpoint = Checkpoint.open(find_checkpoint(str(source), text_quant=text_quant, text_only=True, **options))
        return cls(
            checkpoint, loadable_quant("text encoder", checkpoint.text_quant, text_quant), activation_dtype(dtype)
        )

    @property
    def can_see(self) -> bool:
        return "vision" in self.checkpoint.components

    @property
    def _computed_in(self) -> mx.Dtype:
        return network_dtype("language_model", self.dtype)

    def upsample(self, prompts: Sequence[str], images: Sequence[Image.Image] = (), **settings: Any) -> list[str]:
        """Each prompt with more visual detail or, with RGB `images` to edit, as one clear instruction.

        `settings` are those of `write`.
        """
        images = [shown(images)] if images else []
        return self.write(
            [(prompt, images) for prompt in prompts], UPSAMPLE_I2I if images else UPSAMPLE_T2I, **settings
        )

    def describe(self, images: Sequence[Image.Image], **settings: Any) -> list[str]:
        """What is to be seen in each RGB image, in words that an image can be made from."""
        return self.write([("Describe this image.", [shown([image])]) for image in images], DESCRIBE, **settings)

    def write(
        self,
        questions: Sequence[tuple[str, Sequence[Image.Image]]],
        system: str,
        *,
        temperature: float = TEMPERATURE,
        max_new_tokens: int = MAX_NEW_TOKENS,
        seed: int | None = None,
        on_text: OnText = lambda number, text: None,
    ) -> list[str]:
        """The model's answers to texts with images. Answer k is sampled with seed + k.

        Raises:
            CheckpointError: the checkpoint has no language model, or none that sees.
            InputError: an answer is empty.
        """
        self._check(any(images for _, images in questions))
        inputs = [self._input(text, system, images) for text, images in questions]
        model = self._load_model()
        embeddings = [self._embeddings(model, ids, pixels) for ids, pixels in inputs]
        answers = []
        for number, ((ids, _), embedded) in enumerate(zip(inputs, embeddings, strict=True)):
            tokens = generate(
                model,
                ids,
                self.checkpoint.tokenizer.end_ids,
                embeddings=embedded,
                temperature=temperature,
                max_tokens=max_new_tokens,
                seed=None if seed is None else seed + number,
            )
            answers.append(self._read(tokens, number, on_text))
        return answers

    def _check(self, must_see: bool) -> None:
        if "language_model" not in self.checkpoint.components:
            raise CheckpointError(f"{self.checkpoint.folder} has no language model, so it can't rewrite prompts")
        if must_see and not self.can_see:
            raise CheckpointError(f"{self.checkpoint.folder} has no vision weights, so it can't look at images")

    def _input(self, text: str, system: str, images: Sequence[Image.Image]) -> tuple[list[int], list[np.ndarray]]:
        """Token ids of a question, and its preprocessed images."""
        tokenizer = self.checkpoint.tokenizer
        if not images:
            return tokenizer.encode(tokenizer.chat(text, system)), []
        config = self.checkpoint.components["vision"].config
        pixels = [preprocess(image, config) for image in images]
        cells = [(p.shape[0] // config.cell_size, p.shape[1] // config.cell_size) for p in pixels]
        placeholders = [image_placeholder(height, width) for height, width in cells]
        return tokenizer.encode(mistral_image_chat(text, system, placeholders)), pixels

    def _embeddings(self, model: LanguageModel, ids: list[int], pixels: list[np.ndarray]) -> mx.array | None:
        if not pixels:
            return None
        vision = self.checkpoint.components["vision"].load(self._computed_in, self.text_quant)
        embeddings = embed(model, ids, vision, pixels, self.checkpoint.tokenizer.image_id)
        mx.eval(embeddings)
        return embeddings

    def _load_model(self) -> LanguageModel:
        parts = (self.checkpoint.components[name] for name in ("text_encoder", "language_model"))
        return LanguageModel(*(part.load(self._computed_in, self.text_quant) for part in parts))

    def _read(self, tokens: Iterator[int], number: int, on_text: OnText) -> str:
        answer: list[int] = []
        text = ""
        for token in tokens:
            answer.append(token)
            text = self.checkpoint.tokenizer.decode(answer)
            on_text(number, text)
        if not text.strip():
            raise InputError("the language model answered nothing; try another seed, or leave the rewriting out")
        return text.strip()


def shown(images: Sequence[Image.Image]) -> Image.Image:
    """One RGB image for the language model: side by side on white, centred in height, at most 768² in area."""
    if len(images) == 1:
        joined = images[0]
    else:
        height = max(image.height for image in images)
        joined = Image.new("RGB", (sum(image.width for image in images), height), "white")
        x = 0
        for image in images:
            joined.paste(image, (x, (height - image.height) // 2))
            x += image.width
    area = joined.width * joined.height
    if area <= _MAX_AREA:
        return joined
    scale = math.sqrt(_MAX_AREA / area)
    size = (max(1, int(joined.width * scale)), max(1, int(joined.height * scale)))
    return joined.resize(size, Image.Resampling.LANCZOS)
