"""Forward operators and noise models: what an experiment sees of an unknown, and how well.

    observation = Observation(Points((0.2, 0.5, 0.8)), GaussianNoise(0.05), y)
    observation.log_likelihood(x)    # (batch,), differentiable in x (batch, n), on a grid of any n

An operator maps (batch, *event) to (batch, *data) and can be differentiated; ``second @ first`` composes two.
"""

from __future__ import annotations

from undrift.observe.base import Composition, LinearComposition, LinearOperator, Operator
from undrift.observe.blur import Blur, Heat, SpectralFilter
from undrift.observe.darcy import Darcy1d, Darcy2d
from undrift.observe.noise import CorrelatedNoise, GaussianNoise, LaplaceNoise, Noise, PoissonNoise, StudentTNoise
from undrift.observe.observation import Observation
from undrift.observe.phase import PhaseRetrieval
from undrift.observe.points import Downsample, Identity, Mask, Matrix, Points
from undrift.observe.radon import Radon

__all__ = [
    "Blur",
    "Composition",
    "CorrelatedNoise",
    "Darcy1d",
    "Darcy2d",
    "Downsample",
    "GaussianNoise",
    "Heat",
    "Identity",
    "LaplaceNoise",
    "LinearComposition",
    "LinearOperator",
    "Mask",
    "Matrix",
    "Noise",
    "Observation",
    "Operator",
    "PhaseRetrieval",
    "Points",
    "PoissonNoise",
    "Radon",
    "SpectralFilter",
    "StudentTNoise",
]
