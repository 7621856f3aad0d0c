"""A non-linear inverse problem with a learned prior, judged by a long Metropolised chain that knows the prior.

The unknown is the log-permeability of a 1-d Darcy flow; seven pressures are observed with noise .05. It is a Gaussian
field of Matern spectrum (alpha 2, kappa 3, variance 4), or a mixture of two, whose means are two deviations of the
second mode away from 0 on either side. A network learns it from 20 000 draws on 32 points, and is used on that grid and
on finer ones:

    train       the denoiser
    posterior   one observation: means and deviations of posterior-informed Langevin and of twisted sampling, with the
                learned prior and with the exact one, beside pCN with the exact one
    calibrate   120 truths: ranks of the truth among draws, their p-values, and coverage of 90 % intervals
    plane       the same of one observation in two dimensions: a Gaussian field on 16 x 16 points, 36 pressures

    python bench/darcy.py train posterior calibrate --folder runs/darcy      # an hour on one core
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from undrift import Diffusion, load
from undrift.denoise import Denoiser, Linearised, NetworkDenoiser
from undrift.inverse import (
    Annealing,
    Chains,
    DenoiserPrior,
    FieldMixture,
    Posterior,
    PosteriorInformed,
    calibrate,
    find_mode,
    langevin,
    pcn,
)
from undrift.networks import SpectralNet
from undrift.observe import Darcy1d, Darcy2d, GaussianNoise, Observation
from undrift.process import VP
from undrift.sample import Ancestral, twisted
from undrift.space import Cosine, FunctionSpace, Matern
from undrift.train import Dataset, Denoising, LogUniform, TrainConfig, Trainer

SPACE = FunctionSpace(Cosine(), Matern(2.0, 3.0, 4.0))
_AWAY = 2 * float(SPACE.variances((2,))[1].sqrt())
FIELDS = {
    "gaussian": FieldMixture(SPACE),
    "mixture": FieldMixture(SPACE, torch.tensor([[0.0, _AWAY], [0.0, -_AWAY]])),
}
OPERATOR = Darcy1d(tuple(i / 8 for i in range(1, 8)))
NOISE = GaussianNoise(0.05)
STEP = 0.1
TAUS = (0.001, 0.01, 0.1)
TAU = {"gaussian": 0.001, "mixture": 0.1}


def fields(kind: str, n: int, grid: int, seed: int) -> Tensor:
    """Draws of the true prior, (n, grid), float64."""
    return FIELDS[kind].sample(n, (grid,), torch.Generator().manual_seed(seed))


def train(folder: Path, kind: str, steps: int) -> None:
    torch.manual_seed(0)
    network = SpectralNet(Cosine(), width=32, modes=16, depth=3)
    model = NetworkDenoiser(network, 1.0, 0.01, 40.0, SPACE)
    data = Dataset(f"{kind} fields", fields(kind, 20_000, 32, 1).float())
    config = TrainConfig(steps=steps, lr=2e-3, threads=1)
    Trainer(model, Denoising(noise=LogUniform(0.01, 40.0)), data, config, folder / kind).fit()


def learned(folder: Path, kind: str) -> Denoiser:
    model: Denoiser = load(folder / kind / "model.safetensors")
    return model


def compare(draws: Tensor, weights: Tensor | None, mean: Tensor, std: Tensor) -> dict[str, float]:
    """Gaps of the means of sixteen modes, in deviations, and ratios of their deviations, to those of a reference."""
    c = SPACE.coefficients(draws.double())[:, :16]
    w = torch.full((len(c),), 1 / len(c), dtype=torch.float64) if weights is None else weights
    m = w @ c
    s = (w @ (c - m).square()).sqrt()
    gap, ratio = (m - mean) / std, s / std
    return {
        "gap_rms": float(gap.square().mean().sqrt()),
        "gap_max": float(gap.abs().max()),
        "ratio_low": float(ratio.min()),
        "ratio_high": float(ratio.max()),
        "ratio_0": float(ratio[0]),
    }


def informed_langevin(
    denoiser: Denoiser, seen: Observation, start: Tensor, steps: int, thin: int, seed: int, tau: float
) -> Chains:
    """Crank-Nicolson Langevin, preconditioned by what the data say at the mode under N(0, C)."""
    target = Posterior(DenoiserPrior(denoiser, SPACE), seen)
    mode = find_mode(target, torch.zeros(1, start.shape[1], dtype=torch.float64))
    k = PosteriorInformed.at(target, mode)
    xi = torch.empty_like(start).normal_(generator=torch.Generator().manual_seed(seed))
    begin = mode + k.noise(xi)
    at = Annealing(tau_min=tau)
    return langevin(target, begin, steps, STEP, seed=seed, annealing=at, preconditioner=k, warmup=200, thin=thin)


def posterior(folder: Path, kind: str, grids: list[int], write: Callable[[dict[str, object]], None]) -> None:
    seen = Observation.simulate(OPERATOR, NOISE, fields(kind, 1, 128, 77), torch.Generator().manual_seed(78))
    for n in grids:
        exact, start = FIELDS[kind], fields(kind, 200, n, 79)
        chain = pcn(Posterior(exact, seen), start, 12_000, 0.25, seed=1, warmup=2000, thin=20)
        c = SPACE.coefficients(chain.x)[:, :16]
        mean, std = c.mean(0), c.std(0)
        before = SPACE.coefficients(fields(kind, 4000, n, 0))[:, :3].std(0)
        size = chain.ess(lambda x: SPACE.coefficients(x)[:, :16])
        known: dict[str, object] = {
            "task": "posterior",
            "field": kind,
            "grid": n,
            "acceptance": float(chain.acceptance.mean()),
            "reference_error": float(size.rsqrt().max()),
            "shrink": (std[:3] / before).tolist(),
        }
        for name, denoiser in (("learned", learned(folder, kind)), ("exact", exact)):
            for tau in TAUS:
                clock = time.process_time()
                run = informed_langevin(denoiser, seen, start[:100], 2000, 10, 2, tau)
                more = {"product": max(r.product for r in run.reports), "seconds": time.process_time() - clock}
                row = compare(run.x, None, mean, std)
                write({**known, "method": "langevin", "tau": tau, "prior": name, **row, **more})
            clock = time.process_time()
            walk = Ancestral(steps=60)
            diffusion = Diffusion(VP(), denoiser, SPACE)
            particles = twisted(diffusion, seen, Linearised(seen), 2048, (n,), walk, 3, runs=2, dtype=torch.float64)
            row = compare(particles.x, particles.weights, mean, std)
            more = {
                "ess": particles.ess,
                "log_evidence": particles.log_evidence,
                "seconds": time.process_time() - clock,
            }
            write({**known, "method": "twisted", "prior": name, **row, **more})


def calibrate_all(
    folder: Path, kind: str, truths: int, seed: int, methods: list[str], write: Callable[[dict[str, object]], None]
) -> None:
    n, names = 32, [f"mode {j}" for j in range(6)]
    truth = fields(kind, truths, n, seed)
    seen = Observation.simulate(OPERATOR, NOISE, truth, torch.Generator().manual_seed(seed + 1))
    ranked = SPACE.coefficients(truth)[:, :6]
    chains = 4

    def report(method: str, prior: str, draws: Tensor, seconds: float) -> None:
        result = calibrate(ranked, SPACE.coefficients(draws.double())[..., :6], names)
        covered = result.coverage((0.9,))[0]
        write(
            {
                "task": "calibrate",
                "field": kind,
                "method": method,
                "prior": prior,
                "truths": truths,
                "seed": seed,
                "draws": result.draws,
                "uniformity": result.uniformity().tolist(),
                "chi_square": result.chi_square().tolist(),
                "level": covered.level,
                "covered": covered.share,
                "std_error": covered.std_error,
                "seconds": seconds,
            }
        )

    each = Observation(OPERATOR, NOISE, seen.y.repeat_interleave(chains, 0))
    start = fields(kind, truths * chains, n, seed + 2)
    if "pcn" in methods:
        clock = time.process_time()
        run = pcn(Posterior(FIELDS[kind], each), start, 10_000, 0.25, seed=4, warmup=4000, thin=600)
        report("pcn", "exact", run.states.unflatten(0, (truths, chains)).flatten(1, 2), time.process_time() - clock)
    if set(methods) == {"pcn"}:
        return
    denoiser = learned(folder, kind)
    draws = []
    clock, diffusion = time.process_time(), Diffusion(VP(), denoiser)
    for i in range(truths if "twisted" in methods else 0):
        one = Observation(OPERATOR, NOISE, seen.y[i])
        guide, walk = Linearised(one), Ancestral(steps=40)
        particles = twisted(diffusion, one, guide, 256, (n,), walk, 1000 + i, dtype=torch.float64)
        draws.append(particles.resample(40, torch.Generator().manual_seed(i)))
    if draws:
        report("twisted", "learned", torch.stack(draws), time.process_time() - clock)
    draws, clock = [], time.process_time()
    for i in range(truths if "langevin" in methods else 0):
        one = Observation(OPERATOR, NOISE, seen.y[i])
        draws.append(informed_langevin(denoiser, one, start[:20], 600, 200, 5 + i, TAU[kind]).x)
    if draws:
        report("langevin", "learned", torch.stack(draws), time.process_time() - clock)


def plane(folder: Path, steps: int, write: Callable[[dict[str, object]], None]) -> None:
    """Two dimensions: pCN with the exact prior beside Langevin with a learned one, both posterior-informed."""
    space = FunctionSpace(Cosine(2), Matern(2.5, 4.0, 1.0))
    exact, n = FieldMixture(space), 16
    torch.manual_seed(0)
    model = NetworkDenoiser(SpectralNet(Cosine(2), width=16, modes=8, depth=3), 1.0, 0.01, 40.0, space)
    data = Dataset("Gaussian fields, 2-d", exact.sample(4000, (n, n), torch.Generator().manual_seed(1)).float())
    config = TrainConfig(steps=steps, batch=64, lr=2e-3, threads=1)
    Trainer(model, Denoising(noise=LogUniform(0.01, 40.0)), data, config, folder / "plane").fit()
    wells = tuple((i / 7, j / 7) for i in range(1, 7) for j in range(1, 7))
    truth = exact.sample(1, (n, n), torch.Generator().manual_seed(2))
    operator = Darcy2d(wells)
    scale = float(operator(truth).std())
    seen = Observation.simulate(operator, GaussianNoise(0.05 * scale), truth, torch.Generator().manual_seed(3))
    target = Posterior(exact, seen)
    mode = find_mode(target, torch.zeros(1, n, n, dtype=torch.float64))
    k = PosteriorInformed.at(target, mode)
    xi = torch.empty(40, n, n, dtype=torch.float64).normal_(generator=torch.Generator().manual_seed(4))
    clock = time.process_time()
    chain = pcn(
        target, mode + k.noise(xi), 1500, 0.4, seed=5, reference=k, centre=mode, warmup=300, target=0.3, thin=10
    )
    c = space.coefficients(chain.x).flatten(1)
    order = space.variances((n, n)).flatten().argsort(descending=True)[:32]
    mean, std = c[:, order].mean(0), c[:, order].std(0)
    size = chain.ess(lambda x: space.coefficients(x).flatten(1)[:, order])
    prior = space.variances((n, n)).flatten()[order].sqrt()
    known: dict[str, object] = {
        "task": "plane",
        "acceptance": float(chain.acceptance.mean()),
        "reference_error": float(size.rsqrt().max()),
        "rhat": float(chain.rhat().max()),
        "shrink": [float((std / prior).min()), float((std / prior).max())],
        "seconds of pcn": time.process_time() - clock,
    }
    for name, denoiser in (("learned", learned(folder, "plane")), ("exact", exact)):
        for tau in TAUS:
            clock = time.process_time()
            at = Annealing(tau_min=tau)
            prior_at = Posterior(DenoiserPrior(denoiser, space), seen)
            run = langevin(
                prior_at, mode + k.noise(xi), 500, STEP, seed=6, annealing=at, preconditioner=k, warmup=100, thin=5
            )
            d = space.coefficients(run.x.double()).flatten(1)[:, order]
            gap, ratio = (d.mean(0) - mean) / std, d.std(0) / std
            row = {"gap_rms": float(gap.square().mean().sqrt()), "gap_max": float(gap.abs().max())}
            row |= {"ratio_low": float(ratio.min()), "ratio_high": float(ratio.max())}
            row["product"] = max(report.product for report in run.reports)
            row["seconds"] = time.process_time() - clock
            write({**known, "method": "langevin", "tau": tau, "prior": name, **row})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+", choices=["train", "posterior", "calibrate", "plane"])
    parser.add_argument("--folder", type=Path, default=Path("runs/darcy"))
    parser.add_argument("--fields", nargs="+", choices=list(FIELDS), default=list(FIELDS))
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--grids", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--truths", type=int, default=120)
    parser.add_argument("--seed", type=int, default=80, help="of the truths of calibrate")
    parser.add_argument(
        "--methods", nargs="+", choices=["pcn", "twisted", "langevin"], default=["pcn", "twisted", "langevin"]
    )
    parser.add_argument("--out", type=Path, default=Path("bench/results/darcy.jsonl"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.parent.mkdir(parents=True, exist_ok=True)

    def write(row: dict[str, object]) -> None:
        print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}), flush=True)
        with options.out.open("a") as file:
            file.write(json.dumps(row) + "\n")

    if "plane" in options.tasks:
        plane(options.folder, min(options.steps, 1000), write)
    for kind in options.fields:
        if "train" in options.tasks:
            train(options.folder, kind, options.steps)
        if "posterior" in options.tasks:
            posterior(options.folder, kind, options.grids, write)
        if "calibrate" in options.tasks:
            calibrate_all(options.folder, kind, options.truths, options.seed, options.methods, write)


if __name__ == "__main__":
    main()
