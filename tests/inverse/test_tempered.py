"""A posterior of two modes: Langevin stays, annealing freezes, tempering is right. And ranks that say who lies."""

import math

import pytest
import torch
from scipy.stats import chisquare

from undrift.inverse import (
    Annealing,
    DenoiserPrior,
    FieldMixture,
    LangevinMoves,
    LinearGaussian,
    PCNMoves,
    Posterior,
    StepTooLarge,
    calibrate,
    langevin,
    tempered,
)
from undrift.observe import GaussianNoise, Observation, Points
from undrift.space import Cosine, FunctionSpace, Matern

SPACE = FunctionSpace(Cosine(), Matern(2.0, 3.0), "coefficients")
N, CENTRE, STD, PLACES, WEIGHT = 64, 5.0, 2.0, (0.3, 0.7), 0.7006


def two_modes():
    """Equal modes at plus and minus a constant; two data of which the first two thirds favour plus, by .7006."""
    mean = torch.zeros(N, dtype=torch.float64)
    mean[0] = CENTRE
    prior = FieldMixture(SPACE, torch.tensor([[CENTRE], [-CENTRE]]))

    def parts(height):
        y = torch.tensor([height, height / 2], dtype=torch.float64)
        observed = Observation(Points(PLACES, Cosine()), GaussianNoise(STD), y)
        return observed, [LinearGaussian.of(observed, SPACE, (N,), mean=s * mean).log_evidence() for s in (1, -1)]

    low, high = 0.0, 2.0
    for _ in range(25):
        mid = (low + high) / 2
        a, b = parts(mid)[1]
        low, high = (mid, high) if 1 / (1 + math.exp(b - a)) < WEIGHT else (low, mid)
    observed, (a, b) = parts(low)
    assert 1 / (1 + math.exp(b - a)) == pytest.approx(WEIGHT, abs=1e-6)
    return Posterior(prior, observed), mean.expand(100, N), math.log(0.5 * (math.exp(a) + math.exp(b)))


def share(x):
    return float((x[..., 0] > 0).double().mean())


def test_langevin_stays_where_it_started_and_tempering_does_not():
    posterior, plus, log_evidence = two_modes()
    stays = langevin(posterior, plus, 100, 0.2, thin=50, checks=1)
    assert share(stays.states[:, -1]) == 1.0
    # from the middle the slope is odd but for the data: near a half, 4 standard errors of .05
    split = langevin(posterior, 0 * plus, 100, 0.2, thin=50, checks=0)
    assert abs(share(split.states[:, -1]) - 0.5) < 0.2
    # annealing forgets the start, and freezes the weights where the barrier rises
    frozen = [
        share(langevin(posterior, x, 120, 0.2, annealing=Annealing(1e-3, 6.0, 1.0), warmup=119, seed=s, checks=0).x)
        for s, x in enumerate((plus, 0 * plus))
    ]
    assert abs(frozen[0] - frozen[1]) < 4 * math.sqrt(2 * 0.25 / 100)
    g = torch.Generator().manual_seed(3)
    right = tempered(posterior, posterior.prior.sample(16 * 128, (N,), g), PCNMoves(3), runs=16)
    of_run = (right.weights * (right.x[:, 0] > 0)).reshape(16, -1).sum(1) / right.weights.reshape(16, -1).sum(1)
    assert abs(float(of_run.mean()) - WEIGHT) < 4 * float(of_run.std()) / 4
    assert abs(right.log_evidence - log_evidence) < 4 * right.log_evidence_std_error
    assert right.log_evidence_std_error < 0.1


def test_learned_priors_are_tempered_by_langevin_moves():
    posterior, _, log_evidence = two_modes()
    learned = Posterior(DenoiserPrior(posterior.prior), posterior.likelihood)
    g = torch.Generator().manual_seed(4)
    draws = posterior.prior.sample(8 * 128, (N,), g)
    with pytest.raises(ValueError, match="LangevinMoves"):
        tempered(learned, draws, runs=8)
    with pytest.raises(StepTooLarge):
        tempered(learned, draws, LangevinMoves(20.0, count=1), runs=8)
    found = tempered(learned, draws, LangevinMoves(0.3, count=2), runs=8)
    error = math.sqrt(WEIGHT * (1 - WEIGHT) / found.ess)
    assert abs(float(found.expectation((found.x[:, 0] > 0).double())) - WEIGHT) < 4 * error
    assert abs(found.log_evidence - log_evidence) < 4 * found.log_evidence_std_error + 0.02
    with pytest.raises(FloatingPointError, match="impossible"):
        tempered(Posterior(posterior.prior, lambda x: x[:, 0] - math.inf), draws)


def ranks_of(factor, shift=0.0, replications=400, draws=39):
    """Conjugate normal model with draws whose deviation is too large by a factor, and mean by a shift."""
    g = torch.Generator().manual_seed(0)
    truth = torch.randn(replications, 2, generator=g, dtype=torch.float64)
    y = truth + 0.5 * torch.randn(replications, 2, generator=g, dtype=torch.float64)
    sd = math.sqrt(0.2)
    noise = torch.randn(replications, draws, 2, generator=g, dtype=torch.float64)
    return calibrate(truth, 0.8 * y.unsqueeze(1) + sd * (shift + factor * noise), ["a", "b"])


def test_ranks_of_the_right_posterior_are_uniform_and_wrong_ones_are_not():
    right = ranks_of(1.0)
    assert float(right.chi_square().min()) > 0.01
    assert float(right.uniformity().min()) > 0.01
    for wrong in (ranks_of(0.7), ranks_of(1.0, 0.4)):
        assert float(wrong.chi_square().max()) < 1e-3
    assert float(ranks_of(1.0, 0.4).uniformity().max()) < 1e-6
    (narrow,) = ranks_of(0.7).coverage((0.8,))
    assert narrow.level == pytest.approx(0.8)
    assert max(narrow.share) < 0.8 - 3 * narrow.std_error
    (fair,) = right.coverage((0.8,))
    assert min(fair.share) > 0.8 - 4 * fair.std_error


@pytest.mark.parametrize("draws", [1, 3])
def test_ranks_of_ties_are_uniform_by_both_tests(draws):
    """A functional that never varies is ranked by chance alone; what spreads ranks must not be what broke the ties."""
    ranks = calibrate(torch.zeros(400, 1), torch.zeros(400, draws, 1))
    assert float(ranks.chi_square()) > 0.01
    assert float(ranks.uniformity()) > 0.01


def test_ranks_by_hand():
    truths = torch.tensor([[0.0], [5.0], [2.5]])
    draws = torch.tensor([[1.0, 2.0, 3.0]] * 3).unsqueeze(-1)
    found = calibrate(truths, draws)
    assert found.ranks.flatten().tolist() == [0, 3, 2]
    assert found.histogram(2).tolist() == [[1, 2]]
    assert float(found.chi_square(2)) == pytest.approx(float(chisquare([1, 2]).pvalue))
    assert [c.share for c in found.coverage((0.5,))] == [(pytest.approx(1 / 3),)]
    # ties are broken evenly
    tied = calibrate(torch.zeros(900, 1), torch.zeros(900, 2, 1))
    assert float(chisquare(tied.ranks.flatten().bincount(minlength=3)).pvalue) > 1e-3
    with pytest.raises(ValueError, match="are needed"):
        calibrate(truths, truths)


def test_an_observation_of_each_particle_is_refused():
    space = FunctionSpace(Cosine(), Matern(2.0, 3.0))
    prior = FieldMixture(space)
    x = prior.sample(4, (8,), torch.Generator().manual_seed(0))
    for y, shared in ((torch.ones(4, 2), False), (torch.ones(2), True), (torch.ones(1, 2), True)):
        observation = Observation(Points(PLACES), GaussianNoise(STD), y)
        assert observation.shared(x) is shared
    observation = Observation(Points(PLACES), GaussianNoise(STD), torch.ones(4, 2))
    with pytest.raises(ValueError, match=r"data of shape \(4, 2\) are one observation for each particle"):
        tempered(Posterior(prior, observation), x)
