"""undrift train: from data and a configuration to a run's folder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from undrift.cli.common import Clock, begin, finish, keep_samples
from undrift.config import ConfigError, build, describe, schema
from undrift.denoise import NetworkDenoiser
from undrift.diffusion import Diffusion, NoiseDiffusion
from undrift.networks import MLP, Network, UNet
from undrift.process import VP, LinearProcess
from undrift.report import Tones, write_report
from undrift.sample import Exponential, sample
from undrift.train import (
    Dataset,
    DataSource,
    Denoising,
    Digits,
    EvidenceBound,
    LocalScoreMatching,
    NoiseMatching,
    Objective,
    TrainConfig,
    Trainer,
)

__all__ = ["TrainRun", "default_network"]

_SIGMA_MIN = schema(NetworkDenoiser)["sigma_min"][1]
_FILES = ("last.safetensors", "model.safetensors", "metrics.jsonl", "samples.npz", "samples.png", "report.html")


@dataclass(frozen=True, eq=False)
class TrainRun:
    """Train a network on data; the folder then serves sample, evaluate, compare and report.

    Args:
        data: where the points come from.
        network: what is trained; null for one that fits the data: a UNet for images, an MLP otherwise. channels and
            size (or features) must fit the data; a model of the noise sees all K channels at once.
        objective: Denoising trains one denoiser for every process; NoiseMatching the noise of all channels of one;
            EvidenceBound either, by the bound of one process, and the process with it if that is learned.
        model: denoiser or noise; null for what the objective trains, for EvidenceBound a denoiser.
        process: for NoiseMatching and EvidenceBound, the process; "learned" begins a LearnedProcess at its defaults.
            With Denoising only the process that the report shows.
        kernel: for a model of the noise, hsm integrates the auxiliaries' start out, dsm conditions on it.
        mixed: for a model of the noise, learn the departure from the score of Gaussian data.
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
    model: Literal["denoiser", "noise"] | None = None
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
        objective = type(self.objective).__name__
        if isinstance(self.objective, LocalScoreMatching):
            raise ConfigError(
                f"objective: {objective} is for non-linear processes; train them with undrift.train.Trainer."
            )
        trained = {Denoising: "denoiser", NoiseMatching: "noise"}.get(type(self.objective))
        if trained is not None and self.model not in (None, trained):
            raise ConfigError(
                f"model: {objective} trains a model of kind {trained}, got {self.model}; EvidenceBound trains either."
            )
        if self.process is None and isinstance(self.objective, EvidenceBound):
            raise ConfigError(
                "process: EvidenceBound is the bound of one process; name it, as in --process VP or --process learned."
            )
        if self.process is None and "noise" in (self.model, trained):
            raise ConfigError(f"process: {objective} learns the noise of one process; name it, as in --process PSLD.")
        if trained is not None and _learns(self.process):
            raise ConfigError(
                f"process: {objective} gives a {type(self.process).__name__} no gradient, so it would stay where it "
                "begins; train it with --objective EvidenceBound, or give a process that is not learned."
            )
        if self.samples < 0:
            raise ConfigError(f"samples: expected 0 or more, got {self.samples}.")
        if self.resume and self.overwrite:
            raise ConfigError("resume: give either resume or overwrite, not both.")

    def execute(self, command: Sequence[str]) -> int:
        clock, out = Clock(), Path(self.out)
        data = self.data.load()
        if self.resume and not (out / "last.safetensors").exists():
            raise ConfigError(f"resume: {out} holds no run to resume (no last.safetensors).")
        model = self.new_model(data)
        _try(model, data)
        if not self.resume:
            begin(self, out, _FILES, self.overwrite, "--resume to continue it, ")
        tones = Tones.of(data)
        notes = {**tones.notes, "std": data.std}
        if isinstance(self.objective, EvidenceBound) and self.objective.t_min is None:
            notes["sigma_min"] = self.objective.sigma_min
        trainer = Trainer(model, self.objective, data, self.train, out, notes=notes)
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
            keep_samples(out, "samples", x, diffusion, sampler, tones, self.train.seed)
        print(f"step {result.step}, loss {result.loss:.4g}, {clock.seconds:.0f} s")
        print(f"model   {out / 'model.safetensors'}")
        print(f"report  {write_report(out)}")
        return 0

    def new_model(self, data: Dataset) -> NetworkDenoiser | Diffusion | NoiseDiffusion:
        """The model to train, its weights drawn from ``train.seed``."""
        # What the configuration holds stays as it is: the process is trained in place, and reading the network drew
        # its weights before the seed was known.
        process = None if self.process is None else build(describe(self.process), LinearProcess)
        noise = self.model == "noise" or isinstance(self.objective, NoiseMatching)
        bound = self.objective if isinstance(self.objective, EvidenceBound) else None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.train.seed)
            channels = process.channels if noise and process is not None else 1
            network = (
                default_network(data, channels) if self.network is None else build(describe(self.network), Network)
            )
        # Data such as logits of mostly black pixels lie far from zero, and so does what the network sees.
        scale = data.std if bound is None else float(data.x.double().square().mean().sqrt())
        if noise:
            assert process is not None
            return NoiseDiffusion(process, network, self.kernel, mixed=self.mixed, data_std=scale)
        if bound is None:
            return NetworkDenoiser(network, sigma_data=scale)
        assert process is not None
        first = bound.sigma_min if bound.t_min is None else float(process.sigma(bound.t_min).detach())
        return Diffusion(process, NetworkDenoiser(network, scale, min(_SIGMA_MIN, first)))


def _learns(process: LinearProcess | None) -> bool:
    return isinstance(process, nn.Module) and any(p.requires_grad for p in process.parameters())


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


def _try(model: NetworkDenoiser | Diffusion | NoiseDiffusion, data: Dataset) -> None:
    """One call of the network, so that a wrong shape is said before any work."""
    x = data.x[:2]
    try:
        with torch.no_grad():
            if isinstance(model, NoiseDiffusion):
                model.score(x.unsqueeze(1).expand(-1, model.process.channels, *data.event), 0.5 * model.process.horizon)
            else:
                (model.denoiser if isinstance(model, Diffusion) else model)(x, torch.ones(len(x)))
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"network: does not fit {data.name}, points of shape {data.event}: {error}") from error
