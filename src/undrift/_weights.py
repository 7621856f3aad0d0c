r"""Weights of particles: how many they are worth, what their mean is, and which of them have offspring.

With unnormalised weights :math:`w_i = e^{\ell_i}` along an axis of n particles,

    log Z^   :math:`\log \frac1n \sum_i w_i`
    ESS      :math:`(\sum_i w_i)^2 / \sum_i w_i^2` (Kish)
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Scheme", "ancestors", "effective_sample_size", "log_mean_exp", "pooled"]

Scheme = Literal["systematic", "multinomial"]


def log_mean_exp(log_weights: Tensor, dim: int = -1) -> Tensor:
    """log of the mean weight along an axis; -inf where all weights are 0."""
    return log_weights.logsumexp(dim) - math.log(log_weights.shape[dim])


def effective_sample_size(log_weights: Tensor, dim: int = -1) -> Tensor:
    """Kish's effective sample size along an axis, between 1 and n; 0 where all weights are 0."""
    doubled = 2 * log_weights.logsumexp(dim) - (2 * log_weights).logsumexp(dim)
    return torch.nan_to_num(doubled.exp(), nan=0.0)


def pooled(log_z: Tensor) -> tuple[float, float]:
    """log of the mean of independent estimates e^log_z, log_z (R,), and its jackknife standard error; NaN for one."""
    values = log_z.double()
    count = len(values)
    total = float(log_mean_exp(values))
    if count == 1 or not math.isfinite(total):
        return total, math.nan
    left_out = torch.stack([log_mean_exp(torch.cat([values[:i], values[i + 1 :]])) for i in range(count)])
    spread = (left_out - left_out.mean()).square().sum() * (count - 1) / count
    return total, math.sqrt(float(spread))


def ancestors(
    log_weights: Tensor, generator: torch.Generator | None, scheme: Scheme = "systematic", count: int | None = None
) -> Tensor:
    """Index (R, count) of each new particle's ancestor among the m of its row, of mean count ``count`` W.

    Args:
        log_weights: (R, m), unnormalised; rows are resampled by themselves.
        generator: source of randomness, on the weights' device.
        scheme: "systematic": one uniform number a row; "multinomial": independent draws.
        count: how many are drawn; None for m.
    """
    rows, m = log_weights.shape
    count = m if count is None else count
    w = log_weights.double().softmax(-1)
    if scheme == "multinomial":
        return torch.multinomial(w, count, replacement=True, generator=generator)
    start = torch.empty(rows, 1, dtype=w.dtype, device=w.device).uniform_(generator=generator)
    places = (torch.arange(count, dtype=w.dtype, device=w.device) + start) / count
    edges = w.cumsum(-1)
    return torch.searchsorted(edges / edges[:, -1:], places, right=True).clamp(max=m - 1)
