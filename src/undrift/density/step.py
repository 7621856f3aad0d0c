r"""How long a Langevin step is: rules, named by what they do.

A step of size eps in y moves by :math:`\varepsilon \nabla \log \pi_u + \sqrt{2 \varepsilon}\, \xi`. On a scaled level
:math:`x = s y`, it is the step :math:`h = s^2 \varepsilon` in x. Stability on a well of curvature L asks for
:math:`\varepsilon L = h L / \lambda < 2`; the nearer to 2, the hotter the walkers (an Euler error, not a law).

Rules that read the score of a walker are state-dependent: unadjusted, they change the invariant law to
:math:`\propto \pi / h`; with Metropolis, the proposal's density accounts for it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from undrift.density.law import positive
from undrift.density.level import Level, LevelDensity
from undrift.density.target import Target

__all__ = ["Adapted", "FixedStep", "ScoreNorm", "SignalToNoise", "Smoothness", "StepRule", "smoothness"]


class StepRule(ABC):
    """Step size in y for walkers at a level."""

    by_walker: ClassVar[bool] = False
    """Whether the size depends on the walker."""
    by_batch: ClassVar[bool] = False
    """Whether it depends on the other walkers, which no exact move allows."""

    @abstractmethod
    def size(self, density: LevelDensity, level: Level, score: Tensor, smoothness: float) -> Any:
        """eps: a number, or one for each walker (n,).

        Args:
            density: of the level, in y.
            level: its row.
            score: of the level at the walkers, (n, d).
            smoothness: L of the target.
        """


@dataclass(frozen=True, eq=False)
class FixedStep(StepRule):
    """One step in x for all levels, h = relative / L: at small lambda far too long, hence hot."""

    relative: float = 0.1

    def __post_init__(self) -> None:
        positive(self, relative=self.relative)

    def size(self, density: LevelDensity, level: Level, score: Tensor, smoothness: float) -> Any:
        return self.relative / smoothness * math.exp(-2 * level.log_scale)


@dataclass(frozen=True, eq=False)
class Smoothness(StepRule):
    """A constant relative step, eps = relative / L_u the level's own smoothness (in x, h = relative lambda / L)."""

    relative: float = 0.1

    def __post_init__(self) -> None:
        positive(self, relative=self.relative)

    def size(self, density: LevelDensity, level: Level, score: Tensor, smoothness: float) -> Any:
        return self.relative / density.smoothness(smoothness)


@dataclass(frozen=True, eq=False)
class ScoreNorm(StepRule):
    r"""A step in x of h = relative / L, cut where the score is large, :math:`h \min(1, B / |\nabla \log p_\lambda|)`.

    Args:
        relative: h L.
        radius: B in units of :math:`\sqrt{d L}`, the score's size in equilibrium at lambda = 1.
    """

    by_walker: ClassVar[bool] = True

    relative: float = 1.0
    radius: float = 1.0

    def __post_init__(self) -> None:
        positive(self, relative=self.relative, radius=self.radius)

    def size(self, density: LevelDensity, level: Level, score: Tensor, smoothness: float) -> Any:
        bound = self.radius * math.sqrt(score.shape[-1] * smoothness)
        in_x = score.norm(dim=-1) * math.exp(-level.log_scale)
        return self.relative / smoothness * math.exp(-2 * level.log_scale) * (bound / in_x).clamp(max=1.0)


@dataclass(frozen=True, eq=False)
class SignalToNoise(StepRule):
    r""":math:`\varepsilon = 2 r^2 d / \overline{|\nabla \log \pi|^2}`: the rule of predictor-corrector samplers."""

    by_batch: ClassVar[bool] = True

    ratio: float = 0.16

    def __post_init__(self) -> None:
        positive(self, ratio=self.ratio)

    def size(self, density: LevelDensity, level: Level, score: Tensor, smoothness: float) -> Any:
        return 2 * self.ratio**2 * score.shape[-1] / score.square().sum(-1).mean()


@dataclass(frozen=True, eq=False)
class Adapted(StepRule):
    """Steered, level by level, to a target acceptance (Robbins-Monro on log eps); what a pilot finds is then frozen.

    Args:
        acceptance: null for the move's own: .574 for MALA, .8 for HMC.
        relative: eps L to begin with.
    """

    acceptance: float | None = None
    relative: float = 0.5

    def __post_init__(self) -> None:
        positive(self, relative=self.relative)
        if self.acceptance is not None and not 0 < self.acceptance < 1:
            raise ValueError(f"Adapted: acceptance must lie in (0, 1), got {self.acceptance}.")

    def size(self, density: LevelDensity, level: Level, score: Tensor, smoothness: float) -> Any:
        return self.relative / density.smoothness(smoothness)


def smoothness(target: Target, x: Tensor, rounds: int = 8, seed: int = 0) -> float:
    """Largest curvature of -log gamma at points x (n, d), by power iteration on differences of the score.

    Costs n (rounds + 1) gradients. It is the largest at these points, not a bound on R^d.

    Raises:
        ValueError: if the score is flat, or not finite, at every point.
    """
    score = target.score(x)
    generator = torch.Generator(x.device).manual_seed(seed)
    v = torch.empty_like(x).normal_(generator=generator)
    reach = (torch.finfo(x.dtype).eps ** 0.33) * (1 + x.norm(dim=-1, keepdim=True))
    size = torch.zeros_like(x[:, 0])
    for _ in range(rounds):
        v = v / v.norm(dim=-1, keepdim=True).clamp(min=1e-300)
        curved = (score - target.score(x + reach * v)) / reach
        curved = torch.where(torch.isfinite(curved).all(-1, keepdim=True), curved, torch.zeros_like(curved))
        size = curved.norm(dim=-1)
        v = torch.where(size.unsqueeze(-1) > 0, curved, torch.empty_like(x).normal_(generator=generator))
    best = float(size.max())
    if not (best > 0 and math.isfinite(best)):
        raise ValueError(
            f"{target.name}: no curvature was found at {len(x)} points; give smoothness=, the largest curvature of "
            "-log density."
        )
    return best
