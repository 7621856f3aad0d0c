r"""Potentials of observations: what a prediction says of :math:`p_\sigma(y \mid \tilde x)`, in four approximations.

.. math:: p_\sigma(y \mid \tilde x) = \int p(y \mid x_0)\, p_\sigma(x_0 \mid \tilde x)\, dx_0

is out of reach; with D, the mean of :math:`p_\sigma(x_0 | \tilde x)`, it is replaced by

    PointEstimate     log p(y | D)                                the posterior is a point
    PseudoInverse     log N(y; A D, S_y + r^2 A C A')              covariance r^2 C, r^2 = sigma^2 v/(sigma^2 + v)
    TweedieMoments    log N(y; A D, S_y + A (sigma^2 C J') A')     the true covariance, J = dD / dx~
    Linearised        PseudoInverse's, with A'(D) for A            for operators that are not linear

All agree with the likelihood as sigma goes to 0. PseudoInverse is exact for data N(mu, v C), TweedieMoments for
Gaussian data of any covariance. As published, the covariance is held fixed when the gradient is taken, so both cost one
vector-Jacobian product of D, and TweedieMoments those that its covariance takes.

The operator acts on fields; where the space has other coordinates they are decoded first.

References:
    Chung et al., Diffusion Posterior Sampling for General Noisy Inverse Problems, 2023, arXiv 2209.14687.
    Song et al., Pseudoinverse-Guided Diffusion Models for Inverse Problems, 2023.
    Boys et al., Tweedie Moment Projected Diffusions for Inverse Problems, 2023, arXiv 2310.06721.
    Rozet et al., Learning Diffusion Priors from Observations by Expectation Maximization, 2024, arXiv 2405.13712
    (the moments with conjugate gradients).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from undrift.denoise.guidance import coloured
from undrift.observe.noise import CorrelatedNoise, GaussianNoise
from undrift.observe.observation import Observation
from undrift.space import Space, White

__all__ = ["Linearised", "PointEstimate", "PseudoInverse", "TweedieMoments"]

_DENSE = 1024  # numbers in an observation up to which PseudoInverse keeps the matrix A C A'


@dataclass(frozen=True, eq=False)
class _OfObservation:
    """Base: an observation whose values a call may replace, and the space that points live on."""

    conditions: ClassVar[tuple[str, ...]] = ("observed",)

    observation: Observation
    space: Space | None = field(default=None, kw_only=True)

    def _given(self, observed: Tensor | None) -> Observation:
        return self.observation if observed is None else dataclasses.replace(self.observation, y=observed)

    def _data(self, predicted: Tensor, observed: Tensor | None) -> Tensor:
        """The data y, (*data), (1, *data) or (batch, *data), for predictions (batch, *data) of them."""
        y = self._given(observed).y.to(predicted)
        if y.shape not in (predicted.shape[1:], predicted.shape, (1, *predicted.shape[1:])):
            raise ValueError(
                f"{type(self).__name__}: data of shape {tuple(y.shape)} for predictions {tuple(predicted.shape)}; data "
                "of n samples walked in batches go to sample() as observed=."
            )
        return y

    def _field(self, x: Tensor) -> Tensor:
        return x if self.space is None else self.space.decode(x)

    def _operator(self, x: Tensor) -> Tensor:
        return self.observation.operator(self._field(x))

    def _spread(self, slope: Tensor) -> Tensor:
        """A C slope, (batch, m), float64."""
        return self._operator(coloured(self.space or White(), slope)).reshape(len(slope), -1).double()


@dataclass(frozen=True, eq=False)
class _Gaussian(_OfObservation):
    """Base of Gaussian potentials: Gaussian noise, whose root whitens the residual."""

    def __post_init__(self) -> None:
        noise = self.observation.noise
        if not isinstance(noise, (GaussianNoise, CorrelatedNoise)):
            raise ValueError(
                f"{type(self).__name__}: needs Gaussian noise, got {type(noise).__name__}; PointEstimate takes any."
            )

    def _root(self, data: torch.Size, device: torch.device) -> Tensor:
        """Root R of the noise's covariance R R', float64: (m,) where that is diagonal, or lower triangular (m, m)."""
        noise = self.observation.noise
        if isinstance(noise, GaussianNoise):
            return noise.variance.to(device).sqrt().expand(data).flatten()
        assert isinstance(noise, CorrelatedNoise)
        return noise.root(data).to(device)

    def _white(self, x0: Tensor, observed: Tensor | None) -> tuple[Tensor, Tensor, torch.Size]:
        """R^-1 (y - A x0), (batch, m), float64; R; and the shape of the data."""
        predicted = self._operator(x0)
        y = self._data(predicted, observed)
        root = self._root(predicted.shape[1:], predicted.device)
        return _solve(root, (y - predicted).reshape(len(x0), -1).double()), root, predicted.shape[1:]


def _solve(root: Tensor, v: Tensor) -> Tensor:
    """R^-1 applied to each row of v (batch, m)."""
    return v / root if root.ndim == 1 else torch.linalg.solve_triangular(root, v.mT, upper=False).mT


def _solve_transposed(root: Tensor, v: Tensor) -> Tensor:
    """R'^-1 applied to each row of v (batch, m)."""
    return v / root if root.ndim == 1 else torch.linalg.solve_triangular(root.mT, v.mT, upper=True).mT


def _log_det(root: Tensor) -> Tensor:
    """log det R R'."""
    return 2 * (root if root.ndim == 1 else root.diagonal()).log().sum()


def _transpose(operator: Callable[[Tensor], Tensor], y: Tensor, event: torch.Size) -> Tensor:
    """Transpose of a linear operator applied to y (batch, *data): (batch, *event)."""
    with torch.enable_grad():
        zero = torch.zeros(len(y), *event, dtype=y.dtype, device=y.device, requires_grad=True)
        return torch.autograd.grad(operator(zero), zero, y)[0]


def _log_normal(white: Tensor, weighted: Tensor, log_det: Tensor) -> Tensor:
    """log density of a Gaussian of precision P: P-weighted and plain residual (batch, m), log determinant (batch,)."""
    m = white.shape[1]
    return -0.5 * ((white * weighted).sum(1) + log_det + m * math.log(2 * math.pi))


def _conjugate_gradients(matrix: Callable[[Tensor], Tensor], b: Tensor, iterations: int, tolerance: float) -> Tensor:
    """Solves each row's system, b (batch, m); stops where every residual is below ``tolerance`` of its b."""
    x, r = torch.zeros_like(b), b.clone()
    p, rr = r.clone(), b.square().sum(1, keepdim=True)
    stop = tolerance**2 * rr
    for _ in range(iterations):
        if bool((rr <= stop).all()):
            break
        ap = matrix(p)
        curvature = (p * ap).sum(1, keepdim=True)
        # A row that is solved, or whose matrix turns out not to be positive, stays where it is.
        step = torch.where((rr > stop) & (curvature > 0), rr / curvature, 0.0)
        x, r = x + step * p, r - step * ap
        new = r.square().sum(1, keepdim=True)
        p = r + torch.where(step > 0, new / rr.clamp(min=torch.finfo(rr.dtype).tiny), 0.0) * p
        rr = torch.where(step > 0, new, torch.zeros_like(rr))
    return x


@dataclass(frozen=True, eq=False)
class _Linear(_Gaussian):
    """Base of those that are for linear operators."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.observation.linear:
            raise ValueError(
                f"{type(self).__name__}: needs a linear operator, got a {type(self.observation.operator).__name__}; "
                "Linearised and PointEstimate take any."
            )


@dataclass(frozen=True, eq=False)
class PointEstimate(_OfObservation):
    r"""Diffusion posterior sampling: :math:`\log p(y \mid D(\tilde x, \sigma))`, for any operator and noise.

    It forgets that the prediction is uncertain, and so pulls too hard while sigma is large.

    Args:
        observation: what was seen; ``observed`` in a call replaces its y, (batch, *data).
        normalised: the norm of the residual instead, :math:`-\|y - A(D)\|`. Chung et al. divide the step by that norm
            (zeta / ||y - A(D)||), which is the gradient of this. It is no log likelihood: its scale is that of the
            data's units, set by Guided's strength, and it must not serve as a weight.
        space: where the points live; filled in by Guided.
    """

    normalised: bool = False

    def __call__(self, x: Tensor, sigma: Tensor, x0: Tensor, observed: Tensor | None = None) -> Tensor:
        predicted = self._operator(x0)
        y = self._data(predicted, observed)
        if not self.normalised:
            return self.observation.noise.log_prob(y, predicted)
        return -torch.linalg.vector_norm((predicted - y).reshape(len(x0), -1), dim=1)


@dataclass(frozen=True, eq=False)
class PseudoInverse(_Linear):
    r"""PiGDM: :math:`\log N(y;\, A D,\, S_y + r^2 A C A^\top)`, :math:`r^2 = \sigma^2 v / (\sigma^2 + v)`.

    Exact where the data are :math:`N(\mu, v C)`. Observations of more than 1024 numbers are solved by conjugate
    gradients, without the determinant, which depends on the noise level alone.

    Args:
        observation: linear, of Gaussian noise; ``observed`` in a call replaces its y, (batch, *data).
        prior_variance: v, in units of C; for white noise the variance of a data coordinate.
        space: where the points live; filled in by Guided.

    Raises:
        ValueError: for an operator that is not linear, noise that is not Gaussian, or a v that is not positive.
    """

    prior_variance: float = 1.0
    _spectra: dict[Any, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.prior_variance < math.inf:
            raise ValueError(f"PseudoInverse: prior_variance must be positive and finite, got {self.prior_variance}.")

    def _gram(self, v: Tensor, root: Tensor, data: torch.Size, event: torch.Size) -> Tensor:
        """R^-1 A C A' R'^-1 applied to each row of v (batch, m)."""
        with torch.no_grad():
            back = _transpose(self._operator, _solve_transposed(root, v).reshape(-1, *data), event)
            return _solve(root, self._spread(back))

    def _spectrum(self, root: Tensor, data: torch.Size, event: torch.Size) -> tuple[Tensor, Tensor]:
        """Eigenvalues (m,) and vectors (m, m) of A C A' in units of the noise; once per event and device."""
        key = (event, root.device)
        if key not in self._spectra:
            eye = torch.eye(math.prod(data), dtype=torch.float64, device=root.device)
            gram = self._gram(eye, root, data, event)
            values, vectors = torch.linalg.eigh(0.5 * (gram + gram.mT))
            self._spectra[key] = values.clamp(min=0), vectors
        return self._spectra[key]

    def __call__(self, x: Tensor, sigma: Tensor, x0: Tensor, observed: Tensor | None = None) -> Tensor:
        white, root, data = self._white(x0, observed)
        variance = sigma.double().square().unsqueeze(-1)
        r2 = variance * self.prior_variance / (variance + self.prior_variance)
        if math.prod(data) <= _DENSE:
            values, vectors = self._spectrum(root, data, x.shape[1:])
            scale = 1 + r2 * values
            turned = white @ vectors
            return _log_normal(turned, turned / scale, _log_det(root) + scale.log().sum(1))

        def matrix(v: Tensor) -> Tensor:
            return v + r2 * self._gram(v, root, data, x.shape[1:])

        weighted = _conjugate_gradients(matrix, white.detach(), white.shape[1], 1e-10)
        return _linearised(white, weighted, _log_det(root))


@dataclass(frozen=True, eq=False)
class Linearised(_Gaussian):
    r"""PseudoInverse for operators that are not linear: :math:`\log N(y;\, A(D),\, S_y + r^2 A'(D)\, C A'(D)^\top)`.

    The operator is linearised at the prediction, as an extended Kalman filter does, by one vector-Jacobian product of
    it per number of the observation; the model is asked as often as by PointEstimate. Unlike that, it knows that a
    prediction from much noise says little of the data, and so it serves as a twist where they are precise.

    Args:
        observation: any differentiable operator, Gaussian noise, at most 1024 numbers; ``observed`` in a call replaces
            its y, (batch, *data).
        prior_variance: v, in units of C, of :math:`r^2 = \sigma^2 v / (\sigma^2 + v)`.
        space: where the points live; filled in by Guided.

    Raises:
        ValueError: for noise that is not Gaussian, a v that is not positive, or too many data.
    """

    prior_variance: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.prior_variance < math.inf:
            raise ValueError(f"Linearised: prior_variance must be positive and finite, got {self.prior_variance}.")

    def _spectrum(self, x0: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
        """Eigenvalues (batch, m) and vectors (batch, m, m) of A' C A'^T at x0, in units of the noise."""
        with torch.enable_grad():
            point = x0.detach().requires_grad_()
            seen = _solve(root, self._operator(point).reshape(len(x0), -1).double())
            m = seen.shape[1]
            if m > _DENSE:
                raise ValueError(f"Linearised: takes at most {_DENSE} data, got {m}; take PointEstimate.")
            rows = [torch.autograd.grad(seen[:, i].sum(), point, retain_graph=i + 1 < m)[0] for i in range(m)]
        spread = torch.stack([coloured(self.space or White(), row) for row in rows], 1).flatten(2).double()
        gram = torch.stack(rows, 1).flatten(2).double() @ spread.mT
        values, vectors = torch.linalg.eigh(0.5 * (gram + gram.mT))
        return values.clamp(min=0), vectors

    def __call__(self, x: Tensor, sigma: Tensor, x0: Tensor, observed: Tensor | None = None) -> Tensor:
        white, root, _ = self._white(x0, observed)
        values, vectors = self._spectrum(x0, root)
        variance = sigma.double().square().unsqueeze(-1)
        scale = 1 + variance * self.prior_variance / (variance + self.prior_variance) * values
        turned = (white.unsqueeze(1) @ vectors).squeeze(1)
        return _log_normal(turned, turned / scale, _log_det(root) + scale.log().sum(1))


def _linearised(white: Tensor, weighted: Tensor, log_det: Tensor) -> Tensor:
    """:func:`_log_normal` where ``weighted`` = P white has no graph: its value, and its gradient at fixed P."""
    value = _log_normal(white.detach(), weighted, log_det)
    return value - ((white - white.detach()) * weighted).sum(1)


@dataclass(frozen=True, eq=False)
class TweedieMoments(_Linear):
    r"""Gaussian of both exact moments: :math:`\log N(y;\, A D,\, S_y + A\, \mathrm{Cov}[x_0 | \tilde x]\, A^\top)`.

    Tweedie's second formula, :math:`\mathrm{Cov}[x_0 | \tilde x] = \sigma^2 J C`, :math:`J = \partial D / \partial
    \tilde x`, read as :math:`\sigma^2 C J^\top` (it is symmetric), takes one vector-Jacobian product per number of the
    observation. A learned J need not be that of a posterior mean: where the covariance is made whole, its asymmetric
    part and negative eigenvalues are dropped.

    Args:
        observation: linear, of Gaussian noise; ``observed`` in a call replaces its y, (batch, *data).
        dense: numbers in an observation up to which the covariance is made whole, by a product for each. Beyond, its
            systems are solved by conjugate gradients with a product a step, often far fewer, which stop where J has
            made the matrix indefinite; the log potential then lacks the log determinant, which guidance does not need
            and weights do, and second derivatives do not pass through.
        iterations: of conjugate gradients, at most.
        space: where the points live; filled in by Guided.

    Raises:
        ValueError: for an operator that is not linear, or noise that is not Gaussian.
    """

    dense: int = 64
    iterations: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dense < 0 or self.iterations < 1:
            raise ValueError(
                "TweedieMoments: dense must not be negative and iterations be at least 1, got "
                f"{self.dense} and {self.iterations}."
            )

    def __call__(self, x: Tensor, sigma: Tensor, x0: Tensor, observed: Tensor | None = None) -> Tensor:
        white, root, _ = self._white(x0, observed)
        variance = sigma.double().square().unsqueeze(-1)

        def spread(v: Tensor) -> Tensor:
            """R^-1 A (sigma^2 C J') A' R'^-1 applied to each row of v (batch, m)."""
            (back,) = torch.autograd.grad(white, x, -v, retain_graph=True)  # white = R^-1 (y - A D)
            with torch.no_grad():
                return variance * _solve(root, self._spread(back))

        m = white.shape[1]
        if m > self.dense:
            weighted = _conjugate_gradients(lambda v: v + spread(v), white.detach(), self.iterations, 1e-8)
            return _linearised(white, weighted, _log_det(root))
        eye = torch.eye(m, dtype=torch.float64, device=x.device)
        gram = torch.stack([spread(row.expand_as(white)) for row in eye], -1)
        values, vectors = torch.linalg.eigh(0.5 * (gram + gram.mT))
        scale = 1 + values.clamp(min=0)
        turned = (white.unsqueeze(1) @ vectors).squeeze(1)
        return _log_normal(turned, turned / scale, _log_det(root) + scale.log().sum(1))
