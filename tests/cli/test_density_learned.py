"""undrift density with samplers that learn: every method by name, going on, and drawing from what was kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from undrift._journal import Journal
from undrift.cli import main
from undrift.density import DIS, TrainedSampler
from undrift.density.archive import load_draws
from undrift.density.controlled import ControlledDiffusion, Informed, Training
from undrift.density.targets import Funnel, Gaussian

TINY = [
    "--method.steps", "5", "--method.training.steps", "6", "--method.training.batch", "8",
    "--method.training.record", "2", "--method.control.width", "8", "--method.control.depth", "1",
]  # fmt: skip
RUN = ["--n", "64", "--repeats", "4", "--progress", "false"]


def density(*flags: str) -> int:
    return main(["density", "--target", "gaussian", "--target.log_z", "0.7", "--target.loc", "0.8", *RUN, *flags])


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing figures takes longer than all else here; runs whose report nobody reads go without."""
    monkeypatch.setattr("undrift.cli.density.write_report", lambda out: out / "report.html")


def result(out: Path) -> tuple[dict[str, Any], Tensor]:
    return json.loads((out / "summary.json").read_text()), load_draws(out / "draws.safetensors").states


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("pis", []),
        ("dis", ["--method.process", "cld", "--method.objective.replay", "replay"]),
        ("dds", ["--method.objective", "trajectorybalance"]),
        ("bridge", ["--method.backward.width", "8", "--method.objective.spread", "1.2"]),
        ("cmcd", ["--method.learn", "[noise, levels]", "--method.training.chunk", "2"]),
        ("cmcd", ["--method.resampling.threshold", "0.9", "--method.move", "hmc"]),
    ],
)
def test_every_method_by_name(
    name: str,
    more: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    """The report reads the draws, whoever made them: it is drawn once with bounds, and once without."""
    out, reported = tmp_path / "run", name == "pis" or "--method.move" in more
    if not reported:
        request.getfixturevalue("no_report")
    assert density("--method", name, *TINY, *more, "--out", str(out)) == 0
    printed = capsys.readouterr().out
    summary, states = result(out)
    assert states.shape[:2] == (4, 16)
    assert summary["promise"] == "unbiased"
    page = (out / "report.html").read_text() if reported else ""
    if reported:
        assert "Training" in page
        assert "6 steps" in page
    if "--method.move" in more:
        assert summary["bounds"] is None
        assert "EUBO" not in printed
    else:
        assert summary["bounds"]["elbo"] < summary["bounds"]["eubo"]
        assert "ELBO" in printed
        assert ("EUBO, above log Z" in page) == reported
    assert str(out / "sampler.safetensors") in printed
    sampler = TrainedSampler.load(out / "sampler.safetensors", Gaussian(loc=0.8, log_z=0.7))
    assert type(sampler.method).__name__.lower() == name
    assert [row["step"] for row in sampler.record] == [2, 4, 6]
    assert not (out / "state.safetensors").exists()


def test_a_sampler_draws_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = tmp_path / "again"
    method = DIS(steps=5, control=Informed(width=8, depth=1), training=Training(steps=6, batch=8))
    kept = str(method.run(Gaussian(loc=0.8, log_z=0.7), 64).sampler.save(tmp_path / "sampler.safetensors"))
    assert density("--method", "trained", "--method.path", kept, "--method.steps", "9", "--out", str(again)) == 0
    summary, states = result(again)
    expected = TrainedSampler.load(kept, Gaussian(loc=0.8, log_z=0.7)).draw(64, 0, repeats=4, steps=9)
    assert torch.equal(states, expected.states)
    assert expected.bounds is not None
    assert summary["bounds"]["elbo"] == expected.bounds.elbo
    assert "EUBO, above log Z" in (again / "report.html").read_text()
    assert not (again / "sampler.safetensors").exists(), "nothing was learned"
    capsys.readouterr()
    assert main(["density", "funnel", "--method", "trained", "--method.path", kept, "--out", str(tmp_path / "o")]) == 2
    assert "was trained for Gaussian in 2 dimensions, got Funnel" in capsys.readouterr().err
    missing = ["--method", "trained", "--method.path", str(tmp_path / "none"), "--out", str(tmp_path / "p")]
    assert density(*missing) == 2
    assert "no trained sampler at" in capsys.readouterr().err


@pytest.mark.usefixtures("no_report")
def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the ninth step of twelve, and then while it draws: the same draws as without."""
    flags = ["--method", "dis", *TINY, "--method.training.steps", "12"]
    assert density(*flags, "--out", str(tmp_path / "quiet")) == 0
    out = tmp_path / "run"
    walked = [0]
    walk = ControlledDiffusion.walk

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        walked[0] += 1
        if walked[0] == 9:
            raise KeyboardInterrupt
        return walk(*args, **kwargs)

    def never(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    resume: list[str] = []
    for name, stand_in in (("walk", interrupted), ("walk_back", never)):
        with monkeypatch.context() as patch:
            patch.setattr(ControlledDiffusion, name, stand_in)
            patch.setattr(Journal.__init__, "__defaults__", ("", 0.0))
            with pytest.raises((KeyboardInterrupt, SystemExit)):
                raise SystemExit(density(*flags, *resume, "--out", str(out)))
        resume = ["--resume"]
        assert (out / "state.safetensors").exists()
        assert not (out / "sampler.safetensors").exists()
    with monkeypatch.context() as patch:
        patch.setattr(ControlledDiffusion, "walk", never)  # training is complete
        assert density(*flags, "--resume", "--out", str(out)) == 0
    (one, states), (other, expected) = result(out), result(tmp_path / "quiet")
    assert torch.equal(states, expected)
    assert one["bounds"] == other["bounds"]
    assert not (out / "state.safetensors").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--method", "dis", "--method.steps", "0"], ("method", "steps must be at least 1, got 0")),
        (["--method", "dis", "--method.learn", "[noise]"], ("method", "noise cannot be learned with LogVariance")),
        (["--method", "dis", "--method.learn", "[drift]"], ("method.learn", "drift")),
        (["--method", "dis", "--method.gain", "half"], ("method.gain", "half")),
        (["--method", "dis", "--method.training.batch", "1"], ("method.training", "batch must be at least 2")),
        (["--method", "pis", "--method.objective.spread", "0"], ("method.objective", "spread must be positive")),
        (["--method", "cmcd", "--method.control", "informed"], ("method", "Plain")),
        (["--method", "bridge", "--method.backward", "informed"], ("method", "cannot be guided")),
        (["--method", "dis", "--method.move", "hmc"], ("method", "give resampling")),
        (["--method", "pis", "--method.integrator", "euler"], ("method", "take the exponential integrator")),
        (["--method", "trained"], ("method: Trained needs path",)),
    ],
)
def test_settings_that_do_not_fit_name_the_flag(
    flags: list[str], words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert density(*flags, "--out", str(tmp_path / "run")) == 2
    assert not (tmp_path / "run").exists()
    message = capsys.readouterr().err
    assert "Traceback" not in message
    assert len(message.splitlines()) < 5
    for word in words:
        assert word in message


@pytest.mark.usefixtures("no_report")
def test_short_coordinates(tmp_path: Path) -> None:
    """loc and scale are the method's coordinates, and are kept with the sampler."""
    out = tmp_path / "run"
    flags = ["--method", "pis", *TINY, "--loc", "1", "--scale", "3", *RUN, "--out", str(out)]
    assert main(["density", "--target", "funnel", *flags]) == 0
    sampler = TrainedSampler.load(out / "sampler.safetensors", Funnel())
    assert sampler.loc is not None
    assert sampler.scale is not None
    assert (float(sampler.loc[0]), float(sampler.scale)) == (1.0, 3.0)
