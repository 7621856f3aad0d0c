r"""The step of local score matching: what a longer one costs in bias, and a shorter one in variance.

Two processes with stationary law exp(-H), from 0.7 N(1.2, 0.25^2) + 0.3 N(-0.4, 0.15^2): a double well with constant
noise, and a quartic well with D = (1 + z^2)/(1 + z^2/2).

Bias: the law at t = 0.5 after one local step of length h from the exact law at 0.5 - h, both on a grid; the squared L2
error of its score relative to the Fisher information. Deviation: of the gradient of the loss of a batch of 128 data
points with respect to a network's weights, root of the sum of variances over 40 draws, with pairs and without. Chain:
error of E z^2 at t = 1, by quadrature over every step, with the Ito term, without it, and by Euler-Maruyama.

    python bench/local_matching.py --out bench/results/local_matching.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from scipy.interpolate import CubicSpline
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))

from tests.reference.fokker_planck import FokkerPlanck

from undrift import NonlinearDiffusion
from undrift.networks import MLP
from undrift.process import NonlinearRecipe, local_gaussian
from undrift.train import LocalScoreMatching

NO_CURL = torch.zeros(1, 1)
CASES = {
    "double well, constant D": (
        lambda z: 0.25 * z**4 - 0.5 * z**2,
        lambda z: 1 + 0 * z,
        torch.ones(1, 1, dtype=torch.float64),
    ),
    "quartic well, D(z)": (
        lambda z: 0.25 * z**4,
        lambda z: (1 + z**2) / (1 + 0.5 * z**2),
        lambda z: ((1 + z**2) / (1 + 0.5 * z**2))[..., None],
    ),
}


def density(x: np.ndarray) -> np.ndarray:
    def normal(mean: float, std: float) -> np.ndarray:
        return np.exp(-0.5 * ((x - mean) / std) ** 2) / (std * np.sqrt(2 * np.pi))

    return 0.7 * normal(1.2, 0.25) + 0.3 * normal(-0.4, 0.15)


def draws(n: int, g: torch.Generator) -> Tensor:
    right = torch.rand(n, 1, generator=g) < 0.7
    return torch.where(right, 1.2, -0.4) + torch.where(right, 0.25, 0.15) * torch.randn(n, 1, generator=g)


def bias(process: NonlinearRecipe, exact: FokkerPlanck, h: float, ito: bool, t: float = 0.5) -> float:
    start, x = density(exact.x), exact.x
    p, (seen, score) = exact.density(start, t), exact.score(start, t)
    law = local_gaussian(process.drift, process.diffusion, torch.from_numpy(x)[:, None], h, ito)
    mean, std = law.mean.numpy(), law.root.numpy()[..., 0]
    kernel = np.exp(-0.5 * ((x - mean) / std) ** 2) / (std * np.sqrt(2 * np.pi))
    after = exact.density(start, t - h) @ kernel * exact.dx
    error = np.gradient(np.log(np.maximum(after, 1e-300)), exact.dx) - score
    return float((p * error**2)[seen].sum() / (p * score**2)[seen].sum())


def deviation(process: NonlinearRecipe, h: float, pairs: bool) -> float:
    torch.manual_seed(0)
    network = MLP(1, width=64, depth=2)
    torch.nn.init.normal_(network.outward.weight, std=0.05)
    model = NonlinearDiffusion(process, network, 2.0, resolution=0.15, scale=1.5)
    objective = LocalScoreMatching(step=0.2, lag=h, visits=6, pairs=pairs)
    x, gradients = draws(128, torch.Generator().manual_seed(0)), []
    for k in range(40):
        loss = objective.loss(model, x, torch.Generator().manual_seed(k))[0].mean()
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(network.parameters()))]))
    return float(torch.stack(gradients).var(0).sum().sqrt())


def chain(process: NonlinearRecipe, exact: FokkerPlanck, h: float, scheme: str) -> float:
    start = density(exact.x)
    true = float((exact.density(start, 1.0) * exact.x**2).sum() * exact.dx)
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    grid = np.linspace(-4.5, 4.5, 1201)
    y = torch.from_numpy(grid)[:, None]
    if scheme == "euler":
        ends = torch.cat([process.step(y, h, torch.full_like(y, v), "euler") for v in nodes.tolist()], 1).numpy()
    else:
        law = local_gaussian(process.drift, process.diffusion, y, h, scheme == "ito")
        ends = law.mean.numpy() + law.root.numpy()[..., 0] * nodes
    value = grid**2
    for _ in range(round(1 / h)):
        value = CubicSpline(grid, value)(np.clip(ends, -4.5, 4.5)) @ (weights / weights.sum())
    return float((start * CubicSpline(grid, value)(exact.x)).sum() * exact.dx) - true


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    out, report = parser.parse_args().out, {}
    for name, (energy, noise, diffusion) in CASES.items():
        process = NonlinearRecipe(lambda z, energy=energy: energy(z).sum(1), diffusion, NO_CURL, 1)
        exact = FokkerPlanck(energy, noise, -4.5, 4.5, 900)
        print(f"{name}\n  h       bias     without Ito  deviation, pairs  without pairs")
        steps, chains = [], []
        for h in (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2):
            row = [bias(process, exact, h, True), bias(process, exact, h, False)]
            row += [deviation(process, h, True), deviation(process, h, False)]
            steps.append([h, *row])
            print(f"  {h:<6g}  {row[0]:.1e}  {row[1]:.1e}      {row[2]:.2f}              {row[3]:.2f}")
        print("  steps   E z^2 - exact: Ito, without, Euler-Maruyama")
        for n in (8, 16, 32, 64):
            chains.append([n, *(chain(process, exact, 1 / n, scheme) for scheme in ("ito", "affine", "euler"))])
            print(f"  {n:<6d}  " + "  ".join(f"{v:+.5f}" for v in chains[-1][1:]))
        report[name] = {"step": steps, "chain": chains}
    if out is not None:
        out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
