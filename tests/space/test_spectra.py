"""Spectra and noise: covariances exactly, sums over all modes against direct ones, fits against their parameters."""

import itertools
import math

import pytest
import torch

from tests.space.test_basis_functions import BASES, explicit
from undrift.config import build, describe
from undrift.space import (
    Cosine,
    Covariance,
    EmpiricalSpectrum,
    Fourier,
    FunctionSpace,
    HeatKernel,
    Matern,
    PowerLaw,
    Sine,
    Space,
    White,
)
from undrift.space.covariance import mellin_sum


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("n", [8, 9])
def test_noise_has_the_covariance_of_the_spectrum(kind, n):
    space = FunctionSpace(BASES[kind](1), Matern(1.0, 3.0))
    root = space.colour(torch.eye(n, dtype=torch.float64))  # row j: the noise that the j-th unit normal makes
    table, variances = explicit(kind, n), space.variances((n,))
    expected = torch.einsum("j,ja,jb->ab", variances, table, table)
    torch.testing.assert_close(root.T @ root, expected, rtol=0, atol=1e-13)
    # covariance() is the operator: it integrates against the kernel, with the midpoint rule
    torch.testing.assert_close(space.covariance(torch.eye(n, dtype=torch.float64)), expected / n, rtol=0, atol=1e-13)
    v = torch.randn(2, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(space.precision(space.covariance(v)), v, rtol=0, atol=1e-10)
    torch.testing.assert_close(space.root(space.root(v)), space.covariance(v), rtol=0, atol=1e-12)


def test_the_pointwise_variance_converges_as_the_grid_gets_finer():
    space = FunctionSpace(Cosine(), Matern(1.0, 3.0))
    means = []
    for n, expected in ((32, 0.9856), (64, 0.9928), (128, 0.9964), (256, 0.9982)):
        pointwise = space.colour(torch.eye(n, dtype=torch.float64)).square().sum(0)
        means.append(float(pointwise.mean()))
        assert means[-1] == pytest.approx(expected, abs=5e-5)  # four published digits
        assert means[-1] == pytest.approx(float(space.variances((n,)).sum()), rel=1e-12)
    # 1 less the tail: sum over j >= n of c / (pi j)^2, close to c / (pi^2 n), which halves
    gaps = [1 - m for m in means]
    assert all(a / b == pytest.approx(2.0, abs=0.03) for a, b in itertools.pairwise(gaps))


@pytest.mark.parametrize(
    ("basis", "alpha", "kappa", "n"),
    [
        (Cosine(1), 2.0, 3.0, 2**14),
        (Sine(1), 2.5, 0.5, 2**14),
        (Fourier(1), 2.0, 11.0, 2**14),
        (Cosine(2), 3.0, 3.0, 1024),
        (Fourier(2), 3.5, 2.0, 512),
        (Sine(3), 4.5, 6.0, 96),
        (Cosine(1), 2.0, 0.0, 2**14),
        (Fourier(2), 3.0, 0.0, 512),
    ],
)
def test_sums_over_all_modes_agree_with_direct_ones(basis, alpha, kappa, n):
    mu = basis.eigenvalues((n,) * basis.dims)
    terms = (kappa**2 + mu).pow(-alpha)
    if kappa == 0:
        terms = terms[mu > 0]
    direct = float(terms.sum())
    # what the grid leaves out lies outside the ball of radius r, the least wavenumber left out: with a mode a volume of
    # pi^d in a wedge of 1/2^d of space (cosine, sine), or 2^d pi^d over all of it (Fourier), an integral of k^(d-1-2a)
    d, r = basis.dims, float(basis.wavenumbers(n)[-1])
    sphere = 2 * math.pi ** (d / 2) / math.gamma(d / 2)
    tail = sphere / (2 * math.pi) ** d * r ** (d - 2 * alpha) / (2 * alpha - d)
    assert -1e-9 * direct <= mellin_sum(basis, alpha, kappa) - direct <= 2 * tail + 1e-9 * direct


def test_every_spectrum_is_scaled_by_its_total():
    for spectrum in (Matern(2.5, 3.0, 0.7), PowerLaw(2.5, 0.7), HeatKernel(0.2, 0.7)):
        for basis, n in ((Cosine(1), 4096), (Sine(1), 4096), (Fourier(1), 4096), (Cosine(2), 512)):
            lam = spectrum.variances(basis, (n,) * basis.dims)
            assert float(lam.sum()) == pytest.approx(0.7, rel=2e-5), (spectrum, basis)
            assert bool((lam > 0).all())


@pytest.mark.parametrize(
    "spectrum", [HeatKernel(0.1), HeatKernel(3.0), HeatKernel(30.0), Matern(30.0, 0.5), PowerLaw(30.0)], ids=repr
)
def test_totals_where_the_lowest_mode_is_damped_by_many_orders(spectrum):
    for basis in (Sine(), Sine(2)):
        total = float(spectrum.variances(basis, (64,) * basis.dims).sum())
        assert total == pytest.approx(1.0, rel=1e-8)


@pytest.mark.parametrize("spectrum", [Matern(1.0, 3.0), PowerLaw(0.9)])
def test_what_is_not_trace_class_is_refused(spectrum):
    FunctionSpace(Cosine(1), spectrum)
    with pytest.raises(ValueError, match=r"not trace class in 2 dimensions.*exceed d/2 = 1"):
        FunctionSpace(Cosine(2), spectrum)


def test_a_fit_finds_the_parameters_of_its_own_spectrum():
    truth = Matern(1.7, 8.0, 2.5)
    n, basis = 128, Cosine()
    lam = truth.variances(basis, (n,))
    # two fields c and -c have sample variance 2 c^2: exactly the spectrum, no noise of sampling
    field = basis.synthesise((lam / 2).sqrt())
    found = Matern.fit(torch.stack([field, -field]), basis)
    # kappa is one of 60 on a logarithmic line from 0.3 to 401, 13 % apart; alpha follows it
    assert found.kappa == pytest.approx(8.0, rel=0.07)
    assert found.alpha == pytest.approx(1.7, rel=0.02)
    assert float(found.variances(basis, (n,)).sum()) == pytest.approx(float(lam.sum()), rel=1e-10)


def test_a_measured_spectrum_is_the_data_and_beyond_it_the_fit():
    basis, g = Cosine(2), torch.Generator().manual_seed(0)
    fields = torch.randn(20, 6, 5, dtype=torch.float64, generator=g) * torch.linspace(1, 3, 5)
    spectrum = EmpiricalSpectrum.of(fields, basis)
    measured = basis.analyse(fields).var(0)
    torch.testing.assert_close(spectrum.variances(basis, (6, 5)), measured, rtol=1e-12, atol=0)
    fine = spectrum.variances(basis, (9, 4))
    torch.testing.assert_close(fine[:6], measured[:, :4], rtol=1e-12, atol=0)
    torch.testing.assert_close(fine[6:], spectrum.tail.variances(basis, (9, 4))[6:], rtol=1e-12, atol=0)
    again = build(describe(spectrum), Covariance)
    assert torch.equal(again.variances(basis, (9, 4)), fine)


def test_a_mode_that_the_data_lack_still_has_noise():
    fields = Cosine().synthesise(torch.randn(30, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    fields = fields - Cosine().synthesise(torch.nn.functional.pad(Cosine().analyse(fields)[:, 4:5], (4, 11)))
    spectrum = EmpiricalSpectrum.of(fields, Cosine())
    ratio = spectrum.variances(Cosine(), (16,))[4] / spectrum.tail.variances(Cosine(), (16,))[4]
    assert float(ratio) == pytest.approx(0.01, rel=1e-9)


@pytest.mark.parametrize("kind", BASES)
def test_norms_and_coordinates_are_of_the_function(kind):
    basis = BASES[kind](1)
    spaces = {c: FunctionSpace(basis, Matern(1.2, 2.0), c) for c in ("physical", "coefficients", "whitened")}
    u = torch.randn(3, 2, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(2))  # two components
    c, lam = basis.analyse(u), spaces["physical"].variances((9,))
    for theta in (0.0, 0.4, 1.0):
        expected = (c.square() * lam.pow(-theta)).sum((1, 2))
        for space in spaces.values():
            x = space.encode(u)
            torch.testing.assert_close(space.norm2(x, theta), expected, rtol=1e-11, atol=0)
            torch.testing.assert_close(space.decode(x), u, rtol=0, atol=1e-12)
            torch.testing.assert_close(space.coefficients(x), c, rtol=0, atol=1e-12)
    xi = torch.randn(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    draws = [space.decode(space.colour(xi)) for space in spaces.values()]
    torch.testing.assert_close(draws[1], draws[0], rtol=0, atol=1e-13)
    torch.testing.assert_close(draws[2], draws[0], rtol=0, atol=1e-13)
    assert [s.white for s in spaces.values()] == [False, False, True]


def test_the_gradient_is_the_one_of_the_inner_product():
    n, g = 8, torch.Generator().manual_seed(4)
    u, v = torch.randn(2, 1, n, dtype=torch.float64, generator=g)
    for coordinates in ("physical", "coefficients"):
        space = FunctionSpace(Cosine(), Matern(), coordinates)
        x = space.encode(u).requires_grad_()
        value = space.decode(x).pow(3).mean()  # the integral of u^3 by the midpoint rule
        slope = space.decode(space.gradient(torch.autograd.grad(value, x)[0]))
        assert float((slope * v).mean().detach()) == pytest.approx(
            float((3 * u.square() * v).mean().detach()), rel=1e-12
        )


def test_spaces_come_from_plain_data_and_from_fields():
    plain = {"type": "FunctionSpace", "basis": {"type": "Sine", "dims": 2}, "spectrum": {"type": "HeatKernel"}}
    space = build(plain, Space)
    assert space.basis == Sine(2)
    assert describe(space)["spectrum"]["length"] == 0.1
    assert isinstance(build("White", Space), White)
    fields = torch.randn(10, 5, 6, generator=torch.Generator().manual_seed(5))
    assert FunctionSpace.of(fields).basis == Cosine(2)
    assert FunctionSpace.of(fields).spectrum.alpha <= 1.5
    assert isinstance(FunctionSpace.matched(fields).spectrum, EmpiricalSpectrum)
    with pytest.raises(ValueError, match="one number for each of the 6 modes"):
        EmpiricalSpectrum((1.0, 2.0), (2, 3), Matern())
    with pytest.raises(ValueError, match="N > 1"):
        FunctionSpace.of(fields[:1])


def test_fields_without_a_spectrum_are_named():
    for fields in (torch.ones(5, 16), torch.zeros(3, 2, 4)):
        with pytest.raises(ValueError, match="fields that differ"):
            Matern.fit(fields, Cosine())
    with pytest.raises(ValueError, match="of two modes or more"):
        Matern.fit(torch.randn(5, 1), Cosine())
    with pytest.raises(ValueError, match=r"got shape \(5,\)"):
        FunctionSpace.of(torch.ones(5))
