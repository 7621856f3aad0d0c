"""undrift train: from data and a configuration to a run's folder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from undrift.cli.common import Clock, begin, finish, keep_samples
from undrift.config import ConfigError, build, describe
from undrift.denoise import NetworkDenoiser
from undrift.diffusion import Diffusion, NoiseDiffusion
from undrift.networks import MLP, Network, UNet
from undrift.process import VP, LinearProcess
from undrift.report import write_report
from undrift.sample import Exponential, sample
from undrift.train import Dataset, DataSource, Denoising, Digits, NoiseMatching, Objective, TrainConfig, Trainer

__all__ = ["TrainRun", "default_network"]

_FILES = ("last.safetensors", "model.safetensors", "metrics.jsonl", "samples.npz", "samples.png", "report.html")


@dataclass(frozen=True, eq=False)
class TrainRun:
    """Train a network on data; the folder then serves sample, evaluate, compare and report.

    Args:
        data: where the points come from.
        network: what is trained; null for one that fits the data: a UNet for images, an MLP otherwise. channels and
            size (or features) must fit the data; a NoiseMatching network sees all K channels at once.
        objective: Denoising trains one denoiser for every process; NoiseMatching the noise of all channels of one.
        process: for NoiseMatching, the process; with Denoising only the process that the report shows.
        kernel: for NoiseMatching, hsm integrates the auxiliaries' start out, dsm conditions on it.
        mixed: for NoiseMatching, learn the departure from the score of Gaussian data.
        train: settings of the optimisation.
        samples: how many samples to draw at the end; 0 for none.
        out: folder of the run.
        resume: continue the run in the folder; its settings must be the same, train.steps may be raised.
        overwrite: replace the run in the folder.
        progress: show a bar.
    """

    data: DataSource = field(default_factory=Digits)
    network: Network | None = None
    objective: Objective = field(default_factory=Denoising)
    process: LinearProcess | None = None
    kernel: Literal["hsm", "dsm"] = "hsm"
    mixed: bool = False
    train: TrainConfig = field(default_factory=TrainConfig)
    samples: int = 64
    out: str = "runs/train"
    resume: bool = False
    overwrite: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.objective, NoiseMatching) and self.process is None:
            raise ConfigError("process: NoiseMatching learns the noise of one process; name it, as in --process PSLD.")
        if self.samples < 0:
            raise ConfigError(f"samples: expected 0 or more, got {self.samples}.")
        if self.resume and self.overwrite:
            raise ConfigError("resume: give either resume or overwrite, not both.")

    def execute(self, command: Sequence[str]) -> int:
        clock, out = Clock(), Path(self.out)
        data = self.data.load()
        if self.resume and not (out / "last.safetensors").exists():
            raise ConfigError(f"resume: {out} holds no run to resume (no last.safetensors).")
        model = self.model(data)
        _try(model, data)
        if not self.resume:
            begin(self, out, _FILES, self.overwrite, "--resume to continue it, ")
        trainer = Trainer(
            model, self.objective, data, self.train, out, notes={"low": data.low, "high": data.high, "std": data.std}
        )
        print(f"training on {data.name}, {len(data)} points of shape {data.event}, to step {self.train.steps}")
        result = trainer.fit(progress=self.progress)
        finish(out, command, clock)
        if result.interrupted:
            print(f"interrupted at step {result.step}; saved. Continue with: {' '.join(command)} --resume")
            return 130
        if self.samples:
            diffusion = _shown(result.model, self.process)
            sampler = Exponential(steps=40)
            x = sample(diffusion, self.samples, data.event, sampler, self.train.seed, progress=self.progress)
            assert isinstance(x, torch.Tensor)
            keep_samples(out, "samples", x, diffusion, sampler, (data.low, data.high), self.train.seed)
        print(f"step {result.step}, loss {result.loss:.4g}, {clock.seconds:.0f} s")
        print(f"model   {out / 'model.safetensors'}")
        print(f"report  {write_report(out)}")
        return 0

    def model(self, data: Dataset) -> NetworkDenoiser | NoiseDiffusion:
        """The model to train, its weights drawn from ``train.seed``."""
        channels = self.process.channels if isinstance(self.objective, NoiseMatching) and self.process else 1
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.train.seed)
            # built again, since reading the configuration drew weights before the seed was known
            network = (
                default_network(data, channels) if self.network is None else build(describe(self.network), Network)
            )
        if isinstance(self.objective, NoiseMatching):
            assert self.process is not None
            return NoiseDiffusion(self.process, network, self.kernel, mixed=self.mixed, data_std=data.std)
        return NetworkDenoiser(network, sigma_data=data.std)


def default_network(data: Dataset, channels: int = 1) -> Network:
    """A UNet for square images of even size, an MLP for anything else; ``channels`` is K where it sees all channels."""
    event = data.event
    if len(event) == 3 and event[1] == event[2] and event[1] % 2 == 0:
        levels = (1, 2, 2) if event[1] % 4 == 0 and event[1] >= 16 else (1, 2)
        return UNet(event[0] * channels, event[1], multipliers=levels)
    return MLP(math.prod(event) * channels)


def _shown(
    model: NetworkDenoiser | NoiseDiffusion | Diffusion, process: LinearProcess | None
) -> Diffusion | NoiseDiffusion:
    if isinstance(model, NetworkDenoiser):
        return Diffusion(process or VP(), model)
    return model


def _try(model: NetworkDenoiser | NoiseDiffusion, data: Dataset) -> None:
    """One call of the network, so that a wrong shape is said before any work."""
    x = data.x[:2]
    try:
        with torch.no_grad():
            if isinstance(model, NoiseDiffusion):
                model.score(x.unsqueeze(1).expand(-1, model.process.channels, *data.event), 0.5 * model.process.horizon)
            else:
                model(x, 1.0)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"network: does not fit {data.name}, points of shape {data.event}: {error}") from error
