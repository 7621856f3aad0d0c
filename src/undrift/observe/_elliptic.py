r"""Diffusion equations on the unit square by finite volumes, differentiable in their coefficients.

Unknowns sit at the centres of n1 x n2 cells. A face of transmissibility T carries the flux T (p_left - p_right); faces
on the boundary have the value 0 on their other side. With :math:`D_a p` the steps of p across the faces of axis a, the
balance of all cells is

.. math:: B p = r, \qquad B = D_1^\top T_1 D_1 + D_2^\top T_2 D_2,

symmetric and positive definite. For a loss L with gradient g in p, the adjoint is one more solve with the same matrix,

.. math:: \lambda = B^{-1} g, \qquad \frac{\partial L}{\partial r} = \lambda, \qquad
    \frac{\partial L}{\partial T_a} = -(D_a \lambda) (D_a p) .
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["harmonic", "solve"]


def harmonic(u: Tensor) -> tuple[Tensor, Tensor]:
    """Transmissibilities of the field e^u on cells, by harmonic means of the two half cells at a face.

    Args:
        u: (batch, n1, n2).

    Returns:
        Those across the first axis (batch, n1 + 1, n2) and the second (batch, n1, n2 + 1), differentiable.
    """
    n1, n2 = u.shape[-2:]

    def across(u: Tensor, ratio: float) -> Tensor:  # along axis 1
        inner = 2 * torch.exp(-torch.logaddexp(-u[:, 1:], -u[:, :-1]))
        return ratio * torch.cat([2 * u[:, :1].exp(), inner, 2 * u[:, -1:].exp()], 1)

    return across(u, n1 / n2), across(u.transpose(1, 2), n2 / n1).transpose(1, 2)


def solve(t1: Tensor, t2: Tensor, r: Tensor) -> Tensor:
    """p of the balance above: (batch, n1, n2), float64, differentiable any number of times in all three.

    Each field is factorised once; its adjoints use the same factors. The solves run on the CPU.

    Args:
        t1, t2: transmissibilities (batch, n1 + 1, n2) and (batch, n1, n2 + 1), float64.
        r: what is produced in every cell, (batch, n1, n2), float64.
    """
    return _Solve.apply(t1, t2, r, _Factors(t1, t2))


class _Factors:
    """Sparse factors of the matrices of a batch of fields."""

    def __init__(self, t1: Tensor, t2: Tensor) -> None:
        first, second = t1.detach().cpu().numpy(), t2.detach().cpu().numpy()
        self._each = [_factorise(a, b) for a, b in zip(first, second, strict=True)]

    def solve(self, r: Tensor) -> Tensor:
        flat = r.detach().cpu().flatten(1).numpy()
        out = np.stack([factor.solve(one) for factor, one in zip(self._each, flat, strict=True)])
        return torch.from_numpy(out).reshape(r.shape).to(r.device)


def _factorise(t1: np.ndarray, t2: np.ndarray) -> Any:
    import scipy.sparse  # late: it takes a third of a second, and few need it
    from scipy.sparse.linalg import splu

    n2 = t1.shape[1]
    centre = t1[:-1] + t1[1:] + t2[:, :-1] + t2[:, 1:]
    down = -t1[1:-1].ravel()
    right = -np.pad(t2[:, 1:-1], ((0, 0), (0, 1))).ravel()[:-1]
    if n2 == 1:  # cells of the first axis are then neighbours in memory, and there is no second direction
        matrix = scipy.sparse.diags([down, centre.ravel(), down], [-1, 0, 1], format="csc")
    else:
        matrix = scipy.sparse.diags([down, right, centre.ravel(), right, down], [-n2, -1, 0, 1, n2], format="csc")
    try:  # Positive definite: no pivoting, and an ordering for symmetric patterns.
        return splu(matrix, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True})
    except RuntimeError as error:
        raise ValueError(
            f"Darcy2d: transmissibilities from {min(t1.min(), t2.min()):.3g} to {max(t1.max(), t2.max()):.3g} are too "
            "far apart to be solved with in float64; take smaller steps, or a prior of smaller variance."
        ) from error


class _Solve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t1: Tensor, t2: Tensor, r: Tensor, factors: _Factors) -> Tensor:
        p = factors.solve(r)
        ctx.factors = factors
        ctx.save_for_backward(t1, t2, p)
        return p

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        t1, t2, p = ctx.saved_tensors
        adjoint = _Solve.apply(t1, t2, grads[0], ctx.factors)
        return -_steps(adjoint, 1) * _steps(p, 1), -_steps(adjoint, 2) * _steps(p, 2), adjoint, None


def _steps(p: Tensor, axis: int) -> Tensor:
    """Differences across all faces of one axis, with 0 outside."""
    edge = (0, 0, 1, 1) if axis == 1 else (1, 1)
    return torch.nn.functional.pad(p, edge).diff(dim=axis)
