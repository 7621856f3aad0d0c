"""Moments of weights whose logarithm is quadratic in standard normal noise: exact, whatever computed the weights.

With log w = c + b'e + e'He/2, e ~ N(0, I), and where I - pH is positive definite,

    E[log w] = c + tr H / 2,   Var[log w] = |b|^2 + tr H^2 / 2,
    log E[w^p] = p c + p^2 b'(I - pH)^-1 b / 2 - log det(I - pH) / 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from undrift.density.controlled.diffusion import ControlledDiffusion, Paths
from undrift.density.target import Target


@dataclass
class Quadratic:
    c: Tensor
    b: Tensor
    h: Tensor

    @classmethod
    def of(cls, log_w: Callable[[Tensor], Tensor], count: int, graph: bool = False) -> Quadratic:
        """Read off from gradients at 0 and at unit vectors of noise (count, batch); ``graph``: keep that of b and c."""
        noise = torch.cat([torch.zeros(count, 1), torch.eye(count)], 1).double().requires_grad_()
        value = log_w(noise)
        (slope,) = torch.autograd.grad(value.sum(), noise, create_graph=graph)
        h = slope[:, 1:] - slope[:, :1]
        assert float((h - h.mT).detach().abs().max()) < 1e-8 * (1 + float(h.detach().abs().max()))
        return cls(value[0] if graph else value[0].detach(), slope[:, 0], 0.5 * (h + h.mT))

    @property
    def mean(self) -> Tensor:
        return self.c + 0.5 * self.h.trace()

    @property
    def var(self) -> Tensor:
        return self.b.square().sum() + 0.5 * self.h.square().sum()

    def log_moment(self, p: float) -> float:
        """log E[w^p]; infinite where it does not exist."""
        m = torch.eye(len(self.b), dtype=torch.float64) - p * self.h
        if float(torch.linalg.eigvalsh(m)[0]) <= 0:
            return math.inf
        return float(p * self.c + 0.5 * p * p * self.b @ torch.linalg.solve(m, self.b) - 0.5 * torch.logdet(m))

    @property
    def log_z(self) -> float:
        return self.log_moment(1.0)

    @property
    def ess(self) -> float:
        return math.exp(2 * self.log_moment(1.0) - self.log_moment(2.0))


def walk_along(diffusion: ControlledDiffusion, target: Target, noise: Tensor) -> Paths:
    """Paths, with their graph, that standard normal noise (steps + 1, C, batch, d) makes by the library's steps."""
    tables = diffusion.tables(noise, len(noise) - 1)
    z = tables.chain.start(noise[0])
    walked, answers, controls = [z], [], []
    for k in range(tables.chain.steps):
        answer = diffusion.ask(target, tables, k, z)
        value, score = (None, None) if answer is None else (part.unsqueeze(0) for part in answer)
        a = diffusion.forward_control(tables, slice(k, k + 1), z.unsqueeze(0), value, score)[0]
        z = diffusion.step(tables, k, z, a, noise[k + 1])
        walked.append(z)
        answers.append(answer)
        controls.append(a)
    value, score = diffusion.end(target, z, diffusion.scheme.annealed)
    known = [answer for answer in answers if answer is not None]
    if known and score is not None:
        known.append((value, score))
    parts = [torch.stack(part) for part in zip(*known, strict=True)] if known else [None, None]
    return Paths(torch.stack(walked), parts[0], parts[1], value, score, torch.stack(controls))


def weights_of(diffusion: ControlledDiffusion, target: Target, steps: int | None = None) -> Quadratic:
    """Of a diffusion in one dimension, through the library's own weights."""
    steps = steps or diffusion.scheme.steps
    channels = diffusion.scheme.process.channels

    def log_w(noise: Tensor) -> Tensor:
        paths = walk_along(diffusion, target, noise.reshape(steps + 1, channels, -1, 1))
        return diffusion.log_weights(diffusion.tables(noise, steps), paths)

    return Quadratic.of(log_w, (steps + 1) * channels)
