"""Centre and scale: ascents end on peaks or say they do not; curvature is the Hessian, spread the covariance."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from undrift.density import Affine, Laplace, Target, TargetError
from undrift.density.coordinates import ascend, curvature, factor_of, spread
from undrift.density.targets import Banana, DoubleWell, EightSchools, Funnel, TwoModes


def starts(n: int, dim: int, seed: int = 1) -> Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian(dim: int, condition: float) -> tuple[Target, Tensor]:
    """A Gaussian about 3 whose precision, rotated, has the given condition and the smallest eigenvalue 1."""
    basis, _ = torch.linalg.qr(starts(dim, dim, seed=7))
    precision = basis @ torch.diag(torch.logspace(0, math.log10(condition), dim, dtype=torch.float64)) @ basis.T
    return Target(lambda x: -0.5 * ((x - 3) @ precision * (x - 3)).sum(-1), dim), precision


@pytest.mark.parametrize("dim", [2, 10])
def test_ascents_climb_gaussians_of_condition_a_million(dim: int) -> None:
    target, _ = gaussian(dim, 1e6)
    found = ascend(target, starts(4, dim))
    assert bool(found.flat.all())
    assert float(found.log_prob.min()) > -0.01  # what "at rest" promises, in nats


def test_each_start_climbs_its_own_peak() -> None:
    found = ascend(TwoModes(), torch.tensor([[-6.0], [-3.0], [3.0], [6.0]], dtype=torch.float64))
    torch.testing.assert_close(found.x.squeeze(-1).round(), torch.tensor([-5.0, -5.0, 5.0, 5.0], dtype=torch.float64))
    assert bool(found.flat.all())


def test_a_bent_valley() -> None:
    target = Banana()
    found = ascend(target, starts(4, target.dim))
    best = float(target.log_prob(torch.tensor([[0.0, -target.bend * target.scale**2]], dtype=torch.float64)))
    assert bool(found.flat.all())
    torch.testing.assert_close(found.log_prob, torch.full((4,), best, dtype=torch.float64), atol=0.01, rtol=0)


RUNAWAYS = {
    "slope 1": lambda x: x.sum(-1),
    "slope 0.1": lambda x: 0.1 * x.sum(-1),
    "slope 1e-4": lambda x: 1e-4 * x.sum(-1),
    "grows like a logarithm": lambda x: x.square().sum(-1).add(1).log(),
    "overflows": lambda x: x.exp().sum(-1),
}


@pytest.mark.parametrize("name", RUNAWAYS)
def test_an_ascent_without_end_is_not_at_rest(name: str) -> None:
    target = Target(RUNAWAYS[name], 2)
    assert not bool(ascend(target, starts(2, 2), steps=50).flat.any())


def test_a_funnel_has_no_peak_to_rest_on() -> None:
    target = Funnel()
    assert not bool(ascend(target, starts(4, target.dim)).flat.any())


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e3, 1e6])
def test_scale_does_not_decide_what_rest_is(scale: float) -> None:
    target = Target(lambda x: -0.5 * ((x - 2) / scale).square().sum(-1), 3)
    found = ascend(target, starts(3, 3))
    assert bool(found.flat.all())
    assert float(found.log_prob.min()) > -0.01


def test_walls_turn_ascents_back_and_points_behind_them_stay() -> None:
    def log_prob(x: Tensor) -> Tensor:
        inside = (x > 0).all(-1)
        safe = torch.where(inside.unsqueeze(-1), x, torch.ones_like(x))
        return torch.where(inside, (2 * safe.log() - safe).sum(-1), -math.inf)

    x = torch.tensor([[0.1, 9.0], [5.0, 0.01], [-1.0, 1.0]], dtype=torch.float64)
    found = ascend(Target(log_prob, 2), x)
    assert found.flat.tolist() == [True, True, False]
    torch.testing.assert_close(found.x[:2], torch.full((2, 2), 2.0, dtype=torch.float64), atol=1e-3, rtol=0)
    seen = Laplace(starts=16).choose(Target(log_prob, 2), torch.Generator().manual_seed(0), torch.float64)
    torch.testing.assert_close(seen.loc, torch.full((2,), 2.0, dtype=torch.float64), atol=1e-3, rtol=0)


# -- curvature ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [EightSchools(), DoubleWell(), Banana()], ids=lambda t: t.name)
def test_curvature_is_minus_the_hessian(target: Target) -> None:
    x = 0.3 * starts(1, target.dim)[0]
    exact = torch.autograd.functional.hessian(lambda v: target._log_density(v.unsqueeze(0)).sum(), x)
    found = curvature(target, x)
    torch.testing.assert_close(found, -exact, atol=1e-6 * float(exact.abs().max()), rtol=1e-6)
    assert torch.equal(found, found.T)


def test_curvature_costs_two_gradients_a_coordinate() -> None:
    target, _ = gaussian(10, 10.0)
    curvature(target, starts(1, 10)[0])
    assert (target.evaluations.gradients, target.evaluations.values) == (20, 0)


def test_a_factor_inverts_the_precision() -> None:
    _, precision = gaussian(6, 1e4)
    factor = factor_of(precision)
    torch.testing.assert_close(factor @ factor.T @ precision, torch.eye(6, dtype=torch.float64), atol=1e-9, rtol=0)


def test_directions_that_curve_the_wrong_way_get_the_widest_good_width() -> None:
    basis, _ = torch.linalg.qr(starts(4, 4))
    precision = basis @ torch.diag(torch.tensor([9.0, 4.0, 0.0, -2.0], dtype=torch.float64)) @ basis.T
    factor = factor_of(precision)
    widths = torch.diagonal(basis.T @ factor @ factor.T @ basis)
    torch.testing.assert_close(widths, torch.tensor([1 / 9, 1 / 4, 1 / 4, 1 / 4], dtype=torch.float64))


@pytest.mark.parametrize("value", [-1.0, 0.0, math.nan, math.inf])
def test_no_curvature_at_all_is_an_error(value: float) -> None:
    with pytest.raises(TargetError, match="where the ascent ended; give coordinates"):
        factor_of(value * torch.eye(3, dtype=torch.float64))


# -- spread ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [12, 60])
def test_spread_is_the_weighted_covariance_shrunk_where_points_are_few(n: int) -> None:
    x, w = starts(n, 3) @ starts(3, 3, 2), torch.rand(n, generator=torch.Generator().manual_seed(3)).double()
    w = w / w.sum()
    mean, factor = spread(x, w)
    torch.testing.assert_close(mean, (w.unsqueeze(-1) * x).sum(0))
    direct = torch.cov(x.T, aweights=w, correction=0)
    size = float(1 / w.square().sum())
    keep = 1.0 if n == 60 else size / (size + 3)
    shrunk = keep * direct + (1 - keep) * torch.diag(direct.diagonal())
    torch.testing.assert_close(factor @ factor.T, shrunk, rtol=1e-8, atol=1e-8 * float(direct.diagonal().min()))


def test_strong_correlations_survive() -> None:
    """With n points the covariance, whitened, has eigenvalues within (1 +- sqrt(d / n))^2, whatever its condition."""
    dim, n = 10, 512
    _, precision = gaussian(dim, 1e6)
    factor = factor_of(precision)
    _, found = spread(starts(n, dim) @ factor.T)
    whitened = torch.linalg.svdvals(torch.linalg.solve(factor, found))
    assert float(whitened[0]) < 1 + 1.3 * math.sqrt(dim / n)
    assert float(whitened[-1]) > 1 - 1.3 * math.sqrt(dim / n)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_fewer_points_than_coordinates_still_give_a_factor(n: int) -> None:
    mean, factor = spread(starts(n, 8))
    assert bool(torch.isfinite(mean).all() & torch.isfinite(factor).all())
    assert bool((factor.diagonal() > 0).all())


def test_coordinates_of_very_different_units_keep_their_own() -> None:
    units = torch.tensor([1e6, 1.0, 1e-6], dtype=torch.float64)
    _, factor = spread(starts(4000, 3) * units)
    # Widths have a relative error of 1 / sqrt(2 n) = 1.1 %.
    torch.testing.assert_close(factor.diagonal() / units, torch.ones(3, dtype=torch.float64), atol=0.05, rtol=0)


# -- coordinates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("condition", [1.0, 1e6])
def test_laplace_makes_a_gaussian_standard(condition: float) -> None:
    target, _ = gaussian(5, condition)
    seen = Laplace().choose(target, torch.Generator().manual_seed(0), torch.float64)
    z = starts(50, 5)
    value = seen.log_prob(z) + 0.5 * z.square().sum(-1)
    assert float(value.std()) < 1e-3
    torch.testing.assert_close(seen.score(z), -z, atol=1e-3, rtol=1e-3)


def test_laplace_takes_the_best_of_its_modes() -> None:
    seen = Laplace(starts=16, radius=5.0).choose(TwoModes(), torch.Generator().manual_seed(0), torch.float64)
    assert float(seen.loc) == pytest.approx(5.0, abs=0.01)
    assert float(seen.scale.abs()) == pytest.approx(1.0, abs=0.01)


def test_laplace_refuses_what_has_no_peak() -> None:
    with pytest.raises(TargetError, match=r"give coordinates \(loc and scale\)"):
        Laplace(steps=20).choose(Target(lambda x: x.sum(-1), 2), torch.Generator().manual_seed(0), torch.float64)


def test_given_coordinates_are_taken_as_they_are() -> None:
    seen = Affine(1.0, 2.0).choose(Target(lambda x: -x.square().sum(-1), 2), torch.Generator(), torch.float64)
    assert seen.loc.tolist() == [1.0, 1.0]
    assert float(seen.scale) == 2.0
    assert seen.evaluations.total == 0


@pytest.mark.parametrize("settings", [{"starts": 0}, {"steps": 0}, {"radius": 0.0}])
def test_settings_that_do_not_fit(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="Laplace"):
        Laplace(**settings)  # type: ignore[arg-type]
