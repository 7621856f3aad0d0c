"""Networks: maps of a point and a noise label, for vectors, images and functions. They know nothing of diffusions."""

from undrift.networks.base import FourierFeatures, Network
from undrift.networks.classifier import ClassifierNetwork, ConvClassifier, MLPClassifier
from undrift.networks.diffusers import DiffusersUNet
from undrift.networks.mlp import MLP
from undrift.networks.operators import NeuralOperator
from undrift.networks.spectral import SpectralNet
from undrift.networks.unet import UNet

__all__ = [
    "MLP",
    "ClassifierNetwork",
    "ConvClassifier",
    "DiffusersUNet",
    "FourierFeatures",
    "MLPClassifier",
    "Network",
    "NeuralOperator",
    "SpectralNet",
    "UNet",
]
