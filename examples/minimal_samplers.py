"""Compare samplers at exactly equal numbers of model calls, under several processes, with one denoiser.

    python minimal_samplers.py [number of samples] [numbers of calls, odd ones]

The data is a ring of eight narrow Gaussians, for which the denoiser is known exactly: what is left is the sampler's
error. It is measured by the sliced 2-Wasserstein distance to fresh data; "floor" is the distance of two sets of data.
"""

import sys

import torch
from torch import Tensor

from undrift import Diffusion, sample
from undrift.denoise import MixtureDenoiser
from undrift.process import CLD, PSLD, VP
from undrift.sample import SSCS, Ancestral, DPMSolver2M, EulerMaruyama, Exponential, Heun, LogSigma

GRID = LogSigma(sigma_min=0.01)
METHODS = {
    "Euler-Maruyama": lambda n: EulerMaruyama(steps=n, grid=GRID),
    "ancestral": lambda n: Ancestral(steps=n, grid=GRID),
    "exponential 1": lambda n: Exponential(steps=n, grid=GRID, order=1),
    "exponential 2": lambda n: Exponential(steps=n, grid=GRID, order=2),
    "exponential 3": lambda n: Exponential(steps=n, grid=GRID, order=3),
    "DPM-Solver++(2M)": lambda n: DPMSolver2M(steps=n, grid=GRID),
    "splitting": lambda n: SSCS(steps=n, grid=GRID),
    "splitting, order 2": lambda n: SSCS(steps=(n + 1) // 2, grid=GRID, order=2),
    "Heun": lambda n: Heun(steps=(n + 1) // 2, grid=GRID),
}


def sliced_w2(x: Tensor, y: Tensor, directions: int = 64) -> float:
    """Root mean square over directions of the W2 distance between the projections of two sets of one size."""
    angle = torch.arange(directions, dtype=x.dtype) * (torch.pi / directions)
    axes = torch.stack([angle.cos(), angle.sin()])
    return float(((x @ axes).sort(0).values - (y @ axes).sort(0).values).square().mean().sqrt())


def main(n: int = 5_000, *calls: int) -> None:
    calls = calls or (5, 11, 21)  # odd, so that methods with two calls a step and one final call reach them too
    ring = MixtureDenoiser.ring()
    generator = torch.Generator().manual_seed(0)
    data, other = (ring.sample(n, generator).float() for _ in range(2))
    print(f"sliced W2 to {n} points of data; floor {sliced_w2(data, other):.4f}")

    for process in (VP(), CLD(), PSLD()):
        diffusion = Diffusion(process, ring)
        print(f"\n{type(process).__name__:20}", *(f"{count:>4} calls" for count in calls))
        for name, method in METHODS.items():
            row = []
            for count in calls:
                plan = method(count).plan(process)
                if plan.calls != count:
                    raise ValueError(f"{name} cannot make exactly {count} calls; {plan}")
                row.append(sliced_w2(sample(diffusion, n, (2,), plan, seed=1), data))
            print(f"{name:20}", *(f"{value:10.4f}" for value in row))


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))
