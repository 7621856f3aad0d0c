r"""Small-matrix numerics in float64: exponentials, square roots and linear flows.

Every coefficient of a linear process is a :math:`K \times K` matrix with :math:`K \le 5` or so, shared by all data
coordinates. What is hard is not size but grading: as :math:`t \to 0` the entries of a covariance with momentum span
fifteen orders of magnitude. Hence two rules, kept by every function here:

* covariances are never formed, only their square roots :math:`L` (:math:`\Sigma = L L^\top`), and sums of covariances
  are one QR factorisation of stacked square roots, positive by construction;
* eigendecompositions are never taken, since the drift of a critically damped process is defective.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "Flow",
    "as_f64",
    "expm",
    "gauss_legendre",
    "linear_flow",
    "ou_transition",
    "psd_sqrt",
    "sqrt_sum",
]

_TAYLOR_TERMS = 19  # with |A b| <= 1 the remainder is below 1/19! = 8e-18


def as_f64(value: object) -> Tensor:
    """``value`` (number, sequence, array or tensor) as a float64 tensor on the CPU; gradients are kept.

    Coefficients live on the CPU wherever times and parameters come from: K x K matrices are too small for an
    accelerator, and they are moved to the state's device where they meet it.
    """
    return torch.as_tensor(value, dtype=torch.float64, device="cpu")


def _powers(x: Tensor, one: Tensor, product: Callable[[Tensor, Tensor], Tensor], dim: int) -> Tensor:
    """x^n for n = 0 ... 18, joined along ``dim``, by squaring."""
    out, size = one, one.shape[dim]
    for _ in range(3):
        out, x = torch.cat([out, product(out, x)], dim), product(x, x)
    rest = out.narrow(dim, 0, (_TAYLOR_TERMS - 16) * size)
    return torch.cat([out, product(out, x), product(rest, product(x, x))], dim)


@dataclass(frozen=True, eq=False)
class _Steps:
    """Scalars b (N,) in steps b / 4^q, short enough for a series: sorted by q, the largest first.

    Attributes:
        series: (A / u)^n / n!, (19, K, K), with u near the norm of A, so that no power overflows.
        powers: (u step)^n, (N, 19).
        lengths: the steps themselves, (N,).
        counts: how many scalars are quartered at least once, twice, ...: so many are quadrupled in the j-th round.
        back: restores the order of the scalars.
    """

    series: Tensor
    powers: Tensor
    lengths: Tensor
    counts: list[int]
    back: Tensor

    @classmethod
    def of(cls, a: Tensor, b: Tensor) -> _Steps:
        with torch.no_grad():
            norm = float(torch.linalg.matrix_norm(a, ord=2))
            unit = 2.0 ** math.frexp(norm)[1]  # a power of two: A and b keep their digits
            quarterings = torch.frexp(b.abs() * norm).exponent.clamp(min=0).add(1).div(2, rounding_mode="floor")
            quarterings, order = quarterings.sort(descending=True)
            most = int(quarterings[0]) if len(b) else 0
            counts = (quarterings > torch.arange(most, device=b.device).unsqueeze(-1)).sum(-1).tolist()
            scale = torch.ldexp(torch.full_like(b, unit), -2 * quarterings)
        step = (b[order] * scale).unsqueeze(-1)
        eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
        series = _powers(a / unit, eye, torch.matmul, 0).unflatten(0, (_TAYLOR_TERMS, -1)) / _factorials(a)
        powers = _powers(step, torch.ones_like(step), torch.mul, -1)
        return cls(series, powers, step.squeeze(-1) / unit, counts, order.argsort())


def _factorials(like: Tensor) -> Tensor:
    return torch.arange(_TAYLOR_TERMS, dtype=like.dtype, device=like.device).clamp(min=1).cumprod(0)[:, None, None]


def expm(a: Tensor, b: Tensor) -> Tensor:
    r""":math:`\exp(a b)` for one matrix ``a`` (K, K) and any number of scalars ``b`` (...): shape (..., K, K).

    Scaled Taylor series whose matrix powers are shared by the whole batch, so that a batch costs one matrix product
    and a few squarings of what needs them. Products of graded matrices keep their small entries to full
    relative accuracy.
    """
    steps = _Steps.of(a, b.flatten())
    out, done = (steps.powers @ steps.series.flatten(1)).unflatten(-1, a.shape), []
    for count in steps.counts:
        out, rest = out.split([count, len(out) - count])
        done.append(rest)
        out = out @ out
        out = out @ out
    return torch.cat([out, *done[::-1]])[steps.back].reshape(*b.shape, *a.shape)


def _orthogonalise(rows: Tensor, with_q: bool) -> tuple[Tensor, Tensor]:
    """Q (..., J, K) and lower L, its diagonal not negative, with ``rows`` (..., J, K) = Q L'."""
    # Without its Q factor (mode "r") the decomposition is cheaper, and has no derivative.
    q, upper = torch.linalg.qr(rows, mode="reduced" if with_q else "r")
    sign = torch.ones((), dtype=rows.dtype, device=rows.device).copysign(upper.diagonal(dim1=-2, dim2=-1))
    return (q * sign.unsqueeze(-2) if with_q else q), (upper * sign.unsqueeze(-1)).mT


class _LowerRoot(torch.autograd.Function):
    r"""L of :math:`L L^\top = R^\top R` from rows R (..., J, K), J >= K, by Householder QR of the rows sorted by size.

    With R = Q L' and X the symmetric matrix whose lower triangle is that of :math:`L^\top \bar L`, the gradient is
    :math:`\bar R = Q X L^{-1}`: what the derivative of QR comes to when no gradient arrives at Q.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        order = rows.abs().amax(-1, keepdim=True).argsort(-2, descending=True).expand_as(rows)
        q, lower = _orthogonalise(rows.gather(-2, order), ctx.needs_input_grad[0])
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(rows, order, q, lower)
        return lower

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        rows, order, q, lower = ctx.saved_tensors
        if torch.is_grad_enabled():  # it will be differentiated again: let automatic differentiation have the QR
            q, lower = _orthogonalise(rows.gather(-2, order), True)
        low = (lower.mT @ grad).tril()
        out = q @ torch.linalg.solve_triangular(lower, low + low.tril(-1).mT, upper=False, left=False)
        return torch.zeros_like(out).scatter(-2, order, out)


def sqrt_sum(*roots: Tensor) -> Tensor:
    r"""Lower Cholesky factor of :math:`\sum_i R_i R_i^\top` from roots ``R_i`` (..., K, J_i): shape (..., K, K).

    The stacked rows are sorted by size: Householder QR keeps small rows accurate only below larger ones, and a start
    of the auxiliaries dwarfs the noise of a short time.
    """
    batch = torch.broadcast_shapes(*(r.shape[:-2] for r in roots))
    rows = torch.cat([r.expand(*batch, *r.shape[-2:]).mT for r in roots], dim=-2)
    count, k = rows.shape[-2:]
    if k == 1:
        return torch.linalg.vector_norm(rows, dim=-2, keepdim=True)
    if count < k:
        rows = torch.nn.functional.pad(rows, (0, 0, 0, k - count))
    root: Tensor = _LowerRoot.apply(rows)
    return root


def psd_sqrt(m: Tensor) -> Tensor:
    r"""Lower-triangular root of a positive *semi*-definite ``m`` (..., K, K); a zero pivot gives a zero column.

    Cholesky without its demand for full rank: noise on some channels only is the normal case here. A pivot is zero if
    it is below 1e-13 of its own diagonal entry, so channels may differ in scale by any factor. A root is not
    differentiable at a zero pivot; there its derivative is taken as zero.
    """
    diagonal = m.detach().diagonal(dim1=-2, dim2=-1)
    if m.shape[-1] and not bool(diagonal[..., 0].any()):
        return torch.nn.functional.pad(psd_sqrt(m[..., 1:, 1:]), (1, 0, 1, 0))
    tol = 1e-13 * diagonal.abs()
    factor, failed = torch.linalg.cholesky_ex(m)
    if not bool(failed.any()) and bool((factor.detach().diagonal(dim1=-2, dim2=-1).square() > tol).all()):
        return factor
    rest, columns = m, []
    for j in range(m.shape[-1]):
        pivot = rest[..., 0, 0]
        column = rest[..., 0] / torch.where(pivot > tol[..., j], pivot, math.inf).sqrt().unsqueeze(-1)
        columns.append(torch.nn.functional.pad(column, (j, 0)))
        below = column[..., 1:]
        rest = rest[..., 1:, 1:] - below.unsqueeze(-1) * below.unsqueeze(-2)
    return torch.stack(columns, dim=-1)


@functools.cache
def _legendre(n: int) -> tuple[Tensor, Tensor, Tensor]:
    x, w = np.polynomial.legendre.leggauss(n)
    p = np.stack([np.polynomial.legendre.Legendre.basis(k)(x) for k in range(n + 1)])  # (n + 1, n): P_k(x_i)
    # The primitive of P_k that vanishes at -1 is (P_{k+1} - P_{k-1}) / (2k + 1); the interpolant through the nodes has
    # Legendre coefficients w_j P_k(x_j) (2k + 1) / 2, exactly, by discrete orthogonality.
    primitive = np.stack([x + 1.0] + [(p[k + 1] - p[k - 1]) / (2 * k + 1) for k in range(1, n)])
    scale = (2 * np.arange(n) + 1) / 2
    butcher = primitive.T @ (scale[:, None] * p[:n] * w) / 2
    return torch.from_numpy((x + 1) / 2), torch.from_numpy(w / 2), torch.from_numpy(butcher)


def gauss_legendre(n: int) -> tuple[Tensor, Tensor]:
    """Nodes (n,) and weights (n,) of Gauss-Legendre quadrature on [0, 1]."""
    nodes, weights, _ = _legendre(n)
    return nodes, weights


@functools.cache
def _node_powers(n: int) -> Tensor:
    """Powers of n nodes on [0, 1], each times the root of its weight: (19, n)."""
    nodes, weights = gauss_legendre(n)
    return weights.sqrt() * nodes ** torch.arange(_TAYLOR_TERMS, dtype=nodes.dtype).unsqueeze(-1)


def ou_transition(a: Tensor, noise: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    r"""Transition of :math:`dz = A z\,db + g\,dw` over clock increments ``b`` >= 0.

    Returns :math:`\Phi = e^{A b}` and the lower root of :math:`\int_0^b e^{A u} g g^\top e^{A^\top u} du`: over a step
    with :math:`|A| b \le 1` by Gauss-Legendre nodes stacked into one QR, and from there to each b by as many rounds of
    :math:`\Sigma_{2h} = \Sigma_h + \Phi_h \Sigma_h \Phi_h^\top`, again in roots, as that b needs. The textbook
    difference :math:`S - \Phi S \Phi^\top` and the block exponential both lose every digit for small ``b``; this loses
    none.

    Args:
        a: drift :math:`A`, (K, K).
        noise: :math:`g`, (K, J).
        b: clock increments, any shape (...).

    Returns:
        ``Phi`` and ``cov_sqrt``, each (..., K, K).
    """
    if a.shape[-1] == 1:
        return _scalar_transition(a, noise, b)
    k = a.shape[-1]
    steps = _Steps.of(a, b.flatten())
    # The series at every node, times the noise: (19, J, nodes, K), so that a batch costs one matrix product.
    rows = _node_powers(max(8, k + 3)).to(b.device)[:, None, :, None] * (steps.series @ noise).mT.unsqueeze(2)
    both = steps.powers @ torch.cat([steps.series.flatten(1), rows.flatten(1)], -1)
    phi, rows = both[:, : k * k].unflatten(-1, (k, k)), both[:, k * k :].unflatten(-1, (-1, k))
    root = steps.lengths.sqrt()[:, None, None] * _LowerRoot.apply(rows)
    done = []
    for count in steps.counts:
        phi, rest_phi = phi.split([count, len(phi) - count])
        root, rest_root = root.split([count, len(root) - count])
        done.append((rest_phi, rest_root))
        for _ in range(2):  # twice as far each time; one QR serves both
            phi, moved = (phi @ torch.cat([phi, root], -1)).tensor_split([k], -1)
            root = torch.cat([root, moved], -1)
        root = sqrt_sum(root)
    done.append((phi, root))
    phi, root = (torch.cat(parts)[steps.back].reshape(*b.shape, k, k) for parts in zip(*done[::-1], strict=True))
    return phi, root


def _scalar_transition(a: Tensor, noise: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """One channel in closed form: the variance is g g' b (e^x - 1) / x at x = 2 a b."""
    a, b = a.reshape(()), b[..., None, None]
    x = 2 * a * b
    small = x.abs() < 2  # there the quotient is the integral of e^(x u) over [0, 1], smooth at 0
    nodes, weights = (v.to(b.device) for v in gauss_legendre(8))
    near, far = torch.where(small, x, 0.0), torch.where(small, 1.0, x)
    mean = torch.where(small, torch.exp(near * nodes) @ weights.unsqueeze(-1), torch.expm1(far) / far)
    return torch.exp(a * b), torch.linalg.vector_norm(noise) * (b * mean).sqrt()


@dataclass(frozen=True)
class Flow:
    """The flow of a linear ODE over an interval, and what integrals along it need.

    Attributes:
        phi: propagator from start to end, (..., K, K).
        nodes: quadrature points between start and end, (..., M).
        weights: their signed weights (they sum to end - start), (..., M).
        to_end: propagators from each node to the end, (..., M, K, K).
    """

    phi: Tensor
    nodes: Tensor
    weights: Tensor
    to_end: Tensor

    def noise_root(self, noise: Tensor) -> Tensor:
        """Lower root of the covariance gathered by ``noise`` (..., M, K, J) injected along the way."""
        columns = self.weights.abs().sqrt()[..., None, None] * (self.to_end @ noise)
        return sqrt_sum(columns.movedim(-3, -2).flatten(-2))


def linear_flow(matrix: Callable[[Tensor], Tensor], start: Tensor, end: Tensor, panels: int, stages: int = 8) -> Flow:
    r"""Solve :math:`dY/dt = M(t) Y` from ``start`` to ``end`` (either direction) by Gauss collocation on equal panels.

    Order ``2 * stages`` at panel ends, symplectic: a skew ``M`` gives an orthogonal propagator to rounding.

    Args:
        matrix: maps times (...) to matrices (..., K, K).
        start, end: times of one shape (...).
        panels: number of equal panels.
        stages: collocation points a panel.
    """
    nodes, weights, butcher = (x.to(start.device) for x in _legendre(stages))
    width = (end - start) / panels
    index = torch.arange(panels, dtype=start.dtype, device=start.device)
    times = start[..., None, None] + width[..., None, None] * (index[:, None] + nodes)  # (..., P, n)
    m = matrix(times)
    k = m.shape[-1]
    h = width[..., None]
    eye = torch.eye(k, dtype=m.dtype, device=m.device)
    # Stage i: Y_i = Y_0 + h sum_j a_ij M_j Y_j, one (n K) x (n K) system a panel.
    blocks = h[..., None, None, None, None] * butcher[:, :, None, None] * m.unsqueeze(-4)  # (..., P, n, n, K, K)
    system = torch.eye(stages * k, dtype=m.dtype, device=m.device) - blocks.movedim(-2, -3).flatten(-2).flatten(-3, -2)
    stage = torch.linalg.solve(system, eye.repeat(stages, 1)).unflatten(-2, (stages, k))  # (..., P, n, K, K)
    panel = eye + h[..., None, None] * (weights[:, None, None] * (m @ stage)).sum(-3)  # (..., P, K, K)
    within = torch.linalg.solve(stage, panel.unsqueeze(-3).expand_as(stage), left=False)  # node -> end of its panel
    tail, to_end = eye, []
    for p in range(panels - 1, -1, -1):
        to_end.append(tail.unsqueeze(-3) @ within[..., p, :, :, :])
        tail = tail @ panel[..., p, :, :]
    return Flow(
        phi=tail,
        nodes=times.flatten(-2),
        weights=(h[..., None] * weights).expand_as(times).flatten(-2),
        to_end=torch.cat(to_end[::-1], dim=-3),
    )
