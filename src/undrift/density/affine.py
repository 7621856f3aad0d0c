r"""The same density in other coordinates, :math:`x = m + A z`."""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

from undrift.density.target import Evaluations, Target, TargetError

__all__ = ["AffineTarget"]


class AffineTarget(Target):
    r"""A target seen in coordinates z with :math:`x = m + A z`: density :math:`\gamma(m + A z) |\det A|`, same Z.

    It shares the counter of the target it shows.

    Args:
        inner: the target.
        loc: m, a number or (d,).
        scale: A, a positive number, positive (d,), or an invertible matrix (d, d), such as a Cholesky factor.
    """

    def __init__(self, inner: Target, loc: Tensor | float = 0.0, scale: Tensor | float = 1.0) -> None:
        d = inner.dim
        m = torch.as_tensor(loc, dtype=torch.float64)
        a = torch.as_tensor(scale, dtype=torch.float64)
        if m.shape not in ((), (d,)):
            raise TargetError(f"affine: loc must be a number or have shape ({d},), got {tuple(m.shape)}.")
        if a.shape not in ((), (d,), (d, d)):
            raise TargetError(
                f"affine: scale must be a number, or have shape ({d},) or ({d}, {d}), got {tuple(a.shape)}."
            )
        if not bool(torch.isfinite(m).all() and torch.isfinite(a).all()):
            raise TargetError("affine: loc and scale must be finite.")
        if a.ndim < 2 and not bool((a > 0).all()):
            raise TargetError(f"affine: scale must be positive, its smallest entry is {float(a.min()):.3g}.")
        if a.ndim == 2:
            log_det = float(torch.linalg.slogdet(a).logabsdet)
            if not math.isfinite(log_det):
                raise TargetError("affine: the matrix scale is singular; give a factor of a full covariance.")
        else:
            log_det = float(a.expand(d).log().sum())
        self.inner, self.dim, self.loc, self.scale, self.log_det = inner, d, m.expand(d), a, log_det
        self.log_z, self.parameters, self._name = inner.log_z, inner.parameters, inner.name
        self._placed: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}
        self.exact = inner.exact

    @cached_property
    def evaluations(self) -> Evaluations:
        return self.inner.evaluations

    def _on(self, x: Tensor) -> tuple[Tensor, Tensor]:
        key = (x.device, x.dtype)
        if key not in self._placed:
            self._placed[key] = self.loc.to(x), self.scale.to(x)
        return self._placed[key]

    def to_x(self, z: Tensor) -> Tensor:
        """x = m + A z, (n, d)."""
        self._check_points(z)
        m, a = self._on(z)
        return m + (z @ a.mT if a.ndim == 2 else a * z)

    def to_z(self, x: Tensor) -> Tensor:
        """z = A^-1 (x - m), (n, d)."""
        m, a = self._on(x)
        return torch.linalg.solve(a, (x - m).mT).mT if a.ndim == 2 else (x - m) / a

    def _draw(self, n: int, generator: torch.Generator) -> Tensor:
        return self.to_z(self.inner.sample(n, generator))

    def _log_density(self, x: Tensor) -> Tensor:
        return self.inner._log_density(self.to_x(x)) + self.log_det

    def log_prob(self, x: Tensor) -> Tensor:
        return self.inner.log_prob(self.to_x(x)) + self.log_det

    def log_prob_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        value, score = self.inner.log_prob_and_score(self.to_x(x))
        _, a = self._on(score)
        return value + self.log_det, score @ a if a.ndim == 2 else score * a

    def differentiable(self, x: Tensor) -> tuple[Tensor, Tensor]:
        value, score = self.inner.differentiable(self.to_x(x))
        _, a = self._on(score)
        return value + self.log_det, score @ a if a.ndim == 2 else score * a

    def constrain(self, x: Tensor) -> dict[str, Tensor]:
        return self.inner.constrain(self.to_x(x))

    def _show(self, x: Tensor) -> str:
        return self.inner._show(self.to_x(x.unsqueeze(0))[0])
