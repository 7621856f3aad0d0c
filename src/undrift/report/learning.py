"""How a sampler of a density was trained, and between what it puts log Z: a line, a table and a figure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from undrift.report.html import Page
from undrift.report.plots import MARKERS, PALETTE, new_figure, png

__all__ = ["add_bounds", "add_training", "bounds_line", "bounds_table", "learning_figure"]

_PANELS = {
    "loss": ("loss",),
    "nats": ("elbo", "log_z"),
    "ESS / paths": ("ess",),
    "norm of the gradient": ("gradient_norm",),
}
_NAMES = {"elbo": "ELBO", "log_z": "log Z"}


def _number(value: Any) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


# -- bounds ------------------------------------------------------------------------------------------------------------


def bounds_line(bounds: Mapping[str, Any]) -> str:
    """ELBO, EUBO and forward ESS of a summary in a line; what is not known is left out."""
    parts = ["ELBO -inf" if bounds["elbo"] is None else f"ELBO {_estimate(bounds['elbo'], bounds['elbo_std_error'])}"]
    if bounds["eubo"] is not None:
        parts.append(f"EUBO {_estimate(bounds['eubo'], bounds['eubo_std_error'])}")
    if bounds["forward_ess"] is not None:
        parts.append(f"forward ESS {bounds['forward_ess']:.3g}")
    return ", ".join(parts)


def _estimate(value: float, error: float | None) -> str:
    return f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")


def bounds_table(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and lines of a table of log Z and its bounds, from below to above."""
    bounds = summary["bounds"]
    rows = [
        ("ELBO, below log Z", "-inf" if bounds["elbo"] is None else bounds["elbo"], bounds["elbo_std_error"]),
        ("log Z, from the draws", summary["log_z"], summary["log_z_std_error"]),
        ("log Z, from exact samples", bounds["forward_log_z"], None),
        ("log Z of the target", summary["true_log_z"], None),
        ("EUBO, above log Z", bounds["eubo"], bounds["eubo_std_error"]),
    ]

    def cell(value: Any) -> str:
        return "–" if value is None else value if isinstance(value, str) else f"{value:.4f}"

    return ["", "nats", "±"], [[name, cell(value), cell(error)] for name, value, error in rows if value is not None]


def add_bounds(page: Page, summary: Mapping[str, Any]) -> None:
    """The bounds of a summary as a table, in the section that is open."""
    said = "Mean log weight of the sampler's paths (ELBO) lies below log Z, by the less the better it was trained."
    if summary["bounds"]["eubo"] is not None:
        said += (
            " That of paths walked back from exact samples (EUBO) lies above, and shows what the sampler never visits; "
            "log Z and effective share by these paths need no draws."
        )
    head, lines = bounds_table(summary)
    page.table(head, lines, said)
    page.text(f"{bounds_line(summary['bounds'])}.")


# -- training ----------------------------------------------------------------------------------------------------------


def add_training(page: Page, rows: Sequence[Mapping[str, Any]], true_log_z: float | None = None) -> None:
    """The section on training.

    Args:
        page: of the report.
        rows: as of :class:`undrift.density.Draws`; not empty.
        true_log_z: of the target, where it is known.
    """
    page.section("Training")
    first, last = rows[0], rows[-1]
    steps = f"{last.get('step', len(rows))} steps"
    seconds, skipped = _number(last.get("seconds")), int(last.get("skipped") or 0)
    said = steps + ("" if seconds is None else f", {seconds:.1f} s") + (f", {skipped} skipped" if skipped else "")
    if not _shown(rows):
        page.text(f"{said}.")
        return
    ends = [f"{'–' if v is None else format(v, '.3g')}" for v in (_number(r.get("loss")) for r in (first, last))]
    page.picture(
        png(learning_figure(rows, true_log_z)),
        f"Records of training against the step; the loss goes from {ends[0]} to {ends[1]} over {steps}.",
        f"{said}. Nats and ESS are those of the paths that were trained on; early ones may lie outside of the frame."
        + (" The dashed line is the target's log Z." if _has(rows, "elbo") and true_log_z is not None else ""),
    )


def _has(rows: Sequence[Mapping[str, Any]], key: str) -> bool:
    return any(_number(row.get(key)) is not None for row in rows)


def _shown(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [panel for panel, keys in _PANELS.items() if any(_has(rows, key) for key in keys)]


def learning_figure(rows: Sequence[Mapping[str, Any]], true_log_z: float | None = None) -> Figure:
    """Loss, ELBO and log Z, ESS and gradient against the step: a panel for each that the rows know."""
    shown = _shown(rows)
    columns = min(2, len(shown)) or 1
    lines = max(1, -(-len(shown) // columns))
    figure, axes = new_figure(3.9 * columns, 2.4 * lines + 0.1, lines, columns)
    for ax, panel in zip(axes.flat, shown, strict=False):
        keys = [key for key in _PANELS[panel] if _has(rows, key)]
        late: list[float] = []
        for i, key in enumerate(keys):
            known = [(row.get("step", n), _number(row.get(key))) for n, row in enumerate(rows, 1)]
            points = [(step, value) for step, value in known if value is not None]
            values = [value for _, value in points]
            late += values[len(values) // 4 :]
            ax.plot(
                [step for step, _ in points],
                values,
                color=PALETTE[2 * i],
                linewidth=1.1,
                marker=MARKERS[i] if len(points) < 3 else None,
                label=_NAMES.get(key, key),
            )
        if panel == "nats":
            if true_log_z is not None:
                ax.axhline(true_log_z, color=PALETTE[1], linestyle="--", linewidth=1.3, label="target's log Z")
                late.append(true_log_z)
            margin = 0.06 * (max(late) - min(late)) or 0.5
            ax.set_ylim(min(late) - margin, max(late) + margin)
            ax.ticklabel_format(axis="y", useOffset=False)
            ax.legend(fontsize=7, frameon=False, loc="lower right")
        elif panel == "ESS / paths":
            ax.set_ylim(0, 1.04)
        elif min(values) > 0:
            ax.set_yscale("log")
        else:
            ax.set_yscale("symlog", linthresh=1.0)
        ax.set_xlabel("training step", fontsize=8)
        ax.set_ylabel(panel, fontsize=8)
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    for ax in axes.flat[len(shown) :]:
        ax.set_axis_off()
    return figure
