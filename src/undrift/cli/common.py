"""What the commands share: folders that are never overwritten by accident, models and their notes."""

from __future__ import annotations

import dataclasses
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from undrift.cli.arguments import to_yaml
from undrift.config import ConfigError, describe
from undrift.denoise import NetworkClassifier, NetworkDenoiser
from undrift.diffusion import Diffusion, NoiseDiffusion
from undrift.guided_noise import GuidedNoise
from undrift.modal_diffusion import ModalDiffusion
from undrift.networks.base import takes_observed
from undrift.process import VP, LinearProcess
from undrift.report import Tones, label, samples_figure, write_bytes, write_npz, write_provenance
from undrift.sample import ProbabilityFlow, Sampler, TableSampler
from undrift.sample.modal import modal_plan
from undrift.space import ModalClock
from undrift.train import Dataset, DataSource, Dequantised, load, notes

__all__ = [
    "Checkpoint",
    "Clock",
    "begin",
    "check_applies",
    "check_data",
    "check_pixels",
    "dequantised_flag",
    "diffusion_of",
    "draw_classes",
    "finish",
    "keep_samples",
    "open_checkpoint",
    "open_classifier",
]


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start


def begin(run: Any, out: Path, marks: Sequence[str], overwrite: bool, hint: str = "") -> None:
    """Make a run's folder and write config.yaml, unless a run is there already.

    Args:
        run: the command's configuration.
        out: its folder.
        marks: files that tell that a run is there.
        overwrite: remove those files first.
        hint: what else than --overwrite the user may want.

    Raises:
        ConfigError: if a run is there.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"out: {out} is a file; give a folder.")
    there = [m for m in marks if (out / m).exists()]
    if there and not overwrite:
        raise ConfigError(
            f"out: {out} already holds a run ({', '.join(there)}); give another folder, {hint}or --overwrite to "
            "replace it."
        )
    for mark in there:
        (out / mark).unlink()
    # What was said of the folder held for this start alone; --config with the file may go on, by --resume.
    start = {name: False for name in ("overwrite", "resume") if getattr(run, name, False)}
    write_bytes(out / "config.yaml", to_yaml(dataclasses.replace(run, **start) if start else run).encode())


def finish(out: Path, command: Sequence[str], clock: Clock) -> None:
    """Say in run.json how the folder came about."""
    write_provenance(out, command, clock.seconds)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A trained model on disk: the file, the model, and what was noted beside it."""

    path: Path
    model: NetworkDenoiser | Diffusion | NoiseDiffusion
    notes: Mapping[str, Any]

    @property
    def event(self) -> tuple[int, ...]:
        return tuple(self.notes["event"])

    @property
    def tones(self) -> Tones:
        """How the values of its samples show."""
        return Tones.read(self.notes)

    @property
    def denoiser(self) -> NetworkDenoiser:
        """The denoiser, which serves every process.

        Raises:
            ConfigError: if the model predicts the noise of one process, or runs on a clock of modes.
        """
        if self.clock is not None:
            raise ConfigError(
                f"run: {self.path} was trained on a {type(self.clock).__name__} clock, on which every mode has a noise "
                "level of its own; undrift sample walks it, under any process, and no other command."
            )
        return self._denoiser

    @property
    def clock(self) -> ModalClock | None:
        """Levels of the modes, where they are not one."""
        return None if isinstance(self.model, NoiseDiffusion) else getattr(self._denoiser, "clock", None)

    @property
    def _denoiser(self) -> NetworkDenoiser:
        if isinstance(self.model, NoiseDiffusion):
            raise ConfigError(
                f"run: {self.path} predicts the noise of {label(self.model.process)} and of no other process; "
                "a denoiser serves them all."
            )
        if isinstance(self.model, Diffusion):
            inner = self.model.denoiser
            assert isinstance(inner, NetworkDenoiser)
            return inner
        return self.model

    @property
    def data_std(self) -> float:
        """Deviation of one data coordinate, relative to the noise's."""
        return self.model.data_std if isinstance(self.model, NoiseDiffusion) else self._denoiser.sigma_data

    @property
    def network(self) -> Any:
        """The network inside."""
        return self.model.network if isinstance(self.model, NoiseDiffusion) else self._denoiser.network

    @property
    def told(self) -> bool:
        """Whether the network takes what was observed of a point."""
        return takes_observed(self.network)

    def check_prior(self, what: str, instead: str) -> None:
        """See that the model makes points without being told of an observation.

        Raises:
            ConfigError: if it must be told, saying that ``what`` tells it nothing, and what to do ``instead``.
        """
        if self.told and not self.network.condition_optional:
            raise ConfigError(
                f"run: the network of {self.path} is told what was observed, and {what} tells it nothing; train one "
                f"that does without, with --train.observed_dropout 0.1, or {instead}."
            )


def open_checkpoint(run: str) -> Checkpoint:
    """The model of a run's folder (its model.safetensors), or of a file.

    Raises:
        ConfigError: if there is none, it does not say what it samples, or it is a classifier.
        CheckpointError: if the file is not an intact checkpoint.
    """
    path, model, noted = _open(run, "run")
    if isinstance(model, NetworkClassifier):
        raise ConfigError(f"run: {path} is a classifier; it guides other runs: undrift sample RUN --classifier {run}.")
    return Checkpoint(path, model, noted)


def open_classifier(run: str, checkpoint: Checkpoint) -> NetworkClassifier:
    """The classifier of a run's folder, for points of a model.

    Raises:
        ConfigError: if there is none, or it knows other points than the model makes.
    """
    path, model, noted = _open(run, "classifier")
    if not isinstance(model, NetworkClassifier):
        raise ConfigError(
            f"classifier: {path} is no classifier; train one with undrift train --objective Classification."
        )
    if tuple(noted["event"]) != checkpoint.event:
        raise ConfigError(
            f"classifier: {path} knows points of shape {tuple(noted['event'])}, the model of {checkpoint.path} makes "
            f"{checkpoint.event}."
        )
    own, other = (describe(getattr(m, "space", None)) for m in (model, checkpoint.model))
    if own != other:
        raise ConfigError(
            f"classifier: {path} was trained on noise of {own}, the model of {checkpoint.path} on {other}; train both "
            "on the same space."
        )
    return model


def _open(run: str, flag: str) -> tuple[Path, Any, dict[str, Any]]:
    place = Path(run).expanduser()
    path = place / "model.safetensors" if place.is_dir() else place
    if not path.is_file():
        what = "holds no model.safetensors" if place.is_dir() else "does not exist"
        raise ConfigError(
            f"{flag}: {place} {what}; give a folder that undrift train has written, or a checkpoint file."
        )
    model, noted = load(path), notes(path)
    if "event" not in noted:
        raise ConfigError(
            f"{flag}: {path} does not note the shape of its events; save it with notes={{'event': [...]}}."
        )
    return path, model, noted


def modal_of(checkpoint: Checkpoint, process: LinearProcess | None, sampler: Sampler) -> ModalDiffusion:
    """The diffusion on a clock of modes, under ``process`` or VP.

    Raises:
        ConfigError: if the process ends below the clock's highest level, or the sampler cannot keep to the clock.
    """
    try:
        diffusion = ModalDiffusion(process or VP(), checkpoint._denoiser)  # type: ignore[arg-type]
    except ValueError as error:
        raise ConfigError(f"process: {error}") from error
    if not isinstance(sampler, TableSampler):
        raise ConfigError(f"sampler: a clock of modes is walked by a table, got {type(sampler).__name__}.")
    try:
        modal_plan(diffusion, sampler, (1,) * len(checkpoint.event))
    except ValueError as error:
        raise ConfigError(f"sampler: {error}") from error
    return diffusion


def diffusion_of(checkpoint: Checkpoint, process: LinearProcess | None) -> Diffusion | NoiseDiffusion:
    """The diffusion to sample: under ``process``, or the one it was saved with, or VP."""
    model = checkpoint.model
    if isinstance(model, NoiseDiffusion):
        if process is not None and describe(process) != describe(model.process):
            return Diffusion(process, checkpoint.denoiser)  # says why not
        return model
    if process is None:
        process = model.process if isinstance(model, Diffusion) else VP()
    return Diffusion(process, checkpoint.denoiser)


def draw_classes(checkpoint: Checkpoint, y: int | None, n: int) -> dict[str, Tensor]:
    """The condition of n samples of class ``y``, empty for none.

    Raises:
        ConfigError: if the network was not trained for that class.
    """
    if y is None:
        return {}
    classes = getattr(checkpoint.network, "classes", None)
    if classes is None or not 0 <= y < classes:
        known = "takes no classes" if classes is None else f"knows classes 0 to {classes - 1}"
        raise ConfigError(f"y: the network of {checkpoint.path} {known}, got {y}.")
    return {"y": torch.full((n,), y)}


def keep_samples(
    out: Path,
    stem: str,
    x: Tensor,
    diffusion: Diffusion | NoiseDiffusion | GuidedNoise | ModalDiffusion,
    sampler: Sampler,
    tones: Tones,
    seed: int,
    more: Mapping[str, Any] | None = None,
) -> None:
    """``stem``.npz and ``stem``.png: samples as the model makes them with their settings, and a picture of them."""
    settings: dict[str, Any] = {
        "process": describe(diffusion.process),
        "sampler": describe(sampler),
        "process_name": label(diffusion.process),
        "sampler_name": label(sampler),
        "seed": seed,
        **tones.notes,
        **(more or {}),
    }
    if isinstance(sampler, TableSampler):
        settings["calls"] = sampler.plan(diffusion.process).calls
    write_npz(out / f"{stem}.npz", x, settings)
    write_bytes(out / f"{stem}.png", samples_figure(x, tones))


def check_applies(sampler: Sampler, process: LinearProcess, method: str | None = None) -> None:
    """Make the plan once, so that what does not fit is said before any work.

    Args:
        sampler, process: to be combined.
        method: of conditioning: replacement needs fixed steps, and twisted sampling steps that draw noise.

    Raises:
        ConfigError: with the sampler's own reason.
    """
    if isinstance(sampler, ProbabilityFlow):
        if method in ("replace", "twisted"):
            raise ConfigError(f"sampler: {method} needs fixed steps, not {type(sampler).__name__}; take Ancestral.")
        return
    assert isinstance(sampler, TableSampler)
    try:
        plan = sampler.plan(process)
    except ValueError as error:
        raise ConfigError(f"sampler: {error}") from error
    if method == "twisted" and not bool((plan.L != 0).any()):
        raise ConfigError(
            f"sampler: the steps of {label(sampler)} draw no noise, and particles are weighed by theirs; take "
            "--sampler Ancestral, EulerMaruyama or SSCS, or Exponential with --sampler.stochasticity 1."
        )


def check_data(data: Dataset, source: DataSource, checkpoint: Checkpoint, place: str) -> None:
    """Raise ConfigError if data and model are of different shapes, or of pixels read in different ways."""
    if data.event != checkpoint.event:
        raise ConfigError(
            f"{place}: points of {data.name} have shape {data.event}, the model of {checkpoint.path} makes "
            f"{checkpoint.event}; give the data it was trained on, or another model."
        )
    check_pixels(data, source, checkpoint.tones, place, f"the model of {checkpoint.path}")


def check_pixels(data: Dataset, source: DataSource, tones: Tones, place: str, what: str) -> None:
    """Raise ConfigError if ``what``, with these tones, is of dequantised pixels and the data are not such pixels."""
    if tones.pixels is not None and tones.pixels != Tones.of(data).pixels:
        raise ConfigError(
            f"{place}: {what} is of dequantised pixels, and {data.name} is read in another way; give "
            f"{dequantised_flag(source, tones.pixels, place)}."
        )


def dequantised_flag(source: DataSource, pixels: Mapping[str, Any], place: str) -> str:
    """The flag that reads a source as pixels."""
    inner = source.source if isinstance(source, Dequantised) else source
    value = {"type": "Dequantised", "source": describe(inner), **pixels}
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000).strip()
    return f"--{place} {shlex.quote(text)}"
