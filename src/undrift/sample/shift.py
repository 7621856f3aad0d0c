r"""By how much the noise of a step is to be shifted for its mean to move as a change of the predictions moves it."""

from __future__ import annotations

import torch
from torch import Tensor

from undrift._linalg import sqrt_sum
from undrift.sample.plan import Plan

__all__ = ["lower_roots", "shifts"]


def lower_roots(plan: Plan) -> Tensor:
    """Lower roots (N, K, K) of the plan's noise: its own where they are lower already."""
    return torch.stack([sqrt_sum(root) if bool(root.triu(1).any()) else root for root in plan.L])


def shifts(plan: Plan, roots: Tensor) -> Tensor:
    r"""U (N, J, K) with :math:`L_i U_{ij} = B_{ij} e_0`: the noise that moves a step as a change of prediction does.

    Zero in rows that draw no noise. Roots are graded over many orders of magnitude, so U is found by substitution,
    which keeps small entries, and not by a pseudo-inverse.

    Raises:
        ValueError: if a row draws noise that cannot make the move.
    """
    noisy = roots.flatten(1).any(1)
    target = plan.B[..., 0].mT  # (N, K, J)
    found, missed = torch.zeros_like(target), torch.zeros(target.shape[:2], dtype=torch.bool)
    for k in range(target.shape[1]):
        row, pivot = roots[:, k : k + 1, :k], roots[:, k, k].unsqueeze(-1)
        rest = target[:, k] - (row @ found[:, :k])[:, 0]
        size = target[:, k].abs() + (row.abs() @ found[:, :k].abs())[:, 0]
        solid = pivot.abs() > 1e-13 * torch.linalg.vector_norm(roots[:, k], dim=-1, keepdim=True)
        found[:, k] = torch.where(solid, rest / torch.where(solid, pivot, 1.0), 0.0)
        missed[:, k] = (~solid & (rest.abs() > 1e-9 * size)).any(-1) & noisy
    if bool(missed.any()):
        i, k = (int(v) for v in missed.nonzero()[0])
        raise ValueError(
            f"twisted: row {i} of the plan, called at t = {float(plan.times[i]):.4g}, moves channel {k} with the "
            "prediction where its noise does not reach, so guided and unguided steps have no density ratio. Use "
            "Ancestral, SSCS, or Exponential(stochasticity=1), whose noise reaches every channel."
        )
    return torch.where(noisy[:, None, None], found, 0.0).mT
