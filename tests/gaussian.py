"""The bound on Gaussian data in one dimension, every expectation exact: cubature over noise, quadrature over time."""

import math

import torch
from torch import Tensor

from tests.reference import mdm
from undrift._linalg import gauss_legendre, sqrt_sum
from undrift.bound import Bound
from undrift.denoise import GaussianDenoiser
from undrift.diffusion import Diffusion
from undrift.process import ALDA, CLD, MALDA, VP, LinearClock, LinearProcess, Recipe

SLOW = LinearClock(0.1, 10.0)
TWO_POINTS = (mdm.DATA_MEAN + mdm.DATA_STD, mdm.DATA_MEAN - mdm.DATA_STD)  # exact for averages of quadratics

PROCESSES: dict[str, LinearProcess] = {
    "VP": VP(clock=SLOW),
    "CLD": CLD(mass=1.0, aux_scale=0.01, clock=SLOW),
    "ALDA": ALDA(clock=SLOW),
    "MALDA": MALDA(clock=SLOW),
    "FOUR": Recipe(
        mdm.FOUR_D, mdm.FOUR_Q, torch.diag(torch.tensor(mdm.FOUR_S, dtype=torch.float64)), SLOW, start_cov=0.01
    ),
}


class LinearScore:
    """A diffusion whose score is -m(t) (z - centre(t)) for given functions of time."""

    def __init__(self, process, matrix, centre=None):
        self.process, self.matrix, self.centre = process, matrix, centre

    def score(self, z: Tensor, t: Tensor, **condition: object) -> Tensor:
        return -self.matrix(t) @ (z if self.centre is None else z - self.centre(t))


def exact_score(process: LinearProcess, factor: float = 1.0) -> LinearScore:
    """The score of z_t for x ~ N(0.3, 0.7^2), times a factor."""

    def matrix(t):
        mean, root = process.kernel(t)
        whole = sqrt_sum(root, mdm.DATA_STD * mean.unsqueeze(-1))
        return factor * torch.cholesky_inverse(whole)

    return LinearScore(process, matrix, lambda t: mdm.DATA_MEAN * process.kernel(t)[0].unsqueeze(-1))


def exact_denoiser(process: LinearProcess) -> Diffusion:
    return Diffusion(process, GaussianDenoiser([mdm.DATA_MEAN], mdm.DATA_STD**2))


def last_law(process: LinearProcess) -> tuple[Tensor, Tensor]:
    """Mean and root of z_T for that data."""
    mean, root = process.kernel(process.horizon)
    return mdm.DATA_MEAN * mean, sqrt_sum(root, mdm.DATA_STD * mean.unsqueeze(-1))


def nodes(low: float, high: float, panels: int = 20) -> tuple[Tensor, Tensor]:
    """Gauss-Legendre nodes and weights on [low, high], graded towards low."""
    u, w = gauss_legendre(16)
    ends = (0.0, 1.0) if low == 0 else (math.log(low), math.log(high))
    edges = torch.linspace(*ends, panels + 1, dtype=torch.float64)
    width = edges.diff().unsqueeze(-1)
    s, weight = (edges[:-1].unsqueeze(-1) + width * u).flatten(), (width * w).flatten()
    if low == 0:
        return high * s**4, weight * 4 * high * s**3
    return s.exp(), weight * s.exp()


def noise_rule(count: int) -> Tensor:
    """Points (2 n, n, 1) whose average integrates quadratics of n standard normal numbers exactly."""
    unit = math.sqrt(count) * torch.eye(count, dtype=torch.float64)
    return torch.cat([unit, -unit]).unsqueeze(-1)


def elbo_with_gradient(bound: Bound, x: tuple[float, ...]) -> Tensor:
    """The bound at points of one dimension, exact where its integrand is quadratic in the noise; shape of x."""
    rule = noise_rule(bound.noises)
    t, weight = nodes(bound.t_min, bound.diffusion.process.horizon)
    n, m = len(t), len(rule)
    values = []
    for point in x:
        data = torch.full((m, 1), point, dtype=torch.float64)
        path = bound.path(data.repeat(n, 1), t.repeat_interleave(m), rule.repeat(n, 1, 1)).reshape(n, m).mean(1)
        values.append(bound.prior(data)[0] + (weight * path).sum() + bound.start(data, rule).mean())
    return torch.stack(values)


exact_elbo = torch.no_grad()(elbo_with_gradient)
