"""Figures of the report: object-oriented matplotlib on the Agg canvas, one palette, labelled axes.

The palette is Okabe and Ito's, which readers with any colour vision tell apart; markers and dashes repeat what colours
say.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator, StrMethodFormatter
from torch import Tensor

from undrift.process.linear import LinearProcess
from undrift.report.comparison import label
from undrift.report.tones import Tones
from undrift.sample import Trajectory

__all__ = [
    "comparison_figure",
    "grid_image",
    "kernel_figure",
    "new_figure",
    "png",
    "samples_figure",
    "training_figure",
    "walk_figure",
]

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
GREY = "#6b7280"


def new_figure(
    width: float, height: float, rows: int = 1, columns: int = 1, **options: Any
) -> tuple[Figure, np.ndarray]:
    """A figure of the report's style and its axes (rows, columns); sizes in inches."""
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(GREY)
        ax.tick_params(colors="#374151", labelsize=8)
        ax.grid(alpha=0.25, linewidth=0.6)
    return figure, axes


def png(figure: Figure) -> bytes:
    """A figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    return buffer.getvalue()


def kernel_figure(processes: Sequence[LinearProcess], names: Sequence[str] | None = None) -> Figure:
    """For each process the mean and the deviation of each channel against t; and sigma(t) of all of them."""
    names = names or [label(p) for p in processes]
    panels = len(processes) + 1
    columns = min(3, panels)
    rows = -(-panels // columns)
    figure, axes = new_figure(3.3 * columns, 2.7 * rows, rows, columns)
    last = axes.flat[panels - 1]
    fractions = torch.linspace(0, 1, 201, dtype=torch.float64)
    fractions[0] = 1e-4
    for i, process in enumerate(processes):
        t = fractions * process.horizon
        mean, root = process.kernel(t)
        deviation = root.square().sum(-1).sqrt()
        ax = axes.flat[i]
        for k in range(process.channels):
            colour = PALETTE[k % len(PALETTE)]
            channel = "data" if k == 0 else f"auxiliary {k}" if process.channels > 2 else "momentum"
            ax.plot(t, mean[:, k].detach(), color=colour, label=f"{channel}, mean")
            ax.plot(t, deviation[:, k].detach(), color=colour, linestyle="--", label=f"{channel}, deviation")
        ax.set_title(names[i], fontsize=9, loc="left")
        ax.set_xlabel("time t", fontsize=8)
        ax.legend(fontsize=6, frameon=False)
        if float(deviation.max()) > 20:
            ax.set_yscale("symlog", linthresh=1.0)
        colour, marker = PALETTE[i % len(PALETTE)], MARKERS[i % len(MARKERS)]
        last.plot(
            fractions,
            process.sigma(t).detach(),
            color=colour,
            marker=marker,
            markevery=40,
            markersize=4,
            label=names[i],
        )
    last.set_yscale("log")
    last.set_title("effective noise level", fontsize=9, loc="left")
    last.set_xlabel("time t / T", fontsize=8)
    last.set_ylabel("σ(t), data units", fontsize=8)
    last.legend(fontsize=6, frameon=False)
    for ax in axes.flat[panels:]:
        ax.set_axis_off()
    return figure


def training_figure(rows: Sequence[Mapping[str, Any]], loss: str = "weighted loss") -> Figure:
    """Loss, and norms of the gradients of the network and of a learned process, against the step.

    A loss that takes both signs, as a bound on a density can, has an axis that is linear within 1.
    """
    names = {
        "loss": loss,
        "gradient_norm": "norm of the gradient",
        "process_gradient_norm": "norm of the process's gradient",
    }
    shown = [key for key in names if key in rows[-1]]
    figure, axes = new_figure(4.0 * len(shown), 2.7, 1, len(shown))
    step = [r["step"] for r in rows]
    for ax, key in zip(axes[0], shown, strict=True):
        values = [r[key] for r in rows]
        ax.plot(step, values, color=PALETTE[0], marker="o" if len(step) < 3 else None)
        if min(values) > 0:
            ax.set_yscale("log")
        else:
            ax.set_yscale("symlog", linthresh=1.0)
        ax.set_xlabel("optimiser step", fontsize=8)
        ax.set_ylabel(names[key], fontsize=8)
    return figure


def comparison_figure(rows: Sequence[Mapping[str, Any]], measure: str, floor: float | None = None) -> Figure:
    """Distance against network calls, log-log: a panel for each process on common axes, a line for each sampler.

    The best sampler of a panel at the largest budget is named in its title; the dashed line is the floor.
    """
    processes = list(dict.fromkeys(r["process"] for r in rows))
    samplers = list(dict.fromkeys(r["sampler"] for r in rows))
    columns = min(3, len(processes))
    lines = -(-len(processes) // columns)
    figure, axes = new_figure(3.4 * columns, 2.8 * lines + 0.5, lines, columns, sharex=True, sharey=True)
    handles: dict[str, Any] = {}
    for ax, process in zip(axes.flat, processes, strict=False):
        for i, sampler in enumerate(samplers):
            part = sorted(
                (r for r in rows if (r["process"], r["sampler"]) == (process, sampler)), key=lambda r: r["calls"]
            )
            if not part:
                continue
            handles[sampler] = ax.errorbar(
                [r["calls"] for r in part],
                [r["distance"] for r in part],
                yerr=[r["std_error"] or 0.0 for r in part],
                color=PALETTE[i % len(PALETTE)],
                marker=MARKERS[i % len(MARKERS)],
                markersize=4.5,
                linewidth=1.5,
                capsize=2,
            )
        if floor is not None:
            handles["held-out data (floor)"] = ax.axhline(floor, color=GREY, linestyle="--", linewidth=1.2)
        ax.set_title(process, fontsize=9, loc="left")
        _call_axis(ax, sorted({r["budget"] for r in rows}))
    for ax in axes.flat[len(processes) :]:
        ax.set_axis_off()
    figure.supylabel(measure, fontsize=8)
    if out_of_frame(rows):
        axes[0, 0].set_ylim(top=_top(rows))
    for c in range(columns):  # the lowest panel of each column carries the axis
        used = [axes[r, c] for r in range(lines) if r * columns + c < len(processes)]
        used[-1].set_xlabel("network calls per sample", fontsize=8)
        used[-1].tick_params(labelbottom=True)
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=min(len(handles), 4),
        fontsize=8,
        frameon=False,
    )
    return figure


def _top(rows: Sequence[Mapping[str, Any]]) -> float:
    return 10 * float(np.median([r["distance"] for r in rows]))


def out_of_frame(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the comparison's figure leaves out what would squeeze all else: beyond ten times the median."""
    return max(r["distance"] for r in rows) > _top(rows)


def _call_axis(ax: Axes, budgets: Sequence[int]) -> None:
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.xaxis.set_major_locator(FixedLocator(list(budgets)))
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_minor_formatter(NullFormatter())


def _picture(x: Tensor, tones: Tones) -> np.ndarray:
    """One image (C, H, W) as bytes (H, W, 3)."""
    grey = tones(x).mul(255).round().to(torch.uint8)
    return (grey.expand(3, -1, -1) if grey.shape[0] == 1 else grey[:3]).permute(1, 2, 0).numpy()


def is_image(shape: Sequence[int]) -> bool:
    """Whether an event (C, H, W) can be shown as a picture."""
    return len(shape) == 3 and shape[0] in (1, 3)


def grid_image(x: Tensor, tones: Tones | None = None, columns: int | None = None) -> bytes:
    """Images (n, C, H, W) side by side, as a PNG file in which a pixel is a whole number of screen pixels."""
    from PIL import Image

    n, _, height, width = x.shape
    tones = tones or Tones()
    columns = columns or math.ceil(math.sqrt(n))
    rows = -(-n // columns)
    gap = 1
    canvas = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 128, np.uint8)
    for i in range(n):
        top, left = (i // columns) * (height + gap), (i % columns) * (width + gap)
        canvas[top : top + height, left : left + width] = _picture(x[i].cpu(), tones)
    scale = max(1, 640 // canvas.shape[1])
    picture = Image.fromarray(canvas).resize(
        (canvas.shape[1] * scale, canvas.shape[0] * scale), Image.Resampling.NEAREST
    )
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def samples_figure(x: Tensor, tones: Tones | None = None, most: int = 64) -> bytes:
    """Samples (n, *event) as a PNG file: a grid of images, a cloud of points, or a histogram of numbers."""
    if is_image(x.shape[1:]):
        return grid_image(x[:most], tones)
    flat = x.flatten(1).cpu()
    figure, axes = new_figure(4.0, 4.0)
    ax = axes[0, 0]
    if flat.shape[1] == 1:
        ax.hist(flat[:, 0], bins=60, color=PALETTE[0])
        ax.set_xlabel("value, data units")
        ax.set_ylabel("samples")
    else:
        ax.scatter(flat[:, 0], flat[:, 1], s=3, alpha=0.5, color=PALETTE[0], linewidths=0)
        ax.set_aspect("equal")
        ax.set_xlabel("coordinate 0, data units")
        ax.set_ylabel("coordinate 1, data units")
    return png(figure)


def walk_figure(walk: Trajectory, process: LinearProcess, tones: Tones | None = None, most: int = 9) -> Figure:
    """A few states of a walk: a column for each time, a row for each channel, from noise to data.

    Images show the first walk; points the cloud of all walks, in the plane of their first and last coordinate.
    """
    pick = torch.linspace(0, len(walk.states) - 1, min(most, len(walk.states))).round().long()
    k = process.channels
    sigma = process.sigma(walk.times[pick].clamp(max=process.horizon)).tolist()
    titles = [f"σ = {level:.3g}" if level > 0 else "sample" for level in sigma]
    names = ["data", *[f"auxiliary {i}" for i in range(1, k)]]
    if is_image(walk.states.shape[3:]):
        return _strip(walk.states[pick, 0].cpu(), titles, names, tones or Tones())
    figure, axes = new_figure(1.0 * len(pick) + 0.8, 1.0 * k + 0.5, k, len(pick), sharex="row", sharey="row")
    for channel in range(k):
        for column, index in enumerate(pick.tolist()):
            ax, cloud = axes[channel, column], walk.states[index, :, channel].flatten(1).cpu()
            ax.scatter(cloud[:, 0], cloud[:, -1], s=2, color=PALETTE[channel % len(PALETTE)], linewidths=0)
            ax.set_xticks([])
            ax.set_yticks([])
        axes[channel, 0].set_ylabel(names[channel], fontsize=7)
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title, fontsize=7)
    return figure


def _strip(states: Tensor, titles: Sequence[str], names: Sequence[str], tones: Tones) -> Figure:
    """States (S, K, C, H, W) of one walk as one picture, a column for each state and a row for each channel."""
    count, k, _, height, width = states.shape
    down, right = height + 1, width + 1
    canvas = np.full((k * down - 1, count * right - 1, 3), 255, np.uint8)
    for column, state in enumerate(states):
        for row, z in enumerate(state):
            shown = _picture(*_fitted(z, row, tones))
            canvas[row * down : row * down + height, column * right : column * right + width] = shown
    figure, axes = new_figure(0.95 * count + 0.8, 0.95 * k + 0.4)
    ax = axes[0, 0]
    ax.imshow(canvas, interpolation="nearest")
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0, labelsize=7, labeltop=True, labelbottom=False)
    ax.set_xticks([i * right + (width - 1) / 2 for i in range(count)], titles)
    ax.set_yticks([i * down + (height - 1) / 2 for i in range(k)], names)
    return figure


def _fitted(z: Tensor, channel: int, tones: Tones) -> tuple[Tensor, Tones]:
    """A channel (C, H, W) of a state, drawn together so that it fits the tones; auxiliaries have tones of their own."""
    spread = (1.3 if channel == 0 else 2.5) * float(z.std())
    if channel > 0:  # the final call leaves no auxiliaries
        return z, Tones(-max(spread, 1e-6), max(spread, 1e-6))
    centre, half = 0.5 * (tones.low + tones.high), 0.5 * (tones.high - tones.low)
    return centre + (z - centre) / max(1.0, spread / half), tones
