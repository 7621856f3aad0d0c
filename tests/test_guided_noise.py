"""Guidance of a noise network: with an exact network, everything it says is what the guided denoiser says."""

import math

import pytest
import torch

from undrift import Diffusion, NoiseDiffusion, elbo, log_likelihood, sample
from undrift.denoise import (
    FieldGaussian,
    GaussianDenoiser,
    Guided,
    Linearised,
    MixtureDenoiser,
    PointEstimate,
    PseudoInverse,
    TweedieMoments,
)
from undrift.guided_noise import GuidedNoise, classifier_free, guide
from undrift.networks import MLP
from undrift.observe import GaussianNoise, Matrix, Observation, Points
from undrift.process import CLD, PSLD, VP
from undrift.sample import Ancestral, Exponential, ProbabilityFlow, twisted
from undrift.space import Cosine, FunctionSpace, Matern
from undrift.train import NoiseMatching, Ring, TrainConfig, Trainer

PRIOR = MixtureDenoiser([0.3, 0.7], [[1.0, -0.5, 0.2], [-1.0, 0.4, 0.0]], torch.tensor([[0.3, 0.5, 0.2]] * 2))
A = torch.tensor([[1.0, 0.5, -0.3], [0.2, -1.0, 0.4]], dtype=torch.float64)
SEEN = Observation(Matrix(A), GaussianNoise(0.4), torch.tensor([0.6, -0.2], dtype=torch.float64))
POTENTIALS = [PseudoInverse(SEEN), TweedieMoments(SEEN), PointEstimate(SEEN), Linearised(SEEN)]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.float64).normal_(generator=torch.Generator().manual_seed(seed))


class ExactNoise:
    """The noise network that a denoiser's score makes exact, differentiable in z; the label is all that tells time."""

    def __init__(self, process, denoiser, **settings):
        self.exact = Diffusion(process, denoiser)
        self.space = self.exact.space
        self.diffusion = NoiseDiffusion(process, self, **settings)

    def __call__(self, scaled, label):
        t = self.exact.process.time((4 * label.double()).exp())
        c = self.diffusion.coefficients(t)
        state = scaled.double().flatten(2) * c.scale.unsqueeze(-1)
        z = state.reshape(scaled.shape)
        residual = (c.baseline @ state).reshape(z.shape) - self.exact.preconditioned_score(z, t)
        return (c.root.mT @ residual.flatten(2)).reshape(z.shape).to(scaled)


def pair(process, denoiser, potential, strength=1.0, **settings):
    exact = Diffusion(process, Guided(denoiser, potential, strength))
    return GuidedNoise(ExactNoise(process, denoiser, **settings).diffusion, potential, strength), exact


@pytest.mark.parametrize("potential", POTENTIALS, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize(
    ("process", "settings"),
    [(VP(), {}), (CLD(), {"mixed": True, "data_std": 0.7}), (PSLD(), {"kernel": "dsm", "factor": "upper"})],
    ids=["VP", "CLD", "PSLD"],
)
def test_score_and_prediction_are_those_of_the_guided_denoiser(process, settings, potential):
    """On every channel, a time per sample; of the start, guidance moves channel 0 alone."""
    noise, exact = pair(process, PRIOR, potential, 0.8, **settings)
    times = process.time(torch.tensor([0.05, 0.4, 3.0], dtype=torch.float64))
    z, _ = process.perturb(normal(3, 3, seed=2), times, torch.Generator().manual_seed(3))
    want = exact.score(z, times)
    torch.testing.assert_close(noise.score(z, times), want, rtol=1e-7, atol=1e-8 * float(want.abs().max()))
    torch.testing.assert_close(noise.predict(z, times), exact.predict(z, times), rtol=0, atol=1e-8)
    root = process.kernel(times)[1]
    scaled = torch.einsum("nkj,nkd->njd", root, want)
    torch.testing.assert_close(noise.score(z, times, root), scaled, rtol=1e-7, atol=1e-8 * float(scaled.abs().max()))
    predictor, plain = noise.predictor(times), noise.diffusion.predictor(times)
    for i, t in enumerate(times):
        start = predictor(z, i)
        torch.testing.assert_close(start[:, 0], exact.predict(z, t), rtol=0, atol=1e-7)
        torch.testing.assert_close(start[:, 1:], plain(z, i)[:, 1:], rtol=0, atol=0)
        assert not start.requires_grad


@pytest.mark.parametrize(
    ("process", "sampler"),
    [(PSLD(), Ancestral(8)), (CLD(), Exponential(8, order=2)), (VP(), ProbabilityFlow(rtol=1e-3, atol=1e-3))],
    ids=["ancestral", "exponential", "flow"],
)
def test_samples_are_those_of_the_guided_denoiser(process, sampler):
    noise, exact = pair(process, PRIOR, POTENTIALS[0])
    a, b = (sample(d, 3, (3,), sampler, seed=4, batch=2, dtype=torch.float64) for d in (noise, exact))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_functions_have_the_guidance_of_their_space():
    """Where a gradient that forgot C, or the cell of the grid, would be off by factors of 8 and of a spectrum."""
    space = FunctionSpace(Cosine(1), Matern(1.0, 2.0, 1.0), "physical")
    prior = FieldGaussian(space, Matern(2.0, 3.0, 1.0))
    seen = Observation(Points([[0.3], [0.8]]), GaussianNoise(0.2), torch.tensor([0.5, -0.4], dtype=torch.float64))
    noise, exact = pair(CLD(), prior, TweedieMoments(seen))
    t = noise.process.time(torch.tensor([0.3, 1.0], dtype=torch.float64))
    z = normal(2, 2, 8, seed=5)
    torch.testing.assert_close(noise.score(z, t), exact.score(z, t), rtol=1e-6, atol=1e-6)
    a, b = (sample(d, 3, (8,), Ancestral(6), seed=1, dtype=torch.float64) for d in (noise, exact))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-7)


def test_guided_models_nest():
    first, second = (
        POTENTIALS[1],
        PseudoInverse(Observation(Matrix(A[:1]), GaussianNoise(0.6), torch.zeros(1).double())),
    )
    noise = guide(guide(ExactNoise(CLD(), PRIOR).diffusion, first), second, 0.7)
    exact = Diffusion(CLD(), Guided(Guided(PRIOR, first), second, 0.7))
    t, z = torch.tensor([0.2, 0.5], dtype=torch.float64), normal(2, 2, 3, seed=8)
    torch.testing.assert_close(noise.score(z, t), exact.score(z, t), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(noise.predictor(t)(z, 1)[:, 0], exact.predict(z, t[1]), rtol=0, atol=1e-8)


def test_likelihood_given_y_is_the_posterior_density():
    """Second derivatives flow through the guidance: the divergence of the guided flow, exactly traced."""
    prior = GaussianDenoiser(torch.tensor([0.5, -0.3]), torch.tensor([[0.5, 0.1], [0.1, 0.3]]))
    a, y = torch.tensor([[1.0, -0.5]], dtype=torch.float64), torch.tensor([0.4], dtype=torch.float64)
    noise, _ = pair(VP(), prior, TweedieMoments(Observation(Matrix(a), GaussianNoise(0.3), y)))
    cov = torch.linalg.inv(torch.linalg.inv(prior.cov) + a.T @ a / 0.09)
    mean = cov @ (torch.linalg.inv(prior.cov) @ prior.mean + (y / 0.09) @ a)
    x = normal(3, 2, seed=6)
    found, want = (
        log_likelihood(d, x, rtol=1e-5, atol=1e-5).log_likelihood
        for d in (noise, Diffusion(VP(), GaussianDenoiser(mean, cov)))
    )
    torch.testing.assert_close(found, want, rtol=0, atol=1e-4)


def test_bound_given_y_is_that_of_the_guided_denoiser():
    noise, exact = pair(CLD(), PRIOR, POTENTIALS[0])
    x = normal(4, 3, seed=7)
    found, want = (elbo(d, x, form="hybrid", seed=1, samples=2).elbo for d in (noise, exact))
    torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-6)


def test_either_kind_of_diffusion_is_guided_by_one_function():
    noise = ExactNoise(VP(), PRIOR).diffusion
    assert isinstance(guide(noise, POTENTIALS[0], 2.0), GuidedNoise)
    plain = guide(Diffusion(VP(), PRIOR), POTENTIALS[0], 2.0)
    x, s = normal(2, 3), torch.tensor([0.5, 1.0], dtype=torch.float64)
    torch.testing.assert_close(plain.denoiser(x, s), Guided(PRIOR, POTENTIALS[0], 2.0)(x, s), rtol=0, atol=0)


@pytest.mark.parametrize("sampler", [Ancestral(6), Exponential(6, order=2, stochasticity=1.0)], ids=["one", "memory"])
def test_twisted_particles_are_those_of_the_denoiser(sampler):
    """Weights and evidence too: all channels of the start are predicted, and guidance moves the first."""
    noise = ExactNoise(PSLD(), PRIOR).diffusion
    found, want, free = (
        twisted(d, SEEN, potential, 12, (3,), sampler, 5, runs=2, batch=7, dtype=torch.float64)
        for d, potential in ((noise, POTENTIALS[0]), (Diffusion(PSLD(), PRIOR), POTENTIALS[0]), (noise, None))
    )
    torch.testing.assert_close(found.x, want.x, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.log_weights, want.log_weights, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.run_log_evidence, want.run_log_evidence, rtol=0, atol=1e-5)
    assert not torch.allclose(free.x, found.x)


class Classes:
    """Of a model trained with classes and without: -1 is the whole mixture."""

    def __init__(self, process=None):
        parts = [GaussianDenoiser(m, c) for m, c in zip(PRIOR.means, PRIOR.covs, strict=True)]
        self.models = [*parts, PRIOR] if process is None else [ExactNoise(process, d) for d in (*parts, PRIOR)]

    def __call__(self, x, level, y):
        return torch.stack([model(x, level) for model in self.models])[y, torch.arange(len(x))]


def test_noise_networks_are_guided_without_a_classifier():
    """By the difference of two answers; inside the interval of levels only, which the label must tell."""
    process = CLD()
    noise = classifier_free(NoiseDiffusion(process, Classes(process)), 2.5, (0.1, 1.0))
    exact = classifier_free(Diffusion(process, Classes()), 2.5, (0.1, 1.0))
    t, y = process.time(torch.tensor([0.05, 0.9, 3.0], dtype=torch.float64)), torch.tensor([0, 1, 0])
    z, _ = process.perturb(normal(3, 3, seed=2), t, torch.Generator().manual_seed(3))
    want = exact.score(z, t, y=y)
    torch.testing.assert_close(noise.score(z, t, y=y), want, rtol=1e-7, atol=1e-8 * float(want.abs().max()))
    plain = Diffusion(process, Classes()).score(z, t, y=y)
    assert ((want - plain).flatten(1).abs().amax(1) > 1e-3).tolist() == [False, True, False]


def test_what_cannot_be_guided_is_refused():
    noise = NoiseDiffusion(VP(), MLP(2))
    with pytest.raises(TypeError, match="guides a NoiseDiffusion, got a Diffusion"):
        GuidedNoise(Diffusion(VP(), PRIOR), POTENTIALS[0])
    with pytest.raises(ValueError, match="strength must be finite"):
        GuidedNoise(noise, POTENTIALS[0], math.nan)
    with pytest.raises(ValueError, match="one number per sample"):
        GuidedNoise(noise, lambda x, sigma, x0: x.sum()).predict(torch.zeros(2, 1, 2), 0.5)
    guided = GuidedNoise(noise, lambda x, sigma, x0: x.sum(1))
    with pytest.raises(TypeError, match="GuidedNoise"):
        Trainer(guided, NoiseMatching(), Ring(n=8).load(), TrainConfig(steps=1, batch=8))
