"""What both training stages share: moving averages, checkpoints and the learning rate's course."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn


class MovingAverage:
    """Exponential moving average of a module's parameters, with a warm-up of its horizon."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module, self.decay, self.updates = module, decay, 0
        self.shadow = {name: value.detach().clone() for name, value in module.named_parameters()}

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the module's present parameters."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, value in self.module.named_parameters():
            self.shadow[name].lerp_(value, 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges the averages with the module's parameters; a second call undoes the first."""
        for name, value in self.module.named_parameters():
            kept = value.detach().clone()
            value.copy_(self.shadow[name])
            self.shadow[name] = kept


@dataclass
class Progress:
    """The steps done of a stage bounded by `steps` or by `minutes` (whichever ends first), over several runs."""

    steps: int
    minutes: float
    done: int = 0
    spent: float = 0.0
    mark: float = field(default_factory=time.monotonic)

    def fraction(self) -> float:
        """How much of the stage is over, in [0, 1]."""
        now = time.monotonic()
        self.spent, self.mark = self.spent + now - self.mark, now
        return min(1.0, max(self.done / self.steps, self.spent / (60 * self.minutes)))


def one_cycle(fraction: float, warm_up: float = 0.03, floor: float = 0.01) -> float:
    """The factor of the highest learning rate after `fraction` of the training: linear up, cosine down."""
    if fraction < warm_up:
        return max(fraction / warm_up, 0.02)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (fraction - warm_up) / (1 - warm_up)))


def save_checkpoint(
    path: Path, module: nn.Module, average: MovingAverage, optimiser: torch.optim.Optimizer, progress: Progress
) -> None:
    """Writes everything that resuming needs; a broken write leaves the former checkpoint."""
    state = {
        "module": module.state_dict(),
        "average": average.shadow,
        "updates": average.updates,
        "optimiser": optimiser.state_dict(),
        "done": progress.done,
        "spent": progress.spent,
    }
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def load_checkpoint(
    path: Path, module: nn.Module, average: MovingAverage, optimiser: torch.optim.Optimizer, progress: Progress
) -> None:
    """Restores what `save_checkpoint` wrote."""
    state = torch.load(path, weights_only=True)
    module.load_state_dict(state["module"])
    average.shadow, average.updates = state["average"], state["updates"]
    optimiser.load_state_dict(state["optimiser"])
    progress.done, progress.spent = state["done"], state["spent"]


def load_average(path: Path, module: nn.Module) -> None:
    """Loads the averaged weights of a checkpoint into `module`."""
    state = torch.load(path, weights_only=True)
    module.load_state_dict(state["module"])
    with torch.no_grad():
        for name, value in module.named_parameters():
            value.copy_(state["average"][name])


class Muon(torch.optim.Optimizer):
    """Momentum whose update of each matrix is made orthogonal, as `torch.optim.Muon` does, but in float32.

    The library computes in bfloat16, which most processors only emulate.
    """

    def __init__(self, matrices: list[nn.Parameter], momentum: float = 0.95, weight_decay: float = 0.01) -> None:
        super().__init__(matrices, {"lr": 0.0, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        """One update of every matrix that has a gradient."""
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                mean = self.state[matrix].setdefault("mean", torch.zeros_like(matrix))
                mean.lerp_(matrix.grad, 1 - group["momentum"])
                update = orthogonal(matrix.grad.lerp(mean, group["momentum"]))
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update, alpha=-group["lr"] * math.sqrt(max(1.0, matrix.shape[0] / matrix.shape[1])))


def orthogonal(matrix: Tensor, rounds: int = 4) -> Tensor:
    """`matrix` (N, M) with all its singular values brought near 1, by Newton-Schulz iterations."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(rounds):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.T if tall else x
