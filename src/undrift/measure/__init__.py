"""How good is it: likelihoods, distances between samples, and Fréchet distances between features."""

from undrift.measure.distance import Estimate, energy_distance, jackknife, mmd, sliced_wasserstein, wasserstein
from undrift.measure.elbo import Evidence, elbo
from undrift.measure.fid import (
    FeatureNetwork,
    Neighbours,
    TrainedFeatures,
    extract,
    frechet_distance,
    inception_features,
    nearest_neighbours,
    train_features,
)
from undrift.measure.likelihood import Likelihood, bits_per_dim, log_likelihood
from undrift.measure.modes import ModeErrors, mode_errors
from undrift.measure.transport import Transport, transport
from undrift.pixels import dequantise, quantise

__all__ = [
    "Estimate",
    "Evidence",
    "FeatureNetwork",
    "Likelihood",
    "ModeErrors",
    "Neighbours",
    "TrainedFeatures",
    "Transport",
    "bits_per_dim",
    "dequantise",
    "elbo",
    "energy_distance",
    "extract",
    "frechet_distance",
    "inception_features",
    "jackknife",
    "log_likelihood",
    "mmd",
    "mode_errors",
    "nearest_neighbours",
    "quantise",
    "sliced_wasserstein",
    "train_features",
    "transport",
    "wasserstein",
]
