"""Gradients through the blocks of the transformer against finite differences, and against PyTorch's through diffusers'.

What is differentiated is a random weighting of everything that a block gives, by all that goes in and all weights.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
import torch
from diffusers.models.transformers.transformer_flux2 import Flux2SingleTransformerBlock, Flux2TransformerBlock
from helpers.parity import BLOCK, random_tensor, randomize, relative_error, to_mx, transfer
from helpers.source_rules import rules_for
from mlx.utils import tree_flatten, tree_map

from flux2_mlx.transformer import Execution, rope_table
from flux2_mlx.transformer.blocks import DoubleBlock, SingleBlock
from reference.test_blocks import TINY, block_arguments, positions, reference_rope

TEXT, BATCH, D = 5, 2, TINY.hidden_size
IDS = positions(TEXT, 3, 4)
IMAGE = len(IDS) - TEXT
STEP = 1e-2  # to either side


@dataclass(frozen=True)
class Case:
    """A block of ours and of diffusers' with the same weights, the shapes of what goes in, and how either is called."""

    ours: nn.Module
    reference: torch.nn.Module
    prefixes: tuple[str, str]
    shapes: list[tuple[int, ...]]
    call: Callable[..., tuple[mx.array, ...]]
    call_reference: Callable[..., tuple[torch.Tensor, ...]]

    @property
    def inputs(self) -> list[torch.Tensor]:
        return [random_tensor(*shape, seed=seed) for seed, shape in enumerate(self.shapes)]

    def loss(self, weights: Any, inputs: list[mx.array]) -> mx.array:
        self.ours.update(weights)
        outputs = self.call(self.ours, *inputs)
        return sum((y * to_mx(weighting(y.shape))).sum() for y in outputs)


def weighting(shape: tuple[int, ...]) -> torch.Tensor:
    return random_tensor(*shape, seed=100 + shape[1])


def double_case(execution: Execution) -> Case:
    reference = randomize(Flux2TransformerBlock(**block_arguments(TINY)))

    def call(block, img, txt, img_mod, txt_mod):
        return block(img, txt, split(img_mod, 6), split(txt_mod, 6), rope_table(IDS, TINY), None, execution)

    def call_reference(img, txt, img_mod, txt_mod):
        return reference(img, txt, img_mod, txt_mod, reference_rope(TINY, IDS))[::-1]

    shapes = [(BATCH, IMAGE, D), (BATCH, TEXT, D), (BATCH, 6 * D), (BATCH, 6 * D)]
    prefixes = ("double_blocks.3.", "transformer_blocks.3.")
    return Case(DoubleBlock(TINY), reference, prefixes, shapes, call, call_reference)


def single_case(execution: Execution, wanted: slice | None = None) -> Case:
    reference = randomize(Flux2SingleTransformerBlock(**block_arguments(TINY)))

    def call(block, x, mod):
        return (block(x, split(mod, 3), rope_table(IDS, TINY), None, execution, wanted),)

    def call_reference(x, mod):
        return (reference(x, None, mod, reference_rope(TINY, IDS))[:, wanted or slice(None)],)

    shapes = [(BATCH, len(IDS), D), (BATCH, 3 * D)]
    prefixes = ("single_blocks.3.", "single_transformer_blocks.3.")
    return Case(SingleBlock(TINY), reference, prefixes, shapes, call, call_reference)


def last_case(execution: Execution) -> Case:
    """A single block of which some tokens are wanted, neither the first nor the last."""
    return single_case(execution, slice(TEXT, len(IDS) - 2))


def split(modulation: mx.array, count: int) -> list[mx.array]:
    return mx.split(modulation[:, None], count, axis=-1)


@pytest.fixture(params=[1024, 7], ids=["at one time", "in parts"])
def execution(request) -> Execution:
    return Execution(request.param)


@pytest.fixture(params=[double_case, single_case, last_case], ids=["double", "single", "last"])
def case(request, execution, _no_gradients) -> Iterator[Case]:
    made = request.param(execution)
    transfer(made.reference, made.ours, "transformer", TINY, *made.prefixes)
    with torch.enable_grad():
        yield made


def gradients(case: Case) -> tuple[Any, list[mx.array]]:
    """By the weights and by what goes in."""
    return mx.grad(case.loss, argnums=(0, 1))(case.ours.parameters(), [to_mx(x) for x in case.inputs])


def test_gradients_match_diffusers(case):
    inputs = [x.requires_grad_() for x in case.inputs]
    sum((y * weighting(y.shape)).sum() for y in case.call_reference(*inputs)).backward()
    theirs = {name: to_mx(weight.grad) for name, weight in case.reference.named_parameters()}
    by_weights, by_inputs = gradients(case)
    for mine, x in zip(by_inputs, inputs, strict=True):
        assert relative_error(mine, x.grad) <= BLOCK
    ours, source = case.prefixes
    for name, mine in tree_flatten(by_weights):
        rule = rules_for("transformer", TINY)(ours + name, mine.shape)
        # What joins and moves weights does the same to their gradients.
        expected = rule.apply(*(theirs.pop(part.removeprefix(source)) for part in rule.sources))
        assert relative_error(mine, expected) <= BLOCK, name
    assert not theirs


def test_gradients_are_slopes(case):
    """Along the gradient itself, the slope between two points on either side is its length."""
    weights, inputs = case.ours.parameters(), [to_mx(x) for x in case.inputs]
    for argument, gradient in enumerate(gradients(case)):
        length = sum((x * x).sum() for _, x in tree_flatten(gradient)).item() ** 0.5
        values = []
        for step in (STEP / length, -STEP / length):
            point = [weights, inputs]
            point[argument] = tree_map(partial(_moved, step), point[argument], gradient)
            values.append(case.loss(*point).item())
        slope = (values[0] - values[1]) / (2 * STEP)
        assert slope == pytest.approx(length, rel=1e-3)


def _moved(step: float, x: mx.array, gradient: mx.array) -> mx.array:
    return x + step * gradient
