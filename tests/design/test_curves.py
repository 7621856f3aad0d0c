"""mmse and loss curves against independent integrals, entropies and draws."""

import itertools
import math

import pytest
import torch
from scipy.integrate import quad

from undrift.denoise import MixtureDenoiser
from undrift.design.curves import MixtureCurve
from undrift.design.loss import LossCurve
from undrift.design.score_error import Noise
from undrift.design.spectrum import Spectrum

LINE = MixtureDenoiser([0.3, 0.7], [[-0.7], [0.3]], [0.05**2, 0.1**2])


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def density(x, sigma):
    return float(LINE.log_prob(f64(x).reshape(1, 1), sigma).exp())


def integral(f, sigma):
    """Over the line, in pieces around the modes."""
    cuts = sorted({mu + k * math.hypot(0.1, sigma) for mu in (-0.7, 0.3) for k in (-9, -4, -1.5, 0, 1.5, 4, 9)})
    return sum(quad(f, a, b, epsabs=1e-13, epsrel=1e-12, limit=200)[0] for a, b in itertools.pairwise(cuts))


@pytest.mark.parametrize("sigma", [0.03, 0.2, 0.6, 2.0])
def test_the_curve_of_a_mixture_on_the_line_is_its_fisher_information(sigma):
    """mmse = v - v^2 J, with J = E (d log p / dx)^2 by adaptive quadrature."""

    def squared_score(x):
        return density(x, sigma) * float(LINE.score(f64(x).reshape(1, 1), sigma)) ** 2

    v = sigma**2
    expected = v - v**2 * integral(squared_score, sigma)
    assert float(MixtureCurve(LINE).mmse(f64(sigma))) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("sigma", [0.02, 0.3, 1.5])
def test_information_is_twice_the_gain_of_entropy(sigma):
    """I(x0; x0 + sigma n) = h(x0 + sigma n) - h(sigma n), Guo, Shamai and Verdú's theorem."""

    def entropy(x):
        p = density(x, sigma)
        return -p * math.log(p) if p > 0 else 0.0

    gain = integral(entropy, sigma) - 0.5 * math.log(2 * math.pi * math.e * sigma**2)
    found = MixtureCurve(LINE).information(f64(sigma), f64(math.inf))
    assert 0.5 * float(found) == pytest.approx(gain, rel=1e-9)


def test_information_adds_up_and_its_derivative_is_mmse():
    curve, a = MixtureCurve(LINE), f64(0.05, 0.4, 3.0)
    b = f64(0.4, 3.0, math.inf)
    assert float(curve.information(a, b).sum()) == pytest.approx(float(curve.information(a[0], b[-1])), rel=1e-12)
    h = 1e-4
    slope = curve.information(a * math.exp(-h), a * math.exp(h)) / (a.square().reciprocal() * 2 * math.sinh(2 * h))
    torch.testing.assert_close(slope, curve.mmse(a), rtol=1e-6, atol=0)  # central difference: h^2 times a few


def test_martingale_differences():
    """E|s_b - s_a|^2 = J(b) - J(a) and E|D_b - D_a|^2 = mmse(a) - mmse(b) for noise levels b < a of one path.

    The exact sides to the digits of an independent computation, the draws to four of their standard errors.
    """
    curve = MixtureCurve(LINE)

    def fisher(sigma):
        return 1 / sigma**2 - float(curve.mmse(f64(sigma))) / sigma**4

    generator = torch.Generator().manual_seed(4)
    x0 = LINE.sample(200_000, generator)
    for low, high, expected in ((0.2, 0.3, 11.4135), (0.5, 1.0, 1.5223)):
        exact = fisher(low) - fisher(high)
        assert exact == pytest.approx(expected, abs=5e-5)
        near = x0 + low * torch.empty_like(x0).normal_(generator=generator)
        far = near + math.sqrt(high**2 - low**2) * torch.empty_like(x0).normal_(generator=generator)
        for found, value in (
            ((LINE.score(near, low) - LINE.score(far, high)).square(), exact),
            ((LINE(near, low) - LINE(far, high)).square(), float(curve.mmse(f64(high)) - curve.mmse(f64(low)))),
        ):
            assert abs(float(found.mean()) - value) < 4 * float(found.std()) / math.sqrt(found.numel())
    assert float(curve.mmse(f64(0.3)) - curve.mmse(f64(0.2))) == pytest.approx(0.026742, abs=5e-7)


def product() -> MixtureDenoiser:
    """LINE along one axis, three modes along the second, one Gaussian along the third."""
    weights, means, covs = [], [], []
    for w, mu, c in zip((0.3, 0.7), (-0.7, 0.3), (0.05**2, 0.1**2), strict=True):
        for u, nu, e in zip((0.2, 0.5, 0.3), (-1.0, 0.0, 2.0), (0.1, 0.2, 0.3), strict=True):
            weights.append(w * u)
            means.append([mu, nu, 5.0])
            covs.append([c, e, 0.04])
    return MixtureDenoiser(weights, means, covs)


def test_products_are_recognised_and_add_up_over_coordinates():
    sigma = f64(0.01, 0.1, 0.5, 3.0, math.inf)
    curve = MixtureCurve(product())
    second = MixtureDenoiser([0.2, 0.5, 0.3], [[-1.0], [0.0], [2.0]], [0.1, 0.2, 0.3])
    parts = MixtureCurve(LINE).mmse(sigma) + MixtureCurve(second).mmse(sigma) + Spectrum(f64(0.04)).mmse(sigma)
    assert curve.method == "quadrature"
    torch.testing.assert_close(curve.mmse(sigma), parts, rtol=1e-13, atol=0)
    assert (curve.mmse(sigma).diff() > 0).all()
    assert (curve.std_error(sigma) == 0).all()
    weights, x = product().weights, product().means
    assert curve.second_moment == pytest.approx(float(weights @ (x.square() + product().covs).sum(-1)), rel=1e-14)
    # Four of six combinations, or weights that do not multiply, are no product.
    some = MixtureDenoiser(weights[:4], x[:4], product().covs[:4])
    tilted = MixtureDenoiser(weights * f64(1, 1, 1, 1, 1, 1.01), x, product().covs)
    assert MixtureCurve(some).method == MixtureCurve(tilted).method == "monte carlo"


def test_draws_agree_with_quadrature_and_say_how_well():
    """A rotated product mixture has the same mmse and is no product: 4 standard errors of its own."""
    angle, mixture = 0.7, product()
    turn = torch.eye(3, dtype=torch.float64)
    turn[0, 0] = turn[1, 1] = math.cos(angle)
    turn[0, 1], turn[1, 0] = -math.sin(angle), math.sin(angle)
    rotated = MixtureDenoiser(mixture.weights, mixture.means @ turn.T, turn @ torch.diag_embed(mixture.covs) @ turn.T)
    exact, drawn = MixtureCurve(mixture), MixtureCurve(rotated, samples=2000, seed=1)
    assert drawn.method == "monte carlo"
    sigma = f64(0.05, 0.2, 0.6, 1.5, 10.0)
    errors = drawn.std_error(sigma)
    assert (errors > 0).all()
    assert ((drawn.mmse(sigma) - exact.mmse(sigma)).abs() < 4 * errors).all()
    assert drawn.second_moment == pytest.approx(exact.second_moment, rel=1e-12)
    assert float(drawn.mmse(f64(math.inf))) == pytest.approx(float(exact.mmse(f64(math.inf))), rel=1e-12)
    assert torch.equal(drawn.mmse(sigma), MixtureCurve(rotated, samples=2000, seed=1).mmse(sigma))


def test_a_gaussian_is_a_spectrum():
    levels = f64(0.01, 0.3, 5.0)
    curve = MixtureCurve(MixtureDenoiser([1.0], [[0.5, -1.0]], [[0.2, 3.0]]))
    spectrum = Spectrum(f64(0.2, 3.0), f64(0.5, -1.0))
    torch.testing.assert_close(curve.mmse(levels), spectrum.mmse(levels), rtol=1e-14, atol=0)
    for high in (f64(0.02, 0.9, 7.0), f64(math.inf)):
        torch.testing.assert_close(
            curve.information(levels, high), spectrum.information(levels, high.expand(3)), rtol=1e-12, atol=0
        )


def test_no_variance_at_all():
    curve = MixtureCurve(MixtureDenoiser([0.5, 0.5], [[-1.0], [1.0]], 0.0))
    # Two points: mmse = 1 - E tanh(snr + sqrt(snr) n), Guo, Shamai and Verdú, eq. 17.
    for sigma in (0.2, 0.7, 2.0):
        snr = sigma**-2

        def f(n, snr=snr):
            return math.tanh(snr + math.sqrt(snr) * n) * math.exp(-0.5 * n * n) / math.sqrt(2 * math.pi)

        expected = 1 - quad(f, -12, 12, epsabs=1e-14, limit=200)[0]
        assert float(curve.mmse(f64(sigma))) == pytest.approx(expected, rel=1e-8, abs=1e-13)
    # One bit is all there is to know.
    assert 0.5 * float(curve.information(f64(0.05), f64(math.inf))) == pytest.approx(math.log(2), rel=1e-10)


# -- measured curves ------------------------------------------------------------------------------------------------


def test_power_laws_are_interpolated_and_integrated_exactly():
    sigma = torch.logspace(-2, 1, 7, dtype=torch.float64)
    curve = LossCurve(sigma, 3 * sigma**1.3)
    between = torch.logspace(-2, 1, 50, dtype=torch.float64)
    torch.testing.assert_close(curve.loss(between), 3 * between**1.3, rtol=1e-12, atol=0)
    # Constant above, like sigma^2 below.
    torch.testing.assert_close(curve.loss(f64(1e-3, 40.0)), f64(3 * 0.01**1.3 * 0.01, 3 * 10**1.3), rtol=1e-12, atol=0)

    def antiderivative(s):  # of 2 L / sigma^3, between the levels
        return 6 / (1.3 - 2) * s ** (1.3 - 2)

    inside = antiderivative(8.0) - antiderivative(0.02)
    assert float(curve.information(f64(0.02), f64(8.0))) == pytest.approx(inside, rel=1e-10)
    all_of_it = (
        2 * 3 * 0.01 ** (1.3 - 2) * math.log(10)  # below
        + antiderivative(10.0)
        - antiderivative(0.01)
        + 3 * 10**1.3 / 100  # above
    )
    assert float(curve.information(f64(1e-3), f64(math.inf))) == pytest.approx(all_of_it, rel=1e-10)


def test_interpolation_does_not_overshoot():
    sigma, loss = f64(0.01, 0.1, 0.2, 1.0, 10.0), f64(1e-4, 5e-3, 5e-3, 0.3, 0.25)
    curve = LossCurve(sigma, loss)
    assert not curve.monotone
    fine = torch.logspace(-2, 1, 400, dtype=torch.float64)
    values = curve.loss(fine)
    for a, b, la, lb in zip(sigma[:-1], sigma[1:], loss[:-1], loss[1:], strict=True):
        some = values[(fine >= a) & (fine <= b)]
        assert (some >= min(la, lb) * (1 - 1e-12)).all()
        assert (some <= max(la, lb) * (1 + 1e-12)).all()


def test_a_reference_gives_the_shape():
    spectrum = Spectrum.power_law(64)
    sigma = torch.logspace(-2, 1, 5, dtype=torch.float64)
    curve = LossCurve(sigma, 1.2 * spectrum.mmse(sigma), reference=spectrum)
    fine, high = torch.logspace(-3, 2.5, 30, dtype=torch.float64), f64(math.inf).expand(30)
    torch.testing.assert_close(curve.loss(fine), 1.2 * spectrum.mmse(fine), rtol=1e-12, atol=0)
    torch.testing.assert_close(curve.information(fine, high), 1.2 * spectrum.information(fine, high), rtol=1e-9, atol=0)
    assert (curve.dim, curve.second_moment) == (64, spectrum.second_moment)
    profile = curve.excess(spectrum)
    torch.testing.assert_close(profile(fine), 0.2 * spectrum.mmse(fine), rtol=1e-10, atol=0)
    torch.testing.assert_close(Noise(profile).excess(spectrum, fine), profile(fine), rtol=1e-12, atol=0)


def test_smoothing_pools_by_precision_and_leaves_monotone_curves_alone():
    sigma, loss = f64(0.1, 0.2, 0.4, 0.8), f64(1.0, 2.0, 1.0, 4.0)
    rough = LossCurve(sigma, loss, std_error=f64(0.1, 0.2, 0.05, 0.4))
    # Weights (L / se)^2 of the two levels out of order: 100 and 400.
    pooled = math.exp((100 * math.log(2.0) + 400 * math.log(1.0)) / 500)
    smooth = rough.smoothed()
    torch.testing.assert_close(smooth.losses, f64(1.0, pooled, pooled, 4.0), rtol=1e-12, atol=0)
    assert smooth.monotone
    torch.testing.assert_close(smooth.smoothed().losses, smooth.losses, rtol=1e-14, atol=0)
    plain = LossCurve(sigma, loss).smoothed()
    torch.testing.assert_close(plain.losses, f64(1.0, math.sqrt(2.0), math.sqrt(2.0), 4.0), rtol=1e-12, atol=0)


def test_a_measured_loss_is_the_mmse_of_the_exact_denoiser():
    """Within 4 standard errors at each of 9 levels; and the noise is shared, so the excess is sharper than the loss."""
    spectrum = Spectrum(f64(1.0, 0.1, 0.01))
    exact = spectrum.denoiser()
    generator = torch.Generator().manual_seed(3)
    x = spectrum.variance.sqrt() * torch.empty(1000, 3, dtype=torch.float64).normal_(generator=generator)
    levels = torch.logspace(-2, 1, 9, dtype=torch.float64)
    curve = LossCurve.measure(exact, x, levels, samples=2, batch=300)
    assert ((curve.losses - spectrum.mmse(levels)).abs() < 4 * curve.std_error).all()
    assert (curve.dim, curve.second_moment) == (3, pytest.approx(float(x.square().sum(-1).mean()), rel=1e-12))

    def biased(x, sigma, shift):
        return exact(x, sigma) + shift

    shift = torch.full((1000, 1), 0.1, dtype=torch.float64)
    worse = LossCurve.measure(biased, x, levels, samples=2, batch=300, shift=shift)
    # The cross term 2 * 0.1 * sum (D - x0) has deviation 0.2 sqrt(mmse) per point: 4 of its errors.
    bound = 4 * 0.2 * (spectrum.mmse(levels) / 1000).sqrt()
    assert ((worse.losses - curve.losses - 0.03).abs() < bound).all()
    assert bound.max() < 0.03
    again = LossCurve.measure(exact, x, levels, samples=2, batch=300)
    assert torch.equal(again.losses, curve.losses)
    assert not torch.equal(LossCurve.measure(exact, x, levels, samples=2, seed=1).losses, curve.losses)
    assert curve.to_dict()["loss"] == curve.losses.tolist()


def test_what_is_no_curve_is_refused():
    sigma = f64(0.1, 0.2)
    with pytest.raises(ValueError, match="increasing"):
        LossCurve(sigma.flip(0), f64(1.0, 2.0))
    with pytest.raises(ValueError, match="positive"):
        LossCurve(sigma, f64(1.0, 0.0))
    with pytest.raises(ValueError, match="at least two"):
        LossCurve(f64(0.1), f64(1.0))
    with pytest.raises(ValueError, match="std_error"):
        LossCurve(sigma, f64(1.0, 2.0), f64(0.1))
    with pytest.raises(ValueError, match="reference's mmse"):
        LossCurve(sigma, f64(1.0, 2.0), reference=Spectrum(f64(0.0)))
    with pytest.raises(ValueError, match="give dim"):
        _ = LossCurve(sigma, f64(1.0, 2.0)).dim
    with pytest.raises(ValueError, match="low <= high"):
        MixtureCurve(LINE).information(f64(1.0), f64(0.5))
    with pytest.raises(ValueError, match="samples"):
        MixtureCurve(LINE, samples=1)
    x = torch.zeros(4, 1)
    with pytest.raises(ValueError, match="n >= 2"):
        LossCurve.measure(LINE, x[:1], sigma)
    with pytest.raises(ValueError, match="levels"):
        LossCurve.measure(LINE, x, sigma.flip(0))
    with pytest.raises(ValueError, match="samples and batch"):
        LossCurve.measure(LINE, x, sigma, batch=0)
    with pytest.raises(FloatingPointError, match=r"sigma = 0\.2"):
        LossCurve.measure(lambda y, s: y / (s < 0.15).to(y), x, sigma)
