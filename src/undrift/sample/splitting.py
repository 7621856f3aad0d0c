r"""The symmetric splitting sampler (SSCS) for any recipe process, without per-model algebra.

With stationary law N(0, S), the reverse SDE splits into two parts,

.. math::
    \text{A:}\quad & dz = -\beta (D - Q) S^{-1} z\,db + \sqrt{2 D}\,dw
        && \text{the recipe with } Q \to -Q\text{: solved exactly} \\
    \text{S:}\quad & dz = 2 D (\nabla \log p_t(z) + S^{-1} z)\,db
        && \text{the kick}

and a step is half of A, one kick, half of A. The kick's score is frozen at one time; with the predicted start held fixed it
is affine in z, so the kick too can be solved exactly ("exact") or by Euler ("euler", as published).

Order: with the score at the step's start (as published) the method has weak order 1; with the score at the midpoint and a
kick of second order (two calls, ``order=2``) it has weak order 2.

References:
    Dockhorn, Vahdat & Kreis 2022, section 3.3 (CLD). Pandey & Mandt 2023, eq. 12 (PSLD).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from undrift._linalg import ou_transition, sqrt_sum
from undrift.process.linear import LinearProcess, noise_root
from undrift.process.recipe import RecipeProcess
from undrift.sample.plan import Nodes, Row, TableSampler

__all__ = ["SSCS"]


@dataclass(frozen=True)
class SSCS(TableSampler):
    """Half an exact Ornstein-Uhlenbeck step, a kick by the score, half a step again.

    Args:
        steps, grid, final: see :class:`TableSampler`.
        order: 1, one call a step; 2, two calls a step (exponential midpoint rule for the kick).
        kick: "exact" solves the kick with the predicted start frozen; "euler" is the published explicit step.
        score_time: "midpoint" of the step, or its "start" as published.
    """

    order: int = 1
    kick: Literal["exact", "euler"] = "exact"
    score_time: Literal["midpoint", "start"] = "midpoint"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order not in (1, 2):
            raise ValueError(f"SSCS: order must be 1 or 2, got {self.order}.")
        if self.kick not in ("exact", "euler"):
            raise ValueError(f"SSCS: kick must be 'exact' or 'euler', got {self.kick!r}.")
        if self.score_time not in ("midpoint", "start"):
            raise ValueError(f"SSCS: score_time must be 'midpoint' or 'start', got {self.score_time!r}.")
        if self.order == 2 and self.score_time == "start":
            raise ValueError("SSCS: order 2 needs score_time='midpoint'; with the score at the start of a step the order is 1.")

    def _halves(self, process: LinearProcess, times: Tensor) -> tuple[RecipeProcess, Tensor, Tensor, Tensor]:
        if not isinstance(process, RecipeProcess):
            raise ValueError(
                f"SSCS splits off a stationary process, and {type(process).__name__} is not built from (D, Q, S); "
                "use Ancestral or Exponential, or build the process as a Recipe."
            )
        middle = 0.5 * (times[:-1] + times[1:])
        clock = process.clock.integral
        return process, middle, clock(times[:-1]) - clock(middle), clock(middle) - clock(times[1:])

    def _half_step(self, process: RecipeProcess, b: Tensor) -> tuple[Tensor, Tensor]:
        a, d = process.reversed_matrices()
        return ou_transition(a, noise_root(d), b)

    def initial(self, process: LinearProcess, times: Tensor) -> Tensor:
        if len(times) < 2:
            return super().initial(process, times)
        recipe, _, first, _ = self._halves(process, times)
        phi, root = self._half_step(recipe, first[0])
        return sqrt_sum(phi @ process.prior(times[0]), root)

    def rows(self, process: LinearProcess, times: Tensor) -> list[Row]:
        recipe, middle, first, second = self._halves(process, times)
        at = middle if self.score_time == "midpoint" else times[:-1]
        nodes = Nodes.at(process, at)
        d, _, s = recipe.terms()
        b = first + second
        # dz/db = M z + C z0 with the predicted start z0 frozen.
        pull = nodes.pull / recipe.clock.beta(at)[:, None, None]
        m = 2 * torch.linalg.solve(s, d, left=False) - pull
        c = pull @ nodes.Phi
        # The second half of a step and the first half of the next are one exact step.
        phi, root = self._half_step(recipe, second + torch.cat([first[1:], torch.zeros_like(first[:1])]))
        rows = []
        for i in range(len(b)):
            state, start = self._kick(m[i], c[i], b[i])
            if self.order == 1:
                rows.append(Row(at[i], [phi[i] @ state], [phi[i] @ start], root[i], float(times[i + 1])))
            else:
                half = self._kick(m[i], c[i], 0.5 * b[i])
                zero = torch.zeros_like(state)
                rows.append(Row(at[i], [half[0]], [half[1]], None, math.nan))
                if self.kick == "exact":
                    rows.append(Row(at[i], [zero, phi[i] @ state], [phi[i] @ start], root[i], float(times[i + 1])))
                else:
                    drift = b[i] * m[i]
                    rows.append(Row(at[i], [phi[i] @ drift, phi[i]], [phi[i] @ start], root[i], float(times[i + 1])))
        return rows

    def _kick(self, m: Tensor, c: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """State and prediction coefficients of the kick over clock b."""
        k = m.shape[-1]
        if self.kick == "euler":
            return torch.eye(k, dtype=m.dtype) + b * m, b * c
        block = torch.zeros(2 * k, 2 * k, dtype=m.dtype)
        block[:k, :k], block[:k, k:] = m, c
        whole = torch.linalg.matrix_exp(b * block)
        return whole[:k, :k], whole[:k, k:]
