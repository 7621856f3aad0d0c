"""Black-box probing: the same law as the recursion for all samplers and processes, and for samplers of others."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from tests.process.cases import CATALOG, RANDOM, varying

from undrift import Diffusion, sample
from undrift.design.gaussian import propagate
from undrift.design.probe import probe, probe_sampler
from undrift.design.score_error import Bias, Noise, Relative, ScoreError
from undrift.design.spectrum import Spectrum
from undrift.process import CLD, MALDA, PSLD, VE, VP, LearnedProcess
from undrift.sample import (
    SSCS,
    Ancestral,
    DPMSolver2M,
    EulerMaruyama,
    Exponential,
    Given,
    Heun,
    LogSigma,
    Plan,
    ProbabilityFlow,
)

SPECTRUM = Spectrum(torch.tensor([4.0, 0.3, 0.01, 0.0]), torch.tensor([0.5, -0.7, 0.2, 0.1]))
PROCESSES = {
    **{name: p for name, p in CATALOG.items() if name not in ("VP-cosine", "CLD-underdamped", "MALDA-4")},
    "recipe": next(p for name, p in RANDOM.items() if name.startswith("K4-rank2")),
    "learned": LearnedProcess.random(3, seed=1),
    "varying": varying(),
}
SAMPLERS = {
    "euler": EulerMaruyama(4),
    "euler-half": EulerMaruyama(4, final="drift", stochasticity=0.5, noise_last=False),
    "euler-ode": EulerMaruyama(4, final="none", stochasticity=0.0),
    "heun": Heun(4),
    "heun-drift": Heun(3, final="drift"),
    "churn": Heun(4, final="none", churn=1.2, churn_noise=1.01),
    "sscs": SSCS(4, final="none"),
    "sscs-midpoint": SSCS(4, final="drift", score_time="midpoint"),
    "sscs-2": SSCS(4, order=2),
    "exponential-1": Exponential(4, order=1, final="drift"),
    "exponential-1-sde": Exponential(4, order=1, stochasticity=1.0),
    "exponential-2": Exponential(4, order=2, guard=False),
    "exponential-2-guard": Exponential(4, order=2, stochasticity=0.5),
    "exponential-2-sde": Exponential(4, order=2, stochasticity=1.0, guard=False, final="none"),
    "exponential-3": Exponential(5, order=3, guard=False, final="none"),
    "exponential-3-half": Exponential(5, order=3, stochasticity=0.5, guard=False),
    "exponential-3-sde": Exponential(5, order=3, stochasticity=1.0, final="drift"),
    "2m": DPMSolver2M(4),
    "2m-none": DPMSolver2M(4, final="none"),
    "ancestral": Ancestral(4),
    "ancestral-none": Ancestral(4, final="none"),
    "forward": Ancestral(4, variance="forward"),
    "forward-drift": Ancestral(4, final="drift", variance="forward"),
}


@functools.cache
def _all_times(process) -> torch.Tensor:
    with torch.no_grad():
        top = 0.999 * min(float(process.sigma(process.horizon)), 20.0)
        return process.time(top * torch.tensor([1.0, 0.6, 0.36, 0.12, 0.06, 0.02], dtype=torch.float64))


def _times(process, nodes: int) -> torch.Tensor:
    """Half of the steps short enough for the guard to let high orders in."""
    return _all_times(process)[:nodes]


@torch.no_grad()
def _same(plan: Plan, spectrum: Spectrum, error: ScoreError | None = None) -> None:
    """Mean and variance agree to 1e-12 of the samples' root mean square, or of its square."""
    found, law = probe_sampler(plan.process, plan, spectrum, error), propagate(plan, spectrum, error)
    size = float((law.variance + law.mean[:, 0].square()).max())
    assert float((found.variance - law.variance).abs().max()) < 1e-12 * size
    assert float((found.mean - law.mean[:, 0]).abs().max()) < 1e-12 * math.sqrt(size)
    assert found.calls == plan.calls
    assert torch.equal(found.law.exact_mean[:, 0], law.exact_mean[:, 0].detach())
    assert torch.equal(found.law.exact_cov[:, 0, 0], law.exact_cov[:, 0, 0].detach())
    assert found.law.time == law.time


@pytest.mark.parametrize("process", PROCESSES)
def test_probing_is_the_recursion_for_every_sampler(process):
    """The real loop and the recursion share only the table; the law, and so KL and W2, are the same to rounding."""
    made = PROCESSES[process]
    for name, sampler in SAMPLERS.items():
        if name.startswith("sscs") and not hasattr(made, "reversed_matrices"):
            with pytest.raises(ValueError, match="SSCS splits off"):
                sampler.table(made, _times(made, sampler.nodes))
            continue
        with torch.no_grad():
            plan = sampler.table(made, _times(made, sampler.nodes))
        _same(plan, SPECTRUM)


ERRORS = {
    "relative": Relative(lambda s: 0.2 * s / (1 + s)),
    "bias": Bias(lambda s: 0.05 + 0.1 * s),
    "noise": Noise(lambda s: 0.3 * s / (1 + s)),
    "noise-equal": Noise(0.02, share="equal"),
}


@pytest.mark.parametrize("error", ERRORS)
def test_probing_is_the_recursion_with_wrong_denoisers(error):
    """The noise of a Noise error is drawn by the denoiser: probing sees each call's as sources of its own."""
    for process, name in [
        (VP(), "exponential-3-half"),
        (VE(), "churn"),
        (PSLD(), "sscs-2"),
        (PSLD(), "2m"),
        (MALDA(), "exponential-2-guard"),
        (CLD(), "forward-drift"),
    ]:
        sampler = SAMPLERS[name]
        plan = sampler.table(process, _times(process, sampler.nodes))
        _same(plan, SPECTRUM, ERRORS[error])
        moved = propagate(plan, SPECTRUM, ERRORS[error]).w2 - propagate(plan, SPECTRUM).w2
        assert float(moved.abs()) > 1e-4


@pytest.mark.parametrize("error", ERRORS)
def test_excess_is_the_mean_square_of_the_error(error):
    """E|D^ - D|^2 along the exact marginals, by quadrature over x~ and, where there is noise, over 2e5 draws of it."""
    wrong, spectrum = ERRORS[error], Spectrum(SPECTRUM.variance, SPECTRUM.mean, torch.tensor([1.0, 2.0, 5.0, 1.0]))
    sigma = torch.tensor([0.03, 0.4, 7.0], dtype=torch.float64)
    draws = 100_000 if error.startswith("noise") else 1
    seen = []
    for s in sigma:
        noisy = spectrum.mean + (spectrum.variance + s**2).sqrt() * torch.tensor([[-1.0], [1.0]])
        noisy = noisy.double().repeat_interleave(draws, 0)
        gap = wrong.denoiser(spectrum, seed=3)(noisy, s) - spectrum.denoiser()(noisy, s)
        seen.append((gap.square() * spectrum.count).sum(-1).mean())
    # A mean of 2e5 squares, each of deviation below sqrt(2) of its mean, is known to 0.32 per cent.
    excess = wrong.excess(spectrum, sigma)
    assert torch.allclose(torch.stack(seen), excess, rtol=4 * 0.0032 if draws > 1 else 1e-12)
    if isinstance(wrong, Noise):
        assert torch.allclose(excess, wrong.e2(sigma) if callable(wrong.e2) else torch.full_like(sigma, wrong.e2))


def test_wrong_denoisers_know_levels_of_single_samples_and_keep_shape_and_dtype():
    wrong = Relative(lambda s: s).denoiser(SPECTRUM)
    x = torch.linspace(-1, 1, 12).reshape(3, 2, 2)
    sigma = torch.tensor([0.1, 0.5, 2.0])
    together = wrong(x, sigma)
    assert together.dtype == x.dtype
    for i in range(3):
        assert torch.allclose(together[i], wrong(x[i : i + 1], sigma[i])[0], atol=1e-7)
    one, two = (Noise(0.1).denoiser(SPECTRUM, seed=5)(x, sigma) for _ in range(2))
    assert torch.equal(one, two)
    with pytest.raises(ValueError, match="'mmse' or 'equal'"):
        Noise(0.1, share="mode")


# -- samplers of others ------------------------------------------------------------------------------------------------


def edm_sampler(denoise, batch, levels, churn, low, high, inflate, shape):
    """Karras et al. 2022, algorithm 2, in plain torch."""
    gamma = min(churn / len(levels), math.sqrt(2) - 1)
    x = torch.randn(batch, *shape) * levels[0]
    for s, s_next in zip(levels, [*levels[1:], 0.0], strict=True):
        s_hat = s * (1 + gamma) if low <= s <= high else s
        x_hat = x + math.sqrt(s_hat**2 - s**2) * inflate * torch.randn_like(x)
        slope = (x_hat - denoise(x_hat, torch.full((batch,), s_hat))) / s_hat
        x = x_hat + (s_next - s_hat) * slope
        if s_next > 0:
            slope_next = (x - denoise(x, torch.full((batch,), s_next))) / s_next
            x = x_hat + (s_next - s_hat) * 0.5 * (slope + slope_next)
    return x


@pytest.mark.parametrize("shape", [(4,), (1, 2, 2)])
def test_a_foreign_edm_sampler_has_the_law_of_our_plan(shape):
    levels = [80.0, 20.0, 5.0, 1.5, 0.5, 0.1, 0.02]
    found = probe(lambda d, batch: edm_sampler(d, batch, levels, 2.0, 0.05, 50.0, 1.007, shape), SPECTRUM)
    plan = Heun(7, Given(levels, sigma=True), churn=2.0, churn_min=0.05, churn_max=50.0, churn_noise=1.007).plan(VE())
    law = propagate(plan, SPECTRUM)
    assert torch.allclose(found.variance, law.variance, rtol=0, atol=1e-10)
    assert torch.allclose(found.mean, law.mean[:, 0], rtol=0, atol=1e-10)
    assert found.calls == plan.calls
    assert len(found.gains) == 8
    spectrum = Spectrum(SPECTRUM.variance[:3], SPECTRUM.mean[:3])  # KL needs noise in all directions of the data
    three = probe(lambda d, batch: edm_sampler(d, batch, levels, 2.0, 0.05, 50.0, 1.007, (3,)), spectrum)
    assert float(three.kl) == pytest.approx(float(propagate(plan, spectrum).kl), rel=1e-9)
    assert float(three.w2) == pytest.approx(float(propagate(plan, spectrum).w2), rel=1e-9)


@pytest.mark.parametrize(("eta", "sampler"), [(0.0, Exponential(8, order=1)), (1.0, Ancestral(8))])
def test_a_scheduler_of_diffusers_has_the_law_of_our_plan(eta, sampler):
    """DDIM and DDPM on VP, with that scheduler's own noise levels; it computes in single precision."""
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers")
    scheduler = diffusers.DDIMScheduler(prediction_type="sample", clip_sample=False)
    scheduler.set_timesteps(8)
    alpha = scheduler.alphas_cumprod.double()[scheduler.timesteps].sqrt()
    sigma = (1 - alpha**2).sqrt() / alpha

    def run(denoise, batch):
        z = torch.randn(batch, 1, 2, 2)
        for t, a, s in zip(scheduler.timesteps, alpha, sigma, strict=True):
            z = scheduler.step(denoise(z / a, s), t, z, eta=eta).prev_sample
        return z

    found = probe(run, SPECTRUM, tolerance=1e-5)
    plan = type(sampler)(**{**vars(sampler), "grid": Given(sigma.tolist(), sigma=True)}).plan(VP())
    law = propagate(plan, SPECTRUM)
    assert torch.allclose(found.variance, law.variance, rtol=1e-4, atol=1e-5)
    assert torch.allclose(found.mean, law.mean[:, 0], rtol=1e-4, atol=1e-5)
    assert len(found.gains) == (1 if eta == 0 else 1 + 8)  # it draws at its last step, too


def test_every_way_to_draw_normal_noise_is_prescribed():
    def run(denoise, batch):
        g = torch.Generator().manual_seed(int(torch.randint(9, ())))
        x = torch.empty(batch, 2, 4, dtype=torch.float64).normal_(generator=g)
        x = x[:, 0] + 10 * x[:, 1] + torch.randn((batch, 4), generator=g) * 100
        x = x + torch.normal(torch.full((batch, 4), 0.25), 1e3) + torch.empty(batch, 4).normal_(0.5, std=1e4)
        x = x + torch.normal(mean=0.0, std=1e5, size=(batch, 4))
        return x + torch.distributions.Normal(1.0, 1e6).sample((batch, 4))

    found = probe(run, SPECTRUM)
    powers = 10.0 ** torch.arange(7, dtype=torch.float64)
    assert torch.allclose(found.gains, powers.unsqueeze(-1).expand(7, 4), atol=1e-9)
    assert torch.allclose(found.mean, torch.full((4,), 1.75, dtype=torch.float64), atol=1e-9)
    assert found.calls == 0
    assert torch.get_default_dtype() == torch.float32


def test_noise_left_in_the_samples_is_compared_with_the_noisy_data():
    found = probe(
        lambda d, b: SPECTRUM.mean + (SPECTRUM.variance + 0.04).sqrt() * torch.randn(b, 4), SPECTRUM, sigma=0.2
    )
    assert float(found.kl) == pytest.approx(0.0, abs=1e-14)
    assert float(found.w2) == pytest.approx(0.0, abs=1e-7)


def test_single_precision_is_measured_to_single_precision():
    process = PSLD()
    plan = Ancestral(6, LogSigma(0.05)).plan(process)
    found = probe(lambda d, b: sample(Diffusion(process, d), b, (4,), plan, 0), SPECTRUM)
    assert torch.allclose(found.variance, propagate(plan, SPECTRUM).variance, atol=1e-5)


def _clipped(denoise, batch):
    clip = lambda x, sigma: denoise(x, sigma).clamp(-1, 1)  # noqa: E731
    return sample(Diffusion(VE(), clip), batch, (4,), Exponential(8), 0, dtype=torch.float64)


def _adaptive(denoise, batch):
    return sample(Diffusion(VP(), denoise), batch, (4,), ProbabilityFlow(), 0, dtype=torch.float64)


def _mixed(denoise, batch):
    x = torch.randn(batch, 4)
    return x + 0.1 * x.flip(-1)


def _growing(denoise, batch):
    x = torch.randn(batch, 4)
    return x + torch.randn_like(x) if float(x.abs().max()) > 0 else x


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (_clipped, r"depart from an affine map of the noise by 0\.\d+"),
        (_adaptive, r"depart from an affine map of the noise by [\de.-]+"),
        (_mixed, "coordinates not mix"),
        (lambda d, b: torch.randn(b, 4).clamp(-2.9, 2.9), "predictions not be clipped"),
        (_growing, "draw 2 of the run, 1 channels, was not made"),
        (lambda d, b: torch.from_numpy(np.random.default_rng(0).standard_normal((b, 4))), "two samples still differ"),
        (lambda d, b: torch.rand(b, 4), "calls rand; only normal noise"),
        (lambda d, b: torch.empty(b, 4).uniform_(), "calls uniform_; only normal noise"),
        (lambda d, b: torch.randn(1, 4).expand(b, 4), r"noise of shape \(1, 4\) for a batch of 2"),
        (lambda d, b: torch.randn(b, 3), r"noise of shape \(2, 3\)"),
        (lambda d, b: torch.randn(b, 8), r"must return samples \(2, \*event\) of 4 coordinates"),
        (lambda d, b: torch.randn(b, 4) / 0, "not finite"),
    ],
)
def test_what_is_no_affine_map_is_refused(run, message):
    with pytest.raises(ValueError, match=message):
        probe(run, SPECTRUM)
    with pytest.raises(ValueError, match="sigma must be finite"):
        probe(run, SPECTRUM, sigma=-1.0)


def test_a_plan_of_another_process_is_refused():
    with pytest.raises(ValueError, match="another process object"):
        probe_sampler(VP(), Ancestral(4).plan(VP()), SPECTRUM)
