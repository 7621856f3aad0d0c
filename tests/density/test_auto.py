"""The method that chooses: what it sees, what it picks and why, and that its draws are those of the target."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from undrift.density import (
    SMC,
    Affine,
    Auto,
    Draws,
    Geometric,
    StudentT,
    Survey,
    Target,
    survey,
)
from undrift.density.targets import EightSchools, Funnel, Gaussian, LogisticRegression, Mixture40, TwoModes

QUICK = Auto(walkers=32, levels=60, ascents=9, scouts=2)


def look(target: Target, seed: int = 0) -> Survey:
    return survey(target, torch.Generator().manual_seed(seed), walkers=48, levels=150, ascents=12)


def far(x: Tensor) -> Tensor:
    return -0.5 * ((x - 1000) / 5).square().sum(-1)


def near_truth(draws: Draws, truth: float) -> bool:
    assert draws.log_z is not None
    assert draws.log_z_std_error is not None
    return abs(draws.log_z - truth) < 4 * draws.log_z_std_error


# -- the survey --------------------------------------------------------------------------------------------------------


def test_two_modes_are_two_peaks_with_their_shares() -> None:
    seen = look(TwoModes())
    assert seen.relevant == 2
    assert not seen.unsettled
    # Laplace is exact for a mixture of Gaussians ten deviations apart; the heaviest comes first.
    assert seen.shares.tolist() == pytest.approx([0.9, 0.1], abs=1e-4)
    assert seen.peaks.squeeze(-1).tolist() == pytest.approx([5.0, -5.0], abs=1e-2)


@pytest.mark.parametrize("target", [EightSchools(), LogisticRegression(), Gaussian(dim=5, condition=1e4)], ids=repr)
def test_posteriors_with_one_peak_have_one(target: Target) -> None:
    seen = look(target)
    assert (seen.relevant, seen.unsettled) == (1, False)
    assert seen.factor is not None
    score = target.score(seen.peaks[:1])[0]
    assert float((seen.factor.T @ score).square().sum()) < 0.02  # twice the nats that are left to climb


def test_a_funnel_is_unsettled() -> None:
    seen = look(Funnel())
    assert seen.unsettled
    assert seen.relevant == 0
    assert seen.factor is None


def test_what_has_no_curvature_is_seen_without_the_explorer() -> None:
    box = Target(lambda x: torch.where((x.abs() < 1).all(-1), 0.0 * x.sum(-1), -math.inf), 2)
    assert look(box).explored is None


# -- the choice --------------------------------------------------------------------------------------------------------


def test_one_peak_is_left_from_by_sequential_monte_carlo() -> None:
    target = Gaussian(dim=3, loc=2.0)
    method, why = Auto().choose(target, look(target))
    assert isinstance(method.path, Geometric)
    assert isinstance(method.path.base, StudentT)
    assert isinstance(method.coordinates, Affine)
    torch.testing.assert_close(method.coordinates.loc, torch.full((3,), 2.0, dtype=torch.float64), atol=1e-3, rtol=0)
    assert "One peak was found" in why


def test_several_peaks_are_spanned() -> None:
    target = TwoModes()
    method, why = Auto().choose(target, look(target))
    assert isinstance(method.coordinates, Affine)
    assert isinstance(method.path.start.std, float)
    view = target.affine(method.coordinates.loc, method.coordinates.scale)
    reach = float(view.to_z(torch.tensor([[-5.0], [5.0]]).double()).abs().max()) / method.path.start.std
    assert reach < 2  # deviations of the start law
    assert "2 peaks were found (the heaviest with about 90% of the mass" in why


def test_a_funnel_is_tempered() -> None:
    method, why = Auto().choose(Funnel(), look(Funnel()))
    assert isinstance(method.path, Geometric)
    assert isinstance(method.path.base, StudentT)
    assert "100% of the ascents found no peak to rest on" in why
    assert "parallel tempering" in why


@pytest.mark.parametrize("settings", [{"walkers": 0}, {"levels": 1}, {"ascents": 2}, {"scouts": -1}])
def test_settings_that_do_not_fit(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"Auto: {next(iter(settings))} must be at least"):
        Auto(**settings)  # type: ignore[arg-type]


# -- the draws ---------------------------------------------------------------------------------------------------------


def test_scouts_widen_the_start_until_it_covers_forty_modes() -> None:
    draws = Auto().run(Mixture40(), 800)
    assert near_truth(draws, 0.0)
    shares = draws.mode_weights()
    assert shares is not None
    assert float((shares > 0).double().mean()) > 0.9
    assert not draws.notes


def test_evidence_and_weights_of_two_modes() -> None:
    target = TwoModes()
    draws = Auto().run(target, 800)
    assert draws.target is target
    assert near_truth(draws, 0.0)
    light, error = draws.expectation((draws.x[:, 0] < 0).double())
    assert abs(float(light) - 0.1) < 4 * float(error)


NO_CURVATURE = {
    "Laplace's law": (lambda x: -x.abs().sum(-1), 2 * math.log(2)),
    "a wide prior on a wall": (
        lambda x: torch.where((x > 0).all(-1), -x.sum(-1) - 0.1 * x.square().sum(-1), -math.inf),
        2 * math.log(math.sqrt(10 * math.pi) * math.exp(2.5) * 0.5 * math.erfc(math.sqrt(2.5))),
    ),
}


@pytest.mark.parametrize("name", NO_CURVATURE)
def test_kinks_and_walls(name: str) -> None:
    log_prob, truth = NO_CURVATURE[name]
    target = Target(log_prob, 2)
    # The start that is fitted serves parallel tempering, which walls are left to, and sequential Monte Carlo.
    method, _, _ = Auto(scouts=2).fit(target, look(target), torch.Generator().manual_seed(0))
    draws = method.run(target, 400)
    assert near_truth(draws, truth)


@pytest.mark.parametrize("auto", [QUICK, Auto(walkers=32, levels=60, ascents=9, coordinates=Affine(1000.0, 5.0))])
def test_a_target_far_away_is_found_or_looked_for_where_told(auto: Auto) -> None:
    draws = auto.run(Target(far, 2), 400)
    assert near_truth(draws, math.log(2 * math.pi * 25))
    mean, error = draws.expectation(draws.x)
    assert bool(((mean - 1000).abs() < 4.5 * error).all())


def test_a_mixture_far_away_needs_to_be_told() -> None:
    def log_prob(x: Tensor) -> Tensor:
        y = (x - 1000) / 5
        return torch.logaddexp(far(x - 20), far(x + 20)) + 0 * y.sum(-1)

    truth = math.log(2) + math.log(2 * math.pi * 25)
    draws = Auto(walkers=64, levels=100, coordinates=Affine(1000.0, 5.0)).run(Target(log_prob, 2), 800)
    assert near_truth(draws, truth)
    assert "2 peaks" in draws.reason


def test_many_coordinates_are_surveyed_without_hessians() -> None:
    dim = 2001
    target = Target(lambda x: -0.5 * (x - 1).square().sum(-1), dim)
    seen = survey(target, torch.Generator().manual_seed(0), walkers=4, levels=5, ascents=3)
    assert (seen.relevant, seen.unsettled, seen.factor) == (1, False, None)
    method, why = Auto().choose(target, seen)
    assert type(method) is SMC
    assert "One peak" in why


def test_same_seed_same_draws() -> None:
    first, same, other = (QUICK.run(TwoModes(), 64, seed, repeats=4) for seed in (1, 1, 2))
    assert torch.equal(first.states, same.states)
    assert first.evaluations == same.evaluations
    assert not torch.equal(first.states, other.states)


@pytest.mark.parametrize("name", ["two modes", "one peak"])
def test_an_interruption_leaves_no_trace(name: str, tmp_path: Path) -> None:
    law = {"two modes": TwoModes(), "one peak": Gaussian(dim=2, loc=1.0)}[name]
    whole = QUICK.run(law, 64, 3, repeats=4)
    budget = [0]

    def log_prob(x: Tensor) -> Tensor:
        budget[0] -= len(x)
        if budget[0] < 0:
            raise KeyboardInterrupt
        return law.log_prob(x)

    target = Target(log_prob, law.dim, score=law.score, name=law.name)
    for share in (0.1, 0.6, 0.97):
        budget[0] = 10**9
        start = budget[0]
        assert torch.equal(QUICK.run(target, 64, 3, repeats=4).states, whole.states)
        asked = start - budget[0]
        file = tmp_path / f"{share}"
        budget[0] = int(share * asked)
        with pytest.raises(KeyboardInterrupt):
            QUICK.run(target, 64, 3, repeats=4, checkpoint=file)
        kept = file.exists() or Path(f"{file}.again").exists()
        assert kept or share < 0.9
        budget[0] = 10**9
        resumed = QUICK.run(target, 64, 3, repeats=4, checkpoint=file)
        assert torch.equal(resumed.states, whole.states)
        assert resumed.log_z == whole.log_z
        # What was asked before the interruption counts; at most what the checkpoint's own look takes is new.
        assert whole.evaluations.total <= resumed.evaluations.total + 64 * 20
        assert not list(tmp_path.iterdir())
