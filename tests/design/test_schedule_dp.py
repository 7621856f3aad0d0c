"""Schedules by dynamic programming: exact on candidates, optimal between them, and with the law they tend to."""

import itertools
import json
import math

import pytest
import torch

from undrift.design.gaussian import propagate
from undrift.design.schedule import every_budget, from_density, from_loss_curve, path_kl, step_density
from undrift.design.score_error import Relative
from undrift.design.spectrum import Spectrum
from undrift.process import VE, VP
from undrift.sample import Ancestral, Cosine, LogSigma, Published, Rho, Tangent

HIGH, LOW, DIM = 80.0, 0.002, 64
ENDS = torch.tensor([HIGH, LOW], dtype=torch.float64)
POWER = Spectrum.power_law(DIM)
INFORMATION = float(POWER.information(ENDS[1], ENDS[0]))
BOTH = {"dim": DIM, "information": INFORMATION}
FORMS = ["denoiser", "score"]


def levels(grid, n):
    return VE().sigma(grid.times(VE(), n + 1))


# -- the objective -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "grid", "value"),
    [
        ("score", LogSigma(LOW, HIGH), 150.338440),
        ("score", Rho(7.0, LOW, HIGH), 130.949163),
        ("denoiser", LogSigma(LOW, HIGH), 184.527541),
        ("denoiser", Rho(7.0, LOW, HIGH), 472.024452),
    ],
)
def test_path_kl_is_that_of_the_chains(form, grid, value):
    """Score times 1.1, 20 steps; the values are the KL of the two Gaussian Markov chains, summed step by step."""
    error = Relative(0.1)
    start = 0.5 * float((POWER.variance / HIGH**2 - torch.log1p(POWER.variance / HIGH**2)).sum())
    path = path_kl(lambda s: POWER.mmse(s) + error.excess(POWER, s), levels(grid, 20), form=form, **BOTH)
    assert start + path == pytest.approx(value, abs=6e-7)


# -- golden schedules --------------------------------------------------------------------------------------------------


def test_ten_levels_of_a_power_law():
    """As chosen among 901 candidates, and as they are between them: a step of the candidates is 1.2 per cent."""
    printed = [80, 0.641, 0.195, 0.0845, 0.0437, 0.0248, 0.0148, 0.0089, 0.0054, 0.0033, 0.002]
    digits = [2, 3, 3, 4, 4, 4, 4, 4, 4, 4, 3]
    chosen = from_loss_curve(POWER.mmse, 10, HIGH, LOW, candidates=901, refine=False)
    assert [round(s, d) for s, d in zip(chosen.sigma.tolist(), digits, strict=True)] == printed
    refined = from_loss_curve(POWER.mmse, 10, HIGH, LOW)
    assert float((refined.sigma / chosen.sigma).log().abs().max()) < 0.012
    assert refined.value < chosen.value


@pytest.mark.parametrize(
    ("form", "variance", "value", "kl", "w2"),
    [("denoiser", "posterior", 83.1, 5.29, 2.14), ("score", "forward", 113.1, 6.95, 0.813)],
)
def test_least_path_kl_of_twenty_steps_and_what_its_samples_are(form, variance, value, kl, w2):
    schedule = from_loss_curve(POWER.mmse, 20, HIGH, LOW, candidates=901, form=form, refine=False, **BOTH)
    assert schedule.value == pytest.approx(value, abs=0.05)
    sampler = Ancestral(20, schedule.grid(), final="none", variance=variance)
    law = propagate(sampler.plan(VE()), POWER)
    assert float(law.kl) == pytest.approx(kl, abs=0.005)
    assert float(law.w2) == pytest.approx(w2, abs=0.005 if w2 > 1 else 5e-4)


def mixture_mmse(sigma):
    """Of 0.3 N(-0.7, 0.05^2) + 0.7 N(0.3, 0.1^2): the posterior's variance, integrated under each component."""
    weight = torch.tensor([0.3, 0.7], dtype=torch.float64)
    mean, var = (torch.tensor(v, dtype=torch.float64) for v in ([-0.7, 0.3], [0.0025, 0.01]))
    z = torch.linspace(-9, 9, 201, dtype=torch.float64)  # trapezoids of a smooth integrand that vanishes at the ends
    p = torch.softmax(-0.5 * z.square(), 0)
    v = sigma.square()[:, None, None, None]
    total = var + v  # (N, 1, 1, component)
    y = mean[:, None] + total.sqrt().squeeze(1).mT * z  # (N, drawn component, z)
    r = torch.softmax(weight.log() - 0.5 * total.log() - 0.5 * (y.unsqueeze(-1) - mean).square() / total, -1)
    centre = mean + var / total * (y.unsqueeze(-1) - mean)
    between = r[..., 0] * r[..., 1] * (centre[..., 0] - centre[..., 1]).square()
    return (weight * ((between + (r * (var * v / total)).sum(-1)) * p).sum(-1)).sum(-1)


def test_least_path_kl_of_a_mixture():
    fine = torch.linspace(math.log(LOW), math.log(HIGH), 1001, dtype=torch.float64)
    curve = mixture_mmse(fine.exp())
    information = float(torch.trapezoid(2 * curve * (-2 * fine).exp(), fine))
    slope = {n: from_loss_curve(mixture_mmse, n, HIGH, LOW, information=information).value for n in (10, 40)}
    assert slope[10] == pytest.approx(3.33, abs=0.005)
    assert slope[40] == pytest.approx(0.614, abs=5e-4)
    for n, exp, rho in ((10, 8.80, 38.2), (40, 1.20, 2.46)):
        kl = [
            path_kl(mixture_mmse, levels(g(sigma_min=LOW, sigma_max=HIGH), n), information=information)
            for g in (LogSigma, Rho)
        ]
        assert kl == pytest.approx([exp, rho], rel=5e-3)


# -- optimality --------------------------------------------------------------------------------------------------------


def random_curve(g, rough=False):
    """A positive function of sigma: increasing and smooth as an mmse is, or anything at all."""
    places = torch.linspace(math.log(LOW), math.log(HIGH), 9, dtype=torch.float64)
    logs = torch.randn(9, dtype=torch.float64, generator=g)
    if not rough:
        logs = logs.abs().cumsum(0)

    def loss(sigma):
        if not rough:
            return (torch.sigmoid(1.5 * (sigma.log().unsqueeze(-1) - places)) * logs.exp()).sum(-1)
        right = torch.searchsorted(places, sigma.log()).clamp(1, 8)
        share = (sigma.log() - places[right - 1]) / (places[right] - places[right - 1])
        return torch.lerp(logs[right - 1], logs[right], share).exp()

    return loss


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", range(3))
def test_equals_brute_force(form, seed):
    """All choices of 1 to 4 steps among 10 candidates, on rough curves."""
    loss = random_curve(torch.Generator().manual_seed(seed), rough=True)
    nodes = torch.linspace(math.log(HIGH), math.log(LOW), 10, dtype=torch.float64).exp()
    nodes[0], nodes[-1] = HIGH, LOW
    found = every_budget(loss, 4, HIGH, LOW, candidates=10, form=form, dim=3.0, refine=False)
    for n, schedule in enumerate(found, 1):
        choices = [nodes[[0, *inner, 9]] for inner in itertools.combinations(range(1, 9), n - 1)]
        values = [path_kl(loss, choice, form=form, dim=3.0) for choice in choices]
        best = min(range(len(values)), key=values.__getitem__)
        assert schedule.value == pytest.approx(values[best], rel=1e-13)
        torch.testing.assert_close(schedule.sigma, choices[best], rtol=1e-12, atol=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", range(4))
def test_no_grid_is_better_on_its_own_objective(form, seed):
    g = torch.Generator().manual_seed(seed)
    loss, n = random_curve(g), 7
    best = from_loss_curve(loss, n, HIGH, LOW, form=form, dim=5.0, candidates=300)
    assert path_kl(loss, best.sigma, form=form, dim=5.0) == pytest.approx(best.value, rel=1e-12)
    grids = [c(sigma_min=LOW, sigma_max=HIGH) for c in (LogSigma, Rho, Tangent, Cosine)]
    others = [levels(grid, n) for grid in [*grids, Published("gits-cifar10")]]
    for _ in range(200):
        inner = LOW * (HIGH / LOW) ** torch.rand(n - 1, dtype=torch.float64, generator=g)
        others.append(torch.cat([ENDS[:1], inner.sort(descending=True).values, ENDS[1:]]))
    for _ in range(50):  # and near by
        shift = 0.01 * torch.randn(n - 1, dtype=torch.float64, generator=g)
        others.append(torch.cat([best.sigma[:1], best.sigma[1:-1] * shift.exp(), best.sigma[-1:]]))
    assert min(path_kl(loss, sigma, form=form, dim=5.0) for sigma in others) > best.value


@pytest.mark.parametrize("form", FORMS)
def test_the_refined_optimum_does_not_depend_on_the_candidates(form):
    values = [
        from_loss_curve(POWER.mmse, 12, HIGH, LOW, candidates=m, form=form, **BOTH).value for m in (150, 487, 1201)
    ]
    assert values == pytest.approx([values[0]] * 3, rel=1e-9)


def test_every_budget_is_one_table():
    found = every_budget(POWER.mmse, 12, HIGH, LOW, information=INFORMATION)
    values = [s.value for s in found]
    assert [s.steps for s in found] == list(range(1, 13))
    assert all(a > b for a, b in itertools.pairwise(values))
    alone = from_loss_curve(POWER.mmse, 5, HIGH, LOW, information=INFORMATION)
    assert torch.equal(alone.sigma, found[4].sigma)
    assert alone.value == found[4].value


# -- many steps --------------------------------------------------------------------------------------------------------


def test_the_law_of_many_steps():
    """N times the least path KL falls to (int sqrt f dv)^2 / 4 as 1 + c/N, and the density's quantiles follow."""
    limit = from_density(step_density(POWER), 1, HIGH, LOW).value
    assert limit == pytest.approx(1336, abs=0.5)
    scaled, behind = {}, {}
    for n in (40, 80, 160):
        best = from_loss_curve(POWER.mmse, n, HIGH, LOW, information=INFORMATION)
        scaled[n] = n * best.value
        quantiles = from_density(step_density(POWER), n, HIGH, LOW)
        behind[n] = path_kl(POWER.mmse, quantiles.sigma, information=INFORMATION) / best.value - 1
    assert limit < scaled[160] < 1375.6  # a choice among so many candidates as was printed can only be worse
    assert (scaled[80] - limit) / (scaled[160] - limit) == pytest.approx(2, abs=0.1)
    assert 0 < behind[160] < behind[80] < behind[40] < 0.03


@pytest.mark.parametrize("form", FORMS)
def test_the_density_of_a_curve_is_that_of_its_spectrum(form):
    """Central differences over 1 per cent of sigma are off by h^2/6 of the third derivative in ln v, h = 0.01."""
    sigma = torch.logspace(-1.5, 1.5, 50, dtype=torch.float64)
    exact, measured = step_density(POWER, form)(sigma), step_density(POWER.mmse, form, DIM)(sigma)
    assert float((measured / exact - 1).abs().max()) < 1e-4
    exact, measured = (from_density(step_density(s, form, DIM), 30, HIGH, LOW) for s in (POWER, POWER.mmse))
    assert float((measured.sigma / exact.sigma).log().abs().max()) < 1e-4


def test_the_exponential_grid_is_the_density_of_data_without_variance():
    """J = d/v: f = d/v^2, whose root is uniform in ln v."""
    schedule = from_density(lambda s: DIM / s**4, 9, HIGH, LOW)
    torch.testing.assert_close(schedule.sigma, levels(LogSigma(LOW, HIGH), 9), rtol=1e-6, atol=0)
    assert schedule.value * 9 == pytest.approx(DIM * math.log(HIGH / LOW) ** 2, rel=1e-9)


# -- the result --------------------------------------------------------------------------------------------------------


def test_a_schedule_serves_samplers_and_files():
    schedule = from_loss_curve(POWER.mmse, 8, HIGH, LOW)
    assert schedule.objective == "path KL + a constant, held denoiser"
    for process in (VE(), VP()):
        torch.testing.assert_close(process.sigma(schedule.grid().times(process, 9)), schedule.sigma, rtol=1e-9, atol=0)
        double = schedule.resampled(16)
        reached = process.sigma(schedule.interpolated().times(process, 17))
        torch.testing.assert_close(reached, double.sigma, rtol=1e-9, atol=0)
    assert torch.equal(double.sigma[::2], schedule.sigma)
    assert double.steps == 16
    plain = json.loads(json.dumps(double.to_dict(), allow_nan=False))
    assert plain["value"] is None
    assert "resampled from 8 steps" in plain["objective"]
    assert plain["sigma"] == double.sigma.tolist()


def test_what_cannot_be_scheduled_is_refused():
    with pytest.raises(ValueError, match="n < candidates"):
        from_loss_curve(POWER.mmse, 50, HIGH, LOW, candidates=50)
    with pytest.raises(ValueError, match="needs dim"):
        from_loss_curve(POWER.mmse, 5, HIGH, LOW, form="score")
    with pytest.raises(ValueError, match="'denoiser' or 'score'"):
        from_loss_curve(POWER.mmse, 5, HIGH, LOW, form="noise")
    with pytest.raises(ValueError, match="sigma_min < sigma_max"):
        from_loss_curve(POWER.mmse, 5, LOW, HIGH)
    with pytest.raises(ValueError, match="is not at sigma = 80"):
        from_loss_curve(lambda s: torch.where(s > 10, torch.nan, s), 5, HIGH, LOW)
    with pytest.raises(ValueError, match="strictly decreasing"):
        path_kl(POWER.mmse, torch.tensor([1.0, 2.0]))
    with pytest.raises(ValueError, match="vanishes everywhere"):
        from_density(torch.zeros_like, 5, HIGH, LOW)
