"""Darcy flow: exact solutions, derivatives by adjoints, and one factorisation a field."""

import math
from itertools import pairwise

import pytest
import torch

from undrift.config import build, describe
from undrift.observe import Darcy1d, Darcy2d, Operator, Points, _elliptic
from undrift.space import Cosine


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pressure(x):
    return torch.sin(math.pi * x[..., 0]) * torch.sin(math.pi * x[..., 1])


def field(x):
    return 0.7 * torch.sin(2 * math.pi * x[..., 0]) * torch.cos(math.pi * x[..., 1]) + x[..., 0]


def forcing(x):
    r""":math:`-\nabla\cdot(e^u \nabla p)` of the two above, for which the pressure is exact."""
    point = x.detach().requires_grad_()
    (du,) = torch.autograd.grad(field(point).sum(), point)
    (dp,) = torch.autograd.grad(pressure(point).sum(), point)
    return -field(x).exp() * ((du * dp).sum(-1) - 2 * math.pi**2 * pressure(x))


def test_a_known_solution_is_met_to_second_order():
    errors = []
    for grid in ((8, 12), (16, 24), (32, 48)):
        x = Cosine(2).points(grid)
        errors.append(float((Darcy2d(forcing=forcing)(field(x)[None])[0] - pressure(x)).abs().max()))
    ratios = [a / b for a, b in pairwise(errors)]
    assert all(3.2 < r < 4.8 for r in ratios), (errors, ratios)


def test_the_same_places_see_the_same_pressure():
    at = ((0.5, 0.5), (0.27, 0.81), (0.03, 0.4))
    exact = pressure(torch.tensor(at, dtype=torch.float64))
    errors = []
    for n in (16, 32):
        x = Cosine(2).points((n, n))
        errors.append(float((Darcy2d(at, forcing)(field(x)[None])[0] - exact).abs().max()))
    assert errors[1] < 0.4 * errors[0] < 0.4 * 0.03


def test_a_layered_medium_in_one_direction():
    """Two cells of height 1/2 with permeabilities 1 and 3 between two boundaries, sides closed: by hand.

    The half cells at the boundary have transmissibilities 4 and 12, the face between the cells 2 * 2/(1 + 1/3) = 3;
    every cell produces 1/2.
    """
    t1 = torch.tensor([[[4.0], [3.0], [12.0]]], dtype=torch.float64)
    none = torch.zeros(1, 2, 2, dtype=torch.float64)
    p = _elliptic.solve(t1, none, torch.full((1, 2, 1), 0.5, dtype=torch.float64))[0, :, 0]
    matrix = torch.tensor([[7.0, -3.0], [-3.0, 15.0]], dtype=torch.float64)
    torch.testing.assert_close(matrix @ p, torch.full((2,), 0.5, dtype=torch.float64), rtol=0, atol=1e-14)
    first, second = _elliptic.harmonic(torch.tensor([[[0.0], [math.log(3.0)]]], dtype=torch.float64))
    torch.testing.assert_close(first[0, :, 0], torch.tensor([4.0, 3.0, 12.0], dtype=torch.float64), rtol=1e-14, atol=0)
    torch.testing.assert_close(second[0, :, 0], torch.tensor([1.0, 3.0], dtype=torch.float64), rtol=1e-14, atol=0)


def test_symmetries():
    """Raising u by c multiplies p by e^(-c); turned and mirrored fields have turned and mirrored pressures."""
    u, operator = draw(2, 5, 6), Darcy2d()
    p = operator(u)
    torch.testing.assert_close(operator(u + 1.3), math.exp(-1.3) * p, rtol=1e-12, atol=0)
    torch.testing.assert_close(operator(u.transpose(1, 2)), p.transpose(1, 2), rtol=1e-11, atol=0)
    torch.testing.assert_close(operator(u.flip(1)), p.flip(1), rtol=1e-11, atol=0)
    torch.testing.assert_close(operator(u[:, None])[:, 0], p, rtol=0, atol=0)


def test_gradients_of_a_large_field():
    """Central differences of the log-likelihood's kind of sum, along random ways, at 24 x 24."""
    operator, h = Darcy2d(((0.2, 0.3), (0.6, 0.5), (0.9, 0.9))), 1e-5
    u, way, r = draw(2, 24, 24), draw(2, 24, 24, seed=1), draw(2, 3, seed=2)
    slope = (operator.vjp(u, r) * way).sum((1, 2))
    change = ((operator(u + h * way) - operator(u - h * way)) * r).sum(1) / (2 * h)
    torch.testing.assert_close(slope, change, rtol=1e-6, atol=0)


def test_first_and_second_derivatives():
    u = draw(2, 3, 4).requires_grad_()
    operator = Darcy2d(((0.3, 0.4), (0.7, 0.1)))
    assert torch.autograd.gradcheck(operator, u)
    assert torch.autograd.gradgradcheck(operator, u)
    t1, t2 = (t.detach().requires_grad_() for t in _elliptic.harmonic(u.detach()))
    assert torch.autograd.gradcheck(_elliptic.solve, (t1, t2, draw(2, 3, 4, seed=1).requires_grad_()))


def test_one_factorisation_serves_forward_and_adjoints(monkeypatch):
    made, factorise = [], _elliptic._factorise
    monkeypatch.setattr(_elliptic, "_factorise", lambda a, b: made.append(1) or factorise(a, b))
    u = draw(3, 6, 6).requires_grad_()
    p = Darcy2d()(u)
    assert len(made) == 3  # one a field
    (slope,) = torch.autograd.grad(p.square().sum(), u, create_graph=True)
    torch.autograd.grad(slope.square().sum(), u)
    Darcy2d().jacobian(u[:1])
    assert len(made) == 4  # 36 rows of the Jacobian: one more field, one more factorisation


def test_extreme_fields_are_refused_by_name():
    u = draw(2, 4, 4)
    for value, says in ((-800.0, "from -800"), (math.nan, "from nan")):
        u[1, 2, 2] = value
        with pytest.raises(ValueError, match=f"field 1 of 2 has u {says}"):
            Darcy2d()(u)


def test_a_solution_lost_in_rounding_is_refused():
    """Four cells of permeability e^c within ones of 1: by exact arithmetic the error is 6e-8 at c = 20, a third at 36,
    and more than the solution at 38; noise of as great a contrast that walls nothing in is solved well."""
    u = torch.zeros(2, 6, 6, dtype=torch.float64)
    u[1, 2:4, 2:4] = 20
    outside, inside = Darcy2d()(u)[1, 0, 0], Darcy2d()(u)[1, 2, 2]
    for c in (36, 38, 60, 200):
        u[1, 2:4, 2:4] = c
        with pytest.raises(ValueError, match=f"field 1 of 2, with u from 0 to {c}, walls cells in"):
            Darcy2d()(u)
    u[1, 2:4, 2:4] = 15
    torch.testing.assert_close(Darcy2d()(u)[1, 2, 2], inside, rtol=1e-6, atol=0)
    torch.testing.assert_close(Darcy2d()(u)[1, 0, 0], outside, rtol=1e-6, atol=0)
    rough = 20 * torch.randn(1, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert float(Darcy2d()(rough).min()) > 0


def test_the_closed_derivative_in_one_dimension():
    """-w_m (sum_{i >= m} r_i - sum_i r_i p_i), written out."""
    u, r = draw(7), draw(7, seed=1)
    w = torch.softmax(-u, 0)
    p = Darcy1d()(u[None])[0]
    torch.testing.assert_close(p, torch.stack([w[: i + 1].sum() for i in range(7)]), rtol=0, atol=1e-15)
    by_hand = torch.stack([-w[m] * (r[m:].sum() - (r * p).sum()) for m in range(7)])
    for slope in (Darcy1d().vjp(u[None], r[None]), Operator.vjp(Darcy1d(), u[None], r[None])):
        torch.testing.assert_close(slope[0], by_hand, rtol=0, atol=1e-15)
    interfaces = tuple((i + 1) / 7 for i in range(7))
    torch.testing.assert_close(Darcy1d(interfaces)(u[None])[0], p, rtol=0, atol=1e-14)


def test_descriptions():
    operator = Darcy2d(((0.3, 0.4), (0.7, 0.1)), 2.0)
    plain = {"type": "Darcy2d", "locations": [[0.3, 0.4], [0.7, 0.1]], "forcing": 2.0}
    assert describe(operator) == plain
    u = draw(1, 4, 4)
    assert torch.equal(build(plain, Operator)(u), operator(u))
    torch.testing.assert_close(operator(u), Points(operator.locations)(Darcy2d(forcing=2.0)(u)), rtol=0, atol=0)


def test_too_few_axes_are_named():
    with pytest.raises(ValueError, match=r"Darcy2d: an event needs 2 axes, got \(6,\)"):
        Darcy2d()(draw(3, 6))
    with pytest.raises(ValueError, match=r"Darcy1d: an event needs 1 axis, got \(\)"):
        Darcy1d()(draw(3))
