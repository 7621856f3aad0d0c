"""One objective after another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from undrift.density.controlled.diffusion import Scheme
from undrift.density.controlled.objective import Objective, Runner, Work

__all__ = ["Stages"]


@dataclass(frozen=True, eq=False)
class Stages(Objective):
    """One objective, then another: matching finds the control, a divergence over paths polishes it.

    Args:
        first, then: what is minimised.
        after: steps of the first.
        batch: paths or points a step of the second; null for that of the training.
    """

    first: Objective
    then: Objective
    after: int = 1000
    batch: int | None = None

    def __post_init__(self) -> None:
        if self.after < 1:
            raise ValueError(f"Stages: after must be at least 1, got {self.after}.")
        if self.batch is not None and self.batch < 2:
            raise ValueError(f"Stages: batch must be at least 2, got {self.batch}.")

    def validate(self, scheme: Scheme, batch: int) -> None:
        self.first.validate(scheme, batch)
        self.then.validate(scheme, batch if self.batch is None else self.batch)

    def runner(self, work: Work) -> Runner:
        later = work if self.batch is None else replace(work, batch=self.batch)
        return _StagesRunner(self.after, self.first.runner(work), self.then.runner(later))


class _StagesRunner(Runner):
    def __init__(self, after: int, first: Runner, then: Runner) -> None:
        self.after, self.first, self.then, self.done = after, first, then, 0

    def step(self) -> dict[str, float]:
        self.done += 1
        return (self.first if self.done <= self.after else self.then).step()

    def state(self) -> Mapping[str, Tensor]:
        kept = {f"first.{k}": v for k, v in self.first.state().items()} if self.done < self.after else {}
        kept |= {f"then.{k}": v for k, v in self.then.state().items()}
        return kept | {"stages.done": torch.tensor(self.done)}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        if "stages.done" not in tensors:
            return
        self.done = int(tensors["stages.done"])
        for name, runner in (("first.", self.first), ("then.", self.then)):
            runner.load({k.removeprefix(name): v for k, v in tensors.items() if k.startswith(name)})
