r"""What class a noisy point belongs to: :math:`p_\sigma(c \mid \tilde x)`, in closed form or learned, and its guidance.

.. math:: p_\sigma(c \mid \tilde x) \propto w_c\, p_\sigma(\tilde x \mid c)

A classifier is asked at a noise level. It knows no process, so one serves them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from undrift._linalg import as_f64
from undrift.denoise.base import per_sample
from undrift.denoise.network import NoiseAware
from undrift.networks.classifier import ClassifierNetwork
from undrift.space import Space

__all__ = ["BayesClassifier", "Classifier", "ClassifierPotential", "NetworkClassifier"]


class Classifier(Protocol):
    """Anything that maps noisy points (batch, *event) and noise levels (batch,) to logits (batch, classes)."""

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor: ...


class _Density(Protocol):
    def log_prob(self, x: Tensor, sigma: Tensor | float) -> Tensor: ...


class BayesClassifier:
    """The exact classifier where the law of each class is known.

    Args:
        models: one for each class, with ``log_prob(x, sigma)``, the log density of noisy points: a GaussianDenoiser, a
            MixtureDenoiser, or an EmpiricalDenoiser of the data of the class.
        weights: shares of the classes, positive; equal if None.

    Raises:
        ValueError: if weights and models do not fit.
    """

    def __init__(self, models: Sequence[_Density], weights: Tensor | Sequence[float] | None = None) -> None:
        self.models = tuple(models)
        shares = torch.ones(len(self.models), dtype=torch.float64) if weights is None else as_f64(weights)
        if (
            not self.models
            or shares.shape != (len(self.models),)
            or not bool((shares > 0).all() & shares.isfinite().all())
        ):
            raise ValueError(
                f"BayesClassifier: needs a positive weight for each of at least one model, got {len(self.models)} "
                f"models and weights {shares.tolist()}."
            )
        self.log_weights = (shares / shares.sum()).log()

    def __call__(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """Log joint densities of class and noisy point (batch, classes), in x's dtype."""
        joint = torch.stack([m.log_prob(x, sigma) for m in self.models], -1)
        return joint + self.log_weights.to(joint)


class NetworkClassifier(NoiseAware):
    r"""A network as a classifier of noisy points, with the input scaling and label of EDM.

    .. math:: \mathrm{logits} = F(c_{in} \tilde x;\ \tfrac14 \ln \sigma), \qquad c_{in} = (\sigma^2 + \sigma_d^2)^{-1/2}

    Below sigma_min the label is that of sigma_min. Beyond sigma_max, where most processes begin, a point tells of x0
    through :math:`\exp(\langle x_0, \tilde x\rangle_C / \sigma^2)` and a remainder of order :math:`1/\sigma^2`, so the
    network is asked at sigma_max of :math:`(\sigma_{max}/\sigma)^2\, \tilde x`. Guidance there is as at sigma_max;
    by a label that is merely held it would grow with sigma, to many times the data's size.

    Args:
        network: maps (batch, *event) and labels (batch,) to logits (batch, classes).
        sigma_data: deviation of one data coordinate.
        sigma_min, sigma_max: range of noise levels the network is trained at; those of
            :class:`~undrift.train.Classification` unless it is given others.
        space: where the points live: its noise is what the network learns to see through.
    """

    network: ClassifierNetwork

    def __init__(
        self,
        network: ClassifierNetwork,
        sigma_data: float = 0.5,
        sigma_min: float = 0.01,
        sigma_max: float = 50.0,
        space: Space | None = None,
    ) -> None:
        super().__init__(network, sigma_data, sigma_min, sigma_max, space)

    @property
    def classes(self) -> int:
        """How many classes there are."""
        return self.network.classes

    def forward(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """Logits (batch, classes), in x's dtype, of noisy points x (batch, *event); the network computes in its own."""
        level = per_sample(sigma, x)
        beyond = (level / self.sigma_max).clamp(min=1)
        return self._ask(x / beyond.square(), level.clamp(max=self.sigma_max).flatten())[2]


@dataclass(frozen=True, eq=False)
class ClassifierPotential:
    r"""Potential :math:`\log p_\sigma(c \mid \tilde x)` of a classifier: what guides a denoiser to a class.

    The class may be fixed here, or travel as the condition ``label`` of each call, which wins: labels (n,) given to
    :func:`~undrift.sample.sample` as ``label=`` are split along with its batches.

    Args:
        classifier: maps noisy points and levels to logits (batch, classes).
        label: a class, or one per sample of the batch, (batch,).

    Raises:
        TypeError, ValueError: by a call, if there is no class, or it is not one of the classifier's.
    """

    conditions: ClassVar[tuple[str, ...]] = ("label",)
    of_prediction: ClassVar[bool] = False

    classifier: Classifier
    label: int | Tensor | None = None

    def __call__(self, x: Tensor, sigma: Tensor, x0: Tensor, label: int | Tensor | None = None) -> Tensor:
        chosen = self.label if label is None else label
        if chosen is None:
            raise ValueError("ClassifierPotential: no class; give it a label, or label= with the call.")
        index = torch.as_tensor(chosen, device=x.device)
        if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
            raise TypeError(f"ClassifierPotential: a class is an integer, got {index.dtype}.")
        if index.ndim and index.shape != x.shape[:1]:
            raise ValueError(
                f"ClassifierPotential: label must be one class or one per sample, ({x.shape[0]},), got "
                f"{tuple(index.shape)}; labels of n samples walked in batches go to sample() as label=."
            )
        logits = self.classifier(x, sigma)
        if not bool(((index >= 0) & (index < logits.shape[1])).all()):
            raise ValueError(
                f"ClassifierPotential: labels must lie in 0 ... {logits.shape[1] - 1}, got {index.tolist()}."
            )
        return logits.log_softmax(1).gather(1, index.long().expand(x.shape[0]).unsqueeze(1)).squeeze(1)
