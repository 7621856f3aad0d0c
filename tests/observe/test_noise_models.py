"""Noise models are probability laws: they sum to one, equal their textbook forms, and samples follow them."""

import math

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch

from undrift.config import build, describe
from undrift.observe import CorrelatedNoise, GaussianNoise, LaplaceNoise, Noise, PoissonNoise, StudentTNoise

COV = torch.tensor([[2.0, 0.6, -0.3], [0.6, 1.0, 0.2], [-0.3, 0.2, 0.5]], dtype=torch.float64)
CONTINUOUS = {
    "gaussian": (GaussianNoise(0.7), scipy.stats.norm(1.3, 0.7)),
    "laplace": (LaplaceNoise(0.7), scipy.stats.laplace(1.3, 0.7)),
    "student": (StudentTNoise(3.0, 0.7), scipy.stats.t(3.0, 1.3, 0.7)),
    "cauchy": (StudentTNoise(1.0, 0.7), scipy.stats.cauchy(1.3, 0.7)),
}
SIGNIFICANT = 1e-3  # a correct law fails at one seed in a thousand; the seeds below are fixed and pass


@pytest.fixture(params=CONTINUOUS)
def law(request):
    return CONTINUOUS[request.param]


def test_densities(law):
    noise, exact = law
    y = torch.tensor([-30.0, -0.5, 1.3, 1.31, 9.0], dtype=torch.float64)
    mean = torch.full((5, 1), 1.3, dtype=torch.float64)
    ours = noise.log_prob(y[:, None], mean)
    np.testing.assert_allclose(ours.numpy(), exact.logpdf(y.numpy()), rtol=1e-13)
    # y = tan(a) takes the line to an interval
    density = lambda a: float(noise.log_prob(torch.tensor([[math.tan(a)]]).double(), mean[:1]).exp()) / math.cos(a) ** 2  # noqa: E731
    total, _ = scipy.integrate.quad(density, -math.pi / 2, math.pi / 2, points=[math.atan(1.3)], epsabs=1e-10)
    assert total == pytest.approx(1, abs=1e-8)


def test_samples_follow_the_density(law):
    noise, exact = law
    generator = torch.Generator().manual_seed(3)
    y = noise.sample(torch.full((100, 50), 1.3, dtype=torch.float64), generator)
    assert scipy.stats.kstest(y.flatten().numpy(), exact.cdf).pvalue > SIGNIFICANT
    again = noise.sample(torch.full((100, 50), 1.3, dtype=torch.float64), torch.Generator().manual_seed(3))
    assert torch.equal(y, again)


def test_correlated_noise():
    noise = CorrelatedNoise(COV)
    mean = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)
    y = noise.sample(mean.expand(4000, 3), torch.Generator().manual_seed(0))
    exact = scipy.stats.multivariate_normal(mean[0].numpy(), COV.numpy())
    np.testing.assert_allclose(
        noise.log_prob(y[:9], mean.expand(9, 3)).numpy(), exact.logpdf(y[:9].numpy()), rtol=1e-12
    )
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(COV), (y - mean).T, upper=False)
    for i, row in enumerate(whitened.numpy()):
        assert scipy.stats.kstest(row, "norm").pvalue > SIGNIFICANT, i
    products = whitened @ whitened.T / 4000  # means of 4000 products of variance 1 off the diagonal: 4 standard errors
    assert float((products - torch.diag(products.diagonal())).abs().max()) < 4 / math.sqrt(4000)
    shaped = noise.log_prob(y[:2].reshape(2, 1, 3), mean.expand(2, 3).reshape(2, 1, 3))
    torch.testing.assert_close(shaped, noise.log_prob(y[:2], mean.expand(2, 3)), rtol=0, atol=0)
    torch.testing.assert_close(noise.times(y), y @ COV, rtol=0, atol=0)
    diagonal = CorrelatedNoise(torch.diag(torch.tensor([0.04, 0.09])))
    same, f = GaussianNoise(torch.tensor([0.2, 0.3], dtype=torch.float64)), y[:5, :2]
    torch.testing.assert_close(diagonal.log_prob(y[5:10, :2], f), same.log_prob(y[5:10, :2], f), rtol=1e-6, atol=0)


def test_poisson_counts():
    noise, f = PoissonNoise(20.0), 0.3
    counts = torch.arange(60, dtype=torch.float64)
    mass = noise.log_prob(counts[:, None], torch.full((60, 1), f, dtype=torch.float64)).exp()
    np.testing.assert_allclose(mass.numpy(), scipy.stats.poisson(6.0).pmf(counts.numpy()), rtol=1e-12)
    assert float(mass.sum()) == pytest.approx(1, abs=1e-12)
    y = noise.sample(torch.full((50, 100), f, dtype=torch.float64), torch.Generator().manual_seed(1))
    bins = np.bincount(y.flatten().int().numpy(), minlength=60)[:60]
    expected = 5000 * mass.numpy()
    tail = expected[14:].sum()  # cells of fewer than five expected counts are joined with their neighbours
    expected = np.concatenate([[expected[:2].sum()], expected[2:14], [tail]])
    seen = np.concatenate([[bins[:2].sum()], bins[2:14], [bins[14:].sum()]])
    assert expected.min() > 5
    assert scipy.stats.chisquare(seen, expected * seen.sum() / expected.sum()).pvalue > SIGNIFICANT


def test_negative_intensities_are_floored():
    noise = PoissonNoise(10.0, floor=1e-3)
    f = torch.tensor([[-2.0], [1e-3]], dtype=torch.float64, requires_grad=True)
    low, edge = noise.log_prob(torch.tensor([3.0]), f)
    assert low.item() == edge.item() == pytest.approx(3 * math.log(0.01) - 0.01 - math.log(6), rel=1e-14)
    (slope,) = torch.autograd.grad(low, f)
    assert torch.equal(slope, torch.zeros_like(f))


def test_data_are_shared_or_one_each():
    noise = GaussianNoise(torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64))
    f = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    shared = noise.log_prob(y, f)
    assert torch.equal(shared, noise.log_prob(y[None], f))
    assert torch.equal(shared, noise.log_prob(y.expand(4, 3), f))
    for shape in ((1,), (4, 1), (2, 3), (4, 3, 1)):  # none of these may broadcast by accident
        with pytest.raises(ValueError, match="data of shape"):
            noise.log_prob(torch.zeros(shape), f)


def test_large_counts_keep_their_digits_in_single_precision():
    """Terms of 1e7 that cancel to about 8 each: in float32 the sum over 1000 data was off by tens of nats."""
    noise = PoissonNoise(1e6)
    f = 0.5 + torch.rand(2, 1000, generator=torch.Generator().manual_seed(0))
    y = noise.sample(f.double(), torch.Generator().manual_seed(1))
    want = scipy.stats.poisson.logpmf(y.numpy(), 1e6 * f.double().numpy()).sum(1)
    torch.testing.assert_close(noise.log_prob(y.float(), f), torch.from_numpy(want), rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(5,), (3, 1), (2,)])
def test_a_deviation_for_other_data_is_refused(shape):
    """It would be broadcast to data that do not exist, and counted for each."""
    for noise in (
        GaussianNoise(torch.ones(shape)),
        LaplaceNoise(torch.ones(shape)),
        StudentTNoise(3.0, torch.ones(shape)),
    ):
        for predicted in (torch.zeros(1, 7), torch.zeros(3, 1)):
            with pytest.raises(ValueError, match="does not broadcast"):
                noise.log_prob(predicted[0], predicted)
            with pytest.raises(ValueError, match="does not broadcast"):
                noise.sample(predicted)


def test_sums_over_many_data_are_carried_in_double():
    """A million float32 terms of -5e-7 each, summed in float32, would not keep seven digits."""
    f = torch.zeros(1, 10**6)
    y = torch.full((10**6,), 1e-3)
    total = GaussianNoise(1.0).log_prob(y, f)
    each = float(GaussianNoise(1.0).log_prob(y[:1], f[:, :1]))
    assert total.dtype == torch.float64
    assert float(total) == pytest.approx(1e6 * each, rel=1e-9)


def test_covariances():
    noise = GaussianNoise(torch.tensor([0.5, 2.0], dtype=torch.float64))
    v = torch.tensor([[1.0, 3.0]], dtype=torch.float64)
    assert torch.equal(noise.variance, torch.tensor([0.25, 4.0], dtype=torch.float64))
    assert torch.equal(noise.times(v), v @ noise.covariance((2,)))
    assert torch.equal(GaussianNoise(0.5).covariance((2, 1)), 0.25 * torch.eye(2, dtype=torch.float64))


@pytest.mark.parametrize(
    "noise",
    [GaussianNoise(0.1), CorrelatedNoise(COV), LaplaceNoise(0.2), StudentTNoise(4.0, 0.1), PoissonNoise(30.0)],
    ids=lambda n: type(n).__name__,
)
def test_descriptions(noise):
    f, y = torch.tensor([[1.0, 2.0, 0.5]], dtype=torch.float64), torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64)
    assert torch.equal(build(describe(noise), Noise).log_prob(y, f), noise.log_prob(y, f))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GaussianNoise(0.0), "std must be positive"),
        (lambda: GaussianNoise(torch.tensor([1.0, -1.0])), "from -1.0"),
        (lambda: LaplaceNoise(math.inf), "scale must be positive"),
        (lambda: StudentTNoise(0.0, 1.0), "df must be positive"),
        (lambda: PoissonNoise(-1.0), "peak must be positive"),
        (lambda: CorrelatedNoise(torch.ones(2, 3)), "square"),
        (lambda: CorrelatedNoise(torch.tensor([[1.0, 0.5], [0.0, 1.0]])), "symmetric"),
        (lambda: CorrelatedNoise(torch.tensor([[1.0, 2.0], [2.0, 1.0]])), "smallest eigenvalue is -1"),
        (lambda: CorrelatedNoise(COV).log_prob(torch.zeros(2), torch.zeros(1, 2)), "cov is for 3 data"),
        (lambda: PoissonNoise(1.0).check(torch.tensor([1.0, 0.5, -1.0])), "2 of 3 are not"),
        (lambda: GaussianNoise(1.0).check(torch.tensor([1.0, math.nan])), "1 of 2 data are not finite"),
    ],
)
def test_errors_say_what_was_expected(make, message):
    with pytest.raises(ValueError, match=message):
        make()
