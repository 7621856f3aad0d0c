"""The report of draws of a density: warnings first, then parameters, evidence, modes, weights, chains and levels."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from undrift.density.archive import load_draws
from undrift.density.draws import Draws
from undrift.density.summary import QUANTILES, summarise
from undrift.report.files import write_bytes
from undrift.report.html import Page
from undrift.report.learning import add_bounds, add_training
from undrift.report.plots import GREY, MARKERS, PALETTE, new_figure, png

__all__ = [
    "add_density",
    "evidence_figure",
    "levels_figure",
    "log_weights_figure",
    "marginals_figure",
    "modes_figure",
    "pair_figure",
    "parameters_table",
    "traces_figure",
    "write_density_report",
]

_MOST_ROWS = 200
_MOST_MARGINALS = 12
_MOST_MODES = 64
_MOST_TRACES = 4
_EXACT = 4096


def write_density_report(folder: Path, reproduce: Any) -> Path:
    """Write ``report.html`` of a folder that holds draws.safetensors.

    Args:
        folder: of a run of undrift density.
        reproduce: adds the last section to a page.
    """
    draws = load_draws(folder / "draws.safetensors")
    saved = folder / "summary.json"
    summary = json.loads(saved.read_text(encoding="utf-8")) if saved.exists() else summarise(draws)
    page = Page(f"undrift: {folder.resolve().name}", lead(summary))
    add_density(page, draws, summary)
    reproduce(page)
    return write_bytes(folder / "report.html", page.render().encode())


def lead(summary: Mapping[str, Any]) -> str:
    """What was sampled, how, and the verdict, in a sentence."""
    count = summary["draws"]
    return (
        f"{count['total']} draws of {summary['target']} in {summary['dim']} dimension{_s(summary['dim'])} by "
        f"{summary['method'] or 'an unnamed method'}, {count['repeats']} repeat{_s(count['repeats'])}: "
        f"{summary['verdict']}." + (f" {summary['reason']}" if summary["reason"] else "")
    )


def _s(count: int) -> str:
    return "" if count == 1 else "s"


def add_density(page: Page, draws: Draws, summary: Mapping[str, Any]) -> None:
    """All sections of a report on draws that there is something to show for.

    Args:
        page: of the report.
        draws: of any method.
        summary: of the draws, as :func:`undrift.density.summary.summarise` gives it.
    """
    page.section("Can they be trusted?")
    for line in summary["warnings"]:
        page.text(line)
    if not summary["warnings"]:
        page.text(
            "Nothing in the run speaks against these draws: repeats agree, weights are even, and chains, where there "
            "are any, have mixed. A mode that no walker has found would not show in any of these numbers."
        )
    exact = _exact_values(draws)
    _parameters(page, draws, summary, exact)
    bounded = summary.get("bounds") is not None  # a summary may be older than bounds are
    if summary["repeat_log_z"] or bounded:
        page.section("Evidence")
    if summary["repeat_log_z"]:
        _evidence(page, summary)
    if bounded:
        add_bounds(page, summary)
    if summary["modes"] is not None:
        _modes(page, summary["modes"])
    if draws.walker_log_weights is not None:
        page.section("Weights")
        page.picture(
            png(log_weights_figure(draws)),
            f"Histogram of log weights, spread over {_spread(draws):.3g} nats.",
            f"Log of each walker's weight over their mean; {summary['ess']:.0f} effective draws of "
            f"{draws.walker_log_weights.numel()}. A long tail to the right means that few walkers carry the estimates.",
        )
    if draws.states.shape[2] > 1:
        page.section("Chains")
        page.picture(
            png(traces_figure(draws)),
            "States of a few chains, one after the other.",
            f"The first chains of {draws.states.shape[0] * draws.states.shape[1]}, for the parameters with the largest "
            "R-hat. They should look like noise about a common level.",
        )
    if draws.training:
        add_training(page, draws.training, summary["true_log_z"])
    if len(draws.levels) > 1 and _records(draws.levels):
        page.section("Levels")
        page.picture(
            png(levels_figure(draws.levels)),
            "Records of each level of the path against its parameter u.",
            f"{len(draws.levels)} levels from the start (u = 0) to the target (u = 1).",
        )
    _cost(page, summary)


# -- parameters --------------------------------------------------------------------------------------------------------


def _show(value: float | None, digits: int | None = None) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if digits is None else f"{value:.{digits}f}"


def _digits(error: float | None, value: float) -> int | None:
    """Decimals that show two figures of a standard error, or None where general notation is shorter."""
    if not error or not math.isfinite(error) or max(abs(value), error) >= 1e5 or error < 1e-6:
        return None
    return max(0, 1 - math.floor(math.log10(error)))


def parameters_table(summary: Mapping[str, Any], most: int | None = None) -> tuple[list[str], list[list[str]]]:
    """Head and lines of the table of parameters; columns that no parameter has a number for are left out."""
    rows = summary["parameters"][:most]
    quantiles = [f"{100 * q:g} %" for q in QUANTILES]
    keys = {
        "mean": "mean",
        "mcse": "± (mcse)",
        "sd": "sd",
        "q5": quantiles[0],
        "q50": quantiles[1],
        "q95": quantiles[2],
    }
    keys |= {"ess": "ESS", "rhat": "R-hat"}
    keys = {k: v for k, v in keys.items() if any(row[k] is not None for row in rows)}
    lines = []
    for row in rows:
        digits = _digits(row["mcse"], max(abs(row[k] or 0.0) for k in ("mean", "sd", "q5", "q95")))
        cells = {k: _show(row[k], digits) for k in keys}
        if "ess" in keys:
            cells["ess"] = _show(row["ess"], 0)
        if "rhat" in keys:
            cells["rhat"] = _show(row["rhat"], 3)
        lines.append([row["name"], *cells.values()])
    return ["parameter", *keys.values()], lines


def _exact_values(draws: Draws) -> Tensor | None:
    """Exact draws of the target, on the parameters' scale, where there are any."""
    if not draws.target.exact:
        return None
    x = draws.target.sample(_EXACT, seed=0)
    return x if draws.target.parameters is None else draws.target.parameters.flat(x)


def _parameters(page: Page, draws: Draws, summary: Mapping[str, Any], exact: Tensor | None) -> None:
    page.section("Parameters")
    head, lines = parameters_table(summary, _MOST_ROWS)
    count = len(summary["parameters"])
    some = f" The first {_MOST_ROWS} of {count}; summary.json has all." if count > _MOST_ROWS else ""
    page.table(
        head,
        lines,
        f"Weighted mean, its standard error over repeats, deviation and quantiles of each parameter.{some}",
    )
    shown = min(count, _MOST_MARGINALS)
    beside = f" The line is that of {_EXACT} exact samples." if exact is not None else ""
    page.picture(
        png(marginals_figure(draws, exact)),
        f"Histograms of {shown} parameter{_s(shown)}.",
        f"Marginals of {'the first ' if shown < count else ''}{shown} parameter{_s(shown)}, weighted.{beside} What "
        "lies beyond the quantiles 0.5 % and 99.5 % is outside the frame.",
    )
    if count > 1:
        modes = " Crosses are the target's modes." if _mode_places(draws) is not None else ""
        page.picture(
            png(pair_figure(draws, exact)),
            "Scatter plot of the first two parameters.",
            f"The first two parameters, {_pairs(draws)} draws of equal weight.{modes}",
        )


def _frame(values: Sequence[tuple[Tensor, Tensor | None]]) -> tuple[float, float]:
    """Quantiles .005 and .995 over sets of numbers (n,) with weights, and a margin."""
    low, high = math.inf, -math.inf
    for v, w in values:
        v = v.double().cpu()
        ordered, index = v.sort()
        share = torch.full_like(v, 1 / len(v)) if w is None else w.cpu()
        at = torch.searchsorted(share[index].cumsum(0), torch.tensor([0.005, 0.995], dtype=torch.float64))
        ends = ordered[at.clamp(max=len(v) - 1)]
        low, high = min(low, float(ends[0])), max(high, float(ends[1]))
    margin = 0.04 * (high - low) or 0.5
    return low - margin, high + margin


def marginals_figure(draws: Draws, exact: Tensor | None = None) -> Figure:
    """Weighted histograms of up to 12 parameters; exact draws (n, scalars) as a line beside them."""
    values, labels = draws.values.detach(), draws.target.labels
    shown = min(len(labels), _MOST_MARGINALS)
    columns = min(4, shown)
    rows = -(-shown // columns)
    figure, axes = new_figure(2.5 * columns + (1.0 if shown == 1 else 0.0), 2.0 * rows + 0.3, rows, columns)
    bins = int(min(60, max(12, math.sqrt(_worth(draws)))))
    for i, ax in enumerate(axes.flat):
        if i >= shown:
            ax.set_axis_off()
            continue
        parts: list[tuple[Tensor, Tensor | None]] = [(values[:, i], draws.weights)]
        if exact is not None:
            parts.append((exact[:, i], None))
        low, high = _frame(parts)
        edges = np.linspace(low, high, bins + 1)
        height, _ = np.histogram(_numpy(values[:, i]), edges, weights=_numpy(draws.weights))
        ax.stairs(height / np.diff(edges), edges, fill=True, color=PALETTE[0], alpha=0.55, label="draws")
        if exact is not None:
            height, _ = np.histogram(_numpy(exact[:, i]), edges)
            ax.stairs(height / len(exact) / np.diff(edges), edges, color=PALETTE[1], linewidth=1.3, label="exact")
        ax.set_xlabel(labels[i], fontsize=8)
        ax.set_yticks([])
        ax.spines["left"].set_visible(False)
        ax.grid(False)
        ax.xaxis.set_major_locator(MaxNLocator(4))
    if exact is not None:
        handles, names = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper right", ncols=2, fontsize=7, frameon=False)
    for ax in axes[:, 0]:
        ax.set_ylabel("density", fontsize=8)
    return figure


def _numpy(x: Tensor) -> np.ndarray:
    return x.detach().double().cpu().numpy()


def _worth(draws: Draws) -> int:
    """Effective draws, or all where their number is not known (chains that never moved have none)."""
    known = draws.ess is not None and math.isfinite(draws.ess) and draws.ess >= 1
    return min(len(draws.x), int(draws.ess)) if known else len(draws.x)  # type: ignore[arg-type]


def _pairs(draws: Draws) -> int:
    return min(2000, _worth(draws))


def _mode_places(draws: Draws) -> Tensor | None:
    modes = getattr(draws.target, "modes", None)
    return None if modes is None or draws.target.parameters is not None or len(modes) > 200 else modes


def pair_figure(draws: Draws, exact: Tensor | None = None) -> Figure:
    """The first two parameters of draws of equal weight, over exact draws (n, scalars), with the target's modes."""
    labels, values = draws.target.labels, draws.values.detach().cpu()
    generator = torch.Generator().manual_seed(0)
    if draws.walker_log_weights is None:
        index = torch.randperm(len(values), generator=generator)[: _pairs(draws)]
    else:
        index = torch.multinomial(draws.weights.cpu(), _pairs(draws), replacement=True, generator=generator)
    figure, axes = new_figure(4.6, 4.2)
    ax = axes[0, 0]
    if exact is not None:
        some = exact[: _pairs(draws)]
        ax.scatter(*_numpy(some[:, :2]).T, s=4, alpha=0.35, color=PALETTE[1], linewidths=0, label="exact")
    ax.scatter(*_numpy(values[index, :2]).T, s=5, alpha=0.5, color=PALETTE[0], linewidths=0, label="draws")
    modes = _mode_places(draws)
    if modes is not None:
        ax.scatter(*_numpy(modes[:, :2]).T, s=28, color=PALETTE[6], marker="x", linewidths=1.0, label="modes")
    parts: list[tuple[Tensor, Tensor | None]]
    for axis, limit in ((0, ax.set_xlim), (1, ax.set_ylim)):
        parts = [(values[:, axis], draws.weights)]
        if exact is not None:
            parts.append((exact[:, axis], None))
        if modes is not None:
            parts.append((modes[:, axis], None))
        limit(*_frame(parts))
    ax.set_xlabel(labels[0], fontsize=8)
    ax.set_ylabel(labels[1], fontsize=8)
    if len(ax.collections) > 1:
        figure.legend(loc="outside upper right", ncols=3, fontsize=7, frameon=False, markerscale=1.6)
    return figure


# -- evidence and modes ------------------------------------------------------------------------------------------------


_PROMISES = {
    "unbiased": "Unbiased: levels and steps were fixed before the run, so that the mean of the estimates of Z is Z.",
    "consistent": "Consistent: the estimate tends to Z as the run grows, but is not unbiased in a run of this size.",
}


def _evidence(page: Page, summary: Mapping[str, Any]) -> None:
    value, error, truth = summary["log_z"], summary["log_z_std_error"], summary["true_log_z"]
    digits = _digits(error, abs(value or 0.0))
    said = f"log Z = {_show(value, digits)}" + ("" if error is None else f" ± {_show(error, digits)}")
    said += "" if truth is None else f"; the target's is {_show(truth, digits)}"
    page.text(f"{said}. {_PROMISES.get(summary['promise'], '')}")
    page.picture(
        png(evidence_figure(summary)),
        f"log Z of each of {len(summary['repeat_log_z'])} repeats. {said}.",
        "Estimates of log Z by repeat; the band is their pooled value ± one standard error"
        + ("." if truth is None else ", the dashed line the truth."),
    )


def evidence_figure(summary: Mapping[str, Any]) -> Figure:
    """log Z of each repeat, the pooled value with a band of one standard error, and the truth."""
    figure, axes = new_figure(5.6, 2.6)
    ax = axes[0, 0]
    z = [math.nan if v is None else v for v in summary["repeat_log_z"]]
    ax.plot(range(1, len(z) + 1), z, marker=MARKERS[0], linestyle="none", color=PALETTE[0], label="repeat")
    value, error, truth = summary["log_z"], summary["log_z_std_error"], summary["true_log_z"]
    if value is not None:
        ax.axhline(value, color=PALETTE[0], linewidth=1.0, label="pooled")
        if error is not None:
            ax.axhspan(value - error, value + error, color=PALETTE[0], alpha=0.15, linewidth=0)
    if truth is not None:
        ax.axhline(truth, color=PALETTE[1], linestyle="--", linewidth=1.3, label="truth")
    ax.set_xlabel("repeat", fontsize=8)
    ax.set_ylabel("log Z, nats", fontsize=8)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlim(0.4, len(z) + 0.6)
    ax.ticklabel_format(axis="y", useOffset=False)
    figure.legend(loc="outside right center", fontsize=7, frameon=False)
    return figure


def _modes(page: Page, modes: Mapping[str, Any]) -> None:
    page.section("Modes")
    count = len(modes["weights"])
    found = sum(1 for w in modes["weights"] if w)
    page.text(
        f"{found} of {count} modes have been visited; weights are {_show(modes['total_variation'])} from the true ones "
        "in total variation."
    )
    page.picture(
        png(modes_figure(modes)),
        f"Weights of {min(count, _MOST_MODES)} modes beside the true ones.",
        f"Weight of each mode, with its standard error over repeats, and its true weight."
        f"{f' The first {_MOST_MODES} modes of {count}.' if count > _MOST_MODES else ''}",
    )


def modes_figure(modes: Mapping[str, Any]) -> Figure:
    """Weights of modes as bars with standard errors, true weights as markers."""
    weights, truth = modes["weights"][:_MOST_MODES], modes["true_weights"][:_MOST_MODES]
    errors = [e or 0.0 for e in modes["std_errors"][:_MOST_MODES]]
    count = len(weights)
    figure, axes = new_figure(min(9.0, 3.2 + 0.18 * count), 2.7)
    ax = axes[0, 0]
    place = range(1, count + 1)
    ax.bar(place, weights, yerr=errors, color=PALETTE[0], alpha=0.75, error_kw={"linewidth": 1.0}, label="draws")
    ax.plot(place, truth, marker="_", markersize=max(4.0, min(14.0, 260 / count)), markeredgewidth=2.0, label="truth",
            color=PALETTE[1], linestyle="none")  # fmt: skip
    ax.set_xlabel("mode", fontsize=8)
    ax.set_ylabel("weight", fontsize=8)
    ax.grid(False, axis="x")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside right center", fontsize=7, frameon=False)
    return figure


# -- weights, chains, levels -------------------------------------------------------------------------------------------


def _relative_weights(draws: Draws) -> Tensor:
    """log of each walker's weight over the mean, (n,); walkers of weight 0 left out."""
    assert draws.walker_log_weights is not None
    log_w = draws.walker_log_weights.double().reshape(-1).cpu()
    log_w = log_w - log_w.logsumexp(0) + math.log(len(log_w))
    return log_w[torch.isfinite(log_w)]


def _spread(draws: Draws) -> float:
    log_w = _relative_weights(draws)
    return float(log_w.max() - log_w.min())


def log_weights_figure(draws: Draws) -> Figure:
    """Histogram of log weights relative to their mean."""
    log_w = _relative_weights(draws)
    figure, axes = new_figure(4.8, 2.6)
    ax = axes[0, 0]
    bins = int(min(60, max(10, math.sqrt(len(log_w)))))
    spread = float(log_w.max() - log_w.min())
    ends = (float(log_w.min()), float(log_w.max())) if spread > 1e-6 else (-0.5, 0.5)
    ax.hist(_numpy(log_w), bins=bins, range=ends, color=PALETTE[0], alpha=0.75)
    ax.axvline(0.0, color=GREY, linestyle="--", linewidth=1.2)
    ax.set_xlabel("log of weight / mean weight, nats", fontsize=8)
    ax.set_ylabel("walkers", fontsize=8)
    return figure


def traces_figure(draws: Draws, chains: int = 4) -> Figure:
    """States of a few chains for up to four parameters, those of the largest R-hat."""
    repeats, walkers, length, _ = draws.states.shape
    values = draws.values.detach().reshape(repeats * walkers, length, -1)
    rhat = draws.rhat
    order = range(values.shape[-1]) if rhat is None else torch.nan_to_num(rhat).argsort(descending=True).tolist()
    shown = sorted(list(order)[:_MOST_TRACES])
    figure, axes = new_figure(7.4, 1.35 * len(shown) + 0.5, len(shown), 1, sharex=True)
    pick = torch.linspace(0, len(values) - 1, min(chains, len(values))).round().long().unique().tolist()
    for ax, k in zip(axes[:, 0], shown, strict=True):
        for i, chain in enumerate(pick):
            ax.plot(range(1, length + 1), _numpy(values[chain, :, k]), color=PALETTE[i], linewidth=0.8)
        title = draws.target.labels[k] if rhat is None else f"{draws.target.labels[k]},  R-hat {float(rhat[k]):.3f}"
        ax.set_title(title, fontsize=8, loc="left")
        ax.set_xlim(1, length)
    axes[-1, 0].set_xlabel("kept state", fontsize=8)
    axes[-1, 0].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


_RECORDS = {
    "acceptance": "acceptance",
    "rejection": "rejected exchanges",
    "ess": "ESS / walkers",
    "cess": "conditional ESS",
    "step": "step ε, units of y²",
    "log_z": "log Z up to u, nats",
    "barrier": "barrier up to u",
    "round_trips": "round trips",
}


def _records(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What at least two levels have recorded."""
    return [k for k in _RECORDS if sum(row.get(k) is not None for row in rows) > 1]


def levels_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """What was recorded at each level against u: a panel for each record that levels have."""
    keys = _records(rows)
    panels = len(keys)
    columns = min(3, panels) or 1
    lines = max(1, -(-panels // columns))
    figure, axes = new_figure(3.1 * columns, 2.2 * lines + 0.2, lines, columns)
    for ax, key in zip(axes.flat, keys, strict=False):
        since = 1 if key == "round_trips" else 0  # a trip is from the first level and back to it
        points = [(row["u"], row[key]) for row in rows[since:] if row.get(key) is not None]
        u, values = [p[0] for p in points], [p[1] for p in points]
        ax.plot(u, values, color=PALETTE[0], linewidth=1.1, marker=MARKERS[0] if len(u) <= 40 else None, markersize=3)
        ax.set_ylabel(_RECORDS[key], fontsize=8)
        ax.set_xlabel("u", fontsize=8)
        _u_axis(ax, [row["u"] for row in rows])
        if key == "step" and min(values) > 0 and max(values) > 30 * min(values):
            ax.set_yscale("log")
        elif key in ("acceptance", "rejection", "ess", "cess"):
            ax.set_ylim(0, 1.04)
    for ax in axes.flat[panels:]:
        ax.set_axis_off()
    return figure


def _u_axis(ax: Axes, u: Sequence[float]) -> None:
    """Linear in u, unless half of the levels lie within the first tenth: logarithmic then, with room for 0."""
    positive = sorted(v for v in u if v > 0)
    if len(positive) > 2 and positive[len(positive) // 2] < 0.1:
        ax.set_xscale("symlog", linthresh=positive[0])
        ax.xaxis.set_minor_locator(MaxNLocator(1))
    ax.set_xlim(-0.02 if ax.get_xscale() == "linear" else 0.0, 1.02 if ax.get_xscale() == "linear" else 1.2)


def _cost(page: Page, summary: Mapping[str, Any]) -> None:
    page.section("Cost")
    spent, ess, total = summary["evaluations"], summary["ess"], summary["draws"]["total"]
    facts = [
        ("gradients", f"{spent['gradients']}"),
        ("values alone", f"{spent['values']}"),
        ("evaluations per draw", f"{spent['total'] / total:.4g}"),
    ]
    if ess:
        facts.append(("evaluations per effective draw", f"{spent['total'] / ess:.4g}"))
    if summary["acceptance"] is not None:
        facts.append(("acceptance at the last level", f"{summary['acceptance']:.3f}"))
    if summary["relative_step"] is not None:
        facts.append(("largest relative step ε L", f"{summary['relative_step']:.3g}"))
    if summary["seconds"] is not None:
        facts.append(("time", f"{summary['seconds']:.1f} s"))
    page.facts(facts)
    page.text("A value and a gradient of one point at once count as one gradient; a pilot run is counted.")
