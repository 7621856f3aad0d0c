"""undrift train: from data and a configuration to a run's folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from undrift.cli.common import Clock, begin, finish, keep_samples
from undrift.cli.models import data_scale, default_classifier, default_network, observed_of
from undrift.config import ConfigError, build, describe, schema
from undrift.denoise import NetworkClassifier, NetworkDenoiser
from undrift.denoise.spectral import SpectralDenoiser
from undrift.diffusion import Diffusion, NoiseDiffusion
from undrift.modal_diffusion import ModalDiffusion
from undrift.networks import ClassifierNetwork, Network
from undrift.process import VP, LinearProcess
from undrift.report import Tones, write_json, write_report
from undrift.sample import Exponential, sample
from undrift.space import EmpiricalSpectrum, FunctionSpace, ModalClock, Space, White
from undrift.train import (
    Classification,
    Dataset,
    DataSource,
    Denoising,
    Digits,
    EvidenceBound,
    LocalScoreMatching,
    NoiseMatching,
    Objective,
    SpectralDenoising,
    TrainConfig,
    Trainer,
    accuracy,
)
from undrift.train.checkpoint import network_of
from undrift.train.trainer import check_observed

__all__ = ["TrainRun"]

_SIGMA_MIN = schema(NetworkDenoiser)["sigma_min"][1]
_SIGMA_MAX = schema(NetworkDenoiser)["sigma_max"][1]
_LEVELS = (0.0, 0.3, 1.0, 3.0)
_FILES = (
    "last.safetensors",
    "model.safetensors",
    "metrics.jsonl",
    "samples.npz",
    "samples.png",
    "evaluation.json",
    "report.html",
)


@dataclass(frozen=True, eq=False)
class TrainRun:
    """Train a network on data; the folder then serves sample, evaluate, compare and report.

    Args:
        data: where the points come from.
        network: what is trained; null for one that fits the data: a SpectralNet for functions, a UNet for images, an
            MLP otherwise, and a classifier of the same kind. channels and size (or features) must fit the data; a model
            of the noise sees all K channels at once.
        objective: Denoising trains one denoiser for every process; NoiseMatching the noise of all channels of one;
            EvidenceBound either, by the bound of one process, and the process with it if that is learned;
            SpectralDenoising a denoiser of functions that is preconditioned mode by mode; Classification a classifier
            of noisy points, which guides samples of another run to a class.
        space: where the points live: White, a FunctionSpace, whose noise is a function, "data", whose noise is a Matern
            fit to the data but rough enough to learn in every mode, or "matched", whose noise has the spectrum of the
            data (in one dimension for points (n,), in two for (n1, n2) and (C, n1, n2)).
        clock: with SpectralDenoising, levels of the modes, Blurring or HeatDissipation; null for one level in all.
        model: denoiser or noise; null for what the objective trains, for EvidenceBound a denoiser.
        process: for NoiseMatching and EvidenceBound, the process; "learned" begins a LearnedProcess at its defaults.
            With Denoising only the process that the report shows.
        kernel: for a model of the noise, hsm integrates the auxiliaries' start out, dsm conditions on it.
        mixed: for a model of the noise, learn the departure from the score of Gaussian data.
        train: settings of the optimisation.
        holdout: labelled points that a classifier has not seen; its accuracy at some noise levels is measured on them.
        samples: how many samples to draw at the end; 0 for none.
        out: folder of the run.
        resume: continue the run in the folder; its settings must be the same, train.steps may be raised.
        overwrite: replace the run in the folder.
        progress: show a bar.
    """

    data: DataSource = field(default_factory=Digits)
    network: Network | ClassifierNetwork | None = None
    objective: Objective = field(default_factory=Denoising)
    space: Literal["data", "matched"] | Space | None = None
    clock: ModalClock | None = None
    model: Literal["denoiser", "noise"] | None = None
    process: LinearProcess | None = None
    kernel: Literal["hsm", "dsm"] = "hsm"
    mixed: bool = False
    train: TrainConfig = field(default_factory=TrainConfig)
    holdout: DataSource | None = None
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
        trained = {
            Denoising: "denoiser",
            SpectralDenoising: "denoiser",
            NoiseMatching: "noise",
            Classification: "classifier",
        }.get(type(self.objective))
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
        self._check_kind(objective)
        if self.samples < 0:
            raise ConfigError(f"samples: expected 0 or more, got {self.samples}.")
        if self.resume and self.overwrite:
            raise ConfigError("resume: give either resume or overwrite, not both.")

    def _check_kind(self, objective: str) -> None:
        classifies = isinstance(self.objective, Classification)
        if isinstance(self.network, ClassifierNetwork) != classifies and self.network is not None:
            what = "a classifier" if classifies else "a network of points"
            raise ConfigError(f"network: {objective} trains {what}, got a {type(self.network).__name__}.")
        if classifies and self.process is not None:
            raise ConfigError("process: a classifier is asked at noise levels and serves every process; leave it out.")
        if self.holdout is not None and not classifies:
            raise ConfigError(f"holdout: is for classifiers; judge what {objective} trains by undrift evaluate.")
        function = self.space is not None and not isinstance(self.space, White)
        if isinstance(self.space, FunctionSpace) and self.space.coordinates != "physical":
            raise ConfigError(
                f"space.coordinates: this command trains on values, 'physical', got {self.space.coordinates!r}; "
                "train on encoded points by undrift.train.Trainer."
            )
        if isinstance(self.objective, SpectralDenoising) and not function:
            raise ConfigError("space: SpectralDenoising is for functions; give --space data or a FunctionSpace.")
        if self.clock is not None and not isinstance(self.objective, SpectralDenoising):
            raise ConfigError(
                f"clock: a clock of modes is trained with --objective SpectralDenoising, mode by mode, not {objective}."
            )
        if function and isinstance(self.objective, (NoiseMatching, EvidenceBound)):
            raise ConfigError(
                f"space: {objective} is for White here; functions are learned by Denoising or SpectralDenoising, for "
                "every process at once."
            )

    def execute(self, command: Sequence[str]) -> int:
        clock, out = Clock(), Path(self.out)
        data = self.data.load()
        held = None if self.holdout is None else self.holdout.load()
        if held is not None and (held.event != data.event or held.labels is None):
            raise ConfigError(
                f"holdout: {held.name} must hold labelled points of shape {data.event}, got {held.event}"
                f"{' without labels' if held.labels is None else ''}."
            )
        if isinstance(self.objective, Classification) and data.labels is None:
            raise ConfigError(f"data: {data.name} has no classes to tell apart.")
        if self.resume and not (out / "last.safetensors").exists():
            raise ConfigError(f"resume: {out} holds no run to resume (no last.safetensors).")
        model = self.new_model(data)
        try:
            check_observed(network_of(model), data, self.train.observed_dropout)
        except ValueError as error:
            raise ConfigError(f"train.observed_dropout: {error}") from error
        _try(model, data)
        if self.samples and isinstance(model, SpectralDenoiser):
            try:
                _shown(model, self.process)
            except ValueError as error:
                raise ConfigError(f"process: {error}") from error
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
        if isinstance(result.model, NetworkClassifier):
            if held is not None:
                _judge(out, result.model, held)
        elif self.samples:
            diffusion = _shown(result.model, self.process)
            sampler = Exponential(steps=40)
            told: dict[str, Any] = dict(observed_of(data, self.samples))
            event = tuple(data.draw(torch.zeros(1, dtype=torch.int64), torch.Generator().manual_seed(0)).shape[1:])
            x = sample(diffusion, self.samples, event, sampler, self.train.seed, progress=self.progress, **told)
            assert isinstance(x, torch.Tensor)
            keep_samples(out, "samples", x, diffusion, sampler, tones, self.train.seed)
        print(f"step {result.step}, loss {result.loss:.4g}, {clock.seconds:.0f} s")
        print(f"model   {out / 'model.safetensors'}")
        print(f"report  {write_report(out)}")
        return 0

    def new_model(self, data: Dataset) -> NetworkDenoiser | NetworkClassifier | Diffusion | NoiseDiffusion:
        """The model to train, its weights drawn from ``train.seed``."""
        # What the configuration holds stays as it is: the process is trained in place, and reading the network drew
        # its weights before the seed was known.
        process = None if self.process is None else build(describe(self.process), LinearProcess)
        noise = self.model == "noise" or isinstance(self.objective, NoiseMatching)
        bound = self.objective if isinstance(self.objective, EvidenceBound) else None
        space = self.open_space(data)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.train.seed)
            channels = process.channels if noise and process is not None else 1
            network: Any
            if self.network is not None:
                kind = ClassifierNetwork if isinstance(self.network, ClassifierNetwork) else Network
                network = build(describe(self.network), kind)
            elif isinstance(self.objective, Classification):
                network = default_classifier(data)
            else:
                network = default_network(data, channels, space, self.train.observed_dropout > 0)
        # Data such as logits of mostly black pixels lie far from zero, and so does what the network sees.
        scale = data_scale(data, space) if bound is None else float(data.x.double().square().mean().sqrt())
        if isinstance(self.objective, Classification):
            low, high = self.objective.noise.support
            return NetworkClassifier(network, scale, max(low, _SIGMA_MIN), min(high, _SIGMA_MAX), space)
        if isinstance(self.objective, SpectralDenoising):
            assert isinstance(space, FunctionSpace)
            return SpectralDenoiser(network, space, EmpiricalSpectrum.of(data.x, space.basis), self.clock)
        if noise:
            assert process is not None
            return NoiseDiffusion(process, network, self.kernel, mixed=self.mixed, data_std=scale)
        if bound is None:
            return NetworkDenoiser(network, sigma_data=scale, space=space)
        assert process is not None
        first = bound.sigma_min if bound.t_min is None else float(process.sigma(bound.t_min).detach())
        return Diffusion(process, NetworkDenoiser(network, scale, min(_SIGMA_MIN, first)))

    def open_space(self, data: Dataset) -> Space:
        """Where the points live.

        Raises:
            ConfigError: if the data are not functions on a grid of the space's dimension.
        """
        if self.space is None or isinstance(self.space, White):
            return White()
        dims = self.space.basis.dims if isinstance(self.space, FunctionSpace) else 1
        if len(data.event) < dims or data.pixels is not None:
            what = "dequantised pixels" if data.pixels is not None else f"points of shape {data.event}"
            raise ConfigError(f"space: {data.name} holds {what}, no functions of {dims} variable{'s' * (dims > 1)}.")
        if isinstance(self.space, Space):
            return self.space
        try:
            return FunctionSpace.of(data.x) if self.space == "data" else FunctionSpace.matched(data.x)
        except ValueError as error:
            raise ConfigError(f"space: {error}") from error


def _judge(out: Path, classifier: NetworkClassifier, held: Dataset) -> None:
    """evaluation.json: what a classifier knows of points that it has not seen, at some noise levels."""
    rows = accuracy(classifier, held, _LEVELS)
    measures = [
        {"name": f"accuracy at sigma {r.sigma:g}", "value": f"{r.accuracy:.3f}", "std_error": f"{r.accuracy_se:.3f}"}
        for r in rows
    ] + [
        {
            "name": f"cross-entropy at sigma {r.sigma:g}",
            "value": f"{r.cross_entropy:.3f}",
            "std_error": f"{r.cross_entropy_se:.3f}",
        }
        for r in rows
    ]
    about = {
        "measures": measures,
        "caption": f"Noisy points of {held.name}, which the classifier has not seen; cross-entropy in nats.",
        "remarks": [],
    }
    write_json(out / "evaluation.json", about)
    for r in rows:
        print(f"sigma {r.sigma:<5g} accuracy {r.accuracy:.3f} ± {r.accuracy_se:.3f}, {r.cross_entropy:.3f} nats")


def _learns(process: LinearProcess | None) -> bool:
    return isinstance(process, nn.Module) and any(p.requires_grad for p in process.parameters())


def _shown(
    model: NetworkDenoiser | NoiseDiffusion | Diffusion, process: LinearProcess | None
) -> Diffusion | NoiseDiffusion | ModalDiffusion:
    if isinstance(model, SpectralDenoiser) and model.clock is not None:
        return ModalDiffusion(process or VP(), model)
    if isinstance(model, NetworkDenoiser):
        return Diffusion(process or VP(), model)
    return model


def _try(model: NetworkDenoiser | NetworkClassifier | Diffusion | NoiseDiffusion, data: Dataset) -> None:
    """One call of the network, so that a wrong shape is said before any work."""
    x, told = data.x[:2], observed_of(data, 2)
    x = x if len(x) == 2 else x.expand(2, *data.event)
    try:
        with torch.no_grad():
            if isinstance(model, NoiseDiffusion):
                z = x.unsqueeze(1).expand(-1, model.process.channels, *data.event)
                model.score(z, 0.5 * model.process.horizon, **told)
            elif isinstance(model, NetworkClassifier):
                model(x, torch.ones(len(x)))
            else:
                (model.denoiser if isinstance(model, Diffusion) else model)(x, torch.ones(len(x)), **told)
    except (ValueError, RuntimeError, TypeError) as error:
        raise ConfigError(f"network: does not fit {data.name}, points of shape {data.event}: {error}") from error
