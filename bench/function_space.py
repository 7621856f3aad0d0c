"""Posterior sampling on functions, on 32 to 512 points: what does not depend on the grid, and what does.

    linear    16 point observations: step limits, conditions, divergences of Langevin schemes, in closed form
    tau       the bias of a score at positive time, and the step limit, for noise of four smoothnesses, in closed form
    darcy     seven pressures in one dimension: acceptance of Metropolised moves, and the bias of unadjusted ones
    bimodal   a posterior of two modes of known weight: Langevin, annealed Langevin, tempering

    python bench/function_space.py linear tau darcy bimodal --out bench/results/function_space.jsonl

Each line of the output is one row of a table; rows that are there already are not computed again.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from undrift.inverse import (
    Annealing,
    FieldMixture,
    LinearGaussian,
    PCNMoves,
    Posterior,
    PosteriorInformed,
    PriorCovariance,
    extremes,
    find_mode,
    gaussian_w2,
    langevin,
    pcn,
    tempered,
)
from undrift.observe import Darcy1d, GaussianNoise, Observation, Points
from undrift.space import Cosine, FunctionSpace, Matern

PLACES = (0.01, 0.03, 0.14, 0.33, 0.37, 0.48, 0.53, 0.56, 0.65, 0.66, 0.66, 0.68, 0.71, 0.72, 0.87, 0.94)
SPACE = FunctionSpace(Cosine(), Matern(2.0, 3.0), "coefficients")

Row = dict[str, Any]
Rows = Iterator[tuple[str, Callable[[], Row]]]


def linear_problem(n: int, std: float = 0.3, seed: int = 17177) -> LinearGaussian:
    g = torch.Generator().manual_seed(seed)
    empty = Observation(Points(PLACES, Cosine()), GaussianNoise(std), torch.zeros(16, dtype=torch.float64))
    matrix = LinearGaussian.of(empty, SPACE, (256,)).matrix
    truth = torch.randn(256, generator=g, dtype=torch.float64) * SPACE.variances((256,)).sqrt()
    y = matrix @ truth + std * torch.randn(16, generator=g, dtype=torch.float64)
    return LinearGaussian.of(Observation(empty.operator, empty.noise, y), SPACE, (n,))


def linear() -> Rows:
    def row(n: int, std: float) -> Row:
        p = linear_problem(n, std)
        plain, euler = p.langevin(None, "identity", "euler"), p.langevin(None, "prior", "euler")
        split, best = p.langevin(0.2 * euler.limit, "prior"), p.langevin(0.2, "posterior", "euler")
        return {
            "identity": {"limit": plain.limit, "condition": plain.condition, "kl": plain.kl},
            "prior": {"limit": euler.limit, "condition": euler.condition, "kl": euler.kl, "w2": euler.relative_w2},
            "crank-nicolson": {"kl": split.kl, "w2": split.relative_w2},
            "posterior": {"limit": best.limit, "condition": best.condition, "kl per mode": best.kl / n},
        }

    for std in (0.3, 0.05):
        for n in (32, 64, 128, 256, 512):
            yield f"n {n}, noise {std}", lambda n=n, std=std: row(n, std)


def tau() -> Rows:
    def row(alpha: float) -> Row:
        p = linear_problem(256)
        exact, noise = p.covariance(), Matern(alpha, 3.0).variances(Cosine(), (256,))
        sd = math.sqrt(float(exact.trace()))
        out = {}
        for time_ in (0.1, 0.01, 0.001, 1e-4):
            q = p.at(time_, noise)
            law = q.langevin(None, noise, "euler")
            w2 = gaussian_w2(q.covariance(), exact, q.posterior_mean() - p.posterior_mean()) / sd
            out[f"{time_:g}"] = {"w2": w2, "limit": law.limit, "condition": law.condition}
        return out

    for alpha in (1.0, 1.5, 2.0, 3.0):
        yield f"noise of smoothness {alpha}", lambda alpha=alpha: row(alpha)


def darcy() -> Rows:
    space = FunctionSpace(Cosine(), Matern(2.0, 3.0, 4.0), "coefficients")
    chains = 200

    def row(n: int) -> Row:
        g = torch.Generator().manual_seed(1)
        xi = torch.nn.functional.pad(torch.randn(1, 32, generator=g, dtype=torch.float64), (0, 224))
        operator = Darcy1d(tuple(i / 8 for i in range(1, 8)))
        observed = Observation.simulate(operator, GaussianNoise(0.05), space.decode(space.colour(xi)), g)
        posterior = Posterior(FieldMixture(space), observed)
        mode = find_mode(posterior, torch.zeros(1, n, dtype=torch.float64))
        k = PosteriorInformed.at(posterior, mode)
        start = mode + k.noise(torch.randn(chains, n, generator=g, dtype=torch.float64))
        exact = pcn(posterior, start, 800, 0.5, reference=k, centre=mode, warmup=200, thin=20)
        x, prior_sd = exact.states[:, -1], space.variances((n,)).sqrt()
        out: Row = {
            "reference": {
                "accepted": float(exact.acceptance.mean()),
                "rhat": float(exact.rhat().max()),
                "mean of mode 1": float(exact.mean()[1]),
                "sd over prior's": float(exact.x.var(0).sum().sqrt() / prior_sd.norm()),
            }
        }
        for proposal in ("pcn", "random-walk", "white-walk"):
            found = pcn(posterior, x, 400, 0.25, proposal, thin=400)
            out[proposal] = float(found.acceptance.mean())
        b = extremes(posterior, x[:32], 1e-3, PriorCovariance(space))[1] - 1
        out["b"] = {"median": float(b.median()), "largest": float(b.max())}
        runs = [
            ("crank-nicolson", 0.0125, None),
            ("crank-nicolson", 0.05, None),
            ("euler", 0.05, None),
            ("crank-nicolson", 0.0025, None),
            ("crank-nicolson", 0.2, k),
        ]
        for scheme, step, preconditioner in runs:
            found = langevin(
                posterior, x, 1000, step, scheme, preconditioner=preconditioner, warmup=200, thin=20,
                trust=math.inf, checks=0,
            )  # fmt: skip
            gap = (found.mean() - exact.mean()).abs() / exact.std()
            name = f"{scheme}, step {step}" + ("" if preconditioner is None else ", informed")
            out[name] = {
                "gap of modes 0-3 over sd": [float(v) for v in gap[:4]],
                "variance ratio of modes 0-3": [float(v) for v in (found.x.var(0) / exact.x.var(0))[:4]],
                "variance ratio": float(found.x.var(0).sum() / exact.x.var(0).sum()),
                "variance ratio, modes from 16": float((found.x.var(0)[16:] / prior_sd[16:].square()).mean()),
            }
        return out

    for n in (32, 64, 128, 256):
        yield f"n {n}", lambda n=n: row(n)


def bimodal() -> Rows:
    n, centre, std, weight, chains = 64, 5.0, 2.0, 0.7006, 200
    mean = torch.zeros(n, dtype=torch.float64)
    mean[0] = centre

    def observe(height: float) -> tuple[Observation, float, float]:
        y = torch.tensor([height, height / 2], dtype=torch.float64)
        observed = Observation(Points((0.3, 0.7), Cosine()), GaussianNoise(std), y)
        a, b = (LinearGaussian.of(observed, SPACE, (n,), mean=s * mean).log_evidence() for s in (1, -1))
        return observed, 1 / (1 + math.exp(b - a)), math.log(0.5 * (math.exp(a) + math.exp(b)))

    low, high = 0.0, 2.0
    for _ in range(40):
        mid = (low + high) / 2
        low, high = (mid, high) if observe(mid)[1] < weight else (low, mid)
    observed, exact, log_evidence = observe(low)
    posterior = Posterior(FieldMixture(SPACE, torch.tensor([[centre], [-centre]])), observed)
    starts = {"plus": mean.expand(chains, n), "zero": 0 * mean.expand(chains, n)}

    def run(start: str, steps: int, annealing: Annealing) -> Row:
        # a weight of 3 triples the prior's curvature for a while: gamma b is .41 at the start
        found = langevin(posterior, starts[start], steps, 0.2, annealing=annealing, warmup=steps - 1, trust=0.5)
        return {"weight": float((found.x[:, 0] > 0).double().mean()), "chains": chains, "exact": exact}

    def correct(particles: int) -> Row:
        g = torch.Generator().manual_seed(0)
        draws = posterior.prior.sample(32 * particles, (n,), g)  # type: ignore[attr-defined]
        found = tempered(posterior, draws, PCNMoves(5), runs=32)
        w = found.weights.reshape(32, -1)
        of_run = (w * (found.x[:, 0] > 0).reshape(32, -1)).sum(1) / w.sum(1)
        return {
            "weight": float(of_run.mean()),
            "std_error": float(of_run.std()) / math.sqrt(32),
            "exact": exact,
            "log_evidence": found.log_evidence,
            "log_evidence_std_error": found.log_evidence_std_error,
            "exact_log_evidence": log_evidence,
            "levels": found.calls,
        }

    for particles in (64, 512):
        yield f"tempered, 32 x {particles}", lambda particles=particles: correct(particles)
    for start in starts:
        yield f"langevin from {start}", lambda start=start: run(start, 500, Annealing())
    for steps in (1000, 4000):
        for start in starts:
            yield f"annealed, {steps}, from {start}", lambda a=start, s=steps: run(a, s, Annealing(1e-3, 6.0, 0.95))
    for start in starts:
        weighted = Annealing(1e-3, 6.0, 0.95, 3.0, 0.95)
        yield f"annealed, alpha 3, 1000, from {start}", lambda a=start, w=weighted: run(a, 1000, w)
    for start in starts:
        yield f"annealed, 16000, from {start}", lambda a=start: run(a, 16000, Annealing(1e-3, 6.0, 0.95))


TABLES: dict[str, Callable[[], Rows]] = {"linear": linear, "tau": tau, "darcy": darcy, "bimodal": bimodal}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", default=[], help=f"of {', '.join(TABLES)}; all if none is named")
    parser.add_argument("--out", type=Path, help="JSON lines to read and extend")
    args = parser.parse_args()
    if unknown := set(args.tables) - set(TABLES):
        parser.error(f"no table {', '.join(sorted(unknown))}; there are {', '.join(TABLES)}")
    torch.set_num_threads(1)
    done = set()
    if args.out and args.out.exists():
        done = {(r["table"], r["row"]) for r in map(json.loads, args.out.read_text().splitlines())}
    for table in args.tables or TABLES:
        for name, compute in TABLES[table]():
            if (table, name) in done:
                continue
            began = time.process_time()
            line = json.dumps({"table": table, "row": name, **compute(), "seconds": time.process_time() - began})
            print(line, flush=True)
            if args.out:
                with args.out.open("a") as file:
                    file.write(line + "\n")


if __name__ == "__main__":
    main()
