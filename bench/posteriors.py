"""Real posteriors by the method that chooses for itself, against reference draws and known evidence.

For every posterior with reference draws: the worst deviation of a mean and of a standard deviation, over its
parameters, in combined Monte Carlo errors (ours, from repeats, and the reference's). For every target with a known
log Z: its deviation in combined standard errors. And the evaluations and seconds that it took. Results are kept, line
by line, in ``--out``; lines that are there already are not computed again.

    python bench/posteriors.py --out bench/results/posteriors.jsonl
    python bench/posteriors.py --only EightSchools --n 8192
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from undrift.density import Draws, Target
from undrift.density.auto import Auto
from undrift.density.targets import (
    AutoRegression,
    BrownianMotion,
    EightSchools,
    GPRegression,
    KidScore,
    LogGaussianCox,
    LogisticRegression,
    LowDimGaussMix,
    Mesquite,
    Nes1980,
    OneCompartment,
    SblrcBlr,
    Seeds,
)

CASES = {
    "eight_schools, non-centred": lambda: EightSchools(centered=False),
    "eight_schools, centred": lambda: EightSchools(centered=True),
    "kidscore_momiq": lambda: KidScore("momiq"),
    "kidscore_momhsiq": lambda: KidScore("momhsiq"),
    "kidscore_interaction": lambda: KidScore("interaction"),
    "gp_regr": GPRegression,
    "arK": AutoRegression,
    "sblrc-blr": SblrcBlr,
    "mesquite": lambda: Mesquite(log=False),
    "logmesquite": lambda: Mesquite(log=True),
    "nes1980": Nes1980,
    "low_dim_gauss_mix": LowDimGaussMix,
    "one_comp_mm_elim_abs": OneCompartment,
    "seeds": Seeds,
    "brownian": BrownianMotion,
    "brownian, known scales": lambda: BrownianMotion(known_scales=True),
    "ionosphere": lambda: LogisticRegression("ionosphere"),
    "sonar": lambda: LogisticRegression("sonar"),
    "german credit": lambda: LogisticRegression("german"),
    "lgcp, 126 points": lambda: LogGaussianCox("126"),
    "lgcp, 127 points": lambda: LogGaussianCox("127"),
}


def deviations(target: Target, draws: Draws) -> tuple[float | None, float | None]:
    """Worst |difference| of means and of deviations from the reference, in combined Monte Carlo errors."""
    reference = getattr(target, "reference", dict)()
    if not reference:
        return None, None
    mean, mean_error = draws.expectation(draws.values)
    square, square_error = draws.expectation((draws.values.double() - mean).square())
    sd, sd_error = square.sqrt(), square_error / (2 * square.sqrt())
    worst_mean, worst_sd = 0.0, 0.0
    for i, label in enumerate(target.labels):
        r = reference[label]
        worst_mean = max(worst_mean, abs(float(mean[i]) - r.mean) / float((mean_error[i] ** 2 + r.mcse_mean**2) ** 0.5))
        worst_sd = max(worst_sd, abs(float(sd[i]) - r.sd) / float((sd_error[i] ** 2 + r.mcse_sd**2) ** 0.5))
    return worst_mean, worst_sd


def run(name: str, n: int, seed: int) -> dict[str, object]:
    target = CASES[name]()
    n = n // 4 if target.dim > 200 else n
    draws = Auto().run(target, n, seed, repeats=32)
    known = getattr(target, "log_z", None)
    mean, sd = deviations(target, draws)
    error = draws.log_z_std_error or 0.0
    combined = (error**2 + (getattr(target, "log_z_std_error", None) or 0.0) ** 2) ** 0.5
    return {
        "target": name,
        "d": target.dim,
        "n": n,
        "draws": len(draws.x),
        "seed": seed,
        "mean": mean,
        "sd": sd,
        "log_z": draws.log_z,
        "log_z_std_error": error,
        "known": known,
        "log_z_deviation": None if known is None or draws.log_z is None else (draws.log_z - known) / combined,
        "evaluations": draws.evaluations.total,
        "ess": draws.ess,
        "seconds": draws.seconds,
        "method": draws.method,
        "reason": draws.reason,
        "notes": list(draws.notes),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON lines to read and extend")
    parser.add_argument("--only", nargs="*", help="names of targets, or parts of them")
    parser.add_argument("--n", type=int, default=8192)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    if args.out and args.out.exists():
        rows = [json.loads(line) for line in args.out.read_text().splitlines()]
    done = {(r["target"], r["seed"]) for r in rows}
    print("| target | d | worst mean | worst sd | log Z | known | deviation | evaluations | ESS | s |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name in CASES:
        if args.only and not any(part.lower() in name.lower() for part in args.only):
            continue
        for seed in args.seeds:
            if (name, seed) not in done:
                row = run(name, args.n, seed)
                if args.out:
                    with args.out.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                rows.append(row)
            for r in rows:
                if (r["target"], r["seed"]) == (name, seed):
                    print(_line(r), flush=True)


def _line(r: dict[str, object]) -> str:
    def number(value: object, form: str) -> str:
        return "–" if value is None else format(value, form)

    log_z = "–" if r["log_z"] is None else f"{r['log_z']:.3f} ± {r['log_z_std_error']:.3f}"
    cells = [r["target"], r["d"], number(r["mean"], ".1f"), number(r["sd"], ".1f"), log_z, number(r["known"], ".3f")]
    cells += [number(r["log_z_deviation"], ".1f"), f"{r['evaluations']:.2g}", number(r["ess"], ".0f")]
    return "| " + " | ".join(str(c) for c in [*cells, f"{r['seconds']:.0f}"]) + " |"


if __name__ == "__main__":
    main()
