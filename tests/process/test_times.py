"""Densities over time: published quantiles, exact densities, and what an integral by them is."""

import math

import mpmath
import pytest
import torch

from tests.gaussian import PROCESSES
from tests.reference import mdm
from tests.reference.exact import precise_kernel
from undrift.process import (
    VE,
    FlowMatching,
    InformationTimes,
    LearnedProcess,
    LogSnrTimes,
    SubVP,
    UniformTimes,
)
from undrift.process.times import earliest

FINE = InformationTimes(4096)


def test_vp_quantiles():
    """T15."""
    u = torch.tensor(list(mdm.TIME_QUANTILES), dtype=torch.float64)
    t, density = FINE.draw(PROCESSES["VP"], 1e-3, u)
    assert t.tolist() == pytest.approx(list(mdm.TIME_QUANTILES.values()), rel=1e-11)
    clock = PROCESSES["VP"].clock
    exact = clock.beta(t) / -torch.expm1(-clock.integral(t)) / mdm.TIME_TOTAL_VP
    assert density.tolist() == pytest.approx(exact.tolist(), rel=1e-6)


@pytest.mark.parametrize("name", list(mdm.TIME_ADAPTED))
def test_adapted_times(name):
    """T15. Totals made beforehand carry the error of a covariance in float64, 1.5e-7; ALDA's are off by 1e-7 of it."""
    total, median = mdm.TIME_ADAPTED[name]
    process = PROCESSES[name]
    assert float(FINE.draw(process, 1e-3, torch.tensor([0.5]).double())[0]) == pytest.approx(median, rel=2e-7)
    c, _ = FINE.measure(process, torch.tensor([1e-3, 1.0], dtype=torch.float64))
    assert float(c[1] - c[0]) == pytest.approx(total, abs=1e-5 if name == "ALDA" else 2e-7)


@pytest.mark.parametrize("name", ["CLD", "ALDA", "MALDA"])
def test_total_information_in_fifty_digits(name):
    process = PROCESSES[name]
    a, d = (m.numpy() for m in process.matrices())
    start = process.start().numpy()
    with mpmath.workdps(60):
        values = []
        for t in (1e-3, 1.0):
            b = process.clock.integral(torch.tensor(t, dtype=torch.float64))
            _, root = precise_kernel(a, 2 * d, start, float(b))
            values.append(2 * mpmath.log(mpmath.det(root)) - 2 * mpmath.mpf(float(a.trace())) * mpmath.mpf(float(b)))
        exact = float(values[1] - values[0])
    c, _ = FINE.measure(process, torch.tensor([1e-3, 1.0], dtype=torch.float64))
    assert float(c[1] - c[0]) == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("times", [UniformTimes(), InformationTimes(16), LogSnrTimes(16), InformationTimes()])
@pytest.mark.parametrize("process", [*PROCESSES.values(), SubVP(), FlowMatching(), VE(), LearnedProcess(2)])
def test_density_is_that_of_the_draws(process, times):
    """However coarse the table: the mean of 1/density is the length of the range, and that of t/density its moment."""
    low, high = 1e-3 * process.horizon, process.horizon
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    t, density = times.draw(process, low, u)
    assert float(t.min()) >= low
    assert float(t.max()) <= high
    assert bool((t.diff() > 0).all())
    assert float((1 / density).mean()) == pytest.approx(high - low, rel=1e-6)
    assert float((t / density).mean()) == pytest.approx(0.5 * (high**2 - low**2), rel=1e-6)


@pytest.mark.parametrize("name", list(PROCESSES))
def test_log_snr_times_are_uniform_in_log_sigma(name):
    process = PROCESSES[name]
    t, _ = LogSnrTimes(1024).draw(process, 1e-3, torch.linspace(0, 1, 9, dtype=torch.float64))
    steps = process.sigma(t).log().diff()
    assert steps.tolist() == pytest.approx([float(steps.mean())] * 8, rel=1e-5)


def test_the_table_follows_a_process_that_learns():
    process, times, u = LearnedProcess(2), InformationTimes(), torch.tensor([0.3, 0.6], dtype=torch.float64)
    before = times.draw(process, 1e-3, u)[0]
    assert torch.equal(times.draw(process, 1e-3, u)[0], before)
    with torch.no_grad():
        process.D_raw.mul_(3.0)
    after = times.draw(process, 1e-3, u)[0]
    assert not torch.allclose(before, after)
    assert torch.equal(after, InformationTimes().draw(process, 1e-3, u)[0])
    assert not after.requires_grad
    first = earliest(process, 0.01)
    process.D_raw.grad = torch.ones_like(process.D_raw)  # a fused step, which torch's version counters do not see
    torch.optim.Adam([process.D_raw], lr=0.1, fused=True).step()
    assert not torch.allclose(times.draw(process, 1e-3, u)[0], after)
    assert earliest(process, 0.01) != first


@pytest.mark.parametrize("process", [*PROCESSES.values(), FlowMatching(), VE()], ids=lambda p: type(p).__name__)
def test_earliest_time_is_near_the_level(process):
    for sigma in (1e-3, 0.1):
        assert math.log(float(process.sigma(earliest(process, sigma)))) == pytest.approx(math.log(sigma), abs=0.1)


def test_refusals():
    with pytest.raises(ValueError, match=r"t_min must lie in \(0, 1\)"):
        UniformTimes().draw(PROCESSES["VP"], 1.0, torch.rand(2))
    with pytest.raises(ValueError, match="at least 8"):
        InformationTimes(4)
    with pytest.raises(ValueError, match="sigma_min of 1000 is not among them"):
        earliest(PROCESSES["VP"], 1000.0)
