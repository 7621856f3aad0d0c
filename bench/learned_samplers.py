r"""Learned samplers on the targets of their papers: bounds, evidence, modes; beside published values and floors.

    gap      log Z - ELBO, nats: what papers call the error of log Z
    floor    the same for a perfect control under the same steps: what is left when nothing is left to learn
    log Z    error of the importance estimate, in standard errors too
    ESS      share of the draws; "fwd" from paths walked back from exact samples
    TV       half the sum of |weight of a mode - its true weight|, of weighted draws, and of walkers as they come

Tables: "published" (draws in 200 steps, as there), "modes" (what each objective keeps), "processes" (one sampler, many
processes, one budget), "posteriors", "pdds" (particles and steps). Finished cells are kept in --out and not run again.

    python bench/learned_samplers.py                                     # everything: hours on one core
    python bench/learned_samplers.py --only modes --seeds 0              # minutes
    python bench/learned_samplers.py --only published --device cuda --effort 10   # longer training where it is cheap
    python bench/learned_samplers.py --print                             # the tables from what has been run
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from undrift.denoise import Denoiser, MixtureDenoiser
from undrift.density import HMC, Affine, Controlled, Draws, Laplace, MeanField, Resampling, Target
from undrift.density.controlled import (
    CMCD,
    DIS,
    KL,
    PDDS,
    PIS,
    AdjointMatching,
    ControlledDiffusion,
    EqualAngles,
    EqualTimes,
    Exact,
    Informed,
    LogDerivative,
    LogVariance,
    Replay,
    Scheme,
    ScoreMatching,
    Training,
    TrajectoryBalance,
    TrustRegion,
    walk,
)
from undrift.density.targets import (
    BrownianMotion,
    Difficult2d,
    DoubleWell,
    Funnel,
    LogGaussianCox,
    LogisticRegression,
    ManyWell,
    Mixture9,
)
from undrift.measure.evidence import effective_sample_size, mode_weights, total_variation
from undrift.process import CLD, MALDA, PSLD, VP, BrownianBridge, LearnedProcess, LinearClock

DRAWS = 16384
TARGETS: dict[str, tuple[Callable[[], Target], float]] = {  # with the scale of the prior
    "gmm": (Mixture9, 2.0),
    "dw5": (DoubleWell, 1.0),
    "dw50": (lambda: DoubleWell(dim=50, wells=5, delta=2.0), 1.0),
    "funnel": (Funnel, 3.0),
    "difficult": (Difficult2d, 2.0),
    "mw32": (ManyWell, 1.0),
}
PUBLISHED = {  # |log Z - ELBO| and ESS, log-variance, 200 steps: Richter & Berner 2024, as recalled; floors agree
    ("gmm", "DIS"): (0.056, 0.866),
    ("gmm", "PIS"): (0.046, 0.909),
    ("funnel", "DIS"): (0.430, 0.226),
    ("funnel", "PIS"): (0.277, 0.075),
    ("dw5", "DIS"): (0.375, 0.452),
    ("dw5", "PIS"): (0.214, 0.674),
    ("dw50", "DIS"): (1.783, 0.023),
    ("dw50", "PIS"): (0.087, 0.845),
}


def vp() -> VP:
    return VP(clock=LinearClock(0.1, 10.0))


# -- perfect controls --------------------------------------------------------------------------------------------------


class WellDenoiser(Denoiser):
    """E[x0 | x0 + sigma n] of independent coordinates, by quadrature of each one's density; the rest is N(0, 1)."""

    def __init__(self, wells: int, log_density: Callable[[Tensor], Tensor], reach: float) -> None:
        self.wells = wells
        self.grid = torch.linspace(-reach, reach, 2001, dtype=torch.float64)
        self.log_p = log_density(self.grid)

    def __call__(self, x: Tensor, sigma: Tensor, **condition: Any) -> Tensor:
        level = float(sigma.flatten()[0])
        out = x / (1 + level**2)
        for part in range(0, len(x), 256):
            y = x[part : part + 256, : self.wells].double()
            log_w = self.log_p - 0.5 * ((y.unsqueeze(-1) - self.grid) / level).square()
            out[part : part + 256, : self.wells] = (log_w.softmax(-1) @ self.grid).to(out)
        return out


def perfect(name: str, scale: float) -> Denoiser | None:
    """The denoiser of a target in coordinates x / scale, where it is known."""
    target = TARGETS[name][0]()
    if isinstance(target, (Mixture9, Difficult2d)):
        weights, means, covs = target._mixture
        covs = covs.unsqueeze(-1).expand_as(means) if covs.ndim == 1 else covs
        return MixtureDenoiser(weights, means / scale, covs / scale**2)
    if isinstance(target, DoubleWell) and scale == 1.0:
        return WellDenoiser(target.wells, lambda x: -((x.square() - target.delta).square()), 4.0)
    return None


def floor(name: str, process: str, steps: int = 200, draws: int = 4096) -> tuple[float, float] | None:
    """log Z - ELBO and ESS of a perfect control."""
    make, scale = TARGETS[name]
    denoiser = perfect(name, scale)
    if denoiser is None:
        return None
    target = make()
    seen = target.affine(0.0, scale)
    if process == "PIS":
        scheme = Scheme(BrownianBridge(), EqualTimes(), steps, Exact(denoiser))
    else:
        scheme = Scheme(vp(), EqualAngles(), steps, Exact(denoiser))
    diffusion = ControlledDiffusion(scheme, target.dim)
    log_w = walk(diffusion, seen, 1, draws, torch.Generator().manual_seed(7), torch.float64).log_weights[0]
    assert target.log_z is not None
    return target.log_z - float(log_w.mean()), float(effective_sample_size(log_w)) / draws


# -- what is run -------------------------------------------------------------------------------------------------------

Cell = tuple[str, str, str, Target, Controlled, int]  # table, row, column, target, method, draws


def training(steps: int, effort: float, **settings: Any) -> Training:
    """Training of so many steps, times the effort."""
    whole = {"batch": 512, "rate": 5e-3, "final": 0.01, "average": 300, **settings}
    return Training(steps=max(1, round(steps * effort)), **whole)


def published(effort: float) -> Iterator[Cell]:
    """Trained by score matching on draws in 50 steps; drawn in 200 steps."""
    lengths = {"gmm": 8000, "dw5": 10000, "dw50": 12000, "funnel": 5000, "difficult": 8000, "mw32": 8000}
    for name, (make, scale) in TARGETS.items():
        # Weights of 2^16 modes are learned in small steps: one nat at a time.
        many = {"draws": 2048, "bound": 1.0} if name == "mw32" else {}
        settings: dict[str, Any] = {
            "steps": 200,
            "train_steps": 50,
            "control": Informed(width=128),
            "objective": ScoreMatching(examples=32768, **many),
            "training": training(lengths[name], effort, final=0.003, average=1000),
            "coordinates": Affine(0.0, scale),
        }
        yield "published", name, "DIS", make(), DIS(**settings), DRAWS
        yield "published", name, "PIS", make(), PIS(**settings), DRAWS


def modes(effort: float) -> Iterator[Cell]:
    """What an objective keeps: nine modes of one weight, 32 wells of one weight."""
    objectives = {
        "KL, pathwise": KL(),
        "KL, log-derivative": LogDerivative(),
        "log-variance": LogVariance(),
        "log-variance, shared starts": LogVariance(paths_per_start=16),
        "log-variance, replay": LogVariance(replay=Replay()),
        "trajectory balance": TrajectoryBalance(),
        "trust region": TrustRegion(bound=0.5, refresh=20),
        "adjoint matching": AdjointMatching(),
        "score matching": ScoreMatching(),
    }
    for name, scale in (("gmm", 2.0), ("dw5", 1.0)):
        make = TARGETS[name][0]
        for label, objective in objectives.items():
            steps = 4000 if "matching" in label else 800
            settings = training(steps, effort, batch=512 if "matching" in label else 128, rate=3e-3)
            method = DIS(steps=100, train_steps=50, objective=objective, training=settings)
            yield "modes", name, label, make(), replace(method, coordinates=Affine(0.0, scale)), 4096
        settings = training(800, effort, batch=128, rate=3e-3)
        loop = CMCD(steps=100, train_steps=50, training=settings, coordinates=Affine(0.0, scale))
        yield "modes", name, "CMCD, log-derivative", make(), loop, 4096
        corrected = replace(loop, resampling=Resampling(), move=HMC(), move_size=0.02)
        yield "modes", name, "CMCD, resampled, HMC", make(), corrected, 4096
        untrained = replace(corrected, learn=(), training=Training(steps=0))
        yield "modes", name, "untrained, resampled, HMC", make(), untrained, 4096


def processes(effort: float) -> Iterator[Cell]:
    """DIS over processes: one objective, one budget, one network."""
    table = {
        "VP": vp(),
        "CLD": CLD(),
        "PSLD": PSLD(),
        "MALDA": MALDA(),
        "bridge (PIS)": BrownianBridge(),
        "learned, K = 1": LearnedProcess(1, learn=("D", "clock")),
        "learned, K = 2": LearnedProcess(2),
        "learned, K = 3": LearnedProcess(3),
    }
    for name, scale in (("gmm", 2.0), ("dw50", 1.0), ("difficult", 2.0)):
        make = TARGETS[name][0]
        for label, process in table.items():
            settings = training(600, effort, batch=128, rate=3e-3)
            method = DIS(process=process, steps=100, train_steps=50, objective=LogDerivative(), training=settings)
            yield "processes", name, label, make(), replace(method, coordinates=Affine(0.0, scale)), 4096


def posteriors(effort: float) -> Iterator[Cell]:
    """Bayesian posteriors, in coordinates that are found."""
    short = training(1000, effort, batch=256, rate=2e-3)
    targets: dict[str, tuple[Target, Any]] = {
        "ionosphere": (LogisticRegression("ionosphere"), Laplace()),
        "sonar": (LogisticRegression("sonar"), Laplace()),
        "brownian": (BrownianMotion(), MeanField()),
    }
    for name, (target, coordinates) in targets.items():
        matched = training(3000, effort, batch=512, rate=3e-3)
        yield (
            "posteriors",
            name,
            "DIS, score matching",
            target,
            DIS(steps=128, train_steps=32, objective=ScoreMatching(), training=matched, coordinates=coordinates),
            4096,
        )
        cmcd = CMCD(steps=128, train_steps=32, training=short, coordinates=coordinates)
        yield "posteriors", name, "CMCD, log-derivative", target, cmcd, 4096
        yield "posteriors", name, "CMCD, resampled", target, replace(cmcd, resampling=Resampling()), 4096
    field = training(200, effort, batch=64, rate=2e-3)
    cox = CMCD(
        steps=64,
        train_steps=16,
        training=field,
        coordinates=MeanField(),
        resampling=Resampling(),
        move=HMC(),
        move_size=0.02,
    )
    for points in ("126", "127"):
        target = LogGaussianCox(points=points, whitened=True)  # type: ignore[arg-type]
        yield "posteriors", f"lgcp {points}", "CMCD, resampled, HMC", target, cox, 512


def pdds(effort: float) -> Iterator[Cell]:
    """Particles and steps; the potential is trained once for each number of steps."""
    for name in ("difficult", "funnel"):
        make = TARGETS[name][0]
        for steps in (10, 30, 100):
            settings = training(2000, effort, batch=300, rate=1e-3)
            method = PDDS(steps=steps, train_steps=min(steps, 50), training=settings)
            if name == "difficult":
                method = replace(method, coordinates=Affine(0.0, 2.0))
            yield "pdds", name, f"K = {steps}", make(), method, 512


TABLES = {"published": published, "modes": modes, "processes": processes, "posteriors": posteriors, "pdds": pdds}


def run(cell: Cell, seed: int, device: str) -> dict[str, Any]:
    """One cell, as a row of plain data."""
    table, name, column, target, method, count = cell
    began = time.perf_counter()
    draws = method.run(target, count, seed, repeats=16, device=device)
    row = {"table": table, "target": name, "column": column, "seed": seed} | judged(draws)
    row["seconds"] = time.perf_counter() - began
    row["train_seconds"] = draws.training[-1]["seconds"] if draws.training else 0.0
    if table == "pdds":
        assert draws.sampler is not None
        row["particles"] = {}
        for particles in (32, 128, 512, 2048):
            more = draws.sampler.draw(20 * particles, seed + 1, repeats=20, device=device)
            row["particles"][str(particles)] = judged(more) | {"sd": float(more.repeat_log_z.double().std())}
    return row


def judged(draws: Draws) -> dict[str, Any]:
    """Numbers of a set of draws."""
    log_w, target = draws.walker_log_weights, draws.target
    assert log_w is not None
    truth = None if target.log_z is None else float(target.log_z)
    row: dict[str, Any] = {
        "log_z": draws.log_z,
        "log_z_error": draws.log_z_std_error,
        "truth": truth,
        "ess": float(effective_sample_size(log_w.reshape(-1))) / log_w.numel(),
        "gradients": draws.evaluations.gradients,
        "mean_log_z": float(draws.repeat_log_z.double().mean()) if draws.repeat_log_z is not None else None,
    }
    if draws.bounds is not None:
        b = draws.bounds
        row |= {"elbo": b.elbo, "elbo_error": b.elbo_std_error, "eubo": b.eubo, "forward_ess": b.forward_ess}
    shares = draws.mode_weights()
    if shares is not None:
        exact = torch.as_tensor(target.mode_weights, dtype=torch.float64)  # type: ignore[attr-defined]
        walkers = mode_weights(target.assign(draws.x), len(exact))  # type: ignore[attr-defined]
        row |= {"tv": total_variation(shares, exact), "tv_walkers": total_variation(walkers, exact)}
        row["modes"] = int((walkers > 0.2 * exact).sum())
    return row


# -- tables ------------------------------------------------------------------------------------------------------------


def spread(values: list[float], digits: int = 3) -> str:
    """Median and range."""
    good = [v for v in values if v is not None and math.isfinite(v)]
    if not good:
        return "--"
    middle = statistics.median(good)
    if len(good) == 1:
        return f"{middle:.{digits}f}"
    return f"{middle:.{digits}f} [{min(good):.{digits}f}, {max(good):.{digits}f}]"


def show(rows: list[dict[str, Any]], tables: list[str]) -> None:
    """Print what there is."""
    for table in tables:
        groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for row in rows:
            if row["table"] == table:
                groups.setdefault((row["target"], row["column"]), []).append(row)
        if not groups:
            continue
        print(f"\n{table}")
        for (name, column), cells in groups.items():
            truth = cells[0]["truth"]
            parts = [f"{name:11s} {column:28s} seeds {len(cells)}"]
            if cells[0].get("elbo") is not None:
                gaps = [(truth if truth is not None else c["log_z"]) - c["elbo"] for c in cells]
                parts.append(f"gap {spread(gaps)}")
            parts.append(f"ESS {spread([c['ess'] for c in cells])}")
            if cells[0].get("forward_ess") is not None:
                parts.append(f"fwd {spread([c['forward_ess'] for c in cells])}")
            if truth is not None:
                parts.append(f"log Z {spread([c['log_z'] - truth for c in cells])}")
            else:
                parts.append(f"log Z {spread([c['log_z'] for c in cells], 2)}")
            if "tv" in cells[0]:
                parts.append(
                    f"TV {spread([c['tv'] for c in cells])} walkers {spread([c['tv_walkers'] for c in cells])}"
                )
            parts.append(f"{statistics.median(c['train_seconds'] for c in cells):.0f} s")
            parts.append(f"{statistics.median(c['gradients'] for c in cells) / 1e6:.2f}M gradients")
            known = PUBLISHED.get((name, column)) if table == "published" else None
            if known is not None:
                parts.append(f"published {known[0]:.3f} / {known[1]:.3f}")
            if table == "published":
                least = floor(name, column)
                parts.append("floor --" if least is None else f"floor {least[0]:.3f} / {least[1]:.3f}")
            print("  ".join(parts))
            for cell in cells if table == "pdds" else ():
                for particles, found in cell["particles"].items():
                    miss = found["mean_log_z"] - (truth or 0.0)
                    print(
                        f"    {particles:>5s} particles: mean of log Z^ {miss:+.3f}, sd {found['sd']:.3f}, "
                        f"log of mean Z^ {found['log_z'] - (truth or 0.0):+.3f} ± {found['log_z_error']:.3f}"
                    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(TABLES), default=list(TABLES))
    parser.add_argument("--targets", nargs="+", help="rows to run; all by default")
    parser.add_argument("--columns", nargs="+", help="columns to run; all by default")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--effort", type=float, default=1.0, help="factor of all training steps")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("bench/results/learned_samplers.jsonl"))
    parser.add_argument("--print", action="store_true", dest="only_print", help="run nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    done = {(r["table"], r["target"], r["column"], r["seed"], r["effort"]) for r in rows}
    for seed in [] if args.only_print else args.seeds:
        for table in args.only:
            for cell in TABLES[table](args.effort):
                key = (*cell[:3], seed, args.effort)
                wanted = (not args.targets or cell[1] in args.targets) and (not args.columns or cell[2] in args.columns)
                if key in done or not wanted:
                    continue
                try:
                    row = run(cell, seed, args.device)
                except FloatingPointError as error:
                    print(*key, "failed:", error, flush=True)
                    continue
                row["effort"] = args.effort
                rows.append(row)
                args.out.parent.mkdir(parents=True, exist_ok=True)
                with args.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(*key, {k: round(v, 4) for k, v in row.items() if isinstance(v, float)}, flush=True)
    show([r for r in rows if r["effort"] == args.effort], args.only)


if __name__ == "__main__":
    main()
