r"""The symmetric splitting sampler (SSCS) for any recipe process, without per-model algebra.

With stationary law N(0, S), the reverse SDE splits into two parts,

.. math::
    \text{A:}\quad & dz = -\beta (D - Q) S^{-1} z\,dt + \sqrt{2 \beta D}\,dw
        && \text{the recipe with } Q \to -Q\text{, solved exactly} \\
    \text{S:}\quad & dz = 2 \beta D (\nabla \log p_t(z) + S^{-1} z)\,dt
        && \text{the kick}

and a step is half of A, one kick, half of A. The two halves that meet between kicks are one exact step.

Order. With one Euler kick, as published, the method has weak order 1 wherever in the step the score is taken, in spite
of its Strang form. With the score at the midpoint and a kick of second order (the midpoint rule, two calls) it has weak
order 2.

References:
    Dockhorn, Vahdat & Kreis 2022, section 3.3 (CLD). Pandey & Mandt 2023, eq. 12 (PSLD).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from undrift._linalg import ou_transition
from undrift.process.families import noise_root
from undrift.process.linear import LinearProcess
from undrift.process.recipe import RecipeProcess
from undrift.sample.plan import Nodes, Row, TableSampler

__all__ = ["SSCS"]


@dataclass(frozen=True)
class SSCS(TableSampler):
    """Half an exact Ornstein-Uhlenbeck step, a kick by the score, half a step again.

    Args:
        steps, grid, final: see :class:`TableSampler`; with ``order=2`` a step but the final one takes two calls.
        order: weak order, 1 or 2.
        score_time: where in the step the score is taken, "start" (as published) or "midpoint"; None for the start at
            order 1 and the midpoint at order 2, which needs it.
    """

    order: int = 1
    score_time: Literal["start", "midpoint"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order not in (1, 2):
            raise ValueError(f"SSCS: order must be 1 or 2, got {self.order}.")
        if self.score_time not in (None, "start", "midpoint"):
            raise ValueError(f"SSCS: score_time must be 'start', 'midpoint' or null, got {self.score_time!r}.")
        if self.order == 2 and self.score_time == "start":
            raise ValueError("SSCS: order 2 needs the score at the midpoint; with score_time='start' the order is 1.")

    def _halves(self, process: LinearProcess, times: Tensor) -> tuple[RecipeProcess, Tensor, Tensor, Tensor]:
        """The process, step midpoints, and clock increments of the first and second halves, (N - 1,) each."""
        if not isinstance(process, RecipeProcess):
            raise ValueError(
                f"SSCS splits off a stationary process, and {type(process).__name__} is not built from (D, Q, S); "
                "use Ancestral or Exponential, or build the process as a Recipe."
            )
        middle = 0.5 * (times[:-1] + times[1:])
        clock = process.clock.integral
        return process, middle, clock(times[:-1]) - clock(middle), clock(middle) - clock(times[1:])

    def _ornstein_uhlenbeck(self, process: RecipeProcess, b: Tensor) -> tuple[Tensor, Tensor]:
        a, d = process.reversed_matrices()
        return ou_transition(a, noise_root(d), b)

    def lead(self, process: LinearProcess, times: Tensor) -> tuple[Tensor, Tensor]:
        if len(times) < 2:
            return super().lead(process, times)
        recipe, _, first, _ = self._halves(process, times)
        return self._ornstein_uhlenbeck(recipe, first[0])

    def rows(self, process: LinearProcess, times: Tensor) -> list[Row]:
        recipe, middle, first, second = self._halves(process, times)
        at = times[:-1] if self.order == 1 and self.score_time != "midpoint" else middle
        nodes = Nodes.at(process, at)
        d, _, s = recipe.terms()
        # With the predicted start z0 fixed the kick is dz/dB = M z + C z0.
        pull = nodes.pull / recipe.clock.beta(at)[:, None, None]
        b = (first + second)[:, None, None]
        m, c = b * (2 * torch.linalg.solve(s, d, left=False) - pull), b * (pull @ nodes.Phi)
        phi, root = self._ornstein_uhlenbeck(recipe, second + torch.cat([first[1:], torch.zeros_like(first[:1])]))
        eye = torch.eye(process.channels, dtype=torch.float64)
        rows = []
        for i in range(len(b)):
            after = times[i + 1]
            if self.order == 1:
                rows.append(Row(at[i], [phi[i] @ (eye + m[i])], [phi[i] @ c[i]], root[i], after))
            else:
                rows.append(Row(at[i], [eye + 0.5 * m[i]], [0.5 * c[i]], None, math.nan))
                rows.append(Row(at[i], [phi[i] @ m[i], phi[i]], [phi[i] @ c[i]], root[i], after))
        return rows
