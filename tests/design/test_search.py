"""Searched processes: never worse than what was given, recipes that save and load, and what the objective exploits."""

from __future__ import annotations

import pytest
import torch
import yaml

from undrift.config import build, describe
from undrift.design.gaussian import propagate
from undrift.design.objective import Objective
from undrift.design.optimise import optimise
from undrift.design.search import _embedded, search
from undrift.design.spectrum import Spectrum
from undrift.process import CLD, MALDA, VE, VP, ConstantClock, LearnedProcess, LinearProcess, Recipe, validate_recipe
from undrift.sample import SSCS, Ancestral, Exponential, Heun, LogSigma, TableSampler

FAMILY = [Spectrum.power_law(64, p) for p in (1.0, 2.0, 3.0)]
DDIM = Exponential(4, order=1)
NEAR = {"starts": [LogSigma(0.1, 5.0)], "trust": 3.0}


@pytest.fixture(scope="module")
def found():
    return search(2, SSCS(3), FAMILY, iterations=8, refined=1, **NEAR)


def test_the_process_found_is_a_recipe_that_saves_and_builds_again(found):
    assert type(found.process) is Recipe
    validate_recipe(*found.process.terms())
    text = yaml.safe_dump(found.to_dict(), sort_keys=False)
    data = yaml.safe_load(text)
    process, sampler = build(data["process"], LinearProcess), build(data["sampler"], TableSampler)
    assert describe(process) == data["process"]
    values = [float(propagate(sampler.plan(process), s).w2) for s in FAMILY]
    assert values == pytest.approx(data["values"], rel=1e-9)
    assert found.values == pytest.approx(values, rel=1e-6)
    assert found.gain > 1


def test_its_levels_are_those_that_a_denoiser_knows(found):
    assert float(found.sigma[0]) <= 80 * (1 + 1e-9)
    assert float(found.sigma[-1]) >= 0.002 * (1 - 1e-9)
    low = search(
        LearnedProcess.like(CLD()), DDIM, FAMILY, sigma_max=2.0, iterations=3, refined=1, starts=[LogSigma(0.1, 1.5)]
    )
    assert float(low.sigma[0]) <= 2 * (1 + 1e-9)


def test_the_same_arguments_give_the_same_process():
    one, two = (search(1, SSCS(3), FAMILY, iterations=8, refined=1, **NEAR) for _ in range(2))
    assert torch.equal(one.process.D, two.process.D)
    assert torch.equal(one.sigma, two.sigma)


@pytest.mark.parametrize("sampler", [DDIM, SSCS(2), Heun(2)])
def test_never_worse_than_a_design_it_was_given(sampler):
    """Even where a single iteration leaves no time to find anything."""
    given = [optimise(p, sampler, FAMILY, iterations=2, **NEAR) for p in (VP(), CLD())]
    two = LearnedProcess.random(2, clock=ConstantClock(10.0))
    found = search(two, sampler, FAMILY, candidates=given, iterations=1, refined=1, **NEAR)
    assert found.objective <= min(d.objective for d in given) + 1e-9


def test_never_worse_than_a_design_of_fewer_channels(found):
    three = LearnedProcess.random(3, clock=ConstantClock(10.0))
    more = search(three, SSCS(3), FAMILY, candidates=[found], iterations=1, refined=1, **NEAR)
    assert more.objective <= found.objective + 1e-9
    assert more.process.channels == 3


def test_auxiliaries_that_are_not_coupled_change_nothing():
    for process, channels in ((VP(), 3), (CLD(), 3), (MALDA(1), 2)):
        for sampler in (DDIM, SSCS(3), Ancestral(3)):
            narrow, wide = (sampler.plan(p) for p in (process, _embedded(process, channels, 0.0)))
            for s in FAMILY:
                torch.testing.assert_close(propagate(wide, s).cov[:, 0, 0], propagate(narrow, s).cov[:, 0, 0])


def test_it_begins_off_the_saddle():
    """Without coupling, or with one among equals, nothing tells the objective about the auxiliaries; beside it does."""

    def slope(process: Recipe) -> float:
        learned = LearnedProcess.like(process, learn=("Q", "D"), floor=1e-4)
        with torch.no_grad():
            times = LogSigma(0.1, 5.0).times(learned, 4)
        value = Objective(DDIM, FAMILY, "w2", None, 3.0, 0.0)(learned, times)
        (gradient,) = torch.autograd.grad(value, learned.Q_raw)
        return float(gradient.abs().max())

    assert slope(_embedded(VP(), 2, 0.0)) < 1e-10
    assert slope(_embedded(VP(), 2, 0.25)) > 1e-3
    turned = Recipe(0.5 * torch.eye(2), torch.tensor([[0.0, -0.2], [0.2, 0.0]]), clock=VP().clock, start_cov=0.25)
    narrow, wide = DDIM.plan(VP()), DDIM.plan(turned)
    torch.testing.assert_close(propagate(wide, FAMILY[0]).variance, propagate(narrow, FAMILY[0]).variance)


def test_a_learned_process_is_where_it_begins_and_stays_as_it_is():
    learned = LearnedProcess.like(CLD(), learn=("D",))
    before = {k: v.clone() for k, v in learned.state_dict().items()}
    found = search(learned, DDIM, FAMILY, iterations=10, refined=1, **NEAR)
    assert all(torch.equal(before[k], v) for k, v in learned.state_dict().items())
    q, s = learned.terms()[1:]
    torch.testing.assert_close(found.process.Q, q)
    torch.testing.assert_close(found.process.S, s)
    torch.testing.assert_close(found.process.start(), learned.start())
    assert float((found.process.D - learned.terms()[0].detach()).abs().max()) > 1e-3
    assert found.objective < optimise(learned, DDIM, FAMILY, iterations=40, **NEAR).objective


def test_an_interruption_leaves_the_process_as_it_was(monkeypatch):
    learned = LearnedProcess.like(CLD())
    before = {k: v.clone() for k, v in learned.state_dict().items()}
    calls = 0
    original = Objective.__call__

    def interrupted(self, process, times):
        nonlocal calls
        calls += 1
        if calls == 9:
            raise KeyboardInterrupt
        return original(self, process, times)

    monkeypatch.setattr(Objective, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        search(learned, DDIM, FAMILY)
    assert calls == 9
    assert all(torch.equal(before[k], v) for k, v in learned.state_dict().items())


def test_a_design_for_other_calls_is_resampled():
    given = optimise(VP(), Exponential(6, order=1), FAMILY, iterations=2, **NEAR)
    found = search(1, DDIM, FAMILY, candidates=[given], iterations=3, **NEAR)
    assert found.sigma.shape == (4,)


def test_the_budget_is_kept():
    """A fifteenth of it for each process, all of it for those refined; at most two evaluations an iteration."""
    lines: list[str] = []
    found = search(LearnedProcess.like(VP()), DDIM, FAMILY, iterations=15, refined=1, say=lines.append)
    assert found.evaluations <= 2 * (15 + 1) + 5 + 2
    assert len(lines) == 1
    assert "->" in lines[0]


def test_strangeness_tells_of_a_design_that_only_a_closed_form_can_carry_out():
    """One channel, five calls of DDIM: its samples are too narrow, so a prior that is too wide sets them right.

    On paper it gains a factor of ten and more. The denoiser is shown inputs wider than it was ever trained on.
    """
    sampler = Exponential(5, order=1)
    honest = optimise(VP(), sampler, FAMILY, iterations=40, **NEAR)
    settings = {"candidates": [honest], "starts": NEAR["starts"], "refined": 1}
    exploited = search(1, sampler, FAMILY, trust=0.0, iterations=45, **settings)
    assert exploited.value < 0.1 * honest.value
    assert float(exploited.process.S) > 4
    assert honest.strangeness < 0.05
    assert exploited.strangeness > 5 * honest.strangeness
    trusted = search(1, sampler, FAMILY, trust=100.0, iterations=15, **settings)
    assert trusted.strangeness < 0.05


def test_errors_come_before_the_work():
    with pytest.raises(ValueError, match="at least one channel"):
        search(0, DDIM, FAMILY)
    with pytest.raises(ValueError, match="nothing to learn"):
        search(LearnedProcess.like(CLD(), learn=()), DDIM, FAMILY)
    with pytest.raises(ValueError, match="VE is not made by the recipe"):
        search(2, DDIM, FAMILY, candidates=[VE()])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="a candidate of 3 channels"):
        search(2, DDIM, FAMILY, candidates=[MALDA(2)])
    with pytest.raises(ValueError, match="at least 1, got 0 and 300"):
        search(2, DDIM, FAMILY, refined=0)
    with pytest.raises(ValueError, match="reaches no more than"):
        search(LearnedProcess.like(CLD(clock=ConstantClock(1e-3))), DDIM, FAMILY, sigma_min=1.0)
