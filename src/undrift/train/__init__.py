"""How to learn: objectives, data, the training loop, and models on disk."""

from undrift.container import CheckpointError
from undrift.train.checkpoint import load, notes, save
from undrift.train.classifier import Accuracy, Classification, accuracy
from undrift.train.config import TrainConfig
from undrift.train.data import Dataset, DataSource, Grids, Measured, Pixels
from undrift.train.levels import DefensiveMixture, LogNormal, LogUniform, NoiseLevels, Tabulated
from undrift.train.local import LocalScoreMatching
from undrift.train.objectives import Denoising, EvidenceBound, NoiseMatching, Objective
from undrift.train.sources import Dequantised, Digits, Idx, ImageFolder, Npz, Resampled, Ring, Simulated
from undrift.train.spectral import SpectralDenoising
from undrift.train.trainer import Fit, Trainer, TrainingDiverged

__all__ = [
    "Accuracy",
    "CheckpointError",
    "Classification",
    "DataSource",
    "Dataset",
    "DefensiveMixture",
    "Denoising",
    "Dequantised",
    "Digits",
    "EvidenceBound",
    "Fit",
    "Grids",
    "Idx",
    "ImageFolder",
    "LocalScoreMatching",
    "LogNormal",
    "LogUniform",
    "Measured",
    "NoiseLevels",
    "NoiseMatching",
    "Npz",
    "Objective",
    "Pixels",
    "Resampled",
    "Ring",
    "Simulated",
    "SpectralDenoising",
    "Tabulated",
    "TrainConfig",
    "Trainer",
    "TrainingDiverged",
    "accuracy",
    "load",
    "notes",
    "save",
]
