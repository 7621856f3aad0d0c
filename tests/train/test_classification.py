"""Classifiers of noisy points: learned, they approach Bayes' at every level; they resume, and load as they were."""

import math

import pytest
import torch

from undrift.denoise import GaussianDenoiser, NetworkClassifier, NetworkDenoiser
from undrift.denoise.classifier import BayesClassifier
from undrift.networks import MLP, ConvClassifier, MLPClassifier
from undrift.train import Classification, Dataset, LogUniform, TrainConfig, Trainer, accuracy, load

MODES = [GaussianDenoiser(torch.tensor([1.0, 0.5]), 0.2), GaussianDenoiser(torch.tensor([-0.5, 0.0]), 0.6)]
BAYES = BayesClassifier(MODES, [0.3, 0.7])


def draws(n: int, seed: int) -> Dataset:
    g = torch.Generator().manual_seed(seed)
    labels = (torch.rand(n, generator=g) < 0.7).long()
    x = torch.stack([m.sample(n, g) for m in MODES])[labels, torch.arange(n)]
    return Dataset("two Gaussians", x.float(), labels)


def small(seed: int = 0) -> NetworkClassifier:
    torch.manual_seed(seed)
    return NetworkClassifier(MLPClassifier(2, 2, width=32, depth=1), 0.8, 0.05, 10.0)


def test_the_gradient_of_bayes_classifier_is_the_difference_of_scores():
    sigma = torch.logspace(-1, 1, 7, dtype=torch.float64)
    x = torch.empty(7, 2, dtype=torch.float64).normal_(generator=torch.Generator().manual_seed(1)).requires_grad_()
    posterior = BAYES(x, sigma).log_softmax(1)
    (slope,) = torch.autograd.grad(posterior[:, 0].sum(), x)
    scores = torch.stack([m.score(x.detach(), sigma) for m in MODES])
    mean = (posterior.exp().T.unsqueeze(-1) * scores).sum(0)
    torch.testing.assert_close(slope, (scores[0] - mean).detach(), rtol=0, atol=1e-11)


def test_a_trained_classifier_approaches_bayes_at_every_level():
    """Divergence of the two posteriors, averaged over noisy points: no noise but that of its 2000 points.

    A fresh network is 0.49, 0.24 and 0.08 nats off at sigma = 0, 1 and 10; the fit must leave less than 0.02 anywhere.
    """
    config = TrainConfig(steps=200, batch=256, lr=1e-2, warmup=20, log_every=100, threads=1)
    model = Trainer(small(), Classification(LogUniform(0.05, 10.0)), draws(8000, 0), config).fit(False).model
    x = draws(2000, 1).x
    for level in (0.0, 0.1, 0.5, 1.0, 3.0, 10.0):
        noisy = x + level * torch.empty_like(x).normal_(generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            right = BAYES(noisy.double(), level).log_softmax(1)
            gap = (right.exp() * (right - model(noisy.double(), level).log_softmax(1))).sum(1)
        assert float(gap.mean()) < 0.02, level


def test_runs_resume_and_load(tmp_path):
    data, objective = draws(500, 0), Classification(LogUniform(0.05, 10.0))

    def train(steps: int, folder) -> None:
        config = TrainConfig(steps=steps, batch=32, log_every=5, checkpoint_every=5, threads=1)
        Trainer(small(), objective, data, config, tmp_path / folder).fit(False)

    train(6, "halted")
    train(12, "halted")
    train(12, "whole")
    halted, whole = (load(tmp_path / f / "model.safetensors") for f in ("halted", "whole"))
    assert isinstance(whole, NetworkClassifier)
    assert (whole.sigma_data, whole.sigma_min, whole.sigma_max, whole.classes) == (0.8, 0.05, 10.0, 2)
    with torch.no_grad():
        logits = whole(data.x, 0.3)
        torch.testing.assert_close(halted(data.x, 0.3), logits, rtol=0, atol=0)
    assert float(logits.abs().max()) > 0  # it has learned something: a fresh one is silent


def test_no_class_is_ever_hidden():
    """class_dropout is for denoisers; here a hidden class, -1, would be an index out of range, and nothing to learn."""
    config = TrainConfig(steps=3, batch=64, class_dropout=1.0, log_every=1)
    fit = Trainer(small(), Classification(), draws(500, 0), config).fit(False)
    assert math.isfinite(fit.loss)


def test_images_of_any_size_and_a_silent_start():
    torch.manual_seed(0)
    model = NetworkClassifier(ConvClassifier(2, 5, width=8, multipliers=(1, 2, 2)), 0.5)
    for size in ((8, 8), (9, 13), (28, 28)):
        logits = model(torch.randn(3, 2, *size), torch.tensor([0.0, 1.0, 1e4]))
        torch.testing.assert_close(logits, torch.zeros(3, 5), rtol=0, atol=0)
    with pytest.raises(ValueError, match="at least 4 x 4"):
        model(torch.zeros(3, 2, 3, 8), 1.0)
    with pytest.raises(ValueError, match="must hold 2 numbers"):
        small()(torch.zeros(3, 5), 1.0)


def test_accuracy_is_that_of_bayes_where_it_is_known():
    """Two unit Gaussians at +-1 in noise sigma: the error is the normal tail beyond 1/sqrt(1 + sigma^2)."""
    far = BayesClassifier([GaussianDenoiser(torch.tensor([m]), 1.0) for m in (-1.0, 1.0)])
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(20_000) % 2
    x = (2 * labels - 1).unsqueeze(1) + torch.empty(20_000, 1).normal_(generator=g)
    for row in accuracy(far, Dataset("pair", x, labels), [0.0, 1.0, 4.0], seed=1):
        want = 0.5 * math.erfc(-1 / math.sqrt(2 * (1 + row.sigma**2)))
        assert abs(row.accuracy - want) < 4 * math.sqrt(want * (1 - want) / 20_000)
        assert row.accuracy_se == pytest.approx(math.sqrt(want * (1 - want) / 20_000), rel=0.05)
        assert 0 < row.cross_entropy < math.log(2)


def test_wrong_partners_are_refused():
    x, g = torch.zeros(4, 2), torch.Generator()
    with pytest.raises(TypeError, match="trains a NetworkClassifier, got a NetworkDenoiser"):
        Classification().loss(NetworkDenoiser(MLP(2)), x, g)
    with pytest.raises(ValueError, match="needs the class of each point"):
        Classification().loss(small(), x, g)
    with pytest.raises(ValueError, match="has no labels"):
        accuracy(BAYES, Dataset("bare", x), [0.0])
    with pytest.raises(ValueError, match="positive weight"):
        BayesClassifier(MODES, [1.0, 0.0])
