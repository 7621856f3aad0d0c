"""undrift design: its numbers are propagate's, its plans run as they are written, nothing finished is done twice."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import yaml
from matplotlib.figure import Figure

from undrift.cli import main
from undrift.cli.candidates import STRANGE, Candidate, chosen, memoryless, pairs
from undrift.cli.design import DesignRun
from undrift.cli.design_plans import optimised
from undrift.cli.design_task import Task
from undrift.config import build, describe
from undrift.design.gaussian import propagate, strangeness
from undrift.design.optimise import family, optimise
from undrift.design.spectrum import Spectrum
from undrift.process import CLD, PSLD, VP, LearnedProcess, LinearProcess
from undrift.report import JsonLines, read_npz
from undrift.sample import SSCS, Ancestral, DPMSolver2M, Exponential, Grid, Heun, LogSigma, Sampler
from undrift.train import Digits

TINY = "{type: UNet, channels: 1, size: 8, width: 8, multipliers: [1, 1], attention: false}"
SMALL = [
    *["--processes", "[VP, FlowMatching]", "--samplers", "[Ancestral, SSCS, DPMSolver2M]"],
    *["--grids", "[LogSigma, {type: Published, table: ays-sd15}]", "--calls", "[3, 4]"],
    *["--iterations", "2", "--top", "1"],
]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "digits"
    steps = ["--train.steps", "3", "--train.batch", "16", "--progress", "false", "--samples", "4"]
    assert main(["train", "--data", "Digits", "--network", TINY, *steps, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def designed(run_folder, tmp_path_factory):
    """A design with a run: optimised, searched, and measured. Digits without labels are measured by sliced W2."""
    place = tmp_path_factory.mktemp("design")
    for split in ("train", "test"):
        np.savez(place / f"{split}.npz", x=Digits(split).load().x.numpy())
    source = [
        "--data",
        f"{{type: Npz, path: {place}/train.npz}}",
        "--holdout",
        f"{{type: Npz, path: {place}/test.npz}}",
    ]
    out = place / "all"
    call = ["design", str(run_folder), *SMALL, *source, "--channels", "[1]", "--verify", "100", "--out", str(out)]
    with pytest.MonkeyPatch.context() as undrawn:  # figures are made, and drawn in the tests of the report
        undrawn.setattr(Figure, "savefig", lambda self, file, **settings: file.write(b"a picture"))
        assert main(call) == 0
    assert (out / "report.html").read_text().count("<img") == 6
    return call, out


def spectrum() -> Spectrum:
    data = Digits().load()
    return Spectrum.of(data.x, name=data.name).grouped(64)


def test_predictions_are_those_of_propagate_and_ranked(designed):
    _, out = designed
    about = json.loads((out / "design.json").read_text())
    data = spectrum()
    deviation = float((data.variance * data.count).sum() / data.dim) ** 0.5
    assert about["resolution"] == pytest.approx(0.01 * deviation, rel=1e-12)
    assert {row["kind"] for row in about["plans"]} == {"classical", "optimised", "searched"}
    for row in about["plans"]:
        process = build(row["settings"]["process"], LinearProcess)
        plan = build(row["settings"]["sampler"], Sampler).plan(process)
        law = propagate(plan, data)
        assert plan.calls == row["calls"] <= row["budget"]
        # The same arithmetic on the same numbers: times are stored in full, levels of a grid to rounding.
        assert row["w2"] == pytest.approx(float(law.w2), rel=1e-9)
        assert row["kl"] == pytest.approx(float(law.smoothed(about["resolution"]).kl), rel=1e-9)
        first = memoryless(build(row["settings"]["sampler"], Sampler))
        other = law if first is None else propagate(first.plan(process), data)
        assert row["rank"] == pytest.approx(math.sqrt(float(law.w2) * float(other.w2)), rel=1e-9)
        assert row["strangeness"] == pytest.approx(float(strangeness(plan, data).sum()), rel=1e-9)
        assert row["trusted"] == (row["strangeness"] <= STRANGE)
    for n in (3, 4):
        rows = [row for row in about["plans"] if row["budget"] == n]
        assert [row["rank"] for row in rows] == sorted(row["rank"] for row in rows)
        # 5 pairs that exist (SSCS does not split flow matching) on 2 grids.
        assert sum(row["kind"] == "classical" for row in rows) == 10
        used = about["plans"][about["budgets"][str(n)]["use"]]
        trusted = [row for row in rows if row["trusted"]] or rows
        assert used["rank"] == min(row["rank"] for row in trusted)
        base = about["plans"][about["budgets"][str(n)]["best"]["classical"]]
        assert base["gain"] == 1
        assert used["gain"] == pytest.approx(base["rank"] / used["rank"])


@pytest.mark.parametrize(
    ("sampler", "by"),
    [
        (DPMSolver2M(3, LogSigma()), Exponential(3, order=1)),
        (Exponential(3, LogSigma(), "none", order=2), Exponential(3, None, "none", order=1)),
        (Ancestral(3, LogSigma()), Ancestral(3)),
    ],
)
def test_samplers_that_remember_walk_levels_found_by_order_one(sampler, by, tmp_path):
    """And those without memory their own."""
    run, data, log = DesignRun(iterations=2, grids=[LogSigma(0.05)]), Digits().load(), JsonLines(tmp_path / "log.jsonl")
    task = Task(run, tmp_path, spectrum(), 0.01, None, data, None, log)
    pair = Candidate.of("classical", 4, VP(), sampler, task.spectrum, 0.01, grid="LogSigma")
    found = optimised(task, pair)
    starts = [build(start, Grid) for start in log.rows[0]["settings"]["starts"]]
    design = optimise(VP(), by, family(task.spectrum), starts=starts, iterations=2, sigma_max=80.0)
    assert type(found.sampler) is type(sampler)
    assert found.sampler.grid.values == pytest.approx(design.sigma.tolist(), rel=1e-9)
    assert found.w2 == pytest.approx(float(propagate(found.sampler.plan(VP()), task.spectrum).w2), rel=1e-9)


def test_only_samplers_that_remember_predictions_have_another_find_their_levels():
    assert memoryless(Exponential(5, order=3, stochasticity=0.5)) == Exponential(5, order=1, stochasticity=0.5)
    assert memoryless(DPMSolver2M(5, final="none")) == Exponential(5, final="none", order=1)
    assert not any(memoryless(s) for s in (Exponential(5, order=1), Heun(5), SSCS(5), Ancestral(5)))


def test_kl_ranks_by_kl(tmp_path, monkeypatch):
    monkeypatch.setattr("undrift.cli.design.write_report", lambda out: out)
    assert (
        main(
            ["design", *SMALL, "--processes", "[VP]", "--metric", "kl", "--resolution", "0.05", "--out", str(tmp_path)]
        )
        == 0
    )
    about = json.loads((tmp_path / "design.json").read_text())
    rows = [row for row in about["plans"] if row["budget"] == 4]
    assert [row["rank"] for row in rows] == sorted(row["rank"] for row in rows)
    assert [row["w2"] for row in rows] != sorted(row["w2"] for row in rows), "else the test says nothing"
    optimised = [row for row in rows if row["kind"] == "optimised"]
    # The optimisation begins from all grids compared, and smooths by the resolution too.
    pair = [
        r for r in rows if r["kind"] == "classical" and all(r[k] == optimised[0][k] for k in ("process", "sampler"))
    ]
    assert optimised[0]["kl"] < min(r["kl"] for r in pair)


def test_the_chosen_plan_runs_as_it_is_written(designed, run_folder, tmp_path):
    _, out = designed
    about = json.loads((out / "design.json").read_text())
    for n in (3, 4):
        file = out / f"best-{n}.yaml"
        used = about["plans"][about["budgets"][str(n)]["use"]]
        assert yaml.safe_load(file.read_text()) == used["settings"]
        place = tmp_path / str(n)
        flags = ["--n", "4", "--progress", "false", "--out", str(place)]
        assert main(["sample", str(run_folder), "--config", str(file), *flags]) == 0
        x, settings = read_npz(place / "samples.npz")
        assert x.shape == (4, 1, 8, 8)
        assert settings["calls"] == used["calls"]
        assert settings["sampler"] == used["settings"]["sampler"]


def test_searched_processes_run_as_they_are_written(designed, run_folder, tmp_path):
    _, out = designed
    about = json.loads((out / "design.json").read_text())
    rows = [row["settings"] for row in about["plans"] if row["kind"] == "searched"]
    assert [row["process"]["type"] for row in rows] == ["Recipe", "Recipe"]
    recipe = describe(LearnedProcess.random(2, seed=1).frozen())  # what a search for two channels returns
    rows.append({"process": recipe, "sampler": describe(DPMSolver2M(3))})
    for i, row in enumerate(rows):
        file = tmp_path / f"{i}.yaml"
        file.write_text(yaml.safe_dump(row))
        place = tmp_path / str(i)
        flags = ["--n", "2", "--progress", "false", "--out", str(place)]
        assert main(["sample", str(run_folder), "--config", str(file), *flags]) == 0
        assert read_npz(place / "samples.npz")[1]["process"] == row["process"]


def test_finished_parts_are_not_run_again(designed, capsys, monkeypatch):
    """One part is cut short, as by a kill: it alone is run again, and all comes out as before."""
    call, out = designed
    names = ("verify.jsonl", "design.json", "best-3.yaml", "best-4.yaml")
    before = {name: (out / name).read_bytes() for name in names}
    lines = (out / "design.jsonl").read_text().splitlines()
    assert len(lines) == 1 + 2 + 2, "the loss, and at each budget a schedule and a process"
    (out / "design.jsonl").write_text("\n".join([*lines[:3], lines[4], lines[3][:80]]))
    (out / "best-50.yaml").write_text("of an earlier call\n")

    def never(*args, **settings):
        raise AssertionError("this was finished")

    monkeypatch.setattr("undrift.cli.design_plans.search", never)
    monkeypatch.setattr("undrift.cli.design_plans.LossCurve.measure", never)
    monkeypatch.setattr("undrift.report.comparison.sample", never)
    monkeypatch.setattr("undrift.cli.design.write_report", lambda out: out)
    capsys.readouterr()
    assert main(call) == 0
    printed = capsys.readouterr().out.splitlines()
    assert sum("4 calls: schedule of" in line for line in printed) == 1
    assert not any("3 calls: schedule of" in line for line in printed)
    again = [json.loads(line)["made"] for line in (out / "design.jsonl").read_text().splitlines()]
    made = [json.loads(line)["made"] for line in lines]
    assert again == [*made[:3], made[4], made[3]]
    assert {name: (out / name).read_bytes() for name in names} == before
    assert not (out / "best-50.yaml").exists()


def test_measurements_stand_beside_predictions(designed):
    _, out = designed
    about = json.loads((out / "design.json").read_text())
    rows = about["verified"]["rows"]
    assert [about["plans"][row["plan"]]["kind"] for row in rows] == ["classical", "optimised", "searched"] * 2
    assert all(row["distance"] > about["verified"]["floor"] for row in rows), "the network has hardly been trained"
    assert any(row["grid"] == "measured loss" for row in about["plans"]), "levels of least path KL are offered"


def _candidate(process, sampler, strange: float, w2: float) -> Candidate:
    data = Spectrum(torch.ones(2))
    made = Candidate.of("classical", 4, process, sampler, data, 0.01, grid="LogSigma")
    return Candidate(made.kind, 4, process, sampler, made.names, made.plan, w2, 1.0, (w2, 1.0), strange)


def test_strange_plans_are_not_chosen_unless_there_is_no_other():
    a, b = _candidate(VP(), DPMSolver2M(4, LogSigma()), 0.31, 0.1), _candidate(VP(), Heun(2, LogSigma()), 0.29, 0.2)
    assert chosen([a, b], "w2") is b
    assert chosen([a], "w2") is a
    assert chosen([], "w2") is None


def test_pairs_differ_in_sampler_or_channels():
    dpm, heun = DPMSolver2M(4, LogSigma()), Heun(2, LogSigma())
    plans = [
        _candidate(CLD(), dpm, 9.0, 0.05),
        _candidate(VP(), dpm, 0.0, 0.1),
        _candidate(VP(), dpm, 0.0, 0.2),
        _candidate(PSLD(), dpm, 0.0, 0.3),
        _candidate(VP(), heun, 0.0, 0.4),
    ]
    assert pairs(plans, "w2", 3) == [plans[1], plans[3], plans[4]]
    assert pairs(plans, "w2", 9) == [plans[1], plans[3], plans[4]]


BAD = {
    "no calls": (["--calls", "[]"], "calls: expected at least one"),
    "calls below one": (["--calls", "[5, 0]"], "calls: expected numbers of at least 1"),
    "channels below one": (["--channels", "[0]"], "channels: expected numbers of at least 1"),
    "one grid twice": (["--grids", "[Rho, Rho]"], "grids: Rho is there twice"),
    "a sampler that applies nowhere": (
        ["--processes", "[VE]", "--samplers", "[SSCS]"],
        "samplers: SSCS(order=1) applies to none of the processes: SSCS splits off a stationary process",
    ),
    "an adaptive sampler": (["--samplers", "[ProbabilityFlow]"], "chooses its own number of calls"),
    "no such metric": (["--metric", "fid"], "metric: expected one of 'w2', 'kl'"),
    "no such basis": (["--basis", "wavelet"], "basis: expected one of 'pca', 'fft'"),
    "a resolution of nothing": (["--resolution", "0"], "resolution: expected a positive number"),
    "levels that cross": (["--sigma_min", "3", "--sigma_max", "2"], "sigma_min: expected 0 < sigma_min < sigma_max"),
    "samples of no model": (["--verify", "100"], "verify: samples are drawn from a model; give a run"),
    "no such run": (["--run", "nowhere"], "run: nowhere does not exist"),
    "one point": (["--data", "{type: Ring, n: 1}"], "data: a spectrum needs at least 2 points"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_said_before_any_work(case, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags, message = BAD[case]
    assert main(["design", *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_data_of_another_shape_than_the_run(run_folder, tmp_path, capsys):
    out = tmp_path / "o"
    assert main(["design", str(run_folder), "--data", "Ring", "--holdout", "null", "--out", str(out)]) == 2
    assert "data: points of ring-8 have shape (2,)" in capsys.readouterr().err
    assert not out.exists()
