"""An inverse problem on functions: the permeability of a 1-d Darcy flow from seven pressures, on two grids.

    python minimal_inverse.py [steps of a chain]

The unknown is a Gaussian field u, the flow -(exp(u) p')' = 0. Three samplers that know the prior in different ways draw
from the same posterior: Metropolised chains (its density), Langevin (its slope, as a denoiser would give it), and
tempered particles, which also know the evidence. On a finer grid all numbers stay.
"""

import sys

import torch
from torch import Tensor

from undrift.inverse import FieldMixture, Posterior, PosteriorInformed, find_mode, langevin, pcn, tempered
from undrift.observe import Darcy1d, GaussianNoise, Observation
from undrift.space import Cosine, FunctionSpace, Matern


def show(name: str, modes: Tensor, weights: Tensor | None = None) -> None:
    """Means and deviations of the first coefficients, (n, k)."""
    w = torch.full((len(modes),), 1 / len(modes), dtype=torch.float64) if weights is None else weights
    mean = w @ modes
    sd = (w @ (modes - mean).square()).sqrt()
    print(f"  {name:<10}", "  ".join(f"{m:+.3f} ± {s:.3f}" for m, s in zip(mean.tolist(), sd.tolist(), strict=True)))


def main(steps: int = 2000) -> None:
    space = FunctionSpace(Cosine(), Matern(alpha=2.0, kappa=3.0, variance=4.0))
    prior = FieldMixture(space)
    generator = torch.Generator().manual_seed(0)
    truth = prior.sample(1, (64,), generator)
    operator, noise = Darcy1d(tuple(i / 8 for i in range(1, 8))), GaussianNoise(0.05)
    observation = Observation.simulate(operator, noise, truth, generator)
    print("coefficients 2, 3 and 4 of u; the truth:", [round(c, 3) for c in space.coefficients(truth)[0, 1:4].tolist()])
    for n in (32, 128):
        posterior = Posterior(prior, observation)
        mode = find_mode(posterior, torch.zeros(1, n, dtype=torch.float64))
        informed = PosteriorInformed.at(posterior, mode)
        xi = torch.empty(16, n, dtype=torch.float64).normal_(generator=generator)
        start = mode + informed.noise(xi)
        print(f"{n} points")
        exact = pcn(posterior, start, steps, reference=informed, centre=mode, warmup=steps // 4, target=0.3)
        show("pcn", space.coefficients(exact.x)[:, 1:4])
        walk = langevin(posterior, start, steps, step=0.3, preconditioner=informed)
        show("langevin", space.coefficients(walk.x)[:, 1:4])
        particles = tempered(posterior, prior.sample(512, (n,), generator), runs=2)
        show("tempered", space.coefficients(particles.x)[:, 1:4], particles.weights)
        print(f"  log p(y) = {particles.log_evidence:.2f} ± {particles.log_evidence_std_error:.2f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
