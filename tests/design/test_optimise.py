"""Optimised schedules: published and independently computed optima, optimality itself, corners and errors."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from undrift.config import build
from undrift.design.gaussian import propagate, strangeness
from undrift.design.objective import Descent, Objective, Times
from undrift.design.optimise import Design, family, optimise
from undrift.design.score_error import Noise, Relative
from undrift.design.spectrum import Spectrum
from undrift.process import CLD, VE, VP, LearnedProcess, LinearProcess
from undrift.sample import (
    SSCS,
    Ancestral,
    DPMSolver2M,
    EulerMaruyama,
    Exponential,
    Given,
    Heun,
    LogSigma,
    Published,
    Rho,
    TableSampler,
    Uniform,
)

MIDDLE = Spectrum.power_law(64)
FAMILY = [Spectrum.power_law(64, p) for p in (1.0, 1.5, 2.0, 3.0)]
SPREAD = FAMILY[::2]
BROAD = Rho(3.0, 0.01, 40.0)


def ddim(n: int) -> Exponential:
    return Exponential(n, None, "none", order=1)


def heun(n: int) -> Heun:
    return Heun(n, None, "none")


def between_fixed_ends(sampler, spectra, **settings) -> Design:
    """sigma from 80 to 0.002 exactly, on VE, nothing but the error of the samples counted."""
    fixed = {"sigma_max": 80.0, "free_start": False, "free_end": False, "trust": 0.0, "starts": [Rho()]}
    return optimise(VE(), sampler, spectra, **{**fixed, **settings})


def printed(number: str):
    """What rounds to these digits; a hundredth of the last for the rounding of a rounded number."""
    return pytest.approx(float(number), abs=0.51 * 10.0 ** -len(number.split(".")[1]))


def error(sampler: TableSampler, grid, spectrum: Spectrum, process: LinearProcess | None = None) -> float:
    plan = dataclasses.replace(sampler, grid=grid).plan(process or VE())
    return float(propagate(plan, spectrum).w2)


@pytest.fixture(scope="module")
def ddim_family() -> Design:
    return between_fixed_ends(ddim(10), FAMILY)


@pytest.fixture(scope="module")
def heun_family() -> Design:
    return between_fixed_ends(heun(10), FAMILY)


# -- optima computed by other means: recursions of scalar gains, another optimiser ------------------------------------


@pytest.mark.parametrize(
    ("make", "metric", "n", "optimum", "rho"),
    [
        (ddim, "w2", 5, "1.11", "1.53"),
        (ddim, "w2", 10, ".593", ".850"),
        (ddim, "w2", 20, ".309", ".452"),
        (heun, "w2", 5, "1.35", "2.37"),
        (heun, "w2", 10, ".268", ".504"),
        (heun, "w2", 20, ".059", ".113"),
        (heun, "kl", 5, "5.6", "28.4"),
        (heun, "kl", 20, ".017", ".228"),
    ],
)
def test_optima_on_a_power_law(make, metric, n, optimum, rho):
    found = between_fixed_ends(make(n), MIDDLE, metric=metric)
    assert found.values[0] == printed(optimum)
    plan = dataclasses.replace(make(n), grid=Rho()).plan(VE())
    assert float(getattr(propagate(plan, MIDDLE), metric)) == printed(rho)
    assert [float(found.sigma[0]), float(found.sigma[-1])] == pytest.approx([80.0, 0.002])


def test_the_levels_for_a_family_to_the_digits_given(ddim_family, heun_family):
    levels = ["80.0", "10.9", "5.45", "3.29", "2.08", "1.30", ".782", ".444", ".230", ".092", ".002"]
    assert all(sigma == printed(given) for sigma, given in zip(ddim_family.sigma.tolist(), levels, strict=True))
    assert ddim_family.values == pytest.approx([0.600, 0.595, 0.600, 0.603], abs=5.1e-4)
    assert heun_family.values == pytest.approx([0.251, 0.260, 0.276, 0.353], abs=5.1e-4)


def test_an_optimum_carried_to_other_spectra():
    found = between_fixed_ends(ddim(10), MIDDLE)
    assert [float(found.law(s).w2) for s in FAMILY] == pytest.approx([0.641, 0.610, 0.593, 0.581], abs=5.1e-4)


@pytest.mark.parametrize(
    ("exponent", "levels"),
    [
        (2.5, [80, 9.34, 3.59, 1.47, 0.54, 0.162, 0.002]),
        (2.6, [80, 10.04, 3.886, 1.588, 0.574, 0.163, 0.002]),
    ],
)
def test_six_steps_on_the_spectrum_of_images_are_those_found_along_a_networks_trajectories(exponent, levels):
    """GITS's table for CIFAR-10 came from a network; the spectrum knows one exponent."""
    images = Spectrum.images(32, exponent)
    found = between_fixed_ends(ddim(6), images)
    assert found.sigma.tolist() == pytest.approx(levels, rel=4e-3)
    published = torch.tensor([80.0, 10.9836, 3.8811, 1.584, 0.5666, 0.1698, 0.002])
    if exponent == 2.6:
        assert float((found.sigma / published).log().abs().max()) == pytest.approx(0.09, abs=5e-3)
    else:
        assert found.values[0] == pytest.approx(4.116, abs=5.1e-4)
        others = [error(ddim(6), grid, images) for grid in (Published("gits-cifar10"), Rho(), LogSigma(0.002, 80.0))]
        assert others == pytest.approx([4.134, 5.36, 5.73], abs=5.1e-3)


@pytest.mark.parametrize(("n", "least"), [(5, 1.5), (10, 1.5), (20, 1.4)])
def test_a_family_serves_spectra_it_did_not_contain(n, least):
    """Times closer than rho = 7, with DDIM's steps and free ends, on steeper, flatter and image spectra.

    At 20 steps 1.5 is out of reach for some: on i^-2 itself the best levels gain .452 / .309 = 1.46.
    """
    found = optimise(VE(), Exponential(n, order=1), FAMILY, trust=0.0)
    for other in (Spectrum.power_law(64, 1.25), Spectrum.power_law(64, 2.5), Spectrum.images(16, 2.5)):
        rho = error(Exponential(n, order=1), Rho(), other)
        assert rho / float(found.law(other).w2) >= least


def test_methods_of_higher_order_gain_more():
    for sampler in (Heun(5), DPMSolver2M(5)):
        found = optimise(VE(), sampler, FAMILY, trust=0.0, iterations=40, starts=[Rho()])
        other = Spectrum.images(16, 2.5)
        assert error(sampler, Rho(), other) / float(found.law(other).w2) >= 4


def test_one_eigenvalue_has_the_tangent_law():
    """DDIM's optimum in closed form: equal steps of arctan(sigma / c), which leave cos(step)^N of the deviation."""
    c = 0.5
    found = between_fixed_ends(ddim(10), Spectrum(torch.tensor([c * c])))
    angles = (found.sigma / c).atan()
    step = (math.atan(80 / c) - math.atan(0.002 / c)) / 10
    torch.testing.assert_close(-angles.diff(), torch.full((10,), step, dtype=torch.float64), rtol=0, atol=1e-6)
    left = math.cos(step) ** 10 * math.hypot(c, 0.002)
    exact = 80 / math.hypot(80, c)  # the walk starts from the prior, which is narrower than the data's law there
    assert found.values[0] == pytest.approx(math.hypot(c, 0.002) - left * exact, abs=1e-9)


# -- optimality --------------------------------------------------------------------------------------------------------

SETTINGS = [
    (VP(), Exponential(6, order=1), {}),
    (VP(), DPMSolver2M(4), {"trust": 0.5}),
    (VE(), Heun(5, final="none"), {"metric": "kl"}),
    (CLD(), SSCS(2), {}),
    (VP(), Ancestral(3, final="drift"), {"error": Relative(0.1)}),
    (VE(), EulerMaruyama(3, final="none"), {"free_end": True, "starts": None}),
]


@pytest.mark.parametrize(("process", "sampler", "settings"), SETTINGS)
def test_no_direction_improves_an_optimum_and_no_start_beats_it(process, sampler, settings):
    """Of first order: at distance h the objective falls by less than a thousandth of h, whichever way one goes."""
    settings = {"trust": 3.0, "starts": [BROAD], **settings}
    found = optimise(process, sampler, SPREAD, **settings)
    # None of these takes a resolution.
    objective = Objective(sampler, SPREAD, found.metric, settings.get("error"), settings["trust"], 0.0)
    with torch.no_grad():
        times = process.time(found.sigma)
        assert float(objective(process, times)) == pytest.approx(found.objective, abs=1e-8)
        for grid in (LogSigma(0.002, min(80.0, 0.999 * float(process.sigma(process.horizon)))), Rho(), Uniform()):
            assert float(objective(process, grid.times(process, sampler.nodes))) > found.objective - 1e-3
    logs = times.log().requires_grad_(True)
    (slope,) = torch.autograd.grad(objective(process, logs.exp()), logs)
    inner = slope[1:-1] if sampler.final == "none" and not settings.get("free_end") else slope[1:]
    assert float(inner.abs().max()) < 1e-3
    generator = torch.Generator().manual_seed(0)
    size = 1e-3
    with torch.no_grad():
        for _ in range(20):
            move = torch.randn(len(logs), dtype=torch.float64, generator=generator)
            move[0] = 0 if slope[0] < 0 else move[0]  # at its upper end, where the levels allowed end
            if len(inner) == len(slope) - 2:
                move[-1] = 0
            move = size * move / move.norm()
            assert float(objective(process, (logs + move).exp())) > found.objective - 1e-3 * size


def test_values_and_strangeness_are_those_of_the_plan():
    """Read off the finished table of a spectrum with more eigenvalues than are designed for."""
    fine = [Spectrum.power_law(300, 1.5), Spectrum.power_law(200, 2.0)]
    found = optimise(VP(), DPMSolver2M(5), fine, iterations=5, starts=[Rho()])
    plan = found.plan()
    assert found.values == pytest.approx([float(propagate(plan, s).w2) for s in fine], rel=1e-7)
    per = [float(strangeness(plan, s).sum()) * s.dim for s in fine]
    assert found.strangeness == pytest.approx(sum(per) / 500, rel=1e-7)
    assert found.value == pytest.approx(math.prod(found.values) ** 0.5)
    assert found.gain == pytest.approx(math.prod(found.start_values) ** 0.5 / found.value)
    assert found.gain > 1


def test_the_objective_of_groups_is_that_of_the_spectrum():
    """Groups of eigenvalues change W2 by less than a thousandth of itself."""
    fine = Spectrum.power_law(3000, 1.5)
    objective = Objective(Exponential(8, order=1), fine, "w2", None, 0.0, 0.0)
    times = Rho().times(VP(), 8)
    logs, _ = objective.parts(VP(), times)
    values, _ = objective.report(VP(), times)
    assert len(objective._walks[0].variance) <= 64
    assert float(logs.exp()) == pytest.approx(values[0], rel=1e-3)


def test_trust_keeps_the_denoiser_on_what_it_knows():
    by_trust = [
        optimise(VP(), DPMSolver2M(4), SPREAD, trust=trust, iterations=30, starts=[BROAD])
        for trust in (0.0, 3.0, 100.0)
    ]
    strange, values = [d.strangeness for d in by_trust], [d.value for d in by_trust]
    assert strange == sorted(strange, reverse=True)
    assert values == sorted(values)
    assert strange[2] < 0.3 * strange[0]


def test_an_error_of_the_denoiser_moves_the_schedule():
    """Each design is the better one under the error it was made for, by far more than an optimum is known to."""
    noisy, spectra = Noise(0.5), FAMILY[1:3]
    exact = optimise(VP(), Ancestral(4), spectra, trust=0.0, starts=[BROAD])
    aware = optimise(VP(), Ancestral(4), spectra, trust=0.0, error=noisy, starts=[BROAD])

    def under(design: Design, error) -> float:
        return sum(math.log(float(design.law(s, error).w2)) for s in spectra) / 2

    assert under(aware, noisy) < under(exact, noisy) - 1e-4
    assert under(exact, None) < under(aware, None) - 1e-4
    assert math.log(aware.value) == pytest.approx(under(aware, noisy), abs=1e-6)


# -- levels by another sampler -----------------------------------------------------------------------------------------


def test_levels_found_by_another_sampler_are_its_own_and_values_are_those_of_the_sampler():
    """Its own law would have chosen others, at which it does better on these spectra."""
    settings = {"starts": [BROAD], "trust": 3.0, "iterations": 8}
    order1, multistep = Exponential(4, order=1), DPMSolver2M(4)
    theirs = optimise(VP(), order1, SPREAD, **settings)
    found = optimise(VP(), multistep, SPREAD, by=order1, **settings)
    own = optimise(VP(), multistep, SPREAD, **settings)
    assert torch.equal(found.sigma, theirs.sigma)
    assert type(found.sampler) is DPMSolver2M
    plan = dataclasses.replace(multistep, grid=Given(theirs.sigma.tolist(), sigma=True)).plan(VP())
    values = [float(propagate(plan, s).w2) for s in SPREAD]
    assert found.values == pytest.approx(values, rel=1e-6)
    assert found.strangeness == pytest.approx(sum(float(strangeness(plan, s).sum()) for s in SPREAD) / 2, rel=1e-6)
    assert own.value < 0.9 * found.value
    assert error(multistep, BROAD, SPREAD[0], VP()) >= found.start_values[0] * (1 - 1e-6)


@pytest.mark.parametrize(
    ("by", "message"),
    [
        (Exponential(5, order=1), "as many times as the sampler, 4, and end with final='predict', got 5 and 'predict'"),
        (Exponential(3, final="none", order=1), "got 4 and 'none'"),
        (Exponential(4, final="drift", order=1), "got 4 and 'drift'"),
    ],
)
def test_levels_of_other_numbers_or_ends_are_refused(by, message):
    with pytest.raises(ValueError, match=message):
        optimise(VP(), DPMSolver2M(4), MIDDLE, by=by)


# -- resolution --------------------------------------------------------------------------------------------------------


def test_the_kl_of_a_prediction_is_compared_at_a_resolution():
    """Directions without variance neither count nor spoil the KL; at a given level it is that of the smoothed laws."""
    black = Spectrum(torch.cat([MIDDLE.variance, torch.zeros(10), torch.full((10,), 1e-14)]))
    found = optimise(VP(), Exponential(8, order=1), black, metric="kl", trust=0.0, iterations=40, starts=[BROAD])
    plan = found.plan()
    assert found.values[0] == pytest.approx(float(propagate(plan, black).smoothed(0.002).kl), rel=1e-6)
    assert float(propagate(plan, black).kl) > 100 * found.values[0]
    coarse = optimise(
        VP(), Exponential(8, order=1), black, metric="kl", trust=0.0, resolution=0.1, iterations=40, starts=[BROAD]
    )
    assert float(propagate(plan, black).smoothed(0.1).kl) > coarse.values[0]
    assert coarse.values[0] == pytest.approx(float(coarse.law(black).smoothed(0.1).kl), rel=1e-6)


def test_the_kl_of_a_walk_that_ends_with_noise_needs_no_resolution():
    found = optimise(VP(), Exponential(8, final="none", order=1), MIDDLE, metric="kl", trust=0.0, iterations=5)
    assert found.values[0] == pytest.approx(float(found.law(MIDDLE).kl), rel=1e-6)


# -- corners -----------------------------------------------------------------------------------------------------------


def test_one_call_is_a_search_over_one_level():
    """Brute force over levels finds the same."""
    found = optimise(VP(), Exponential(1, order=1), MIDDLE, trust=0.0)
    levels = torch.linspace(math.log(0.05), math.log(80), 100, dtype=torch.float64).exp().tolist()
    brute = min(error(Exponential(1, order=1), Given([level], sigma=True), MIDDLE, VP()) for level in levels)
    assert brute * 0.998 < found.values[0] <= brute


def test_two_calls_are_a_search_over_two_levels():
    found = optimise(VP(), Exponential(2, order=1), MIDDLE, trust=0.0)
    levels = torch.linspace(math.log(0.05), math.log(80), 12, dtype=torch.float64).exp().tolist()
    brute = min(
        error(Exponential(2, order=1), Given([high, low], sigma=True), MIDDLE, VP())
        for i, low in enumerate(levels)
        for high in levels[i + 1 :]
    )
    assert brute * 0.9 < found.values[0] <= brute


def test_ends_stay_within_the_levels():
    narrow = optimise(VP(), Exponential(5, order=1), MIDDLE, sigma_max=3.0, sigma_min=0.5, iterations=5, starts=[BROAD])
    assert float(narrow.sigma[0]) <= 3.0 * (1 + 1e-9)
    assert float(narrow.sigma[-1]) >= 0.5 * (1 - 1e-9)
    top = float(CLD().sigma(1.0))
    beyond = optimise(CLD(), Exponential(4, order=1), MIDDLE, sigma_max=10 * top, iterations=3, starts=[BROAD])
    assert float(beyond.sigma[0]) <= top * (1 + 1e-9)
    fixed = optimise(VP(), Exponential(4, order=1), MIDDLE, sigma_max=20.0, free_start=False, iterations=3)
    assert float(fixed.sigma[0]) == pytest.approx(20.0)


def test_a_single_step_between_free_and_fixed_ends():
    found = optimise(VP(), Exponential(1, None, "none", order=1), MIDDLE, trust=0.0)
    assert found.sigma.shape == (2,)
    assert float(found.sigma[-1]) == pytest.approx(0.002)


def test_steps_that_vanish_have_a_floor():
    """Numbers far apart ask for equal times; the table still has its steps."""
    times = Times.of(VP(), 6, 80.0, 0.002, True, True, changes=False)
    for changes in (False, True):
        times = Times.of(VP(), 6, 80.0, 0.002, True, True, changes)
        numbers = torch.tensor([900.0, -900.0, -900.0, -900.0, -900.0, 0.0, 0.0], dtype=torch.float64)
        at = times(VP(), numbers)
        assert bool((at.diff() < 0).all())
        assert DPMSolver2M(6).table(VP(), at).A.isfinite().all()


@pytest.mark.parametrize("nodes", [1, 2, 7])
@pytest.mark.parametrize("changes", [False, True])
def test_numbers_and_times_are_inverse(nodes, changes):
    for free_start, free_end in ((True, True), (True, False), (False, True)):
        times = Times.of(VP(), nodes, 80.0, 0.002, free_start, free_end, changes)
        numbers = torch.linspace(-1, 0.7, times.size, dtype=torch.float64)
        at = times(VP(), numbers)
        assert at.shape == (nodes,)
        torch.testing.assert_close(times(VP(), times.back(VP(), at)), at, rtol=1e-6, atol=0)


def test_the_gradient_is_the_derivative():
    """Along random directions of the times and of each parameter, levels as coordinates, by central differences."""
    generator = torch.Generator().manual_seed(0)
    for sampler in (SSCS(4), Heun(3, final="none"), Exponential(3, None, "drift", order=2)):
        learned = LearnedProcess.like(CLD(), learn=("Q", "D", "S", "start"), floor=1e-4)
        objective = Objective(sampler, FAMILY[:2], "w2", None, 3.0, 0.0)
        times = Times.of(learned, sampler.nodes, 80.0, 0.002, True, True, changes=True)
        descent = Descent(objective, learned, times, [p for p in learned.parameters() if p.requires_grad])
        with torch.no_grad():
            flat = descent.numbers(LogSigma(0.05, 8.0).times(learned, sampler.nodes))
        flat = flat + 0.05 * torch.randn(len(flat), dtype=torch.float64, generator=generator).numpy()
        _, gradient = descent.value(flat)
        parts = [times.size, *(p.numel() for p in descent.parameters)]
        for i, part in enumerate(torch.randn(len(flat), dtype=torch.float64, generator=generator).split(parts)):
            pieces = [part / part.norm() if i == j else torch.zeros(n) for j, n in enumerate(parts)]
            along = torch.cat(pieces).double().numpy()
            slope = (descent.value(flat + 1e-5 * along)[0] - descent.value(flat - 1e-5 * along)[0]) / 2e-5
            assert gradient @ along == pytest.approx(slope, rel=1e-5, abs=1e-6)


# -- what comes out ----------------------------------------------------------------------------------------------------


def test_the_same_arguments_give_the_same_design(ddim_family):
    again = between_fixed_ends(ddim(10), FAMILY)
    assert torch.equal(again.sigma, ddim_family.sigma)
    assert again.evaluations == ddim_family.evaluations


def test_under_no_grad_and_with_progress(ddim_family):
    lines: list[str] = []
    with torch.no_grad():
        again = between_fixed_ends(ddim(10), FAMILY, say=lines.append)
    assert torch.equal(again.sigma, ddim_family.sigma)
    assert len(lines) == 1
    assert "->" in lines[0]


def test_a_design_is_plain_data_and_a_schedule(ddim_family):
    data = json.loads(json.dumps(ddim_family.to_dict()))
    assert data["values"] == pytest.approx([0.600, 0.595, 0.600, 0.603], abs=5.1e-4)
    plan = build(data["sampler"], TableSampler).plan(build(data["process"], LinearProcess))
    assert [float(propagate(plan, s).w2) for s in FAMILY] == pytest.approx(data["values"], rel=1e-9)
    schedule = ddim_family.schedule
    assert schedule.steps == 10
    assert schedule.value == pytest.approx(ddim_family.value)
    assert schedule.objective == "W2 of Exponential on VE"
    torch.testing.assert_close(schedule.grid().times(VE(), 11), ddim_family.sigma)


def test_a_learned_process_is_designed_for_as_it_stands():
    learned = LearnedProcess.like(CLD())
    found = optimise(learned, Exponential(4, order=1), MIDDLE, iterations=3, starts=[BROAD])
    assert all(p.grad is None for p in learned.parameters())
    before = float(found.law(MIDDLE).w2)
    with torch.no_grad():
        learned.D_raw.mul_(2)
    assert float(found.law(MIDDLE).w2) == before


# -- families and errors -----------------------------------------------------------------------------------------------


def test_a_family_keeps_trace_and_mean():
    middle = Spectrum(torch.tensor([4.0, 1.0, 0.0]), torch.tensor([1.0, 0.0, 2.0]), torch.tensor([1.0, 2.0, 3.0]))
    flat, same, steep = family(middle)
    for member in (flat, same, steep):
        assert member.second_moment == pytest.approx(middle.second_moment)
        assert float(member.variance[2]) == 0
    torch.testing.assert_close(same.variance, middle.variance)
    ratios = [float(s.variance[0] / s.variance[1]) for s in (flat, same, steep)]
    assert ratios == pytest.approx([4**0.7, 4.0, 4**1.3])


def test_errors_come_before_the_work():
    sampler = Exponential(4, order=1)
    with pytest.raises(ValueError, match="SSCS splits off a stationary process"):
        optimise(VE(), SSCS(4), MIDDLE)
    with pytest.raises(ValueError, match="0 < sigma_min < sigma_max"):
        optimise(VP(), sampler, MIDDLE, sigma_max=0.001)
    with pytest.raises(ValueError, match="CLD reaches no more than"):
        optimise(CLD(), sampler, MIDDLE, sigma_min=1e6, sigma_max=1e7)
    with pytest.raises(ValueError, match="at least one spectrum"):
        optimise(VP(), sampler, [])
    with pytest.raises(ValueError, match="'w2' or 'kl'"):
        optimise(VP(), sampler, MIDDLE, metric="fid")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="trust"):
        optimise(VP(), sampler, MIDDLE, trust=-1.0)
    with pytest.raises(ValueError, match="resolution"):
        optimise(VP(), sampler, MIDDLE, resolution=math.nan)
    with pytest.raises(ValueError, match="2 times between fixed ends"):
        optimise(VP(), ddim(1), MIDDLE, free_start=False)
    with pytest.raises(ValueError, match="1 times between fixed ends"):
        optimise(VP(), Exponential(1), MIDDLE, free_start=False, free_end=False)
    with pytest.raises(ValueError, match="needs 4 times"):
        optimise(VP(), sampler, MIDDLE, starts=[Given([3.0, 2.0, 1.0], sigma=True)])
    with pytest.raises(ValueError, match="no start gives Exponential a finite error"):
        optimise(VP(), sampler, MIDDLE, starts=[])
    with pytest.raises(ValueError, match="above -1"):
        family(MIDDLE, [-1.0])
    with pytest.raises(ValueError, match="all eigenvalues are zero"):
        family(Spectrum(torch.zeros(3)))
