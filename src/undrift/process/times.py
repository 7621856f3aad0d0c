r"""Densities over time, for integrals along a process: which times to visit, and with what weight.

The path term of the evidence bound is an integral over time whose integrand grows like 1/t near the data. Visited with
a density p(t) close to it in shape, it costs far less variance than uniformly:

* :class:`InformationTimes`: :math:`p \propto \mathrm{tr}(GG^\top S_t^{-1})`, twice the expected squared norm of the
  kernel's score per coordinate. Its distribution function is closed for every linear process,
  :math:`\ln\det S_t - 2 \ln|\det\Phi(0, t)|` up to constants, since :math:`\frac{d}{dt} \ln\det S_t = 2\,\mathrm{tr} F
  + \mathrm{tr}(GG^\top S_t^{-1})` and, by Liouville, :math:`\ln\det\Phi = \int \mathrm{tr} F`. For VP this is
  :math:`\beta/(1 - e^{-B})`.
* :class:`LogSnrTimes`: :math:`\ln \sigma(t)` uniform, the natural variable of a denoiser.
* :class:`UniformTimes`.

Any positive density leaves an estimate unbiased, so none needs a derivative in the process.

References:
    Song et al., Maximum Likelihood Training of Score-Based Diffusion Models, 2021, section 5.1 (VP's density).
    Kingma et al., Variational Diffusion Models, 2021, appendix I.1 (stratified times).
"""

from __future__ import annotations

import math
import weakref
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from undrift.process.linear import LinearProcess

__all__ = ["InformationTimes", "LogSnrTimes", "TimeDensity", "UniformTimes", "earliest"]


class TimeDensity(ABC):
    """Base of all densities over the times of a process."""

    @abstractmethod
    def draw(self, process: LinearProcess, t_min: float, u: Tensor) -> tuple[Tensor, Tensor]:
        """Times on [t_min, T] from uniforms.

        Args:
            process: whose times.
            t_min: earliest time, in (0, T).
            u: uniforms in [0, 1], float64, any shape.

        Returns:
            Times and their density (per unit of time), float64, shape of ``u``, without gradients.

        Raises:
            ValueError: if ``t_min`` does not lie in (0, T).
        """


def _check(process: LinearProcess, t_min: float) -> None:
    if not 0 < t_min < process.horizon:
        raise ValueError(
            f"t_min must lie in (0, {process.horizon:g}), between the data and the end of {type(process).__name__}, "
            f"got {t_min:g}."
        )


@dataclass(frozen=True, eq=False)
class UniformTimes(TimeDensity):
    """Uniform on [t_min, T]."""

    def draw(self, process: LinearProcess, t_min: float, u: Tensor) -> tuple[Tensor, Tensor]:
        _check(process, t_min)
        span = process.horizon - t_min
        return t_min + span * u, torch.full_like(u, 1 / span)


@dataclass(frozen=True, eq=False)
class _Tabulated(TimeDensity):
    """Draws by inverting a tabulated distribution function C, known together with its slope.

    Cubic Hermite interpolation of ln t in C. What is returned as density is the interpolant's own derivative, so a
    coarse table makes the density less than ideal and never wrong.

    Args:
        points: size of the table, log-spaced in t.
    """

    points: int = 256
    _tables: weakref.WeakKeyDictionary[LinearProcess, tuple[object, Tensor]] = field(
        default_factory=weakref.WeakKeyDictionary, init=False, repr=False
    )

    def __post_init__(self) -> None:
        if self.points < 8:
            raise ValueError(f"{type(self).__name__}: points must be at least 8, got {self.points}.")

    @abstractmethod
    def measure(self, process: LinearProcess, t: Tensor) -> tuple[Tensor, Tensor]:
        """C at times t (N,), up to a constant and a factor, and dC/dt > 0."""

    def _table(self, process: LinearProcess, t_min: float) -> Tensor:
        """Rows (ln t, C in [0, 1], d ln t / dC), kept until the process's parameters change; (3, points)."""
        key = (t_min, _state(process))
        if process not in self._tables or self._tables[process][0] != key:
            with torch.no_grad():
                log_t = torch.linspace(math.log(t_min), math.log(process.horizon), self.points, dtype=torch.float64)
                t = log_t.exp().clamp(max=process.horizon)
                c, rate = self.measure(process, t)
                total = c[-1] - c[0]
                self._tables[process] = (key, torch.stack([log_t, (c - c[0]) / total, total / (t * rate)]))
        return self._tables[process][1]

    def draw(self, process: LinearProcess, t_min: float, u: Tensor) -> tuple[Tensor, Tensor]:
        _check(process, t_min)
        log_t, c, slope = self._table(process, t_min)
        i = torch.searchsorted(c, u.contiguous()).clamp(1, self.points - 1)
        width, rise = c[i] - c[i - 1], log_t[i] - log_t[i - 1]
        s = ((u - c[i - 1]) / width).clamp(0, 1)
        # Slopes within [0, 3] times the secant keep a cubic monotone (Fritsch & Carlson 1980).
        left = torch.minimum(slope[i - 1] * width, 3 * rise)
        right = torch.minimum(slope[i] * width, 3 * rise)
        bend_left, bend_right = left - rise, right - rise
        value = log_t[i - 1] + s * rise + s * (1 - s) * ((1 - s) * bend_left - s * bend_right)
        rate = rise + (1 - 4 * s + 3 * s.square()) * bend_left + (3 * s.square() - 2 * s) * bend_right
        t = value.exp().clamp(t_min, process.horizon)
        return t, width / (rate * t)


@dataclass(frozen=True, eq=False)
class InformationTimes(_Tabulated):
    r"""Density :math:`\propto \mathrm{tr}(GG^\top S_t^{-1})`: where the kernel's score is large."""

    def measure(self, process: LinearProcess, t: Tensor) -> tuple[Tensor, Tensor]:
        phi, root = process.marginal(t)
        c = 2 * (root.diagonal(dim1=-2, dim2=-1).log().sum(-1) - torch.linalg.slogdet(phi).logabsdet)
        white = torch.linalg.solve_triangular(root, process.diffusion(t), upper=False)
        white = torch.linalg.solve_triangular(root, white.mT, upper=False)
        return c, white.diagonal(dim1=-2, dim2=-1).sum(-1)


@dataclass(frozen=True, eq=False)
class LogSnrTimes(_Tabulated):
    r"""Density that makes :math:`\ln \sigma(t)` uniform on :math:`[\ln \sigma(t_{min}), \ln \sigma(T)]`."""

    def measure(self, process: LinearProcess, t: Tensor) -> tuple[Tensor, Tensor]:
        snr, rate = process.information(t)
        return -0.5 * snr.log(), 0.5 * rate / snr


_earliest: weakref.WeakKeyDictionary[LinearProcess, tuple[object, float]] = weakref.WeakKeyDictionary()


def earliest(process: LinearProcess, sigma: float) -> float:
    """The time at which the noise level is ``sigma``, to within a tenth: where a bound's decoder may take over.

    :meth:`LinearProcess.time` is exact, and too slow to ask at every step of a process that changes. For one that does
    not, the answer is kept.

    Raises:
        ValueError: if the process does not pass that level on (1e-12 T, T).
    """
    key = (sigma, _state(process))
    if process not in _earliest or _earliest[process][0] != key:
        _earliest[process] = (key, _search(process, sigma))
    return _earliest[process][1]


def _state(process: LinearProcess) -> bytes:
    """The parameters of a learned process, a few numbers; torch's version counters miss what a fused optimiser does."""
    values = process.parameters() if isinstance(process, nn.Module) else ()
    return b"".join(p.detach().numpy().tobytes() for p in values)


def _search(process: LinearProcess, sigma: float) -> float:
    with torch.no_grad():
        log_t = torch.linspace(math.log(1e-12), 0.0, 41, dtype=torch.float64)
        level = process.sigma((log_t.exp() * process.horizon).clamp(max=process.horizon)).log()
    target = math.log(sigma)
    if not float(level[0]) < target < float(level[-1]):
        raise ValueError(
            f"{type(process).__name__} passes noise levels from {float(level[0].exp()):.3g} to "
            f"{float(level[-1].exp()):.3g}; a sigma_min of {sigma:g} is not among them."
        )
    i = int(torch.searchsorted(level, target))
    part = (target - float(level[i - 1])) / float(level[i] - level[i - 1])
    return process.horizon * math.exp(float(log_t[i - 1]) + part * float(log_t[i] - log_t[i - 1]))
