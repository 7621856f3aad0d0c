r"""Moves leave their level as it is, or miss it by as much as theory says.

Exact moves start from exact draws of a level that is not Gaussian. What they leave must pass Kolmogorov's test against
the level's law, and pairs (before, after) of a reversible move must be exchangeable. Both give p-values; a test fails
below 1e-6, so that the hundred of them here raise a false alarm once in ten thousand choices of seeds. Two wrong moves
show that the same test finds faults.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from scipy.special import erfc
from scipy.stats import chisquare, kstest
from torch import Tensor

from undrift.density import HMC, MALA, ULA, Cycle, Independence, Move, Normal, ScoreNorm, StudentT, Target, Underdamped
from undrift.density import move as move_module
from undrift.density.frame import Frame, FramedDensity
from undrift.density.level import Level, LevelDensity
from undrift.density.move import Info, Size, State
from undrift.density.targets import Gaussian, GaussianMixture, TwoModes

N, PAIRS = 20_000, 200_000
ALARM = 1e-6


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@dataclass(frozen=True)
class Exact:
    """A level with exact draws and the distribution functions of some projections."""

    density: LevelDensity
    draw: Callable[[int, torch.Generator], Tensor]
    projections: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]]
    smoothness: float
    bend: float
    """Size of the score beyond which ``by_score`` shortens steps."""


def tilted() -> Exact:
    """A mixture times exp(-kappa |y|^2 / 2): a mixture again."""
    kappa = 0.3
    means = torch.stack([tensor(1.5, 0.5), tensor(-1.0, 1.5), tensor(0.0, -2.0)])
    weights, variances = tensor(0.5, 0.3, 0.2), tensor(0.25, 1.0, 0.5)
    squeeze = 1 + kappa * variances
    log_w = weights.log() - squeeze.log() - 0.5 * kappa * means.square().sum(-1) / squeeze
    law = GaussianMixture(means / squeeze.unsqueeze(-1), variances / squeeze, log_w.softmax(0))

    def along(direction: Tensor) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        centres, width = law.means @ direction, law.covs.sqrt()
        return lambda y: y @ direction, lambda v: (
            torch.special.ndtr((v.unsqueeze(-1) - centres) / width) * law.weights
        ).sum(-1)

    directions = {"first": tensor(1, 0), "second": tensor(0, 1), "diagonal": tensor(0.6, -0.8)}
    density = LevelDensity(GaussianMixture(means, variances, weights), Normal(), 1.0, kappa)
    return Exact(density, law.sample, {k: along(v) for k, v in directions.items()}, 4.0 + kappa, 2.0)


def geometric() -> Exact:
    """Two modes to the power .6 times Student's law to the power .4; drawn by its inverse distribution function."""
    density = LevelDensity(TwoModes(weight=0.3, distance=2.0), StudentT(1.0, 5.0), 0.6, 0.4)
    y = torch.linspace(-40, 40, 400_001, dtype=torch.float64)
    p = density.log_prob(density.at(y.unsqueeze(-1))).softmax(0)
    cumulative = p.cumsum(0) - 0.5 * p

    def between(at: Tensor, x: Tensor, value: Tensor) -> Tensor:
        right = torch.searchsorted(x, at).clamp(1, len(x) - 1)
        share = ((at - x[right - 1]) / (x[right] - x[right - 1]).clamp(min=1e-300)).clamp(0, 1)
        return value[right - 1] + share * (value[right] - value[right - 1])

    def draw(n: int, generator: torch.Generator) -> Tensor:
        u = torch.rand(n, generator=generator, dtype=torch.float64)
        return between(u, cumulative, y).unsqueeze(-1)

    value = {"value": (lambda v: v.squeeze(-1), lambda v: between(v, y, cumulative))}
    return Exact(density, draw, value, 1.0, 0.7)


LEVELS = {"tilted": tilted(), "geometric": geometric()}


def constant(eps: float) -> Size:
    return lambda score: torch.as_tensor(eps, dtype=score.dtype)


def by_score(level: Exact) -> Size:
    rule = ScoreNorm(1.5, radius=level.bend / math.sqrt(level.density.target.dim * level.smoothness))
    return lambda score: rule.size(level.density, Level(1.0, 0.0), score, level.smoothness)


def two_sided(z: float) -> float:
    return float(erfc(abs(z) / math.sqrt(2)))


def p_values(level: Exact, move: Move, size: Size, reversible: bool, n: int = N) -> dict[str, float]:
    """Of the law of n walkers after 25 moves, and of exchanging before and after one move."""
    generator = torch.Generator().manual_seed(7)
    state = State(level.draw(n, generator))
    for _ in range(25):
        state, _ = move.step(level.density, state, size, generator)
    found = {}
    for name, (project, distribution) in level.projections.items():
        found[f"law, {name}"] = float(kstest(distribution(project(state.y)).numpy(), "uniform").pvalue)
    if reversible:
        before = level.draw(PAIRS, generator)
        after = move.step(level.density, State(before), size, generator)[0].y
        functions = {
            "place": lambda y: y[:, 0],
            "square": lambda y: y.square().sum(-1),
            "side": lambda y: (y[:, 0] > 0.3).double(),
            "steep": lambda y: (level.density.score(level.density.at(y)).norm(dim=-1) > level.bend).double(),
        }
        for f_name, g_name in (("place", "square"), ("place", "side"), ("square", "side"), ("steep", "square")):
            f, g = functions[f_name], functions[g_name]
            odd = f(before) * g(after) - g(before) * f(after)
            z = float(odd.mean()) / max(float(odd.std()) / math.sqrt(PAIRS), 1e-300)
            found[f"exchange, {f_name} and {g_name}"] = two_sided(z)
    return found


MOVES: dict[str, tuple[Move, float | None, bool]] = {  # move, eps (None: by the score's norm), reversible
    "MALA": (MALA(), 0.25, True),
    "MALA, step by walker": (MALA(), None, True),
    "HMC": (HMC(leapfrogs=5), 0.08, True),
    "HMC, random scale": (HMC(leapfrogs=5, decades=1.0), 0.3, True),
    "Underdamped": (Underdamped(friction=0.4, metropolis=True), 0.2, False),
    "Independence": (Independence(StudentT(1.5, 4.0)), 0.1, True),
    "Cycle": (Cycle((MALA(), Independence(Normal(2.0)), HMC(3))), 0.15, False),
}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", MOVES)
def test_exact_moves_leave_the_level_invariant(name: str, level: str) -> None:
    move, eps, reversible = MOVES[name]
    assert move.exact
    exact = LEVELS[level]
    size = by_score(exact) if eps is None else constant(eps)
    found = p_values(exact, move, size, reversible)
    assert min(found.values()) > ALARM, found


class ForgetsTheWayBack(MALA):
    """Metropolis without h(x'): as if the step back were as long as the step there."""

    def step(self, density: LevelDensity, state: State, size: Size, generator: torch.Generator) -> tuple[State, Info]:
        there: list[Tensor] = []

        def once(score: Tensor) -> Tensor:
            if not there:
                there.append(size(score))
            return there[0]

        return super().step(density, state, once, generator)


@pytest.mark.parametrize("level", LEVELS)
def test_wrong_moves_are_found_out(level: str) -> None:
    exact = LEVELS[level]
    forgets = p_values(exact, ForgetsTheWayBack(), by_score(exact), True, 3 * N)
    laws = [v for k, v in forgets.items() if k.startswith("law")]
    exchanges = [v for k, v in forgets.items() if k.startswith("exchange")]
    assert min(laws) < ALARM
    assert min(exchanges) < ALARM
    unadjusted = p_values(exact, ULA(), constant(0.4), False)
    assert min(unadjusted.values()) < ALARM


@pytest.mark.parametrize("move", [MALA(), HMC(4), Underdamped(metropolis=True)], ids=["MALA", "HMC", "Underdamped"])
def test_moves_through_a_frame_leave_the_level_invariant(move: Move) -> None:
    exact = LEVELS["tilted"]
    factor = torch.tensor([[1.2, 0.0], [-0.5, 0.6]], dtype=torch.float64)
    frame = Frame(tensor(0.4, -0.3), factor, factor.inverse())
    plain = exact.density
    density = FramedDensity(plain.target, plain.law, plain.exponent, plain.base, frame)
    generator = torch.Generator().manual_seed(3)
    y = exact.draw(N, generator)
    state = frame.enter(State(y, plain.at(y)))
    for _ in range(25):
        state, _ = move.step(density, state, constant(0.15), generator)
    state = frame.leave(state)
    for name, (project, distribution) in exact.projections.items():
        assert kstest(distribution(project(state.y)).numpy(), "uniform").pvalue > ALARM, name
    assert state.point is not None
    torch.testing.assert_close(state.point.score, plain.target.score(state.y), rtol=1e-9, atol=1e-9)


# -- unadjusted moves: their law on a Gaussian, by linear algebra on the moves' own code -------------------------------


def linear_map(move: Move, eps: float, monkeypatch: pytest.MonkeyPatch, noises: int, velocity: bool) -> Tensor:
    """(position, velocity) after a move on N(0, 1) as a matrix on (position, velocity, noise ...)."""
    inputs = torch.eye((2 if velocity else 1) + noises, dtype=torch.float64)
    y, v = inputs[:, :1], inputs[:, 1:2] if velocity else None
    queue = [inputs[:, i : i + 1] for i in range(inputs.shape[1] - noises, inputs.shape[1])]
    with monkeypatch.context() as patch:
        patch.setattr(move_module, "_normal_like", lambda *_: queue.pop(0))
        density = LevelDensity(Gaussian(dim=1), Normal())
        state, info = move.step(density, State(y, velocity=v), constant(eps), torch.Generator())
    assert info.acceptance is None
    assert not queue
    parts = [state.y] if state.velocity is None else [state.y, state.velocity]
    return torch.cat(parts, -1).T


@pytest.mark.parametrize("eps", [0.01, 0.1, 0.5, 1.5])
def test_ula_heats_a_gaussian_by_half_its_step(eps: float, monkeypatch: pytest.MonkeyPatch) -> None:
    ((gain, noise),) = linear_map(ULA(), eps, monkeypatch, 1, velocity=False).tolist()
    assert noise**2 / (1 - gain**2) == pytest.approx(1 / (1 - eps / 2), rel=1e-12)


def test_ula_heats_what_it_draws() -> None:
    eps, n = 0.5, 20_000
    generator = torch.Generator().manual_seed(0)
    density, state = LevelDensity(Gaussian(dim=2), Normal()), State(torch.zeros(n, 2, dtype=torch.float64))
    for _ in range(40):
        state, _ = ULA().step(density, state, constant(eps), generator)
    assert float(state.y.square().mean()) == pytest.approx(1 / (1 - eps / 2), rel=4 * math.sqrt(2 / (2 * n)))


@pytest.mark.parametrize("friction", [0.1, 2.0])
@pytest.mark.parametrize("eps", [0.01, 0.1, 0.5])
def test_underdamped_misses_by_the_square_of_its_leapfrog(
    eps: float, friction: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Leapfrog steps delta = sqrt(2 eps) keep x^2 (1 - delta^2 / 4) + v^2, whatever the friction."""
    step = linear_map(Underdamped(friction), eps, monkeypatch, 2, velocity=True)
    law = torch.diag(tensor(1 / (1 - 2 * eps / 4), 1.0, 1.0, 1.0))
    torch.testing.assert_close(step @ law @ step.T, law[:2, :2], rtol=1e-12, atol=1e-12)
    keep = torch.linalg.det(step[:, :2])  # leapfrog keeps volume, the two refreshments do not
    assert float(keep) == pytest.approx(math.exp(-friction), rel=1e-12)


# -- relations and costs -----------------------------------------------------------------------------------------------


def test_hmc_with_one_leapfrog_step_is_mala() -> None:
    exact = LEVELS["tilted"]
    y = exact.draw(N, torch.Generator().manual_seed(1))
    ends, acceptances = [], []
    for move in (MALA(), HMC(leapfrogs=1)):
        state, info = move.step(exact.density, State(y), constant(0.4), torch.Generator().manual_seed(2))
        ends.append(state.y)
        acceptances.append(info.acceptance)
    torch.testing.assert_close(acceptances[0], acceptances[1], rtol=1e-10, atol=1e-13)
    both = (ends[0] != y).all(-1) & (ends[1] != y).all(-1)
    assert 0.2 * N < int(both.sum()) < 0.9 * N
    torch.testing.assert_close(ends[0][both], ends[1][both], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "move", [ULA(), MALA(), Underdamped(), Underdamped(metropolis=True), Independence()], ids=lambda m: type(m).__name__
)
def test_a_move_costs_one_gradient(move: Move) -> None:
    target, n, moves = Gaussian(dim=2), 7, 12
    density, generator = LevelDensity(target, Normal(), 0.5, 0.5), torch.Generator().manual_seed(0)
    state = State(torch.zeros(n, 2, dtype=torch.float64))
    for _ in range(moves):
        state, _ = move.step(density, state, constant(0.1), generator)
    look = 0 if isinstance(move, ULA) else 1  # ULA never looks at where it ends
    assert target.evaluations.gradients == n * (moves + look)
    assert target.evaluations.values == 0


def test_hmc_costs_as_many_gradients_as_it_leaps_which_is_uniform() -> None:
    target = Gaussian(dim=1)
    density, generator = LevelDensity(target, Normal()), torch.Generator().manual_seed(5)
    state = State(torch.zeros(1, 1, dtype=torch.float64))
    state, _ = HMC(6).step(density, state, constant(0.1), generator)
    counts = [0] * 6
    for _ in range(1200):
        before = target.evaluations.gradients
        state, _ = HMC(6).step(density, state, constant(0.1), generator)
        counts[target.evaluations.gradients - before - 1] += 1
    assert chisquare(counts).pvalue > ALARM


def test_cycle_takes_turns() -> None:
    target = Gaussian(dim=1)
    density, generator = LevelDensity(target, Normal()), torch.Generator().manual_seed(5)
    state, sized = State(torch.zeros(3, 1, dtype=torch.float64)), []
    for _ in range(6):
        state, info = Cycle((MALA(), MALA(), Independence())).step(density, state, constant(0.1), generator)
        sized.append(info.sized)
    assert sized == [True, True, False, True, True, False]
    assert not Cycle((MALA(), ULA())).exact


@pytest.mark.parametrize("move", [MALA(), HMC(3), Underdamped(metropolis=True), Independence()])
def test_walkers_never_leave_the_support(move: Move) -> None:
    half_line = Target(lambda x: torch.where(x[:, 0] > 0, -x[:, 0], -torch.inf), 1)
    density, generator = LevelDensity(half_line, Normal()), torch.Generator().manual_seed(0)
    exact = torch.empty(N, 1, dtype=torch.float64).exponential_(generator=generator)
    state = State(exact)
    for _ in range(30):
        state, _ = move.step(density, state, constant(0.3), generator)
    assert bool((state.y > 0).all())
    assert kstest(state.y.squeeze(-1).numpy(), "expon").pvalue > ALARM
