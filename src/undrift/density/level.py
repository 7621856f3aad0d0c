"""One level of a path: the target to a power, times a base law to a power."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from undrift.density.law import Base
from undrift.density.target import Point, Target

__all__ = ["Level", "LevelDensity", "column", "times"]


class Level(NamedTuple):
    """A row of a path's table.

    Attributes:
        exponent: t, of the target.
        base: b, of the base law.
        log_scale: log s.
    """

    exponent: float
    base: float
    log_scale: float = 0.0


def times(factor: float | Tensor, value: Tensor) -> Tensor:
    """factor * value, and 0 where the factor is 0, even if the value is infinite."""
    if isinstance(factor, Tensor):
        return torch.where(factor == 0, torch.zeros_like(value), factor * value)
    return torch.zeros_like(value) if factor == 0 else value if factor == 1 else factor * value


def column(factor: float | Tensor) -> float | Tensor:
    """A factor of each point, (n,), shaped to meet vectors (n, d)."""
    return factor.unsqueeze(-1) if isinstance(factor, Tensor) else factor


@dataclass(frozen=True, eq=False)
class LevelDensity:
    """The density of a level, in y.

    Args:
        target: gamma.
        law: nu.
        exponent: t, a number, or one for each point (n,).
        base: b, likewise.
    """

    target: Target
    law: Base
    exponent: float | Tensor = 1.0
    base: float | Tensor = 0.0

    def at(self, y: Tensor) -> Point:
        """One evaluation of the target at each y (n, d). Where the density is 0, or no number, so is the score."""
        value, score = self.target.log_prob_and_score(y)
        if not bool(torch.isfinite(score).all() & torch.isfinite(value).all()):
            lost = ~torch.isfinite(y).all(-1)  # proposals beyond the numbers; their answers do not count
            undefined = torch.isnan(value) | (value == math.inf) | ~torch.isfinite(score).all(-1) & (value != -math.inf)
            self.target.evaluations.undefined += int((undefined & ~lost).sum())
            value = value.masked_fill(undefined | lost, -math.inf)
            score = score.masked_fill((value == -math.inf).unsqueeze(-1), 0.0)
        return Point(y, value, score)

    def log_prob(self, point: Point) -> Tensor:
        """log pi_u, (n,), not normalised."""
        value = times(self.exponent, point.log_prob)
        if isinstance(self.base, Tensor) or self.base != 0:
            value = value + times(self.base, self.law.log_prob(point.x))
        return value

    def score(self, point: Point) -> Tensor:
        """grad log pi_u, (n, d)."""
        score = times(column(self.exponent), point.score)
        if isinstance(self.base, Tensor) or self.base != 0:
            score = score + times(column(self.base), self.law.score(point.x))
        return score

    def smoothness(self, of_target: float) -> Any:
        """L of the level for a target of smoothness L: t L + b L_nu."""
        return self.exponent * of_target + self.base * self.law.smoothness(self.target.dim)
