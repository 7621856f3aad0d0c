"""Clocks of modes: every mode is the process on a time of its own."""

import math

import pytest
import torch

from undrift import Diffusion, sample
from undrift.denoise.spectral import SpectralDenoiser
from undrift.design.gaussian import propagate
from undrift.design.spectrum import Spectrum
from undrift.modal_diffusion import ModalDiffusion
from undrift.networks.base import Network
from undrift.process import CLD, PSLD, VP
from undrift.sample import SSCS, Ancestral, Exponential, Heun, LogSigma
from undrift.sample.modal import modal_plan
from undrift.space import Cosine, Fourier, FunctionSpace, Matern
from undrift.space.clock import Blurring, HeatDissipation

DATA = Matern(2.0, 5.0)


class Silent(Network):
    """A network with nothing to say: the denoiser is then exact for Gaussian data."""

    def forward(self, x, label, **condition):
        return torch.zeros_like(x)


def denoiser(space, clock=None, **options):
    return SpectralDenoiser(Silent(), space, DATA, clock, **options)


@pytest.mark.parametrize("clock", [Blurring(), HeatDissipation()], ids=["blurring", "heat"])
@pytest.mark.parametrize("process", [VP(), PSLD()], ids=["VP", "PSLD"])
@pytest.mark.parametrize("sampler", [Ancestral(steps=8), Exponential(steps=8, order=2), SSCS(steps=8)], ids=repr)
def test_every_mode_is_the_scalar_walk_on_its_own_times(process, clock, sampler):
    # Gaussian data, so a walk is linear: the law of each mode's end is design's recursion on that mode's own table
    space = FunctionSpace(Cosine(), Matern(1.5, 3.0))
    n, basis = 6, space.basis
    model = denoiser(space, clock)
    plan = modal_plan(ModalDiffusion(process, model), sampler, (n,))
    mu, lam = DATA.variances(basis, (n,)), space.variances((n,))
    levels = torch.logspace(
        math.log10(clock.sigma_max), math.log10(clock.sigma_min), sampler.nodes, dtype=torch.float64
    )
    for j in (0, 1, 5):
        times = process.time(clock.levels(levels, basis.eigenvalues((n,))[j]))
        table = sampler.table(process, times)
        law = propagate(table, Spectrum((mu[j] / lam[j]).reshape(1)))
        kappa = float(mu[j] / lam[j])
        k = process.channels
        cov = plan.prior[..., j] @ plan.prior[..., j].T
        depth, memory = plan.A.shape[1], plan.B.shape[1]
        size = k * depth + memory  # earlier states, then earlier predictions
        full = torch.zeros(size, size, dtype=torch.float64)
        full[:k, :k] = cov
        for i in range(plan.calls):
            level = clock.levels(plan.times[i], basis.eigenvalues((n,))[j])
            gain = kappa / (kappa + level**2)
            see = torch.eye(size, dtype=torch.float64)
            see[k * depth + 1 :, k * depth : -1] = torch.eye(memory - 1, dtype=torch.float64)
            see[k * depth + 1 :, k * depth + 1 :] = 0
            see[k * depth, :] = 0
            see[k * depth, :k] = gain * plan.rows[i, :, j]
            step = torch.zeros(size, size, dtype=torch.float64)
            step[:k, : k * depth] = torch.cat(list(plan.A[i, ..., j]), -1)
            step[:k, k * depth :] = torch.stack([b[:, 0] for b in plan.B[i, ..., j]], -1)
            step[k : k * depth, : k * (depth - 1)] = torch.eye(k * (depth - 1), dtype=torch.float64)
            step[k * depth :, k * depth :] = torch.eye(memory, dtype=torch.float64)
            move = step @ see
            full = move @ full @ move.T
            full[:k, :k] += plan.L[i, ..., j] @ plan.L[i, ..., j].T
        assert float(full[0, 0]) == pytest.approx(float(law.variance[0]), rel=1e-8)


def test_the_loop_walks_the_plan_it_is_given():
    # a walk without noise is linear in its start: the loop's answer, mode by mode, against the plan's own matrices
    space = FunctionSpace(Fourier(2), Matern(2.0, 3.0))
    clock, process = Blurring(sigma_max=5.0), CLD()
    diffusion = ModalDiffusion(process, denoiser(space, clock))
    sampler = Exponential(steps=5)
    plan = modal_plan(diffusion, sampler, (6, 4))
    x = sample(diffusion, 3, (2, 6, 4), sampler, 7, dtype=torch.float64)
    noise = torch.empty(3, 2, 2, 6, 4, dtype=torch.float64).normal_(generator=torch.Generator().manual_seed(7))
    z = torch.einsum("kc...,bc...->bk...", plan.prior.unsqueeze(2), noise * space.variances((6, 4)).sqrt())
    mu, lam = DATA.variances(space.basis, (6, 4)), space.variances((6, 4))
    for i in range(plan.calls):
        level = clock.levels(plan.times[i], space.basis.eigenvalues((6, 4)))
        x0 = mu / (mu + level**2 * lam) * (plan.rows[i].unsqueeze(1) * z).sum(1)
        z = torch.einsum("kc...,bc...->bk...", plan.A[i, 0].unsqueeze(2), z) + plan.B[i, 0, :, 0].unsqueeze(
            1
        ) * x0.unsqueeze(1)
    assert torch.allclose(x, space.basis.synthesise(z[:, 0]), rtol=0, atol=1e-12 * float(x.abs().max()))


def test_a_clock_that_does_not_blur_is_an_ordinary_diffusion():
    space = FunctionSpace(Cosine(), Matern(1.5, 3.0))
    clock = Blurring(sigma_min=0.01, sigma_max=20.0, width=1e-7, floor=0.2)
    grid = LogSigma(0.01, 20.0)
    for sampler in (Ancestral, Exponential):
        modal = sample(ModalDiffusion(VP(), denoiser(space, clock)), 4, (16,), sampler(steps=6), 0, dtype=torch.float64)
        usual = sample(Diffusion(VP(), denoiser(space)), 4, (16,), sampler(steps=6, grid=grid), 0, dtype=torch.float64)
        assert torch.allclose(modal, usual, rtol=0, atol=1e-8)


def test_blurring_is_what_it_says():
    # a view d c + sigma n of a function blurred for a time tau: its level is sigma / d
    clock = Blurring(sigma_min=0.01, sigma_max=10.0, width=0.3, floor=0.1)
    mu = Cosine().eigenvalues((9,))
    sigma = torch.tensor([0.01, 0.3, 10.0], dtype=torch.float64).unsqueeze(-1)
    width = 0.3 * torch.sin(0.5 * math.pi * (sigma / 0.01).log() / math.log(1000)) ** 2
    blurred = 0.9 * torch.exp(-mu * width**2 / 2) + 0.1
    assert torch.allclose(clock.levels(sigma, mu), sigma / blurred, rtol=1e-13)
    for c in (clock, HeatDissipation()):
        ladder = c.levels(torch.logspace(-2.6, 1, 200, dtype=torch.float64).clamp(c.sigma_min, 10.0).unsqueeze(-1), mu)
        assert bool((ladder.diff(dim=0) >= 0).all())
        assert bool((ladder.diff(dim=1) >= 0).all())


def test_what_does_not_fit_is_said_before_any_walk():
    space = FunctionSpace(Cosine(), Matern(1.5, 3.0))
    with pytest.raises(ValueError, match="must have a modal clock"):
        ModalDiffusion(VP(), denoiser(space))
    with pytest.raises(ValueError, match=r"sigma_max / floor = 5000"):
        ModalDiffusion(VP(), denoiser(space, Blurring(sigma_max=500.0)))
    diffusion = ModalDiffusion(VP(), denoiser(space, Blurring()))
    with pytest.raises(ValueError, match="leave grid out"):
        sample(diffusion, 1, (8,), Ancestral(steps=4, grid=LogSigma()))
    with pytest.raises(ValueError, match="between the times"):
        sample(diffusion, 1, (8,), Heun(steps=4, churn=3.0))
    with pytest.raises(ValueError, match="floor must lie"):
        Blurring(floor=0.0)


def test_stages_inside_a_step_are_no_states_of_the_walk():
    diffusion = ModalDiffusion(VP(), denoiser(FunctionSpace(Cosine(), Matern(1.5, 3.0)), Blurring()))
    walk = sample(diffusion, 2, (5,), Heun(steps=4), 0, trajectory=True)
    assert len(walk.states) == len(walk.times) == 5
    assert bool((walk.times.diff() < 0).all())
