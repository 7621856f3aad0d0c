"""Objectives against closed forms on Gaussian data."""

import math

import pytest
import torch
from torch import nn

from undrift.denoise import GaussianDenoiser, NetworkDenoiser
from undrift.diffusion import NoiseDiffusion
from undrift.networks import MLP
from undrift.process import CLD, PSLD, VP
from undrift.train import DefensiveMixture, Denoising, LogNormal, LogUniform, NoiseMatching
from undrift.train.levels import stratified

MEAN, VAR = 0.3, 0.25


def gaussian_data(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return MEAN + VAR**0.5 * torch.randn(n, 1, dtype=torch.float64, generator=g), g


class ExactGaussian(nn.Module):
    """The posterior mean for N(MEAN, VAR), with a sigma_data so that the EDM weight is defined."""

    sigma_data = 0.5

    def forward(self, x, sigma):
        s2 = sigma.square().unsqueeze(-1)
        return (VAR * x + s2 * MEAN) / (VAR + s2)


def standard_error(values):
    return float(values.std() / len(values) ** 0.5)


# -- noise levels ------------------------------------------------------------------------------------------------------

LEVELS = {
    "bell": LogNormal(-0.5, 0.9),
    "uniform": LogUniform(0.01, 50.0),
    "mixture": DefensiveMixture(sigma_min=0.01, sigma_max=100.0, share=0.3),
    "narrow mixture": DefensiveMixture(mean=1.0, std=3.0, sigma_min=0.1, sigma_max=10.0, share=0.1),
}


@pytest.mark.parametrize("case", LEVELS)
def test_draws_follow_their_density(case):
    """Kolmogorov-Smirnov distance between a stratified draw and the density integrated by trapezoids.

    Stratified draws miss the distribution function by at most two slices (one per part of the mixture), and the
    trapezoids by less than 1e-4.
    """
    levels, n = LEVELS[case], 20_000
    x = levels.draw(stratified(n, torch.Generator().manual_seed(0))).log().sort().values
    grid = torch.linspace(-9, 9, 200_001, dtype=torch.float64)
    cdf = torch.cumulative_trapezoid(levels.density(grid.exp()), grid)
    assert float(cdf[-1]) == pytest.approx(1, abs=1e-4)
    exact = cdf[torch.searchsorted(grid, x).clamp(max=len(cdf) - 1)]
    empirical = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    assert float((exact - empirical).abs().max()) < 2 / n + 2e-4


def test_stratified_uniforms_fill_every_slice():
    u = stratified(1000, torch.Generator().manual_seed(3))
    assert torch.equal((u * 1000).floor(), torch.arange(1000, dtype=torch.float64))


def test_the_default_levels_reach_where_processes_start():
    """VP starts sampling at sigma(T) near 152, CLD near 150 to 250: one in 30 samples must lie within [80, 300]."""
    reach = float(VP().sigma(1.0))
    assert 100 < reach < 300
    sigma = DefensiveMixture().draw(stratified(100_000, torch.Generator().manual_seed(0)))
    share = float((sigma > 80).double().mean())
    assert share == pytest.approx(0.2 * math.log(300 / 80) / math.log(300 / 0.002), abs=1e-4)
    assert float((LogNormal().draw(stratified(100_000, torch.Generator().manual_seed(0))) > 80).sum()) <= 1


# -- denoising ---------------------------------------------------------------------------------------------------------


def exact_error(sigma):
    return VAR * sigma**2 / (VAR + sigma**2)


@pytest.mark.parametrize("noise", [LogUniform(0.05, 20.0), DefensiveMixture(sigma_min=0.05, sigma_max=20.0)])
def test_likelihood_weight_estimates_half_the_integral_over_snr(noise):
    """1/2 int E||x0 - D||^2 d snr for N(0, v) is 1/2 ln((1 + v snr_max)/(1 + v snr_min)), for any density of levels."""
    x, g = gaussian_data(200_000)
    loss, _ = Denoising("likelihood", noise).loss(ExactGaussian(), x, g)
    exact = 0.5 * math.log((1 + VAR / 0.05**2) / (1 + VAR / 20.0**2))
    assert abs(float(loss.mean()) - exact) < 4 * standard_error(loss)  # stratification only makes the error smaller
    assert standard_error(loss) < 0.01 * exact


def test_edm_and_uniform_weights_of_the_exact_denoiser():
    noise = DefensiveMixture()
    sigma = noise.draw((torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000)
    for weighting, weight in (("edm", 1 / sigma**2 + 1 / 0.25), ("uniform", 1 / sigma**2)):
        x, g = gaussian_data(200_000, seed=1)
        loss, levels = Denoising(weighting, noise).loss(ExactGaussian(), x, g)
        assert abs(float(loss.mean() - (weight * exact_error(sigma)).mean())) < 4 * standard_error(loss)
        assert 0.002 <= float(levels.min()) < 0.0025
        assert 250 < float(levels.max()) <= 300


def test_the_edm_weight_is_unit_weight_on_the_networks_error():
    """A silent network on N(0, sigma_data^2): the target of F is standard normal, so every level's loss is 1."""
    g = torch.Generator().manual_seed(5)
    x = 0.7 * torch.randn(100_000, 1, dtype=torch.float64, generator=g)
    model = NetworkDenoiser(MLP(1, width=8, depth=1), sigma_data=0.7)
    with torch.no_grad():
        loss, sigma = Denoising("edm").loss(model, x, g)
    for part in loss[sigma.argsort()].chunk(4):
        assert abs(float(part.mean()) - 1) < 4 * standard_error(part)


def test_the_library_gaussian_denoiser_is_a_minimum():
    """Moving away from the exact denoiser along any of a few directions raises the loss (same noise, paired)."""
    exact = GaussianDenoiser(torch.tensor([MEAN], dtype=torch.float64), torch.tensor([[VAR]], dtype=torch.float64))
    objective = Denoising("uniform", LogUniform(0.1, 10.0))

    def loss(change):
        x, g = gaussian_data(100_000, seed=2)
        return objective.loss(lambda z, s: exact(z, s) + change(z, s), x, g)[0]

    best = loss(lambda z, s: 0.0)
    for change in (lambda z, s: 0.1, lambda z, s: -0.1, lambda z, s: 0.1 * z, lambda z, s: -0.1 * z):
        gap = loss(change) - best
        assert float(gap.mean()) > 4 * standard_error(gap)


# -- noise matching ----------------------------------------------------------------------------------------------------


class LinearNoise(nn.Module):
    """eps = C_i (1, z / scale), a matrix for each sample given from outside: the best predictor for Gaussian data."""

    def __init__(self):
        super().__init__()
        self.matrix = None

    def forward(self, z, label):
        design = torch.cat([torch.ones_like(z[:, :1]), z], 1)
        return torch.einsum("kj,bj...->bk...", self.matrix.to(z), design)


def exact_network(diffusion, t):
    """Coefficients of the optimal eps for N(MEAN, VAR) data: L'(b + S^-1 (z - mu)), in the network's scaled input."""
    time = torch.tensor([t], dtype=torch.float64)
    root, baseline, scale, *_ = diffusion.coefficients(time)
    mean, full = diffusion.process.kernel(time)
    cov = full @ full.mT + VAR * mean.unsqueeze(-1) * mean.unsqueeze(-2)
    slope = root.mT @ (torch.linalg.inv(cov) + baseline)
    offset = -(root.mT @ torch.linalg.inv(cov) @ (mean * MEAN).unsqueeze(-1))
    return torch.cat([offset, slope * scale.unsqueeze(-2)], -1)[0]


@pytest.mark.parametrize(
    ("t", "expected"),  # published sheet, section 8.7: mean of the minimum HSM losses of both channels
    [(1e-3, 0.4998391295), (0.01, 0.4979492898), (0.1, 0.2928209791), (0.5, 0.0016814931)],
)
def test_minimum_hsm_loss_for_gaussian_data(t, expected):
    process = PSLD(gamma=0.01, nu=4.01)
    network = LinearNoise()
    diffusion = NoiseDiffusion(process, network)
    network.matrix = exact_network(diffusion, t)
    x, g = gaussian_data(100_000)
    times = torch.tensor([t], dtype=torch.float64)
    loss, _ = NoiseMatching().loss_at(diffusion, x, times, g)
    assert abs(float(loss.mean()) - expected) < 4 * standard_error(loss)


@pytest.mark.parametrize("process", [PSLD(gamma=0.02, nu=4.02), CLD()], ids=["PSLD", "CLD"])
@pytest.mark.parametrize(
    "settings",
    [
        {"kernel": "hsm"},
        {"kernel": "dsm"},
        {"kernel": "hsm", "factor": "upper"},
        {"kernel": "hsm", "mixed": True, "data_std": 0.8},
        {"kernel": "dsm", "mixed": True, "factor": "upper"},
    ],
    ids=lambda s: " ".join(str(v) for v in s.values()),
)
def test_every_parametrisation_has_the_true_score_as_its_optimum(process, settings):
    """Least squares of the objective's own targets on (1, z), then the model's score against the exact one.

    The network is a probe: it records its input, and the loss is quadratic in its answer, so its answers 0 and the unit
    vectors give the targets. Coefficients of a regression on n samples have standard error about sd/sqrt(n), at most
    1/sqrt(n) in the noise's units; the score is then compared in those units, L'(s - s_exact), at 6 standard errors.
    """
    t, n = 0.2, 100_000
    network = LinearNoise()
    diffusion = NoiseDiffusion(process, network, **settings)
    x, _ = gaussian_data(n)
    times = torch.tensor([t], dtype=torch.float64)
    answers, inputs = {}, {}

    class Probe(nn.Module):
        def forward(self, z, label):
            inputs["z"] = z
            return self.answer.to(z).unsqueeze(0).expand_as(z)

    probe = Probe()
    probing = NoiseDiffusion(process, probe, **settings)
    for k, answer in enumerate((torch.zeros(2, 1), torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [1.0]]))):
        probe.answer = answer
        answers[k] = NoiseMatching().loss_at(probing, x, times, torch.Generator().manual_seed(1))[0]
    # loss_k = mean over channels of (a_k - target)^2, so loss_0 - loss_k = (2 target_k - 1)/2.
    target = torch.stack([answers[0] - answers[k] + 0.5 for k in (1, 2)], -1)
    design = torch.cat([torch.ones(n, 1, dtype=torch.float64), inputs["z"].squeeze(-1)], -1)
    network.matrix = torch.linalg.lstsq(design, target).solution.mT

    time = torch.tensor([t], dtype=torch.float64)
    mean, full = process.kernel(time)
    cov = (full @ full.mT + VAR * mean.unsqueeze(-1) * mean.unsqueeze(-2))[0]
    z = (mean[0] * MEAN) + torch.tensor([[0.0, 0.0], [0.7, 0.0], [0.0, 0.4], [-0.5, 0.5]], dtype=torch.float64)
    exact = -torch.linalg.solve(cov, (z - mean[0] * MEAN).mT).mT
    score = diffusion.score(z.unsqueeze(-1), t).squeeze(-1)
    miss = (score - exact) @ diffusion.coefficients(time).root[0]
    size = (1 + (z / cov.diagonal().sqrt()).square().sum(1)).sqrt()
    # Correlated inputs inflate the coefficients' error by the design's condition number.
    inflation = float(torch.linalg.cond(design.mT @ design)) ** 0.5
    spread = target.std(0).max().clamp(min=1.0)
    assert float((miss.abs().amax(1) / size).max()) < 6 * float(spread) * inflation / n**0.5
    assert float(miss.abs().max()) < 0.2  # the exact scores in these units are of order one


def test_likelihood_weight_is_the_score_error_in_the_noise_metric():
    """1/2 (T - t_min) ||s - grad log p||^2_{GG'}, computed here from scores in x and v (published sheet, section 3)."""
    process = PSLD(gamma=0.02, nu=4.02)
    diffusion = NoiseDiffusion(process, shaken_mlp(), data_std=0.5)
    x, _ = gaussian_data(64)
    t = torch.linspace(0.05, 0.95, 64, dtype=torch.float64)
    loss, sigma = NoiseMatching("likelihood", t_min=0.01).loss_at(diffusion, x, t, torch.Generator().manual_seed(4))
    z, noise = process.perturb(x, t, torch.Generator().manual_seed(4))
    target = -torch.linalg.solve_triangular(process.kernel(t)[1].mT, noise, upper=True)
    error = (diffusion.score(z, t) - target).squeeze(-1)
    beta, gamma, nu, mass = 8.0, 0.02, 4.02, 0.25
    expected = 0.5 * 0.99 * beta * (gamma * error[:, 0].square() + mass * nu * error[:, 1].square())
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(sigma, process.sigma(t), rtol=1e-10, atol=0)


def shaken_mlp():
    torch.manual_seed(0)
    network = MLP(2, width=16, depth=1)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return network.double()


def test_events_of_any_shape_and_one_channel():
    for process, kernel in ((VP(), "hsm"), (PSLD(), "dsm")):
        x = torch.randn(6, 2, 3)
        diffusion = NoiseDiffusion(process, MLP(6 * process.channels, width=8, depth=1), kernel)
        for weighting in ("uniform", "likelihood"):
            loss, sigma = NoiseMatching(weighting).loss(diffusion, x, torch.Generator().manual_seed(0))
            assert loss.shape == sigma.shape == (6,)
            assert bool(loss.isfinite().all())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Denoising("snr"), "weighting must be 'edm', 'likelihood' or 'uniform', got 'snr'"),
        (lambda: Denoising("likelihood", LogNormal()), "LogNormal has none; use LogUniform"),
        (lambda: Denoising().loss(lambda x, s: x, torch.zeros(2, 1), torch.Generator()), "a model with sigma_data"),
        (lambda: LogNormal(std=0.0), "a positive std, got -1.2 and 0.0"),
        (lambda: LogUniform(1.0, 0.5), "0 < sigma_min < sigma_max < inf, got 1.0 and 0.5"),
        (lambda: DefensiveMixture(share=1.0), r"share must lie in \(0, 1\), got 1.0"),
        (lambda: DefensiveMixture(mean=40.0, std=1.0), "next to no mass"),
        (lambda: NoiseMatching("edm"), "weighting must be 'uniform' or 'likelihood', got 'edm'"),
        (lambda: NoiseMatching(t_min=0.0), "t_min must be positive, got 0.0"),
        (
            lambda: NoiseMatching().loss(NetworkDenoiser(MLP(1)), torch.zeros(2, 1), torch.Generator()),
            "trains a NoiseDiffusion, got a NetworkDenoiser",
        ),
        (
            lambda: NoiseMatching(t_min=2.0).loss(NoiseDiffusion(VP(), MLP(1)), torch.zeros(2, 1), torch.Generator()),
            "t_min = 2.0 must lie below T = 1.0",
        ),
    ],
)
def test_misuse_is_named(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()
