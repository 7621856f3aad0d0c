"""A denoiser trained on one grid serves finer ones: what that costs, by network and by noise.

Networks of spectral convolutions, of fixed physical modes, and of dilated convolutions, trained on coarse fields and
judged on finer grids. The noise is a "function" of half a derivative in the mean square, or "white" on the pixels; for
fields of a steep spectrum also "matched", of the data's own, and "by modes": the same, with a network preconditioned
mode by mode.

* denoising: the error in the norm of L^2, relative to the data's variance, at levels where the noise on every mode of
  the training grid is what it was there (white noise is made so much louder per pixel), over the modes shared with that
  grid and over all; for Gaussian fields also the excess over the exact denoiser's error, in parts of it;
* sampling, 20 calls of an order-2 exponential integrator on VE, the white models' levels louder likewise: the energy
  distance to data in L^2 (squared distance; the unbiased estimate), and the W2 distance between the spectra of samples
  and data, relative to the data's deviation.

"upsampled" takes the samples of the training grid to the finer one by way of the basis. Gaussian fields are our own;
with UNDRIFT_DATA set there are snapshots of the Kuramoto-Sivashinsky equation with random shifts, every second one for
training, and pressures of Darcy's equation on 16 x 16 and 32 x 32 points.

    python bench/resolution.py      # 20 minutes on one core; a second start goes on where the first was stopped
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from undrift.denoise import FieldGaussian, NetworkDenoiser, SpectralDenoiser
from undrift.diffusion import Diffusion
from undrift.measure import energy_distance
from undrift.networks import FourierFeatures, Network, SpectralNet
from undrift.process import VE, PowerClock
from undrift.sample import Exponential, Rho, sample
from undrift.space import Basis, Cosine, Fourier, FunctionSpace, Matern, Space, White
from undrift.train import Dataset, DefensiveMixture, Denoising, Objective, SpectralDenoising, TrainConfig, Trainer

LEVELS = (0.05, 0.2, 1.0, 5.0)
LOW, HIGH, CALLS = 0.01, 80.0, 20


class Convolutions(Network):
    """Residual dilated convolutions of 3 points an axis, modulated by the label: any grid, but a span in pixels."""

    def __init__(self, dims: int, width: int = 48, dilations: tuple[int, ...] = (1, 2, 4, 8, 1)) -> None:
        super().__init__()
        conv = {1: nn.Conv1d, 2: nn.Conv2d}[dims]
        self.dims, self.dilations = dims, dilations
        self.embed = nn.Sequential(FourierFeatures(32), nn.Linear(32, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU())
        self.inward, self.outward = conv(1, width, 1), conv(width, 1, 1)
        self.layers = nn.ModuleList(conv(width, width, 3, dilation=d) for d in dilations)
        self.mixes = nn.ModuleList(conv(width, width, 1) for _ in dilations)
        self.modulations = nn.ModuleList(nn.Linear(64, 2 * width) for _ in dilations)
        nn.init.zeros_(self.outward.weight)
        nn.init.zeros_(self.outward.bias)
        self.mode = "reflect"

    def forward(self, x: Tensor, label: Tensor, **condition: Any) -> Tensor:
        h, e = self.inward(x.unsqueeze(1)), self.embed(label)
        for d, layer, mix, modulation in zip(self.dilations, self.layers, self.mixes, self.modulations, strict=True):
            scale, shift = modulation(e).reshape(len(e), -1, *[1] * self.dims).chunk(2, 1)
            h = h + mix(F.gelu(layer(F.pad(h, [d] * 2 * self.dims, mode=self.mode)) * (1 + scale) + shift))
        return self.outward(F.gelu(h)).squeeze(1)


@dataclass
class Problem:
    """Fields to train on, (N, *grid) of unit pointwise variance, and fresh ones (n, *grid) on any grid."""

    name: str
    basis: Basis
    space: FunctionSpace
    train: Tensor
    grids: tuple[tuple[int, ...], ...]
    test: Callable[[int, tuple[int, ...]], Tensor]
    exact: Matern | None = None
    matched: FunctionSpace | None = None


def gaussian(dims: int, coarse: int, grids: tuple[int, ...]) -> Problem:
    basis, data = Cosine(dims), Matern(2.0 if dims == 1 else 2.5, 6.0)
    space = FunctionSpace(basis, Matern(1.0 if dims == 1 else 1.5, 6.0))
    field = FieldGaussian(space, data)

    def draw(n: int, grid: tuple[int, ...], seed: int = 1) -> Tensor:
        return field.draw(n, grid, torch.Generator().manual_seed(seed), torch.float32)

    shapes = tuple((n,) * dims for n in grids)
    return Problem(f"Gaussian field, {dims}-d", basis, space, draw(4000, (coarse,) * dims, 0), shapes, draw, data)


def rough(train: Tensor, basis: Basis) -> FunctionSpace:
    return FunctionSpace.of(train, basis)


def matched(train: Tensor, basis: Basis) -> FunctionSpace:
    return FunctionSpace.matched(train, basis)


def kuramoto(root: Path) -> Problem:
    with np.load(root / "kuramoto_sivashinsky.npz", allow_pickle=False) as file:
        u = torch.from_numpy(file["uu"][:-1].T.copy())  # the last point repeats the first
    u = (u - u.mean()) / u.std()

    def shifted(fields: Tensor, n: int, seed: int) -> Tensor:
        g = torch.Generator().manual_seed(seed)
        which = torch.randint(len(fields), (n,), generator=g)
        shift = torch.randint(fields.shape[1], (n, 1), generator=g)
        return fields[which].gather(1, (torch.arange(fields.shape[1]) + shift) % fields.shape[1])

    def draw(n: int, grid: tuple[int, ...]) -> Tensor:
        return basis.resample(shifted(u[1::2], n, 1), grid).float()

    basis = Fourier(1)
    train = basis.resample(shifted(u[::2], 4000, 0), (32,)).float()
    grids = ((32,), (64,), (128,), (256,))
    return Problem("Kuramoto-Sivashinsky", basis, rough(train, basis), train, grids, draw, None, matched(train, basis))


def darcy(root: Path) -> Problem:
    y = {}
    for part, n in (("train", 16), ("test", 16), ("test", 32)):
        with np.load(root / f"darcy_{part}_{n}.npz", allow_pickle=False) as file:
            y[part, n] = torch.from_numpy(file["y"])
    mean, std = y["train", 16].mean(), y["train", 16].std()
    y = {k: (v - mean) / std for k, v in y.items()}
    train, basis = y["train", 16], Cosine(2)

    def draw(n: int, grid: tuple[int, ...]) -> Tensor:
        return y["test", grid[0]][:n]

    grids = ((16, 16), (32, 32))
    return Problem("Darcy pressure", basis, rough(train, basis), train, grids, draw, None, matched(train, basis))


def problems() -> list[Problem]:
    found = [gaussian(1, 32, (32, 64, 128, 256)), gaussian(2, 16, (16, 32, 64))]
    if "UNDRIFT_DATA" in os.environ:
        root = Path(os.environ["UNDRIFT_DATA"]) / "pde"
        found[1:1] = [kuramoto(root), darcy(root)]
    return found


def trained(problem: Problem, network: str, noise: str, steps: int) -> NetworkDenoiser:
    torch.manual_seed(0)
    dims = problem.basis.dims
    net: Network
    if network == "spectral":
        net = SpectralNet(problem.basis, width=32 if dims == 1 else 24, modes=16 if dims == 1 else 8)
    else:
        net = Convolutions(dims, 48 if dims == 1 else 32)
        net.mode = "circular" if isinstance(problem.basis, Fourier) else "reflect"
    space: Space = {"function": problem.space, "white": White()}.get(noise, problem.matched)
    model = NetworkDenoiser(net, sigma_data=1.0, space=space)
    objective: Objective = Denoising()
    if noise == "by modes":
        model, objective = SpectralDenoiser(net, space), SpectralDenoising(DefensiveMixture())
    config = TrainConfig(steps=steps, batch=64 if dims == 1 else 32, lr=2e-3, ema=10_000.0, class_dropout=0.0)
    return Trainer(model, objective, Dataset(problem.name, problem.train), config).fit(progress=False).model


def louder(problem: Problem, noise: str, grid: tuple[int, ...]) -> float:
    """White noise on n points has variance 1/n on a mode of L^2: the factor that keeps it that of the training grid."""
    ratio = math.prod(grid) / math.prod(problem.train.shape[1:])
    return math.sqrt(ratio) if noise == "white" else 1.0


@torch.no_grad()
def denoising(problem: Problem, model: NetworkDenoiser, noise: str, grid: tuple[int, ...]) -> dict[str, Any]:
    n, basis = 256 if math.prod(grid) <= 1024 else 64, problem.basis
    x = problem.test(n, grid)
    g = torch.Generator().manual_seed(2)
    shared = basis.fit(torch.ones(problem.train.shape[1:]), grid).bool()
    total = float(problem.space.norm2(x - x.mean(0)).mean())
    rows: dict[str, Any] = {"sigma": list(LEVELS), "error": [], "shared": []}
    if problem.exact is not None:
        rows["excess"], rows["shared excess"] = [], []
    for sigma in LEVELS:
        level = sigma * louder(problem, noise, grid)
        noisy = x + level * model.space.colour(torch.empty_like(x).normal_(generator=g))
        error = basis.analyse(model(noisy, level) - x).square().mean(0)
        rows["error"].append(float(error.sum()) / total)
        rows["shared"].append(float(error[shared].sum()) / total)
        if problem.exact is not None:
            data = FunctionSpace(basis, problem.exact).variances(grid)
            own = problem.space.variances(grid) if noise == "function" else torch.full(grid, 1 / math.prod(grid))
            gain = data / (data + level**2 * own)
            best = basis.synthesise(basis.analyse(noisy.double()) * gain) - x
            exact = basis.analyse(best).square().mean(0)
            rows["excess"].append(float(error.sum() / exact.sum()) - 1)
            rows["shared excess"].append(float(error[shared].sum() / exact[shared].sum()) - 1)
    return rows


def judged(problem: Problem, x: Tensor, grid: tuple[int, ...]) -> dict[str, float]:
    data = problem.test(len(x), grid)
    size = math.sqrt(math.prod(grid))
    c, d = problem.basis.analyse(x.double()), problem.basis.analyse(data.double())
    gap = (c.std(0) - d.std(0)).square() + (c.mean(0) - d.mean(0)).square()
    shared = problem.basis.fit(torch.ones(problem.train.shape[1:]), grid).bool()
    total = float(d.var(0).sum())
    return {
        "energy": energy_distance(x / size, data / size),
        "spectrum": math.sqrt(float(gap.sum()) / total),
        "spectrum, shared": math.sqrt(float(gap[shared].sum()) / total),
        "variance": float(c.var(0).sum()) / total,
        "variance beyond": float(c.var(0)[~shared].sum()) / total,
        "data beyond": float(d.var(0)[~shared].sum()) / total,
    }


def samples(problem: Problem, model: NetworkDenoiser, noise: str, grid: tuple[int, ...], count: int) -> Tensor:
    factor = louder(problem, noise, grid)
    process = VE(PowerClock(sigma_max=HIGH * factor, horizon=HIGH * factor))
    sampler = Exponential(CALLS, Rho(sigma_min=LOW * factor, sigma_max=HIGH * factor), order=2)
    return sample(Diffusion(process, model), count, grid, sampler, seed=3, batch=128)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs=2, default=(1500, 400), help="of training, in 1-d and in 2-d")
    parser.add_argument("--out", type=Path, default=Path("bench/results/resolution.jsonl"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    done = set()
    if options.out.exists():
        done = {(r["problem"], r["network"], r["noise"]) for r in map(json.loads, options.out.read_text().splitlines())}
    for problem in problems():
        steps = options.steps[problem.basis.dims - 1]
        for network in ("spectral", "convolutions"):
            for noise in ("function", "white", "matched", "by modes"):
                if noise in ("matched", "by modes") and (problem.matched is None or network != "spectral"):
                    continue
                if (problem.name, network, noise) in done:
                    continue
                start = time.process_time()
                model = trained(problem, network, noise, steps)
                seconds = time.process_time() - start
                coarse, rows = None, []
                for grid in problem.grids:
                    count = 512 if math.prod(grid) <= 1024 else 64
                    x = samples(problem, model, noise, grid, count)
                    row = {"problem": problem.name, "network": network, "noise": noise, "grid": list(grid)}
                    row |= {"steps": steps, "train_seconds": round(seconds, 1), "samples": count}
                    row |= {"denoising": denoising(problem, model, noise, grid), "sampling": judged(problem, x, grid)}
                    if coarse is None:
                        coarse = x
                    else:
                        row["upsampled"] = judged(problem, problem.basis.resample(coarse[:count], grid), grid)
                    rows.append(row)
                    print(json.dumps(row), flush=True)
                with options.out.open("a") as file:
                    file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
