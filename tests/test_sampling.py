"""The denoising loop."""

from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from flux2_mlx.sampling import Conditioning, Text, denoise

SIGMAS = np.array([1, 0.75, 0.5, 0], dtype=np.float32)


class Network:
    """Stands for the transformer: a constant velocity for each text, and a record of what it was called with."""

    def __init__(self, velocities: dict[int, mx.array]):
        self._velocities = velocities
        self.calls: list[SimpleNamespace] = []

    def __call__(self, tokens, text, timestep, rope, guidance, past=None):
        self.calls.append(SimpleNamespace(tokens=tokens, text=text, timestep=timestep, rope=rope, guidance=guidance))
        return self._velocities[int(text[0].item())].astype(tokens.dtype)

    @property
    def timesteps(self) -> list[float]:
        return [call.timestep.item() for call in self.calls]


ROPE, OTHER_ROPE = mx.array([0]), mx.array([3])
TEXT, NEGATIVE = Text(mx.array([1]), ROPE), Text(mx.array([2]), OTHER_ROPE)


@pytest.fixture
def noise() -> mx.array:
    return mx.random.normal((2, 3, 4), key=mx.random.key(0))


@pytest.fixture
def image() -> mx.array:
    return mx.random.normal((2, 3, 4), key=mx.random.key(1))


@pytest.fixture
def network(noise, image) -> Network:
    """A straight flow from `image` to `noise`."""
    return Network({1: noise - image, 2: image})


def run(network: Network, noise: mx.array, dtype=mx.float32, **conditioning):
    return denoise(network, noise, Conditioning(TEXT, **conditioning), SIGMAS, dtype)


def assert_close(a: mx.array, b: mx.array) -> None:
    assert mx.allclose(a, b, rtol=1e-5, atol=1e-5).item()


def test_denoise_yields_after_every_step(network, noise, image):
    steps = run(network, noise)
    assert network.calls == []
    for number, step in enumerate(steps, 1):
        assert len(network.calls) == step.number == number
        assert (step.from_sigma, step.sigma) == (SIGMAS[number - 1], SIGMAS[number])
        assert_close(step.tokens, image + float(SIGMAS[number]) * (noise - image))
        assert_close(step.estimate, image)
    assert number == 3
    assert network.timesteps == [1, 0.75, 0.5]
    assert_close(network.calls[1].tokens, image + 0.75 * (noise - image))
    assert all(call.text is TEXT.states and call.rope is ROPE and call.guidance is None for call in network.calls)


def test_denoise_goes_on_from_tokens_that_were_sent(network, noise):
    steps = run(network, noise)
    next(steps)
    other = mx.ones_like(noise)
    step = steps.send(other)
    assert_close(network.calls[1].tokens, other)
    assert_close(step.tokens, other - 0.25 * network(other, TEXT.states, mx.array([0.0]), ROPE, None))


def test_denoise_can_be_closed_early(network, noise):
    steps = run(network, noise)
    next(steps)
    steps.close()
    assert len(network.calls) == 1
    assert list(steps) == []


def test_tokens_stay_in_float32(network, noise):
    steps = list(run(network, noise, mx.bfloat16))
    assert {call.tokens.dtype for call in network.calls} == {mx.bfloat16}
    assert {step.tokens.dtype for step in steps} | {step.estimate.dtype for step in steps} == {mx.float32}


def test_classifier_free_guidance(network, noise, image):
    step = next(run(network, noise, negative_text=NEGATIVE, guidance=3.0))
    assert [call.text.item() for call in network.calls] == [1, 2]
    assert [call.rope for call in network.calls] == [ROPE, OTHER_ROPE]
    assert network.timesteps == [1, 1]
    assert all(call.guidance is None for call in network.calls)
    velocity = image + 3 * ((noise - image) - image)
    assert_close(step.tokens, noise - 0.25 * velocity)
    assert_close(step.estimate, noise - velocity)


def test_embedded_guidance(network, noise):
    list(run(network, noise, embedded_guidance=mx.array([2.5])))
    assert [call.guidance.item() for call in network.calls] == [2.5] * 3
