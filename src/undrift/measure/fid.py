r"""Fréchet distance between the features of two sets of images, and a check for memorised training data.

.. math:: d^2 = \|\mu_a - \mu_b\|^2 + tr\bigl(C_a + C_b - 2 (C_a^{1/2} C_b C_a^{1/2})^{1/2}\bigr)

The number means nothing without the feature network, so every network carries a name that belongs beside it: FID is the
distance with ``inception_features()``; a network from ``train_features`` ranks models on one data set and no more.

References:
    Heusel et al., GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium, 2017.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

__all__ = [
    "FeatureNetwork",
    "Neighbours",
    "TrainedFeatures",
    "extract",
    "frechet_distance",
    "inception_features",
    "nearest_neighbours",
    "train_features",
]


@runtime_checkable
class FeatureNetwork(Protocol):
    """Anything that maps images (batch, C, H, W) to features (batch, D), with a name to print beside its distances."""

    @property
    def name(self) -> str:
        """What the features are."""
        ...

    def __call__(self, images: Tensor) -> Tensor:
        """Features (batch, D) of images (batch, C, H, W)."""
        ...


def extract(network: FeatureNetwork, images: Tensor, batch: int = 256) -> Tensor:
    """Features of all images (n, C, H, W), batch by batch: (n, D) in float64 on the CPU."""
    if images.ndim != 4 or len(images) == 0:
        raise ValueError(f"extract: images must have shape (n, C, H, W), n >= 1, got {tuple(images.shape)}.")
    with torch.no_grad():
        features = torch.cat([network(part).double().cpu() for part in images.split(batch)])
    if features.ndim != 2:
        raise ValueError(f"extract: {network.name!r} must give (batch, D) features, got shape {tuple(features.shape)}.")
    return features


def frechet_distance(a: Tensor, b: Tensor) -> float:
    r"""Squared Fréchet distance between Gaussians fitted to two sets of features, which is what FID reports.

    With any roots, :math:`C = R^\top R`, the last trace is the sum of the singular values of :math:`R_a R_b^\top`, and
    R is the QR factor of the centred features: no covariance is formed and no matrix root taken, so there is no complex
    residue and no jitter, and singular covariances cost no accuracy.

    Args:
        a, b: features (n, D) and (m, D); fewer than D + 1 of them give singular covariances, and a warning.
    """
    for name, f in (("a", a), ("b", b)):
        if f.ndim != 2 or len(f) < 2:
            raise ValueError(f"frechet_distance: {name} must be features (n, D) with n >= 2, got {tuple(f.shape)}.")
        if not bool(torch.isfinite(f).all()):
            raise ValueError(f"frechet_distance: {name} has features that are not finite.")
    if a.shape[1] != b.shape[1]:
        raise ValueError(
            f"frechet_distance: a has {a.shape[1]} features, b has {b.shape[1]}; use one network for both."
        )
    d = a.shape[1]
    if min(len(a), len(b)) < d + 1:
        warnings.warn(
            f"frechet_distance: {min(len(a), len(b))} points cannot fill a covariance of {d} features; the distance is "
            f"biased upwards. Give at least {d + 1} points, better ten times as many, and compare only equal numbers.",
            stacklevel=2,
        )
    a, b = a.detach().double(), b.detach().double()
    shift = (a.mean(0) - b.mean(0)).square().sum()
    root_a, root_b = _root(a), _root(b)
    cross = torch.linalg.svdvals(root_a @ root_b.T).sum()
    return max(0.0, float(shift + root_a.square().sum() + root_b.square().sum() - 2 * cross))


def _root(f: Tensor) -> Tensor:
    """R with R'R the sample covariance."""
    return torch.linalg.qr((f - f.mean(0)) / (len(f) - 1) ** 0.5, mode="r").R


class _Classifier(nn.Module):
    """Two convolutions, one hidden layer; its ``features`` are that layer."""

    def __init__(self, channels: int, classes: int, features: int, mean: float, std: float) -> None:
        super().__init__()
        self.mean, self.std = mean, std
        self.body = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(64 * 16, features),
            nn.SiLU(),
        )
        self.head = nn.Linear(features, classes)

    def features(self, images: Tensor) -> Tensor:
        return self.body((images - self.mean) / self.std)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


@dataclass(frozen=True, eq=False)
class TrainedFeatures:
    """Features of a classifier trained on the spot.

    Attributes:
        classifier: the network; its features are the layer before the last.
        accuracy: on the held-out part of its training data.
        name: says what it is wherever its distances are shown.
    """

    classifier: nn.Module
    accuracy: float
    name: str = "small classifier, trained in place"

    def __call__(self, images: Tensor) -> Tensor:
        weight = next(self.classifier.parameters())
        return self.classifier.features(images.to(weight))  # type: ignore[operator]


def train_features(
    x: Tensor, labels: Tensor, *, features: int = 64, epochs: int = 15, test_fraction: float = 0.2, seed: int = 0
) -> TrainedFeatures:
    """Train a small convolutional classifier and keep its last hidden layer: seconds for 8 x 8 digits on one core.

    Args:
        x: images (n, C, H, W).
        labels: classes 0 ... c - 1, (n,).
        features: width of the layer that is kept, D.
        epochs: passes over the training part.
        test_fraction: part held out for the reported accuracy.
        seed: of the split, the initial weights and the order; the same seed gives the same network.
    """
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"train_features: x must be float images (n, C, H, W), got {x.dtype} {tuple(x.shape)}.")
    if labels.shape != (len(x),) or labels.is_floating_point():
        raise ValueError(
            f"train_features: labels must be {len(x)} whole numbers, one per image, "
            f"got {labels.dtype} {tuple(labels.shape)}."
        )
    classes = int(labels.max()) + 1
    if int(labels.min()) < 0 or classes < 2:
        raise ValueError(f"train_features: labels must be classes 0, 1, ..., got {int(labels.min())} to {classes - 1}.")
    if not 0 < test_fraction < 1 or not 1 <= round(test_fraction * len(x)) < len(x):
        raise ValueError(f"train_features: test_fraction = {test_fraction} of {len(x)} images leaves a part empty.")
    if epochs < 1 or features < 1:
        raise ValueError(f"train_features: epochs and features must be at least 1, got {epochs} and {features}.")
    x, labels = x.detach().float(), labels.long()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator).to(x.device)
    held_out, train = order.tensor_split([round(test_fraction * len(x))])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = _Classifier(x.shape[1], classes, features, float(x[train].mean()), max(float(x[train].std()), 1e-6))
    net = net.to(x.device)
    batch = 128
    steps = epochs * -(-len(train) // batch)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(epochs):
        for part in train[torch.randperm(len(train), generator=generator).to(x.device)].split(batch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[part]), labels[part]).backward()
            optimizer.step()
            schedule.step()
    net.eval().requires_grad_(False)
    right = [net(x[part]).argmax(-1) == labels[part] for part in held_out.split(1024)]
    return TrainedFeatures(net, float(torch.cat(right).double().mean()))


@dataclass(frozen=True, eq=False)
class _Inception:
    network: Any
    name: str = "Inception-v3 (FID), pool 2048"

    def __call__(self, images: Tensor) -> Tensor:
        bytes_ = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return self.network(bytes_.expand(-1, 3, -1, -1) if images.shape[1] == 1 else bytes_)[0]


def inception_features(device: torch.device | str = "cpu") -> FeatureNetwork:
    """The network of the published FID, through torch-fidelity: images in [-1, 1], 1 or 3 channels, to 2048 features.

    Raises:
        ImportError: if torch-fidelity is not installed. It is no dependency, since it installs torchvision, and it
            fetches its weights from the network on first use.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ImportError(
            "inception_features needs torch-fidelity: pip install torch-fidelity. It drags in torchvision, which must "
            "match your torch, and downloads its weights on first use; train_features needs neither."
        ) from error
    return _Inception(FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).to(device).eval())


@dataclass(frozen=True, eq=False)
class Neighbours:
    """Distances to the nearest training point.

    Attributes:
        samples: of each sample, (n,).
        index: which training point that is, (n,).
        held_out: of each held-out point, (m,): what new data of the same law would show.
    """

    samples: Tensor
    index: Tensor
    held_out: Tensor

    @property
    def ratio(self) -> float:
        """Median of ``samples`` over median of ``held_out``: near 1 for new data, near 0 for copies."""
        return float(self.samples.median() / self.held_out.median())

    @property
    def copied(self) -> float:
        """Fraction of samples nearer to a training point than 99 % of held-out data is; 0.01 for new data."""
        return float((self.samples < self.held_out.quantile(0.01)).double().mean())

    def __str__(self) -> str:
        return f"nearest training point: ratio to held-out data {self.ratio:.3f}, copied {self.copied:.1%}"


def nearest_neighbours(samples: Tensor, train: Tensor, held_out: Tensor) -> Neighbours:
    """How far samples and held-out data are from the nearest training point, in Euclidean distance.

    Args:
        samples, train, held_out: (n, *event), (N, *event) and (m, *event); images, or features of them. ``held_out``
            must not have been trained on.
    """
    for name, s in (("samples", samples), ("train", train), ("held_out", held_out)):
        if s.ndim < 2 or len(s) == 0:
            raise ValueError(f"nearest_neighbours: {name} must have shape (n, *event), n >= 1, got {tuple(s.shape)}.")
        if s.shape[1:] != train.shape[1:]:
            raise ValueError(
                f"nearest_neighbours: {name} has points of shape {tuple(s.shape[1:])}, "
                f"train of {tuple(train.shape[1:])}."
            )
    near, index = _nearest(samples, train)
    return Neighbours(near, index, _nearest(held_out, train)[0])


def _nearest(points: Tensor, train: Tensor) -> tuple[Tensor, Tensor]:
    points, train = points.detach().flatten(1).double(), train.detach().flatten(1).double()
    half_norms = 0.5 * train.square().sum(1)
    # Candidates by one matrix product, the distance itself by differences, so that a copy is at distance 0.
    index = torch.cat([(half_norms - part @ train.T).argmin(1) for part in points.split(1024)])
    return (points - train[index]).norm(dim=1), index
