"""Potentials by name, and one call of a model before any work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from undrift.cli.rules import Twisting
from undrift.config import ConfigError
from undrift.denoise import Linearised, PointEstimate, PseudoInverse, TweedieMoments
from undrift.diffusion import Diffusion, NoiseDiffusion
from undrift.guided_noise import GuidedNoise, guide
from undrift.modal_diffusion import ModalDiffusion
from undrift.observe import CorrelatedNoise, GaussianNoise, Observation

__all__ = ["potential_of", "try_model", "try_potential", "twisting_of"]


def twisting_of(observation: Observation) -> Twisting:
    """The potential that knows most of an observation of its kind."""
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
    name = name or twisting_of(observation)
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
    try_model(guide(diffusion, potential), event, place, given)


def try_model(
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
