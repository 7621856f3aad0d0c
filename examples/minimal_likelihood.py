"""Compute log likelihoods by the probability-flow ODE, and compare them with the truth.

    python minimal_likelihood.py [number of points]

The data is a Gaussian mixture, whose density and denoiser are both known. With one channel the likelihood is exact up
to the solver's tolerance. With auxiliary channels it is a lower bound; it is tight where the score is exact, as here,
and for a network more starts of the auxiliaries make it tighter.
"""

import sys

import torch

from undrift import Diffusion
from undrift.denoise import MixtureDenoiser
from undrift.measure import log_likelihood
from undrift.process import CLD, VE, VP


def main(n: int = 200) -> None:
    mixture = MixtureDenoiser(
        weights=torch.tensor([0.5, 0.3, 0.2]),
        means=torch.tensor([[0.0, 0.0], [1.5, 0.5], [-1.0, 1.0]]),
        covs=torch.tensor([[[0.30, 0.20], [0.20, 0.30]], [[0.05, 0.00], [0.00, 0.40]], [[0.10, -0.05], [-0.05, 0.20]]]),
    )
    x = mixture.sample(n, torch.Generator().manual_seed(0))
    truth = mixture.log_prob(x)
    print(f"mean log density of {n} points: {float(truth.mean()):.4f} nats, known in closed form\n")
    print(f"{'process':14} {'starts':>6} {'mean':>9} {'mean gap':>9} {'largest':>9} {'calls':>6}")

    for process, starts in ((VP(), 1), (VE(), 1), (CLD(), 1), (CLD(), 4)):
        result = log_likelihood(Diffusion(process, mixture), x, samples=starts, rtol=1e-5, atol=1e-5, seed=0)
        gap = truth - result.log_likelihood
        print(
            f"{type(process).__name__:14} {starts:6} {float(result.log_likelihood.mean()):9.4f} "
            f"{float(gap.mean()):9.5f} {float(gap.abs().max()):9.5f} {result.calls:6}"
        )


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))
