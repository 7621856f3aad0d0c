"""Bases against explicit sums of cosines and sines, on odd and even grids, in one and two dimensions."""

import math

import pytest
import torch

from undrift.space import Cosine, Fourier, Sine

BASES = {"cosine": Cosine, "sine": Sine, "fourier": Fourier}
ROUNDING = 1e-12  # of sums of at most 300 terms of order 10 in float64


def functions(kind, j, x):
    """The j-th function of a basis at x, float64, by its definition."""
    if kind == "cosine":
        return torch.ones_like(x) if j == 0 else math.sqrt(2) * torch.cos(math.pi * j * x)
    if kind == "sine":
        return math.sqrt(2) * torch.sin(math.pi * (j + 1) * x)
    if j == 0:
        return torch.ones_like(x)
    k = (j + 1) // 2
    return math.sqrt(2) * (torch.sin if j % 2 else torch.cos)(2 * math.pi * k * x)


def explicit(kind, n, modes=None):
    """Values (modes, n) of the first modes on the midpoint grid of n points; the grid's alternating mode as it is."""
    x = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    table = torch.stack([functions(kind, j, x) for j in range(modes or n)])
    if modes is None and (kind == "sine" or (kind == "fourier" and n % 2 == 0)):
        table[-1] /= math.sqrt(2)
    return table


@pytest.mark.parametrize("n", [1, 2, 5, 8, 31])
@pytest.mark.parametrize("kind", BASES)
def test_synthesis_is_the_sum_of_the_functions_and_analysis_the_inner_products(kind, n):
    basis, table = BASES[kind](1), explicit(kind, n)
    c = torch.randn(3, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    u = c @ table
    torch.testing.assert_close(basis.synthesise(c), u, rtol=0, atol=ROUNDING)
    torch.testing.assert_close(basis.analyse(u), u @ table.T / n, rtol=0, atol=ROUNDING)
    torch.testing.assert_close(basis.analyse(u), c, rtol=0, atol=ROUNDING)
    torch.testing.assert_close(c.square().sum(-1), u.square().mean(-1), rtol=ROUNDING, atol=0)  # Parseval


@pytest.mark.parametrize("grid", [(4, 7), (6, 5)])
@pytest.mark.parametrize("kind", BASES)
def test_two_dimensions_are_products(kind, grid):
    basis = BASES[kind](2)
    c = torch.randn(2, *grid, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u = torch.einsum("bij,ix,jy->bxy", c, explicit(kind, grid[0]), explicit(kind, grid[1]))
    torch.testing.assert_close(basis.synthesise(c), u, rtol=0, atol=ROUNDING)
    torch.testing.assert_close(basis.analyse(u), c, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize(("coarse", "fine"), [(8, 16), (9, 14), (7, 49)])
@pytest.mark.parametrize("kind", BASES)
def test_coefficients_are_the_same_function_on_every_grid(kind, coarse, fine):
    basis, kept = BASES[kind](1), coarse - 1  # without the alternating mode
    c = torch.zeros(coarse, dtype=torch.float64)
    c[:kept] = torch.randn(kept, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    there = c[:kept] @ explicit(kind, fine, kept)
    torch.testing.assert_close(
        basis.resample(c[:kept] @ explicit(kind, coarse, kept), (fine,)), there, rtol=0, atol=ROUNDING
    )
    torch.testing.assert_close(basis.resample(there, (coarse,)), basis.synthesise(c), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("kind", BASES)
def test_eigenvalues_are_of_minus_the_laplacian(kind):
    basis, h, j = BASES[kind](2), 1e-4, (3, 2)
    x = torch.tensor([0.31, 0.77], dtype=torch.float64)
    second = sum(
        (functions(kind, j[a], x[a] + h) - 2 * functions(kind, j[a], x[a]) + functions(kind, j[a], x[a] - h))
        / h**2
        / functions(kind, j[a], x[a])
        for a in (0, 1)
    )
    # a second difference misses by mu^2 h^2 / 12 of each part, at most 2e-7 relative here, and rounding 1e-16 / h^2
    assert float(basis.eigenvalues((5, 6))[j]) == pytest.approx(-float(second), rel=1e-6)


@pytest.mark.parametrize("n", [4, 5])
@pytest.mark.parametrize("kind", BASES)
def test_derivatives_are_exact(kind, n):
    basis = BASES[kind](1)
    u = torch.randn(2, n, dtype=torch.float64, generator=torch.Generator().manual_seed(2), requires_grad=True)
    assert torch.autograd.gradcheck(basis.analyse, u)
    assert torch.autograd.gradcheck(basis.synthesise, u)


def test_single_precision_and_leading_axes():
    u = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(3))
    for basis in (Cosine(2), Sine(2), Fourier(2)):
        c = basis.analyse(u)
        assert c.dtype == torch.float32
        torch.testing.assert_close(c.double(), basis.analyse(u.double()), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(basis.synthesise(c), u, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="needs 2 axes of values"):
        Cosine(2).analyse(torch.zeros(5))
    with pytest.raises(ValueError, match="1, 2 or 3, got 4"):
        Cosine(4)
