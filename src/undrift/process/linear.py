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

import torch
from torch import Tensor

from undrift._linalg import as_f64, psd_sqrt, sqrt_sum

__all__ = ["LinearProcess", "mix"]


def _lower_solve(root: Tensor, rhs: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(root, rhs, upper=False)


def mix(coefficients: Tensor, z: Tensor) -> Tensor:
    """Contract channels: ``coefficients`` (..., J, K), unbatched or one per sample, times z (batch, K, *event)."""
    if coefficients.shape[-2:] == (1, 1):  # a product of 1 x 1 matrices is not a matrix product
        return coefficients.to(z).reshape(-1, *[1] * (z.ndim - 1)) * z
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

    def information(self, t: object) -> tuple[Tensor, Tensor]:
        """snr, and the rate -d snr/dt = m' S^-1 G G' S^-1 m >= 0 at which it is lost, each of the shape of ``t``."""
        time = self._time(t)
        snr, row = self._weights(time)
        return snr, snr.square() * (row.unsqueeze(-2) @ self.diffusion(time) @ row.unsqueeze(-1))[..., 0, 0]

    def snr_rate(self, t: object) -> Tensor:
        """-d snr/dt, shape of ``t``; see :meth:`information`."""
        return self.information(t)[1]

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
            reached, climb = self._log_sigma(table, high)
            slack = 1e-9
            if bool((target < reached[0] - slack).any()) or bool((target > reached[-1] + slack).any()):
                low_sigma, high_sigma = float(reached[0].exp()), float(reached[-1].exp())
                raise ValueError(
                    f"{type(self).__name__}.time: sigma must lie in [{low_sigma:.3g}, {high_sigma:.6g}], the levels "
                    f"this process reaches, got {float(target.min().exp()):.6g} to {float(target.max().exp()):.6g}."
                )
            place = torch.searchsorted(torch.cummax(reached, 0).values, target).clamp(1, 127)
            lo, hi = table[place - 1], table[place]
            # Cubic Hermite interpolation of log t in log sigma leaves little for Newton to do.
            gap = reached[place] - reached[place - 1]
            u = ((target - reached[place - 1]) / gap).nan_to_num(0.5).clamp(0, 1)
            bend = (1 - u) * (gap / climb[place - 1] - (hi - lo)) - u * (gap / climb[place] - (hi - lo))
            x = (torch.lerp(lo, hi, u) + u * (1 - u) * bend.nan_to_num(0.0)).clamp(lo, hi)
            for _ in range(60):
                miss, slope = self._log_sigma(x, high)
                miss = miss - target
                lo, hi = torch.where(miss < 0, x, lo), torch.where(miss < 0, hi, x)
                step = x - miss / slope
                inside = (step >= lo) & (step <= hi) & torch.isfinite(step)
                previous, x = x, torch.where(inside, step, 0.5 * (lo + hi))
                if bool((((x - previous).abs() < 1e-8) & inside).all()):  # the next step would move by its square
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
