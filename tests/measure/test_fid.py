"""Fréchet distance, the feature network trained in place, and the memorisation check."""

import sys
import types

import pytest
import torch
from sklearn.datasets import load_digits

from undrift.measure import (
    FeatureNetwork,
    extract,
    frechet_distance,
    inception_features,
    nearest_neighbours,
    train_features,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.float64).normal_(generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    return torch.tensor(data.images).float().unsqueeze(1) / 8 - 1, torch.tensor(data.target)


@pytest.fixture(scope="module")
def trained(digits):
    return train_features(*digits, epochs=6)


def whitened(n: int, d: int, seed: int = 0) -> torch.Tensor:
    """Points whose sample mean and covariance are 0 and I exactly."""
    x = normal(n, d, seed=seed)
    x = x - x.mean(0)
    return torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(x.T)), x.T, upper=False).T


def test_equals_the_closed_form():
    """|mu|^2 + tr(A^2 + B^2 - 2 AB) for commuting roots, and |mu|^2 + tr(I + C - 2 C^(1/2)) against the identity."""
    x, y = whitened(50, 3), whitened(80, 3, seed=1)
    a, b = (torch.tensor(v, dtype=torch.float64) for v in ([1.0, 2.0, 0.5], [0.3, 1.0, 4.0]))
    shift = torch.tensor([0.1, -0.2, 0.7], dtype=torch.float64)
    want = float(shift.square().sum() + (a - b).square().sum())
    assert frechet_distance(x * a, y * b + shift) == pytest.approx(want, abs=1e-10)
    root = normal(3, 3, seed=2)
    values = torch.linalg.svdvals(root)
    assert frechet_distance(x, y @ root) == pytest.approx(float((1 - values).square().sum()), abs=1e-10)


def test_is_symmetric_and_zero_on_equal_features_even_when_degenerate():
    a, b = normal(60, 5), 1 + normal(70, 5, seed=1) @ normal(5, 5, seed=2)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), abs=1e-10)
    flat = torch.cat([a, a[:, :1] - a[:, 1:2], torch.zeros(60, 1)], 1)  # a singular covariance
    assert frechet_distance(flat, flat) == pytest.approx(0.0, abs=1e-10)
    assert frechet_distance(flat, flat + 1.0) == pytest.approx(7.0, abs=1e-9)


def test_too_few_points_are_warned_of():
    with pytest.warns(UserWarning, match=r"4 points cannot fill a covariance of 5 features.*at least 6 points"):
        frechet_distance(normal(4, 5), normal(50, 5))


def test_classifier_is_good_named_and_repeatable(digits, trained):
    assert trained.accuracy > 0.95
    assert trained.name == "small classifier, trained in place"
    assert isinstance(trained, FeatureNetwork)
    again = train_features(*digits, epochs=6)
    assert torch.equal(again(digits[0][:16]), trained(digits[0][:16]))
    before = torch.random.get_rng_state()
    train_features(digits[0][:60], digits[1][:60], epochs=1)
    assert torch.equal(before, torch.random.get_rng_state())


def test_feature_distance_ranks_corruptions(digits, trained):
    """Two halves of the data are near each other; noise, blur and a missing class are farther, more noise the more."""
    x, labels = digits
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    half, rest = extract(trained, x[order[:900]]), x[order[900:]]
    floor = frechet_distance(half, extract(trained, rest))
    noise = normal(*rest.shape, seed=3).float()
    small, large = (frechet_distance(half, extract(trained, rest + s * noise)) for s in (0.5, 1.0))
    blurred = frechet_distance(half, extract(trained, torch.nn.functional.avg_pool2d(rest, 3, 1, 1)))
    missing = frechet_distance(half, extract(trained, rest[labels[order[900:]] != 3]))
    assert 2 * floor < small < large
    assert 2 * floor < blurred
    assert 1.5 * floor < missing


def test_copies_are_flagged_and_new_data_is_not(digits):
    x = digits[0][torch.randperm(len(digits[0]), generator=torch.Generator().manual_seed(1))]
    train, held_out, fresh = x[:1200], x[1200:1500], x[1500:]
    new = nearest_neighbours(fresh, train, held_out)
    copies = nearest_neighbours(train[:200] + 0.01 * normal(200, 1, 8, 8).float(), train, held_out)
    exact = nearest_neighbours(train[:200], train, held_out)
    assert new.ratio == pytest.approx(1.0, abs=0.15)
    # a fraction of .01 among 297 points, with a threshold known from 300: 4 standard errors of either make .04
    assert new.copied < 0.05
    assert copies.ratio < 0.1
    assert copies.copied == 1.0
    assert exact.ratio == 0.0
    assert torch.equal(exact.index, torch.arange(200))
    assert "copied 100.0%" in str(exact)


def test_neighbours_are_the_nearest():
    samples, train = normal(40, 3), normal(70, 3, seed=1)
    found = nearest_neighbours(samples, train, samples)
    distances = (samples[:, None] - train).norm(dim=-1)
    torch.testing.assert_close(found.samples, distances.amin(1), rtol=0, atol=1e-14)
    assert torch.equal(found.index, distances.argmin(1))


def test_inception_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(ImportError, match=r"pip install torch-fidelity. It drags in torchvision"):
        inception_features()


def test_inception_is_given_bytes_in_three_channels(monkeypatch):
    seen = []

    class Extractor(torch.nn.Module):
        def __init__(self, name: str, layers: list[str]) -> None:
            super().__init__()
            seen.append((name, layers))

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
            seen.append(images)
            return (images.float().mean((2, 3)),)

    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = Extractor
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    features = extract(inception_features(), torch.tensor([-1.0, 0.0, 2.0]).reshape(3, 1, 1, 1).expand(3, 1, 4, 4))
    assert seen[0] == ("inception-v3-compat", ["2048"])
    assert seen[1].dtype == torch.uint8
    assert seen[1].shape == (3, 3, 4, 4)
    assert features[:, 0].tolist() == [0, 128, 255]


X, Y = torch.zeros(10, 1, 8, 8), torch.arange(10)
BAD = [
    (lambda: frechet_distance(torch.zeros(5, 2), torch.zeros(5, 3)), r"a has 2 features, b has 3"),
    (lambda: frechet_distance(torch.zeros(1, 2), torch.zeros(5, 2)), r"a must be features \(n, D\) with n >= 2"),
    (lambda: frechet_distance(torch.zeros(5, 2) / 0, torch.zeros(5, 2)), r"a has features that are not finite"),
    (lambda: train_features(X.flatten(1), Y), r"x must be float images \(n, C, H, W\), got torch.float32 \(10, 64\)"),
    (lambda: train_features(X, Y[:5]), r"labels must be 10 whole numbers, one per image, got torch.int64 \(5,\)"),
    (lambda: train_features(X, Y - 1), r"labels must be classes 0, 1, ..., got -1 to 8"),
    (lambda: train_features(X, Y, test_fraction=1.0), r"test_fraction = 1.0 of 10 images leaves a part empty"),
    (lambda: train_features(X, Y, epochs=0), r"epochs and features must be at least 1, got 0 and 64"),
    (lambda: nearest_neighbours(X, X[:, :, :4], X), r"samples has points of shape \(1, 8, 8\), train of \(1, 4, 8\)"),
    (lambda: nearest_neighbours(X, X, X[:0]), r"held_out must have shape \(n, \*event\), n >= 1"),
    (lambda: extract(lambda x: x, X[0]), r"images must have shape \(n, C, H, W\)"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
