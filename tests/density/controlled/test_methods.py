"""Learned samplers as methods: settings, costs, draws with bounds, files, and how they fail."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from undrift.config import build, describe
from undrift.container import CheckpointError
from undrift.density import (
    CMCD,
    DDS,
    DIS,
    HMC,
    MALA,
    PIS,
    ULA,
    Affine,
    Bridge,
    Controlled,
    Draws,
    Laplace,
    Method,
    Resampling,
    Target,
    Trained,
    TrainedSampler,
)
from undrift.density.archive import load_draws, save_draws
from undrift.density.controlled.control import Control, Exact, Informed, Plain, Potential
from undrift.density.controlled.diffusion import ControlledDiffusion, Scheme
from undrift.density.controlled.grid import EqualTimes, GivenTimes, PowerTimes
from undrift.density.controlled.objective import KL, LogDerivative, LogVariance, Replay, TrajectoryBalance
from undrift.density.controlled.train import Training
from undrift.density.controlled.trust_region import TrustRegion
from undrift.density.targets import Gaussian, Mixture9
from undrift.density.trust import warnings
from undrift.process import CLD, HOLD, PSLD, VP, BrownianBridge, LearnedClock, LearnedProcess, LinearClock, SubVP

LOG_Z = 0.7
ODD = Gaussian(dim=2, loc=0.4, scale=0.5, condition=4.0, log_z=LOG_Z)
TINY: dict[str, Any] = {"width": 8, "depth": 1}
FEW = Training(steps=3, batch=6, warmup=1, average=2, record=2)
METHODS: dict[str, Controlled] = {
    "PIS": PIS(steps=6, control=Informed(interpolate=False, initial=0.01, **TINY), training=FEW),
    "DIS": DIS(steps=6, control=Informed(**TINY), training=FEW),
    "DIS, CLD": DIS(process=CLD(clock=LinearClock(0.1, 6.0)), steps=6, control=Informed(**TINY), training=FEW),
    "DIS, potential": DIS(steps=6, control=Potential(**TINY), training=FEW),
    "DIS, learned": DIS(
        process=LearnedProcess.random(2, seed=1),
        steps=6,
        control=Informed(**TINY),
        training=FEW,
        objective=LogDerivative(),
    ),
    "DIS, elsewhere": DIS(steps=6, control=Informed(**TINY), training=FEW, coordinates=Affine(0.3, 1.4)),
    "DDS": DDS(steps=6, control=Informed(interpolate=False, initial=0.01, **TINY), training=FEW),
    "Bridge": Bridge(steps=6, control=Informed(**TINY), backward=Plain(**TINY), training=FEW),
    "CMCD": CMCD(steps=6, control=Plain(**TINY), training=FEW),
    "CMCD, resampled": CMCD(
        steps=6,
        control=Plain(**TINY),
        training=FEW,
        resampling=Resampling(),
        move=HMC(),
        moves=2,
        coordinates=Laplace(),
    ),
}


HEAVY = CLD(mass=torch.tensor(0.3, requires_grad=True))


def annealed(control: Control, **settings: Any) -> ControlledDiffusion:
    return ControlledDiffusion(Scheme(VP(), EqualTimes(), 4, control, annealed=True, **settings), 2)


def same(a: Draws, b: Draws) -> None:
    assert torch.equal(a.states, b.states)
    assert a.walker_log_weights is not None
    assert b.walker_log_weights is not None
    assert torch.equal(a.walker_log_weights, b.walker_log_weights)
    assert a.bounds == b.bounds


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_settings_come_back_and_give_the_same_draws(name: str) -> None:
    method, before = METHODS[name], torch.random.get_rng_state()
    again = build(describe(method), Method)
    assert describe(again) == describe(method)
    one, two = (m.run(ODD, 24, seed=5, repeats=2) for m in (method, again))
    same(one, two)
    assert not torch.equal(one.states, method.run(ODD, 24, seed=6, repeats=2).states)
    assert torch.equal(torch.random.get_rng_state(), before), "no randomness but the run's own"
    assert one.evaluations == two.evaluations


def test_names_are_settings_of_one_class() -> None:
    """The same settings in the general class give the same draws."""
    for name in ("PIS", "DDS", "CMCD"):
        method = METHODS[name]
        plain = Controlled(**{key: getattr(method, key) for key in Controlled.__dataclass_fields__})
        same(plain.run(ODD, 24, seed=5, repeats=2), method.run(ODD, 24, seed=5, repeats=2))
        assert method.in_words().startswith(name)
        assert plain.in_words().startswith("controlled diffusion")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DIS(steps=0), "DIS: steps must be at least 1, got 0"),
        (lambda: DIS(train_steps=0), "DIS: train_steps must be at least 1, got 0"),
        (lambda: DIS(moves=0), "moves"),
        (lambda: DIS(move_size=0.0), "move_size"),
        (lambda: DIS(integrator="heun"), "integrator must be exponential or euler, got 'heun'"),
        (lambda: DIS(gain="half"), "gain must be posterior or score, got 'half'"),
        (lambda: DIS(learn=("drift",), objective=KL()), "learn holds some of noise, prior, levels"),
        (lambda: DIS(learn=("noise", "noise"), objective=KL()), "each once"),
        (lambda: DIS(learn=("prior",), objective=KL()), "prior is for annealed"),
        (lambda: DIS(learn=("noise",)), "noise cannot be learned with LogVariance"),
        (lambda: DIS(process=LearnedProcess.random(2)), "process cannot be learned with LogVariance"),
        (lambda: CMCD(objective=LogVariance()), "noise, prior, levels cannot be learned"),
        (lambda: CMCD(control=Informed()), "Plain"),
        (lambda: CMCD(backward=Plain()), "backward: null"),
        (lambda: annealed(Informed()), "its control is Plain"),
        (lambda: annealed(Potential()), "its control is Plain"),
        (lambda: annealed(Exact(lambda x, sigma: x)), "its control is Plain"),
        (lambda: annealed(Plain(), backward=Plain()), "backward: null"),
        (lambda: annealed(Plain(), gain="score"), "gain = score: these are for reversals"),
        (lambda: CMCD(integrator="euler"), "integrator = euler, gain = posterior: these are for reversals"),
        (lambda: Bridge(backward=Informed()), "cannot be guided"),
        (lambda: Bridge(objective=TrustRegion()), "TrustRegion: trains the forward control"),
        (lambda: DIS(move=MALA()), "give resampling"),
        (lambda: DIS(resampling=Resampling(), move=ULA()), "MALA or HMC"),
        (lambda: DIS(resampling=Resampling(), control=Plain()), "never asks"),
        (lambda: DIS(objective=LogVariance(paths_per_start=3), training=Training(batch=8)), "multiple"),
        (lambda: Trained("somewhere", steps=0), "steps"),
        (lambda: DIS(grid=GivenTimes([1.0, 0.5, 0.0]), steps=3), "3 steps need 4 times"),
        (lambda: DIS(grid=GivenTimes([1.0, 0.5, 0.0]), steps=2, train_steps=3), "3 steps need 4 times"),
        (lambda: DIS(grid=GivenTimes([2.0, 0.5, 0.0]), steps=2), "must fall strictly from T = 1 to 0"),
        (lambda: DIS(process=CLD(), integrator="euler"), "no noise on some channels.* exponential integrator"),
        (lambda: DIS(process=PSLD(aux_scale=0.0)), "auxiliaries that start without noise"),
        (lambda: PIS(integrator="euler"), "infinite at T; take the exponential integrator"),
        (lambda: CMCD(process=BrownianBridge()), "recipe process such as VP"),
        (lambda: DIS(process=VP(clock=LearnedClock([1.0, 9.0]))), "VP has parameters .* LearnedProcess.like"),
        (lambda: CMCD(process=VP(clock=LearnedClock([1.0, 9.0]))), "VP has parameters .* LearnedProcess.like"),
        (lambda: DIS(process=SubVP(clock=LearnedClock([1.0, 9.0]))), "SubVP has parameters .* give one without"),
        (lambda: ControlledDiffusion(Scheme(HEAVY, EqualTimes(), 4, Plain()), 2), "CLD has parameters"),
    ],
)
def test_settings_that_do_not_fit(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_settings_are_checked_on_a_chain_of_two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the steps it has: with auxiliaries, 1000 of them take more than half a second."""
    made, base = [], ControlledDiffusion.base_chain

    def seen(diffusion: ControlledDiffusion, steps: int | None = None) -> Any:
        made.append(base(diffusion, steps))
        return made[-1]

    monkeypatch.setattr(ControlledDiffusion, "base_chain", seen)
    DIS(process=HOLD(), steps=1000, train_steps=500)
    assert [chain.steps for chain in made] == [2]


@pytest.mark.parametrize("repeats", [0, 9])
def test_repeats_that_do_not_fit(repeats: int, tmp_path: Path) -> None:
    target = Target(ODD.log_prob, 2, name="odd")
    with pytest.raises(ValueError, match="repeat"):
        DIS().run(target, 8, repeats=repeats, checkpoint=tmp_path / "run")
    assert target.evaluations.total == 0
    assert not list(tmp_path.iterdir())


# -- what it costs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "per_path"),
    [("PIS", (1, 6)), ("DIS, CLD", (1, 6)), ("DIS, elsewhere", (1, 6)), ("Bridge", (1, 6)), ("CMCD", (0, 7))],
)
def test_every_evaluation_is_counted_and_none_is_wasted(name: str, per_path: tuple[int, int]) -> None:
    """K gradients and one value a path, or K + 1 gradients: in training, in draws, and on the way back."""
    method = METHODS[name]

    def spent(n: int, steps: int, exact: bool) -> torch.Tensor:
        target: Target = ODD if exact else Target(ODD.log_prob, 2, name="odd")
        before = target.evaluations.copy()
        draws = replace(method, training=replace(FEW, steps=steps)).run(target, n, seed=1, repeats=2)
        assert draws.evaluations == target.evaluations - before
        return torch.tensor([draws.evaluations.values, draws.evaluations.gradients])

    one = torch.tensor(per_path)
    base = spent(10, 0, False)
    assert torch.equal(spent(10, 3, False) - base, 3 * FEW.batch * one)
    assert torch.equal(spent(24, 0, False) - base, 14 * one)
    assert torch.equal(spent(24, 0, True) - spent(10, 0, True), 2 * 14 * one)


# -- draws -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_draws_carry_exact_weights_bounds_and_how_they_were_made(name: str) -> None:
    """Hardly trained: E[w] = Z, E ELBO <= log Z <= E EUBO, each within 4 standard errors."""
    method = METHODS[name]
    draws = method.run(ODD, 2048, seed=2, repeats=16)
    assert draws.promise == "unbiased"
    assert draws.corrected
    assert draws.repeat_log_z is not None
    ratio = (draws.repeat_log_z - LOG_Z).exp()
    assert abs(float(ratio.mean()) - 1) < 4 * float(ratio.std()) / 4
    assert (draws.bounds is None) == (method.resampling is not None), "resampled walkers are no independent paths"
    if draws.bounds is not None:
        assert draws.bounds.eubo is not None
        assert draws.bounds.eubo_std_error is not None
        assert draws.bounds.forward_log_z == pytest.approx(LOG_Z, abs=0.15)
        assert draws.bounds.elbo < LOG_Z + 4 * draws.bounds.elbo_std_error
        assert draws.bounds.eubo > LOG_Z - 4 * draws.bounds.eubo_std_error
    weights = draws.walker_log_weights
    assert weights is not None
    mean = (weights.reshape(-1).softmax(0).unsqueeze(-1) * draws.x).sum(0)
    assert bool(((mean - 0.4).abs() < 4 * torch.tensor([0.5, 1.0]) / math.sqrt(draws.ess)).all())
    assert draws.method == method.in_words()
    assert draws.sampler.method is method
    assert [row["step"] for row in draws.training] == [2, 3]
    assert not [line for line in warnings(draws) if "wrong" in line]


def test_resampling_and_moves_correct_a_walk_that_is_hardly_trained() -> None:
    corrected: dict[str, Any] = {"resampling": Resampling(threshold=0.7), "move": HMC(), "moves": 2, "move_size": 0.5}
    method = replace(METHODS["CMCD"], steps=24, **corrected)
    draws = method.run(ODD, 4096, seed=2, repeats=16)
    plain = replace(method, move=None, resampling=None).run(ODD, 4096, seed=2, repeats=16)
    assert draws.log_z == pytest.approx(LOG_Z, abs=3 * draws.log_z_std_error)
    assert draws.log_z_std_error < 0.05
    assert draws.ess > plain.ess
    assert draws.acceptance is not None
    assert 0.3 < draws.acceptance <= 1
    assert len(draws.levels) == 24


def test_the_spread_of_repeats_is_that_of_the_weights() -> None:
    """Var log Z^ = (1 / ESS - 1) / n for each of 64 repeats: 9 % of its root, and as much for the tails."""
    draws = METHODS["DIS"].run(ODD, 64 * 128, seed=4, repeats=64)
    assert draws.repeat_log_z is not None
    share = draws.ess / (64 * 128)
    assert float(draws.repeat_log_z.std()) == pytest.approx(math.sqrt((1 / share - 1) / 128), rel=0.35)


def test_a_control_trained_with_few_steps_draws_with_many() -> None:
    few = METHODS["DIS"].run(ODD, 512, seed=1)
    many = replace(METHODS["DIS"], train_steps=6, steps=40).run(ODD, 512, seed=1)
    assert [row["loss"] for row in few.training] == [row["loss"] for row in many.training]
    assert len(many.levels) == 40
    again = few.sampler.draw(512, seed=3, steps=40)
    same(again, many.sampler.draw(512, seed=3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_have_the_numbers_asked_for(dtype: torch.dtype) -> None:
    draws = METHODS["DIS, CLD"].run(ODD, 256, seed=1, dtype=dtype)
    assert draws.states.dtype == dtype
    assert draws.walker_log_weights is not None
    assert draws.walker_log_weights.dtype == torch.float64


# -- on disk -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_a_sampler_in_a_file_draws_as_it_did(name: str, tmp_path: Path) -> None:
    kept = METHODS[name].run(ODD, 16, seed=5, repeats=2).sampler
    path = kept.save(tmp_path / "sampler.safetensors")
    found = TrainedSampler.load(path, ODD)
    assert describe(found.method) == describe(kept.method)
    assert found.record == kept.record
    one, two = (s.draw(40, seed=7, repeats=4) for s in (kept, found))
    same(one, two)
    assert one.evaluations == two.evaluations
    assert one.evaluations.total > 0
    third = Trained(str(path)).run(ODD, 40, seed=7, repeats=4)
    same(one, third)
    assert third.evaluations == one.evaluations
    assert describe(build(describe(Trained("a", 3)), Method)) == describe(Trained("a", 3))
    same(Trained(str(path), steps=9).run(ODD, 40, seed=7, repeats=4), kept.draw(40, seed=7, repeats=4, steps=9))


def test_files_and_numbers_that_do_not_fit(tmp_path: Path) -> None:
    draws = METHODS["DIS"].run(ODD, 16, seed=5, repeats=2)
    path = draws.sampler.save(tmp_path / "sampler.safetensors")
    with pytest.raises(ValueError, match="was trained for Gaussian in 2 dimensions, got Mixture9"):
        TrainedSampler.load(path, Mixture9())
    with pytest.raises(ValueError, match="in 2 dimensions, got Gaussian in 3"):
        TrainedSampler.load(path, replace(ODD, dim=3))
    with pytest.raises(ValueError, match="holds no trained sampler"):
        TrainedSampler.load(save_draws(tmp_path / "draws.safetensors", draws), ODD)
    with pytest.raises(FileNotFoundError):
        Trained(str(tmp_path / "nothing")).run(ODD, 16)
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CheckpointError):
        TrainedSampler.load(path, ODD)
    before = ODD.evaluations.copy()
    for n, repeats in ((0, 8), (4, 8), (8, 0)):
        with pytest.raises(ValueError, match="repeats must be at least 1 and at most n"):
            draws.sampler.draw(n, repeats=repeats)
    with pytest.raises(ValueError, match="steps"):
        draws.sampler.draw(8, steps=0)
    assert (ODD.evaluations - before).total == 0


def test_draws_in_a_file_keep_bounds_and_training(tmp_path: Path) -> None:
    draws = METHODS["CMCD"].run(ODD, 16, seed=5, repeats=2)
    found = load_draws(save_draws(tmp_path / "draws.safetensors", draws))
    assert found.bounds == draws.bounds
    assert [dict(row) for row in found.training] == [dict(row) for row in draws.training]


def test_more_settings_come_back() -> None:
    for method in (
        DIS(objective=LogVariance(replay=Replay(power=0.2))),
        DIS(objective=TrajectoryBalance(rate=0.3), control=Potential(), grid=PowerTimes(3.0)),
        DIS(objective=TrustRegion(bound=0.3), resampling=Resampling(threshold=0.3), move=MALA()),
        DIS(process=VP(clock=LinearClock(0.2, 5.0)), learn=("noise",), objective=KL(), grid=EqualTimes()),
        CMCD(learn=("levels",), process=CLD(), training=Training(chunk=3, precision="float64")),
    ):
        assert describe(build(describe(method), Method)) == describe(method)
