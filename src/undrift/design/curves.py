r"""Data seen through one curve: how well it can be denoised at each noise level.

Everything that the path KL of a sampler needs to know about data, whatever its law, is

.. math:: mmse(\sigma) = E|x_0 - E[x_0 | x_0 + \sigma n]|^2, \qquad
    I(\sigma_a, \sigma_b) = \int mmse\ d\,snr, \quad snr = \sigma^{-2} .

mmse is the sum over coordinates; it does not decrease in sigma, from 0 to the total variance. A trained network has a
loss instead (:mod:`undrift.design.loss`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from undrift._linalg import as_f64, gauss_legendre
from undrift.denoise.closed_form import MixtureDenoiser

__all__ = ["DataModel", "MixtureCurve", "integrate_snr"]

_PANEL = 0.25  # width in log sigma of a panel of 8 nodes
_LEVELS = 32  # noise levels a block of the mixture's quadrature


class DataModel(Protocol):
    """Data as the path KL sees it; :class:`~undrift.design.spectrum.Spectrum` is one in closed form."""

    @property
    def dim(self) -> float:
        """Coordinates, d."""
        ...

    @property
    def second_moment(self) -> float:
        """E|x0|^2."""
        ...

    def mmse(self, sigma: Tensor) -> Tensor:
        """E|x0 - E[x0 | x0 + sigma n]|^2, summed over coordinates; shape of ``sigma``."""
        ...

    def information(self, low: Tensor, high: Tensor) -> Tensor:
        """Integral of mmse over snr from 1/high^2 to 1/low^2, for levels low < high of one shape; high may be inf."""
        ...


def _snr_nodes(low: float, high: float, breaks: list[float], knee: float) -> tuple[Tensor, Tensor]:
    """Levels and weights of the integral over snr between two levels; above ``knee`` in snr itself, as far as inf."""
    inner = [b for b in breaks if low < b < min(high, knee)]
    parts = []
    if high > knee:
        far, near = high**-2, max(low, knee) ** -2
        x, w = gauss_legendre(16)
        parts.append(((far + (near - far) * x).rsqrt(), (near - far) * w))
    edges = [low, *inner, min(high, knee)] if low < knee else []
    x, w = gauss_legendre(8)
    for a, b in itertools.pairwise(edges):
        width = math.log(b / a)
        panels = max(1, math.ceil(width / _PANEL))
        h = width / panels
        sigma = a * (h * (torch.arange(panels, dtype=torch.float64).unsqueeze(-1) + x)).exp().flatten()
        parts.append((sigma, 2 * h * w.repeat(panels) / sigma.square()))
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def integrate_snr(
    curve: Callable[[Tensor], Tensor], low: Tensor, high: Tensor, breaks: list[float], knee: float
) -> Tensor:
    """Integral of a curve over snr between levels, by Gauss-Legendre over panels of log sigma.

    Args:
        curve: of levels (n,).
        low, high: levels of one shape; high may be inf.
        breaks: levels at which the curve is not smooth, increasing.
        knee: level above which the curve is smooth in snr down to 0, where snr itself is integrated over.
    """
    low, high = torch.broadcast_tensors(as_f64(low), as_f64(high))
    if not bool((low > 0).all()) or bool((low > high).any()):
        raise ValueError("information: needs levels 0 < low <= high.")
    nodes, weights, place = [], [], []
    for i, (a, b) in enumerate(zip(low.flatten().tolist(), high.flatten().tolist(), strict=True)):
        if a < b:
            sigma, weight = _snr_nodes(a, b, breaks, knee)
            nodes.append(sigma)
            weights.append(weight)
            place.append(torch.full((len(sigma),), i))
    out = torch.zeros(low.numel(), dtype=torch.float64)
    if nodes:
        out.index_add_(0, torch.cat(place), torch.cat(weights) * curve(torch.cat(nodes)))
    return out.reshape(low.shape)


class MixtureCurve:
    """The mmse of a mixture of Gaussians.

    A mixture whose coordinates are independent (its modes are all combinations of modes along each coordinate, with
    weights that multiply) is as many mixtures on the line, each by quadrature to rounding. Any other one is averaged
    over draws, without bias: the trace of the posterior covariance, which is known at every point, at the same points
    and noise for all levels.

    Args:
        mixture: the exact denoiser of the data.
        samples: draws, where draws are needed.
        seed: of the draws.

    Attributes:
        method: "quadrature" or "monte carlo".
    """

    def __init__(self, mixture: MixtureDenoiser, samples: int = 4096, seed: int = 0) -> None:
        if samples < 2:
            raise ValueError(f"MixtureCurve: samples must be at least 2, got {samples}.")
        self.mixture, self.samples, self.seed = mixture, samples, seed
        log_weights, means, values, *_ = self._parts
        weights = log_weights.exp()
        centre = weights @ means
        spread = values.expand(means.shape).sum(-1) + (means - centre).square().sum(-1)
        self._total = float(weights @ spread)
        self._second = self._total + float(centre.square().sum())
        self._factors = _factors(weights, means, _diagonal(mixture))
        self.method = "monte carlo" if self._factors is None else "quadrature"
        self._drawn: tuple[Tensor, Tensor] | None = None

    @property
    def _parts(self) -> tuple[Any, ...]:
        return self.mixture._home

    @property
    def dim(self) -> float:
        """Coordinates, d."""
        return float(self.mixture._d)

    @property
    def second_moment(self) -> float:
        """E|x0|^2."""
        return self._second

    def mmse(self, sigma: Tensor) -> Tensor:
        """See :class:`DataModel`; exact to rounding, or an average over draws (``method``)."""
        level = as_f64(sigma)
        flat, out = level.flatten(), torch.full((level.numel(),), self._total, dtype=torch.float64)
        finite = flat.isfinite()
        if self._factors is None:
            out[finite] = self._posterior_traces(flat[finite]).mean(-1)
        else:
            out[finite] = sum(count * _line_mmse(*modes, flat[finite]) for modes, count in self._factors)
        return out.reshape(level.shape)

    def std_error(self, sigma: Tensor) -> Tensor:
        """Standard error of :meth:`mmse`; zero where it is not averaged over draws."""
        level = as_f64(sigma)
        if self._factors is not None:
            return torch.zeros_like(level)
        out = self._posterior_traces(level.flatten()).std(-1) / math.sqrt(self.samples)
        return out.reshape(level.shape)

    def information(self, low: Tensor, high: Tensor) -> Tensor:
        """See :class:`DataModel`; Gauss-Legendre over panels of log sigma, and over snr above four deviations."""
        return integrate_snr(self.mmse, low, high, [], 4 * max(math.sqrt(self._total), 1e-150))

    def _posterior_traces(self, sigma: Tensor) -> Tensor:
        """tr Cov[x0 | x0 + sigma n] at each draw, (levels, samples)."""
        mixture = self.mixture
        if self._drawn is None:
            generator = torch.Generator().manual_seed(self.seed)
            x0 = mixture.sample(self.samples, generator).flatten(1)
            self._drawn = x0, torch.empty_like(x0).normal_(generator=generator)
        x0, normal = self._drawn
        _, means, values, _, _, vectors = self._parts
        out = torch.empty(len(sigma), self.samples, dtype=torch.float64)
        for i, s in enumerate(sigma):
            y, noise = mixture._coordinates(x0 + s * normal, s)
            var = values.unsqueeze(-1) + noise
            share = mixture._log_joint(y, var).softmax(0)
            gain = values.unsqueeze(-1) / var
            part = gain * y
            part = means.unsqueeze(-1) + (part if vectors is None else vectors @ part)
            apart = (part - (share.unsqueeze(1) * part).sum(0)).square().sum(1)
            within = (gain * noise).expand(-1, mixture._d, -1).sum(1)
            out[i] = (share * (within + apart)).sum(0)
        return out

    def __repr__(self) -> str:
        return f"MixtureCurve({self.mixture._count} modes, {self.mixture._d} coordinates, by {self.method})"


def _diagonal(mixture: MixtureDenoiser) -> Tensor | None:
    """Variances (M, d) of a mixture with diagonal covariances, or None."""
    _, means, values, _, _, vectors = mixture._home
    assert means is not None
    assert values is not None
    if vectors is None:
        return values.expand(means.shape)
    diagonal = mixture.covs.diagonal(dim1=-2, dim2=-1)
    return diagonal.clamp(min=0) if torch.equal(mixture.covs, torch.diag_embed(diagonal)) else None


Line = tuple[Tensor, Tensor, Tensor]  # weights, means and variances of a mixture on the line, (M,) each


def _factors(
    weights: Tensor, means: Tensor, variances: Tensor | None, centred: bool = True
) -> list[tuple[Line, float]] | None:
    """The coordinates of a product mixture, equal ones joined with a count; None if it is no product.

    ``centred``: coordinates that differ by a shift are equal.
    """
    if variances is None:
        return None
    count, d = means.shape
    joint, lines = torch.zeros(count, dtype=torch.long), []
    expected = torch.ones_like(weights)
    size = 1
    for i in range(d):
        modes, label = torch.stack([means[:, i], variances[:, i]], -1).unique(dim=0, return_inverse=True)
        share = torch.zeros(len(modes), dtype=torch.float64).index_add_(0, label, weights)
        joint, size = joint * len(modes) + label, size * len(modes)
        if size > count:  # fewer modes than combinations
            return None
        expected = expected * share[label]
        lines.append((share, modes[:, 0], modes[:, 1]))
    # Modes that coincide share a label, and their weights add up. Where a combination is missing the others weigh more.
    total = torch.zeros(size, dtype=torch.float64).index_add_(0, joint, weights)
    if not torch.allclose(total[joint], expected, rtol=1e-12, atol=0):
        return None
    found: dict[tuple[float, ...], tuple[Line, float]] = {}
    for share, mu, c in lines:
        key = tuple(torch.cat([share, mu - share @ mu if centred else mu, c]).tolist())
        line, n = found.get(key, ((share, mu, c), 0.0))
        found[key] = line, n + 1
    return list(found.values())


def _line_mmse(weights: Tensor, means: Tensor, variances: Tensor, sigma: Tensor) -> Tensor:
    """mmse (levels,) of a mixture on the line, by panels of half a deviation around every mode, 12 deviations far."""
    if len(weights) == 1:
        return variances * sigma.square() / (variances + sigma.square())
    x, w = gauss_legendre(12)
    grid = torch.linspace(-12, 12, 49, dtype=torch.float64)
    out = []
    for some in sigma.split(_LEVELS):
        noise = some.square().unsqueeze(-1)
        var = variances + noise  # (levels, M)
        edges = (means.unsqueeze(-1) + var.sqrt().unsqueeze(-1) * grid).flatten(1).sort(-1).values
        width = edges.diff(dim=-1).unsqueeze(-1)
        point = (edges[:, :-1, None] + width * x).flatten(1).unsqueeze(1)  # (levels, 1, X)
        weight = (width * w).flatten(1)
        off = point - means.unsqueeze(-1)  # (levels, M, X)
        joint = weights.log().unsqueeze(-1) - 0.5 * (var.log().unsqueeze(-1) + off.square() / var.unsqueeze(-1))
        density = (joint.logsumexp(1) - 0.5 * math.log(2 * math.pi)).exp()
        share = joint.softmax(1)
        gain = (variances / var).unsqueeze(-1)
        part = means.unsqueeze(-1) + gain * off
        apart = (part - (share * part).sum(1, keepdim=True)).square()
        out.append(((share * (gain * noise.unsqueeze(-1) + apart)).sum(1) * density * weight).sum(-1))
    return torch.cat(out)
