"""How the commands measure samples against data: one distance, its name, and its floor."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from undrift.config import ConfigError
from undrift.measure import (
    Neighbours,
    extract,
    frechet_distance,
    nearest_neighbours,
    sliced_wasserstein,
    train_features,
)
from undrift.pixels import dequantise, quantise
from undrift.report.plots import is_image
from undrift.train import Dataset

__all__ = ["Judge", "centred", "memorisation"]


@dataclass(frozen=True, eq=False)
class Judge:
    """A distance between samples and a data set.

    Attributes:
        measure: its name, for axes and tables.
        caption: what it is, in a sentence.
        distance: of samples (n, *event) to the data.
        floor: distance of the held-out data, or None without any.
        size: points in the held-out data: sets of samples of this size have the floor's bias.
        identity: plain data that tells this judge from others.
    """

    measure: str
    caption: str
    distance: Callable[[Tensor], float]
    floor: float | None
    size: int | None
    identity: dict[str, Any]

    @classmethod
    def of(cls, data: Dataset, holdout: Dataset | None, seed: int = 0, epochs: int = 15) -> Judge:
        """The judge that fits the data: features of a small classifier for labelled images, sliced W2 otherwise.

        Args:
            data: what samples are compared with.
            holdout: points the model has not seen, for the floor.
            seed: of the classifier's training, or of the directions.
            epochs: of the classifier's training.
        """
        if holdout is not None and holdout.event != data.event:
            raise ConfigError(
                f"holdout: points of {holdout.name} have shape {holdout.event}, those of {data.name} {data.event}."
            )
        if is_image(data.event) and data.labels is not None:
            features = train_features(data.x, data.labels, seed=seed, epochs=epochs)
            reference = extract(features, data.x)
            measure = f"Fréchet distance ({features.name})"
            caption = (
                f"Squared Fréchet distance between Gaussians fitted to the features of a small classifier, trained in "
                f"place on {data.name} to {features.accuracy:.1%} of its held-out images: the values compare with each "
                "other and with nothing published."
            )

            def distance(x: Tensor) -> float:
                return frechet_distance(extract(features, centred(x, data)), reference)
        else:
            measure = "sliced W2 distance"
            caption = f"Sliced 2-Wasserstein distance to {data.name}, in data units."

            def distance(x: Tensor) -> float:
                return sliced_wasserstein(centred(x, data), data.x, seed=seed)

        floor = None if holdout is None else distance(holdout.x)
        digest = hashlib.sha256(data.x.contiguous().numpy().tobytes()).hexdigest()[:16]
        identity = {"measure": measure, "data": data.name, "digest": digest, "seed": seed, "epochs": epochs}
        return cls(measure, caption, distance, floor, None if holdout is None else len(holdout), identity)


def memorisation(x: Tensor, data: Dataset, holdout: Dataset) -> Neighbours:
    """Distances of samples and of held-out points to the nearest training point: are the samples copies?"""
    return nearest_neighbours(centred(x, data), data.x, holdout.x)


def centred(x: Tensor, data: Dataset) -> Tensor:
    """Samples as ``data.x`` shows its points: of dequantised pixels, at the centres of their bins."""
    p = data.pixels
    if p is None:
        return x
    pixels = quantise(x, p.transform, bins=p.bins, alpha=p.alpha)
    return dequantise(pixels, p.transform, bins=p.bins, alpha=p.alpha, noise=x.new_tensor(0.5))[0].to(x)
