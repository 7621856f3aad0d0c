"""Parallel tempering: what exchanges leave invariant, what the ladder learns, and what comes out."""

import math

import pytest
import torch
from scipy import stats

from undrift.config import build, describe
from undrift.density import ladders as loop
from undrift.density.coordinates import Affine
from undrift.density.ladders import Ladders, equal_rejections, exchange
from undrift.density.law import Normal, StudentT
from undrift.density.method import Method
from undrift.density.move import HMC, MALA, ULA, Cycle, Independence, Underdamped
from undrift.density.path import Dilation, Direct, Geometric, Path, TemperedDilation, Tilt
from undrift.density.target import Target, TargetError
from undrift.density.targets.mixtures import Gaussian, Grid16, TwoModes
from undrift.density.tempering import ParallelTempering
from undrift.measure.evidence import total_variation

AXIS = torch.linspace(-40, 40, 40001, dtype=torch.float64)


def level_cdf(target: Target, path: Path, u: float) -> torch.Tensor:
    """Distribution function of a level in one dimension, on AXIS."""
    density = path.density(target, u)
    log_p = density.log_prob(density.at(AXIS.unsqueeze(-1)))
    total = (log_p - log_p.max()).exp().cumsum(0)
    return total / total[-1]


def at_equilibrium(method: ParallelTempering, target: Target, ladders: int, steps: list[float], seed: int):
    """Ladders whose every level starts from exact draws, by inverse distribution functions."""
    g = torch.Generator().manual_seed(seed)
    engine = Ladders(method, target, 1, ladders, g)
    state = engine.begin(torch.float64)
    y = []
    for u in state.u.tolist():
        place = torch.searchsorted(level_cdf(target, method.path, u), torch.rand(ladders, dtype=torch.float64))
        y.append(AXIS[place.clamp(max=len(AXIS) - 1)])
    point = method.path.density(target, 1.0).at(torch.cat(y).unsqueeze(-1))
    return engine, state._replace(point=point, log_step=torch.tensor(steps, dtype=torch.float64).log())


def p_values(method: ParallelTempering, target: Target, state, ladders: int) -> list[float]:
    out = []
    for u, y in zip(state.u.tolist(), state.point.x.reshape(-1, ladders), strict=True):
        cdf = level_cdf(target, method.path, u)
        out.append(stats.kstest(cdf[torch.searchsorted(AXIS, y).clamp(max=len(AXIS) - 1)], "uniform").pvalue)
    return out


MOVES = {
    "MALA": MALA(),
    "HMC": HMC(3),
    "GHMC": Underdamped(metropolis=True),
    "cycle": Cycle((MALA(), Independence(Normal(4.0)))),
}


@pytest.mark.parametrize("move", MOVES)
def test_all_levels_keep_their_laws(move):
    torch.manual_seed(0)
    method = ParallelTempering(Geometric(Normal(4.0)), MOVES[move], levels=4, iterations=15, warmup=0, thin=15)
    target, ladders = TwoModes(weight=0.3, distance=3.0), 4000
    engine, state = at_equilibrium(method, target, ladders, [1.0, 3.0, 2.0, 1.5], seed=1)
    while state.k < method.iterations:
        state = engine.iterate(state)
    assert min(p_values(method, target, state, ladders)) > 1e-3
    # The levels of a ladder are independent in equilibrium: correlations are N(0, 1 / ladders).
    signs = (state.point.x > 0).double().reshape(-1, ladders)
    z = torch.corrcoef(signs)[~torch.eye(4, dtype=torch.bool)] * math.sqrt(ladders)
    assert float(z.abs().max()) < 4


@pytest.mark.parametrize("path", [TemperedDilation(first=0.05), Tilt(first=2.0, last=0.01)])
def test_levels_without_exact_draws_keep_their_laws(path):
    torch.manual_seed(1)
    method = ParallelTempering(path, levels=4, iterations=15, warmup=0, thin=15)
    target, ladders = TwoModes(weight=0.3, distance=3.0), 4000
    engine, state = at_equilibrium(method, target, ladders, [0.5, 0.8, 1.0, 1.5], seed=2)
    while state.k < method.iterations:
        state = engine.iterate(state)
    assert min(p_values(method, target, state, ladders)) > 1e-3


def test_a_wrong_ratio_would_be_seen(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(loop, "exchange", lambda r, parity, g: exchange(0.5 * r, parity, g))
    method = ParallelTempering(Geometric(Normal(4.0)), levels=4, iterations=15, warmup=0, thin=15)
    target, ladders = TwoModes(weight=0.3, distance=3.0), 4000
    engine, state = at_equilibrium(method, target, ladders, [1.0, 3.0, 2.0, 1.5], seed=1)
    while state.k < method.iterations:
        state = engine.iterate(state)
    assert min(p_values(method, target, state, ladders)) < 1e-6


@pytest.mark.parametrize("path", [Geometric(StudentT(2.0, 5.0)), TemperedDilation(), Tilt()])
def test_ratio_is_that_of_the_product_density(path):
    target = Grid16()
    engine = Ladders(ParallelTempering(path, levels=5), target, 2, 3, torch.Generator().manual_seed(0))
    state = engine.begin(torch.float64)
    forward, backward = engine._gain(state)
    x = state.point.x.reshape(5, 6, 2)

    def log_product(order: list[int]) -> torch.Tensor:
        total = torch.zeros(6, dtype=torch.float64)
        for u, place in zip(state.u.tolist(), order, strict=True):
            density = path.density(target, u)
            total = total + density.log_prob(density.at(x[place]))
        return total

    before = log_product([0, 1, 2, 3, 4])
    for i in range(4):
        swapped = [0, 1, 2, 3, 4]
        swapped[i], swapped[i + 1] = swapped[i + 1], swapped[i]
        torch.testing.assert_close((forward - backward)[i], log_product(swapped) - before)


def test_exchange_is_a_permutation_of_neighbours():
    g = torch.Generator().manual_seed(0)
    ratio = torch.full((4, 20000), math.log(0.3), dtype=torch.float64)
    for parity in (0, 1):
        source = exchange(ratio, parity, g)
        assert torch.equal(source.sort(0).values, torch.arange(5).unsqueeze(-1).expand(5, 20000))
        assert torch.equal(source.gather(0, source), torch.arange(5).unsqueeze(-1).expand(5, 20000))
        moved = (source != torch.arange(5).unsqueeze(-1)).double().mean(-1)
        share = torch.tensor([0.3, 0.3, 0.3, 0.3, 0.0] if parity == 0 else [0.0, 0.3, 0.3, 0.3, 0.3])
        assert float((moved - share).abs().max()) < 4 * math.sqrt(0.21 / 20000)
    refused = exchange(torch.tensor([[-math.inf, math.nan, math.inf]]), 0, g)
    assert refused.tolist() == [[0, 0, 1], [1, 1, 0]]


def test_exchanges_keep_every_state():
    method = ParallelTempering(TemperedDilation(), MALA(), levels=6, iterations=10, warmup=0, thin=10)
    engine = Ladders(method, Grid16(), 1, 50, torch.Generator().manual_seed(0))
    state = engine.begin(torch.float64)
    frozen = state._replace(log_step=torch.full_like(state.log_step, -200.0))  # steps that move nothing
    after = frozen
    for _ in range(4):
        after = engine.iterate(after)
    for old, new in zip(frozen.point, after.point, strict=True):
        old, new = (v.reshape(6, 50, -1)[..., 0].sort(0).values for v in (old, new))
        torch.testing.assert_close(new, old)
    assert not torch.equal(after.point.x, frozen.point.x)
    again = Grid16().at(after.point.x)  # what is known of a point travels with it
    torch.testing.assert_close(after.point.log_prob, again.log_prob)
    torch.testing.assert_close(after.point.score, again.score)


def weight_error(target, draws) -> torch.Tensor:
    """Weights of modes against the truth, in standard errors from repeats."""
    modes = torch.nn.functional.one_hot(target.assign(draws.x), len(target.mode_weights)).double()
    mean, error = draws.expectation(modes)
    return (mean - target.mode_weights) / error


def test_modes_and_evidence_of_two_modes():
    target = TwoModes(log_z=3.0)
    method = ParallelTempering(Geometric(Normal(5.1)), levels=8, iterations=300, thin=15)
    draws = method.run(target, 4000, seed=0, repeats=20)
    assert draws.states.shape == (20, 20, 10, 1)
    assert abs(float(weight_error(target, draws)[0])) < 3
    # TV of independent draws: sd .0047. States 15 iterations apart are less than twice as variable.
    assert total_variation(draws.mode_weights(), target.mode_weights) < 3 * 2**0.5 * 0.0047
    assert draws.promise == "consistent"
    assert draws.log_z_std_error < 0.02
    assert abs(draws.log_z - 3.0) < 3 * draws.log_z_std_error
    assert draws.corrected
    assert draws.log_weights is None
    assert draws.notes == ()


def test_sixteen_modes_are_as_good_as_independent_draws():
    target = Grid16(log_z=3.0)
    draws = ParallelTempering(Geometric(Normal(11.2)), iterations=200, thin=25).run(target, 4000, seed=0, repeats=8)
    floor = torch.stack(
        [
            torch.bincount(target.assign(target.sample(4000, seed)), minlength=16) / 4000 - target.mode_weights
            for seed in range(20)
        ]
    )
    floor = 0.5 * floor.abs().sum(-1)
    tv = total_variation(draws.mode_weights(), target.mode_weights)
    assert tv < float(floor.mean() + 4 * floor.std())
    assert abs(draws.log_z - 3.0) < 3 * draws.log_z_std_error
    rows = draws.levels
    rejections = torch.tensor([row["rejection"] for row in rows[:-1]])
    # The last change of the ladder saw 500 ladders x 25 iterations, half of it still warming up.
    assert float(rejections.max() - rejections.min()) < 0.03
    assert rows[-1]["barrier"] == pytest.approx(float(rejections.sum()))
    assert all(0.5 < row["acceptance"] < 0.65 for row in rows[1:])
    assert rows[0]["acceptance"] is None
    trips = [row["round_trips"] for row in rows[1:]]
    assert trips == sorted(trips, reverse=True)


def test_round_trips_are_as_many_as_theory_says():
    """Syed et al.: 1 / (2 + 2 sum r / (1 - r)) an iteration, if local moves forget the state's density at once."""
    method = ParallelTempering(Geometric(Normal(3.0)), HMC(8), levels=6, iterations=200, thin=100)
    draws = method.run(Gaussian(4, condition=4.0), 400, seed=0, repeats=4)
    r = torch.tensor([row["rejection"] for row in draws.levels[:-1]])
    expected = 1 / (2 + 2 * float((r / (1 - r)).sum()))
    found = draws.levels[-1]["round_trips"] / (100 * 400)
    assert 0.85 * expected < found < 1.05 * expected


def test_evidence_of_gaussian_without_normaliser():
    d = 5
    target = Target(lambda x: -0.5 * (x - 1).square().sum(-1) / 0.25, dim=d)
    draws = ParallelTempering(Geometric(Normal(2.0)), levels=6, iterations=200, thin=20).run(target, 1000, repeats=10)
    assert draws.log_z_std_error < 0.03
    assert abs(draws.log_z - 0.5 * d * math.log(2 * math.pi * 0.25)) < 3 * draws.log_z_std_error
    mean, error = draws.expectation(draws.x)
    assert float(((mean - 1) / error).abs().max()) < 4


@pytest.mark.parametrize(("path", "target"), [(TemperedDilation(), Grid16()), (Tilt(), TwoModes())])
def test_paths_without_a_normalised_start(path, target):
    draws = ParallelTempering(path, iterations=300, thin=25).run(target, 2400, seed=0, repeats=8)
    assert draws.log_z is None
    assert draws.promise is None
    assert float(weight_error(target, draws).abs().max()) < 4.5
    floor = 0.5 * float((target.mode_weights * 2 / (math.pi * 2400)).sqrt().sum())  # mean of half the sum of |errors|
    assert total_variation(draws.mode_weights(), target.mode_weights) < 2.5 * floor


def test_coordinates_reach_a_target_far_from_the_origin():
    target = Target(lambda x: -0.5 * ((x - 100) / 0.1).square().sum(-1), dim=2)
    method = ParallelTempering(levels=4, iterations=100, thin=10, coordinates=Affine(100.2, 0.2))
    draws = method.run(target, 400, repeats=8)
    mean, error = draws.expectation(draws.x)
    assert float(((mean - 100) / error).abs().max()) < 4
    assert abs(draws.log_z - math.log(2 * math.pi * 0.01)) < 3.5 * draws.log_z_std_error


def test_support_with_edges():
    """An exponential law: -inf on half of the line, where the first level has half of its states."""
    target = Target(lambda x: torch.where(x[:, 0] > 0, -x[:, 0], -math.inf), dim=1)
    draws = ParallelTempering(Geometric(Normal(3.0)), levels=6, iterations=200, thin=10).run(target, 4000, repeats=8)
    assert float(draws.x.min()) > 0
    assert abs(draws.log_z) < 3 * draws.log_z_std_error
    mean, error = draws.expectation(draws.x)
    assert abs(float((mean - 1) / error)) < 4


def test_too_few_iterations_are_told():
    draws = ParallelTempering(Geometric(Normal(1.0)), levels=12, iterations=20, thin=10).run(Grid16(), 16, repeats=2)
    assert "round trip" in draws.notes[0]
    assert draws.levels[-1]["round_trips"] == 0


def test_equal_rejections_invert_the_barrier():
    u = torch.linspace(0, 1, 6, dtype=torch.float64)
    barrier = u.sqrt()  # steep at the start, as tempering's is
    for _ in range(12):
        u = equal_rejections(u, u.sqrt().diff())
    torch.testing.assert_close(u.sqrt().diff(), torch.full((5,), 0.2, dtype=torch.float64), atol=2e-3, rtol=0)
    assert float(barrier[-1]) == 1.0
    flat = equal_rejections(u, torch.zeros(5, dtype=torch.float64))
    assert bool((flat.diff() > 0).all())


def test_same_seed_same_draws_and_evaluations_counted():
    target = Grid16()
    method = ParallelTempering(Geometric(Normal(8.0)), levels=5, moves=2, iterations=20, thin=5)
    one, two, other = (method.run(target, 100, seed, repeats=5) for seed in (1, 1, 2))
    assert torch.equal(one.states, two.states)
    assert not torch.equal(one.states, other.states)
    # 64 probes and what their check costs, 5 levels to begin with, then (4 levels x 2 moves + 1 fresh draw) x 20.
    ladders = 5 * 10
    assert one.evaluations.gradients == 64 + ladders * (5 + 20 * 9)
    assert one.states.dtype == torch.float64
    assert method.run(target, 100, 1, repeats=5, dtype=torch.float32).states.dtype == torch.float32


@pytest.mark.parametrize("stop", [3, 17])
def test_an_interrupted_run_goes_on(tmp_path, monkeypatch, stop):
    method = ParallelTempering(Geometric(Normal(5.0)), Underdamped(metropolis=True), levels=4, iterations=24, thin=4)
    whole = method.run(TwoModes(log_z=1.0), 60, seed=3, repeats=4)
    real = Ladders.iterate

    def interrupted(self, state):
        if state.k == stop:
            raise KeyboardInterrupt
        return real(self, state)

    file = tmp_path / "run.undrift"
    monkeypatch.setattr(Ladders, "iterate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        method.run(TwoModes(log_z=1.0), 60, seed=3, repeats=4, checkpoint=file)
    monkeypatch.setattr(Ladders, "iterate", real)
    with pytest.raises(ValueError, match="belongs to a run"):
        method.run(TwoModes(log_z=1.0), 60, seed=4, repeats=4, checkpoint=file)
    resumed = method.run(TwoModes(log_z=1.0), 60, seed=3, repeats=4, checkpoint=file)
    assert torch.equal(resumed.states, whole.states)
    assert torch.equal(resumed.repeat_log_z, whole.repeat_log_z)
    assert resumed.levels == whole.levels
    assert not file.exists()


def test_unusable_settings():
    for path in (Dilation(), Direct()):
        with pytest.raises(ValueError, match="exchange nothing"):
            ParallelTempering(path)
    with pytest.raises(ValueError, match="MALA or HMC"):
        ParallelTempering(move=ULA())
    with pytest.raises(ValueError, match="no state would be kept"):
        ParallelTempering(iterations=60, thin=50)
    with pytest.raises(ValueError, match="levels must be at least 2"):
        ParallelTempering(levels=1)
    with pytest.raises(ValueError, match="warmup"):
        ParallelTempering(warmup=1.0)
    with pytest.raises(ValueError, match="one draw a repeat"):
        ParallelTempering().run(Gaussian(), 3, repeats=4)
    with pytest.raises(TargetError, match="nan"):
        ParallelTempering().run(Target(lambda x: x.sum(-1) * math.nan, dim=1), 100)


def test_plain_data():
    method = ParallelTempering(TemperedDilation(first=0.01), HMC(4), levels=7)
    again = build(describe(method), Method)
    assert describe(again) == describe(method)
