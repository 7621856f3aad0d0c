r"""Twisted sequential Monte Carlo: draws of the posterior under a sampler's own law, right as particles grow.

A plan whose rows draw noise is a Markov chain (of the state and what the plan remembers)

.. math:: z_{i+1} = \sum_m A_{im} z_{i-m} + \sum_j B_{ij} \hat z_{0, i-j} + L_i \xi_i, \qquad \xi_i \sim N(0, I),

whose last state holds the sample x0. Guidance moves the predictions, by :math:`\delta_i = D^{\text{guided}}_i - D_i`,
and so the mean of a step by :math:`\sum_j B_{ij} \delta_{i-j}`. Where that lies in the range of the noise,
:math:`\sum_j B_{ij} \delta_{i-j} = L_i u_i`, a guided step is the chain's own with :math:`\xi_i + u_i` for
:math:`\xi_i`, and the ratio of the two laws is one of standard normals, whatever the process:

.. math::
    \frac{w_{i+1}}{w_i} = \frac{g_{i+1}(z_{i+1})}{g_i(z_i)}\,
        \exp\bigl(-\langle u_i, \xi_i \rangle - \tfrac12 \|u_i\|^2\bigr), \qquad w_0 = g_0(z_0),

with any positive twisting functions g but for the last, which is the likelihood p(y | x0) of the sample itself. The
average weight is then an unbiased estimate of :math:`p(y) = E[p(y | x_0)]`, and the weighted particles tend to
:math:`p(x_0)\,p(y | x_0) / p(y)`, with p(x0) the law of the sampler's output, for every plan, potential and strength.
How many particles it takes is what these decide: with :math:`g = p_\sigma(y | \tilde x)` exactly, guidance by its
gradient and short steps, weights hardly vary; over long steps, or with a potential that forgets how uncertain a
prediction is, guidance moves a state by many deviations of the noise, and a few particles carry all weight.

What is guided and what is not is told apart step by step, along each particle's own path, with the memory of multistep
methods. Rows that draw no noise (stages, the last prediction) are not guided.

On a function space :math:`\xi_i` are the unit normals behind the noise, so nothing changes but how u is measured.

References:
    Wu, Trippe, Naesseth, Blei & Cunningham, Practical and Asymptotically Exact Conditional Sampling in Diffusion
    Models, 2023 (arXiv 2306.17775), algorithm 1: the case of one channel and ancestral steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from undrift._journal import Entry, Journal, digest
from undrift._weights import ancestors, effective_sample_size, log_mean_exp
from undrift.denoise.base import per_sample
from undrift.denoise.guidance import Guided, Potential
from undrift.diffusion import Diffusion, NoiseDiffusion
from undrift.guided_noise import GuidedNoise, guide
from undrift.observe import Observation
from undrift.process.linear import mix
from undrift.sample.particles import Particles
from undrift.sample.plan import Plan, TableSampler
from undrift.sample.run import _combine, _generator
from undrift.sample.shift import lower_roots, shifts
from undrift.space import FunctionSpace

__all__ = ["Likelihood", "twisted"]


class Likelihood(Protocol):
    """What was observed: an :class:`undrift.observe.Observation`, or anything else with this method."""

    def log_likelihood(self, x: Tensor) -> Tensor:
        """log p(y | x0 = x) for x (batch, *event): (batch,)."""
        ...


@torch.no_grad()
def twisted(
    diffusion: Diffusion | NoiseDiffusion | GuidedNoise,
    likelihood: Likelihood | Callable[[Tensor], Tensor],
    potential: Potential | None,
    particles: int,
    shape: Sequence[int],
    sampler: TableSampler | Plan,
    seed: int | torch.Generator | None = None,
    *,
    resample: float = 0.5,
    strength: float = 1.0,
    runs: int = 1,
    batch: int | None = None,
    checkpoint: str | Path | Journal | None = None,
    progress: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    **condition: Any,
) -> Particles:
    """Draw from the posterior of a diffusion given an observation, by twisted sequential Monte Carlo.

    Args:
        diffusion: the prior, of either kind.
        likelihood: an observation, which sees fields, or any callable from samples (batch, *event), as ``sample``
            returns them, to log p(y | x0) (batch,).
        potential: twisting function and guidance, see :class:`undrift.denoise.guidance.Potential`; positive where the
            likelihood is. TweedieMoments and PseudoInverse know how uncertain a prediction is; PointEstimate does not,
            and needs many more particles. None for plain importance sampling of the prior's draws.
        particles: of each run.
        shape: event shape of one sample.
        sampler: a table that draws noise, such as Ancestral, EulerMaruyama, SSCS, Exponential(stochasticity=1); or a
            plan made before.
        seed: integer or generator; the same seed, batch and device give the same particles. None draws a fresh one.
        resample: resample a run, systematically, when its effective sample size is below this share of its particles;
            0 never, 1 at every call.
        strength: of the guidance that proposes; the posterior does not depend on it. 0 leaves the twisting of weights.
        runs: independent runs, walked together; the spread of their evidence is its standard error.
        batch: particles shown to the model at a time; None for all of all runs.
        checkpoint: file to keep the run's state in between calls of the model for all particles, so that an interrupted
            run goes on where it was; removed when the run is complete.
        progress: show a progress bar over model calls.
        dtype, device: of the state; weights are float64.
        condition: passed to potential and model, the same for all particles; a tensor whose first size is runs times
            particles is cut into batches.

    Raises:
        ValueError: for unusable arguments, a plan that draws no noise, or one whose noise cannot reach what guidance
            moves, or a checkpoint of another run, before any work starts.
        FloatingPointError: if predictions or weights are not finite, or all weights of a run are 0.
    """
    plan = _plan(diffusion, sampler)
    _check(particles, shape, resample, runs, batch)
    total, place = runs * particles, torch.device(device)
    for key, value in condition.items():
        if isinstance(value, Tensor) and value.ndim and value.shape[0] == total and bool((value != value[:1]).any()):
            raise ValueError(
                f"twisted: {key} differs between particles, which trade places when they are resampled; call twisted "
                "once for each condition."
            )
    if isinstance(likelihood, Observation):
        some = diffusion.space.decode(torch.zeros(1, *shape, dtype=dtype, device=place))
        if not likelihood.shared(some):
            raise ValueError(
                f"twisted: data of shape {tuple(likelihood.y.shape)} are one observation for each particle, and "
                "particles trade places when they are resampled; call twisted once for each observation."
            )
    walk = _Walk(diffusion, likelihood, potential, strength, plan, min(batch or total, total), condition)
    generator = _generator(seed, place)
    noise = torch.empty(total, plan.process.channels, *shape, dtype=dtype, device=place).normal_(generator=generator)

    def identity() -> str:
        settings = {"method": "twisted", "runs": runs, "batch": walk.batch, "resample": resample, "strength": strength}
        table = {name: getattr(plan, name) for name in ("times", "A", "B", "L", "prior")}
        return digest(**settings, **table, **walk.marks(noise), noise=noise, seed=generator.get_state())

    journal = Journal.of(checkpoint, identity, "diffusion, likelihood, potential, setting or seed")
    with tqdm(total=plan.calls * -(-total // walk.batch), disable=not progress, desc="twisted", unit="call") as bar:
        return walk.run(noise, runs, resample, generator, bar, journal)


def _check(particles: int, shape: Sequence[int], resample: float, runs: int, batch: int | None) -> None:
    for name, value in (("particles", particles), ("runs", runs), ("batch", 1 if batch is None else batch)):
        if value < 1:
            raise ValueError(f"twisted: {name} must be at least 1, got {value}.")
    if any(int(s) < 1 for s in shape):
        raise ValueError(f"twisted: shape is the event shape of one sample, with positive sizes, got {tuple(shape)}.")
    if not 0 <= resample <= 1:
        raise ValueError(f"twisted: resample is a share of the particles, in [0, 1], got {resample}.")


def _plan(diffusion: Diffusion | NoiseDiffusion | GuidedNoise, sampler: TableSampler | Plan) -> Plan:
    if not isinstance(diffusion, (Diffusion, NoiseDiffusion, GuidedNoise)):
        raise ValueError(
            f"twisted: needs a Diffusion or a NoiseDiffusion, which are guided at one noise level, got a "
            f"{type(diffusion).__name__}."
        )
    if not isinstance(sampler, (Plan, TableSampler)):
        raise ValueError(
            f"twisted: sampler must be a table that draws noise, such as Ancestral, or a plan; got "
            f"{type(sampler).__name__}."
        )
    plan = sampler.plan(diffusion.process) if isinstance(sampler, TableSampler) else sampler
    if plan.process is not diffusion.process:
        raise ValueError(
            "twisted: the plan was made for another process object; make it with sampler.plan(diffusion.process)."
        )
    if not bool((plan.L != 0).any()):
        raise ValueError(
            f"twisted: the steps of {type(sampler).__name__} draw no noise, so nothing can be guided with weights that "
            "exist; use Ancestral, EulerMaruyama, SSCS, or Exponential(stochasticity=1)."
        )
    return plan


class _Walk:
    """The chain of a plan with its guidance, its likelihood and its space at hand."""

    def __init__(
        self,
        diffusion: Diffusion | NoiseDiffusion | GuidedNoise,
        likelihood: Likelihood | Callable[[Tensor], Tensor],
        potential: Potential | None,
        strength: float,
        plan: Plan,
        batch: int,
        condition: dict[str, Any],
    ) -> None:
        self.plan, self.batch, self.condition = plan, batch, condition
        self.space = space = diffusion.space
        self.modes: FunctionSpace | None = None
        if isinstance(space, FunctionSpace) and not space.white:
            self.modes = space.in_coordinates("coefficients")
        self.diffusion, self.strength = diffusion, strength
        self.guided = None if potential is None else guide(diffusion, potential, strength)
        observed = getattr(likelihood, "log_likelihood", None)
        self.log_likelihood: Callable[[Tensor], Tensor] = likelihood  # type: ignore[assignment]
        if observed is not None:
            self.log_likelihood = lambda x: observed(space.decode(x))
        self.readings = (self.guided or diffusion).reading(plan.times)
        self.levels = plan.process.sigma(plan.times)
        self.roots = lower_roots(plan)
        self.shifts = shifts(plan, self.roots)

    def move(self, slope: Tensor, sigma: Tensor) -> Tensor:
        """What guidance adds to a prediction, strength sigma^2 C grad log g, by the unit normals that would draw it.

        From the slope: the difference of two predictions, divided by the root of C, is rounding where modes are faint.
        """
        if self.modes is not None:
            slope = self.modes.root(self.modes.encode(self.space.decode(self.space.gradient(slope))))
        level = per_sample(sigma, slope)
        return level * (level * (self.strength * slope))

    def ask(self, z: Tensor, i: int, **condition: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The predicted starts (n, P, *event) at states z; the potential's log (n,) and its slope (n, *event)."""
        reading = self.readings[i]
        if self.guided is None:
            start = self.diffusion.read(z, reading, **condition)
            return start, start.new_zeros(len(z)), torch.zeros_like(start[:, 0])
        if isinstance(self.guided, GuidedNoise):
            said = self.guided.parts(z, reading, **condition)
            return said.unguided, said.log_potential, said.slope
        assert isinstance(self.guided.denoiser, Guided)
        x = mix(reading[:-1].unsqueeze(0), z).squeeze(1)
        parts = self.guided.denoiser.parts(x, reading[-1].to(x).expand(len(x)), **condition)
        return parts.unguided.unsqueeze(1), parts.log_potential, parts.slope

    def parts(self, z: Tensor, i: int, bar: tqdm) -> tuple[Tensor, Tensor, Tensor]:
        """What the model says of all states z (n, K, *event) at call i.

        Returns:
            Predicted starts (n, P, *event); what guidance adds to the data's channel of each, in unit normals,
            (n, 1, *event); and log g (n,).
        """
        said = []
        for first in range(0, len(z), self.batch):
            some = z[first : first + self.batch]
            condition = {
                k: v[first : first + len(some)] if isinstance(v, Tensor) and v.ndim and len(v) == len(z) else v
                for k, v in self.condition.items()
            }
            start, log_g, slope = self.ask(some, i, **condition)
            move = self.move(slope, self.levels[i].to(slope)) if self.guided is not None else slope
            said.append((start, move.unsqueeze(1), log_g))
            bar.update()
        starts, moves, log_g = (torch.cat(part) for part in zip(*said, strict=True))
        return starts, moves, log_g

    def marks(self, noise: Tensor) -> dict[str, Any]:
        """Values by which models, guidance and likelihoods are told apart, at two starts; conditions as they are."""
        total, i = len(noise), self.plan.calls // 2
        z = mix(self.plan.prior, self.space.colour(noise[:2]))
        condition = {
            k: v[:2] if isinstance(v, Tensor) and v.ndim and len(v) == total else v for k, v in self.condition.items()
        }
        start, log_g, slope = self.ask(z, i, **condition)
        said = {"likelihood": self.log_likelihood(z[:, 0]), "start": start, "potential": log_g, "slope": slope}
        return said | {f"condition.{k}": v for k, v in self.condition.items()}

    def step(
        self, i: int, z: Tensor, before: Tensor, past: list[Tensor], moved: list[Tensor], generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """The next states, and the log ratio (n,) of the plan's own step to the guided one that was made.

        Args:
            i: the row.
            z, before: states, and those before them.
            past, moved: unguided predictions (n, P, *event), and what guidance adds to the data's channel of each, in
                unit normals, (n, 1, *event); newest first.
            generator: of the noise.
        """
        plan, root = self.plan, self.roots[i]
        blocks, parts = [plan.A[i, 0]], [z]
        if plan.A.shape[1] > 1:
            blocks.append(plan.A[i, 1])
            parts.append(before)
        for j, prediction in enumerate(past):
            blocks.append(plan.B[i, j][:, : self.diffusion.predictions])
            parts.append(prediction)
        columns = root.any(0)
        ratio = torch.zeros(len(z), dtype=torch.float64, device=z.device)
        if bool(columns.any()):
            shape = (len(z), int(columns.sum()), *z.shape[2:])
            xi = torch.empty(shape, dtype=z.dtype, device=z.device).normal_(generator=generator)
            u = mix(self.shifts[i, : len(moved), columns].mT, torch.cat(moved, 1))
            ratio = -(u * (xi + 0.5 * u)).flatten(1).sum(1, dtype=torch.float64)
            blocks.append(root[:, columns])
            parts.append(self.space.colour(xi + u))
        return _combine(torch.cat(blocks, -1), parts), ratio

    def run(
        self, noise: Tensor, runs: int, resample: float, generator: torch.Generator, bar: tqdm, journal: Journal
    ) -> Particles:
        """From unit normals (runs * particles, K, *event) to weighted draws."""
        plan, total = self.plan, len(noise)
        m, place = total // runs, noise.device
        found = journal.read()
        first = 0
        past: list[Tensor] = []
        moved: list[Tensor] = []
        ess: list[Tensor] = []
        resampled: list[Tensor] = []
        if found is None:
            z = before = mix(plan.prior, self.space.colour(noise))
            log_w = torch.zeros(runs, m, dtype=torch.float64, device=place)
            log_z, value, ratio = log_w[:, 0].clone(), log_w.flatten(), log_w.flatten()
            lineage = torch.arange(m, device=place).expand(runs, m)
        else:
            tensors, plain = found
            generator.set_state(tensors.pop("generator"))
            tensors, first = {name: kept.to(place) for name, kept in tensors.items()}, plain["i"]
            z, before, log_w, log_z = (tensors[name] for name in ("z", "before", "log_w", "log_z"))
            value, ratio, lineage = tensors["value"], tensors["ratio"], tensors["lineage"]
            past, moved = list(tensors["past"]), list(tensors["moved"])
            ess, resampled = list(tensors["ess"]), list(tensors["resampled"])
            bar.update(first * -(-total // self.batch))
        offset = m * torch.arange(runs, device=place).unsqueeze(-1)

        def snapshot(i: int) -> Entry:
            now = {"z": z, "before": before, "log_w": log_w, "log_z": log_z, "value": value, "ratio": ratio}
            now |= {"lineage": lineage, "generator": generator.get_state()}
            lists = {"past": [*past], "moved": [*moved], "ess": [*ess], "resampled": [*resampled]}
            return lambda: (now | {name: torch.stack(each) for name, each in lists.items()}, {"i": i})

        with journal:
            for i in range(first, plan.calls):
                unguided, move, g = self.parts(z, i, bar)
                log_w = _gain(log_w, ratio + g.double() - value, f"call {i} of {plan.calls}")
                value, dead = g.double(), (log_w == -math.inf).reshape(-1, *[1] * (move.ndim - 1))
                past = [unguided, *past[: plan.B.shape[1] - 1]]
                moved = [move.masked_fill(dead, 0.0), *moved[: plan.B.shape[1] - 1]]
                ess.append(effective_sample_size(log_w))
                due = ess[-1] < resample * m * (1 - 1e-12)
                resampled.append(due)
                if bool(due.any()):
                    source = torch.where(due.unsqueeze(-1), ancestors(log_w, generator), lineage.new_tensor(range(m)))
                    index = (source + offset).flatten()
                    z, before, value = z[index], before[index], value[index]
                    past, moved = [p[index] for p in past], [p[index] for p in moved]
                    lineage = lineage.gather(1, source)
                    log_z = torch.where(due, log_z + log_mean_exp(log_w), log_z)
                    log_w = log_w.masked_fill(due.unsqueeze(-1), 0.0)
                after, ratio = self.step(i, z, before, past, moved, generator)
                before, z = z, after
                if journal.active:
                    journal.note(snapshot(i + 1))
        x = z[:, 0]
        last = torch.cat([self.log_likelihood(some) for some in x.split(self.batch)])
        if last.shape != (total,):
            raise ValueError(
                f"twisted: the log likelihood must be one number per sample, ({total},), got {tuple(last.shape)}."
            )
        log_w = _gain(log_w, ratio + last.double() - value, "the likelihood of the samples")
        if not bool(torch.isfinite(x).all()):
            raise FloatingPointError(
                "twisted: samples are not finite: the model returned such values, the guidance is too strong, or the "
                "method is unstable on this grid; take more steps, or use Ancestral."
            )
        ess.append(effective_sample_size(log_w))
        resampled.append(torch.zeros_like(resampled[-1]))
        journal.close()
        return Particles(
            x=x,
            log_weights=(log_w + log_z.unsqueeze(-1)).flatten().log_softmax(0),
            run_log_evidence=log_z + log_mean_exp(log_w),
            ess_path=torch.stack(ess),
            resampled=torch.stack(resampled),
            lineage=lineage,
            calls=plan.calls,
        )


def _gain(log_w: Tensor, increment: Tensor, where: str) -> Tensor:
    """Log weights (runs, m) after an increment (runs * m,); a weight of 0 stays 0."""
    log_w = torch.where(log_w == -math.inf, log_w, log_w + increment.reshape(log_w.shape))
    if bool(log_w.isnan().any()) or bool((log_w == math.inf).any()):
        raise FloatingPointError(
            f"twisted: weights are not finite at {where}: the potential, the likelihood or the guided predictions are "
            "not; look at them at that noise level, or lower the strength."
        )
    if bool((log_w == -math.inf).all(-1).any()):
        raise FloatingPointError(
            f"twisted: all weights of a run are 0 at {where}: the potential or the likelihood is 0 at every particle; "
            "use more particles, or one that is positive everywhere."
        )
    return log_w
