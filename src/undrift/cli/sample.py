"""undrift sample: from a checkpoint to samples, of everything or of what is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from undrift.cli.common import (
    Clock,
    begin,
    check_applies,
    diffusion_of,
    finish,
    keep_samples,
    modal_of,
    open_checkpoint,
)
from undrift.cli.conditioned import Conditioned, evidence
from undrift.cli.conditioning import condition
from undrift.cli.rules import Method, Twisting, check
from undrift.config import ConfigError
from undrift.diffusion import Diffusion, NoiseDiffusion
from undrift.modal_diffusion import ModalDiffusion
from undrift.observe import Noise, Operator
from undrift.process import LinearProcess
from undrift.report import JsonLines, label, write_npz, write_report
from undrift.sample import Ancestral, Exponential, Particles, Sampler, TableSampler, sample, twisted
from undrift.train import DataSource

__all__ = ["SampleRun"]

_SAMPLER: Sampler = Exponential(steps=20)
_TWISTED: Sampler = Ancestral(steps=50)
_FILES = (
    "samples.npz",
    "samples.png",
    "particles.npz",
    "posterior.npz",
    "posterior.json",
    "metrics.jsonl",
    "report.html",
)


@dataclass(frozen=True, eq=False)
class SampleRun:
    """Draw samples from a trained model, under any process and sampler, of everything or of what is given.

    Args:
        run: folder of a training run, or a checkpoint file.
        process: any linear process for a denoiser; null for the one that the checkpoint names, or VP.
        sampler: how to get back from noise; for twisted sampling Ancestral in 50 steps if nothing else is said.
        n: number of samples.
        y: class of the samples, for a network trained with classes.
        guidance: strength of guidance: to the class y without a classifier, by a classifier, or by an observation; null
            for none of the first, and 1 of the others. 1 is the conditional model as it is.
        interval: noise levels [low, high] within which guidance without a classifier acts; null for all.
        classifier: run of a classifier of noisy points (undrift train --objective Classification) that guides to label.
        label: the class that a classifier guides to.
        known: file of a point of which a part is known: an npz file (x), or an image.
        mask: where it is known: left, right, top, bottom, frame, an npz file (mask), or an image, white for known; null
            for where known is not NaN.
        observe: what was observed of the sample, an operator.
        noise: law of the data around that; with a mask and a method that has a likelihood, of the known values.
        data: npz file (y) of what was observed.
        simulate: index of a point of the source, as the truth of which the data, or the known part, are simulated.
        source: where that truth comes from; null for the data that the run was trained on.
        truth: file of the truth, as of known: data are simulated of it if there are none, and errors are told.
        method: of a known part, known (prediction with it in place; the default) or replace (drawn anew at every
            step); of anything with a likelihood, guidance by dps, pigdm, moments (the default where operator and
            noise are linear and Gaussian) or linearised (where the noise is Gaussian), or twisted sampling, which is
            right as particles grow; amortised for a network that is told the data.
        potential: what twisted sampling is twisted by; null for moments, for linearised where the
            operator is not linear, or for dps where the noise is not Gaussian.
        particles: of a run of twisted sampling; null for 256.
        runs: independent runs of twisted sampling; null for 2.
        seed: of the noise.
        batch: samples walked at a time.
        out: folder of the samples; null for one beside the checkpoint, named by process and sampler.
        overwrite: replace the samples in the folder.
        progress: show a bar.
    """

    run: str
    process: LinearProcess | None = None
    sampler: Sampler = field(default_factory=lambda: _SAMPLER)
    n: int = 64
    y: int | None = None
    guidance: float | None = None
    interval: tuple[float, float] | None = None
    classifier: str | None = None
    label: int | None = None
    known: str | None = None
    mask: str | None = None
    observe: Operator | None = None
    noise: Noise | None = None
    data: str | None = None
    simulate: int | None = None
    source: DataSource | None = None
    truth: str | None = None
    method: Method | None = None
    potential: Twisting | None = None
    particles: int | None = None
    runs: int | None = None
    seed: int = 0
    batch: int = 256
    out: str | None = None
    overwrite: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("n", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, got {getattr(self, name)}.")
        if self.seed < 0:
            raise ConfigError(f"seed: expected 0 or more, got {self.seed}.")
        check(self)
        if self.method == "twisted" and self.sampler is _SAMPLER:
            object.__setattr__(self, "sampler", _TWISTED)

    def execute(self, command: Sequence[str]) -> int:
        clock = Clock()
        checkpoint = open_checkpoint(self.run)
        diffusion: Diffusion | NoiseDiffusion | ModalDiffusion
        if checkpoint.clock is not None:
            diffusion = modal_of(checkpoint, self.process, self.sampler)
        else:
            diffusion = diffusion_of(checkpoint, self.process)
            check_applies(self.sampler, diffusion.process, self.method)
        given = condition(self, checkpoint, diffusion)
        name = f"sample-{type(diffusion.process).__name__}-{type(self.sampler).__name__}"
        name += "" if given.method is None else f"-{given.method}"
        out = checkpoint.path.parent / name if self.out is None else Path(self.out)
        begin(self, out, _FILES, self.overwrite)
        x, particles = self._draw(given, checkpoint.event)
        space = given.space
        more = {**given.notes, **({} if particles is None else {"particles": evidence(particles)})}
        keep_samples(out, "samples", space.decode(x), given.diffusion, self.sampler, checkpoint.tones, self.seed, more)
        if particles is not None:
            weights = {"log_weights": particles.log_weights, "run_log_evidence": particles.run_log_evidence}
            write_npz(out / "particles.npz", space.decode(particles.x), more, **weights)
        finish(out, command, clock)
        row = {"samples": self.n, "seconds": clock.seconds, "mean": float(x.mean()), "std": float(x.std())}
        JsonLines(out / "metrics.jsonl").append(row)
        print(f"{self.n} samples under {label(diffusion.process)} with {label(self.sampler)}, {clock.seconds:.1f} s")
        if given.method is not None:
            record = given.record(x, particles, checkpoint.tones.notes, self.seed)
            record.save(out)
            say(record.about)
        elif given.words:
            print(f"given {given.words}")
        print(f"samples  {out / 'samples.npz'}")
        if particles is not None:
            print(f"weights  {out / 'particles.npz'}")
        print(f"picture  {out / 'samples.png'}")
        print(f"report   {write_report(out)}")
        return 0

    def _draw(self, given: Conditioned, event: tuple[int, ...]) -> tuple[Tensor, Particles | None]:
        """Samples (n, *event) of equal weight, and the particles they were drawn from, if there are such."""
        if given.method != "twisted":
            told: dict[str, Any] = given.each(self.n)
            x = sample(
                given.diffusion,
                self.n,
                event,
                self.sampler,
                self.seed,
                batch=self.batch,
                progress=self.progress,
                steer=given.steer,
                **told,
            )
            assert isinstance(x, Tensor)
            return x, None
        particles, runs = self.particles or 256, self.runs or 2
        assert given.observation is not None
        assert not isinstance(given.diffusion, ModalDiffusion)
        assert isinstance(self.sampler, TableSampler)
        conditions: dict[str, Any] = given.each(runs * particles)
        found = twisted(
            given.diffusion,
            given.observation,
            given.potential,
            particles,
            event,
            self.sampler,
            self.seed,
            strength=1.0 if self.guidance is None or self.y is not None else self.guidance,
            runs=runs,
            batch=self.batch,
            progress=self.progress,
            **conditions,
        )
        return found.resample(self.n, torch.Generator().manual_seed(self.seed + 2)), found


def say(about: Mapping[str, Any]) -> None:
    """Print what a posterior's summary says."""
    for key, value in about["facts"]:
        print(f"{key:<10} {value}")
    errors = about.get("errors")
    if errors:
        covered = ", ".join(
            f"{100 * v:.0f} % of places within the central {100 * float(q):g} %" for q, v in errors["coverage"].items()
        )
        print(f"{'error':<10} rmse {errors['rmse']:.4g}, posterior deviation {errors['std']:.4g}; {covered}")
    for line in about["warnings"]:
        print(f"warning: {line}")
