"""Posteriors of random Gaussian mixtures under linear observations: twisted sampling, and guidance, against the truth.

Prior, observation and so the posterior are Gaussian mixtures, known exactly. For every method: total variation between
the weights of the posterior's modes, sliced W2 to exact draws of it, and the error of log p(y). "guidance" is the same
potential without weights; "bootstrap" weighs draws of the prior, and with the most particles shows what the sampler's
own law makes of the observation, which is what twisted sampling tends to; "known" puts the observed coordinates in the
prediction and "replace" draws them anew at every step, both as if there were no noise; "exact" is another exact sample.
All make the same number of calls of the model. Results are kept, line by line, in ``--out``; lines that are there
already are not computed again. Seeds are new mixtures, observations and particles.

    python bench/twisted_mixtures.py --out bench/results/twisted_mixtures.jsonl
    python bench/twisted_mixtures.py --out bench/results/twisted_mixtures.jsonl --table
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from undrift import Diffusion, sample
from undrift.denoise import MixtureDenoiser
from undrift.denoise.guidance import Guided
from undrift.denoise.known import Known
from undrift.denoise.potentials import PointEstimate, PseudoInverse, TweedieMoments
from undrift.measure.distance import sliced_wasserstein
from undrift.measure.evidence import total_variation
from undrift.observe import GaussianNoise, Matrix, Observation
from undrift.process import CLD, PSLD, VP
from undrift.sample import Ancestral, Replace, twisted

DRAWS = 4096
MANY = 16384
POTENTIALS = {"point": PointEstimate, "pseudo-inverse": PseudoInverse, "moments": TweedieMoments}
PROCESSES: dict[str, Callable[[], Any]] = {"VP": VP, "CLD": CLD, "PSLD": PSLD}

Drawn = tuple[Tensor, Tensor | None, dict[str, float]]
"""Draws (n, d), their weights (n,) or None, and what else is to be noted."""


class Task(NamedTuple):
    """A family of problems: dimension, modes, numbers observed, their noise, and whether they are coordinates."""

    d: int
    modes: int
    m: int
    noise: float
    mask: bool = False

    def __str__(self) -> str:
        return f"d={self.d}, {self.modes} modes, {self.m} {'coordinates' if self.mask else 'sums'}, noise {self.noise}"


TASKS = [
    Task(2, 25, 1, 0.5),
    Task(2, 25, 1, 0.1),
    Task(8, 12, 2, 0.5),
    Task(8, 12, 2, 0.1),
    Task(8, 12, 2, 0.3, mask=True),
    Task(32, 6, 2, 0.5),
    Task(32, 6, 2, 0.1),
]


class Problem:
    """A mixture with means of unit variance and modes of random shape, and an observation of a draw of it."""

    def __init__(self, task: Task, seed: int) -> None:
        g = torch.Generator().manual_seed(1000 * seed + 17)
        f64 = torch.float64
        means = torch.randn(task.modes, task.d, generator=g, dtype=f64)
        frames = torch.linalg.qr(torch.randn(task.modes, task.d, task.d, generator=g, dtype=f64)).Q
        spread = 0.1 + 0.3 * torch.rand(task.modes, 1, task.d, generator=g, dtype=f64)
        weights = 0.2 + torch.rand(task.modes, generator=g, dtype=f64)
        self.prior = MixtureDenoiser(weights, means, (frames * spread.square()) @ frames.mT)
        rows = torch.randn(task.m, task.d, generator=g, dtype=f64)
        self.a = torch.eye(task.d, dtype=f64)[: task.m] if task.mask else rows / rows.norm(dim=1, keepdim=True)
        truth = self.prior.sample(1, g)
        self.y = (truth @ self.a.T)[0] + task.noise * torch.randn(task.m, generator=g, dtype=f64)
        self.posterior = self.prior.posterior(self.a, task.noise**2, self.y)
        self.log_p = self.prior.log_evidence(self.a, task.noise**2, self.y)
        self.observation = Observation(Matrix(self.a), GaussianNoise(task.noise), self.y)
        self.exact = self.posterior.sample(DRAWS, g)
        self.weights = self.posterior.weights / self.posterior.weights.sum()

    def judge(self, x: Tensor, weights: Tensor | None) -> dict[str, float]:
        """Distances of draws x (n, d) from the posterior; weights (n,), or None for equal ones."""
        equal = x
        if weights is None:
            weights = torch.full((len(x),), 1 / len(x), dtype=x.dtype)
        else:
            equal = x[torch.multinomial(weights, DRAWS, replacement=True, generator=torch.Generator().manual_seed(0))]
        y, _ = self.posterior._coordinates(x, 0.0)
        share = self.posterior._log_joint(y, self.posterior._noisy_variances(torch.zeros(1, dtype=x.dtype)))
        seen = share.softmax(0) @ weights
        return {"tv": total_variation(seen, self.weights), "sw2": sliced_wasserstein(equal, self.exact, 128)}


def results(task: Task, name: str, seed: int, calls: int, particles: list[int], done: set[Any]) -> Iterator[dict]:
    """The rows of one problem on one process that are not there yet."""
    problem, process = Problem(task, seed), PROCESSES[name]()
    diffusion, plan = Diffusion(process, problem.prior), Ancestral(calls).plan(process)
    f64 = torch.float64

    def row(method: str, n: int, make: Callable[[], Drawn]) -> Iterator[dict]:
        if (str(task), name, method, n, seed, calls) not in done:
            start = time.perf_counter()
            x, weights, extra = make()
            seconds = time.perf_counter() - start
            where = {"task": str(task), "process": name, "method": method, "particles": n, "seed": seed, "calls": calls}
            yield where | problem.judge(x, weights) | extra | {"seconds": round(seconds, 3)}

    yield from row(
        "exact", DRAWS, lambda: (problem.posterior.sample(DRAWS, torch.Generator().manual_seed(seed)), None, {})
    )
    potentials = {k: make(problem.observation) for k, make in POTENTIALS.items()}
    for label, potential in potentials.items():

        def guided(potential: Any = potential) -> Drawn:
            steered = Diffusion(process, Guided(problem.prior, potential))
            return sample(steered, DRAWS, (task.d,), plan, seed, batch=1024, dtype=f64), None, {}

        yield from row(f"guidance, {label}", DRAWS, guided)
    if task.mask:
        mask = torch.arange(task.d) < task.m
        values = torch.cat([problem.y, torch.zeros(task.d - task.m, dtype=f64)])
        inside = Diffusion(process, Known(problem.prior, mask, values))
        yield from row("known", DRAWS, lambda: (sample(inside, DRAWS, (task.d,), plan, seed, dtype=f64), None, {}))
        steer = Replace(mask, values)
        yield from row(
            "replace",
            DRAWS,
            lambda: (sample(diffusion, DRAWS, (task.d,), plan, seed, steer=steer, dtype=f64), None, {}),
        )
    for n in [*particles, MANY]:
        for label, potential in {"bootstrap": None, **({} if n == MANY else potentials)}.items():

            def weighted(n: int = n, potential: Any = potential) -> Drawn:
                out = twisted(
                    diffusion, problem.observation, potential, n, (task.d,), plan, seed, batch=2048, dtype=f64
                )
                extra = {
                    "log_p_error": out.log_evidence - problem.log_p,
                    "ess": out.ess,
                    "least_ess": float(out.ess_path.min()),
                }
                return out.x, out.weights, extra

            yield from row(label if potential is None else f"twisted, {label}", n, weighted)


def table(rows: list[dict[str, Any]]) -> None:
    """Mean and standard error over seeds, task by task."""
    groups: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for r in rows:
        groups[r["task"], r["process"], r["calls"], r["method"], r["particles"]].append(r)

    def number(members: list[dict[str, Any]], key: str, absolute: bool = False) -> str:
        values = torch.tensor([r[key] for r in members if key in r], dtype=torch.float64)
        if not len(values):
            return "–"
        values = values.abs() if absolute else values
        error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return f"{float(values.mean()):.3f} ± {error:.3f}"

    print("| task | process | method | particles | TV | sliced W2 | error of log p(y) | ESS | seeds |")
    print("|---|---|---|---|---|---|---|---|---|")
    for (task, process, _, method, n), members in sorted(groups.items(), key=lambda item: str(item[0][:4])):
        ess = [r["ess"] for r in members if "ess" in r]
        size = f"{sum(ess) / len(ess):.0f}" if ess else "–"
        print(
            f"| {task} | {process} | {method} | {n} | {number(members, 'tv')} | {number(members, 'sw2')} | "
            f"{number(members, 'log_p_error', True)} | {size} | {len(members)} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines to read and extend")
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--calls", type=int, default=50)
    parser.add_argument("--particles", type=int, nargs="*", default=[16, 64, 256, 1024, 4096])
    parser.add_argument("--processes", nargs="*", default=list(PROCESSES))
    parser.add_argument("--tasks", type=int, nargs="*", default=list(range(len(TASKS))), help="places in the list")
    parser.add_argument("--table", action="store_true", help="print what is there, and compute nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    if not args.table:
        keys = ("task", "process", "method", "particles", "seed", "calls")
        done = {tuple(r[k] for k in keys) for r in rows}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        for seed in range(args.seeds):
            for index in args.tasks:
                for name in args.processes:
                    for row in results(TASKS[index], name, seed, args.calls, args.particles, done):
                        with args.out.open("a") as file:
                            file.write(json.dumps(row) + "\n")
                        rows.append(row)
    table(rows)


if __name__ == "__main__":
    main()
