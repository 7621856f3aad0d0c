"""Plans for a clock of modes: one table for each eigenvalue, stacked over the grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from undrift.modal_diffusion import ModalDiffusion
from undrift.sample.plan import Plan, TableSampler

__all__ = ["ModalPlan", "modal_plan"]


@dataclass(frozen=True, eq=False)
class ModalPlan(Plan):
    """A plan whose matrices differ from mode to mode: A, B, L, prior and lead end in the axes of the grid.

    ``times``, ``after`` and ``start`` are levels of the modal clock, where the model is called, and 0 at the end.

    Attributes:
        rows: what reads x~ off a state, (N, K, *grid).
    """

    rows: Tensor

    def predictor(self, diffusion: Any) -> Any:
        """Predictor of the function's coefficients, (batch, 1, *event)."""
        levels = self.times

        def predict(z: Tensor, i: int, **condition: Any) -> Tensor:
            return diffusion.read(z, self.rows[i], levels[i], **condition)

        return predict


def modal_plan(diffusion: ModalDiffusion, sampler: TableSampler, shape: Sequence[int]) -> ModalPlan:
    """The table of a sampler for events of a shape, at clock levels evenly spaced in their logarithm.

    Raises:
        ValueError: if the sampler brings a grid of its own, which is one of times, or has stages between two times.
    """
    name = type(sampler).__name__
    if sampler.grid is not None:
        raise ValueError(f"{name}: a modal clock sets the times of every mode; leave grid out.")
    clock, process = diffusion.clock, diffusion.process
    grid = diffusion.space.basis.grid(shape)
    mu = diffusion.space.basis.eigenvalues(grid).flatten()
    kinds, which = mu.unique(return_inverse=True)
    levels = torch.logspace(0, 1, sampler.nodes, dtype=torch.float64, base=clock.sigma_min / clock.sigma_max)
    levels = levels * clock.sigma_max
    times = process.time(clock.levels(levels.unsqueeze(-1), kinds))
    tables = [sampler.table(process, times[:, k]) for k in range(len(kinds))]
    calls = torch.stack([t.times for t in tables])
    at = (calls[0].unsqueeze(-1) == times[:, 0]).double()
    if not bool((at.sum(-1) == 1).all()) or not all(
        bool((c.unsqueeze(-1) == times[:, k]).any(-1).all()) for k, c in enumerate(calls)
    ):
        raise ValueError(
            f"{name} calls the model between the times of its grid, where the modes' levels are not those of one "
            "clock level; use Ancestral, EulerMaruyama, SSCS or Exponential."
        )
    labels = at @ levels
    final = sampler.final != "none"
    after = torch.cat([labels[1:], torch.zeros(1, dtype=torch.float64) if final else levels[-1:]])
    after = torch.where(tables[0].after.isnan(), torch.nan, after)  # stages inside a step

    def over_modes(parts: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(parts), -1)[..., which].unflatten(-1, grid)

    readings = process._weights(calls)[1].movedim(0, -1)[..., which].unflatten(-1, grid)
    return ModalPlan(
        process=process,
        times=labels,
        A=over_modes([t.A for t in tables]),
        B=over_modes([t.B for t in tables]),
        L=over_modes([t.L for t in tables]),
        prior=over_modes([t.prior for t in tables]),
        after=after,
        start=levels[0],
        lead=(over_modes([t.lead[0] for t in tables]), over_modes([t.lead[1] for t in tables])),
        rows=readings,
    )
