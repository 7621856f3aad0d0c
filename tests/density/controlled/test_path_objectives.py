"""Losses of controlled diffusions: their gradients against autograd, each other, and closed forms."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from undrift.density import Target
from undrift.density.controlled.control import Control, Field, Informed, Plain, View
from undrift.density.controlled.diffusion import ControlledDiffusion, Paths, Scheme, Tables
from undrift.density.controlled.grid import EqualAngles, EqualTimes
from undrift.density.controlled.objective import (
    KL,
    LogDerivative,
    LogVariance,
    Objective,
    Replay,
    TrajectoryBalance,
    Work,
    backpropagate,
    facts,
)
from undrift.density.controlled.trust_region import TrustRegion, tempering
from undrift.density.targets import Gaussian
from undrift.process import CLD, VP, BrownianBridge, ConstantClock, LearnedProcess, LinearClock

CLOCK = LinearClock(0.1, 6.0)


def quartic(x: Tensor) -> Tensor:
    """Neither Gaussian nor symmetric, and its score is not linear."""
    return -0.1 * x.pow(4).sum(-1) - 0.5 * (x[:, 0] - 0.4).square() + 0.3 * (x[:, 0] * x[:, -1]).sin()


def target() -> Target:
    return Target(quartic, 2, name="quartic")


def rough(diffusion: ControlledDiffusion, size: float = 0.3, seed: int = 5) -> ControlledDiffusion:
    """In float64, with parameters away from their start, where many derivatives are 0."""
    diffusion.double()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in diffusion.parameters():
            p.add_(size * torch.empty_like(p).normal_(generator=g) / math.sqrt(max(p.shape[-1] if p.ndim else 1, 1)))
    return diffusion


SMALL = {"width": 6, "depth": 1}
VP_SCHEME = Scheme(VP(clock=CLOCK), EqualAngles(), 7, Informed(**SMALL))
ANNEALED = Scheme(
    VP(clock=ConstantClock(1.0)), EqualTimes(), 7, Plain(**SMALL), annealed=True, learn=("noise", "prior", "levels")
)
SCHEMES: dict[str, Scheme] = {
    "VP": VP_SCHEME,
    "CLD": replace(VP_SCHEME, process=CLD(clock=CLOCK)),
    "PIS": replace(VP_SCHEME, process=BrownianBridge(), grid=EqualTimes()),
    "bridge": replace(VP_SCHEME, control=Plain(**SMALL), backward=Plain(**SMALL)),
    "annealed": ANNEALED,
    "annealed, underdamped": replace(ANNEALED, process=CLD(clock=ConstantClock(1.0))),
    "annealed, levels alone": replace(ANNEALED, learn=("levels",)),
    "noise": replace(VP_SCHEME, learn=("noise",)),
    "noise, PIS": replace(VP_SCHEME, process=BrownianBridge(), grid=EqualTimes(), learn=("noise",)),
    "learned": replace(VP_SCHEME, process=LearnedProcess.random(2, seed=3, clock=CLOCK), control=Plain(**SMALL)),
}


def work_on(scheme: Scheme, batch: int = 9, chunk: int | None = None, seed: int = 0, size: float = 0.3) -> Work:
    diffusion = rough(ControlledDiffusion(scheme, 2, seed=1), size)
    return Work(diffusion, target(), torch.Generator().manual_seed(seed), batch, torch.float64, chunk)


def gradients(diffusion: ControlledDiffusion) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in diffusion.named_parameters()}
    diffusion.zero_grad(set_to_none=True)
    return {name: torch.zeros(()) if grad is None else grad.clone() for name, grad in found.items()}


def flat(diffusion: ControlledDiffusion) -> Tensor:
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in diffusion.parameters()]
    diffusion.zero_grad(set_to_none=True)
    return torch.cat([part.reshape(-1) for part in parts])


def broken(paths: Paths, how: str) -> Paths:
    """The paths with the second one spoilt."""
    if how == "density":
        log_target = paths.log_target.clone()
        log_target[1] = -math.inf
        return paths._replace(log_target=log_target)
    z = paths.z.clone()
    z[3, :, 1] = math.nan if how == "nan" else math.inf
    return paths._replace(z=z, control=None)


OBJECTIVES: dict[str, LogVariance | LogDerivative | TrajectoryBalance] = {
    "LogVariance": LogVariance(),
    "LogVariance, shared starts": LogVariance(paths_per_start=3),
    "TrajectoryBalance": TrajectoryBalance(),
    "LogDerivative": LogDerivative(),
}


def direct(objective: Objective, work: Work, tables: Tables, paths: Paths, good: Tensor) -> Tensor:
    """A scalar whose derivative is the gradient wanted, straight from log F and log B of the usable paths."""
    d, kept = work.diffusion, paths.take(good.nonzero().squeeze(-1))
    forth, home = d.log_kernels(tables, slice(0, tables.chain.steps), kept)
    log_f = d.log_start(tables, kept.z[0]) + forth.sum(0)
    log_b = d.log_finish(tables, kept.z[-1]) + home.sum(0) + kept.log_target
    r = log_f - log_b
    if isinstance(objective, TrajectoryBalance):
        return (r + work.diffusion.log_z.clone()).square().mean()
    if isinstance(objective, LogDerivative):
        n = len(r)
        return ((r - r.mean()).detach() * log_f).sum() / (n - 1) - log_b.mean()
    parts, size = [], objective.paths_per_start  # type: ignore[attr-defined]
    if size == 1:
        return r.var()
    at = good.reshape(-1, size)
    for row, start in zip(at, at.reshape(-1).cumsum(0).reshape(-1, size)[:, -1], strict=True):
        parts.append(r[int(start) - int(row.sum()) : int(start)].var())
    return torch.stack(parts).mean()


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize(
    ("scheme", "spoilt"),
    [*((name, "") for name in SCHEMES)]
    + [(name, how) for name in ("CLD", "bridge", "annealed") for how in ("density", "nan", "inf")],
)
def test_two_passes_give_the_gradient_of_the_loss(scheme: str, chunk: int | None, spoilt: str) -> None:
    """On fixed paths, whole or in chunks, with all that is learned; a path that left the numbers has no part in it."""
    work = work_on(SCHEMES[scheme], chunk=chunk)
    d = work.diffusion
    paths = work.walk(work.tables(), 9)
    good = torch.ones(9, dtype=torch.bool)
    if spoilt:
        paths, good[1] = broken(paths, spoilt), False
    for name, objective in OBJECTIVES.items():
        if d.learns_kernels and not objective.learns_kernels and name != "LogVariance":
            continue
        d.log_z.fill_(0.3)
        value = direct(objective, work, work.tables(), paths, good)
        value.backward()
        expected = gradients(d)
        log_w, c = backpropagate(
            work,
            work.tables(),
            paths,
            lambda r, o=objective: o.coefficients(r, work),  # type: ignore[misc]
            d.learns_kernels,
        )
        found = gradients(d)
        assert torch.isfinite(log_w).tolist() == good.tolist()
        if name != "LogDerivative":
            assert c.loss == pytest.approx(value.item(), rel=1e-9)
        assert any(float(part.abs().max()) > 0 for part in expected.values())
        for key, part in expected.items():
            assert torch.allclose(found[key], part, rtol=1e-7, atol=1e-9), (name, key)


@pytest.mark.parametrize("objective", [LogVariance(), TrajectoryBalance(), KL(), TrustRegion(buffer=9)])
@pytest.mark.parametrize("chunk", [None, 3])
def test_lost_paths_are_counted_and_the_others_learned_from(objective: Objective, chunk: int | None) -> None:
    """A density that ends in the middle: some paths end outside."""
    work = work_on(VP_SCHEME, chunk=chunk)
    work.target = Target(lambda x: torch.where(x[:, 0] < 0.3, quartic(x), -math.inf), 2)
    found = objective.runner(work).step()
    assert 0 < found["dropped"] < 9
    assert math.isfinite(found["loss"])
    assert math.isfinite(found["elbo"])
    assert math.isfinite(found["log_z"])
    assert 1 / 9 <= found["ess"] <= 1
    assert bool(torch.isfinite(flat(work.diffusion)).all())


@pytest.mark.parametrize("objective", [LogVariance(), LogVariance(replay=Replay()), KL(), TrustRegion(buffer=9)])
def test_a_step_without_a_path_says_so(objective: Objective) -> None:
    work = work_on(VP_SCHEME)
    work.target = Target(lambda x: torch.where(x[:, 0] > 50, quartic(x), -math.inf), 2)
    runner = objective.runner(work)
    for _ in range(2):
        found = runner.step()
        assert math.isnan(found["loss"])
        assert found["dropped"] == 9


def test_facts_take_what_is_no_number_for_weight_zero() -> None:
    found = facts(1.0, torch.tensor([0.0, math.nan, math.inf, -math.inf], dtype=torch.float64))
    assert found == {"loss": 1.0, "elbo": 0.0, "log_z": pytest.approx(-math.log(4)), "ess": 0.25, "dropped": 3.0}


def test_shared_starts_are_shared_and_the_loss_is_the_mean_variance_within() -> None:
    work, objective = work_on(SCHEMES["CLD"], batch=12), LogVariance(paths_per_start=4)
    seen: list[Paths] = []
    walk = work.diffusion.walk
    work.diffusion.walk = lambda *a, **k: seen.append(walk(*a, **k)) or seen[-1]  # type: ignore[assignment,func-returns-value]
    found = objective.runner(work).step()
    start = seen[0].z[0].unflatten(1, (3, 4))
    assert torch.equal(start, start[:, :, :1].expand_as(start))
    assert len(start[0, :, 0, 0].unique()) == 3
    log_w = work.diffusion.log_weights(work.tables(), seen[0]).detach()
    assert found["loss"] == pytest.approx(float(log_w.reshape(3, 4).var(-1).mean()), rel=1e-9)


# -- a constant control in a constant field: everything known ---------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Constant(Control):
    """a = value / sqrt(horizon), so that u = value in units where the noise has the rate 1."""

    value: float = 0.0

    def field(self, inputs: int, dim: int) -> Field:
        return _Constant(self.value)


class _Constant(Field):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value, dtype=torch.float64))

    def forward(self, view: View, times: tuple[Tensor, ...]) -> Tensor:
        return self.value.expand_as(view.y)


SIGMA2, HORIZON, MEAN, LOG_Z = 0.2, 5.0, 1.7, 0.7
SIGMA = math.sqrt(SIGMA2)
BEST = MEAN / (SIGMA * HORIZON)  # of u
UNIT = SIGMA * HORIZON / (SIGMA2 * HORIZON)  # a = grad log g_0 = mean / (sigma^2 T) where u = mean / (sigma T)


def brownian(steps: int, theta: float, seed: int = 0, batch: int = 4096) -> Work:
    """PIS with sigma^2 T = 1 on N(1.7, 1), under the constant control u = theta."""
    scheme = Scheme(BrownianBridge(), EqualTimes(), steps, Constant(theta * UNIT))
    diffusion = ControlledDiffusion(scheme, 1)
    known = Gaussian(dim=1, loc=MEAN, scale=1.0, log_z=LOG_Z)
    return Work(diffusion, known, torch.Generator().manual_seed(seed), batch, torch.float64)


@pytest.mark.parametrize("steps", [1, 2, 10, 100])
def test_at_the_best_constant_control_nothing_is_left_path_by_path(steps: int) -> None:
    work = brownian(steps, BEST, batch=64)
    tables = work.tables()
    log_w = work.diffusion.log_weights(tables, work.walk(tables, 64))
    assert float((log_w - LOG_Z).detach().abs().max()) < 1e-12
    for objective in (LogVariance(), LogVariance(paths_per_start=2), TrajectoryBalance()):
        assert objective.runner(work).step()["loss"] < 1e-24
        assert float(flat(work.diffusion).abs()) < 1e-11, "each path's own term is 0, not only their mean"
    assert float(work.diffusion.log_z) == pytest.approx(LOG_Z, abs=1e-12)


def test_divergences_of_constant_controls_are_those_of_the_formulas() -> None:
    """KL = T (theta - theta*)^2 / 2, LV twice that, gradients T (theta - theta*) and 2 T (theta - theta*)."""
    theta = 0.1
    assert abs(BEST - 0.7602631) < 1e-7
    assert 0.5 * HORIZON * (theta - BEST) ** 2 == pytest.approx(1.0898684, abs=1e-7)
    found: dict[str, list[tuple[float, float]]] = {}
    for seed in range(16):
        for objective in (KL(), LogVariance(), LogDerivative()):
            work = brownian(5, theta, seed)
            loss = objective.runner(work).step()["loss"]
            found.setdefault(type(objective).__name__, []).append((loss, UNIT * float(flat(work.diffusion))))
    for name, (value, slope) in {
        "KL": (1.0898684 - LOG_Z, HORIZON * (theta - BEST)),
        "LogVariance": (2.1797369, -6.6026311),
        "LogDerivative": (1.0898684 - LOG_Z, HORIZON * (theta - BEST)),
    }.items():
        rows = torch.tensor(found[name], dtype=torch.float64)
        error = rows.std(0) / 4 + 1e-12  # of 16 runs
        assert bool(((rows.mean(0) - torch.tensor([value, slope])).abs() < 4 * error).all()), name


# -- the same gradients from different losses --------------------------------------------------------------------------


def means(work: Work, objective: Objective, directions: Tensor, times: int) -> tuple[Tensor, Tensor]:
    """Mean of the gradient of independent batches along directions, and its standard error."""
    runner, rows = objective.runner(work), []
    for _ in range(times):
        runner.step()
        rows.append(directions @ flat(work.diffusion))
    found = torch.stack(rows)
    return found.mean(0), found.std(0) / math.sqrt(times)


@dataclass(frozen=True, eq=False)
class Linear(Control):
    """a = p grad log g_0(y) + q y: depends on what is learned through y alone."""

    def field(self, inputs: int, dim: int) -> Field:
        return _Linear(dim)


class _Linear(Field):
    guided = True

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.factors = nn.Parameter(torch.ones(2, dim, dtype=torch.float64))

    def forward(self, view: View, times: tuple[Tensor, ...]) -> Tensor:
        assert view.guide is not None
        return self.factors[0] * view.guide + self.factors[1] * view.y


LEARNED = ("VP", "bridge", "annealed", "annealed, underdamped", "noise", "learned")
GUIDED = Scheme(
    LearnedProcess.random(2, seed=3, clock=CLOCK, learn=("Q", "D", "S", "start")), EqualTimes(), 4, Linear()
)


@pytest.mark.parametrize(
    ("objective", "scheme", "factor"),
    [(LogVariance(), SCHEMES[name], 2.0) for name in ("VP", "CLD", "PIS")]
    + [(LogVariance(paths_per_start=8), SCHEMES["CLD"], 2.0)]
    + [(LogDerivative(), scheme, 1.0) for scheme in (*(SCHEMES[name] for name in LEARNED), GUIDED)],
)
def test_losses_on_paths_have_the_gradient_of_the_pathwise_one(
    objective: Objective, scheme: Scheme, factor: float
) -> None:
    """Twice that of KL for the log-variance with fixed kernels; that of KL itself for the log-derivative, always.

    Along eight directions, that of the gradient, and what is learned beside controls: within 4 standard errors.
    """
    work = work_on(scheme, batch=4096 if scheme is GUIDED else 1024, seed=2)
    g = torch.Generator().manual_seed(0)
    size = sum(p.numel() for p in work.diffusion.parameters())
    directions = torch.empty(10, size, dtype=torch.float64).normal_(generator=g) / math.sqrt(size)
    KL().runner(work).step()
    directions[0] = flat(work.diffusion)
    kernels = [torch.full((p.numel(),), float("control" not in n)) for n, p in work.diffusion.named_parameters()]
    directions[1] = directions[0] * torch.cat(kernels)
    directions[:2] /= directions[:2].norm(dim=-1, keepdim=True).clamp(min=1e-30)
    one, error = means(work, KL(), directions, 16)
    other, noise = means(work, objective, directions, 32)
    seen = one.abs() > 4 * (error + noise / factor)
    assert bool(seen[0]), "nothing would be compared"
    if work.diffusion.learns_kernels and scheme is not SCHEMES["learned"]:
        assert bool(seen[1])
    off = (other - factor * one).abs()
    assert bool((off <= 4 * (noise.square() + (factor * error).square()).sqrt()).all())


@pytest.mark.parametrize("name", ["VP", "CLD", "bridge", "annealed", "noise", "guided, learned"])
def test_kl_differentiates_the_whole_walk(name: str) -> None:
    """Against differences with the same random numbers, h^2 and rounding 1e-7 apart."""
    work = work_on({**SCHEMES, "guided, learned": GUIDED}[name])
    ahead = torch.Generator().manual_seed(4)

    def loss(diffusion: ControlledDiffusion) -> float:
        work.generator.manual_seed(7)
        return KL().runner(replace(work, diffusion=diffusion)).step()["loss"]

    loss(work.diffusion)
    slope = flat(work.diffusion)
    way = torch.empty_like(slope).normal_(generator=ahead)
    start = nn.utils.parameters_to_vector(work.diffusion.parameters()).detach()
    ends = []
    for h in (1e-5, -1e-5):
        nn.utils.vector_to_parameters(start + h * way, work.diffusion.parameters())
        ends.append(loss(work.diffusion))
    nn.utils.vector_to_parameters(start, work.diffusion.parameters())
    work.diffusion.zero_grad()
    differences = (ends[0] - ends[1]) / 2e-5
    assert float(slope @ way) == pytest.approx(differences, rel=1e-6, abs=1e-7)
    if not work.diffusion.guided:
        return
    look = work.target.differentiable
    work.target.differentiable = lambda x: (look(x)[0], look(x)[1].detach())  # type: ignore[method-assign]
    loss(work.diffusion)
    without = flat(work.diffusion)
    assert float(without @ way) != pytest.approx(differences, rel=1e-3), "the Hessian is in the gradient"


def test_log_variance_does_not_ask_for_the_normalisation() -> None:
    found = []
    for constant in (0.0, 123.0):
        work = work_on(VP_SCHEME)
        work.target = Target(lambda x, c=constant: quartic(x) + c, 2)  # type: ignore[misc]
        loss = LogVariance().runner(work).step()["loss"]
        found.append((loss, flat(work.diffusion)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-9)
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-8, atol=1e-11)


def test_trajectory_balance_forgets_a_wrong_log_z() -> None:
    """It steps by a share of the difference: .9^100 of 5 is left."""
    work = brownian(4, BEST, batch=8)
    work.diffusion.log_z.fill_(LOG_Z + 5.0)
    runner = TrajectoryBalance(rate=0.1).runner(work)
    for _ in range(100):
        runner.step()
    assert float(work.diffusion.log_z) == pytest.approx(LOG_Z + 5.0 * 0.9**100, abs=1e-9)


# -- paths from elsewhere ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [LogVariance(replay=Replay(capacity=50)), LogVariance(spread=1.7)])
def test_nothing_is_left_on_paths_of_any_origin(objective: LogVariance) -> None:
    work = brownian(6, BEST, batch=32)
    runner = objective.runner(work)
    for _ in range(4):
        found = runner.step()
        assert found["loss"] < 1e-24
        assert float(flat(work.diffusion).abs()) < 1e-11
    assert ("elbo" in found) == (objective.spread == 1.0), "the mean weight of wider paths is no bound"


def test_the_buffer_keeps_the_latest_points_and_gives_them_by_weight() -> None:
    work = brownian(3, 0.3, batch=40)
    walked: list[Tensor] = []
    walk = work.diffusion.walk
    work.diffusion.walk = lambda *a, **k: walked.append((p := walk(*a, **k)).x) or p  # type: ignore[assignment,func-returns-value]
    runner: Any = LogVariance(replay=Replay(capacity=50, fraction=0.25, power=0.5)).runner(work)
    for _ in range(3):
        runner.step()
    assert [len(x) for x in walked] == [40, 30, 30]
    assert torch.equal(runner.buffer.x, torch.cat(walked)[-50:])
    tables = work.tables()
    log_w = work.diffusion.log_weights(tables, work.walk(tables, 1)).detach()
    assert runner.buffer.log_w.dtype == log_w.dtype == torch.float64
    runner.buffer.x, runner.buffer.log_w = torch.arange(4.0).unsqueeze(-1), torch.tensor([0.0, 2.0, -4.0, 4.0])
    n = 20000
    count = runner.buffer.draw(n, torch.Generator().manual_seed(0)).long().squeeze(-1).bincount(minlength=4)
    p = torch.tensor([0.0, 1.0, -2.0, 2.0]).softmax(0)
    assert bool(((count / n - p).abs() < 4 * (p * (1 - p) / n).sqrt()).all())
    runner.buffer.add(torch.tensor([[5.0], [6.0]]), torch.tensor([-math.inf, 1.0]))
    assert runner.buffer.x[:, 0].tolist() == [0, 1, 2, 3, 6], "points without weight are never asked for"


# -- trust region ------------------------------------------------------------------------------------------------------


def test_tempering_solves_its_dual() -> None:
    """For normal log weights of deviation s the divergence is eta^2 s^2 / 2, and the ESS exp(-2 bound)."""
    z = torch.erfinv(2 * (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000 - 1) * math.sqrt(2)
    for bound, scale in ((0.01, 3.0), (0.1, 3.0), (0.1, 40.0)):
        eta = tempering(scale * z - 100.0, bound)
        p = (eta * scale * z).softmax(0)
        assert float((p * p.log()).sum()) + math.log(20000) == pytest.approx(bound, rel=1e-6)
        assert eta * scale == pytest.approx(math.sqrt(2 * bound), rel=1e-3)
        assert 1 / float(p.square().sum()) / 20000 == pytest.approx(1 / (1 + 2 * bound), rel=2.2 * bound**2 + 1e-3)
    assert tempering(torch.zeros(10), 1e-9) == 1.0
    assert tempering(0.1 * z, 0.1) == 1.0
    assert tempering(torch.tensor([0.0, 0.0, -math.inf, math.nan]), 1e-9) == 1.0


def test_a_trust_region_moves_the_paths_by_its_bound() -> None:
    """Constant controls: the next one lies sqrt(2 bound / T) further, till nothing is left to go."""
    work = brownian(5, 0.1, batch=512)
    (value,) = work.diffusion.parameters()
    runner = TrustRegion(bound=0.1, buffer=8192, refresh=60).runner(work)
    optimiser = torch.optim.Adam([value], lr=0.03)
    places, asked = [], []
    for _ in range(5):
        for step in range(60):
            optimiser.param_groups[0]["lr"] = 0.03 * (1 - step / 60)
            optimiser.zero_grad()
            before = work.target.evaluations.copy()
            found = runner.step()
            optimiser.step()
            asked.append((work.target.evaluations - before).total)
        places.append(float(value.detach()) / UNIT)
    assert asked == ([8192] + 59 * [0]) * 5, "a value at the end of each path, at each refreshment"
    step = math.sqrt(2 * 0.1 / HORIZON)
    moved = [b - a for a, b in zip([0.1, *places], places[:3], strict=False)]
    # eta comes from the weights of 8192 paths, whose divergence of .1 has a relative error of about 4 %, and so each
    # step one of 2 %; the way down to the minimum, on batches of 512, as much again
    assert moved == pytest.approx([step] * 3, rel=0.12)
    assert places[4] == pytest.approx(BEST, abs=0.01)
    assert found["eta"] == 1.0


def test_what_a_step_asks_of_the_target() -> None:
    """K gradients and a value a path; annealed ones K + 1 gradients; KL the gradient at the end."""
    k, batch = 7, 9
    for scheme, objective, expected in (
        (VP_SCHEME, LogVariance(), (batch, k * batch)),
        (VP_SCHEME, LogVariance(replay=Replay(fraction=0.5)), (batch, k * batch)),
        (SCHEMES["noise"], LogDerivative(), (batch, k * batch)),
        (SCHEMES["bridge"], LogVariance(), (batch, 0)),
        (ANNEALED, LogDerivative(), (0, (k + 1) * batch)),
        (VP_SCHEME, KL(), (0, (k + 1) * batch)),
        (replace(GUIDED, steps=k), LogDerivative(), (batch, 2 * k * batch)),
    ):
        for chunk in (None, 3):
            work = work_on(scheme, chunk=chunk)
            runner = objective.runner(work)
            for _ in range(2):  # the first may probe how the target is differentiated; the second replays
                before = work.target.evaluations.copy()
                runner.step()
            spent = work.target.evaluations - before
            assert (spent.values, spent.gradients) == expected, (objective, chunk)


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Replay(capacity=0), "capacity"),
        (lambda: Replay(fraction=1.0), "fraction"),
        (lambda: Replay(power=1.1), "power"),
        (lambda: LogVariance(spread=0.0), "spread"),
        (lambda: LogVariance(paths_per_start=0), "paths_per_start"),
        (lambda: LogVariance(paths_per_start=2, replay=Replay()), "cannot come from a replay"),
        (lambda: LogVariance(spread=1.1, replay=Replay()), "spread = 1.1 are none"),
        (lambda: TrajectoryBalance(spread=0.9, replay=Replay()), "spread = 0.9 are none"),
        (lambda: LogDerivative(spread=1.1), "own paths"),
        (lambda: TrajectoryBalance(rate=0.0), "rate"),
        (lambda: TrajectoryBalance(paths_per_start=2), "paths_per_start"),
        (lambda: TrustRegion(bound=0.0), "bound"),
        (lambda: TrustRegion(refresh=0), "refresh"),
        (lambda: LogVariance(paths_per_start=3).validate(VP_SCHEME, 8), "multiple"),
        (lambda: LogVariance().validate(SCHEMES["noise"], 8), "noise cannot be learned"),
        (lambda: TrajectoryBalance().validate(SCHEMES["learned"], 8), "process cannot be learned"),
        (lambda: TrustRegion().validate(SCHEMES["bridge"], 8), "backward"),
        (lambda: TrustRegion().validate(replace(ANNEALED, learn=()), 8), "backward"),
    ],
)
def test_settings_that_do_not_fit(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()
