r"""Noise models: the law of data y given the prediction :math:`f = A(x)` of a forward operator.

    GaussianNoise      y = f + std n, independent
    CorrelatedNoise    y = f + n, n ~ N(0, cov)
    LaplaceNoise       density exp(-|y - f| / scale) / (2 scale)
    StudentTNoise      y = f + scale t, t of df degrees of freedom
    PoissonNoise       counts of rate peak f

Predictions are (batch, *data); data are the same shape, or (*data) and shared by the batch. ``log_prob`` is normalised:
the logarithm of a density, or for counts of a mass. Its sum over the data is carried in float64, because weights of
particles are differences of such sums.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["CorrelatedNoise", "GaussianNoise", "LaplaceNoise", "Noise", "PoissonNoise", "StudentTNoise"]


class Noise(ABC):
    """Base of all noise models."""

    def log_prob(self, y: Tensor, predicted: Tensor) -> Tensor:
        """Log density (or mass) of the data given predictions.

        Args:
            y: data (batch, *data), or (*data) or (1, *data) for all of the batch; taken to the predictions' dtype.
            predicted: (batch, *data).

        Returns:
            (batch,), float64, differentiable in both.

        Raises:
            ValueError: if the shapes do not belong together.
        """
        data = predicted.shape[1:]
        if y.shape not in (data, predicted.shape, (1, *data)):
            raise ValueError(
                f"{type(self).__name__}: data of shape {tuple(y.shape)} for predictions {tuple(predicted.shape)}; "
                f"expected {tuple(data)}, shared by the batch, or {tuple(predicted.shape)}."
            )
        return self._log_prob(y.to(predicted), predicted)

    @abstractmethod
    def _log_prob(self, y: Tensor, predicted: Tensor) -> Tensor:
        """``log_prob`` of data that broadcast against the predictions."""

    @abstractmethod
    def sample(self, predicted: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Data drawn for predictions (batch, *data): same shape, dtype and device."""

    def check(self, y: Tensor) -> None:
        """
        Raises:
            ValueError: if the data could not have come from this noise.
        """
        bad = int((~torch.isfinite(y)).sum())
        if bad:
            raise ValueError(
                f"{type(self).__name__}: {bad} of {y.numel()} data are not finite; leave missing data out with a Mask."
            )


@dataclass(frozen=True, eq=False)
class GaussianNoise(Noise):
    """Independent Gaussian noise.

    Args:
        std: standard deviation, one number or a tensor that broadcasts against the data (*data).
    """

    std: float | Tensor

    def __post_init__(self) -> None:
        _positive("GaussianNoise", "std", self.std)

    @property
    def variance(self) -> Tensor:
        """Variance, the shape of ``std``, float64."""
        return torch.as_tensor(self.std, dtype=torch.float64).square()

    def _log_prob(self, y: Tensor, predicted: Tensor) -> Tensor:
        std = _like(predicted, self.std)
        return _total(-0.5 * ((y - predicted) / std).square() - std.log() - 0.5 * math.log(2 * math.pi))

    def sample(self, predicted: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return predicted + _like(predicted, self.std) * _normal(predicted, generator)

    def times(self, v: Tensor) -> Tensor:
        """The noise's covariance applied to v (..., *data)."""
        return self.variance.to(v) * v

    def covariance(self, data: Sequence[int]) -> Tensor:
        """Covariance matrix of data of this shape (d, d), float64, d their number."""
        return torch.diag(self.variance.expand(*data).flatten())


@dataclass(frozen=True, eq=False)
class CorrelatedNoise(Noise):
    """Gaussian noise of any covariance.

    Args:
        cov: symmetric positive definite (d, d), d the number of data, in the order of the flattened data.
    """

    cov: Tensor
    _root: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        cov = torch.as_tensor(self.cov, dtype=torch.float64)
        if cov.ndim != 2 or cov.shape[0] != cov.shape[1]:
            raise ValueError(f"CorrelatedNoise: cov must be a square matrix, got shape {tuple(cov.shape)}.")
        if not torch.allclose(cov, cov.T, rtol=1e-10, atol=1e-12 * float(cov.abs().max())):
            raise ValueError("CorrelatedNoise: cov must be symmetric.")
        root, info = torch.linalg.cholesky_ex(cov)
        if int(info) or not bool(torch.isfinite(root).all()):
            low = float(torch.linalg.eigvalsh(cov)[0]) if bool(torch.isfinite(cov).all()) else math.nan
            raise ValueError(f"CorrelatedNoise: cov must be positive definite; its smallest eigenvalue is {low:.3g}.")
        object.__setattr__(self, "cov", cov)
        object.__setattr__(self, "_root", root)

    def _fits(self, data: Sequence[int]) -> None:
        if math.prod(data) != self.cov.shape[0]:
            raise ValueError(
                f"CorrelatedNoise: cov is for {self.cov.shape[0]} data, the predictions hold "
                f"{math.prod(data)} each, of shape {tuple(data)}."
            )

    def _log_prob(self, y: Tensor, predicted: Tensor) -> Tensor:
        self._fits(predicted.shape[1:])
        root = self._root.to(predicted.device)
        residual = (y - predicted).flatten(1).double()
        white = torch.linalg.solve_triangular(root, residual.T, upper=False)
        return -0.5 * white.square().sum(0) - root.diagonal().log().sum() - 0.5 * len(root) * math.log(2 * math.pi)

    def sample(self, predicted: Tensor, generator: torch.Generator | None = None) -> Tensor:
        self._fits(predicted.shape[1:])
        noise = _normal(predicted, generator).flatten(1) @ self._root.T.to(predicted)
        return predicted + noise.reshape(predicted.shape)

    def times(self, v: Tensor) -> Tensor:
        """The noise's covariance applied to v (batch, *data)."""
        return (v.flatten(1) @ self.cov.to(v)).reshape(v.shape)

    def covariance(self, data: Sequence[int]) -> Tensor:
        """Covariance matrix of data of this shape (d, d), float64."""
        self._fits(data)
        return self.cov

    def root(self, data: Sequence[int]) -> Tensor:
        """Its lower root (d, d), float64."""
        self._fits(data)
        return self._root


@dataclass(frozen=True, eq=False)
class LaplaceNoise(Noise):
    """Independent two-sided exponential noise, of standard deviation sqrt(2) scale.

    Args:
        scale: mean absolute deviation, one number or a tensor that broadcasts against the data (*data).
    """

    scale: float | Tensor

    def __post_init__(self) -> None:
        _positive("LaplaceNoise", "scale", self.scale)

    def _log_prob(self, y: Tensor, predicted: Tensor) -> Tensor:
        scale = _like(predicted, self.scale)
        return _total(-(y - predicted).abs() / scale - (2 * scale).log())

    def sample(self, predicted: Tensor, generator: torch.Generator | None = None) -> Tensor:
        empty = torch.empty(2, *predicted.shape, dtype=torch.float64, device=predicted.device)
        first, second = empty.exponential_(generator=generator)
        return predicted + _like(predicted, self.scale) * (first - second).to(predicted)


@dataclass(frozen=True, eq=False)
class StudentTNoise(Noise):
    """Independent noise with heavy tails, for data with outliers.

    Args:
        df: degrees of freedom, positive; the variance df / (df - 2) scale^2 is finite above 2.
        scale: one number or a tensor that broadcasts against the data (*data).

    References:
        Bailey, Polar Generation of Random Variates with the t-Distribution, 1994 (sampling).
    """

    df: float
    scale: float | Tensor

    def __post_init__(self) -> None:
        _positive("StudentTNoise", "df", self.df)
        _positive("StudentTNoise", "scale", self.scale)

    def _log_prob(self, y: Tensor, predicted: Tensor) -> Tensor:
        scale = _like(predicted, self.scale)
        norm = math.lgamma((self.df + 1) / 2) - math.lgamma(self.df / 2) - 0.5 * math.log(self.df * math.pi)
        ratio = ((y - predicted) / scale).square() / self.df
        return _total(norm - scale.log() - (self.df + 1) / 2 * ratio.log1p())

    def sample(self, predicted: Tensor, generator: torch.Generator | None = None) -> Tensor:
        shape = (2, *predicted.shape)
        first, second = torch.rand(shape, generator=generator, dtype=torch.float64, device=predicted.device)
        radius = (self.df * torch.expm1(-2 / self.df * torch.log1p(-first))).sqrt()
        t = radius * torch.cos(2 * math.pi * second)
        return predicted + _like(predicted, self.scale) * t.to(predicted)


@dataclass(frozen=True, eq=False)
class PoissonNoise(Noise):
    r"""Counts, :math:`y \sim \text{Poisson}(\text{peak} \max(f, \text{floor}))`.

    An intensity cannot be negative, but the prediction of a linear operator at a sample can: below ``floor`` the rate
    stays at its smallest value, the likelihood is finite and flat, and its gradient is zero.

    Args:
        peak: expected counts where the prediction is 1.
        floor: smallest intensity.
    """

    peak: float
    floor: float = 1e-6

    def __post_init__(self) -> None:
        _positive("PoissonNoise", "peak", self.peak)
        _positive("PoissonNoise", "floor", self.floor)

    def check(self, y: Tensor) -> None:
        super().check(y)
        bad = int(((y < 0) | (y != y.round())).sum())
        if bad:
            raise ValueError(f"PoissonNoise: data are counts 0, 1, 2, ...; {bad} of {y.numel()} are not.")

    def _log_prob(self, y: Tensor, predicted: Tensor) -> Tensor:
        rate = self.peak * predicted.double().clamp(min=self.floor)  # terms of large counts nearly cancel
        y = y.double()
        return _total(y * rate.log() - rate - torch.lgamma(y + 1))

    def sample(self, predicted: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.poisson(self.peak * predicted.clamp(min=self.floor), generator=generator)


def _positive(owner: str, name: str, value: float | Tensor) -> None:
    given = torch.as_tensor(value)
    if not bool((torch.isfinite(given) & (given > 0)).all()) or given.numel() == 0:
        shown = (
            value if isinstance(value, (int, float)) else f"values from {float(given.min())} to {float(given.max())}"
        )
        raise ValueError(f"{owner}: {name} must be positive and finite, got {shown}.")


def _like(predicted: Tensor, value: float | Tensor) -> Tensor:
    """A number, or one for each datum, to go with predictions (batch, *data)."""
    out = torch.as_tensor(value, dtype=predicted.dtype, device=predicted.device)
    data = predicted.shape[1:]
    if out.ndim > len(data) or any(m not in (1, n) for m, n in zip(out.shape[::-1], data[::-1], strict=False)):
        raise ValueError(
            f"noise: a deviation or scale of shape {tuple(out.shape)} does not broadcast against data of shape "
            f"{tuple(data)}; give one number, or one for each datum."
        )
    return out


def _total(terms: Tensor) -> Tensor:
    return terms.flatten(1).sum(-1, dtype=torch.float64)


def _normal(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.empty_like(like, requires_grad=False).normal_(generator=generator)
