r"""Three families of linear processes, by how their transitions are computed.

* :class:`ClockedProcess`: constant matrices on one clock; exponentials, exact.
* :class:`ScalarProcess`: one channel with any signal and noise level; closed forms.
* :class:`PanelProcess`: any F(t) and GG'(t); collocation over panels, composed.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from undrift._linalg import as_f64, linear_flow, ou_transition, psd_sqrt
from undrift.process.clock import Clock
from undrift.process.linear import LinearProcess

__all__ = ["ClockedProcess", "PanelProcess", "ScalarProcess", "auxiliary_start", "noise_root"]


class ClockedProcess(LinearProcess):
    r"""Constant matrices on one clock: :math:`F = \beta A`, :math:`GG^\top = \beta\, 2D`. Kernels are exact."""

    clock: Clock

    @abstractmethod
    def matrices(self) -> tuple[Tensor, Tensor]:
        """A (K, K) and D (K, K)."""

    @property
    def horizon(self) -> float:  # type: ignore[override]
        return self.clock.horizon

    @property
    def channels(self) -> int:  # type: ignore[override]
        return self.matrices()[0].shape[0]

    def drift(self, t: object) -> Tensor:
        return self.clock.beta(self._time(t))[..., None, None] * self.matrices()[0]

    def diffusion(self, t: object) -> Tensor:
        return self.clock.beta(self._time(t))[..., None, None] * 2 * self.matrices()[1]

    def _transition(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        # The kernel runs from clock zero: a clock with B(0) > 0 has gathered noise before t = 0.
        begin = torch.where(s > 0, self.clock.integral(s), torch.zeros_like(s))
        return self.advance(self.clock.integral(t) - begin)

    def advance(self, b: Tensor) -> tuple[Tensor, Tensor]:
        """Phi and cov_sqrt over clock increments ``b`` (...), each (..., K, K)."""
        a, d = self.matrices()
        return ou_transition(a, noise_root(d), b)


def noise_root(d: Tensor) -> Tensor:
    """g (K, J) with g g' = 2 D, without its zero columns."""
    root = psd_sqrt(2 * d)
    used = (root.detach() != 0).any(-2)
    return root[..., used] if bool(used.any()) else root[..., :1]


class ScalarProcess(LinearProcess):
    r"""One channel, :math:`z_t = \alpha_t x_0 + \sigma_t n`, for any smooth :math:`\alpha` and :math:`\sigma`.

    The transition is :math:`\alpha_t/\alpha_s` with variance :math:`\alpha_t^2 (q_t^2 - q_s^2)`, where
    :math:`q = \sigma/\alpha` increases.
    """

    channels = 1

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Signal coefficient, shape of ``t``."""

    @abstractmethod
    def ratio(self, t: Tensor) -> Tensor:
        """q = sigma/alpha, shape of ``t``, increasing from 0."""

    def start(self) -> Tensor:
        return torch.zeros(1, 1, dtype=torch.float64)

    def _transition(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, qs, qt = self.alpha(t), self.ratio(s), self.ratio(t)
        spread = alpha * ((qt - qs) * (qt + qs)).clamp(min=0).sqrt()
        return (alpha / self.alpha(s))[..., None, None], spread[..., None, None]


class PanelProcess(LinearProcess):
    r"""Any F(t) and GG'(t), also where they share no clock: transitions by collocation over panels, composed.

    The exponential of an integrated drift is wrong for such a process (it commutes with itself at no two times);
    8-stage Gauss collocation on equal panels is accurate to order 16 in the panel's width.

    Args:
        drift: maps times (N,) to F, (N, K, K), with torch operations.
        diffusion: maps times (N,) to GG', (N, K, K), positive semi-definite.
        horizon: end time T.
        start: covariance of the auxiliaries at t = 0, (K - 1, K - 1); a number stands for a multiple of the identity.
        stationary: covariance of the common stationary law, if there is one.
        panels: equal panels an interval is cut into.
    """

    def __init__(
        self,
        drift: Callable[[Tensor], Tensor],
        diffusion: Callable[[Tensor], Tensor],
        horizon: float = 1.0,
        start: float | Tensor = 0.0,
        stationary: Tensor | None = None,
        panels: int = 32,
    ) -> None:
        if panels < 1:
            raise ValueError(f"PanelProcess: panels must be at least 1, got {panels}.")
        if not horizon > 0:
            raise ValueError(f"PanelProcess: horizon must be positive, got {horizon}.")
        self._drift, self._diffusion, self.horizon, self.panels = drift, diffusion, float(horizon), panels
        probe = torch.tensor([0.25, 0.75], dtype=torch.float64) * horizon
        f, d = drift(probe), diffusion(probe)
        if f.ndim != 3 or f.shape[0] != 2 or f.shape[1] != f.shape[2] or d.shape != f.shape:
            raise ValueError(
                "PanelProcess: drift and diffusion must map times (N,) to (N, K, K); for N = 2 they gave "
                f"{tuple(f.shape)} and {tuple(d.shape)}."
            )
        self.channels = f.shape[-1]
        self._start = auxiliary_start(start, self.channels)
        self._stationary = None if stationary is None else as_f64(stationary)
        if self._stationary is not None:
            s = self._stationary
            miss = float((f @ s + s @ f.mT + d).abs().max() / d.abs().max())
            if miss > 1e-8:
                raise ValueError(f"PanelProcess: the given stationary law misses F S + S F' + GG' = 0 by {miss:.2e}.")

    def drift(self, t: object) -> Tensor:
        return _at(self._drift, self._time(t))

    def diffusion(self, t: object) -> Tensor:
        return _at(self._diffusion, self._time(t))

    def start(self) -> Tensor:
        return self._start

    @property
    def stationary(self) -> Tensor | None:
        return self._stationary

    def _transition(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        flow = linear_flow(lambda time: _at(self._drift, time), s, t, self.panels)
        return flow.phi, flow.noise_root(psd_sqrt(_at(self._diffusion, flow.nodes)))


def _at(coefficient: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """A coefficient that maps (N,) to (N, K, K), at times of any shape."""
    values = as_f64(coefficient(t.flatten()))
    return values.reshape(*t.shape, *values.shape[-2:])


def auxiliary_start(start: float | Tensor, channels: int) -> Tensor:
    """(K, K) start covariance from a number or a (K - 1, K - 1) block.

    Raises:
        ValueError: if the block is not a covariance of K - 1 auxiliaries.
    """
    block = as_f64(start)
    aux = channels - 1
    if block.ndim == 0 or (aux == 0 and block.numel() == 0):  # an empty matrix written as a list has lost its shape
        block = block.sum() * torch.eye(aux, dtype=torch.float64)
    if block.shape != (aux, aux):
        raise ValueError(
            f"start must be a number or the ({aux}, {aux}) covariance of the auxiliaries, got shape "
            f"{tuple(block.shape)}."
        )
    if aux:
        fixed = block.detach()
        scale = float(fixed.abs().max())
        if not math.isfinite(scale) or float((fixed - fixed.mT).abs().max()) > 1e-10 * scale:
            raise ValueError(f"start must be a finite, symmetric covariance of the auxiliaries, got {fixed.tolist()}.")
        low = float(torch.linalg.eigvalsh(fixed)[0])
        if low < -1e-12 * scale:
            raise ValueError(
                "start must be a positive semi-definite covariance of the auxiliaries; its smallest eigenvalue is "
                f"{low:.3g}."
            )
    return torch.nn.functional.pad(block, (1, 0, 1, 0))
