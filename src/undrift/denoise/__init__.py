"""What is out there: the posterior mean of the data given a noisy view of it, and given more than that.

Known in closed form or learned; conditioned by a potential, by a classifier or without one, by an observation, or by a
known part.
"""

from undrift.denoise.base import Denoiser
from undrift.denoise.classifier import BayesClassifier, Classifier, ClassifierPotential, NetworkClassifier
from undrift.denoise.closed_form import GaussianDenoiser, MixtureDenoiser
from undrift.denoise.empirical import EmpiricalDenoiser
from undrift.denoise.fields import FieldGaussian, OnFunctions
from undrift.denoise.free import ClassifierFree
from undrift.denoise.guidance import Guided, Parts, Potential
from undrift.denoise.known import Known
from undrift.denoise.network import NetworkDenoiser
from undrift.denoise.potentials import Linearised, PointEstimate, PseudoInverse, TweedieMoments
from undrift.denoise.spectral import SpectralDenoiser

__all__ = [
    "BayesClassifier",
    "Classifier",
    "ClassifierFree",
    "ClassifierPotential",
    "Denoiser",
    "EmpiricalDenoiser",
    "FieldGaussian",
    "GaussianDenoiser",
    "Guided",
    "Known",
    "Linearised",
    "MixtureDenoiser",
    "NetworkClassifier",
    "NetworkDenoiser",
    "OnFunctions",
    "Parts",
    "PointEstimate",
    "Potential",
    "PseudoInverse",
    "SpectralDenoiser",
    "TweedieMoments",
]
