"""Methods that scripts for diffusers call: each does what is asked for, or says what to write instead."""

from typing import Any

import mlx.core as mx

from .arguments import named
from .components import PAINTING
from .errors import InputError
from .metering import turn
from .networks import Networks

_INSTEAD = {
    "fuse_lora": "adapters run beside the weights, which takes hardly longer; leave it out",
    "unfuse_lora": "adapters run beside the weights; write pipe.unload_lora_weights()",
    "save_pretrained": "write a converted model with `flux2-mlx convert`",
    **{name: f"networks are loaded for their phase of a run; write pipe.networks.load({name!r})" for name in PAINTING},
    "scheduler": "the schedule is fixed; write sigmas=[...] for other noise levels",
    "components": "write pipe.checkpoint.components",
    "device": "MLX computes on its default device; write mlx.core.default_device()",
    "config": "write pipe.checkpoint",
}


class MissingError(InputError, AttributeError):
    """An attribute of diffusers' pipelines that there is none of here, so that `hasattr` is False."""


class DiffusersMethods:
    """What changes little or nothing here, since networks are loaded for their phase of a run, on the device that there
    is; and the bar of steps."""

    networks: Networks
    keep: bool
    _bar: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        if name in _INSTEAD:
            raise MissingError(f"a pipeline has no {name!r}: {_INSTEAD[name]}")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def to(self, device: Any = None, dtype: Any = None) -> Any:
        """The pipeline itself: MLX computes on the Apple GPU where there is one, and else on the CPU.

        Raises:
            InputError: that is not the device asked for, or a dtype is.
        """
        kind = str(device).partition(":")[0]
        own = "mps" if mx.default_device() == mx.gpu else "cpu"
        if dtype is not None or "float" in kind:
            raise InputError("the dtype is chosen when a model is opened; write from_pretrained(..., dtype='bfloat16')")
        if device is not None and kind != own:
            raise InputError(f"MLX computes on {own!r} here, not on {kind!r:.40}; leave .to() out")
        return self

    @named
    def set_progress_bar_config(
        self,
        *,
        disable: bool | None = False,
        desc: str | None = None,
        leave: bool = True,
        position: int | None = None,
        ncols: int | None = None,
    ) -> None:
        """How the bar of a call's steps looks, as in tqdm. `disable` None: without a terminal there is none."""
        self._bar = {"disable": disable, "desc": desc, "leave": leave, "position": position, "ncols": ncols}

    def enable_model_cpu_offload(self, device: Any = None) -> None:
        """Have only the network of the current phase in memory, as with `keep=False`."""
        self.keep = False
        with turn():
            self.networks.release()

    def enable_sequential_cpu_offload(self, device: Any = None) -> None:
        """Have only the network of the current phase in memory; what of it does not fit into `memory_limit` is read
        from disk at every step anyway."""
        self.enable_model_cpu_offload(device)

    def enable_attention_slicing(self, slice_size: Any = "auto") -> None:
        """Nothing to do: attention is computed in parts where it has to be."""

    def disable_attention_slicing(self) -> None:
        """Nothing to do; see `enable_attention_slicing`."""

    def enable_vae_slicing(self) -> None:
        """Nothing to do: images are decoded one by one."""

    def enable_vae_tiling(self) -> None:
        """Nothing to do: images are decoded in strips of rows, with the pixels of the whole."""

    def enable_xformers_memory_efficient_attention(self, attention_op: Any = None) -> None:
        """Nothing to do: attention is never held in memory as a whole."""
