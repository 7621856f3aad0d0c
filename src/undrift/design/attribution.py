r"""Which source of error does what to the last state: each switched off, on Gaussian data, exactly.

    start            off: the exact law of z at the first time in place of the prior
    score            off: the exact denoiser
    discretisation   off: the same sampler with every interval cut into many equal steps of log sigma

Each alone, all but each, and none, which shows what the refined grid and the cut at the last level leave. KL and W2 of
the last state do not add up over sources; the path KL does (:mod:`undrift.design.path`).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from undrift.design.gaussian import Law, Start, propagate
from undrift.design.score_error import ErrorTerms, ScoreError
from undrift.design.spectrum import Spectrum
from undrift.process.linear import LinearProcess
from undrift.sample.plan import TableSampler

__all__ = ["Switched", "attribute"]


@dataclass(frozen=True)
class Switched:
    """KL and W2 of the samples with only some sources of error on.

    Attributes:
        name: "all", "only start", "all but start", ..., "none".
        on: of "start", "discretisation", "score".
        kl, w2: nats and data units.
    """

    name: str
    on: tuple[str, ...]
    kl: float
    w2: float


@dataclass(frozen=True, eq=False)
class _HeldNoise(ScoreError):
    """An error whose noise is held over intervals that a refined grid cuts; the call at the last level is one."""

    error: ScoreError
    refine: int
    last: float

    def terms(self, spectrum: Spectrum, sigma: Tensor) -> ErrorTerms:
        relative, bias, noise = self.error.terms(spectrum, sigma)
        factor = torch.where(sigma > self.last * (1 + 1e-9), float(self.refine), 1.0)
        return ErrorTerms(relative, bias, noise * factor.unsqueeze(-1))


def _refined(process: LinearProcess, times: Tensor, sigma: Tensor, refine: int) -> Tensor:
    """The grid with every interval cut into ``refine`` equal steps of log sigma."""
    part = torch.arange(1, refine, dtype=torch.float64) / refine
    inner = torch.lerp(sigma[:-1].log().unsqueeze(-1), sigma[1:].log().unsqueeze(-1), part).exp()
    return torch.cat([torch.cat([times[:-1].unsqueeze(-1), process.time(inner)], -1).flatten(), times[-1:]])


def attribute(
    process: LinearProcess,
    sampler: TableSampler,
    times: Tensor,
    spectrum: Spectrum,
    error: ScoreError | None = None,
    refine: int = 64,
) -> tuple[Switched, ...]:
    """KL and W2 of a sampler's samples with its sources of error switched off.

    An error that is fresh noise at each call would average out on a refined grid. It is held over each original
    interval instead: its variance per call grows by ``refine``, but for the call at the last level.

    Args:
        process: any linear process.
        sampler: any that is a table.
        times: its grid, as many as it needs.
        spectrum: of the data.
        error: of the denoiser; None for the exact one, and then the score is no source.
        refine: steps that each interval is cut into.
    """
    if refine < 2:
        raise ValueError(f"attribute: refine must be at least 2, got {refine}.")
    sigma = process.sigma(times)
    coarse = sampler.table(process, times)
    fine_times = _refined(process, times, sigma, refine) if len(times) > 1 else times
    steps = len(fine_times) - (sampler.final == "none")
    fine = dataclasses.replace(sampler, steps=steps, grid=None).table(process, fine_times)
    finer_error = None if error is None else _HeldNoise(error, refine, float(sigma[-1]))
    sources = ("start", "discretisation") + (() if error is None else ("score",))

    def law(on: tuple[str, ...]) -> Law:
        start: Start = "prior" if "start" in on else "exact"
        wrong = "score" in on
        if "discretisation" in on:
            return propagate(coarse, spectrum, error if wrong else None, start)
        return propagate(fine, spectrum, finer_error if wrong else None, start)

    cases: dict[str, tuple[str, ...]] = {
        "all": sources,
        **{f"only {s}": (s,) for s in sources},
        **({f"all but {s}": tuple(o for o in sources if o != s) for s in sources} if len(sources) > 2 else {}),
        "none": (),
    }
    out = []
    for name, on in cases.items():
        at = law(on)
        out.append(Switched(name, on, float(at.kl), float(at.w2)))
    return tuple(out)
