"""Conditional generation: flags to a conditioned diffusion, whatever its process, and to what is reported of it."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from torch import Tensor

from undrift.cli.common import Checkpoint, draw_classes, open_classifier
from undrift.cli.conditioned import Conditioned, coordinates_of
from undrift.cli.given import (
    known_part,
    pick,
    read_array,
    read_event,
    seen,
    trained_on,
)
from undrift.cli.potentials import potential_of, try_model, try_potential, twisting_of
from undrift.cli.rules import OF_PARTS, Method
from undrift.config import ConfigError, describe
from undrift.denoise import (
    ClassifierPotential,
    Known,
)
from undrift.diffusion import Diffusion, NoiseDiffusion
from undrift.guided_noise import GuidedNoise, classifier_free, guide
from undrift.modal_diffusion import ModalDiffusion
from undrift.observe import CorrelatedNoise, GaussianNoise, LinearOperator, Mask, Noise, Operator
from undrift.report import label
from undrift.sample import Replace
from undrift.space import FunctionSpace
from undrift.train import Simulated

if TYPE_CHECKING:
    from undrift.cli.sample import SampleRun

__all__ = ["condition"]


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
        space = coordinates_of(diffusion)
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
        try_model(diffusion, event, "data", given)
        return _replace(found, given=given)
    assert not isinstance(diffusion, ModalDiffusion)
    twisting: Any = method if method != "twisted" else run.potential or twisting_of(observation)
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
