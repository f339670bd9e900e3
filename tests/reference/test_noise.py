"""Seeded noise against PyTorch's CPU generator."""

import numpy as np
import pytest
import torch

from flux2_mlx.noise import initial_noise, torch_randn

# fmt: off
GOLDEN = {
    0: [-1.12584, -1.15236, -0.250579, -0.433879, 0.84871, 0.692009, -0.316013, -2.115219,
        0.322275, -1.263335, 0.349983, 0.308134, 0.119842, 1.237658, 1.116777, -0.247278],
    42: [1.926915, 1.487284, 0.900717, -2.105521, 0.678418, -1.234545, -0.043067, -1.604667,
         -0.752135, 1.648723, -0.392479, -1.403607, -0.727881, -0.55943, -0.768839, 0.762445,
         1.642317, -0.159597, -0.497398, 0.439589, -0.758131, 1.078318, 0.800801, 1.680621,
         1.279124, 1.296423, 0.610466, 1.334738, -0.231624, 0.041759, -0.251575, 0.859859],
    2**32 - 1: [-2.664298, -1.091049, 0.451447, 0.228361, 1.898618, 1.564209, -1.2554, 0.793644,
                -1.751495, -0.709675, 1.218266, 0.222246, -2.515884, 0.483752, 0.841787, 0.14091],
}
# fmt: on


def reference(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)).numpy()


@pytest.mark.parametrize("seed", GOLDEN)
def test_golden(seed):
    values = torch_randn(seed, (len(GOLDEN[seed]),))
    assert values.dtype == np.float32
    np.testing.assert_allclose(values, GOLDEN[seed], atol=1e-6)


@pytest.mark.parametrize("seed", [0, 1, 42, 123456789, 2**31, 2**32 - 1, 2**32, 2**32 + 7, 2**63, 2**64 - 1])
@pytest.mark.parametrize("shape", [(16,), (48,), (1, 32, 4, 6), (2, 128, 8, 8), (1, 128, 64, 64)], ids=str)
def test_matches_torch(seed, shape):
    ours, expected = torch_randn(seed, shape), reference(seed, shape)
    assert ours.shape == shape
    np.testing.assert_allclose(ours, expected, atol=2e-6)
    # The largest values are few and differ most: as a whole the noise is that of PyTorch to the last places.
    assert np.linalg.norm(ours - expected) / np.linalg.norm(expected) < 2e-7


def test_matches_torch_in_bfloat16():
    ours = torch.from_numpy(torch_randn(7, (1, 128, 16, 16))).bfloat16()
    generator = torch.Generator("cpu").manual_seed(7)
    expected = torch.randn((1, 128, 16, 16), generator=generator).bfloat16()
    assert (ours != expected).float().mean() < 1e-3  # those that lie between two bfloat16 numbers


@pytest.mark.parametrize("seed", [0, 42, 2**32 - 1])
def test_a_row_of_a_batch_is_the_single_run_with_its_seed(seed):
    shape = (128, 4, 6)
    batch = initial_noise([seed, seed + 1, seed + 2], *shape)
    assert (batch.dtype, batch.shape) == (np.float32, (3, *shape))
    for k in range(3):
        np.testing.assert_array_equal(batch[k], initial_noise([seed + k], *shape)[0])
        np.testing.assert_allclose(batch[k], reference(seed + k, (1, *shape))[0], atol=2e-6)
    assert np.abs(batch[0] - batch[1]).mean() > 0.5


def test_the_global_generator_is_left_alone():
    np.random.seed(3)
    expected = np.random.random()
    np.random.seed(3)
    torch_randn(0, (16,))
    assert np.random.random() == expected


@pytest.mark.parametrize("shape", [(8,), (17,), (3, 5)])
def test_incomplete_blocks_are_refused(shape):
    with pytest.raises(ValueError, match=r"multiple of 16 values, got shape \("):
        torch_randn(0, shape)
