r"""Weights and evidence: effective sample size, log Z with its error from independent repeats, weights of modes.

With unnormalised weights :math:`w_i = e^{\ell_i}` of mean Z,

    log Z^   :math:`\log \frac1n \sum_i w_i`
    ESS      :math:`(\sum_i w_i)^2 / \sum_i w_i^2` (Kish)
    TV       :math:`\frac12 \sum_k |\hat w_k - w_k|` between weights of modes
"""

from __future__ import annotations

import torch
from torch import Tensor

from undrift._weights import effective_sample_size, log_mean_exp, pooled
from undrift.measure.distance import Estimate

__all__ = ["effective_sample_size", "log_evidence", "log_mean_exp", "mode_weights", "total_variation"]


def log_evidence(log_z: Tensor) -> Estimate:
    """log Z of independent repeats, each an estimate of log Z whose exponential has mean Z.

    Args:
        log_z: (R,).

    Returns:
        log of the mean of Z, with the jackknife's standard error over repeats; NaN for one repeat.
    """
    if log_z.ndim != 1 or log_z.numel() == 0:
        raise ValueError(f"log_evidence: log_z must have shape (repeats,), got {tuple(log_z.shape)}.")
    return Estimate(*pooled(log_z))


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
