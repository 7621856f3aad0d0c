"""Metropolised moves: exact ratios, acceptance that does not see the grid, and posteriors known in closed form."""

import math

import pytest
import torch

from undrift.inverse import (
    DenoiserPrior,
    FieldMixture,
    LinearGaussian,
    Posterior,
    PosteriorInformed,
    StepTooLarge,
    find_mode,
    langevin,
    pcn,
)
from undrift.inverse.pcn import Kernel
from undrift.observe import Darcy1d, GaussianNoise, Observation, Points
from undrift.space import Cosine, FunctionSpace, Matern

Y = torch.tensor([0.3, -0.5, 0.2], dtype=torch.float64)
OBSERVED = Observation(Points((0.1, 0.5, 0.9), Cosine()), GaussianNoise(0.3), Y)
COORDINATES = ("physical", "coefficients", "whitened")


def darcy(n, coordinates="coefficients"):
    """Seven pressures of one log-permeability, the same function and data on every grid."""
    s = FunctionSpace(Cosine(), Matern(2.0, 3.0, 4.0), coordinates)
    g = torch.Generator().manual_seed(1)
    xi = torch.nn.functional.pad(torch.randn(1, 32, generator=g, dtype=torch.float64), (0, 256 - 32))
    u = s.decode(s.colour(xi))
    y = Observation.simulate(Darcy1d(tuple(i / 8 for i in range(1, 8))), GaussianNoise(0.05), u, g)
    return Posterior(FieldMixture(s), y), g


@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("proposal", ["pcn", "pcnl", "random-walk", "white-walk"])
def test_acceptance_is_the_ratio_of_densities(coordinates, proposal):
    """Against densities of states and proposals on a grid, all dense."""
    n, s = 6, FunctionSpace(Cosine(), Matern(1.5, 3.0), coordinates)
    means = torch.tensor([[0.8, 0.3], [-0.5, 0.1]])
    posterior = Posterior(FieldMixture(s, means, [0.4, 0.6]), OBSERVED)
    g = torch.Generator().manual_seed(0)
    u, v = (s.colour(torch.randn(1, n, generator=g, dtype=torch.float64)) for _ in range(2))
    centre = s.colour(torch.randn(1, n, generator=g, dtype=torch.float64))
    reference = PosteriorInformed.at(posterior, u, smallest=0.0)
    walk = proposal.endswith("walk")
    kernel = Kernel(posterior, proposal, reference, None if walk else centre, temperature=0.7)
    beta = 0.6
    delta = 2 * (1 - 0.8) / 1.8
    eye = torch.eye(n, dtype=torch.float64)
    k = reference.noise(eye).T @ reference.noise(eye)
    prior = s.colour(eye).T @ s.colour(eye)

    def log_pi(x):
        gauss = torch.distributions.MultivariateNormal(torch.zeros(n).double(), prior)
        return 0.7 * posterior.log_likelihood(x) + posterior.prior.log_ratio(x) + gauss.log_prob(x)

    def log_q(x, to):
        if walk:
            return torch.zeros(1)
        if proposal == "pcn":
            mean, spread = centre + 0.8 * (x - centre), beta**2 * k
        else:  # the slope of the density with respect to N(centre, K)
            reference_law = torch.distributions.MultivariateNormal(centre[0], k)
            point = x.clone().requires_grad_()
            (slope,) = torch.autograd.grad((log_pi(point) - reference_law.log_prob(point)).sum(), point)
            mean = centre + ((2 - delta) * (x - centre) + 2 * delta * slope @ k) / (2 + delta)
            spread = 8 * delta / (2 + delta) ** 2 * k
        return torch.distributions.MultivariateNormal(mean[0], spread).log_prob(to)

    expected = log_pi(v) - log_pi(u) + log_q(v, u) - log_q(u, v)
    a, b = kernel.at(u), kernel.at(v)
    got = b.log_density - a.log_density
    if proposal == "pcnl":
        got = kernel._langevin_term(a, b, delta) - kernel._langevin_term(b, a, delta)
    torch.testing.assert_close(got, expected.detach(), rtol=1e-7, atol=1e-8)


def test_a_reference_that_is_the_posterior_has_every_move_accepted():
    for coordinates in COORDINATES:
        s = FunctionSpace(Cosine(), Matern(2.0, 3.0), coordinates)
        posterior = Posterior(FieldMixture(s), OBSERVED)
        mode = find_mode(posterior, torch.zeros(1, 24, dtype=torch.float64))
        k = PosteriorInformed.at(posterior, mode, smallest=0.0)
        x = torch.zeros(5, 24, dtype=torch.float64)
        for proposal in ("pcn", "pcnl"):
            chains = pcn(posterior, x, 20, 0.9, proposal, reference=k, centre=mode)
            assert float(chains.acceptance.min()) == 1


def test_linear_posterior_within_its_errors():
    s = FunctionSpace(Cosine(), Matern(2.0, 3.0), "coefficients")
    posterior, exact = Posterior(FieldMixture(s), OBSERVED), LinearGaussian.of(OBSERVED, s, (16,))
    for proposal, beta in (("pcn", 0.4), ("pcnl", 0.5)):
        chains = pcn(posterior, torch.zeros(300, 16).double(), 140, beta, proposal, warmup=40, thin=10)
        of_chain = chains.states.mean(1)  # chains are independent: their spread is the error
        error = of_chain.std(0) / math.sqrt(300)
        assert float(((of_chain.mean(0) - exact.posterior_mean()) / error).abs().max()) < 4
        squares = (chains.states - exact.posterior_mean()).square().mean(1)
        error = squares.std(0) / math.sqrt(300)
        assert float(((squares.mean(0) - exact.covariance().diagonal()) / error).abs().max()) < 4


def test_acceptance_is_flat_in_the_grid_but_for_random_walks():
    rates = {}
    for n in (32, 256):
        posterior, _ = darcy(n)
        g = torch.Generator().manual_seed(2)
        mode = find_mode(posterior, torch.zeros(1, n, dtype=torch.float64))
        start = mode + PosteriorInformed.at(posterior, mode).noise(torch.randn(200, n, generator=g).double())
        for proposal in ("pcn", "random-walk", "white-walk"):
            chains = pcn(posterior, start, 80, 0.25, proposal, warmup=20, thin=20)
            rates[proposal, n] = float(chains.acceptance.mean())
    # acceptances of 200 chains over 60 moves differ by .1 between chains: .007 in the mean, .01 in a difference
    assert abs(rates["pcn", 256] - rates["pcn", 32]) < 0.04
    assert rates["pcn", 32] == pytest.approx(0.328, abs=0.03)
    # at stationarity a walk accepts about 2 Phi(-beta sqrt(n) / 2) of what pcn does: .48 and .046
    assert rates["random-walk", 256] < 0.2 * rates["random-walk", 32]
    assert rates["white-walk", 256] == 0


def test_langevin_agrees_with_pcn_on_flow_through_a_medium():
    posterior, g = darcy(32)
    mode = find_mode(posterior, torch.zeros(1, 32, dtype=torch.float64))
    k = PosteriorInformed.at(posterior, mode)
    start = mode + k.noise(torch.randn(150, 32, generator=g, dtype=torch.float64))
    exact = pcn(posterior, start, 160, 0.7, reference=k, centre=mode, warmup=40, thin=10)
    found = langevin(posterior, start, 160, 0.15, preconditioner=k, warmup=40, thin=10)
    a, b = exact.states.mean(1), found.states.mean(1)
    error = (a.var(0) / 150 + b.var(0) / 150).sqrt()
    # no bias of Langevin is seen above 4 standard errors and a tenth of a deviation, a third of (gamma b)
    assert float(((a.mean(0) - b.mean(0)).abs() / (4 * error + 0.1 * exact.std())).max()) < 1
    ratio = found.x.var(0) / exact.x.var(0)
    assert float((ratio - 1).abs().max()) < 0.35
    high = found.x[:, 16:].var(0).mean() / posterior.space.variances((32,))[16:].mean()
    assert 0.9 < float(high) < 1.1
    with pytest.raises(StepTooLarge) as caught:
        langevin(posterior, start, 60, 0.05)
    assert caught.value.advised < 0.0125
    assert caught.value.report.product > 2


def test_beta_is_steered_in_warm_up_and_then_left_alone():
    posterior, _ = darcy(32)
    start = find_mode(posterior, torch.zeros(1, 32).double()).expand(100, 32)
    chains = pcn(posterior, start, 300, 0.9, warmup=200, target=0.25, thin=10)
    assert float(chains.acceptance.mean()) == pytest.approx(0.25, abs=0.05)
    assert pcn(posterior, start, 20, 0.3, warmup=10).step == 0.3
    again = pcn(posterior, start, 300, 0.9, warmup=200, target=0.25, thin=10)
    torch.testing.assert_close(again.states, chains.states, rtol=0, atol=0)


def test_priors_without_a_ratio_and_useless_settings_are_refused():
    s = FunctionSpace(Cosine())
    prior = FieldMixture(s)
    x = torch.zeros(2, 8).double()
    with pytest.raises(ValueError, match="no log_ratio"):
        pcn(Posterior(DenoiserPrior(prior), OBSERVED), x, 10)
    with pytest.raises(ValueError, match="beta must lie"):
        pcn(Posterior(prior, OBSERVED), x, 10, 1.5)
    with pytest.raises(ValueError, match="leave nothing to keep"):
        pcn(Posterior(prior, OBSERVED), x, 10, warmup=10)
    with pytest.raises(ValueError, match="no finite density"):
        pcn(Posterior(prior, lambda x: x.sum(1) - math.inf), x, 10)
