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

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "Flow",
    "Interpolant",
    "as_f64",
    "expm",
    "gauss_legendre",
    "linear_flow",
    "ou_transition",
    "psd_sqrt",
    "sqrt_sum",
]

_TAYLOR_DEGREE = 18  # with |A b| <= 1 the remainder is below 1/19! = 8e-18


def as_f64(value: object) -> Tensor:
    """``value`` (number, sequence, array or tensor) as a float64 tensor on the CPU; gradients are kept.

    Coefficients live on the CPU wherever times and parameters come from: K x K matrices are too small for an
    accelerator, and they are moved to the state's device where they meet it.
    """
    return torch.as_tensor(value, dtype=torch.float64, device="cpu")


def expm(a: Tensor, b: Tensor) -> Tensor:
    r""":math:`\exp(a b)` for one matrix ``a`` (K, K) and any number of scalars ``b`` (...): shape (..., K, K).

    Scaled Taylor series whose matrix powers are shared by the whole batch, so that a batch costs one matrix product
    and a few squarings. Products of graded matrices keep their small entries to full relative accuracy.
    """
    k = a.shape[-1]
    with torch.no_grad():
        reach = float(torch.linalg.matrix_norm(a, ord=1) * b.abs().max()) if b.numel() else 0.0
        squarings = max(0, math.ceil(math.log2(reach))) if reach > 0 else 0
    step = b / 2**squarings
    power = torch.eye(k, dtype=a.dtype, device=a.device)
    terms = [power]
    for n in range(1, _TAYLOR_DEGREE + 1):
        power = power @ a / n
        terms.append(power)
    # Horner would multiply matrices per scalar; this is one (..., 19) x (19, K K) product.
    exponents = torch.arange(_TAYLOR_DEGREE + 1, dtype=a.dtype, device=a.device)
    out = (step.unsqueeze(-1) ** exponents @ torch.stack(terms).flatten(1)).unflatten(-1, (k, k))
    for _ in range(squarings):
        out = out @ out
    return out


def sqrt_sum(*roots: Tensor) -> Tensor:
    r"""Lower Cholesky factor of :math:`\sum_i R_i R_i^\top` from roots ``R_i`` (..., K, J_i): shape (..., K, K).

    The stacked rows are sorted by size: Householder QR keeps small rows accurate only below larger ones, and a start
    of the auxiliaries dwarfs the noise of a short time.
    """
    batch = torch.broadcast_shapes(*(r.shape[:-2] for r in roots))
    stack = torch.cat([r.expand(*batch, *r.shape[-2:]) for r in roots], dim=-1)
    k, columns = stack.shape[-2:]
    if columns < k:
        stack = torch.nn.functional.pad(stack, (0, k - columns))
    if k == 1:
        return torch.linalg.vector_norm(stack, dim=-1, keepdim=True)
    order = stack.detach().abs().amax(-2).argsort(-1, descending=True)
    stack = stack.gather(-1, order.unsqueeze(-2).expand_as(stack))
    # Without its Q factor (mode "r") the decomposition is cheaper, and has no derivative.
    upper = torch.linalg.qr(stack.mT, mode="reduced" if stack.requires_grad else "r").R
    sign = torch.where(upper.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)
    return (upper * sign.unsqueeze(-1)).mT


def psd_sqrt(m: Tensor) -> Tensor:
    r"""Lower-triangular root of a positive *semi*-definite ``m`` (..., K, K); a zero pivot gives a zero column.

    Cholesky without its demand for full rank: noise on some channels only is the normal case here. A pivot is zero if
    it is below 1e-13 of its own diagonal entry, so channels may differ in scale by any factor. A root is not
    differentiable at a zero pivot; there its derivative is taken as zero.
    """
    tol = 1e-13 * m.detach().diagonal(dim1=-2, dim2=-1).abs()
    rest, columns = m, []
    for j in range(m.shape[-1]):
        pivot = rest[..., j, j]
        used = pivot > tol[..., j]
        safe = torch.where(used, pivot, torch.ones_like(pivot))
        column = torch.where(
            used.unsqueeze(-1), rest[..., :, j] / safe.sqrt().unsqueeze(-1), torch.zeros_like(m[..., 0])
        )
        rows = torch.arange(m.shape[-1], device=m.device) >= j
        column = column * rows
        rest = rest - column.unsqueeze(-1) * column.unsqueeze(-2)
        columns.append(column)
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


def ou_transition(a: Tensor, noise: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    r"""Transition of :math:`dz = A z\,db + g\,dw` over clock increments ``b`` >= 0.

    Returns :math:`\Phi = e^{A b}` and the lower root of :math:`\int_0^b e^{A u} g g^\top e^{A^\top u} du` by
    Gauss-Legendre nodes stacked into one QR. The textbook difference :math:`S - \Phi S \Phi^\top` and the block
    exponential both lose every digit for small ``b``; this loses none.

    Args:
        a: drift :math:`A`, (K, K).
        noise: :math:`g`, (K, J).
        b: clock increments, any shape (...).

    Returns:
        ``Phi`` and ``cov_sqrt``, each (..., K, K).
    """
    with torch.no_grad():
        reach = float(torch.linalg.matrix_norm(a, ord=2) * b.abs().max()) if b.numel() else 0.0
    halvings = max(0, math.ceil(math.log2(reach / 24.0))) if reach > 24.0 else 0
    reach /= 2**halvings
    nodes, weights = gauss_legendre(8 if reach < 2.5 else 16 if reach < 10.0 else 32)
    nodes, weights = nodes.to(b.device), weights.to(b.device)
    b = b / 2**halvings
    at_nodes = expm(a, torch.cat([b.unsqueeze(-1) * nodes, b.unsqueeze(-1)], dim=-1))  # (..., n + 1, K, K)
    phi = at_nodes[..., -1, :, :]
    columns = (b.unsqueeze(-1) * weights).sqrt()[..., None, None] * (at_nodes[..., :-1, :, :] @ noise)
    root = sqrt_sum(columns.movedim(-3, -2).flatten(-2))
    for _ in range(halvings):
        root = sqrt_sum(root, phi @ root)
        phi = phi @ phi
    return phi, root


class Interpolant:
    """A smooth function of one variable, tabulated once: Chebyshev points on equal panels, barycentric evaluation.

    An adaptive solver asks for coefficients at one time after another; tabulated, an answer costs microseconds. With 16
    points on panels of 0.25 in log t most processes are met to 1e-12. A singularity close to the end of the range (flow
    matching's at t = 1) needs narrower panels, so the table is checked at their centres, where the error is largest,
    and made four times finer until it holds or rounding in the function itself is what is left.

    Args:
        function: maps points (N,) to values (N, M), float64.
        low, high: the range.
        width: widest panel to begin with.
        points: points a panel, even.
        tol: error allowed, relative to the value, or to 1e-6 of the largest in its column.
    """

    panels: int
    width: float
    values: np.ndarray

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        low: float,
        high: float,
        width: float = 0.25,
        points: int = 16,
        tol: float = 1e-10,
    ) -> None:
        self.low, self.high = low, high
        angle = np.pi * (2 * np.arange(points) - points + 1) / (2 * points)
        self.nodes = np.sin(angle)  # Chebyshev points of the first kind
        self.signs = (-1.0) ** np.arange(points) * np.cos(angle)
        self.panels = max(1, math.ceil((high - low) / width))
        error = self._tabulate(function)
        while error > tol and self.panels < 1024:
            coarse, self.panels = (self.panels, self.width, self.values), 4 * self.panels
            finer = self._tabulate(function)
            if finer > 0.1 * error:
                self.panels, self.width, self.values = coarse
                break
            error = finer

    def _tabulate(self, function: Callable[[Tensor], Tensor]) -> float:
        """Fill the table; the largest relative error at the centres of the panels."""
        self.width = (self.high - self.low) / self.panels
        edges = self.low + self.width * np.arange(self.panels)
        at = np.concatenate([(edges[:, None] + self.width * (self.nodes + 1) / 2).reshape(-1), edges + self.width / 2])
        values, centres = np.split(function(torch.from_numpy(at)).detach().cpu().numpy(), [-self.panels])
        self.values = values.reshape(self.panels, len(self.nodes), -1)
        weight = self.signs / -self.nodes
        miss = np.abs(np.einsum("n,pnm->pm", weight / weight.sum(), self.values) - centres)
        scale = np.abs(centres) + 1e-6 * np.abs(centres).max(0)
        return float((miss / np.where(scale > 0, scale, 1.0)).max())

    def __call__(self, x: float) -> Tensor:
        """Values (M,) at one point; slightly outside the range it extrapolates."""
        panel = min(max(int((x - self.low) / self.width), 0), self.panels - 1)
        gap = 2 * (x - self.low - panel * self.width) / self.width - 1 - self.nodes
        hit = np.abs(gap) < 1e-15
        weight = hit.astype(float) if hit.any() else self.signs / gap
        return torch.from_numpy(weight @ self.values[panel] / weight.sum())


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
