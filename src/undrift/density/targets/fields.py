r"""Latent fields and effects: a log-Gaussian Cox process, a hidden random walk, random effects."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor
from torch.distributions import biject_to, constraints
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import SoftplusTransform
from torch.nn.functional import softplus

from undrift.density.parameters import Parameters
from undrift.density.target import Target
from undrift.density.targets._data import Placed, load_json, load_npz
from undrift.density.targets._densities import log_gamma, log_lognormal, log_normal
from undrift.density.targets._posterior import Posterior
from undrift.density.targets.shapes import normal

__all__ = ["BrownianMotion", "LogGaussianCox", "Seeds"]

_SIDE = 40
_CELLS = _SIDE**2
_COX_LOG_Z = {"126": (501.72, 0.02), "127": (512.41, 0.03)}


def _fold(f: Tensor) -> Tensor:
    """(n, 1600) -> (4, n, 400): parts of a 40 x 40 field even or odd under each reflection; orthogonal."""
    f = f.reshape(-1, _SIDE, _SIDE)
    for axis in (-2, -1):
        head, tail = f.chunk(2, axis)
        tail = tail.flip(axis)
        f = torch.cat([head + tail, head - tail], axis)
    quarters = 0.5 * f.reshape(-1, 2, _SIDE // 2, 2, _SIDE // 2).permute(1, 3, 0, 2, 4)
    return quarters.reshape(4, f.shape[0], _CELLS // 4)


def _unfold(parts: Tensor) -> Tensor:
    """The inverse of :func:`_fold`."""
    n, half = parts.shape[1], _SIDE // 2
    f = parts.reshape(2, 2, n, half, half).permute(2, 0, 3, 1, 4).reshape(n, _SIDE, _SIDE)
    for axis in (-2, -1):
        even, odd = f.chunk(2, axis)
        f = torch.cat([even + odd, (even - odd).flip(axis)], axis)
    return 0.5 * f.reshape(n, _CELLS)


@dataclass(frozen=True, eq=False)
class LogGaussianCox(Target):
    r"""Log-Gaussian Cox process of the Finnish pines on a 40 x 40 grid, d = 1600.

    .. math::
        \log \gamma(f) = \log N(f; \mu_0 1, K) + \sum_i \Bigl( y_i f_i - \tfrac{1}{1600} e^{f_i} \Bigr), \qquad
        K_{ij} = 1.91\, \exp\Bigl(-\frac{|c_i - c_j|}{40 / 33}\Bigr),

    with cells c on the integer grid, :math:`\mu_0 = \log 126 - 1.91 / 2`, counts y, and no factorials of the counts.
    Møller, Syversveen & Waagepetersen, Log Gaussian Cox processes (Scandinavian Journal of Statistics 25, 1998); as a
    benchmark of evidence in Heng et al., Controlled sequential Monte Carlo (Annals of Statistics 48, 2020).

    Two sets of points go by the same name. ``126`` has the 126 pines; ``127`` counts the first pine twice and rescales
    the plot to [0, 1]. Their log Z differ by 10.7, and are often confused: 512.6, as published for the second (Vargas
    et al., arXiv 2302.13834), is not to be compared with runs on the first. Here log Z is 501.72 (standard error .02)
    and 512.41 (.03): the mean of five runs each of sequential Monte Carlo from the Laplace approximation to the target,
    with 400 to 1000 particles and three Hamiltonian moves a level. Another set of runs, of 128 particles, gave 501.815
    (.005) and 512.52 (.02); their errors look too small.

    K commutes with both reflections of the grid, so it falls into four blocks of 400 cells.

    Args:
        points: which set of points.
        whitened: sample x with f = mu_0 + R x, R R' = K, so that the prior is N(0, I). Same Z.
    """

    points: Literal["126", "127"] = "126"
    whitened: bool = False
    dim = _CELLS

    @property
    def log_z(self) -> float:  # type: ignore[override]
        return _COX_LOG_Z[self.points][0]

    @property
    def log_z_std_error(self) -> float:
        """Standard error of ``log_z``."""
        return _COX_LOG_Z[self.points][1]

    @property
    def _mean(self) -> float:
        return math.log(126) - 1.91 / 2

    @cached_property
    def _constants(self) -> Placed:
        axis = torch.arange(_SIDE, dtype=torch.float64)
        cells = torch.cartesian_prod(axis, axis)
        kernel = 1.91 * torch.exp(-torch.cdist(cells, cells, compute_mode="donot_use_mm_for_euclid_dist") * 33 / _SIDE)
        half = _fold(kernel)  # (4, 1600, 400): K U' by blocks
        blocks = torch.stack([_fold(half[b].T)[b] for b in range(4)])
        blocks = 0.5 * (blocks + blocks.mT)
        root = torch.linalg.cholesky(blocks)
        return Placed(
            root=root,
            precision=torch.cholesky_inverse(root),
            half_log_det=root.diagonal(dim1=-2, dim2=-1).log().sum(),
            counts=load_npz("pines")[f"counts_{self.points}"].reshape(-1),
        )

    def field(self, x: Tensor) -> Tensor:
        """The latent log intensity of points x: (n, 1600) -> (n, 1600)."""
        if not self.whitened:
            return x
        parts = x.reshape(-1, 4, _CELLS // 4).transpose(0, 1)
        return self._mean + _unfold(parts @ self._constants.on(x)["root"].mT)

    def _prior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """log prior density (n,), and minus its gradient (n, 1600)."""
        if self.whitened:
            pull = x
            log_det: Tensor | float = 0.0
        else:
            c = self._constants.on(x)
            pull = _unfold(_fold(x - self._mean) @ c["precision"])
            log_det, x = c["half_log_det"], x - self._mean
        return -0.5 * (x * pull).sum(-1) - log_det - 0.5 * self.dim * math.log(2 * math.pi), pull

    def _likelihood(self, f: Tensor) -> tuple[Tensor, Tensor]:
        """log likelihood (n,), and its gradient in f (n, 1600)."""
        counts = self._constants.on(f)["counts"]
        expected = f.exp() / _CELLS
        return f @ counts - expected.sum(-1), counts - expected

    def _log_density(self, x: Tensor) -> Tensor:
        return self._prior(x)[0] + self._likelihood(self.field(x))[0]

    def _gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        prior, pull = self._prior(x)
        likelihood, slope = self._likelihood(self.field(x))
        if self.whitened:
            slope = (_fold(slope) @ self._constants.on(x)["root"]).transpose(0, 1).reshape(x.shape)
        return prior + likelihood, slope - pull


class _BySoftplus(Constraint):
    """Positive numbers, reached by log(1 + e^x)."""

    is_discrete = False
    event_dim = 0

    def check(self, value: Tensor) -> Tensor:
        return value > 0


biject_to.register(_BySoftplus)(lambda constraint: SoftplusTransform())


@dataclass(frozen=True, eq=False)
class BrownianMotion(Posterior):
    r"""A random walk of thirty steps, seen with noise at its first and last ten.

    .. math::
        x_1 \sim N(0, a^2), \quad x_{i+1} \sim N(x_i, a^2), \quad y_i \sim N(x_i, b^2) \text{ for } i \notin \{11..20\}.

    The data is of TensorFlow Probability's inference_gym (Sountsov, Radul et al., 2020), drawn with a = .1, b = .15.
    Two of its posteriors go by this name:

    - scales unknown (d = 32): a and b have priors logNormal(0, 2), and are sampled as softplus of the first two
      coordinates. The one in papers on learned samplers. log Z = 1.1877491, exactly: given a and b the walk is
      Gaussian, and a two-dimensional quadrature remains. Published estimates are below it: 1.030 (Vargas et al., arXiv
      2302.13834), 1.169 (256 bridges; code of Vargas et al., arXiv 2307.01050).
    - scales known (d = 30): Gaussian, with exact draws and log Z = 5.613044.

    Args:
        known_scales: whether a and b are given.
    """

    known_scales: bool = False

    @property
    def exact(self) -> bool:  # type: ignore[override]
        return self.known_scales

    @property
    def log_z(self) -> float:  # type: ignore[override]
        return 5.613043574458207 if self.known_scales else 1.1877491032316

    @cached_property
    def parameters(self) -> Parameters:  # type: ignore[override]
        locations = {"location": (constraints.real, 30)}
        if self.known_scales:
            return Parameters(locations)
        scale = _BySoftplus()
        return Parameters({"innovation_scale": scale, "observation_scale": scale, **locations})

    @cached_property
    def _constants(self) -> Placed:
        observed = load_json("brownian")["observed"]
        index = [i for i, v in enumerate(observed) if v is not None]
        return Placed(index=torch.tensor(index), seen=torch.tensor([observed[i] for i in index], dtype=torch.float64))

    def _log_joint(self, values: Mapping[str, Tensor]) -> Tensor:
        x = values["location"]
        c = self._constants.on(x)
        if self.known_scales:
            data = load_json("brownian")
            a, b = x.new_tensor([data["innovation_scale"]]), x.new_tensor([data["observation_scale"]])
            prior: Tensor | float = 0.0
        else:
            a, b = values["innovation_scale"], values["observation_scale"]
            prior = log_lognormal(a, 0.0, 2.0) + log_lognormal(b, 0.0, 2.0)
            a, b = a.unsqueeze(-1), b.unsqueeze(-1)
        steps = torch.diff(x, dim=-1, prepend=torch.zeros_like(x[:, :1]))
        noise = c["seen"] - x[:, c["index"].long()]
        return prior + log_normal(steps, 0.0, a).sum(-1) + log_normal(noise, 0.0, b).sum(-1)

    @cached_property
    def _law(self) -> tuple[Tensor, Tensor]:
        """Mean (30,), and a factor of the covariance (30, 30), of the walk given the data and the known scales."""
        data, c = load_json("brownian"), self._constants.on(torch.zeros(1, dtype=torch.float64))
        a, b = data["innovation_scale"], data["observation_scale"]
        steps = torch.eye(30, dtype=torch.float64) - torch.eye(30, dtype=torch.float64).roll(1, 0).tril(-1)
        seen, index = torch.zeros(30, dtype=torch.float64), c["index"].long()
        seen[index] = c["seen"] / b**2
        precision = steps.T @ steps / a**2
        precision[index, index] += 1 / b**2
        root = torch.linalg.cholesky(precision)
        inverse = torch.linalg.solve_triangular(root, torch.eye(30, dtype=torch.float64), upper=False)
        return inverse.T @ (inverse @ seen), inverse.T

    def _draw(self, n: int, generator: torch.Generator) -> Tensor:
        mean, factor = (v.to(generator.device) for v in self._law)
        return mean + normal(generator, n, 30) @ factor.T


@dataclass(frozen=True, eq=False)
class Seeds(Posterior):
    r"""Germination of seeds on 21 plates: logistic regression with random effects, d = 26.

    .. math::
        r_j \sim \mathrm{Binomial}\bigl(n_j,\ \sigma(a_0 + a_1 u_j + a_2 v_j + a_3 u_j v_j + b_j)\bigr), \quad
        b_j \sim N(0, 1/\tau), \quad a_k \sim N(0, 10^2), \quad \tau \sim \mathrm{Gamma}(.01, .01).

    Crowder, Beta-binomial ANOVA for proportions (Applied Statistics 27, 1978); volume I of the BUGS examples. With the
    binomial coefficients, log Z = -73.4066 (standard error .0015: Gauss-Hermite over b, importance sampling over a, a
    grid over log tau). Published: -73.40 (128 bridges; code of Vargas et al., arXiv 2307.01050).
    """

    log_z = -73.40655201683484
    log_z_std_error = 0.0014617023677146149

    @cached_property
    def parameters(self) -> Parameters:  # type: ignore[override]
        return Parameters({"tau": constraints.positive, "a": (constraints.real, 4), "b": (constraints.real, 21)})

    @cached_property
    def _constants(self) -> Placed:
        data = load_json("seeds")
        r, n, u, v = (torch.tensor(data[k], dtype=torch.float64) for k in ("R", "N", "X1", "X2"))
        ways = torch.lgamma(n + 1) - torch.lgamma(r + 1) - torch.lgamma(n - r + 1)
        return Placed(r=r, n=n, design=torch.stack([torch.ones_like(u), u, v, u * v]), ways=ways.sum())

    def _log_joint(self, values: Mapping[str, Tensor]) -> Tensor:
        tau, a, b = values["tau"], values["a"], values["b"]
        c = self._constants.on(a)
        logit = a @ c["design"] + b
        likelihood = c["ways"] + (c["r"] * logit - c["n"] * softplus(logit, threshold=40)).sum(-1)
        effects = log_normal(b, 0.0, tau.rsqrt().unsqueeze(-1)).sum(-1)
        return likelihood + effects + log_normal(a, 0.0, 10.0).sum(-1) + log_gamma(tau, 0.01, 0.01)
