"""Twisted sequential Monte Carlo against the exact law of plans on Gaussian data, where p(y) is known to rounding."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from tests.sample.affine import data_law
from undrift import Diffusion, sample
from undrift.denoise import FieldGaussian, GaussianDenoiser, PseudoInverse
from undrift.observe import GaussianNoise, Matrix, Observation, Points
from undrift.process import CLD, PSLD, VE, VP
from undrift.sample import SSCS, Ancestral, EulerMaruyama, Exponential, Heun, ProbabilityFlow, Quadratic, Uniform
from undrift.sample.shift import lower_roots, shifts
from undrift.sample.twisted import twisted
from undrift.space import Cosine, FunctionSpace, HeatKernel, Matern

MEAN, VARIANCE, NOISE, Y = 0.3, 0.5, 0.4, 1.1
F64 = torch.float64
DATA = GaussianDenoiser([MEAN], VARIANCE)


def log_normal(residual, variance):
    return -0.5 * (residual.square() / variance + (2 * math.pi * variance).log()).sum(-1)


def likelihood(x):
    return log_normal(Y - x, torch.full_like(x, NOISE**2))


def potential(factor):
    """log N(y; x0, s^2 + factor Var[x0 | x~]): the true p(y | x~) at factor 1."""

    def log_g(x, sigma, x0):
        s2 = sigma.square().unsqueeze(-1)
        return log_normal(Y - x0, NOISE**2 + factor * VARIANCE * s2 / (VARIANCE + s2))

    return log_g


def evidence(plan):
    """p(y) under the law of the plan's own output, which is Gaussian: exact."""
    mean, variance = data_law(plan, MEAN, VARIANCE)
    v = torch.tensor(variance + NOISE**2, dtype=F64)
    return float(log_normal(torch.tensor([Y - mean], dtype=F64), v))


PLANS = {
    "ancestral VP": (VP(), Ancestral(20)),
    "ancestral PSLD, forward variance": (PSLD(), Ancestral(24, variance="forward")),
    "Euler VP, no noise last": (VP(), EulerMaruyama(20, noise_last=False)),
    "Euler CLD, noise on the velocity alone": (CLD(), EulerMaruyama(30)),
    "SSCS CLD, half a step of lead": (CLD(), SSCS(40, Quadratic())),
    "SSCS CLD, stages": (CLD(), SSCS(30, Quadratic(), order=2)),
    "Exponential VP, memory": (VP(), Exponential(20, order=3, stochasticity=1.0, guard=False)),
    "Exponential CLD, memory": (CLD(), Exponential(20, order=2, stochasticity=0.7, guard=False)),
    "Heun VE, churned": (VE(), Heun(18, churn=40.0)),
    "no final call": (VP(), Ancestral(20, final="none")),
    "final drift": (PSLD(), Ancestral(20, final="drift")),
}


def run(process, sampler, factor, m, runs, **options):
    log_g = None if factor is None else potential(factor)
    diffusion = Diffusion(process, DATA)
    return twisted(diffusion, likelihood, log_g, m, (1,), sampler, 3, runs=runs, dtype=F64, **options)


def deviation(log_z, log_p):
    """Mean of Z^ / Z over independent runs: how many standard errors from 1, and the standard error."""
    z = (log_z - log_p).exp()
    error = float(z.std() / math.sqrt(len(z)))
    return (float(z.mean()) - 1) / error, error


@pytest.mark.parametrize("name", PLANS)
def test_evidence_is_unbiased_whatever_the_plan_the_potential_and_the_strength(name):
    """Within 4 standard errors over 300 independent runs of 6 particles; each error a few per cent."""
    process, sampler = PLANS[name]
    plan = sampler.plan(process)
    log_p = evidence(plan)
    for factor, options in (
        (1.0, {}),
        (4.0, {"strength": 0.5, "resample": 1.0}),
    ):
        off, error = deviation(run(process, plan, factor, 6, 300, **options).run_log_evidence, log_p)
        assert abs(off) < 4, (factor, options, off, error)
        assert error < 0.08, (factor, options, off, error)


def test_with_the_true_potential_weights_stop_varying_as_steps_grow():
    """The deviation of Z^ / Z of 6 particles falls about like 1 / steps."""
    process = VP()
    spread = []
    for steps in (20, 80):
        plan = Ancestral(steps).plan(process)
        spread.append(float((run(process, plan, 1.0, 6, 300).run_log_evidence - evidence(plan)).std()))
    assert spread[1] < 0.4 * spread[0]
    assert spread[1] < 0.1


def test_the_posterior_is_that_of_the_samplers_own_law():
    """A coarse plan, whose output is N(m, q) with q far from the data's: mean and variance by conjugacy, from 300 runs.

    Runs are independent, so the standard error of a ratio of sums over runs is the delta method's.
    """
    process = VP()
    plan = EulerMaruyama(12, Uniform()).plan(process)
    m, q = data_law(plan, MEAN, VARIANCE)
    assert abs(q / VARIANCE - 1) > 0.05
    gain = q / (q + NOISE**2)
    exact_mean, exact_second = m + gain * (Y - m), (1 - gain) * q + (m + gain * (Y - m)) ** 2
    out = run(process, plan, 1.0, 100, 300)
    w = out.weights.reshape(300, 100)
    for f, exact in ((out.x, exact_mean), (out.x.square(), exact_second)):
        residual = (w * (f.reshape(300, 100) - exact)).sum(1)
        assert float(residual.sum().abs()) < 4 * float(residual.square().sum().sqrt())
    assert torch.allclose(out.mean(), (out.weights.unsqueeze(-1) * out.x).sum(0))
    assert float(out.std()) == pytest.approx(math.sqrt((1 - gain) * q), rel=0.05)


@pytest.mark.parametrize("name", PLANS)
def test_the_shift_of_the_noise_moves_the_mean_as_the_prediction_does(name):
    process, sampler = PLANS[name]
    plan = sampler.plan(process)
    roots = lower_roots(plan)
    assert torch.allclose(roots @ roots.mT, plan.L @ plan.L.mT, rtol=1e-12, atol=0)
    noisy = plan.L.flatten(1).any(1)
    moved = (shifts(plan, roots).unsqueeze(-2) @ roots.mT.unsqueeze(1)).squeeze(-2)
    expected = plan.B[..., 0]
    assert torch.allclose(moved[noisy], expected[noisy], rtol=1e-9, atol=1e-14)
    assert not bool(shifts(plan, roots)[~noisy].any())


def test_without_guidance_and_resampling_it_is_the_samplers_own_walk():
    process = CLD()
    diffusion = Diffusion(process, DATA)
    for sampler in (SSCS(5, order=2), Exponential(6, order=2, stochasticity=1.0)):
        plain = sample(diffusion, 12, (1,), sampler, seed=5, dtype=F64)
        for log_g, strength in ((None, 1.0), (potential(1.0), 0.0)):
            out = twisted(
                diffusion, likelihood, log_g, 12, (1,), sampler, 5, resample=0.0, strength=strength, dtype=F64
            )
            assert torch.allclose(out.x, plain, rtol=1e-12)
            assert torch.allclose(out.log_weights, likelihood(plain).log_softmax(0), atol=1e-9)
            assert not out.resampled_at


def test_batches_and_runs_change_nothing_and_the_seed_everything():
    process = VP()
    whole = run(process, Ancestral(8), 1.0, 5, 4)
    parts = run(process, Ancestral(8), 1.0, 5, 4, batch=7)
    assert torch.equal(whole.x, parts.x)
    assert torch.allclose(whole.log_weights, parts.log_weights, atol=1e-12)
    assert float(whole.log_weights.logsumexp(0)) == pytest.approx(0, abs=1e-12)
    assert whole.log_evidence == pytest.approx(float(whole.run_log_evidence.exp().mean().log()))
    other = twisted(Diffusion(process, DATA), likelihood, potential(1.0), 5, (1,), Ancestral(8), 4, runs=4, dtype=F64)
    assert not torch.equal(whole.x, other.x)


def test_coloured_noise_is_measured_in_its_own_norm():
    """On functions whose noise has covariance C: the same walk in three coordinates, and an unbiased p(y).

    Data N(0, v C), one coefficient observed: the problem of one number, in units of its lambda.
    """
    physical = FunctionSpace(Cosine(), Matern(alpha=2.0))
    grid, v, process = 8, 0.5, CLD()
    lam = float(physical.variances((grid,))[1])
    noise = 0.3 * lam
    plan = Ancestral(20).plan(process)
    _, q = data_law(plan, 0.0, v)
    y = torch.tensor([1.2 * math.sqrt(lam)], dtype=F64)
    log_p = float(log_normal(y, torch.tensor([lam * q + noise], dtype=F64)))
    outs = []
    for coordinates in ("physical", "coefficients", "whitened"):
        space = physical.in_coordinates(coordinates)

        def seen(x, variance, space=space):
            c = space.coefficients(x)[:, 1:2]
            return log_normal(y - c, variance.reshape(-1, 1).expand_as(c))

        def log_g(x, sigma, x0, seen=seen):
            s2 = sigma.square()
            return seen(x0, noise + lam * v * s2 / (v + s2))

        diffusion = Diffusion(process, lambda x, s: x * (v / (v + s.square())).unsqueeze(-1), space)
        outs.append(
            twisted(
                diffusion,
                lambda x, seen=seen: seen(x, torch.full((len(x),), noise, dtype=F64)),
                log_g,
                6,
                (grid,),
                plan,
                2,
                runs=300,
                dtype=F64,
            )
        )
    for out, coordinates in zip(outs[1:], ("coefficients", "whitened"), strict=True):
        assert torch.allclose(out.log_weights, outs[0].log_weights, atol=1e-6)
        assert torch.allclose(physical.in_coordinates(coordinates).decode(out.x), outs[0].x, atol=1e-8)
    off, error = deviation(outs[0].run_log_evidence, log_p)
    assert abs(off) < 4
    assert error < 0.05


def test_single_precision_does_not_show_in_modes_that_have_little_noise():
    """Noise whose highest modes have a variance of 1e-12: rounding of the predictions, in units of it, is of order 1.

    Taken from the slope, guidance in physical coordinates is that of whitened ones, up to the rounding of weights.
    """
    smooth, at = FunctionSpace(Cosine(), HeatKernel(0.1)), Points(((0.3,), (0.6,)))
    seen = Observation(at, GaussianNoise(0.3), torch.tensor([0.8, 0.1]))
    outs = []
    for coordinates in ("physical", "coefficients", "whitened"):
        space = smooth.in_coordinates(coordinates)
        diffusion = Diffusion(VP(), FieldGaussian(space, HeatKernel(0.1)))
        outs.append(twisted(diffusion, seen, PseudoInverse(seen), 20, (64,), Ancestral(12), 0, resample=0.0))
    for out in outs[:2]:
        torch.testing.assert_close(out.log_weights, outs[2].log_weights, rtol=0, atol=0.02)


def test_observations_see_fields_whatever_the_coordinates():
    space = FunctionSpace(Cosine(), Matern(alpha=2.0), "whitened")
    observation = Observation(
        Matrix(torch.ones(1, 8, dtype=F64) / 8), GaussianNoise(0.1), torch.tensor([0.2], dtype=F64)
    )
    diffusion = Diffusion(VP(), lambda x, s: x / (1 + s.square()).unsqueeze(-1), space)
    out = twisted(diffusion, observation, None, 20, (8,), Ancestral(5), 0, dtype=F64)
    assert torch.allclose(out.log_weights, observation.log_likelihood(space.decode(out.x)).log_softmax(0), atol=1e-9)


def test_weights_of_zero_stay_zero_and_count():
    """An event of the data, |x0 - 1.6| < 0.6, by a likelihood of 0 and 1, and with a potential that is 0 too: P within
    4 standard errors."""
    process = VP()
    plan = Ancestral(20).plan(process)
    m, q = data_law(plan, MEAN, VARIANCE)
    normal = torch.distributions.Normal(m, math.sqrt(q))
    p = float(normal.cdf(torch.tensor(2.2)) - normal.cdf(torch.tensor(1.0)))

    def event(x):
        return torch.where((x - 1.6).abs() < 0.6, 0.0, -math.inf).squeeze(-1)

    def log_g(x, sigma, x0):
        far = (x0 < -8 * sigma.unsqueeze(-1) - 0.5).squeeze(-1)  # where no path comes back from
        return (-(x0 - 1.6).square() / (0.4 + sigma.unsqueeze(-1))).squeeze(-1).masked_fill(far, -math.inf)

    diffusion = Diffusion(process, DATA)
    out = twisted(diffusion, event, log_g, 20, (1,), plan, 0, runs=200, dtype=F64)
    assert 0 < int((out.weights == 0).sum()) < 4000
    off, error = deviation(out.run_log_evidence, math.log(p))
    assert abs(off) < 4
    assert error < 0.05
    with pytest.raises(FloatingPointError, match="all weights of a run are 0 at the likelihood"):
        twisted(diffusion, lambda x: event(x - 50.0), None, 20, (1,), plan, 0, dtype=F64)
    with pytest.raises(FloatingPointError, match="not finite at call 0 of 20"):
        twisted(diffusion, event, lambda x, s, x0: x0.sum(1) * math.nan, 20, (1,), plan, 0, dtype=F64)


def test_draws_of_equal_weight_and_warnings():
    process = VP()
    good = run(process, Ancestral(40), 1.0, 400, 2)
    assert good.warnings() == []
    assert "2 x 400 particles" in repr(good)
    x = good.resample(3000, torch.Generator().manual_seed(0))
    values, parent = good.x.unique(return_inverse=True)
    shares = torch.zeros(len(values), dtype=F64).index_add(0, parent.flatten(), good.weights)
    counts = (x == values).sum(0)
    assert int(counts.sum()) == 3000
    assert float((counts - 3000 * shares).abs().max()) < 1 + 1e-9, "systematic"
    assert good.log_evidence_std_error > 0
    assert math.isnan(run(process, Ancestral(5), 1.0, 5, 1).log_evidence_std_error)

    def narrow(x):
        return log_normal(3.0 - x, torch.full_like(x, 1e-4))

    bad = twisted(Diffusion(process, DATA), narrow, None, 300, (1,), Ancestral(10), 0, runs=3, dtype=F64)
    text = " ".join(bad.warnings())
    assert "a few draws carry all weight" in text
    assert "log p(y) differs between runs" in text
    family = run(process, Ancestral(40), 1.0, 30, 1, resample=1.0, strength=0.0)
    assert family.ancestors < 10
    assert "they are one family" in " ".join(family.warnings())


def never(x, sigma):
    raise AssertionError("the model was called")


def refused(process=None, diffusion=None, sampler=Ancestral(3), particles=4, shape=(1,), **options):  # noqa: B008
    diffusion = diffusion or Diffusion(process or VP(), never)
    return twisted(diffusion, likelihood, potential(1.0), particles, shape, sampler, 0, **options)


def blind_to_position():
    process = CLD()
    plan = Ancestral(4).plan(process)
    noise = torch.zeros_like(plan.L)
    noise[:-1, 1, 1] = 0.1
    return refused(diffusion=Diffusion(process, never), sampler=dataclasses.replace(plan, L=noise))


def of_each(particles):
    observation = Observation(Matrix(torch.ones(1, 1)), GaussianNoise(NOISE), torch.ones(particles, 1))
    return twisted(Diffusion(VP(), never), observation, None, particles, (1,), Ancestral(3), 0)


BAD = [
    (lambda: refused(sampler=Exponential(4)), "the steps of Exponential draw no noise"),
    (lambda: refused(sampler=ProbabilityFlow()), "must be a table that draws noise"),
    (lambda: refused(sampler=Ancestral(3).plan(CLD())), "made for another process"),
    (lambda: refused(diffusion=never), "needs a Diffusion or a NoiseDiffusion"),
    (blind_to_position, "row 0 of the plan, called at t = 1, moves channel 0"),
    (lambda: refused(particles=0), "particles must be at least 1, got 0"),
    (lambda: refused(runs=0), "runs must be at least 1"),
    (lambda: refused(batch=0), "batch must be at least 1"),
    (lambda: refused(shape=(0,)), "positive sizes"),
    (lambda: refused(resample=1.5), r"in \[0, 1\], got 1.5"),
    (lambda: refused(strength=math.nan), "strength must be finite"),
    (lambda: refused(label=torch.arange(4)), "label differs between particles"),
    (lambda: of_each(4), r"data of shape \(4, 1\) are one observation for each particle"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_calls_are_refused_before_any_call_of_the_model(call, message):
    with pytest.raises(ValueError, match=message):
        call()
