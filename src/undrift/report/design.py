"""The report of a design: predictions ranked at each budget of calls, and where their errors come from."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from undrift.report.comparison import number
from undrift.report.files import write_bytes
from undrift.report.html import Page
from undrift.report.plots import GREY, MARKERS, PALETTE, _call_axis, new_figure, png

__all__ = ["CAVEAT", "design_table", "strange_line", "write_design_report"]

About = Mapping[str, Any]

CAVEAT = (
    "Predictions are exact for Gaussian data with this spectrum and a denoiser without error. Real data is not "
    "Gaussian and no network is exact: take the ranking as where to look first, and measure before you rely on it."
)
KINDS = ("classical", "optimised", "searched")
_SHOWN = 10  # lines of a ranking
_FRAME = 100  # times the best value, beyond which a plan is out of the figure
_HEAD = ("process", "sampler", "grid", "kind", "calls", "W2", "KL", "rank", "strangeness", "gain")


def design_table(about: About, calls: int) -> tuple[list[str], list[list[str]], int]:
    """Head and lines of a budget's ranking, and which line is the plan to use.

    The best of all plans, the best one of each kind, and the best one from a measured loss. A strangeness that speaks
    against a plan has a mark.
    """
    budget = about["budgets"][str(calls)]
    order = [i for i, row in enumerate(about["plans"]) if row["budget"] == calls]
    measured = [i for i in order if about["plans"][i]["grid"] == "measured loss"][:1]
    shown = sorted({*order[:_SHOWN], *budget["best"].values(), *measured})
    lines = []
    for i in shown:
        row = about["plans"][i]
        strange = f"{row['strangeness']:.2g}" + ("" if row["trusted"] else " !")
        numbers = [str(row["calls"]), f"{row['w2']:.4g}", f"{row['kl']:.4g}"]
        numbers += [f"{row['rank']:.4g}", strange, f"{row['gain']:.3g}"]
        lines.append([row["process"], row["sampler"], row["grid"], row["kind"], *numbers])
    return list(_HEAD), lines, shown.index(budget["use"])


def strange_line(about: About, calls: int) -> str:
    """What is wrong with plans that rank well by strange means; empty if none does."""
    budget = about["budgets"][str(calls)]
    rows = [row for row in about["plans"] if row["budget"] == calls]
    used = about["plans"][budget["use"]]
    marked = sum(not row["trusted"] for row in rows[:_SHOWN])
    why = (
        f"it was not trained on (strangeness above {about['strange']:g} nats per coordinate, summed over calls), about "
        "which no theory tells"
    )
    if not used["trusted"]:
        return f"no plan of {calls} calls can be trusted: all show the denoiser inputs that {why}; allow more calls."
    if marked == 1:
        return f"one of the best plans is marked (!) and not chosen: it shows the denoiser inputs that {why}."
    if marked:
        return f"{marked} of the best plans are marked (!) and not chosen: they show the denoiser inputs that {why}."
    return ""


def write_design_report(place: Path, reproduce: Callable[[Page], None]) -> Path:
    """Write ``report.html`` from the folder's design.json.

    Args:
        place: the folder.
        reproduce: adds the last section.
    """
    about = json.loads((place / "design.json").read_text(encoding="utf-8"))
    spectrum = about["spectrum"]
    budgets = ", ".join(str(n) for n in about["calls"])
    page = Page(
        f"undrift: {place.resolve().name}",
        f"What to use for {spectrum['name']}, {spectrum['dim']:g} coordinates, in {budgets} network calls. "
        + about["caption"],
    )
    _answer(page, about)
    _rankings(page, about)
    page.section("Where the error comes from")
    page.picture(
        png(sources_figure(about)),
        "Bars of W2 with all sources of error on, and with one alone, for each budget.",
        "W2 of the chosen plans with their sources of error switched off. Start: the prior stands for the law at the "
        "first noise level. Discretisation: finite steps. Score: the measured loss in excess of what a linear denoiser "
        "reaches, which is the least that the network's error can be; without a run there is none, and only with one "
        "is the whole more than the prediction above. W2 does not add up over sources. None: what a refined walk "
        "leaves, which is the final call at the last noise level.",
    )
    if any(b["path"] for b in about["budgets"].values()):
        page.picture(
            png(path_figure(about)),
            "Bars of the path KL: of the start, and of each step.",
            "Path KL, the divergence of the whole walk, in nats; it adds up over start and steps. It is finite for "
            f"samplers with noise only, and shown for the best such plans: {_walkers(about)}.",
        )
    page.picture(
        png(modes_figure(about)),
        "Error of the deviation of samples along each eigenvector of the data, against the data's deviation there.",
        "Which directions of the data are wrong: the chosen plans' error along each eigenvector, against the data's "
        "deviation along it. On the dashed line all of that deviation is missed. For natural images, and for the plane "
        "waves of an fft basis, small deviations are high frequencies.",
    )
    page.section("Schedules")
    page.picture(
        png(schedules_figure(about)),
        "Noise level of each call for the chosen plans, and for equal steps in log sigma and rho = 7.",
        "At which noise levels the chosen plans call the denoiser, beside two usual grids.",
    )
    if about["loss"]:
        _loss(page, about["loss"])
    if about["verified"]:
        _verified(page, about)
    if about["left_out"]:
        page.section("Left out")
        pairs: dict[tuple[str, str, str], list[Any]] = {}
        for row in about["left_out"]:
            pairs.setdefault((row["process"], row["sampler"], row["why"]), []).append(row["grid"])
        lines = [[p, s, ", ".join(dict.fromkeys(grids)), why] for (p, s, why), grids in pairs.items()]
        page.table(["process", "sampler", "grids", "why"], lines, "Combinations that do not exist.", 4)
    reproduce(page)
    return write_bytes(place / "report.html", page.render().encode())


def _walkers(about: About) -> str:
    names = []
    for n in about["calls"]:
        path = about["budgets"][str(n)]["path"]
        if path:
            row = about["plans"][path["plan"]]
            names.append(f"{n} calls, {row['sampler']} on {row['process']} ({row['grid']}), {path['kl']:.3g} in all")
    return "; ".join(names)


def _answer(page: Page, about: About) -> None:
    page.section("What to use")
    for n in about["calls"]:
        row = about["plans"][about["budgets"][str(n)]["use"]]
        gain = "" if row["kind"] == "classical" else f", {row['gain']:.3g} times better than the best classical plan"
        page.text(
            f"{n} calls: {row['sampler']} on {row['process']}, grid {row['grid']} ({row['kind']}): predicted W2 "
            f"{row['w2']:.4g}, KL {row['kl']:.4g} nats{gain}. Run it with undrift sample RUN --config best-{n}.yaml."
        )
    page.picture(
        png(quality_figure(about)),
        "Predicted W2 and KL of the best plan of each kind against the number of calls.",
        "Predictions against network calls; lower is better. Dots are all classical plans within a hundred times the "
        f"best; lines join the best plan of each kind by {_metric(about)}, marked plans left aside where there are "
        f"others. KL is taken at a resolution of {about['resolution']:.3g} data units.",
    )


def _metric(about: About) -> str:
    return "W2" if about["metric"] == "w2" else "KL"


def _rankings(page: Page, about: About) -> None:
    page.section("Rankings")
    for n in about["calls"]:
        head, lines, use = design_table(about, n)
        count = sum(row["budget"] == n for row in about["plans"])
        page.heading(f"{n} calls")
        page.table(
            head,
            lines,
            f"The best of {count} plans by {_metric(about)}, and the best of each kind; the one to use stands out. W2 "
            "in data units, KL in nats; rank is W2 (or KL), for samplers that remember its geometric mean with order "
            "1's; gain is that of the best classical plan over it.",
            4,
            [(use, 5 if about["metric"] == "w2" else 6)],
        )
        warning = strange_line(about, n)
        if warning:
            page.text(f"Warning: {warning}")


def _loss(page: Page, loss: Mapping[str, Any]) -> None:
    page.section("The denoiser's loss")
    page.picture(
        png(loss_figure(loss)),
        "Measured loss and the Gaussian error against the noise level, and their ratio.",
        f"Loss on {loss['data']}, summed over coordinates, with twice its standard error, beside the error of the best "
        "linear denoiser, which is what Gaussian data of this spectrum allows. Below it the network knows more about "
        "the data than its spectrum; above it the difference is error of the network.",
    )


def _verified(page: Page, about: About) -> None:
    told = about["verified"]
    page.section("Predicted and measured")
    lines = []
    for row in told["rows"]:
        plan = about["plans"][row["plan"]]
        names = [plan["kind"], plan["process"], plan["sampler"], plan["grid"]]
        lines.append([*names, str(plan["calls"]), f"{plan['w2']:.4g}", f"{plan['kl']:.4g}", number(row)])
    marks = []
    for n in about["calls"]:
        here = [i for i, row in enumerate(told["rows"]) if about["plans"][row["plan"]]["budget"] == n]
        if here:
            marks.append((min(here, key=lambda i: told["rows"][i]["distance"]), 7))
    floor = "" if told["floor"] is None else f" Held-out data: {told['floor']:.4g}."
    page.table(
        ["kind", "process", "sampler", "grid", "calls", "predicted W2", "predicted KL", told["measure"]],
        lines,
        f"{told['caption']} The best measured plan of each budget stands out.{floor}",
        4,
        marks,
    )


# -- figures -----------------------------------------------------------------------------------------------------------


def quality_figure(about: About) -> Figure:
    """Predicted W2 and KL against calls: all classical plans, and the best of each kind."""
    figure, axes = new_figure(9.0, 3.2, 1, 2)
    for ax, key, name in zip(axes[0], ("w2", "kl"), ("W2, data units", "KL, nats"), strict=True):
        best = []
        for j, kind in enumerate(KINDS):
            points = [about["plans"][b["best"][kind]] for b in about["budgets"].values() if kind in b["best"]]
            if points:
                best += [row[key] for row in points]
                ax.plot(
                    [row["budget"] for row in points],
                    [row[key] for row in points],
                    color=PALETTE[j],
                    marker=MARKERS[j],
                    markersize=5,
                    label=f"best {kind}",
                    zorder=3,
                )
        rest = [r for r in about["plans"] if r["kind"] == "classical" and 0 < r[key] < _FRAME * max(best)]
        ax.scatter([r["budget"] for r in rest], [r[key] for r in rest], s=7, color=GREY, alpha=0.4, linewidths=0)
        _call_axis(ax, about["calls"])
        ax.set_xlabel("network calls per sample", fontsize=8)
        ax.set_ylabel(f"predicted {name}", fontsize=8)
    axes[0, 0].legend(fontsize=7, frameon=False)
    return figure


def sources_figure(about: About) -> Figure:
    """W2 of the chosen plans with all sources of error, each alone, and none."""
    names = list(dict.fromkeys(n for b in about["budgets"].values() for n in b["sources"] if "all but" not in n))
    figure, axes = new_figure(6.5, 3.0)
    ax = axes[0, 0]
    width = 0.8 / len(names)
    for j, name in enumerate(names):
        for i, n in enumerate(about["calls"]):
            value = about["budgets"][str(n)]["sources"].get(name)
            if value:
                ax.bar(
                    i + (j - (len(names) - 1) / 2) * width,
                    value,
                    width,
                    color=PALETTE[j % len(PALETTE)],
                    hatch=("", "//", "..", "xx", "--")[j % 5],
                    edgecolor="white",
                    label=name if i == 0 else None,
                )
    seen = [v for b in about["budgets"].values() for n, v in b["sources"].items() if n in names and v > 0]
    ax.set_yscale("log")
    ax.set_ylim(bottom=0.5 * min(seen, default=1.0))
    ax.tick_params(which="both", labelsize=8)
    ax.set_xticks(range(len(about["calls"])), [f"{n} calls" for n in about["calls"]])
    ax.set_ylabel("W2, data units", fontsize=8)
    figure.legend(loc="outside lower center", ncols=len(names), fontsize=7, frameon=False)
    return figure


def _panels(about: About, count: int, height: float = 2.9) -> tuple[Figure, list[Axes]]:
    columns = min(3, count)
    lines = -(-count // columns)
    figure, axes = new_figure(3.4 * columns, height * lines, lines, columns)
    for ax in axes.flat[count:]:
        ax.set_axis_off()
    return figure, list(axes.flat[:count])


def path_figure(about: About) -> Figure:
    """E_I, and E_D and E_S of each step, for the best plan of each budget that has a path KL."""
    found = [(n, about["budgets"][str(n)]["path"]) for n in about["calls"] if about["budgets"][str(n)]["path"]]
    figure, axes = _panels(about, len(found))
    for ax, (n, path) in zip(axes, found, strict=True):
        count = len(path["discretisation"])
        steps = range(1, count + 1)
        parts: list[tuple[str, Sequence[float], Sequence[float], float]] = [
            ("start", [0], [path["start"]], 0.8),
            ("discretisation", list(steps), path["discretisation"], 0.4),
        ]
        if path["score"] is not None:
            parts.append(("score, at least", [i + 0.4 for i in steps], path["score"], 0.4))
        for j, (name, places, values, width) in enumerate(parts):
            style: dict[str, Any] = {"color": PALETTE[(2, 0, 1)[j]], "hatch": ("..", "", "//")[j]}
            ax.bar(places, values, width, edgecolor="white", label=name, **style)
        top = max(path["start"], *path["discretisation"], *(path["score"] or []))
        ax.set_yscale("log")
        ax.set_ylim(1e-7 * top, 2 * top)
        every = max(1, math.ceil(count / 6))
        shown = [0, *list(steps)[::every]]
        ax.set_xticks(shown, ["start", *[f"{path['sigma'][i - 1]:.2g}" for i in shown[1:]]])
        ax.set_xlabel("noise level that the step begins at", fontsize=8)
        ax.set_ylabel("path KL, nats", fontsize=8)
        ax.set_title(f"{n} calls", fontsize=9, loc="left")
    axes[0].legend(fontsize=7, frameon=False)
    return figure


def modes_figure(about: About) -> Figure:
    """Error along each eigenvector against the data's deviation along it, for the chosen plans."""
    figure, axes = new_figure(6.5, 3.4)
    ax = axes[0, 0]
    variance = torch.tensor(about["spectrum"]["variance"], dtype=torch.float64)
    alive = variance > 1e-12 * variance.max()
    deviation = variance[alive].sqrt()
    ax.plot(deviation, deviation, color=GREY, linestyle="--", linewidth=1, label="all of it missed")
    for j, n in enumerate(about["calls"]):
        error = torch.tensor(about["budgets"][str(n)]["modes"]["w2_squared"], dtype=torch.float64)[alive].sqrt()
        ax.plot(
            deviation,
            error.clamp(min=1e-12),
            color=PALETTE[j % len(PALETTE)],
            marker=MARKERS[j % len(MARKERS)],
            markersize=3,
            linewidth=1,
            label=f"{n} calls",
        )
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_ylim(bottom=float(deviation.min()) * 1e-3)
    ax.set_xlabel("deviation of the data along an eigenvector, data units", fontsize=8)
    ax.set_ylabel("error of the samples along it", fontsize=8)
    ax.legend(fontsize=7, frameon=False)
    return figure


def schedules_figure(about: About) -> Figure:
    """Noise levels of the calls of the chosen plans, beside usual grids; a panel for each budget."""
    figure, axes = _panels(about, len(about["calls"]))
    for ax, n in zip(axes, about["calls"], strict=True):
        for j, (name, levels) in enumerate(about["budgets"][str(n)]["levels"].items()):
            ax.plot(
                range(1, len(levels) + 1),
                levels,
                color=PALETTE[0] if j == 0 else GREY,
                linestyle=("-", "--", ":")[j],
                marker="o" if j == 0 else None,
                markersize=3.5,
                label=name,
            )
        row = about["plans"][about["budgets"][str(n)]["use"]]
        ax.set_yscale("log")
        grid = row["grid"] if row["kind"] == "classical" else row["kind"]
        ax.set_title(f"{n} calls, {grid}", fontsize=9, loc="left")
        ax.set_xlabel("call", fontsize=8)
        ax.set_ylabel("noise level σ, data units", fontsize=8)
    axes[0].legend(fontsize=7, frameon=False)
    return figure


def loss_figure(loss: Mapping[str, Sequence[float]]) -> Figure:
    """L(sigma) and the Gaussian mmse, and their ratio."""
    figure, axes = new_figure(9.0, 3.0, 1, 2)
    sigma, value, error, mmse = (
        torch.tensor(loss[k], dtype=torch.float64) for k in ("sigma", "loss", "std_error", "mmse")
    )
    for ax, scale, name in zip(axes[0], (torch.ones_like(mmse), mmse), ("loss", "loss / linear"), strict=True):
        ax.errorbar(
            sigma,
            value / scale,
            yerr=2 * error / scale,
            color=PALETTE[0],
            marker="o",
            markersize=3,
            capsize=2,
            linewidth=1.2,
            label="the network, measured",
        )
        ax.plot(sigma, mmse / scale, color=PALETTE[1], linestyle="--", label="the best linear denoiser")
        ax.set_xscale("log")
        ax.set_xlabel("noise level σ, data units", fontsize=8)
        ax.set_ylabel(name, fontsize=8)
    axes[0, 0].set_yscale("log")
    axes[0, 0].set_ylabel("E|x0 − D|², summed over coordinates", fontsize=8)
    axes[0, 0].legend(fontsize=7, frameon=False)
    return figure
