r"""A level seen in coordinates fitted to its walkers: y = m + A z, so that a move isotropic in z has the metric A A'.

Only moves look through a frame; paths, weights and what is kept stay in y. The target's value is that of y, without the
constant log |det A|, which no move can see.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from undrift.density.coordinates import spread
from undrift.density.level import LevelDensity, column, times
from undrift.density.move import State
from undrift.density.target import Point

__all__ = ["Frame", "FramedDensity", "Metric", "fit_frame"]

Metric = Literal["unit", "diagonal", "dense"]
"""What moves take the walkers' spread to be: of one size, along the axes, or with all correlations."""


@dataclass(frozen=True, eq=False)
class Frame:
    """y = mean + factor z; ``factor`` and ``inverse`` are (d,), or (d, d)."""

    mean: Tensor
    factor: Tensor
    inverse: Tensor

    def to_y(self, z: Tensor) -> Tensor:
        return self.mean + (z @ self.factor.mT if self.factor.ndim == 2 else z * self.factor)

    def to_z(self, y: Tensor) -> Tensor:
        centred = y - self.mean
        return centred @ self.inverse.mT if self.inverse.ndim == 2 else centred * self.inverse

    def pull(self, score: Tensor) -> Tensor:
        """Gradient in z of what has gradient ``score`` in y: A' s."""
        return score @ self.factor if self.factor.ndim == 2 else score * self.factor

    def push(self, score: Tensor) -> Tensor:
        """Gradient in y of what has gradient ``score`` in z."""
        return score @ self.inverse if self.inverse.ndim == 2 else score * self.inverse

    def enter(self, state: State) -> State:
        """Walkers in y, seen in z. A velocity is a number of z already."""
        point = state.point
        z = self.to_z(state.y)
        seen = None if point is None else Point(z, point.log_prob, self.pull(point.score))
        return State(z, seen, state.velocity, state.moved)

    def leave(self, state: State) -> State:
        """Walkers in z, back in y."""
        point = state.point
        y = self.to_y(state.y)
        seen = None if point is None else Point(y, point.log_prob, self.push(point.score))
        return State(y, seen, state.velocity, state.moved)


def fit_frame(y: Tensor, log_weights: Tensor, metric: Metric) -> Frame | None:
    """Frame of walkers y (n, d) of log weights (n,); None for the unit metric.

    A dense metric needs five effective walkers a coordinate, else it is diagonal.
    """
    if metric == "unit":
        return None
    w = log_weights.double().softmax(0)
    size, d = float(1 / w.square().sum()), y.shape[1]
    if metric == "dense" and size >= 5 * d:
        mean, factor = spread(y, w)
        inverse = torch.linalg.solve_triangular(factor, torch.eye(d, dtype=factor.dtype, device=y.device), upper=False)
        return Frame(mean.to(y), factor.to(y), inverse.to(y))
    x = y.double()
    mean = w @ x
    width = (w @ (x - mean).square()).sqrt()
    width = width.clamp(min=1e-8 * float(width.max().clamp(min=1e-300)))
    return Frame(mean.to(y), width.to(y), (1 / width).to(y))


@dataclass(frozen=True, eq=False)
class FramedDensity(LevelDensity):
    """A level's density, in z."""

    frame: Frame | None = None

    def at(self, y: Tensor) -> Point:
        assert self.frame is not None
        point = super().at(self.frame.to_y(y))
        return Point(y, point.log_prob, self.frame.pull(point.score))

    def log_prob(self, point: Point) -> Tensor:
        assert self.frame is not None
        value = times(self.exponent, point.log_prob)
        if isinstance(self.base, Tensor) or self.base != 0:
            value = value + times(self.base, self.law.log_prob(self.frame.to_y(point.x)))
        return value

    def score(self, point: Point) -> Tensor:
        assert self.frame is not None
        score = times(column(self.exponent), point.score)
        if isinstance(self.base, Tensor) or self.base != 0:
            score = score + times(column(self.base), self.frame.pull(self.law.score(self.frame.to_y(point.x))))
        return score
