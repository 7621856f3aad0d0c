"""Solutions of partial differential equations as functions: coarse fields to train on, fresh ones on finer grids.

The fields are other people's files (neuraloperator, and Raissi's PINNs; both MIT), in the folder ``pde`` of
UNDRIFT_DATA. What their grids are decides what may be compared:

* one trajectory on 512 or 256 points of a circle (Kuramoto-Sivashinsky, Korteweg-de Vries, Allen-Cahn, a shock of
  Burgers' equation): every equation is the same everywhere on the circle, so a shifted solution is a solution, and
  shifts at random make a law of functions. Every second snapshot is for training, cut off to the coarse grid's modes:
  fresh fields lie between those in time.
* 1200 trajectories of Burgers' equation, on 16 points only. Their initial functions are smooth (a part of 1e-5 of the
  energy is in the last modes), so we solve the equation for them on 128 points. The file does not give its times; .06
  apart, our solution meets its values on the 16 points to 6e-4, and worse than 1e-3 is an error here.
* pressures of Darcy's equation, which vanish at the boundary, at points i/n: every second value on 32 x 32 points is
  one of those on 16 x 16. Their sine coefficients take them to midpoints. The same 50 test fields serve both grids.

Fields have mean 0 and, at a point, variance 1: Darcy's are less the mean function of training.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from undrift.space import Basis, Sine

Test = Callable[[int, tuple[int, ...]], Tensor]
TIMES, APART, SOLVED = 17, 0.06, 128


def arrays(path: Path) -> dict[str, Tensor]:
    with np.load(path, allow_pickle=False) as file:
        return {k: torch.from_numpy(file[k]) for k in file.files if file[k].dtype.kind == "f"}


def circle(path: Path, basis: Basis, coarse: int) -> tuple[Tensor, Test]:
    """One trajectory of an equation on a circle: 4000 shifted fields on the coarse grid, and test(n, grid)."""
    file = arrays(path)
    u, x = file.get("uu", file.get("usol")).T, file["x"].flatten()
    if x[-1] == -x[0]:  # the last point repeats the first
        u = u[:, :-1]
    u = (u - u.mean()) / u.std()

    def shifted(fields: Tensor, n: int, seed: int) -> Tensor:
        g = torch.Generator().manual_seed(seed)
        which = torch.randint(len(fields), (n,), generator=g)
        shift = torch.randint(fields.shape[1], (n, 1), generator=g)
        return fields[which].gather(1, (torch.arange(fields.shape[1]) + shift) % fields.shape[1])

    def test(n: int, grid: tuple[int, ...]) -> Tensor:
        return basis.resample(shifted(u[1::2], n, 1), grid).float()

    return basis.resample(shifted(u[::2], 4000, 0), (coarse,)).float(), test


def burgers(root: Path, basis: Basis) -> tuple[Tensor, Test]:
    """All times of 800 trajectories on 16 points; test(n, grid) of 400 others, solved by us where grid is finer."""
    train, test = (arrays(root / f"burgers_{part}_16.npz") for part in ("train", "test"))
    fine = solve_burgers(test["x"], SOLVED, float(test["visc"]))
    gap = fine[..., :: SOLVED // 16] - test["y"]
    worst = float((gap.square().mean((0, 2)) / test["y"].square().mean((0, 2))).sqrt().max())
    if worst > 1e-3:
        raise ValueError(f"burgers_test_16.npz: our solution misses its values by {worst:.1e} of their deviation.")
    scale = train["y"].std()
    own, solved = ((y / scale).flatten(0, 1) for y in (test["y"], fine))
    order = torch.randperm(len(own), generator=torch.Generator().manual_seed(1))

    def draw(n: int, grid: tuple[int, ...]) -> Tensor:
        return (own[order[:n]] if grid == (16,) else basis.resample(solved[order[:n]], grid)).float()

    return (train["y"] / scale).flatten(0, 1).float(), draw


def solve_burgers(start: Tensor, n: int, viscosity: float, steps: int = 480) -> Tensor:
    """u_t + u u_x = viscosity u_xx on the unit circle: values at 17 times (batch, 17, n) from some at the first.

    Pseudo-spectral without the upper third of modes, an integrating factor, and Runge and Kutta's fourth order.
    """
    k = 2 * math.pi * torch.arange(n // 2 + 1, dtype=torch.float64)
    step = APART * (TIMES - 1) / steps
    half = (-viscosity * k.square() * step / 2).exp()
    kept = torch.arange(n // 2 + 1) < n / 3

    def rate(c: Tensor) -> Tensor:
        return -0.5j * k * torch.fft.rfft(torch.fft.irfft(c, n).square()) * kept

    c = torch.fft.rfft(start.double())[:, : start.shape[1] // 2] * (n / start.shape[1])
    c = torch.nn.functional.pad(c, [0, n // 2 + 1 - c.shape[1]])
    out = [c]
    for i in range(1, steps + 1):
        a = rate(c)
        b = rate(half * (c + step / 2 * a))
        d = rate(half * c + step / 2 * b)
        e = rate(half * (half * c + step * d))
        c = half * (half * (c + step / 6 * a) + step / 3 * (b + d)) + step / 6 * e
        if i % (steps // (TIMES - 1)) == 0:
            out.append(c)
    return torch.fft.irfft(torch.stack(out, 1), n)


def darcy(root: Path) -> tuple[Tensor, Tensor, Test]:
    """Pressures: 900 training fields on 16 x 16 points, 100 others, and test(n, grid) of up to 50, also on 32 x 32."""
    train = midpoints(arrays(root / "darcy_train_16.npz")["y"])
    fresh = {(n, n): midpoints(arrays(root / f"darcy_test_{n}.npz")["y"]) for n in (16, 32)}
    mean = train[:900].mean(0)
    std = (train[:900] - mean).square().mean().sqrt()

    def test(n: int, grid: tuple[int, ...]) -> Tensor:
        u = (fresh[grid] - Sine(2).resample(mean, grid)) / std
        return u[:n].float()

    fields = ((train - mean) / std).float()
    return fields[:900], fields[900:], test


def midpoints(u: Tensor) -> Tensor:
    """Values at i/n, i = 0, ..., n - 1, of functions that vanish at the boundary, as values at (i + 1/2)/n."""
    n = u.shape[-1]
    i = torch.arange(1, n, dtype=torch.float64)
    inner = math.sqrt(2) / n * (math.pi / n * torch.outer(i, i)).sin()  # symmetric: coefficients of interpolation
    return Sine(2).synthesise(Sine(2).fit(inner @ u[..., 1:, 1:].double() @ inner, (n, n)))
