"""undrift: design a diffusion, learn it, and get back."""

from undrift.diffusion import Diffusion, NoiseDiffusion
from undrift.guided_noise import GuidedNoise, classifier_free, guide
from undrift.measure import elbo, log_likelihood
from undrift.modal_diffusion import ModalDiffusion
from undrift.nonlinear_diffusion import NonlinearDiffusion
from undrift.sample import sample
from undrift.train import load, save

__version__ = "0.1.0"

__all__ = [
    "Diffusion",
    "GuidedNoise",
    "ModalDiffusion",
    "NoiseDiffusion",
    "NonlinearDiffusion",
    "__version__",
    "classifier_free",
    "elbo",
    "guide",
    "load",
    "log_likelihood",
    "sample",
    "save",
]
