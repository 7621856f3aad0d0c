"""undrift invert that is interrupted: what is said, what is kept, and that it ends as if it had not been."""

from __future__ import annotations

import json
import re
import shlex

import numpy as np
import pytest
import yaml

from undrift.cli import calibrating, invert, main
from undrift.inverse import FieldMixture
from undrift.observe import Observation

LINEAR = ["--observe", "{type: Points, locations: [0.3, 0.6]}", "--grid", "[12]", "--noise.std", "0.2", "--seed", "1"]
QUICK = {
    "pcn": ["--steps", "40", "--chains", "4"],
    "langevin": ["--steps", "30", "--chains", "4", "--step", "0.01"],
    "tempered": ["--particles", "40"],
    "twisted": ["--particles", "30", "--sampler.steps", "12"],
}


def run(*words: object) -> int:
    return main(["invert", *map(str, words), "--progress", "false"])


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(invert, "write_report", lambda out: out)


@pytest.fixture
def calls(monkeypatch):
    """Counts calls of the likelihood and of the prior's denoiser; the one at ``stop`` is interrupted."""
    count = {"calls": 0, "stop": -1}

    def counted(inner):
        def call(*args, **kwargs):
            count["calls"] += 1
            if count["calls"] == count["stop"]:
                raise KeyboardInterrupt
            return inner(*args, **kwargs)

        return call

    for place, name in ((Observation, "log_likelihood"), (FieldMixture, "__call__")):
        monkeypatch.setattr(place, name, counted(getattr(place, name)))
    return count


def same(one, other):
    with np.load(one / "posterior.npz") as a, np.load(other / "posterior.npz") as b:
        assert a.files == b.files
        for name in a.files:
            if name != "about":
                np.testing.assert_array_equal(a[name], b[name])
    left, right = (json.loads((f / "posterior.json").read_text()) for f in (one, other))
    for key in left.keys() - {"seconds", "lead"}:
        assert left[key] == right[key], key


@pytest.mark.parametrize("method", QUICK)
def test_an_interrupted_posterior_is_not_lost_nor_overwritten(method, calls, tmp_path, capsys):
    flags = [*LINEAR, "--method", method, *QUICK[method]]
    whole, out = tmp_path / "whole", tmp_path / "halves"
    assert run(*flags, "--out", whole) == 0
    total = calls["calls"]
    calls |= {"calls": 0, "stop": int(0.6 * total)}
    assert run(*flags, "--out", out) == 130
    said = capsys.readouterr().err
    assert said.startswith(f"undrift: interrupted; saved in {out}. Continue with: undrift invert ")
    again = shlex.split(said.partition("Continue with: ")[2])
    assert again[-1] == "--resume"
    assert sorted(f.name for f in out.iterdir()) == ["config.yaml", "state.safetensors"]
    assert run(*flags, "--out", out) == 2
    assert "holds an interrupted run (state.safetensors); --resume goes on with it, --overwrite starts anew." in (
        capsys.readouterr().err
    )
    assert run(*flags, "--seed", 5, "--resume", "--out", out) == 2
    assert re.search(r"state.safetensors belongs to a run with another .* or seed", capsys.readouterr().err)
    calls |= {"calls": 0, "stop": -1}
    assert main(again[1:]) == 0
    assert calls["calls"] < total
    same(whole, out)
    assert not list(out.glob("state*"))
    assert yaml.safe_load((out / "config.yaml").read_text())["resume"] is False
    assert run(*flags, "--resume", "--out", out) == 2
    assert f"resume: {out} holds a complete run (no state.safetensors)" in capsys.readouterr().err
    assert run(*flags, "--out", out) == 2
    assert "already holds a run (posterior.npz, posterior.json)" in capsys.readouterr().err
    assert run(*flags, "--resume", "--overwrite", "--out", out) == 2
    assert "resume: give either resume or overwrite" in capsys.readouterr().err


def test_a_calibration_goes_on_with_the_truth_it_had_reached(tmp_path, monkeypatch, capsys):
    """Interrupted in the seventh truth: six are not solved again, nor is the problem itself."""
    flags = [*LINEAR, "--method", "twisted", "--particles", 10, "--sampler.steps", 4]
    flags = [*LINEAR, *flags, "--calibrate", 20]
    whole, out = tmp_path / "whole", tmp_path / "halves"
    assert run(*flags, "--out", whole) == 0
    ranked, seen = calibrating._ranked, []

    def counted(one, problem):
        seen.append(one.seed)
        if len(seen) == 7:
            raise KeyboardInterrupt
        return ranked(one, problem)

    monkeypatch.setattr(calibrating, "_ranked", counted)
    assert run(*flags, "--out", out) == 130
    assert "Continue with: " in capsys.readouterr().err
    assert sorted(f.name for f in out.glob("state*")) == ["state-calibration.safetensors", "state.safetensors"]
    assert run(*flags[:-1], 21, "--resume", "--out", out) == 2
    assert (
        "state-calibration.safetensors belongs to a run with another prior, setting or seed" in capsys.readouterr().err
    )
    assert run(*flags, "--resume", "--out", out) == 0
    assert seen[6:] == [seen[6], *[1 + 100 * i for i in range(7, 21)]]
    same(whole, out)
    assert not list(out.glob("state*"))


def test_all_truths_at_once_go_on_too(calls, tmp_path):
    """Chains of the prior's moves, one a truth: their state is that of the calibration."""
    flags = [*LINEAR, "--informed", "false", "--steps", 64, "--chains", 4, "--calibrate", 20]
    assert run(*flags, "--out", tmp_path / "whole") == 0
    calls |= {"stop": calls["calls"] - 12, "calls": 0}
    out = tmp_path / "halves"
    assert run(*flags, "--out", out) == 130
    assert (out / "state-calibration.safetensors").exists()
    calls |= {"calls": 0, "stop": -1}
    assert run(*flags, "--resume", "--out", out) == 0
    assert calls["calls"] < 40
    same(tmp_path / "whole", out)


def test_ctrl_c_within_a_truth_ends_the_calibration(calls, tmp_path):
    """And does not rank half a chain, nor go on with the next truth."""
    flags = [*LINEAR, "--steps", 40, "--chains", 4]
    assert run(*flags, "--out", tmp_path / "alone") == 0
    calls |= {"stop": calls["calls"] + 45, "calls": 0}  # a truth takes more than 40, and its first 13 are not kept
    assert run(*flags, "--calibrate", 20, "--out", tmp_path / "o") == 130
    assert calls["calls"] == calls["stop"]


def test_before_anything_was_done_there_is_nothing_to_go_on_with(calls, tmp_path, capsys):
    calls["stop"] = 1
    assert run(*LINEAR, "--out", tmp_path / "o") == 130
    assert capsys.readouterr().err == "undrift: interrupted.\n"
    assert run(*LINEAR, "--out", tmp_path / "o", "--resume") == 2
    assert "holds no run to resume (no state.safetensors)" in capsys.readouterr().err


def test_a_refused_step_does_not_hold_the_folder(tmp_path, capsys):
    flags = ["--grid", "[12]", "--method", "langevin", "--informed", "false", "--steps", 20, "--out", tmp_path / "o"]
    for _ in range(2):
        assert run(*flags, "--step", 0.5) == 2
        assert "Give --step" in capsys.readouterr().err
