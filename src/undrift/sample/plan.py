r"""A plan: every fixed-step sampler as one table.

Given the predicted start state :math:`\hat z_0` (for a denoiser :math:`(\hat x_0, 0, \dots, 0)`), the score of a
linear process is affine,

.. math:: \nabla \log p_t(z) = -S_t^{-1} (z - \Phi_t \hat z_0),

so a step of any explicit sampler is a row of matrices that depend on the process and the grid alone:

.. math::
    z_{i+1} = \sum_m A_{im} z_{i-m} + \sum_j B_{ij} \hat z_{0, i-j} + L_i \xi_i, \qquad
    \hat z_{0,i} = \text{model}(z_i, t_i).

One row is one call of the model. Methods of two stages take two rows; the second remembers the state before the first
(m = 1); multistep methods remember predictions (j > 0). Rows are computed once, in float64, before the first call.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from undrift._linalg import as_f64, sqrt_sum
from undrift.process.linear import LinearProcess
from undrift.sample.grid import Grid, LogSigma

__all__ = ["Final", "Nodes", "Plan", "Sampler", "TableSampler"]

Final = Literal["predict", "drift", "none"]


@dataclass(frozen=True, eq=False)
class Plan:
    """The table of a sampler on a process and a grid; all tensors float64.

    Attributes:
        process: the process walked back.
        times: when the model is called, (N,), decreasing or constant within a step.
        A: state coefficients, (N, M, K, K), newest first.
        B: prediction coefficients, (N, J, K, K), newest first; a denoiser uses their first column.
        L: noise roots, (N, K, K); zero rows draw no noise.
        prior: root (K, K) of the law that the walk starts from.
        after: time of the state that each row leaves, (N,); NaN where the row is a stage inside a step.
        start: the time that the walk starts from.
        lead: what stands between the state at the first time and the first call, a matrix and a noise root, each
            (K, K): the identity and zero but for methods that begin with half a step.
    """

    process: LinearProcess
    times: Tensor
    A: Tensor
    B: Tensor
    L: Tensor
    prior: Tensor
    after: Tensor
    start: Tensor
    lead: tuple[Tensor, Tensor]

    @property
    def calls(self) -> int:
        """Number of model calls, N."""
        return self.times.shape[0]

    def predictor(self, diffusion: Any) -> Any:
        """``predict(z, i, **condition)``: the diffusion's prediction of the start state at the i-th call."""
        return diffusion.predictor(self.times)

    def __repr__(self) -> str:
        kind = "stochastic" if bool((self.L != 0).any()) else "deterministic"
        span = f"t = {float(self.times[0]):.4g} .. {float(self.times[-1]):.4g}"
        memory = f"{self.A.shape[1]} states, {self.B.shape[1]} predictions"
        return f"Plan({type(self.process).__name__}, {self.calls} calls, {span}, {memory}, {kind})"


class Sampler:
    """Base of all samplers: the tables, and the adaptive solver."""


@dataclass(frozen=True)
class TableSampler(Sampler, ABC):
    """Base of the samplers that are tables.

    Args:
        steps: steps of the walk, the final denoising included: model calls, for a method of one stage.
        grid: where the steps lie.
        final: the last call. "predict" replaces z by the predicted x0; "drift" makes the papers' noise-free Euler step
            of the reverse SDE from the last time to 0; "none" stops at the last time, whose noise stays in the samples.
    """

    steps: int = 20
    grid: Grid | None = None
    final: Final = "predict"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"{type(self).__name__}: steps must be at least 1, got {self.steps}.")
        if self.final not in ("predict", "drift", "none"):
            raise ValueError(f"{type(self).__name__}: final must be 'predict', 'drift' or 'none', got {self.final!r}.")

    def default_grid(self, process: LinearProcess) -> Grid:
        """The grid used where none is given."""
        return LogSigma()

    @abstractmethod
    def rows(self, process: LinearProcess, times: Tensor) -> list[Row]:
        """The rows that walk from ``times[0]`` to ``times[-1]``; at least one per interval."""

    def lead(self, process: LinearProcess, times: Tensor) -> tuple[Tensor, Tensor]:
        """Matrix and noise root, each (K, K), from the state at the first time to the one that the model sees first."""
        eye = torch.eye(process.channels, dtype=torch.float64)
        return eye, torch.zeros_like(eye)

    @property
    def nodes(self) -> int:
        """Times that the method asks its grid for."""
        return self.steps + (self.final == "none")

    def plan(self, process: LinearProcess) -> Plan:
        """The table for ``process``.

        Raises:
            ValueError: if the grid gives unusable times, or the method does not apply to the process.
        """
        return self.table(process, (self.grid or self.default_grid(process)).times(process, self.nodes))

    def table(self, process: LinearProcess, times: Tensor) -> Plan:
        """The table on times of your own, differentiable in them and in the process.

        Args:
            process: any linear process that the method applies to.
            times: as many as :attr:`nodes`, strictly decreasing in (0, T], float64.

        Raises:
            ValueError: if the times are unusable, or the method does not apply to the process.
        """
        nodes = self.nodes
        if times.shape != (nodes,) or bool((times.diff() >= 0).any()) or not bool(times[-1] > 0):
            raise ValueError(
                f"{type(self).__name__}: the grid must give {nodes} strictly decreasing times in (0, T], "
                f"got {times.tolist()}."
            )
        lead = self.lead(process, times)
        start = process.prior(times[0])
        rows = self.rows(process, times) if nodes > 1 else []
        if self.final != "none":
            rows.append(self._final_row(process, times[-1]))
        k = process.channels
        states, predictions = max(len(r.A) for r in rows), max(len(r.B) for r in rows)
        zero = torch.zeros(k, k, dtype=torch.float64)

        def stack(blocks: list[list[Tensor]], width: int) -> Tensor:
            return torch.stack([torch.stack(b + [zero] * (width - len(b))) for b in blocks])

        return Plan(
            process=process,
            times=torch.stack([r.time for r in rows]),
            A=stack([r.A for r in rows], states),
            B=stack([r.B for r in rows], predictions),
            L=torch.stack(
                [zero if r.L is None else torch.nn.functional.pad(r.L, (0, k - r.L.shape[-1])) for r in rows]
            ),
            prior=sqrt_sum(lead[0] @ start, lead[1]) if bool(lead[1].any()) else lead[0] @ start,
            after=torch.stack([as_f64(r.after) for r in rows]),
            start=times[0],
            lead=lead,
        )

    def _final_row(self, process: LinearProcess, t: Tensor) -> Row:
        k = process.channels
        zero = torch.zeros(k, k, dtype=torch.float64)
        if self.final == "predict":
            keep = zero.clone()
            keep[0, 0] = 1.0
            return Row(t, [zero], [keep], None, 0.0)
        node = Nodes.at(process, t)
        pull = t * node.pull
        return Row(t, [torch.eye(k, dtype=torch.float64) - t * node.F - pull], [pull @ node.Phi], None, 0.0)


@dataclass(frozen=True)
class Row:
    """One row of a plan: time of its call, state and prediction coefficients newest first, noise root, time left at."""

    time: Tensor
    A: list[Tensor]
    B: list[Tensor]
    L: Tensor | None
    after: Tensor | float


@dataclass(frozen=True)
class Nodes:
    """The process at times (...): F, GG', Phi(0, t), the root of S_t, and pull = GG' S_t^{-1}; each (..., K, K)."""

    t: Tensor
    F: Tensor
    GG: Tensor
    Phi: Tensor
    root: Tensor
    pull: Tensor = field(repr=False)

    @classmethod
    def at(cls, process: LinearProcess, t: Tensor) -> Nodes:
        phi, root = process.marginal(t)
        gg = process.diffusion(t)
        half = torch.linalg.solve_triangular(root, gg, upper=False)
        pull = torch.linalg.solve_triangular(root.mT, half, upper=True).mT
        return cls(t, process.drift(t), gg, phi, root, pull)

    @property
    def log_sigma(self) -> Tensor:
        """Logarithm of the effective noise level, (...)."""
        u = torch.linalg.solve_triangular(self.root, self.Phi[..., :1], upper=False)
        return -0.5 * u.square().sum((-2, -1)).log()

    def flatten(self) -> Nodes:
        """The last two dimensions of times joined to one."""
        joined = (m.flatten(-4, -3) for m in (self.F, self.GG, self.Phi, self.root, self.pull))
        return Nodes(self.t.flatten(-2), *joined)
