"""The annealing loop: what it promises of Z, what it refuses, and that interruptions leave no trace."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from undrift.density import (
    AIS,
    HMC,
    MALA,
    MCMC,
    SMC,
    ULA,
    AdaptiveLevels,
    Affine,
    Annealing,
    Dilation,
    DilationLangevin,
    Direct,
    Draws,
    FixedLevels,
    Geometric,
    ImportanceSampling,
    Langevin,
    Laplace,
    Normal,
    Resampling,
    ScoreNorm,
    SignalToNoise,
    Smoothness,
    StudentT,
    Target,
    TemperedDilation,
    Tilt,
    Underdamped,
    anneal,
)
from undrift.density.step import Adapted
from undrift.density.targets import (
    Banana,
    Difficult2d,
    DoubleWell,
    Funnel,
    Gaussian,
    GaussianMixture,
    ManyWell,
    Mixture9,
    Rings,
    StudentMixture,
    TwoModes,
)


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# -- Z -----------------------------------------------------------------------------------------------------------------

TARGETS: dict[str, tuple[Target, float]] = {  # with the width of a base law that covers it
    "Gaussian": (Gaussian(dim=5, loc=0.5, condition=10.0, log_z=3.0), 2.0),
    "TwoModes": (TwoModes(log_z=3.0), 5.0),
    "Mixture9": (Mixture9(log_z=-2.0), 4.2),
    "Difficult2d": (Difficult2d(log_z=1.0), 3.0),
    "StudentMixture": (StudentMixture(dim=2, modes_count=3, df=5.0), 8.0),
    "Banana": (Banana(), 3.0),
    "Funnel": (Funnel(dim=2), 3.0),
    "Rings": (Rings(), 3.0),
    "DoubleWell": (DoubleWell(), 2.0),
    "ManyWell": (ManyWell(dim=4), 2.0),
}


@pytest.mark.parametrize("method", ["AIS", "SMC"])
@pytest.mark.parametrize("name", TARGETS)
def test_mean_evidence_is_the_evidence(name: str, method: str) -> None:
    target, width = TARGETS[name]
    path = Geometric(StudentT(width, 5.0) if name == "StudentMixture" else Normal(width))
    runs: dict[str, Annealing] = {
        "AIS": AIS(path=path, levels=FixedLevels(25), moves=2),
        "SMC": SMC(path=path, levels=AdaptiveLevels(0.8), moves=3),
    }
    repeats = 100
    draws = runs[method].run(target, repeats * 64, seed=1, repeats=repeats)
    assert draws.promise == "unbiased"
    assert draws.repeat_log_z is not None
    assert target.log_z is not None
    ratio = (draws.repeat_log_z - target.log_z).exp()
    error = float(ratio.std()) / math.sqrt(repeats)
    assert error < 0.15
    assert abs(float(ratio.mean()) - 1) < 3 * error
    assert draws.log_z == pytest.approx(target.log_z + math.log(float(ratio.mean())), abs=1e-9)
    assert draws.log_z_std_error == pytest.approx(error / float(ratio.mean()), rel=0.1)


def test_evidence_of_plain_importance_sampling_is_that_of_its_weights() -> None:
    target, base = TwoModes(log_z=3.0), Normal(5.0)
    draws = ImportanceSampling(path=Direct(base)).run(target, 4000, seed=0, repeats=10)
    assert draws.promise == "unbiased"
    assert draws.walker_log_weights is not None
    expected = target.log_prob(draws.x) - base.log_prob(draws.x)
    torch.testing.assert_close(draws.walker_log_weights.reshape(-1), expected, rtol=0, atol=1e-12)
    assert draws.log_z == pytest.approx(3.0, abs=4 * float(draws.log_z_std_error or 0))


@pytest.mark.parametrize("threshold", [0.5, 1.0])
def test_the_mean_weight_survives_resampling(threshold: float) -> None:
    """The mean weight of a repeat is its estimate, before and after; resampling at every level leaves equal weights."""
    method = SMC(path=Geometric(Normal(3.0)), levels=FixedLevels(8), moves=1, resampling=Resampling("multinomial", 1.0))
    method = dataclasses.replace(method, resampling=Resampling("multinomial", threshold))
    draws = method.run(TwoModes(distance=2.0, log_z=3.0), 640, seed=0, repeats=10)
    weights, estimates = draws.walker_log_weights, draws.repeat_log_z
    assert weights is not None
    assert estimates is not None
    torch.testing.assert_close(weights.logsumexp(-1) - math.log(64), estimates, rtol=1e-12, atol=0)
    assert (float((weights - weights[:, :1]).abs().max()) < 1e-12) == (threshold == 1.0)
    assert float(estimates.std()) > 0


def test_levels_are_chosen_by_walkers_that_count() -> None:
    """From a start whose weights one walker holds: it alone would call any jump safe, and be believed."""
    target, path = Gaussian(dim=10, log_z=3.0), Dilation(first=0.05, base=Normal(6.0))
    for seed in range(3):
        draws = SMC(path=path, pilot=False).run(target, 400, seed=seed, repeats=1)
        # between centred Gaussians a jump from lambda to rho lambda has a CESS of (2 rho - rho^2)^(d / 2)
        ratio = 1 + math.sqrt(1 - 0.95 ** (2 / 10))
        assert len(draws.levels) == pytest.approx(math.log(1 / 0.05) / math.log(ratio), rel=0.35)


def test_what_adapts_on_its_way_is_only_consistent() -> None:
    target = TwoModes(distance=2.0)
    path = Geometric(Normal(3.0))
    settings: dict[str, Any] = {"n": 256, "repeats": 4, "path": path, "moves": 2}
    assert anneal(target, **settings).promise == "unbiased"
    assert anneal(target, pilot=False, **settings).promise == "consistent"
    fixed = anneal(target, pilot=False, levels=FixedLevels(9), step=Smoothness(0.3), **settings)
    assert fixed.promise == "unbiased"
    assert len(fixed.levels) == 9


def test_a_pilot_freezes_levels_and_steps() -> None:
    draws = SMC(path=Geometric(Normal(3.0)), moves=2).run(TwoModes(distance=2.0), 400, seed=0, repeats=4)
    again = SMC(path=Geometric(Normal(3.0)), moves=2, pilot=False).run(
        TwoModes(distance=2.0), 400, seed=0, repeats=1
    )  # the pilot itself: the same seed, one repeat
    assert [row["u"] for row in draws.levels] == [row["u"] for row in again.levels]
    assert draws.evaluations.gradients > again.evaluations.gradients


# -- the dilation path's increments are a test of the sampler ----------------------------------------------------------


class ForgetsTheWayBack(MALA):
    """Metropolis without h(x')."""

    def step(self, density: Any, state: Any, size: Any, generator: torch.Generator) -> Any:
        there: list[Tensor] = []

        def once(score: Tensor) -> Tensor:
            if not there:
                there.append(size(score))
            return there[0]

        return super().step(density, state, once, generator)


def test_increments_of_dilation_have_mean_one() -> None:
    """All levels have one normaliser: what is estimated between the first and the last is 1, by exact moves only."""
    target = Gaussian(dim=3, log_z=3.0)
    path = Dilation(first=0.4, base=Normal(1.0))  # the first level is the target itself: weights start equal
    assert path.constant_normaliser
    assert not any(p.constant_normaliser for p in (Geometric(), TemperedDilation(), Tilt(), Direct()))

    def z_scores(move: MALA) -> list[float]:
        method = Annealing(path, move, FixedLevels(6), moves=4, step=ScoreNorm(1.5, 0.5), resampling=Resampling())
        draws = method.run(target, 40 * 400, seed=0, repeats=40)
        assert draws.repeat_log_z is not None
        assert draws.promise == "unbiased"
        error = float((draws.repeat_log_z - 3.0).exp().std()) / math.sqrt(40)
        assert draws.levels[0]["log_z"] == pytest.approx(3.0, abs=1e-12)
        return [math.expm1(row["log_z"] - 3.0) / error for row in draws.levels]

    assert max(map(abs, z_scores(MALA()))) < 4
    assert abs(z_scores(ForgetsTheWayBack())[-1]) > 8


# -- same seed, same draws ---------------------------------------------------------------------------------------------

SMALL = GaussianMixture(
    torch.stack([tensor(2, 0), tensor(-2, 1)]), torch.stack([tensor(1.0, 0.3), tensor(0.4, 0.8)]), tensor(0.4, 0.6)
)
METHODS: dict[str, Annealing] = {
    "SMC": SMC(path=Geometric(Normal(3.0)), levels=AdaptiveLevels(0.7), moves=2),
    "SMC, HMC, dense metric": SMC(
        path=Geometric(Normal(3.0)), move=HMC(3), levels=AdaptiveLevels(0.7), moves=2, metric="dense"
    ),
    "SMC, underdamped": SMC(
        path=Geometric(Normal(3.0)), move=Underdamped(metropolis=True), levels=AdaptiveLevels(0.7), moves=2
    ),
    "SMC, tempered dilation": SMC(
        path=TemperedDilation(first=0.05, tail=1.5), levels=AdaptiveLevels(0.7), moves=2, keep=3, thin=2
    ),
    "AIS, no pilot": AIS(path=Geometric(Normal(3.0)), levels=FixedLevels(6), pilot=False, coordinates=Affine(0.3, 1.2)),
    "AIS, Laplace": AIS(path=Geometric(Normal(2.0)), levels=FixedLevels(5), coordinates=Laplace(2, 2.0)),
    "dilation": DilationLangevin(levels=FixedLevels(9), moves=2, keep=2),
    "MCMC": MCMC(moves=8, keep=4, thin=2, metric="diagonal"),
}


class Interrupting:
    """A target that is interrupted, as by a key, at its k-th call."""

    def __init__(self, at: int = -1) -> None:
        self.calls, self.at = 0, at

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        return SMALL.log_prob(x)


def same(a: Draws, b: Draws) -> None:
    assert torch.equal(a.states, b.states)
    for one, other in ((a.walker_log_weights, b.walker_log_weights), (a.repeat_log_z, b.repeat_log_z)):
        assert (one is None) == (other is None)
        assert one is None or other is None or torch.equal(one, other)
    drop = lambda rows: [{k: v for k, v in row.items() if k != "gradients"} for row in rows]  # noqa: E731
    assert drop(a.levels) == drop(b.levels)


@pytest.mark.parametrize("name", METHODS)
def test_same_seed_same_draws(name: str) -> None:
    method, before = METHODS[name], torch.random.get_rng_state()
    one, two = (method.run(SMALL, 40, seed=3, repeats=2) for _ in range(2))
    same(one, two)
    assert one.evaluations == two.evaluations
    assert not torch.equal(one.states, method.run(SMALL, 40, seed=4, repeats=2).states)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("name", METHODS)
def test_an_interruption_leaves_no_trace(name: str, tmp_path: Path) -> None:
    """Interrupted at any call of the target, and once more when resumed: the draws are those of a quiet run."""
    method = METHODS[name]
    quiet = Interrupting()

    def run(function: Callable[[Tensor], Tensor], file: Path | None = None) -> Draws:
        return method.run(Target(function, 2, name="small"), 40, seed=3, repeats=2, checkpoint=file)

    expected = run(quiet)
    total = quiet.calls
    places = sorted({*range(14, min(30, total)), *range(30, total, max(1, total // 10)), total})
    for place in places:
        file = tmp_path / f"{place}.run"
        with pytest.raises(KeyboardInterrupt):
            run(Interrupting(place), file)
        again = Interrupting(8)
        try:
            found = run(again, file)
        except KeyboardInterrupt:
            found = run(Interrupting(), file)
        same(found, expected)
        assert not file.exists(), "a complete run leaves its checkpoint behind"


def test_resuming_does_not_start_over(tmp_path: Path) -> None:
    quiet, file = Interrupting(), tmp_path / "run"
    method = METHODS["MCMC"]
    method.run(Target(quiet, 2), 40, seed=3, repeats=2)
    with pytest.raises(KeyboardInterrupt):
        method.run(Target(Interrupting(quiet.calls - 3), 2), 40, seed=3, repeats=2, checkpoint=file)
    rest = Interrupting()
    method.run(Target(rest, 2), 40, seed=3, repeats=2, checkpoint=file)
    assert rest.calls < 12 + quiet.calls // 8


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    file, method = tmp_path / "run", METHODS["SMC"]
    quiet = Interrupting()
    method.run(Target(quiet, 2, name="small"), 40, seed=3, repeats=2)
    with pytest.raises(KeyboardInterrupt):
        method.run(Target(Interrupting(quiet.calls - 1), 2, name="small"), 40, seed=3, repeats=2, checkpoint=file)
    target = Target(SMALL.log_prob, 2, name="small")
    others: list[tuple[Annealing, Target, dict[str, Any]]] = [
        (method, target, {"seed": 4}),
        (method, target, {"repeats": 4}),
        (method, target, {"n": 80}),
        (method, target, {"dtype": torch.float32}),
        (dataclasses.replace(method, moves=3), target, {}),
        (dataclasses.replace(method, path=Geometric(Normal(2.0))), target, {}),
        (method, Target(lambda x: SMALL.log_prob(x) + 0.1, 2, name="small"), {}),
    ]
    for other, density, changes in others:
        with pytest.raises(ValueError, match="belongs to a run with another target, method"):
            other.run(density, **{"n": 40, "seed": 3, "repeats": 2, "checkpoint": file, **changes})
    assert file.exists()


# -- what does not fit is refused before any work ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"move": ULA(), "weights": True, "levels": FixedLevels(3)}, "weights need moves that leave each level"),
        ({"weights": False}, "levels adapt to the weights' conditional ESS; without weights give FixedLevels"),
        ({"move": ULA()}, "without weights give FixedLevels"),
        ({"step": SignalToNoise()}, "looks at all walkers"),
        ({"move": HMC(), "step": ScoreNorm()}, "depends on the walker, which HMC cannot correct"),
        ({"move": ULA(), "levels": FixedLevels(3), "step": Adapted()}, "no acceptance to adapt to"),
        ({"metric": "dense", "step": Smoothness()}, "leave step to be adapted"),
        ({"keep": 0}, "keep must be at least 1"),
        ({"moves": -1}, "moves must be at least 0"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Annealing(**settings)


@pytest.mark.parametrize(("n", "repeats", "says"), [(3, 4, "at least one draw a repeat"), (8, 0, "repeats must be")])
def test_runs_that_do_not_fit(n: int, repeats: int, says: str) -> None:
    target = Gaussian()
    with pytest.raises(ValueError, match=says):
        SMC().run(target, n, repeats=repeats)
    assert target.evaluations.total == 0


def test_uncorrected_draws_promise_nothing() -> None:
    for method in (DilationLangevin(levels=FixedLevels(20)), Langevin(moves=20)):
        draws = method.run(TwoModes(), 64, repeats=4)
        assert not draws.corrected
        assert (draws.log_z, draws.log_z_std_error, draws.promise, draws.ess) == (None, None, None, None)
        assert draws.log_weights is None
        torch.testing.assert_close(draws.weights, torch.full((64,), 1 / 64, dtype=torch.float64))
    chains = MCMC(moves=10, keep=4).run(TwoModes(), 64, repeats=4)
    assert chains.corrected
    assert chains.log_z is None


def test_divergence_is_said_with_its_cause() -> None:
    with pytest.raises(FloatingPointError, match=r"walkers left the numbers.*shorter step"):
        Langevin(moves=3000, step=Smoothness(3.0)).run(Gaussian(), 16, repeats=1)


def test_a_start_outside_the_support_is_said() -> None:
    far = Target(lambda x: torch.where(x[:, 0] > 2.5, -x[:, 0], -torch.inf), 1)
    with pytest.raises(FloatingPointError, match="the start law lies outside the support"):
        SMC(smoothness=1.0).run(far, 64, seed=0, repeats=16)


# -- coordinates, precision, costs -------------------------------------------------------------------------------------


def test_coordinates_are_those_of_the_affine_target() -> None:
    loc, scale = tensor(0.5, -0.2), torch.tensor([[1.5, 0.0], [0.4, 0.8]], dtype=torch.float64)
    method = SMC(path=Geometric(Normal(2.0)), levels=AdaptiveLevels(0.8), moves=3)
    moved = dataclasses.replace(method, coordinates=Affine(loc, scale)).run(SMALL, 200, seed=5, repeats=4)
    plain = method.run(SMALL.affine(loc, scale), 200, seed=5, repeats=4)
    torch.testing.assert_close(moved.x, loc + plain.x @ scale.T, rtol=1e-12, atol=1e-12)
    assert moved.repeat_log_z is not None
    assert plain.repeat_log_z is not None
    torch.testing.assert_close(moved.repeat_log_z, plain.repeat_log_z, rtol=1e-12, atol=1e-12)
    assert moved.target is SMALL


def test_coordinates_leave_z_and_the_law() -> None:
    target = GaussianMixture(SMALL.means, SMALL.covs, SMALL.weights, log_z=3.0)
    scale = torch.tensor([[3.0, 0.0], [-1.0, 1.5]], dtype=torch.float64)
    method = SMC(path=Geometric(Normal(1.5)), moves=4, coordinates=Affine(tensor(0.5, 0.5), scale))
    draws = method.run(target, 40 * 150, seed=0, repeats=40)
    assert draws.log_z == pytest.approx(3.0, abs=3.5 * float(draws.log_z_std_error or 0))
    weights, means, covs = tensor(0.4, 0.6), SMALL.means, SMALL.covs
    mean, error = draws.expectation(draws.x)
    assert bool(((mean - weights @ means).abs() < 4 * error).all())
    second, error = draws.expectation(draws.x.square())
    assert bool(((second - weights @ (means.square() + covs)).abs() < 4 * error).all())
    assert bool((error < 0.2).all())


@pytest.mark.parametrize("name", METHODS)
def test_single_precision(name: str) -> None:
    draws = METHODS[name].run(SMALL, 400, seed=1, repeats=4, dtype=torch.float32)
    assert draws.states.dtype == torch.float32
    assert bool(torch.isfinite(draws.states).all())
    if draws.log_z is not None:
        assert abs(draws.log_z) < 4 * float(draws.log_z_std_error or 0) + 0.02
        assert float(draws.log_z_std_error or 0) < 0.5


@pytest.mark.parametrize("name", METHODS)
def test_evaluations_are_counted(name: str, tmp_path: Path) -> None:
    points = 0

    def counted(x: Tensor) -> Tensor:
        nonlocal points
        points += x.shape[0]
        return SMALL.log_prob(x)

    draws = METHODS[name].run(Target(counted, 2), 40, repeats=2)
    assert draws.evaluations.total == points


def test_what_a_langevin_run_costs() -> None:
    """One gradient a draw and step, beside what is spent on a look at the target before the run."""
    n, steps = 32, 50
    runs = [
        Langevin(moves=moves, smoothness=1.0).run(Gaussian(), n, repeats=2).evaluations for moves in (10, 10 + steps)
    ]
    assert (runs[1] - runs[0]).gradients == n * steps
    assert (runs[1] - runs[0]).values == 0
    one, two = (
        MCMC(move=HMC(1), moves=5, keep=keep, thin=3, step=Smoothness(0.5), smoothness=1.0).run(
            Gaussian(), n * keep, repeats=2
        )
        for keep in (1, 4)
    )
    assert two.states.shape == (2, n // 2, 4, 2)
    assert (two.evaluations - one.evaluations).gradients == n * 3 * 3
    assert torch.equal(one.states[:, :, 0], two.states[:, :, 0])


def test_one_call() -> None:
    draws = anneal(SMALL, Geometric(Normal(3.0)), HMC(3), n=64, seed=2, repeats=4, moves=2)
    named = Annealing(Geometric(Normal(3.0)), HMC(3), moves=2).run(SMALL, 64, 2, repeats=4)
    same(draws, named)
    assert draws.method == "annealing (Geometric path, HMC)"
