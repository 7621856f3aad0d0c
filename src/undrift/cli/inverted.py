"""What undrift invert says of the draws of a posterior."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from undrift.cli.conditioned import evidence
from undrift.cli.given import direct, noise_level, sites
from undrift.inverse import (
    Calibration,
    Chains,
    FieldMixture,
    LinearGaussian,
)
from undrift.observe import CorrelatedNoise, GaussianNoise
from undrift.report import PosteriorRecord, accuracy, label, rank_table
from undrift.sample import Particles

if TYPE_CHECKING:
    from undrift.cli.invert import InvertRun, Problem

__all__ = ["mode_names", "modes_of", "record_of"]

_MODES = 8


def modes_of(problem: Problem, x: Tensor) -> Tensor:
    """The coefficients of most variance under the prior's noise, (n, k)."""
    space = problem.space
    grid = space.basis.grid(problem.event)
    order = space.variances(grid).flatten().argsort(descending=True, stable=True)[:_MODES]
    c = space.coefficients(x.double()).reshape(len(x), -1, math.prod(grid))[:, 0]
    return c[:, order]


def mode_names(count: int) -> list[str]:
    return [f"mode {j + 1}" for j in range(count)]


def record_of(
    run: InvertRun,
    problem: Problem,
    found: Chains | Particles,
    calibration: tuple[Calibration, list[str]] | None,
    seconds: float,
) -> PosteriorRecord:
    """What the report shows."""
    space, observation = problem.space, problem.observed
    fields = space.decode(found.x).double()
    generator = torch.Generator().manual_seed(run.seed + 4)
    if isinstance(found, Particles):
        mean = found.expectation(fields)
        std = found.expectation((fields - mean).square()).sqrt()
        draws = space.decode(found.resample(min(run.draws, len(fields)), generator)).double()
        traces: dict[str, Tensor] = {}
        error = found.log_evidence_std_error
        facts = [
            ("particles", f"{len(found.x)}, effective {found.ess:.1f}, of {found.ancestors} starts"),
            ("log p(y)", f"{found.log_evidence:.5g}" + ("" if math.isnan(error) else f" ± {error:.2g}")),
        ]
        numbers = evidence(found)
    else:
        mean, std = fields.mean(0), fields.std(0)
        index = torch.randperm(len(fields), generator=generator)[: run.draws]
        draws = fields[index]
        watched = modes_of(problem, found.x).reshape(*found.states.shape[:2], -1)[..., :3]
        traces = {"log-likelihood": found.log_likelihood.T}
        traces |= {name: watched[..., j].T for j, name in enumerate(mode_names(watched.shape[-1]))}
        facts = [("chains", f"{found.states.shape[0]} of {found.states.shape[1]} kept states; {found.method}")]
        if found.acceptance is not None:
            facts.append(("accepted", f"{100 * float(found.acceptance.mean()):.3g} %"))
        facts += [("step", str(r)) for r in found.reports[-1:]]
        numbers = {
            "acceptance": None if found.acceptance is None else float(found.acceptance.mean()),
            "step": found.step,
            "step_checks": [dataclasses.asdict(r) for r in found.reports],
            "complete": found.complete,
        }
    facts = [
        ("prior", _prior_words(run, problem)),
        ("data", f"{observation.y.numel()}, {label(run.observe)} with {label(run.noise)}, of {problem.of}"),
        ("method", str(run.method)),
        *facts,
        *_closed_form(problem, mean, std),
    ]
    warnings = found.warnings()
    about: dict[str, Any] = {
        "kind": {1: "curve", 2: "field"}.get(space.basis.dims, "vector"),
        "lead": f"{len(draws)} draws of the posterior of a function on {_grid(problem)} points by {run.method}, "
        f"{seconds:.1f} s.",
        "facts": facts,
        "quantities": _quantities(problem, found),
        "direct": direct(run.observe),
        "noise_std": noise_level(run.noise),
        "seconds": round(seconds, 2),
        "seed": run.seed,
        **numbers,
    }
    if problem.truth is not None:
        about["errors"] = accuracy(draws, mean, std, problem.truth)
    if calibration is not None:
        about["calibration"] = rank_table(calibration[0])
        warnings = [*warnings, *calibration[1]]
    about["warnings"] = warnings
    with torch.no_grad():
        predicted = observation.operator(draws[:200])
    return PosteriorRecord(
        draws.float(), mean, std, about, problem.truth, observation.y, predicted, sites(run.observe), None, traces
    )


def _grid(problem: Problem) -> str:
    return " x ".join(str(n) for n in problem.space.basis.grid(problem.event))


def _prior_words(run: InvertRun, problem: Problem) -> str:
    if run.run is not None:
        return f"the law of {run.run}"
    prior = problem.prior
    assert isinstance(prior.means, Tensor)
    what = "Gaussian field" if len(prior.means) == 1 else f"mixture of {len(prior.means)} Gaussian fields"
    spectrum = problem.space.spectrum if prior.spectrum is None else prior.spectrum
    return f"{what}, {label(spectrum)}"


def _closed_form(problem: Problem, mean: Tensor, std: Tensor) -> list[tuple[str, str]]:
    """Beside the exact posterior, where there is one."""
    prior, observation = problem.prior, problem.observed
    if not isinstance(prior, FieldMixture) or not observation.linear or len(torch.as_tensor(prior.means)) > 1:
        return []
    if not isinstance(observation.noise, (GaussianNoise, CorrelatedNoise)) or math.prod(problem.event) > 1024:
        return []
    space, grid = problem.space, problem.event
    assert isinstance(prior.means, Tensor)
    centre = space.basis.fit(prior.means, grid)[0]
    exact = LinearGaussian.of(observation, space, grid, prior.spectrum, centre)
    d = math.prod(grid)
    waves = space.basis.synthesise(torch.eye(d, dtype=torch.float64).reshape(d, *grid)).flatten(1)
    deviation = (waves * (exact.covariance() @ waves)).sum(0).sqrt().reshape(grid)
    gap = (mean - space.basis.synthesise(exact.posterior_mean().reshape(grid))) / deviation
    ratio = float((std / deviation).square().mean().sqrt())
    return [
        (
            "closed form",
            f"mean off by {float(gap.square().mean().sqrt()):.3g} deviations (rms), deviations {ratio:.3g} times the "
            f"exact ones; log p(y) is {exact.log_evidence():.5g}",
        )
    ]


def _quantities(problem: Problem, found: Chains | Particles) -> list[dict[str, Any]]:
    """Scalars of the posterior: the log-likelihood and the largest modes."""
    truth = problem.truth
    modes = modes_of(problem, found.x)
    true: list[float | None] = [None] * (1 + modes.shape[1])
    if truth is not None:
        x = problem.space.encode(truth.double()).unsqueeze(0)
        true = [float(problem.observed.log_likelihood(truth.unsqueeze(0))), *modes_of(problem, x)[0].tolist()]
    names = ["log-likelihood", *mode_names(modes.shape[1])]
    if isinstance(found, Particles):
        with torch.no_grad():
            likelihood = problem.posterior.log_likelihood(found.x)
        values = torch.cat([likelihood.unsqueeze(1), modes], 1)
        mean = found.expectation(values)
        sd = found.expectation((values - mean).square()).sqrt()
        order = values.argsort(0)
        cumulated = found.weights.unsqueeze(1).expand_as(values).gather(0, order).cumsum(0)
        ends = [
            values.gather(0, order)[(cumulated < q).sum(0).clamp(max=len(values) - 1), torch.arange(len(names))]
            for q in (0.05, 0.95)
        ]
        ess: list[float | None] = [found.ess] * len(names)
        rhat: list[float | None] = [None] * len(names)
    else:
        values = torch.cat([found.log_likelihood.reshape(-1, 1), modes], 1)
        mean, sd = values.mean(0), values.std(0)
        ends = list(values.quantile(torch.tensor([0.05, 0.95], dtype=torch.float64), 0))
        ess, rhat = [None] * len(names), [None] * len(names)
        if found.states.shape[1] >= 4:
            watched = {"f": lambda x: torch.cat([found.log_likelihood.reshape(-1, 1), modes_of(problem, x)], 1)}
            ess, rhat = found.ess(**watched).tolist(), found.rhat(**watched).tolist()
    columns = (mean.tolist(), sd.tolist(), ends[0].tolist(), ends[1].tolist(), true, ess, rhat)
    keys = ("mean", "sd", "q5", "q95", "truth", "ess", "rhat")
    return [
        {"name": name, **{k: v if v is not None and math.isfinite(v) else None for k, v in zip(keys, row, strict=True)}}
        for name, row in zip(names, zip(*columns, strict=True), strict=True)
    ]
