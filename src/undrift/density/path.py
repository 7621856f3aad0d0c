r"""Paths of densities from an easy law to the target. A path, too, is a table: three numbers a level.

In coordinates y, the level of parameter u in [0, 1] has the density

.. math::
    \pi_u(y) = \gamma(y)^{t(u)}\, \nu(y)^{b(u)}, \qquad x = s(u)\, y,

with the target :math:`\gamma`, a base law :math:`\nu`, an exponent t, a base exponent b and a scale s; u = 1 is the
target itself (t = 1, b = 0, s = 1). The paths of the literature are settings of it:

=================  ========  ===========  ======================  ============================================
path               t         b            s                       level in x
=================  ========  ===========  ======================  ============================================
geometric          beta      1 - beta     1                       :math:`\nu^{1-\beta} \gamma^\beta`
dilation           1         0            :math:`\sqrt\lambda`    :math:`\gamma(x / \sqrt\lambda)`
tempered dilation  lambda    0            :math:`\sqrt\lambda`    :math:`\gamma(x / \sqrt\lambda)^\lambda`
tilt               1         kappa        1                       :math:`\gamma(x)\, e^{-\kappa |x|^2 / 2}`
=================  ========  ===========  ======================  ============================================

A walker keeps its x from one level to the next, so y shrinks by :math:`s(u) / s(u')`. Only that ratio is ever
formed: the dilation path, integrated in y, is Langevin dynamics on the target with a shrink between the steps, and
overflows at no :math:`\lambda`. Everything is anchored at the origin and measured in the coordinates' unit:
see coordinates.py for another centre and scale.

References:
    Chehab & Korba, A Practical Diffusion Path for Sampling, 2024 (dilation).
    Neal, Annealed Importance Sampling, 2001 (geometric).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from undrift.density.target import Point, Target

__all__ = [
    "Base",
    "Dilation",
    "Direct",
    "Geometric",
    "Level",
    "LevelDensity",
    "Normal",
    "Path",
    "StudentT",
    "TemperedDilation",
    "Tilt",
]


# -- laws to start from ------------------------------------------------------------------------------------------------


class Base(ABC):
    """A law on R^d, for any d, with exact draws and a normalised density; isotropic about the origin."""

    std: float

    @abstractmethod
    def log_prob(self, y: Tensor) -> Tensor:
        """Log density at y (n, d): (n,)."""

    @abstractmethod
    def score(self, y: Tensor) -> Tensor:
        """Its gradient, (n, d)."""

    @abstractmethod
    def sample(self, n: int, dim: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        """n draws, (n, dim), on the generator's device."""

    @abstractmethod
    def smoothness(self, dim: int) -> float:
        """Largest curvature of -log density."""


def _positive(owner: object, **values: float) -> None:
    for name, value in values.items():
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{type(owner).__name__}: {name} must be positive, got {value}.")


def _noise(n: int, dim: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    return torch.empty(n, dim, dtype=dtype, device=generator.device).normal_(generator=generator)


@dataclass(frozen=True, eq=False)
class Normal(Base):
    """N(0, std^2 I)."""

    std: float = 1.0

    def __post_init__(self) -> None:
        _positive(self, std=self.std)

    def log_prob(self, y: Tensor) -> Tensor:
        constant = y.shape[-1] * (math.log(self.std) + 0.5 * math.log(2 * math.pi))
        return y.square().sum(-1) * (-0.5 / self.std**2) - constant

    def score(self, y: Tensor) -> Tensor:
        return y * (-1 / self.std**2)

    def sample(self, n: int, dim: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        return self.std * _noise(n, dim, generator, dtype)

    def smoothness(self, dim: int) -> float:
        return self.std**-2


@dataclass(frozen=True, eq=False)
class StudentT(Base):
    """Multivariate Student t about 0 with scale ``std`` and ``df`` degrees of freedom: for targets of heavy tails."""

    std: float = 1.0
    df: float = 4.0

    def __post_init__(self) -> None:
        _positive(self, std=self.std, df=self.df)

    def log_prob(self, y: Tensor) -> Tensor:
        d, nu = y.shape[-1], self.df
        constant = math.lgamma(0.5 * (nu + d)) - math.lgamma(0.5 * nu) - 0.5 * d * math.log(nu * math.pi * self.std**2)
        return constant - 0.5 * (nu + d) * (y.square().sum(-1) / (nu * self.std**2)).log1p()

    def score(self, y: Tensor) -> Tensor:
        d, nu = y.shape[-1], self.df
        return y * (-(nu + d) / (nu * self.std**2 + y.square().sum(-1, keepdim=True)))

    def sample(self, n: int, dim: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        noise = _noise(n, dim, generator, dtype)
        shape = torch.full((n, 1), 0.5 * self.df, dtype=dtype, device=generator.device)
        chi = 2 * torch._standard_gamma(shape, generator=generator)
        return self.std * noise * (self.df / chi).sqrt()

    def smoothness(self, dim: int) -> float:
        return (self.df + dim) / (self.df * self.std**2)


# -- levels ------------------------------------------------------------------------------------------------------------


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


def _times(factor: float | Tensor, value: Tensor) -> Tensor:
    """factor * value, and 0 where the factor is 0, even if the value is infinite."""
    if isinstance(factor, Tensor):
        return torch.where(factor == 0, torch.zeros_like(value), factor * value)
    return torch.zeros_like(value) if factor == 0 else value if factor == 1 else factor * value


def _column(factor: float | Tensor) -> float | Tensor:
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
        value = _times(self.exponent, point.log_prob)
        if isinstance(self.base, Tensor) or self.base != 0:
            value = value + _times(self.base, self.law.log_prob(point.x))
        return value

    def score(self, point: Point) -> Tensor:
        """grad log pi_u, (n, d)."""
        score = _times(_column(self.exponent), point.score)
        if isinstance(self.base, Tensor) or self.base != 0:
            score = score + _times(_column(self.base), self.law.score(point.x))
        return score

    def smoothness(self, of_target: float) -> Any:
        """L of the level for a target of smoothness L: t L + b L_nu."""
        return self.exponent * of_target + self.base * self.law.smoothness(self.target.dim)


class Path(ABC):
    """A path of densities; its parameter u runs from 0 (start) to 1 (target)."""

    constant_normaliser: ClassVar[bool] = False
    """Whether all levels have one normaliser in y: incremental weights have mean 1 then, and only test the sampler."""

    @property
    @abstractmethod
    def law(self) -> Base:
        """The base law nu."""

    @property
    @abstractmethod
    def start(self) -> Base:
        """The law that walkers start from, in y; level 0 is reached from it by importance weights."""

    @abstractmethod
    def level(self, u: float) -> Level:
        """The row at u in [0, 1]."""

    def density(self, target: Target, u: float) -> LevelDensity:
        """Density of the level u, in y."""
        row = self.level(u)
        return LevelDensity(target, self.law, row.exponent, row.base)

    @property
    def scales(self) -> bool:
        """Whether y changes between levels, so that weights cost evaluations."""
        return self.level(0.0).log_scale != 0.0


@dataclass(frozen=True, eq=False)
class Direct(Path):
    """No path: every level is the target. Langevin dynamics, MCMC and plain importance sampling start here.

    Args:
        base: law that walkers start from.
    """

    base: Base = field(default_factory=Normal)

    @property
    def law(self) -> Base:
        return self.base

    @property
    def start(self) -> Base:
        return self.base

    def level(self, u: float) -> Level:
        return Level(1.0, 0.0)


@dataclass(frozen=True, eq=False)
class Geometric(Path):
    r""":math:`\nu^{1-\beta} \gamma^\beta`, beta = u: the usual path of AIS, SMC and parallel tempering.

    Args:
        base: nu; its scale must cover the target, or modes are lost without a trace.
    """

    base: Base = field(default_factory=Normal)

    @property
    def law(self) -> Base:
        return self.base

    @property
    def start(self) -> Base:
        return self.base

    def level(self, u: float) -> Level:
        return Level(u, 1.0 - u)


Spacing = Literal["linear", "quadratic", "log"]


def _dilate(u: float, first: float, floor: float, spacing: Spacing) -> float:
    """lambda(u): from ``first`` to 1, clipped from below at ``floor``."""
    if spacing == "log":
        value = first ** (1.0 - u)
    else:
        value = (first + (1.0 - first) * u) if spacing == "linear" else (first**0.5 + (1.0 - first**0.5) * u) ** 2
    return max(value, floor)


def _check_dilation(path: Any) -> None:
    if not 0 < path.first <= 1:
        raise ValueError(f"{type(path).__name__}: first is lambda at the start, in (0, 1], got {path.first}.")
    if not 0 <= path.floor <= 1:
        raise ValueError(f"{type(path).__name__}: floor clips lambda from below, in [0, 1], got {path.floor}.")
    if path.spacing not in ("linear", "quadratic", "log"):
        raise ValueError(f"{type(path).__name__}: spacing must be linear, quadratic or log, got {path.spacing!r}.")


@dataclass(frozen=True, eq=False)
class Dilation(Path):
    r"""The law of :math:`\sqrt\lambda X`, density :math:`\lambda^{-d/2} \pi(x / \sqrt\lambda)`: from Dirac to target.

    Its score is closed, its mode weights are those of the target at every level, and so are its barriers: an exact
    sampler gains nothing by it. Steps that are too long for the early levels heat the walkers, and that is what makes
    it a cheap explorer; mode weights of what it finds are not to be trusted.

    Args:
        first: lambda at u = 0.
        floor: lower clip of lambda.
        spacing: of lambda in u.
        base: law of the start, in y (that is, of :math:`x / \sqrt{\lambda_0}`).

    References:
        Chehab & Korba 2024. The schedule and the step rule of the paper could not be verified; ours are named by what
        they do.
    """

    constant_normaliser: ClassVar[bool] = True

    first: float = 1e-3
    floor: float = 0.0
    spacing: Spacing = "linear"
    base: Base = field(default_factory=Normal)

    def __post_init__(self) -> None:
        _check_dilation(self)

    @property
    def law(self) -> Base:
        return self.base

    @property
    def start(self) -> Base:
        return self.base

    def level(self, u: float) -> Level:
        return Level(1.0, 0.0, 0.5 * math.log(_dilate(u, self.first, self.floor, self.spacing)))


@dataclass(frozen=True, eq=False)
class TemperedDilation(Path):
    r""":math:`\gamma(x / \sqrt\lambda)^\lambda`: what some codes run as dilation. One step size fits all.

    Walkers start from N(0, tail^2 I) in x, where the first level of a target with Gaussian tails is near that law.

    Args:
        first: lambda at u = 0.
        floor: lower clip of lambda.
        spacing: of lambda in u.
        tail: width of the target's tails, or of its widest mode.
    """

    first: float = 1e-3
    floor: float = 0.0
    spacing: Spacing = "linear"
    tail: float = 1.0

    def __post_init__(self) -> None:
        _check_dilation(self)
        _positive(self, tail=self.tail)

    @property
    def law(self) -> Base:
        return self.start

    @property
    def start(self) -> Base:
        return Normal(self.tail * math.exp(-self.level(0.0).log_scale))

    def level(self, u: float) -> Level:
        value = _dilate(u, self.first, self.floor, self.spacing)
        return Level(value, 0.0, 0.5 * math.log(value))


@dataclass(frozen=True, eq=False)
class Tilt(Path):
    r""":math:`\gamma(y)\, e^{-\kappa |y|^2 / 2}`, kappa falling log-linearly, then 0: dilation's spring, made explicit.

    Dilation in y is Langevin dynamics on this tilted target with :math:`\kappa = \frac12 d \log\lambda / d\tau`; here
    kappa is chosen, and lambda never formed. Modes that are not connected through the centre are missed.

    Args:
        first: kappa at u = 0, in units of 1 / y^2: 10 to 100 times the target's smoothness L.
        last: kappa just before u = 1: about 1e-4 L.
    """

    first: float = 100.0
    last: float = 1e-4

    def __post_init__(self) -> None:
        _positive(self, first=self.first, last=self.last)

    @property
    def law(self) -> Base:
        return Normal()  # to the power kappa: exp(-kappa |y|^2 / 2) up to a constant, which is gone at kappa = 0

    @property
    def start(self) -> Base:
        return Normal(self.first**-0.5)

    def level(self, u: float) -> Level:
        return Level(1.0, 0.0 if u >= 1 else self.first ** (1.0 - u) * self.last**u)
