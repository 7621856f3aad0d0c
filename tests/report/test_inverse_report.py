"""Reports of posteriors: what they hold, and the numbers they tell."""

from __future__ import annotations

import re

import pytest
import torch

from undrift.inverse import Calibration
from undrift.report import PosteriorRecord, accuracy, rank_table, write_report
from undrift.report.inverse import curve_figure

EVENTS = {"curve": (20,), "field": (8, 8), "image": (1, 8, 8), "vector": (3,)}


def record(kind: str, **more) -> PosteriorRecord:
    g = torch.Generator().manual_seed(0)
    event = EVENTS[kind]
    draws = torch.randn(30, *event, generator=g, dtype=torch.float64)
    about = {"kind": kind, "lead": "A lead.", "facts": [["method", "none"]], "warnings": ["Beware of <this>."]}
    return PosteriorRecord(draws, draws.mean(0), draws.std(0), {**about, **more.pop("about", {})}, **more)


@pytest.mark.parametrize("kind", EVENTS)
def test_every_kind_is_shown_in_one_file(kind, tmp_path):
    truth = torch.zeros(EVENTS[kind], dtype=torch.float64)
    found = record(kind, truth=truth)
    found.save(tmp_path)
    page = write_report(tmp_path).read_text()
    assert "Beware of &lt;this&gt;." in page
    assert re.findall(r'(?:src|href)="(?!data:|#)', page) == [], "nothing is fetched"
    assert page.count("<img") == {"curve": 1, "field": 1, "image": 4, "vector": 1}[kind]
    again = PosteriorRecord.load(tmp_path)
    assert torch.equal(again.draws, found.draws)
    assert torch.equal(again.truth, truth)


def test_data_chains_and_calibration_have_sections(tmp_path):
    ranks = Calibration(torch.arange(40).reshape(40, 1) % 8, 7, ("mode 1",))
    about = {
        "quantities": [{"name": "mode 1", "mean": 1.0, "sd": 0.5, "ess": 12.3, "rhat": None}],
        "calibration": rank_table(ranks),
        "errors": {"rmse": 1.0, "relative": None, "std": 1.0, "coverage": {"0.5": 0.4}, "places": 20},
    }
    y = torch.tensor([0.1, 0.2])
    parts = {
        "y": y,
        "predicted": y.repeat(5, 1),
        "sites": torch.tensor([[0.2], [0.7]]),
        "traces": {"m": torch.rand(9, 2)},
    }
    record("curve", about=about, **parts).save(tmp_path)
    page = write_report(tmp_path).read_text()
    for section in ("Findings", "Posterior", "Against the truth", "Data", "Chains", "Calibration", "Reproduce"):
        assert re.search(f"<h2[^>]*>{section}</h2>", page), section
    assert "R-hat" not in page, "columns without a number are left out"


def test_coverage_and_errors_are_over_what_was_not_known():
    """Draws are the normal's quantiles at each place, so the central half is |x| < .6745 and 90 % |x| < 1.645."""
    levels = (torch.arange(2001, dtype=torch.float64) + 0.5) / 2001
    draws = torch.special.ndtri(levels).unsqueeze(1).expand(-1, 5)
    truth = torch.tensor([0.0, 0.66, 0.69, 1.6, 1.7], dtype=torch.float64)
    known = torch.tensor([True, False, False, False, False])
    told = accuracy(draws, torch.zeros(5), torch.full((5,), 2.0), truth, known)
    assert told["coverage"] == {"0.5": 0.25, "0.9": 0.75}
    assert told["places"] == 4
    assert told["rmse"] == pytest.approx(float(truth[1:].square().mean().sqrt()))
    assert told["relative"] == pytest.approx(1.0)
    assert told["std"] == pytest.approx(2.0)


def test_every_component_of_a_curve_has_a_panel_with_its_own_data():
    draws = torch.randn(20, 2, 9, generator=torch.Generator().manual_seed(0))
    y, sites = torch.tensor([[0.5], [-0.5]]), torch.tensor([[0.3]])
    about = {"kind": "curve", "direct": True}
    figure = curve_figure(PosteriorRecord(draws, draws.mean(0), draws.std(0), about, draws[0], y, None, sites))
    assert len(figure.axes) == 2
    for k, ax in enumerate(figure.axes):
        lines = {line.get_label(): line.get_ydata() for line in ax.lines}
        assert lines["mean"] == pytest.approx(draws.mean(0)[k].numpy())
        assert lines["truth"] == pytest.approx(draws[0, k].numpy())
        assert lines["data"] == pytest.approx(y[k].numpy())


def test_any_number_of_values_can_be_covered(monkeypatch):
    """Quantiles are taken of a part of the places at a time, since there is a largest tensor that can be sorted."""
    draws = torch.randn(50, 3, 11, generator=torch.Generator().manual_seed(0))
    truth = torch.randn(3, 11, generator=torch.Generator().manual_seed(1))
    whole = accuracy(draws, draws.mean(0), draws.std(0), truth)
    monkeypatch.setattr("undrift.report.posterior._SORTED", 120)
    assert accuracy(draws, draws.mean(0), draws.std(0), truth) == whole


def test_rank_tables_tell_uniform_ranks_from_ranks_at_the_ends():
    even = torch.arange(320) % 32
    ends = torch.where(torch.arange(320) % 2 == 0, 0, 31)
    table = rank_table(Calibration(torch.stack([even, ends], 1), 31, ("even", "ends")))
    good, bad = table["scalars"]
    assert good["histogram"] == [20] * 16
    assert good["chi_square"] == pytest.approx(1.0)
    assert bad["chi_square"] < 1e-100
    assert bad["coverage"] == [0.0, 0.0]
