r"""The exact denoiser of a finite data set: what a network trained to the end on it would become.

For data :math:`y_1, \dots, y_N` the posterior mean is a softmax average of the data,

.. math::
    D(\tilde x, \sigma) = \sum_i w_i y_i, \qquad
    w_i \propto e^{\ell_i}, \quad \ell_i = \frac{\tilde x^\top y_i - \frac12 \|y_i\|^2}{\sigma^2},

where :math:`-\|\tilde x\|^2 / 2 \sigma^2`, common to all i, has been dropped. The data pass by in chunks, and a
running maximum rescales what has been summed (an online log-sum-exp), so no matrix of all pairs is ever held.

The logits are float64. They are a difference of terms of size :math:`\|y\|^2 / \sigma^2`: for images of 784 pixels at
:math:`\sigma = 10^{-2}` that is 1e6 or more, of which float32 would leave an error near 1, a weight wrong by a factor
of e; float64 leaves 1e-9.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from undrift.denoise.base import Denoiser, per_sample

__all__ = ["EmpiricalDenoiser"]

_LEAST_VARIANCE = 1e-280  # stands for 0, where the softmax is the nearest data point; the logits stay finite


class EmpiricalDenoiser(Denoiser):
    """Posterior mean over a finite data set, exact at every noise level.

    Args:
        data: (N, *event), float32 or float64; kept as given, without a copy.
        chunk: at most this many points meet this many data points at once, so the work space is ``8 chunk^2`` bytes and
            one chunk of the data in float64.

    Raises:
        ValueError: if the data are empty, not floating point, or not finite, or the chunk is not positive.
    """

    def __init__(self, data: Tensor, chunk: int = 2048) -> None:
        if data.ndim < 2 or data.shape[0] == 0:
            raise ValueError(f"EmpiricalDenoiser: data must have shape (N, *event), N >= 1, got {tuple(data.shape)}.")
        if not data.is_floating_point():
            raise ValueError(
                f"EmpiricalDenoiser: data must be floating point, scaled as the model's, got {data.dtype}."
            )
        if chunk < 1:
            raise ValueError(f"EmpiricalDenoiser: chunk must be at least 1, got {chunk}.")
        self.data, self.chunk = data.detach(), chunk
        norms = [0.5 * part.flatten(1).double().square().sum(-1) for part in self.data.split(chunk)]
        self._half_norms = torch.cat(norms)
        bad = ~torch.isfinite(self._half_norms)
        if bool(bad.any()):
            raise ValueError(f"EmpiricalDenoiser: data must be finite; point {int(bad.nonzero()[0])} is not.")

    def _reduce(self, x: Tensor, var: Tensor, mean: bool) -> tuple[Tensor, Tensor]:
        """Log-sum-exp of the logits (batch,), and the softmax mean (batch, d) if asked for; x is float64 (batch, d)."""
        top = torch.full_like(x[:, 0], -math.inf)
        total = torch.zeros_like(top)
        weighted = torch.zeros_like(x)
        for part, half_norm in zip(self.data.split(self.chunk), self._half_norms.split(self.chunk), strict=True):
            y = part.flatten(1).to(x)
            logits = (x @ y.T - half_norm.to(x)) / var.unsqueeze(-1)
            peak = torch.maximum(top, logits.detach().amax(-1))  # a shift that cancels: no gradient goes through it
            scale = (top - peak).exp()
            weights = (logits - peak.unsqueeze(-1)).exp()
            total = total * scale + weights.sum(-1)
            if mean:
                weighted = weighted * scale.unsqueeze(-1) + weights @ y
            top = peak
        return top + total.log(), weighted / total.unsqueeze(-1)

    def _flat(self, x: Tensor, sigma: Tensor | float) -> tuple[Tensor, Tensor]:
        if x.ndim == 0 or math.prod(x.shape[1:]) != self.data[0].numel():
            raise ValueError(
                f"EmpiricalDenoiser: x must have shape (batch, *event) with {self.data[0].numel()} coordinates "
                f"an event, as the data of shape {tuple(self.data.shape[1:])} has; got {tuple(x.shape)}."
            )
        flat = x.reshape(x.shape[0], -1).double()
        return flat, per_sample(sigma, flat).squeeze(-1).square()

    def __call__(self, x: Tensor, sigma: Tensor | float, **condition: Any) -> Tensor:
        """E[x0 | x0 + sigma n = x] for x0 uniform on the data.

        Args:
            x: noisy points (batch, *event); any event with as many coordinates as the data.
            sigma: one noise level, or one per sample (batch,); at 0 the answer is the nearest data point.

        Returns:
            Posterior mean, same shape and dtype as ``x``.
        """
        if condition:
            raise ValueError(f"EmpiricalDenoiser takes no condition, got {', '.join(condition)}.")
        flat, var = self._flat(x, sigma)
        var = var.clamp(min=_LEAST_VARIANCE)
        parts = [
            self._reduce(*piece, mean=True)[1]
            for piece in zip(flat.split(self.chunk), var.split(self.chunk), strict=True)
        ]
        return torch.cat(parts).reshape(x.shape).to(x.dtype)

    def log_prob(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """Log density of x0 + sigma n at x (batch, *event), a kernel density estimate; (batch,) in x's dtype."""
        flat, var = self._flat(x, sigma)
        if not bool((var > 0).all()):
            raise ValueError("EmpiricalDenoiser: a finite data set has a density only for sigma > 0.")
        parts = [
            self._reduce(*piece, mean=False)[0]
            for piece in zip(flat.split(self.chunk), var.split(self.chunk), strict=True)
        ]
        constant = math.log(self.data.shape[0]) + 0.5 * flat.shape[1] * (2 * math.pi * var).log()
        return (torch.cat(parts) - 0.5 * flat.square().sum(-1) / var - constant).to(x.dtype)

    def score(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """Gradient of :meth:`log_prob` in x, (D - x) / sigma^2; same shape and dtype as ``x``."""
        flat, var = self._flat(x, sigma)
        if not bool((var > 0).all()):
            raise ValueError("EmpiricalDenoiser: a finite data set has a density only for sigma > 0.")
        mean = self(flat, var.sqrt())
        return ((mean - flat) / var.unsqueeze(-1)).reshape(x.shape).to(x.dtype)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw n of the data points with replacement: (n, *event) in the data's dtype."""
        device = torch.device("cpu") if generator is None else generator.device
        index = torch.randint(self.data.shape[0], (n,), generator=generator, device=device)
        return self.data[index.to(self.data.device)]
