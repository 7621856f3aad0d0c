r"""Linear processes: :math:`dz = F(t) z\,dt + G(t)\,dw` on K channels per data coordinate.

Notation (kept through the library)
    z       state, ``(batch, K, *event)``; channel 0 starts at the data x0, the auxiliaries at N(0, start)
    F, GG'  drift and squared noise, K x K, shared by all coordinates
    Phi     transition matrix, ``Phi(s, t)``; m_t its first column from 0 to t
    S_t     covariance of z_t given x0, auxiliaries integrated out ("hybrid" kernel); L_t its lower root
    snr     m' S^-1 m: all that z_t knows about x0, per coordinate;  sigma = snr^(-1/2)
    x~      m' S^-1 z / snr, distributed as x0 + sigma n with n standard normal

Time runs from 0 (data) to T (noise). All coefficients are float64, on the CPU, and differentiable in the process's
parameters, wherever times and parameters come from; states keep their own dtype and device.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from undrift._linalg import as_f64, linear_flow, ou_transition, psd_sqrt, sqrt_sum
from undrift.process.clock import Clock

__all__ = ["ClockedProcess", "LinearProcess", "PanelProcess", "ScalarProcess"]


def _lower_solve(root: Tensor, rhs: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(root, rhs, upper=False)


def mix(coefficients: Tensor, z: Tensor) -> Tensor:
    """Contract channels: ``coefficients`` (..., J, K), unbatched or one per sample, times z (batch, K, *event)."""
    flat = coefficients.to(z) @ z.flatten(2) if z.ndim > 2 else (coefficients.to(z) @ z.unsqueeze(-1))
    return flat.reshape(z.shape[0], coefficients.shape[-2], *z.shape[2:])


class LinearProcess(ABC):
    """Base of all linear processes; a subclass gives drift, diffusion and transition, and the rest follows."""

    channels: int
    horizon: float

    # -- what a process is -------------------------------------------------------------------------------------------

    @abstractmethod
    def drift(self, t: Tensor) -> Tensor:
        """F(t), (*t.shape, K, K)."""

    @abstractmethod
    def diffusion(self, t: Tensor) -> Tensor:
        """G G'(t), (*t.shape, K, K), positive semi-definite."""

    @abstractmethod
    def _transition(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """``transition`` for float64 tensors of one shape with 0 <= s <= t <= T."""

    @abstractmethod
    def start(self) -> Tensor:
        """Covariance of z_0 given x0, (K, K): zero in row and column 0, the auxiliaries' start elsewhere."""

    @property
    def stationary(self) -> Tensor | None:
        """Covariance S of the stationary law N(0, S), (K, K), or None where there is none."""
        return None

    # -- what follows --------------------------------------------------------------------------------------------------

    def _time(self, t: object, name: str = "t") -> Tensor:
        time = as_f64(t)
        bad = (time < 0) | (time > self.horizon * (1 + 1e-6)) | time.isnan()
        if bool(bad.any()):
            first = float(time[bad].flatten()[0])
            raise ValueError(f"{type(self).__name__}: {name} must lie in [0, {self.horizon:g}], got {first:g}.")
        return time.clamp(max=self.horizon)

    def transition(self, s: object, t: object) -> tuple[Tensor, Tensor]:
        """Law of z_t given z_s: mean ``Phi z_s`` and covariance ``cov_sqrt cov_sqrt'``.

        Args:
            s, t: times with 0 <= s <= t <= T; they broadcast.

        Returns:
            Phi and cov_sqrt (lower), each (*shape, K, K).
        """
        start, end = torch.broadcast_tensors(self._time(s, "s"), self._time(t))
        if bool((start > end).any()):
            raise ValueError(
                f"{type(self).__name__}.transition: needs s <= t; the reverse direction is a sampler's work."
            )
        return self._transition(start, end)

    def marginal(self, t: object) -> tuple[Tensor, Tensor]:
        """Phi(0, t) and the lower root of S_t, each (*t.shape, K, K)."""
        time = self._time(t)
        phi, root = self._transition(torch.zeros_like(time), time)
        if self.channels > 1:
            root = sqrt_sum(phi @ psd_sqrt(self.start()), root)
        return phi, root

    def kernel(self, t: object) -> tuple[Tensor, Tensor]:
        """Law of z_t given x0: ``mean`` m_t (*t.shape, K), the factor of x0, and ``cov_sqrt`` L_t (*t.shape, K, K)."""
        phi, root = self.marginal(t)
        return phi[..., 0], root

    def _weights(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """snr (...), and the row w = m' S^-1 / snr (..., K) that reads x~ off z."""
        mean, root = self.kernel(t)
        at_data = root[..., 0, 0] == 0  # sigma = 0: z shows x0 itself
        eye = torch.eye(self.channels, dtype=root.dtype, device=root.device)
        root = torch.where(at_data[..., None, None], eye, root)
        u = _lower_solve(root, mean.unsqueeze(-1))
        v = torch.linalg.solve_triangular(root.mT, u, upper=True).squeeze(-1)
        snr = u.square().sum((-2, -1))
        row = torch.where(at_data.unsqueeze(-1), eye[0], v / snr.unsqueeze(-1))
        return torch.where(at_data, torch.full_like(snr, math.inf), snr), row

    def snr(self, t: object) -> Tensor:
        """m' S^-1 m, shape of ``t``; infinite where z_t still equals the data."""
        return self._weights(self._time(t))[0]

    def snr_rate(self, t: object) -> Tensor:
        """-d snr/dt = m' S^-1 G G' S^-1 m >= 0, shape of ``t``: the rate at which information about x0 is lost."""
        time = self._time(t)
        snr, row = self._weights(time)
        return snr.square() * (row.unsqueeze(-2) @ self.diffusion(time) @ row.unsqueeze(-1))[..., 0, 0]

    def sigma(self, t: object) -> Tensor:
        """Effective noise level snr^(-1/2), shape of ``t``, increasing."""
        return self.snr(t).rsqrt()

    def time(self, sigma: object) -> Tensor:
        """Inverse of :meth:`sigma`: the time at which z shows x0 through noise of level ``sigma``.

        Bracketed Newton steps in (log t, log sigma) to rounding; differentiable in ``sigma`` and in the process.

        Raises:
            ValueError: if a level lies outside what the process reaches on (1e-12 T, T].
        """
        level = as_f64(sigma)
        with torch.no_grad():
            if not bool((torch.isfinite(level) & (level > 0)).all()):
                raise ValueError(f"{type(self).__name__}.time: sigma must be positive and finite.")
            target = level.log().flatten()
            low, high = math.log(1e-12 * self.horizon), math.log(self.horizon)
            table = torch.linspace(low, high, 128, dtype=torch.float64)
            reached = self.sigma(table.exp().clamp(max=self.horizon)).log()
            slack = 1e-9
            if bool((target < reached[0] - slack).any()) or bool((target > reached[-1] + slack).any()):
                low_sigma, high_sigma = float(reached[0].exp()), float(reached[-1].exp())
                raise ValueError(
                    f"{type(self).__name__}.time: sigma must lie in [{low_sigma:.3g}, {high_sigma:.6g}], the levels "
                    f"this process reaches, got {float(target.min().exp()):.6g} to {float(target.max().exp()):.6g}."
                )
            place = torch.searchsorted(torch.cummax(reached, 0).values, target).clamp(1, 127)
            lo, hi = table[place - 1], table[place]
            # Interpolated, not halved: where the root is an end of the table, as at sigma(T), it is hit at once.
            share = (target - reached[place - 1]) / (reached[place] - reached[place - 1])
            x = torch.lerp(lo, hi, share.nan_to_num(0.5).clamp(0, 1))
            for _ in range(60):
                miss, slope = self._log_sigma(x, high)
                miss = miss - target
                lo, hi = torch.where(miss < 0, x, lo), torch.where(miss < 0, hi, x)
                step = x - miss / slope
                inside = (step >= lo) & (step <= hi) & torch.isfinite(step)
                previous, x = x, torch.where(inside, step, 0.5 * (lo + hi))
                if float((x - previous).abs().max()) < 1e-15 * max(1.0, float(x.abs().max())):
                    break
        if torch.is_grad_enabled():  # one Newton step carries the implicit derivative
            value, slope = self._log_sigma(x, high)
            x = x - (value - level.log().flatten()) / slope.detach()
        return x.exp().clamp(max=self.horizon).reshape(level.shape)

    def _log_sigma(self, log_t: Tensor, high: float) -> tuple[Tensor, Tensor]:
        """log sigma and its derivative in log t = t (-snr') / (2 snr)."""
        t = log_t.clamp(max=high).exp().clamp(max=self.horizon)
        snr, row = self._weights(t)
        rate = snr * (row.unsqueeze(-2) @ self.diffusion(t) @ row.unsqueeze(-1))[..., 0, 0]
        return -0.5 * snr.log(), 0.5 * t * rate

    def statistic(self, z: Tensor, t: object) -> tuple[Tensor, Tensor]:
        """The sufficient statistic of z about x0.

        Args:
            z: state (batch, K, *event).
            t: one time, or one per sample (batch,).

        Returns:
            x~ (batch, *event), in z's dtype, and sigma (batch,) in float64.
        """
        time = self._per_sample(z, t)
        snr, row = self._weights(time)
        return mix(row.unsqueeze(-2), z).squeeze(1), snr.rsqrt().expand(z.shape[0])

    def _per_sample(self, z: Tensor, t: object) -> Tensor:
        if z.ndim < 2 or z.shape[1] != self.channels:
            raise ValueError(
                f"{type(self).__name__}: z must have shape (batch, {self.channels}, *event), got {tuple(z.shape)}."
            )
        return self._batch_time(z.shape[0], t)

    def _batch_time(self, batch: int, t: object) -> Tensor:
        """Times (batch,), or (1,) where all samples share one: its coefficients are then computed once."""
        time = self._time(t)
        if time.ndim > 1 or (time.ndim == 1 and time.shape[0] not in (1, batch)):
            raise ValueError(f"t must be one time or one per sample ({batch},), got shape {tuple(time.shape)}.")
        return time.reshape(-1)

    def prior(self, t: object | None = None) -> Tensor:
        """Lower root (K, K) of the law N(0, S) that sampling starts from at time ``t`` (default T).

        The stationary law where there is one, else the kernel's covariance at ``t``.
        """
        if self.stationary is not None:
            return psd_sqrt(self.stationary)
        return self.kernel(self.horizon if t is None else t)[1]

    def perturb(self, x0: Tensor, t: object, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draw z_t given x0: returns z (batch, K, *event) and the standard normal noise behind it, same shape.

        Args:
            x0: data (batch, *event).
            t: one time, or one per sample (batch,).

        Raises:
            ValueError: if there are neither one nor ``batch`` times, or ``x0`` is not a batch of floating-point points.
        """
        if x0.ndim < 1 or not x0.is_floating_point():
            raise ValueError(f"x0 must be floating-point, of shape (batch, *event); got {x0.dtype}, {tuple(x0.shape)}.")
        time = self._batch_time(x0.shape[0], t)
        mean, root = self.kernel(time)
        noise = torch.empty(x0.shape[0], self.channels, *x0.shape[1:], dtype=x0.dtype, device=x0.device)
        noise.normal_(generator=generator)
        return mix(torch.cat([mean.unsqueeze(-1), root], -1), torch.cat([x0.unsqueeze(1), noise], 1)), noise


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
