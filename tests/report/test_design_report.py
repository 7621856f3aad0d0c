"""The report of a design, from a file of known numbers: what is chosen, said and drawn."""

from __future__ import annotations

import copy
import json

import pytest
from matplotlib.figure import Figure

from undrift.cli import main
from undrift.report import write_report
from undrift.report.design import (
    design_table,
    loss_figure,
    modes_figure,
    path_figure,
    quality_figure,
    schedules_figure,
    sources_figure,
    strange_line,
)


def _plan(kind, budget, w2, kl, strangeness, grid="LogSigma", calls=None):
    return {
        "kind": kind,
        "budget": budget,
        "calls": calls or budget,
        "process": "VP",
        "sampler": "Heun",
        "grid": grid,
        "w2": w2,
        "kl": kl,
        "rank": w2,
        "strangeness": strangeness,
        "trusted": strangeness <= 0.3,
        "gain": 0.2 / w2,
        "settings": {},
    }


def _budget(use, best, path=None):
    return {
        "use": use,
        "best": best,
        "modes": {"variance": [3.0, 1.0, 0.0], "w2_squared": [0.01, 0.0004, 0.0]},
        "levels": {"this plan": [9.0, 1.0, 0.1], "log σ": [80.0, 1.0, 0.01], "ρ = 7": [80.0, 5.0, 0.002]},
        "sources": {"all": 0.1, "only start": 0.01, "only discretisation": 0.09, "none": 0.0},
        "path": path,
    }


@pytest.fixture
def about():
    path = {
        "plan": 1,
        "sigma": [10.0, 1.0, 0.1],
        "start": 0.5,
        "discretisation": [2.0, 4.0],
        "score": None,
        "kl": 6.5,
    }
    return {
        "spectrum": {
            "name": "toy, pca",
            "dim": 4.0,
            "variance": [4.0, 1.0, 0.0],
            "mean": [0.0, 0.0, 0.0],
            "count": [1.0, 1.0, 2.0],
        },
        "metric": "w2",
        "resolution": 0.01,
        "strange": 0.3,
        "caption": "A prediction <for Gaussian data>.",
        "calls": [3, 5],
        "plans": [
            _plan("searched", 3, 0.05, 0.3, 0.9, "optimised"),
            _plan("optimised", 3, 0.1, 0.2, 0.1, "optimised"),
            _plan("classical", 3, 0.2, 0.1, 0.2),
            *[_plan("classical", 3, 0.3 + 0.1 * i, 0.4, 0.0, f"grid {i}") for i in range(12)],
            _plan("optimised", 3, 40.0, 9.0, 0.0, "measured loss"),
            _plan("classical", 5, 0.04, 0.01, 0.31, calls=4),
        ],
        "budgets": {
            "3": _budget(1, {"classical": 2, "optimised": 1, "searched": 0}, path),
            "5": _budget(16, {"classical": 16}),
        },
        "left_out": [{"process": "VE", "sampler": "SSCS", "grid": "Rho", "calls": 3, "why": "no stationary law"}],
        "loss": None,
        "verified": None,
    }


def test_the_table_shows_the_best_the_chosen_and_the_kinds(about):
    head, lines, use = design_table(about, 3)
    assert len(lines) == 10 + 1, "the ten best, and the one from a measured loss, which is none of them"
    assert lines[use][3:] == ["optimised", "3", "0.1", "0.2", "0.1", "0.1", "2"]
    assert lines[0][head.index("strangeness")] == "0.9 !"
    assert lines[-1][head.index("grid")] == "measured loss"
    assert design_table(about, 5)[1] == [
        ["VP", "Heun", "LogSigma", "classical", "4", "0.04", "0.01", "0.04", "0.31 !", "5"]
    ]


def test_strange_plans_are_warned_of(about):
    assert strange_line(about, 3).startswith("one of the best plans is marked (!) and not chosen: it shows")
    assert strange_line(about, 5).startswith("no plan of 5 calls can be trusted")
    about["plans"][2]["trusted"] = False
    assert strange_line(about, 3).startswith("2 of the best plans are marked")
    for row in about["plans"]:
        row["trusted"] = True
    assert strange_line(about, 3) == ""


def test_figures_hold_the_numbers(about):
    w2, kl = quality_figure(about).axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in w2.get_lines()}
    assert lines["best classical"] == [[3, 0.2], [5, 0.04]]
    assert lines["best optimised"] == [[3, 0.1]]
    assert {line.get_label(): line.get_xydata().tolist() for line in kl.get_lines()}["best searched"] == [[3, 0.3]]
    assert len(w2.collections[0].get_offsets()) == 14, "all classical plans"

    (ax,) = path_figure(about).axes  # the plan of five calls has none
    assert sorted(bar.get_height() for bar in ax.patches) == [0.5, 2.0, 4.0]
    about["budgets"]["3"]["path"]["score"] = [0.25, 0.125]
    (ax,) = path_figure(about).axes
    assert sorted(bar.get_height() for bar in ax.patches) == [0.125, 0.25, 0.5, 2.0, 4.0]

    assert (
        sorted(bar.get_height() for bar in sources_figure(about).axes[0].patches) == [0.01] * 2 + [0.09] * 2 + [0.1] * 2
    )
    missed, three, _ = modes_figure(about).axes[0].get_lines()
    assert missed.get_xydata().tolist() == [[2.0, 2.0], [1.0, 1.0]], "directions without variance are left out"
    assert three.get_ydata().tolist() == pytest.approx([0.1, 0.02], rel=1e-12)
    drawn = [line.get_ydata() for line in schedules_figure(about).axes[0].get_lines()]
    assert [list(y) for y in drawn] == list(about["budgets"]["3"]["levels"].values())


def test_the_report_is_rebuilt_from_the_file_alone(about, tmp_path, capsys):
    about["loss"] = {
        "sigma": [0.1, 1.0],
        "loss": [0.5, 1.0],
        "std_error": [0.01, 0.02],
        "mmse": [0.4, 2.0],
        "data": "toy-test",
    }
    ratio = loss_figure(about["loss"]).axes[1].get_lines()[0].get_ydata()
    assert list(ratio) == [1.25, 0.5]
    about["verified"] = {
        "measure": "sliced W2",
        "floor": 0.1,
        "caption": "Three sets.",
        "rows": [
            {"plan": 2, "distance": 0.7, "std_error": 0.01},
            {"plan": 1, "distance": 0.6, "std_error": 0.01},
            {"plan": 16, "distance": 0.5, "std_error": None},
        ],
    }
    (tmp_path / "design.json").write_text(json.dumps(about))
    assert main(["report", str(tmp_path)]) == 0
    assert "report.html" in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text()
    assert page.count("<img") == 6, "quality, sources, path, modes, schedules, loss"
    assert "A prediction &lt;for Gaussian data&gt;." in page
    assert "2 times better than the best classical plan" in page
    assert 'class="best">0.600 ± 0.010' in page
    assert 'class="best">0.500' in page
    assert "Warning: no plan of 5 calls can be trusted" in page
    assert "no stationary law" in page


def test_what_there_is_not_is_left_out(about, tmp_path, monkeypatch):
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **settings: file.write(b"a picture"))
    bare = copy.deepcopy(about)
    bare["left_out"], bare["budgets"]["3"]["path"] = [], None
    (tmp_path / "design.json").write_text(json.dumps(bare))
    page = write_report(tmp_path).read_text()
    assert page.count("<img") == 4
    for section in ("Left out", "The denoiser", "Predicted and measured"):
        assert f">{section}" not in page
