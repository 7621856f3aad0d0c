"""undrift demo: the main job in one command: one denoiser, five processes, four samplers, judged on real digits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from undrift.cli.common import Clock, begin, finish, keep_samples, open_checkpoint
from undrift.cli.compare import compare_into, plan_cells
from undrift.cli.judge import Judge
from undrift.cli.train import TrainRun
from undrift.config import ConfigError
from undrift.diffusion import Diffusion
from undrift.networks import UNet
from undrift.process import CLD, MALDA, PSLD, VP, FlowMatching, LinearProcess
from undrift.report import Tones, write_report
from undrift.sample import SSCS, Ancestral, EulerMaruyama, Exponential, Sampler, sample
from undrift.train import Digits, TrainConfig, Trainer

__all__ = ["DemoRun"]

_FILES = (
    *("last.safetensors", "model.safetensors", "metrics.jsonl", "samples.npz", "samples.png"),
    *("comparison.jsonl", "comparison.json", "run.json", "report.html"),
)


@dataclass(frozen=True, eq=False)
class DemoRun:
    """Train one small U-Net on scikit-learn's 8x8 digits, sample it under five processes with five samplers, report.

    Nothing is trained again between processes: one denoiser serves them all. A demo that was stopped goes on where it
    was; a finished one is not repeated without --overwrite.

    Args:
        out: folder of the run.
        fast: seconds instead of minutes: a network too small and too young for good digits, to see that all works.
        seed: of training and sampling.
        overwrite: start anew.
        progress: show a bar while training.
    """

    out: str = "runs/demo"
    fast: bool = False
    seed: int = 0
    overwrite: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ConfigError(f"seed: expected 0 or more, got {self.seed}.")

    def execute(self, command: Sequence[str]) -> int:
        clock, out = Clock(), Path(self.out)
        if (out / "run.json").exists() or self.overwrite or not (out / "last.safetensors").exists():
            begin(self, out, _FILES, self.overwrite)
        data, holdout = Digits("train").load(), Digits("test").load()
        train = self.train()
        work, refused = plan_cells(self.processes(), self.samplers(), self.calls())

        print(f"1. one denoiser, a small U-Net, on {len(data)} digits: {train.train.steps} steps", flush=True)
        trainer = Trainer(
            train.new_model(data),
            train.objective,
            data,
            train.train,
            out,
            notes={**Tones.of(data).notes, "std": data.std},
        )
        if trainer.fit(progress=self.progress).interrupted:
            print("interrupted; saved. The same command goes on from here.")
            return 130

        print(f"2. features of a small classifier, trained in place  ({clock.seconds:.0f} s)", flush=True)
        judge = Judge.of(data, holdout, self.seed, epochs=2 if self.fast else 15)

        print(
            f"3. {len(work)} cells: process x sampler x network calls, nothing retrained  ({clock.seconds:.0f} s)",
            flush=True,
        )
        checkpoint = open_checkpoint(str(out))
        n, repeats = (80, 2) if self.fast else (None, 3)
        compare_into(out, checkpoint, work, refused, judge, data, holdout, n, repeats, self.seed, 600)
        diffusion, sampler = Diffusion(PSLD(), checkpoint.denoiser), Exponential(steps=10 if self.fast else 40)
        x = sample(diffusion, 64, data.event, sampler, self.seed)
        assert isinstance(x, torch.Tensor)
        keep_samples(out, "samples", x, diffusion, sampler, checkpoint.tones, self.seed)
        finish(out, command, clock)
        print(f"\n4. done in {clock.seconds:.0f} s")
        print(f"report  {write_report(out).resolve()}")
        return 0

    def train(self) -> TrainRun:
        """The training part, as undrift train would run it."""
        if self.fast:
            network = UNet(1, 8, width=8, multipliers=(1, 1), attention=False)
            config = TrainConfig(steps=30, batch=64, warmup=5, log_every=10, seed=self.seed)
        else:
            network = UNet(1, 8, width=32)
            config = TrainConfig(
                steps=1200,
                batch=128,
                lr=2e-3,
                warmup=100,
                ema=40_000,
                log_every=50,
                checkpoint_every=400,
                seed=self.seed,
            )
        return TrainRun(data=Digits("train"), network=network, train=config, out=self.out)

    def processes(self) -> list[LinearProcess]:
        return [VP(), CLD(), PSLD(), MALDA(), FlowMatching()]

    def samplers(self) -> list[Sampler]:
        return [EulerMaruyama(), Ancestral(), SSCS(), Exponential(order=1), Exponential(order=2)]

    def calls(self) -> list[int]:
        return [2, 4] if self.fast else [5, 10, 20]
