r"""Time grids: at which times, or noise levels, a sampler calls the model.

A grid gives n decreasing times from the start of sampling to the last call. Two families: spaced in time, and spaced
in the effective noise level sigma, which means the same for every process.

Levels that a process does not reach are left out: a walk that is asked to start above sigma(T) starts at sigma(T).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from undrift._linalg import as_f64
from undrift.process.linear import LinearProcess

__all__ = [
    "PUBLISHED",
    "Cosine",
    "Given",
    "Grid",
    "Interpolated",
    "LogSigma",
    "Published",
    "Quadratic",
    "Rho",
    "Tangent",
    "Uniform",
    "log_linear",
]


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
    top = float(process.sigma(process.horizon).detach())
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
class Tangent(Grid):
    r"""Equal steps in the angle :math:`\arctan(\sigma / c)`: the tangent law.

    Steps of DDIM on Gaussian data of deviation c leave samples whose deviation is
    :math:`\prod_k \cos(\theta_k - \theta_{k+1})` times the exact one, :math:`\theta = \arctan(\sigma / c)`. The cosine
    is log-concave, so equal angles are the best there are for any number of steps, by KL and by W2.

    Args:
        scale: c, the deviation of one data coordinate.
        sigma_min, sigma_max: as in :class:`LogSigma`.

    References:
        Sun, Poor & Zhang, 2026, arXiv 2601.13602.
    """

    scale: float = 0.5
    sigma_min: float = 0.002
    sigma_max: float | None = 80.0

    def __post_init__(self) -> None:
        if not 0 < self.scale < math.inf:
            raise ValueError(f"Tangent: scale must be positive and finite, got {self.scale}.")

    def times(self, process: LinearProcess, n: int) -> Tensor:
        low, high, from_end = _levels("Tangent", process, self.sigma_min, self.sigma_max)
        first, last = math.atan2(high, self.scale), math.atan2(low, self.scale)
        levels = self.scale * torch.tan(first + (last - first) * _ramp(n))
        return _at_levels(process, _exact_ends(levels, high, low), from_end)


@dataclass(frozen=True)
class Cosine(Grid):
    r"""Equal steps in the time of the cosine schedule, taken as noise levels (Nichol & Dhariwal 2021, eq. 17).

    Its signal at time u is :math:`\cos\theta / \cos\theta_0`, :math:`\theta = \frac{\pi}{2} \frac{u + s}{1 + s}`, hence
    :math:`\sigma = \sqrt{\sin(\theta - \theta_0) \sin(\theta + \theta_0)} / \cos\theta`. Without offset this is
    :class:`Tangent` with scale 1.

    Args:
        offset: s.
        sigma_min, sigma_max: as in :class:`LogSigma`.
    """

    offset: float = 0.008
    sigma_min: float = 0.002
    sigma_max: float | None = 80.0

    def __post_init__(self) -> None:
        if not 0 <= self.offset < math.inf:
            raise ValueError(f"Cosine: offset must be finite and not negative, got {self.offset}.")

    def times(self, process: LinearProcess, n: int) -> Tensor:
        low, high, from_end = _levels("Cosine", process, self.sigma_min, self.sigma_max)
        start = 0.5 * math.pi * self.offset / (1 + self.offset)
        first, last = (math.atan2(math.hypot(level, math.sin(start)), math.cos(start)) for level in (high, low))
        angle = first + (last - first) * _ramp(n)
        levels = (torch.sin(angle - start) * torch.sin(angle + start)).sqrt() / torch.cos(angle)
        return _at_levels(process, _exact_ends(levels, high, low), from_end)


def _exact_ends(levels: Tensor, high: float, low: float) -> Tensor:
    levels[-1] = low
    levels[0] = high
    return levels


def log_linear(levels: Tensor, n: int, start: float = math.inf) -> Tensor:
    """Noise levels (m,) resampled to n: log sigma piecewise linear in the index, cut at ``start``, its ends kept.

    Args:
        levels: decreasing, float64.
        n: how many; one is the first, and m without a cut are the levels themselves.
        start: what lies above is left out, and the curve begins where it crosses this level.
    """
    logs = levels.log()
    at = 0.0
    if start < float(levels[0]):
        i = int((levels >= start).sum()) - 1  # the last level not below the cut
        at = i + float((logs[i] - math.log(start)) / (logs[i] - logs[i + 1]))
    place = at + (len(levels) - 1 - at) * _ramp(n)
    left = place.long().clamp(max=max(0, len(levels) - 2))
    right = (left + 1).clamp(max=len(levels) - 1)
    share = place - left
    out = torch.where(share == 0, levels[left], torch.lerp(logs[left], logs[right], share).exp())
    if n > 1:
        out[-1] = levels[-1]
    if at:
        out[0] = start
    return out


def _resampled(owner: str, process: LinearProcess, values: Tensor, n: int, drop: int = 0) -> Tensor:
    """Times of decreasing levels resampled to n + drop, the last ``drop`` of them left out."""
    if len(values) < 2 or bool((values.diff() >= 0).any()) or not bool((values > 0).all() & values.isfinite().all()):
        raise ValueError(
            f"{owner}: needs at least two noise levels, positive and strictly decreasing, got {values.tolist()}."
        )
    top = float(process.sigma(process.horizon).detach())
    if not float(values[-1]) < top:
        raise ValueError(
            f"{owner}: all levels, {float(values[0]):g} to {float(values[-1]):g}, lie above sigma(T) = {top:g}, where "
            "this process ends; give lower ones, or a process with more noise."
        )
    levels = log_linear(values, n + drop, top)
    return _at_levels(process, levels[:n], bool(levels[0] == top))


@dataclass(frozen=True)
class Interpolated(Grid):
    """Noise levels of your own, resampled to as many as the sampler asks for.

    Log sigma is linear between neighbours, in their index: the way in which tables of levels are carried to other
    numbers of steps (Sabour et al. 2024). For a process whose noise ends below the first level, the part of the curve
    above sigma(T) is left out and the rest resampled; nothing is added above the first level or below the last.

    Args:
        values: decreasing noise levels, at least two.
    """

    values: list[float]

    def times(self, process: LinearProcess, n: int) -> Tensor:
        return _resampled("Interpolated", process, as_f64(self.values), n)


# Name -> levels as released, and how many of the last are not those of a call.
PUBLISHED: dict[str, tuple[tuple[float, ...], int]] = {
    "ays-sd15": (
        (
            14.6146412293,
            6.4745760956,
            3.8636745985,
            2.6946151520,
            1.8841921177,
            1.3943805092,
            0.9642583904,
            0.6523686016,
            0.3977456272,
            0.1515232662,
            0.0291671582,
        ),
        1,
    ),
    "ays-sdxl": (
        (
            14.6146412293,
            6.3184485287,
            3.7681790315,
            2.1811480769,
            1.3405244945,
            0.8620721141,
            0.5550693289,
            0.3798540708,
            0.2332364134,
            0.1114188177,
            0.0291671582,
        ),
        1,
    ),
    "ays-svd": ((700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002), 1),
    "gits-cifar10": ((80.0, 10.9836, 3.8811, 1.584, 0.5666, 0.1698, 0.002), 0),
}


@dataclass(frozen=True)
class Published(Grid):
    """Released tables of optimised noise levels, resampled as in :class:`Interpolated`.

    * "ays-sd15", "ays-sdxl", "ays-svd": Align Your Steps for Stable Diffusion 1.5, XL and Stable Video Diffusion, 10
      calls each, in units of the latent space of the model. Their authors resample eleven levels to one more than the
      calls and replace the last by 0: use them with a final call, as samplers have by default.
    * "gits-cifar10": GITS for EDM's CIFAR-10 model, six calls, pixels in [-1, 1]. Its walk stops at the last level,
      0.002: with ``final="none"`` six steps are the table; with a final call it is called there too.

    Args:
        table: one of the above.
        scale: factor from the table's units to those of your data.

    References:
        Sabour, Fidler & Kreis, Align Your Steps: Optimizing Sampling Schedules in Diffusion Models, 2024,
        arXiv 2404.14507; the levels are those of the authors' project page.
        Chen et al., On the Trajectory Regularity of ODE-based Diffusion Sampling, 2024, arXiv 2405.11326; the levels
        are those of the authors' repository, zju-pi/diff-sampler.
    """

    table: Literal["ays-sd15", "ays-sdxl", "ays-svd", "gits-cifar10"]
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.table not in PUBLISHED:
            raise ValueError(f"Published: table must be one of {', '.join(PUBLISHED)}, got {self.table!r}.")
        if not 0 < self.scale < math.inf:
            raise ValueError(f"Published: scale must be positive and finite, got {self.scale}.")

    def times(self, process: LinearProcess, n: int) -> Tensor:
        levels, drop = PUBLISHED[self.table]
        return _resampled("Published", process, self.scale * as_f64(levels), n, drop)


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
