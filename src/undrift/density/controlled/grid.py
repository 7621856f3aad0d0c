r"""Where a controlled diffusion steps: K + 1 times from T (the prior) to 0 (the target), both included.

What a step costs in variance of the weights is set by how far the process turns in it. For a variance-preserving
process :math:`z = \cos\theta\, x_0 + \sin\theta\, n`, and equal steps in the angle :math:`\theta` are the cosine
schedule; for any other process the angle is that of its signal to noise ratio, :math:`\tan\theta = \sigma(t)`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from undrift._linalg import as_f64
from undrift.process.linear import LinearProcess

__all__ = ["EqualAngles", "EqualTimes", "GivenTimes", "PowerTimes", "TimeGrid", "angle"]


class TimeGrid(ABC):
    """Base of all grids that reach both ends."""

    @abstractmethod
    def times(self, process: LinearProcess, steps: int) -> Tensor:
        """steps + 1 strictly decreasing times from T to 0, float64."""

    def validate(self, process: LinearProcess, steps: int) -> None:  # noqa: B027  most serve any
        """Raise a ValueError if there are no such times."""


def angle(process: LinearProcess, t: Tensor) -> Tensor:
    """arctan sigma(t), in [0, pi/2], for times (...) in [0, T]."""
    return process.snr(t).detach().rsqrt().nan_to_num(nan=math.inf).atan()


def _ramp(steps: int) -> Tensor:
    """From 1 to 0."""
    return torch.arange(steps, -1, -1, dtype=torch.float64) / steps


@dataclass(frozen=True)
class EqualTimes(TimeGrid):
    """Equal steps in time."""

    def times(self, process: LinearProcess, steps: int) -> Tensor:
        return process.horizon * _ramp(steps)


@dataclass(frozen=True)
class PowerTimes(TimeGrid):
    r""":math:`t_k = T (1 - k/K)^p`: shorter steps near the target.

    Args:
        power: p.
    """

    power: float = 2.0

    def __post_init__(self) -> None:
        if not self.power > 0:
            raise ValueError(f"PowerTimes: power must be positive, got {self.power}.")

    def times(self, process: LinearProcess, steps: int) -> Tensor:
        return process.horizon * _ramp(steps) ** self.power


@dataclass(frozen=True)
class EqualAngles(TimeGrid):
    """Equal steps in the angle arctan sigma: the cosine schedule, for any process and clock.

    For a process that is learned the times are found anew whenever its table is, and without a gradient, like the
    labels that networks are told: both count as given. Weights are exact on any grid, so every objective is minimised
    on the grid that the process has at that step; none sees that another process would step elsewhere.
    """

    def times(self, process: LinearProcess, steps: int) -> Tensor:
        end = as_f64(process.horizon).reshape(1)
        with torch.no_grad():
            first, last = angle(process, torch.cat([end, torch.zeros_like(end)]))
            theta = last + (first - last) * _ramp(steps)[1:-1]  # Song's exploding clock begins above 0
            inner = process.time(theta.tan()) if steps > 1 else end[:0]
        return torch.cat([end, inner, torch.zeros(1, dtype=torch.float64)])


@dataclass(frozen=True)
class GivenTimes(TimeGrid):
    """Times of your own.

    Args:
        values: from T to 0, strictly decreasing.
    """

    values: list[float]

    def validate(self, process: LinearProcess, steps: int) -> None:
        values = as_f64(self.values)
        if len(values) != steps + 1:
            raise ValueError(f"GivenTimes: {steps} steps need {steps + 1} times, got {len(values)}.")
        if bool((values.diff() >= 0).any()) or float(values[-1]) != 0 or float(values[0]) != process.horizon:
            raise ValueError(
                f"GivenTimes: values must fall strictly from T = {process.horizon:g} to 0, got {self.values}."
            )

    def times(self, process: LinearProcess, steps: int) -> Tensor:
        self.validate(process, steps)
        return as_f64(self.values)
