"""What a learned process has become: its matrices and its clock, before and after, beside fixed processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from torch import Tensor, nn

from undrift.bound import Bound
from undrift.diffusion import NoiseDiffusion
from undrift.process import CLD, MALDA, VP, LinearClock
from undrift.process.learned import LearnedProcess
from undrift.process.linear import LinearProcess
from undrift.report.comparison import label
from undrift.report.html import Page
from undrift.report.plots import GREY, MARKERS, PALETTE, kernel_figure, new_figure, png

__all__ = ["add_learned_process", "fixed_processes", "learned_clock_figure", "matrices_figure", "prior_gap"]

_SIGNED = LinearSegmentedColormap.from_list("signed", [PALETTE[1], "#ffffff", PALETTE[0]])


def fixed_processes() -> dict[str, LinearProcess]:
    """What a learned process is drawn beside, by name: one, two and three channels on the clock it begins with."""
    clock = LinearClock(0.1, 10.0)
    return {"VP": VP(clock=clock), "CLD": CLD(mass=1.0, aux_scale=0.01, clock=clock), "MALDA": MALDA(clock=clock)}


def prior_gap(process: LinearProcess) -> float:
    """KL(q(z_T | x) || prior) of a coordinate in nats, for data of mean square 1: what the bound loses at the end."""
    return -float(Bound(NoiseDiffusion(process, nn.Identity())).prior(torch.ones(1, 1, dtype=torch.float64)).detach())


def matrices_figure(stages: Sequence[tuple[str, LearnedProcess]]) -> Figure:
    """Q and D, and S and the auxiliaries' start if they are learned, as annotated heat maps: a row for each stage.

    Args:
        stages: the process as it was at some stages, with their names.
    """
    last = stages[-1][1]
    names = ["Q", "D", *(["S"] if "S" in last.learn else [])]
    names += ["start"] if "start" in last.learn and last.channels > 1 else []
    k = last.channels
    side = max(1.9, 0.62 * k + 0.7)
    figure, axes = new_figure(side * len(names) + 0.5, side * len(stages), len(stages), len(names))
    rows = [_matrices(process) for _, process in stages]
    channels = ["data", *[f"aux {i}" for i in range(1, k)]]
    for c, name in enumerate(names):
        largest = max(float(row[name].abs().max()) for row in rows) or 1.0
        for r, (stage, _) in enumerate(stages):
            ax, m = axes[r, c], rows[r][name]
            ax.imshow(m.numpy(), cmap=_SIGNED, vmin=-1.6 * largest, vmax=1.6 * largest)
            for i, j in [(i, j) for i in range(k) for j in range(k)]:
                ax.text(j, i, f"{float(m[i, j]):.3g}".replace("-", "−"), ha="center", va="center", fontsize=7)
            ax.grid(False)
            ax.spines[:].set_visible(False)
            ax.tick_params(length=0, labelsize=7)
            ax.set_xticks(range(k), channels)
            ax.set_yticks(range(k), channels if c == 0 else [""] * k)
            ax.set_title(f"{name}, {stage}", fontsize=9, loc="left")
    return figure


def _matrices(process: LearnedProcess) -> dict[str, Tensor]:
    d, q, s = (m.detach() for m in process.terms())
    return {"Q": q, "D": d, "S": s, "start": process.start().detach()}


def learned_clock_figure(stages: Sequence[tuple[str, LearnedProcess]]) -> Figure:
    """Rate beta(t), clock B(t) and noise level sigma(t) of the process at some stages, beside the fixed processes."""
    figure, axes = new_figure(9.9, 2.9, 1, 3)
    lines: list[tuple[str, LinearProcess, dict[str, object]]] = [
        (
            stage,
            process,
            {"color": PALETTE[0], "linestyle": "-" if process is stages[-1][1] else ":"},
        )
        for stage, process in stages
    ]
    fixed = fixed_processes()
    fractions = torch.linspace(0, 1, 201, dtype=torch.float64)
    fractions[0] = 1e-4
    for i, (name, process) in enumerate(fixed.items(), 1):
        style = {"color": PALETTE[i], "linewidth": 1.0, "marker": MARKERS[i], "markevery": 40, "markersize": 4}
        lines.append((name, process, style))
    for name, process, style in lines:
        t = fractions * process.horizon
        axes[0, 2].plot(t, process.sigma(t).detach(), label=name, **style)
        if isinstance(process, LearnedProcess):
            axes[0, 0].plot(t, process.clock.beta(t).detach(), label=name, **style)
            axes[0, 1].plot(t, process.clock.integral(t).detach(), label=name, **style)
    clock = fixed["VP"].clock  # type: ignore[attr-defined]
    grey = {"color": GREY, "linestyle": "--", "linewidth": 1.0, "label": "clock of the fixed processes"}
    axes[0, 0].plot(fractions, clock.beta(fractions), **grey)
    axes[0, 1].plot(fractions, clock.integral(fractions), **grey)
    axes[0, 2].set_yscale("log")
    for ax, name in zip(axes[0], ("rate β(t)", "clock B(t) = ∫ β", "noise level σ(t), data units"), strict=True):
        ax.set_xlabel("time t", fontsize=8)
        ax.set_ylabel(name, fontsize=8)
        ax.legend(fontsize=6, frameon=False)
    return figure


@torch.no_grad()
def add_learned_process(page: Page, now: LearnedProcess, begun: LearnedProcess | None) -> None:
    """The section of a report on a learned process.

    Args:
        page: of the report.
        now: the process as it was learned.
        begun: where it began, if that is known.
    """
    stages = [*([("where it began", begun)] if begun is not None else []), ("learned", now)]
    page.section("The learned process")
    what = f"{_and(now.learn)} trained with the model" if now.learn else "nothing of it trained"
    page.text(
        f"{now.channels} channel{'s' if now.channels > 1 else ''}, {what}; {now.degrees} effective degrees of freedom, "
        "the free parameters less those that the data channel cannot tell apart."
    )
    changed = "" if begun is None else " The upper row is where it began."
    page.picture(
        png(matrices_figure(stages)),
        "; ".join(f"{stage}: {_spelled(process)}" for stage, process in stages),
        f"Matrices of dz = −β(t) (D + Q) S⁻¹ z dt + √(2 β(t) D) dw.{changed}",
    )
    page.picture(
        png(learned_clock_figure(stages)),
        "Rate, clock and noise level of the learned process against time, beside the fixed processes.",
        "With a denoiser the bound depends on the process only through σ at its two ends.",
    )
    fixed = fixed_processes()
    names = ["learned", *fixed]
    page.picture(
        png(kernel_figure([now, *fixed.values()], names)),
        f"Mean and deviation of each channel against time for {', '.join(names)}, and their noise levels.",
        "Kernels of the learned process and of fixed ones on the clock β from 0.1 to 10: the factor of the data in the "
        "mean of each channel (solid), and each channel's deviation given the data (dashed).",
    )
    rows = [(f"{label(p)}, {stage}", p) for stage, p in stages] + list(fixed.items())
    page.table(
        ["process", "channels", "σ(T)", "prior gap, nats per coordinate"],
        [[name, str(p.channels), f"{float(p.sigma(p.horizon)):.4g}", f"{prior_gap(p):.3g}"] for name, p in rows],
        "Noise level at the end, and divergence of the state there from the prior, for data of mean square 1.",
    )


def _and(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _spelled(process: LearnedProcess) -> str:
    rows = {name: [[f"{v:.3g}" for v in row] for row in m.tolist()] for name, m in _matrices(process).items()}
    return " ".join(f"{name} = ({'; '.join(', '.join(r) for r in rows[name])})" for name in ("Q", "D"))
