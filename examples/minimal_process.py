"""Design a diffusion process from (D, Q, S), look at what it does to a point, and walk it back to data.

    python minimal_process.py [number of samples]

A process here is a linear SDE on K channels per data coordinate, dz = -beta (D + Q) S^-1 z dt + sqrt(2 beta D) dw.
Channel 0 starts at the data. D says where noise enters, Q how the channels mix, S where everything ends: N(0, S).
"""

import sys

import torch

from undrift import Diffusion, sample
from undrift.denoise import MixtureDenoiser
from undrift.process import ConstantClock, Recipe
from undrift.sample import SSCS, Exponential


def design() -> Recipe:
    """Three channels: the data x, a fast momentum and a slow one. Noise enters the momenta only."""
    return Recipe(
        D=[[0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.3]],
        Q=[[0.0, -1.0, -0.5], [1.0, 0.0, 0.0], [0.5, 0.0, 0.0]],
        S=[[1.0, 0.0, 0.0], [0.0, 0.5, 0.0], [0.0, 0.0, 2.0]],
        clock=ConstantClock(8.0),
        start_cov=0.05,
    )


def main(n: int = 10_000) -> None:
    process = design()

    print("what z_t knows about x0, given x0 = 1")
    print("     t   mean of x, m1, m2             deviation of x, m1, m2        sigma")
    for t in (0.01, 0.1, 0.3, 0.6, 1.0):
        mean, root = process.kernel(t)
        deviation = (root @ root.T).diagonal().sqrt()
        row = [f"{value:8.4f}" for value in (*mean.tolist(), *deviation.tolist())]
        print(f"{t:6.2f}", *row[:3], "   ", *row[3:], f"{float(process.sigma(t)):12.4f}")

    # A design that cannot work is refused, with the reason: here nothing reaches the momentum.
    try:
        Recipe(D=[[1.0, 0.0], [0.0, 0.0]], Q=[[0.0, 0.0], [0.0, 0.0]])
    except ValueError as error:
        print("\nrefused:", error)

    # The drift and the noise of any linear process give its (D, Q) back, or say by how much N(0, S) is missed.
    t = torch.tensor(0.5, dtype=torch.float64)
    d, q = Recipe.of(process.drift(t), process.diffusion(t), process.stationary)
    beta = float(process.clock.beta(t))
    print("\nrecovered D:", (d / beta).diagonal().tolist(), " Q[0]:", (q / beta)[0].tolist())

    # Sampling needs a denoiser, E[x0 | x0 + sigma n]. For a Gaussian mixture it is known; a network would do as well,
    # and neither was told of this process.
    ring = MixtureDenoiser.ring(modes=8, radius=1.3, std=0.08)
    diffusion = Diffusion(process, ring)
    truth = ring.sample(n, torch.Generator().manual_seed(1)).norm(dim=-1)
    print(f"\nradius of the data           {float(truth.mean()):.4f} +- {float(truth.std()):.4f}")
    for sampler in (Exponential(steps=20), SSCS(steps=20)):
        radius = sample(diffusion, n, shape=(2,), sampler=sampler, seed=0).norm(dim=-1)
        name = type(sampler).__name__
        print(f"radius of {name:>11} samples {float(radius.mean()):.4f} +- {float(radius.std()):.4f}, 20 calls")


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))
