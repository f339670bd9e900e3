"""How long a run computes: what it has to do, by the rates that chips are known for or that were measured."""

import math
import platform
from dataclasses import dataclass, replace

import mlx.core as mx

from .chips import Chip, find_chip
from .config import TransformerConfig
from .device import chip as chip_name
from .device import dtype_name, on_metal
from .memory import Workload
from .networks import Networks
from .request import Request
from .text import TextCost
from .transformer import pass_operations
from .vae import VAECost

# Fitted to published runs of other programs; `python scripts/published_speeds.py` shows all of these beside what is
# expected, and which were fitted to. The share of a chip's peak that the products of a step reach: klein-9b of mflux in
# float16 on an M1 Max.
_REACHED = 0.7
# How many times as long a step takes in bfloat16 where the GPU has none: the same run in bfloat16.
_WITHOUT_BFLOAT16 = 1.1
# And with packed weights: klein-4b and klein-9b of a port to Swift on an M3 Max. Of qint6 and mixed4 nobody has told;
# they are taken for the slowest. Those programs unpack weights for every few rows. That ours unpacks them once a block
# for an image's many (`device.rows_to_unpack`), which should make this 1.02 at most on M1 to M4, nobody has timed yet
# on a Mac; and with 1.02 what is too short for mflux's qint4 now, by 23 % at most, would be by 32.
_PACKED = {"bf16": 1.0, "qint8": 1.09, "qint6": 1.18, "mixed4": 1.18, "qint4": 1.18}
# Not fitted, as nobody has told of the chip and the way: that direct convolutions reach half as much as products.
_CONVOLVED = 0.35
# Arrays as wide as the stream, in 16 bits, that pass through other kernels of a block, as `tests/helpers/fake_gpu.py`
# counts them; and the share of a memory's bandwidth that was measured on an M5.
_WIDTHS, _BANDWIDTH = 24, 0.8
_UNITS_FROM = (26, 2)  # the macOS with which MLX uses the matrix units of M5


@dataclass(frozen=True)
class Rates:
    """Operations a second of products, attention and convolutions, and bytes a second that pass through what is none of
    these, where that is not counted among the products."""

    products: float
    attention: float
    convolutions: float = math.inf
    traffic: float = math.inf

    def step_seconds(self, config: TransformerConfig, tokens: int, seen: int = 0) -> float:
        """Seconds of one pass with so many tokens that attend to `seen` further ones besides."""
        products, attention = pass_operations(config, tokens, seen)
        nbytes = 2 * tokens * config.hidden_size * _WIDTHS * (config.num_layers + config.num_single_layers)
        return products / self.products + attention / self.attention + nbytes / self.traffic


@dataclass(frozen=True)
class Duration:
    """Seconds that a run is expected to compute, what it loads and reads from disk not included.

    Attributes:
        chip: the name of what computes.
        dtype: what the transformer computes in.
        step: of one denoising step of one image.
        phases: of each phase by its name.
    """

    chip: str
    dtype: str
    step: float
    phases: dict[str, float]

    @property
    def seconds(self) -> float:
        return sum(self.phases.values())


def own_chip() -> Chip | None:
    """The chip of this Mac, without matrix units where its macOS has no use of them; None: it is not in the table."""
    found = find_chip(chip_name()) if on_metal() else None
    if found is None or not found.has_matrix_units:
        return found
    version = tuple(int(part) for part in platform.mac_ver()[0].split(".")[:2])
    return replace(found, has_matrix_units=version >= _UNITS_FROM)


def rates_of(chip: Chip, dtype: mx.Dtype, quant: str = "bf16") -> Rates:
    """What a chip is expected to do with weights of a quantization in activations of a dtype. One that is not known is
    taken for `qint4`."""
    slower = _PACKED.get(quant, _PACKED["qint4"])
    if dtype == mx.bfloat16 and not chip.has_bfloat16:
        slower *= _WITHOUT_BFLOAT16
    tflops = chip.tflops if dtype == mx.float32 else chip.matrix_tflops
    products = 1e12 * _REACHED * tflops
    return Rates(products / slower, products, 1e12 * _CONVOLVED * chip.tflops, _BANDWIDTH * chip.bandwidth)


def duration(networks: Networks, request: Request, work: Workload, chip: Chip) -> Duration:
    """How long a run of `request` which makes `work` is expected to compute on a `chip`."""
    variant, dtype = networks.checkpoint.fitted_variant, networks.dtype
    rates = rates_of(chip, dtype, networks.quant)
    reading = rates_of(chip, networks.dtype_of("text_encoder"), networks.text_quant)
    vae = VAECost(variant.vae, networks.dtype_of("vae"))
    image, references = (count(variant.vae.token_size) for count in (work.image_tokens, work.reference_tokens))
    apart = references if variant.kv_cache else 0
    tokens = work.length + image + references - apart
    guided = bool(request.negative_prompts)
    step = (1 + guided) * rates.step_seconds(variant.transformer, tokens, apart)
    before = rates.step_seconds(variant.transformer, apart) if apart else 0.0
    texts = work.prompts + guided * work.negatives
    phases = {
        "text_encoder": texts * TextCost(variant.text, dtype).operations(work.length) / reading.products,
        "vae_encoder": sum(vae.encoding_operations(h, w) for w, h in work.references) / rates.convolutions,
        "transformer": before + work.images * request.steps * step,
        "vae": work.images * vae.decoding_operations(work.height, work.width) / rates.convolutions,
    }
    return Duration(chip.name, dtype_name(dtype), step, {name: seconds for name, seconds in phases.items() if seconds})
