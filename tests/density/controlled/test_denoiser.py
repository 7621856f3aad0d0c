"""A control as a denoiser: of use to every process and sampler."""

import math

import pytest
import torch

from undrift import Diffusion, sample
from undrift.denoise import MixtureDenoiser
from undrift.density import DIS, Affine
from undrift.density.controlled import (
    ControlDenoiser,
    ControlledDiffusion,
    EqualAngles,
    Exact,
    Informed,
    Plain,
    Scheme,
    ScoreMatching,
    Training,
)
from undrift.density.targets import Mixture9
from undrift.measure.evidence import mode_weights, total_variation
from undrift.process import CLD, PSLD, VP
from undrift.sample import Exponential

MEANS = torch.tensor([[1.0, 0.5], [-1.0, 0.0]], dtype=torch.float64)
KNOWN = MixtureDenoiser(torch.tensor([0.3, 0.7]), MEANS, torch.full((2, 2), 0.2, dtype=torch.float64))


@pytest.mark.parametrize("process", [VP(), CLD()], ids=["VP", "CLD"])
def test_the_control_of_a_denoiser_is_that_denoiser(process):
    """D -> a = (D - y) / V -> y + V a, whatever the process and the level."""
    diffusion = ControlledDiffusion(Scheme(process, EqualAngles(), 4, Exact(KNOWN)), 2)
    back = ControlDenoiser(diffusion, Mixture9())
    x = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for level in (0.01, 0.3, 1.0, 20.0):
        sigma = torch.full((6,), level, dtype=torch.float64)
        torch.testing.assert_close(back(x * (1 + level), sigma), KNOWN(x * (1 + level), sigma), rtol=1e-9, atol=1e-9)


def test_what_dis_learned_draws_under_another_process():
    """Trained with VP from a density; drawn by phase-space Langevin and an exponential integrator in 30 calls."""
    target = Mixture9()
    method = DIS(
        steps=20,
        objective=ScoreMatching(examples=8192),
        training=Training(steps=500, batch=512, rate=5e-3),
        coordinates=Affine(0.0, 3.0),
    )
    sampler = method.run(target, 64).sampler
    n = 4000
    x = sample(Diffusion(PSLD(), sampler.denoiser()), n, shape=(2,), sampler=Exponential(steps=30), seed=1)
    found = mode_weights(target.assign(3.0 * x.double()), 9)
    # Nine equal modes: counts deviate by sqrt(9 * 8/81 / n) in total, and so does their distance on average.
    assert total_variation(found, torch.full((9,), 1 / 9, dtype=torch.float64)) < 0.05 + 3 * math.sqrt(8 / 9 / n)
    spread = (3.0 * x.double()).std(0)
    assert float((spread - 4.119).abs().max()) < 0.25


def test_what_is_no_posterior_mean_is_refused():
    for settings in ({"backward": Plain()}, {"learn": ["noise"]}):
        diffusion = ControlledDiffusion(Scheme(VP(), EqualAngles(), 4, Informed(), **settings), 2)
        with pytest.raises(ValueError, match="plain reversal"):
            ControlDenoiser(diffusion, Mixture9())
