"""Weights in NVFP4 as ComfyUI and the releaser store them: 4 bits each, and scales of 16 inputs and of the whole."""

from collections.abc import Mapping

import mlx.core as mx
import numpy as np

from flux2_mlx.errors import CheckpointError
from flux2_mlx.weights import TensorInfo

from .checks import not_all_zero, of_weights
from .comfy import AGAIN, WEIGHT, Declared, declarations, packed_layer, swizzled_shape, told, unswizzled
from .fp8 import check_scales, eight_bits
from .packed import Packed
from .tables import pairs

_FORMAT = "nvfp4"
_SCALE = ".weight_scale"
_SCALE_2 = ".weight_scale_2"
_SMOOTHING = ".pre_quant_scale"
_GROUP = 16
_NUMBERS = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
_LARGEST = 448.0 * 6  # what a scale of the whole is multiplied with


def packed(infos: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> dict[str, Packed]:
    """The weights in NVFP4 among tensors, by their names, as float32.

    The scales of groups are in cuBLAS's blocks and an even input in the upper half of its byte. Tools that store them
    in rows and the other way round make tensors of the same shapes, so a file has to say that it is ComfyUI's.

    Args:
        infos: all tensors of the files, by their names there, in any naming.
        metadata: the texts of the files' headers.

    Raises:
        CheckpointError: a scale is missing, without weight or of another shape or dtype than it can be, or a file
            does not say in which layout they are.
    """
    declared = declarations(infos, metadata)
    return {layer + WEIGHT: _layer(layer, declared, infos) for layer in _layers(declared, infos)}


def _layers(declared: Mapping[str, Declared | None], infos: Mapping[str, TensorInfo]) -> list[str]:
    """The layers in NVFP4, as told by the file's metadata, a second scale, or scales beside a weight of bytes."""
    layers = [layer for layer, said in declared.items() if said is not None and said.format == _FORMAT]
    for name, info in infos.items():
        if name.endswith(_SCALE_2):
            layers.append(name.removesuffix(_SCALE_2))
        elif name.endswith(WEIGHT) and info.dtype == "U8":
            layer = name.removesuffix(WEIGHT)
            if layer in declared or layer + _SCALE in infos:
                layers.append(layer)
    return list(dict.fromkeys(layers))


def _layer(layer: str, declared: Mapping[str, Declared | None], infos: Mapping[str, TensorInfo]) -> Packed:
    weight, scale, scale_2 = (layer + end for end in (WEIGHT, _SCALE, _SCALE_2))
    for name in (weight, scale, scale_2):
        if name not in infos:
            raise CheckpointError(f"there is no {name}, which a layer in NVFP4 needs; fetch or make the file again")
    if layer not in declared:
        raise CheckpointError(
            f"{weight} looks like NVFP4, and its file does not say so, as those of ComfyUI and of the releaser do; "
            f"other tools store the same otherwise; {AGAIN}"
        )
    if layer + _SMOOTHING in infos:
        raise CheckpointError(f"{layer}{_SMOOTHING} can't be read: inputs scaled before a layer; get another file")
    rows, columns = _check_shapes(infos, weight, scale, scale_2)

    def unpack(codes: mx.array, scales: mx.array, whole: mx.array) -> mx.array:
        whole = whole.astype(mx.float32).reshape(())
        check_scales(scale_2, whole, _LARGEST)
        groups = eight_bits(scale, "F8_E4M3", unswizzled(scales, rows, columns // _GROUP))
        check_scales(scale, groups, 1, zero=True)
        groups = not_all_zero(groups * whole, scale, codes)
        # Of each byte the upper half comes first.
        found = pairs(np.asarray(codes).reshape(-1), np.repeat(_NUMBERS, 16), np.tile(_NUMBERS, 16))
        found = (found.reshape(rows, -1, _GROUP) * groups[..., None]).reshape(rows, columns)
        return of_weights(found, scale_2, float(_NUMBERS.max()) * float(np.asarray(groups).max()))

    shape = (rows, columns)
    return packed_layer(layer, _FORMAT, declared[layer], infos, (scale, scale_2), shape, unpack)


def _check_shapes(infos: Mapping[str, TensorInfo], weight: str, scale: str, scale_2: str) -> tuple[int, int]:
    """Rows and columns of a weight; CheckpointError if a tensor of its layer has not its shape or dtype."""
    stored = infos[weight]
    groups = infos[scale]
    whole = infos[scale_2]
    if stored.dtype != "U8" or len(stored.shape) != 2 or 0 in stored.shape or stored.shape[1] % (_GROUP // 2):
        raise CheckpointError(f"{weight} is {told(stored)}, which is no weight in NVFP4; {AGAIN}")
    rows, columns = stored.shape[0], 2 * stored.shape[1]
    wanted = swizzled_shape(rows, columns // _GROUP)
    if groups.dtype not in ("F8_E4M3", "U8") or groups.shape != wanted:
        raise CheckpointError(
            f"{scale} is {told(groups)}; for {told(stored)} it is F8_E4M3 {list(wanted)}, in blocks; {AGAIN}"
        )
    if whole.dtype != "F32" or whole.shape not in ((), (1,)):
        raise CheckpointError(f"{scale_2} is {told(whole)} in place of one number in F32; {AGAIN}")
    return rows, columns
