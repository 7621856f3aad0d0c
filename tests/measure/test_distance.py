"""Distances between samples: closed forms, identities, and what they do when there is nothing to find."""

import math

import numpy as np
import pytest
import torch

from undrift.measure import energy_distance, jackknife, mmd, sliced_wasserstein, wasserstein


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.float64).normal_(generator=torch.Generator().manual_seed(seed))


# -- Wasserstein -------------------------------------------------------------------------------------------------------


def test_translation_costs_its_length():
    x, shift = normal(60, 3), torch.tensor([0.3, -0.4, 1.2], dtype=torch.float64)
    assert wasserstein(x, x + shift) == pytest.approx(1.3, abs=1e-12)
    assert wasserstein(x, x[torch.randperm(60, generator=torch.Generator().manual_seed(1))]) == 0.0
    # E (u . s)^2 = |s|^2 / d over the sphere; over 4000 directions its error is below 4 sqrt(4/45 * |s|^4 / 4000)
    assert sliced_wasserstein(x, x + shift, 4000) ** 2 == pytest.approx(
        1.69 / 3, abs=4 * 1.69 * math.sqrt(4 / 45 / 4000)
    )


def test_scaling_of_a_gaussian_has_the_closed_form():
    """W2(N(0, I), N(0, A^2)) = |A - I|_F; the optimal map is x -> A x, so a sample and its image attain it."""
    a = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    x = normal(300, 2)
    exact = float((x @ (a - torch.eye(2).double())).square().sum(1).mean().sqrt())
    assert wasserstein(x, x @ a) == pytest.approx(exact, abs=1e-12)
    assert exact == pytest.approx(float(torch.linalg.matrix_norm(a - torch.eye(2).double())), rel=0.1)


def test_in_one_dimension_it_is_sorting():
    x, y = normal(80, 1), 2 + 0.5 * normal(80, 1, seed=1).exp()
    sorted_cost = float((x.sort(0).values - y.sort(0).values).square().mean().sqrt())
    assert wasserstein(x, y) == pytest.approx(sorted_cost, abs=1e-12)
    assert sliced_wasserstein(x, y, 3) == pytest.approx(sorted_cost, abs=1e-12)


@pytest.mark.parametrize(("n", "m"), [(6, 4), (5, 7), (1, 9)])
def test_unequal_sizes_equal_their_replication(n, m):
    """A sample and its k-fold copy are one empirical law."""
    x, y = normal(n, 2), normal(m, 2, seed=1)
    whole = math.lcm(n, m)
    want = sliced_wasserstein(x.repeat(whole // n, 1), y.repeat(whole // m, 1), 32)
    assert sliced_wasserstein(x, y, 32) == pytest.approx(want, abs=1e-12)


def test_sliced_is_at_most_exact_and_events_are_flattened():
    x, y = normal(100, 2, 2), 0.5 + normal(100, 2, 2, seed=1)
    assert 0 < sliced_wasserstein(x, y) < wasserstein(x, y)
    assert sliced_wasserstein(x, y) == sliced_wasserstein(x.flatten(1), y.flatten(1))


# -- maximum mean discrepancy ------------------------------------------------------------------------------------------


def gaussian_mmd(shift: float, scale: float, d: int, h: float) -> float:
    """MMD^2 between N(0, I) and N(shift 1, scale^2 I) in d dimensions: three Gaussian integrals."""

    def mean_kernel(gap: float, var: float) -> float:
        return (h**2 / (h**2 + var)) ** (d / 2) * math.exp(-0.5 * d * gap**2 / (h**2 + var))

    return mean_kernel(0, 2) + mean_kernel(0, 2 * scale**2) - 2 * mean_kernel(shift, 1 + scale**2)


@pytest.mark.parametrize(("shift", "scale"), [(0.5, 1.0), (0.0, 1.6)])
def test_mmd_of_gaussians_has_the_closed_form(shift, scale):
    """Mean over 20 independent pairs of samples within 4 of its standard errors."""
    values = [
        mmd(normal(300, 2, seed=i), shift + scale * normal(300, 2, seed=100 + i), bandwidth=0.8) for i in range(20)
    ]
    error = np.std(values, ddof=1) / math.sqrt(20)
    assert abs(np.mean(values) - gaussian_mmd(shift, scale, 2, 0.8)) < 4 * error


def test_mmd_statistics_and_bandwidth():
    x, y = normal(50, 3), normal(40, 3, seed=1)
    k = [torch.exp(-(torch.cdist(a, b) ** 2) / 2) for a, b in ((x, x), (y, y), (x, y))]
    biased = float(k[0].mean() + k[1].mean() - 2 * k[2].mean())
    unbiased = float((k[0].sum() - 50) / (50 * 49) + (k[1].sum() - 40) / (40 * 39) - 2 * k[2].mean())
    assert mmd(x, y, 1.0, unbiased=False) == pytest.approx(biased, abs=1e-12)
    assert mmd(x, y, 1.0) == pytest.approx(unbiased, abs=1e-12)
    median = float(torch.nn.functional.pdist(torch.cat([x, y])).median())
    assert mmd(x, y) == pytest.approx(mmd(x, y, median), abs=1e-12)
    assert mmd(10 * x, 10 * y) == pytest.approx(mmd(x, y), abs=1e-12)


# -- energy distance ---------------------------------------------------------------------------------------------------


def test_energy_distance_is_the_gap_between_distribution_functions():
    """In one dimension it is 2 int (F - G)^2, exactly so for the empirical laws."""
    x, y = normal(37, 1), 0.4 + 1.3 * normal(23, 1, seed=1)
    points = torch.cat([x, y]).flatten().sort().values
    gap = (points[:-1, None] >= x.T).double().mean(1) - (points[:-1, None] >= y.T).double().mean(1)
    assert energy_distance(x, y, unbiased=False) == pytest.approx(float(2 * (gap**2 * points.diff()).sum()), abs=1e-12)


def test_energy_distance_of_shifted_normals_has_the_closed_form():
    """E|N(a, 2)| in closed form; mean over 20 independent pairs within 4 of its standard errors."""
    shift = 0.7
    across = 2 / math.sqrt(math.pi) * math.exp(-(shift**2) / 4) + shift * math.erf(shift / 2)
    exact = 2 * across - 4 / math.sqrt(math.pi)
    values = [energy_distance(normal(400, 1, seed=i), shift + normal(400, 1, seed=50 + i)) for i in range(20)]
    assert abs(np.mean(values) - exact) < 4 * np.std(values, ddof=1) / math.sqrt(20)


# -- behaviour ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", [mmd, energy_distance])
def test_null_is_centred_and_a_difference_stands_out_of_its_permutations(distance):
    x, y = normal(150, 2), normal(150, 2, seed=1)

    def permuted(b: torch.Tensor) -> np.ndarray:
        pool, generator = torch.cat([x, b]), torch.Generator().manual_seed(2)
        orders = [torch.randperm(300, generator=generator) for _ in range(60)]
        return np.array([distance(pool[o[:150]], pool[o[150:]]) for o in orders])

    null = permuted(y)
    assert abs(null.mean()) < 4 * null.std(ddof=1) / math.sqrt(60)
    # One law: the value is an ordinary draw of the null. Among 60, the extreme 1/60 on either side are excluded.
    assert null.min() < distance(x, y) < null.max()
    assert distance(x, y + 0.5) > permuted(y + 0.5).max()


@pytest.mark.parametrize("distance", [sliced_wasserstein, wasserstein, mmd, energy_distance])
def test_grows_with_the_shift_and_is_symmetric(distance):
    x, y = normal(120, 2), normal(120, 2, seed=1)
    values = [distance(x, y + shift) for shift in (0.5, 1.0, 2.0)]
    assert values == sorted(values)
    assert distance(x, y + 1) == pytest.approx(distance(y + 1, x), abs=1e-12)


def test_jackknife_error_is_the_spread_between_samples():
    """Against 40 independent repetitions, whose standard deviation is itself known to 11 %; the jackknife's to 24 %."""
    pairs = [(normal(400, 2, seed=i), 1 + normal(400, 2, seed=200 + i)) for i in range(40)]
    spread = np.std([sliced_wasserstein(x, y, 32) for x, y in pairs], ddof=1)
    errors = [jackknife(sliced_wasserstein, x, y, projections=32).std_error for x, y in pairs[:10]]
    assert np.mean(errors) == pytest.approx(spread, rel=4 * math.hypot(0.11, 0.24 / math.sqrt(10)))
    one = jackknife(sliced_wasserstein, *pairs[0], projections=32)
    assert float(one) == sliced_wasserstein(*pairs[0], 32)
    assert str(one) == f"{one.value:.5g} ± {one.std_error:.2g}"


ONE = torch.zeros(4, 2)
BAD = [
    (lambda: sliced_wasserstein(torch.zeros(4), ONE), r"x must have shape \(n, \*event\) with n >= 1, got \(4,\)"),
    (lambda: sliced_wasserstein(ONE, torch.zeros(4, 3)), r"as many coordinates, got 2 in x and 3 in y"),
    (lambda: sliced_wasserstein(ONE, ONE, projections=0), r"projections must be at least 1, got 0"),
    (lambda: energy_distance(ONE, ONE / 0), r"energy_distance: y has 4 points of 4 that are not finite"),
    (lambda: wasserstein(ONE, ONE[:3]), r"samples of one size, got 4 and 3.*or use sliced_wasserstein"),
    (lambda: wasserstein(torch.zeros(5001, 1), torch.zeros(5001, 1)), r"5001 points are too many.*at most 5000"),
    (lambda: mmd(ONE, ONE), r"more than half of the pairs coincide.*give a bandwidth"),
    (lambda: mmd(ONE, ONE, bandwidth=0.0), r"bandwidth must be 'median' or a positive number, got 0.0"),
    (lambda: mmd(ONE, ONE, bandwidth="mean"), r"bandwidth must be 'median' or a positive number, got 'mean'"),
    (lambda: mmd(ONE[:1], ONE), r"mmd: x must have shape \(n, \*event\) with n >= 2, got \(1, 2\)"),
    (lambda: jackknife(mmd, ONE, ONE, groups=1), r"groups must be at least 2, got 1"),
    (lambda: jackknife(mmd, ONE, ONE), r"10 groups need 20 points, got 4 and 4"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
