"""Targets: faults are found and named before any sampling, counts are right, and coordinates change nothing but x."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Beta,
    Categorical,
    Dirichlet,
    Distribution,
    Gamma,
    Independent,
    LogNormal,
    LowRankMultivariateNormal,
    MixtureSameFamily,
    Multinomial,
    MultivariateNormal,
    Normal,
    Poisson,
    StudentT,
    Uniform,
    Wishart,
    constraints,
)

from undrift.density import Affine, AffineTarget, Auto, Laplace, ParallelTempering, Point, Target, TargetError, anneal

NET = torch.nn.Linear(2, 1).double().requires_grad_(True)


def points(n: int = 16, dim: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def quadratic(x: Tensor) -> Tensor:
    return -0.5 * x.square().sum(-1)


def hidden_branch(x: Tensor) -> Tensor:
    """Finite everywhere, but the branch that is not taken has the slope NaN, and 0 * NaN is NaN."""
    return quadratic(x) + torch.where(x[:, 0] > 0, x[:, 0].sqrt(), torch.zeros_like(x[:, 0]))


class Restless:
    """Another value at every call."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, x: Tensor) -> Tensor:
        return quadratic(x) + 0.1 * torch.randn(len(x), generator=self.generator, dtype=x.dtype)


FAULTS: dict[str, tuple[Callable[[], Target], str]] = {
    "no tensor": (lambda: Target(lambda x: 1.0, 2), "must return a tensor, got float"),  # type: ignore[arg-type, return-value]
    "batch summed": (lambda: Target(lambda x: quadratic(x).sum(), 2), r"shape \(\); .*batch dimension was summed"),
    "not summed": (lambda: Target(lambda x: -x.square(), 2), r"coordinates were not summed: end with .sum\(-1\)"),
    "column": (lambda: Target(lambda x: quadratic(x).unsqueeze(-1), 2), r"drop the last axis, as in .squeeze\(-1\)"),
    "batch mean": (lambda: Target(lambda x: quadratic(x - x.mean(0)), 2), "other points of its batch"),
    "batch deviation": (
        lambda: Target(lambda x: quadratic((x - x[:1]) / (x - x[:1]).norm()), 2),
        "changes by nan with",
    ),
    "random": (lambda: Target(Restless(), 2), "two calls at the same points gave different values"),
    "NaN": (
        lambda: Target(lambda x: quadratic(x) + x[:, 0].log(), 2),
        r"log_prob is nan at x = \(.*logs of negative numbers",
    ),
    "+inf": (
        lambda: Target(lambda x: quadratic(x) + math.inf, 2),
        "log_prob is inf at x = .* at (16 of 16|64 of 64|8 of 8)",
    ),
    "no support": (
        lambda: Target(lambda x: quadratic(x) - math.inf, 2),
        "-inf at all .* points tried.*loc= and scale=",
    ),
    "hidden branch": (lambda: Target(hidden_branch, 2), "gradient is not finite.*torch.where"),
    "wrong score": (lambda: Target(quadratic, 2, score=lambda x: x), "the score is not the gradient of log_prob"),
    "score off by a tenth": (lambda: Target(quadratic, 2, score=lambda x: -1.1 * x), "Correct score=, or leave it out"),
    "score of a point": (lambda: Target(quadratic, 2, score=quadratic), r"score must have the shape of the points"),
    "detached": (lambda: Target(lambda x: quadratic(x.detach()), 2), "does not depend on x for autograd.*give score="),
    "detached before a network": (
        lambda: Target(lambda x: NET(x.detach()).squeeze(-1), 2),
        "does not depend on x for autograd",
    ),
    "numpy": (
        lambda: Target(lambda x: torch.from_numpy(-0.5 * np.square(x.numpy()).sum(-1)), 2),
        "computed in numpy.*give score=",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_found_and_named(name: str) -> None:
    build, says = FAULTS[name]
    with pytest.raises(TargetError, match=says):
        build().check(points())


RUNS: dict[str, Callable[[Target], object]] = {
    "anneal": lambda target: anneal(target),
    "affine": lambda target: anneal(target, coordinates=Affine(0.1, 2.0)),
    "Laplace": lambda target: anneal(target, coordinates=Laplace()),
    "tempering": lambda target: ParallelTempering(iterations=20, thin=5).run(target),
    "Auto": lambda target: Auto().run(target),
}
"""Each of 4096 draws."""


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("how", RUNS)
def test_faults_are_found_before_any_walking(name: str, how: str) -> None:
    build, says = FAULTS[name]
    target = build()
    with pytest.raises(TargetError, match=says):
        RUNS[how](target)
    assert target.evaluations.total <= 64 * 4  # the probe, not the walkers


def test_a_fault_in_coordinates_is_shown_where_the_user_knows_it() -> None:
    target = Target(lambda x: quadratic(x) + (x[:, 0] - 1000).sqrt() * math.nan, 2).affine(1000.0, 1.0)
    with pytest.raises(TargetError, match=r"at x = \((999|100\d)"):
        target.check(points())


def test_one_point_and_wrong_dimensions() -> None:
    target = Target(quadratic, 2)
    with pytest.raises(TargetError, match=r"\(batch, 2\), got \(2,\); one point is x.unsqueeze\(0\)"):
        target.log_prob(torch.zeros(2))
    for seen in (target, target.affine(1.0, 2.0), target.affine(0.0, torch.eye(2)).affine(torch.zeros(2), 1.0)):
        for shape in ((5, 3), (5, 1), (2, 2, 2), (2,)):
            with pytest.raises(TargetError, match=r"points must have shape \(batch, 2\)"):
                seen.log_prob(torch.zeros(*shape))
            with pytest.raises(TargetError, match=r"points must have shape \(batch, 2\)"):
                seen.score(torch.zeros(*shape))
    assert target.evaluations.total == 0


@pytest.mark.parametrize(("log_prob", "dim"), [(3.0, 2), (quadratic, 0), (quadratic, 2.0), (quadratic, True)])
def test_arguments_that_do_not_fit(log_prob: Callable[[Tensor], Tensor], dim: int) -> None:
    with pytest.raises(TargetError, match="got"):
        Target(log_prob, dim)


def test_sound_targets_pass() -> None:
    for target in (
        Target(quadratic, 2),
        Target(quadratic, 2, score=lambda x: -x),
        Target(lambda x: -x.abs().sum(-1), 2),  # kinks
        Target(lambda x: quadratic(x) + 1e8, 2),  # differences of large values are noisy
        Target(lambda x: quadratic(x / 1e-4) * 1.0, 2),
        Target(lambda x: torch.where(x[:, 0] > 0, quadratic(x), -math.inf), 2),  # a wall
        Target(lambda x: quadratic(x.float()) - 50, 2),  # single precision inside
    ):
        target.check(points())


def test_rounding_in_single_precision_is_not_randomness() -> None:
    """Sums on several threads, or a formula of its own for value and score, differ by a few roundings."""

    def rounded(x: Tensor) -> Tensor:
        return quadratic(x) * (1 + 3e-7 * torch.randn(len(x), dtype=x.dtype))

    Target(rounded, 2).check(points(dtype=torch.float32))
    with pytest.raises(TargetError, match="two calls"):
        Target(rounded, 2).check(points())


def test_a_target_of_single_precision_only_can_be_sampled_in_it() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    target = Target(lambda x: net(x).squeeze(-1) + quadratic(x), 2)
    draws = anneal(target, n=64, repeats=2, moves=2, dtype=torch.float32)
    assert draws.states.dtype == torch.float32
    wrong = Target(lambda x: net(x).squeeze(-1) + quadratic(x), 2, score=lambda x: x)
    with pytest.raises(TargetError, match="not the gradient"):
        anneal(wrong, n=64, dtype=torch.float32)


# -- counting ----------------------------------------------------------------------------------------------------------


def test_counts_are_those_of_an_independent_count() -> None:
    asked = {"value": 0, "score": 0}

    def log_prob(x: Tensor) -> Tensor:
        asked["value"] += len(x)
        return quadratic(x)

    def score(x: Tensor) -> Tensor:
        asked["score"] += len(x)
        return -x

    target = Target(log_prob, 2)
    target.log_prob(points(5))
    target.score(points(7))
    target.at(points(3))
    view = target.affine(1.0, torch.eye(2)).affine(0.5)
    view.log_prob(points(11))
    view.check(points(16))
    assert target.evaluations is view.evaluations
    assert target.evaluations.total == asked["value"]
    assert target.evaluations.gradients == 7 + 3 + 16

    given = Target(log_prob, 2, score=score)
    asked["value"] = 0
    given.check(points(16))
    assert (given.evaluations.total, given.evaluations.gradients) == (asked["value"], asked["score"])


def test_evaluations_are_numbers_that_add() -> None:
    target = Target(quadratic, 2)
    before = target.evaluations.copy()
    target.score(points(4))
    target.log_prob(points(3))
    spent = target.evaluations - before
    assert (spent.values, spent.gradients, spent.total) == (3, 4, 7)
    assert (spent + spent).total == 14
    assert before.total == 0


# -- value, score, points ----------------------------------------------------------------------------------------------


def test_the_score_is_the_gradient_and_keeps_no_graph() -> None:
    target = Target(lambda x: (x.sin() * x.square()).sum(-1), 3)
    x = points(6, 3).requires_grad_()
    value, score = target.log_prob_and_score(x)
    assert not value.requires_grad
    assert not score.requires_grad
    torch.testing.assert_close(score, (x.cos() * x.square() + 2 * x * x.sin()).detach())
    with torch.no_grad():
        torch.testing.assert_close(target.score(x), score)


def test_points_are_taken_and_chosen_row_by_row() -> None:
    target = Target(quadratic, 2)
    a, b = target.at(points(4)), target.at(points(4) + 1)
    choose = torch.tensor([True, False, True, False])
    mixed = Point.where(choose, a, b)
    for i, source in enumerate((a, b, a, b)):
        for part, own in zip(mixed, source, strict=True):
            assert torch.equal(part[i], own[i])
    assert torch.equal(mixed.take(torch.tensor([2, 0])).score, a.score[[2, 0]])


def test_exact_draws_are_refused_where_there_are_none() -> None:
    target = Target(quadratic, 2)
    assert not target.exact
    with pytest.raises(TargetError, match=r"no exact samples; draw with"):
        target.sample(3)


# -- torch.distributions -----------------------------------------------------------------------------------------------

_TRIL = torch.tensor([[1.0, 0.0], [0.7, 0.5]])
LAWS: dict[str, Distribution] = {
    "Normal": Normal(0.3, 1.4),
    "StudentT": StudentT(5.0, 1.0, 0.5),
    "Gamma": Gamma(2.0, 3.0),
    "LogNormal": LogNormal(0.2, 0.8),
    "Beta": Beta(0.7, 2.0),
    "Uniform": Uniform(-1.0, 3.0),
    "mixture": MixtureSameFamily(Categorical(torch.tensor([0.3, 0.7])), Normal(torch.tensor([-2.0, 1.5]), 0.6)),
    "MultivariateNormal": MultivariateNormal(torch.tensor([1.0, -1.0]), scale_tril=_TRIL),
    "low rank": LowRankMultivariateNormal(torch.zeros(2), torch.ones(2, 1), torch.ones(2)),
    "Dirichlet": Dirichlet(torch.tensor([0.8, 1.5, 2.5])),
    "independent": Independent(Gamma(torch.tensor([2.0, 3.0]), torch.ones(2)), 1),
    "mixture in the plane": MixtureSameFamily(
        Categorical(torch.ones(2)), MultivariateNormal(torch.tensor([[-2.0, 0.0], [2.0, 1.0]]), scale_tril=_TRIL)
    ),
}
"""Made as users make them, in single precision."""


@pytest.mark.parametrize("name", LAWS)
def test_distributions_integrate_to_one_without_their_constraints(name: str) -> None:
    target = Target.of(LAWS[name])
    n, reach = (20001, 60.0) if target.dim == 1 else (1201, 45.0)
    axis = torch.linspace(-reach, reach, n, dtype=torch.float64)
    grid = torch.cartesian_prod(*[axis] * target.dim).reshape(-1, target.dim)
    mass = torch.cat([target.log_prob(part) for part in grid.split(200_000)]).exp().sum()
    # The trapezoidal rule is exact to rounding for smooth densities; 1e-6 is that of the single-precision parameters.
    assert float(mass * (axis[1] - axis[0]) ** target.dim) == pytest.approx(1.0, abs=2e-6)
    assert target.log_z == 0.0


@pytest.mark.parametrize("name", LAWS)
def test_exact_draws_agree_with_the_density(name: str) -> None:
    target, n = Target.of(LAWS[name]), 4000
    x = target.sample(n, seed=3)
    assert (x.dtype, x.shape) == (torch.float64, (n, target.dim))
    # Stein's identity: the mean of the divergence of score * f + f' is 0, here with f bounded.
    f, slope = (x / 3).tanh(), (1 - (x / 3).tanh().square()) / 3
    stein = (target.score(x) * f + slope).sum(-1)
    assert abs(float(stein.mean())) < 4.5 * float(stein.std()) / math.sqrt(n)
    assert torch.equal(x, target.sample(n, seed=3))
    assert not torch.equal(x, target.sample(n, seed=4))


def test_draws_leave_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    Target.of(LAWS["Gamma"]).sample(10)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("name", LAWS)
def test_distributions_hold_far_out_and_in_both_precisions(name: str) -> None:
    """A walker may go where the bijection ends on the boundary; NaN there would hide the target's own faults."""
    law = LAWS[name]
    before = {key: value.clone() for key, value in vars(law).items() if isinstance(value, Tensor)}
    target = Target.of(law)
    far = torch.tensor([-1e5, -800.0, 800.0, 1e5], dtype=torch.float64).unsqueeze(-1).expand(-1, target.dim)
    assert not bool(torch.isnan(target.log_prob(far)).any())
    single = target.log_prob(points(8, target.dim, torch.float32))
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), target.log_prob(points(8, target.dim)), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(vars(law)[key], value) for key, value in before.items())  # the user's object is as it was


def test_values_come_back_on_the_scale_of_the_distribution() -> None:
    law = Dirichlet(torch.tensor([2.0, 3.0, 4.0]))
    target = Target.of(law)
    values = target.constrain(target.sample(4000, 0))["x"]
    torch.testing.assert_close(values.sum(-1), torch.ones(4000, dtype=torch.float64))
    error = (law.variance / 4000).sqrt()
    assert bool(((values.mean(0) - law.mean).abs() < 4.5 * error).all())
    assert target.labels == ["x[0]", "x[1]", "x[2]"]


@pytest.mark.parametrize(
    ("law", "says"),
    [
        (Bernoulli(0.5), "Bernoulli is not a density on a continuous support"),
        (Poisson(2.0), "Poisson is not a density"),
        (Multinomial(3, torch.ones(3)), "Multinomial is not a density"),
        (Normal(torch.zeros(3), 1.0), r"batch shape \(3,\).*torch.distributions.Independent"),
        (Wishart(torch.tensor(5.0), torch.eye(2)), "Wishart has no known bijection.*Target.constrained"),
    ],
)
def test_distributions_that_are_no_targets(law: Distribution, says: str) -> None:
    with pytest.raises(TargetError, match=says):
        Target.of(law)


def test_named_parameters_keep_the_density_and_its_normaliser() -> None:
    def log_prob(p: dict[str, Tensor]) -> Tensor:
        return Gamma(2.0, 3.0).log_prob(p["rate"]) + Beta(2.0, 2.0).log_prob(p["share"])

    target = Target.constrained(log_prob, {"rate": constraints.positive, "share": constraints.unit_interval}, log_z=0.0)  # type: ignore[arg-type]
    axis = torch.linspace(-30, 30, 1201, dtype=torch.float64)
    mass = target.log_prob(torch.cartesian_prod(axis, axis)).exp().sum() * (axis[1] - axis[0]) ** 2
    assert float(mass) == pytest.approx(1.0, abs=1e-6)
    assert target.labels == ["rate", "share"]
    assert target.name == "log_prob"


# -- affine coordinates ------------------------------------------------------------------------------------------------

_MATRIX = torch.tensor([[2.0, 0.3], [-0.4, 0.5]], dtype=torch.float64)
MAPS: dict[str, Callable[[Target], AffineTarget]] = {
    "number": lambda t: t.affine(3.0, 0.5),
    "vector": lambda t: t.affine(torch.tensor([1.0, -2.0]), torch.tensor([0.1, 7.0])),
    "matrix": lambda t: t.affine(torch.tensor([1.0, -2.0]), _MATRIX),
    "nested": lambda t: t.affine(torch.tensor([1.0, -2.0]), _MATRIX).affine(0.5, torch.tensor([2.0, 0.2])),
    "mirrored": lambda t: t.affine(0.0, torch.tensor([[0.0, 1.0], [1.0, 0.0]])),
}


@pytest.mark.parametrize("name", MAPS)
def test_coordinates_change_nothing_but_x(name: str) -> None:
    target = Target.of(LAWS["MultivariateNormal"])
    view = MAPS[name](target)
    z = points(8)

    def through(z: Tensor) -> Tensor:  # to_x leads one view down
        x = view.to_x(z)
        return view.inner.to_x(x) if isinstance(view.inner, AffineTarget) else x

    x = through(z)
    jacobian = torch.autograd.functional.jacobian(lambda row: through(row[None])[0], z[0])
    torch.testing.assert_close(view.log_prob(z), target.log_prob(x) + torch.linalg.slogdet(jacobian).logabsdet)
    value, score = view.log_prob_and_score(z)
    torch.testing.assert_close(value, view.log_prob(z))
    torch.testing.assert_close(score, target.score(x) @ jacobian)
    torch.testing.assert_close(view.to_z(view.to_x(z)), z)
    torch.testing.assert_close(view.constrain(z)["x"], target.constrain(x)["x"])
    # exact draws are the same draws, seen in z
    torch.testing.assert_close(through(view.sample(50, 1)), target.sample(50, 1))
    assert view.exact
    assert view.log_z == 0.0


@pytest.mark.parametrize("name", MAPS)
def test_the_normaliser_is_that_of_the_target(name: str) -> None:
    view = MAPS[name](Target.of(LAWS["MultivariateNormal"]))
    centre = view.sample(2000, 0)
    # A grid over mean +- 9 deviations of the density in z.
    low, high = centre.mean(0) - 9 * centre.std(0), centre.mean(0) + 9 * centre.std(0)
    axes = [torch.linspace(float(a), float(b), 601, dtype=torch.float64) for a, b in zip(low, high, strict=True)]
    cell = math.prod(float(axis[1] - axis[0]) for axis in axes)
    assert float(view.log_prob(torch.cartesian_prod(*axes)).exp().sum() * cell) == pytest.approx(1.0, abs=2e-6)


@pytest.mark.parametrize("name", MAPS)
def test_single_precision_points_with_double_precision_maps(name: str) -> None:
    view = MAPS[name](Target(quadratic, 2))
    z = points(8, dtype=torch.float32)
    value, score = view.log_prob_and_score(z)
    assert value.dtype == score.dtype == view.to_x(z).dtype == view.to_z(z).dtype == torch.float32
    exact, slope = view.log_prob_and_score(z.double())
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(score.double(), slope, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("loc", "scale", "says"),
    [
        (torch.zeros(3), 1.0, r"loc must be a number or have shape \(2,\), got \(3,\)"),
        (0.0, torch.ones(3), r"scale must be a number, or have shape \(2,\) or \(2, 2\), got \(3,\)"),
        (0.0, torch.ones(2, 3), "scale must be a number"),
        (math.nan, 1.0, "must be finite"),
        (0.0, math.inf, "must be finite"),
        (0.0, 0.0, "must be positive, its smallest entry is 0"),
        (0.0, torch.tensor([1.0, -2.0]), "smallest entry is -2"),
        (0.0, torch.ones(2, 2), "singular"),
    ],
)
def test_maps_that_do_not_fit(loc: Tensor | float, scale: Tensor | float, says: str) -> None:
    with pytest.raises(TargetError, match=says):
        Target(quadratic, 2).affine(loc, scale)
