"""A diffusion with what it is told, and what is reported of its samples."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from undrift.cli.given import (
    direct,
    noise_level,
    sites,
)
from undrift.cli.rules import Method
from undrift.diffusion import Diffusion, NoiseDiffusion
from undrift.guided_noise import GuidedNoise
from undrift.modal_diffusion import ModalDiffusion
from undrift.observe import Observation
from undrift.report import PosteriorRecord, accuracy
from undrift.report.plots import is_image
from undrift.sample import Particles
from undrift.sample.replace import Steer
from undrift.space import FunctionSpace, Space

__all__ = ["Conditioned", "coordinates_of", "evidence"]

_WORDS = {
    "known": "prediction with the known part in place",
    "replace": "replacement of the known part at every step",
    "amortised": "a network that is told the data",
    "dps": "guidance by the likelihood of the prediction (DPS)",
    "pigdm": "guidance by a Gaussian of fixed covariance (PiGDM)",
    "moments": "guidance by a Gaussian of Tweedie's covariance",
    "linearised": "guidance by a Gaussian, the operator linearised at the prediction",
    "twisted": "twisted sequential Monte Carlo",
}
_NO_POSTERIOR = {
    "known": "Predictions see the known part through its noise: these are plausible completions, and no draws of the "
    "posterior where known and unknown parts depend on each other.",
    "replace": "Predictions see the known part through its noise: these are plausible completions, and no draws of the "
    "posterior where known and unknown parts depend on each other.",
    "dps": "Guidance by a point estimate is no draw of the posterior; twisted corrects it as particles grow.",
    "pigdm": "Guidance by a Gaussian is a draw of the posterior for data of that covariance only; twisted corrects it.",
    "linearised": "Guidance by a Gaussian is no draw of the posterior; twisted corrects it as particles grow.",
    "moments": "Guidance by a Gaussian is a draw of the posterior for Gaussian data only; twisted corrects it.",
}


@dataclass(frozen=True, eq=False)
class Conditioned:
    """A diffusion with what it is told.

    Attributes:
        diffusion: conditioned; for twisted sampling the prior.
        method: how, or None where only classes are given.
        words: what is told, for reports; empty for nothing.
        given: conditions of one sample; see :meth:`each`.
        steer: for replacement.
        observation: what was seen, but for the methods of a known part.
        potential: for twisted sampling.
        known, values: of a known part: where, and what, (*event).
        truth: (*event), if it is known.
        notes: settings that are kept beside the samples.
    """

    diffusion: Diffusion | NoiseDiffusion | GuidedNoise | ModalDiffusion
    method: Method | None = None
    words: str = ""
    given: Mapping[str, Tensor] = field(default_factory=dict)
    steer: Steer | None = None
    observation: Observation | None = None
    potential: Any = None
    known: Tensor | None = None
    values: Tensor | None = None
    truth: Tensor | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def space(self) -> Space:
        """In whose coordinates samples come."""
        return coordinates_of(self.diffusion)

    def each(self, n: int) -> dict[str, Tensor]:
        """The conditions of n samples."""
        return {k: v.expand(n, *v.shape) for k, v in self.given.items()}

    def record(self, x: Tensor, particles: Particles | None, tones: Mapping[str, Any], seed: int) -> PosteriorRecord:
        """What the report shows of draws x (n, *event) of equal weight."""
        decode = self.space.decode
        draws = decode(x).double()
        mean, std = draws.mean(0), draws.std(0) if len(draws) > 1 else torch.zeros_like(draws[0])
        warnings = [_NO_POSTERIOR[self.method]] if self.method in _NO_POSTERIOR else []
        if self.method == "amortised" and self.notes.get("guidance", 1) != 1:
            warnings = ["Guidance at a strength other than 1 is no draw of the posterior."]
        facts: list[tuple[str, str]] = [("told", self.words), ("method", _WORDS[str(self.method)])]
        facts.append(("draws", str(len(x))))
        if particles is not None:
            fields = decode(particles.x).double()
            mean = particles.expectation(fields)
            std = particles.expectation((fields - mean).square()).sqrt()
            warnings = particles.warnings()
            error = particles.log_evidence_std_error
            facts += [
                ("particles", f"{len(particles.x)}, effective {particles.ess:.1f}, of {particles.ancestors} starts"),
                ("log p(y)", f"{particles.log_evidence:.5g}" + ("" if math.isnan(error) else f" ± {error:.2g}")),
            ]
        observation, y, predicted, where = self.observation, self.values, None, None
        if observation is not None:
            where, y = sites(observation.operator), observation.y if self.known is None else self.values
            with torch.no_grad():
                predicted = observation.operator(draws[:200].to(x)) if self.known is None else None
        about: dict[str, Any] = {
            "kind": kind_of(self.space, tuple(mean.shape)),
            "lead": f"{len(x)} draws given {self.words}.",
            "facts": facts,
            "warnings": warnings,
            "tones": dict(tones),
            "direct": observation is not None and direct(observation.operator),
            "noise_std": None if observation is None else noise_level(observation.noise),
            "settings": {**self.notes, "seed": seed},
        }
        if particles is not None:
            about |= evidence(particles)
        if self.truth is not None and len(draws) > 1:
            about["errors"] = accuracy(draws, mean, std, self.truth, self.known)
        return PosteriorRecord(draws.to(x), mean, std, about, self.truth, y, predicted, where, self.known)


def coordinates_of(diffusion: Diffusion | NoiseDiffusion | GuidedNoise | ModalDiffusion) -> Space:
    """The space in whose coordinates ``sample`` gives points."""
    return diffusion.functions if isinstance(diffusion, ModalDiffusion) else diffusion.space


def evidence(particles: Particles) -> dict[str, Any]:
    """What particles say of themselves, as plain data."""
    error = particles.log_evidence_std_error
    return {
        "log_evidence": particles.log_evidence,
        "log_evidence_std_error": None if math.isnan(error) else error,
        "run_log_evidence": particles.run_log_evidence.tolist(),
        "ess": particles.ess,
        "ess_path": particles.ess_path.tolist(),
        "ancestors": particles.ancestors,
        "resampled_at": list(particles.resampled_at),
        "warnings": particles.warnings(),
    }


def kind_of(space: Space, event: tuple[int, ...]) -> str:
    """What an event is shown as: "curve", "field", "image" or "vector"."""
    if isinstance(space, FunctionSpace):
        return {1: "curve", 2: "field"}.get(space.basis.dims, "vector")
    if is_image(event):
        return "image"
    return "curve" if len(event) == 1 and event[0] >= 16 else "field" if len(event) == 2 else "vector"
