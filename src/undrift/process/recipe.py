r"""The complete recipe for linear processes with a Gaussian stationary law N(0, S).

.. math:: dz = -\beta(t) (D + Q) S^{-1} z\,dt + \sqrt{2 \beta(t) D}\,dw

With D positive semi-definite and Q skew, N(0, S) is stationary, and every linear process with that stationary law has
this form. Reversed in its stationary law it is the same recipe with Q replaced by -Q.

References:
    Ma, Chen & Fox, A Complete Recipe for Stochastic Gradient MCMC, 2015, theorem 2.
    Pandey & Mandt, A Complete Recipe for Diffusion Generative Models, 2023, eq. 2-5.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from undrift._linalg import as_f64
from undrift.process.clock import Clock, ConstantClock
from undrift.process.families import ClockedProcess, PanelProcess, auxiliary_start

__all__ = ["Recipe", "RecipeProcess", "time_varying_recipe", "validate_recipe"]


def _square(name: str, m: Tensor) -> None:
    if m.ndim != 2 or m.shape[0] != m.shape[1]:
        raise ValueError(f"{name} must be a square K x K matrix, got shape {tuple(m.shape)}.")
    if not bool(torch.isfinite(m).all()):
        raise ValueError(f"{name} must be finite, got {m.tolist()}.")


def _matrix(name: str, value: object) -> Tensor:
    try:
        m = as_f64(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be a square K x K matrix of numbers, got {value!r}.") from error
    _square(name, m)
    return m


def _positive_definite(name: str, m: Tensor) -> None:
    low = float(torch.linalg.eigvalsh(m.detach())[0])
    if low <= 1e-12 * float(m.detach().abs().max()):
        raise ValueError(f"{name} must be positive definite; its smallest eigenvalue is {low:.3g}.")


def validate_recipe(d: Tensor, q: Tensor, s: Tensor) -> None:
    """Check that (D, Q, S) makes a process that converges to N(0, S).

    Raises:
        ValueError: naming the asymmetry, the offending eigenvalue, or the direction that no noise reaches.
    """
    d, q, s = d.detach(), q.detach(), s.detach()
    for name, m in (("D", d), ("Q", q), ("S", s)):
        _square(name, m)
    if not d.shape == q.shape == s.shape:
        raise ValueError(
            f"D, Q and S must have one shape, got {tuple(d.shape)}, {tuple(q.shape)} and {tuple(s.shape)}."
        )
    for name, m in (("D", d), ("S", s)):
        miss = float((m - m.T).abs().max())
        if miss > 1e-10 * float(m.abs().max()):
            raise ValueError(f"{name} must be symmetric; {name} - {name}' has an entry of size {miss:.3g}.")
    miss = float((q + q.T).abs().max())
    if miss > 1e-10 * max(float(q.abs().max()), 1e-300):
        raise ValueError(f"Q must be skew-symmetric; Q + Q' has an entry of size {miss:.3g}.")
    low = float(torch.linalg.eigvalsh(d)[0])
    if low < -1e-12 * float(d.abs().max()):
        raise ValueError(f"D must be positive semi-definite; its smallest eigenvalue is {low:.3g}.")
    _positive_definite("S", s)
    # Stability. In whitened coordinates the drift is -(D~ + Q~), and a mode on the imaginary axis is an eigenvector
    # that D~ annihilates: noise never reaches it. A semi-definite D alone rules out growth, not idling.
    root = torch.linalg.cholesky(s)
    white = [torch.linalg.solve_triangular(root, m, upper=False) for m in (d, q)]
    d_white, q_white = (torch.linalg.solve_triangular(root, m.mT, upper=False).mT for m in white)
    values, vectors = torch.linalg.eig(-(d_white + q_white))
    slowest = int(values.real.argmax())
    scale = float((d_white + q_white).abs().max())
    if scale == 0 or float(values.real[slowest]) > -1e-10 * scale:
        direction = [round(abs(complex(v)), 3) for v in vectors[:, slowest]]
        raise ValueError(
            "(D, Q, S) does not converge: the drift -(D + Q) S^-1 has an eigenvalue with real part "
            f"{float(values.real[slowest]) + 0.0:.3g}, since no noise reaches the direction with channel weights "
            f"{direction}. Put noise on that channel (D), or couple it to one that has noise (Q)."
        )


class RecipeProcess(ClockedProcess):
    """Base of the processes that the recipe builds: a subclass gives (D, Q, S), its clock and its auxiliary start."""

    clock: Clock

    @abstractmethod
    def terms(self) -> tuple[Tensor, Tensor, Tensor]:
        """D, Q and S, each (K, K)."""

    def matrices(self) -> tuple[Tensor, Tensor]:
        d, q, s = self.terms()
        return -torch.linalg.solve(s, d + q, left=False), d

    def reversed_matrices(self) -> tuple[Tensor, Tensor]:
        """Drift matrix and D of the time reversal of the stationary process: Q -> -Q."""
        d, q, s = self.terms()
        return -torch.linalg.solve(s, d - q, left=False), d

    @property
    def stationary(self) -> Tensor:
        return self.terms()[2]


@dataclass(frozen=True, eq=False)
class Recipe(RecipeProcess):
    """Any process from (D, Q, S): validated, so convergent by construction.

    Args:
        D: noise, (K, K) positive semi-definite.
        Q: mixing, (K, K) skew-symmetric.
        S: stationary covariance, (K, K) positive definite; None for the identity.
        clock: common clock of D and Q.
        start_cov: covariance of the auxiliaries at t = 0, (K - 1, K - 1), or a number: that multiple of the identity.

    Raises:
        ValueError: see :func:`validate_recipe`.
    """

    D: Tensor | list[list[float]]
    Q: Tensor | list[list[float]]
    S: Tensor | list[list[float]] | None = None
    clock: Clock = field(default_factory=ConstantClock)
    start_cov: Tensor | list[list[float]] | float = 0.01

    def __post_init__(self) -> None:
        validate_recipe(*self.terms())
        self.start()

    def terms(self) -> tuple[Tensor, Tensor, Tensor]:
        d, q = _matrix("D", self.D), _matrix("Q", self.Q)
        return d, q, torch.eye(d.shape[-1], dtype=torch.float64) if self.S is None else _matrix("S", self.S)

    def start(self) -> Tensor:
        return auxiliary_start(as_f64(self.start_cov), as_f64(self.D).shape[-1])

    @staticmethod
    def of(
        drift: object, diffusion: object, stationary: object | None = None, tol: float = 1e-9
    ) -> tuple[Tensor, Tensor]:
        r"""The (D, Q) of a given linear process :math:`dz = A z\,dt + G\,dw` with stationary law N(0, S).

        :math:`D = \frac12 GG^\top` and :math:`Q = -(A S + \frac12 GG^\top)`, which is skew exactly when N(0, S) is
        stationary.

        Args:
            drift: A, (K, K).
            diffusion: G G', (K, K).
            stationary: S, (K, K); None for the identity.

        Raises:
            ValueError: if N(0, S) is not stationary for the process; the message says by how much it misses.
        """
        a, gg = as_f64(drift), as_f64(diffusion)
        _square("drift", a)
        s = torch.eye(a.shape[-1], dtype=torch.float64) if stationary is None else as_f64(stationary)
        for name, m in (("diffusion", gg), ("stationary", s)):
            _square(name, m)
            if m.shape != a.shape:
                raise ValueError(f"{name} must have the shape of drift, {tuple(a.shape)}, got {tuple(m.shape)}.")
        residual = a @ s + s @ a.mT + gg
        scale = max(float((a @ s).abs().max()), float(gg.abs().max()), 1e-300)
        miss = float(residual.abs().max())
        if miss > tol * scale:
            where = [int(i) for i in torch.unravel_index(residual.abs().argmax(), residual.shape)]
            raise ValueError(
                "N(0, S) is not stationary for this process: A S + S A' + GG' has "
                f"{float(residual[tuple(where)]):.3g} at {where} (scale {scale:.3g}); it must vanish."
            )
        d = 0.5 * gg
        q = -(a @ s + d)
        return d, 0.5 * (q - q.mT)


def time_varying_recipe(
    d: Callable[[Tensor], Tensor],
    q: Callable[[Tensor], Tensor],
    s: Tensor | list[list[float]],
    horizon: float = 1.0,
    start: float | Tensor = 0.01,
    panels: int = 32,
) -> PanelProcess:
    r"""The recipe with D(t) and Q(t) on schedules of their own, :math:`F = -(D(t) + Q(t)) S^{-1}`.

    Args:
        d, q: map times (N,) to matrices (N, K, K), positive semi-definite and skew-symmetric.
        s: common stationary covariance, (K, K) positive definite.
        horizon, start, panels: as in :class:`PanelProcess`.

    Raises:
        ValueError: if D(t) or Q(t) is not what it must be at one of three times, or S is not positive definite.
    """
    s = as_f64(s)
    _positive_definite("S", s)
    probe = torch.tensor([0.0, 0.37, 1.0], dtype=torch.float64) * horizon
    for time, d_t, q_t in zip(probe.tolist(), as_f64(d(probe)).detach(), as_f64(q(probe)).detach(), strict=True):
        miss = float((q_t + q_t.T).abs().max())
        if miss > 1e-10 * float(q_t.abs().max()):
            raise ValueError(f"Q(t) must be skew-symmetric; at t = {time:g}, Q + Q' has an entry of size {miss:.3g}.")
        miss = float((d_t - d_t.T).abs().max())
        if miss > 1e-10 * float(d_t.abs().max()):
            raise ValueError(f"D(t) must be symmetric; at t = {time:g}, D - D' has an entry of size {miss:.3g}.")
        low = float(torch.linalg.eigvalsh(d_t)[0])
        if low < -1e-12 * float(d_t.abs().max()):
            raise ValueError(f"D(t) must be positive semi-definite; at t = {time:g}, an eigenvalue is {low:.3g}.")
    inverse = torch.linalg.inv(s)
    return PanelProcess(
        drift=lambda t: -(d(t) + q(t)) @ inverse,
        diffusion=lambda t: 2 * d(t),
        horizon=horizon,
        start=start,
        stationary=s,
        panels=panels,
    )
