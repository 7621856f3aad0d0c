r"""A controlled diffusion for one target: a chain, the controls of its two directions, and the weights of its paths.

Two kinds, of one shape:

    reversal    z follows the reversed reference under a forward control; noise leads back. PIS, DIS, DDS. With a
                backward control as well: a general bridge.
    annealed    Langevin dynamics along :math:`\gamma^\beta \nu^{1 - \beta}`, with the learned part of the force in
                both directions, of opposite signs: controlled Monte Carlo diffusions (CMCD).

The target is asked once a step, at the point where the control looks, and the answers are kept with the path: its
gradient is then taken in a second pass without a single evaluation.

References:
    Vargas et al., Transport Meets Variational Inference: Controlled Monte Carlo Diffusions, 2024.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from undrift._linalg import as_f64
from undrift.density.controlled.chain import Chain, contract, langevin, reversal
from undrift.density.controlled.control import Control, Exact, PotentialField, View
from undrift.density.controlled.grid import TimeGrid
from undrift.density.target import Target
from undrift.process.learned import LearnedProcess
from undrift.process.linear import LinearProcess
from undrift.process.recipe import RecipeProcess

__all__ = ["ControlledDiffusion", "Learnable", "Paths", "Scheme", "Tables"]

Learnable = Literal["noise", "prior", "levels"]


@dataclass(frozen=True, eq=False)
class Scheme:
    """All that defines a controlled diffusion but its target.

    Args:
        process: any linear process; for an annealed one, its geometry.
        grid, integrator, gain: see :func:`undrift.density.controlled.chain.reversal`.
        steps: K.
        control: of the forward direction.
        backward: of the backward direction; null for the noising process as it is.
        annealed: Langevin dynamics along a path to the target, not the reversal of noise.
        caution: of the twist of a reversal without a potential: :math:`g_0(y)` counts to the power
            :math:`(1 - V)^{caution}`. At one point it knows little of :math:`E[g_0 | z]` where V is large.
        learn: what else is learned: "noise", a factor of all noise for each coordinate; for annealed ones also "prior",
            centre and scale of the start, and "levels", the schedule beta.
    """

    process: LinearProcess
    grid: TimeGrid
    steps: int
    control: Control
    backward: Control | None = None
    annealed: bool = False
    integrator: Literal["exponential", "euler"] = "exponential"
    gain: Literal["posterior", "score"] = "posterior"
    learn: Sequence[Learnable] = ()
    caution: float = 4.0


class Paths(NamedTuple):
    """Paths of a batch, with what the target said on the way.

    Attributes:
        z: states, (K + 1, C, batch, d).
        value, score: log gamma and its gradient where the control looked, (K + 1, batch) and (K + 1, batch, d); None
            if it never looked.
        log_target: log gamma at the end of the path, (batch,).
        end_score: its gradient there, (batch, d), where it was asked for.
        control: forward control along the path, (K, batch, d), where the path was walked forwards.
    """

    z: Tensor
    value: Tensor | None
    score: Tensor | None
    log_target: Tensor
    end_score: Tensor | None = None
    control: Tensor | None = None

    @property
    def x(self) -> Tensor:
        """The ends, (batch, d)."""
        return self.z[-1, 0]

    def take(self, index: Tensor) -> Paths:
        """The paths at an index into the batch."""
        return Paths(
            self.z[:, :, index],
            None if self.value is None else self.value[:, index],
            None if self.score is None else self.score[:, index],
            self.log_target[index],
            None if self.end_score is None else self.end_score[index],
            None if self.control is None else self.control[:, index],
        )


class Tables(NamedTuple):
    """What depends on time and parameters alone: computed once for a batch of paths.

    Attributes:
        chain: in the states' dtype and on their device.
        noise: factor of all noise, (d,), or None.
        beta: exponent of the target at each time, (K + 1,), for annealed ones.
        cut: largest entry of the force there, likewise: what moves a walker by one unit of the prior in a step.
        unit: makes y of the order of 1, (K + 1, 1, 1).
        narrow: dtype that networks compute in.
        forward, backward: of the fields.
    """

    chain: Chain
    noise: Tensor | None
    beta: Tensor | None
    cut: Tensor | None
    unit: Tensor
    narrow: torch.dtype
    forward: tuple[Tensor, ...]
    backward: tuple[Tensor, ...]


_LEVEL_KNOTS = 32


class ControlledDiffusion(nn.Module):
    """A scheme for a target of ``dim`` coordinates, in which the prior is N(0, I).

    Args:
        scheme: see :class:`Scheme`; a process with parameters is copied, and learned.
        dim: d.
        seed: of the networks.

    Raises:
        ValueError: for settings that exclude each other.
    """

    log_z: Tensor

    def __init__(self, scheme: Scheme, dim: int, seed: int = 0) -> None:
        super().__init__()
        self.dim = dim
        learned = isinstance(scheme.process, nn.Module)
        if not learned and _differentiable(scheme.process):
            name = type(scheme.process).__name__
            ask = "LearnedProcess.like(process), with learn=('clock',) where it is the clock alone, or give "
            raise ValueError(
                f"{name} has parameters that nothing would train: a process is learned as a whole; give "
                f"{ask if isinstance(scheme.process, RecipeProcess) else ''}one without parameters."
            )
        process = copy.deepcopy(scheme.process) if learned else scheme.process
        self.scheme = replace(scheme, process=process)
        self.process = process if learned else None
        channels = process.channels
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            whole = scheme.annealed or scheme.backward is not None
            self.inputs: Literal["state", "mean"] = "state" if whole else "mean"
            width = channels * dim if whole else dim
            self.control = scheme.control.field(width, dim)
            back = None if scheme.backward is None else scheme.backward.field(channels * dim, dim)
            self.backward_control = back
        if scheme.annealed and (back is not None or self.control.guided or isinstance(scheme.control, Exact)):
            raise ValueError(
                "an annealed diffusion has the target's score in both directions already; its control is Plain, and "
                "serves both (backward: null)."
            )
        if scheme.annealed and (scheme.integrator, scheme.gain) != ("exponential", "posterior"):
            raise ValueError(
                f"integrator = {scheme.integrator}, gain = {scheme.gain}: these are for reversals, and an annealed "
                "diffusion takes Langevin's steps; leave them at exponential and posterior."
            )
        if back is not None and back.guided:
            raise ValueError("a backward control cannot be guided by the target; give backward: plain.")
        for part in scheme.learn:
            if part != "noise" and not scheme.annealed:
                raise ValueError(f"learn: {part} is for annealed diffusions; the reversal of a process has its own.")
        zeros = torch.zeros(dim)
        self.log_noise = nn.Parameter(zeros.clone()) if "noise" in scheme.learn else None
        prior = "prior" in scheme.learn
        self.prior_loc = nn.Parameter(zeros.clone()) if prior else None
        self.prior_log_scale = nn.Parameter(zeros.clone()) if prior else None
        self.level_logits = nn.Parameter(torch.zeros(_LEVEL_KNOTS)) if "levels" in scheme.learn else None
        self.register_buffer("log_z", torch.tensor(math.nan, dtype=torch.float64))  # of trajectory balance
        self._chains: dict[tuple[int, torch.dtype, torch.device], Chain] = {}

    # -- tables --------------------------------------------------------------------------------------------------------

    @property
    def learns_kernels(self) -> bool:
        """Whether more is learned than controls."""
        return isinstance(self.process, LearnedProcess) or bool(self.scheme.learn)

    def base_chain(self, steps: int | None = None) -> Chain:
        """The table in float64, with gradients to a learned process."""
        s = self.scheme
        if s.annealed:
            return langevin(s.process, s.grid, steps or s.steps)
        return reversal(s.process, s.grid, steps or s.steps, s.integrator, s.gain)

    def tables(self, like: Tensor, steps: int | None = None) -> Tables:
        """Everything that depends on time and parameters alone, for states like a tensor.

        Args:
            like: of the dtype and device of the states.
            steps: K, where it is not the scheme's: one control serves every number of steps.
        """
        key = (steps or self.scheme.steps, like.dtype, like.device)
        if self.process is not None:
            chain = self.base_chain(steps).to(like.dtype, like.device)
        else:
            if key not in self._chains:
                self._chains[key] = self.base_chain(steps).to(like.dtype, like.device)
            chain = self._chains[key]
        beta = cut = None
        if self.scheme.annealed:
            beta = self._beta(1 - chain.label)
            most = chain.forward.gain.abs().amax(-1)
            cut = torch.cat([most, most[-1:]]).reciprocal()
        noise = None if self.log_noise is None else self.log_noise.exp().to(like)
        back = () if self.backward_control is None else self.backward_control.times(chain)
        unit = (1 - chain.unknown).clamp(min=1e-12).rsqrt()[:, None, None]
        return Tables(chain, noise, beta, cut, unit, self._dtype, self.control.times(chain), back)

    def _beta(self, u: Tensor) -> Tensor:
        if self.level_logits is None:
            return u
        knots = nn.functional.pad(self.level_logits.softmax(0).cumsum(0), (1, 0)).to(u)
        place = u * _LEVEL_KNOTS
        low = place.detach().floor().long().clamp(0, _LEVEL_KNOTS - 1)
        return torch.lerp(knots[low], knots[low + 1], place - low)

    # -- the prior -----------------------------------------------------------------------------------------------------

    def start(self, tables: Tables, n: int, generator: torch.Generator) -> Tensor:
        """z_0 (C, n, d)."""
        chain = tables.chain
        z = chain.start(_noise(chain, chain.channels, n, self.dim, generator))
        if tables.noise is not None:
            z = torch.cat([z[:1], z[1:] * tables.noise]) if self.scheme.annealed else z * tables.noise
        if self.prior_loc is not None and self.prior_log_scale is not None:
            x = self.prior_loc.to(z) + self.prior_log_scale.exp().to(z) * z[0]
            z = torch.cat([x.unsqueeze(0), z[1:]])
        return z

    def log_start(self, tables: Tables, z: Tensor) -> Tensor:
        """log density of z_0, (batch,)."""
        chain, shift = tables.chain, torch.zeros((), dtype=z.dtype, device=z.device)
        if self.prior_loc is not None and self.prior_log_scale is not None:
            scale = self.prior_log_scale.to(z)
            z = torch.cat([((z[0] - self.prior_loc.to(z)) * (-scale).exp()).unsqueeze(0), z[1:]])
            shift = shift - scale.sum()
        if tables.noise is not None and not chain.pinned:
            aux = z[1:] / tables.noise
            z = torch.cat([z[:1], aux]) if self.scheme.annealed else z / tables.noise
            shift = shift - (len(aux) if self.scheme.annealed else len(z)) * tables.noise.log().sum()
        return chain.log_start(z) + shift

    def finish(self, tables: Tables, x: Tensor, generator: torch.Generator) -> Tensor:
        """z_K (C, n, d) with data x (n, d)."""
        chain = tables.chain
        z = chain.finish(x, _noise(chain, chain.channels - 1, len(x), self.dim, generator))
        return z if tables.noise is None else torch.cat([z[:1], z[1:] * tables.noise])

    def log_finish(self, tables: Tables, z: Tensor) -> Tensor:
        """log density of the auxiliaries of z_K, (batch,)."""
        if tables.noise is None:
            return tables.chain.log_finish(z)
        z = torch.cat([z[:1], z[1:] / tables.noise])
        return tables.chain.log_finish(z) - (len(z) - 1) * tables.noise.log().sum()

    # -- controls ------------------------------------------------------------------------------------------------------

    @property
    def guided(self) -> bool:
        """Whether the target's gradient is needed along the path."""
        return self.scheme.annealed or self.control.guided

    def look(self, tables: Tables, at: slice, z: Tensor) -> Tensor:
        """Where the target is asked, at states z (steps, C, batch, d): (steps, batch, d)."""
        if self.scheme.annealed:
            return z[:, 0]
        look = tables.chain.look[at]
        if tables.chain.channels == 1:
            return look.unsqueeze(-1) * z.squeeze(-3)
        return contract(look.unsqueeze(-2), z).squeeze(-3)

    def _view(self, tables: Tables, at: slice, z: Tensor, value: Tensor | None, score: Tensor | None) -> View:
        y = self.look(tables, at, z)
        guide = log_g = None
        if self.scheme.annealed:
            inputs = z.movedim(-3, -2).flatten(-2)
        else:
            if tables.noise is not None:  # in units of the noise everything is as without
                y, z = y / tables.noise, z / tables.noise
                score = None if score is None else score * tables.noise
            if score is not None:
                guide = score + y
            if value is not None and self.control.valued:
                log_g = value + 0.5 * y.square().sum(-1)
            inputs = y * tables.unit[at] if self.inputs == "mean" else z.movedim(-3, -2).flatten(-2)
        return View(at, inputs.to(tables.narrow), y, guide, log_g)

    @property
    def _dtype(self) -> torch.dtype:
        """What networks compute in."""
        return next((p.dtype for p in self.control.parameters()), torch.float64)

    def forward_control(
        self, tables: Tables, at: slice, z: Tensor, value: Tensor | None, score: Tensor | None
    ) -> Tensor:
        """a of the forward kernels at states z (steps, C, batch, d) of times ``at``: (steps, batch, d)."""
        a = self.control(self._view(tables, at, z, value, score), _at(tables.forward, at)).to(z)
        if self.scheme.annealed:
            return self._force(tables, at, z, score) + a
        return a if tables.noise is None else a / tables.noise  # a displaces by L L' a: the field's unit is 1 / noise

    def backward_control_at(self, tables: Tables, at: slice, z: Tensor, score: Tensor | None) -> Tensor | None:
        """v of the backward kernels that leave states z at times ``at``; None if there is none."""
        if self.scheme.annealed:
            value = None if score is None else score[..., 0]
            learned = self.control(self._view(tables, at, z, value, score), _at(tables.forward, at)).to(z)
            return self._force(tables, at, z, score) - learned
        if self.backward_control is None:
            return None
        inputs = z if tables.noise is None else z / tables.noise
        view = View(at, inputs.movedim(-3, -2).flatten(-2).to(tables.narrow), z[:, 0])
        v = self.backward_control(view, _at(tables.backward, at)).to(z)
        return v if tables.noise is None else v / tables.noise

    def _force(self, tables: Tables, at: slice, z: Tensor, score: Tensor | None) -> Tensor:
        """grad log of gamma^beta nu^(1 - beta) on the data channel, cut where a step would leave the prior's range."""
        assert tables.beta is not None
        assert tables.cut is not None
        assert score is not None
        beta, cut = (part[at][:, None, None] for part in (tables.beta, tables.cut))
        x = z[:, 0]
        if self.prior_loc is not None and self.prior_log_scale is not None:
            x = (x - self.prior_loc.to(x)) * (-2 * self.prior_log_scale.to(x)).exp()
        return torch.clamp(beta * score - (1 - beta) * x, -cut, cut)

    # -- weights -------------------------------------------------------------------------------------------------------

    def log_kernels(
        self, tables: Tables, at: slice, paths: Paths, control: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """log F_k and log B_k of the steps ``at`` of paths, each (steps, batch); differentiable in all that is learned.

        Args:
            tables: see :meth:`tables`.
            at: steps.
            paths: at least the states and answers of the times that these steps join.
            control: the forward control, where it is known already.
        """
        z = paths.z[at.start : at.stop + 1]
        value = None if paths.value is None else paths.value[at]
        score = None if paths.score is None else paths.score[at]
        if control is None:
            control = self.forward_control(tables, at, z[:-1], value, score)
        later = slice(at.start + 1, at.stop + 1)
        back = self.backward_control_at(tables, later, z[1:], None if paths.score is None else paths.score[later])
        return self.log_steps(tables, at, z, control, back)

    def log_steps(
        self, tables: Tables, at: slice, z: Tensor, control: Tensor, back: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """log F and log B of the steps between states z (steps + 1, C, batch, d) under given controls."""
        chain, shift = tables.chain, None
        if tables.noise is not None:  # in units of the noise everything is as without
            z = z / tables.noise
            control = control * tables.noise
            back = None if back is None else back * tables.noise
            shift = chain.channels * tables.noise.log().sum()
        forth, home = chain.log_forward(at, z, control), chain.log_backward(at, z, back)
        if shift is not None:
            forth, home = forth - shift, home - shift
            if chain.pinned and at.start == 0:
                home = torch.cat([home[:1] + shift, home[1:]])
        return forth, home

    def log_weights(self, tables: Tables, paths: Paths, chunk: int | None = None) -> Tensor:
        """log w of paths, (batch,), in float64; without a graph unless one is asked for by the caller's grad mode."""
        total = self.log_ends(tables, paths).double()
        steps = tables.chain.steps
        for first in range(0, steps, chunk or steps):
            at = slice(first, min(first + (chunk or steps), steps))
            walked = paths.control
            usable = walked is not None and (walked.requires_grad or not torch.is_grad_enabled())
            known = walked[at] if walked is not None and usable else None
            forth, home = self.log_kernels(tables, at, paths, known)
            total = total + (home.double() - forth.double()).sum(0)
        return total

    def log_ends(self, tables: Tables, paths: Paths) -> Tensor:
        """What the two ends of a path contribute to its log weight, (batch,)."""
        return paths.log_target - self.log_start(tables, paths.z[0]) + self.log_finish(tables, paths.z[-1])

    # -- walking -------------------------------------------------------------------------------------------------------

    def ask(self, target: Target, tables: Tables, k: int, z: Tensor) -> tuple[Tensor, Tensor] | None:
        """log gamma (batch,) and its gradient (batch, d) where the control looks at z (C, batch, d) at time k."""
        if not self.guided:
            return None
        return clean(target, self.look(tables, slice(k, k + 1), z.unsqueeze(0))[0], z.requires_grad)

    def walk(
        self,
        target: Target,
        tables: Tables,
        z: Tensor,
        generator: torch.Generator,
        *,
        spread: float = 1.0,
        end_score: bool = False,
        graph: bool = False,
    ) -> Paths:
        """Walk forwards from z_0 (C, batch, d).

        Args:
            target: in the coordinates of the chain.
            tables: see :meth:`tables`.
            z: starts.
            generator: of the noise.
            spread: factor of the noise; above 1 the paths explore, and are no longer the diffusion's own.
            end_score: whether the target's gradient is wanted at the ends.
            graph: keep the graph of the whole walk, through the target's gradients too.
        """
        chain = tables.chain
        walked, answers, controls = [z], [], []
        # Noise for the whole walk at once: as much as its states.
        noises = torch.empty(chain.steps, *z.shape, dtype=z.dtype, device=z.device).normal_(generator=generator)
        row = None if graph or chain.channels > 1 or tables.noise is not None else _scalars(chain)
        with torch.set_grad_enabled(graph):
            for k in range(chain.steps):
                answer = self.ask(target, tables, k, z)
                at = slice(k, k + 1)
                value, score = (None, None) if answer is None else (part.unsqueeze(0) for part in answer)
                a = self.forward_control(tables, at, z.unsqueeze(0), value, score)[0]
                if row is None:
                    z = self.step(tables, k, z, a, noises[k], spread)
                else:
                    mean, gain, root = row[k]
                    z = torch.add(mean * z, a, alpha=gain).add_(noises[k], alpha=spread * root)
                walked.append(z)
                controls.append(a)
                answers.append(answer)
            end = self.end(target, z, end_score or self.scheme.annealed)
        return _paths(walked, answers, end, torch.stack(controls))

    def step(self, tables: Tables, k: int, z: Tensor, a: Tensor, noise: Tensor, spread: float = 1.0) -> Tensor:
        """z_{k+1} from z_k (C, batch, d), the control and standard normal noise."""
        f = tables.chain.forward
        if tables.noise is not None:
            noise, a = noise * tables.noise, a * tables.noise.square()
        if tables.chain.channels == 1:
            return f.mean[k] * z + (f.gain[k] * a + spread * f.root[k] * noise)
        return (
            torch.cat([f.mean[k], f.gain[k].unsqueeze(-1), spread * f.root[k]], -1)
            .matmul(torch.cat([z, a.unsqueeze(0), noise]).flatten(1))
            .unflatten(-1, a.shape)
        )

    def walk_back(self, target: Target, tables: Tables, x: Tensor, generator: torch.Generator) -> Paths:
        """Walk backwards from points x (batch, d) with the backward kernels, without a graph."""
        chain, b = tables.chain, tables.chain.backward
        with torch.no_grad():
            z = self.finish(tables, x, generator)
            end = self.end(target, z, self.scheme.annealed)
            walked, answers = [z], []
            score = end[1]
            for k in range(chain.steps - 1, -1, -1):
                later = slice(k + 1, k + 2)
                v = self.backward_control_at(
                    tables, later, z.unsqueeze(0), None if score is None else score.unsqueeze(0)
                )
                noise = _noise(chain, chain.channels, z.shape[1], self.dim, generator)
                if tables.noise is not None:
                    noise = noise * tables.noise
                    v = None if v is None else v * tables.noise.square()
                moved = contract(b.mean[k], z) + contract(b.root[k], noise)
                if v is not None:
                    moved = moved + b.gain[k][:, None, None] * v
                z = torch.zeros_like(z) if chain.pinned and k == 0 else moved
                answer = self.ask(target, tables, k, z)
                score = None if answer is None or not self.scheme.annealed else answer[1]
                walked.append(z)
                answers.append(answer)
        return _paths(walked[::-1], answers[::-1], end, None)

    def end(self, target: Target, z: Tensor, with_score: bool) -> tuple[Tensor, Tensor | None]:
        """log gamma at the data channel of z_K (C, batch, d), and its gradient where it is wanted."""
        if with_score or z.requires_grad:
            return clean(target, z[0], z.requires_grad)
        value = target.log_prob(z[0])
        return value.masked_fill(value.isnan() | (value == math.inf), -math.inf), None

    # -- twisting ------------------------------------------------------------------------------------------------------

    def log_twist(self, tables: Tables, k: int, z: Tensor, value: Tensor, score: Tensor | None) -> Tensor:
        r"""log density, up to a constant, that walkers should have at time k, z (C, batch, d): (batch,).

        For an annealed diffusion the level of its path; for a reversal the reference's law times the learned potential,
        or times a cautious power of :math:`g_0(y)`.

        Args:
            tables: see :meth:`tables`.
            k: time.
            z: states.
            value, score: the target's answer at z; see :meth:`ask`.
        """
        if self.scheme.annealed:
            assert tables.beta is not None
            start, beta = self.log_start(tables, z), tables.beta[k]
            aux = self.log_finish(tables, z)
            return beta * value + (1 - beta) * (start - aux) + aux
        at = slice(k, k + 1)
        view = self._view(tables, at, z.unsqueeze(0), value.unsqueeze(0), None if score is None else score.unsqueeze(0))
        if isinstance(self.control, PotentialField):
            log_g = self.control.potential(view, _at(tables.forward, at))[0][0]
        else:
            trust = (1 - tables.chain.unknown[k]) ** self.scheme.caution
            log_g = trust * (value + 0.5 * view.y[0].square().sum(-1))
        scaled = z if tables.noise is None else z / tables.noise
        return tables.chain.log_law(k, scaled) + log_g.to(z)


def _differentiable(process: LinearProcess) -> bool:
    """Whether a process has parameters, its clock's included."""
    with torch.enable_grad():
        return any(part.requires_grad for part in process.kernel(as_f64([process.horizon])))


def _at(times: tuple[Tensor, ...], at: slice) -> tuple[Tensor, ...]:
    return tuple(part[at] for part in times)


def _scalars(chain: Chain) -> list[tuple[float, float, float]]:
    """Mean, gain and root of each forward step of a chain of one channel: numbers are cheaper than tensors."""
    f = chain.forward
    return list(zip(*(part.detach().flatten().tolist() for part in f), strict=True))


def _noise(chain: Chain, channels: int, n: int, d: int, generator: torch.Generator) -> Tensor:
    like = chain.prior
    return torch.empty(channels, n, d, dtype=like.dtype, device=like.device).normal_(generator=generator)


def clean(target: Target, x: Tensor, graph: bool = False) -> tuple[Tensor, Tensor]:
    """log gamma and its gradient at x; where the target has no number to give, -inf and 0."""
    value, score = target.differentiable(x) if graph else target.log_prob_and_score(x)
    if not math.isfinite(float(value.detach().sum() + score.detach().sum())):  # a sum is cheaper than a test of each
        bad = value.isnan() | (value == math.inf) | ~torch.isfinite(score).all(-1)
        value = value.masked_fill(bad, -math.inf)
        score = score.masked_fill((value == -math.inf).unsqueeze(-1), 0.0)
    return value, score


def _paths(
    walked: list[Tensor],
    answers: list[tuple[Tensor, Tensor] | None],
    end: tuple[Tensor, Tensor | None],
    control: Tensor | None,
) -> Paths:
    known = [answer for answer in answers if answer is not None]
    value = score = None
    if known:
        last = (end[0], torch.zeros_like(known[0][1]) if end[1] is None else end[1])
        value, score = (torch.stack(parts) for parts in zip(*known, last, strict=True))
    return Paths(torch.stack(walked), value, score, end[0], end[1], control)
