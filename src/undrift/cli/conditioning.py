"""Conditional generation: flags to a conditioned diffusion, whatever its process, and to what is reported of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from undrift.cli.common import Checkpoint, draw_classes, open_classifier
from undrift.cli.given import (
    direct,
    known_part,
    noise_level,
    pick,
    read_array,
    read_event,
    seen,
    sites,
    trained_on,
)
from undrift.cli.rules import OF_PARTS, Method, Twisting
from undrift.config import ConfigError, describe
from undrift.denoise import (
    ClassifierPotential,
    Known,
    Linearised,
    PointEstimate,
    PseudoInverse,
    TweedieMoments,
)
from undrift.diffusion import Diffusion, NoiseDiffusion
from undrift.guided_noise import GuidedNoise, classifier_free, guide
from undrift.modal_diffusion import ModalDiffusion
from undrift.observe import CorrelatedNoise, GaussianNoise, LinearOperator, Mask, Noise, Observation, Operator
from undrift.report import PosteriorRecord, accuracy, label
from undrift.report.plots import is_image
from undrift.sample import Particles, Replace
from undrift.sample.replace import Steer
from undrift.space import FunctionSpace, Space
from undrift.train import Simulated

if TYPE_CHECKING:
    from undrift.cli.sample import SampleRun

__all__ = ["Conditioned", "condition", "evidence", "kind_of", "potential_of", "try_potential"]

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
        return _space_of(self.diffusion)

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


def _space_of(diffusion: Diffusion | NoiseDiffusion | GuidedNoise | ModalDiffusion) -> Space:
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


def condition(
    run: SampleRun, checkpoint: Checkpoint, diffusion: Diffusion | NoiseDiffusion | ModalDiffusion
) -> Conditioned:
    """The diffusion with what it is told.

    Raises:
        ConfigError: for what does not fit the model, before any work.
    """
    words: list[str] = []
    notes: dict[str, Any] = {}
    given: dict[str, Tensor] = {}
    if run.y is not None:
        given["y"] = draw_classes(checkpoint, run.y, 1)["y"][0]
        words.append(f"class {run.y}")
        notes["y"] = run.y
    method = _method(run, checkpoint)
    # to the class where there is one, or else to what an amortised network is told
    to = "y" if run.y is not None else "observed" if method == "amortised" else None
    free = run.guidance is not None and run.classifier is None and to is not None
    if run.interval is not None and not free:
        raise ConfigError(
            "interval: the noise levels of guidance without a classifier, which is to a class, --y, or to what a "
            f"network is told; the network of {checkpoint.path} is told nothing."
        )
    if isinstance(diffusion, NoiseDiffusion) and method == "known":
        raise ConfigError(
            f"run: {checkpoint.path} predicts the noise of {label(diffusion.process)}, and --method known needs a "
            "denoiser; train one, or take --method replace, a guided one, or twisted."
        )
    if isinstance(diffusion, ModalDiffusion) and (run.classifier or method not in (None, "known", "amortised")):
        raise ConfigError(
            f"run: {checkpoint.path} was trained on a {type(diffusion.clock).__name__} clock, and guidance asks a "
            "potential at one noise level; on a clock of modes there is --guidance to a class that the network knows, "
            "--method known, and networks that are told the data."
        )
    if run.guidance is not None and run.classifier is not None and method not in (None, "amortised", *OF_PARTS):
        raise ConfigError(
            f"guidance: would be the strength of both the classifier and the observation, which guides by {method}; "
            "leave it out, for 1."
        )
    model: Diffusion | NoiseDiffusion | GuidedNoise | ModalDiffusion = diffusion
    if free:
        _check_dropped(checkpoint, str(to))
        interval = (0.0, math.inf) if run.interval is None else run.interval
        assert run.guidance is not None
        model = classifier_free(diffusion, run.guidance, interval)
        if to == "y":
            words[-1] += f" at strength {run.guidance:g}"
        notes |= {"guidance": run.guidance, "interval": None if run.interval is None else list(run.interval)}
    if run.classifier is not None:
        assert run.label is not None
        classifier = open_classifier(run.classifier, checkpoint)
        if not 0 <= run.label < classifier.classes:
            raise ConfigError(f"label: {run.classifier} knows classes 0 to {classifier.classes - 1}, got {run.label}.")
        strength = 1.0 if run.guidance is None else run.guidance
        potential: Any = ClassifierPotential(classifier, run.label)
        assert not isinstance(model, ModalDiffusion)
        model = guide(model, potential, strength)
        words.append(f"class {run.label} by a classifier at strength {strength:g}")
        notes |= {"classifier": run.classifier, "label": run.label, "guidance": strength}
    if method is None:
        return Conditioned(model, words=" and ".join(words), given=given, notes=notes)
    return _told(run, checkpoint, model, method, words, given, {**notes, "method": method})


def _method(run: SampleRun, checkpoint: Checkpoint) -> Method | None:
    """The method that is meant, or None if nothing is observed."""
    told, nothing = checkpoint.told, run.data is None and run.simulate is None and run.truth is None
    if told and run.method not in (None, "amortised"):
        raise ConfigError(f"method: the network of {checkpoint.path} is told what was observed; it is amortised.")
    if told and (run.known is not None or run.mask is not None):
        raise ConfigError(
            f"mask: the network of {checkpoint.path} is told what was observed; give --observe or --data."
        )
    if told and nothing:
        if run.method is None and checkpoint.network.condition_optional:
            return None
        raise ConfigError(
            f"data: the network of {checkpoint.path} is told what was observed; give --data FILE, or a truth to "
            "simulate it from, --simulate INDEX. (The prior is drawn from a run with train.observed_dropout above 0.)"
        )
    if told:
        return "amortised"
    if run.method == "amortised":
        raise ConfigError(f"method: the network of {checkpoint.path} is not told data; train one with data of pairs.")
    if run.method is not None:
        return run.method
    if run.known is not None or run.mask is not None:
        return "known"
    if run.observe is None:
        if run.truth is not None or run.simulate is not None:
            raise ConfigError("truth: of what? Say what is seen of it: --mask, or --observe and --noise.")
        if run.data is not None:
            raise ConfigError("data: needs the operator that sees them, as in --observe '{type: Blur, width: 0.1}'.")
        return None
    if not isinstance(run.noise, (GaussianNoise, CorrelatedNoise)):
        return "dps"
    return "moments" if isinstance(run.observe, LinearOperator) else "linearised"


def _told(
    run: SampleRun,
    checkpoint: Checkpoint,
    diffusion: Diffusion | NoiseDiffusion | GuidedNoise | ModalDiffusion,
    method: Method,
    words: list[str],
    given: dict[str, Tensor],
    notes: dict[str, Any],
) -> Conditioned:
    event, tones = checkpoint.event, checkpoint.tones
    truth, of = None, "an unknown"
    if run.simulate is not None:
        truth, of = pick(run.source, run.simulate, checkpoint)
        notes |= {"simulate": run.simulate, "truth": of}
    elif run.truth is not None:
        truth, of = read_event(run.truth, "truth", event, tones), "a known truth"
    known = values = None
    if run.known is not None or run.mask is not None:
        space = _space_of(diffusion)
        if isinstance(space, FunctionSpace) and space.coordinates != "physical":
            raise ConfigError("mask: a part of a function is known by its values; this model's space has others.")
        values, known = known_part(run.known, run.mask, truth, event, tones)
        words.append(f"{int(known.sum())} of {known.numel()} values of {of}")
        if method in OF_PARTS:
            steer = Replace(known, values) if method == "replace" else None
            if method == "known":
                assert isinstance(diffusion, (Diffusion, ModalDiffusion))
                diffusion = dataclasses.replace(diffusion, denoiser=Known(diffusion.denoiser, known, values))
            return Conditioned(
                diffusion, method, _and(words), given, steer, known=known, values=values, truth=truth, notes=notes
            )
        operator: Operator = Mask(known)
        noise = run.noise
        assert noise is not None
        y = None if run.known is None else operator(values.unsqueeze(0))[0]
    else:
        operator, noise = _experiment(run, checkpoint, method)
        y = None if run.data is None else read_array(run.data, "data", ("y", "x", "data")).float()
        words.append(f"{type(operator).__name__} of {of} with {type(noise).__name__}")
        if method == "amortised" and "guidance" in notes and run.y is None and run.classifier is None:
            words[-1] += f" at strength {run.guidance:g}"
    observation = seen(operator, noise, event, y, truth, run.seed + 1)  # the seed itself is the sampler's
    if known is not None:
        assert isinstance(operator, Mask)
        values = operator.adjoint(observation.y.unsqueeze(0), event)[0]
    notes |= {"observe": _described(operator), "noise": _described(noise), "data": run.data}
    found = Conditioned(diffusion, method, _and(words), given, None, observation, None, known, values, truth, notes)
    if method == "amortised":
        given = {**given, "observed": observation.y}
        _try(diffusion, event, "data", given)
        return _replace(found, given=given)
    assert not isinstance(diffusion, ModalDiffusion)
    twisting: Any = method if method != "twisted" else run.potential or _twisting(observation)
    potential: Any = potential_of(twisting, observation, checkpoint.data_std**2)
    try_potential(potential, diffusion, event, "potential" if method == "twisted" else "method", given)
    if method == "twisted":
        return _replace(found, potential=potential, notes={**notes, "potential": twisting})
    strength = 1.0 if run.guidance is None or run.y is not None else run.guidance
    return _replace(found, diffusion=guide(diffusion, potential, strength), notes={**notes, "guidance": strength})


def _replace(found: Conditioned, **changes: Any) -> Conditioned:
    return Conditioned(**{**{k: getattr(found, k) for k in found.__dataclass_fields__}, **changes})


def _and(words: list[str]) -> str:
    return " and ".join(words)


def _described(part: Any) -> Any:
    """Plain data, or the name of what has none that would be of use: a mask, a matrix."""
    if isinstance(part, Mask):
        return type(part).__name__
    try:
        return describe(part)
    except ConfigError:
        return type(part).__name__


def _experiment(run: SampleRun, checkpoint: Checkpoint, method: Method) -> tuple[Operator, Noise]:
    """Operator and noise: those given, or for a network that is told data those of its training."""
    if run.observe is not None:
        assert run.noise is not None
        return run.observe, run.noise
    source = trained_on(checkpoint)
    if not isinstance(source, Simulated):
        raise ConfigError(
            f"observe: the data that {checkpoint.path} was trained on do not say how they are observed; give --observe "
            "and --noise."
        )
    return source.operator, source.noise if run.noise is None else run.noise


def _check_dropped(checkpoint: Checkpoint, condition: str) -> None:
    """Raise ConfigError if the run never saw a point without its class ("y"), or without what was "observed" of it, so
    that there is nothing to guide away from."""
    import yaml

    if condition == "observed":
        if not checkpoint.network.condition_optional:
            raise ConfigError(
                f"guidance: the network of {checkpoint.path} was always told what was observed and knows no prior to "
                "guide away from; train with train.observed_dropout 0.1."
            )
        return
    path = checkpoint.path.parent / "config.yaml"
    config = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    dropped = (config or {}).get("train", {}).get("class_dropout") if isinstance(config, dict) else None
    if dropped == 0:
        raise ConfigError(
            f"guidance: {checkpoint.path} was trained with train.class_dropout 0 and knows no points without a class; "
            "train with 0.1, or guide by --classifier."
        )


def _twisting(observation: Observation) -> Twisting:
    if not isinstance(observation.noise, (GaussianNoise, CorrelatedNoise)):
        return "dps"
    return "moments" if observation.linear else "linearised"


def potential_of(name: Twisting | None, observation: Observation, variance: float) -> Any:
    """The potential of a name; None for moments, for linearised where an operator is not linear, or for dps where noise
    is not Gaussian.

    Args:
        name: of the potential.
        observation: what was seen.
        variance: of the data in units of the noise's, for pigdm and linearised.

    Raises:
        ConfigError: if it does not exist for this operator and noise.
    """
    name = name or _twisting(observation)
    try:
        if name == "dps":
            return PointEstimate(observation)
        if name == "linearised":
            return Linearised(observation, prior_variance=variance)
        if name == "pigdm":
            return PseudoInverse(observation, prior_variance=variance)
        return TweedieMoments(observation)
    except ValueError as error:
        raise ConfigError(f"method: {error}") from error


def try_potential(
    potential: Any,
    diffusion: Diffusion | NoiseDiffusion | GuidedNoise,
    event: tuple[int, ...],
    place: str,
    given: Mapping[str, Tensor],
) -> None:
    """One guided call, so that shapes are said to be wrong before any work."""
    _try(guide(diffusion, potential), event, place, given)


def _try(
    diffusion: Diffusion | NoiseDiffusion | GuidedNoise | ModalDiffusion,
    event: tuple[int, ...],
    place: str,
    given: Mapping[str, Tensor],
) -> None:
    """One call half way, which every process reaches at a finite level."""
    condition = {k: v.unsqueeze(0) for k, v in given.items()}
    z, t = torch.zeros(1, diffusion.process.channels, *event), 0.5 * diffusion.process.horizon
    t = diffusion.clock.sigma_max if isinstance(diffusion, ModalDiffusion) else t
    try:
        with torch.no_grad():
            diffusion.predict(z, t, **condition)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"{place}: {error}") from error
