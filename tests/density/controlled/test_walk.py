"""Walkers with weights: what they are without resampling, and that resampling and moves leave means as they are."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from undrift.density import Resampling
from undrift.density.controlled.control import Informed, Plain, Potential
from undrift.density.controlled.diffusion import ControlledDiffusion, Scheme
from undrift.density.controlled.grid import EqualAngles, EqualTimes
from undrift.density.controlled.walk import Result, Twist, walk
from undrift.density.move import HMC, MALA
from undrift.density.target import Target
from undrift.density.targets import GaussianMixture
from undrift.process import CLD, PSLD, VE, VP, BrownianBridge, ConstantClock, LearnedProcess, LinearClock, PowerClock

CLOCK = LinearClock(0.1, 10.0)
LOG_Z = -0.4
MEANS, WEIGHTS, COVS = torch.tensor([[-0.8, 0.4], [0.8, 0.0]]), torch.tensor([0.4, 0.6]), torch.tensor([0.5, 0.7])
TARGET = GaussianMixture(MEANS, COVS, WEIGHTS, log_z=LOG_Z)
MEAN = (WEIGHTS.unsqueeze(-1) * MEANS).sum(0).double()
SQUARE = (WEIGHTS.unsqueeze(-1) * (COVS.unsqueeze(-1) + MEANS.square())).sum(0).double()
SMALL = {"width": 16, "depth": 1}

SCHEMES: dict[str, Scheme] = {
    "VP": Scheme(VP(clock=CLOCK), EqualAngles(), 8, Informed(**SMALL)),
    "VE": Scheme(VE(clock=PowerClock(5.0, 2.0, 1.0)), EqualAngles(), 8, Informed(**SMALL)),
    "BrownianBridge": Scheme(BrownianBridge(), EqualTimes(), 8, Informed(**SMALL)),
    "potential": Scheme(VP(clock=CLOCK), EqualTimes(), 8, Potential(**SMALL)),
    "noise": Scheme(VP(clock=CLOCK), EqualTimes(), 8, Informed(**SMALL), learn=["noise"], caution=0.0),
    "bridge": Scheme(VP(clock=CLOCK), EqualTimes(), 8, Informed(**SMALL), Plain(**SMALL)),
    "CLD": Scheme(CLD(clock=CLOCK), EqualAngles(), 8, Informed(**SMALL)),
    "CLD: potential, noise": Scheme(CLD(clock=CLOCK), EqualTimes(), 8, Potential(**SMALL), learn=["noise"]),
    "LearnedProcess": Scheme(LearnedProcess(2, clock=CLOCK), EqualTimes(), 8, Informed(**SMALL)),
    "annealed VP": Scheme(VP(clock=ConstantClock(3.0)), EqualTimes(), 8, Plain(**SMALL), annealed=True),
    "annealed PSLD": Scheme(PSLD(clock=ConstantClock(4.0)), EqualTimes(), 8, Plain(**SMALL), annealed=True),
    "annealed CLD": Scheme(
        CLD(mass=0.6), EqualTimes(), 8, Plain(**SMALL), annealed=True, learn=["noise", "prior", "levels"]
    ),
}


def untrained(name: str, scale: float = 0.1) -> ControlledDiffusion:
    diffusion = ControlledDiffusion(SCHEMES[name], 2, seed=5)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for part in diffusion.parameters():
            part.add_(scale * torch.randn(part.shape, generator=generator, dtype=part.dtype))
    return diffusion


def run(diffusion: ControlledDiffusion, repeats: int, walkers: int, seed: int = 0, **settings: Any) -> Result:
    generator = torch.Generator().manual_seed(seed)
    return walk(diffusion, TARGET, repeats, walkers, generator, settings.pop("dtype", torch.float64), **settings)


def assert_means(result: Result) -> None:
    """Means of w, w x and w x^2 over repeats are Z, Z E[x] and Z E[x^2], within 4 errors: 5 % of Z, 8 % of moments."""
    w = (result.log_weights - LOG_Z).exp().double()
    x = result.x.double()
    for found, exact, shown in (
        (w.mean(1), torch.ones((), dtype=torch.float64), 0.05),
        ((w.unsqueeze(-1) * x).mean(1), MEAN, 0.08),
        ((w.unsqueeze(-1) * x.square()).mean(1), SQUARE, 0.08 * float(SQUARE.max())),
    ):
        error = found.std(0) / math.sqrt(len(found))
        assert bool((4 * error < shown).all()), error
        assert bool(((found.mean(0) - exact).abs() < 4 * error).all()), (found.mean(0), exact, error)


@pytest.mark.parametrize("name", SCHEMES)
def test_without_resampling_weights_are_those_of_paths(name):
    """The same noise, walked once by each: the same ends and, gathered step by step, the same weights."""
    diffusion = untrained(name)
    found = run(diffusion, 3, 40)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        tables = diffusion.tables(torch.zeros((), dtype=torch.float64))
        start = diffusion.start(tables, 120, generator)
        paths = diffusion.walk(TARGET, tables, start, generator)
        log_w = diffusion.log_weights(tables, paths)
    torch.testing.assert_close(found.x.reshape(120, 2), paths.x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.log_weights.reshape(120), log_w, rtol=1e-4, atol=1e-4)
    assert len(found.rows) == 8


MOVES: list[tuple[str, dict[str, Any]]] = [
    ("VP", {"move": MALA()}),
    ("VE", {"move": HMC(3)}),
    ("BrownianBridge", {"move": MALA(), "size": 0.3}),
    ("potential", {"move": HMC(3)}),
    ("noise", {"move": MALA(), "steps": 5}),
    ("bridge", {"move": None}),
    ("CLD", {"move": HMC(4), "size": 0.5}),
    ("CLD: potential, noise", {"move": MALA(), "moves": 2}),
    ("LearnedProcess", {"move": MALA(), "dtype": torch.float32}),
    ("annealed VP", {"move": HMC(3), "steps": 11}),
    ("annealed PSLD", {"move": MALA(), "moves": 2}),
    ("annealed CLD", {"move": HMC(3), "dtype": torch.float32}),
]


@pytest.mark.parametrize(("name", "settings"), MOVES, ids=lambda v: v if isinstance(v, str) else "")
def test_resampling_and_moves_leave_means_as_they_are(name, settings):
    """Resampled at every time, by networks that know nothing, at a number of steps that is not the scheme's too."""
    rule = Resampling("multinomial" if name == "VP" else "systematic", 1.0)
    result = run(untrained(name), 1000, 12, seed=3, resampling=rule, **settings)
    assert_means(result)
    if settings.get("move") is not None:
        rates = [row["acceptance"] for row in result.rows if row["acceptance"] is not None]
        assert len(rates) >= 4
        assert all(0.2 < rate <= 1 for rate in rates), rates


@pytest.mark.parametrize("name", ["VP", "CLD", "annealed VP"])
def test_some_repeats_are_resampled_and_some_are_not(name):
    """A threshold in the middle: weights carry over where a repeat is not due, and all walkers are moved either way."""
    result = run(untrained(name), 1000, 12, seed=4, resampling=Resampling(threshold=0.8), move=MALA())
    assert_means(result)
    spread = result.log_weights.std(1) > 1e-9
    assert bool(spread.all())


@pytest.mark.parametrize("name", ["VP", "BrownianBridge", "CLD", "annealed CLD"])
@pytest.mark.parametrize("steps", [6, 13])
def test_any_number_of_steps(name, steps):
    assert_means(run(untrained(name), 200, 100, steps=steps))


@pytest.mark.parametrize("name", [name for name in SCHEMES])
def test_the_slope_of_a_twist_is_that_of_differences(name):
    diffusion = untrained(name, 0.3).double()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        tables = diffusion.tables(torch.zeros((), dtype=torch.float64))
        start = diffusion.start(tables, 6, generator)
        z = diffusion.walk(TARGET, tables, start, generator).z
        for k in (1, 4, 7):
            twist = Twist(diffusion, tables, TARGET, k)
            rows = twist.rows(z[k])
            assert torch.equal(twist.states(rows), z[k])
            point, eps = twist.at(rows), 1e-5
            for i in range(rows.shape[-1]):
                step = eps * torch.eye(rows.shape[-1], dtype=torch.float64)[i]
                slope = (twist.at(rows + step).log_prob - twist.at(rows - step).log_prob) / (2 * eps)
                torch.testing.assert_close(point.score[:, i], slope, rtol=1e-6, atol=1e-6)
            answer = diffusion.ask(TARGET, tables, k, z[k])
            assert answer is not None
            torch.testing.assert_close(point.log_prob, diffusion.log_twist(tables, k, z[k], *answer))


def test_the_last_twist_of_a_path_is_the_target():
    """An annealed path: beta = 1 at the end, gamma(x) N(aux; 0, E); beta = 0 at the start, the prior's own density."""
    diffusion = untrained("annealed CLD")
    with torch.no_grad():
        tables, generator = diffusion.tables(torch.zeros((), dtype=torch.float64)), torch.Generator().manual_seed(2)
        z = diffusion.start(tables, 7, generator)
        for k, expected in (
            (0, diffusion.log_start(tables, z)),
            (8, TARGET.log_prob(z[0]) + diffusion.log_finish(tables, z)),
        ):
            answer = diffusion.ask(TARGET, tables, k, z)
            assert answer is not None
            torch.testing.assert_close(diffusion.log_twist(tables, k, z, *answer), expected, rtol=1e-6, atol=1e-6)


class Half(Target):
    """N(0, I) on x_0 > 0 alone: -inf elsewhere, with a score that is not a number there."""

    dim = 2
    log_z = math.log(0.5 * 2 * math.pi)

    def __init__(self) -> None:
        self.calls = 0

    def _log_density(self, x: Tensor) -> Tensor:
        value = -0.5 * x.square().sum(-1)
        return torch.where(x[:, 0] > 0, value, torch.full_like(value, math.nan))

    def _gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._log_density(x), torch.where(x[:, :1] > 0, -x, torch.full_like(x, math.nan))


@pytest.mark.parametrize("name", ["VP", "annealed VP"])
def test_walkers_may_leave_the_support_and_return(name):
    target = Half()
    result = walk(untrained(name), target, 400, 40, torch.Generator().manual_seed(1), torch.float64)
    z = (result.log_weights - target.log_z).exp().mean(1)
    assert bool(torch.isfinite(z).all())
    error = float(z.std()) / 20
    assert 4 * error < 0.1
    assert abs(float(z.mean()) - 1) < 4 * error


def test_refusals():
    plain = ControlledDiffusion(Scheme(VP(clock=CLOCK), EqualTimes(), 4, Plain(**SMALL)), 2)
    with pytest.raises(ValueError, match="resampling needs a target that is asked on the way"):
        run(plain, 2, 5, resampling=Resampling())
    nowhere = Target(lambda x: x.sum(-1) * math.nan, 2, name="nowhere")
    with pytest.raises(FloatingPointError, match="nowhere: all walkers of a repeat lost their weight"):
        walk(plain, nowhere, 2, 5, torch.Generator().manual_seed(0), torch.float64)
