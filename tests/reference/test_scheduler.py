"""The schedule against published numbers and diffusers' scheduler."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

from flux2_mlx.scheduler import empirical_mu, euler_step, noise_levels

TURBO = [1.0, 0.6509, 0.4374, 0.2932, 0.1893, 0.1108, 0.0495, 0.00031]


def reference(image_tokens: int, steps: int, sigmas=None) -> FlowMatchEulerDiscreteScheduler:
    """diffusers' scheduler as the released `scheduler_config.json` and the pipelines set it."""
    scheduler = FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000,
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )
    grid = np.linspace(1.0, 1 / steps, steps) if sigmas is None else sigmas
    scheduler.set_timesteps(sigmas=grid, mu=compute_empirical_mu(image_tokens, steps))
    return scheduler


@pytest.mark.parametrize(
    ("image_tokens", "steps", "mu"),
    [
        (1024, 28, 1.8591765771805644),
        (4096, 20, 2.1980220725551165),
        (4096, 4, 2.291179894),
        (1024, 4, 2.030689708),
        (4096, 50, 2.023351157),
        (4080, 50, 2.021677225),
        (4300, 10, 2.27407142532),
        (4300, 200, 1.18452766),
        (4301, 7, 1.18469693),
        (9216, 50, 2.01665898),
        (16384, 4, 3.22998634),
    ],
)
def test_mu_golden(image_tokens, steps, mu):
    assert empirical_mu(image_tokens, steps) == pytest.approx(mu, abs=1e-9)


@pytest.mark.parametrize(
    ("image_tokens", "steps", "sigmas"),
    [
        (4096, 4, [1, 0.967384, 0.908144, 0.767200, 0]),
        (1024, 4, [1, 0.958085, 0.883982, 0.717497, 0]),
        (4096, 8, [1, 0.985425, 0.966641, 0.941515, 0.906183, 0.852842, 0.763014, 0.579807, 0]),
    ],
)
def test_noise_levels_golden(image_tokens, steps, sigmas):
    np.testing.assert_allclose(noise_levels(steps, image_tokens), sigmas, atol=1e-6)


def test_noise_levels_golden_ends_of_50_steps():
    sigmas = noise_levels(50, 4080)
    np.testing.assert_allclose(sigmas[:4], [1, 0.997305, 0.994512, 0.991618], atol=1e-6)
    np.testing.assert_allclose(sigmas[-4:], [0.325226, 0.239326, 0.133525, 0], atol=1e-6)


@pytest.mark.parametrize("image_tokens", [1, 64, 1024, 4096, 4300, 4301, 16384])
@pytest.mark.parametrize("steps", [1, 2, 4, 8, 28, 50])
def test_noise_levels_match_diffusers(image_tokens, steps):
    sigmas = noise_levels(steps, image_tokens)
    assert (sigmas.dtype, sigmas.shape) == (np.float32, (steps + 1,))
    assert (sigmas[0], sigmas[-1]) == (1, 0)
    np.testing.assert_allclose(sigmas, reference(image_tokens, steps).sigmas, atol=2e-7)


@pytest.mark.parametrize("image_tokens", [1024, 4096, 9216])
def test_custom_sigmas_match_diffusers(image_tokens):
    expected = reference(image_tokens, len(TURBO), TURBO).sigmas
    np.testing.assert_allclose(noise_levels(len(TURBO), image_tokens, TURBO), expected, atol=2e-7)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_euler_steps_match_diffusers(dtype):
    scheduler = reference(1024, 4)
    sigmas = noise_levels(4, 1024)
    generator = torch.Generator().manual_seed(0)
    theirs = torch.randn(2, 6, 16, generator=generator)
    ours = mx.array(theirs.numpy())
    for i, timestep in enumerate(scheduler.timesteps):
        assert float(timestep) / 1000 == pytest.approx(float(sigmas[i]), abs=1e-6)
        velocity = torch.randn(2, 6, 16, generator=generator).to(getattr(torch, dtype)).float()
        theirs = scheduler.step(velocity, timestep, theirs).prev_sample
        ours = euler_step(ours, mx.array(velocity.numpy()).astype(getattr(mx, dtype)), sigmas[i], sigmas[i + 1])
        assert ours.dtype == mx.float32
        np.testing.assert_allclose(np.array(ours), theirs, atol=2e-6)
