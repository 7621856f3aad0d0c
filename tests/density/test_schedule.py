"""Levels by conditional effective sample size, and resampling: counts, means, and who is resampled."""

from __future__ import annotations

import itertools
import math
from typing import Literal

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from undrift.density import AdaptiveLevels, FixedLevels, Resampling
from undrift.density.schedule import conditional_ess


def log_weights(repeats: int, m: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 1.5 * torch.randn(repeats, m, generator=generator, dtype=torch.float64) + 700  # constants do not matter


def counts(index: Tensor, m: int) -> Tensor:
    """How often each walker (R, m) became an ancestor."""
    return torch.zeros(index.shape[0], m, dtype=torch.float64).scatter_add_(1, index, torch.ones_like(index).double())


def test_systematic_counts_are_next_to_their_means() -> None:
    log_w = log_weights(200, 57)
    log_w[:, 5] = -math.inf
    index = Resampling("systematic").ancestors(log_w, torch.Generator().manual_seed(1))
    expected = 57 * log_w.softmax(-1)
    found = counts(index, 57)
    assert bool((found >= expected.floor() - 1e-9).all())
    assert bool((found <= expected.ceil() + 1e-9).all())
    assert bool((found.sum(-1) == 57).all())
    assert bool((found[:, 5] == 0).all())


@pytest.mark.parametrize("scheme", ["systematic", "multinomial"])
def test_mean_counts_are_the_weights(scheme: Literal["systematic", "multinomial"]) -> None:
    repeats, m = 40_000, 8
    log_w = log_weights(1, m).expand(repeats, m)
    found = counts(Resampling(scheme).ancestors(log_w, torch.Generator().manual_seed(2)), m)
    expected = m * log_w[0].softmax(-1)
    error = found.std(0) / math.sqrt(repeats)
    assert bool(((found.mean(0) - expected).abs() < 5 * error + 1e-12).all())
    if scheme == "multinomial":
        w = expected / m
        torch.testing.assert_close(found.var(0), m * w * (1 - w), rtol=0.05, atol=1e-3)
    else:
        assert bool((found.var(0) <= 0.25 + 1e-3).all())  # two neighbouring counts: at most a coin's variance


def test_each_repeat_is_resampled_on_its_own() -> None:
    log_w = torch.zeros(3, 100, dtype=torch.float64)
    log_w[1, :50] = -math.inf  # half of the walkers carry all: exactly at the threshold of .5
    log_w[2, :51] = -math.inf
    assert Resampling(threshold=0.5).due(log_w).tolist() == [False, False, True]
    assert Resampling(threshold=1.0).due(log_w).tolist() == [False, True, True]
    log_w[0, 0] = 0.1
    assert Resampling(threshold=1.0).due(log_w).tolist() == [True, True, True]
    index = Resampling("multinomial").ancestors(log_w[2:].expand(2000, -1), torch.Generator().manual_seed(3))
    assert int(index.min()) >= 51
    assert chisquare(torch.bincount(index.reshape(-1), minlength=100)[51:].numpy()).pvalue > 1e-6


def test_conditional_ess_of_known_cases() -> None:
    even, half = torch.zeros(8, dtype=torch.float64), torch.tensor([0.0] * 4 + [-math.inf] * 4, dtype=torch.float64)
    assert conditional_ess(even + 3.0, even - 700.0) == pytest.approx(1.0)
    assert conditional_ess(even, half) == pytest.approx(0.5)
    gain = torch.where(half == 0, 2.0, 5.0)  # walkers without weight have no say
    assert conditional_ess(half, gain) == pytest.approx(1.0)
    assert conditional_ess(even, torch.full_like(even, -math.inf)) == 0.0
    gain = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    w = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    expected = (w @ gain) ** 2 / (w @ gain.square())
    assert conditional_ess(w.log() + 5, gain.log()) == pytest.approx(float(expected), rel=1e-12)


def test_fixed_levels_are_even_and_reach_both_ends() -> None:
    for count in (2, 3, 10, 1000):
        levels, u = FixedLevels(count), [0.0]
        while u[-1] < 1:
            u.append(levels.following(len(u) - 1, u[-1], lambda v: 1.0))
        assert u == pytest.approx([k / (count - 1) for k in range(count)], abs=1e-15)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("rate", [3.0, 400.0])
def test_adaptive_levels_land_on_the_cess(share: float, rate: float) -> None:
    """Where the CESS of a jump is exp(-(rate jump)^2), all jumps but the last are sqrt(-log share) / rate long."""
    levels, u, calls = AdaptiveLevels(share), [0.0], 0

    def cess(at: float, v: float) -> float:
        nonlocal calls
        calls += 1
        return math.exp(-((rate * (v - at)) ** 2))

    while u[-1] < 1:
        u.append(levels.following(len(u) - 1, u[-1], lambda v, at=u[-1]: cess(at, v)))
    jumps = [b - a for a, b in itertools.pairwise(u)]
    expected = math.sqrt(-math.log(share)) / rate
    assert jumps[:-1] == pytest.approx([expected] * (len(jumps) - 1), rel=0.08)
    assert jumps[-1] <= expected * 1.08
    assert calls < 20 * len(jumps)


def test_adaptive_levels_get_past_a_cliff() -> None:
    """Where any jump beyond .3 loses everything, the search comes as near to it as numbers allow, and gives up."""
    levels, u = AdaptiveLevels(0.9, most=40), 0.0
    cess = lambda v: 1.0 if v <= 0.3 else 0.0  # noqa: E731
    assert levels.following(0, u, cess) == pytest.approx(0.3, abs=1e-6)
    with pytest.raises(FloatingPointError, match=r"40 levels were not enough to get past u = 0\.3"):
        levels.following(40, 0.3, cess)


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: FixedLevels(0), "count must be at least 1"),
        (lambda: AdaptiveLevels(1.0), r"cess must lie in \(0, 1\)"),
        (lambda: AdaptiveLevels(most=1), "most must be at least 2"),
        (lambda: Resampling("stratified"), "systematic or multinomial"),  # type: ignore[arg-type]
        (lambda: Resampling(threshold=0.0), "threshold must lie in"),
    ],
)
def test_settings_that_do_not_fit(build: object, says: str) -> None:
    assert callable(build)
    with pytest.raises(ValueError, match=says):
        build()
