"""The report of a posterior: truth and data, mean and deviation, draws, chains, and whether they are calibrated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from undrift.report.files import write_bytes
from undrift.report.html import Page
from undrift.report.plots import GREY, PALETTE, grid_image, new_figure, png
from undrift.report.posterior import LEVELS, PosteriorRecord, shown_number
from undrift.report.tones import Tones

__all__ = ["write_inverse_report"]

_SHOWN = 6  # draws
_COMPONENTS = 4  # of a curve
_DATA = 400  # numbers in a figure of data


def write_inverse_report(place: Path, reproduce: Callable[[Page], None]) -> Path:
    """Write ``report.html`` from the folder's posterior.npz and posterior.json.

    Args:
        place: the folder.
        reproduce: adds the last section.
    """
    record = PosteriorRecord.load(place)
    about = record.about
    page = Page(f"undrift: {place.resolve().name}", about["lead"])
    page.section("Findings")
    if about["facts"]:
        page.facts([(str(k), str(v)) for k, v in about["facts"]])
    for line in about["warnings"]:
        page.text(f"Warning: {line}")
    if not about["warnings"]:
        page.text("No warnings: nothing in the run speaks against these draws.")
    _posterior(page, record)
    if about.get("errors"):
        _errors(page, about["errors"], len(record.draws))
    if record.y is not None and record.predicted is not None and record.y.ndim == 1 and record.y.numel() <= _DATA:
        page.section("Data")
        page.picture(
            png(data_figure(record)),
            f"{record.y.numel()} data, and what the draws predict for them.",
            "Data (crosses), predictions of the draws without noise (90 % interval and mean)"
            + (", and two deviations of the noise (thin lines)." if about.get("noise_std") else "."),
        )
    _chains(page, record)
    if about.get("calibration"):
        _calibration(page, about["calibration"])
    reproduce(page)
    return write_bytes(place / "report.html", page.render().encode())


# -- the posterior -----------------------------------------------------------------------------------------------------


def _posterior(page: Page, record: PosteriorRecord) -> None:
    page.section("Posterior")
    kind, count = record.about["kind"], len(record.draws)
    truth = "" if record.truth is None else "truth, "
    if kind == "curve":
        page.picture(
            png(curve_figure(record)),
            f"The posterior as curves: {truth}mean, intervals and draws.",
            f"Posterior mean, central 50 % and 90 % intervals at every place, and {min(_SHOWN, count)} of {count} draws"
            + (", with the truth." if record.truth is not None else "."),
        )
    elif kind == "field":
        page.picture(
            png(fields_figure(record)),
            f"Fields: {truth}posterior mean and deviation, and draws.",
            f"Posterior mean and deviation, and {min(_SHOWN, count)} of {count} draws, on common colours"
            + (", with the truth and the mean's error in units of the deviation" * (record.truth is not None))
            + (". Dots: where the data were taken." if record.sites is not None else "."),
        )
    elif kind == "image":
        _images(page, record)
    else:
        page.picture(
            png(cloud_figure(record)),
            f"Draws in the plane of their first and last coordinate{', with the truth' * (record.truth is not None)}.",
            f"{count} draws; the cross is their mean" + (", the star the truth." if record.truth is not None else "."),
        )


def bands(draws: Tensor) -> Tensor:
    """Ends of the central intervals of LEVELS, from the widest in: (2 * levels, *event)."""
    tails = [0.5 - level / 2 for level in reversed(LEVELS)] + [0.5 + level / 2 for level in LEVELS]
    return draws.double().quantile(torch.tensor(tails, dtype=torch.float64), 0)


def curve_figure(record: PosteriorRecord) -> Figure:
    """Functions of one variable: intervals, mean, draws, truth, and data that are values; a panel a component."""
    n = record.mean.shape[-1]
    count = min(_COMPONENTS, record.mean.numel() // n)
    figure, axes = new_figure(7.6, 3.5 if count == 1 else 2.6 * count, count, 1)
    for k in range(count):
        _curve(axes[k, 0], record, k)
        axes[k, 0].set_ylabel("value" if count == 1 else f"component {k + 1}", fontsize=8)
    axes[-1, 0].set_xlabel("place", fontsize=8)
    axes[0, 0].legend(fontsize=7, frameon=False, ncols=2)
    return figure


def _curve(ax: Axes, record: PosteriorRecord, k: int) -> None:
    """The k-th component."""
    n = record.mean.shape[-1]
    x = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    draws = record.draws.reshape(len(record.draws), -1, n)[:, k]
    ends = bands(draws)
    for i, alpha in enumerate((0.16, 0.28)):
        ax.fill_between(x, ends[i], ends[-1 - i], color=PALETTE[0], alpha=alpha, linewidth=0, label=_interval(i))
    for draw in draws[:_SHOWN]:
        ax.plot(x, draw, color=PALETTE[0], linewidth=0.5, alpha=0.6)
    ax.plot(x, record.mean.reshape(-1, n)[k], color=PALETTE[0], linewidth=1.6, label="mean")
    if record.truth is not None:
        ax.plot(x, record.truth.reshape(-1, n)[k], color=PALETTE[1], linewidth=1.4, linestyle="--", label="truth")
    if record.about.get("direct") and record.sites is not None and record.y is not None:
        seen = record.y.reshape(-1, len(record.sites))[k]
        ax.plot(record.sites[:, 0], seen, "x", color=PALETTE[6], markersize=5, label="data")
    elif record.sites is not None:
        ax.plot(record.sites[:, 0], torch.full((len(record.sites),), ax.get_ylim()[0]), "|", color=PALETTE[6])


def _interval(i: int) -> str:
    return f"{100 * LEVELS[len(LEVELS) - 1 - i]:g} % interval"


def fields_figure(record: PosteriorRecord) -> Figure:
    """Functions of two variables: truth, mean, deviation and error above, draws below."""
    mean, std = (_plane(t) for t in (record.mean, record.std))
    truth = None if record.truth is None else _plane(record.truth)
    top = [("posterior mean", mean, None), ("posterior deviation", std, (0.0, float(std.max())))]
    if truth is not None:
        error = (mean - truth) / std.clamp(min=1e-12 * float(std.max()) + 1e-300)
        top = [("truth", truth, None), *top, ("error / deviation", error, (-3.0, 3.0))]
    draws = [(f"draw {i + 1}", _plane(d), None) for i, d in enumerate(record.draws[: len(top)])]
    both = torch.stack([t for _, t, limits in [*top, *draws] if limits is None])
    common = float(both.min()), float(both.max())
    figure, axes = new_figure(2.5 * len(top), 4.6, 2, len(top))
    for ax, (name, values, limits) in zip(axes.flat, [*top, *draws], strict=False):
        low, high = limits or common
        colours = "RdBu_r" if limits == (-3.0, 3.0) else "magma" if limits else "viridis"
        shown = ax.imshow(
            values.T.numpy(), origin="lower", extent=(0, 1, 0, 1), cmap=colours, vmin=low, vmax=max(high, low + 1e-12)
        )
        figure.colorbar(shown, ax=ax, shrink=0.75).ax.tick_params(labelsize=6)
        ax.set_title(name, fontsize=8, loc="left")
        ax.set_xticks([])
        ax.set_yticks([])
        ax.grid(False)
        if record.sites is not None and name in ("truth", "posterior mean") and record.sites.shape[1] == 2:
            ax.plot(record.sites[:, 0], record.sites[:, 1], ".", color="white", markersize=3, markeredgecolor="black")
    for ax in axes.flat[len(top) + len(draws) :]:
        ax.set_axis_off()
    return figure


def _plane(t: Tensor) -> Tensor:
    """The first component of a field, (n1, n2)."""
    return t.double().reshape(-1, *t.shape[-2:])[0]


def _images(page: Page, record: PosteriorRecord) -> None:
    tones = Tones.read(record.about.get("tones", {}))
    single: list[tuple[bytes, str, str]] = []

    def add(x: Tensor, name: str, caption: str, scale: Tones = tones) -> None:
        single.append((grid_image(x.float().unsqueeze(0), scale), name, caption))

    if record.truth is not None:
        add(record.truth, "The truth.", "Truth.")
    seen = observed_image(record, tones)
    if seen is not None:
        add(*seen)
    add(record.mean, "The posterior mean.", "Posterior mean.")
    largest = float(record.std.max()) or 1.0
    add(record.std, "The posterior deviation.", f"Posterior deviation, white is {largest:.3g}.", Tones(0.0, largest))
    page.gallery(single)
    count = min(len(record.draws), 36)
    page.gallery(
        [(grid_image(record.draws[:count], tones), f"{count} draws.", f"{count} of {len(record.draws)} draws.")]
    )


def observed_image(record: PosteriorRecord, tones: Tones) -> tuple[Tensor, str, str] | None:
    """What was seen, where it can be shown as an image: the known part in place, or data that are one."""
    middle = 0.5 * (tones.low + tones.high) if tones.pixels is None else 0.0
    if record.known is not None and record.y is not None and record.y.shape == record.mean.shape:
        seen = torch.where(record.known.expand(record.mean.shape), record.y.double(), middle)
        return seen, "The known part.", "The known part; the rest is grey."
    if record.y is not None and record.y.ndim == 3 and record.y.shape[0] == record.mean.shape[0]:
        return record.y, "The data.", "Data."
    return None


def cloud_figure(record: PosteriorRecord) -> Figure:
    """Vectors: draws in the plane of their first and last coordinate."""
    figure, axes = new_figure(4.2, 4.0)
    ax = axes[0, 0]
    flat = record.draws.flatten(1).double()
    ax.scatter(flat[:, 0], flat[:, -1], s=4, alpha=0.5, color=PALETTE[0], linewidths=0)
    for values, marker, colour in ((record.mean, "X", PALETTE[6]), (record.truth, "*", PALETTE[1])):
        if values is not None:
            ax.plot(float(values.flatten()[0]), float(values.flatten()[-1]), marker, color=colour, markersize=9)
    ax.set_xlabel("first coordinate", fontsize=8)
    ax.set_ylabel("last coordinate", fontsize=8)
    return figure


def data_figure(record: PosteriorRecord) -> Figure:
    """Data (m,) with the interval of what draws predict."""
    assert record.y is not None
    assert record.predicted is not None
    figure, axes = new_figure(7.6, 2.8)
    ax = axes[0, 0]
    line = record.sites is not None and record.sites.shape[1] == 1
    x = record.sites[:, 0] if line and record.sites is not None else torch.arange(len(record.y))
    ends = record.predicted.double().quantile(torch.tensor([0.05, 0.95], dtype=torch.float64), 0)
    middle = record.predicted.double().mean(0)
    std = record.about.get("noise_std")
    if std:
        ax.errorbar(x, record.y, yerr=2 * std, fmt="none", ecolor=GREY, elinewidth=0.7)
    ax.vlines(x, ends[0], ends[1], color=PALETTE[0], linewidth=4, alpha=0.4, label="predicted, 90 %")
    ax.plot(x, middle, ".", color=PALETTE[0], label="predicted, mean")
    ax.plot(x, record.y, "x", color=PALETTE[1], label="data")
    ax.set_xlabel("place" if line else "number of the datum", fontsize=8)
    ax.set_ylabel("datum", fontsize=8)
    ax.legend(fontsize=7, frameon=False)
    return figure


def _errors(page: Page, errors: Mapping[str, Any], draws: int) -> None:
    page.section("Against the truth")
    lines = [
        ["root mean square error of the mean", shown_number(errors["rmse"])],
        ["the same over that of the truth", shown_number(errors["relative"])],
        ["root mean square posterior deviation", shown_number(errors["std"])],
    ]
    lines += [
        [f"places within the central {100 * float(q):g} %", f"{100 * v:.0f} %"] for q, v in errors["coverage"].items()
    ]
    page.table(
        ["", "value"],
        lines,
        f"Over {errors['places']} values that were not data, by {draws} draws. Values vary together, so that the "
        "coverage of one truth is a hint and no test.",
    )


# -- chains and calibration --------------------------------------------------------------------------------------------


def _chains(page: Page, record: PosteriorRecord) -> None:
    rows = record.about.get("quantities") or []
    if not rows and not record.traces:
        return
    page.section("Chains")
    if rows:
        page.table(*quantities_table(rows), "Scalars of the posterior; ESS is of the mean, over all chains.")
    if record.traces:
        page.picture(
            png(traces_figure(record.traces)),
            f"Traces of {', '.join(record.traces)}.",
            "One line a chain. Chains that mix cover the same ground, and have no trend.",
        )


_COLUMNS = {"mean": "mean", "sd": "sd", "truth": "truth", "q5": "5 %", "q95": "95 %", "ess": "ESS", "rhat": "R-hat"}


def quantities_table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Head and lines of the table of scalars; columns that no scalar has a number for are left out."""
    used = [key for key in _COLUMNS if any(row.get(key) is not None for row in rows)]
    lines = [[row["name"], *(_cell(key, row.get(key)) for key in used)] for row in rows]
    return ["scalar", *(_COLUMNS[key] for key in used)], lines


def _cell(key: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.0f}" if key == "ess" else f"{value:.3f}" if key == "rhat" else shown_number(value, 4)


def traces_figure(traces: Mapping[str, Tensor]) -> Figure:
    """A panel for each scalar, a line for each of up to 8 chains."""
    columns = min(2, len(traces))
    lines = -(-len(traces) // columns)
    figure, axes = new_figure(4.2 * columns, 1.9 * lines + 0.2, lines, columns)
    for ax, (name, values) in zip(axes.flat, traces.items(), strict=False):
        for i, chain in enumerate(values.T[:8]):
            ax.plot(chain, linewidth=0.6, color=PALETTE[i % len(PALETTE)], alpha=0.8)
        ax.set_title(name, fontsize=8, loc="left")
        ax.set_xlabel("kept iteration", fontsize=8)
    for ax in axes.flat[len(traces) :]:
        ax.set_axis_off()
    return figure


def _calibration(page: Page, calibration: Mapping[str, Any]) -> None:
    page.section("Calibration")
    count, draws = calibration["experiments"], calibration["draws"]
    page.text(
        f"{count} truths were drawn from the prior, observed, and ranked among {draws} posterior draws each. If the "
        "posterior is right, ranks are uniform."
    )
    page.picture(
        png(ranks_figure(calibration)),
        "Histograms of ranks: " + "; ".join(f"{s['name']}: {s['histogram']}" for s in calibration["scalars"]),
        "Ranks of the truth; between the dashed lines lie 99 % of the bars if ranks are uniform. A hollow says that "
        "the posterior is too narrow, a hill too wide, a slope that it is off to a side.",
    )
    page.table(
        ["scalar", "p, chi-square", "p, Cramer-von Mises", *(f"in {100 * q:.3g} %" for q in calibration["levels"])],
        [
            [s["name"], shown_number(s["chi_square"], 2), shown_number(s["uniformity"], 2)]
            + [f"{100 * c:.0f} %" for c in s["coverage"]]
            for s in calibration["scalars"]
        ],
        f"Tests of uniform ranks, and shares of truths within central intervals, over {count} experiments.",
    )


def ranks_figure(calibration: Mapping[str, Any]) -> Figure:
    """Histograms of ranks with the 99 % interval of a bar."""
    from scipy.stats import binom

    scalars = calibration["scalars"]
    columns = min(3, len(scalars))
    lines = -(-len(scalars) // columns)
    figure, axes = new_figure(3.2 * columns, 2.1 * lines + 0.2, lines, columns)
    count, bins = calibration["experiments"], len(scalars[0]["histogram"])
    low, high = binom.ppf((0.005, 0.995), count, 1 / bins)
    for ax, scalar in zip(axes.flat, scalars, strict=False):
        _bars(ax, scalar["histogram"])
        for end in (low, high):
            ax.axhline(end, color=PALETTE[1], linestyle="--", linewidth=1)
        ax.set_title(f"{scalar['name']}, p = {scalar['uniformity']:.2g}", fontsize=8, loc="left")
        ax.set_xlabel("rank of the truth / draws", fontsize=8)
    for ax in axes.flat[len(scalars) :]:
        ax.set_axis_off()
    return figure


def _bars(ax: Axes, histogram: Sequence[int]) -> None:
    width = 1 / len(histogram)
    ax.bar([(i + 0.5) * width for i in range(len(histogram))], histogram, 0.92 * width, color=PALETTE[0])
    ax.set_xlim(0, 1)
