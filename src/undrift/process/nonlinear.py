r"""The complete recipe without linearity: any energy, and noise and mixing that depend on the state.

.. math::
    dz = f(z)\,dt + \sqrt{2 D(z)}\,dw, \qquad f = -(D + Q) \nabla H + \tau, \qquad
    \tau_i = \sum_j \partial_{z_j} (D_{ij} + Q_{ij})

With D(z) positive semi-definite and Q(z) skew, :math:`p \propto e^{-H}` is stationary, and every diffusion whose only
stationary law is p has this form. The correction :math:`\tau` vanishes for constant D and Q; left out elsewhere, the
process settles in another law. Such a process has no closed kernel: it is simulated.

References:
    Ma, Chen & Fox, A Complete Recipe for Stochastic Gradient MCMC, 2015, theorems 1-2.
    Pandey & Mandt, A Complete Recipe for Diffusion Generative Models, 2023, eq. 2-4.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.func import grad, jacrev, vmap
from tqdm import tqdm

from undrift._linalg import psd_sqrt

__all__ = ["NonlinearRecipe", "fokker_planck_residual"]

Field = Callable[[Tensor], Tensor]
"""A batched function of the state: maps z (batch, dim) to (batch, ...), with torch operations."""


def _one(field: Field) -> Field:
    """A batched field at one point."""
    return lambda point: field(point.unsqueeze(0)).squeeze(0)


def _matrix_field(matrix: Tensor | Field) -> Field:
    """Constant matrices as fields, on the state's dtype and device."""
    if not isinstance(matrix, Tensor):
        return matrix
    return lambda z: matrix.to(z).expand(z.shape[0], *matrix.shape)


def _apply(matrix: Tensor, v: Tensor) -> Tensor:
    """One matrix (dim, dim), or one per sample, times v (batch, dim)."""
    return v @ matrix.mT if matrix.ndim == 2 else (matrix @ v.unsqueeze(-1)).squeeze(-1)


def _divergence(field: Field) -> Field:
    """Row divergence of a matrix field at one point: sum_j d_j M_ij, (dim,)."""
    return lambda point: jacrev(_one(field))(point).diagonal(dim1=-2, dim2=-1).sum(-1)


def fokker_planck_residual(drift: Field, diffusion: Tensor | Field, energy: Field, z: Tensor) -> Tensor:
    r"""By how much :math:`p \propto e^{-H}` fails to be stationary for :math:`dz = f\,dt + \sqrt{2D}\,dw`, at points z.

    The pointwise residual :math:`\big(\nabla \cdot (f p) - \sum_{ij} \partial_i \partial_j (D_{ij} p)\big) / p`, which
    is :math:`\nabla \cdot u - u \cdot \nabla H` with :math:`u = f - \nabla \cdot D + D \nabla H`. It vanishes
    everywhere exactly when p is stationary; any drift may be given, one from the recipe or not.

    Args:
        drift: f, maps (batch, dim) to (batch, dim).
        diffusion: D, a matrix (dim, dim), or maps (batch, dim) to (batch, dim, dim).
        energy: H, maps (batch, dim) to (batch,).
        z: points (batch, dim).

    Returns:
        residuals (batch,), in units of 1/time.
    """
    slope, noise = grad(_one(energy)), _matrix_field(diffusion)
    spread = _divergence(noise)

    def current(point: Tensor) -> Tensor:
        return _one(drift)(point) - spread(point) + _one(noise)(point) @ slope(point)

    return vmap(lambda point: jacrev(current)(point).trace() - current(point) @ slope(point))(z)


@dataclass(frozen=True, eq=False)
class NonlinearRecipe:
    """A process from (D(z), Q(z), H), simulated; its stationary law is exp(-H) up to a constant.

    Args:
        energy: H, maps (batch, dim) to (batch,), with torch operations.
        diffusion: D, positive semi-definite: a matrix (dim, dim), or maps (batch, dim) to (batch, dim, dim).
        curl: Q, skew-symmetric: likewise.
        dim: number of coordinates of the state, auxiliaries included.
        probe: points (N, dim) at which D, Q and H are checked; standard normal ones if not given. Give some where the
            energy is defined on part of the space only.

    Raises:
        ValueError: if at a probe a value has a wrong shape or is not finite, D is not symmetric and positive
            semi-definite, or Q is not skew-symmetric.
    """

    energy: Field
    diffusion: Tensor | Field
    curl: Tensor | Field
    dim: int
    probe: Tensor | None = None

    def __post_init__(self) -> None:
        if self.dim < 1:
            raise ValueError(f"NonlinearRecipe: dim must be at least 1, got {self.dim}.")
        probe = self._probe()
        if probe.ndim != 2 or probe.shape[1] != self.dim:
            raise ValueError(f"NonlinearRecipe: probe must have shape (N, {self.dim}), got {tuple(probe.shape)}.")
        n = probe.shape[0]
        square = (n, self.dim, self.dim)
        for name in ("diffusion", "curl"):
            constant = getattr(self, name)
            if isinstance(constant, Tensor) and constant.shape != square[1:]:
                raise ValueError(f"NonlinearRecipe: {name} must be {square[1:]}, got {tuple(constant.shape)}.")
        with torch.no_grad():
            d, q = self.matrices(probe)
            values = {"energy": (self.energy(probe), (n,)), "diffusion": (d, square), "curl": (q, square)}
        for name, (value, shape) in values.items():
            if value.shape != shape:
                raise ValueError(
                    f"NonlinearRecipe: {name} must map {tuple(probe.shape)} to {shape}, got {tuple(value.shape)}."
                )
            if not bool(torch.isfinite(value).all()):
                where = int((~torch.isfinite(value.reshape(n, -1))).any(1).nonzero()[0])
                raise ValueError(f"NonlinearRecipe: {name} is not finite at z = {probe[where].tolist()}.")
        _worst("diffusion must be symmetric; D - D' has an entry of size", (d - d.mT).abs(), d, probe)
        _worst("curl must be skew-symmetric; Q + Q' has an entry of size", (q + q.mT).abs(), q, probe)
        low = torch.linalg.eigvalsh(d)[:, 0]
        _worst("diffusion must be positive semi-definite; an eigenvalue is minus", -low[:, None, None], d, probe)

    def _probe(self) -> Tensor:
        if self.probe is not None:
            return self.probe
        return torch.randn(16, self.dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def matrices(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """D and Q at z (batch, dim), each (batch, dim, dim)."""
        return _matrix_field(self.diffusion)(z), _matrix_field(self.curl)(z)

    def correction(self, z: Tensor) -> Tensor:
        """tau at z (batch, dim), same shape, by automatic differentiation; zero where D and Q are constant."""
        tau = torch.zeros_like(z)
        for field in (self.diffusion, self.curl):
            if not isinstance(field, Tensor):
                tau = tau + vmap(_divergence(field))(z)
        return tau

    def drift(self, z: Tensor) -> Tensor:
        """f at z (batch, dim), same shape."""
        slope = grad(lambda points: self.energy(points).sum())(z)
        f = self.correction(z)
        for matrix in (self.diffusion, self.curl):
            f = f - _apply(matrix.to(z) if isinstance(matrix, Tensor) else matrix(z), slope)
        return f

    @property
    def reverse(self) -> NonlinearRecipe:
        """The stationary process run backwards: the same energy and noise, the curl with its sign changed."""
        q = self.curl
        curl = -q if isinstance(q, Tensor) else lambda z: -q(z)
        return NonlinearRecipe(self.energy, self.diffusion, curl, self.dim, self.probe)

    @property
    def rate(self) -> float:
        """Mean over probes and coordinates of the diagonal of 2 D: squared distance per time, per coordinate."""
        with torch.no_grad():
            return float(2 * self.matrices(self._probe())[0].diagonal(dim1=1, dim2=2).mean())

    def stationarity_residual(self, z: Tensor) -> Tensor:
        """:func:`fokker_planck_residual` of this process at z (batch, dim): zero up to rounding, (batch,)."""
        return fokker_planck_residual(self.drift, self.diffusion, self.energy, z)

    def step(self, z: Tensor, size: float, noise: Tensor, scheme: Literal["heun", "euler"] | None = None) -> Tensor:
        r"""One step of length ``size`` from z (batch, dim), driven by standard normal ``noise`` of the same shape.

        Euler-Maruyama, :math:`z + h f(z) + \sqrt{2 h D(z)} \xi`, of weak order 1 for any D; or stochastic Heun, which
        averages f over both ends of that step, of weak order 2 where D is constant (it would converge to the wrong
        process elsewhere).

        Args:
            scheme: "heun" or "euler"; None for Heun where D is constant and Euler-Maruyama elsewhere.
        """
        scheme = self._scheme(scheme)
        d = self.diffusion.to(z) if isinstance(self.diffusion, Tensor) else self.diffusion(z)
        kick = size**0.5 * _apply(psd_sqrt(2 * d), noise)
        slope = self.drift(z)
        euler = z + size * slope + kick
        return euler if scheme == "euler" else z + 0.5 * size * (slope + self.drift(euler)) + kick

    def _scheme(self, scheme: str | None) -> Literal["heun", "euler"]:
        constant = isinstance(self.diffusion, Tensor)
        if scheme not in (None, "heun", "euler"):
            raise ValueError(f"NonlinearRecipe: scheme must be 'heun', 'euler' or None, got {scheme!r}.")
        if scheme == "heun" and not constant:
            raise ValueError(
                "NonlinearRecipe: scheme 'heun' needs a constant diffusion, given as a matrix; use 'euler' for D(z)."
            )
        if scheme is None:
            return "heun" if constant else "euler"
        return "heun" if scheme == "heun" else "euler"

    def simulate(
        self,
        z0: Tensor,
        t_end: float,
        steps: int,
        generator: torch.Generator | None = None,
        trajectory: bool = False,
        scheme: Literal["heun", "euler"] | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Run the process from z0 for a time ``t_end`` in equal steps (see :meth:`step`).

        Args:
            z0: start (batch, dim), floating-point.
            t_end: time to run for, positive.
            steps: number of steps, at least 1.
            generator: source of the noise, on z0's device.
            trajectory: return every state instead of the last.
            scheme: see :meth:`step`.
            progress: show a progress bar.

        Returns:
            states (batch, dim), or (steps + 1, batch, dim) with ``trajectory``.

        Raises:
            ValueError: for a start, a time or a number of steps that cannot be run.
            FloatingPointError: if a state is no longer finite, naming the step and its size.
        """
        if z0.ndim != 2 or z0.shape[1] != self.dim or not z0.is_floating_point():
            raise ValueError(f"z0 must be floating-point, (batch, {self.dim}); got {z0.dtype}, {tuple(z0.shape)}.")
        if steps < 1 or not 0 < t_end < float("inf"):
            raise ValueError(f"simulate needs t_end > 0 and steps >= 1, got t_end = {t_end}, steps = {steps}.")
        scheme = self._scheme(scheme)
        size, z, states = t_end / steps, z0, [z0]
        for i in tqdm(range(steps), desc="simulate", disable=not progress):
            noise = torch.empty_like(z).normal_(generator=generator)
            with torch.no_grad():
                z = self.step(z, size, noise, scheme)
            if not bool(torch.isfinite(z).all()):
                lost = int((~torch.isfinite(z)).any(1).sum())
                raise FloatingPointError(
                    f"NonlinearRecipe.simulate: {lost} of {z.shape[0]} states are not finite after step {i + 1} of "
                    f"{steps} (step size {size:.3g}); take more steps, or start where the energy is less steep."
                )
            if trajectory:
                states.append(z)
        return torch.stack(states) if trajectory else z


def _worst(what: str, miss: Tensor, matrix: Tensor, probe: Tensor) -> None:
    """Raise with the worst point if a miss (N, ., .) exceeds rounding of the matrix (N, dim, dim) it belongs to."""
    relative = miss.amax((1, 2)) / matrix.abs().amax((1, 2)).clamp(min=torch.finfo(matrix.dtype).tiny)
    where = int(relative.argmax())
    if float(relative[where]) > 1e3 * torch.finfo(matrix.dtype).eps:
        size = float(miss[where].max())
        raise ValueError(f"NonlinearRecipe: {what} {size:.3g} at z = {[round(v, 4) for v in probe[where].tolist()]}.")
