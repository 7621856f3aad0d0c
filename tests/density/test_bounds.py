"""Bounds on log Z, against weights whose law is known, and what they give away of a sampler that was trained."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from undrift.container import read_file, write_file
from undrift.density import Draws, Target
from undrift.density.archive import load_draws, save_draws
from undrift.density.bounds import Bounds, bounds
from undrift.density.summary import summarise
from undrift.density.targets import Gaussian, TwoModes
from undrift.density.trust import warnings
from undrift.density.trust_learned import training

R, M, N = 8, 500, 4000
S = 0.3


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def log_normal(log_z: float, deviation: float, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """log w ~ N(log Z - s^2 / 2, s^2) by the sampler, and so N(log Z + s^2 / 2, s^2) by exact samples."""
    own = log_z - 0.5 * deviation**2 + deviation * normal(R, M, seed=seed)
    return own, log_z + 0.5 * deviation**2 + deviation * normal(N, seed=seed + 100)


def learned(log_w: torch.Tensor | None = None, forward: torch.Tensor | None = None, **changed: Any) -> Draws:
    """Exact draws of a Gaussian in the plane, as a sampler gives them that was trained well."""
    own, exact = log_normal(0.0, S)
    own, exact = (own if log_w is None else log_w), (exact if forward is None else forward)
    settings: dict[str, Any] = {
        "target": Gaussian(),
        "states": normal(*own.shape, 1, 2),
        "walker_log_weights": own,
        "corrected": True,
        "repeat_log_z": own.logsumexp(-1) - math.log(own.shape[1]),
        "promise": "unbiased",
        "method": "DIS",
        "bounds": bounds(own, exact),
        "training": rows(),
    }
    return Draws(**{**settings, **changed})


def rows(count: int = 100, fall: float = 0.0, scatter: float = 0.05) -> tuple[dict[str, Any], ...]:
    """A loss that has come down to 0.1 within the first half, and falls by ``fall`` more within each quarter."""
    noise = scatter * normal(count, seed=3)
    loss = [0.1 + 5 * math.exp(-20 * i / count) + fall * 4 * (1 - i / count) + float(noise[i]) for i in range(count)]
    return tuple({"step": 20 * (i + 1), "loss": v, "gradient_norm": 0.1, "skipped": 0} for i, v in enumerate(loss))


def only(draws: Draws, words: str) -> str:
    """The one warning, which must hold these words."""
    found = warnings(draws)
    assert len(found) == 1, found
    assert words in found[0]
    return found[0]


# -- the numbers -------------------------------------------------------------------------------------------------------


def test_bounds_of_normal_log_weights_are_as_far_from_log_z_as_half_their_variance():
    """log w ~ N(log Z -+ s^2 / 2, s^2): ELBO and EUBO lie s^2 / 2 away, and the effective share is exp(-s^2)."""
    log_z, s = 2.0, 0.5
    found = bounds(*log_normal(log_z, s))
    assert found.elbo_std_error == pytest.approx(s / math.sqrt(R * M), rel=0.05)
    assert found.eubo_std_error == pytest.approx(s / math.sqrt(N), rel=0.05)
    assert abs(found.elbo - (log_z - s**2 / 2)) < 4 * found.elbo_std_error
    assert abs(found.eubo - (log_z + s**2 / 2)) < 4 * found.eubo_std_error
    # 1 / w and w are log-normal, of variance exp(s^2) - 1 over their squared means: log Z and ESS by the delta rule.
    error = math.sqrt(math.expm1(s**2) / N)
    assert abs(found.forward_log_z - log_z) < 4 * error
    assert abs(math.log(found.forward_ess) + s**2) < 4 * 2 * error


def test_forward_numbers_by_hand():
    found = bounds(torch.zeros(2, 2), torch.tensor([1.0, 2.0, 4.0]).log())
    assert (found.elbo, found.elbo_std_error) == (0.0, 0.0)
    assert found.eubo == pytest.approx(math.log(2))
    assert found.forward_log_z == pytest.approx(-math.log((1 + 0.5 + 0.25) / 3))
    assert found.forward_ess == pytest.approx(1 / (1.75 / 3) / (7 / 3))
    assert bounds(torch.zeros(4), torch.full((3,), 700.0)).forward_ess == pytest.approx(1.0)


def test_what_is_not_known_and_what_is_no_number():
    assert bounds(torch.zeros(2, 2)).eubo is None
    assert bounds(torch.tensor([0.0, -math.inf])).elbo == -math.inf
    assert math.isnan(bounds(torch.zeros(1)).elbo_std_error)
    assert math.isnan(bounds(torch.zeros(2), torch.tensor([0.0, math.nan])).eubo)
    with pytest.raises(ValueError, match="log_weights hold NaN"):
        bounds(torch.tensor([0.0, math.nan]))
    with pytest.raises(ValueError, match=r"log_weights of shape \(2, 0\) holds no weights"):
        bounds(torch.zeros(2, 0))


# -- on disk -----------------------------------------------------------------------------------------------------------


def test_bounds_and_training_come_back(tmp_path):
    record = ({"step": 20, "loss": 3.5, "elbo": -math.inf, "ess": None}, {"step": 40, "loss": math.inf, "ess": 0.5})
    draws = learned(training=record, bounds=Bounds(-math.inf, 0.1, 0.2, 0.3, 0.4, None))
    again = load_draws(save_draws(tmp_path / "a", draws))
    assert again.bounds == draws.bounds
    assert again.training == draws.training
    plain = learned(bounds=None, training=())
    assert (load_draws(save_draws(tmp_path / "b", plain)).bounds, plain.training) == (None, ())
    summary = summarise(draws)
    assert summary["bounds"] == {
        "elbo": None, "elbo_std_error": 0.1, "eubo": 0.2, "eubo_std_error": 0.3, "forward_ess": 0.4,
        "forward_log_z": None,
    }  # fmt: skip
    assert summary["training"] == {
        "rows": 2,
        "first": {"step": 20, "loss": 3.5, "elbo": None, "ess": None},
        "last": {"step": 40, "loss": None, "ess": 0.5},
    }
    assert (summarise(plain)["bounds"], summarise(plain)["training"]) == (None, None)


def test_files_written_before_there_were_bounds_are_read(tmp_path):
    path = save_draws(tmp_path / "a", learned())
    tensors, about = read_file(path)
    write_file(path, tensors, {k: v for k, v in about.items() if k not in ("bounds", "training")})
    old = load_draws(path)
    assert (old.bounds, tuple(old.training)) == (None, ())


def test_the_line_names_the_bound():
    assert f"; ELBO {learned().bounds.elbo:.4g}; ESS" in repr(learned())


# -- warnings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_a_sampler_that_was_trained_well_has_no_warning(seed):
    own, exact = log_normal(0.0, S, seed)
    assert warnings(learned(own, exact)) == []
    assert warnings(learned(own, exact, target=Target(lambda x: x.sum(-1), 2, name="unknown"))) == []


def test_a_perfect_control_has_no_warning_for_its_rounding():
    own = 1e-6 * normal(R, M) + 2e-6
    assert warnings(learned(own, own.reshape(-1) - 1e-5, repeat_log_z=1e-7 * normal(R))) == []


def test_elbo_above_log_z_is_impossible_and_explains_log_z():
    """All weights 1 nat too large: log Z is missed as well, and one warning tells both."""
    own, exact = log_normal(1.0, S)
    found = only(learned(own, exact), "nats above the target's log Z, 0:")
    assert f"{float(own.mean()):.3g} nats above" in found
    assert "float64" not in found
    single = learned(own, exact, states=normal(R, M, 1, 2).float())
    assert "run once in float64" in only(single, "above the target's log Z")
    assert not any("ELBO" in w for w in warnings(learned(own, exact, target=Gaussian(log_z=1.0))))


def test_a_log_z_that_is_known_by_an_estimate_has_its_error():
    own, exact = log_normal(1.0, S)
    estimated = Gaussian(log_z=0.9)
    assert "above" in only(learned(own, exact, target=estimated), "ELBO came out")
    object.__setattr__(estimated, "log_z_std_error", 0.1)
    assert warnings(learned(own, exact, target=estimated)) == []


@pytest.mark.parametrize(("target", "whose"), [(Gaussian(), "the target's log Z"), (None, "the estimate of log Z")])
def test_eubo_below_log_z_is_impossible(target, whose):
    own, exact = log_normal(0.0, S)
    target = target or Target(lambda x: x.sum(-1), 2, name="unknown")
    assert "exact samples are not of this density" in only(learned(own, exact - 0.5, target=target), f"below {whose}")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_paths_back_that_leave_the_numbers(value):
    own, exact = log_normal(0.0, S)
    exact[3] = value
    only(learned(own, exact), f"EUBO came out as {value}")
    assert summarise(learned(own, exact))["bounds"]["eubo"] is None


def test_a_mode_that_the_sampler_never_visits():
    """Half of the exact samples lie where log w is 10 higher; the sampler's own weights are even, of mean Z / 2."""
    own, exact = log_normal(math.log(0.5), S)
    exact = exact + 10.0 * (torch.arange(N) % 2)
    known, unknown = learned(own, exact), learned(own, exact, target=Target(lambda x: x.sum(-1), 2, name="unknown"))
    found = only(known, "hardly visits a part of the target")
    assert "a mode is missing, or a tail" in found
    assert f"log Z, {known.log_z:+.3g} from the target's, is that of the rest" in found
    assert "from the target's" not in only(unknown, "hardly visits a part")


def test_a_rare_mode_shows_in_the_forward_ess_alone():
    """2 % of the target at weights e^a higher: EUBO is only .02 a higher, but w is .98 + .02 e^a times as large.

    That is 2.8 for a = 4.5, and 9 for a = 6: the share falls from exp(-S^2) = .91 to a third of it, and to a ninth.
    """
    own, exact = log_normal(0.0, S)
    rare = torch.arange(N) % 50 == 0
    assert warnings(learned(own, exact + 4.5 * rare)) == []
    draws = learned(own, exact + 6.0 * rare)
    assert draws.bounds.eubo < 0.2
    assert draws.bounds.forward_ess == pytest.approx(0.914 / 9 / 0.98, rel=0.05)
    only(draws, f"leave {draws.bounds.forward_ess:.2%} effective draws, and put EUBO")


def test_eubo_alone_tells_too():
    draws = learned()
    high = replace(draws.bounds, forward_ess=None, eubo=draws.log_z + 4.0)
    assert "from exact samples put EUBO 4 above it" in only(replace(draws, bounds=high), "hardly visits")
    noisy = replace(high, eubo_std_error=1.5)
    assert warnings(replace(draws, bounds=noisy)) == []


def test_modes_that_are_known_to_be_lost_are_named_once():
    """All walkers in one of two modes: the target knows its modes, and what exact samples say adds nothing."""
    own, exact = log_normal(math.log(0.5), S)
    target = TwoModes(weight=0.5)
    states = target.modes[1].expand(R, M, 1, 1)
    found = warnings(learned(own, exact + 10.0 * (torch.arange(N) % 2), target=target, states=states))
    assert any("known modes" in w for w in found)
    assert not any("hardly visits" in w for w in found)


def test_uneven_weights_call_for_training_and_are_said_once():
    own, exact = log_normal(0.0, 3.0)
    draws = learned(own, exact, target=Target(lambda x: x.sum(-1), 2, name="unknown"))
    found, gap = warnings(draws), draws.log_z - draws.bounds.elbo
    few = [w for w in found if "effective draws" in w]
    assert len(few) == 1
    assert f"has not been trained long enough (ELBO lies {gap:.3g} nats" in few[0]
    assert not any("than such even weights explain" in w for w in found)
    other = warnings(learned(own, bounds=None, training=(), target=Target(lambda x: x.sum(-1), 2, name="unknown")))
    assert any("bring the start nearer to the target" in w for w in other)


def test_an_elbo_that_few_paths_pull_down():
    own, exact = log_normal(0.0, S)
    own[:, ::50] -= 200.0
    own -= math.log(0.98)
    assert "more than such even weights explain" in only(learned(own, exact), "ELBO lies 4.")
    own[:, ::50] = -math.inf
    assert "paths end where the density is 0" in only(learned(own, exact), "ELBO is -inf")


# -- training ----------------------------------------------------------------------------------------------------------


def uneven() -> Draws:
    """Weights of deviation .8, so that ELBO is .32 below log Z: longer training has something to give."""
    return learned(*log_normal(0.0, 0.8))


def test_a_loss_that_still_falls():
    falling = replace(uneven(), training=rows(fall=0.3))
    assert "Train for more steps" in only(falling, "The loss still fell when training ended")
    assert warnings(replace(uneven(), training=rows(fall=0.02))) == [], "less than it scatters"
    assert warnings(replace(uneven(), training=rows(24, fall=0.3))) == [], "too few rows to tell"
    assert warnings(learned(training=rows(fall=0.3))) == [], "nothing to gain"


def test_level_losses_are_not_said_to_fall():
    """Of 200 level losses of normal, and of heavy-tailed, noise, at most one is: chance is a thousandth."""
    draws = uneven()
    for power in (1, 3):
        called = 0
        for seed in range(200):
            losses = 10 + normal(100, seed=seed) ** power
            record = [{"step": i, "loss": float(v)} for i, v in enumerate(losses)]
            called += bool([*training(replace(draws, training=record))])
        assert called <= 1


@pytest.mark.parametrize("count", [1, 7])
def test_steps_that_were_skipped(count):
    record = [row | {"skipped": count * (i > 50)} for i, row in enumerate(rows())]
    only(replace(uneven(), training=record), f"Training skipped {count} step{'s' if count > 1 else ''} whose")


@pytest.mark.parametrize("key", ["loss", "gradient_norm"])
@pytest.mark.parametrize("value", [math.nan, None])
def test_training_that_ended_without_numbers(key, value):
    record = list(rows())
    record[-1] = record[-1] | {key: value, "skipped": 3}
    found = only(replace(uneven(), training=record), "Training ended without numbers: at step 2000")
    assert "3 steps in all had to be skipped" in found
