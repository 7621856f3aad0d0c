"""Shapes that are hard to sample though their integrals are known: funnel, bananas, rings."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from undrift.density.target import Target, TargetError

__all__ = ["Banana", "Funnel", "Rings", "Rosenbrock"]

_LOG_2PI = math.log(2 * math.pi)


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float64, device=generator.device).normal_(generator=generator)


def uniform(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64, device=generator.device, generator=generator)


@dataclass(frozen=True, eq=False)
class Funnel(Target):
    r"""Neal's funnel: :math:`x_0 \sim N(0, s^2)`, and :math:`x_i \sim N(0, e^{x_0})` for the others.

    Neal, Slice sampling (Annals of Statistics 31, 2003), section 8, with s = 3 and ten coordinates, where
    :math:`E|x|^2 = 9 + 9 e^{4.5} = 819.154`.

    Args:
        dim: d.
        scale: s, the deviation of x_0.
    """

    dim: int = 10
    scale: float = 3.0
    log_z = 0.0
    exact = True

    def __post_init__(self) -> None:
        if self.dim < 2 or not self.scale > 0:
            raise TargetError(f"Funnel: dim must be at least 2 and scale positive, got {self.dim} and {self.scale}.")

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log gamma, e^-x0, and half the sum of the others' squares over their variance."""
        precision = (-x[:, 0]).exp()
        energy = 0.5 * precision * x[:, 1:].square().sum(-1)
        constant = 0.5 * self.dim * _LOG_2PI + math.log(self.scale)
        neck = 0.5 * (x[:, 0] / self.scale).square() + 0.5 * (self.dim - 1) * x[:, 0]
        return -neck - energy - constant, precision, energy

    def _log_density(self, x: Tensor) -> Tensor:
        return self._parts(x)[0]

    def _gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        value, precision, energy = self._parts(x)
        score = -precision.unsqueeze(-1) * x
        score[:, 0] = energy - x[:, 0] / self.scale**2 - 0.5 * (self.dim - 1)
        return value, score

    def _draw(self, n: int, generator: torch.Generator) -> Tensor:
        x = normal(generator, n, self.dim)
        x[:, 0] *= self.scale
        x[:, 1:] *= (0.5 * x[:, :1]).exp()
        return x


@dataclass(frozen=True, eq=False)
class Banana(Target):
    r"""A bent Gaussian: :math:`x_0 \sim N(0, s^2),\ x_1 \sim N(b (x_0^2 - s^2), 1)`, the rest N(0, 1).

    Haario, Saksman & Tamminen, Adaptive proposal distribution for random walk Metropolis algorithm (Computational
    Statistics 14, 1999), whose s = 10 and b = .03 ("mildly") or .1 ("strongly twisted"), up to the sign of x_1.

    Args:
        dim: d.
        scale: s, the deviation of x_0.
        bend: b.
    """

    dim: int = 2
    scale: float = 10.0
    bend: float = 0.1
    log_z = 0.0
    exact = True

    def __post_init__(self) -> None:
        if self.dim < 2 or not self.scale > 0:
            raise TargetError(f"Banana: dim must be at least 2 and scale positive, got {self.dim} and {self.scale}.")

    def _straight(self, x: Tensor) -> Tensor:
        """x_1 without its bend, (n,)."""
        return x[:, 1] - self.bend * (x[:, 0].square() - self.scale**2)

    def _log_density(self, x: Tensor) -> Tensor:
        squares = (x[:, 0] / self.scale).square() + self._straight(x).square() + x[:, 2:].square().sum(-1)
        return -0.5 * (squares + self.dim * _LOG_2PI) - math.log(self.scale)

    def _gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self._straight(x)
        score = -x
        score[:, 0] = -x[:, 0] / self.scale**2 + 2 * self.bend * x[:, 0] * y
        score[:, 1] = -y
        return self._log_density(x), score

    def _draw(self, n: int, generator: torch.Generator) -> Tensor:
        x = normal(generator, n, self.dim)
        x[:, 0] *= self.scale
        x[:, 1] += self.bend * (x[:, 0].square() - self.scale**2)
        return x


@dataclass(frozen=True, eq=False)
class Rosenbrock(Target):
    r"""Rosenbrock's valley, for each pair (u, v): :math:`\exp\bigl(-[(a - u)^2 + b (v - u^2)^2] / T\bigr)`.

    Pairs are (x_0, x_1), (x_2, x_3), ...
    With a = 1, b = 100 and T = 20 and one pair, the density of Goodman & Weare, Ensemble samplers with affine
    invariance (Communications in Applied Mathematics and Computational Science 5, 2010), section 4.
    :math:`Z = (\pi T / \sqrt b)^{d/2}`.

    Args:
        dim: d, even.
        a: position of the valley's lowest point.
        b: steepness of its walls.
        temperature: T.
    """

    dim: int = 2
    a: float = 1.0
    b: float = 100.0
    temperature: float = 20.0
    exact = True

    def __post_init__(self) -> None:
        if self.dim < 2 or self.dim % 2:
            raise TargetError(f"Rosenbrock: dim must be even, at least 2, got {self.dim}.")
        if not (self.b > 0 and self.temperature > 0):
            raise TargetError(f"Rosenbrock: b and temperature must be positive, got {self.b} and {self.temperature}.")

    @property
    def log_z(self) -> float:  # type: ignore[override]
        """d/2 log(pi T / sqrt b)."""
        return 0.5 * self.dim * math.log(math.pi * self.temperature / math.sqrt(self.b))

    def _log_density(self, x: Tensor) -> Tensor:
        u, v = x[:, ::2], x[:, 1::2]
        return -((self.a - u).square() + self.b * (v - u.square()).square()).sum(-1) / self.temperature

    def _gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        u, v = x[:, ::2], x[:, 1::2]
        off = v - u.square()
        score = torch.empty_like(x)
        score[:, ::2] = (2 * (self.a - u) + 4 * self.b * u * off) / self.temperature
        score[:, 1::2] = -2 * self.b * off / self.temperature
        return self._log_density(x), score

    def _draw(self, n: int, generator: torch.Generator) -> Tensor:
        x = math.sqrt(self.temperature / 2) * normal(generator, n, self.dim)
        x[:, ::2] += self.a
        x[:, 1::2] = x[:, 1::2] / math.sqrt(self.b) + x[:, ::2].square()
        return x


@dataclass(frozen=True, eq=False)
class Rings(Target):
    r"""Rings in the plane: :math:`\exp(-\kappa \min_r (|x| - r)^2)`, without a mode to climb to.

    The density has a kink half-way between two rings. A ring's mass is known: between radii l and h it is
    :math:`2 \pi \int_l^h \rho\, e^{-\kappa (\rho - r)^2} d\rho`, an error function.

    Args:
        radii: r, increasing.
        sharpness: kappa; a ring has deviation 1 / sqrt(2 kappa).
    """

    radii: tuple[float, ...] = (1.0, 3.0, 5.0)
    sharpness: float = 100.0
    dim = 2
    exact = True

    def __post_init__(self) -> None:
        r = self.radii
        if not r or r[0] <= 0 or any(b <= a for a, b in itertools.pairwise(r)) or not self.sharpness > 0:
            raise TargetError(
                f"Rings: radii must be positive and increasing and sharpness positive, got {r} and {self.sharpness}."
            )

    @cached_property
    def _edges(self) -> list[float]:
        middle = [(a + b) / 2 for a, b in itertools.pairwise(self.radii)]
        return [0.0, *middle, math.inf]

    @cached_property
    def _masses(self) -> list[float]:
        k, out = self.sharpness, []
        for r, low, high in zip(self.radii, self._edges, self._edges[1:], strict=False):
            a, b = math.sqrt(k) * (low - r), math.sqrt(k) * (high - r)
            edges = (math.exp(-a * a) - math.exp(-b * b)) / (2 * k)
            out.append(2 * math.pi * (edges + r * math.sqrt(math.pi / k) * (math.erf(b) - math.erf(a)) / 2))
        return out

    @property
    def log_z(self) -> float:  # type: ignore[override]
        """2.3048815 for the default."""
        return math.log(sum(self._masses))

    @property
    def mode_weights(self) -> Tensor:
        """Share of each ring, (rings,)."""
        masses = torch.tensor(self._masses, dtype=torch.float64)
        return masses / masses.sum()

    def assign(self, x: Tensor) -> Tensor:
        """The nearest ring of each point: (n, 2) -> (n,) integers."""
        edges = torch.tensor(self._edges[1:-1], dtype=x.dtype, device=x.device)
        return torch.bucketize(x.norm(dim=-1), edges)

    def _distance(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """|x| and signed distance to the nearest ring, (n,)."""
        radius = x.norm(dim=-1)
        return radius, radius - torch.tensor(self.radii, dtype=x.dtype, device=x.device)[self.assign(x)]

    def _log_density(self, x: Tensor) -> Tensor:
        return -self.sharpness * self._distance(x)[1].square()

    def _gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        radius, off = self._distance(x)
        slope = -2 * self.sharpness * off / radius.clamp(min=torch.finfo(x.dtype).tiny)
        return -self.sharpness * off.square(), slope.unsqueeze(-1) * x

    def _draw(self, n: int, generator: torch.Generator) -> Tensor:
        # Propose a radius about each ring: rho e^(-kappa (rho - r)^2) is at most the upper edge times the Gaussian.
        device, scale = generator.device, 1 / math.sqrt(2 * self.sharpness)
        ring = torch.multinomial(self.mode_weights.to(device), n, replacement=True, generator=generator)
        r = torch.tensor(self.radii, dtype=torch.float64, device=device)[ring]
        low, high = (
            torch.tensor(e, dtype=torch.float64, device=device)[ring] for e in (self._edges[:-1], self._edges[1:])
        )
        bound = torch.minimum(high, r + 12 * scale)  # beyond it lies less than 1e-60 of the mass
        radius = torch.full_like(r, math.nan)
        left = torch.arange(n, device=device)
        while len(left):
            rho = r[left] + scale * normal(generator, len(left))
            keep = (rho >= low[left]) & (rho < high[left])
            keep &= uniform(generator, len(left)) * bound[left] < rho
            radius[left[keep]] = rho[keep]
            left = left[~keep]
        angle = 2 * math.pi * uniform(generator, n)
        return torch.stack([radius * angle.cos(), radius * angle.sin()], -1)
