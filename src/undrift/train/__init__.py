"""How to learn: objectives, data, the training loop, and models on disk."""

from undrift.container import CheckpointError
from undrift.train.checkpoint import load, notes, save
from undrift.train.classifier import Accuracy, Classification, accuracy
from undrift.train.config import TrainConfig
from undrift.train.data import Dataset, DataSource, Pixels
from undrift.train.levels import DefensiveMixture, LogNormal, LogUniform, NoiseLevels, Tabulated
from undrift.train.local import LocalScoreMatching
from undrift.train.objectives import Denoising, EvidenceBound, NoiseMatching, Objective
from undrift.train.sources import Dequantised, Digits, Idx, ImageFolder, Npz, Ring
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
    "Idx",
    "ImageFolder",
    "LocalScoreMatching",
    "LogNormal",
    "LogUniform",
    "NoiseLevels",
    "NoiseMatching",
    "Npz",
    "Objective",
    "Pixels",
    "Ring",
    "Tabulated",
    "TrainConfig",
    "Trainer",
    "TrainingDiverged",
    "accuracy",
    "load",
    "notes",
    "save",
]
