"""Guidance by a potential: exact where the potential is, for every process and nesting; and what travels where."""

import math

import pytest
import torch
from torch.autograd.functional import jacobian

from undrift.config import build, describe
from undrift.denoise import (
    ClassifierFree,
    ClassifierPotential,
    GaussianDenoiser,
    Guided,
    MixtureDenoiser,
    PseudoInverse,
)
from undrift.denoise.classifier import BayesClassifier
from undrift.diffusion import Diffusion
from undrift.observe import CorrelatedNoise, GaussianNoise, Matrix, Observation
from undrift.process import CLD, PSLD, VE, VP
from undrift.sample import Ancestral, sample

SIGMAS = torch.logspace(-2, 2, 9, dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.float64).normal_(generator=torch.Generator().manual_seed(seed))


class Linear:
    """A mixture prior, data y = A x + noise, and by Bayes the mixture posterior and log p(y | x~); d = 3, m = 2."""

    def __init__(self, seed: int = 0, prior: MixtureDenoiser | None = None) -> None:
        roots = 0.5 * normal(4, 3, 3, seed=seed)
        self.prior = prior or MixtureDenoiser(
            torch.tensor([1.0, 2.0, 0.5, 1.5]), 1.5 * normal(4, 3, seed=seed + 1), roots @ roots.mT
        )
        self.a, self.y = normal(2, 3, seed=seed + 2), normal(2, seed=seed + 3)
        self.noise = torch.tensor([[0.3, 0.1], [0.1, 0.2]], dtype=torch.float64)

    @property
    def observation(self) -> Observation:
        return Observation(Matrix(self.a), CorrelatedNoise(self.noise), self.y)

    @property
    def posterior(self) -> MixtureDenoiser:
        p = self.prior
        seen = self.a @ p.covs @ self.a.T + self.noise
        gain = p.covs @ self.a.T @ torch.linalg.inv(seen)
        miss = self.y - p.means @ self.a.T
        weights = p.weights * torch.distributions.MultivariateNormal(torch.zeros_like(miss), seen).log_prob(miss).exp()
        covs = p.covs - gain @ self.a @ p.covs
        return MixtureDenoiser(weights, p.means + (gain @ miss.unsqueeze(-1)).squeeze(-1), 0.5 * (covs + covs.mT))

    def log_potential(self, x: torch.Tensor, sigma: torch.Tensor, x0: torch.Tensor) -> torch.Tensor:
        """log sum_k p(k | x~) N(y; A E[x0 | x~, k], A Cov[x0 | x~, k] A' + S), dense solves."""
        p, eye = self.prior, torch.eye(3, dtype=torch.float64)
        noisy = p.covs + sigma.reshape(-1, 1, 1, 1).square() * eye  # (batch, modes, 3, 3)
        off = x.unsqueeze(1) - p.means
        log_r = torch.distributions.MultivariateNormal(torch.zeros_like(off), noisy).log_prob(off) + p.weights.log()
        gain = p.covs @ torch.linalg.inv(noisy)
        mean = p.means + (gain @ off.unsqueeze(-1)).squeeze(-1)
        cov = self.a @ (p.covs - gain @ p.covs) @ self.a.T + self.noise
        miss = self.y - mean @ self.a.T
        log_y = torch.distributions.MultivariateNormal(torch.zeros_like(miss), 0.5 * (cov + cov.mT)).log_prob(miss)
        return (log_r.log_softmax(1) + log_y).logsumexp(1)


@pytest.mark.parametrize("shared", [True, False], ids=["one level", "a level per sample"])
def test_the_true_potential_gives_the_posterior_mean(shared):
    problem = Linear()
    guided = Guided(problem.prior, problem.log_potential)
    x = 2 * normal(9, 3, seed=9)
    for sigma in SIGMAS if shared else (SIGMAS,):
        torch.testing.assert_close(guided(x, sigma), problem.posterior(x, sigma), rtol=0, atol=1e-9)


def test_parts_are_both_predictions_and_the_potential():
    problem, x = Linear(), 2 * normal(9, 3, seed=9)
    parts = Guided(problem.prior, problem.log_potential, strength=0.7).parts(x, SIGMAS)
    torch.testing.assert_close(parts.unguided, problem.prior(x, SIGMAS), rtol=0, atol=0)
    full = problem.posterior(x, SIGMAS) - parts.unguided
    torch.testing.assert_close(parts.guided - parts.unguided, 0.7 * full, rtol=0, atol=1e-9)
    torch.testing.assert_close(parts.log_potential, problem.log_potential(x, SIGMAS, x), rtol=0, atol=0)
    assert not any(part.requires_grad for part in parts)


@pytest.mark.parametrize("process", [VP(), VE(), CLD(), PSLD()], ids=lambda p: type(p).__name__)
def test_scores_gain_the_gradient_of_the_potential_on_every_channel(process):
    """Pandey & Mandt 2023, eq. 13-14, and the score of the diffusion of the posterior."""
    problem, t = Linear(), torch.linspace(0.05, 1, 6, dtype=torch.float64) * process.horizon
    z = 0.5 * normal(6, process.channels, 3, seed=5) * process.kernel(t)[1].norm(dim=-1).unsqueeze(-1)
    point = z.clone().requires_grad_()
    x, sigma = process.statistic(point, t)
    (slope,) = torch.autograd.grad(problem.log_potential(x, sigma, x).sum(), point)
    before = Diffusion(process, problem.prior).score(z, t)
    after = Diffusion(process, Guided(problem.prior, problem.log_potential)).score(z, t)
    scale = float(before.abs().max())
    torch.testing.assert_close(after - before, slope, rtol=1e-8, atol=1e-10 * scale)
    torch.testing.assert_close(after, Diffusion(process, problem.posterior).score(z, t), rtol=1e-8, atol=1e-10 * scale)


def test_guided_denoisers_nest_and_are_differentiable():
    """Bayes' rule twice; the outer gradient runs through the inner guidance, second derivatives included."""
    first = Linear()
    second = Linear(seed=20, prior=first.posterior)
    inner = Guided(first.prior, first.log_potential)
    nested = Guided(inner, second.log_potential)
    x = normal(5, 3, seed=3)
    torch.testing.assert_close(nested(x, 0.7), second.posterior(x, 0.7), rtol=0, atol=1e-9)
    sigma = torch.tensor([0.7], dtype=torch.float64)
    got, want = (jacobian(lambda v, d=d: d(v, sigma), x[:1]) for d in (inner, first.posterior))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-9)


def test_dtype_is_kept_and_the_level_may_be_a_number():
    problem = Linear()
    observation = Observation(Matrix(problem.a), GaussianNoise(0.5), problem.y)
    x = normal(4, 3, seed=3)
    for potential in (PseudoInverse(observation), ClassifierPotential(BayesClassifier([problem.prior] * 2), 1)):
        got = Guided(problem.prior, potential)(x.float(), 0.5)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), Guided(problem.prior, potential)(x, 0.5), rtol=0, atol=1e-5)


@pytest.mark.parametrize("strength", [math.nan, math.inf])
def test_unusable_settings_are_refused(strength):
    with pytest.raises(ValueError, match="strength must be finite"):
        Guided(GaussianDenoiser(), lambda x, sigma, x0: x.sum(), strength)
    with pytest.raises(ValueError, match="strength must be finite"):
        ClassifierFree(GaussianDenoiser(), strength)


def test_a_potential_must_be_one_number_per_sample():
    with pytest.raises(ValueError, match=r"one number per sample, \(2,\), got \(\)"):
        Guided(GaussianDenoiser(), lambda x, sigma, x0: x.sum())(torch.zeros(2), 1.0)


# -- classes -----------------------------------------------------------------------------------------------------------

MODES = [
    GaussianDenoiser(torch.tensor([2.0, 0.0]), torch.tensor([0.3, 0.1])),
    GaussianDenoiser(torch.tensor([-1.0, 1.0]), torch.tensor([0.2, 0.4])),
]
WEIGHTS = torch.tensor([0.3, 0.7], dtype=torch.float64)
BOTH = MixtureDenoiser(WEIGHTS, torch.stack([m.mean for m in MODES]), torch.stack([m.cov for m in MODES]))


def test_the_exact_classifier_guides_to_its_class():
    x = 3 * normal(9, 2, seed=4)
    classifier = BayesClassifier(MODES, WEIGHTS)
    torch.testing.assert_close(classifier(x, SIGMAS).logsumexp(1), BOTH.log_prob(x, SIGMAS), rtol=0, atol=1e-12)
    for label, mode in enumerate(MODES):
        guided = Guided(BOTH, ClassifierPotential(classifier, label))
        torch.testing.assert_close(guided(x, SIGMAS), mode(x, SIGMAS), rtol=0, atol=1e-10)


def test_labels_travel_with_the_samples_batch_by_batch():
    labels = torch.tensor([0, 1, 1, 0, 1, 0, 0])
    guided = Guided(BOTH, ClassifierPotential(BayesClassifier(MODES, WEIGHTS)))
    options = {"seed": 3, "batch": 3, "dtype": torch.float64}
    process, sampler = CLD(), Ancestral(8)
    x = sample(Diffusion(process, guided), 7, (2,), sampler, label=labels, **options)
    for label, mode in enumerate(MODES):
        alone = sample(Diffusion(process, mode), 7, (2,), sampler, **options)
        torch.testing.assert_close(x[labels == label], alone[labels == label], rtol=0, atol=1e-8)


def test_labels_are_checked():
    classifier, x = BayesClassifier(MODES), torch.zeros(3, 2)
    with pytest.raises(ValueError, match="no class; give it a label"):
        Guided(BOTH, ClassifierPotential(classifier))(x, 1.0)
    with pytest.raises(ValueError, match=r"one per sample, \(3,\), got \(2,\)"):
        Guided(BOTH, ClassifierPotential(classifier, torch.tensor([0, 1])))(x, 1.0)
    with pytest.raises(ValueError, match="labels must lie in"):
        Guided(BOTH, ClassifierPotential(classifier))(x, 1.0, label=2)


class Classed:
    """What a network trained with classes and without would become: class -1 is the whole mixture."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, x, sigma, y=None, **condition):
        self.batches.append(len(x))
        y = torch.full((len(x),), -1) if y is None else y
        every = torch.stack([m(x, sigma) for m in [*MODES, BOTH]])
        return every[y, torch.arange(len(x))]


def test_classifier_free_guidance_is_that_of_the_implied_classifier():
    x, y, net = 2 * normal(9, 2, seed=4), torch.arange(9) % 2, Classed()
    for w in (0.0, 0.5, 1.0, 3.0):
        want = Guided(BOTH, ClassifierPotential(BayesClassifier(MODES, WEIGHTS)), w)(x, SIGMAS, label=y)
        torch.testing.assert_close(ClassifierFree(net, w)(x, SIGMAS, y=y), want, rtol=0, atol=1e-9)
    assert net.batches == [18, 18, 9, 18]  # one call each, and no doubling where the class alone decides


def test_classifier_free_guidance_acts_within_its_interval():
    x, y = 2 * normal(9, 2, seed=4), torch.arange(9) % 2
    got = ClassifierFree(Classed(), 3.0, interval=(0.1, 10.0))(x, SIGMAS, y=y)
    inside = (SIGMAS > 0.1) & (SIGMAS <= 10.0)
    torch.testing.assert_close(got[inside], ClassifierFree(Classed(), 3.0)(x, SIGMAS, y=y)[inside], rtol=0, atol=0)
    torch.testing.assert_close(got[~inside], Classed()(x, SIGMAS, y=y)[~inside], rtol=0, atol=0)
    assert 0 < int(inside.sum()) < 9
    net = Classed()
    ClassifierFree(net, 3.0, interval=(0.1, 10.0))(x, 50.0, y=y)
    assert net.batches == [9]


def test_another_denoiser_may_guide():
    x, y, broad = 2 * normal(9, 2, seed=4), torch.arange(9) % 2, GaussianDenoiser(torch.zeros(2), 4.0)
    pulled = Classed()(x, SIGMAS, y=y)
    got = ClassifierFree(Classed(), 2.0, guide=broad)(x, SIGMAS, y=y)  # which takes no class
    torch.testing.assert_close(got, 2 * pulled - broad(x, SIGMAS), rtol=0, atol=1e-12)

    def worse(x, sigma, y):
        return 0.5 * Classed()(x, sigma, y=y)

    got = ClassifierFree(Classed(), 2.0, guide=worse, guide_told=True)(x, SIGMAS, y=y)
    torch.testing.assert_close(got, 1.5 * pulled, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="guide_told needs a guide"):
        ClassifierFree(Classed(), guide_told=True)
    with pytest.raises(ValueError, match="needs the class"):
        ClassifierFree(Classed())(x, SIGMAS)
    with pytest.raises(ValueError, match="interval must be"):
        ClassifierFree(Classed(), interval=(2.0, 1.0))


class Told:
    """Of a model of pairs, in closed form: the posterior given what was observed, for all or for each, or the prior."""

    def __init__(self) -> None:
        self.problem = Linear()

    def __call__(self, x, sigma, observed=None, **condition):
        assert not condition
        if observed is None:
            return self.problem.prior(x, sigma)
        rows = []
        for i, y in enumerate(observed.expand(len(x), 2)):
            self.problem.y = y
            rows.append(self.problem.posterior(x[i : i + 1], sigma[i : i + 1]))
        return torch.cat(rows)


def test_classifier_free_guidance_is_that_of_the_implied_likelihood():
    """D + w (D(. | y) - D) is the prior at 0, the posterior at 1, and at any w guided by the exact log p(y | x~)."""
    net, x, every = Told(), 2 * normal(9, 3, seed=4), normal(9, 2, seed=5)
    prior = net.problem.prior(x, SIGMAS)
    for w in (0.0, 0.5, 1.0, 3.0):
        free = ClassifierFree(net, w)
        rows = []
        for i, y in enumerate(every):
            net.problem.y = y
            rows.append(Guided(net.problem.prior, net.problem.log_potential, w)(x[i : i + 1], SIGMAS[i : i + 1]))
        torch.testing.assert_close(free(x, SIGMAS, observed=every), torch.cat(rows), rtol=0, atol=1e-9)
        # one observation for all, of any size: here of two numbers for a batch of two, whose rows it must not be
        net.problem.y = every[0]
        want = Guided(net.problem.prior, net.problem.log_potential, w)(x[:2], SIGMAS[:2])
        torch.testing.assert_close(free(x[:2], SIGMAS[:2], observed=every[0]), want, rtol=0, atol=1e-9)
    assert float((net(x, SIGMAS, observed=every) - prior).abs().max()) > 1, "there is something to get wrong"
    some = ClassifierFree(net, 3.0, interval=(0.1, 10.0))(x, SIGMAS, observed=every)
    inside = (SIGMAS > 0.1) & (SIGMAS <= 10.0)
    full = ClassifierFree(net, 3.0)(x, SIGMAS, observed=every)
    torch.testing.assert_close(some, torch.where(inside[:, None], full, net(x, SIGMAS, observed=every)))


def test_what_is_hidden_from_the_guide_can_be_chosen():
    """Of a class and data together each can be guided to, or both; by itself it is the class."""

    def net(x, sigma, y=None, observed=None):  # linear in what is told, so that the guide's knowledge shows
        told = torch.zeros_like(x) if y is None else 1.0 * (1 + y).unsqueeze(1).expand_as(x)
        return x + told + (0 if observed is None else 100 * observed)

    x, y, seen = normal(2, 2, seed=1), torch.tensor([0, 2]), normal(2, 2, seed=2)
    pulled = net(x, 1.0, y, seen)
    for hides, base in (
        (None, net(x, 1.0, None, seen)),
        (("y",), net(x, 1.0, None, seen)),
        (("observed",), net(x, 1.0, y)),
        (("y", "observed"), net(x, 1.0)),
    ):
        got = ClassifierFree(net, 3.0, hides=hides)(x, 1.0, y=y, observed=seen)
        torch.testing.assert_close(got, base + 3 * (pulled - base), rtol=0, atol=1e-10)
    got = ClassifierFree(net, 3.0, guide=GaussianDenoiser(torch.zeros(2), 4.0))(x, 1.0, observed=seen)
    base = GaussianDenoiser(torch.zeros(2), 4.0)(x, 1.0)
    torch.testing.assert_close(got, base + 3 * (net(x, 1.0, None, seen) - base), rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="needs what was observed, observed="):
        ClassifierFree(net, hides=("observed",))(x, 1.0, y=y)
    with pytest.raises(ValueError, match="hides must name y, observed or both"):
        ClassifierFree(net, hides=("x",))
    again = build(describe(ClassifierFree(GaussianDenoiser(), hides=("observed",))), ClassifierFree)
    assert tuple(again.hides) == ("observed",)


def test_wrappers_describe_themselves():
    data = describe(ClassifierFree(GaussianDenoiser(), 3.0, (0.1, 2.0)))
    assert (data["type"], data["strength"], data["interval"]) == ("ClassifierFree", 3.0, [0.1, 2.0])
