r"""Weights and evidence: effective sample size, log Z with its error from independent repeats, weights of modes.

With unnormalised weights :math:`w_i = e^{\ell_i}` of mean Z,

    log Z^   :math:`\log \frac1n \sum_i w_i`
    ESS      :math:`(\sum_i w_i)^2 / \sum_i w_i^2` (Kish)
    TV       :math:`\frac12 \sum_k |\hat w_k - w_k|` between weights of modes
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from undrift.measure.distance import Estimate

__all__ = ["effective_sample_size", "log_evidence", "log_mean_exp", "mode_weights", "total_variation"]


def log_mean_exp(log_weights: Tensor, dim: int = -1) -> Tensor:
    """log of the mean weight along an axis; -inf where all weights are 0."""
    return log_weights.logsumexp(dim) - math.log(log_weights.shape[dim])


def effective_sample_size(log_weights: Tensor, dim: int = -1) -> Tensor:
    """Kish's effective sample size along an axis, between 1 and n; 0 where all weights are 0."""
    doubled = 2 * log_weights.logsumexp(dim) - (2 * log_weights).logsumexp(dim)
    return torch.nan_to_num(doubled.exp(), nan=0.0)


def log_evidence(log_z: Tensor) -> Estimate:
    """log Z of independent repeats, each an estimate of log Z whose exponential has mean Z.

    Args:
        log_z: (R,).

    Returns:
        log of the mean of Z, with the jackknife's standard error over repeats; NaN for one repeat.
    """
    if log_z.ndim != 1 or log_z.numel() == 0:
        raise ValueError(f"log_evidence: log_z must have shape (repeats,), got {tuple(log_z.shape)}.")
    values = log_z.double()
    count = len(values)
    pooled = float(log_mean_exp(values))
    if count == 1 or not math.isfinite(pooled):
        return Estimate(pooled, math.nan)
    left_out = torch.stack([log_mean_exp(torch.cat([values[:i], values[i + 1 :]])) for i in range(count)])
    spread = (left_out - left_out.mean()).square().sum() * (count - 1) / count
    return Estimate(pooled, math.sqrt(float(spread)))


def mode_weights(modes: Tensor, count: int, log_weights: Tensor | None = None) -> Tensor:
    """Share of each mode, (count,), from the mode (n,) that each draw belongs to, and the draws' weights if any."""
    w = torch.ones(len(modes), dtype=torch.float64) if log_weights is None else log_weights.double().softmax(0).cpu()
    total = torch.zeros(count, dtype=torch.float64).index_add_(0, modes.cpu(), w)
    return total / total.sum()


def total_variation(p: Tensor, q: Tensor) -> float:
    """Half the sum of |p - q| over two sets of weights of the same modes."""
    if p.shape != q.shape:
        raise ValueError(f"total_variation: both need the same shape, got {tuple(p.shape)} and {tuple(q.shape)}.")
    return 0.5 * float((p.double() - q.double()).abs().sum())
