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
from typing import Any, ClassVar, Literal

from undrift.density.law import Base, Normal, positive
from undrift.density.level import Level, LevelDensity
from undrift.density.target import Target

__all__ = ["Dilation", "Direct", "Geometric", "Path", "Spacing", "TemperedDilation", "Tilt"]


class Path(ABC):
    """A path of densities; its parameter u runs from 0 (start) to 1 (target)."""

    constant_normaliser: ClassVar[bool] = False
    """Whether all levels have one normaliser in y: incremental weights have mean 1 then, and only test the sampler."""

    @property
    @abstractmethod
    def law(self) -> Base:
        """The base law nu."""

    @property
    def start(self) -> Base:
        """The law that walkers start from, in y; level 0 is reached from it by importance weights."""
        return self.law

    @abstractmethod
    def level(self, u: float) -> Level:
        """The row at u in [0, 1]."""

    def density(self, target: Target, u: float) -> LevelDensity:
        """Density of the level u, in y."""
        row = self.level(u)
        return LevelDensity(target, self.law, row.exponent, row.base)


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
        positive(self, tail=self.tail)

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
        positive(self, first=self.first, last=self.last)

    @property
    def law(self) -> Base:
        return Normal()  # to the power kappa: exp(-kappa |y|^2 / 2) up to a constant, which is gone at kappa = 0

    @property
    def start(self) -> Base:
        return Normal(self.first**-0.5)

    def level(self, u: float) -> Level:
        return Level(1.0, 0.0 if u >= 1 else self.first ** (1.0 - u) * self.last**u)
