r"""Mixtures: densities with known modes, weights, evidence and exact draws.

.. math::
    \gamma(x) = Z \sum_k w_k\, N(x; \mu_k, C_k), \qquad
    \nabla \log \gamma(x) = \sum_k r_k(x) \bigl[h_k - P_k (x - c)\bigr],

with precisions :math:`P_k = C_k^{-1}`, :math:`h_k = P_k (\mu_k - c)`, responsibilities :math:`r_k` and c the centre of
the means. In these natural parameters the M exponents are one matrix product with the features :math:`(x, q(x))`, where
q is :math:`|x|^2` for round modes, :math:`x_i^2` for aligned ones and :math:`x_i x_j` in general. The expansion about c
cancels leading digits, so everything is computed in float64 and returned in the dtype of the point.

Each Gaussian mixture has a field ``log_z``, so that an estimate of the evidence can be asked to find a number other
than zero. T2, T16w, T40, T40s, T40u and T16d10 are the names under which results in these targets are reported.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from undrift.density.target import Target, TargetError
from undrift.density.targets._data import Placed, load_json

__all__ = [
    "Difficult2d",
    "Gaussian",
    "GaussianMixture",
    "Grid16",
    "Mixture9",
    "Mixture40",
    "MixtureHighDim",
    "StudentMixture",
    "TwoModes",
]


class Modes(NamedTuple):
    """weights (M,) with sum 1, means (M, d), and covs: (M,) or (M, d) variances, or (M, d, d) matrices; float64."""

    weights: Tensor
    means: Tensor
    covs: Tensor


def _sum(exponents: Tensor) -> tuple[Tensor, Tensor]:
    """log of the sum of exponentials over the last axis, and each one's share of it.

    Without a graph, ``exponents`` is used up. Terms under e^-200 of the largest count as e^-200: they do not change the
    sum, and numbers close to the smallest ones a processor knows would make it ten times slower.
    """
    top = exponents.detach().amax(-1, keepdim=True)
    floor = -200 if exponents.dtype == torch.float64 else -80
    if exponents.requires_grad:
        terms = (exponents - top).clamp(min=floor).exp()
        total = terms.sum(-1, keepdim=True)
        return (top + total.log()).squeeze(-1), terms / total
    terms = exponents.sub_(top).clamp_(min=floor).exp_()  # a new array for each step would cost more than the step
    total = terms.sum(-1, keepdim=True)
    return top.add_(total.log()).squeeze(-1), terms.div_(total)


class _Mixture(Target):
    """A Gaussian mixture from :meth:`_modes`."""

    log_z: float | None = 0.0
    exact = True

    def _modes(self) -> Modes:
        raise NotImplementedError

    @cached_property
    def _mixture(self) -> Modes:
        return self._modes()

    @property
    def modes(self) -> Tensor:
        """Means of the modes, (M, d)."""
        return self._mixture.means

    @property
    def mode_weights(self) -> Tensor:
        """Weights of the modes, (M,), with sum 1."""
        return self._mixture.weights

    @cached_property
    def _natural(self) -> Placed:
        weights, means, covs = self._mixture
        count, d = means.shape
        centre = means.mean(0)
        m = means - centre
        if covs.ndim == 3:
            root = torch.linalg.cholesky(covs)
            precision = torch.cholesky_inverse(root)
            log_det = 2 * root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
            h = (precision @ m.unsqueeze(-1)).squeeze(-1)
            shape = precision.reshape(count, d * d)
        else:
            precision = 1 / covs
            log_det = covs.log().sum(-1) if covs.ndim == 2 else d * covs.log()
            h = m * (precision if covs.ndim == 2 else precision.unsqueeze(-1))
            shape = precision.reshape(count, -1)
        assert self.log_z is not None
        constant = weights.log() - 0.5 * ((h * m).sum(-1) + log_det + d * math.log(2 * math.pi)) + self.log_z
        return Placed(centre=centre, h=h, precision=shape, features=torch.cat([h, -0.5 * shape], -1).T, c=constant)

    def _exponents(self, x: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """log of each mode's part of gamma, (n, M); the point about the centre; the natural parameters."""
        y = x.double()
        p = self._natural.on(y)
        y = y - p["centre"]
        parts, d = p["precision"].shape[-1], self.dim
        if parts == 1:
            quadratic = y.square().sum(-1, keepdim=True)
        elif parts == d:
            quadratic = y.square()
        else:
            quadratic = (y.unsqueeze(-1) * y.unsqueeze(-2)).flatten(1)
        return torch.addmm(p["c"], torch.cat([y, quadratic], -1), p["features"]), y, p

    def _log_density(self, x: Tensor) -> Tensor:
        return _sum(self._exponents(x)[0])[0].to(x.dtype)

    def _gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        exponents, y, p = self._exponents(x)
        value, share = _sum(exponents)
        precision = share @ p["precision"]
        if precision.shape[-1] in (1, self.dim):
            pull = precision * y
        else:
            pull = (precision.reshape(-1, self.dim, self.dim) @ y.unsqueeze(-1)).squeeze(-1)
        return value.to(x.dtype), (share @ p["h"] - pull).to(x.dtype)

    def assign(self, x: Tensor) -> Tensor:
        """Mode with the largest responsibility for each point: (n, d) -> (n,) integers."""
        return self._exponents(x)[0].argmax(-1)

    def _draw(self, n: int, generator: torch.Generator) -> Tensor:
        device = generator.device
        weights, means, covs = (v.to(device) for v in self._mixture)
        mode = torch.multinomial(weights, n, replacement=True, generator=generator)
        noise = torch.empty(n, self.dim, dtype=torch.float64, device=device).normal_(generator=generator)
        if covs.ndim == 3:
            spread = (torch.linalg.cholesky(covs)[mode] @ noise.unsqueeze(-1)).squeeze(-1)
        else:
            spread = covs.sqrt()[mode].reshape(n, -1) * noise
        return means[mode] + spread


def _equal(count: int) -> Tensor:
    return torch.full((count,), 1 / count, dtype=torch.float64)


def _dimension(target: Target, least: int) -> None:
    if target.dim < least:
        raise TargetError(f"{target.name}: dim must be at least {least}, got {target.dim}.")


@dataclass(frozen=True, eq=False)
class GaussianMixture(_Mixture):
    r"""A Gaussian mixture of one's own: :math:`Z \sum_k w_k N(\mu_k, C_k)`.

    Args:
        means: (M, d).
        covs: variances (M,) or (M, d), or covariances (M, d, d).
        weights: (M,) positive, divided by their sum; equal if None.
        log_z: log Z.
    """

    means: Tensor
    covs: Tensor
    weights: Tensor | None = None
    log_z: float = 0.0

    def __post_init__(self) -> None:
        if self.means.ndim != 2:
            raise TargetError(f"GaussianMixture: means must have shape (modes, dim), got {tuple(self.means.shape)}.")
        count, d = self.means.shape
        if self.covs.shape not in ((count,), (count, d), (count, d, d)):
            raise TargetError(
                f"GaussianMixture: covs must have shape ({count},), ({count}, {d}) or ({count}, {d}, {d}), "
                f"got {tuple(self.covs.shape)}."
            )
        least = torch.linalg.eigvalsh(self.covs.double()) if self.covs.ndim == 3 else self.covs
        if not bool((least > 0).all()):
            raise TargetError(f"GaussianMixture: covs must be positive (definite), found {float(least.min()):.3g}.")
        weights = self.weights
        if weights is not None and (weights.shape != (count,) or not bool((weights > 0).all())):
            raise TargetError(f"GaussianMixture: weights must be {count} positive numbers, got {weights.tolist()}.")

    @property
    def dim(self) -> int:  # type: ignore[override]
        return int(self.means.shape[1])

    def _modes(self) -> Modes:
        weights = _equal(len(self.means)) if self.weights is None else self.weights.double() / self.weights.sum()
        return Modes(weights, self.means.double(), self.covs.double())


@dataclass(frozen=True, eq=False)
class Gaussian(_Mixture):
    r"""One Gaussian with independent coordinates: :math:`Z \prod_i N(x_i; m, s_i^2)`.

    Args:
        dim: d.
        loc: m, the same for every coordinate.
        scale: the smallest deviation, of the first coordinate.
        condition: ratio of the largest to the smallest variance; deviations grow geometrically from first to last.
        log_z: log Z.
    """

    dim: int = 2
    loc: float = 0.0
    scale: float = 1.0
    condition: float = 1.0
    log_z: float = 0.0

    def __post_init__(self) -> None:
        _dimension(self, 1)
        if not (self.scale > 0 and self.condition >= 1):
            raise TargetError(
                f"Gaussian: scale must be positive and condition at least 1, got {self.scale} and {self.condition}."
            )

    def _modes(self) -> Modes:
        grow = torch.linspace(0, 1, self.dim, dtype=torch.float64)
        variances = self.scale**2 * self.condition**grow
        return Modes(_equal(1), torch.full((1, self.dim), self.loc, dtype=torch.float64), variances.unsqueeze(0))


@dataclass(frozen=True, eq=False)
class TwoModes(_Mixture):
    r"""Two unit Gaussians on the line: :math:`w N(-a, 1) + (1 - w) N(a, 1)`; "T2" by default.

    The modes are a barrier of :math:`a^2 / 2 - \log 2` nats apart, and as far from the origin as each other: a method
    may get the weights right by luck of that symmetry.

    Args:
        weight: w, of the mode at -a.
        distance: a.
        log_z: log Z.
    """

    weight: float = 0.1
    distance: float = 5.0
    log_z: float = 0.0
    dim = 1

    def __post_init__(self) -> None:
        if not 0 < self.weight < 1:
            raise TargetError(f"TwoModes: weight must lie between 0 and 1, got {self.weight}.")

    def _modes(self) -> Modes:
        weights = torch.tensor([self.weight, 1 - self.weight], dtype=torch.float64)
        means = torch.tensor([[-self.distance], [self.distance]], dtype=torch.float64)
        return Modes(weights, means, torch.ones(2, dtype=torch.float64))


@dataclass(frozen=True, eq=False)
class Mixture9(_Mixture):
    r"""Nine equal Gaussians :math:`N(m, 0.3\, I)`, :math:`m \in \{-5, 0, 5\}^2`.

    The "gmm" of Zhang & Chen, Path Integral Sampler (arXiv 2111.15141), and of Richter & Berner, Improved sampling via
    learned diffusions (arXiv 2307.01198). A product of two one-dimensional mixtures; a coordinate has deviation
    4.11906138.

    Args:
        log_z: log Z.
    """

    log_z: float = 0.0
    dim = 2

    def _modes(self) -> Modes:
        means = torch.cartesian_prod(*2 * [torch.tensor([-5.0, 0.0, 5.0], dtype=torch.float64)])
        return Modes(_equal(9), means, torch.full((9,), 0.3, dtype=torch.float64))


@dataclass(frozen=True, eq=False)
class Grid16(_Mixture):
    r"""Sixteen unit Gaussians at :math:`\{\pm 5, \pm 15\}^2` with weights 1, ..., 16 over 136.

    "T16w", and "T16d10" with ``dim=10``. Weights grow in reading order, x_1 before x_0; the four inner modes
    have a quarter of the mass, so that a sampler which finds nothing else misses log 4 of the evidence.

    Args:
        dim: d; coordinates after the second are N(0, 1).
        log_z: log Z.
    """

    dim: int = 2
    log_z: float = 0.0

    def __post_init__(self) -> None:
        _dimension(self, 2)

    def _modes(self) -> Modes:
        means = torch.cartesian_prod(*2 * [torch.tensor([-15.0, -5.0, 5.0, 15.0], dtype=torch.float64)])
        means = torch.cat([means, means.new_zeros(16, self.dim - 2)], -1)
        weights = torch.arange(1, 17, dtype=torch.float64) / 136
        return Modes(weights, means, torch.ones(16, dtype=torch.float64))


@dataclass(frozen=True, eq=False)
class Mixture40(_Mixture):
    r"""Forty Gaussians in the plane, their means drawn once, uniformly in :math:`[-40, 40]^2`.

    The means are those of Midgley et al., Flow Annealed Importance Sampling Bootstrap (arXiv 2208.01893), as their
    code draws them in float32; they come as numbers, not from a generator. Others draw other means, or use deviation 1:
    compare results with this target's only.

    Args:
        shift: moves the whole mixture along the first coordinate; -50 is the off-centre "T40s".
        unequal: False: equal weights and deviation softplus(1) = 1.3132617 ("T40"). True: weights proportional to
            exp of standard normal numbers and deviations drawn uniformly from [0.5, 3], both shipped ("T40u").
        log_z: log Z.
    """

    shift: float = 0.0
    unequal: bool = False
    log_z: float = 0.0
    dim = 2

    def _modes(self) -> Modes:
        data = load_json("mixture40")
        means = torch.tensor(data["means"], dtype=torch.float64)
        means[:, 0] += self.shift
        if self.unequal:
            weights = torch.tensor(data["weights"], dtype=torch.float64)
            return Modes(weights / weights.sum(), means, torch.tensor(data["stds"], dtype=torch.float64).square())
        return Modes(_equal(40), means, torch.full((40,), math.log1p(math.e) ** 2, dtype=torch.float64))


@dataclass(frozen=True, eq=False)
class Difficult2d(_Mixture):
    r"""Six equal, elongated Gaussians in the plane.

    :math:`N((3, 0), \mathrm{diag}(.7, .05))`, :math:`N((-2.5, 0), \text{same})`, :math:`N((2, 3), C)` with unit
    variances and correlation .95, and the three with their coordinates swapped. Of Arbel, Matthews & Doucet, Annealed
    Flow Transport Monte Carlo (arXiv 2102.07501), and Phillips et al., Particle Denoising Diffusion Sampler (arXiv
    2402.06320).

    Args:
        log_z: log Z.
    """

    log_z: float = 0.0
    dim = 2

    def _modes(self) -> Modes:
        means = torch.tensor([[3.0, 0.0], [-2.5, 0.0], [2.0, 3.0]], dtype=torch.float64)
        flat = [[0.7, 0.0], [0.0, 0.05]]
        covs = torch.tensor([flat, flat, [[1.0, 0.95], [0.95, 1.0]]], dtype=torch.float64)
        return Modes(_equal(6), torch.cat([means, means.flip(-1)]), torch.cat([covs, covs.flip(-1, -2)]))


def _uniform(seed: int, *shape: int) -> Tensor:
    """Uniform numbers that stay the same: NumPy keeps the stream of RandomState as it is (NEP 19)."""
    return torch.from_numpy(np.random.RandomState(seed).random_sample(shape))


@dataclass(frozen=True, eq=False)
class MixtureHighDim(_Mixture):
    r"""A mixture of unit Gaussians whose modes stay as far apart in every dimension.

    Means are :math:`(s / \sqrt 2)\, u_k` with directions :math:`u_k` drawn once on the sphere (from uniform numbers, by
    Box and Muller's map), so that two of them are about s apart: nearly exactly so in high dimension, where they are
    nearly orthogonal. Weights are 1, ..., M over their sum.

    Args:
        dim: d.
        modes_count: M.
        separation: s, in deviations of a mode.
        seed: of the directions.
        log_z: log Z.
    """

    dim: int = 10
    modes_count: int = 8
    separation: float = 10.0
    seed: int = 0
    log_z: float = 0.0

    def __post_init__(self) -> None:
        _dimension(self, 1)
        if self.modes_count < 1 or self.separation < 0:
            raise TargetError(
                "MixtureHighDim: modes_count must be at least 1 and separation not negative, "
                f"got {self.modes_count} and {self.separation}."
            )

    def _modes(self) -> Modes:
        u = _uniform(self.seed, 2, self.modes_count, self.dim)
        normal = (-2 * torch.log1p(-u[0])).sqrt() * (2 * math.pi * u[1]).cos()
        means = self.separation / math.sqrt(2) * normal / normal.norm(dim=-1, keepdim=True)
        weights = torch.arange(1, self.modes_count + 1, dtype=torch.float64)
        return Modes(weights / weights.sum(), means, torch.ones(self.modes_count, dtype=torch.float64))


@dataclass(frozen=True, eq=False)
class StudentMixture(Target):
    r"""Equal modes with heavy tails: :math:`\frac1M \sum_k \prod_i t_\nu(x_i - \mu_{ki})`.

    The design of "MoS" in Blessing et al., Beyond ELBOs (arXiv 2406.07423): ten products of Student t densities with
    two degrees of freedom, locations uniform in :math:`[-10, 10]^d`, scale 1. The locations here are drawn once with
    ``seed`` and are not theirs. With :math:`\nu \le 2` variances are infinite.

    Args:
        dim: d.
        modes_count: M.
        df: degrees of freedom, nu.
        seed: of the locations.
    """

    dim: int = 10
    modes_count: int = 10
    df: float = 2.0
    seed: int = 0
    log_z = 0.0
    exact = True

    def __post_init__(self) -> None:
        _dimension(self, 1)
        if self.modes_count < 1 or not self.df > 0:
            raise TargetError(
                f"StudentMixture: modes_count must be at least 1 and df positive, got {self.modes_count} and {self.df}."
            )

    @cached_property
    def modes(self) -> Tensor:
        """Locations of the modes, (M, d)."""
        return 20 * _uniform(self.seed, self.modes_count, self.dim) - 10

    @cached_property
    def mode_weights(self) -> Tensor:
        """Weights of the modes, (M,)."""
        return _equal(self.modes_count)

    @cached_property
    def _constants(self) -> Placed:
        return Placed(modes=self.modes)

    def _exponents(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """log of each mode's part (n, M), and the points about each mode (n, M, d)."""
        nu = self.df
        y = x.unsqueeze(1) - self._constants.on(x)["modes"]
        one = math.lgamma((nu + 1) / 2) - math.lgamma(nu / 2) - 0.5 * math.log(math.pi * nu)
        constant = self.dim * one - math.log(self.modes_count)
        return constant - (nu + 1) / 2 * torch.log1p(y.square() / nu).sum(-1), y

    def _log_density(self, x: Tensor) -> Tensor:
        return _sum(self._exponents(x)[0])[0]

    def _gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        exponents, y = self._exponents(x)
        value, share = _sum(exponents)
        slope = -(self.df + 1) * y / (self.df + y.square())
        return value, (share.unsqueeze(-1) * slope).sum(1)

    def assign(self, x: Tensor) -> Tensor:
        """Mode with the largest responsibility for each point: (n, d) -> (n,) integers."""
        return self._exponents(x)[0].argmax(-1)

    def _draw(self, n: int, generator: torch.Generator) -> Tensor:
        device = generator.device
        mode = torch.randint(self.modes_count, (n,), generator=generator, device=device)
        shape = (n, self.dim)
        # A Student variable by inverse of its distribution would need a special function; Bailey's polar form does not.
        u, v = (torch.rand(shape, generator=generator, device=device, dtype=torch.float64) for _ in range(2))
        radius = (self.df * ((1 - u).pow(-2 / self.df) - 1)).sqrt()
        return self.modes.to(device)[mode] + radius * (2 * math.pi * v).cos()
