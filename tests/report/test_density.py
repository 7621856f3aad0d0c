"""The report of draws: its sections, what its figures draw, and what its tables say."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from torch.distributions import constraints

from undrift.config import build
from undrift.density import Draws, Target
from undrift.density.archive import save_draws
from undrift.density.bounds import Bounds, bounds
from undrift.density.summary import summarise
from undrift.density.targets import Gaussian, TwoModes
from undrift.report import write_report
from undrift.report.density import (
    add_density,
    evidence_figure,
    lead,
    levels_figure,
    log_weights_figure,
    marginals_figure,
    modes_figure,
    pair_figure,
    parameters_table,
    traces_figure,
)
from undrift.report.html import Page
from undrift.report.learning import bounds_line, bounds_table, learning_figure
from undrift.report.plots import PALETTE


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


KEYS = ("u", "acceptance", "cess", "ess", "step", "log_z")
ROWS = ((0.0, None, None, 1.0, None, 0.0), (0.3, 0.6, 0.9, 0.9, 4.0, -0.4), (1.0, 0.5, 0.95, 0.8, 0.1, 0.1))
LEVELS = tuple(dict(zip(KEYS, row, strict=True)) for row in ROWS)


@pytest.fixture(scope="module")
def weighted() -> Draws:
    """Draws of N(0, 4) with the weights that make them of two unit modes at -1 and 1, of shares .25 and .75."""
    target = TwoModes(weight=0.25, distance=1.0)
    x = 2.0 * normal(4, 500, 1, 1)
    flat = x.reshape(-1, 1)
    start = -0.125 * flat.square().sum(-1) - math.log(2.0) - 0.5 * math.log(2 * math.pi)
    log_w = (target.log_prob(flat) - start).reshape(4, 500)
    z = log_w.logsumexp(-1) - math.log(500)
    return Draws(
        target=target,
        states=x,
        walker_log_weights=log_w,
        corrected=True,
        repeat_log_z=z,
        promise="unbiased",
        method="importance sampling",
        levels=LEVELS,
        seconds=1.5,
    )


def posterior(size: int) -> Target:
    spec = {"tau": constraints.positive, "theta": (constraints.real, size)}
    return Target.constrained(lambda v: -v["tau"] - 0.5 * v["theta"].square().sum(-1), spec, name="posterior")


RECORD = tuple(
    {"step": 20 * i, "loss": 50.0 / i**2, "elbo": -50.0 / i**2, "log_z": -1.0 / i, "ess": 1 - 1 / i,
     "gradient_norm": None, "skipped": i // 4, "seconds": 0.5 * i}
    for i in range(1, 9)
)  # fmt: skip


@pytest.fixture(scope="module")
def learned(weighted) -> Draws:
    """The same draws, as a sampler gives them that was trained, with weights of eight exact samples."""
    forward = torch.linspace(0.1, 0.4, 8, dtype=torch.float64)
    levels = tuple({"u": u, "ess": 1 - 0.5 * u, "acceptance": None} for u in (0.0, 0.5, 1.0))
    return replace(weighted, bounds=bounds(weighted.walker_log_weights, forward), training=RECORD, levels=levels)


@pytest.fixture(scope="module")
def chains() -> Draws:
    states = normal(2, 3, 40, 14)
    states[0, 0, :, 5] += 4  # theta[4] of one chain sits apart
    return Draws(target=posterior(13), states=states, walker_log_weights=None, corrected=True, method="MCMC (HMC)")


def sections(page: str) -> list[str]:
    return re.findall(r"<h2[^>]*>([^<]*)</h2>", page)


def render(draws: Draws) -> str:
    summary = summarise(draws)
    page = Page("t", lead(summary))
    add_density(page, draws, summary)
    return page.render()


def test_sections_are_what_there_is_to_show(weighted, chains):
    first, second = render(weighted), render(chains)
    parts = ["Can they be trusted?", "Parameters", "Evidence", "Modes", "Weights", "Levels", "Cost"]
    assert sections(first) == parts
    assert sections(second) == ["Can they be trusted?", "Parameters", "Chains", "Cost"]
    for page in (first, second):
        assert all(re.search(r'alt="[^"]{10,}"', figure) for figure in re.findall("<figure>.*?</figure>", page))
    assert "posterior in 14 dimensions by MCMC (HMC), 2 repeats: read the" in second
    assert "R-hat exceeds 1.01" in second.split("<h2")[1]
    assert "Unbiased: levels and steps were fixed" in first


def test_a_folder_is_shown_whole_and_without_the_density(tmp_path):
    draws = Draws(target=posterior(1), states=normal(2, 50, 1, 2), walker_log_weights=None, corrected=False)
    save_draws(tmp_path / "draws.safetensors", draws)
    text = write_report(tmp_path).read_text()
    (tmp_path / "summary.json").write_text(json.dumps(summarise(draws)))
    (tmp_path / "run.json").write_text(json.dumps({"command": ["undrift", "density", "--n", "240"], "seconds": 2.0}))
    again = write_report(tmp_path).read_text()
    assert sections(again)[-1] == sections(text)[-1] == "Reproduce"
    assert "undrift density --n 240" in again
    assert again.split("Reproduce</h2>")[0] == text.split("Reproduce</h2>")[0]


def test_a_sampler_that_learned_shows_bounds_and_training(learned, weighted):
    page = render(learned)
    parts = ["Can they be trusted?", "Parameters", "Evidence", "Modes", "Weights", "Training", "Levels", "Cost"]
    assert sections(page) == parts
    assert f"<p>{bounds_line(summarise(learned)['bounds'])}.</p>" in page
    assert "160 steps, 4.0 s, 2 skipped." in page
    assert "the loss goes from 50 to 0.781 over 160 steps" in page
    assert all(re.search(r'alt="[^"]{10,}"', figure) for figure in re.findall("<figure>.*?</figure>", page))
    alone = render(replace(learned, repeat_log_z=None, training=({"step": 0, "skipped": 0},), levels=LEVELS[:0]))
    assert sections(alone) == [*parts[:6], "Cost"]
    assert "0 steps." in alone.split("Training</h2>")[1]
    nothing = tuple({"u": u, "acceptance": None} for u in (0.0, 1.0))
    assert "Levels" not in sections(render(replace(weighted, levels=nothing)))


def test_a_summary_from_before_there_were_bounds_is_shown(weighted):
    summary = {k: v for k, v in summarise(weighted).items() if k not in ("bounds", "training")}
    page = Page("t", lead(summary))
    add_density(page, weighted, summary)
    assert page.render() == render(weighted)


# -- tables ------------------------------------------------------------------------------------------------------------


def test_digits_follow_the_standard_error_and_empty_columns_are_left_out(weighted):
    summary = summarise(weighted)
    head, ((name, mean, error, *_),) = parameters_table(summary)
    assert head == ["parameter", "mean", "± (mcse)", "sd", "5 %", "50 %", "95 %", "ESS"]
    assert name == "x[0]"
    row = summary["parameters"][0]
    assert len(error.lstrip("0.")) == 2, "two figures of the error"
    assert len(mean.partition(".")[2]) == len(error.partition(".")[2])
    assert float(mean) == pytest.approx(row["mean"], abs=10 ** -len(error.partition(".")[2]))
    one = Draws(target=Gaussian(), states=normal(1, 50, 1, 2), walker_log_weights=None, corrected=False)
    assert parameters_table(summarise(one))[0] == ["parameter", "mean", "sd", "5 %", "50 %", "95 %"]


def test_bounds_are_a_line_and_a_table_from_below_to_above(learned):
    summary = summarise(learned)
    known = summary["bounds"]
    assert bounds_line(known) == (
        f"ELBO {known['elbo']:.4f} ± {known['elbo_std_error']:.4f}, EUBO 0.2500 ± 0.0371, "
        f"forward ESS {known['forward_ess']:.3g}"
    )
    _, lines = bounds_table(summary)
    names = [line[0].split(",")[0] for line in lines]
    assert names == ["ELBO", "log Z", "log Z", "log Z of the target", "EUBO"]
    assert lines[1][1:] == [f"{learned.log_z:.4f}", f"{learned.log_z_std_error:.4f}"]
    assert lines[4][1:] == ["0.2500", "0.0371"]
    bare = summarise(replace(learned, bounds=Bounds(-math.inf, math.nan)))
    assert bounds_line(bare["bounds"]) == "ELBO -inf"
    assert [line[0].split(",")[0] for line in bounds_table(bare)[1]] == ["ELBO", "log Z", "log Z of the target"]


# -- figures -----------------------------------------------------------------------------------------------------------


def test_marginals_are_weighted_densities_beside_the_exact_ones(weighted):
    exact = weighted.target.sample(4000, seed=1)
    (ax,) = marginals_figure(weighted, exact).axes
    drawn, true = (patch.get_data() for patch in ax.patches)
    centres = 0.5 * (drawn.edges[1:] + drawn.edges[:-1])
    width = np.diff(drawn.edges)
    for stairs in (drawn, true):
        assert float((stairs.values * width).sum()) == pytest.approx(0.99, abs=0.012), "99 % are within the frame"
        # Mean .5; four standard errors of 2000 draws of deviation 1.3, weighted, and what the frame cuts off.
        assert float((stairs.values * width * centres).sum()) == pytest.approx(0.5, abs=0.2)
    assert [to_hex(p.get_edgecolor()) for p in ax.patches][1] == PALETTE[1].lower()


def test_marginals_show_twelve_parameters_by_name_on_their_own_scale(chains):
    axes = [ax for ax in marginals_figure(chains).axes if ax.axison]
    assert [ax.get_xlabel() for ax in axes] == chains.target.labels[:12]
    assert axes[0].patches[0].get_data().edges[0] > -0.5, "tau is positive"


def test_pairs_are_draws_of_equal_weight(chains):
    (ax,) = pair_figure(chains).axes
    points = ax.collections[0].get_offsets()
    assert len(points) == min(240, int(chains.ess))
    assert (points[:, 0] > 0).all()
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("tau", "theta[0]")


def test_the_pooled_evidence_and_the_truth_are_lines(weighted):
    summary = summarise(weighted)
    (ax,) = evidence_figure(summary).axes
    assert [line.get_ydata()[0] for line in ax.lines[1:]] == [weighted.log_z, 0.0]
    assert list(ax.lines[0].get_ydata()) == weighted.repeat_log_z.tolist()
    band = ax.patches[0]
    assert band.get_height() == pytest.approx(2 * weighted.log_z_std_error)
    assert band.get_y() + band.get_height() / 2 == pytest.approx(weighted.log_z)


def test_bars_are_the_weights_of_modes(weighted):
    modes = summarise(weighted)["modes"]
    (ax,) = modes_figure(modes).axes
    assert [bar.get_height() for bar in ax.patches] == modes["weights"]
    assert list(ax.lines[-1].get_ydata()) == modes["true_weights"] == [0.25, 0.75]
    # The first mode is the likelier one below -log(3) / 2, where the density holds .214 of its mass; the tolerance is
    # four standard errors of 1000 draws.
    assert weighted.ess > 1000
    assert modes["weights"] == pytest.approx([0.214, 0.786], abs=0.05)


def test_log_weights_are_relative_to_their_mean(weighted):
    (ax,) = log_weights_figure(weighted).axes
    assert sum(bar.get_height() for bar in ax.patches) == 2000
    top = float(weighted.weights.max() * 2000)
    assert ax.patches[-1].get_x() + ax.patches[-1].get_width() == pytest.approx(math.log(top))


def test_traces_show_the_parameters_that_agree_least(chains):
    axes = traces_figure(chains).axes
    assert len(axes) == 4
    titles = [ax.get_title(loc="left") for ax in axes]
    worst = float(chains.rhat.max())
    assert f"theta[4],  R-hat {worst:.3f}" in titles
    assert all(len(ax.lines) == 4 and len(ax.lines[0].get_xdata()) == 40 for ax in axes)


def test_levels_show_every_record_there_is():
    panels = [ax for ax in levels_figure(LEVELS).axes if ax.axison]
    names = ["acceptance", "ESS / walkers", "conditional ESS", "step ε, units of y²", "log Z up to u, nats"]
    assert [ax.get_ylabel() for ax in panels] == names
    assert list(panels[4].lines[0].get_xdata()) == [0.0, 0.3, 1.0]
    assert panels[3].get_yscale() == "log"
    early = [{"u": u, "acceptance": 0.5} for u in (0.0, 1e-4, 1e-3, 1e-2, 1.0)]
    assert levels_figure(early).axes[0].get_xscale() == "symlog", "levels that crowd at the start are told apart"


def test_levels_of_samplers_that_learn_know_little(learned):
    panels = [ax for ax in levels_figure(learned.levels).axes if ax.axison]
    assert [ax.get_ylabel() for ax in panels] == ["ESS / walkers"]
    assert list(panels[0].lines[0].get_ydata()) == [1.0, 0.75, 0.5]


def test_training_is_drawn_against_the_step():
    axes = [ax for ax in learning_figure(RECORD, true_log_z=0.25).axes if ax.axison]
    assert [ax.get_ylabel() for ax in axes] == ["loss", "nats", "ESS / paths"], "no row knows the gradient"
    assert axes[0].get_yscale() == "log"
    elbo, log_z, truth = axes[1].lines
    assert list(elbo.get_xdata()) == [row["step"] for row in RECORD]
    assert list(log_z.get_ydata()) == [row["log_z"] for row in RECORD]
    assert set(truth.get_ydata()) == {0.25}
    low, high = axes[1].get_ylim()
    assert -50 < low < -50 / 9, "where training began is out of the frame"
    assert high > 0.25
    holes = [row | {"elbo": None, "log_z": math.nan, "loss": None if i == 3 else -1.0} for i, row in enumerate(RECORD)]
    axes = [ax for ax in learning_figure(holes).axes if ax.axison]
    assert [ax.get_ylabel() for ax in axes] == ["loss", "ESS / paths"]
    assert len(axes[0].lines[0].get_xdata()) == 7
    assert axes[0].get_yscale() == "symlog"


def test_a_benchmark_is_named_and_drawn_with_its_modes():
    target = build({"type": "Mixture9"}, Target)
    draws = Draws(
        target=target, states=target.sample(64).reshape(4, 16, 1, 2), walker_log_weights=None, corrected=False
    )
    (ax,) = pair_figure(draws, target.sample(100, seed=2)).axes
    exact, drawn, modes = (c.get_offsets() for c in ax.collections)
    assert (len(exact), len(drawn)) == (64, 64), "as many exact samples as draws"
    assert np.array_equal(modes, target.modes.numpy())


def test_chains_that_never_moved_are_shown_as_they_are():
    stuck = torch.ones(2, 2, 10, 2, dtype=torch.float64)
    draws = Draws(target=Gaussian(), states=stuck, walker_log_weights=None, corrected=True)
    with np.errstate(invalid="ignore"):
        assert "All 40 states of the chains are the same" in render(draws)
