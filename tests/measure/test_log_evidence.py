"""Weights and evidence against direct sums, closed cases and limits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from undrift.measure.evidence import (
    effective_sample_size,
    log_evidence,
    log_mean_exp,
    mode_weights,
    total_variation,
)

INF = math.inf


def logs(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_log_mean_exp_is_the_log_of_the_mean_at_any_height() -> None:
    w = torch.rand(3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for height in (-1e5, 0.0, 1e5):
        torch.testing.assert_close(log_mean_exp(w.log() + height), w.mean(-1).log() + height)
    torch.testing.assert_close(log_mean_exp(w.log(), dim=0), w.mean(0).log())
    assert float(log_mean_exp(logs(-INF, 0.0))) == pytest.approx(-math.log(2))
    assert float(log_mean_exp(logs(-INF, -INF))) == -INF


@pytest.mark.parametrize("height", [-1e4, 0.0, 1e4])
def test_effective_sample_size_has_its_limits(height: float) -> None:
    assert float(effective_sample_size(torch.zeros(50, dtype=torch.float64) + height)) == pytest.approx(50)
    assert float(effective_sample_size(logs(0.0, -INF, -INF, -INF) + height)) == pytest.approx(1)
    assert float(effective_sample_size(logs(0.0, 0.0, -INF, -INF) + height)) == pytest.approx(2)
    w = logs(0.2, 0.5, 0.3)
    assert float(effective_sample_size(w.log() + height)) == pytest.approx(float(1 / w.square().sum()))


def test_weights_that_are_all_zero_are_worth_nothing() -> None:
    assert effective_sample_size(torch.stack([logs(-INF, -INF), logs(0.0, 0.0)])).tolist() == [0.0, 2.0]


def test_the_jackknife_of_two_and_of_equal_repeats_is_closed() -> None:
    # Two repeats leave out one each: the estimates are the logs themselves, (b - a)^2 / 2 * 1/2.
    found = log_evidence(logs(1.0, 1.6))
    assert found.value == pytest.approx(math.log((math.exp(1.0) + math.exp(1.6)) / 2))
    assert found.std_error == pytest.approx(0.3)
    assert log_evidence(logs(2.0, 2.0, 2.0)).std_error == pytest.approx(0.0, abs=1e-12)


def test_the_jackknife_is_the_delta_method_for_many_repeats() -> None:
    z = 1 + 0.05 * torch.randn(400, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = log_evidence(z.log())
    # sd(Z) / (mean(Z) sqrt R); they differ in the second order, (0.05)^2.
    assert found.std_error == pytest.approx(float(z.std() / z.mean()) / math.sqrt(400), rel=5e-3)


def test_the_standard_error_is_honest() -> None:
    """Over many sets of 8 repeats the error has the size that is claimed: z-scores of mean square near 1."""
    sigma = 0.3
    noise = torch.randn(600, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = [log_evidence(row) for row in sigma * noise - 0.5 * sigma**2]  # log-normal estimates of mean 1
    errors = torch.tensor([f.value for f in found])
    claimed = torch.tensor([f.std_error for f in found])
    ratio = float(errors.square().mean().sqrt() / claimed.square().mean().sqrt())
    # A root mean square over 600 has a standard error of 1 / sqrt(1200) = 3 %; that of the claims, with 7 degrees of
    # freedom each, 600 * 7, is a third of it.
    assert ratio == pytest.approx(1.0, abs=0.12)


def test_repeats_without_evidence_count_in_the_mean() -> None:
    assert log_evidence(logs(0.0, -INF)).value == pytest.approx(-math.log(2))
    lost = log_evidence(logs(-INF, -INF))
    assert lost.value == -INF
    assert math.isnan(lost.std_error)
    assert math.isnan(log_evidence(logs(0.5)).std_error)


@pytest.mark.parametrize("log_z", [torch.zeros(2, 2), torch.zeros(0), torch.tensor(1.0)])
def test_evidence_needs_one_number_a_repeat(log_z: Tensor) -> None:
    with pytest.raises(ValueError, match=r"log_z must have shape \(repeats,\), got"):
        log_evidence(log_z)


def test_shares_of_modes_are_sums_of_weights() -> None:
    modes = torch.tensor([0, 2, 2, 0, 2])
    assert mode_weights(modes, 4).tolist() == pytest.approx([0.4, 0.0, 0.6, 0.0])
    weighted = mode_weights(modes, 4, logs(1.0, 2.0, 3.0, 4.0, 0.0).log() + 700)
    assert weighted.tolist() == pytest.approx([0.5, 0.0, 0.5, 0.0])


def test_total_variation_is_a_distance_between_zero_and_one() -> None:
    p, q, r = logs(0.5, 0.5, 0.0), logs(0.0, 0.0, 1.0), logs(0.2, 0.5, 0.3)
    assert total_variation(p, p) == 0.0
    assert total_variation(p, q) == pytest.approx(1.0)
    assert total_variation(p, r) == total_variation(r, p) == pytest.approx(0.3)
    assert total_variation(p, q) <= total_variation(p, r) + total_variation(r, q) + 1e-12
    with pytest.raises(ValueError, match=r"same shape, got \(3,\) and \(2,\)"):
        total_variation(p, logs(0.5, 0.5))
