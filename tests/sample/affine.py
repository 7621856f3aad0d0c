"""The exact law of a plan on scalar Gaussian data, where the model is affine: a closed recursion."""

from __future__ import annotations

import torch
from torch import Tensor

from undrift.sample import Plan


def law(plan: Plan, mean: float, variance: float | Tensor) -> tuple[Tensor, Tensor]:
    """Mean (*, K) and covariance (*, K, K) of the last state, for data N(mean, variance) and its exact denoiser.

    A tensor of variances, shape (*), is as many laws side by side.
    """
    variance = torch.as_tensor(variance, dtype=torch.float64)
    batch = variance.shape
    process, k = plan.process, plan.process.channels
    states, depth = plan.A.shape[1], plan.B.shape[1]
    size = k * states + depth - 1  # newest states first, then past predictions
    mu = torch.zeros(*batch, size, dtype=torch.float64)
    cov = torch.zeros(*batch, size, size, dtype=torch.float64)
    cov[..., :k, :k] = plan.prior @ plan.prior.T
    start_mean, root = process.kernel(plan.times)
    precision = torch.cholesky_inverse(root)
    for i in range(plan.calls):
        m, inverse = start_mean[i], precision[i]
        snr = m @ inverse @ m
        gain = (variance / (1 + variance * snr)).unsqueeze(-1) * (inverse @ m)  # E[x0 | z] = gain . z + offset
        offset = mean / (1 + variance * snr)
        predict = torch.zeros(*batch, size, dtype=torch.float64)
        predict[..., :k] = gain
        step = torch.zeros(*batch, size, size, dtype=torch.float64)
        shift = torch.zeros(*batch, size, dtype=torch.float64)
        for s in range(states):
            step[..., :k, s * k : (s + 1) * k] = plan.A[i, s]
        b = plan.B[i, :, :, 0]
        step[..., :k, :] += b[0][:, None] * predict.unsqueeze(-2)
        shift[..., :k] += b[0] * offset.unsqueeze(-1)
        for j in range(1, depth):
            step[..., :k, k * states + j - 1] += b[j]
        if states > 1:
            step[..., k : 2 * k, :k] = torch.eye(k, dtype=torch.float64)
        if depth > 1:
            step[..., k * states, :] = predict
            shift[..., k * states] = offset
            for j in range(1, depth - 1):
                step[..., k * states + j, k * states + j - 1] = 1.0
        mu = (step @ mu.unsqueeze(-1)).squeeze(-1) + shift
        cov = step @ cov @ step.mT
        cov[..., :k, :k] += plan.L[i] @ plan.L[i].T
    return mu[..., :k], cov[..., :k, :k]


def data_law(plan: Plan, mean: float, variance: float) -> tuple[float, float]:
    """Mean and variance of the data channel of the last state."""
    mu, cov = law(plan, mean, variance)
    return float(mu[0]), float(cov[0, 0])
