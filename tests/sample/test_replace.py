"""Inpainting by replacement: the known part follows its exact kernel at the time that the walk has come to."""

from __future__ import annotations

import math

import pytest
import torch

from undrift import Diffusion, NoiseDiffusion, sample
from undrift.denoise import GaussianDenoiser
from undrift.process import CLD, PSLD, VP
from undrift.sample import SSCS, Ancestral, EulerMaruyama, Exponential, Heun, ProbabilityFlow, Replace

COV = torch.tensor([[1.0, 0.6], [0.6, 0.8]], dtype=torch.float64)
DATA = GaussianDenoiser([0.2, -0.1], COV)
MASK, VALUES = torch.tensor([True, False]), torch.tensor([1.5, math.nan])
N = 4000


@pytest.mark.parametrize("process", [VP(), CLD(), PSLD()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("sampler", [Ancestral(8), EulerMaruyama(30)], ids=lambda s: type(s).__name__)
def test_the_known_part_of_every_channel_has_the_kernels_law_at_the_time_after_the_step(process, sampler):
    """Mean and covariance of N draws against the kernel's, whitened, within 4.5 standard errors at every time.

    Drawn at the time before the step the variance would be off by its factor between two times: see the next test.
    """
    walk = sample(
        Diffusion(process, DATA),
        N,
        (2,),
        sampler,
        seed=1,
        trajectory=True,
        steer=Replace(MASK, VALUES),
        dtype=torch.float64,
    )
    means, roots = process.kernel(walk.times[:-1])
    k = process.channels
    for state, mean, root in zip(walk.states[:-1], means, roots, strict=True):
        white = torch.linalg.solve_triangular(root, (state[:, :, 0] - 1.5 * mean).T, upper=False)
        assert float(white.mean(1).abs().max()) < 4.5 / math.sqrt(N)
        off = white @ white.T / N - torch.eye(k, dtype=torch.float64)
        assert float(off.abs().max()) < 4.5 * math.sqrt(2 / N)
    assert bool((walk.states[-1, :, 0, 0] == 1.5).all()), "known data come back as they are"
    if k > 1:
        assert bool((walk.states[-1, :, 1:, 0] == 0).all())


def test_times_one_step_early_would_be_seen():
    """On the later half of that grid the kernel's variances differ from time to time by 20 times what is allowed."""
    process = VP()
    plan = Ancestral(8).plan(process)
    variance = process.kernel(plan.times)[1].square().flatten()
    ratio = variance[:-1] / variance[1:]
    assert float(ratio[3:].min()) - 1 > 20 * 4.5 * math.sqrt(2 / N)


def test_steps_with_stages_are_replaced_once_a_step_at_the_time_of_the_next_call():
    process = CLD()
    for sampler in (Heun(5), SSCS(5), SSCS(5, order=2), SSCS(5, score_time="midpoint")):
        plan = sampler.plan(process)
        seen = []

        def denoiser(x, sigma, seen=seen):
            seen.append((x[:, 0], sigma[0]))
            return DATA(x, sigma)

        x = sample(
            Diffusion(process, denoiser), N, (2,), plan, seed=2, steer=Replace(MASK, VALUES), dtype=torch.float64
        )
        assert bool((x[:, 0] == 1.5).all())
        for i, (known, sigma) in enumerate(seen):
            if i == 0 or bool(torch.isfinite(plan.after[i - 1])):  # x~ = x0 + sigma n
                assert float(((known - 1.5) / sigma).mean().abs()) < 4.5 / math.sqrt(N)
                assert abs(float(((known - 1.5) / sigma).square().mean()) - 1) < 4.5 * math.sqrt(2 / N)


def test_the_unknown_part_leans_towards_what_is_known():
    """Between the prior's mean and the posterior's: in between where parts depend."""
    free = -0.1
    exact = free + 0.6 * (1.5 - 0.2)
    x = sample(Diffusion(VP(), DATA), N, (2,), Ancestral(40), seed=3, steer=Replace(MASK, VALUES), dtype=torch.float64)
    assert free + 0.2 < float(x[:, 1].mean()) < exact + 4 * math.sqrt(0.8 / N)


def test_values_one_per_sample_follow_their_samples_through_batches_and_channels_of_noise_networks():
    values = torch.linspace(-1, 1, 10, dtype=torch.float64).unsqueeze(-1) * torch.ones(2, dtype=torch.float64)
    steer = Replace(torch.tensor([0, 1]), values)
    process = CLD()
    for diffusion in (Diffusion(process, DATA), NoiseDiffusion(process, lambda z, c: 0.1 * z)):
        x = sample(diffusion, 10, (2,), Exponential(5), seed=0, batch=4, steer=steer, dtype=torch.float64)
        assert torch.equal(x[:, 1], values[:, 1])


BAD = [
    (lambda: Replace(torch.tensor([0.5]), torch.zeros(1)), "mask must hold 0"),
    (lambda: Replace(torch.tensor([1]), torch.tensor([math.inf])), "must be finite"),
    (lambda: run(Replace(torch.ones(3), torch.zeros(3))), r"mask \(3,\) and values \(3,\) must broadcast"),
    (lambda: run(Replace(MASK, VALUES.expand(4, 2))), r"values also to one per sample, \(5, 2\)"),
    (lambda: run(Replace(MASK, VALUES), ProbabilityFlow()), "needs a sampler with fixed steps, a table; got Prob"),
]


def run(steer, sampler=Ancestral(3)):  # noqa: B008
    def never(x, sigma):
        raise AssertionError("the model was called")

    return sample(Diffusion(VP(), never), 5, (2,), sampler, seed=0, steer=steer)


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_replacements_are_refused_before_any_call(call, message):
    with pytest.raises(ValueError, match=message):
        call()
