"""undrift density, in-process: what it writes, a density of one's own, short names, going on, and how it fails."""

from __future__ import annotations

import importlib
import itertools
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import yaml

from undrift.cli import main
from undrift.cli.arguments import parse
from undrift.cli.density import DensityRun, import_target
from undrift.config import ConfigError, build, describe
from undrift.density import (
    AIS,
    MCMC,
    SMC,
    Affine,
    Bounds,
    DilationLangevin,
    ImportanceSampling,
    Langevin,
    Method,
    StudentT,
    Target,
    path,
)
from undrift.density.archive import load_draws
from undrift.density.targets import Funnel, Mixture9

FAST = ["--method", "ais", "--method.levels.count", "10", "--n", "64", "--repeats", "4", "--progress", "false"]

MODEL = """
import torch
from torch.distributions import constraints
from undrift.density import Target

calls = []
number = 3

def log_prob(x):
    calls.append(x.dtype)
    return -0.5 * ((x - 7) / 2).square().sum(-1)

def broken(x):
    return x @ torch.ones(5)

def summed(x):
    return -x.square().sum()

def steep(x):
    return 1e8 * x[:, 0] ** 4

def posterior():
    return Target.constrained(lambda v: -v["tau"], {"tau": constraints.positive}, name="exponential")

def nothing():
    return None

def fails():
    raise RuntimeError("no data")

class Models:
    ready = posterior()
"""


_count = itertools.count()


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current directory with a module of a new name, so that none is cached from another test."""
    name = f"model_{next(_count)}"
    (tmp_path / f"{name}.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    return name


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "nine"
    assert main(["density", "mixture9", *FAST, "--method.path.base.std", "5", "--out", str(out)]) == 0
    return out


def test_a_complete_folder(run_folder, capsys):
    summary = json.loads((run_folder / "summary.json").read_text())
    assert summary["target"] == "Mixture9"
    assert summary["draws"] == {"repeats": 4, "walkers": 16, "states": 1, "total": 64}
    assert summary["true_log_z"] == 0.0
    config = yaml.safe_load((run_folder / "config.yaml").read_text())
    assert config["method"]["type"] == "AIS"
    assert config["method"]["path"]["base"]["std"] == 5
    draws = load_draws(run_folder / "draws.safetensors")
    assert draws.log_z == summary["log_z"]
    assert isinstance(draws.target, Mixture9)
    assert not (run_folder / "state.safetensors").exists(), "nothing is left to resume"
    assert json.loads((run_folder / "run.json").read_text())["command"][:3] == ["undrift", "density", "mixture9"]
    page = (run_folder / "report.html").read_text()
    assert "undrift density mixture9" in page
    (run_folder / "report.html").unlink()
    assert main(["report", str(run_folder)]) == 0
    assert (run_folder / "report.html").read_text() == page


def test_bounds_are_printed_below_the_evidence(run_folder, monkeypatch, tmp_path, capsys):
    def bounded(self, *args, **options):
        return replace(load_draws(run_folder / "draws.safetensors"), bounds=Bounds(-0.1, 0.01, 0.04, 0.02, 0.912))

    monkeypatch.setattr(AIS, "run", bounded)
    assert main(["density", "mixture9", *FAST, "--out", str(tmp_path / "run")]) == 0
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("ELBO -0.1000 ± 0.0100, EUBO 0.0400 ± 0.0200, forward ESS 0.912")
    assert lines[at - 1].startswith("log Z ")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["bounds"]["eubo"] == 0.04


def test_the_written_configuration_repeats_the_run(run_folder, tmp_path, capsys):
    again = tmp_path / "again"
    assert main(["density", "--config", str(run_folder / "config.yaml"), "--out", str(again)]) == 0
    first, second = (load_draws(f / "draws.safetensors") for f in (run_folder, again))
    assert torch.equal(first.states, second.states)
    printed = capsys.readouterr().out
    assert "x[0] " in printed
    assert "the target's is 0.0000" in printed
    assert "warning: The weights leave" in printed


# -- a density of the user's own ---------------------------------------------------------------------------------------


def test_a_function_of_the_current_directory_with_its_centre_and_scale(here, tmp_path, capsys):
    call = ["density", "--log-prob", f"{here}:log_prob", "--dim", "3", "--loc", "7", "--scale", "2", *FAST]
    assert main([*call, "--dtype", "float32", "--out", "o"]) == 0
    summary = json.loads((tmp_path / "o" / "summary.json").read_text())
    # In these coordinates the target is the start law: all weights are equal, and log Z = 1.5 log(2 pi 4).
    assert summary["log_z"] == pytest.approx(1.5 * 3.2241715, abs=1e-4)
    assert summary["ess"] == pytest.approx(64, abs=1e-3)
    assert load_draws(tmp_path / "o" / "draws.safetensors").states.dtype == torch.float32
    assert torch.float32 in importlib.import_module(here).calls
    # The report is written again without the function.
    assert main(["report", "o"]) == 0


@pytest.mark.parametrize("name", ["posterior", "Models.ready"])
def test_a_target_or_what_makes_one_needs_no_dim(name, here):
    target = import_target(f"{here}:{name}")
    assert target.name == "exponential"
    assert target.labels == ["tau"]
    with pytest.raises(ConfigError, match=r"dim: .* is a target of 1 coordinates, got 4; leave dim out"):
        import_target(f"{here}:{name}", 4)


def test_defaults_do_not_turn_a_density_into_a_factory(here, tmp_path):
    (tmp_path / f"{here}_b.py").write_text("def f(x=None):\n    return -x.square().sum(-1)\n")
    assert import_target(f"{here}_b:f", 2).dim == 2


WRONG = {
    "neither": ([], "target: give a benchmark target by name, as in --target funnel"),
    "both": (["--target", "funnel", "--log-prob", "M:log_prob"], "log_prob: give either target or log_prob"),
    "no module": (["--log-prob", "no_such_module_here:f"], "no module 'no_such_module_here' in"),
    "no submodule": (["--log-prob", "M.sub:f"], "log_prob: "),
    "no colon": (["--log-prob", "M.py"], "is not module:name, such as my_module:log_prob"),
    "no attribute": (["--log-prob", "M:log_pro", "--dim", "3"], "has no attribute 'log_pro'; it has Target, log_prob"),
    "not callable": (["--log-prob", "M:number", "--dim", "3"], "is a int, not a function"),
    "no dim": (["--log-prob", "M:log_prob"], "dim: the number of coordinates of M:log_prob is needed"),
    "dim of a benchmark": (["--target", "funnel", "--dim", "3"], "dim: is for log_prob"),
    "not a target": (["--log-prob", "M:nothing"], "takes no arguments and returned a NoneType"),
    "a factory that fails": (["--log-prob", "M:fails"], "failed: RuntimeError: no data (M.py, line 29)"),
    "a density that fails": (["--log-prob", "M:broken", "--dim", "3"], "failed at points of shape (2, 3): RuntimeErr"),
    "a density that sums the batch": (["--log-prob", "M:summed", "--dim", "3"], "the batch dimension was summed"),
    "a target that does not exist": (["--target", "tunnel"], "target.type: unknown 'tunnel' (did you mean 'Funnel'?)"),
    "two that a name may mean": (["--target", "funnel", "--method", "annea"], "method.type: unknown 'annea'"),
    "coordinates twice": (
        ["--target", "funnel", "--method.coordinates", "affine", "--loc", "3"],
        "loc: method.coordinates is given as well",
    ),
    "no such device": (["--target", "funnel", "--device", "gpu7"], "device: gpu7 with float64 is not at hand"),
    "fewer draws than repeats": (["--target", "funnel", "--n", "3"], "n: expected at least one draw a repeat"),
    "a scale of nothing": (["--target", "funnel", "--scale", "0"], "scale: expected a positive number"),
    "nothing to resume": (["--target", "funnel", "--resume"], "resume: o holds no run to resume"),
    "a setting out of range": (["--target", "funnel", "--target.dim", "1"], "target: Funnel: dim must be at least 2"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_named_and_exits_with_status_2(case, here, tmp_path, capsys):
    words, message = WRONG[case]
    call = [w.replace("M", here) if w.startswith("M") else w for w in words]
    assert main(["density", *call, "--out", "o", "--progress", "false"]) == 2
    captured = capsys.readouterr()
    assert message.replace("M:", f"{here}:").replace("(M.", f"({here}.") in captured.err
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "o").exists(), "nothing was written"


def test_a_module_that_does_not_run_says_where(here, tmp_path, capsys):
    (tmp_path / f"{here}_c.py").write_text("import torch\n\nx = torch.ones(3) @ torch.ones(4)\n")
    (tmp_path / f"{here}_d.py").write_text("def f(:\n")
    (tmp_path / f"{here}_e.py").write_text("import not_installed_at_all\n")
    for ending, words in (("c", f"({here}_c.py, line 3)"), ("d", "SyntaxError"), ("e", "No module named 'not_inst")):
        assert main(["density", "--log-prob", f"{here}_{ending}:f", "--dim", "2"]) == 2
        assert words in capsys.readouterr().err


def test_a_run_that_leaves_the_numbers_fails_with_status_1(here, tmp_path, capsys):
    flags = [
        "--method",
        "langevin",
        "--method.step",
        "fixed",
        "--method.step.relative",
        "5",
        "--method.smoothness",
        "1",
    ]
    assert main(["density", "--log-prob", f"{here}:steep", "--dim", "2", *flags, "--n", "64", "--progress=false"]) == 1
    assert "left the numbers" in capsys.readouterr().err


# -- going on ----------------------------------------------------------------------------------------------------------


class Halt(Target):
    """A target that is interrupted, as by Ctrl-C, once its gradients reach a number."""

    def __init__(self, stop: int | None) -> None:
        super().__init__(lambda x: -0.5 * x.square().sum(-1), 2, name="halt")
        self.stop = stop

    def log_prob_and_score(self, x):
        if self.stop is not None and self.evaluations.gradients > self.stop:
            raise KeyboardInterrupt
        return super().log_prob_and_score(x)


def test_an_interrupted_run_is_not_lost_nor_overwritten(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("undrift.cli.density.write_report", lambda out: out)
    flags = ["--log-prob", "anything:at_all", *FAST]
    monkeypatch.setattr(DensityRun, "open_target", lambda self: Halt(None))
    assert main(["density", *flags, "--out", str(tmp_path / "whole")]) == 0
    out = tmp_path / "halves"
    monkeypatch.setattr(DensityRun, "open_target", lambda self: Halt(1500))
    assert main(["density", *flags, "--out", str(out)]) == 130
    assert (out / "state.safetensors").exists()
    capsys.readouterr()
    monkeypatch.setattr(DensityRun, "open_target", lambda self: Halt(None))
    assert main(["density", *flags, "--out", str(out)]) == 2
    message = capsys.readouterr().err
    assert "--resume goes on with it" in message
    assert "--overwrite starts anew" in message
    assert main(["density", *flags, "--seed", "5", "--resume", "--out", str(out)]) == 2
    assert "another target, method, n, repeats or seed" in capsys.readouterr().err
    assert main(["density", "--config", str(out / "config.yaml"), "--resume"]) == 0
    whole, halves = (load_draws(f / "draws.safetensors") for f in (tmp_path / "whole", out))
    assert torch.equal(whole.states, halves.states)
    assert torch.equal(whole.log_weights, halves.log_weights)
    assert not (out / "state.safetensors").exists()
    assert main(["density", *flags, "--resume", "--out", str(out)]) == 2
    assert "holds a complete run" in capsys.readouterr().err
    assert main(["density", *flags, "--out", str(out)]) == 2
    assert "already holds a run (draws.safetensors, summary.json" in capsys.readouterr().err
    assert main(["density", *flags, "--out", str(out), "--overwrite"]) == 0


# -- names and settings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("short", "full"),
    {
        "dilation": DilationLangevin,
        "smc": SMC,
        "AIS": AIS,
        "mcmc": MCMC,
        "langevin": Langevin,
        "importance": ImportanceSampling,
    }.items(),
)
def test_short_names_of_methods(short, full):
    assert type(parse(DensityRun, ["funnel", "--method", short])[0].method) is full


def test_short_names_of_methods_by_a_word_within():
    for name in ("tempering", "parallel"):
        assert describe(build(name, Method))["type"] == "ParallelTempering"


def test_flags_below_a_short_name_start_from_that_class():
    flags = ["funnel", "--target.dim", "20", "--method", "dilation", "--method.path.base", "student"]
    run, _ = parse(DensityRun, [*flags, "--method.path.base.df", "3", "--method.step.relative", "0.5"])
    assert isinstance(run.target, Funnel)
    assert run.target.dim == 20
    assert describe(run.method.path) == describe(type(run.method.path)(base=StudentT(df=3.0)))
    assert run.method.step.relative == 0.5
    assert run.method.levels.count == 1000


@dataclass(frozen=True, eq=False)
class _Family:
    """A family for these tests."""


@dataclass(frozen=True, eq=False)
class Slow(_Family):
    pass


@dataclass(frozen=True, eq=False)
class SlowSteady(_Family):
    pass


@dataclass(frozen=True, eq=False)
class SlowStart(_Family):
    pass


def test_a_beginning_must_be_of_one_member_only():
    names = {"slow": Slow, "slowst": None, "SLOWSTE": SlowSteady, "steady": SlowSteady, "sta": SlowStart, "low": None}
    for name, member in {**names, "st": None, "": None}.items():
        if member is None:
            with pytest.raises(ConfigError, match=r"^type: unknown .*; one of Slow, SlowStart, SlowSteady\.$"):
                build(name, _Family)
        else:
            assert type(build(name, _Family)) is member
    assert describe(build("tempered", path.Path))["type"] == "TemperedDilation"


def test_loc_and_scale_are_coordinates():
    method = parse(DensityRun, ["funnel", "--scale", "3"])[0].in_coordinates()
    assert describe(method.coordinates) == describe(Affine(0.0, 3.0))
    untouched = parse(DensityRun, ["funnel"])[0]
    assert untouched.in_coordinates() is untouched.method


def test_the_current_directory_is_left_off_the_path(here):
    before = list(sys.path)
    import_target(f"{here}:posterior")
    assert sys.path == before
    assert str(Path.cwd()) not in sys.path
