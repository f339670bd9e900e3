"""Prompt upsampling and image description by the language models that come with FLUX.2."""

import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np
from PIL import Image

from .advice import check_possible, checked_writing_plan
from .arguments import checked_number, kinds, pictures, texts
from .checkpoint import Checkpoint
from .config import VARIANTS
from .device import activation_dtype, check_process, failures, foreign, memory_bytes
from .errors import CheckpointError, InputError
from .images import flattened
from .kept import held
from .layers import check_finite
from .memory import Plan, Writing
from .metering import Phases, running, warn_of_long_operations
from .networks import Networks
from .output import Phase
from .request import check_prompt, check_words
from .store import Announce, Model, Progress, find_checkpoint
from .text import LanguageModel
from .text.generation import embed, generate, image_placeholder
from .text.pixtral import preprocess
from .text.prompts import DESCRIBE, UPSAMPLE_I2I, UPSAMPLE_T2I, mistral_image_chat

# The reference's own numbers for the language models of FLUX.2.
TEMPERATURE = 0.15
MAX_NEW_TOKENS = 512
# Images are shown to the language model at no more than this area, as in the reference.
_MAX_AREA = 768 * 768
_MAX_ANSWER = 100_000  # tokens: of the order of what the models can read, and beyond any prompt
_SMALLER = "fewer images or a shorter prompt"  # than an answer needs too much for
_log = logging.getLogger(__name__)
# Hears the number of the answer and its text so far.
OnText = Callable[[int, str], None]


@dataclass(frozen=True)
class Writer:
    """Rewrites prompts and describes images with the language model of a checkpoint, which is in memory only while
    it writes, unless a pipeline keeps it (`keep`), and takes up to `memory_limit` bytes. `timings` has a `Phase` for
    each one of what has been written."""

    networks: Networks
    memory_limit: int
    keep: bool = False
    timings: list[Phase] = field(default_factory=list)

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str] | Model,
        *,
        variant: str | None = None,
        text_quant: str | None = None,
        dtype: str | None = None,
        models_dir: str | os.PathLike[str] | None = None,
        memory_limit: int | str | None = None,
        keep_source: bool = True,
        announce: Announce | None = None,
        progress: Progress | None = None,
    ) -> "Writer":
        """Open the language model of a model; its transformer and VAE need not be there.

        Args:
            source: as for `Flux2Pipeline.from_pretrained`; fetched and converted first if need be. Of the released
                models, dev's sees images.
            variant: the model's name where the source can't tell.
            text_quant: `bf16`, `qint8`, `qint6`, `mixed4` or `qint4`; None: as stored, or `qint8` or as few
                bits as the source has.
            dtype: `float32`, `bfloat16` or `float16` for activations; None: the device's own. With `float16` it is
                `bfloat16`, as hidden states of language models overflow the other.
            models_dir: as for `Flux2Pipeline.from_pretrained`.
            memory_limit: bytes, or a size such as `"12GB"`, to stay within, if need be by reading layers from disk for
                every word; None: what the system of this machine can spare, as `flux2-mlx info` shows.
            keep_source: leave what is fetched in the Hub's cache.
            announce: hears what is about to be fetched.
            progress: hears bytes done, bytes in all, and `download` or `convert`.
        """

        def networks(checkpoint: Checkpoint) -> Networks:
            return Networks.open(checkpoint, text_quant=text_quant, dtype=dtype, text_only=True)

        check_process()
        activation_dtype(dtype)  # InputError if there is none of that name
        limit = memory_bytes(memory_limit)
        folder = find_checkpoint(
            source,
            variant=variant,
            text_quant=text_quant,
            models_dir=models_dir,
            text_only=True,
            keep_source=keep_source,
            check=lambda checkpoint: check_possible(networks(checkpoint), limit),
            announce=announce,
            progress=progress,
        )
        return cls(networks(Checkpoint.open(folder)), limit)

    @property
    def checkpoint(self) -> Checkpoint:
        return self.networks.checkpoint

    @property
    def can_see(self) -> bool:
        return "vision" in self.checkpoint.components

    def upsample(
        self,
        prompts: Sequence[str],
        images: Sequence[Image.Image] = (),
        *,
        temperature: float = TEMPERATURE,
        max_new_tokens: int = MAX_NEW_TOKENS,
        seed: int | None = None,
        on_text: OnText = lambda number, text: None,
    ) -> list[str]:
        """Each prompt with more visual detail or, with RGB `images` to edit, as one clear instruction.

        The other settings are those of `write`. InputError if a prompt is empty, too long or no text.
        """
        check_prompts(prompts)
        images = [shown(images)] if images else []
        system = UPSAMPLE_I2I if images else UPSAMPLE_T2I
        questions = [(prompt, images) for prompt in prompts]
        return self.write(
            questions, system, temperature=temperature, max_new_tokens=max_new_tokens, seed=seed, on_text=on_text
        )

    def describe(
        self,
        images: Sequence[Image.Image],
        *,
        temperature: float = TEMPERATURE,
        max_new_tokens: int = MAX_NEW_TOKENS,
        seed: int | None = None,
        on_text: OnText = lambda number, text: None,
    ) -> list[str]:
        """What is to be seen in each RGB image, in words that an image can be made from; settings as of `write`."""
        questions = [("Describe this image.", [shown([image])]) for image in images]
        return self.write(
            questions, DESCRIBE, temperature=temperature, max_new_tokens=max_new_tokens, seed=seed, on_text=on_text
        )

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
        """The model's answers to texts with images. Answer k is sampled with seed + k, and 0 follows the largest seed.

        Raises:
            CheckpointError: the checkpoint has no language model, or none that sees.
            InputError: an answer is empty.
        """
        self._check(any(images for _, images in questions))
        temperature = checked_number("temperature", temperature, 0, 2)
        max_new_tokens = int(checked_number("max_new_tokens", max_new_tokens, 1, _MAX_ANSWER))
        if not questions:
            return []
        pictures = {id(image): self._pixels(image) for _, images in questions for image in images}
        prompts = [self._ids(text, system, [pictures[id(image)] for image in images]) for text, images in questions]
        planned = self._plan(prompts, list(pictures.values()), max_new_tokens)
        with running(self.networks, planned, self.timings, keep=self.keep) as phases, failures(_SMALLER):
            features = {}
            if pictures:
                with phases.enter("vision"):
                    features = self._look(pictures)
            seen = [[features[id(image)] for image in images] for _, images in questions]
            with phases.enter("language_model"):
                return self._answers(
                    phases, list(zip(prompts, seen, strict=True)), seed, on_text, temperature, max_new_tokens
                )

    def _check(self, must_see: bool) -> None:
        if "language_model" not in self.checkpoint.components:
            name = self.checkpoint.variant.name if self.checkpoint.is_built_in else self.checkpoint.folder
            writing = ", ".join(name for name, row in VARIANTS.items() if row.text.num_later_layers)
            raise CheckpointError(
                f"{name} has no language model, so it can't rewrite prompts or describe images; choose one of {writing}"
            )
        if must_see and not self.can_see:
            raise CheckpointError(f"{self.checkpoint.folder} has no vision weights, so it can't look at images")

    def _pixels(self, image: Image.Image) -> np.ndarray:
        return preprocess(image, self.checkpoint.components["vision"].config)

    def _ids(self, text: str, system: str, images: Sequence[np.ndarray]) -> list[int]:
        """Token ids of a question about preprocessed images."""
        tokenizer = self.checkpoint.tokenizer
        if not images:
            return tokenizer.encode(tokenizer.chat(text, system))
        placeholders = [image_placeholder(*self._cells(pixels)) for pixels in images]
        return tokenizer.encode(mistral_image_chat(text, system, placeholders))

    def _cells(self, pixels: np.ndarray) -> tuple[int, int]:
        """Height and width of a preprocessed image in tokens."""
        size = self.checkpoint.components["vision"].config.cell_size
        return pixels.shape[0] // size, pixels.shape[1] // size

    def _plan(self, prompts: Sequence[list[int]], images: Sequence[np.ndarray], max_new_tokens: int) -> Plan:
        pixels = tuple(image.shape[0] * image.shape[1] for image in images)
        writing = Writing(max(map(len, prompts)), max_new_tokens, pixels)
        planned = checked_writing_plan(self.networks, writing, max(0, self.memory_limit - held()))
        warn_of_long_operations(planned.longest, _SMALLER)
        if streamed := planned.phase("language_model").streamed:
            _log.warning(
                "%.3g GiB of the language model do not fit into memory and are read for every word", streamed / 2**30
            )
        return planned

    def _look(self, images: dict[int, np.ndarray]) -> dict[int, mx.array]:
        """The embeddings `[cells, D]` of each preprocessed image."""
        vision = self.networks.load("vision")
        dtype = self.networks.dtype_of("vision")
        features = {}
        for key, pixels in images.items():
            features[key] = vision(mx.array(pixels).astype(dtype))
            check_finite(features[key], "vision tower")
        return features

    def _answers(
        self,
        phases: Phases,
        questions: Sequence[tuple[list[int], list[mx.array]]],
        seed: int | None,
        on_text: OnText,
        temperature: float,
        max_tokens: int,
    ) -> list[str]:
        """Answers to token ids with embeddings of images."""
        model = self.networks.load_language_model(phases.planned("language_model"))
        answers = []
        for number, (ids, features) in enumerate(questions):
            embeddings = self._embeddings(model, ids, features)
            tokens = generate(
                model,
                ids,
                self.checkpoint.tokenizer.end_ids,
                embeddings=embeddings,
                temperature=temperature,
                max_tokens=max_tokens,
                seed=None if seed is None else (seed + number) % 2**64,
            )
            answers.append(self._read(tokens, number, on_text))
        return answers

    def _embeddings(self, model: LanguageModel, ids: list[int], features: list[mx.array]) -> mx.array | None:
        return embed(model, ids, features, self.checkpoint.tokenizer.image_id) if features else None

    def _read(self, tokens: Iterator[int], number: int, on_text: OnText) -> str:
        answer: list[int] = []
        text = ""
        for token in tokens:
            answer.append(token)
            text = self.checkpoint.tokenizer.decode(answer)
            with foreign():
                on_text(number, text)
        if not text.strip():
            raise InputError("the language model answered nothing; try another seed, or leave the rewriting out")
        return text.strip()


def check_prompts(prompts: Sequence[str]) -> None:
    """Raise InputError if one of `prompts` can't be rewritten: empty, too long, or no text."""
    for prompt in prompts:
        check_words(prompt)
        check_prompt(prompt)


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


class WritingMethods:
    """What a pipeline does with its language model."""

    networks: Networks
    memory_limit: int
    keep: bool

    def writer(self) -> Writer:
        """The model's own language model: dev's sees images, klein's does not."""
        return Writer(self.networks, self.memory_limit, self.keep)

    def upsample_prompt(
        self,
        prompt: str | Sequence[str],
        images: Sequence[Image.Image] = (),
        *,
        vision: Writer | None = None,
        temperature: float = TEMPERATURE,
        max_new_tokens: int = MAX_NEW_TOKENS,
        seed: int | None = None,
    ) -> list[str]:
        """Prompts rewritten with more detail or, with RGB `images` to edit, as clear instructions.

        `vision` looks at images where this model can't (see `Writer.from_pretrained`); the other settings are those of
        `Writer.write`.
        """
        prompts = texts("prompt", prompt)
        images = [flattened(image) for image in pictures("images", images)[0]]
        kinds(vision=(vision, Writer))
        writer = vision if images and vision is not None else self.writer()
        return writer.upsample(prompts, images, temperature=temperature, max_new_tokens=max_new_tokens, seed=seed)

    def describe_image(
        self,
        image: Image.Image,
        *,
        vision: Writer | None = None,
        temperature: float = TEMPERATURE,
        max_new_tokens: int = MAX_NEW_TOKENS,
        seed: int | None = None,
    ) -> str:
        """What is to be seen in an RGB image; arguments as for `upsample_prompt`."""
        images = [flattened(image) for image in pictures("image", image)[0]]
        if len(images) != 1:
            raise InputError(f"one image is described at a time, got {len(images)}")
        kinds(vision=(vision, Writer))
        writer = vision or self.writer()
        return writer.describe(images, temperature=temperature, max_new_tokens=max_new_tokens, seed=seed)[0]
