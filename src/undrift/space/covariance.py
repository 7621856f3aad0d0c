r"""Spectra of noise on functions: variances :math:`\lambda_j = \lambda(\mu_j)` of the modes of a basis.

:math:`C = \sum_j \lambda_j\, \phi_j \otimes \phi_j` is the covariance of a random function only if it is trace class,
:math:`\sum_j \lambda_j < \infty`: then :math:`E\|u\|^2 = \operatorname{tr} C` on every grid. White noise on pixels is
not such a function. Its total variance is fixed by the grid, so that of any one mode falls as the grid gets finer, and
what a noise level means changes with it.

Every spectrum is scaled by its ``variance``, :math:`\operatorname{tr} C` over *all* modes, which for the unit cube is
the mean over the domain of the pointwise variance. Sums over all modes are taken by Mellin's integral

.. math:: \sum_j (\kappa^2 + \mu_j)^{-\alpha}
    = \frac1{\Gamma(\alpha)} \int_0^\infty s^{\alpha-1} e^{-\kappa^2 s}\, \theta(s)^d\, ds, \qquad
    \theta(s) = \sum_j e^{-s \mu_j} \text{ (one axis)},

whose end at 0, where theta is known in closed form, tells whether the sum is finite.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from undrift.space.basis import Basis

__all__ = ["Covariance", "EmpiricalSpectrum", "HeatKernel", "Matern", "PowerLaw"]


class Covariance(ABC):
    """Base of all spectra: immutable, and a function of the Laplacian's eigenvalues."""

    @abstractmethod
    def check(self, basis: Basis) -> None:
        """Raise ValueError if this is not trace class in ``basis``."""

    @abstractmethod
    def variances(self, basis: Basis, grid: tuple[int, ...]) -> Tensor:
        """Variances lambda of the modes of a grid, in the order of its coefficients, (*grid), float64, positive."""


def _positive(owner: object, **values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{type(owner).__name__}: {name} must be positive and finite, got {value}.")


def _check_alpha(owner: object, alpha: float, basis: Basis) -> None:
    if not alpha > basis.dims / 2:
        raise ValueError(
            f"{type(owner).__name__}(alpha={alpha:g}) is not trace class in {basis.dims} "
            f"dimension{'s' * (basis.dims > 1)}: its variances sum to infinity, so no function has this noise, and a "
            f"finer grid would only show more of it. alpha must exceed d/2 = {basis.dims / 2:g}."
        )


@dataclass(frozen=True)
class Matern(Covariance):
    r"""Matern's (or Whittle's) spectrum, :math:`\lambda \propto (\kappa^2 + \mu)^{-\alpha}`.

    Draws have almost :math:`\alpha - d/2` derivatives in the mean square, and correlation length of order 1/kappa.

    Args:
        alpha: decay; trace class where alpha > d/2.
        kappa: inverse correlation length, in units of the domain.
        variance: sum of all variances.
    """

    alpha: float = 2.0
    kappa: float = 3.0
    variance: float = 1.0

    def __post_init__(self) -> None:
        _positive(self, alpha=self.alpha, kappa=self.kappa, variance=self.variance)

    def check(self, basis: Basis) -> None:
        _check_alpha(self, self.alpha, basis)

    def variances(self, basis: Basis, grid: tuple[int, ...]) -> Tensor:
        self.check(basis)
        shape = (self.kappa**2 + basis.eigenvalues(grid)).pow(-self.alpha)
        return shape * (self.variance / mellin_sum(basis, self.alpha, self.kappa))

    @classmethod
    def fit(cls, fields: Tensor, basis: Basis, smoothest: float = 4.0) -> Matern:
        """Least squares of the logarithm of the fields' own spectrum, every mode counted once.

        The total variance is matched exactly on the fields' grid.

        Args:
            fields: data (N, ..., *grid), N > 1; other axes are averaged over.
            basis: where to look at them.
            smoothest: largest alpha tried; the smallest is d/2 + 0.05. Noise much smoother than the data barely moves
                their highest modes, and rougher noise makes the posterior stiff.
        """
        measured = _spectrum(fields, basis)
        mu = basis.eigenvalues(measured.shape)
        log_kappa = torch.linspace(math.log(0.3), 0.5 * math.log(float(mu.max())), 60, dtype=torch.float64)
        kappa = log_kappa.exp()
        grid = tuple(measured.shape)
        y = measured.log().flatten()
        x = -(kappa.square().unsqueeze(1) + mu.flatten()).log()
        centred = x - x.mean(1, keepdim=True)
        alpha = (centred @ (y - y.mean())) / centred.square().sum(1)
        alpha = alpha.clamp(basis.dims / 2 + 0.05, smoothest)
        miss = (y - y.mean() - alpha.unsqueeze(1) * centred).square().sum(1)
        best = int(miss.argmin())
        unit = cls(float(alpha[best]), float(kappa[best]))
        return cls(unit.alpha, unit.kappa, float(measured.sum() / unit.variances(basis, grid).sum()))


@dataclass(frozen=True)
class PowerLaw(Covariance):
    r"""A power of the frequency, :math:`\lambda \propto \mu^{-\alpha}`.

    A constant mode, which has mu = 0, counts as one of the lowest others.

    Args:
        alpha: decay in mu, so 2 alpha in the wavenumber; trace class where alpha > d/2.
        variance: sum of all variances.
    """

    alpha: float = 2.0
    variance: float = 1.0

    def __post_init__(self) -> None:
        _positive(self, alpha=self.alpha, variance=self.variance)

    def check(self, basis: Basis) -> None:
        _check_alpha(self, self.alpha, basis)

    def variances(self, basis: Basis, grid: tuple[int, ...]) -> Tensor:
        self.check(basis)
        first = basis.eigenvalues((3,) * basis.dims)
        lowest = float(first[first > 0].min())
        mu = basis.eigenvalues(grid).clamp(min=lowest)
        total = mellin_sum(basis, self.alpha, 0.0) + (lowest**-self.alpha if float(first.min()) == 0 else 0.0)
        return mu.pow(-self.alpha) * (self.variance / total)


@dataclass(frozen=True)
class HeatKernel(Covariance):
    r"""A Gaussian spectrum, :math:`\lambda \propto e^{-\ell^2 \mu/2}`: infinitely smooth draws.

    Args:
        length: correlation length l, in units of the domain.
        variance: sum of all variances.
        floor: least variance of a mode, relative to the greatest: past it the modes have in truth no noise, and nothing
            could divide by them. Modes at the floor are left out of the sum.
    """

    length: float = 0.1
    variance: float = 1.0
    floor: float = 1e-12

    def __post_init__(self) -> None:
        _positive(self, length=self.length, variance=self.variance, floor=self.floor)

    def check(self, basis: Basis) -> None:
        """Trace class in every dimension."""

    def variances(self, basis: Basis, grid: tuple[int, ...]) -> Tensor:
        s = torch.tensor(self.length**2 / 2, dtype=torch.float64)
        lowest = float(basis.eigenvalues((1,) * basis.dims))  # which may itself be damped to nothing
        shape = torch.exp(-s * (basis.eigenvalues(grid) - lowest))
        damped = float(s) * lowest / basis.dims
        axis = float(basis.heat_trace(s)) * math.exp(damped) if damped < 300 else 1.0
        return shape.clamp(min=self.floor) * (self.variance / axis**basis.dims)


@dataclass(frozen=True)
class EmpiricalSpectrum(Covariance):
    """The data's own spectrum on the modes it was measured on, and a Matern fit beyond them.

    Args:
        values: variances of the modes of the data's grid, flat.
        grid: that grid.
        tail: spectrum of the modes beyond.
    """

    values: tuple[float, ...]
    grid: tuple[int, ...]
    tail: Matern

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(float(v) for v in self.values))
        object.__setattr__(self, "grid", tuple(int(n) for n in self.grid))
        if not isinstance(self.tail, Matern):
            raise TypeError(f"EmpiricalSpectrum: tail must be a Matern, got a {type(self.tail).__name__}.")
        if len(self.values) != math.prod(self.grid) or not self.grid:
            raise ValueError(
                f"EmpiricalSpectrum: values must hold one number for each of the {math.prod(self.grid)} modes of the "
                f"grid {self.grid}, got {len(self.values)}."
            )
        if not all(math.isfinite(v) and v > 0 for v in self.values):
            raise ValueError("EmpiricalSpectrum: every variance must be positive and finite.")

    @classmethod
    def of(cls, fields: Tensor, basis: Basis, floor: float = 1e-2) -> EmpiricalSpectrum:
        """Measure the spectrum of data.

        Args:
            fields: data (N, ..., *grid), N > 1; other axes are averaged over.
            basis: where to look at them.
            floor: least variance of a mode, as a part of the Matern fit's: a mode that N fields happen to lack must not
                be one that noise cannot reach.
        """
        tail = Matern.fit(fields, basis)
        measured = _spectrum(fields, basis)
        grid = tuple(measured.shape)
        values = torch.maximum(measured, floor * tail.variances(basis, grid))
        return cls(tuple(values.flatten().tolist()), grid, tail)

    def check(self, basis: Basis) -> None:
        if len(self.grid) != basis.dims:
            raise ValueError(
                f"EmpiricalSpectrum: was measured on the grid {self.grid}, the basis has {basis.dims} dimension"
                f"{'s' * (basis.dims > 1)}."
            )
        self.tail.check(basis)

    def variances(self, basis: Basis, grid: tuple[int, ...]) -> Tensor:
        self.check(basis)
        out = self.tail.variances(basis, grid)
        both = tuple(slice(min(n, m)) for n, m in zip(grid, self.grid, strict=True))
        out[both] = torch.tensor(self.values, dtype=torch.float64).reshape(self.grid)[both]
        return out


def _spectrum(fields: Tensor, basis: Basis) -> Tensor:
    """Variances of the coefficients of fields (N, ..., *grid) about their mean, (*grid), float64."""
    if fields.ndim < basis.dims + 1 or fields.shape[0] < 2:
        raise ValueError(
            f"a spectrum is measured on fields (N, ..., *grid) with N > 1 and a grid of {basis.dims} axes, "
            f"got shape {tuple(fields.shape)}."
        )
    measured = basis.analyse(fields.double()).var(0)
    measured = measured.reshape(-1, *basis.grid(fields.shape)).mean(0)
    if not bool(measured.isfinite().all()):
        raise ValueError("a spectrum is measured on finite fields; these hold values that are not.")
    if measured.numel() < 2 or float(measured.max()) == 0:
        raise ValueError(
            f"a spectrum is measured on fields that differ, of two modes or more; these {fields.shape[0]} of shape "
            f"{tuple(fields.shape[1:])} do not."
        )
    return measured.clamp(min=1e-12 * float(measured.max()))


def mellin_sum(basis: Basis, alpha: float, kappa: float, split: float = 1e-3) -> float:
    """Sum of (kappa^2 + mu_j)^-alpha over all modes of the basis; without the constant mode if kappa = 0.

    Args:
        basis: whose modes.
        alpha: exponent, above d/2.
        kappa: as in Matern; or 0.
        split: where the integral over s, by the trapezoidal rule in log s, hands over to the closed form at small s.
    """
    from scipy.special import gammainc

    d, constant = basis.dims, float(float(basis.eigenvalues((1,) * basis.dims)) == 0 and kappa == 0)
    a, b = basis.small_heat_trace()

    def below(p: float) -> float:
        """Integral of s^(p-1) exp(-kappa^2 s) from 0 to split."""
        if kappa == 0:
            return split**p / p
        return math.gamma(p) * float(gammainc(p, kappa**2 * split)) / kappa ** (2 * p)

    near = sum(math.comb(d, k) * a ** (d - k) * b**k * below(alpha - k / 2) for k in range(d + 1))
    near -= constant * below(alpha)
    rest: Any = torch.linspace(math.log(split), math.log(400.0 / min(1.0, kappa**2 or 1.0)), 4001, dtype=torch.float64)
    s = rest.exp()
    value = (alpha * rest - kappa**2 * s).exp() * (basis.heat_trace(s) ** d - constant)
    far = float(torch.trapezoid(value, rest))
    # the trapezoidal rule's error at the end where the integrand does not vanish, by Euler and Maclaurin
    step = float(rest[1] - rest[0])
    far += step**2 / 12 * float((value[1] - value[0]) / step - 0.5 * (value[2] - 2 * value[1] + value[0]) / step)
    return (near + far) / math.gamma(alpha)
