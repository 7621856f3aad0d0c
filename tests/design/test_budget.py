"""The path KL is what it is said to be, term by term, and the budget's other half is the exact law, switched."""

import dataclasses
import json
import math

import pytest
import torch
from torch.distributions import MultivariateNormal

from undrift.denoise import MixtureDenoiser
from undrift.design.attribution import attribute
from undrift.design.budget import budget
from undrift.design.curves import MixtureCurve
from undrift.design.gaussian import propagate, trajectory
from undrift.design.loss import LossCurve
from undrift.design.path import chain_kl, held_by, is_chain, path_steps, start_kl
from undrift.design.score_error import Bias, Noise, Relative
from undrift.design.spectrum import Spectrum
from undrift.process import CLD, MALDA, PSLD, VE, VP, FlowMatching, LinearClock, Recipe
from undrift.sample import (
    SSCS,
    Ancestral,
    DPMSolver2M,
    EulerMaruyama,
    Exponential,
    Given,
    Heun,
    LogSigma,
    Rho,
)


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


GRIDS = {"exp": LogSigma(0.002, 80), "rho 7": Rho(sigma_min=0.002, sigma_max=80, rho=7.0)}
HELD = {"prediction": "posterior", "score": "forward"}
POWER = Spectrum.power_law(64)
LINE = MixtureDenoiser([0.3, 0.7], [[-0.7], [0.3]], [0.05**2, 0.1**2])
FEW = Spectrum(f64(1.0, 0.3, 0.01, 0.0), f64(0.5, -0.2, 1.0, 0.0), f64(1.0, 2.0, 3.0, 1.0))
RECIPE = Recipe(
    [[0.5, 0.2, 0.0], [0.2, 1.0, 0.3], [0.0, 0.3, 2.0]], [[0, 1.5, -0.7], [-1.5, 0, 0.4], [0.7, -0.4, 0]], None,
    LinearClock(0.1, 10.0),
)  # fmt: skip
PROCESSES = {
    "VP": VP(),
    "VE": VE(),
    "flow matching": FlowMatching(),
    "CLD": CLD(),
    "PSLD": PSLD(),
    "MALDA": MALDA(),
    "recipe": RECIPE,
}


def ancestral(held, steps=20, grid=None, final="none"):
    return Ancestral(steps=steps, grid=grid, final=final, variance=HELD[held])


def path(grid, held, error=None, steps=20, data=POWER):
    return budget(VE(), ancestral(held, steps, GRIDS[grid]), data, error, attribution=False).path


# -- the identity ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("held", "grid", "expected"),
    [
        ("score", "exp", 150.338440),
        ("score", "rho 7", 130.949163),
        ("prediction", "exp", 184.527541),
        ("prediction", "rho 7", 472.024452),
    ],
)
def test_golden_numbers(held, grid, expected):
    """Score times 1.1, from two independent routes, to all digits of a third."""
    found = path(grid, held, Relative(0.1))
    assert found.kl == pytest.approx(expected, abs=6e-7)
    assert found.start == pytest.approx(6.4e-7, abs=5e-9)
    chain = chain_kl(ancestral(held, grid=GRIDS[grid]).plan(VE()), POWER, Relative(0.1))
    assert float(chain.sum()) == pytest.approx(found.kl, rel=1e-12)
    if held == "prediction":  # the sum over a loss curve, and nothing else
        sigma = found.steps.sigma
        loss = POWER.mmse(sigma[:-1]) + Relative(0.1).excess(POWER, sigma[:-1])
        riemann = 0.5 * float((loss * sigma.square().reciprocal().diff()).sum())
        assert found.fixed + riemann == pytest.approx(found.kl, rel=1e-12)


@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("name", PROCESSES)
def test_the_terms_add_up_to_the_kl_of_the_chains(name, held):
    """Step by step, for any process, variances that vanish, means, and errors that scale or shift."""
    process = PROCESSES[name]
    low = 0.05 if name == "recipe" else 0.01
    plan = ancestral(held, 8, LogSigma(low)).plan(process)
    times = torch.cat([plan.start.reshape(1), plan.after])
    steps, start = path_steps(process, times, held), float(start_kl(process, times[0], FEW))
    for error in (None, Relative(0.1), Relative(lambda s: 0.3 / (1 + s)), Bias(0.05), Bias(lambda s: 0.1 * s)):
        excess = torch.zeros(8, dtype=torch.float64) if error is None else error.excess(FEW, steps.sigma[:-1])
        terms = steps.discretisation(FEW) + steps.score(excess)
        chain = chain_kl(plan, FEW, error)
        assert float(chain[0]) == pytest.approx(start, abs=1e-12)
        # Rounding: 1e-13 of the conditional covariances' size, which is below 1 after whitening, per coordinate.
        torch.testing.assert_close(chain[1:], terms, rtol=1e-10, atol=1e-10)
        assert (steps.discretisation(FEW) > 0).all()


@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("name", ["VP", "CLD", "recipe"])
def test_fresh_noise_costs_what_a_fixed_error_costs_if_it_is_known(name, held):
    """KL of (walk, noise): the step's KL averaged over a bias of 1 and -1 times its deviation, which is quadratic."""
    process, grid = PROCESSES[name], LogSigma(0.05)
    plan = ancestral(held, 6, grid).plan(process)
    steps = path_steps(process, torch.cat([plan.start.reshape(1), plan.after]), held)
    noise = Noise(lambda s: 0.03 * s.square(), share="equal")
    known = steps.discretisation(FEW) + steps.score(noise.excess(FEW, steps.sigma[:-1]))
    deviation = math.sqrt(0.03 / FEW.dim)
    pair = [chain_kl(plan, FEW, Bias(lambda s, k=k: k * deviation * s))[1:] for k in (1, -1)]
    torch.testing.assert_close(0.5 * (pair[0] + pair[1]), known, rtol=1e-9, atol=1e-9)
    widened = chain_kl(plan, FEW, noise)[1:]
    assert (widened <= known * (1 + 1e-12)).all()
    assert float(widened.sum()) < float(known.sum())


def test_chain_kl_is_the_kl_of_joint_laws():
    """Three times of one coordinate, with a bias or noise: dense joint Gaussians of the whole chain."""
    for name, bias, rough in (("VP", 0.1, 0.0), ("CLD", 0.1, 0.0), ("MALDA", 0.0, 0.04), ("VP", 0.0, 0.04)):
        process = PROCESSES[name]
        times = process.time(f64(20.0, 1.0, 0.3))
        plan, k = ancestral("score", 2).table(process, times), process.channels
        lam, mean = 0.4, 0.7
        exact = torch.zeros(3 * k, 3 * k, dtype=torch.float64)
        for i in range(3):
            for j in range(i, 3):  # times[i] >= times[j]
                phi, root = process.marginal(times[j])
                there, _ = process.transition(times[j], times[i])
                cov = lam * torch.outer(phi[:, 0], phi[:, 0]) + root @ root.T
                block = there @ cov
                exact[i * k : (i + 1) * k, j * k : (j + 1) * k] = block
                exact[j * k : (j + 1) * k, i * k : (i + 1) * k] = block.T
        centre = torch.cat([process.marginal(t)[0][:, 0] * mean for t in times])
        maps = [torch.cat([plan.prior, torch.zeros(k, 2 * k + 2, dtype=torch.float64)], -1)]
        shift = [torch.zeros(k, dtype=torch.float64)]
        for i in range(2):
            snr, row = process._weights(times[i])
            gain = lam / (lam + 1 / snr)
            column = plan.B[i, 0, :, 0]
            step = plan.A[i, 0] + gain * torch.outer(column, row)
            own = torch.zeros(k, 3 * k + 2, dtype=torch.float64)
            own[:, (i + 1) * k : (i + 2) * k] = plan.L[i]
            own[:, 3 * k + i] = math.sqrt(rough) * column
            maps.append(step @ maps[-1] + own)
            shift.append(step @ shift[-1] + column * ((1 - gain) * mean + bias))
        root = torch.cat(maps)
        ours = MultivariateNormal(torch.cat(shift), root @ root.T)
        expected = torch.distributions.kl_divergence(MultivariateNormal(centre, exact), ours)
        found = chain_kl(plan, Spectrum(f64(lam), mean), Noise(rough) if rough else Bias(bias)).sum()
        assert float(found) == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("name", ["VP", "CLD"])
def test_the_identity_holds_for_data_that_is_not_gaussian(name, held):
    """A mixture with two channels: log ratios of true and sampled transitions, over draws, to 4 standard errors.

    p(z_{k+1} | z_k) by Bayes' rule from the mixtures that z_k and z_{k+1} are; the denoiser is off by a constant.
    """
    process, bias = PROCESSES[name], 0.1
    times = process.time(f64(1.0, 0.4))
    plan = ancestral(held, 1).table(process, times)
    k, n, generator = process.channels, 100_000, torch.Generator().manual_seed(7)

    def law(t):
        phi, root = process.marginal(t)
        m = phi[:, 0]
        covs = LINE.covs[:, None, None] * torch.outer(m, m) + root @ root.T
        return MixtureDenoiser(LINE.weights, LINE.means * m, covs)

    z1, _ = process.perturb(LINE.sample(n, generator), times[1], generator)
    z1 = z1.squeeze(-1)
    there, root = process.transition(times[1], times[0])
    z0 = z1 @ there.T + torch.empty(n, k, dtype=torch.float64).normal_(generator=generator) @ root.T
    forward = MultivariateNormal(z1 @ there.T, scale_tril=root)
    true = law(times[1]).log_prob(z1) + forward.log_prob(z0) - law(times[0]).log_prob(z0)
    x, sigma = process.statistic(z0.unsqueeze(-1), times[0])
    guess = LINE(x, sigma) + bias
    cov = plan.L[0] @ plan.L[0].T
    ours = MultivariateNormal(z0 @ plan.A[0, 0].T + guess * plan.B[0, 0, :, 0], cov)
    ratio = true - ours.log_prob(z1)
    steps, curve = path_steps(process, times, held), MixtureCurve(LINE)
    expected = float((steps.discretisation(curve) + steps.score(f64(bias**2))).sum())
    error = float(ratio.std()) / math.sqrt(n)
    assert error < 0.02 * expected
    assert abs(float(ratio.mean()) - expected) < 4 * error
    # The start, from the same draws.
    prior = process.prior(times[0])
    gap = law(times[0]).log_prob(z0) - MultivariateNormal(torch.zeros(k).double(), prior @ prior.T).log_prob(z0)
    start = float(start_kl(process, times[0], curve))
    assert abs(float(gap.mean()) - start) < 4 * float(gap.std()) / math.sqrt(n)


def test_a_held_prediction_costs_the_same_on_every_process():
    levels = torch.logspace(math.log10(60), -2, 13, dtype=torch.float64)
    error, bits = Relative(0.1), []
    for name in ("VE", "VP", "CLD", "PSLD", "MALDA"):
        process = PROCESSES[name]
        found = budget(
            process, ancestral("prediction", 12, Given(levels.tolist(), sigma=True)), POWER, error, attribution=False
        )
        torch.testing.assert_close(found.sigma, levels, rtol=1e-9, atol=0)
        bits.append(torch.stack([found.path.discretisation, found.path.score]))
    for other in bits[1:]:
        torch.testing.assert_close(other, bits[0], rtol=1e-6, atol=1e-9)  # levels are met to rounding in time
    # A held score is another thing on another process.
    costs = [
        float(path_steps(PROCESSES[name], PROCESSES[name].time(levels), "score").discretisation(POWER).sum())
        for name in ("VE", "VP", "CLD")
    ]
    assert costs[0] == pytest.approx(costs[1], rel=1e-6)  # one channel: a change of scale
    assert costs[2] > 1.2 * costs[0]


def test_who_holds_what():
    assert held_by(Ancestral()) == "prediction"
    assert held_by(Ancestral(variance="forward")) == "score"
    assert held_by(Exponential(order=1, stochasticity=1.0)) == "prediction"
    for other in (Exponential(order=2, stochasticity=1.0), Exponential(order=1, stochasticity=0.5), EulerMaruyama()):
        assert held_by(other) is None
    # Exponential integration of order 1 is ancestral sampling on any process: its chain has the same KL.
    for name in ("VP", "CLD"):
        process = PROCESSES[name]
        sampler = Exponential(steps=6, order=1, stochasticity=1.0, final="none", grid=LogSigma(0.05))
        expected = budget(process, sampler, POWER, attribution=False).path.kl
        assert float(chain_kl(sampler.plan(process), POWER).sum()) == pytest.approx(expected, rel=1e-6)


def test_chains_that_are_not():
    process, data = VP(), FEW
    for sampler in (DPMSolver2M(), Heun(), Exponential(order=2), SSCS()):
        plan = sampler.plan(process)
        assert not is_chain(plan)
        with pytest.raises(ValueError, match="no chain"):
            chain_kl(plan, data)
    final = chain_kl(Ancestral(steps=5).plan(process), data)
    assert final[:-1].isfinite().all()
    assert final[-1] == math.inf
    deterministic = chain_kl(Exponential(steps=5, order=1, final="none").plan(process), data)
    assert deterministic[0].isfinite()
    assert (deterministic[1:] == math.inf).all()
    # Noise on one channel of two does not reach the data within a step.
    assert (chain_kl(EulerMaruyama(steps=5, final="none").plan(CLD()), data)[1:] == math.inf).all()
    euler = chain_kl(EulerMaruyama(steps=300, final="none").plan(process), data)
    assert euler.isfinite().all()


# -- tables ---------------------------------------------------------------------------------------------------------

WORST = Spectrum(torch.zeros(1, dtype=torch.float64), count=64.0)
ERRORS = {
    "none": lambda s: 0.0 * s,
    "0.05": lambda s: 64 * 0.05 * s.square(),
    "2": lambda s: 64 * 2.0 * s.square(),
    "2 below 0.05": lambda s: 64 * 2.0 * s.square() * (s < 0.05),
    "2 above 5": lambda s: 64 * 2.0 * s.square() * (s > 5),
}  # of the noise prediction, per coordinate


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (WORST, {"none": (260.0, 282.4), "0.05": (281, 302), "2": (1096, 1074), "2 below 0.05": (511, 447),
                 "2 above 5": (511, 563)}),
        (POWER, {"none": (147.7, 128.1), "0.05": (169, 148), "2": (984, 920), "2 below 0.05": (399, 293),
                 "2 above 5": (399, 409)}),
    ],
    ids=["worst case", "power law"],
)  # fmt: skip
def test_polynomial_against_exponential(data, expected):
    """E_D + E_S of the held score for 20 steps of a perfect and of poor scores, to the digits printed."""
    for name, values in expected.items():
        for grid, value in zip(GRIDS, values, strict=True):
            steps = path_steps(VE(), GRIDS[grid].times(VE(), 21), "score")
            terms = steps.discretisation(data) + steps.score(ERRORS[name](steps.sigma[:-1]))
            assert float(terms.sum()) == pytest.approx(value, abs=0.051 if name == "none" else 0.51)


def test_in_the_worst_case_the_better_grid_changes_at_an_error_of_one():
    """E_D + E_S = const - (1 - e^2) d/2 sum (1 - 1/r): the grids tie at e^2 = 1, and change places there."""

    def gap(e2):
        costs = []
        for grid in GRIDS.values():
            steps = path_steps(VE(), grid.times(VE(), 21), "score")
            excess = 64 * e2 * steps.sigma[:-1].square()
            costs.append(float((steps.discretisation(WORST) + steps.score(excess)).sum()))
        return costs[1] - costs[0]

    assert abs(gap(1.0)) < 1e-9
    assert gap(0.99) > 0.1
    assert gap(1.01) < -0.1


@pytest.mark.parametrize(
    ("held", "grid", "kl", "marginal", "w2"),
    [
        ("prediction", "exp", 176.9, 4.42, 0.859),
        ("prediction", "rho 7", 464.6, 8.15, 0.816),
        ("score", "exp", 147.7, 4.43, 1.33),
        ("score", "rho 7", 128.1, 6.27, 1.06),
    ],
)
def test_path_and_last_state_disagree(held, grid, kl, marginal, w2):
    found = budget(VE(), ancestral(held, grid=GRIDS[grid]), POWER, attribution=False)
    assert found.path.kl == pytest.approx(kl, abs=0.051)
    assert float(found.marginal.last.kl) == pytest.approx(marginal, abs=0.0051)
    assert float(found.marginal.last.w2) == pytest.approx(w2, abs=0.0051 if w2 > 1 else 0.00051)
    assert found.marginal.truncation == pytest.approx(1.9e-4, abs=5e-6)
    assert found.marginal.final is None


@pytest.mark.parametrize(
    ("steps", "expected", "digit"), [(10, (8.80, 38.2), (0.0051, 0.051)), (40, (1.20, 2.46), (0.0051, 0.0051))]
)
def test_a_mixture_on_the_line(steps, expected, digit):
    for grid, value, last in zip(GRIDS, expected, digit, strict=True):
        assert path(grid, "prediction", steps=steps, data=MixtureCurve(LINE)).kl == pytest.approx(value, abs=last)


# -- the budget -----------------------------------------------------------------------------------------------------


def test_the_last_state_is_no_worse_than_the_path():
    """Data processing, over processes, errors and both samplers."""
    errors = (Relative(0.2), Bias(0.1), Noise(0.1))
    for held in HELD:
        for i, (name, process) in enumerate(PROCESSES.items()):
            sampler = ancestral(held, 7, LogSigma(0.05))
            for error in (None, errors[i % 3]):
                found = budget(process, sampler, POWER, error, attribution=False)
                assert 0 < float(found.marginal.last.kl) < found.path.kl, (held, name, error)


def test_a_final_call_comes_after_the_path():
    process, grid = CLD(), LogSigma(0.05)
    with_call = budget(process, ancestral("prediction", 7, grid, "predict"), POWER, Relative(0.1), attribution=False)
    without = budget(process, ancestral("prediction", 6, grid), POWER, Relative(0.1), attribution=False)
    assert with_call.path.kl == pytest.approx(without.path.kl, rel=1e-12)
    torch.testing.assert_close(with_call.marginal.last.cov, without.marginal.last.cov, rtol=1e-10, atol=0)
    plan = ancestral("prediction", 7, grid, "predict").plan(process)
    torch.testing.assert_close(with_call.marginal.final.kl, propagate(plan, POWER, Relative(0.1)).kl)
    assert with_call.marginal.samples is with_call.marginal.final
    # Predicting from exact z at sigma: variance lambda^2 / (lambda + sigma^2).
    lam = POWER.variance
    after = (lam.sqrt() - lam / (lam + 0.05**2).sqrt()).square().sum().sqrt()
    assert with_call.marginal.finish == pytest.approx(float(after), rel=1e-6)


def test_all_that_depends_on_the_schedule_is_a_sum_over_its_steps():
    for held in HELD:
        for process in (VE(), CLD()):
            fixed = [
                budget(process, ancestral(held, n, LogSigma(0.01, 60)), POWER, attribution=False).path for n in (5, 40)
            ]
            assert fixed[0].fixed == pytest.approx(fixed[1].fixed, rel=1e-10)
            for p in fixed:
                s = p.steps
                varies = 0.5 * float((s.weight * POWER.mmse(s.sigma[:-1]) - POWER.dim * s.spent).sum())
                assert p.fixed + varies == pytest.approx(p.kl, rel=1e-9)
                assert float(p.share.sum()) * p.kl == pytest.approx(p.kl - p.start, rel=1e-12)


def test_a_measured_loss_is_an_error():
    """A curve of mmse plus a known error, through its own interpolation: the reference makes it exact."""
    sigma = torch.logspace(-3, 2.5, 40, dtype=torch.float64)
    curve = LossCurve(sigma, 1.3 * POWER.mmse(sigma), reference=POWER)
    sampler = ancestral("score", grid=GRIDS["exp"])
    found = budget(VE(), sampler, POWER, curve, attribution=False)
    given = budget(VE(), sampler, POWER, lambda s: 0.3 * POWER.mmse(s), attribution=False)
    torch.testing.assert_close(found.path.score, given.path.score, rtol=1e-9, atol=0)
    torch.testing.assert_close(found.marginal.last.kl, given.marginal.last.kl, rtol=1e-9, atol=0)
    # As data, the curve hides the network's error in the discretisation: the steps are short of its information.
    alone = budget(VE(), sampler, curve)
    lost = 0.5 * 0.3 * float(POWER.information(f64(0.002), f64(80.0)))
    assert alone.marginal is None
    steps = [float((b.path.discretisation + b.path.score).sum()) for b in (alone, found)]
    assert steps[0] == pytest.approx(steps[1] - lost, rel=1e-9)
    assert 0 <= alone.path.start <= alone.path.bounds.start


def test_other_samplers():
    found = budget(VP(), DPMSolver2M(steps=8), POWER, Relative(0.1), refine=8)
    assert (found.path, found.chain) == (None, None)
    assert found.marginal.final is not None
    ode = budget(VP(), Exponential(steps=8, order=1), POWER, attribution=False)
    assert float(ode.chain.sum()) == math.inf
    euler = EulerMaruyama(steps=300, final="none")
    found = budget(VP(), euler, POWER, attribution=False)
    assert float(found.chain.sum()) == pytest.approx(float(chain_kl(euler.plan(VP()), POWER).sum()), rel=1e-12)
    assert float(found.marginal.last.kl) < float(found.chain.sum())


def switched(*args, **options):
    return {s.name: s for s in attribute(*args, **options)}


def test_switches_switch():
    process, sampler, error = VE(), ancestral("score", 10, LogSigma(0.01, 3.0), "predict"), Bias(0.05)
    times = sampler.grid.times(process, 10)
    found, plan = switched(process, sampler, times, POWER, error, refine=4), sampler.plan(process)
    fine = dataclasses.replace(sampler, steps=37).plan(process)  # a geometric grid, cut in four, is one again
    cases = {
        "all": (plan, error, "prior"),
        "all but start": (plan, error, "exact"),
        "all but score": (plan, None, "prior"),
        "only discretisation": (plan, None, "exact"),
        "all but discretisation": (fine, error, "prior"),
        "only score": (fine, error, "exact"),
        "only start": (fine, None, "prior"),
        "none": (fine, None, "exact"),
    }
    assert set(cases) == set(found)
    for name, (table, wrong, start) in cases.items():
        law = propagate(table, POWER, wrong, start)
        assert found[name].kl == pytest.approx(float(law.kl), rel=1e-8), name
        assert found[name].w2 == pytest.approx(float(law.w2), rel=1e-8), name
    assert len({round(s.kl, 9) for s in found.values()}) == len(cases)


def test_switches_that_change_nothing_change_nothing():
    process, sampler = VE(), ancestral("prediction", 10, GRIDS["exp"])
    times = sampler.grid.times(process, 11)
    # No variance: the prior is the exact law, so the start is no source, alone or with others.
    none = Spectrum(f64(0.0), 0.0, f64(3.0))
    found = switched(process, sampler, times, none, Relative(0.1), refine=4)
    assert (found["only start"].kl, found["only start"].w2) == (found["none"].kl, found["none"].w2)
    assert found["all"].kl == pytest.approx(found["all but start"].kl, rel=1e-12)
    # An error of nothing.
    found = switched(process, sampler, times, POWER, Relative(0.0), refine=4)
    assert (found["only score"].kl, found["only score"].w2) == (found["none"].kl, found["none"].w2)
    assert (found["all but score"].kl, found["all but score"].w2) == (found["all"].kl, found["all"].w2)
    plain = switched(process, sampler, times, POWER, refine=4)
    assert set(plain) == {"all", "only start", "only discretisation", "none"}
    assert plain["only start"].kl == pytest.approx(found["only start"].kl, rel=1e-12)


def test_without_discretisation_the_error_vanishes_with_the_square_of_the_steps():
    """KL of the last state falls by 16 where the steps are a fourth; both orders of the expansion are of that size."""
    process, sampler = VE(), ancestral("prediction", 20, GRIDS["exp"])
    times = sampler.grid.times(process, 21)
    few, many = (switched(process, sampler, times, POWER, refine=r)["none"] for r in (4, 16))
    assert few.kl / many.kl == pytest.approx(16, rel=0.1)
    assert few.w2 / many.w2 == pytest.approx(4, rel=0.1)
    all_on = switched(process, sampler, times, POWER, refine=16)
    law = propagate(sampler.table(process, times), POWER)
    assert (all_on["all"].kl, all_on["all"].w2) == (float(law.kl), float(law.w2))


def test_the_start_alone_is_carried_by_the_exact_flow():
    """An ODE keeps its start: variances end at (lambda + v_N) v_0 / (lambda + v_0)."""
    process, sampler = VE(), Heun(steps=20, grid=LogSigma(0.01, 3.0), final="none")
    times = sampler.grid.times(process, 21)
    found = switched(process, sampler, times, POWER, refine=32)["only start"]
    lam = POWER.variance
    ratio = 9.0 / (lam + 9.0)
    kl = 0.5 * (1 / ratio - 1 + ratio.log()).sum()
    w2 = ((lam + 1e-4).sqrt() * (1 - ratio.sqrt())).square().sum().sqrt()
    # Second order in steps of ln 300 / 640 = 0.009 each.
    assert found.kl == pytest.approx(float(kl), rel=2e-3)
    assert found.w2 == pytest.approx(float(w2), rel=2e-3)


def test_noise_is_held_where_the_grid_is_refined():
    """Fresh at each call it would average out; held, it tends to a limit at first order, as a relative error does."""
    process, sampler = VE(), ancestral("prediction", 12, GRIDS["exp"])
    times = sampler.grid.times(process, 13)
    for error in (Noise(lambda s: 0.2 * POWER.mmse(s)), Relative(0.1)):
        kl = [switched(process, sampler, times, POWER, error, refine=r)["only score"].kl for r in (32, 64, 128)]
        assert (kl[2] - kl[1]) / (kl[1] - kl[0]) == pytest.approx(0.5, abs=0.05)
        limit = 2 * kl[2] - kl[1]
        assert limit == pytest.approx(kl[2], rel=0.1)
        assert limit > 10 * switched(process, sampler, times, POWER, refine=128)["none"].kl


def test_the_final_call_is_one_call_on_any_grid():
    """Noise there alone adds its own variance to samples that are too narrow: W2 = sqrt p - sqrt q."""
    process, sampler, one = VE(), ancestral("prediction", 6, LogSigma(0.3), "predict"), Spectrum(f64(1.0))
    times = sampler.grid.times(process, 6)
    found = switched(process, sampler, times, one, Noise(lambda s: 0.02 * (s < 0.31)), refine=4)
    narrow, wider = ((1 - found[name].w2) ** 2 for name in ("none", "only score"))
    assert wider - narrow == pytest.approx(0.02, rel=1e-6)


def test_text_and_numbers():
    found = budget(CLD(), ancestral("score", 5, LogSigma(0.05), "predict"), POWER, Relative(0.1), refine=4)
    text, numbers = str(found), json.loads(json.dumps(found.to_dict()))
    for word in ("path KL", "start", "discretisation", "score", "after the final call", "truncation", "only start"):
        assert word in text
    assert f"{found.path.kl:.5g}" in text
    assert numbers["path"]["kl"] == found.path.kl
    assert sum(numbers["marginal"]["final"]["kl_modes"]) == pytest.approx(float(found.marginal.final.kl), rel=1e-12)
    assert numbers["attribution"]["all"]["w2"] == float(found.marginal.final.w2)
    assert numbers["path"]["bounds"]["mmse"] >= sum(numbers["path"]["discretisation"])
    laws = trajectory(ancestral("score", 5, LogSigma(0.05), "predict").plan(CLD()), POWER, Relative(0.1))
    assert numbers["marginal"]["last"]["kl"] == float(laws[-2].kl)


def test_arguments_are_checked():
    sampler = Ancestral(steps=4)
    with pytest.raises(ValueError, match="Relative acts on the eigenvalues"):
        budget(VP(), sampler, MixtureCurve(LINE), Relative(0.1))
    with pytest.raises(ValueError, match="refine"):
        budget(VP(), sampler, POWER, refine=1)
    with pytest.raises(ValueError, match="not be negative"):
        budget(VP(), sampler, POWER, -1.0)
    with pytest.raises(ValueError, match="strictly decreasing"):
        budget(VP(), sampler, POWER, times=f64(0.1, 0.2, 0.3, 0.4))
    with pytest.raises(ValueError, match="held must be"):
        path_steps(VP(), f64(0.5, 0.1), "both")
    with pytest.raises(ValueError, match="strictly decreasing"):
        path_steps(VP(), f64(0.1, 0.5), "score")
    one = budget(VP(), dataclasses.replace(sampler, steps=1), POWER, refine=4)
    assert one.path is None
    assert float(one.marginal.final.kl) > 0
