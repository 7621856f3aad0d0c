"""Metrics: a level seen in fitted coordinates is the same level, and moves in them keep law and evidence."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from undrift.density import HMC, SMC, AdaptiveLevels, Draws, Geometric, Normal, Target, Underdamped
from undrift.density.frame import Frame, FramedDensity, Metric, fit_frame
from undrift.density.level import LevelDensity
from undrift.density.move import MALA, State
from undrift.density.targets import DoubleWell, Gaussian


def noise(n: int, dim: int, seed: int = 0) -> Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


WELLS = DoubleWell(dim=2, wells=2)

FRAMES = {
    "diagonal": Frame(
        torch.tensor([1.0, -2.0]).double(), torch.tensor([0.5, 4.0]).double(), torch.tensor([2.0, 0.25]).double()
    ),
    "dense": fit_frame(noise(400, 2) @ torch.tensor([[2.0, 1.5], [0.0, 0.3]]).double(), torch.zeros(400), "dense"),
}


@pytest.mark.parametrize("name", FRAMES)
@pytest.mark.parametrize(("exponent", "base"), [(1.0, 0.0), (0.3, 0.7), (0.0, 1.0)])
def test_a_framed_level_is_the_level_under_the_map(name: str, exponent: float, base: float) -> None:
    frame = FRAMES[name]
    assert frame is not None
    target, law = WELLS, Normal(2.0)
    plain = LevelDensity(target, law, exponent, base)
    framed = FramedDensity(target, law, exponent, base, frame)
    z = noise(6, 2, 1)

    def through(z: Tensor) -> Tensor:
        y = frame.to_y(z)
        return exponent * target._log_density(y) + base * law.log_prob(y)

    point = framed.at(z)
    assert torch.equal(point.x, z)
    torch.testing.assert_close(framed.log_prob(point), plain.log_prob(plain.at(frame.to_y(z))))
    leaf = z.clone().requires_grad_()
    (slope,) = torch.autograd.grad(through(leaf).sum(), leaf)
    torch.testing.assert_close(framed.score(point), slope)


@pytest.mark.parametrize("name", FRAMES)
def test_exponents_may_differ_between_points(name: str) -> None:
    frame = FRAMES[name]
    exponent = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    framed = FramedDensity(WELLS, Normal(2.0), exponent, 1 - exponent, frame)
    z = noise(3, 2, 1)
    point = framed.at(z)
    for i, t in enumerate(exponent.tolist()):
        one = FramedDensity(WELLS, Normal(2.0), t, 1 - t, frame)
        torch.testing.assert_close(framed.log_prob(point)[i : i + 1], one.log_prob(one.at(z[i : i + 1])))
        torch.testing.assert_close(framed.score(point)[i : i + 1], one.score(one.at(z[i : i + 1])))


@pytest.mark.parametrize("name", FRAMES)
def test_walkers_enter_and_leave_as_they_were(name: str) -> None:
    frame = FRAMES[name]
    assert frame is not None
    y = noise(5, 2, 2)
    state = State(y, WELLS.at(y), noise(5, 2, 3), 17)
    inside = frame.enter(state)
    assert inside.point is not None
    torch.testing.assert_close(inside.point.x, inside.y)
    back = frame.leave(inside)
    assert state.point is not None
    assert back.point is not None
    torch.testing.assert_close(back.y, y)
    torch.testing.assert_close(back.point.score, state.point.score)
    assert torch.equal(back.point.log_prob, state.point.log_prob)
    assert back.velocity is state.velocity  # a number of z already
    assert back.moved == 17
    assert frame.leave(frame.enter(State(y))).point is None


def test_frames_whiten_the_walkers_they_were_fitted_to() -> None:
    mixing = torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, -0.7], [0.0, 0.0, 1.0]], dtype=torch.float64)
    y = noise(2000, 3) @ mixing * torch.tensor([1e-3, 1.0, 1e3], dtype=torch.float64) + 5
    log_w = 0.3 * noise(2000, 1, 4).squeeze(-1)
    w = log_w.softmax(0)
    for metric in ("dense", "diagonal"):
        frame = fit_frame(y, log_w, metric)
        assert frame is not None
        z = frame.to_z(y)
        torch.testing.assert_close(w @ z, torch.zeros(3, dtype=torch.float64), atol=1e-6, rtol=0)
        second = (w.unsqueeze(-1) * z).T @ z
        found = second if metric == "dense" else second * torch.eye(3, dtype=torch.float64)
        torch.testing.assert_close(found, torch.eye(3, dtype=torch.float64), atol=1e-6, rtol=0)
        torch.testing.assert_close(frame.to_y(z), y)
    assert fit_frame(y, log_w, "unit") is None


def test_a_dense_metric_needs_five_effective_walkers_a_coordinate() -> None:
    y = noise(14, 3)
    few = fit_frame(y, torch.zeros(14), "dense")
    enough = fit_frame(noise(15, 3), torch.zeros(15), "dense")
    uneven = torch.zeros(100)
    uneven[0] = 20.0
    one = fit_frame(noise(100, 3), uneven, "dense")
    assert few is not None
    assert enough is not None
    assert one is not None
    assert (few.factor.ndim, enough.factor.ndim, one.factor.ndim) == (1, 2, 1)
    assert bool((one.factor > 0).all() & torch.isfinite(one.inverse).all())


# -- in the loop -------------------------------------------------------------------------------------------------------

DIM = 4
ILL = Gaussian(dim=DIM, condition=1e4, log_z=1.3)


def run(metric: Metric, target: Target = ILL, n: int = 2048, seed: int = 0) -> Draws:
    widest = float(ILL.sample(4000, 0).std(0).max())
    path = Geometric(Normal(1.5 * widest))
    method = SMC(path=path, move=HMC(4), moves=3, levels=AdaptiveLevels(0.8), metric=metric)
    return method.run(target, n, seed, repeats=16)


@pytest.mark.parametrize("metric", ["diagonal", "dense"])
def test_metrics_keep_evidence_and_law(metric: Metric) -> None:
    draws = run(metric)
    assert draws.promise == "unbiased"
    assert draws.log_z is not None
    assert draws.log_z_std_error is not None
    assert draws.repeat_log_z is not None
    # E[Z^] = Z: the mean of Z^ / Z over repeats, within four of its standard errors.
    ratio = (draws.repeat_log_z - 1.3).exp()
    assert abs(float(ratio.mean()) - 1) < 4 * float(ratio.std()) / math.sqrt(len(ratio))
    exact = ILL.sample(20000, 1).double()
    for power in (1, 2):
        mean, error = draws.expectation((draws.x / exact.std(0)) ** power)
        truth = (exact / exact.std(0)) ** power
        gap = (mean - truth.mean(0)).abs()
        assert bool((gap < 4.5 * (error.square() + truth.var(0) / len(exact)).sqrt()).all())


def test_fitted_metrics_take_longer_steps_on_narrow_targets() -> None:
    """In walkers' own units a step is as long as the target is wide; without, as its narrowest direction."""
    rows = {metric: run(metric, n=1024).levels[-1] for metric in ("unit", "dense")}
    assert all(0.6 < row["acceptance"] < 0.97 for row in rows.values())
    widest = float(ILL.sample(4000, 0).var(0).max())
    # eps is in units of the walkers' variance; sqrt(eps) a leapfrog step. Condition 1e4 is a factor of 1e4 in eps.
    assert rows["dense"]["step"] > 300 * rows["unit"]["step"] / widest


@pytest.mark.parametrize("metric", ["diagonal", "dense"])
@pytest.mark.parametrize("move", [MALA(), Underdamped(metropolis=True)], ids=["MALA", "Underdamped"])
def test_an_interruption_in_a_metric_leaves_no_trace(metric: Metric, move: MALA | Underdamped, tmp_path: Path) -> None:
    method = SMC(move=move, moves=3, levels=AdaptiveLevels(0.6), metric=metric)
    whole = method.run(WELLS, 64, 3, repeats=2)
    calls = whole.evaluations.total
    budget = [0]

    def log_prob(x: Tensor) -> Tensor:
        budget[0] -= len(x)
        if budget[0] < 0:
            raise KeyboardInterrupt
        return WELLS.log_prob(x)

    target = Target(log_prob, 2, name=WELLS.name)
    for share in (0.3, 0.6, 0.9):  # in the pilot, and in the run proper
        budget[0] = int(share * calls)
        with pytest.raises(KeyboardInterrupt):
            method.run(target, 64, 3, repeats=2, checkpoint=tmp_path / f"{share}")
        budget[0] = 10**9
        resumed = method.run(target, 64, 3, repeats=2, checkpoint=tmp_path / f"{share}")
        assert torch.equal(resumed.states, whole.states)
        assert resumed.promise == whole.promise == "unbiased"
