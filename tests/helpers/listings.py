"""Names, shapes and dtypes of the tensors in the released files, as `keys/` lists them.

`{0-4}` in a listed name stands for the numbers 0 to 4.
"""

import re
from pathlib import Path

from flux2_mlx.weights import TensorInfo

KEYS = Path(__file__).parent.parent / "keys"


def listing(name: str) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for line in (KEYS / f"{name}.tsv").read_text().splitlines():
        key, shape, dtype = line.split("\t")
        tensor = TensorInfo(dtype, tuple(int(size) for size in shape.split("x")) if shape != "scalar" else ())
        numbers = re.search(r"\{(\d+)-(\d+)\}", key)
        for number in range(int(numbers[1]), int(numbers[2]) + 1) if numbers else [None]:
            full = key if numbers is None else key.replace(numbers[0], str(number))
            assert full not in tensors, f"{full} is listed twice"
            tensors[full] = tensor
    return tensors
