"""What sequential Monte Carlo gives back: weighted draws, the evidence, and how far to trust both."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from undrift._weights import ancestors, effective_sample_size, pooled

__all__ = ["Particles"]


@dataclass(frozen=True, eq=False, repr=False)
class Particles:
    """Weighted draws of a posterior; the particles of a run are neighbours.

    Attributes:
        x: (n, *event), n = runs times particles.
        log_weights: (n,), float64, normalised over all runs.
        run_log_evidence: log of each run's estimate of p(y), (runs,): unbiased for twisted sampling, and for tempering
            at fixed levels and moves; runs are independent but for those that tempering finds for all at once.
        ess_path: effective sample size of each run before every call, and at the end, (calls + 1, runs).
        resampled: where a run was resampled, (calls + 1, runs); never at the end.
        lineage: which start each particle descends from, (runs, particles).
        calls: calls of the model for each particle.
    """

    x: Tensor
    log_weights: Tensor
    run_log_evidence: Tensor
    ess_path: Tensor
    resampled: Tensor
    lineage: Tensor
    calls: int

    def __repr__(self) -> str:
        runs, m = self.lineage.shape
        error = self.log_evidence_std_error
        spread = "" if math.isnan(error) else f" ± {error:.2g}"
        return (
            f"<{runs} x {m} particles; log p(y) {self.log_evidence:.5g}{spread}; ESS {self.ess:.0f}; "
            f"resampled at {len(self.resampled_at)} of {self.calls} calls>"
        )

    @property
    def log_evidence(self) -> float:
        """log of the mean of the runs' estimates of p(y), under the sampler's own law."""
        return pooled(self.run_log_evidence)[0]

    @property
    def log_evidence_std_error(self) -> float:
        """Its standard error by the spread over runs; NaN for one run."""
        return pooled(self.run_log_evidence)[1]

    @property
    def ess(self) -> float:
        """Effective number of draws, of all runs together, by their weights; kinship is not counted, see ancestors."""
        return float(effective_sample_size(self.log_weights))

    @property
    def resampled_at(self) -> tuple[int, ...]:
        """Calls at which some run was resampled."""
        return tuple(self.resampled.any(1).nonzero().flatten().tolist())

    @property
    def ancestors(self) -> int:
        """How many different starts the draws descend from, over all runs."""
        return sum(len(run.unique()) for run in self.lineage)

    @property
    def weights(self) -> Tensor:
        """Normalised weights, (n,), float64."""
        return self.log_weights.exp()

    def resample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n draws of equal weight, (n, *event), by systematic resampling, in random order."""
        if n < 1:
            raise ValueError(f"Particles.resample: n must be at least 1, got {n}.")
        index = ancestors(self.log_weights.unsqueeze(0), generator, count=n)[0]
        return self.x[index[torch.randperm(n, generator=generator, device=index.device)]]

    def expectation(self, f: Tensor) -> Tensor:
        """Weighted mean of f (n, ...), in float64."""
        return torch.tensordot(self.weights, f.double(), 1)

    def mean(self) -> Tensor:
        """Posterior mean, (*event), float64."""
        return self.expectation(self.x)

    def std(self) -> Tensor:
        """Posterior standard deviation of each coordinate, (*event), float64."""
        return self.expectation((self.x - self.mean()).square()).sqrt()

    def warnings(self) -> list[str]:
        """Why these draws should not be trusted, in sentences; empty if nothing in the run speaks against them."""
        m = self.lineage.shape[1]
        out = []
        lowest = self.ess_path.min(1).values
        if float(lowest.min()) < max(2.0, 0.01 * m):
            at = int(lowest.argmin())
            out.append(
                f"The effective sample size of a run fell to {float(lowest.min()):.3g} of {m} particles at call {at} "
                f"of {self.calls}: a few draws carry all weight. Use more particles, more steps, resampling, or a "
                "potential that knows the observation's noise and the spread of the prediction."
            )
        few = min(len(run.unique()) for run in self.lineage)
        if few < min(10, m):
            out.append(
                f"All {m} draws of a run descend from {few} of its starts: they are one family, and the posterior is "
                "narrower than it looks where early noise decides. Use more particles, or several runs."
            )
        if self.log_evidence_std_error > 1:
            out.append(
                f"log p(y) differs between runs, with a standard error of {self.log_evidence_std_error:.2g}: one run "
                "outweighs the others. Use more particles."
            )
        return out
