r"""From a controlled diffusion to draws: walkers that carry weights, are resampled on the way if asked, and moved.

Without resampling the weight of a walker is the ratio of path densities of chain.py. With it, walkers follow the
*twists* :math:`\psi_0, \dots, \psi_K` (levels of a path, or the reference's law times what is known of
:math:`E[g_0 | z]`; :math:`\psi_K` is the target), gain

.. math:: \log G_k = \log\psi_{k+1}(z_{k+1}) - \log\psi_k(z_k) + \log B_k(z_k | z_{k+1}) - \log F_k(z_{k+1} | z_k),

are resampled where weights have become uneven, and may be moved by kernels that leave :math:`\psi_{k+1}` invariant: a
particle denoising diffusion sampler for the reversal, sequential controlled Langevin for an annealed one. Either way
the mean weight has mean Z, for any control and any twist that was fixed before the run and vanishes nowhere. Where
gamma is 0 the twists here are too: walkers that would have come back are lost, so a target with an edge, of log density
-inf beyond it, is not for resampling.

References:
    Phillips et al., Particle Denoising Diffusion Sampler, 2024. Chen et al., Sequential Controlled Langevin
    Diffusions, 2025.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from undrift.density.controlled.diffusion import ControlledDiffusion, Tables
from undrift.density.move import Move, State
from undrift.density.schedule import Resampling
from undrift.density.target import Point, Target
from undrift.measure.evidence import effective_sample_size, log_mean_exp

__all__ = ["Result", "Twist", "walk"]


class Twist:
    """The density psi_k of one time as moves ask for it, in states laid out as rows (n, C d).

    Args:
        diffusion, tables, target: of the run.
        k: time.
    """

    def __init__(self, diffusion: ControlledDiffusion, tables: Tables, target: Target, k: int) -> None:
        self.diffusion, self.tables, self.target, self.k = diffusion, tables, target, k

    def states(self, rows: Tensor) -> Tensor:
        """(n, C d) to (C, n, d)."""
        return rows.unflatten(-1, (-1, self.diffusion.dim)).movedim(-2, 0)

    @staticmethod
    def rows(z: Tensor) -> Tensor:
        """(C, n, d) to (n, C d)."""
        return z.movedim(0, -2).flatten(-2)

    def at(self, rows: Tensor) -> Point:
        """log psi and its gradient, from one evaluation of the target: (n,) and (n, C d)."""
        value, score = log_twist_and_score(self.diffusion, self.tables, self.target, self.k, self.states(rows))
        return Point(rows, value, self.rows(score))

    def log_prob(self, point: Point) -> Tensor:
        return point.log_prob

    def score(self, point: Point) -> Tensor:
        return point.score


def log_twist_and_score(
    diffusion: ControlledDiffusion, tables: Tables, target: Target, k: int, z: Tensor
) -> tuple[Tensor, Tensor]:
    """log psi_k (n,) and its gradient in z (C, n, d)."""
    answer = diffusion.ask(target, tables, k, z)
    assert answer is not None
    leaf = z.detach().requires_grad_()
    with torch.enable_grad():  # the target's value follows its gradient to first order, which is all that is needed
        look = diffusion.look(tables, slice(k, k + 1), leaf.unsqueeze(0))[0]
        value = answer[0] + (answer[1] * (look - look.detach())).sum(-1)
        psi = diffusion.log_twist(tables, k, leaf, value, answer[1])
        (score,) = torch.autograd.grad(psi.sum(), leaf)
    bad = ~torch.isfinite(psi) | ~torch.isfinite(score).all(-1).all(0)
    return psi.detach().masked_fill(bad, -math.inf), score.masked_fill(bad.unsqueeze(-1), 0.0)


@dataclass
class Result:
    """Where a walk ended.

    Attributes:
        x: (repeats, walkers, d).
        log_weights: (repeats, walkers), such that the mean weight of a repeat is its estimate of Z.
        rows: what happened at each time.
    """

    x: Tensor
    log_weights: Tensor
    rows: list[dict[str, Any]] = field(default_factory=list)


def walk(
    diffusion: ControlledDiffusion,
    target: Target,
    repeats: int,
    walkers: int,
    generator: torch.Generator,
    dtype: torch.dtype,
    *,
    steps: int | None = None,
    resampling: Resampling | None = None,
    move: Move | None = None,
    moves: int = 1,
    size: float = 0.1,
    progress: bool = False,
) -> Result:
    """Draw with a controlled diffusion.

    Args:
        diffusion: trained or not.
        target: in its coordinates.
        repeats, walkers: groups, and walkers in each.
        generator: all randomness.
        dtype: of the walkers; networks compute in their own.
        steps: K, where it is not the scheme's.
        resampling: null for plain importance weights; not for a target whose log density is -inf in places.
        move: an exact move of :mod:`undrift.density.move`, made after each resampling.
        moves: how many.
        size: their step size eps, in units of the smallest variance of psi's reference at the time.
        progress: show a bar.

    Raises:
        FloatingPointError: if all walkers of a repeat lose their weight.
    """
    like = torch.zeros((), dtype=dtype, device=generator.device)
    with torch.no_grad():
        tables = diffusion.tables(like, steps)
        chain = tables.chain
        z = diffusion.start(tables, repeats * walkers, generator)
        log_z = torch.zeros(repeats, dtype=torch.float64, device=z.device)
        log_w = torch.zeros(repeats, walkers, dtype=torch.float64, device=z.device)
        rows: list[dict[str, Any]] = []
        psi = diffusion.log_start(tables, z)  # the twist that walkers have followed so far

        def gain(amount: Tensor) -> None:
            nonlocal log_w
            amount = torch.nan_to_num(amount.double(), nan=-math.inf, neginf=-math.inf, posinf=-math.inf)
            log_w = log_w + amount.reshape(repeats, walkers)
            if bool((log_w.logsumexp(-1) == -math.inf).any()):
                raise FloatingPointError(
                    f"{target.name}: all walkers of a repeat lost their weight: the prior lies outside the support. "
                    "Give coordinates (loc, scale)."
                )

        annealed = diffusion.scheme.annealed
        answer = diffusion.ask(target, tables, 0, z)
        for k in tqdm(range(chain.steps), disable=not progress, desc="draw", unit="step"):
            value, score = answer if answer is not None else (None, None)
            row: dict[str, Any] = {"u": 1 - float(chain.label[k]), "acceptance": None}
            if resampling is not None:
                if value is None:
                    raise ValueError("resampling needs a target that is asked on the way; take an informed control.")
                twist = diffusion.log_twist(tables, k, z, value, score)
                gain(twist - psi)
                psi = twist
                due = resampling.due(log_w)
                if bool(due.any()):
                    index = _ancestors(resampling, due, log_w, generator)
                    log_z = torch.where(due, log_z + log_mean_exp(log_w), log_z)
                    log_w = torch.where(due.unsqueeze(-1), torch.zeros_like(log_w), log_w)
                    z, psi, value = z[:, index], psi[index], value[index]
                    score = None if score is None else score[index]
                    if move is not None and k > 0:
                        z, row["acceptance"] = _moved(diffusion, tables, target, k, z, move, moves, size, generator)
                        answer = diffusion.ask(target, tables, k, z)
                        assert answer is not None
                        value, score = answer
                        psi = diffusion.log_twist(tables, k, z, value, score)
            at = slice(k, k + 1)
            a = diffusion.forward_control(tables, at, z.unsqueeze(0), _row(value), _row(score))
            noise = torch.empty_like(z).normal_(generator=generator)
            new = diffusion.step(tables, k, z, a[0], noise)
            last = k + 1 == chain.steps
            answer = None if last and not annealed else diffusion.ask(target, tables, k + 1, new)
            later = answer[1].unsqueeze(0) if annealed and answer is not None else None
            back = diffusion.backward_control_at(tables, slice(k + 1, k + 2), new.unsqueeze(0), later)
            forth, home = diffusion.log_steps(tables, at, torch.stack([z, new]), a, back)
            gain((home - forth)[0])
            z = new
            row["ess"] = float(effective_sample_size(log_w).mean()) / walkers
            rows.append(row)
        end = answer[0] if annealed and answer is not None else diffusion.end(target, z, False)[0]
        gain(end + diffusion.log_finish(tables, z) - psi)
    return Result(z[0].reshape(repeats, walkers, -1), log_z.unsqueeze(-1) + log_w, rows)


def _row(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.unsqueeze(0)


def _ancestors(rule: Resampling, due: Tensor, log_w: Tensor, generator: torch.Generator) -> Tensor:
    """Flat index (repeats * walkers,) of each walker's ancestor, itself where its repeat is not due."""
    repeats, walkers = log_w.shape
    own = torch.arange(walkers, device=due.device).expand(repeats, -1)
    index = torch.where(due.unsqueeze(-1), rule.ancestors(log_w, generator), own)
    return (index + walkers * torch.arange(repeats, device=due.device).unsqueeze(-1)).reshape(-1)


def _moved(
    diffusion: ControlledDiffusion,
    tables: Tables,
    target: Target,
    k: int,
    z: Tensor,
    move: Move,
    moves: int,
    size: float,
    generator: torch.Generator,
) -> tuple[Tensor, float]:
    """Walkers after exact moves at psi_k, and their mean acceptance."""
    twist = Twist(diffusion, tables, target, k)
    eps = torch.as_tensor(size, dtype=z.dtype, device=z.device) * float(tables.chain.law[k].diagonal().square().min())
    state, accepted = State(twist.rows(z)), []
    for _ in range(moves):
        state, info = move.step(twist, state, lambda score: eps, generator)  # type: ignore[arg-type]
        accepted.append(1.0 if info.acceptance is None else float(info.acceptance.mean()))
    return twist.states(state.y), sum(accepted) / len(accepted)
