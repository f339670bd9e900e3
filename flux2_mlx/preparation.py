"""Models that are not here yet: what they will be is planned and checked, and then they are fetched and converted."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Self

from .advice import advice, check_possible, workload
from .base_pipeline import BasePipeline
from .checkpoint import Checkpoint
from .chips import Chip
from .config import Variant
from .decoders import Decoder
from .device import dtype_name, is_slow_with_qint4
from .durations import Duration, duration, own_chip
from .memory import Plan
from .networks import Networks
from .references import Edit
from .request import Request
from .store import Announce, Model, find_checkpoint
from .store import Progress as Acquiring


class PreparedPipeline(BasePipeline):
    """A pipeline whose model need not be here to say what a run of it would take."""

    @classmethod
    def outline(
        cls,
        model: Checkpoint | Variant,
        *,
        quant: str | None = None,
        text_quant: str | None = None,
        dtype: str | None = None,
        memory_limit: int | str | None = None,
        decoder: Decoder | None = None,
    ) -> Self:
        """The pipeline of what a `model` is or will be, which can check and plan runs; see `Networks.open`."""
        return cls(
            Networks.open(model, quant=quant, text_quant=text_quant, dtype=dtype, decoder=decoder),
            memory_limit=memory_limit,
        )

    @classmethod
    def prepare(
        cls,
        source: str | os.PathLike[str] | Model,
        *,
        variant: str | None = None,
        quant: str | None = None,
        text_quant: str | None = None,
        dtype: str | None = None,
        models_dir: str | os.PathLike[str] | None = None,
        memory_limit: int | str | None = None,
        keep_source: bool = True,
        check: Callable[[Self], object] | None = None,
        announce: Announce | None = None,
        progress: Acquiring | None = None,
        decoder: Decoder | None = None,
    ) -> Path:
        """The MLX checkpoint folder of a model, fetched and converted first if need be.

        Args:
            source, variant, quant, text_quant, dtype, models_dir, memory_limit, keep_source: as for `from_pretrained`.
            check: called with the `outline` of what is about to be fetched or converted, as soon as that is known; it
                may raise what speaks against it. None: the smallest image must fit into memory.
            announce, progress: see `find_checkpoint`.
            decoder: makes images in place of the model's own.

        Raises:
            InputError, CheckpointError, DownloadError: as for `from_pretrained`, and what `check` raises.
        """

        def look(checkpoint: Checkpoint) -> None:
            pipe = cls.outline(
                checkpoint,
                quant=quant,
                text_quant=text_quant,
                dtype=dtype,
                memory_limit=memory_limit,
                decoder=decoder,
            )
            check_possible(pipe.networks, pipe.memory_limit) if check is None else check(pipe)

        return find_checkpoint(
            source,
            variant=variant,
            quant=quant,
            text_quant=text_quant,
            models_dir=models_dir,
            keep_source=keep_source,
            check=look,
            announce=announce,
            progress=progress,
        )

    def expected(self, request: Request, edit: Edit = Edit()) -> tuple[Plan, str | None]:  # noqa: B008 (it is frozen)
        """The plan of a run, and what would fit in its place if that does not."""
        work = workload(request, edit)
        planned = self.networks.needs(work).plan(self._limit)
        return planned, None if planned.fits else advice(self.networks, work, self._limit)

    def duration(
        self,
        request: Request,
        edit: Edit = Edit(),  # noqa: B008 (it is frozen)
        *,
        chip: Chip | None = None,
    ) -> Duration | None:
        """How long a run is expected to compute on a `chip`, by default this Mac's; None: of that no speed is known."""
        computing = chip or own_chip()
        return None if computing is None else duration(self.networks, request, workload(request, edit), computing)

    def is_faster_in_bf16(self, request: Request, edit: Edit, text_quant: str | None = None) -> bool:
        """Whether a run takes longer with 4 bits here than it would with the 16 for which there is memory.

        Args:
            request: the settings.
            edit: the pictures.
            text_quant: how the text encoder would be stored then; None: as is usual.
        """
        if self.quant not in ("qint4", "mixed4") or not is_slow_with_qint4():
            return False
        own = self.networks
        plain = Networks.open(
            own.checkpoint.fitted_variant,
            text_quant=text_quant,
            dtype=dtype_name(own.dtype),
        )
        planned = plain.needs(workload(request, edit)).plan(self._limit)
        return planned.fits and not planned.phase("transformer").streamed
