"""The report of a run's folder: whatever the folder holds is shown, and what it lacks is left out."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from undrift.config import ConfigError, build
from undrift.denoise import Denoiser
from undrift.diffusion import Diffusion, NoiseDiffusion
from undrift.process.learned import LearnedProcess
from undrift.process.linear import LinearProcess
from undrift.report.comparison import label, shown, table
from undrift.report.density import write_density_report
from undrift.report.design import write_design_report
from undrift.report.files import JsonLines, read_npz, write_bytes
from undrift.report.html import Page
from undrift.report.inverse import write_inverse_report
from undrift.report.learned import add_learned_process
from undrift.report.plots import (
    comparison_figure,
    is_image,
    kernel_figure,
    out_of_frame,
    png,
    samples_figure,
    training_figure,
    walk_figure,
)
from undrift.report.tones import Tones
from undrift.sample import Exponential, Trajectory, sample
from undrift.train import load, notes

__all__ = ["write_report"]


def write_report(folder: str | Path) -> Path:
    """Write ``report.html`` into a run's folder.

    Args:
        folder: of a run: any of config.yaml, run.json, metrics.jsonl, model.safetensors, comparison.jsonl,
            comparison.json, evaluation.json, samples.npz and samples-*.npz; or draws.safetensors and summary.json; or
            design.json; or posterior.npz and posterior.json.

    Returns:
        Path of the file.

    Raises:
        FileNotFoundError: if there is no such folder, or it holds nothing of a run.
    """
    place = Path(folder)
    if not place.is_dir():
        raise FileNotFoundError(f"{place}: no such folder; give the folder of a run.")
    if (place / "draws.safetensors").exists():
        return write_density_report(place, lambda page: _reproduce(page, place, _json(place / "run.json")))
    if (place / "design.json").exists():
        return write_design_report(place, lambda page: _reproduce(page, place, _json(place / "run.json")))
    if (place / "posterior.json").exists():
        return write_inverse_report(place, lambda page: _reproduce(page, place, _json(place / "run.json")))
    known = ("config.yaml", "metrics.jsonl", "model.safetensors", "comparison.jsonl", "evaluation.json", "samples.npz")
    if not any((place / name).exists() for name in known):
        raise FileNotFoundError(f"{place} holds nothing of a run (none of {', '.join(known)}).")
    run = _json(place / "run.json")
    config = yaml.safe_load((place / "config.yaml").read_text("utf-8")) if (place / "config.yaml").exists() else {}
    rows = JsonLines(place / "comparison.jsonl").rows
    about = _json(place / "comparison.json")
    # The lines also keep cells of earlier settings, for the day they are asked for again.
    rows = [row for row in rows if "rows" not in about or row["key"] in about["rows"]]
    model = load(place / "model.safetensors") if (place / "model.safetensors").exists() else None
    noted = notes(place / "model.safetensors") if model is not None else {}
    processes = _processes(rows, model)
    page = Page(f"undrift: {place.resolve().name}", _lead(rows, about, noted))
    if rows:
        _comparison(page, rows, about)
    _samples(page, place)
    learned = _learned(model)
    if learned is not None:
        add_learned_process(page, learned, _begun(config))
    if processes and (rows or learned is None):
        _kernels(page, processes)
    if model is not None and processes:
        _walks(page, model, processes, noted)
    evaluation = _json(place / "evaluation.json")
    if evaluation:
        page.section("Evaluation")
        page.table(
            ["measure", "value", "floor: held-out data"],
            [[m["name"], shown(m), m.get("floor") or "–"] for m in evaluation["measures"]],
            evaluation["caption"],
        )
        for line in evaluation["remarks"]:
            page.text(line)
    metrics = [r for r in JsonLines(place / "metrics.jsonl").rows if "loss" in r]
    if metrics:
        page.section("Training")
        caption = (
            f"{metrics[-1]['step']} steps, {metrics[-1]['samples']} samples seen; each point is a mean over the steps "
            "since the one before."
        )
        alt = f"Loss falls from {metrics[0]['loss']:.3g} to {metrics[-1]['loss']:.3g} over {metrics[-1]['step']} steps."
        bound = (config.get("objective") or {}).get("type") == "EvidenceBound"
        loss = "minus the bound, nats per coordinate" if bound else "weighted loss"
        page.picture(png(training_figure(metrics, loss)), alt, caption)
    _reproduce(page, place, run)
    return write_bytes(place / "report.html", page.render().encode())


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _processes(rows: Sequence[Mapping[str, Any]], model: Any) -> list[LinearProcess]:
    found: dict[str, LinearProcess] = {}
    for row in rows:
        if row["process"] not in found:
            try:
                found[row["process"]] = build(row["settings"]["process"], LinearProcess)
            except ConfigError:  # a process of the user's own, whose class is not in memory now
                continue
    if not found and isinstance(model, (Diffusion, NoiseDiffusion)):
        found[label(model.process)] = model.process
    return list(found.values())


def _learned(model: Any) -> LearnedProcess | None:
    process = getattr(model, "process", None)
    return process if isinstance(process, LearnedProcess) else None


def _begun(config: Mapping[str, Any]) -> LearnedProcess | None:
    """Where the process of a training run's configuration began."""
    try:
        process = build(config.get("process"), LinearProcess)
    except ConfigError:
        return None
    return process if isinstance(process, LearnedProcess) else None


def _lead(rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any], noted: Mapping[str, Any]) -> str:
    data = noted.get("data")
    if rows:
        count = len({r["process"] for r in rows})
        trained = f"trained on {data}" if data else "trained once"
        return (
            f"One denoiser, {trained}, sampled under {count} {'process' if count == 1 else 'processes'} and "
            f"{len({r['sampler'] for r in rows})} samplers without retraining."
        )
    return f"A model trained on {data}." if data else "A run."


def _comparison(page: Page, rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> None:
    page.section("Quality against network calls")
    measure, floor = about.get("measure", "distance"), about.get("floor")
    budgets = sorted({int(r["budget"]) for r in rows})
    for budget in budgets:
        best = min((r for r in rows if r["budget"] == budget), key=lambda r: r["distance"])
        page.text(
            f"{budget} calls: lowest for {best['process']} with {best['sampler']}, {best['distance']:.3g}"
            + (f" ± {best['std_error']:.1g}." if best["std_error"] is not None else ".")
        )
    figure = comparison_figure(rows, measure, floor)
    caption = f"{measure[:1].upper()}{measure[1:]} against network calls; lower is better. {about.get('caption', '')}"
    if out_of_frame(rows):
        caption += " What lies beyond ten times the median distance is outside the frame, and in the table."
    page.picture(
        png(figure), "Line plots of the table below: one panel for each process, one line for each sampler.", caption
    )
    head, lines = table(rows)
    marks = []
    for c in range(2, len(head)):
        budget = budgets[c - 2]
        value = {(r["process"], r["sampler"]): r["distance"] for r in rows if r["budget"] == budget}
        for process in dict.fromkeys(line[0] for line in lines):
            pairs = [
                (value[line[0], line[1]], i)
                for i, line in enumerate(lines)
                if line[0] == process and (line[0], line[1]) in value
            ]
            if pairs:
                marks.append((min(pairs)[1], c))
    note = "" if floor is None else f" Held-out data: {floor:.3g}."
    page.table(head, lines, f"{measure}; mean ± standard error; the best of each process stands out.{note}", 2, marks)
    if about.get("memorisation"):
        page.heading("Memorisation check")
        page.table(
            ["process", "sampler", "calls", "to the nearest training point", "ratio to held-out points", "copied"],
            about["memorisation"],
            "Median distance of samples to the nearest training point, its ratio to that of held-out points (near 1 "
            "for new data, near 0 for copies), and the share of samples nearer than 99% of held-out points are (1% for "
            "new data); for the best sampler of each process.",
            2,
        )


def _samples(page: Page, place: Path) -> None:
    files = [*sorted(place.glob("samples.npz")), *sorted(place.glob("samples-*.npz"))]
    if not files:
        return
    page.section("Samples")
    pictures = []
    for file in files:
        x, settings = read_npz(file)
        title = " · ".join(str(settings[k]) for k in ("process_name", "sampler_name") if k in settings) or file.stem
        shown = min(len(x), 64) if is_image(x.shape[1:]) else len(x)
        calls = f", {settings['calls']} calls" if "calls" in settings else ""
        png_file = samples_figure(x, Tones.read(settings))
        caption = f"{title}{calls}. The first {shown} of {len(x)} samples, seed {settings.get('seed', 'unknown')}."
        pictures.append((png_file, f"{shown} samples, {title}{calls}", caption))
    page.gallery(pictures)


def _kernels(page: Page, processes: Sequence[LinearProcess]) -> None:
    page.section("Processes")
    page.text(
        "What each process does to one data coordinate: the factor of the data in the mean of each channel (solid), "
        "and each channel's deviation given the data (dashed). Everything that the state knows about the data sits "
        "in one number, the effective noise level; that is why one denoiser serves them all."
    )
    names = ", ".join(label(p) for p in processes)
    page.picture(
        png(kernel_figure(processes)),
        f"Mean and deviation of each channel against time for {names}, and their effective noise levels.",
        "Time runs from data (0) to noise (T).",
    )


def _walks(page: Page, model: Any, processes: Sequence[LinearProcess], noted: Mapping[str, Any]) -> None:
    event = tuple(noted.get("event", ()))
    if len(event) == 0 or not (is_image(event) or event[0] > 1):
        return
    page.section("Walks from noise to data")
    page.text("A few states of one walk: the data channel, and the auxiliaries that carry it. Exponential integrator.")
    for process in processes:
        diffusion = model if isinstance(model, NoiseDiffusion) else Diffusion(process, _denoiser(model))
        count = 1 if is_image(event) else 400
        walk = sample(diffusion, count, event, Exponential(steps=24), seed=0, trajectory=True)
        assert isinstance(walk, Trajectory)
        page.heading(label(process))
        figure = walk_figure(walk, process, Tones.read(noted))
        page.picture(
            png(figure),
            f"States of a walk under {label(process)} at falling noise levels, from noise to a sample.",
            f"{process.channels} channel{'s' if process.channels > 1 else ''}; 24 calls, seed 0.",
        )


def _denoiser(model: Any) -> Denoiser:
    return model.denoiser if isinstance(model, Diffusion) else model


def _reproduce(page: Page, place: Path, run: Mapping[str, Any]) -> None:
    page.section("Reproduce")
    if run:
        page.code(shlex.join(run["command"]))
        keys = ("seconds", "undrift", "torch", "python", "machine")
        page.facts([(k, f"{run[k]} s" if k == "seconds" else str(run[k])) for k in keys if k in run])
    config = place / "config.yaml"
    if config.exists():
        page.heading("Complete configuration (config.yaml)")
        page.code(config.read_text(encoding="utf-8"))
