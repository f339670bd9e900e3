"""The flow-matching schedule and the Euler step.

Source: `get_schedule` and `compute_empirical_mu` of the FLUX.2 reference code; diffusers'
`FlowMatchEulerDiscreteScheduler` with dynamic exponential shifting gives the same numbers.
"""

from collections.abc import Sequence
from itertools import pairwise

import mlx.core as mx
import numpy as np

from .errors import InputError

# The reference code's lines mu = a·tokens + b, for 10 and for 200 steps; from so many tokens on the second one is used
# at any number of steps.
_MU_10_STEPS = (8.73809524e-05, 1.89833333)
_MU_200_STEPS = (0.00016927, 0.45666666)
_LONG_SEQUENCE = 4300


def empirical_mu(image_tokens: int, steps: int) -> float:
    """Shift of the schedule for the number of target image tokens (references do not count)."""
    mu_10, mu_200 = (a * image_tokens + b for a, b in (_MU_10_STEPS, _MU_200_STEPS))
    if image_tokens > _LONG_SEQUENCE:
        return mu_200
    slope = (mu_200 - mu_10) / 190
    return slope * steps + mu_200 - 200 * slope


def noise_levels(
    steps: int, image_tokens: int, sigmas: Sequence[float] | None = None, shift_steps: int | None = None
) -> np.ndarray:
    """Noise levels σ from 1 down to the final 0: float32 `[steps + 1]`.

    `sigmas` replaces the even grid that is shifted, as in diffusers; `steps` must then be its length. `shift_steps` is
    the number of steps that the shift is computed for; None: `steps`.
    """
    grid = np.linspace(1, 1 / steps, steps) if sigmas is None else np.asarray(sigmas, dtype=np.float64)
    shifted = np.exp(empirical_mu(image_tokens, shift_steps or steps)) * grid
    return np.append(shifted / (shifted + 1 - grid), 0).astype(np.float32)


def check_sigmas(sigmas: Sequence[float]) -> None:
    """Raise InputError unless these, of which there are some, are noise levels that fall from step to step."""
    if not (sigmas[0] <= 1 and all(a > b for a, b in pairwise((*sigmas, 0.0)))):
        raise InputError(f"sigmas must fall from at most 1 to above 0, got {', '.join(map(str, sigmas)):.200}")


def euler_step(latents: mx.array, velocity: mx.array, sigma: float, next_sigma: float) -> mx.array:
    """x + (σ_next − σ)·v in float32, which `latents` stay in from step to step."""
    return latents + (next_sigma - sigma) * velocity.astype(mx.float32)
