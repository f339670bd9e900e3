"""Decoders in place of the one of a model's own autoencoder, whose encoder and statistics stay."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path

import mlx.core as mx

from .checkpoint import Checkpoint, Component
from .config import VAEConfig
from .errors import InputError
from .files import file_sha256
from .vae import TinyVAEConfig
from .weights import TensorInfo, Tensors, part

_DECODES = ("decoder.", "post_quant_conv.")  # what the names of a decoder's tensors begin with


@dataclass(frozen=True)
class Decoder:
    """A decoder of FLUX.2's latents, unread.

    Attributes:
        name: what it is asked for as: a name of the store, or the name of its file.
        path: its file.
        config: the geometry of the autoencoder that it belongs to; of TAEF2 a `TinyVAEConfig`.
        tensors: its weights, by the names that they have in an autoencoder of ours.
        origin: the name, or the repo and file of the Hub, by which it is found again; None: it is a file here.
    """

    name: str
    path: Path
    config: VAEConfig
    tensors: Tensors
    origin: str | None = None

    @cached_property
    def settings(self) -> dict[str, str]:
        """What images remember of it: its origin, or else the name of its file, and the SHA-256 of that."""
        return {"name": self.origin or self.path.name, "sha256": file_sha256(self.path)}

    @property
    def is_tiny(self) -> bool:
        """Whether it is TAEF2."""
        return isinstance(self.config, TinyVAEConfig)

    @property
    def layers(self) -> Tensors:
        """Its weights by the names that they have within the decoder; of TAEF2 all that there are."""
        return part(self.tensors, "decoder.")

    def decoding(self, checkpoint: Checkpoint) -> Checkpoint:
        """A model that decodes with it, and encodes with what it has itself.

        Raises:
            InputError: it is a decoder of other latents than the model's.
        """
        own = checkpoint.components["vae"]
        values = {field.name: getattr(own, field.name) for field in fields(Component)}
        vae = Redecoded(**values | {"config": self.fitted(own.config, checkpoint.variant.name)}, decoder=self)
        return replace(checkpoint, components=checkpoint.components | {"vae": vae})

    def fitted(self, own: VAEConfig, model: str) -> VAEConfig:
        """The geometry of a model's own autoencoder with this decoder; InputError as `decoding` has it."""
        values = {field.name: getattr(own, field.name) for field in fields(VAEConfig)}
        if self.is_tiny:
            wanted: VAEConfig = TinyVAEConfig(**values)
            fits = _latents(own) == _latents(self.config)
        else:
            wanted = VAEConfig(**values | {"decoder_block_out_channels": self.config.decoder_channels})
            fits = wanted == replace(self.config, decoder_block_out_channels=self.config.decoder_channels)
        if not fits:
            raise InputError(
                f"decoder {self.name!r:.80} is for {_told(self.config)}, not for those of {model}, {_told(own)}; "
                "leave it out, or give another"
            )
        return wanted


def _latents(config: VAEConfig) -> tuple[int, int]:
    return config.latent_channels, config.scale_factor


def _told(config: VAEConfig) -> str:
    return f"latents of {config.latent_channels} channels for {config.scale_factor}×{config.scale_factor} pixels"


@dataclass(frozen=True)
class Redecoded(Component):
    """An autoencoder of which all but the decoder is a model's own."""

    decoder: Decoder | None = None

    @property
    def tensors(self) -> Tensors:
        own = super().tensors
        return own if self.decoder is None else _Joined(own, self.decoder.tensors)


class _Joined:
    """The tensors of an autoencoder, with those of another decoder in place of its own."""

    def __init__(self, own: Tensors, decoder: Tensors):
        self._own = own
        self._decoder = decoder

    @cached_property
    def infos(self) -> dict[str, TensorInfo]:
        kept = {name: info for name, info in self._own.infos.items() if not name.startswith(_DECODES)}
        return kept | dict(self._decoder.infos)

    def read(self, names: Iterable[str]) -> Iterator[mx.array]:
        for is_other, some in groupby(names, self._decoder.infos.__contains__):
            yield from (self._decoder if is_other else self._own).read(some)


def decodes(name: str) -> bool:
    """Whether the tensor of an autoencoder is its decoder's."""
    return name.startswith(_DECODES)
