r"""What a training step costs beside the network and target calls in it, and what a second of training buys.

    step    one step of an objective, gradient included, without the optimiser; best of several
    floor   the bare calls that it cannot do without. Log-variance: K network calls without a graph, K gradients of the
            target, one call and one backward pass over all K B states. KL: K calls and K target gradients with a graph,
            each followed by its own backward pass.
    peak    largest resident memory of a process that does nothing else, less that before the first step

Each cell runs in a process of its own, on one thread.

    python bench/learned_cost.py                 # both tables, minutes
    python bench/learned_cost.py --only steps
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from undrift.density import Affine, Target
from undrift.density.controlled import (
    DIS,
    KL,
    ControlledDiffusion,
    EqualAngles,
    Informed,
    LogVariance,
    Objective,
    Scheme,
    ScoreMatching,
    Training,
)
from undrift.density.controlled.control import _Informed
from undrift.density.controlled.objective import Work
from undrift.density.targets import DoubleWell, Mixture9
from undrift.process import CLD, VP, LinearClock

TARGETS: dict[str, tuple[Callable[[], Target], float]] = {
    "gmm": (Mixture9, 2.0),
    "dw50": (lambda: DoubleWell(dim=50, wells=5, delta=2.0), 1.0),
}
OBJECTIVES: dict[str, Objective] = {"LV": LogVariance(), "KL": KL()}


def best(run: Callable[[], Any], count: int) -> float:
    """Least CPU seconds of several runs: on a shared machine the clock on the wall says little."""
    times = []
    for _ in range(count):
        began = time.process_time()
        run()
        times.append(time.process_time() - began)
    return min(times)


def memory() -> float:
    """Largest resident memory so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def cell(target: str, objective: str, process: str, batch: int, steps: int, chunk: int | None) -> dict[str, float]:
    """One training step and its floor."""
    torch.set_num_threads(1)
    make, scale = TARGETS[target]
    seen = make().affine(0.0, scale)
    chosen = CLD() if process == "CLD" else VP(clock=LinearClock(0.1, 10.0))
    diffusion = ControlledDiffusion(Scheme(chosen, EqualAngles(), steps, Informed()), seen.dim)
    work = Work(diffusion, seen, torch.Generator().manual_seed(0), batch, torch.float32, chunk)
    runner = OBJECTIVES[objective].runner(work)
    count = 5 if batch * steps <= 60_000 else 3
    before = memory()
    runner.step()
    peak = memory() - before
    step = best(runner.step, count)

    field = diffusion.control
    assert isinstance(field, _Informed)
    net, labels = field.net, diffusion.tables(torch.zeros(())).chain.label
    x, states = torch.randn(1, batch, seen.dim), torch.randn(steps, batch, seen.dim)

    def bare() -> None:
        if objective == "LV":
            with torch.no_grad():
                e = net.time(labels)
                for k in range(steps):
                    seen.log_prob_and_score(x[0])
                    net(x, e[k : k + 1])
            net(states, net.time(labels)[:-1]).square().sum().backward()
            return
        e = net.time(labels)
        for k in range(steps):
            point = x.detach().requires_grad_()
            _, score = seen.differentiable(point[0])
            (net(point, e[k : k + 1])[0] * score).sum().backward(retain_graph=True)

    bare()
    return {"step": step, "floor": best(bare, count), "peak": peak}


def steps_table() -> None:
    """Time and memory of a step."""
    print("target objective process  batch  steps  chunk     step    floor  ratio   peak MB")
    cells = [
        ("gmm", o, "VP", b, k, None) for o in OBJECTIVES for b, k in ((512, 100), (512, 200), (2048, 100), (2048, 200))
    ]
    cells += [
        ("gmm", "LV", "VP", 2048, 200, 20),
        ("gmm", "LV", "CLD", 512, 100, None),
        ("dw50", "LV", "VP", 512, 100, None),
    ]
    for target, objective, process, batch, steps, chunk in cells:
        arguments = [target, objective, process, str(batch), str(steps), str(chunk or 0)]
        command = [sys.executable, __file__, "--cell", *arguments]
        out = subprocess.run(command, capture_output=True, text=True, check=True)
        r = json.loads(out.stdout.splitlines()[-1])
        left = f"{target:6s} {objective:9s} {process:8s} {batch:5d}  {steps:5d}  {chunk or '--':>5}"
        times = f"{1e3 * r['step']:5.0f} ms {1e3 * r['floor']:5.0f} ms  {r['step'] / r['floor']:5.2f}"
        print(f"{left}  {times}  {r['peak']:8.0f}", flush=True)


def time_table() -> None:
    """ESS of the walkers against the seconds of training that they cost."""
    marks = (5, 10, 20, 40)
    print("\nESS of training batches (share) after so many seconds   " + "  ".join(f"{m:5d}" for m in marks))
    for target, (make, scale) in TARGETS.items():
        for name, objective, batch, steps in (
            ("log-variance", LogVariance(), 128, 900),
            ("KL", KL(), 128, 600),
            ("score matching", ScoreMatching(), 512, 4000),
        ):
            method = DIS(
                steps=50,
                objective=objective,
                training=Training(steps=steps, batch=batch, rate=3e-3, final=1.0, record=10),
                coordinates=Affine(0.0, scale),
            )
            rows = method.run(make(), 256).training
            found = []
            for mark in marks:
                near = [r["ess"] for r in rows if 0.7 * mark < r["seconds"] <= mark and r.get("ess") is not None]
                found.append(f"{sum(near) / len(near):5.2f}" if near else "   --")
            print(f"{target:6s} {name:48s} " + "  ".join(found), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["steps", "time"])
    parser.add_argument("--cell", nargs=6, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.cell:
        target, objective, process, batch, steps, chunk = args.cell
        print(json.dumps(cell(target, objective, process, int(batch), int(steps), int(chunk) or None)))
        return
    if args.only != "time":
        steps_table()
    if args.only != "steps":
        time_table()


if __name__ == "__main__":
    main()
