"""A network as a classifier of noisy points: what it says beyond the levels it knows, and what a class is."""

import math

import pytest
import torch

from undrift.denoise import (
    BayesClassifier,
    ClassifierPotential,
    GaussianDenoiser,
    Guided,
    MixtureDenoiser,
    NetworkClassifier,
)
from undrift.diffusion import Diffusion, NoiseDiffusion
from undrift.guided_noise import GuidedNoise
from undrift.networks.classifier import ClassifierNetwork
from undrift.process import VP
from undrift.train import Classification

MEANS, VARIANCE = torch.tensor([[1.0, 0.0], [-0.5, 0.5]], dtype=torch.float64), 0.3
BAYES = BayesClassifier([GaussianDenoiser(m, VARIANCE) for m in MEANS])
PRIOR = MixtureDenoiser([0.5, 0.5], MEANS, VARIANCE)


class Exact(ClassifierNetwork):
    """Bayes' classifier as a network: it reads the level off the label and the point off the scaled input."""

    classes = 2

    def forward(self, u, label):
        sigma = (4 * label).exp()
        return BAYES(u * (sigma.square() + 0.25).sqrt().unsqueeze(-1), sigma)


def test_beyond_its_levels_a_classifier_says_what_it_knows_at_the_last():
    """log p(c | x~) is <m_c, x~> / sigma^2 up to 1 / sigma^2, so the pull is that of Bayes up to |m|^2 / sigma_max^2.

    With points of the noise's size, and sigma_max = 50, that is 4e-4 times a few; a label that is merely held there
    makes the pull sigma / sigma_max times too long.
    """
    model = NetworkClassifier(Exact(), sigma_max=50.0)
    sigma = torch.tensor([10.0, 50.0, 150.0, 1e4, 1e8], dtype=torch.float64)
    x = sigma.unsqueeze(-1) * torch.empty(5, 2, dtype=torch.float64).normal_(generator=torch.Generator().manual_seed(0))
    got, want = (Guided(PRIOR, ClassifierPotential(c, 0)).parts(x, sigma) for c in (model, BAYES))
    torch.testing.assert_close(got.guided[:2], want.guided[:2], rtol=0, atol=1e-10)
    assert float((got.guided - want.guided).abs().max()) < 4e-3
    assert float((want.guided - want.unguided).norm(dim=-1).min()) > 0.5, "there is something to get wrong"
    torch.testing.assert_close(
        got.log_potential[-1], torch.tensor(math.log(0.5), dtype=torch.float64), rtol=0, atol=1e-3
    )


def test_a_classifier_knows_the_levels_that_it_is_trained_at_if_nothing_is_said():
    model, noise = NetworkClassifier(Exact()), Classification().noise
    assert (model.sigma_min, model.sigma_max) == noise.support


@pytest.mark.parametrize(
    "label", [torch.tensor([1, 0], dtype=d) for d in (torch.uint8, torch.int16, torch.int32)], ids=str
)
def test_classes_are_integers_of_any_kind(label):
    x = torch.zeros(2, 2, dtype=torch.float64)
    guided = Guided(PRIOR, ClassifierPotential(BAYES))
    torch.testing.assert_close(guided(x, 1.0, label=label), guided(x, 1.0, label=label.long()), rtol=0, atol=0)
    with pytest.raises(TypeError, match="a class is an integer"):
        guided(x, 1.0, label=label.float())
    with pytest.raises(TypeError, match="a class is an integer"):
        guided(x, 1.0, label=True)


@pytest.mark.parametrize("kind", ["denoiser", "network of all channels"])
def test_a_model_keeps_no_graph_for_a_classifier(kind):
    """The potential has no use for the prediction; derivatives of the guided prediction, where asked for, still do."""
    kept = []

    def network(v, *_):
        kept.append(torch.is_grad_enabled())
        return torch.zeros_like(v)

    potential = ClassifierPotential(BAYES, 0)
    model = (
        Diffusion(VP(), Guided(lambda x, sigma: network(x), potential))
        if kind == "denoiser"
        else GuidedNoise(NoiseDiffusion(VP(), network), potential)
    )
    z = torch.ones(1, 1, 2, dtype=torch.float64)
    plain = model.predict(z, 0.5)
    assert kept == [False]
    assert not plain.requires_grad
    assert model.predict(z.requires_grad_(), 0.5).requires_grad
    assert kept[1:] == [True]
    torch.testing.assert_close(plain, model.predict(z, 0.5).detach(), rtol=0, atol=0)
