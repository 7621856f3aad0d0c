"""What a sampler of densities gives back: draws, weights, evidence, and how far to trust them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from undrift.density.bounds import Bounds
from undrift.density.target import Evaluations, Target
from undrift.measure.evidence import effective_sample_size, log_evidence, mode_weights

__all__ = ["Draws"]


@dataclass(frozen=True, eq=False, repr=False)
class Draws:
    """Draws of a target.

    Attributes:
        target: what was sampled.
        states: (repeats, walkers, length, d) in the target's own coordinates; ``length`` states of each walker in turn.
        walker_log_weights: (repeats, walkers), unnormalised, so that the mean weight of a repeat is its estimate of Z;
            None if the method gives draws without weights.
        corrected: whether the draws are of the target in the limit (Metropolis, or weights).
        repeat_log_z: log of each repeat's estimate of Z, (repeats,), for methods that promise one; else None.
        promise: "unbiased" if E[Z^] = Z for the run as it was done, "consistent" if only in the limit of many walkers.
        method: what drew them, in words.
        reason: why that method, where it was chosen for the target.
        evaluations: of the target, pilot included.
        acceptance: mean acceptance at the last level; None without Metropolis.
        relative_step: largest eps L (in x, h L / lambda) over levels, by the curvature found: near 2, Euler's error
            heats the walkers. None where no step size was involved.
        levels: what happened, level by level: rows of the same keys.
        notes: facts about the run worth a warning, beside those that follow from the numbers.
        seconds: wall time.
        bounds: what log Z lies between, where the weights are those of whole paths that nothing has resampled.
        training: how a sampler that learns was trained: rows of step, loss, elbo, log_z, ess (a share), gradient_norm,
            skipped (steps so far that were left out, for want of a finite loss or gradient), seconds, and others; None
            for what a row does not know.
        sampler: what was trained, a TrainedSampler, to draw more or to be saved; not part of the file of these draws.
    """

    target: Target
    states: Tensor
    walker_log_weights: Tensor | None
    corrected: bool
    repeat_log_z: Tensor | None = None
    promise: Literal["unbiased", "consistent"] | None = None
    method: str = ""
    reason: str = ""
    evaluations: Evaluations = field(default_factory=Evaluations)
    acceptance: float | None = None
    relative_step: float | None = None
    levels: Sequence[Mapping[str, Any]] = ()
    notes: tuple[str, ...] = ()
    seconds: float = math.nan
    bounds: Bounds | None = None
    training: Sequence[Mapping[str, Any]] = ()
    sampler: Any = None

    def __repr__(self) -> str:
        repeats, walkers, length, d = self.states.shape
        parts = [f"{repeats * walkers * length} draws of {self.target.name} in {d} dimensions by {self.method}"]
        if self.log_z is not None:
            error = self.log_z_std_error
            parts.append(f"log Z {self.log_z:.4g}" + ("" if error is None else f" ± {error:.2g}") + f", {self.promise}")
        if self.bounds is not None:
            parts.append(f"ELBO {self.bounds.elbo:.4g}")
        if self.ess is not None:
            parts.append(f"ESS {self.ess:.0f}")
        return f"<{'; '.join(parts)}; {self.evaluations.total} evaluations>"

    # -- draws ---------------------------------------------------------------------------------------------------------

    @property
    def x(self) -> Tensor:
        """All draws, (n, d), unconstrained."""
        return self.states.reshape(-1, self.states.shape[-1])

    @property
    def log_weights(self) -> Tensor | None:
        """Unnormalised log weight of each draw, (n,); log mean exp of them is ``log_z``."""
        if self.walker_log_weights is None:
            return None
        return self.walker_log_weights.reshape(-1).repeat_interleave(self.states.shape[2])

    @cached_property
    def weights(self) -> Tensor:
        """Normalised weights (n,) in float64; equal ones for draws without weights."""
        n = self.states[..., 0].numel()
        if self.log_weights is None:
            return torch.full((n,), 1.0 / n, dtype=torch.float64, device=self.states.device)
        return self.log_weights.double().softmax(0)

    @cached_property
    def values(self) -> Tensor:
        """All draws on the scale of the target's parameters, (n, scalars), in the order of ``target.labels``."""
        return torch.cat([value.reshape(len(value), -1) for value in self.parameters().values()], -1)

    def parameters(self) -> dict[str, Tensor]:
        """Draws of each named parameter, (n, *shape), on its own scale."""
        return self.target.constrain(self.x)

    def resample(self, n: int, seed: int | torch.Generator = 0) -> Tensor:
        """n draws of equal weight, (n, d), by multinomial resampling."""
        device = self.states.device
        generator = seed if isinstance(seed, torch.Generator) else torch.Generator(device).manual_seed(seed)
        return self.x[torch.multinomial(self.weights, n, replacement=True, generator=generator)]

    # -- evidence and precision ----------------------------------------------------------------------------------------

    @property
    def log_z(self) -> float | None:
        """log of the mean of the repeats' estimates of Z; None where the method promises none."""
        return None if self.repeat_log_z is None else float(log_evidence(self.repeat_log_z))

    @property
    def log_z_std_error(self) -> float | None:
        """Its standard error, from repeats; None with fewer than two."""
        if self.repeat_log_z is None or len(self.repeat_log_z) < 2:
            return None
        return log_evidence(self.repeat_log_z).std_error

    @cached_property
    def ess(self) -> float | None:
        """Effective number of draws, Kish's for weighted walkers and the least bulk ESS over coordinates for chains.

        None for draws that no correction makes draws of the target: a number would promise what they do not keep.
        """
        if not self.corrected:
            return None
        if self.walker_log_weights is not None:
            return float(effective_sample_size(self.walker_log_weights.double().reshape(-1)))
        chains = self.chain_ess
        return None if chains is None else float(chains.min())

    def _chains(self) -> Any:
        """(chains, length, scalars) as NumPy, for ArviZ; None with fewer than 4 states a chain."""
        repeats, walkers, length, _ = self.states.shape
        if length < 4:
            return None
        return self.values.reshape(repeats * walkers, length, -1).cpu().double().numpy()

    @cached_property
    def rhat(self) -> Tensor | None:
        """Rank-normalised split R-hat of each scalar, by ArviZ; None unless walkers kept at least 4 states."""
        chains = self._chains()
        if chains is None or self.walker_log_weights is not None:
            return None
        from arviz_stats.base import array_stats

        return torch.as_tensor(array_stats.rhat(chains, chain_axis=0, draw_axis=1))

    @cached_property
    def chain_ess(self) -> Tensor | None:
        """Bulk ESS of each scalar over all chains, by ArviZ; None unless walkers kept at least 4 states."""
        chains = self._chains()
        if chains is None or self.walker_log_weights is not None:
            return None
        from arviz_stats.base import array_stats

        return torch.as_tensor(array_stats.ess(chains, chain_axis=0, draw_axis=1, method="bulk"))

    def expectation(self, f: Tensor) -> tuple[Tensor, Tensor]:
        """Mean of f (n, ...) over the draws, and its standard error.

        The error comes from the spread over repeats where there are at least two, by the delta method for the ratio of
        weighted sums; it holds whatever the dependence within a repeat. NaN for one repeat.
        """
        repeats = self.states.shape[0]
        flat = f.double().reshape(repeats, -1, *f.shape[1:])
        w = self.weights.reshape(repeats, -1, *[1] * (f.ndim - 1))
        total, share = (w * flat).sum(1), w.sum(1)
        mean = total.sum(0) / share.sum(0)
        if repeats < 2:
            return mean, torch.full_like(mean, math.nan)
        residual = total - share * mean
        return mean, (residual.square().sum(0) * repeats / (repeats - 1)).sqrt()

    def mean(self) -> Tensor:
        """Mean of each scalar parameter, on its own scale, (scalars,)."""
        return self.expectation(self.values)[0]

    def std(self) -> Tensor:
        """Standard deviation of each scalar parameter, (scalars,)."""
        m = self.mean()
        return self.expectation((self.values.double() - m).square())[0].sqrt()

    def quantile(self, q: Sequence[float]) -> Tensor:
        """Weighted quantiles of each scalar parameter, (len(q), scalars)."""
        ordered, index = self.values.double().sort(0)
        cumulative = self.weights[index].cumsum(0)
        level = torch.as_tensor(q, dtype=torch.float64, device=ordered.device).unsqueeze(-1)
        at = torch.searchsorted(cumulative.T.contiguous(), level.expand(-1, ordered.shape[1]).T.contiguous())
        return ordered.T.gather(1, at.clamp(max=len(ordered) - 1)).T

    def mode_weights(self) -> Tensor | None:
        """Share of each mode of the target, (modes,); None for targets that do not name their modes."""
        assign = getattr(self.target, "assign", None)
        if assign is None:
            return None
        truth = getattr(self.target, "mode_weights", None)
        if truth is None:
            return None
        return mode_weights(assign(self.x), len(truth), self.log_weights)

    # -- on disk, and for others ---------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write everything to one sealed safetensors file, atomically; :meth:`load` reads it back."""
        from undrift.density.archive import save_draws  # an archive knows draws

        return save_draws(path, self)

    @staticmethod
    def load(path: str | Path, target: Target | None = None) -> Draws:
        """Draws from a file; see :func:`undrift.density.archive.load_draws`.

        Args:
            path: of the file.
            target: what was sampled; null rebuilds a benchmark target, and keeps what was recorded of any other.
        """
        from undrift.density.archive import load_draws

        return load_draws(path, target)

    def to_arviz(self, seed: int = 0) -> Any:
        """For ArviZ, with named parameters; needs the extra ``arviz``. Weighted draws are resampled first."""
        from undrift.density.archive import to_arviz

        return to_arviz(self, seed)

    def warnings(self) -> list[str]:
        """Why these draws should not be trusted, in sentences; empty if nothing in the run speaks against them."""
        from undrift.density.trust import warnings

        return warnings(self)
