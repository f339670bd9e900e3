"""Whether a run fits into memory, and what would fit in its place, in the words of settings."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product

from .config import QUANTIZATIONS
from .errors import InputError
from .kept import held
from .memory import Plan, Workload, Writing
from .networks import Networks
from .references import MIN_SIDE, Edit
from .request import Request
from .wording import told

_SMALLER_TEXT = "choose a smaller model, one converted with text_quant='qint4', or a higher limit"


def workload(
    request: Request,
    edit: Edit = Edit(),  # noqa: B008 (it is frozen)
    *,
    previews: bool = False,
    previewing: int = 0,
    texts: tuple[int, int, int] | None = None,
) -> Workload:
    """What a run of `request` with the pictures of `edit` makes.

    Args:
        request: the settings.
        edit: the pictures.
        previews: whether the VAE makes images between the steps.
        previewing: bytes that something else takes for one there.
        texts: how many prompts and negative prompts there are, and of how many tokens, if they are not the request's.
    """
    own = len(set(request.prompts)), max(1, len(set(request.negative_prompts))), request.max_sequence_length
    prompts, negatives, length = texts or own
    return Workload(
        request.width,
        request.height,
        length,
        references=tuple(image.size for image in edit.references),
        prompts=prompts,
        images=len(request.seeds),
        previews=previews,
        negatives=negatives,
        on_canvas=edit.canvas is not None,
        caches=request.passes_a_step if request.step_cache else 0,
        previewing=previewing,
    )


def checked_plan(networks: Networks, work: Workload, limit: int) -> Plan:
    """The plan of a run within `limit` bytes; InputError that says what would fit if that does not."""
    planned = networks.needs(work).plan(limit)
    if not planned.fits:
        raise _refusal(planned, advice(networks, work, limit))
    return planned


def check_given_plan(planned: Plan, work: Workload, limit: int) -> None:
    """InputError if a plan is not one of a run that makes `work` within `limit` bytes."""
    if planned.limit > limit or not _covers(planned.work, work):
        raise InputError(
            "the plan is of another request, edit, previews or memory_limit than this run; plan this one, or leave "
            "planned out"
        )


def _covers(planned: Workload | Writing | None, work: Workload) -> bool:
    """Whether what makes `work` is `planned`, or is the same but for shorter or fewer texts."""
    if not isinstance(planned, Workload):
        return False
    fewer = work.length <= planned.length and work.prompts <= planned.prompts and work.negatives <= planned.negatives
    same = replace(work, length=planned.length, prompts=planned.prompts, negatives=planned.negatives)
    return fewer and same == planned


def checked_phase_plan(networks: Networks, work: Workload, name: str, limit: int) -> Plan:
    """What encoding the prompts or decoding an image holds in memory alone; InputError if that does not fit."""
    planned = networks.needs(work).plan(limit).only(name)
    if not planned.fits:
        raise _refusal(planned, "choose a smaller image or a higher limit" if name == "vae" else _SMALLER_TEXT)
    return planned


def checked_writing_plan(networks: Networks, writing: Writing, limit: int) -> Plan:
    """What writing text holds in memory; InputError if that does not fit."""
    planned = networks.writing_needs(writing).plan(limit)
    if not planned.fits:
        raise _refusal(planned, _SMALLER_TEXT)
    return planned


def check_possible(networks: Networks, limit: int) -> None:
    """InputError if not even the smallest image fits into `limit` bytes or, of a language model alone, a word."""
    if networks.paints:
        size = networks.checkpoint.fitted_variant.vae.token_size
        request = Request.checked(networks.checkpoint.fitted_variant, size, [""], width=size, height=size)
        checked_plan(networks, workload(request), limit)
    elif "language_model" in networks.checkpoint.components:
        checked_writing_plan(networks, Writing(1, 1), limit)


@dataclass(frozen=True)
class _Budget:
    """Networks and the bytes of memory that there are for a run of them."""

    networks: Networks
    limit: int

    def fits(self, work: Workload) -> bool:
        return self.networks.needs(work).plan(self.limit).fits

    @property
    def token_size(self) -> int:
        return self.networks.checkpoint.fitted_variant.vae.token_size

    def largest(self, work_of: Callable[[int], Workload], least: int, most: int, step: int = 1) -> int:
        """The largest of `step`, twice that and so on, from `least` to `most`, with which the run fits; 0: none."""
        low, high = least // step - 1, most // step
        if high * step < least or not self.fits(work_of(least)):
            return 0
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.fits(work_of(middle * step)) else (low, middle - 1)
        return low * step


def advice(networks: Networks, work: Workload, limit: int) -> str:
    """What would fit instead of a run that does not: the same with less beside it, smaller pictures, fewer bits."""
    budget = _Budget(networks, limit)
    if _is_convertible(networks) and _Budget(networks.stored_as(networks.quant, networks.text_quant), limit).fits(work):
        return f"convert the model with {_settings(networks.quant, networks.text_quant)}, which lets it be streamed"
    if (work.previews or work.previewing) and budget.fits(replace(work, previews=False, previewing=0)):
        return "without images between the steps it would fit"
    if work.caches and budget.fits(replace(work, caches=0)):
        return "without a step cache it would fit"
    if count := budget.largest(lambda count: _only(work, count), 1, work.images):
        return f"{count} at a time would fit"
    if pictures := _smaller_pictures(budget, work):
        return f"{pictures} would fit"
    if networks.adapters and _Budget(networks.with_adapters([]), limit).fits(work):
        return "without adapters it would fit"
    if bits := _fewer_bits(budget, work):
        return f"no size fits, but {bits} it would"
    return "no size fits; choose a smaller model or a higher limit"


def _only(work: Workload, images: int) -> Workload:
    """A part of a run that makes so many images."""
    return replace(work, images=images, prompts=min(images, work.prompts), negatives=min(images, work.negatives))


def _smaller_pictures(budget: _Budget, work: Workload) -> str | None:
    """The largest references, or else the largest image, or else the largest of both, with which the run fits."""
    if not work.on_canvas:
        if smaller := _smaller_references(budget, work):
            return smaller
        if smaller := _smaller_image(budget, work):
            return smaller
    return _smaller_all(budget, work) if work.references else None


def _smaller_references(budget: _Budget, work: Workload) -> str | None:
    count = len(work.references)
    most = max((max(size) for size in work.references), default=0)

    def smaller(side: int) -> Workload:
        return replace(work, references=((side, side),) * count)

    side = budget.largest(smaller, MIN_SIDE, most, budget.token_size)
    return f"{f'{count} references' if count > 1 else 'a reference'} of {side}×{side} pixels" if side else None


def _smaller_image(budget: _Budget, work: Workload) -> str | None:
    token_size = budget.token_size

    def smaller(side: int) -> Workload:
        return _with_image(work, side, token_size)

    side = budget.largest(smaller, token_size, max(work.width, work.height), token_size)
    return f"an image of {smaller(side).width}×{smaller(side).height}" if side else None


def _smaller_all(budget: _Budget, work: Workload) -> str | None:
    token_size = budget.token_size
    most = max(max(size) for size in work.references)
    # No reference may be narrower than the least that there may be.
    least = max(math.ceil(MIN_SIDE * max(size) / min(size)) for size in work.references)

    def smaller(side: int) -> Workload:
        references = tuple(_scaled_to(size, side, token_size) for size in work.references)
        return replace(_with_image(work, side, token_size), references=references)

    side = budget.largest(smaller, -(-least // token_size) * token_size, most, token_size)
    return f"pictures and an image of at most {side} pixels a side" if side else None


def _fewer_bits(budget: _Budget, work: Workload) -> str | None:
    """The settings of the mildest quantization with which the run fits."""
    networks = budget.networks
    left = [QUANTIZATIONS[QUANTIZATIONS.index(quant) :] for quant in (networks.quant, networks.text_quant)]
    converted = _is_convertible(networks)
    for quant, text_quant in sorted(product(*left), key=lambda pair: sorted(map(QUANTIZATIONS.index, pair))[::-1]):
        fewer = networks.stored_as(quant, text_quant) if converted else networks.quantized(quant, text_quant)
        if _Budget(fewer, budget.limit).fits(work):
            return f"{'converted ' if converted else ''}with {_settings(quant, text_quant)}"
    return None


def _is_convertible(networks: Networks) -> bool:
    """Whether the model can be stored in other bits: not the one that comes with the package, which is as it is."""
    return not networks.checkpoint.is_built_in


def _settings(quant: str, text_quant: str) -> str:
    return f"quant={quant!r}, text_quant={text_quant!r}"


def _with_image(work: Workload, side: int, token_size: int) -> Workload:
    width, height = _scaled_to((work.width, work.height), side, token_size)
    return replace(work, width=width, height=height)


def _scaled_to(size: tuple[int, int], side: int, token_size: int) -> tuple[int, int]:
    """A size of the same shape, of at most `side` pixels a side, in whole tokens."""
    scale = min(1, side / max(size))
    width, height = (max(token_size, int(x * scale) // token_size * token_size) for x in size)
    return width, height


def _refusal(planned: Plan, advice: str) -> InputError:
    name = told([planned.worst.name])
    needed, limit = (_shown(x, planned.peak_memory - planned.limit) for x in (planned.peak_memory, planned.limit))
    if held():
        return InputError(f"the {name} needs {needed}, and the run that is going on leaves {limit}; {advice}")
    return InputError(f"the {name} needs {needed}, the limit is {limit}; {advice}")


def _shown(nbytes: int, difference: int) -> str:
    """In GiB, or MiB below 0.1 GiB, with as many digits as a difference from another number of bytes needs."""
    value, unit = (nbytes / 2**30, "GiB") if nbytes > 2**30 / 10 else (nbytes / 2**20, "MiB")
    return f"{value:.3g} {unit}" if difference > 0.01 * nbytes else f"{value:.10g} {unit}"
