r"""The law of a non-linear process a short time ahead: a Gaussian, by linearising the drift where the step begins.

For :math:`dy = f(y)\,dt + \sqrt{a(y)}\,dw` started at y, with :math:`J = f'(y)` and :math:`b = \frac12 f''(y) : a(y)`,
the drift along the path is :math:`f(y_u) = f + J (y_u - y) + b u + \dots`: to first order in time a linear drift, whose
offset changes at the rate b that Itô's formula gives. With :math:`\varphi_1(z) = (e^z - 1)/z`,
:math:`\varphi_2(z) = (e^z - 1 - z)/z^2` the linear process has

.. math::
    \mu = y + h\,\varphi_1(hJ) f + h^2 \varphi_2(hJ) b, \qquad
    \Sigma = \int_0^h e^{Ju}\, a(y)\, e^{J^\top u} du

The noise is frozen at y. Against the true moments after h, mean and covariance are wrong by :math:`O(h^3)` where a is
constant (without the Itô term the mean is wrong by :math:`O(h^2)`), so that a chain of such steps has weak order 2.
Where a depends on the state the covariance is wrong by :math:`O(h^2)` and the order is 1; a better covariance would not
change that, since the true law then has a third cumulant of order :math:`h^2`, and a Gaussian has none.

**Why the score matching target is exact all the same.** Fix the law of :math:`y_s` and let :math:`y_t` be *drawn from*
:math:`N(\mu(y_s), \Sigma(y_s))`. Then :math:`\tilde p_t(z) = E_{y_s} N(z; \mu(y_s), \Sigma(y_s))`, and differentiating
under the expectation

.. math::
    \nabla \log \tilde p_t(z) = E\big[-\Sigma(y_s)^{-1} (z - \mu(y_s)) \,\big|\, y_t = z\big]

with no approximation, for whatever functions :math:`\mu, \Sigma` of :math:`y_s`, state-dependent noise included. The
regression on this target therefore learns the exact score of the law of the *chain* that made :math:`y_t`. The whole
error of the method is that the chain's law is not the process's, by the weak error above; there is no second error from
the target, as there would be if :math:`y_t` came from one scheme and the target from another.

References:
    Singhal, Goldstein & Ranganath, What's the score? Automated denoising score matching for nonlinear diffusions, 2024
    (matching on a transition from a nearby time, linearised).
    Shoji & Ozaki, Estimation for nonlinear stochastic differential equations by a local linearization method, 1998
    (the Itô term).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from undrift._linalg import gauss_legendre, psd_sqrt, sqrt_sum
from undrift.process.nonlinear import Field, NonlinearRecipe, _matrix_field

__all__ = ["LocalGaussian", "local_gaussian", "local_pairs"]


class LocalGaussian(NamedTuple):
    """Means (batch, dim) and lower roots of covariances (batch, dim, dim)."""

    mean: Tensor
    root: Tensor

    def draw(self, noise: Tensor) -> Tensor:
        """States for standard normal ``noise`` (batch, dim), same shape."""
        return self.mean + (self.root @ noise.unsqueeze(-1)).squeeze(-1)

    def target(self, noise: Tensor) -> Tensor:
        r"""Gradient of the log density at :meth:`draw` of the same noise, :math:`-L^{-\top} \xi`, (batch, dim).

        Raises:
            ValueError: where a covariance is singular, and the law has no density.
        """
        width = torch.linalg.vector_norm(self.root, dim=-1)
        flat = (self.root.diagonal(dim1=-2, dim2=-1) <= 1e-14 * width).nonzero()  # 0 but for rounding
        if len(flat):
            sample, coordinate = flat[0].tolist()
            raise ValueError(
                f"a local Gaussian has no density: coordinate {coordinate} of sample {sample} got no noise. Its step "
                "is 0, or D and the drift's Jacobian bring no noise there; give D noise on that coordinate."
            )
        return -torch.linalg.solve_triangular(self.root.mT, noise.unsqueeze(-1), upper=True).squeeze(-1)


def _derivatives(drift: Field, y: Tensor, directions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""f, its Jacobian, and :math:`\sum_j f''[g_j, g_j]` for directions (batch, dim, n), at y (batch, dim).

    In reverse mode, with every sample repeated once per component of f; forward mode over forward mode was measured 3
    to 17 times slower. A derivative that vanishes identically ends the graph, and is zero.
    """
    batch, dim = y.shape
    points = y.detach().repeat_interleave(dim, 0).requires_grad_(True)
    with torch.enable_grad():
        f = drift(points).reshape(batch, dim, dim).diagonal(dim1=1, dim2=2)  # component i at repetition i
        jacobian = torch.zeros(batch, dim, dim, dtype=y.dtype, device=y.device)
        bend = torch.zeros(batch, dim, 1, dtype=y.dtype, device=y.device)
        if f.requires_grad:
            rows = torch.autograd.grad(f.sum(), points, create_graph=directions.shape[-1] > 0, allow_unused=True)[0]
            jacobian = jacobian if rows is None else rows.reshape(batch, dim, dim)
        for g in directions.split(1, -1):
            slope = (jacobian @ g).sum()
            hessian = None
            if slope.requires_grad:
                hessian = torch.autograd.grad(slope, points, retain_graph=True, allow_unused=True)[0]
            if hessian is not None:
                bend = bend + hessian.reshape(batch, dim, dim) @ g
    return f.detach(), jacobian.detach(), bend.squeeze(-1).detach()


def _flow(m: Tensor, noise: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r""":math:`\varphi_1(m), \varphi_2(m)` for m = hJ, and the lower root of :math:`\Sigma`; all (batch, dim, dim).

    A Taylor series where the norm is at most 1/2, Gauss-Legendre for the integral, then doublings of the step. The
    covariance is never formed: noise on one coordinate of three leaves it with entries from h to h^5.
    """
    reach = float(m.abs().sum(-1).max())
    doublings = max(0, math.ceil(math.log2(2 * reach))) if reach > 0 else 0
    m = m / 2**doublings
    reach /= 2**doublings
    degree = next(n for n in range(2, 20) if reach ** (n + 1) < 1e-17 * math.factorial(n + 1))
    power = torch.eye(m.shape[-1], dtype=m.dtype, device=m.device).expand_as(m)
    powers = [power]
    for _ in range(degree):
        power = power @ m
        powers.append(power)
    series = torch.stack(powers)
    nodes, weights = (c.to(m.device) for c in gauss_legendre(6))
    n = torch.arange(degree + 1, dtype=m.dtype, device=m.device)
    rows = [1 / torch.exp(torch.lgamma(n + k)) for k in (1, 2, 3)]  # of exp, phi1, phi2
    inside = nodes.unsqueeze(-1) ** n * rows[0]
    phi, one, two, *at_nodes = torch.tensordot(torch.cat([torch.stack(rows), inside]), series, 1)
    flows = torch.stack(at_nodes)
    columns = (h / 2**doublings * weights.unsqueeze(-1)).sqrt()[..., None, None] * (flows @ noise)
    root = sqrt_sum(columns.movedim(0, -2).flatten(-2))
    for _ in range(doublings):
        root = sqrt_sum(root, phi @ root)
        two = 0.25 * (phi @ two + one + two)
        one = 0.5 * (phi @ one + one)
        phi = phi @ phi
    return one, two, root


def local_gaussian(
    drift: Field,
    diffusion: Tensor | Field,
    y: Tensor,
    h: Tensor | float,
    ito: bool = True,
) -> LocalGaussian:
    r"""The Gaussian law of :math:`dy = f\,dt + \sqrt{2D}\,dw` a time h after y, by local linearisation.

    The Itô term is :math:`\sum_j f''[g_j, g_j]/2` over the columns of a root :math:`g g^\top = 2D`, each a derivative
    along a direction taken twice: no Hessian is formed, and no eigendecomposition taken. The derivatives are taken in
    the dtype of y, everything after them in float64.

    Args:
        drift: f, maps (batch, dim) to (batch, dim), with torch operations.
        diffusion: D, a matrix (dim, dim), or maps (batch, dim) to (batch, dim, dim).
        y: where the step begins, (batch, dim).
        h: step, in units of time, not negative: one, or one per sample (batch,).
        ito: with the Itô term; without it the drift alone is linearised (the order falls by one where D is constant).

    Returns:
        mean and lower root of the covariance, in the dtype of y. A root has a zero column where a direction gets no
        noise: at h = 0, or where the noise reaches too few coordinates for the linear process to spread it to all.

    Raises:
        ValueError: for a step that is negative, or not finite, or of another shape.
        FloatingPointError: if the drift or a derivative of it is not finite.
    """
    step = torch.as_tensor(h, dtype=torch.float64, device=y.device)
    if step.ndim > 1 or step.shape not in ((), (y.shape[0],)) or not bool(((step >= 0) & step.isfinite()).all()):
        raise ValueError(
            f"local_gaussian: h must be finite and not negative, one step or one per sample ({y.shape[0]},); got shape "
            f"{tuple(step.shape)}, smallest {float(step.min()):.4g}, largest {float(step.max()):.4g}."
        )
    step = step.expand(y.shape[0])
    with torch.no_grad():
        noise = psd_sqrt(2 * _matrix_field(diffusion)(y))
        noise = noise[..., (noise != 0).any(0).any(0)]
    f, jacobian, bend = (v.double() for v in _derivatives(drift, y, noise if ito else noise[..., :0]))
    bad = ~torch.cat([f.unsqueeze(-1), jacobian, bend.unsqueeze(-1)], -1).isfinite().all(-1).all(-1)
    if bool(bad.any()):
        raise FloatingPointError(
            f"local_gaussian: the drift or a derivative of it is not finite at z = {y[int(bad.nonzero()[0])].tolist()}."
        )
    one, two, root = _flow(step[:, None, None] * jacobian, noise.double(), step)
    step = step.unsqueeze(-1)
    shift = step * (one @ f.unsqueeze(-1)).squeeze(-1) + step.square() * (two @ (0.5 * bend).unsqueeze(-1)).squeeze(-1)
    return LocalGaussian(y + shift.to(y), root.to(y))


def local_pairs(
    process: NonlinearRecipe,
    x: Tensor,
    times: Tensor,
    lag: Tensor,
    step: float,
    generator: torch.Generator,
    ito: bool = True,
) -> LocalGaussian:
    """The local Gaussians that lead to given times along paths from x: paths are simulated, the last steps not drawn.

    A path goes by local steps no longer than ``step`` to each s = t - lag in turn; there one local Gaussian of length
    lag is attached, and the path goes on without it. All paths of a batch share the number of steps, not their size.

    Args:
        process: what is simulated.
        x: starts at time 0, (batch, dim).
        times: increasing along each path, (R, batch).
        lag: at most the time, and such that t - lag does not decrease along a path, (R, batch).
        step: longest step of the simulation.
        generator: source of the noise, on x's device.
        ito: see :func:`local_gaussian`.

    Returns:
        R * batch Gaussians, those of the first times first.
    """
    y, now, states = x, torch.zeros_like(times[0]), []
    for s in times - lag:
        gap = (s - now).clamp(min=0)
        count = math.ceil(float(gap.max()) / step * (1 - 1e-9))  # rounding must not add a step
        for _ in range(count):
            noise = torch.empty_like(y).normal_(generator=generator)
            y = local_gaussian(process.drift, process.diffusion, y, gap / count, ito).draw(noise)
        now = torch.maximum(s, now)
        states.append(y)
    return local_gaussian(process.drift, process.diffusion, torch.cat(states), lag.flatten(), ito)
