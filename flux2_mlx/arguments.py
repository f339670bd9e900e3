"""What callers of the pipeline write, as diffusers takes it, turned into what a run needs."""

import difflib
import functools
import hashlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import mlx.core as mx
import numpy as np
from PIL import Image

from .config import VAEConfig
from .device import check_process, failures
from .errors import InputError, SettingError
from .images import flattened, open_hashed
from .request import Request

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")
# Arguments of diffusers' pipelines for which there is something else to write.
_INSTEAD = {
    "image_reference": "give references after the image: image=[image, *references]",
    "images": "write image=[...]",
    "num_images": "write num_images_per_prompt=",
    "steps": "write num_inference_steps=",
    "guidance": "write guidance_scale=",
    "true_cfg_scale": "write guidance_scale=",
    "prompt_2": "FLUX.2 has one text encoder; write all of it in prompt",
    "negative_prompt_2": "FLUX.2 has one text encoder; write all of it in negative_prompt",
    "caption_upsample_temperature": "write pipe(pipe.upsample_prompt(prompt, temperature=...))",
    "timesteps": "write sigmas=[...], which are timesteps / 1000",
    "callback": "write callback_on_step_end=",
    "callback_steps": "callback_on_step_end is called after every step",
    "revision": "give the folder of that revision",
    "config": "leave it out; files tell which model they are of, or write variant='klein-4b'",
    "original_config": "leave it out; files tell which model they are of, or write variant='klein-4b'",
    "token": "set HF_TOKEN, or log in with `hf auth login`",
    "use_auth_token": "set HF_TOKEN, or log in with `hf auth login`",
    "cache_dir": "set HF_HOME; models_dir= is where converted models are kept",
    "local_files_only": "set HF_HUB_OFFLINE=1",
    "quantization_config": "write quant='qint8' or 'qint4'",
    "device_map": "leave it out; networks are loaded where they are computed",
    "use_safetensors": "leave it out; nothing else is read",
    "low_cpu_mem_usage": "leave it out; networks are loaded one after the other",
}


def named(method: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Turn arguments that `method` does not have into an InputError that says what to write."""
    signature = inspect.signature(method)

    @functools.wraps(method)
    def checked(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        for name in kwargs:
            if name not in signature.parameters:
                raise InputError(f"{method.__name__.strip('_')} has no argument {name!r}; {_advice(name, signature)}")
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            raise InputError(f"{method.__name__.strip('_')}: {error}; give the others by name") from error
        return method(*args, **kwargs)

    return checked


@contextmanager
def spelled(**names: str) -> Iterator[None]:
    """Have errors name settings as the caller does: `names` are these by those that they have here."""
    try:
        yield
    except SettingError as error:
        name, _, reason = str(error).partition(" ")
        raise SettingError(f"{names.get(name, name)} {reason}") from error


def _advice(name: str, signature: inspect.Signature) -> str:
    if name in _INSTEAD:
        return _INSTEAD[name]
    names = [own for own in signature.parameters if own not in ("self", "cls")]
    near = difflib.get_close_matches(name, names, 1)
    return f"did you mean {near[0]}?" if near else f"choose from {', '.join(names)}"


def in_order(prompt: Any, image: Any) -> tuple[Any, Any]:
    """Prompt and image; diffusers' own pipelines for FLUX.2 take the image first."""
    return (image, prompt) if _is_picture(prompt) and not _is_picture(image) else (prompt, image)


def texts(name: str, given: Any) -> list[str]:
    """One or several texts as a list."""
    if isinstance(given, str):
        return [given]
    if not isinstance(given, list | tuple) or not all(isinstance(text, str) for text in given):
        raise InputError(f"{name} must be text or a list of texts, got {_kind(given)}")
    return list(given)


def kinds(**given: tuple[Any, type]) -> None:
    """Raise InputError if a value that is not None is not of its type."""
    for name, (value, kind) in given.items():
        if value is not None and not isinstance(value, kind):
            wanted = {str: "text", bool: "True or False"}.get(kind, kind.__name__)
            raise InputError(f"{name} must be {wanted}, got {_kind(value)}")


def checked_number(name: str, value: Any, least: float, most: float) -> float:
    """A number of any type from `least` to `most`."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise InputError(f"{name} must be a number, got {_kind(value)}") from error
    if not least <= number <= most:
        raise InputError(f"{name} must be {least} to {most}, got {number:g}")
    return number


def _is_picture(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(_is_picture(item) for item in value)
    if isinstance(value, str):
        return os.path.isfile(value)  # no prompt is the name of a file
    return isinstance(value, Image.Image | Path | np.ndarray | mx.array) or _is_torch(value)


def _is_torch(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] == "torch"


def _kind(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"a list of {', '.join(sorted({type(item).__name__ for item in value})) or 'nothing'}"
    return f"{type(value).__name__} {value!r:.40}"


def pictures(name: str, given: Any, ground: str = "white") -> tuple[list[Image.Image], list[dict[str, str]]]:
    """Images of any kind as PIL images, and what their settings remember of each: a name and a hash.

    There may be one or a list of PIL images; paths of files; arrays of numpy or MLX `[H, W]`, `[H, W, C]` or
    `[B, H, W, C]`; tensors of PyTorch `[H, W]`, `[C, H, W]` or `[B, C, H, W]`, with 1, 3 or 4 channels. Whole numbers
    are 0 to 255, others 0 to 1. `ground` is the colour that transparency of a file is laid on.
    """
    images: list[Image.Image] = []
    origins: list[dict[str, str]] = []
    for item in given if isinstance(given, list | tuple) else [] if given is None else [given]:
        if isinstance(item, str | os.PathLike):
            image, digest = _opened(name, os.fspath(item), ground)
            images.append(image)
            origins.append({"path": os.path.basename(item), "sha256": digest})
            continue
        for image in [item] if isinstance(item, Image.Image) else _from_numbers(name, item):
            images.append(image)
            origins.append({"path": f"{name} {len(images)}", "sha256": _pixels_hash(image)})
    return images, origins


def _opened(name: str, path: str, ground: str) -> tuple[Image.Image, str]:
    if path.startswith(("http://", "https://")):
        raise InputError(f"{name} is an address; download {path:.80} and give the file")
    return open_hashed(Path(path), ground)


def _pixels_hash(image: Image.Image) -> str:
    image = flattened(image)
    return hashlib.sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).hexdigest()


def _from_numbers(name: str, given: Any) -> list[Image.Image]:
    if _is_torch(given) and hasattr(given, "detach"):
        tensor = given.detach().cpu()
        values = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
        shapes, axes = "[H, W], [C, H, W] or [B, C, H, W]", (0, 2, 3, 1)
    elif isinstance(given, np.ndarray | mx.array):
        if isinstance(given, mx.array) and mx.issubdtype(given.dtype, mx.floating):
            given = given.astype(mx.float32)
        values = np.array(given)
        shapes, axes = "[H, W], [H, W, C] or [B, H, W, C]", (0, 1, 2, 3)
    else:
        raise InputError(f"{name} must be a PIL image, a path, an array, or a list of those, got {_kind(given)}")
    shape = values.shape
    if values.ndim == 2:
        values = values[None, ..., None]
    else:
        values = (values[None] if values.ndim == 3 else values).transpose(axes) if values.ndim in (3, 4) else values
    if values.ndim != 4 or values.shape[-1] not in (1, 3, 4) or 0 in values.shape:
        raise InputError(f"{name} of shape {shape} must be {shapes} with 1, 3 or 4 channels C")
    return [Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image) for image in _bytes(name, values)]


def _bytes(name: str, values: np.ndarray) -> np.ndarray:
    """Numbers of any type as bytes."""
    if values.dtype == np.uint8:
        return values
    if values.dtype == bool:
        return values.astype(np.uint8) * 255
    if values.dtype.kind not in "iuf":
        raise InputError(f"{name} must hold numbers, got {values.dtype}")
    most = 1 if values.dtype.kind == "f" else 255
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= most):  # NaN is in no range
        raise InputError(
            f"{name} has numbers from {low:g} to {high:g}, not 0 to 1 (floats) or 0 to 255 (whole numbers)"
        )
    return np.round(values * (255 / most)).astype(np.uint8)


def seeds(seed: Any, generator: Any, prompts: int, images_per_prompt: Any) -> Any:
    """The seed or seeds of so many images, given as such or as generators of PyTorch.

    A generator says its seed as long as nothing was drawn from it. A run draws from it what diffusers does, so that
    one that is used again is told from a new one.
    """
    if generator is None:
        return seed
    if seed is not None:
        raise InputError("give either seed or generator")
    generators = list(generator) if isinstance(generator, list | tuple) else [generator]
    for one in generators:
        if not (_is_torch(one) and hasattr(one, "initial_seed")):
            raise InputError(f"generator must be a torch.Generator, got {_kind(one)}; write seed=42 without PyTorch")
        if one.device.type != "cpu":
            raise InputError(f"a generator on {one.device} draws other numbers; write seed={one.initial_seed()}")
        fresh = type(one)("cpu").manual_seed(one.initial_seed())
        if not fresh.get_state().equal(one.get_state()):
            raise InputError(
                "the generator has been drawn from before, which no seed can say; give each run a new one, "
                f"torch.Generator().manual_seed(...), or write seed={one.initial_seed()}"
            )
    count = prompts * images_per_prompt if isinstance(images_per_prompt, int) else len(generators)
    if len(generators) != count:
        raise InputError(f"{len(generators)} generators don't go with {count} images; give one each, or write seed=...")
    if len({id(one) for one in generators}) < count:
        raise InputError("one generator can't be that of several images; give each its own, or write seed=...")
    return [one.initial_seed() for one in generators]


def draw(generator: Any, request: Request, vae: VAEConfig) -> None:
    """Draw an image's noise from each of PyTorch's generators."""
    shape = (vae.token_channels, request.height // vae.token_size, request.width // vae.token_size)
    for one in generator if isinstance(generator, list | tuple) else [] if generator is None else [generator]:
        sys.modules["torch"].randn(shape, generator=one)


def dtype_name(dtype: Any, torch_dtype: Any) -> str | None:
    """The name of what to compute in, given as a name or as a dtype of MLX or PyTorch."""
    if dtype is not None and torch_dtype is not None:
        raise InputError("give either dtype or torch_dtype, which are the same")
    given = torch_dtype if dtype is None else dtype
    if given is None or isinstance(given, str):
        return given
    if isinstance(given, mx.Dtype) or _is_torch(given):
        return str(given).rpartition(".")[2]
    raise InputError(f"dtype must be float32, bfloat16 or float16, got {_kind(given)}")


def array(name: str, values: Any) -> mx.array:
    """An array of real numbers that the caller has given, evaluated; one of MLX is not copied."""
    if _is_torch(values) and hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.float().numpy() if values.is_floating_point() else values.numpy()
    check_process()
    if isinstance(values, str | bytes | dict | None):
        raise InputError(f"{name} must be an array, got {_kind(values)}")
    try:
        given = values if isinstance(values, mx.array) else mx.array(values)
        with failures():
            mx.eval(given)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"{name} can't be used ({reason}); give an array, evaluated if another thread has made it"
        ) from error
    if given.dtype == mx.complex64:
        raise InputError(f"{name} must be real numbers, got {given.dtype}")
    return given


def embeds(name: str, given: Any, features: int) -> mx.array:
    """Encoded prompts that the caller has given."""
    states = array(name, given)
    if states.ndim != 3 or states.shape[-1] != features:
        raise InputError(f"{name} must be [prompts, tokens, {features}], got {states.shape}")
    if states.shape[1] == 0 or not mx.isfinite(states).all().item():
        raise InputError(f"{name} {states.shape} must be finite numbers, for one token at least")
    return states


def for_each(prompts: Sequence[str], negatives: mx.array) -> mx.array:
    """Encoded negative prompts, one row for each of `prompts`."""
    if len(negatives) not in (1, len(prompts)):
        raise InputError(
            f"negative_prompt_embeds have {len(negatives)} rows, not 1 or {len(prompts)}, one for each prompt"
        )
    return mx.broadcast_to(negatives, (len(prompts), *negatives.shape[1:]))


def text_sizes(request: Request, embeds: mx.array | None, negatives: mx.array | None) -> tuple[int, int, int]:
    """How many prompts and negative prompts there are, and the tokens of the longest, if some are given encoded."""
    longest = request.max_sequence_length
    count, length = _text_size(request.prompts, embeds, longest)
    negative_count, negative_length = _text_size(request.negative_prompts or [""], negatives, longest)
    return count, negative_count, max(length, negative_length if request.negative_prompts else 0)


def _text_size(texts: Sequence[str], embeds: mx.array | None, longest: int) -> tuple[int, int]:
    """How many different texts there are, and the tokens of each. `embeds` are the texts if they are encoded."""
    return (len(set(texts)), longest) if embeds is None else (embeds.shape[0], embeds.shape[1])


def latents(given: Any, shape: tuple[int | None, ...], name: str = "latents") -> mx.array:
    """Latents that the caller has given, of a shape in which None is any number."""
    values = array(name, given)
    fits = len(shape) == values.ndim and all(want in (None, got) for want, got in zip(shape, values.shape, strict=True))
    if not fits or 0 in values.shape:
        wanted = f"({', '.join('any' if want is None else str(want) for want in shape)})"
        raise InputError(f"{name} have shape {values.shape}, this run needs {wanted}")
    if not mx.isfinite(values).all().item():
        raise InputError(f"{name} have values that are not finite numbers")
    return values


def adapter_scale(attention: Any) -> Any:
    """The scale of adapters that `attention_kwargs` of diffusers hold; InputError if there is anything else in them."""
    if not isinstance(attention, dict | None) or not {*(attention or ())} <= {"scale"}:
        raise InputError(f"attention_kwargs hold {attention!r:.60}; of these there is only {{'scale': number}} here")
    return (attention or {}).get("scale", 1.0)


def check_diffusers(tensor_inputs: Any, layers: Any, own_layers: Sequence[int]) -> None:
    """Raise InputError if arguments that only diffusers has ask for anything that is not done here."""
    if tensor_inputs is not None and not (isinstance(tensor_inputs, list | tuple) and [*tensor_inputs] == ["latents"]):
        raise InputError(f"callbacks get latents only; write ['latents'], not {tensor_inputs!r:.60}")
    if layers is not None and not (isinstance(layers, list | tuple) and tuple(layers) == tuple(own_layers)):
        raise InputError(f"text_encoder_out_layers are {tuple(own_layers)} for this model; leave them out")
