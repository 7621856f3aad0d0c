r"""Where a denoiser of functions errs: the mean squared error of every mode, beside what is at stake there.

.. math:: e_j(\sigma) = E\,\langle D(x_0 + \sigma n, \sigma) - x_0, \phi_j\rangle^2, \qquad
    \text{prior } \mu_j = \operatorname{var} \langle x_0, \phi_j\rangle, \qquad
    \text{linear } \frac{\mu_j\, \sigma^2\lambda_j}{\mu_j + \sigma^2\lambda_j} .

The last is what the best denoiser that treats every mode by itself and linearly leaves: the optimum if the data are a
Gaussian field of that basis, and for other data what a network has to beat. Its advantage is that of dependence
between modes. Errors near the prior mean that a mode is not denoised at all, errors above it that the model does harm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from undrift.denoise.base import Denoiser
from undrift.space import FunctionSpace

__all__ = ["ModeErrors", "mode_errors"]


@dataclass(frozen=True, eq=False)
class ModeErrors:
    """Errors of a denoiser, mode by mode; all tensors float64, on the CPU.

    Attributes:
        sigma: noise levels (S,).
        error: mean squared errors (S, *grid), a mean over fields and components.
        std_error: their standard errors, (S, *grid).
        prior: variances of the data's modes (*grid), about their mean.
        linear: errors of the best mode-by-mode linear denoiser for that prior, (S, *grid).
        eigenvalues: of minus the Laplacian, (*grid).
        fields: how many functions were used.
    """

    sigma: Tensor
    error: Tensor
    std_error: Tensor
    prior: Tensor
    linear: Tensor
    eigenvalues: Tensor
    fields: int

    @property
    def total(self) -> Tensor:
        """Mean squared errors in H, (S,): sums over the modes."""
        return self.error.flatten(1).sum(1)

    def summary(self, bands: int = 8) -> dict[str, Any]:
        """Plain data: totals, and sums over bands of wavenumbers, equally wide in their logarithm.

        Args:
            bands: how many, beside the constant mode; empty ones are left out.

        Returns:
            "fields", "sigma", "error", "linear" (a number for each level), "prior" (a number), and "bands": a list of
            "wavenumbers" [from, to], "modes", "prior", and "error", "std_error" and "linear", one for each level.
        """
        if bands < 1:
            raise ValueError(f"ModeErrors.summary: bands must be at least 1, got {bands}.")
        k = self.eigenvalues.flatten().sqrt()
        low, high = float(k[k > 0].min()) if bool((k > 0).any()) else 1.0, float(k.max())
        edges = torch.linspace(0, 1, bands + 1, dtype=torch.float64)[1:-1]
        place = torch.bucketize(k.clamp(min=low), low * (max(high, low) / low) ** edges, right=True)
        place = torch.where(k == 0, -1, place)
        rows = []
        for band in place.unique().tolist():
            inside = place == band
            rows.append(
                {
                    "wavenumbers": [float(k[inside].min()), float(k[inside].max())],
                    "modes": int(inside.sum()),
                    "prior": float(self.prior.flatten()[inside].sum()),
                    "error": self.error.flatten(1)[:, inside].sum(1).tolist(),
                    "std_error": self.std_error.flatten(1)[:, inside].square().sum(1).sqrt().tolist(),
                    "linear": self.linear.flatten(1)[:, inside].sum(1).tolist(),
                }
            )
        return {
            "fields": self.fields,
            "sigma": self.sigma.tolist(),
            "error": self.total.tolist(),
            "linear": self.linear.flatten(1).sum(1).tolist(),
            "prior": float(self.prior.sum()),
            "bands": rows,
        }


@torch.no_grad()
def mode_errors(
    denoiser: Denoiser,
    space: FunctionSpace,
    fields: Tensor,
    sigmas: Sequence[float],
    seed: int | torch.Generator = 0,
    batch: int = 256,
    **condition: Any,
) -> ModeErrors:
    """Errors of a denoiser on noisy functions.

    Args:
        denoiser: takes points in the space's coordinates.
        space: its noise, and the basis in which errors are looked at.
        fields: data (N, *event) in the space's coordinates, N > 1; better not those of training.
        sigmas: noise levels.
        seed: integer or generator, on the fields' device; not the one that drew the fields. The same noise serves every
            level.
        batch: functions denoised at a time.
        condition: passed on; tensors whose first size is N are split along with the batches.

    Raises:
        TypeError: if the space is not one of functions.
        ValueError: for fewer than two fields, or levels that are not positive.
    """
    if not isinstance(space, FunctionSpace):
        raise TypeError(f"mode_errors: space must be a FunctionSpace, got {type(space).__name__}; White has no modes.")
    if fields.shape[0] < 2 or batch < 1:
        raise ValueError(f"mode_errors: needs two fields or more and batch >= 1, got {fields.shape[0]} and {batch}.")
    levels = torch.tensor(list(sigmas), dtype=torch.float64)
    if not len(levels) or not bool((levels.isfinite() & (levels > 0)).all()):
        raise ValueError(f"mode_errors: sigmas must be positive numbers, got {list(sigmas)}.")
    generator = seed if isinstance(seed, torch.Generator) else torch.Generator(fields.device).manual_seed(seed)
    n, grid = fields.shape[0], space.basis.grid(fields.shape[1:])
    first, second = (torch.zeros(len(levels), *grid, dtype=torch.float64) for _ in range(2))
    for start in range(0, n, batch):
        x = fields[start : start + batch]
        part = {
            k: v[start : start + batch] if isinstance(v, Tensor) and v.ndim and v.shape[0] == n else v
            for k, v in condition.items()
        }
        noise = space.colour(torch.empty_like(x).normal_(generator=generator))
        for i, sigma in enumerate(levels.tolist()):
            level = torch.full((x.shape[0],), sigma, dtype=x.dtype, device=x.device)
            gap = space.coefficients((denoiser(x + sigma * noise, level, **part) - x).double())
            squares = gap.reshape(x.shape[0], -1, *grid).square().mean(1)  # components share their spectrum
            first[i] += squares.sum(0).cpu()
            second[i] += squares.square().sum(0).cpu()
    mean = first / n
    deviation = ((second / n - mean.square()).clamp(min=0) / (n - 1)).sqrt()
    prior = space.coefficients(fields.double()).var(0).reshape(-1, *grid).mean(0).cpu()
    noise_variance = levels.square().reshape(-1, *[1] * len(grid)) * space.variances(grid)
    linear = prior * noise_variance / (prior + noise_variance)
    return ModeErrors(levels, mean, deviation, prior, linear, space.basis.eigenvalues(grid), n)
