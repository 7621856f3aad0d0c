"""undrift sample: from a checkpoint to samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from undrift.cli.common import (
    Clock,
    begin,
    check_applies,
    diffusion_of,
    draw_classes,
    finish,
    keep_samples,
    open_checkpoint,
)
from undrift.config import ConfigError
from undrift.process import LinearProcess
from undrift.report import JsonLines, label, write_report
from undrift.sample import Exponential, Sampler, sample

__all__ = ["SampleRun"]


@dataclass(frozen=True, eq=False)
class SampleRun:
    """Draw samples from a trained model, under any process and sampler.

    Args:
        run: folder of a training run, or a checkpoint file.
        process: any linear process for a denoiser; null for the one that the checkpoint names, or VP.
        sampler: how to get back from noise.
        n: number of samples.
        y: class of the samples, for a network trained with classes.
        seed: of the noise.
        batch: samples walked at a time.
        out: folder of the samples; null for one beside the checkpoint, named by process and sampler.
        overwrite: replace the samples in the folder.
        progress: show a bar.
    """

    run: str
    process: LinearProcess | None = None
    sampler: Sampler = field(default_factory=lambda: Exponential(steps=20))
    n: int = 64
    y: int | None = None
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

    def execute(self, command: Sequence[str]) -> int:
        clock = Clock()
        checkpoint = open_checkpoint(self.run)
        diffusion = diffusion_of(checkpoint, self.process)
        check_applies(self.sampler, diffusion.process)
        condition: dict[str, Any] = draw_classes(checkpoint, self.y, self.n)
        name = f"sample-{type(diffusion.process).__name__}-{type(self.sampler).__name__}"
        out = checkpoint.path.parent / name if self.out is None else Path(self.out)
        begin(self, out, ("samples.npz", "samples.png", "metrics.jsonl", "report.html"), self.overwrite)
        x = sample(
            diffusion,
            self.n,
            checkpoint.event,
            self.sampler,
            self.seed,
            batch=self.batch,
            progress=self.progress,
            **condition,
        )
        assert isinstance(x, torch.Tensor)
        keep_samples(out, "samples", x, diffusion, self.sampler, checkpoint.tones, self.seed)
        finish(out, command, clock)
        row = {"samples": self.n, "seconds": clock.seconds, "mean": float(x.mean()), "std": float(x.std())}
        JsonLines(out / "metrics.jsonl").append(row)
        print(f"{self.n} samples under {label(diffusion.process)} with {label(self.sampler)}, {clock.seconds:.1f} s")
        print(f"samples  {out / 'samples.npz'}")
        print(f"picture  {out / 'samples.png'}")
        print(f"report   {write_report(out)}")
        return 0
