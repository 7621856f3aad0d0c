"""Which sampler, process and grid for how many calls? Measured on Gaussian mixtures with the exact denoiser.

Every setting walks the same number of model calls (the last is the final prediction) on 2-d targets: a ring of 8 modes,
and random mixtures of 6. Quality is the sliced W2 to fresh samples, averaged over seeds, with its standard error; the
floor is the same figure between two sets of exact samples.

    python bench/mixture_table.py --out bench/results/mixture_table.json      # some hours on one core
    python bench/mixture_table.py --quick --calls 5 10                        # minutes: one seed, ring only
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from pathlib import Path

import torch

from undrift import Diffusion, sample
from undrift.denoise import MixtureDenoiser
from undrift.process import CLD, MALDA, PSLD, VE, VP, FlowMatching, LinearClock, LinearProcess
from undrift.process.clock import ConstantClock
from undrift.sample import (
    SSCS,
    Ancestral,
    DPMSolver2M,
    EulerMaruyama,
    Exponential,
    Heun,
    LogSigma,
    Quadratic,
    Rho,
    Uniform,
)

PROCESSES: dict[str, LinearProcess] = {
    "VP": VP(),
    "VP .1-10": VP(LinearClock(0.1, 10.0)),
    "VE": VE(),
    "FlowMatching": FlowMatching(),
    "CLD": CLD(),
    "CLD beta/2": CLD(clock=ConstantClock(2.0)),
    "PSLD": PSLD(),
    "MALDA": MALDA(),
}
GRIDS = {"log sigma": LogSigma(), "quadratic": Quadratic(), "uniform": Uniform(), "rho 7": Rho(sigma_min=0.01)}
SAMPLERS = {
    "EM": lambda n, g: EulerMaruyama(n, g),
    "SSCS": lambda n, g: SSCS(n, g),
    "SSCS mid": lambda n, g: SSCS(n, g, score_time="midpoint"),
    "SSCS2": lambda n, g: SSCS((n + 1) // 2, g, order=2),
    "ancestral": lambda n, g: Ancestral(n, g),
    "EI1": lambda n, g: Exponential(n, g, order=1),
    "EI2": lambda n, g: Exponential(n, g, order=2),
    "EI3": lambda n, g: Exponential(n, g, order=3),
    "EI2 raw": lambda n, g: Exponential(n, g, order=2, guard=False),
    "2M": lambda n, g: DPMSolver2M(n, g),
    "Heun": lambda n, g: Heun((n + 1) // 2, g),
}


def random_mixture(seed: int, modes: int = 6) -> MixtureDenoiser:
    """Unequal weights and widths, scaled to unit total variance a coordinate."""
    g = torch.Generator().manual_seed(seed)
    weights = torch.rand(modes, generator=g, dtype=torch.float64) + 0.2
    weights = weights / weights.sum()
    means = torch.randn(modes, 2, generator=g, dtype=torch.float64)
    widths = 0.05 + 0.25 * torch.rand(modes, generator=g, dtype=torch.float64)
    means = means - weights @ means
    variance = (weights @ (means.square().sum(1) / 2 + widths.square())).item()
    return MixtureDenoiser(weights, means / math.sqrt(variance), widths.square() / variance)


def sliced_w2(x: torch.Tensor, reference: torch.Tensor, projections: torch.Tensor) -> float:
    """Exact over 64 directions of the half circle."""
    return float(((x @ projections).sort(0).values - reference).square().mean().sqrt())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--calls", type=int, nargs="+", default=[5, 10, 20, 50])
    parser.add_argument("--targets", choices=["ring", "random"], nargs="+", default=["ring", "random"])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    angle = torch.linspace(0, math.pi, 65, dtype=torch.float64)[:-1]
    projections = torch.stack([angle.cos(), angle.sin()])
    targets = {"ring": MixtureDenoiser.ring()} if args.quick or "ring" in args.targets else {}
    if "random" in args.targets and not args.quick:
        targets |= {f"random {i}": random_mixture(i) for i in range(4)}
    seeds = range(1 if args.quick else args.seeds)
    results, begin = [], time.time()
    for name, target in targets.items():
        references, floors = [], []
        for seed in seeds:
            g = torch.Generator().manual_seed(10_000 + seed)
            exact = [target.sample(args.samples, g).double() @ projections for _ in range(2)]
            references.append(exact[0].sort(0).values)
            floors.append(float((exact[1].sort(0).values - references[-1]).square().mean().sqrt()))
        print(
            f"\n## {name}: floor {sum(floors) / len(floors):.3f} ({min(floors):.3f} to {max(floors):.3f})", flush=True
        )
        for calls in args.calls:
            print(
                f"\n### {calls} calls\n\n| process, grid | "
                + " | ".join(SAMPLERS)
                + " |\n|---"
                + "|---" * len(SAMPLERS)
                + "|"
            )
            for (process_name, process), (grid_name, grid) in itertools.product(PROCESSES.items(), GRIDS.items()):
                row = []
                for sampler_name, make in SAMPLERS.items():
                    try:
                        plan = make(calls, grid).plan(process)
                    except ValueError:  # SSCS where nothing is stationary
                        row.append("")
                        continue
                    values = []
                    for seed in seeds:
                        try:
                            x = sample(
                                Diffusion(process, target), args.samples, (2,), plan, seed=seed, dtype=torch.float64
                            )
                            values.append(sliced_w2(x, references[seed], projections))
                        except FloatingPointError:
                            values.append(math.inf)
                    mean = sum(values) / len(values)
                    spread = sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1) if mean < math.inf else 0.0
                    error = math.sqrt(spread / len(values))
                    row.append(f"{mean:.3f}" if mean < 100 else f"{mean:.0e}")
                    results.append(
                        {"target": name, "calls": plan.calls, "budget": calls, "process": process_name,
                         "grid": grid_name, "sampler": sampler_name, "w2": mean, "standard_error": error,
                         "floor": sum(floors) / len(floors)}
                    )  # fmt: skip
                print(f"| {process_name}, {grid_name} | " + " | ".join(row) + " |", flush=True)
            cells = [r for r in results if r["target"] == name and r["budget"] == calls]
            for r in sorted(cells, key=lambda r: r["w2"])[:5]:
                setting = f"{r['process']}, {r['sampler']}, {r['grid']}"
                print(f"best: {setting}: {r['w2']:.4f} +- {r['standard_error']:.4f} ({r['calls']} calls)")
            if args.out:
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps(results, indent=0))
    print(f"\n{time.time() - begin:.0f} s")


if __name__ == "__main__":
    main()
