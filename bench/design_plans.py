"""Predicted and measured errors of plans, and what optimised schedules and processes gain, for 5 to 50 calls.

For each data set a spectrum is estimated in one call, and every setting (process, sampler, grid, calls) is predicted by
its exact law on that spectrum and measured by sampling: digits and Fashion-MNIST with a trained denoiser, mixtures with
their exact one. Optimised schedules and searched processes stand beside the classical grids. Nothing is tuned on
samples: a design sees the spectrum alone. Rows are kept in --out and not run again.

    python bench/design_plans.py --data spectra ring mixtures              # minutes
    python bench/design_plans.py --data digits                             # trains a U-Net first; an hour on one core
    UNDRIFT_DATA=... python bench/design_plans.py --data fashion           # likewise
    python bench/design_plans.py --table                                   # tables of what is there
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor

from mixture_table import random_mixture
from undrift import Diffusion, sample
from undrift.config import describe
from undrift.denoise import MixtureDenoiser, NetworkDenoiser
from undrift.denoise.base import Denoiser
from undrift.design.gaussian import propagate, strangeness
from undrift.design.optimise import family, optimise
from undrift.design.search import search
from undrift.design.spectrum import Spectrum
from undrift.measure import extract, frechet_distance, sliced_wasserstein, train_features
from undrift.networks import UNet
from undrift.process import CLD, MALDA, PSLD, VE, VP, FlowMatching, LinearProcess
from undrift.report.comparison import at_calls
from undrift.sample import (
    SSCS,
    Ancestral,
    Cosine,
    DPMSolver2M,
    EulerMaruyama,
    Exponential,
    Grid,
    Heun,
    LogSigma,
    Published,
    Quadratic,
    Rho,
    TableSampler,
    Tangent,
    Uniform,
)
from undrift.train import Dataset, Denoising, Digits, Idx, TrainConfig, Trainer
from undrift.train.checkpoint import load

PROCESSES: dict[str, LinearProcess] = {
    "VP": VP(),
    "VE": VE(),
    "FlowMatching": FlowMatching(),
    "CLD": CLD(),
    "PSLD": PSLD(),
    "MALDA": MALDA(),
}
SAMPLERS: dict[str, TableSampler] = {
    "EM": EulerMaruyama(),
    "ancestral": Ancestral(),
    "SSCS": SSCS(),
    "EI1": Exponential(order=1),
    "EI2": Exponential(order=2),
    "EI2 raw": Exponential(order=2, guard=False),
    "EI3 raw": Exponential(order=3, guard=False),
    "2M": DPMSolver2M(),
    "Heun": Heun(),
}
GRIDS: dict[str, Grid] = {
    "log sigma": LogSigma(),
    "log sigma .002-80": LogSigma(0.002, 80.0),
    "rho 7": Rho(),
    "quadratic": Quadratic(),
    "uniform": Uniform(),
    "cosine": Cosine(sigma_min=0.01, sigma_max=80.0),
    "tangent": Tangent(scale=0.5, sigma_min=0.01, sigma_max=80.0),
    "AYS": Published("ays-sd15"),
    "GITS": Published("gits-cifar10"),
}
CALLS = (5, 8, 10, 20, 50)
SEEDS = (101, 102, 103)  # of the samples that are judged; designs have none


@dataclass(frozen=True, eq=False)
class Problem:
    """A data set with its denoiser, its spectrum, and what it is judged by."""

    name: str
    denoiser: Denoiser
    spectrum: Spectrum
    shape: tuple[int, ...]
    n: int
    distances: Callable[[Tensor, int], dict[str, float]]
    classical: tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]  # processes, samplers, grids
    designed: tuple[tuple[str, ...], tuple[str, ...]]  # processes (or channels to search), samplers
    surrogate: MixtureDenoiser | None = None  # of the data: one Gaussian a class

    def restricted(self, processes: list[str]) -> Problem:
        """The same problem with some of its processes only."""
        old = (self.classical, self.designed)
        kept = [(tuple(p for p in settings[0] if p in processes), *settings[1:]) for settings in old]
        return dataclasses.replace(self, classical=kept[0], designed=kept[1])


def mixture(name: str, denoiser: MixtureDenoiser) -> Problem:
    clean = denoiser.sample(200_000, torch.Generator().manual_seed(1))
    reference = denoiser.sample(20_000, torch.Generator().manual_seed(2))

    def distances(x: Tensor, seed: int) -> dict[str, float]:
        return {"sliced": sliced_wasserstein(x, reference, 64, 0)}

    every = (("VP", "CLD", "MALDA"), tuple(SAMPLERS), tuple(GRIDS))
    designed = (
        ("VP", "VE", "CLD", "MALDA", "1", "2", "3"),
        ("ancestral", "SSCS", "EI1", "EI2 raw", "EI3 raw", "2M", "Heun"),
    )
    return Problem(name, denoiser, Spectrum.of(clean, name=name), (2,), 20_000, distances, every, designed)


def fashion() -> tuple[Dataset, TrainConfig]:
    """Images as 14 x 14 blocks of four pixels, which makes the network three times as fast."""
    root = os.environ.get("UNDRIFT_DATA")
    if root is None:
        raise SystemExit("Fashion-MNIST is read from the folder images/fashion_mnist of UNDRIFT_DATA; set it.")
    place = Path(root) / "images" / "fashion_mnist"
    data = Idx(str(place / "train-images-idx3-ubyte.gz"), str(place / "train-labels-idx1-ubyte.gz")).load()
    blocks = Dataset("fashion-mnist", torch.pixel_unshuffle(data.x, 2), data.labels)
    config = TrainConfig(steps=5000, batch=64, lr=1e-3, warmup=200, ema=60_000, log_every=50, checkpoint_every=500)
    return blocks, config


def digits() -> tuple[Dataset, TrainConfig]:
    config = TrainConfig(steps=1200, batch=128, lr=2e-3, warmup=100, ema=40_000, log_every=50, checkpoint_every=400)
    return Digits("train").load(), config


def images(name: str, runs: Path) -> Problem:
    data, config = {"digits": digits, "fashion": fashion}[name]()
    torch.manual_seed(0)
    model = NetworkDenoiser(UNet(data.event[0], data.event[-1], width=32), float(data.x.std()))
    if not (runs / name / "model.safetensors").exists():
        print(f"training a denoiser of {name}: {config.steps} steps", flush=True)
        Trainer(model, Denoising(), data, config, runs / name).fit(progress=False)
    denoiser = load(runs / name / "model.safetensors")
    assert isinstance(denoiser, NetworkDenoiser)
    assert data.labels is not None
    some = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:10_000]
    pixels = torch.pixel_shuffle(data.x, 2) if name == "fashion" else data.x
    features = train_features(pixels[some], data.labels[some], seed=0)
    reference = extract(features, pixels[some])
    n = 1500 if name == "digits" else 500
    spectrum = Spectrum.of(data.x, name=name)
    centre, clean = data.x.mean(0), data.x[some[:n]]
    vectors = torch.linalg.eigh(torch.cov(data.x.flatten(1).double().mT))[1].flip(-1)

    def distances(x: Tensor, seed: int) -> dict[str, float]:
        shown = torch.pixel_shuffle(x, 2) if name == "fashion" else x
        along = (x - centre).flatten(1).double() @ vectors
        modes = (along.var(0).sqrt() - spectrum.variance.sqrt()).square() + along.mean(0).square()
        return {
            "frechet": frechet_distance(extract(features, shown), reference),
            "sliced": sliced_wasserstein(x, clean, 256, 0),
            "modes": float(modes.sum().sqrt()),
        }

    every = ("EM", "ancestral", "SSCS", "EI1", "EI2 raw", "EI3 raw", "2M", "Heun")
    if name == "digits":
        settings = (("VP", "CLD", "MALDA"), every, ("log sigma", "rho 7", "quadratic", "cosine", "AYS"))
    else:
        settings = (("VP", "CLD"), every[1:], ("log sigma", "rho 7", "quadratic", "AYS"))
    designed = (("VP", "CLD", "MALDA", "1", "2", "3"), ("ancestral", "SSCS", "EI1", "EI2 raw", "EI3 raw", "2M", "Heun"))
    return Problem(name, denoiser, spectrum, data.event, n, distances, settings, designed, classes(data))


def classes(data: Dataset) -> MixtureDenoiser:
    """The mixture of one Gaussian a class: data with modes, whose denoiser is known."""
    assert data.labels is not None
    flat, labels = data.x.flatten(1).double(), data.labels
    groups = [flat[labels == c] for c in labels.unique()]
    floor = 1e-4 * flat.var(0).mean() * torch.eye(flat.shape[1], dtype=torch.float64)
    return MixtureDenoiser(
        torch.tensor([len(g) for g in groups], dtype=torch.float64),
        torch.stack([g.mean(0) for g in groups]),
        torch.stack([torch.cov(g.T) + floor for g in groups]),
    )


def classical(problem: Problem, calls: tuple[int, ...]) -> Iterator[tuple[dict[str, Any], LinearProcess, TableSampler]]:
    for count, p, s, g in itertools.product(calls, *problem.classical):
        try:
            chosen, plan = at_calls(dataclasses.replace(SAMPLERS[s], grid=GRIDS[g]), PROCESSES[p], count)
        except ValueError:
            continue
        key = {"kind": "classical", "process": p, "sampler": s, "grid": g, "budget": count, "calls": plan.calls}
        yield key, PROCESSES[p], chosen


def designed(
    problem: Problem, calls: tuple[int, ...], known: set[str]
) -> Iterator[tuple[dict[str, Any], LinearProcess, TableSampler]]:
    """Schedules by each sampler's own law; for multistep methods also by that of order 1; and searched processes."""
    members = family(problem.spectrum)
    for count, p, s, by in itertools.product(calls, *problem.designed, ("itself", "EI1", "trust 10")):
        searched = p.isdigit()
        key = {"kind": "searched" if searched else "optimised", "process": p, "sampler": s, "grid": f"by {by}"}
        key |= {"budget": count}
        if by == "trust 10" and not searched:
            continue
        if by == "EI1" and (searched or s not in ("EI2 raw", "EI3 raw", "2M")):
            continue
        if name_of(problem, key) in known or (searched and (count > 20 or s in ("EI2 raw", "EI3 raw", "2M"))):
            continue
        start = time.process_time()
        try:
            sampler, plan = at_calls(SAMPLERS[s], PROCESSES["VP" if searched else p], count)
            if searched:
                found = search(int(p), sampler, members, trust=10.0 if by == "trust 10" else 3.0, iterations=100)
            else:
                deciding = Exponential(count, order=1) if by == "EI1" else None
                found = optimise(PROCESSES[p], sampler, members, by=deciding)
        except ValueError as error:
            print(f"left out: {key}: {error}", flush=True)
            continue
        key |= {"calls": plan.calls, "design_seconds": round(time.process_time() - start, 2)}
        key |= {"sigma": [float(f"{v:.5g}") for v in found.sigma.tolist()], "evaluations": found.evaluations}
        if searched:
            key["found"] = describe(found.process)
        yield key, found.process, found.sampler


def name_of(problem: Problem, key: dict[str, Any]) -> str:
    return "/".join([problem.name, *(str(key[k]) for k in ("kind", "process", "sampler", "grid", "budget"))])


def measure(problem: Problem, process: LinearProcess, sampler: TableSampler, seeds: tuple[int, ...]) -> dict[str, Any]:
    plan = sampler.plan(process)
    law = propagate(plan, problem.spectrum)
    row: dict[str, Any] = {
        "w2": float(law.w2),
        "kl": float(law.smoothed(0.004).kl),
        "strangeness": float(strangeness(plan, problem.spectrum).sum()),
    }
    if not seeds:
        return row
    if problem.surrogate is not None:  # particles with that denoiser, against its own samples
        shape = problem.surrogate.means.shape[1:]
        count = min(problem.n, 100_000 // problem.surrogate.means[0].numel())
        exact = problem.surrogate.sample(count, torch.Generator().manual_seed(7))
        try:
            x = sample(Diffusion(process, problem.surrogate), count, shape, plan, 8, dtype=torch.float64)
            assert isinstance(x, Tensor)
            row["surrogate"] = sliced_wasserstein(x, exact, 256, 0)
        except FloatingPointError:
            row["surrogate"] = None
    values: dict[str, list[float]] = {}
    for seed in seeds:
        try:
            x = sample(Diffusion(process, problem.denoiser), problem.n, problem.shape, plan, seed, batch=2500)
        except FloatingPointError:
            return {**row, "measured": None}
        assert isinstance(x, Tensor)
        for key, value in problem.distances(x, seed).items():
            values.setdefault(key, []).append(value)
    row["measured"] = {k: statistics.fmean(v) for k, v in values.items()}
    row["std_error"] = {k: statistics.stdev(v) / math.sqrt(len(v)) if len(v) > 1 else None for k, v in values.items()}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["ring", "mixtures", "digits"])
    parser.add_argument("--calls", type=int, nargs="+", default=list(CALLS))
    parser.add_argument("--processes", nargs="+", help="only these processes, classical and designed")
    parser.add_argument("--only", choices=["classical", "designed"])
    parser.add_argument("--seeds", type=int, default=1, help="sets of samples a setting, up to 3")
    parser.add_argument("--runs", type=Path, default=Path("runs/design"))
    parser.add_argument("--out", type=Path, default=Path("bench/results/design_plans.jsonl"))
    parser.add_argument("--table", action="store_true", help="print tables of --out and stop")
    options = parser.parse_args()
    if options.table:
        print(tables([json.loads(line) for line in options.out.read_text().splitlines()]))
        return
    torch.set_num_threads(1)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    known = (
        {json.loads(line)["name"] for line in options.out.read_text().splitlines()} if options.out.exists() else set()
    )
    problems: list[Problem] = []
    for name in options.data:
        if name == "mixtures":
            problems += [mixture(f"mixture {i}", random_mixture(i)) for i in range(2)]
        elif name == "ring":
            problems.append(mixture("ring", MixtureDenoiser.ring()))
        else:
            problems.append(images(name, options.runs))
    calls = tuple(options.calls)
    for problem in problems:
        print(problem.spectrum, flush=True)
        if options.processes:
            problem = problem.restricted(options.processes)
        work: list[Iterator[tuple[dict[str, Any], LinearProcess, TableSampler]]] = []
        if options.only != "classical":
            work.append(designed(problem, calls, known))
        if options.only != "designed":
            work.append(classical(problem, calls))
        for key, process, sampler in itertools.chain(*work):
            name = name_of(problem, key)
            if name in known:
                continue
            row = {"name": name, "data": problem.name, **key}
            row |= measure(problem, process, sampler, SEEDS[: options.seeds])
            with options.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            known.add(name)
            print(f"{name}: W2 {row['w2']:.4f} measured {row.get('measured')}", flush=True)
    print(tables([json.loads(line) for line in options.out.read_text().splitlines()]))


# -- tables ------------------------------------------------------------------------------------------------------------


def spearman(x: list[float], y: list[float]) -> float:
    return float(spearmanr(x, y).statistic) if len(x) > 2 else math.nan


KINDS = ("classical", "optimised", "searched")


def _best(group: list[dict[str, Any]], distance: str) -> list[tuple[str, dict[str, Any]]]:
    measured = min(group, key=lambda r: r["measured"][distance])
    return [("best measured", measured), ("best predicted", min(group, key=lambda r: r["w2"]))]


def _shown(row: dict[str, Any], distance: str) -> str:
    setting = " ".join(row["name"].split("/")[2:5])
    return f"{setting} | {row['measured'][distance]:.4g} | {row['w2']:.4g}"


def tables(rows: list[dict[str, Any]]) -> str:
    lines: list[str] = []
    for data in dict.fromkeys(r["data"] for r in rows):
        mine = [r for r in rows if r["data"] == data and r.get("measured")]
        if not mine:
            continue
        for distance in mine[0]["measured"]:
            lines += ["", f"{data}: rank correlation of W2 predicted on the spectrum with measured {distance}"]
            fixed = [r for r in mine if r["kind"] == "classical"]
            groups: dict[str, list[dict[str, Any]]] = {"classical": fixed, "all": mine}
            for count in sorted({r["budget"] for r in fixed}):
                groups[f"classical, {count} calls"] = [r for r in fixed if r["budget"] == count]
            for name, group in groups.items():
                spectrum = spearman([r["w2"] for r in group], [r["measured"][distance] for r in group])
                line = f"  {name}: {spectrum:.3f} over {len(group)} settings"
                some = [r for r in group if r.get("surrogate")]
                if len(some) > 2:
                    mixture = spearman([r["surrogate"] for r in some], [r["measured"][distance] for r in some])
                    line += f"; by a mixture of the classes {mixture:.3f}"
                lines.append(line)
            lines += [
                f"{data}: best measured {distance} per number of calls",
                "  calls | kind | setting | measured | W2",
            ]
            for count, kind in itertools.product(sorted({r["budget"] for r in mine}), KINDS):
                group = [r for r in mine if r["budget"] == count and r["kind"] == kind]
                if group:
                    lines += [f"  {count} | {kind}, {how} | {_shown(r, distance)}" for how, r in _best(group, distance)]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
