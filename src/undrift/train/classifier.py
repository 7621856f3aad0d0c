r"""Learning p(c | x~) at every noise level: one classifier, for guidance in every process.

The loss is the cross-entropy :math:`-\log p_\sigma(c \mid x_0 + \sigma n)`, in nats; its minimiser is the true
posterior of the class at each level, whatever the density of the levels. What the class can be known by is gone at a
level of the data's size, and the last of it between there and ten times that: levels far above teach nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from undrift.denoise.classifier import Classifier, NetworkClassifier
from undrift.space import space_of
from undrift.train.data import Dataset
from undrift.train.levels import LogUniform, NoiseLevels, stratified
from undrift.train.objectives import Objective

__all__ = ["Accuracy", "Classification", "accuracy"]


@dataclass(frozen=True, eq=False)
class Classification(Objective):
    """Cross-entropy of a classifier of noisy points, for a :class:`~undrift.denoise.NetworkClassifier`.

    Args:
        noise: density of the levels that are visited.
    """

    noise: NoiseLevels = field(default_factory=lambda: LogUniform(0.01, 50.0))

    drops_classes: ClassVar[bool] = False

    def loss(self, model: Any, x: Tensor, generator: torch.Generator, **condition: Any) -> tuple[Tensor, Tensor]:
        if not isinstance(model, NetworkClassifier):
            raise TypeError(f"Classification: trains a NetworkClassifier, got a {type(model).__name__}.")
        labels = condition.get("y")
        if labels is None:
            raise ValueError("Classification: needs the class of each point; give the trainer data with labels.")
        sigma = self.noise.draw(stratified(x.shape[0], generator)).to(x)
        noise = model.space.colour(torch.empty_like(x).normal_(generator=generator))
        noisy = torch.addcmul(x, noise, sigma.reshape(-1, *[1] * (x.ndim - 1)))
        return F.cross_entropy(model(noisy, sigma), labels, reduction="none"), sigma


@dataclass(frozen=True)
class Accuracy:
    """How well a classifier knows the class at one noise level.

    Attributes:
        sigma: the level.
        accuracy: share of points whose class has the largest logit.
        accuracy_se: its standard error.
        cross_entropy: mean of minus the log probability of the true class, nats.
        cross_entropy_se: its standard error.
    """

    sigma: float
    accuracy: float
    accuracy_se: float
    cross_entropy: float
    cross_entropy_se: float


@torch.no_grad()
def accuracy(
    classifier: Classifier, data: Dataset, levels: Sequence[float], seed: int = 0, batch: int = 1024
) -> list[Accuracy]:
    """Accuracy and cross-entropy at noise levels, on data that the classifier has not seen.

    Args:
        classifier: maps noisy points and levels to logits.
        data: points with labels.
        levels: noise levels; 0 is clean data.
        seed: of the noise, which is the same at every level.
        batch: points at a time.

    Raises:
        ValueError: if the data have no labels.
    """
    if data.labels is None:
        raise ValueError(f"accuracy: {data.name} has no labels.")
    space, out = space_of(classifier), []
    for level in levels:
        generator = torch.Generator(data.x.device).manual_seed(seed)
        right, nats = [], []
        for x, labels in zip(data.x.split(batch), data.labels.split(batch), strict=True):
            noise = space.colour(torch.empty_like(x).normal_(generator=generator))
            logits = classifier(x + level * noise, torch.full((len(x),), float(level), dtype=x.dtype, device=x.device))
            right.append((logits.argmax(1) == labels).double())
            nats.append(F.cross_entropy(logits, labels, reduction="none").double())
        (a, a_se), (c, c_se) = (_mean(torch.cat(v)) for v in (right, nats))
        out.append(Accuracy(float(level), a, a_se, c, c_se))
    return out


def _mean(v: Tensor) -> tuple[float, float]:
    """Mean and its standard error."""
    return float(v.mean()), float(v.std(correction=0)) / max(1, len(v) - 1) ** 0.5
