"""Laws of every operator: adjoints are transposes, derivatives those of finite differences, products compose."""

import math

import pytest
import torch

from undrift.config import ConfigError, build, describe
from undrift.observe import (
    Blur,
    Composition,
    Darcy1d,
    Darcy2d,
    Downsample,
    Heat,
    Identity,
    LinearComposition,
    LinearOperator,
    Mask,
    Matrix,
    Operator,
    PhaseRetrieval,
    Points,
    Radon,
)
from undrift.space import Cosine, Fourier, Sine


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


CROSS = torch.tensor([[0, 1, 0], [1, 1, 1], [0, 1, 0]])
LINEAR = {
    "identity": (Identity(), (2, 3)),
    "matrix": (Matrix(draw(4, 6)), (2, 3)),
    "mask": (Mask(CROSS), (2, 3, 3)),
    "downsample-1d": (Downsample(3, dims=1), (2, 12)),
    "downsample-2d": (Downsample(2), (3, 4, 6)),
    "downsample-3d": (Downsample(2, dims=3), (4, 2, 6)),
    "points-1d": (Points((0.0, 0.21, 0.98)), (3, 9)),
    "points-2d": (Points(((0.02, 0.5), (0.4, 0.99))), (2, 5, 7)),
    "points-3d": (Points(((0.1, 0.5, 0.7),)), (3, 4, 2)),
    "points-cosine": (Points(((0.02, 0.5), (0.4, 0.99)), Cosine(2)), (5, 4)),
    "points-sine": (Points((0.3, 0.7), Sine(1)), (6,)),
    "points-fourier": (Points((0.3, 0.7), Fourier(1)), (2, 6)),
    "blur": (Blur(0.1), (2, 5, 6)),
    "heat": (Heat(0.01, Sine(1)), (7,)),
    "heat-torus": (Heat(0.01, Fourier(2)), (4, 5)),
    "radon": (Radon(5, 7), (2, 6, 4)),
    "radon-angles": (Radon((0.3, 2.0), 4), (5, 5)),
    "composed": (Radon(3, 4) @ Blur(0.1), (5, 4)),
    "composed-twice": (Mask([[1, 0]]) @ Downsample(2) @ Heat(0.1, Cosine(2)), (3, 2, 4)),
}
NONLINEAR = {
    "phase": (PhaseRetrieval(1.5), (2, 3, 4)),
    "darcy-1d": (Darcy1d((0.1, 0.5, 0.93)), (2, 6)),
    "darcy-1d-all": (Darcy1d(), (6,)),
    "darcy-2d": (Darcy2d(((0.3, 0.4), (0.9, 0.05))), (2, 3, 4)),
    "darcy-2d-all": (Darcy2d(forcing=2.0), (4, 3)),
    "composed": (PhaseRetrieval(dims=1) @ Darcy1d(), (5,)),
}


@pytest.fixture(params=LINEAR)
def linear(request):
    return LINEAR[request.param]


@pytest.fixture(params=NONLINEAR)
def nonlinear(request):
    return NONLINEAR[request.param]


def test_the_adjoint_is_the_transpose(linear):
    operator, event = linear
    x = draw(3, *event)
    y = operator(x)
    matrix = operator.dense(event)
    torch.testing.assert_close(x.flatten(1) @ matrix.T, y.flatten(1), rtol=0, atol=1e-12)
    unit = torch.eye(y[0].numel(), dtype=torch.float64).reshape(-1, *y.shape[1:])
    for adjoint in (operator.adjoint(unit, event), LinearOperator.adjoint(operator, unit, event)):
        assert adjoint.shape == (len(unit), *event)
        torch.testing.assert_close(adjoint.flatten(1), matrix, rtol=0, atol=1e-12)
    torch.testing.assert_close(operator.gram(event), matrix @ matrix.T, rtol=0, atol=1e-12)


def test_the_adjoint_can_be_differentiated(linear):
    """Guidance differentiates A'(y - A D(x)): the gradient of r'A'y in y is A r."""
    operator, event = linear
    r = draw(2, *event)
    y = operator(draw(2, *event)).detach().requires_grad_()
    for adjoint in (operator.adjoint(y, event), LinearOperator.adjoint(operator, y, event)):
        (slope,) = torch.autograd.grad((r * adjoint).sum(), y)
        torch.testing.assert_close(slope, operator(r), rtol=0, atol=1e-12)


def test_linear_derivatives_are_the_operator(linear):
    operator, event = linear
    x, matrix = draw(2, *event), operator.dense(event)
    r = draw(*operator(x).shape, seed=1)
    expected = (r.flatten(1) @ matrix).reshape(x.shape)
    torch.testing.assert_close(operator.vjp(x, r), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(Operator.vjp(operator, x, r), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(operator.jacobian(x)[1], matrix, rtol=0, atol=0)


def test_derivatives_are_those_of_finite_differences(nonlinear):
    """Central differences of step h err by h^2 times a third derivative plus rounding / h: 1e-10 at h = 1e-5."""
    operator, event = nonlinear
    x, way, h = draw(3, *event), draw(3, *event, seed=1), 1e-5
    r = draw(*operator(x).shape, seed=2)
    change = ((operator(x + h * way) - operator(x - h * way)) / (2 * h) * r).flatten(1).sum(1)
    for gradient in (operator.vjp(x, r), Operator.vjp(operator, x, r)):
        torch.testing.assert_close((gradient * way).flatten(1).sum(1), change, rtol=1e-8, atol=1e-9)
    by_matrix = torch.einsum("bme,bm->be", operator.jacobian(x), r.flatten(1))
    torch.testing.assert_close(by_matrix.reshape(x.shape), operator.vjp(x, r), rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", [*LINEAR.values(), *NONLINEAR.values()], ids=[*LINEAR, *(f"n-{k}" for k in NONLINEAR)])
def test_single_precision_and_description(case):
    """Same answer from float32 to rounding, and from the operator that the description builds, exactly."""
    operator, event = case
    x = draw(2, *event)
    single = operator(x.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), operator(x), rtol=1e-4, atol=1e-5)
    assert torch.equal(build(describe(operator), Operator)(x), operator(x))
    if operator.data_shape is not None:
        assert tuple(single.shape[single.ndim - len(operator.data_shape) :]) == operator.data_shape


def test_compositions():
    first, second = Matrix(draw(4, 6)), Matrix(draw(3, 4, seed=1))
    both = second @ first
    assert isinstance(both, LinearComposition)
    torch.testing.assert_close(both.dense((6,)), second.matrix @ first.matrix, rtol=0, atol=1e-14)
    mixed = Matrix(draw(2, 6)) @ Darcy1d()
    assert isinstance(mixed, Composition)
    assert not isinstance(mixed, LinearOperator)
    x = draw(2, 6)
    torch.testing.assert_close(mixed.jacobian(x), mixed.second.matrix @ Darcy1d().jacobian(x), rtol=0, atol=1e-14)
    with pytest.raises(TypeError):
        first @ 3.0


def test_phase_retrieval_sees_amplitudes_only():
    operator, x = PhaseRetrieval(2.0), draw(2, 4, 3)
    y = operator(x)
    torch.testing.assert_close(y.square().sum((1, 2)), x.square().sum((1, 2)), rtol=1e-13, atol=0)  # Parseval
    torch.testing.assert_close(operator(-x), y, rtol=0, atol=1e-14)
    torch.testing.assert_close(operator(x.flip(1, 2)), y, rtol=0, atol=1e-14)
    a, b = torch.arange(4, dtype=torch.float64), torch.arange(3, dtype=torch.float64)
    phase = torch.exp(-2j * math.pi * (3 * a[:, None] / 8 + 2 * b / 6))  # frequency (3, 2) of the 8 x 6 grid
    torch.testing.assert_close(y[:, 3, 2], (x * phase).sum((1, 2)).abs() / math.sqrt(48), rtol=1e-13, atol=0)
    blank = torch.zeros(1, 4, 4, dtype=torch.float64)
    assert torch.equal(operator.vjp(blank, operator(blank) + 1), blank)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Points((0.5, 1.5)), "location 1 is"),
        (lambda: Points(()), "one or more places"),
        (lambda: Points((0.5, (0.2, 0.3))), "one or more places"),
        (lambda: Points((0.5,), Cosine(2)), "dims=2"),
        (lambda: Points(((0.5, 0.5),))(draw(2, 5)), "2 axes"),
        (lambda: Mask(torch.zeros(3)), "something is known"),
        (lambda: Mask([1, 0])(draw(2, 3)), "does not end in the mask's"),
        (lambda: Matrix(draw(3)), "got shape"),
        (lambda: Matrix(torch.tensor([[math.nan]])), "not finite"),
        (lambda: Matrix(draw(3, 4))(draw(2, 5)), "rows hold 4 numbers"),
        (lambda: Downsample(2)(draw(1, 4, 5)), "2 divides"),
        (lambda: Downsample(0), "factor >= 1"),
        (lambda: Blur(-1.0), "width"),
        (lambda: Heat(math.inf), "time"),
        (lambda: Radon(0, 3), "at least one finite angle"),
        (lambda: Radon(3, 4)(draw(2, 5)), "two axes"),
        (lambda: PhaseRetrieval(0.5), "oversample"),
        (lambda: PhaseRetrieval()(draw(2, 5)), "needs 2 axes"),
        (lambda: Darcy1d(((0.1, 0.2),)), "single numbers"),
        (lambda: Darcy2d((0.1, 0.2)), "pairs"),
        (lambda: Identity().dense((20000,)), "too large"),
    ],
)
def test_errors_say_what_was_expected(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_places_may_be_arrays():
    table = torch.tensor([[0.25, 0.5], [0.75, 1.0]], dtype=torch.float64)
    for kind in (Points, Darcy2d):
        for given in (table, table.numpy(), [tuple(s) for s in table]):
            assert kind(given).locations == ((0.25, 0.5), (0.75, 1.0))
    assert Points(table[0]).locations == (0.25, 0.5)


def test_configuration_errors_name_the_place():
    with pytest.raises(ConfigError, match=r"operator\.locations"):
        build({"type": "Points", "locations": "middle"}, Operator, "operator")
