r"""The one thing a diffusion learns: :math:`D(\tilde x, \sigma) = E[x_0 \mid x_0 + \sigma n = \tilde x]`.

A denoiser knows nothing of processes. Whatever the process, :math:`E[x_0 \mid z_t] = D(\tilde x(z, t), \sigma(t))`.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

__all__ = ["Denoiser", "per_sample"]


@runtime_checkable
class Denoiser(Protocol):
    """Anything that maps a noisy point and its noise level to the posterior mean of the data."""

    def __call__(self, x: Tensor, sigma: Tensor, **condition: Any) -> Tensor:
        """
        Args:
            x: noisy points (batch, *event).
            sigma: noise levels (batch,), or one level.
            condition: what the model is conditioned on, if anything.

        Returns:
            Posterior mean of the data, same shape and dtype as ``x``.
        """
        ...


def per_sample(sigma: Tensor | float, x: Tensor) -> Tensor:
    """``sigma`` as a tensor of x's dtype and device, shaped (batch, 1, ..., 1) to broadcast against x (batch, *event).

    Raises:
        ValueError: if ``sigma`` is neither one level nor one per sample.
    """
    level = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
    if level.ndim > 1 or (level.ndim == 1 and level.shape[0] not in (1, x.shape[0])):
        raise ValueError(f"sigma must be one level or one per sample ({x.shape[0]},), got shape {tuple(level.shape)}.")
    return level.expand(x.shape[0]).reshape(-1, *[1] * (x.ndim - 1))
