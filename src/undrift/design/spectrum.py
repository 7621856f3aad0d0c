r"""Gaussian data seen in its eigenbasis: a spectrum of variances, on which every plan has an exactly known law.

For data :math:`N(\mu, U \Lambda U^\top)` the best denoiser acts on each eigenvector alone,

.. math:: D(\tilde x, \sigma)_i = \mu_i + \frac{\lambda_i}{\lambda_i + \sigma^2} (\tilde x_i - \mu_i),

and so does every linear process, whose coefficients are shared by all coordinates. So d coordinates are d problems of
one coordinate each, and equal eigenvalues are one problem with a count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from undrift._linalg import as_f64
from undrift.denoise.closed_form import GaussianDenoiser

__all__ = ["Spectrum"]


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Variances of Gaussian data along its eigenvectors.

    Args:
        variance: eigenvalues of the covariance, (n,), not negative, in squared data units.
        mean: the data's mean along the same vectors, (n,), or one number for all; for a group of equal eigenvalues the
            root of its mean square.
        count: how many coordinates share each eigenvalue, (n,), or one number for all.
        name: for tables and figures.

    Raises:
        ValueError: if a number is not finite, an eigenvalue negative, a count not positive, or the shapes do not fit.
    """

    variance: Tensor
    mean: Tensor | float = 0.0
    count: Tensor | float = 1.0
    name: str = "spectrum"

    def __post_init__(self) -> None:
        variance = as_f64(self.variance)
        if variance.ndim != 1 or not len(variance):
            raise ValueError(
                f"Spectrum: variance must be a list of eigenvalues (n,), got shape {tuple(variance.shape)}."
            )
        if not bool((variance.isfinite() & (variance >= 0)).all()):
            raise ValueError("Spectrum: eigenvalues must be finite and not negative; a covariance has no others.")
        object.__setattr__(self, "variance", variance)
        for key in ("mean", "count"):
            value = as_f64(getattr(self, key))
            if value.ndim and value.shape != variance.shape:
                raise ValueError(
                    f"Spectrum: {key} must be a number or have the shape of variance, {tuple(variance.shape)}, got "
                    f"{tuple(value.shape)}."
                )
            object.__setattr__(self, key, value.expand_as(variance))
        if not bool(self._mean.isfinite().all()):
            raise ValueError("Spectrum: mean must be finite.")
        if not bool(((self._count > 0) & self._count.isfinite()).all()):
            raise ValueError("Spectrum: counts must be positive.")

    @property
    def _mean(self) -> Tensor:
        return self.mean  # type: ignore[return-value]

    @property
    def _count(self) -> Tensor:
        return self.count  # type: ignore[return-value]

    # -- where spectra come from ---------------------------------------------------------------------------------------

    @classmethod
    def power_law(cls, dim: int, exponent: float = 2.0, mean_variance: float = 0.25) -> Spectrum:
        """Eigenvalues in proportion to i^-exponent, i = 1 ... dim, with the given mean.

        Raises:
            ValueError: if ``dim`` is below 1 or ``mean_variance`` not positive.
        """
        if dim < 1 or not mean_variance > 0:
            raise ValueError(
                f"Spectrum.power_law: needs dim >= 1 and mean_variance > 0, got {dim} and {mean_variance}."
            )
        values = torch.arange(1, dim + 1, dtype=torch.float64) ** -exponent
        return cls(values * (mean_variance / values.mean()), name=f"i^-{exponent:g}, d = {dim}")

    @classmethod
    def images(cls, size: int, exponent: float = 2.5, mean_variance: float = 0.25) -> Spectrum:
        r"""Grey images of size x size with power :math:`(|k|^2 + \frac12)^{-p/2}` at integer wave vectors k.

        Natural images have p between 2 and 3. Equal eigenvalues are joined.

        Args:
            size: pixels along an edge.
            exponent: p.
            mean_variance: of a pixel.
        """
        if size < 1 or not mean_variance > 0:
            raise ValueError(f"Spectrum.images: needs size >= 1 and mean_variance > 0, got {size} and {mean_variance}.")
        k = torch.fft.fftfreq(size, 1 / size, dtype=torch.float64).square()
        squares, count = (k + k.unsqueeze(-1)).flatten().unique(return_counts=True)
        values = (squares + 0.5) ** (-exponent / 2)
        weights = count.double()
        values = values * (mean_variance * weights.sum() / (values * weights).sum())
        return cls(values, count=weights, name=f"images {size} x {size}, p = {exponent:g}")

    @classmethod
    def of(cls, x: Tensor, basis: Literal["pca", "fft"] = "pca", name: str = "data") -> Spectrum:
        """The spectrum of a sample.

        Args:
            x: points (n, *event), n at least 2.
            basis: "pca" takes the covariance's own eigenvectors, exact for the sample, at a cost of d^3; with fewer
                points than coordinates the rest of the spectrum is zero. "fft" takes the plane waves over the last two
                dimensions of the event (the last one, if there is no other): exact for stationary data, a diagonal of
                the covariance for others, at a cost of d log d, and with little noise from few points.
            name: of the spectrum.

        Raises:
            ValueError: for fewer than two points, or points that are not finite.
        """
        if x.ndim < 2 or len(x) < 2:
            raise ValueError(f"Spectrum.of: x must be points (n, *event) with n >= 2, got {tuple(x.shape)}.")
        if basis not in ("pca", "fft"):
            raise ValueError(f"Spectrum.of: basis must be 'pca' or 'fft', got {basis!r}.")
        points = x.detach().cpu().double()
        if not bool(points.isfinite().all()):
            raise ValueError("Spectrum.of: x must be finite.")
        centre = points.mean(0)
        points = points - centre
        n = len(points)
        if basis == "fft":
            axes = tuple(range(max(1, points.ndim - 2), points.ndim))
            power = torch.fft.fftn(points, dim=axes, norm="ortho").abs().square().sum(0) / (n - 1)
            mean = torch.fft.fftn(centre, dim=tuple(a - 1 for a in axes), norm="ortho").abs()
            order = power.flatten().argsort(descending=True)
            return cls(power.flatten()[order], mean.flatten()[order], name=f"{name}, fft")
        flat = points.flatten(1)
        if n <= flat.shape[1]:
            _, s, v = torch.linalg.svd(flat, full_matrices=True)
            values = torch.zeros(flat.shape[1], dtype=torch.float64)
            values[: len(s)] = s.square() / (n - 1)
            coordinates = v @ centre.flatten()
        else:
            values, vectors = torch.linalg.eigh(flat.mT @ flat / (n - 1))
            values, coordinates = values.clamp(min=0).flip(0), (vectors.mT @ centre.flatten()).flip(0)
        return cls(values, coordinates, name=f"{name}, pca")

    def grouped(self, groups: int = 64) -> Spectrum:
        """At most so many eigenvalues: those within equal steps of log variance joined, trace and mean square kept.

        The law of a plan is smooth in the eigenvalue, so a schedule designed for the groups is one for the spectrum.
        Eigenvalues below 1e-12 of the largest are one group.
        """
        if groups < 2:
            raise ValueError(f"Spectrum.grouped: groups must be at least 2, got {groups}.")
        if len(self.variance) <= groups:
            return self
        top = float(self.variance.max())
        level = (self.variance / top).clamp(min=1e-12).log() if top > 0 else torch.zeros_like(self.variance)
        low = float(level.min())
        place = ((level - low) / (-low if low < 0 else 1.0) * (groups - 1)).round().long()
        used, place = place.unique(return_inverse=True)

        def total(values: Tensor) -> Tensor:
            return torch.zeros(len(used), dtype=torch.float64).scatter_add(0, place, values)

        count = total(self._count)
        variance = total(self._count * self.variance) / count
        mean = (total(self._count * self._mean.square()) / count).sqrt()
        return Spectrum(variance.flip(0), mean.flip(0), count.flip(0), self.name)

    # -- what follows --------------------------------------------------------------------------------------------------

    @property
    def dim(self) -> float:
        """Coordinates, d."""
        return float(self._count.sum())

    @property
    def second_moment(self) -> float:
        """E|x0|^2."""
        return float((self._count * (self.variance + self._mean.square())).sum())

    def mmse(self, sigma: Tensor) -> Tensor:
        """E|x0 - E[x0 | x0 + sigma n]|^2, summed over coordinates; shape of ``sigma``."""
        noise = as_f64(sigma).square().unsqueeze(-1)
        scale = torch.where(self.variance > 0, self.variance * noise / (self.variance + noise), 0.0)
        return (self._count * torch.where(noise.isinf(), self.variance, scale)).sum(-1)

    def information(self, low: Tensor, high: Tensor) -> Tensor:
        r""":math:`\int mmse\, d\,snr` from 1/high^2 to 1/low^2, in closed form, for levels low < high of one shape."""
        near, far = (as_f64(s).square().reciprocal().unsqueeze(-1) * self.variance for s in (low, high))
        return (self._count * (torch.log1p(near) - torch.log1p(far))).sum(-1)

    def denoiser(self) -> GaussianDenoiser:
        """The exact denoiser of points (batch, n) in the eigenbasis, one coordinate per eigenvalue."""
        return GaussianDenoiser(self._mean, self.variance)

    def __repr__(self) -> str:
        low, high = float(self.variance.min()), float(self.variance.max())
        per = self.second_moment / self.dim
        return (
            f"Spectrum({self.name}: {self.dim:g} coordinates, {len(self.variance)} eigenvalues, "
            f"{low:.3g} to {high:.3g}, root mean square {math.sqrt(per):.3g})"
        )
