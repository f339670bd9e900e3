"""Denoisers, and the denoising loop."""

from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from flux2_mlx.config import TransformerConfig
from flux2_mlx.errors import InputError
from flux2_mlx.sampling import Conditions, Painting, References, beside, denoise, guided, read
from flux2_mlx.transformer import PLAIN, Execution, image_ids, rope_table, text_ids

SIGMAS = np.array([1, 0.75, 0.5, 0], dtype=np.float32)


class Recorded:
    """A denoiser of constant velocity, and what it was called with."""

    def __init__(self, velocity: mx.array):
        self._velocity = velocity
        self.tokens: list[mx.array] = []
        self.sigmas: list[float] = []

    def __call__(self, tokens: mx.array, sigma: float) -> mx.array:
        self.tokens.append(tokens)
        self.sigmas.append(sigma)
        return self._velocity


@pytest.fixture
def noise() -> mx.array:
    return mx.random.normal((2, 3, 4), key=mx.random.key(0))


@pytest.fixture
def image() -> mx.array:
    return mx.random.normal((2, 3, 4), key=mx.random.key(1))


@pytest.fixture
def denoiser(noise, image) -> Recorded:
    """A straight flow from `image` to `noise`."""
    return Recorded(noise - image)


def assert_close(a: mx.array, b: mx.array) -> None:
    assert mx.allclose(a, b, rtol=1e-5, atol=1e-5).item()


def test_denoise_yields_after_every_step(denoiser, noise, image):
    steps = denoise(denoiser, noise, SIGMAS)
    assert denoiser.sigmas == []
    for number, step in enumerate(steps, 1):
        assert len(denoiser.sigmas) == step.number == number
        assert (step.from_sigma, step.sigma) == (SIGMAS[number - 1], SIGMAS[number])
        assert_close(step.tokens, image + float(SIGMAS[number]) * (noise - image))
        assert_close(step.estimate, image)
    assert number == 3
    assert denoiser.sigmas == [1, 0.75, 0.5]
    assert_close(denoiser.tokens[1], image + 0.75 * (noise - image))


def last_tokens(steps, sent: dict[int, mx.array]) -> mx.array:
    """What `steps` end with if tokens are sent after some."""
    step = next(steps)
    while True:
        try:
            step = steps.send(sent.get(step.number))
        except StopIteration as end:
            return end.value


def test_denoise_ends_with_the_last_tokens(denoiser, noise, image):
    assert_close(last_tokens(denoise(denoiser, noise, SIGMAS), {}), image)
    other = mx.ones_like(noise)
    assert_close(last_tokens(denoise(denoiser, noise, SIGMAS), {2: other}), other - 0.5 * (noise - image))
    assert_close(last_tokens(denoise(denoiser, noise, SIGMAS), {3: other}), other)


def test_denoise_goes_on_from_tokens_that_were_sent(denoiser, noise, image):
    steps = denoise(denoiser, noise, SIGMAS)
    next(steps)
    other = mx.ones_like(noise)
    step = steps.send(other)
    assert_close(denoiser.tokens[1], other)
    assert_close(step.tokens, other - 0.25 * (noise - image))


@pytest.mark.parametrize(
    "wrong", [np.zeros((2, 3, 5)), np.full((2, 3, 4), np.nan), "x"], ids=["shape", "no numbers", "text"]
)
def test_what_can_not_be_tokens_is_refused(wrong, denoiser, noise):
    steps = denoise(denoiser, noise, SIGMAS)
    next(steps)
    with pytest.raises(InputError, match="a callback returned "):
        steps.send(wrong)


def test_denoise_can_be_closed_early(denoiser, noise):
    steps = denoise(denoiser, noise, SIGMAS)
    next(steps)
    steps.close()
    assert len(denoiser.sigmas) == 1
    assert list(steps) == []


def test_tokens_stay_in_float32(noise, image):
    steps = list(denoise(Recorded((noise - image).astype(mx.bfloat16)), noise, SIGMAS))
    assert {step.tokens.dtype for step in steps} | {step.estimate.dtype for step in steps} == {mx.float32}


def test_classifier_free_guidance(denoiser, noise, image):
    negative = Recorded(image)
    step = next(denoise(guided(denoiser, negative, 3.0), noise, SIGMAS))
    assert denoiser.sigmas == negative.sigmas == [1]
    assert negative.tokens == denoiser.tokens == [noise]
    velocity = image + 3 * ((noise - image) - image)
    assert_close(step.tokens, noise - 0.25 * velocity)
    assert_close(step.estimate, noise - velocity)


def test_references_go_along(noise):
    references, velocity = mx.ones((1, 5, 4)), mx.arange(2 * 8 * 4).reshape(2, 8, 4)
    recorded = Recorded(velocity)
    assert mx.array_equal(beside(recorded, references)(noise, 0.5), velocity[:, :3])
    assert recorded.sigmas == [0.5]
    assert mx.array_equal(recorded.tokens[0], mx.concatenate([noise, mx.ones((2, 5, 4))], axis=1))


class Network:
    """Stands for the transformer, and records what it was called with."""

    config = TransformerConfig(1, 1, 1, 4, 8, 4, axes_dims_rope=(2, 2, 2, 2))

    def __init__(self):
        self.calls: list[SimpleNamespace] = []
        self.was_read: list[tuple[mx.array, ...]] = []

    def txt_in(self, states: mx.array) -> mx.array:
        return states + 1

    def read(self, *arguments: mx.array) -> str:
        self.was_read.append(arguments)
        return "past"

    def __call__(self, tokens, text, timestep, rope, guidance, past, **how):
        self.calls.append(SimpleNamespace(tokens=tokens, text=text, rope=rope, guidance=guidance, past=past, **how))
        self.calls[-1].sigma = timestep.item()
        return tokens[:, : how["image"]]


WAY = Execution(part=7)
TEXTS = [mx.zeros((6, 2)), mx.ones((6, 2)), mx.full((9, 2), 5.0)]
REFERENCES = References(mx.full((1, 4, 4), 7.0), image_ids(2, 2, 10))


def assert_rope(rope: mx.array, *ids: np.ndarray) -> None:
    assert mx.array_equal(rope, rope_table(np.concatenate(ids), Network.config))


def test_the_texts_of_a_pass(noise):
    network = Network()
    conditions = Conditions(network, mx.bfloat16, image_ids(1, 3), TEXTS)
    velocity = conditions.denoiser([TEXTS[1], TEXTS[0]])(noise, 0.5)
    conditions.denoiser([TEXTS[2], TEXTS[2]])(noise, 0.25)
    first, second = network.calls
    assert (velocity.shape, first.tokens.dtype, first.sigma, second.sigma) == (noise.shape, mx.bfloat16, 0.5, 0.25)
    assert (first.guidance, first.past, first.image, first.execution) == (None, None, 3, PLAIN)
    assert mx.array_equal(first.text, mx.stack([mx.full((6, 2), 2.0), mx.ones((6, 2))]))
    assert mx.array_equal(second.text, mx.full((2, 9, 2), 6.0))
    assert_rope(first.rope, text_ids(6), image_ids(1, 3))
    assert_rope(second.rope, text_ids(9), image_ids(1, 3))


def test_embedded_guidance(noise):
    network = Network()
    denoiser = Conditions(network, mx.float32, image_ids(1, 3), TEXTS, guidance=mx.array([2.5])).denoiser(TEXTS[:2])
    list(denoise(denoiser, noise, SIGMAS))
    assert [call.guidance.item() for call in network.calls] == [2.5] * 3


def test_references_as_keys_and_values(noise):
    network, guidance = Network(), mx.array([2.5])
    past = read(network, REFERENCES, mx.float32, guidance, WAY)
    conditions = Conditions(network, mx.float32, image_ids(1, 3), TEXTS, guidance=guidance, past=past)
    assert conditions.denoiser(TEXTS[:2])(noise, 0.5).shape == noise.shape
    (call,) = network.calls
    ((tokens, rope, seen, execution),) = network.was_read
    assert execution == WAY
    assert (call.past, call.tokens.shape, seen.item()) == ("past", noise.shape, 2.5)
    assert mx.array_equal(tokens, REFERENCES.tokens)
    assert_rope(rope, REFERENCES.ids)
    assert_rope(call.rope, text_ids(6), image_ids(1, 3))


def test_references_as_tokens(noise):
    network = Network()
    conditions = Conditions(network, mx.float32, image_ids(1, 3), TEXTS, along=REFERENCES.ids, execution=WAY)
    assert beside(conditions.denoiser(TEXTS[:2]), REFERENCES.tokens)(noise, 0.5).shape == noise.shape
    (call,) = network.calls
    assert (call.past, call.tokens.shape, network.was_read) == (None, (2, 7, 4), [])
    assert (call.image, call.execution) == (3, WAY)
    assert_rope(call.rope, text_ids(6), image_ids(1, 3), REFERENCES.ids)


def test_what_is_not_painted_over_is_kept(denoiser, noise, image):
    mask = mx.array([1.0, 0.0, 0.25])[None, :, None]
    painting = Painting(mx.ones((1, 3, 4)), noise, mask)
    steps = list(denoise(denoiser, noise, SIGMAS, painting.kept))
    for step in steps:
        assert mx.array_equal(step.tokens[:, 1], step.sigma * noise[:, 1] + (1 - step.sigma))
        assert mx.array_equal(step.estimate[:, 1], mx.ones((2, 4)))
    assert_close(steps[0].tokens[:, 2], 0.75 * painting.at(0.75)[:, 2] + 0.25 * (image + 0.75 * (noise - image))[:, 2])
    assert_close(steps[-1].tokens[:, 0], image[:, 0])
