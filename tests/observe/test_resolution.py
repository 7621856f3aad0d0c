"""Operators of functions: the same function gives the same data on every grid, exactly or to second order."""

import math
from itertools import pairwise

import pytest
import torch

from undrift.observe import Blur, Darcy1d, Downsample, Heat, Points, Radon
from undrift.space import Cosine, Fourier, Sine

GRIDS = (16, 32, 64)


def second_order(errors):
    """Errors on grids of n, 2n, 4n fall by about 4 each time; other powers of 2 fall outside."""
    ratios = [a / b for a, b in pairwise(errors)]
    assert all(3.2 < r < 4.8 for r in ratios), (errors, ratios)


def smooth(x):
    """No symmetry, no boundary condition: x (..., 2) to (...)."""
    return torch.exp(0.7 * x[..., 0] - x[..., 1]) + torch.sin(3 * x[..., 0] * x[..., 1] + 1)


PLACES = ((0.0, 0.0), (0.004, 0.61), (0.3, 1.0), (0.37, 0.52), (0.9, 0.11))


def test_linear_interpolation_is_second_order_up_to_the_boundary():
    operator, exact = Points(PLACES), smooth(torch.tensor(PLACES, dtype=torch.float64))
    # The error at one place depends on where in its cell it lies: bound it by the worst cell, h^2/8 and 3 h^2/8 at
    # the boundary times second derivatives of at most 9 + e along either axis.
    for n in GRIDS:
        u = smooth(Cosine(2).points((n, n)))
        assert float((operator(u[None])[0] - exact).abs().max()) < 2 * 3 / 8 * (9 + math.e) / n**2
    x = Cosine(2).points((5, 4))
    plane = 1 + 2 * x[..., 0] - 3 * x[..., 1]
    at = torch.tensor(PLACES, dtype=torch.float64)
    torch.testing.assert_close(operator(plane[None])[0], 1 + 2 * at[:, 0] - 3 * at[:, 1], rtol=0, atol=1e-14)


def test_corners_are_second_order():
    """At a corner the place lies in its cell the same way on every grid, so the error falls smoothly."""
    operator = Points(((0.0, 0.0),))
    exact = smooth(torch.zeros(2, dtype=torch.float64))
    second_order([float((operator(smooth(Cosine(2).points((n, n)))[None]) - exact).abs()) for n in GRIDS])


@pytest.mark.parametrize("basis", [None, Cosine(2), Sine(2), Fourier(2)])
@pytest.mark.parametrize("grid", [(4, 5), (5, 6)])
def test_a_grid_point_gives_its_own_value(basis, grid):
    u = torch.randn(2, *grid, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    points = tuple(map(tuple, Cosine(2).points(grid).reshape(-1, 2).tolist()))
    torch.testing.assert_close(Points(points, basis)(u), u.flatten(1), rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", [Cosine, Sine, Fourier])
def test_band_limited_functions_are_read_exactly_on_every_grid(kind):
    """Resampled to finer grids, a function has the same values; and they are those of its series."""
    basis, at = kind(2), Points(PLACES, kind(2))
    c = torch.randn(1, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    c[..., -1] = c[..., -1, :] = 0  # the mode of the highest frequency is the one that grids do not share
    exact = at(basis.synthesise(c))
    for grid in ((9, 12), (17, 8)):
        torch.testing.assert_close(at(basis.synthesise(basis.fit(c, grid))), exact, rtol=0, atol=1e-12)
    s = torch.tensor([[0.0, 0.27, 0.9]], dtype=torch.float64)
    second = (math.pi * s).cos() if kind is Cosine else (2 * math.pi * s).sin()
    one = torch.zeros(1, 8, dtype=torch.float64)
    one[0, 1] = 1
    read = Points((0.0, 0.27, 0.9), kind(1))(kind(1).synthesise(one))
    torch.testing.assert_close(read, math.sqrt(2) * second, rtol=0, atol=1e-13)


def test_block_means_are_second_order():
    """Means of e^(x + 2 y) over the cells of a 4 x 4 grid, from finer ones."""
    edges = torch.arange(5, dtype=torch.float64) / 4
    exact = 16 * edges.exp().diff()[:, None] * (2 * edges).exp().diff() / 2
    errors = []
    for n in GRIDS:
        x = Cosine(2).points((n, n))
        u = torch.exp(x[..., 0] + 2 * x[..., 1])
        errors.append(float((Downsample(n // 4)(u[None])[0] - exact).abs().max()))
    second_order(errors)


def test_a_blur_is_a_convolution_inside():
    """A Gaussian of width a, far from the boundary, becomes one of width sqrt(a^2 + w^2), on every grid that has it."""
    a, w, centre = 0.06, 0.05, torch.tensor([0.5, 0.45], dtype=torch.float64)
    wide = a**2 + w**2
    for basis in (Cosine(2), Sine(2), Fourier(2)):
        for n in (32, 48):
            r2 = (basis.points((n, n)) - centre).square().sum(-1)
            blurred = Blur(w, basis)(torch.exp(-r2 / (2 * a**2))[None])[0]
            expected = a**2 / wide * torch.exp(-r2 / (2 * wide))
            # The boundary is 5.7 widths away: e^(-16) = 1e-7; beyond the grid's frequencies a Gaussian has less.
            torch.testing.assert_close(blurred, expected, rtol=0, atol=5e-7)


def test_heat_flows():
    """Modes decay by e^(-mu t); times add; a blur of width w is heat at w^2/2; the insulated mean stays."""
    u = torch.randn(2, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = Cosine(1).points((12,))[:, 0]
    mode = torch.sin(3 * math.pi * x)[None]
    torch.testing.assert_close(Heat(0.02, Sine(1))(mode), math.exp(-9 * math.pi**2 * 0.02) * mode, rtol=0, atol=1e-14)
    torch.testing.assert_close((Heat(0.01) @ Heat(0.02))(u), Heat(0.03)(u), rtol=0, atol=1e-14)
    torch.testing.assert_close(Blur(0.2, Cosine(1))(u), Heat(0.02)(u), rtol=0, atol=1e-14)
    torch.testing.assert_close(Heat(0.5)(u).mean(1), u.mean(1), rtol=0, atol=1e-14)


def test_beams_through_a_gaussian():
    """The integral of a Gaussian bump along a line is a Gaussian of the line's distance from its centre."""
    width, centre = 0.07, torch.tensor([0.58, 0.44], dtype=torch.float64)
    operator = Radon(7, 15)
    theta = math.pi * torch.arange(7, dtype=torch.float64) / 7
    middle = (centre[0] - 0.5) * theta.cos() + (centre[1] - 0.5) * theta.sin()
    distance = operator.offsets - middle[:, None]
    exact = math.sqrt(2 * math.pi) * width * torch.exp(-distance.square() / (2 * width**2))
    errors = []
    for n in (32, 64, 128):
        u = torch.exp(-(Cosine(2).points((n, n)) - centre).square().sum(-1) / (2 * width**2))
        errors.append(float((operator(u[None])[0] - exact).norm() / exact.norm()))
    second_order(errors)


def test_beams_through_planes_are_exact():
    """Chords have their length, and the integral of a plane is length times its value at the chord's middle."""
    operator = Radon((0.0, math.pi / 4, math.pi / 2), 9)
    s = operator.offsets
    chord = torch.stack([(s.abs() <= 0.5).double(), math.sqrt(2) - 2 * s.abs(), (s.abs() <= 0.5).double()])
    middle = 0.5 + s * torch.tensor([[1.0], [math.sqrt(0.5)], [0.0]], dtype=torch.float64)
    for grid in ((6, 6), (5, 8)):
        x = Cosine(2).points(grid)[..., 0]
        torch.testing.assert_close(operator(torch.ones(1, *grid, dtype=torch.float64))[0], chord, rtol=0, atol=1e-13)
        torch.testing.assert_close(operator(x[None])[0], chord * middle, rtol=0, atol=1e-13)


def test_the_darcy_pressure_in_one_dimension_is_that_of_the_function():
    """For u = -log(1 + x^2) the pressure is (x + x^3/3) / (4/3), whatever the grid."""
    at = (0.11, 0.25, 0.5, 0.83)
    s = torch.tensor(at, dtype=torch.float64)
    exact = (s + s**3 / 3) * 0.75
    fields = [-torch.log1p(Cosine(1).points((n,))[:, 0] ** 2)[None] for n in GRIDS]
    for n, u in zip(GRIDS, fields, strict=True):  # midpoint and linear rules: h^2/24 and h^2/8 of derivatives up to 2
        assert float((Darcy1d(at)(u)[0] - exact).abs().max()) < (2 / 24 + 2 / 8) * 0.75 / n**2
    second_order([float((Darcy1d((0.5,))(u)[0] - exact[2]).abs()) for u in fields])
    steps = torch.randn(2, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    fine = steps.repeat_interleave(5, -1)  # the same piecewise constant field on a finer grid: exactly the same
    torch.testing.assert_close(Darcy1d(at)(fine), Darcy1d(at)(steps), rtol=0, atol=1e-14)
