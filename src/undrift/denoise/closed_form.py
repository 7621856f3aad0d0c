r"""Denoisers that are known exactly: Gaussian data, and mixtures of Gaussians with full covariances.

For data :math:`x_0 \sim \sum_k w_k N(\mu_k, C_k)` the noisy point is :math:`\tilde x \sim \sum_k w_k N(\mu_k, C_k +
\sigma^2 I)`, and with the responsibilities :math:`r_k(\tilde x) \propto w_k N(\tilde x; \mu_k, C_k + \sigma^2 I)`

.. math::
    D(\tilde x, \sigma) = \sum_k r_k \bigl[\mu_k + C_k (C_k + \sigma^2 I)^{-1} (\tilde x - \mu_k)\bigr], \qquad
    \nabla \log p_\sigma(\tilde x) = -\sum_k r_k (C_k + \sigma^2 I)^{-1} (\tilde x - \mu_k).

One eigendecomposition :math:`C_k = U_k \Lambda_k U_k^\top` when the denoiser is made turns every solve, at any noise
level, into a division: with :math:`y_k = U_k^\top (\tilde x - \mu_k)` the gain is :math:`\Lambda_k / (\Lambda_k +
\sigma^2)`. Covariances are symmetric, so the decomposition always exists (the drift of a process is another matter).
Everything is computed in float64 and returned in the dtype of the point.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from undrift._linalg import as_f64
from undrift.denoise.base import Denoiser, per_sample
from undrift.denoise.linear_gaussian import Conditioned, condition

__all__ = ["GaussianDenoiser", "MixtureDenoiser"]


class _Modes(Denoiser):
    """M Gaussians in R^d: log weights (M,), means (M, d), and covariances (1 or M, 1 or d) or (M, d, d)."""

    def __init__(self, log_weights: Tensor, means: Tensor, covs: Tensor, event: torch.Size) -> None:
        name, (count, d) = type(self).__name__, means.shape
        if not bool(torch.isfinite(means).all()):
            raise ValueError(f"{name}: means must be finite.")
        if not bool(torch.isfinite(covs).all()):
            raise ValueError(f"{name}: covariances must be finite.")
        vectors = None
        if covs.ndim == 3:
            skew = (covs - covs.mT).abs().amax((-2, -1))
            worst = int(skew.argmax())
            if float(skew[worst]) > 1e-10 * float(covs[worst].abs().max()):
                raise ValueError(
                    f"{name}: covariance {worst} must be symmetric; "
                    f"C - C' has an entry of size {float(skew[worst]):.3g}."
                )
            values, vectors = torch.linalg.eigh(0.5 * (covs + covs.mT))
        else:
            values = covs
        lowest = values.amin(-1)
        worst = int(lowest.argmin())
        if float(lowest[worst]) < -1e-10 * float(values[worst].abs().max()):
            raise ValueError(
                f"{name}: covariance {worst} must be positive semi-definite; "
                f"its smallest eigenvalue is {float(lowest[worst]):.3g}."
            )
        self._event, self._count, self._d = event, count, d
        self._home = self._arrange(log_weights, means, values.clamp(min=0), vectors)
        self._placed = {means.device: self._home}

    @staticmethod
    def _arrange(
        log_weights: Tensor, means: Tensor, values: Tensor, vectors: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if vectors is None:
            return log_weights, means, values, None, means, None
        rotation = vectors.mT.flatten(0, 1)  # (M d, d): rotation @ x is U_k' x for every k
        return log_weights, means, values, rotation, (vectors.mT @ means.unsqueeze(-1)).squeeze(-1), vectors

    def _on(self, device: torch.device) -> tuple[Any, ...]:
        if device not in self._placed:
            self._placed[device] = tuple(None if p is None else p.to(device) for p in self._home)
        return self._placed[device]

    # The batch is the last axis of everything below: M and d are small, and reductions over a short last axis are slow.

    def _coordinates(self, x: Tensor, sigma: Tensor | float) -> tuple[Tensor, Tensor]:
        """y (M, d, batch) = U_k'(x - mu_k), and sigma^2 (batch,), or (1,) if the batch shares one level."""
        if x.ndim == 0 or math.prod(x.shape[1:]) != self._d:
            raise ValueError(
                f"{type(self).__name__}: x must have shape (batch, *event) with {self._d} coordinates an event, "
                f"as the data of shape {tuple(self._event)} has; got {tuple(x.shape)}."
            )
        level = (sigma if isinstance(sigma, Tensor) else as_f64(sigma)).to(x.device)
        if level.ndim == 1 and level.shape[0] > 1 and level.stride(0) == 0:
            level = level[:1]  # expanded from one level
        level = level.double()
        if level.numel() != 1:
            level = per_sample(level, x.reshape(x.shape[0], -1).double())
        _, _, _, rotation, centre, _ = self._on(x.device)
        flat = x.reshape(x.shape[0], self._d).double().T.contiguous()
        y = flat if rotation is None else (rotation @ flat).unflatten(0, (self._count, self._d))
        return y - centre.unsqueeze(-1), level.reshape(-1).square()

    def _log_joint(self, y: Tensor, var: Tensor) -> Tensor:
        """log w_k N(x; mu_k, C_k + sigma^2 I), (M, batch); var is (1 or M, 1 or d, 1 or batch)."""
        log_det = var.log().sum(1) * (self._d / var.shape[1])
        constant = self._on(y.device)[0].unsqueeze(-1) - 0.5 * (log_det + self._d * math.log(2 * math.pi))
        if var.shape[1] == 1:
            return constant - y.square().sum(1) * (0.5 / var.squeeze(1))
        return constant - (y.square() * (0.5 / var)).sum(1)

    def _back(self, parts: Tensor) -> Tensor:
        """sum_k U_k parts_k, (d, batch), for parts (M, d, batch)."""
        rotation = self._on(parts.device)[3]
        return parts.sum(0) if rotation is None else rotation.T @ parts.flatten(0, 1)

    # -- what it offers ------------------------------------------------------------------------------------------------

    def __call__(self, x: Tensor, sigma: Tensor | float, **condition: Any) -> Tensor:
        """E[x0 | x0 + sigma n = x].

        Args:
            x: noisy points (batch, *event); any event with as many coordinates as the data.
            sigma: one noise level, or one per sample (batch,); at 0 the answer is x.

        Returns:
            Posterior mean, same shape and dtype as ``x``.
        """
        if condition:
            raise ValueError(f"{type(self).__name__} takes no condition, got {', '.join(condition)}.")
        y, noise = self._coordinates(x, sigma)
        _, means, values, *_ = self._on(x.device)
        values = values.unsqueeze(-1)
        var = values + noise
        var = torch.where(var == 0, torch.ones_like(var), var)
        gain = values / var
        share = self._log_joint(y, var).softmax(0)
        out = means.T @ share + self._back((share.unsqueeze(1) * gain) * y)
        out = out.T.reshape(x.shape)
        clean = noise == 0
        if bool(clean.any()):
            out = torch.where(clean.reshape(-1, *[1] * (x.ndim - 1)), x.double(), out)
        return out.to(x.dtype)

    def _noisy_variances(self, noise: Tensor) -> Tensor:
        var = self._on(noise.device)[2].unsqueeze(-1) + noise
        if not bool((var > 0).all()):
            raise ValueError(
                f"{type(self).__name__}: the data has a singular covariance, so it has a density only for sigma > 0."
            )
        return var

    def log_prob(self, x: Tensor, sigma: Tensor | float = 0.0) -> Tensor:
        """Log density of x0 + sigma n at x (batch, *event); returns (batch,) in x's dtype.

        Raises:
            ValueError: at sigma = 0 if a covariance is singular.
        """
        y, noise = self._coordinates(x, sigma)
        return self._log_joint(y, self._noisy_variances(noise)).logsumexp(0).to(x.dtype)

    def score(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """Gradient of :meth:`log_prob` in x, same shape and dtype as ``x``; no cancellation at small sigma."""
        y, noise = self._coordinates(x, sigma)
        var = self._noisy_variances(noise)
        share = self._log_joint(y, var).softmax(0)
        return self._back((share.unsqueeze(1) / -var) * y).T.reshape(x.shape).to(x.dtype)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw n points of clean data, (n, *event) in float64, on the device of ``generator`` (CPU without one)."""
        device = torch.device("cpu") if generator is None else generator.device
        log_weights, means, values, _, _, vectors = self._on(device)
        mode = torch.multinomial(log_weights.exp(), n, replacement=True, generator=generator)
        noise = torch.empty(n, self._d, dtype=torch.float64, device=device).normal_(generator=generator)
        spread = values.expand(self._count, -1)[mode].sqrt() * noise
        if vectors is not None:
            spread = (vectors[mode] @ spread.unsqueeze(-1)).squeeze(-1)
        return (means[mode] + spread).reshape(n, *self._event)

    def _given(self, a: object, noise_cov: object, y: object) -> Conditioned:
        """Each Gaussian given y, in float64 on the CPU; the log evidence is that of the mode and y together."""
        log_weights, means, values, _, _, vectors = self._on(torch.device("cpu"))
        spread = values.expand(values.shape[0], self._d).sqrt()
        roots = torch.diag_embed(spread) if vectors is None else vectors * spread.unsqueeze(-2)
        given = condition(means, roots, a, noise_cov, y)
        return given._replace(log_evidence=given.log_evidence + log_weights)

    def log_evidence(self, a: Tensor, noise_cov: Tensor | float, y: Tensor) -> float:
        """log p(y) of y = A x0 + noise; see :meth:`posterior` for the arguments."""
        return float(self._given(a, noise_cov, y).log_evidence.logsumexp(0))


class GaussianDenoiser(_Modes):
    r"""Posterior mean of Gaussian data :math:`N(\mu, C)`: affine in the point.

    Args:
        mean: centre of the data, of any shape *event; a number for one coordinate. Arrays and lists are taken too.
        cov: a variance, one variance per coordinate (*event), or a full covariance (d, d) of the flattened event;
            positive semi-definite.

    Raises:
        ValueError: if the shapes do not fit, or ``cov`` is not a covariance.
    """

    def __init__(self, mean: Tensor | float = 0.0, cov: Tensor | float = 1.0) -> None:
        self.mean, self.cov = as_f64(mean).detach(), as_f64(cov).detach()
        d, c = self.mean.numel(), self.cov
        if c.ndim == 0:
            c = c.reshape(1, 1)
        elif c.shape in (self.mean.shape, (d,)):
            c = c.reshape(1, d)
        elif c.shape == (d, d):
            c = c.reshape(1, d, d)
        else:
            raise ValueError(
                f"GaussianDenoiser: cov must be a number, or have shape {tuple(self.mean.shape)} (variances) "
                f"or ({d}, {d}) (covariance), got {tuple(c.shape)}."
            )
        super().__init__(self.mean.new_zeros(1), self.mean.reshape(1, d), c, self.mean.shape)

    @property
    def config(self) -> Mapping[str, Any]:
        """Constructor arguments."""
        return {"mean": self.mean, "cov": self.cov}

    def posterior(self, a: Tensor, noise_cov: Tensor | float, y: Tensor) -> GaussianDenoiser:
        """The law of the data given y = A x0 + noise, exact, also for singular covariances.

        Args:
            a: A, (m, d), of the flattened event.
            noise_cov: of Gaussian noise: a variance, one per observed number (m,), or a covariance (m, m).
            y: observed numbers, (m,).

        Raises:
            ValueError: if the shapes do not fit, or y has no density.
        """
        given = self._given(a, noise_cov, y)
        return GaussianDenoiser(given.means.reshape(self.mean.shape), given.covs[0])


class MixtureDenoiser(_Modes):
    r"""Posterior mean of a mixture of M Gaussians.

    Args:
        weights: (M,) positive; divided by their sum, so counts do as well.
        means: (M, *event). Arrays and nested lists are taken too.
        covs: one variance, one per mode (M,), one per mode and coordinate (M, *event), or full covariances (M, d, d) of
            the flattened events; positive semi-definite.

    Raises:
        ValueError: if the shapes do not fit, a weight is not positive, or a covariance is not one.
    """

    def __init__(self, weights: Tensor, means: Tensor, covs: Tensor | float) -> None:
        self.weights, self.means, self.covs = (as_f64(v).detach() for v in (weights, means, covs))
        m = self.means
        if m.ndim < 2:
            raise ValueError(f"MixtureDenoiser: means must have shape (modes, *event), got {tuple(m.shape)}.")
        count, d = m.shape[0], m[0].numel()
        if self.weights.shape != (count,):
            raise ValueError(
                f"MixtureDenoiser: weights must have shape ({count},), one per mean, got {tuple(self.weights.shape)}."
            )
        if not bool((torch.isfinite(self.weights) & (self.weights > 0)).all()):
            raise ValueError(f"MixtureDenoiser: weights must be positive and finite, got {self.weights.tolist()}.")
        c = self.covs
        if c.ndim == 0:
            c = c.reshape(1, 1)  # shared by the modes: broadcasts
        elif c.shape == (count,):
            c = c.reshape(count, 1)
        elif c.shape in (m.shape, (count, d)):
            c = c.reshape(count, d)
        elif c.shape != (count, d, d):
            raise ValueError(
                f"MixtureDenoiser: covs must be a number, or have shape ({count},), {tuple(m.shape)} "
                f"or ({count}, {d}, {d}), got {tuple(c.shape)}."
            )
        super().__init__((self.weights / self.weights.sum()).log(), m.reshape(count, d), c, m.shape[1:])

    @property
    def config(self) -> Mapping[str, Any]:
        """Constructor arguments."""
        return {"weights": self.weights, "means": self.means, "covs": self.covs}

    def posterior(self, a: Tensor, noise_cov: Tensor | float, y: Tensor) -> MixtureDenoiser:
        """The law of the data given y = A x0 + noise, a mixture of as many modes, exact, also for singular covariances.

        Args:
            a: A, (m, d), of the flattened event.
            noise_cov: of Gaussian noise: a variance, one per observed number (m,), or a covariance (m, m).
            y: observed numbers, (m,).

        Raises:
            ValueError: if the shapes do not fit, or y has no density.
        """
        given = self._given(a, noise_cov, y)
        weights = given.log_evidence.softmax(0).clamp(min=torch.finfo(torch.float64).tiny)  # modes that y rules out
        return MixtureDenoiser(weights, given.means.reshape(self.means.shape), given.covs)

    @classmethod
    def ring(cls, modes: int = 8, radius: float = 1.3, std: float = 0.08) -> MixtureDenoiser:
        """Equal modes of deviation ``std`` on a circle in the plane, so far apart that a dropped one shows."""
        if modes < 1:
            raise ValueError(f"MixtureDenoiser.ring: modes must be at least 1, got {modes}.")
        if not (math.isfinite(std) and std > 0):
            raise ValueError(f"MixtureDenoiser.ring: std must be positive and finite, got {std}.")
        angle = 2 * math.pi * torch.arange(modes, dtype=torch.float64) / modes
        means = radius * torch.stack([angle.cos(), angle.sin()], -1)
        return cls(torch.ones(modes, dtype=torch.float64), means, std**2)
