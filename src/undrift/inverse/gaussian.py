r"""Linear problems with Gaussian priors in closed form: the posterior, and the law every Langevin scheme ends in.

Unknown :math:`c \sim N(m, \operatorname{diag}\mu)`, the coefficients of a function in its basis; data
:math:`y = A c + n`, :math:`n \sim N(0, \Sigma)`. With the prior-preconditioned Hessian

.. math:: B = \operatorname{diag}\mu^{1/2}\, A^\top \Sigma^{-1} A\, \operatorname{diag}\mu^{1/2}
    = V \operatorname{diag}(b) V^\top

(b >= 0, at most as many nonzero as there are data, and the same on every grid) the posterior is
:math:`N(m + P A^\top \Sigma^{-1}(y - A m),\, P)` with :math:`P = \mu^{1/2} V (1 + b)^{-1} V^\top \mu^{1/2}`.

Langevin dynamics with step gamma and preconditioner K, of the posterior of precision :math:`P^{-1}`, splits along the
eigenvectors of :math:`K^{1/2} P^{-1} K^{1/2}`, with eigenvalues h (for K the prior's covariance, h = 1 + b). Its mean
is exact, and its stationary variance is that of the posterior times

    Euler            1 / (1 - gamma h / 2)           stable where gamma h < 2
    Crank-Nicolson   1 / (1 - gamma (h - 1) / 2)     stable where gamma (h - 1) < 2

The Crank-Nicolson scheme treats the drift of the reference, :math:`-c` in these directions, implicitly: it is exact in
every direction in which the posterior is the reference, of which a fine grid has ever more, so that its divergence
:math:`\frac12 \sum (r - 1 - \log r)` from the posterior stays bounded where Euler's grows with the grid.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from undrift.observe import CorrelatedNoise, GaussianNoise, Observation
from undrift.space import Covariance, FunctionSpace

__all__ = ["LinearGaussian", "Scheme", "Stationary", "gaussian_kl", "gaussian_w2"]

Scheme = Literal["euler", "crank-nicolson"]


@dataclass(frozen=True, eq=False)
class Stationary:
    """Where a Langevin scheme ends on a linear Gaussian problem.

    Attributes:
        h: eigenvalues of the preconditioned precision of the posterior, ascending, (d,).
        limit: largest step that is stable.
        condition: largest h over smallest.
        ratios: stationary over posterior variance in each eigendirection, (d,).
        covariance: of the stationary law, in coefficients, (d, d).
        kl: divergence of the stationary law from the posterior.
        relative_w2: Wasserstein distance in H = L^2 between them, over the posterior's root mean square deviation.
    """

    h: Tensor
    limit: float
    condition: float
    ratios: Tensor
    covariance: Tensor
    kl: float
    relative_w2: float


@dataclass(frozen=True, eq=False)
class LinearGaussian:
    """A linear inverse problem with a Gaussian prior, on one grid.

    Args:
        matrix: A (m, d), from coefficients to data.
        variances: mu (d,), of the prior.
        noise: covariance of the data's noise, (m, m), or (m,) if diagonal.
        y: data (m,).
        mean: of the prior (d,); 0 if None.
    """

    matrix: Tensor
    variances: Tensor
    noise: Tensor
    y: Tensor
    mean: Tensor | None = None

    def __post_init__(self) -> None:
        m, d = self.matrix.shape
        for name, shapes in (("variances", [(d,)]), ("noise", [(m,), (m, m)]), ("y", [(m,)]), ("mean", [(d,)])):
            value = getattr(self, name)
            if value is not None and tuple(value.shape) not in shapes:
                raise ValueError(
                    f"LinearGaussian: with a matrix of shape ({m}, {d}), {name} must have shape "
                    f"{' or '.join(map(str, shapes))}, got {tuple(value.shape)}."
                )
            if value is not None:
                object.__setattr__(self, name, value.double())
        object.__setattr__(self, "matrix", self.matrix.double())
        if not bool((self.variances > 0).all()):
            raise ValueError("LinearGaussian: the prior's variances must be positive.")

    @classmethod
    def of(
        cls,
        observation: Observation,
        space: FunctionSpace,
        grid: Sequence[int],
        spectrum: Covariance | None = None,
        mean: Tensor | None = None,
    ) -> LinearGaussian:
        """The problem of an observation of fields on one grid.

        Args:
            observation: linear, with Gaussian noise.
            space: whose basis the coefficients belong to.
            grid: shape of the fields.
            spectrum: of the prior; the space's if None.
            mean: coefficients of the prior's mean (*grid); 0 if None.

        Raises:
            ValueError: if the problem is not linear and Gaussian.
        """
        if not observation.linear or not isinstance(observation.noise, GaussianNoise | CorrelatedNoise):
            raise ValueError(
                f"LinearGaussian: needs a linear operator and Gaussian noise, got "
                f"{type(observation.operator).__name__} and {type(observation.noise).__name__}."
            )
        grid = tuple(grid)
        d = math.prod(grid)
        fields = space.basis.synthesise(torch.eye(d, dtype=torch.float64).reshape(d, *grid))
        data = observation.operator(fields)
        variances = space.variances(grid) if spectrum is None else spectrum.variances(space.basis, grid)
        return cls(
            data.flatten(1).T,
            variances.flatten(),
            observation.noise.covariance(data.shape[1:]),
            observation.y.double().flatten(),
            None if mean is None else mean.flatten(),
        )

    @property
    def d(self) -> int:
        """Number of coefficients."""
        return self.matrix.shape[1]

    def _white(self) -> tuple[Tensor, Tensor]:
        """A and y - A m with the data's noise whitened."""
        shift = self.y if self.mean is None else self.y - self.matrix @ self.mean
        if self.noise.ndim == 1:
            root = self.noise.sqrt()
            return self.matrix / root.unsqueeze(1), shift / root
        root = torch.linalg.cholesky(self.noise)
        both = torch.cat([self.matrix, shift.unsqueeze(1)], 1)
        both = torch.linalg.solve_triangular(root, both, upper=False)
        return both[:, :-1], both[:, -1]

    def hessian(self) -> Tensor:
        """B (d, d)."""
        a = self._white()[0] * self.variances.sqrt()
        return a.T @ a

    def eigenvalues(self) -> Tensor:
        """Eigenvalues b of B, descending, (d,)."""
        b = torch.linalg.svdvals(self._white()[0] * self.variances.sqrt()).square()
        return torch.cat([b, b.new_zeros(self.d - len(b))])

    def covariance(self) -> Tensor:
        """Posterior covariance P (d, d), by the data's Gram matrix."""
        a = self._white()[0] * self.variances.sqrt()
        gram = torch.eye(len(a), dtype=a.dtype) + a @ a.T
        inner = torch.eye(self.d, dtype=a.dtype) - a.T @ torch.linalg.solve(gram, a)
        root = self.variances.sqrt()
        return root.unsqueeze(1) * (0.5 * (inner + inner.T)) * root

    def posterior_mean(self) -> Tensor:
        """Coefficients of the posterior mean (d,)."""
        a, shift = self._white()
        spread = a * self.variances
        gram = torch.eye(len(a), dtype=a.dtype) + spread @ a.T
        step = spread.T @ torch.linalg.solve(gram, shift)
        return step if self.mean is None else self.mean + step

    def log_evidence(self) -> float:
        """log p(y)."""
        a, shift = self._white()
        root = torch.linalg.cholesky(torch.eye(len(a), dtype=a.dtype) + (a * self.variances) @ a.T)
        inside = torch.linalg.solve_triangular(root, shift.unsqueeze(1), upper=False)
        noise = self.noise.log().sum() if self.noise.ndim == 1 else torch.linalg.slogdet(self.noise)[1]
        total = inside.square().sum() + 2 * root.diagonal().log().sum() + noise + len(a) * math.log(2 * math.pi)
        return -0.5 * float(total)

    def at(self, tau: float, noise: Tensor) -> LinearGaussian:
        """The problem whose prior is that at time tau of the Ornstein-Uhlenbeck process with noise variances (d,).

        A sampler that uses the score at tau > 0 samples its posterior.
        """
        shrink = math.exp(-tau)
        return dataclasses.replace(
            self,
            variances=shrink * self.variances - math.expm1(-tau) * noise.double().flatten(),
            mean=None if self.mean is None else math.exp(-tau / 2) * self.mean,
        )

    def langevin(
        self,
        step: float | None = None,
        preconditioner: Literal["identity", "prior", "posterior"] | Tensor = "prior",
        scheme: Scheme = "crank-nicolson",
    ) -> Stationary:
        """The law that Langevin dynamics ends in, whatever its start.

        Args:
            step: gamma; None for a fifth of what is stable.
            preconditioner: K: "identity", "prior" (its covariance), "posterior", variances (d,) or a covariance (d, d).
            scheme: "euler" or "crank-nicolson"; the latter's reference is N(., K).

        Raises:
            ValueError: if the step is not stable.
        """
        if scheme not in ("euler", "crank-nicolson"):
            raise ValueError(f"LinearGaussian.langevin: scheme must be 'euler' or 'crank-nicolson', got {scheme!r}.")
        a = self._white()[0]
        k: Tensor | None
        if isinstance(preconditioner, Tensor):
            k = preconditioner.double()
        else:
            k = {"identity": torch.ones(self.d).double(), "prior": self.variances, "posterior": None}[preconditioner]
        precision = torch.diag(1 / self.variances) + a.T @ a
        if k is None or k.ndim == 2:
            values, vectors = torch.linalg.eigh(self.covariance() if k is None else k)
            root = vectors * values.clamp(min=0).sqrt()
        else:
            root = torch.diag(k.sqrt())
        h, vectors = torch.linalg.eigh(_symmetric(root.T @ precision @ root))
        moved = h if scheme == "euler" else h - 1
        top = float(moved[-1])
        limit = 2 / top if top > 1e-10 else math.inf
        if step is None:
            step = 0.2 * limit
        if not 0 < step < limit:
            raise ValueError(f"LinearGaussian.langevin: a step of {step:.4g} is not stable; the limit is {limit:.4g}.")
        ratios = 1 / (1 - step * moved / 2)
        turned = root @ vectors
        covariance = _symmetric(turned * (ratios / h) @ turned.T)
        kl = 0.5 * float((ratios - 1 - ratios.log()).sum())
        posterior = self.covariance()
        w2 = gaussian_w2(covariance, posterior) / math.sqrt(float(posterior.trace()))
        return Stationary(h, limit, float(h[-1] / h[0]), ratios, covariance, kl, w2)


def gaussian_w2(cov: Tensor, other: Tensor, shift: Tensor | None = None) -> float:
    """Wasserstein distance between two Gaussians of covariances (d, d) and difference of means ``shift`` (d,)."""
    values, vectors = torch.linalg.eigh(_symmetric(cov))
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(_symmetric(root @ other @ root)).clamp(min=0).sqrt().sum()
    total = cov.trace() + other.trace() - 2 * cross
    return math.sqrt(max(0.0, float(total)) + (0.0 if shift is None else float(shift.square().sum())))


def gaussian_kl(cov: Tensor, other: Tensor, shift: Tensor | None = None) -> float:
    """KL(N(shift, cov) || N(0, other)), covariances (d, d)."""
    root = torch.linalg.cholesky(other)
    inner = torch.linalg.solve_triangular(root, torch.linalg.cholesky(cov), upper=False)
    value = inner.square().sum() - len(cov) - 2 * inner.diagonal().log().sum()
    if shift is not None:
        value = value + torch.linalg.solve_triangular(root, shift.unsqueeze(1), upper=False).square().sum()
    return 0.5 * float(value)


def _symmetric(m: Tensor) -> Tensor:
    return 0.5 * (m + m.T)
