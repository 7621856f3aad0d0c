"""What draws say of themselves, against direct computation: weights, means, errors, quantiles, ESS, evidence."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

from undrift.density import SMC, Draws, Parameters, Target
from undrift.density.targets import Gaussian, TwoModes
from undrift.measure.evidence import log_evidence

arviz = pytest.importorskip("arviz_stats.base", reason="R-hat and ESS of chains need arviz-stats")

REPEATS, WALKERS, LENGTH, DIM = 6, 30, 2, 3
SPACE = Parameters({"mu": constraints.real, "tau": (constraints.positive, 2)})
TARGET = Target(lambda x: -0.5 * x.square().sum(-1), DIM, parameters=SPACE)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weighted(**changes: Any) -> Draws:
    log_w = normal(REPEATS, WALKERS, seed=1) + 500
    given: dict[str, Any] = {
        "target": TARGET,
        "states": normal(REPEATS, WALKERS, LENGTH, DIM),
        "walker_log_weights": log_w,
        "corrected": True,
        "repeat_log_z": log_w.logsumexp(-1) - math.log(WALKERS),
        "promise": "unbiased",
    }
    return Draws(**{**given, **changes})


def chains(**changes: Any) -> Draws:
    """Autoregressions, of which the third coordinate mixes slowest."""
    rho = torch.tensor([0.0, 0.5, 0.9], dtype=torch.float64)
    noise = normal(2, 4, 100, DIM, seed=2)
    x = [noise[:, :, 0]]
    for t in range(1, 100):
        x.append(rho * x[-1] + (1 - rho.square()).sqrt() * noise[:, :, t])
    given: dict[str, Any] = {
        "target": TARGET,
        "states": torch.stack(x, 2),
        "walker_log_weights": None,
        "corrected": True,
    }
    return Draws(**{**given, **changes})


# -- weights and expectations ------------------------------------------------------------------------------------------


def test_weights_belong_to_their_walkers_states() -> None:
    draws = weighted()
    assert draws.walker_log_weights is not None
    w = (draws.walker_log_weights - 500).exp()
    expected = (w / w.sum() / LENGTH).unsqueeze(-1).expand(-1, -1, LENGTH)
    torch.testing.assert_close(draws.weights.reshape(REPEATS, WALKERS, LENGTH), expected)
    assert draws.log_weights is not None
    assert draws.log_z is not None
    assert float(draws.log_weights.logsumexp(0)) - math.log(len(draws.x)) == pytest.approx(draws.log_z)
    equal = chains().weights
    assert float(equal.sum()) == pytest.approx(1)
    assert float(equal.min()) == float(equal.max())


def test_means_are_ratios_of_weighted_sums() -> None:
    draws = weighted()
    f = draws.x.square()
    mean, _ = draws.expectation(f)
    torch.testing.assert_close(mean, (draws.weights.unsqueeze(-1) * f).sum(0))
    scalar, error = draws.expectation(f[:, 0])
    assert (scalar.shape, error.shape) == ((), ())
    assert float(scalar) == pytest.approx(float(mean[0]))
    square, _ = draws.expectation(f.unsqueeze(-1) * f.unsqueeze(-2))
    assert square.shape == (DIM, DIM)


def test_the_standard_error_is_the_delta_method_over_repeats() -> None:
    draws = weighted()
    f = draws.x[:, 0]
    mean, error = draws.expectation(f)
    assert draws.walker_log_weights is not None
    w = (draws.walker_log_weights - 500).exp().double().unsqueeze(-1).expand(-1, -1, LENGTH).reshape(REPEATS, -1)
    top, bottom = (w * f.reshape(REPEATS, -1)).mean(1), w.mean(1)
    # ratio = top / bottom: variance (g' C g) / R with the gradient (1, -ratio) / bottom and C between repeats.
    covariance = torch.cov(torch.stack([top, bottom]))
    gradient = torch.stack([torch.ones(()).double(), -mean]) / bottom.mean()
    assert float(error) == pytest.approx(math.sqrt(float(gradient @ covariance @ gradient) / REPEATS))


def test_the_standard_error_of_equal_weights_is_that_of_repeat_means() -> None:
    draws = chains()
    mean, error = draws.expectation(draws.x)
    means = draws.states.mean((1, 2))
    torch.testing.assert_close(mean, means.mean(0))
    torch.testing.assert_close(error, means.std(0) / math.sqrt(2))
    one = dataclasses.replace(draws, states=draws.states[:1])
    assert bool(torch.isnan(one.expectation(one.x)[1]).all())


def test_the_standard_error_covers_the_truth() -> None:
    """z-scores of the mean over many runs have a mean square of a t variable with R - 1 = 7 degrees: 7/5."""
    scores = []
    for seed in range(300):
        states = normal(8, 20, 1, DIM, seed=seed)
        tilt = 0.5 * states[:, :, 0, 0]  # importance weights from N(0, I) to N(0.5 e1, I)
        mean, error = weighted(states=states, walker_log_weights=tilt).expectation(states.reshape(-1, DIM)[:, 1])
        scores.append(float(mean / error))
    # The variance of a squared t_7 variable is about 8.2 (kurtosis 5): 0.17 for the mean of 300.
    assert float(torch.tensor(scores).square().mean()) == pytest.approx(1.4, abs=0.6)


def test_standard_deviations_are_weighted() -> None:
    draws = weighted()
    w = draws.weights.unsqueeze(-1)
    mean = (w * draws.values).sum(0)
    torch.testing.assert_close(draws.mean(), mean)
    torch.testing.assert_close(draws.std(), (w * (draws.values - mean).square()).sum(0).sqrt())


def test_quantiles_invert_the_weighted_distribution_function() -> None:
    draws = weighted()
    levels = (0.0, 0.05, 0.5, 0.95, 1.0)
    found = draws.quantile(levels)
    assert found.shape == (5, DIM)
    for column in range(DIM):
        values = draws.values[:, column]
        for q, at in zip(levels, found[:, column], strict=True):
            assert float(draws.weights[values <= at].sum()) >= q - 1e-12
            assert float(draws.weights[values < at].sum()) <= q + 1e-12
    levels = (0.0, 0.0503, 0.5003, 0.9503, 1.0)  # between the jumps, multiples of 1 / 800
    expected = torch.from_numpy(np.quantile(chains().values.numpy(), levels, axis=0, method="inverted_cdf"))
    torch.testing.assert_close(chains().quantile(levels), expected)


def test_resampling_draws_by_weight() -> None:
    draws = weighted(states=torch.arange(REPEATS * WALKERS * LENGTH).double().reshape(REPEATS, WALKERS, LENGTH, 1),
                     target=Target(lambda x: x.sum(-1), 1))  # fmt: skip
    n = 20_000
    picked = draws.resample(n, 3).squeeze(-1).long()
    count = torch.bincount(picked, minlength=len(draws.x)).double()
    expected = n * draws.weights
    # Pearson's statistic has k - 1 degrees of freedom, variance 2 (k - 1).
    statistic, k = float(((count - expected).square() / expected).sum()), len(expected)
    assert abs(statistic - (k - 1)) < 4 * math.sqrt(2 * k)
    assert torch.equal(picked, draws.resample(n, 3).squeeze(-1).long())
    assert torch.equal(picked, draws.resample(n, torch.Generator().manual_seed(3)).squeeze(-1).long())


# -- evidence, ESS, convergence ----------------------------------------------------------------------------------------


def test_evidence_and_its_error_are_those_of_the_repeats() -> None:
    draws = weighted()
    assert draws.repeat_log_z is not None
    found = log_evidence(draws.repeat_log_z)
    assert (draws.log_z, draws.log_z_std_error) == (found.value, found.std_error)
    assert weighted(repeat_log_z=draws.repeat_log_z[:1]).log_z_std_error is None
    none = chains()
    assert (none.log_z, none.log_z_std_error) == (None, None)


def test_weighted_walkers_have_the_ess_of_kish() -> None:
    draws = weighted()
    assert draws.walker_log_weights is not None
    w = (draws.walker_log_weights - 500).exp()
    assert draws.ess == pytest.approx(float(w.sum() ** 2 / w.square().sum()))
    assert draws.rhat is None
    assert draws.chain_ess is None


def test_chains_have_the_ess_and_rhat_of_arviz() -> None:
    draws = chains()
    array = draws.values.reshape(8, 100, DIM).numpy()
    for column in range(DIM):
        one = array[:, :, column]
        rhat = arviz.array_stats.rhat(one, chain_axis=0, draw_axis=1)
        ess = arviz.array_stats.ess(one, chain_axis=0, draw_axis=1, method="bulk")
        assert draws.rhat is not None
        assert draws.chain_ess is not None
        assert float(draws.rhat[column]) == pytest.approx(float(rhat))
        assert float(draws.chain_ess[column]) == pytest.approx(float(ess))
    assert draws.ess == pytest.approx(float(draws.chain_ess.min()))  # type: ignore[union-attr]
    # An autoregression of rho = 0.9 is worth (1 - rho) / (1 + rho) of its length; 800 states are 42, give or take.
    assert 20 < draws.ess < 90  # type: ignore[operator]


def test_what_cannot_be_known_is_none() -> None:
    short = chains(states=normal(2, 4, 3, DIM))
    assert (short.rhat, short.chain_ess, short.ess) == (None, None, None)
    assert chains(corrected=False).ess is None


# -- scales and names --------------------------------------------------------------------------------------------------


def test_parameters_are_on_their_own_scale() -> None:
    draws = weighted()
    named = draws.parameters()
    torch.testing.assert_close(named["tau"], draws.x[:, 1:].exp())
    torch.testing.assert_close(draws.values, torch.cat([draws.x[:, :1], draws.x[:, 1:].exp()], -1))
    assert draws.target.labels == ["mu", "tau[0]", "tau[1]"]


def test_parameters_of_an_affine_view_are_those_of_the_target() -> None:
    view = TARGET.affine(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 0.5, 1.0]))
    draws = weighted(target=view)
    inside = weighted(states=view.to_x(draws.x).reshape(draws.states.shape))
    torch.testing.assert_close(draws.values, inside.values)
    torch.testing.assert_close(draws.values[:, 1:].reshape(-1, 2), draws.parameters()["tau"])
    torch.testing.assert_close(draws.quantile([0.5]), inside.quantile([0.5]))


def test_mode_weights_are_shares_of_weight() -> None:
    target = TwoModes()
    states = torch.tensor([-5.0, 5.0, 5.0]).double().reshape(1, 3, 1, 1)
    log_w = torch.tensor([[2.0, 5.0, 3.0]]).double().log()
    draws = weighted(target=target, states=states, walker_log_weights=log_w)
    found = draws.mode_weights()
    assert found is not None
    low = int(target.assign(torch.tensor([[-5.0]]).double()))
    assert float(found[low]) == pytest.approx(0.2)
    assert weighted().mode_weights() is None


@pytest.mark.parametrize("build", [weighted, chains])
def test_draws_come_back_from_disk(build: Any, tmp_path: Path) -> None:
    draws = build(method="how", reason="why", notes=("a note",))
    path = draws.save(tmp_path / "draws.safetensors")
    back = Draws.load(path, TARGET)
    assert torch.equal(back.states, draws.states)
    assert torch.equal(back.values, draws.values)
    assert torch.equal(back.weights, draws.weights)
    assert (back.method, back.reason, back.notes, back.log_z) == ("how", "why", ("a note",), draws.log_z)
    assert (back.ess, back.promise) == (draws.ess, draws.promise)


def test_draws_say_what_they_are_in_a_line() -> None:
    draws = SMC().run(Gaussian(dim=2), 64, seed=0, repeats=4)
    line = repr(draws)
    assert line.startswith("<64 draws of Gaussian in 2 dimensions by SMC")
    assert f"log Z {draws.log_z:.4g} ± " in line
    assert f"{draws.evaluations.total} evaluations" in line
