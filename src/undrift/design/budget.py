r"""Where a sampler's error comes from: start, discretisation, score, and what it all comes to.

A budget has two halves, and they answer different questions.

*Path KL* is the divergence between whole walks (:mod:`undrift.design.path`): exact, additive, and defined for any data
that has an mmse curve. It bounds the KL of the last state from above, as a rule by far, and it reaches as far as the
last noise level; the noise-free call after it has no path KL that is finite.

*The last state's* KL and W2 are exact on Gaussian data. They do not add up, so their sources are found by switching
them off (:mod:`undrift.design.attribution`). Both are always shown, because they rank schedules differently.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from undrift._linalg import as_f64
from undrift.design.attribution import Switched, attribute
from undrift.design.bounds import PathBounds, path_bounds
from undrift.design.curves import DataModel
from undrift.design.gaussian import Law, propagate, trajectory
from undrift.design.loss import LossCurve
from undrift.design.path import Held, PathSteps, chain_kl, held_by, is_chain, path_steps, start_kl
from undrift.design.score_error import Noise, ScoreError
from undrift.design.spectrum import Spectrum
from undrift.process.linear import LinearProcess
from undrift.sample.plan import TableSampler

__all__ = ["Budget", "Marginal", "PathBudget", "budget"]

Error = ScoreError | LossCurve | Callable[[Tensor], Tensor] | float


@dataclass(frozen=True, eq=False)
class PathBudget:
    """The path KL, term by term, in nats.

    Attributes:
        steps: the grid's coefficients.
        start: E_I.
        discretisation: E_D of each step, (M,).
        score: E_S of each step, (M,); a measured loss below the data's mmse makes it negative.
        fixed: the part of the sum that depends on the ends of the grid but not on the steps between.
        bounds: on the first two.
    """

    steps: PathSteps
    start: float
    discretisation: Tensor
    score: Tensor
    fixed: float
    bounds: PathBounds

    @property
    def kl(self) -> float:
        """E_I + E_D + E_S."""
        return self.start + float((self.discretisation + self.score).sum())

    @property
    def share(self) -> Tensor:
        """Of each step in the path KL, (M,); what is missing to 1 is the start."""
        return (self.discretisation + self.score) / self.kl


@dataclass(frozen=True, eq=False)
class Marginal:
    """The last state on Gaussian data.

    Attributes:
        last: law at the last noise level, beside the exact one there.
        final: law after the final call, if there is one, beside the data.
        truncation: W2 from the data to z's data channel at the last noise level, exact.
        finish: W2 from the data to the final call's answer on that exact z, if there is one.
    """

    last: Law
    final: Law | None
    truncation: float
    finish: float | None

    @property
    def samples(self) -> Law:
        """What the sampler returns."""
        return self.last if self.final is None else self.final


@dataclass(frozen=True, eq=False)
class Budget:
    """See :func:`budget`.

    Attributes:
        title: process, sampler, grid and data, in words.
        times, sigma: the grid, (M + 1,).
        path: the path KL, or None for samplers that hold neither prediction nor score.
        chain: for those, on Gaussian data, the KL between Markov chains on the grid: of the start and of each step,
            (M + 1,), infinite for deterministic steps; None where the sampler is no Markov chain there.
        marginal: the last state, or None for data that is not a spectrum.
        attribution: the same with sources switched off.
    """

    title: str
    times: Tensor
    sigma: Tensor
    path: PathBudget | None
    chain: Tensor | None
    marginal: Marginal | None
    attribution: tuple[Switched, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists."""
        out: dict[str, Any] = {"title": self.title, "times": self.times.tolist(), "sigma": self.sigma.tolist()}
        if self.path is not None:
            p = self.path
            out["path"] = {
                "held": p.steps.held,
                "kl": p.kl,
                "start": p.start,
                "discretisation": p.discretisation.tolist(),
                "score": p.score.tolist(),
                "fixed": p.fixed,
                "bounds": dataclasses.asdict(p.bounds),
            }
        if self.chain is not None:
            out["chain"] = self.chain.tolist()
        if self.marginal is not None:
            m = self.marginal
            out["marginal"] = {
                "last": _numbers(m.last),
                "final": None if m.final is None else _numbers(m.final),
                "truncation": m.truncation,
                "finish": m.finish,
            }
            out["attribution"] = {s.name: {"on": list(s.on), "kl": s.kl, "w2": s.w2} for s in self.attribution}
        return out

    def table(self) -> str:
        """The budget as text."""
        lines = [self.title, ""]
        last = float(self.sigma[-1])
        if self.path is not None:
            p = self.path
            made, wrong = float(p.discretisation.sum()), float(p.score.sum())
            lines += [
                f"path KL to sigma = {last:.3g}: {p.kl:.5g} nats, the {p.steps.held} held over each step",
                f"  start           {p.start:10.4g}   (at most {p.bounds.start:.4g})",
                f"  discretisation  {made:10.4g}   (at most {p.bounds.mmse:.4g}; from d and E|x0|^2 alone, "
                f"{p.bounds.moments:.4g})",
                f"  score           {wrong:10.4g}",
                "",
                f"  {'sigma':>10}  {'to':>10}  {'discret.':>10}  {'score':>10}  share",
            ]
            for i in range(len(self.sigma) - 1):
                row = (self.sigma[i], self.sigma[i + 1], p.discretisation[i], p.score[i])
                lines.append("".join(f"  {float(v):>10.4g}" for v in row) + f"  {float(p.share[i]):>5.1%}")
            lines.append("")
        elif self.chain is not None:
            lines += [f"KL of the Markov chain to sigma = {last:.3g}: {float(self.chain.sum()):.5g} nats", ""]
        if self.marginal is not None:
            m = self.marginal
            rows = [(f"at sigma = {last:.3g}", m.last)] + (
                [] if m.final is None else [("after the final call", m.final)]
            )
            lines += [f"{'last state':<22}  {'KL':>10}  {'W2':>10}"]
            lines += [f"  {name:<20}  {float(law.kl):>10.4g}  {float(law.w2):>10.4g}" for name, law in rows]
            lines += [f"  {'truncation':<20}  {'':>10}  {m.truncation:>10.4g}"]
            if m.finish is not None:
                lines += [f"  {'its final call':<20}  {'':>10}  {m.finish:>10.4g}"]
        if self.attribution:
            lines += ["", f"{'sources on':<22}  {'KL':>10}  {'W2':>10}"]
            lines += [f"  {s.name:<20}  {s.kl:>10.4g}  {s.w2:>10.4g}" for s in self.attribution]
        return "\n".join(lines).rstrip()

    def __str__(self) -> str:
        return self.table()


def _numbers(law: Law) -> dict[str, Any]:
    return {
        "kl": float(law.kl),
        "w2": float(law.w2),
        "kl_modes": law.kl_modes.tolist(),
        "w2_modes": law.w2_modes.tolist(),
    }


def budget(
    process: LinearProcess,
    sampler: TableSampler,
    data: DataModel,
    error: Error | None = None,
    *,
    times: Tensor | None = None,
    attribution: bool = True,
    refine: int = 64,
) -> Budget:
    r"""Where the error of a sampler comes from.

    The path KL is there for samplers that hold the prediction (:class:`~undrift.sample.Ancestral` with the posterior's
    variance, :class:`~undrift.sample.Exponential` of order 1 and stochasticity 1) or the score (Ancestral with
    the forward variance), on any linear process and any data. The last state's law is there for any sampler, on a
    :class:`Spectrum`. Samplers that hold something else have a chain KL on a spectrum, where they are chains at all.

    A score error given as a squared error, :math:`e^2(\sigma) = E|\hat D - D|^2` summed over coordinates, is all that
    the path needs. The last state needs its law, and takes it for fresh noise at each call (:class:`Noise`, of which
    the path KL counts each draw as known; see :func:`~undrift.design.path.chain_kl`). On the refined grids of the
    attribution that noise is held over each original interval: its variance per call grows by ``refine``, or it would
    average out.

    Args:
        process: any linear process.
        sampler: any that is a table.
        data: a spectrum, or any other data model for the path KL alone.
        error: of the denoiser: None; a model of it on a spectrum; its squared error as a function of sigma, or one
            number; or a measured loss, whose squared error is what it has over the data's mmse.
        times: the grid; None for the sampler's.
        attribution: switch sources off, one by one and all but one; needs a spectrum.
        refine: steps that each interval is cut into where the discretisation is switched off.

    Raises:
        ValueError: if the sampler does not apply to the process, or a model of the error is given without a spectrum.
    """
    if refine < 2:
        raise ValueError(f"budget: refine must be at least 2, got {refine}.")
    spectrum = data if isinstance(data, Spectrum) else None
    if isinstance(error, ScoreError) and spectrum is None:
        raise ValueError(
            f"budget: {type(error).__name__} acts on the eigenvalues of a Spectrum, and the data is {data!r}; give its "
            "squared error as a function of sigma instead."
        )
    with torch.no_grad():
        if times is None:
            times = (sampler.grid or sampler.default_grid(process)).times(process, sampler.nodes)
        plan = sampler.table(process, as_f64(times))
        times = as_f64(times)
        sigma = process.sigma(times)
        excess, model = _error(error, data)
        held, path, chain = held_by(sampler), None, None
        if held is not None and len(times) > 1:
            path = _path(process, times, held, data, excess)
        elif held is None and spectrum is not None and is_chain(plan):
            chain = chain_kl(plan, spectrum, model)[: len(times)]
        marginal: Marginal | None = None
        switched: tuple[Switched, ...] = ()
        if spectrum is not None:
            laws = trajectory(plan, spectrum, model)
            marginal = _marginal(process, sampler, times, spectrum, laws)
            if attribution:
                switched = attribute(process, sampler, times, spectrum, model, refine)
    span = f"{len(times)} levels from sigma = {float(sigma[0]):.4g} to {float(sigma[-1]):.3g}"
    title = f"{type(sampler).__name__} on {type(process).__name__}, {plan.calls} calls, {span}; {data!r}"
    return Budget(title, times, sigma, path, chain, marginal, switched)


def _error(error: Error | None, data: DataModel) -> tuple[Callable[[Tensor], Tensor], ScoreError | None]:
    """E|D^ - D|^2 as a function of sigma, and a model of the error on spectra."""
    if error is None:
        return torch.zeros_like, None
    if isinstance(error, ScoreError):
        assert isinstance(data, Spectrum)
        model, spectrum = error, data
        return lambda sigma: model.excess(spectrum, sigma), model
    if isinstance(error, LossCurve):
        profile = error.excess(data)
    elif callable(error):
        profile = error
    else:
        level = float(error)
        if not level >= 0:
            raise ValueError(f"budget: a squared error must not be negative, got {level}.")

        def profile(sigma: Tensor) -> Tensor:
            return torch.full_like(sigma, level)

    return profile, Noise(profile)


def _path(
    process: LinearProcess, times: Tensor, held: Held, data: DataModel, excess: Callable[[Tensor], Tensor]
) -> PathBudget:
    steps = path_steps(process, times, held)
    start = float(start_kl(process, times[0], data))
    known = float(data.information(steps.sigma[-1:], steps.sigma[:1]).sum())
    return PathBudget(
        steps,
        start,
        steps.discretisation(data),
        steps.score(as_f64(excess(steps.sigma[:-1]))),
        start + 0.5 * (data.dim * float(steps.gathered.sum()) - known),
        path_bounds(process, steps, data),
    )


def _marginal(
    process: LinearProcess, sampler: TableSampler, times: Tensor, spectrum: Spectrum, laws: list[Law]
) -> Marginal:
    if sampler.final == "none":
        last, final, finish = laws[-1], None, None
    else:
        last, final = laws[-2:]
        one = dataclasses.replace(sampler, steps=1, grid=None).table(process, times[-1:])
        finish = float(propagate(one, spectrum, start="exact").w2)
    p, q = spectrum.variance, last.exact_cov[:, 0, 0]
    square = (p.sqrt() - q.sqrt()).square() + (spectrum._mean - last.exact_mean[:, 0]).square()
    return Marginal(last, final, math.sqrt(float((spectrum._count * square).sum())), finish)
