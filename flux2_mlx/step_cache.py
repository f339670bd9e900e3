"""Passes that differ little from an earlier one: of these only the first block is computed.

The measure is that of First Block Cache (ParaAttention, and `FirstBlockCacheConfig` of diffusers), which is a simpler
TeaCache: how much what the first block adds to the stream has changed since the last step whose blocks were all
computed, as the mean absolute difference in terms of the mean absolute value. Up to a threshold, what the other blocks
have added there is added again.

No step is computed for its place alone, be it among the first ones, the last, or after many that were skipped: with as
many passes skipped in all, that makes the error no smaller (scripts/tried.md).

Only tokens whose velocity is wanted count: references hardly change from step to step, so with them, as in those
projects, a threshold would mean less the more references there are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from .device import fused
from .output import Passes
from .streaming import Reading
from .transformer import PLAIN, Execution, Flux2Transformer, KeysValues, Shared
from .transformer.headroom import clipped

# Called as a `Flux2Transformer` is.
Pass = Callable[..., mx.array]


@dataclass(frozen=True)
class StepCaches:
    """Makes the step caches of a run.

    Args:
        threshold: up to what relative change of what the first block adds the other blocks are not computed; 0: all
            are computed, and there are no caches.
        passes: counts what is skipped.
        reading: counts what is streamed from disk.
    """

    threshold: float
    passes: Passes
    reading: Reading

    def of(self, transformer: Flux2Transformer) -> Pass:
        """The transformer with a cache of its own, for the passes of the same images with the same texts."""
        return StepCache(transformer, self) if self.threshold else transformer


@dataclass(frozen=True)
class _Added:
    """What the `first` block and the `others` have added to the tokens of an image, each `[1, Li, D]`, where all were
    computed last."""

    first: mx.array
    others: mx.array


class StepCache:
    """A transformer one of whose passes computes the blocks after the first one for those images only that need it.

    Each image is looked at by itself, so that it becomes the same whatever others are denoised beside it.
    """

    def __init__(self, transformer: Flux2Transformer, caches: StepCaches):
        self._transformer = transformer
        self._caches = caches
        self._added: dict[int, _Added] = {}  # by the places of images
        self._streamed = 0  # bytes that a pass reads whose blocks are all computed

    def __call__(
        self,
        img: mx.array,
        txt: mx.array,
        timestep: mx.array,
        rope: mx.array,
        guidance: mx.array | None = None,
        past: list[KeysValues] | None = None,
        *,
        image: int | None = None,
        execution: Execution = PLAIN,
    ) -> mx.array:
        """Velocity of the image tokens; arguments as for a `Flux2Transformer`, with one noise level for all images."""
        read = self._caches.reading.nbytes
        x, shared = self._transformer.begin(img, txt, timestep, rope, guidance, image=image, execution=execution)
        blocks = self._transformer.blocks(shared, past)
        before, x = x, execution.finish(x, next(blocks)(x))
        first = [now - then for now, then in zip(_images(x, shared), _images(before, shared), strict=True)]
        stale = self._stale(first)
        del before  # which is as large as the stream
        reused = self._reused(x, shared, stale)
        if stale:
            x, entered = self._entering(x, shared, stale)
            for block in blocks:
                x = execution.finish(x, block(x))
            self._keep(stale, first, entered, _images(x, shared))
        self._count(len(first), len(stale), self._caches.reading.nbytes - read)
        if reused:
            x = _in_order(reused | dict(zip(stale, _images(x, shared), strict=False)))
        return self._transformer.end(x, shared)

    def _stale(self, first: Sequence[mx.array]) -> list[int]:
        """The places of the images that need all blocks, given what the `first` one adds to each; this is evaluated."""
        known = [place for place in range(len(first)) if place in self._added]
        # Not a number is no small change: nothing was added, or what was is beyond the range of float16.
        small = [_change(first[place], self._added[place].first) <= self._caches.threshold for place in known]
        mx.eval(*first, *small)
        near = [place for place, is_small in zip(known, small, strict=True) if is_small.item()]
        return [place for place in range(len(first)) if place not in near]

    def _reused(self, x: mx.array, shared: Shared, stale: Sequence[int]) -> dict[int, mx.array]:
        """The images that are not `stale` after all blocks, by their places, given the stream after the first one."""
        images = enumerate(_images(x, shared))
        reused = {place: clipped(now + self._added[place].others) for place, now in images if place not in stale}
        mx.eval(*reused.values())
        return reused

    def _entering(self, x: mx.array, shared: Shared, stale: Sequence[int]) -> tuple[mx.array, list[mx.array]]:
        """The stream of the `stale` images alone, and what each of them has to be less when all blocks are done."""
        images = _images(x, shared)
        entered = [mx.negative(images[place]) for place in stale]  # parts of `x` itself would keep all of it
        for place in stale:
            self._added.pop(place, None)
        x = x if len(stale) == len(x) else x[mx.array([*stale])]
        mx.eval(x, *entered)
        return x, entered

    def _keep(
        self, stale: Sequence[int], first: Sequence[mx.array], entered: Sequence[mx.array], left: Sequence[mx.array]
    ) -> None:
        """Keep what the `first` block has added to the `stale` images, and what the others have, of which each has
        `left` the last one."""
        for place, end, less in zip(stale, left, entered, strict=True):
            others = clipped(end + less)
            mx.eval(others)
            self._added[place] = _Added(first[place], others)

    def _count(self, images: int, stale: int, read: int) -> None:
        passes = self._caches.passes
        passes.all += images
        passes.skipped += images - stale
        if stale:
            self._streamed = read
        else:
            passes.unread += self._streamed - read


def _images(x: mx.array, shared: Shared) -> list[mx.array]:
    """The tokens `[1, Li, D]` of each image of a stream whose velocity is wanted."""
    wanted = shared.wanted_of(x)
    return [wanted[place : place + 1] for place in range(len(wanted))]


def _in_order(images: dict[int, mx.array]) -> mx.array:
    return mx.concatenate([images[place] for place in sorted(images)])


def _change(now: mx.array, then: mx.array) -> mx.array:
    """How much `now` differs from `then`, in terms of that."""
    return _difference(now, then).mean() / mx.abs(then.astype(mx.float32)).mean()


@fused
def _difference(now: mx.array, then: mx.array) -> mx.array:
    return mx.abs(now.astype(mx.float32) - then.astype(mx.float32))
