"""Grids: what each is optimal for or defined by, and how tables of levels are carried to other numbers of calls."""

import math

import numpy as np
import pytest
import torch

from undrift.config import ConfigError, build, describe
from undrift.design.gaussian import propagate
from undrift.design.spectrum import Spectrum
from undrift.process import CLD, PSLD, VE, VP, LearnedProcess
from undrift.process.clock import CosineClock, PowerClock
from undrift.sample import Cosine, Exponential, Given, Interpolated, LogSigma, Published, Rho, Tangent
from undrift.sample.grid import PUBLISHED, Grid, log_linear

ENDS = {"sigma_min": 0.002, "sigma_max": 80.0}


def deviation_ratio(grid, n, process=None, c=0.5):
    """Deviation of DDIM's samples over the exact one at the last level, from the exact law at the first."""
    plan = Exponential(steps=n, grid=grid, final="none", order=1).plan(process or VE())
    law = propagate(plan, Spectrum(torch.tensor([c**2])), start="exact")
    return float((law.cov / law.exact_cov)[0, 0, 0].sqrt())


# -- the tangent law ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "value"),
    [(Rho(7.0, **ENDS), 0.7527766246), (LogSigma(**ENDS), 0.7673485925), (Tangent(0.5, **ENDS), 0.8849158552)],
)
def test_ddim_on_one_variance_is_a_product_of_cosines(grid, value):
    angles = torch.atan(VE().sigma(grid.times(VE(), 11)) / 0.5)
    product = float(torch.cos(angles.diff()).prod())
    assert product == pytest.approx(value, abs=1e-10)
    assert deviation_ratio(grid, 10) == pytest.approx(product, abs=1e-12)


@pytest.mark.parametrize("process", [VE(), VP()], ids=["VE", "VP"])
@pytest.mark.parametrize("n", [1, 3, 10])
def test_the_tangent_law_reaches_its_formula_on_any_scalar_process(process, n):
    """The flow of a process of one channel is the same in levels; its coefficients are exact to 1e-11 or so."""
    whole = math.atan2(80, 0.5) - math.atan2(0.002, 0.5)
    ratio = deviation_ratio(Tangent(0.5, **ENDS), n, process)
    assert ratio == pytest.approx(math.cos(whole / n) ** n, abs=1e-9)


def test_no_other_levels_beat_the_tangent_law():
    g = torch.Generator().manual_seed(0)
    best = deviation_ratio(Tangent(0.5, **ENDS), 6)
    angles = torch.atan(VE().sigma(Tangent(0.5, **ENDS).times(VE(), 7)) / 0.5)
    for size in (1e-3, 1e-2, 5e-2):
        for _ in range(5):
            moved = angles.clone()
            moved[1:-1] += size * torch.randn(5, dtype=torch.float64, generator=g)
            levels = 0.5 * torch.tan(moved)
            levels[0], levels[-1] = 80.0, 0.002
            # To second order each ratio loses (1 + tan^2) |change of steps|^2 / 2 of itself: far above rounding.
            assert deviation_ratio(Given(levels.tolist(), sigma=True), 6) < best - 0.1 * size**2


# -- the cosine schedule -----------------------------------------------------------------------------------------------


def test_cosine_levels_are_those_of_the_cosine_process_at_equal_times():
    process = VP(clock=CosineClock())
    high, low = 50.0, 0.004
    times = process.time(torch.tensor([high, low], dtype=torch.float64))
    equal = times[0] + (times[1] - times[0]) * torch.linspace(0, 1, 9, dtype=torch.float64)
    for other in (process, VE(), PSLD()):
        levels = other.sigma(Cosine(sigma_min=low, sigma_max=high).times(other, 9))
        torch.testing.assert_close(levels, process.sigma(equal), rtol=1e-8, atol=0)


def test_cosine_without_offset_is_the_tangent_law_of_unit_scale():
    a, b = Cosine(0.0, **ENDS).times(VE(), 12), Tangent(1.0, **ENDS).times(VE(), 12)
    torch.testing.assert_close(a, b, rtol=1e-11, atol=0)


# -- tables ------------------------------------------------------------------------------------------------------------

TABLE = [80.0, 11.0, 3.9, 1.6, 0.57, 0.17, 0.002]


@pytest.mark.parametrize("n", [2, 3, 7, 10, 13, 40])
def test_resampling_is_linear_interpolation_of_logarithms_in_the_index(n):
    expected = np.exp(np.interp(np.linspace(0, 1, n), np.linspace(0, 1, len(TABLE)), np.log(TABLE)))
    levels = log_linear(torch.tensor(TABLE, dtype=torch.float64), n)
    np.testing.assert_allclose(levels.numpy(), expected, rtol=1e-12)
    if n in (7, 13):
        assert levels[:: (n - 1) // 6].tolist() == TABLE  # given levels are kept to the last bit
    for process in (VE(), VP(), CLD()):
        reached = process.sigma(Interpolated(TABLE).times(process, n))
        np.testing.assert_allclose(reached.numpy(), expected, rtol=1e-9)


def test_a_curve_is_cut_where_the_process_ends():
    """Of a curve from 1000 to 0.1 in two straight pieces, VE shows what lies below 80, at the same density."""
    values = [1000.0, 10.0, 0.1]
    times = Interpolated(values).times(VE(), 5)
    assert float(times[0]) == 80.0
    start = math.log(1000 / 80) / math.log(100)  # index at which the curve crosses 80
    place = np.linspace(start, 2, 5)
    np.testing.assert_allclose(VE().sigma(times).numpy(), 10.0 ** (3 - 2 * place), rtol=1e-10)


def test_a_level_at_the_end_of_the_process_is_no_cut():
    assert VE().sigma(Interpolated([80.0, 5.0, 0.1]).times(VE(), 3)).tolist() == pytest.approx([80.0, 5.0, 0.1])
    cut = VE().sigma(Interpolated([100.0, 80.0, 0.1]).times(VE(), 3))  # the crossing is a knot
    assert cut.tolist() == pytest.approx([80.0, math.sqrt(8.0), 0.1])


@pytest.mark.parametrize("table", PUBLISHED)
def test_published_tables_at_their_own_number_of_calls(table):
    levels, drop = PUBLISHED[table]
    process = VE(clock=PowerClock(800.0, horizon=800.0))
    calls = len(levels) - drop
    assert process.sigma(Published(table).times(process, calls)).tolist() == pytest.approx(levels[:calls], rel=1e-10)
    doubled = process.sigma(Published(table, scale=0.5).times(process, 2 * (len(levels) - 1) + 1 - drop))
    assert doubled[::2].tolist() == pytest.approx([0.5 * v for v in levels[: len(doubled[::2])]], rel=1e-10)
    assert doubled[1].item() == pytest.approx(0.5 * math.sqrt(levels[0] * levels[1]), rel=1e-10)


@pytest.mark.parametrize("grid", [Tangent(0.3), Cosine(0.01, 0.01, None), Interpolated(TABLE), Published("ays-svd")])
def test_grids_are_decreasing_times_of_every_process_and_come_back_from_their_description(grid):
    for process in (VE(), VP(), CLD()):
        for n in (1, 2, 3, 17):
            times = grid.times(process, n)
            assert times.shape == (n,)
            assert bool((times.diff() < 0).all())
            assert 0 < float(times[-1]) <= float(times[0]) <= process.horizon
    assert build(describe(grid), Grid) == grid


@pytest.mark.parametrize("grid", [LogSigma(), Tangent(0.3), Interpolated([1e3, 5.0, 0.1]), Published("ays-svd")])
def test_times_of_a_process_that_learns_follow_it_without_a_warning(grid, recwarn):
    """Levels are numbers, times move with the process: they keep d sigma(t) = 0 between the ends."""
    learned = LearnedProcess(2, learn=("D", "clock"))
    times = grid.times(learned, 4)
    assert not recwarn.list
    (slope,) = torch.autograd.grad(times[1], learned.D_raw)
    assert float(slope.abs().max()) > 0
    held = torch.autograd.grad(learned.sigma(grid.times(learned, 4))[1], learned.D_raw)[0]
    assert float(held.abs().max()) < 1e-9 * float(learned.sigma(times)[1].detach())


def test_what_cannot_be_a_grid_is_refused():
    with pytest.raises(ConfigError, match="'ays-sd15'"):
        build({"type": "Published", "table": "ays"}, Grid)
    with pytest.raises(ValueError, match="strictly decreasing"):
        Interpolated([1.0, 2.0]).times(VE(), 3)
    with pytest.raises(ValueError, match="at least two"):
        Interpolated([1.0]).times(VE(), 3)
    with pytest.raises(ValueError, match=r"sigma\(T\) = 80"):
        Interpolated([200.0, 100.0]).times(VE(), 3)
    with pytest.raises(ValueError, match="scale must be positive"):
        Tangent(0.0)
    with pytest.raises(ValueError, match="offset"):
        Cosine(-0.1)
