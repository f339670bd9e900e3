"""What conversion does with arrays, whatever they are of."""

import mlx.core as mx
import pytest
from flux2_mlx.convert.rules import Finite

from flux2_mlx.errors import CheckpointError
from flux2_mlx.weights import TensorInfo

LARGEST = 3.38e38  # of bfloat16, nearly


class One:
    """A tensor."""

    def __init__(self, array: mx.array):
        self._array, self.infos = array, {"a": TensorInfo("BF16", array.shape)}

    def read(self, names):
        return (self._array for _ in names)


def checked(array: mx.array) -> mx.array:
    (found,) = Finite(One(array), "{} is not finite".format).read(["a"])
    return found


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
def test_numbers_have_to_be_finite(dtype):
    for value in ("nan", "inf"):
        for sign in (1, -1):
            array = mx.zeros((3, 5), dtype)
            array[1, 2] = sign * float(value)
            with pytest.raises(CheckpointError, match="a is not finite"):
                checked(array)
    most = LARGEST if dtype != mx.float16 else 65504
    for array in (mx.array([most, -most, 0.0, -0.0]), mx.zeros((0, 3)), mx.array(1.0), mx.ones((4, 6)).T):
        assert mx.array_equal(checked(array.astype(dtype)), array.astype(dtype))
