"""Running a sampler: one tight loop over the rows of its plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from undrift.diffusion import Diffusion, NoiseDiffusion
from undrift.guided_noise import GuidedNoise
from undrift.modal_diffusion import ModalDiffusion
from undrift.process.linear import mix
from undrift.sample.flow import ProbabilityFlow
from undrift.sample.modal import modal_plan
from undrift.sample.plan import Plan, Sampler, TableSampler
from undrift.sample.replace import Hook, Steer

__all__ = ["Trajectory", "run_plan", "sample"]


@dataclass(frozen=True, eq=False)
class Trajectory:
    """A walk from noise to data.

    Attributes:
        times: times of the states, (S,), from T down; the last is 0 after a final call.
        states: (S, n, K, *event).
        calls: model calls made for each sample.
    """

    times: Tensor
    states: Tensor
    calls: int

    @property
    def x(self) -> Tensor:
        """The samples: channel 0 of the last state, (n, *event)."""
        return self.states[-1, :, 0]


def _generator(seed: int | torch.Generator | None, device: torch.device) -> torch.Generator:
    if isinstance(seed, torch.Generator):
        if seed.device.type != device.type:
            raise ValueError(
                f"sample: the generator lives on {seed.device}, the samples on {device}; make both the same."
            )
        return seed
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


def _check(n: int, shape: Sequence[int], batch: int | None) -> None:
    if n < 1:
        raise ValueError(f"sample: n must be at least 1, got {n}.")
    if any(int(s) < 1 for s in shape):
        raise ValueError(f"sample: shape is the event shape of one sample, with positive sizes, got {tuple(shape)}.")
    if batch is not None and batch < 1:
        raise ValueError(f"sample: batch must be at least 1, got {batch}.")


@torch.no_grad()
def sample(
    diffusion: Diffusion | NoiseDiffusion | GuidedNoise | ModalDiffusion,
    n: int,
    shape: Sequence[int],
    sampler: Sampler | Plan,
    seed: int | torch.Generator | None = None,
    *,
    batch: int | None = None,
    trajectory: bool = False,
    progress: bool = False,
    steer: Steer | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    **condition: Any,
) -> Tensor | Trajectory:
    """Draw samples.

    Args:
        diffusion: what to sample.
        n: number of samples.
        shape: event shape of one sample, such as (1, 8, 8); () for scalars.
        sampler: how to get back; or a plan made before.
        seed: integer or generator; the same seed, batch and device give the same samples. None draws a fresh one.
        batch: samples walked at a time; None walks all at once. Noise is drawn batch by batch.
        trajectory: return every state of the walk as a :class:`Trajectory`; those of a ModalDiffusion are coefficients.
        progress: show a progress bar over model calls.
        steer: what changes states between steps, such as Replace; for samplers that are tables.
        dtype, device: of the state; the model may compute in its own dtype.
        condition: passed to the model; tensors whose first size is n are split along with the batch.

    Returns:
        Samples (n, *shape) in the coordinates of the diffusion's space, or the trajectory.

    Raises:
        ValueError: for unusable arguments, before any work starts.
        RuntimeError: if the adaptive solver's step size underflows.
        FloatingPointError: if the samples of a plan are not finite.
    """
    _check(n, shape, batch)
    place = torch.device(device)
    generator = _generator(seed, place)
    if not isinstance(sampler, (Plan, TableSampler, ProbabilityFlow)):
        raise ValueError(f"sample: sampler must be a sampler or a plan, got {type(sampler).__name__}.")
    if isinstance(diffusion, ModalDiffusion):
        if not isinstance(sampler, TableSampler) or steer is not None:
            raise ValueError(f"sample: a ModalDiffusion is walked by a table, unsteered; got {type(sampler).__name__}.")
        plan: Plan | ProbabilityFlow = modal_plan(diffusion, sampler, shape)
    else:
        plan = sampler.plan(diffusion.process) if isinstance(sampler, TableSampler) else sampler
    if isinstance(plan, Plan) and plan.process is not diffusion.process:
        raise ValueError(
            "sample: the plan was made for another process object; make it with sampler.plan(diffusion.process)."
        )
    hook: Hook | None = None
    if steer is not None:
        if not isinstance(plan, Plan):
            raise ValueError(f"sample: steer needs a sampler with fixed steps, a table; got {type(plan).__name__}.")
        hook = steer.along(diffusion.space, plan, n, shape, generator)
    size = n if batch is None else batch
    calls = plan.calls if isinstance(plan, Plan) else None
    walks = []
    with tqdm(
        total=None if calls is None else calls * -(-n // size), disable=not progress, desc="sampling", unit="call"
    ) as bar:
        for first in range(0, n, size):
            count = min(size, n - first)
            part = {
                key: value[first : first + count]
                if isinstance(value, Tensor) and value.ndim and value.shape[0] == n
                else value
                for key, value in condition.items()
            }
            noise = torch.empty(count, diffusion.process.channels, *shape, dtype=dtype, device=place).normal_(
                generator=generator
            )
            if isinstance(plan, Plan):
                walks.append(run_plan(diffusion, plan, noise, generator, trajectory, bar, hook, first, **part))
            elif not isinstance(diffusion, ModalDiffusion):
                z = mix(diffusion.process.prior(), diffusion.space.colour(noise))
                walks.append(Trajectory(*plan.solve(diffusion, z, bar.update, **part)))
    if trajectory:
        return Trajectory(walks[0].times, torch.cat([w.states for w in walks], 1), max(w.calls for w in walks))
    x = torch.cat([w.x for w in walks])
    return diffusion.express(x) if isinstance(diffusion, ModalDiffusion) else x


def run_plan(
    diffusion: Diffusion | NoiseDiffusion | GuidedNoise | ModalDiffusion,
    plan: Plan,
    noise: Tensor,
    generator: torch.Generator,
    trajectory: bool = False,
    bar: tqdm | None = None,
    hook: Hook | None = None,
    first: int = 0,
    **condition: Any,
) -> Trajectory:
    """Walk one batch: ``noise`` (batch, K, *event) is standard normal, coloured here and shaped by the plan's prior."""
    p = diffusion.predictions
    predict = plan.predictor(diffusion)
    space = diffusion.space
    z = _combine(plan.prior, [space.colour(noise)])
    if hook is not None:
        z = hook(z, 0, first)
    before = z
    history: list[Tensor] = []
    depth = plan.B.shape[1]
    kept = [z]
    for i in range(plan.calls):
        start = predict(z, i, **condition)
        history = [start, *history[: depth - 1]]
        blocks, parts = [plan.A[i, 0]], [z]
        if plan.A.shape[1] > 1:
            blocks.append(plan.A[i, 1])
            parts.append(before)
        for j, h in enumerate(history):
            blocks.append(plan.B[i, j][:, :p])
            parts.append(h)
        columns = plan.L[i].flatten(1).any(0) if plan.L.ndim == 3 else plan.L[i].flatten(2).any(-1).any(0)
        if bool(columns.any()):
            root = plan.L[i][:, columns]
            blocks.append(root)
            parts.append(
                space.colour(
                    torch.empty(z.shape[0], root.shape[1], *z.shape[2:], dtype=z.dtype, device=z.device).normal_(
                        generator=generator
                    )
                )
            )
        before, z = z, _combine(torch.cat(blocks, 1), parts)
        if hook is not None:
            z = hook(z, i + 1, first)
        if trajectory and bool(torch.isfinite(plan.after[i])):
            kept.append(z)
        if bar is not None:
            bar.update()
    if not bool(torch.isfinite(z).all()):
        raise FloatingPointError(
            "sample: the walk ended in values that are not finite. The model returned them, or the method is unstable "
            "on this grid: look at the trajectory, take more steps, or use Ancestral or Exponential(order=1)."
        )
    if not trajectory:
        return Trajectory(plan.after[-1:], z.unsqueeze(0), plan.calls)
    times = torch.cat([plan.times[:1], plan.after[torch.isfinite(plan.after)]])
    return Trajectory(times, torch.stack(kept), plan.calls)


def _combine(coefficients: Tensor, parts: list[Tensor]) -> Tensor:
    """The one contraction of a step: coefficients (K, C), or (K, C, *grid), times the parts, stacked along channels."""
    if coefficients.ndim > 2:
        stacked = torch.cat(parts, 1)
        own = stacked.ndim - coefficients.ndim  # axes of the event before the grid's
        weights = coefficients.to(stacked).reshape(*coefficients.shape[:2], *[1] * own, *coefficients.shape[2:])
        return torch.stack([(w * stacked).sum(1) for w in weights], 1)
    if coefficients.shape[0] == 1:
        out = parts[0] * float(coefficients[0, 0])
        for c, part in zip(coefficients[0, 1:].tolist(), parts[1:], strict=True):
            if c != 0.0:
                out.add_(part, alpha=c)
        return out
    return mix(coefficients, torch.cat(parts, 1))
