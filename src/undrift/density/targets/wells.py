r"""Wells: barriers of known height, with exact draws.

For one double well :math:`\gamma(x) = \exp(-(x^2 - \delta)^2 + c x)`, and :math:`s = \sqrt\delta`,

.. math::
    (x^2 - \delta)^2 = (x \mp s)^2 (x \pm s)^2 \ge s^2 (x \mp s)^2 \quad \text{where } \pm x \ge 0,

so a Gaussian in each well, of variance :math:`1 / 2 s^2` and tilted by cx, dominates it: exact draws by rejection.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from scipy import integrate, special
from torch import Tensor

from undrift.density.target import Target, TargetError
from undrift.density.targets.shapes import normal, uniform

__all__ = ["DoubleWell", "ManyWell"]

_LOG_2PI = math.log(2 * math.pi)


def _well_draws(count: int, delta: float, tilt: float, generator: torch.Generator) -> Tensor:
    """Exact draws (count,) of exp(-(x^2 - delta)^2 + tilt x), by rejection."""
    s = math.sqrt(delta)
    out = torch.full((count,), math.nan, dtype=torch.float64, device=generator.device)
    left = torch.arange(count, device=generator.device)
    right = 1 / (1 + math.exp(-2 * tilt * s))
    while len(left):
        side = torch.where(uniform(generator, len(left)) < right, 1.0, -1.0).double()
        x = side * s + tilt / (2 * s * s) + normal(generator, len(left)) / (math.sqrt(2) * s)
        excess = (x - side * s).square() * ((x + side * s).square() - s * s)
        keep = (x * side > 0) & (uniform(generator, len(left)) < (-excess).exp())
        out[left[keep]] = x[keep]
        left = left[~keep]
    return out


@dataclass(frozen=True, eq=False)
class DoubleWell(Target):
    r"""m double wells beside Gaussians: :math:`\prod_{i<m} e^{-((x_i - c)^2 - \delta)^2} \prod_{i \ge m} e^{-x_i^2/2}`.

    2^m modes of equal weight. d = m = 5 with delta = 4, and d = 50, m = 5 with delta = 2, in Richter & Berner, Improved
    sampling via learned diffusions (arXiv 2307.01198). With the modified Bessel functions I,

    .. math::
        Z = Z_1^m (2\pi)^{(d-m)/2}, \qquad
        Z_1 = \tfrac{\pi}{2} \sqrt\delta\, e^{-\delta^2/2} \bigl[I_{-1/4}(\delta^2/2) + I_{1/4}(\delta^2/2)\bigr].

    Args:
        dim: d.
        wells: m.
        delta: square of the distance of a well from the centre; the barrier is delta^2 nats.
        shift: c, the centre.
    """

    dim: int = 5
    wells: int = 5
    delta: float = 4.0
    shift: float = 0.0
    exact = True

    def __post_init__(self) -> None:
        if not 1 <= self.wells <= self.dim:
            raise TargetError(
                f"DoubleWell: wells must lie between 1 and dim, got {self.wells} of {self.dim} coordinates."
            )
        if not self.delta > 0:
            raise TargetError(f"DoubleWell: delta must be positive, got {self.delta}.")

    @property
    def log_z(self) -> float:  # type: ignore[override]
        """-0.5410555 for (5, 5, 4); 42.8172427 for (50, 5, 2); 40.8111785 for (50, 5, 4)."""
        half = self.delta**2 / 2
        bessel = special.ive(-0.25, half) + special.ive(0.25, half)
        one = math.log(math.pi / 2 * math.sqrt(self.delta) * float(bessel))
        return self.wells * one + 0.5 * (self.dim - self.wells) * _LOG_2PI

    @cached_property
    def modes(self) -> Tensor | None:
        """Bottoms of the wells, (2^m, d), in binary order; None for m > 10."""
        if self.wells > 10:
            return None
        ends = torch.tensor([-1.0, 1.0], dtype=torch.float64) * math.sqrt(self.delta)
        corners = torch.cartesian_prod(*self.wells * [ends]).reshape(-1, self.wells) + self.shift
        return torch.cat([corners, corners.new_zeros(len(corners), self.dim - self.wells)], -1)

    @property
    def mode_weights(self) -> Tensor | None:
        """2^-m each; None for m > 10."""
        if self.wells > 10:
            return None
        return torch.full((2**self.wells,), 0.5**self.wells, dtype=torch.float64)

    def assign(self, x: Tensor) -> Tensor:
        """The well of each point, by the signs of its coordinates about the centre: (n, d) -> (n,) integers."""
        powers = 2 ** torch.arange(self.wells - 1, -1, -1, device=x.device)
        return ((x[:, : self.wells] > self.shift) * powers).sum(-1)

    def _log_density(self, x: Tensor) -> Tensor:
        off = (x[:, : self.wells] - self.shift).square() - self.delta
        return -off.square().sum(-1) - 0.5 * x[:, self.wells :].square().sum(-1)

    def _gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x[:, : self.wells] - self.shift
        off = y.square() - self.delta
        value = -off.square().sum(-1) - 0.5 * x[:, self.wells :].square().sum(-1)
        return value, torch.cat([-4 * y * off, -x[:, self.wells :]], -1)

    def _draw(self, n: int, generator: torch.Generator) -> Tensor:
        x = normal(generator, n, self.dim)
        x[:, : self.wells] = _well_draws(n * self.wells, self.delta, 0.0, generator).reshape(n, -1) + self.shift
        return x


@dataclass(frozen=True, eq=False)
class ManyWell(Target):
    r"""d/2 uneven double wells, one for each pair (u, v): :math:`\exp(u/2 + 6 u^2 - u^4 - v^2/2)`.

    Pairs are (x_0, x_1), (x_2, x_3), ... Midgley et al., Flow Annealed Importance Sampling Bootstrap (arXiv
    2208.01893), with d = 32: 65 536 modes. In each pair the well at u > 0 has the share 0.8443071 of the mass,
    :math:`\int \exp(u/2 + 6u^2 - u^4) du = 11784.509265`, and u has mean 1.18796098 and mean square 2.95980609 (by
    quadrature).

    Args:
        dim: d, even.
    """

    dim: int = 32
    exact = True

    def __post_init__(self) -> None:
        if self.dim < 2 or self.dim % 2:
            raise TargetError(f"ManyWell: dim must be even, at least 2, got {self.dim}.")

    @cached_property
    def log_z(self) -> float:  # type: ignore[override]
        """164.6956753 for d = 32."""
        one = integrate.quad(lambda u: math.exp(u / 2 + 6 * u**2 - u**4), -6, 6, epsrel=1e-13, epsabs=0)[0]
        return 0.5 * self.dim * (math.log(one) + 0.5 * _LOG_2PI)

    def _log_density(self, x: Tensor) -> Tensor:
        u, v = x[:, ::2], x[:, 1::2]
        square = u.square()
        return (0.5 * u + square * (6 - square) - 0.5 * v.square()).sum(-1)

    def _gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        u, v = x[:, ::2], x[:, 1::2]
        square = u.square()
        score = torch.empty_like(x)
        score[:, ::2] = 0.5 + u * (12 - 4 * square)
        score[:, 1::2] = -v
        return (0.5 * u + square * (6 - square) - 0.5 * v.square()).sum(-1), score

    def _draw(self, n: int, generator: torch.Generator) -> Tensor:
        x = normal(generator, n, self.dim)
        x[:, ::2] = _well_draws(n * self.dim // 2, 3.0, 0.5, generator).reshape(n, -1)  # 6u^2 - u^4 = 9 - (u^2 - 3)^2
        return x
