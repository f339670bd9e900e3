"""Compare what `flux2_mlx.durations` expects with every speed that others have published of FLUX.2 on Apple's chips.

    python scripts/published_speeds.py

None of them is this program's, and most say little of how they were measured: whole runs include loading, and other
programs have other kernels. Lines with a * are those that constants are fitted to. The error is what is expected,
against what was published. What is no run of these networks as they are is not in it: the 0.6B encoder in place of the
4B one, and times of a VAE alone on a chip that is not named.
"""

from dataclasses import dataclass, replace

from flux2_mlx.advice import workload
from flux2_mlx.chips import chip_named
from flux2_mlx.config import VARIANTS
from flux2_mlx.durations import duration
from flux2_mlx.networks import Networks
from flux2_mlx.request import Request


@dataclass(frozen=True)
class Published:
    """Seconds that a `program` was said to take, of one step where `of_step`, else of a whole run. `fitted` if a
    constant is fitted to it; `pictures` are references of 1024² pixels."""

    program: str
    chip: str
    model: str
    quant: str
    seconds: float
    of_step: bool = False
    dtype: str = "bfloat16"
    steps: int = 4
    size: tuple[int, int] = (1024, 1024)
    pictures: int = 0
    fitted: bool = False

    @property
    def expected(self) -> float:
        variant = VARIANTS[self.model]
        width, height = self.size
        networks = Networks.open(variant, quant=self.quant, dtype=self.dtype)
        request = Request.checked(variant, 16, [""], width=width, height=height, steps=self.steps)
        work = replace(workload(request), references=((1024, 1024),) * self.pictures)
        found = duration(networks, request, work, chip_named(self.chip))
        return found.step if self.of_step else found.seconds

    @property
    def error(self) -> float:
        """What is expected, against what was published: 0.1 is a tenth too long."""
        return self.expected / self.seconds - 1

    def __str__(self) -> str:
        what = "a step" if self.of_step else f"{self.steps} steps"
        width, height = self.size
        beside = f", {self.pictures} reference" if self.pictures else ""
        settings = f"{self.model} {self.quant} {self.dtype} {width}×{height}{beside}"
        seconds = f"{self.seconds:9.1f}{self.expected:9.1f}{self.error:+8.0%}"
        return f"{self.program:12}{self.chip:9}{settings:52}{what:9}{seconds}{' *' if self.fitted else ''}"


def _swift(model: str, seconds: tuple[float, float, float], steps: int = 4) -> list[Published]:
    """The runs of the Swift port in 16, 8 and 4 bits. Constants are fitted to what 8 and 4 bits take of klein more."""
    fitted = model != "dev"
    return [
        Published("Swift port", "M3 Max", model, quant, taken, steps=steps, fitted=fitted and quant != "bf16")
        for quant, taken in zip(("bf16", "qint8", "qint4"), seconds, strict=True)
    ]


PUBLISHED = (
    Published("mflux", "M1 Max", "klein-9b", "bf16", 10.5, of_step=True, dtype="float16", fitted=True),
    Published("mflux", "M1 Max", "klein-9b", "bf16", 11.6, of_step=True, fitted=True),
    Published("mflux", "M1 Max", "klein-4b", "qint4", 5.0, of_step=True, dtype="float16"),
    Published("mflux", "M1 Max", "klein-4b", "qint4", 6.8, of_step=True),
    Published("mflux", "M1 Max", "klein-4b", "qint4", 26, size=(768, 1024)),
    Published("mflux", "M1 Max", "klein-base-4b", "qint4", 589, steps=50, size=(768, 1024)),
    Published("mflux", "M2 Pro", "klein-4b", "bf16", 41.8),
    Published("mflux", "M2 Pro", "klein-4b", "qint4", 52.7),
    Published("mflux", "M4 Pro", "klein-4b", "bf16", 27),
    Published("mflux", "M3 Ultra", "klein-4b", "qint4", 9.2),
    Published("mflux", "M5 Max", "klein-9b", "bf16", 27.5),
    Published("mflux", "M5 Max", "klein-9b-kv", "bf16", 21.6, pictures=1),
    Published("mlx-dfloat", "M1 Max", "klein-4b", "bf16", 35),
    Published("mlx-dfloat", "M1 Max", "klein-9b", "bf16", 78),
    *_swift("klein-4b", (25.6, 27.9, 30.3)),
    *_swift("klein-9b", (54.9, 59.7, 64.8)),
    *_swift("dev", (1759, 1843, 1780), 28),
    Published("Draw Things", "M3 Max", "klein-4b", "qint4", 14.2),  # in fact 6 bits
    Published("flux2.c", "M3 Max", "klein-4b", "bf16", 19),
    Published("torch MPS", "M3 Max", "klein-4b", "bf16", 25),
)


def main() -> None:
    print(f"{'program':12}{'chip':9}{'run':52}{'seconds':9}{'published':>9}{'expected':>9}{'error':>8}")
    for line in PUBLISHED:
        print(line)


if __name__ == "__main__":
    main()
