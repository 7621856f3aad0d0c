"""Levels and weights of training: facts in closed form, and a predicted variance against the measured one."""

import dataclasses
import itertools
import math

import pytest
import torch
from torch import nn

from undrift.config import build, describe
from undrift.denoise import NetworkDenoiser
from undrift.design.schedule import from_loss_curve
from undrift.design.spectrum import Spectrum
from undrift.design.training import (
    LevelProfile,
    gradient_variance,
    max_ratio,
    measure_levels,
    noise_levels,
    residual_balance,
    sampling_weight,
    training_weight,
)
from undrift.networks import MLP
from undrift.train import DefensiveMixture, Denoising, LogNormal, LogUniform, NoiseLevels, Objective, Tabulated
from undrift.train.levels import stratified

EDM = Denoising("edm", LogNormal())


def grid(low, high, n):
    return torch.linspace(math.log(low), math.log(high), n, dtype=torch.float64).exp()


# -- the EDM weight ----------------------------------------------------------------------------------------------------


def test_the_edm_weight_is_one_over_the_mmse_of_a_gaussian():
    sigma = grid(1e-3, 1e3, 100)
    product = EDM.weight(sigma, 0.5) * Spectrum(torch.tensor([0.25])).mmse(sigma)
    torch.testing.assert_close(product, torch.ones_like(sigma), rtol=1e-12, atol=0)


def test_the_irreducible_edm_loss_of_structured_data_dips_in_the_middle():
    sigma = torch.tensor([0.002, 0.02, 0.1, 0.3, 0.5, 1, 3, 10, 80], dtype=torch.float64)
    loss = EDM.weight(sigma, 0.5) * Spectrum.power_law(64).mmse(sigma) / 64
    assert loss.tolist() == pytest.approx([0.999, 0.950, 0.562, 0.302, 0.273, 0.334, 0.652, 0.943, 0.999], abs=6e-4)


def test_the_total_weight_depends_on_what_is_predicted():
    """EDM's bell on the network's error is, on the predicted noise's, a sum of two bells; on x0's, near a third."""
    sigma = grid(1e-4, 1e3, 40001)
    total = EDM.total(sigma, 0.5)
    c_out = sigma * 0.5 / (sigma**2 + 0.25).sqrt()
    bell = LogNormal(-1.2, 1.2).density(sigma)
    torch.testing.assert_close(total * c_out**2, bell, rtol=1e-12, atol=0)
    on_noise = total * sigma**2
    second = math.exp(2 * -1.2 + 2 * 1.2**2) / 0.25
    assert second == pytest.approx(6.46, abs=0.005)
    # Times e^(2 ln sigma), a bell of the same width moves by 2 std^2, to -1.2 + 2.88.
    two = bell + second * LogNormal(1.68, 1.2).density(sigma)
    torch.testing.assert_close(on_noise, two, rtol=1e-10, atol=0)
    assert float(sigma[on_noise.argmax()]) == pytest.approx(5.2, abs=0.05)
    assert float(sigma[total.argmax()].log()) == pytest.approx(-4.08, abs=0.005)


# -- tabulated densities -----------------------------------------------------------------------------------------------

TABLE = Tabulated([0.01, 0.03, 0.4, 0.5, 60.0], [1.0, 5.0, 0.2, 7.0, 0.5])


def test_tabulated_draws_follow_their_density():
    """The largest gap between the distribution of stratified draws and the density integrated by trapezoids: one slice
    at most, and the trapezoids' error, (2e-4)^2 of a piecewise linear function."""
    n = 20_000
    x = TABLE.draw(stratified(n, torch.Generator().manual_seed(0))).log().sort().values
    place = torch.linspace(math.log(0.01), math.log(60), 40_001, dtype=torch.float64)
    cdf = torch.cumulative_trapezoid(TABLE.density(place.exp()), place)
    assert float(cdf[-1]) == pytest.approx(1, abs=1e-6)
    exact = cdf[torch.searchsorted(place, x).clamp(1, len(cdf)) - 1]
    empirical = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    assert float((exact - empirical).abs().max()) < 1 / n + 4e-4  # a density below 1.2 over a trapezoid of 2.2e-4


def test_tabulated_ends_and_dtypes():
    u = torch.tensor([0.0, 1e-12, 0.5, 1 - 1e-12, 1.0], dtype=torch.float64)
    drawn = TABLE.draw(u)
    assert bool((drawn.diff() >= 0).all())
    assert drawn[[0, -1]].tolist() == pytest.approx([0.01, 60.0], rel=1e-12)
    assert TABLE.draw(u.float()).dtype == torch.float32
    outside = TABLE.density(torch.tensor([0.009, 0.01, 60.0, 61.0]))
    assert outside[[0, 3]].tolist() == [0, 0]
    assert bool((outside[1:3] > 0).all())
    flat = Tabulated([0.01, 1.0, 60.0], [3.0, 3.0, 3.0])
    torch.testing.assert_close(flat.draw(u), LogUniform(0.01, 60.0).draw(u), rtol=1e-12, atol=0)


def test_tabulated_refuses_what_is_no_density():
    for sigma, weight in (([1.0], [1.0]), ([1.0, 2.0], [1.0]), ([2.0, 1.0], [1.0, 1.0]), ([1.0, 2.0], [0.0, 1.0])):
        with pytest.raises(ValueError, match="Tabulated"):
            Tabulated(sigma, weight)


# -- other levels, same objective --------------------------------------------------------------------------------------


class Shrink(nn.Module):
    """D(x) = a x, one parameter."""

    sigma_data = 1.0

    def __init__(self, a):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a, dtype=torch.float64))

    def forward(self, x, sigma):
        return self.a * x


def normal_points(n):
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return torch.special.ndtri(u).unsqueeze(-1)


@pytest.mark.parametrize("weighting", ["edm", "uniform", "likelihood"])
def test_visiting_other_levels_leaves_the_objective(weighting):
    """Both estimates within four of their standard errors of the same integral, over the same range."""
    first = LogUniform(0.3, 10.0) if weighting == "likelihood" else DefensiveMixture(0.0, 1.0, 0.3, 10.0, 0.3)
    objective = Denoising(weighting, first)
    other = objective.visiting(Tabulated([0.3, 1.0, 10.0], [4.0, 1.0, 0.5]))
    sigma = grid(0.3, 10.0, 20001)
    error = (0.6 - 1) ** 2 + 0.36 * sigma**2
    exact = float(torch.trapezoid(objective.total(sigma, 1.0) * error, sigma.log()))
    torch.testing.assert_close(other.total(sigma, 1.0), objective.total(sigma, 1.0), rtol=1e-12, atol=0)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(200_000, 1, dtype=torch.float64, generator=g)
    for o in (objective, other):
        with torch.no_grad():
            loss, visited = o.loss(Shrink(0.6), x, g)
        assert abs(float(loss.mean()) - exact) < 4 * float(loss.std()) / len(loss) ** 0.5
    below = float((visited < 1).double().mean())  # the levels themselves are the other's: two trapezoids
    left, right = math.log(1 / 0.3) * 2.5, math.log(10) * 0.75
    assert below == pytest.approx(left / (left + right), abs=1e-5)
    assert describe(build(describe(other), Objective)) == describe(other)


def test_a_file_without_target_is_what_it_was():
    old = build({"type": "Denoising", "weighting": "edm", "noise": {"type": "LogNormal"}}, Objective)
    sigma = grid(0.01, 10, 20)
    assert old.target is None
    assert torch.equal(old.weight(sigma, 0.5), 1 / sigma.square() + 4)


def test_levels_that_the_objective_counts_cannot_be_left_out():
    narrow = Tabulated([0.1, 1.0], [1.0, 1.0])
    with pytest.raises(ValueError, match="never be trained"):
        Denoising("edm").visiting(narrow)
    with pytest.raises(ValueError, match="integral over the levels"):
        Denoising("likelihood", LogUniform(0.01, 10.0)).visiting(narrow)
    with pytest.raises(ValueError, match="leave target out"):
        Denoising("likelihood", target=LogUniform())


# -- measurement -------------------------------------------------------------------------------------------------------


def test_measured_moments_of_one_parameter():
    """With r = a y - x the gradient 2 r y has mean 2 C and variance 4 (Var r Var y + C^2), C = Cov(r, y); each within
    four standard errors at each of five levels."""
    a, levels = 0.3, grid(0.1, 5.0, 5)
    g = torch.Generator().manual_seed(2)
    found = measure_levels(Shrink(a), normal_points(20_001), levels, g, pairs=300, batch=8)
    noise = levels**2
    vy, vr, c = 1 + noise, (a - 1) ** 2 + a**2 * noise, a * (1 + noise) - 1
    for value, error, exact in (
        (found.loss, found.loss_error, vr),
        (found.variance, found.variance_error, 4 * (vr * vy + c**2)),
        (found.signal, found.signal_error, 4 * c**2),
    ):
        assert bool(((value - exact).abs() < 4 * error).all())
    assert float((found.variance_error / found.variance).max()) < 0.1 * 2**0.5  # falls with the root of the pairs
    assert float((found.loss_error / found.loss).max()) < 0.03 * 2**0.5
    assert float(found.noise_scale[-1]) == pytest.approx(float((vr * vy + c**2)[-1] / c[-1] ** 2), rel=0.3)


@pytest.fixture(scope="module")
def trained():
    """A small network after 200 steps on two clusters, its data, and its profile."""
    g = torch.Generator().manual_seed(3)
    torch.manual_seed(0)
    x = 0.1 * torch.randn(4000, 2, generator=g) + torch.tensor([0.5, -0.3]) * (
        1 - 2 * torch.randint(2, (4000, 1), generator=g)
    )
    model = NetworkDenoiser(MLP(2, width=32, depth=2), sigma_data=0.42, sigma_min=0.01, sigma_max=50.0)
    objective = Denoising("edm", DefensiveMixture(sigma_min=0.01, sigma_max=50.0))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(200):
        batch = x[torch.randint(len(x), (128,), generator=g)]
        loss = objective.loss(model, batch, g)[0].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    profile = measure_levels(model, x, grid(0.01, 50.0, 20), g, pairs=40, batch=64)
    return model, x, objective, profile


def batch_variance(model, x, objective, g, pairs=100, batch=64):
    """batch x variance of a batch's gradient, and its standard error, by independent pairs."""
    parameters = list(model.parameters())
    values = []
    for _ in range(pairs):
        grads = []
        for _ in range(2):
            points = x[torch.randint(len(x), (batch,), generator=g)]
            grads.append(torch.autograd.grad(objective.loss(model, points, g)[0].mean(), parameters))
        values.append(0.5 * batch * sum((a - b).double().square().sum() for a, b in zip(*grads, strict=True)))
    values = torch.stack(values)
    return float(values.mean()), float(values.std()) / pairs**0.5


def prediction(profile, objective):
    """Predicted variance, and its standard error from those of the levels."""
    value, squares = gradient_variance(profile, objective), 0.0
    for i, error in enumerate(profile.variance_error):
        moved = profile.variance.clone()
        moved[i] += error
        squares += (gradient_variance(dataclasses.replace(profile, variance=moved), objective) - value) ** 2
    return value, squares**0.5


def test_the_best_levels_lower_the_variance_by_the_predicted_factor(trained):
    """For the likelihood at EDM's levels, about threefold; within four of the standard errors of both."""
    model, x, edm, profile = trained
    objective = Denoising("likelihood", edm.noise)
    g = torch.Generator().manual_seed(4)
    measured, predicted = [], []
    for o in (objective, objective.visiting(noise_levels(profile, objective))):
        measured.append(batch_variance(model, x, o, g))
        predicted.append(prediction(profile, o))
        assert abs(measured[-1][0] - predicted[-1][0]) < 4 * math.hypot(measured[-1][1], predicted[-1][1])
    factor, expected = (pair[0][0] / pair[1][0] for pair in (measured, predicted))
    error = factor * math.hypot(*(e / v for v, e in measured))
    # The errors of the two predictions are those of one profile, and nearly cancel in their ratio.
    assert abs(factor - expected) < 4 * error
    assert factor - 4 * error > 2


def test_edm_levels_are_all_but_the_best_for_the_edm_objective(trained):
    """On its own weight the gradient varies alike at all levels, so the bell itself is within a few per cent."""
    _, _, objective, profile = trained
    best = noise_levels(profile, objective)
    assert 1 < gradient_variance(profile, objective) / gradient_variance(profile, objective, best) < 1.1


def test_no_density_has_less_predicted_variance(trained):
    """Cauchy-Schwarz: the least is the square of an integral, and every other density is above it."""
    _, _, objective, profile = trained
    sigma = grid(0.01, 50.0, 4001)
    spread = profile.at(profile.variance, sigma).sqrt()
    least = float(torch.trapezoid(objective.total(sigma, profile.sigma_data) * spread, sigma.log())) ** 2
    best = noise_levels(profile, objective, share=1e-3, knots=1025)
    assert least < gradient_variance(profile, objective, best) < 1.01 * least
    g = torch.Generator().manual_seed(5)
    for size in (0.2, 1.0):
        for _ in range(5):
            factor = (size * torch.randn(len(best.weight), dtype=torch.float64, generator=g)).exp()
            moved = Tabulated(best.sigma, (torch.tensor(best.weight) * factor).tolist())
            assert gradient_variance(profile, objective, moved) > least
    shared = noise_levels(profile, objective, share=0.25)
    uniform = LogUniform(0.01, 50.0)
    assert bool((shared.density(sigma) >= 0.25 * uniform.density(sigma) * (1 - 1e-9)).all())
    assert math.isinf(gradient_variance(profile, objective, LogUniform(0.1, 10.0)))


def test_balanced_residuals():
    """With the density as target, each of ten equal ranges of ln sigma adds a tenth of the loss."""
    levels = grid(0.01, 50.0, 65)
    curve = Spectrum.power_law(16).mmse(levels) / 16
    zero = torch.zeros_like(levels)
    profile = LevelProfile(levels, curve, zero, curve, zero, curve, zero, 0.5)
    for weighting in ("edm", "uniform"):
        objective = Denoising(weighting, LogUniform(0.01, 50.0))
        balanced = dataclasses.replace(objective, target=residual_balance(profile, objective))
        edges = torch.linspace(math.log(0.01), math.log(50.0), 11, dtype=torch.float64)
        parts = []
        for low, high in itertools.pairwise(edges.tolist()):
            sigma = torch.linspace(low, high, 401, dtype=torch.float64).exp()
            parts.append(torch.trapezoid(balanced.total(sigma, 0.5) * profile.at(curve, sigma), sigma.log()))
        shares = torch.stack(parts) / sum(parts)
        assert float((shares - 0.1).abs().max()) < 1e-3  # of a density linear between knots
    with pytest.raises(ValueError, match="likelihood fixes"):
        residual_balance(profile, Denoising("likelihood"))


# -- training beside sampling ------------------------------------------------------------------------------------------


def test_the_likelihood_weighs_levels_as_every_walk_does():
    schedule = from_loss_curve(Spectrum.power_law(16).mmse, 12, 20.0, 0.01)
    objective = Denoising("likelihood", DefensiveMixture(sigma_min=0.005, sigma_max=50.0))
    sampling, training = sampling_weight(schedule.sigma), training_weight(schedule.sigma, objective)
    torch.testing.assert_close(sampling, training, rtol=1e-3, atol=0)  # trapezoids of e^(-2 ln sigma) over long steps
    assert max_ratio(schedule.sigma, objective) == pytest.approx(1, abs=1e-3)
    fine = grid(0.01, 20.0, 20_001).flip(0)
    density = sampling_weight(fine) / -fine.log().diff()
    middle = (fine[1:] * fine[:-1]).sqrt()
    torch.testing.assert_close(density, middle**-2, rtol=1e-6, atol=0)  # snr d ln sigma


def test_the_largest_ratio_bounds_the_path_kl_of_an_excess():
    objective = Denoising("edm", DefensiveMixture(sigma_min=0.005, sigma_max=50.0))
    sigma = grid(0.01, 20.0, 16).flip(0)
    sampling, training = sampling_weight(sigma), training_weight(sigma, objective, 0.5)
    worst = max_ratio(sigma, objective, 0.5)
    assert worst > 1.2
    g = torch.Generator().manual_seed(6)
    even = sampling.sum() / training.sum()
    excess = torch.rand(500, 15, dtype=torch.float64, generator=g).log().mul(-3).exp()
    gap = (excess @ sampling) / (even * (excess @ training))
    assert float(gap.max()) < worst
    only = torch.zeros(15, dtype=torch.float64)
    only[(sampling / training).argmax()] = 1.0
    assert float(only @ sampling / (even * (only @ training))) == pytest.approx(worst, rel=1e-12)
    assert math.isinf(max_ratio(torch.tensor([0.004, 0.002, 0.001]), objective, 0.5))


def test_what_cannot_be_measured_is_refused():
    g = torch.Generator()
    x = torch.zeros(10, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match="no parameters"):
        measure_levels(nn.Identity(), x, grid(0.1, 1, 3), g)
    with pytest.raises(ValueError, match="increasing"):
        measure_levels(Shrink(0.5), x, grid(0.1, 1, 3).flip(0), g)
    with pytest.raises(ValueError, match="pairs"):
        measure_levels(Shrink(0.5), x, grid(0.1, 1, 3), g, pairs=1)
    assert isinstance(build({"type": "tabulated", "sigma": [0.1, 1], "weight": [1, 2]}, NoiseLevels), Tabulated)
