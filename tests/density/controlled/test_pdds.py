"""Particle denoising diffusion: its path densities, its potential, its evidence with any network, and its training."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from undrift.density.controlled.control import Potential
from undrift.density.controlled.diffusion import ControlledDiffusion, Scheme
from undrift.density.controlled.grid import EqualTimes
from undrift.density.controlled.matching import ScoreMatching
from undrift.density.controlled.objective import Work
from undrift.density.controlled.regression import control_at
from undrift.density.controlled.walk import log_twist_and_score, walk
from undrift.density.move import MALA
from undrift.density.schedule import Resampling
from undrift.density.target import Target
from undrift.density.targets import Gaussian
from undrift.process import VP, CosineClock


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def f64(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def sampler(steps: int = 10, dim: int = 2, wild: float = 0.05) -> ControlledDiffusion:
    """With a potential that nobody trained, away from its start by noise of size ``wild``."""
    scheme = Scheme(
        VP(clock=CosineClock()), EqualTimes(), steps, Potential(width=16, clip=1e12, reach=1e12), gain="score"
    )
    d = ControlledDiffusion(scheme, dim)
    with torch.no_grad():
        for p in d.parameters():
            p.add_(wild * torch.randn(p.shape, generator=generator(11)))
    return d


def pair() -> Target:
    """Two modes, log Z = 1.3."""
    means, s2 = torch.tensor([[-0.8, 0.3], [0.7, -0.4]], dtype=torch.float64), 0.2

    def log_prob(x: Tensor) -> Tensor:
        far = (x.unsqueeze(1) - means.to(x)).square().sum(-1)
        return 1.3 + (-0.5 * far / s2).logsumexp(-1) - math.log(2) - math.log(2 * math.pi * s2)

    return Target(log_prob, 2, log_z=1.3)


def test_both_ways_along_a_path() -> None:
    """Start, proposals and weight make up the target and its noising, whatever the potential."""
    target, d = pair(), sampler()
    tables = d.tables(f64(0.0))
    chain = tables.chain
    with torch.no_grad():
        paths = d.walk(target, tables, d.start(tables, 50, generator()), generator(1))
        log_w = d.log_weights(tables, paths)
        z = paths.z[:, 0]
        normal = lambda loc, scale, x: torch.distributions.Normal(loc, scale).log_prob(x).sum(-1)  # noqa: E731
        kept = (-VP(clock=CosineClock()).clock.integral(chain.times)).exp()
        forth = normal(f64(0.0), f64(1.0), z[0])
        home = target.log_prob(z[-1])
        for k in range(chain.steps):
            a, value, score = kept[k] / kept[k + 1], paths.value, paths.score
            assert value is not None
            assert score is not None
            at = slice(k, k + 1)
            y = kept[k].sqrt() * z[k]
            slope = d.forward_control(tables, at, paths.z[at], value[at], score[at])[0] * kept[k].sqrt()
            assert torch.allclose(score[k], target.score(y))
            forth = forth + normal(a.sqrt() * z[k] + (1 - a) * slope, (1 - a).sqrt(), z[k + 1])
            home = home + normal(a.sqrt() * z[k + 1], (1 - a).sqrt(), z[k])
    assert torch.allclose(forth + log_w, home, rtol=0, atol=1e-9)


def test_twists_telescope() -> None:
    """With a threshold that is never met the twisted weights are those of the path."""
    target, d = pair(), sampler()
    plain = walk(d, target, 2, 100, generator(3), torch.float64)
    twisted = walk(d, target, 2, 100, generator(3), torch.float64, resampling=Resampling(threshold=1e-6))
    assert torch.equal(plain.x, twisted.x)
    assert torch.allclose(plain.log_weights, twisted.log_weights, rtol=0, atol=1e-9)


def test_the_control_is_the_gradient_of_the_potential() -> None:
    target, d = pair(), sampler()
    tables = d.tables(f64(0.0))
    chain = tables.chain
    for k in (0, 4, 9):
        z = torch.randn(1, 20, 2, generator=generator(k), dtype=torch.float64)
        _, slope = log_twist_and_score(d, tables, target, k, z)
        answer = d.ask(target, tables, k, z)
        assert answer is not None
        with torch.no_grad():
            a = d.forward_control(tables, slice(k, k + 1), z.unsqueeze(0), answer[0][None], answer[1][None])[0]
        assert torch.allclose(slope[0], chain.look[k, 0] * a - z[0], rtol=1e-4, atol=1e-4)


def test_at_the_target_nothing_is_learned() -> None:
    """The potential at t = 0 is log g_0 itself, with any network; the process ends at t = 0 exactly."""
    target, d = pair(), sampler()
    chain = d.tables(f64(0.0)).chain
    assert float(chain.times[-1]) == 0
    assert float(chain.unknown[-1]) == 0
    x = torch.randn(20, 2, generator=generator(), dtype=torch.float64)
    value, score = target.log_prob_and_score(x)
    with torch.no_grad():
        a = control_at(d, chain, torch.zeros(20, dtype=torch.float64), x, value, score)
    assert torch.allclose(a, score + x, rtol=0, atol=1e-5)  # the network's precision


@pytest.mark.parametrize("move", [None, MALA()], ids=["unmoved", "moved"])
def test_the_evidence_of_an_untrained_potential(move: MALA | None) -> None:
    """400 runs of 64 walkers, resampled under way: the mean of Z is right within 4 of its standard errors."""
    target, d = pair(), sampler()
    found = walk(
        d, target, 400, 64, generator(5), torch.float64, resampling=Resampling(threshold=0.9), move=move, size=0.1
    )
    z = (found.log_weights.logsumexp(-1) - math.log(64) - 1.3).exp()
    assert float(z.std()) < 2.0  # else the test says nothing
    assert abs(float(z.mean()) - 1) < 4 * float(z.std()) / math.sqrt(400)


def test_training() -> None:
    """A Gaussian off the centre, half as wide: the particles' weights become even, and log Z is right."""
    target = Gaussian(dim=2, loc=0.6, scale=0.5, log_z=0.4)
    d = sampler(steps=20, wild=0.0)
    objective = ScoreMatching(draws=512, examples=2048, refresh=50, replace=50, resampling=Resampling(threshold=0.3))
    runner = objective.runner(Work(d, target, generator(), 128, torch.float64))
    before = walk(d, target, 1, 2000, generator(7), torch.float64).log_weights.var()
    optimizer = torch.optim.Adam(d.parameters(), 5e-3)
    for _ in range(300):
        optimizer.zero_grad()
        runner.step()
        torch.nn.utils.clip_grad_norm_(d.parameters(), 1.0)
        optimizer.step()
    after = walk(d, target, 1, 2000, generator(7), torch.float64).log_weights
    assert float(after.var()) < 0.2 * float(before)
    error = float(after.exp().mean().log()) - 0.4
    assert abs(error) < 4.5 * float(after.exp().std() / after.exp().mean()) / math.sqrt(2000)
