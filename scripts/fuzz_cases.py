"""The kinds of cases that `fuzz.py` runs: each damages one input at random, uses it, and says what came of it."""

import contextlib
import functools
import json
import os
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from flux2_mlx.convert import Source, write_checkpoint
from fuzz import Finding, is_one_line
from fuzz_damage import cut, damaged_header, damaged_json, mutated, scrambled
from PIL import ExifTags, Image, PngImagePlugin
from tiny_model import VARIANT, write_source

from flux2_mlx import CheckpointError, Flux2Pipeline
from flux2_mlx.checkpoint import FILES, MANIFEST, sealed
from flux2_mlx.embedding_cache import EmbeddingCache
from flux2_mlx.images import MAX_INPUT_PIXELS, open_image, read_settings
from flux2_mlx.verification import verify

RUN = {"width": 16, "height": 16, "num_inference_steps": 1, "seed": 1, "max_sequence_length": 16}
PROMPT = "a red circle"
WEIGHTS = [f"{name}/model.safetensors" for name in ("transformer", "text_encoder", "vae")]
FORMATS = {".png": {}, ".jpg": {}, ".webp": {}, ".tif": {}, ".bmp": {}, ".gif": {}}


class Bench:
    """A folder with a healthy model of each kind, pictures and entries, and what they give.

    `size` is what a case is given to read, in bytes: files, and of a picture the pixels that it says it has.
    """

    def __init__(self, folder: Path):
        os.environ["FLUX2_MLX_HOME"] = str(folder / "home")
        self.folder = folder
        self.source = write_source(folder / "source")
        self.models = [folder / "bf16", folder / "qint4"]
        for model in self.models:
            write_checkpoint(Source.open(self.source, VARIANT), model, model.name, model.name)
        self.right = {model: pixels(model) for model in self.models}
        self._touched: dict[Path, bytes] = {}
        self.size = 0
        self.kinds: dict[str, Callable[[random.Random], str]] = {
            "payload": self.payload,
            "header": self.header,
            "config": self.config,
            "tokenizer": self.tokenizer,
            "source": self.converted,
            "image": self.image,
            "replay": self.replay,
            "cache": self.cached,
            "hub": self.fetched,
        }
        for kind, run in self.kinds.items():  # or the first case of each would be charged with what is imported for it
            with contextlib.suppress(Exception):
                run(random.Random(kind))
            self.restore()

    def write(self, path: Path, data: bytes) -> None:
        """Write a damaged file until `restore`."""
        self._touched.setdefault(path, path.read_bytes())
        path.write_bytes(data)

    def restore(self) -> None:
        """Undo what a case has done to the folder."""
        for path, data in self._touched.items():
            path.write_bytes(data)
        self._touched.clear()
        shutil.rmtree(self.folder / "case", ignore_errors=True)
        for model in self.models:
            (model / "verified.json").unlink(missing_ok=True)

    def scratch(self) -> Path:
        """An empty folder until `restore`."""
        (self.folder / "case").mkdir()
        return self.folder / "case"

    def used(self, model: Path) -> str:
        """What a damaged checkpoint gives: the same pixels, or others of which a verification knows."""
        self.size += size_of(model)
        if pixels(model) == self.right[model]:
            return "identical"
        if not verify(model).problems:
            raise Finding("silent", f"other pixels of {model.name}")
        return "found"

    def payload(self, rng: random.Random) -> str:
        model = rng.choice(self.models)
        path = model / rng.choice(WEIGHTS)
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        for _ in range(rng.choice([1, 1, 1, 5])):
            place = rng.randrange(start, len(data))
            run = rng.choice([bytes([data[place] ^ (1 << rng.randrange(8))]), rng.randbytes(rng.choice([1, 2, 64]))])
            run = rng.choice([run, run, bytes(len(run)), b"\xff\x7f" * len(run), b"\x80\x7f"])[: len(data) - place]
            data = data[:place] + run + data[place + len(run) :]
        self.write(path, data)
        return self.used(model)

    def header(self, rng: random.Random) -> str:
        model = rng.choice(self.models)
        path = model / rng.choice(WEIGHTS)
        self.write(path, rng.choice([damaged_header] * 4 + [cut])(rng, path.read_bytes()))
        return self.used(model)

    def config(self, rng: random.Random) -> str:
        model = rng.choice(self.models)
        paths = sorted(path for path in model.rglob("*.json") if path.parent.name != "tokenizer")
        path = rng.choice(paths)
        self.write(path, damaged_json(rng, path.read_bytes()))
        if path.name == MANIFEST and rng.random() < 0.6 and resealed(path):
            pixels(model)  # which it may well change: it says that it is meant so
            return "resealed"
        return self.used(model) if path.name == MANIFEST else self.used_unrecorded(rng, model)

    def tokenizer(self, rng: random.Random) -> str:
        model = rng.choice(self.models)
        path = rng.choice(sorted((model / "tokenizer").glob("*.json")))
        self.write(path, damaged_json(rng, path.read_bytes()))
        return self.used_unrecorded(rng, model)

    def used_unrecorded(self, rng: random.Random, model: Path) -> str:
        """The same, but mostly of a model that says of no file what it was, so that all else is checked."""
        if rng.random() < 0.3:
            return self.used(model)
        manifest = json.loads((model / MANIFEST).read_bytes())
        del manifest[FILES]
        self.write(model / MANIFEST, json.dumps(sealed(manifest)).encode())
        pixels(model)  # which may well be others
        return "unrecorded"

    def converted(self, rng: random.Random) -> str:
        path = rng.choice(sorted(path for path in self.source.rglob("*") if path.is_file()))
        data = path.read_bytes()
        if path.suffix == ".json":
            data = damaged_json(rng, data)
        elif path.suffix == ".safetensors":
            data = rng.choice([damaged_header, damaged_header, cut, scrambled])(rng, data)
        else:
            data = scrambled(rng, data)
        self.write(path, data)
        self.size += size_of(self.source)
        folder = self.scratch()
        try:
            quant = rng.choice(["bf16", "qint4"])
            write_checkpoint(Source.open(self.source, VARIANT), folder / "model", quant, quant)
        except CheckpointError:
            if any(folder.iterdir()):
                raise Finding("leftover", f"{sorted(folder.iterdir())}") from None
            raise
        pixels(folder / "model")
        return "converted"

    def image(self, rng: random.Random) -> str:
        path = self.scratch() / f"picture{rng.choice(list(FORMATS))}"
        mode = rng.choice(["RGB", "L", "RGBA", "P", "1", "CMYK", "I;16"])
        picture(rng, mode, path)
        data = path.read_bytes()
        for _ in range(rng.choice([1, 1, 2, 6])):
            data = rng.choice([scrambled] * 4 + [cut])(rng, data)
        path.write_bytes(data)
        self.size += max(len(data), stated_size(path))
        opened = open_image(path)
        if opened.mode != "RGB" or opened.info:
            raise Finding("silent", f"a picture of mode {opened.mode} with {list(opened.info)}")
        return "decoded"

    @functools.cached_property
    def _remembered(self) -> list[dict]:
        """The settings of an image made from text, and of one made from a picture with a mask."""
        small = [*("-W", "16", "-H", "16", "-s", "1", "--seed", "1"), "-m", str(self.models[0])]
        picture(random.Random(0), "RGB", self.folder / "in.png", (64, 64))
        picture(random.Random(1), "L", self.folder / "mask.png", (64, 64))
        edit = ["-i", str(self.folder / "in.png"), "--mask", str(self.folder / "mask.png"), *small[4:]]
        commands = {"t.png": ["t2i", PROMPT, *small], "i.png": ["i2i", PROMPT, *edit]}
        for name, command in commands.items():
            code, output = flux2_mlx([*command, "-o", str(self.folder / name)])
            if code:
                raise RuntimeError(output)
        return [read_settings(self.folder / name) for name in commands]

    def replay(self, rng: random.Random) -> str:
        number = rng.randrange(2)
        settings = self._remembered[number]
        for _ in range(rng.choice([1, 1, 1, 2])):
            settings = mutated(rng, settings)
        # A run that takes long, or has many pixels, is what was asked for.
        for name, most in {"steps": 3, "width": 64, "height": 64}.items():
            if isinstance(settings, dict) and type(settings.get(name)) is int and 0 < settings[name] < 10**6:
                settings[name] = min(settings[name], most)
        path = self.scratch() / rng.choice(["a.png", "a.jpg", "a.webp"])
        remember(path, json.dumps(settings))
        if rng.random() < 0.15:
            path.write_bytes(scrambled(rng, path.read_bytes()))
        self.size += size_of(self.models[0]) + max(path.stat().st_size, stated_size(path))
        code, output = flux2_mlx([["t2i", "i2i"][number], "--replay", str(path), "-o", str(path.with_name("b.png"))])
        if code == 0:
            return "made"
        message = output.strip().splitlines()[-1:] or [""]
        if "\x1b" in output or code not in (1, 2) or not is_one_line(message[0], 1100) or "Error: " not in message[0]:
            raise Finding("unclear", f"exit code {code}: {output!r}")
        if path.with_name("b.png").exists():
            raise Finding("leftover", "an image of a run that failed")
        return "refused"

    @functools.cached_property
    def _entry(self) -> tuple[str, bytes]:
        """An entry of the prompt cache, by name and content."""
        pixels(self.models[0], self.folder / "fresh")
        (entry,) = EmbeddingCache(self.folder / "fresh").entries()
        return entry.path.name, entry.path.read_bytes()

    def cached(self, rng: random.Random) -> str:
        name, data = self._entry
        path = self.scratch() / name
        action = rng.random()
        if action < 0.8:
            path.write_bytes(rng.choice([scrambled, scrambled, cut, damaged_header])(rng, data))
        elif action < 0.95:
            target = rng.choice(["/dev/zero", "/dev/null", "gone", name, "/", "/proc/self/mem", self.source])
            path.symlink_to(target)
        else:
            rng.choice([os.mkfifo, os.mkdir])(path)
        self.size += size_of(self.models[0])
        if pixels(self.models[0], path.parent) != self.right[self.models[0]]:
            raise Finding("silent", "other pixels from a damaged entry")
        return "identical"

    @functools.cached_property
    def _hub(self) -> Any:
        from helpers.hub_client import NEEDED, REPO
        from helpers.hub_server import HubServer

        hub = HubServer({REPO: NEEDED})
        hub.__enter__()  # until the process ends
        return hub

    def fetched(self, rng: random.Random) -> str:
        from helpers.hub_client import NEEDED, fetch, files_in, listing

        hub, home = self._hub, self.scratch()
        hub.heal()
        if rng.random() < 0.6:
            info = listing(hub)
            for _ in range(rng.choice([1, 1, 2, 3])):
                info = mutated(rng, info)
            text = json.dumps(info).encode()
            hub.publish(text if rng.random() < 0.85 else rng.choice([scrambled, cut])(rng, text))
        else:
            name = rng.choice(sorted(NEEDED))
            hub.replace(name, rng.choice([scrambled, cut])(rng, NEEDED[name]))
        self.size += sum(map(len, NEEDED.values()))
        try:
            folder = fetch(hub, home)
        finally:
            if {path.name for path in home.iterdir()} - {"hub"}:
                raise Finding("leftover", f"{sorted(home.iterdir())}")
        found = files_in(folder)
        if any(NEEDED.get(name) != data for name, data in found.items()):
            raise Finding("silent", "files of other content were fetched")
        return "fetched"


def resealed(path: Path) -> bool:
    """Give a damaged manifest a digest that fits, so that what it says is read; False if it is none."""
    try:
        path.write_text(json.dumps(sealed(json.loads(path.read_bytes()))))
    except (ValueError, AttributeError, RecursionError):
        return False
    return True


def remember(path: Path, settings: str) -> None:
    """Write an image with `settings` where the program keeps its own."""
    info, exif = PngImagePlugin.PngInfo(), Image.Exif()
    info.add_itxt("flux2-mlx", settings)
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = b"UNICODE\0" + settings.encode("utf-16-be")
    options = {"pnginfo": info} if path.suffix == ".png" else {"exif": exif}
    Image.new("RGB", (16, 16)).save(path, **options)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def stated_size(path: Path) -> int:
    """Bytes of the pixels that a picture says it has, if it may have so many."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                count = image.width * image.height
    except Exception:  # Pillow raises whatever it likes
        return 0
    return 4 * count if count <= MAX_INPUT_PIXELS else 0


def pixels(model: Path, cache: Path | None = None) -> bytes:
    """What the model paints, with entries of `cache` if there is one."""
    pipe = Flux2Pipeline.from_pretrained(model, prompt_cache=False)
    pipe.prompt_cache = None if cache is None else EmbeddingCache(cache)
    return pipe(PROMPT, **RUN).images[0].tobytes()


def picture(rng: random.Random, mode: str, path: Path, size: tuple[int, int] = (24, 20)) -> None:
    """Write noise in `mode`, or in RGB where the format has no such pixels."""
    noise = np.random.default_rng(rng.randrange(2**32)).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    exif = Image.Exif()
    exif[0x0112] = rng.randrange(9)
    try:
        image.convert(mode).save(path, exif=exif)
    except (OSError, ValueError):
        image.save(path)


def flux2_mlx(arguments: list[str]) -> tuple[int, str]:
    """Exit code and output of a command; an exception that it does not handle is raised."""
    from click.testing import CliRunner

    from flux2_mlx.cli.main import cli

    result = CliRunner().invoke(cli, arguments, catch_exceptions=False, prog_name="flux2-mlx")
    return result.exit_code, result.output
