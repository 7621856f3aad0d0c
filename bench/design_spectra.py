"""Optimised schedules against classical ones on spectra that they were not made for, exactly: no sampling.

Schedules are made for a family around eigenvalues i^-2 in 64 dimensions and judged by exact W2 on other spectra,
flatter and steeper ones and 32 x 32 images; and, where UNDRIFT_DATA is set, for one half of 401 photographs and judged
on the other half. Beside them EDM's rho = 7 with the same sampler, and the best of nine classical and published grids,
chosen for each spectrum. A multistep method is shown at levels of its own law and at those of order 1.

    python bench/design_spectra.py            # ten minutes on one core
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch

from design_plans import GRIDS, PROCESSES, SAMPLERS
from undrift.design import Spectrum, family, optimise, propagate
from undrift.process import LinearProcess
from undrift.report.comparison import at_calls
from undrift.sample import Exponential, Rho, TableSampler

CALLS = (5, 8, 10, 20, 50)
METHODS = ("EI1", "ancestral", "Heun", "SSCS", "2M", "EI2 raw")


def problems() -> list[tuple[list[Spectrum], list[Spectrum]]]:
    """Families that schedules are made for, and the spectra they are judged on."""
    others = [Spectrum.power_law(64, 1.25), Spectrum.power_law(64, 3.0), Spectrum.images(32, 2.6)]
    found = [(family(Spectrum.power_law(64, 2.0)), others)]
    root = os.environ.get("UNDRIFT_DATA")
    if root is not None:
        with np.load(Path(root) / "images" / "natural64" / "natural_patches64.npz", allow_pickle=False) as file:
            photographs = torch.from_numpy(file["rgb"].astype(np.float32)).movedim(-1, 1) / 127.5 - 1
        halves = [Spectrum.of(photographs[i::2], "fft", name=f"photographs, half {i + 1}") for i in (0, 1)]
        found.append((family(halves[0]), [halves[1]]))
    return found


def error(process: LinearProcess, sampler: TableSampler, spectrum: Spectrum) -> float:
    return float(propagate(sampler.plan(process), spectrum).w2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--process", default="VP", choices=list(PROCESSES))
    parser.add_argument("--calls", type=int, nargs="+", default=list(CALLS))
    parser.add_argument("--out", type=Path, default=Path("bench/results/design_spectra.jsonl"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    process, given = PROCESSES[options.process], problems()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    print("sampler | calls | spectrum | optimised W2 | over rho = 7 | over the best classical grid (which)")
    for name, count, by in itertools.product(METHODS, options.calls, ("itself", "EI1")):
        if by == "EI1" and name not in ("2M", "EI2 raw"):
            continue
        try:
            sampler, plan = at_calls(SAMPLERS[name], process, count)
        except ValueError:
            continue
        ratios = []
        for members, others in given:
            start = time.process_time()
            found = optimise(process, sampler, members, by=Exponential(count, order=1) if by == "EI1" else None)
            seconds = time.process_time() - start
            for spectrum in others:
                value = error(process, found.sampler, spectrum)
                rho = error(process, dataclasses.replace(sampler, grid=Rho()), spectrum)
                grids = {k: error(process, dataclasses.replace(sampler, grid=g), spectrum) for k, g in GRIDS.items()}
                best = min(grids, key=grids.__getitem__)
                ratios.append((rho / value, grids[best] / value))
                row = {"sampler": name, "by": by, "calls": plan.calls, "budget": count, "spectrum": spectrum.name}
                row |= {"w2": value, "rho7": rho, "best": grids[best], "grid": best, "seconds": round(seconds, 2)}
                row |= {"process": options.process}
                with options.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(
                    f"{name} by {by} | {count} | {spectrum.name} | {value:.4g} | {rho / value:.2f} | "
                    f"{grids[best] / value:.2f} ({best})",
                    flush=True,
                )
        means = [math.exp(sum(math.log(r[i]) for r in ratios) / len(ratios)) for i in (0, 1)]
        print(f"{name} by {by} | {count} | geometric mean | | {means[0]:.2f} | {means[1]:.2f}", flush=True)


if __name__ == "__main__":
    main()
