"""The loop that runs plans: laws by Monte Carlo, seeds, trajectories, both kinds of diffusion, and bad calls."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from undrift import Diffusion, NoiseDiffusion, sample
from undrift.denoise import GaussianDenoiser, MixtureDenoiser
from undrift.process import CLD, MALDA, PSLD, VE, VP, FlowMatching
from undrift.sample import (
    SSCS,
    Ancestral,
    DPMSolver2M,
    EulerMaruyama,
    Exponential,
    Given,
    Heun,
    LogSigma,
    ProbabilityFlow,
    Quadratic,
    Rho,
    Trajectory,
    Uniform,
)

from .affine import law

GAUSSIAN = GaussianDenoiser(torch.tensor([0.3]), 0.25)
SAMPLERS = {
    "EM": EulerMaruyama(40),
    "SSCS": SSCS(12, Quadratic()),
    "SSCS2": SSCS(8, Quadratic(), order=2),
    "ancestral": Ancestral(12),
    "exponential 3": Exponential(24, order=3),
    "stochastic": Exponential(24, order=2, stochasticity=0.7),
    "2M": DPMSolver2M(12),
    "Heun": Heun(40),
    "drift": EulerMaruyama(60, Uniform(), "drift"),
}


class ExactNoise:
    """The exact noise prediction for scalar Gaussian data in the shape of a network: it undoes scale and label."""

    def __init__(self, process, **settings):
        self.process = process
        self.diffusion = NoiseDiffusion(process, self, **settings)

    def __call__(self, scaled, label):
        t = self.process.time(torch.exp(4 * label[:1].double()))
        root, baseline, scale, *_ = self.diffusion.coefficients(t)
        z = scaled.double() * scale[0].reshape(1, -1, 1)
        score = Diffusion(self.process, GAUSSIAN).score(z, t)
        residual = torch.einsum("kl,blj->bkj", baseline[0], z) - score
        return torch.einsum("lk,blj->bkj", root[0], residual).to(scaled)


@pytest.mark.parametrize("process", [VP(), PSLD(), MALDA()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("name", SAMPLERS)
def test_monte_carlo_agrees_with_the_exact_law_of_the_plan(process, name):
    """Mean and variance of 20 000 walks within 4.5 standard errors of the recursion (27 pairs: 4e-4 by chance)."""
    plan = SAMPLERS[name].plan(process)
    mean, cov = law(plan, 0.3, 0.25)
    n = 20_000
    x = sample(Diffusion(process, GAUSSIAN), n, (1,), plan, seed=1, dtype=torch.float64).squeeze(1)
    variance = float(cov[0, 0])
    assert abs(float(x.mean() - mean[0])) < 4.5 * math.sqrt(variance / n)
    assert abs(float(x.var()) - variance) < 4.5 * variance * math.sqrt(2 / n)


@pytest.mark.parametrize("process", [VP(), CLD(), PSLD()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(
    "settings", [{}, {"mixed": True, "data_std": 0.5}, {"factor": "upper"}], ids=["plain", "mixed", "upper"]
)
def test_a_noise_network_runs_under_every_sampler(process, name, settings):
    """With the exact noise the K-channel network and the denoiser walk the same path."""
    if process.channels == 1 and settings.get("factor"):
        pytest.skip("one channel has one root")
    sampler = replace(SAMPLERS[name], steps=5)  # equal step by step, so that few steps tell as much as many
    a = sample(Diffusion(process, GAUSSIAN), 5, (1,), sampler, seed=3, dtype=torch.float64)
    b = sample(ExactNoise(process, **settings).diffusion, 5, (1,), sampler, seed=3, dtype=torch.float64)
    assert torch.allclose(a, b, atol=2e-5)  # set by the label's inversion through sigma near t = 0


def test_probability_flow_matches_the_psld_sheet():
    """Section 8.7: z(1) = (1, .5) flows to z(.1) and z(1e-3)."""
    for process, middle, end in [
        (PSLD(), (-0.099081315916, 0.451665822470), (-0.407161089814, 0.001127891958)),
        (PSLD(gamma=0.0, nu=4.0), (-0.102212405694, 0.445625399509), (-0.406998939737, -0.001528280514)),
    ]:
        diffusion = Diffusion(process, GAUSSIAN)
        z = torch.tensor([[[1.0], [0.5]]], dtype=torch.float64)
        for t, expected in ((0.1, middle), (1e-3, end)):
            flow = ProbabilityFlow(1e-9, 1e-11, sigma_min=float(process.sigma(t)), final="none")
            _, states, calls = flow.solve(diffusion, z)
            assert states[-1].flatten().tolist() == pytest.approx(expected, abs=1e-7)
            assert calls > 20


def test_probability_flow_and_a_fine_plan_agree_path_by_path():
    diffusion = Diffusion(CLD(), MixtureDenoiser.ring())
    a = sample(diffusion, 50, (2,), ProbabilityFlow(1e-8, 1e-9, sigma_min=0.02), seed=0, dtype=torch.float64)
    b = sample(diffusion, 50, (2,), Exponential(400, LogSigma(0.02), order=3), seed=0, dtype=torch.float64)
    # A few points start within rounding of a boundary between modes; the rest must agree.
    assert float((a - b).norm(dim=1).median()) < 1e-4
    assert float(((a - b).norm(dim=1) < 1e-2).double().mean()) > 0.9


def test_the_same_seed_gives_the_same_samples():
    diffusion = Diffusion(PSLD(), MixtureDenoiser.ring())
    draw = lambda seed, **k: sample(diffusion, 64, (2,), SSCS(8), seed=seed, **k)  # noqa: E731
    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    assert torch.equal(draw(torch.Generator().manual_seed(5)), draw(5))
    assert torch.equal(draw(0, batch=10), draw(0, batch=10))
    assert draw(0, batch=10).shape == (64, 2)
    state = torch.random.get_rng_state()
    draw(0)
    assert torch.equal(state, torch.random.get_rng_state()), "sampling must leave the global generator alone"


@pytest.mark.parametrize("sampler", [*SAMPLERS.values(), ProbabilityFlow()], ids=[*SAMPLERS, "flow"])
def test_trajectories_end_in_the_samples(sampler):
    diffusion = Diffusion(PSLD(), MixtureDenoiser.ring())
    walk = sample(diffusion, 6, (2,), sampler, seed=0, trajectory=True)
    assert isinstance(walk, Trajectory)
    assert torch.equal(walk.x, sample(diffusion, 6, (2,), sampler, seed=0))
    assert walk.states.shape == (len(walk.times), 6, 2, 2)
    assert bool((walk.times.diff() < 0).all())
    if hasattr(sampler, "steps"):
        assert len(walk.times) == sampler.steps + 1
        assert walk.calls == sampler.plan(diffusion.process).calls


def test_conditions_are_split_with_the_batch():
    seen = []

    def denoiser(x, sigma, *, y, scale):
        seen.append((y.tolist(), scale))
        return x * 0

    sample(Diffusion(VP(), denoiser), 5, (2,), Ancestral(1), seed=0, batch=2, y=torch.arange(5), scale=3.0)
    assert seen == [([0, 1], 3.0), ([2, 3], 3.0), ([4], 3.0)]


def test_a_walk_costs_exactly_its_calls():
    for name, sampler in SAMPLERS.items():
        count = 0

        def denoiser(x, sigma):
            nonlocal count
            count += 1
            return GAUSSIAN(x, sigma)

        plan = sampler.plan(PSLD())
        sample(Diffusion(plan.process, denoiser), 3, (1,), plan, seed=0)
        assert count == plan.calls, name


@pytest.mark.parametrize(
    "sampler", [Ancestral(6), Heun(4), ProbabilityFlow(1e-3, 1e-3)], ids=["table", "two stages", "flow"]
)
def test_progress_counts_every_model_call(sampler, capsys):
    count = 0

    def denoiser(x, sigma):
        nonlocal count
        count += 1
        return GAUSSIAN(x, sigma)

    sample(Diffusion(VP(), denoiser), 4, (1,), sampler, seed=0, batch=2, progress=True)
    shown = capsys.readouterr().err
    assert f"{count}call" in shown or f"{count}/{count}" in shown, shown


def test_images_and_scalars_walk_alike():
    diffusion = Diffusion(CLD(), lambda x, sigma: x / (1 + sigma[0] ** 2))
    flat = sample(diffusion, 4, (12,), Ancestral(5), seed=0)
    image = sample(diffusion, 4, (3, 2, 2), Ancestral(5), seed=0)
    assert torch.allclose(flat, image.flatten(1), atol=1e-6)
    assert sample(Diffusion(CLD(), lambda x, s: x), 4, (), Ancestral(5), seed=0).shape == (4,)


def test_guarded_orders_are_never_worse_than_order_one_beyond_noise():
    """Sliced W2 on the ring, 5 to 20 calls, three grids: order 2 and 3 against order 1.

    The threshold is 3 standard errors of the difference between two means over 4 independent seeds.
    """
    target, n, seeds = MixtureDenoiser.ring(), 2500, 4
    angle = torch.linspace(0, math.pi, 17, dtype=torch.float64)[:-1]
    projections = torch.stack([angle.cos(), angle.sin()])
    draws = [target.sample(n, torch.Generator().manual_seed(100 + seed)).double() for seed in range(seeds)]
    exact = [(x @ projections).sort(0).values for x in draws]
    for process in (VP(), CLD()):
        diffusion = Diffusion(process, target)
        for grid in (LogSigma(), Quadratic(), Uniform()):
            for calls in (5, 10, 20):
                w2 = torch.zeros(3, seeds, dtype=torch.float64)
                for seed in range(seeds):
                    for order in (1, 2, 3):
                        x = sample(
                            diffusion, n, (2,), Exponential(calls, grid, order=order), seed=seed, dtype=torch.float64
                        )
                        w2[order - 1, seed] = ((x @ projections).sort(0).values - exact[seed]).square().mean().sqrt()
                for order in (2, 3):
                    error = math.sqrt(float(w2[order - 1].var() + w2[0].var()) / seeds)
                    worse = float(w2[order - 1].mean() - w2[0].mean())
                    assert worse < 3 * error, (type(process).__name__, grid, calls, order, worse, error)


BAD_SAMPLERS = [
    (lambda: Ancestral(0), "Ancestral: steps must be at least 1, got 0"),
    (lambda: Ancestral(5, final="denoise"), "final must be 'predict', 'drift' or 'none', got 'denoise'"),
    (lambda: Exponential(5, order=4), "order must be 1, 2 or 3, got 4"),
    (lambda: Exponential(5, stochasticity=-1.0), "stochasticity must not be negative, got -1.0"),
    (lambda: SSCS(5, order=2, score_time="start"), "order 2 needs the score at the midpoint"),
    (lambda: SSCS(5, score_time="end"), "score_time must be 'start', 'midpoint' or null"),
    (lambda: Heun(5, churn=-0.1), "churn must not be negative"),
    (lambda: Uniform(t_min=2.0), "t_min is a fraction of the horizon and must lie in \\(0, 1\\), got 2.0"),
    (lambda: Rho(rho=0.0), "rho must be positive"),
    (lambda: LogSigma(sigma_min=200.0).times(VP(), 3), "starts at sigma = 152.167"),
    (lambda: Ancestral(3, Given([1.0, 0.5])).plan(VP()), "needs 3 times for its steps, got 2"),
    (lambda: Ancestral(2, Given([0.5, 1.0])).plan(VP()), "must be positive and strictly decreasing"),
    (lambda: Ancestral(2, Given([3.0, 0.5])).plan(VP()), "t must lie in \\[0, 1\\], got 3"),
    (lambda: ProbabilityFlow(rtol=0.0), "rtol must be positive, got 0.0"),
]


@pytest.mark.parametrize(("call", "message"), BAD_SAMPLERS)
def test_bad_samplers_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


DIFFUSION = Diffusion(VP(), GAUSSIAN)
BAD_CALLS = [
    (lambda: sample(DIFFUSION, 0, (1,), Ancestral(3)), "n must be at least 1, got 0"),
    (lambda: sample(DIFFUSION, 4, (0, 3), Ancestral(3)), "positive sizes, got \\(0, 3\\)"),
    (lambda: sample(DIFFUSION, 4, (1,), Ancestral(3), batch=0), "batch must be at least 1, got 0"),
    (lambda: sample(DIFFUSION, 4, (1,), "ancestral"), "sampler must be a sampler or a plan, got str"),
    (lambda: sample(DIFFUSION, 4, (1,), Ancestral(3).plan(CLD())), "the plan was made for another process"),
    (
        lambda: DIFFUSION.score(torch.zeros(3, 2, 1), 0.5),
        "z must have shape \\(batch, 1, \\*event\\), got \\(3, 2, 1\\)",
    ),
    (lambda: DIFFUSION.score(torch.zeros(3, 1, 1), torch.zeros(2)), "t must be one time or one per sample \\(3,\\)"),
    (lambda: NoiseDiffusion(VP(), lambda z, t: z, kernel="ssm"), "kernel must be 'hsm' or 'dsm', got 'ssm'"),
]


@pytest.mark.parametrize(("call", "message"), BAD_CALLS)
def test_bad_calls_are_refused_before_any_work(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_walk_that_blows_up_says_so():
    with pytest.raises(FloatingPointError, match="not finite"):
        sample(Diffusion(VP(), lambda x, s: x * math.inf), 2, (1,), Ancestral(3), seed=0)


def test_grids_of_the_sheets():
    """psld 4.2: the example with n = 4; design sheet: EDM's 18 levels."""
    process = VP()
    assert Uniform(1e-3).times(process, 5).tolist() == pytest.approx([1, 0.75025, 0.5005, 0.25075, 0.001])
    assert Quadratic(1e-3).times(process, 5).tolist() == pytest.approx([1, 0.5629375, 0.25075, 0.0634375, 0.001])
    levels = Rho().times(VE(), 18).tolist()  # sigma(t) = t
    assert levels[:3] == pytest.approx([80, 57.585984721248, 40.785573796508], rel=1e-10)
    assert levels[-2:] == pytest.approx([0.007528019963, 0.002], rel=1e-8)


@pytest.mark.parametrize("process", [VP(), FlowMatching(), CLD(), MALDA()], ids=lambda p: type(p).__name__)
def test_log_sigma_grid_is_geometric_in_the_effective_noise(process):
    times = LogSigma(0.01).times(process, 9)
    steps = process.sigma(times).log().diff()
    assert torch.allclose(steps, steps.mean().expand(8), rtol=1e-7)
    assert float(times[0]) == process.horizon
