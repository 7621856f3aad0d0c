"""Training of controlled diffusions: what a few seconds reach, which modes are kept, and that interruptions do not."""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from undrift._journal import Journal
from undrift.density import CMCD, DDS, DIS, PIS, Affine, Bridge, Controlled, Draws, Target
from undrift.density.controlled.control import Control, Field, Informed, Plain, Potential, View
from undrift.density.controlled.diffusion import ControlledDiffusion, Scheme
from undrift.density.controlled.grid import EqualAngles, EqualTimes
from undrift.density.controlled.matching import AdjointMatching, ScoreMatching
from undrift.density.controlled.objective import (
    KL,
    LogDerivative,
    LogVariance,
    Objective,
    Replay,
    Runner,
    TrajectoryBalance,
    Work,
)
from undrift.density.controlled.stages import Stages
from undrift.density.controlled.train import Training, train
from undrift.density.controlled.trust_region import TrustRegion
from undrift.density.move import MALA
from undrift.density.schedule import Resampling
from undrift.density.targets import Gaussian, Mixture9, TwoModes
from undrift.process import VP, LearnedClock, LearnedProcess, LinearClock

loop = importlib.import_module("undrift.density.controlled.train")  # the package has a function of this name

SMALL: dict[str, Any] = {"width": 32, "depth": 2}
QUICK = Training(steps=60, batch=256, rate=5e-3, warmup=5, average=20, record=10)
SHORT = replace(QUICK, batch=128)
ODD = Gaussian(dim=2, loc=0.4, scale=0.3, condition=9.0, log_z=0.7)
DRIVEN = Informed(interpolate=False, initial=0.01, **SMALL)


# -- what is learned ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "gap", "ess"),
    [  # nats from ELBO or EUBO to log Z, and effective share; seeds 1 to 3 gave .17 at most, and .78 at least
        (PIS(steps=25, control=DRIVEN, training=SHORT), 0.25, 0.7),
        (DDS(steps=25, control=DRIVEN, training=SHORT), 0.25, 0.7),
        (Bridge(steps=16, control=Informed(**SMALL), backward=Plain(**SMALL), training=SHORT), 0.25, 0.7),
        (CMCD(steps=16, control=Plain(**SMALL), training=SHORT), 0.25, 0.7),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_minute_of_two_dimensions(method: Controlled, gap: float, ess: float) -> None:
    draws = method.run(ODD, 2048, seed=1, repeats=8)
    assert draws.bounds is not None
    assert draws.bounds.eubo is not None
    assert draws.bounds.elbo > 0.7 - gap
    assert draws.bounds.eubo < 0.7 + gap
    assert draws.ess / 2048 > ess
    assert draws.log_z == pytest.approx(0.7, abs=4 * draws.log_z_std_error + 1e-9)
    assert draws.training[-1]["elbo"] > draws.training[0]["elbo"]
    assert [row["step"] for row in draws.training] == [10, 20, 30, 40, 50, 60]


def test_nine_modes_in_sixty_steps() -> None:
    method = DIS(steps=50, coordinates=Affine(0.0, 3.0), training=QUICK)
    draws = method.run(Mixture9(), 2048, seed=1, repeats=8)
    assert draws.ess / 2048 > 0.25
    assert draws.bounds is not None
    assert draws.bounds.eubo is not None
    assert draws.bounds.eubo < 1.0, "no mode is missing"


def test_kl_loses_a_mode_that_log_variance_keeps() -> None:
    """Modes of weights .3 and .7, the walkers' start on the first, 3.2 deviations from the second.

    KL is minimised by the first one alone, log .3 = -1.2 nats below log Z; paths with more noise see both.
    """
    found: dict[str, tuple[float, float]] = {}
    for objective in (KL(), LogVariance(spread=1.5)):
        method = DIS(
            steps=12,
            control=Plain(**SMALL),
            coordinates=Affine(-4.0, 2.5),
            objective=objective,
            training=replace(QUICK, steps=80, rate=1e-2),
        )
        draws = method.run(TwoModes(weight=0.3, distance=4.0), 2048, seed=0, repeats=8)
        assert draws.walker_log_weights is not None
        assert draws.bounds is not None
        right = draws.x[:, 0] > 0
        weight = float(draws.walker_log_weights.reshape(-1).softmax(0)[right].sum())
        found[type(objective).__name__] = weight, float(right.double().mean())
        if isinstance(objective, KL):
            assert draws.bounds.elbo == pytest.approx(math.log(0.3), abs=0.25)
            assert draws.bounds.eubo is not None
            assert draws.bounds.eubo > 5, "the bound from above shows what the weights do not"
    weight, share = found["KL"]
    assert weight < 0.02
    assert share < 0.02
    weight, share = found["LogVariance"]
    assert weight == pytest.approx(0.7, abs=0.06)  # the ESS is about half of 2048: a standard error of .015
    assert share > 0.4


def test_learned_noise_is_better_than_given_noise() -> None:
    method = DIS(steps=6, control=Informed(**SMALL), objective=LogDerivative(), training=QUICK)
    given, learned = (m.run(ODD, 2048, seed=1) for m in (method, replace(method, learn=("noise",))))
    assert given.bounds is not None
    assert learned.bounds is not None
    assert learned.bounds.elbo > given.bounds.elbo + 0.05
    assert learned.sampler.diffusion.log_noise.abs().max() > 0.05


def test_a_learned_process_is_better_than_the_one_it_began_with() -> None:
    """One that has forgotten half of the data at T learns to forget more."""
    process = LearnedProcess(2, [[0.0, -0.3], [0.3, 0.0]], [[0.1, 0.0], [0.0, 0.1]], clock=LinearClock(0.1, 4.0))
    method = DIS(
        process=process,
        steps=6,
        control=Informed(**SMALL),
        objective=LogDerivative(),
        training=replace(QUICK, rate=1e-2),
    )
    learned, given = (m.run(ODD, 2048, seed=1) for m in (method, replace(method, process=process.frozen())))
    assert given.bounds is not None
    assert learned.bounds is not None
    assert learned.bounds.elbo > given.bounds.elbo + 0.15
    after = learned.sampler.diffusion.process.terms()
    moved = [float((a - b).detach().abs().max()) for a, b in zip(after, process.terms(), strict=True)]
    assert max(moved) > 0.02
    assert process.terms()[0][0, 0].item() == pytest.approx(0.1), "the setting itself stays as it was"


def test_a_learned_clock_is_learned() -> None:
    """Of one channel and one knot at each end: both rates move, the noise stays, and the setting is as it was."""
    process = LearnedProcess.like(VP(clock=LearnedClock([0.1, 2.0])), learn=("clock",))
    method = DIS(
        process=process,
        steps=4,
        control=Informed(**SMALL),
        objective=LogDerivative(),
        training=replace(QUICK, steps=20, rate=2e-2),
    )
    after = method.run(ODD, 16, seed=1).sampler.diffusion.process
    moved = (after.clock.log_rates - process.clock.log_rates).detach().abs()
    assert bool((moved > 0.02).all())
    assert torch.equal(after.terms()[0], process.terms()[0])
    assert process.clock.log_rates.exp().tolist() == pytest.approx([0.1, 2.0])


# -- the loop ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Bowl(Objective):
    """A parabola, for which the parameters' way is known; NaN at some steps."""

    lost: tuple[int, ...] = ()

    def runner(self, work: Work) -> Runner:
        return _Bowl(self, work)


class _Bowl(Runner):
    def __init__(self, objective: Bowl, work: Work) -> None:
        self.objective, self.work, self.count = objective, work, 0

    def step(self) -> dict[str, float]:
        self.count += 1
        loss = sum(p.square().sum() for p in self.work.diffusion.parameters())
        if self.count in self.objective.lost:
            loss = loss * math.nan
        loss.backward()  # type: ignore[union-attr]
        return {"loss": loss.item(), "odd": math.nan if self.count % 2 else float(self.count)}


@dataclass(frozen=True, eq=False)
class One(Control):
    """A control of one number, at first 1."""

    def field(self, inputs: int, dim: int) -> Field:
        return _One()


class _One(Field):
    def __init__(self) -> None:
        super().__init__()
        self.value = torch.nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, view: View, times: tuple[Tensor, ...]) -> Tensor:
        return self.value.expand_as(view.y)


def one() -> ControlledDiffusion:
    return ControlledDiffusion(Scheme(VP(), EqualAngles(), 3, One()), 1)


def run_bowl(settings: Training, lost: tuple[int, ...] = ()) -> tuple[float, list[dict[str, Any]]]:
    diffusion = one()
    rows = train(diffusion, ODD, Bowl(lost), settings, torch.Generator().manual_seed(0))
    return float(next(diffusion.parameters()).detach()), rows


def test_rates_averages_and_records() -> None:
    """Adam's first steps are of the rate itself: 1, less rates that rise over 4 steps and fall by half a cosine."""
    settings = Training(steps=3, batch=2, rate=0.01, final=0.1, warmup=2, average=0, record=2, clip=0.5)
    assert [settings.factor(k) for k in range(4)] == pytest.approx([0.5, 1.0, 1.0, 0.1])
    value, rows = run_bowl(settings)
    assert value == pytest.approx(1 - 0.005 - 0.01 - 0.01, abs=1e-4)
    assert [row["step"] for row in rows] == [2, 3]
    assert rows[0]["loss"] == pytest.approx((1 + 0.995**2) / 2)
    assert (rows[0]["odd"], rows[1]["odd"]) == (2.0, None), "means of what is a number"
    assert rows[0]["gradient_norm"] == pytest.approx(2 - 0.005), "before it is clipped"
    places = [1.0, 0.995, 0.985, 0.975]
    mean = places[0]
    for k, place in enumerate(places[1:]):
        keep = min(0.5, (1 + k) / (10 + k))
        mean = keep * mean + (1 - keep) * place
    assert run_bowl(replace(settings, average=2))[0] == pytest.approx(mean, abs=1e-4)
    assert run_bowl(replace(settings, steps=0)) == (1.0, [])


def test_steps_without_a_number_are_skipped_and_too_many_are_an_error() -> None:
    settings = Training(steps=8, batch=2, rate=0.01, warmup=0, final=1.0, average=0, record=4)
    value, rows = run_bowl(settings, lost=(2, 3, 7))
    assert value == pytest.approx(1 - 5 * 0.01, abs=1e-3)
    assert [row["skipped"] for row in rows] == [2, 3]
    run_bowl(replace(settings, steps=60), lost=tuple(range(1, 50)))
    with pytest.raises(FloatingPointError, match="50 training steps in a row"):
        run_bowl(replace(settings, steps=60), lost=tuple(range(3, 53)))


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"steps": -1}, "steps"),
        ({"batch": 1}, "batch"),
        ({"warmup": -1}, "warmup"),
        ({"average": -1}, "average"),
        ({"record": 0}, "record"),
        ({"chunk": 0}, "chunk"),
        ({"rate": 0.0}, "rate"),
        ({"clip": math.nan}, "clip"),
        ({"final": 0.0}, "final"),
        ({"precision": "float16"}, "precision"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=f"Training: {word}"):
        Training(**settings)


# -- interruptions -----------------------------------------------------------------------------------------------------

FEW = Training(steps=11, batch=8, warmup=2, average=4, record=2)
TINY: dict[str, Any] = {"width": 8, "depth": 1}
BASE = DIS(steps=5, control=Informed(**TINY), training=FEW)
TRUST = TrustRegion(buffer=16, refresh=4)
RUNS: dict[str, Controlled] = {
    "replay": replace(BASE, objective=LogVariance(replay=Replay(capacity=20))),
    "trust region": replace(BASE, objective=TRUST, training=replace(FEW, chunk=2), coordinates=Affine(0.2, 1.5)),
    "KL": replace(BASE, objective=KL()),
    "TrajectoryBalance": replace(BASE, objective=TrajectoryBalance(), control=Plain(**TINY)),
    "learned process": replace(
        BASE,
        process=LearnedProcess.like(VP(), learn=("D", "clock"), knots=3),
        grid=EqualTimes(),
        objective=LogDerivative(),
    ),
    "CMCD": CMCD(steps=5, control=Plain(**TINY), training=FEW),
    "particles": replace(
        BASE,
        control=Potential(**TINY),
        objective=ScoreMatching(
            draws=16, examples=32, refresh=3, replace=4, resampling=Resampling(threshold=0.9), move=MALA()
        ),
    ),
    "adjoint, then trust": replace(
        BASE, objective=Stages(AdjointMatching(draws=8, examples=24, refresh=2, buffer=12), TRUST, after=5, batch=6)
    ),
}


class Keyboard:
    """Interrupts a run at a step, or at a call of the target."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.step, self.call = -1, -1
        self.steps = self.calls = 0
        average = loop._average

        def count(*args: Any) -> None:
            self.steps += 1
            if self.steps == self.step:
                raise KeyboardInterrupt
            average(*args)

        monkeypatch.setattr(loop, "_average", count)
        monkeypatch.setattr(Journal.__init__, "__defaults__", ("", 0.0))

    def at(self, step: int = -1, call: int = -1) -> None:
        self.step, self.call, self.steps, self.calls = step, call, 0, 0

    def log_prob(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.call:
            raise KeyboardInterrupt
        return ODD.log_prob(x)

    def target(self) -> Target:
        return Target(self.log_prob, 2, sample=lambda n, g: ODD.sample(n, g), name="odd")


@pytest.fixture
def keyboard(monkeypatch: pytest.MonkeyPatch) -> Keyboard:
    return Keyboard(monkeypatch)


def timeless(rows: Any) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def same(a: Draws, b: Draws) -> None:
    assert torch.equal(a.states, b.states)
    assert a.walker_log_weights is not None
    assert b.walker_log_weights is not None
    assert torch.equal(a.walker_log_weights, b.walker_log_weights)
    assert a.bounds == b.bounds
    assert timeless(a.training) == timeless(b.training)
    for one, other in zip(a.sampler.diffusion.parameters(), b.sampler.diffusion.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", RUNS)
def test_an_interruption_leaves_no_trace(name: str, keyboard: Keyboard, tmp_path: Path) -> None:
    """Interrupted in training twice, and then while it draws: bit for bit the draws and the record of a quiet run."""
    method = RUNS[name]

    def run(file: Path | None) -> Draws:
        return method.run(keyboard.target(), 40, seed=3, repeats=2, checkpoint=file)

    expected = run(None)
    for places in ((1,), (6, 4)):
        file = tmp_path / f"{places}"
        for place in places:
            keyboard.at(step=place)
            with pytest.raises(KeyboardInterrupt):
                run(file)
        keyboard.at()
        same(run(file), expected)
        done = keyboard.steps
        assert done <= FEW.steps - (max(places) - 1) // 2 * 2, "what was done is not done again"
        assert not file.exists()
    file = tmp_path / "draw"
    keyboard.at()
    run(file)
    calls = keyboard.calls
    keyboard.at(call=calls)
    with pytest.raises(KeyboardInterrupt):
        run(file)
    keyboard.at()
    same(run(file), expected)
    assert keyboard.steps == 0, "training was complete"


def test_a_checkpoint_of_another_run_is_refused(keyboard: Keyboard, tmp_path: Path) -> None:
    file = tmp_path / "run"
    keyboard.at(step=6)
    with pytest.raises(KeyboardInterrupt):
        BASE.run(keyboard.target(), 40, seed=3, repeats=2, checkpoint=file)
    kept = file.read_bytes()
    others = [
        replace(BASE, steps=6),
        replace(BASE, objective=LogVariance(spread=1.1)),
        replace(BASE, training=replace(FEW, rate=1e-3)),
        replace(BASE, control=Plain(**TINY)),
    ]
    for other in others:
        with pytest.raises(ValueError, match="belongs to a run with another"):
            other.run(keyboard.target(), 40, seed=3, repeats=2, checkpoint=file)
        with pytest.raises(ValueError, match="belongs to a run with another"):
            BASE.run(keyboard.target(), 40, seed=4, repeats=2, checkpoint=file)
    assert file.read_bytes() == kept


def test_costs_of_an_interrupted_run_are_those_of_its_parts(keyboard: Keyboard, tmp_path: Path) -> None:
    """What was kept counts once, what was lost with the interruption not at all."""
    file = tmp_path / "run"
    quiet = BASE.run(keyboard.target(), 40, seed=3, repeats=2, checkpoint=tmp_path / "quiet")
    keyboard.at(step=6)
    with pytest.raises(KeyboardInterrupt):
        BASE.run(keyboard.target(), 40, seed=3, repeats=2, checkpoint=file)
    keyboard.at()
    again = BASE.run(keyboard.target(), 40, seed=3, repeats=2, checkpoint=file)
    assert again.evaluations.gradients == quiet.evaluations.gradients
    assert again.evaluations.values == quiet.evaluations.values + 1, "the fingerprint is taken twice"
    assert again.training[-1]["seconds"] > again.training[0]["seconds"] > 0
