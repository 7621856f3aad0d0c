r"""Clocks: how fast a process runs.

A clocked process has drift :math:`\beta(t) A` and noise :math:`\beta(t)\, 2 D`. Its transitions depend on time only
through the clock :math:`B(t) = \int_0^t \beta`, so a clock is that function together with its derivative.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from undrift._linalg import as_f64

__all__ = ["CallableClock", "Clock", "ConstantClock", "CosineClock", "GeometricClock", "LinearClock", "PowerClock"]

Number = float | Tensor


def number(value: Number) -> float:
    """The value of a parameter, for checks and messages; gradients stay where they are."""
    return float(value.detach()) if isinstance(value, Tensor) else float(value)


def _positive(name: str, owner: str, value: Number, strict: bool = True) -> None:
    v = number(value)
    if not math.isfinite(v) or v < 0 or (strict and v == 0):
        bound = "positive" if strict else "non-negative"
        raise ValueError(f"{owner}: {name} must be a finite {bound} number, got {v}.")


class Clock(ABC):
    """Base of all clocks. Times are float64 tensors of any shape; ``horizon`` is the end time T."""

    horizon: float

    @abstractmethod
    def beta(self, t: Tensor) -> Tensor:
        r"""Rate :math:`\beta(t)`, same shape as ``t``."""

    @abstractmethod
    def integral(self, t: Tensor) -> Tensor:
        r"""Clock :math:`B(t)`, same shape as ``t``, increasing."""


@dataclass(frozen=True, eq=False)
class ConstantClock(Clock):
    r""":math:`\beta(t) = \beta`, :math:`B = \beta t`."""

    rate: Number = 1.0
    horizon: float = 1.0

    def __post_init__(self) -> None:
        _positive("rate", "ConstantClock", self.rate)
        _positive("horizon", "ConstantClock", self.horizon)

    def beta(self, t: Tensor) -> Tensor:
        return as_f64(self.rate) * torch.ones_like(t)

    def integral(self, t: Tensor) -> Tensor:
        return as_f64(self.rate) * t


@dataclass(frozen=True, eq=False)
class LinearClock(Clock):
    r""":math:`\beta(t) = \beta_{min} + (\beta_{max} - \beta_{min})\, t / T` (Ho et al. 2020; Song et al. 2021)."""

    beta_min: Number = 0.1
    beta_max: Number = 20.0
    horizon: float = 1.0

    def __post_init__(self) -> None:
        _positive("beta_min", "LinearClock", self.beta_min, strict=False)
        _positive("beta_max", "LinearClock", self.beta_max)
        _positive("horizon", "LinearClock", self.horizon)

    def _slope(self) -> Tensor:
        return (as_f64(self.beta_max) - as_f64(self.beta_min)) / self.horizon

    def beta(self, t: Tensor) -> Tensor:
        return as_f64(self.beta_min) + self._slope() * t

    def integral(self, t: Tensor) -> Tensor:
        return (as_f64(self.beta_min) + 0.5 * self._slope() * t) * t


@dataclass(frozen=True, eq=False)
class CosineClock(Clock):
    r"""The cosine schedule: :math:`e^{-B/2} = \cos\frac{\pi}{2}\frac{t+s}{1+s} / \cos\frac{\pi}{2}\frac{s}{1+s}`.

    :math:`B` diverges at t = 1, so the horizon stays below it; the default leaves a signal of 0.0078.

    References:
        Nichol & Dhariwal, Improved Denoising Diffusion Probabilistic Models, 2021, eq. 17.
    """

    offset: Number = 0.008
    horizon: float = 0.995

    def __post_init__(self) -> None:
        _positive("offset", "CosineClock", self.offset, strict=False)
        if not 0 < self.horizon < 1:
            raise ValueError(
                f"CosineClock: horizon must lie in (0, 1), where the signal is not yet 0, got {self.horizon}."
            )

    def _angles(self, t: Tensor) -> tuple[Tensor, Tensor]:
        scale = 0.5 * math.pi / (1 + as_f64(self.offset))
        return scale * as_f64(self.offset), scale * t

    def beta(self, t: Tensor) -> Tensor:
        start, moved = self._angles(t)
        return math.pi / (1 + as_f64(self.offset)) * torch.tan(start + moved)

    def integral(self, t: Tensor) -> Tensor:
        start, moved = self._angles(t)
        return -2 * torch.log1p(-(2 * torch.sin(moved / 2) ** 2 + torch.tan(start) * torch.sin(moved)))


@dataclass(frozen=True, eq=False)
class PowerClock(Clock):
    r""":math:`B(t) = \sigma(t)^2`, :math:`\sigma(t) = \sigma_{max} (t/T)^\rho`: the clock of EDM's process.

    With ``exponent=1`` and ``horizon == sigma_max`` this is exactly :math:`\sigma(t) = t`; with ``exponent=7`` uniform
    times are EDM's rho = 7 noise levels (with :math:`\sigma_{min} = 0`).

    References:
        Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models, 2022, eq. 5.
    """

    sigma_max: Number = 80.0
    exponent: float = 1.0
    horizon: float = 80.0

    def __post_init__(self) -> None:
        for name in ("sigma_max", "exponent", "horizon"):
            _positive(name, "PowerClock", getattr(self, name))

    def beta(self, t: Tensor) -> Tensor:
        power = 2 * self.exponent
        return as_f64(self.sigma_max) ** 2 * power / self.horizon * (t / self.horizon) ** (power - 1)

    def integral(self, t: Tensor) -> Tensor:
        return (as_f64(self.sigma_max) * (t / self.horizon) ** self.exponent) ** 2


@dataclass(frozen=True, eq=False)
class GeometricClock(Clock):
    r""":math:`B(t) = \sigma_{min}^2 (\sigma_{max}/\sigma_{min})^{2t/T}`: Song's variance-exploding clock.

    It does not start at 0: the process it drives already carries :math:`\sigma_{min}` of noise at t = 0.

    References:
        Song et al., Score-Based Generative Modeling through Stochastic Differential Equations, 2021, eq. 30.
    """

    sigma_min: Number = 0.01
    sigma_max: Number = 50.0
    horizon: float = 1.0

    def __post_init__(self) -> None:
        for name in ("sigma_min", "sigma_max", "horizon"):
            _positive(name, "GeometricClock", getattr(self, name))
        low, high = number(self.sigma_min), number(self.sigma_max)
        if low >= high:
            raise ValueError(f"GeometricClock: sigma_min must be below sigma_max, got {low} >= {high}.")

    def _log_ratio(self) -> Tensor:
        return torch.log(as_f64(self.sigma_max) / as_f64(self.sigma_min))

    def beta(self, t: Tensor) -> Tensor:
        return 2 * self._log_ratio() / self.horizon * self.integral(t)

    def integral(self, t: Tensor) -> Tensor:
        return as_f64(self.sigma_min) ** 2 * torch.exp(2 * self._log_ratio() * t / self.horizon)


@dataclass(frozen=True, eq=False)
class CallableClock(Clock):
    r"""Any increasing, differentiable :math:`B(t)`; :math:`\beta = B'` by automatic differentiation unless given.

    Args:
        clock: maps a float64 tensor of times to :math:`B`, element by element, with torch operations.
        horizon: end time T.
        rate: optional closed form of :math:`\beta`; it is checked against :math:`B'` here, once.

    Raises:
        ValueError: if :math:`B` is not increasing on [0, T], or ``rate`` is not its derivative.
    """

    clock: Callable[[Tensor], Tensor]
    horizon: float = 1.0
    rate: Callable[[Tensor], Tensor] | None = field(default=None)

    def __post_init__(self) -> None:
        _positive("horizon", "CallableClock", self.horizon)
        t = torch.linspace(0.0, 1.0, 65, dtype=torch.float64)[1:] * self.horizon
        with torch.no_grad():
            b = self.clock(t)
        if b.shape != t.shape:
            raise ValueError(
                f"CallableClock: clock maps times {tuple(t.shape)} to {tuple(b.shape)}; it must keep the shape."
            )
        if not bool(torch.isfinite(b).all()) or bool((b.diff() <= 0).any()) or float(b[0]) < 0:
            raise ValueError(
                "CallableClock: clock must be finite, non-negative and strictly increasing on (0, horizon]."
            )
        if self.rate is not None:
            exact, given = self._derivative(t).detach(), self.rate(t).detach()
            miss = float(((given - exact).abs() / exact.abs().max()).max())
            if miss > 1e-6:
                raise ValueError(
                    f"CallableClock: rate differs from the derivative of clock by {miss:.2e} of its maximum."
                )

    def _derivative(self, t: Tensor) -> Tensor:
        keep = torch.is_grad_enabled() and self.clock(t).requires_grad  # through t, or a parameter of the function
        with torch.enable_grad():
            leaf = t if t.requires_grad else t.detach().requires_grad_(True)
            (rate,) = torch.autograd.grad(self.clock(leaf).sum(), leaf, create_graph=keep)
        return rate if keep else rate.detach()

    def beta(self, t: Tensor) -> Tensor:
        return self._derivative(t) if self.rate is None else self.rate(t)

    def integral(self, t: Tensor) -> Tensor:
        return self.clock(t)
