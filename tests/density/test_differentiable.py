"""Losses that go through the score: its derivative, for every target, in the graph of the points."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from undrift.config import family
from undrift.density import AffineTarget, Target, TargetError
from undrift.density.targets import (
    AutoRegression,
    Banana,
    BrownianMotion,
    Difficult2d,
    DoubleWell,
    EightSchools,
    Funnel,
    Gaussian,
    GaussianMixture,
    GPRegression,
    Grid16,
    KidScore,
    LogGaussianCox,
    LogisticRegression,
    LowDimGaussMix,
    ManyWell,
    Mesquite,
    Mixture9,
    Mixture40,
    MixtureHighDim,
    Nes1980,
    OneCompartment,
    Rings,
    Rosenbrock,
    SblrcBlr,
    Seeds,
    StudentMixture,
    TwoModes,
)


def points(n: int, dim: int, seed: int = 1) -> Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MEANS = points(3, 3)
TARGETS: list[Target] = [
    AutoRegression(),
    Banana(dim=4),
    BrownianMotion(),
    BrownianMotion(known_scales=True),
    Difficult2d(),
    DoubleWell(),
    DoubleWell(dim=3, wells=2, delta=2.0, shift=1.5),
    EightSchools(),
    EightSchools(centered=True),
    Funnel(),
    Gaussian(dim=4, loc=2.0, condition=100.0),
    GaussianMixture(MEANS, torch.ones(3)),
    GaussianMixture(MEANS, torch.ones(3, 3) + MEANS.abs()),
    GaussianMixture(MEANS, torch.eye(3).expand(3, 3, 3) + 0.5 * MEANS.unsqueeze(-1) * MEANS.unsqueeze(-2)),
    GPRegression(),
    Grid16(dim=10),
    KidScore(),
    LogGaussianCox(),
    LogGaussianCox("127", whitened=True),
    *(LogisticRegression(name) for name in ("ionosphere", "sonar", "german")),
    LowDimGaussMix(),
    ManyWell(),
    Mesquite(),
    Mixture9(),
    Mixture40(),
    MixtureHighDim(dim=30),
    Nes1980(),
    OneCompartment(),
    Rings(),
    Rosenbrock(dim=4),
    SblrcBlr(),
    Seeds(),
    StudentMixture(dim=3),
    TwoModes(),
    EightSchools().affine(0.1, 0.5),
    DoubleWell(dim=3, wells=2).affine(points(1, 3)[0], torch.tensor([0.5, 1.0, 2.0])),
    Funnel(dim=3).affine(0.3, torch.linalg.cholesky(torch.eye(3) + 0.4)).affine(0.1, 1.5),
    Target(lambda x: -(x.square() + 0.3 * x.pow(4)).sum(-1), 3),
    Target(lambda x: -(x.square() + 0.3 * x.pow(4)).sum(-1), 3, score=lambda x: -2 * x - 1.2 * x.pow(3)),
    Target.of(torch.distributions.Gamma(2.0, 3.0)),
]


def test_every_target_of_the_library_is_here() -> None:
    ours = {name for name, cls in family(Target).items() if cls.__module__.startswith("undrift.")}
    assert ours <= {type(t).__name__ for t in TARGETS}


@pytest.mark.parametrize("target", TARGETS, ids=repr)
def test_the_derivative_of_the_score_is_that_of_differences(target: Target) -> None:
    """Along random directions, at points that are themselves the result of an operation on a leaf."""
    x = target.sample(4, 3) if target.exact else 0.3 * points(4, target.dim)
    u = points(4, target.dim, 2)
    u /= u.norm(dim=-1, keepdim=True)
    leaf = (x / 2).requires_grad_()
    value, score = target.differentiable(2 * leaf)
    torch.testing.assert_close((value.detach(), score.detach()), target.log_prob_and_score(x), rtol=1e-9, atol=1e-9)
    (by_score,) = torch.autograd.grad((u * score).sum(), leaf, retain_graph=True)
    (by_value,) = torch.autograd.grad(value.sum(), leaf)
    torch.testing.assert_close(by_value / 2, score.detach(), rtol=1e-9, atol=1e-9)
    # Of order four: an error of h^4 in the density's own units, and one of rounding over h.
    best = math.inf
    for step in (1e-3, 1e-4):
        h = step * (1 + x.abs().max()) * u
        near = (target.score(x + h) - target.score(x - h)) / 2
        far = (target.score(x + 2 * h) - target.score(x - 2 * h)) / 2
        slope = (8 * near - far) / (6 * step * (1 + x.abs().max()))
        miss = (by_score / 2 - slope).norm(dim=-1) / slope.norm(dim=-1).clamp(min=1e-3 * float(slope.norm()))
        best = min(best, float(miss.max()))
    assert best < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_graph_goes_through_a_simulation(dtype: torch.dtype) -> None:
    """The derivative of a chain of Langevin steps in its step size, against differences."""
    target = Funnel(dim=3).affine(0.0, torch.tensor([1.0, 0.5, 2.0]))
    noise = points(30, 3).reshape(5, 6, 3).to(dtype)

    def end(step: Tensor) -> Tensor:
        x = noise[0] * 0.5 * step.sqrt()
        for xi in noise[1:]:
            x = x + step * target.differentiable(x)[1] + (2 * step).sqrt() * xi
        return target.differentiable(x)[0].mean()

    step = torch.tensor(0.02, dtype=dtype, requires_grad=True)
    out = end(step)
    (slope,) = torch.autograd.grad(out, step)
    assert out.dtype == slope.dtype == dtype
    h = 1e-6 if dtype == torch.float64 else 1e-3
    with torch.no_grad():
        expected = (end(step + h) - end(step - h)) / (2 * h)
    torch.testing.assert_close(slope, expected, rtol=1e-7 if h < 1e-5 else 0.02, atol=0)


def test_without_a_graph_it_is_the_score() -> None:
    target, x = Mixture40(), points(5, 2)
    for found in (target.differentiable(x), torch.no_grad()(target.differentiable)(x.clone().requires_grad_())):
        assert all(torch.equal(a, b) for a, b in zip(found, target.log_prob_and_score(x), strict=True))
        assert not any(part.requires_grad for part in found)


# -- counts ------------------------------------------------------------------------------------------------------------


def quartic(x: Tensor) -> Tensor:
    return -0.25 * x.pow(4).sum(-1)


def test_points_count_as_gradients() -> None:
    target = Funnel()
    target.affine(0.5, 2.0).differentiable(points(7, 10).requires_grad_())
    assert (target.evaluations.gradients, target.evaluations.values) == (7, 0)


@pytest.mark.parametrize("given", [None, lambda x: -x.pow(3), lambda x: -x.detach().pow(3)])
def test_functions_are_probed_once_and_the_probe_is_counted(given: Callable[[Tensor], Tensor] | None) -> None:
    asked = [0]

    def log_prob(x: Tensor) -> Tensor:
        asked[0] += len(x)
        return quartic(x)

    target = Target(log_prob, 2, score=given)
    x = points(9, 2).requires_grad_()
    for _ in range(2):
        _, score = target.differentiable(x)
        (slope,) = torch.autograd.grad(score.sum(), x)
        torch.testing.assert_close(slope, -3 * x.detach().square())
    assert target.evaluations.gradients == asked[0]
    assert asked[0] <= 2 * 9 + 18


# -- faults ------------------------------------------------------------------------------------------------------------


class Once(torch.autograd.Function):
    """-|x|^4 / 4 with a gradient that autograd must not differentiate."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        return quartic(x)

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return -grad.unsqueeze(-1) * ctx.saved_tensors[0].pow(3)


class Blind(torch.autograd.Function):
    """The same, whose gradient comes from NumPy and hides where it depends on x."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        ctx.cubed = torch.from_numpy(x.detach().numpy() ** 3)
        return quartic(x)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return -grad.unsqueeze(-1) * ctx.cubed


@pytest.mark.parametrize(
    "target",
    [
        Target(Once.apply, 2),
        Target(Blind.apply, 2),
        Target(lambda x: torch.from_numpy(quartic(torch.from_numpy(x.numpy())).numpy()), 2, score=lambda x: -x.pow(3)),
        Target(lambda x: quartic(x.detach()), 2, score=lambda x: -x.pow(3)),
        Target(lambda x: torch.from_numpy(np.zeros(len(x))) + quartic(x.detach()), 2),
    ],
    ids=["once", "blind", "numpy", "detached", "constant"],
)
def test_what_cannot_be_differentiated_twice_is_refused(target: Target) -> None:
    for seen in (target, target.affine(0.1, 2.0)):
        with pytest.raises(TargetError):
            seen.differentiable(points(4, 2).requires_grad_())


def test_the_refusal_says_what_to_do() -> None:
    for apply in (Once.apply, Blind.apply):
        with pytest.raises(TargetError, match=r"twice: the derivative that autograd finds is not that.*log-variance"):
            Target(apply, 2).differentiable(points(4, 2).requires_grad_())
    with pytest.raises(TargetError, match="does not depend on x for autograd"):
        Target(lambda x: quartic(x.detach()), 2).differentiable(points(4, 2).requires_grad_())
    with pytest.raises(TargetError, match=r"points must have shape \(batch, 2\)"):
        Target(quartic, 2).differentiable(points(4, 3).requires_grad_())


def test_a_score_that_is_detached_in_part_is_passed_over() -> None:
    target = Target(quartic, 2, score=lambda x: -x * x.detach().square())
    x = points(5, 2).requires_grad_()
    (slope,) = torch.autograd.grad(target.differentiable(x)[1].sum(), x)
    torch.testing.assert_close(slope, -3 * x.detach().square())


def test_densities_without_curvature_are_no_fault() -> None:
    """An exponential and a Laplace law: the derivative is zero, and in the graph."""
    for log_prob in (lambda x: torch.where(x > 0, -x, -math.inf).sum(-1), lambda x: -x.abs().sum(-1)):
        x = (1 + points(4, 2).abs()).requires_grad_()
        value, score = Target(log_prob, 2).differentiable(x)
        (slope,) = torch.autograd.grad((score.sum() + value.sum()), x)
        torch.testing.assert_close(slope, -torch.ones_like(x))


def test_points_outside_the_support_do_not_spoil_the_probe() -> None:
    target = Target(lambda x: torch.where(x[:, 0] > 0, quartic(x), -math.inf), 2)
    x = points(6, 2)
    x[:2, 0] = -1.0
    _, score = target.differentiable(x.requires_grad_())
    (slope,) = torch.autograd.grad(score[2:].sum(), x)
    inside = x.detach()[:, :1] > 0
    inside[:2] = False
    torch.testing.assert_close(slope, torch.where(inside, -3 * x.detach().square(), 0.0))


def test_affine_views_share_the_probe() -> None:
    target = Target(quartic, 2)
    view = target.affine(0.0, 2.0)
    assert isinstance(view, AffineTarget)
    x = points(3, 2).requires_grad_()
    view.differentiable(x)
    before = target.evaluations.gradients
    view.differentiable(x)
    target.affine(1.0).differentiable(x)
    assert target.evaluations.gradients == before + 6
