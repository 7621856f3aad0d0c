r"""Time grids: at which times, or noise levels, a sampler calls the model.

A grid gives n decreasing times from the start of sampling to the last call. Two families: spaced in time, and spaced
in the effective noise level sigma, which means the same for every process.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from undrift._linalg import as_f64
from undrift.process.linear import LinearProcess

__all__ = ["Given", "Grid", "LogSigma", "Quadratic", "Rho", "Uniform"]


class Grid(ABC):
    """Base of all grids."""

    @abstractmethod
    def times(self, process: LinearProcess, n: int) -> Tensor:
        """n strictly decreasing times (n,) in (0, T], float64; n >= 1."""


def _ramp(n: int) -> Tensor:
    """n points from 0 to 1; a single one at 0."""
    return torch.linspace(0.0, 1.0, n, dtype=torch.float64)


def _check_t_min(owner: str, t_min: float) -> None:
    if not 0 < t_min < 1:
        raise ValueError(f"{owner}: t_min is a fraction of the horizon and must lie in (0, 1), got {t_min}.")


@dataclass(frozen=True)
class Uniform(Grid):
    """Equal steps in time from T to ``t_min`` T.

    Args:
        t_min: last time, as a fraction of the horizon.
    """

    t_min: float = 1e-3

    def __post_init__(self) -> None:
        _check_t_min("Uniform", self.t_min)

    def times(self, process: LinearProcess, n: int) -> Tensor:
        return process.horizon * (1 - (1 - self.t_min) * _ramp(n))


@dataclass(frozen=True)
class Quadratic(Grid):
    r""":math:`t_i = \epsilon + (T - \epsilon)(1 - i/n)^2`, dense near the data (Dockhorn et al. 2022).

    Args:
        t_min: last time, as a fraction of the horizon.
    """

    t_min: float = 1e-3

    def __post_init__(self) -> None:
        _check_t_min("Quadratic", self.t_min)

    def times(self, process: LinearProcess, n: int) -> Tensor:
        return process.horizon * (self.t_min + (1 - self.t_min) * (1 - _ramp(n)) ** 2)


def _levels(owner: str, process: LinearProcess, sigma_min: float, sigma_max: float | None) -> tuple[float, float, bool]:
    """Levels to walk between: sigma_min, sigma_max or what the process reaches if that is less, and if it is that."""
    top = float(process.sigma(process.horizon))
    high = top if sigma_max is None else min(sigma_max, top)
    if not 0 < sigma_min < high:
        raise ValueError(
            f"{owner}: needs 0 < sigma_min < sigma_max, got sigma_min = {sigma_min:g} where the walk starts at "
            f"sigma = {high:g}."
        )
    return sigma_min, high, high == top


def _at_levels(process: LinearProcess, sigma: Tensor, from_end: bool) -> Tensor:
    times = process.time(sigma)
    if from_end:
        times[0] = process.horizon
    return times


@dataclass(frozen=True)
class LogSigma(Grid):
    """Equal steps in log sigma: a geometric sequence of noise levels.

    Args:
        sigma_min: noise level of the last call, in data units.
        sigma_max: noise level of the first call; None for the process's sigma(T). Never above sigma(T).
    """

    sigma_min: float = 0.01
    sigma_max: float | None = None

    def times(self, process: LinearProcess, n: int) -> Tensor:
        low, high, from_end = _levels("LogSigma", process, self.sigma_min, self.sigma_max)
        return _at_levels(process, high * (low / high) ** _ramp(n), from_end)


@dataclass(frozen=True)
class Rho(Grid):
    r"""EDM's levels: equal steps in :math:`\sigma^{1/\rho}` (Karras et al. 2022, eq. 5).

    Args:
        rho: 7 in the paper; 1 is uniform in sigma, large values approach :class:`LogSigma`.
        sigma_min, sigma_max: as in :class:`LogSigma`.
    """

    rho: float = 7.0
    sigma_min: float = 0.002
    sigma_max: float | None = 80.0

    def __post_init__(self) -> None:
        if not self.rho > 0:
            raise ValueError(f"Rho: rho must be positive, got {self.rho}.")

    def times(self, process: LinearProcess, n: int) -> Tensor:
        low, high, from_end = _levels("Rho", process, self.sigma_min, self.sigma_max)
        a, b = high ** (1 / self.rho), low ** (1 / self.rho)
        return _at_levels(process, (a + _ramp(n) * (b - a)) ** self.rho, from_end)


@dataclass(frozen=True)
class Given(Grid):
    """Times, or noise levels, of your own.

    Args:
        values: decreasing times or noise levels; their number must be what the sampler asks for.
        sigma: read the values as noise levels.
    """

    values: list[float]
    sigma: bool = False

    def times(self, process: LinearProcess, n: int) -> Tensor:
        if len(self.values) != n:
            raise ValueError(f"Given: the sampler needs {n} times for its steps, got {len(self.values)}.")
        values = as_f64(self.values)
        if bool((values.diff() >= 0).any()) or bool((values <= 0).any()):
            raise ValueError(f"Given: values must be positive and strictly decreasing, got {self.values}.")
        return process.time(values) if self.sigma else process._time(values)
