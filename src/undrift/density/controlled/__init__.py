"""Samplers of densities that learn: controlled diffusions in one table, their losses, and draws with exact weights."""

from undrift.density.controlled.chain import Chain, Rows, langevin, reversal
from undrift.density.controlled.control import Control, Exact, Informed, Plain, Potential
from undrift.density.controlled.denoiser import ControlDenoiser
from undrift.density.controlled.diffusion import ControlledDiffusion, Paths, Scheme, Tables
from undrift.density.controlled.grid import EqualAngles, EqualTimes, GivenTimes, PowerTimes, TimeGrid
from undrift.density.controlled.matching import AdjointMatching, ScoreMatching
from undrift.density.controlled.methods import CMCD, DDS, DIS, PDDS, PIS, Bridge, Controlled
from undrift.density.controlled.objective import (
    KL,
    LogDerivative,
    LogVariance,
    Objective,
    Replay,
    TrajectoryBalance,
)
from undrift.density.controlled.sampler import Trained, TrainedSampler
from undrift.density.controlled.stages import Stages
from undrift.density.controlled.train import Training, train
from undrift.density.controlled.trust_region import TrustRegion
from undrift.density.controlled.walk import walk

__all__ = [
    "CMCD",
    "DDS",
    "DIS",
    "KL",
    "PDDS",
    "PIS",
    "AdjointMatching",
    "Bridge",
    "Chain",
    "Control",
    "ControlDenoiser",
    "Controlled",
    "ControlledDiffusion",
    "EqualAngles",
    "EqualTimes",
    "Exact",
    "GivenTimes",
    "Informed",
    "LogDerivative",
    "LogVariance",
    "Objective",
    "Paths",
    "Plain",
    "Potential",
    "PowerTimes",
    "Replay",
    "Rows",
    "Scheme",
    "ScoreMatching",
    "Stages",
    "Tables",
    "TimeGrid",
    "Trained",
    "TrainedSampler",
    "Training",
    "TrajectoryBalance",
    "TrustRegion",
    "langevin",
    "reversal",
    "train",
    "walk",
]
