r"""Which noise levels training visits: densities over :math:`\ln \sigma`.

A batch is stratified: sample i of n draws from the i-th of n slices of equal probability. The estimate of a loss stays
unbiased and the share of the levels in its variance all but vanishes (the low-discrepancy idea of Kingma et al. 2021,
appendix I.1, with independent draws per slice).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["DefensiveMixture", "LogNormal", "LogUniform", "NoiseLevels", "Tabulated", "stratified"]


def stratified(n: int, generator: torch.Generator) -> Tensor:
    """Uniforms (n,) in (0, 1), float64, one in each slice [i/n, (i + 1)/n), on the generator's device."""
    u = torch.empty(n, dtype=torch.float64, device=generator.device).uniform_(generator=generator)
    return ((torch.arange(n, dtype=torch.float64, device=u.device) + u) / n).clamp(1e-12, 1 - 1e-12)


def _check_range(owner: str, low: float, high: float) -> None:
    if not 0 < low < high < math.inf:
        raise ValueError(f"{owner}: needs 0 < sigma_min < sigma_max < inf, got {low} and {high}.")


class NoiseLevels(ABC):
    """Base of all distributions of training noise levels."""

    @abstractmethod
    def draw(self, u: Tensor) -> Tensor:
        """Noise levels for uniforms ``u`` in (0, 1), same shape and dtype."""

    @abstractmethod
    def density(self, sigma: Tensor) -> Tensor:
        r"""Density of :math:`\ln \sigma`, same shape as ``sigma``."""

    @property
    def support(self) -> tuple[float, float]:
        """Smallest and largest level it can draw."""
        return 0.0, math.inf


@dataclass(frozen=True, eq=False)
class LogNormal(NoiseLevels):
    r""":math:`\ln \sigma \sim N(\text{mean}, \text{std}^2)` (Karras et al. 2022, table 1)."""

    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self) -> None:
        if not 0 < self.std < math.inf or not math.isfinite(self.mean):
            raise ValueError(f"LogNormal: needs a finite mean and a positive std, got {self.mean} and {self.std}.")

    def draw(self, u: Tensor) -> Tensor:
        return (self.mean + self.std * torch.special.ndtri(u)).exp()

    def density(self, sigma: Tensor) -> Tensor:
        z = (sigma.log() - self.mean) / self.std
        return (-0.5 * z.square()).exp() / (self.std * math.sqrt(2 * math.pi))


@dataclass(frozen=True, eq=False)
class LogUniform(NoiseLevels):
    r""":math:`\ln \sigma` uniform over a range."""

    sigma_min: float = 0.002
    sigma_max: float = 300.0

    def __post_init__(self) -> None:
        _check_range("LogUniform", self.sigma_min, self.sigma_max)

    @property
    def support(self) -> tuple[float, float]:
        return self.sigma_min, self.sigma_max

    def draw(self, u: Tensor) -> Tensor:
        return (math.log(self.sigma_min) + u * math.log(self.sigma_max / self.sigma_min)).exp()

    def density(self, sigma: Tensor) -> Tensor:
        inside = (sigma >= self.sigma_min * (1 - 1e-6)) & (sigma <= self.sigma_max * (1 + 1e-6))
        return inside.to(sigma) / math.log(self.sigma_max / self.sigma_min)


@dataclass(frozen=True, eq=False)
class DefensiveMixture(NoiseLevels):
    r"""EDM's bell, cut to a range, with a share of log-uniform levels over the same range.

    The bell alone puts 1.6e-6 of its draws beyond :math:`\sigma = 80`, while VP, CLD and their kin start sampling at
    150 to 250: there a denoiser trained by the bell answers with what it never learned. A share of uniform levels
    visits every level, costs the bell that share of its samples, and bounds importance weights by
    :math:`\ln(\sigma_{max}/\sigma_{min})/\text{share}` (hence the name: Hesterberg 1995).

    Args:
        mean, std: of the bell over ln sigma.
        sigma_min, sigma_max: the range.
        share: probability of the uniform part, in (0, 1).
    """

    mean: float = -1.2
    std: float = 1.2
    sigma_min: float = 0.002
    sigma_max: float = 300.0
    share: float = 0.2

    def __post_init__(self) -> None:
        _check_range("DefensiveMixture", self.sigma_min, self.sigma_max)
        if not 0 < self.share < 1:
            raise ValueError(f"DefensiveMixture: share must lie in (0, 1), got {self.share}.")
        low, high = self._cuts()
        if high - low < 1e-3:
            raise ValueError(
                f"DefensiveMixture: the bell of mean {self.mean} and std {self.std} over ln sigma has next to no "
                f"mass in [{self.sigma_min}, {self.sigma_max}]; move one of them."
            )

    @property
    def support(self) -> tuple[float, float]:
        return self.sigma_min, self.sigma_max

    def _parts(self) -> tuple[LogNormal, LogUniform]:
        return LogNormal(self.mean, self.std), LogUniform(self.sigma_min, self.sigma_max)

    def _cuts(self) -> tuple[float, float]:
        """The bell's distribution function at both ends of the range."""
        bell = LogNormal(self.mean, self.std)
        low, high = ((math.log(s) - bell.mean) / bell.std for s in self.support)
        return 0.5 * math.erfc(-low / math.sqrt(2)), 0.5 * math.erfc(-high / math.sqrt(2))

    def draw(self, u: Tensor) -> Tensor:
        # The first slices of a stratified batch serve the uniform part, the rest the bell: both stay stratified.
        bell, flat = self._parts()
        low, high = self._cuts()
        inner = ((u - self.share) / (1 - self.share)).clamp(1e-12, 1 - 1e-12)
        return torch.where(u < self.share, flat.draw(u / self.share), bell.draw(low + inner * (high - low)))

    def density(self, sigma: Tensor) -> Tensor:
        bell, flat = self._parts()
        low, high = self._cuts()
        uniform = flat.density(sigma)
        cut = bell.density(sigma) / (high - low)
        return self.share * uniform + (1 - self.share) * torch.where(uniform > 0, cut, torch.zeros_like(cut))


@dataclass(frozen=True, eq=False)
class Tabulated(NoiseLevels):
    r"""A density of :math:`\ln \sigma` that is piecewise linear between knots, such as one found from measurements.

    Args:
        sigma: knots, at least two, positive and increasing; the range ends with them.
        weight: density at the knots, positive, up to a common factor.
    """

    sigma: list[float]
    weight: list[float]
    _table: tuple[Tensor, Tensor, Tensor] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        knots, weight = (torch.tensor(v, dtype=torch.float64) for v in (self.sigma, self.weight))
        if len(knots) < 2 or len(knots) != len(weight):
            raise ValueError(
                f"Tabulated: needs a weight for each of at least two knots, got {len(knots)} knots and {len(weight)} "
                "weights."
            )
        if not bool((knots > 0).all() & (knots.diff() > 0).all() & knots.isfinite().all()):
            raise ValueError(f"Tabulated: sigma must be positive, finite and strictly increasing, got {self.sigma}.")
        if not bool((weight > 0).all() & weight.isfinite().all()):
            raise ValueError(
                f"Tabulated: weights must be positive and finite, got {self.weight}; end the knots where no level is "
                "to be drawn."
            )
        place = knots.log()
        mass = torch.cumulative_trapezoid(weight, place)
        density = weight / mass[-1]
        cdf = torch.cat([torch.zeros(1, dtype=torch.float64), mass / mass[-1]])
        object.__setattr__(self, "_table", (place, density, cdf))

    @property
    def support(self) -> tuple[float, float]:
        return self.sigma[0], self.sigma[-1]

    def draw(self, u: Tensor) -> Tensor:
        place, density, cdf = (v.to(u.device) for v in self._table)
        wanted = u.double()
        right = torch.searchsorted(cdf, wanted).clamp(1, len(cdf) - 1)
        left = right - 1
        a, width = density[left], place[right] - place[left]
        # The mass a s + slope s^2 / 2 passed since the knot is solved for s in the form that cannot cancel.
        slope, passed = (density[right] - a) / width, wanted - cdf[left]
        s = 2 * passed / (a + (a.square() + 2 * slope * passed).clamp(min=0).sqrt())
        return (place[left] + torch.minimum(s, width)).exp().to(u)

    def density(self, sigma: Tensor) -> Tensor:
        place, density, _ = (v.to(sigma.device) for v in self._table)
        at = sigma.double().log()
        inside = (at >= place[0] - 1e-6) & (at <= place[-1] + 1e-6)
        right = torch.searchsorted(place, at).clamp(1, len(place) - 1)
        share = ((at - place[right - 1]) / (place[right] - place[right - 1])).clamp(0, 1)
        return (inside * torch.lerp(density[right - 1], density[right], share)).to(sigma)
