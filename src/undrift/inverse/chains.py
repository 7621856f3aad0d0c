"""What parallel chains give back: their states, what was recorded on the way, and whether they agree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from undrift.inverse.step import StepReport
from undrift.space import FunctionSpace, Space

__all__ = ["Chains"]

RHAT = 1.05  # above this chains are said to disagree


@dataclass(frozen=True, eq=False, repr=False)
class Chains:
    """Draws of parallel chains, after warm-up.

    Attributes:
        states: (chains, length, *event), in the space's coordinates.
        log_likelihood: log p(y | x) of each, (chains, length), float64.
        acceptance: share of accepted moves of each chain (chains,), after warm-up; None for unadjusted chains.
        space: where the points live.
        step: gamma, or beta as it was after warm-up.
        reports: what the step diagnostic found along the run.
        complete: false if the run was interrupted.
        method: in words.
    """

    states: Tensor
    log_likelihood: Tensor
    acceptance: Tensor | None
    space: Space
    step: float
    reports: tuple[StepReport, ...]
    complete: bool
    method: str

    def __repr__(self) -> str:
        accepted = "" if self.acceptance is None else f"; {float(self.acceptance.mean()):.3g} accepted"
        stopped = "" if self.complete else "; interrupted"
        return f"<{self.method}: {self.states.shape[0]} chains of {self.states.shape[1]} states{accepted}{stopped}>"

    @property
    def x(self) -> Tensor:
        """All states, (n, *event), chain by chain."""
        return self.states.flatten(0, 1)

    def mean(self) -> Tensor:
        """Mean of the states, (*event), float64."""
        return self.x.double().mean(0)

    def std(self) -> Tensor:
        """Standard deviation of each coordinate, (*event), float64."""
        return self.x.double().std(0)

    def functionals(self) -> Tensor:
        """What is watched by default, (chains, length, k): the log-likelihood, and the largest modes.

        Of a function these are the eight coefficients of most variance under the noise; of another array its first
        eight coordinates.
        """
        flat = self.x
        if isinstance(self.space, FunctionSpace):
            grid = self.space.basis.grid(flat.shape)
            order = self.space.variances(grid).flatten().argsort(descending=True, stable=True)[:8].to(flat.device)
            flat = self.space.coefficients(flat).flatten(-len(grid))[..., order]
        values = flat.flatten(1)[:, :8].double().reshape(*self.states.shape[:2], -1)
        return torch.cat([self.log_likelihood.unsqueeze(-1), values], -1)

    def _of(self, f: Callable[[Tensor], Tensor] | None) -> Any:
        if self.states.shape[1] < 4:
            raise ValueError(
                f"Chains: R-hat and effective sample sizes need 4 states a chain, these keep {self.states.shape[1]}; "
                "thin less or run longer."
            )
        if f is None:
            return self.functionals().cpu().numpy()
        return f(self.x).double().reshape(*self.states.shape[:2], -1).cpu().numpy()

    def rhat(self, f: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Rank-normalised split R-hat, by ArviZ, of f(x) (n, k), or of :meth:`functionals`: (k,)."""
        from arviz_stats.base import array_stats

        return torch.as_tensor(array_stats.rhat(self._of(f), chain_axis=0, draw_axis=1))

    def ess(self, f: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Effective number of draws for means, by ArviZ, of f(x) (n, k), or of :meth:`functionals`: (k,)."""
        from arviz_stats.base import array_stats

        return torch.as_tensor(array_stats.ess(self._of(f), chain_axis=0, draw_axis=1, method="mean"))

    def warnings(self) -> list[str]:
        """Why these draws should not be trusted, in sentences; empty if nothing in the run speaks against them."""
        out = []
        if not self.complete:
            out.append("The run was interrupted; these are the states it had.")
        if self.states.shape[1] >= 4 and self.states.shape[0] * self.states.shape[1] >= 8:
            worst = float(torch.nan_to_num(self.rhat(), nan=1.0).max())
            if worst > RHAT:
                out.append(
                    f"R-hat is {worst:.3g} for a functional: the chains have not forgotten their starts. Run longer, "
                    "or if modes hold them apart take tempered()."
                )
        if self.acceptance is not None and float(self.acceptance.min()) < 0.01:
            out.append(f"A chain accepted {float(self.acceptance.min()):.2g} of its moves: take a smaller beta.")
        return out
