"""Bounds are bounds, tight where they should be, and the worst case is what it is said to be."""

import math

import pytest
import torch

from undrift.denoise import MixtureDenoiser
from undrift.design.bounds import (
    exponential_worst_case,
    mmse_bound,
    moment_bound,
    path_bounds,
    rho_factor,
    score_bound,
)
from undrift.design.curves import MixtureCurve
from undrift.design.path import path_steps, start_kl
from undrift.design.spectrum import Spectrum
from undrift.process import CLD, MALDA, PSLD, VE, VP, LinearClock, Recipe
from undrift.sample import LogSigma, Rho

VP_, CLD_, PSLD_, MALDA_, VE_ = VP(), CLD(), PSLD(), MALDA(), VE()


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def recipe(generator):
    q, d = torch.empty(3, 3, dtype=torch.float64), torch.empty(3, 2, dtype=torch.float64)
    q.normal_(generator=generator), d.normal_(generator=generator)
    return Recipe(d @ d.T, q - q.T, None, LinearClock(0.1, 10.0))


def data(generator, kind):
    draws = torch.empty(3, 3, dtype=torch.float64).normal_(generator=generator)
    if kind == "spectrum":
        return Spectrum((2 * draws[0]).exp(), draws[1], draws[2].abs() * 5 + 1)
    return MixtureCurve(MixtureDenoiser(draws[0].exp(), 2 * draws[1].unsqueeze(-1), (2 * draws[2] - 2).exp()))


@pytest.mark.parametrize("kind", ["spectrum", "mixture"])
@pytest.mark.parametrize("held", ["prediction", "score"])
@pytest.mark.parametrize("seed", range(6))
def test_bounds_are_bounds(seed, held, kind):
    """Over random data, processes and grids; slack for rounding only."""
    generator = torch.Generator().manual_seed(seed)
    process = (VP_, VE_, CLD_, PSLD_, MALDA_, recipe(generator))[seed]
    top = float(process.sigma(process.horizon))
    inner = torch.empty(9, dtype=torch.float64).uniform_(generator=generator)
    low = 0.01 if seed < 5 else 0.1
    levels = low * (top / low) ** inner.sort(descending=True).values
    times = process.time(levels)
    model = data(generator, kind)
    steps = path_steps(process, times, held)
    exact, slack = steps.discretisation(model), 1e-9
    assert (exact > -slack).all()
    per_step = mmse_bound(steps, model)
    assert (exact <= per_step * (1 + slack) + slack).all()
    whole = float(moment_bound(steps, model.dim, model.second_moment))
    assert float(per_step.sum()) <= whole * (1 + slack)
    assert 0 <= float(start_kl(process, times[0], model)) <= float(start_kl(process, times[0], model, known=False))
    # The lemma of the second bound: an error of the prediction weighs less where the step has more noise.
    assert (steps.weight <= path_steps(process, times, "prediction").weight * (1 + slack)).all()
    weight = torch.empty(8, dtype=torch.float64).normal_(generator=generator).exp()
    excess = torch.empty(8, dtype=torch.float64).normal_(generator=generator).exp()
    assert float(steps.score(excess).sum()) <= float(score_bound(steps, weight, excess)) * (1 + slack)
    # ... with equality where training weighs as sampling does.
    assert float(score_bound(steps, steps.weight, excess)) == pytest.approx(float(steps.score(excess).sum()), rel=1e-12)
    bounds = path_bounds(process, steps, model)
    assert bounds.moments == whole
    assert bounds.mmse == float(per_step.sum())


def test_the_start_on_ve_is_the_second_moment_over_the_noise():
    spectrum = Spectrum(f64(1.0, 0.2), f64(0.5, -0.3), f64(3.0, 5.0))
    bound = float(start_kl(VE_, 80.0, spectrum, known=False))
    assert bound == pytest.approx(spectrum.second_moment / (2 * 80**2), rel=1e-12)


def test_the_bounds_on_a_held_score_are_sharp_without_variance():
    times = VE_.time(torch.logspace(1, -2, 21, dtype=torch.float64))
    steps, nothing = path_steps(VE_, times, "score"), Spectrum(f64(0.0), count=64.0)
    exact = float(steps.discretisation(nothing).sum())
    assert float(mmse_bound(steps, nothing).sum()) == pytest.approx(exact, rel=1e-12)
    assert float(moment_bound(steps, 64.0, 0.0)) == pytest.approx(exact, rel=1e-12)


def test_weights_that_fall_along_the_walk():
    """One long step and a short one: the largest weight so far counts, times the least of d sigma^2 and E|x0|^2.

    Summed by parts with the weights themselves the bound would be 0.02, and false.
    """
    steps = path_steps(VE_, f64(10.0, 1.0, 0.99), "prediction")
    found = float(moment_bound(steps, 1.0, 1.0))
    assert found == pytest.approx(0.5 * (1 - 0.01) * 1.0, rel=1e-12)
    assert 0.1 < float(steps.discretisation(Spectrum(f64(1.0))).sum()) < found
    assert float(moment_bound(steps, 0.002, 1.0)) == pytest.approx(0.5 * 0.99 * 0.2, rel=1e-12)


def test_held_score_on_ve_has_the_published_shape():
    """d sum (ln r - 1 + 1/r), and a second sum of order m2^2 sum (1/v): both in closed form."""
    sigma = Rho(sigma_min=0.002, sigma_max=80, rho=7.0).times(VE_, 21)
    steps = path_steps(VE_, sigma, "score")
    v = sigma.square()
    r = v[:-1] / v[1:]
    torch.testing.assert_close(steps.gathered - steps.spent, r.log() - 1 + 1 / r, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(steps.weight, (1 - 1 / r) / v[:-1], rtol=1e-12, atol=0)
    # Never above the cruder sup over the step of (v - v_{k+1}) / v^2, which follows from -J' <= d/v^2 + mmse'/v^2.
    inside = torch.minimum(2 * v[1:], v[:-1])
    assert (steps.weight <= (inside - v[1:]) / inside.square() * (1 + 1e-12)).all()


@pytest.mark.parametrize(("rho", "factor"), [(7.0, 1.206), (5.0, 1.435), (3.0, 2.58), (2.0, 7.05), (20.0, 1.024)])
def test_polynomial_against_exponential_in_the_worst_case(rho, factor):
    ratio, n, nothing = 40000.0, 4000, Spectrum(f64(0.0))
    assert rho_factor(rho, ratio) == pytest.approx(factor, abs=0.5 * 10 ** -(3 if factor < 2 else 2))
    cost = {}
    for name, grid in (("exp", LogSigma(0.002, 80)), ("rho", Rho(sigma_min=0.002, sigma_max=80, rho=rho))):
        steps = path_steps(VE_, grid.times(VE_, n + 1), "score")
        cost[name] = float(steps.discretisation(nothing).sum())
    limit = exponential_worst_case(1.0, ratio, n)
    # The summand u - 1 + e^-u = u^2/2 - u^3/6 + ...: relative corrections of a third of the longest step in ln v.
    assert cost["exp"] == pytest.approx(limit, rel=math.log(ratio) * 2 / n)
    assert cost["exp"] < limit
    longest = 2 * rho * (ratio ** (1 / rho) - 1) / n
    assert cost["rho"] / cost["exp"] == pytest.approx(rho_factor(rho, ratio), rel=longest)


def test_equal_ratios_are_optimal_in_the_worst_case():
    nothing, generator = Spectrum(f64(0.0)), torch.Generator().manual_seed(0)
    even = torch.linspace(math.log(80), math.log(0.002), 21, dtype=torch.float64)

    def cost(log_sigma):
        return float(path_steps(VE_, VE_.time(log_sigma.exp()), "score").discretisation(nothing).sum())

    least = cost(even)
    for _ in range(10):
        other = even.clone()
        other[1:-1] += 0.1 * torch.empty(19, dtype=torch.float64).normal_(generator=generator)
        assert cost(other) > least


def test_a_weight_must_be_positive():
    steps = path_steps(VE_, f64(2.0, 1.0, 0.5), "score")
    with pytest.raises(ValueError, match="positive weight for each of 2 steps"):
        score_bound(steps, f64(1.0, 0.0), f64(1.0, 1.0))
