"""Draws on disk and for ArviZ: what comes back is what was written, and an altered or foreign file is refused."""

from __future__ import annotations

import json
import math
from dataclasses import fields

import numpy as np
import pytest
import torch
from torch.distributions import constraints

from undrift.config import describe
from undrift.container import CheckpointError, write_file
from undrift.density import AIS, MCMC, FixedLevels, Geometric, Langevin, Normal, Target, TargetError
from undrift.density.archive import RecordedTarget, load_draws, save_draws, to_arviz
from undrift.density.summary import summarise
from undrift.density.targets import Mixture9, TwoModes


def posterior() -> Target:
    """A scale, log-normal, and a 2 x 2 matrix of normals."""

    def log_prob(v):
        return -v["scale"].log() - 0.5 * v["scale"].log().square() - 0.5 * v["theta"].square().sum((-1, -2))

    spec = {"scale": constraints.positive, "theta": (constraints.real, 2, 2)}
    return Target.constrained(log_prob, spec, log_z=2.5 * math.log(2 * math.pi), name="lognormal")


@pytest.fixture(scope="module")
def runs():
    short = AIS(levels=FixedLevels(20))
    return {
        "weights": short.run(posterior(), 256, repeats=4),
        "chains": MCMC(moves=20, keep=16).run(posterior(), 512, repeats=4),
        "walkers": Langevin(moves=20).run(Mixture9(), 256, repeats=4),
        "modes": AIS(path=Geometric(Normal(5.0)), levels=FixedLevels(20)).run(Mixture9(log_z=1.5), 256, repeats=4),
    }


@pytest.mark.parametrize("name", ["weights", "chains", "walkers", "modes"])
@pytest.mark.parametrize("given", [True, False], ids=["with the target", "without"])
def test_everything_comes_back(name, given, runs, tmp_path):
    draws = runs[name]
    again = load_draws(save_draws(tmp_path / "new" / "draws.safetensors", draws), draws.target if given else None)
    for field in fields(draws):
        old, new = getattr(draws, field.name), getattr(again, field.name)
        if isinstance(old, torch.Tensor):
            assert torch.equal(old, new)
        elif field.name != "target":
            assert old == new, field.name
    assert torch.equal(draws.values, again.values)
    assert {k: v.shape for k, v in draws.parameters().items()} == {k: v.shape for k, v in again.parameters().items()}
    assert again.target.labels == draws.target.labels
    assert summarise(again) == summarise(draws)


def test_a_function_is_not_kept_and_a_benchmark_is(runs, tmp_path):
    alone = load_draws(save_draws(tmp_path / "a", runs["weights"])).target
    assert isinstance(alone, RecordedTarget)
    with pytest.raises(TargetError, match=r"read without their density; give it, as in load_draws\(path, target\)"):
        alone.log_prob(torch.zeros(1, 5))
    built = load_draws(save_draws(tmp_path / "b", runs["modes"])).target
    assert describe(built) == describe(Mixture9(log_z=1.5))
    # What was read without its density can be written again.
    again = load_draws(save_draws(tmp_path / "c", load_draws(tmp_path / "a")))
    assert torch.equal(again.values, runs["weights"].values)


def test_draws_of_another_target_are_refused(runs, tmp_path):
    path = save_draws(tmp_path / "a", runs["modes"])
    with pytest.raises(TargetError, match=r"holds draws of Mixture9, not of TwoModes: dim is 2 there, 1 here"):
        load_draws(path, TwoModes())
    with pytest.raises(TargetError, match=r"settings is .*1\.5.* there, .*0\.0.* here"):
        load_draws(path, Mixture9())


def test_files_that_are_no_draws_are_refused(runs, tmp_path):
    with pytest.raises(FileNotFoundError, match="no draws at"):
        load_draws(tmp_path / "none")
    write_file(tmp_path / "model", {"w": torch.ones(1)}, {"kind": "denoiser"})
    with pytest.raises(CheckpointError, match="holds no draws of a density, but denoiser"):
        load_draws(tmp_path / "model")
    path = save_draws(tmp_path / "a", runs["modes"])
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match="damaged"):
        load_draws(path)


def test_the_summary_is_json_and_says_what_the_draws_say(runs):
    for draws in runs.values():
        summary = summarise(draws)
        assert json.loads(json.dumps(summary, allow_nan=False)) == summary
        assert [row["name"] for row in summary["parameters"]] == draws.target.labels
        assert [row["mean"] for row in summary["parameters"]] == pytest.approx(draws.mean().tolist())
        assert [row["sd"] for row in summary["parameters"]] == pytest.approx(draws.std().tolist())
        assert [row["q95"] for row in summary["parameters"]] == draws.quantile([0.95])[0].tolist()
    assert summarise(runs["walkers"])["log_z"] is None
    assert summarise(runs["modes"])["modes"]["true_weights"] == pytest.approx(9 * [1 / 9])


# -- ArviZ -------------------------------------------------------------------------------------------------------------


def test_chains_keep_their_order_and_parameters_their_shapes(runs):
    draws = runs["chains"]
    data = to_arviz(draws)
    theta = data["posterior"]["theta"]
    assert theta.dims[:2] == ("chain", "draw")
    assert theta.shape == (32, 16, 2, 2)
    assert np.array_equal(theta.values, draws.parameters()["theta"].reshape(32, 16, 2, 2).numpy())
    assert data["posterior"]["scale"].shape == (32, 16)
    assert data["posterior"].attrs["method"] == draws.method


def test_walkers_of_one_state_are_draws_of_their_repeat(runs):
    data = to_arviz(runs["walkers"])
    assert data["posterior"]["x"].shape == (4, 64, 2)
    assert "weighted" not in data.children


def test_weighted_draws_become_as_many_equal_ones_as_they_are_worth(runs):
    draws = runs["weights"]
    data = to_arviz(draws)
    assert data["posterior"]["scale"].shape == (1, int(draws.ess))
    held = data["weighted"]
    assert np.array_equal(held["log_weight"].values, draws.walker_log_weights.numpy())
    assert held["theta"].shape == (4, 64, 2, 2)
    assert data["posterior"].attrs["log_z"] == draws.log_z
    # A resampled mean is that of the weighted draws to within four standard errors of n equal draws.
    mean, sd = float(draws.mean()[0]), float(draws.std()[0])
    assert abs(float(data["posterior"]["scale"].mean()) - mean) < 4 * sd / math.sqrt(int(draws.ess))
