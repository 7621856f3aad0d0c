"""How undrift invert draws, and what it says of the draws."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from undrift._journal import Entry, Journal, digest
from undrift.cli.conditioning import evidence, potential_of
from undrift.cli.given import direct, noise_level, sites
from undrift.config import ConfigError
from undrift.inverse import (
    Calibration,
    Chains,
    FieldMixture,
    LinearGaussian,
    Posterior,
    PosteriorInformed,
    Preconditioner,
    PriorCovariance,
    calibrate,
    check_step,
    find_mode,
    langevin,
    pcn,
    tempered,
)
from undrift.observe import CorrelatedNoise, GaussianNoise, Observation
from undrift.report import PosteriorRecord, accuracy, label, rank_table
from undrift.sample import Particles, sample, twisted

if TYPE_CHECKING:
    from undrift.cli.invert import InvertRun, Problem

__all__ = ["by_chains", "by_particles", "calibration_of", "kept_draws", "prior_draws", "record_of", "started"]

_RANKED = 31  # draws of each truth that is ranked
_RANK_CHAINS, _RANK_STEPS = 8, 240  # that make them, if informed
_MODES = 8
_STEPS = 4000  # of a chain
_APART = "prior, setting or seed"
_BESIDE = {"data", "truth", "simulate", "source", "out", "resume", "overwrite", "progress"}  # of no effect on a prior


def prior_draws(run: InvertRun, problem: Problem, n: int, seed: int) -> Tensor:
    """Draws of the prior (n, *event), in the space's coordinates, float64."""
    if isinstance(problem.prior, FieldMixture):
        return problem.prior.sample(n, problem.event, torch.Generator().manual_seed(seed))
    x = sample(problem.diffusion, n, problem.event, run.sampler, seed, batch=256, dtype=torch.float64)
    assert isinstance(x, Tensor)
    return x


def kept_draws(run: InvertRun, problem: Problem, n: int, seed: int, place: Path) -> Tensor:
    """Draws of the prior, which a network takes long to make: kept in a file, if they are not found there."""
    journal = Journal(place, _identity(run, problem, "draws of the prior"), apart=_APART, keep=True)
    found = journal.read()
    if found is not None:
        return found[0]["x"]
    x = prior_draws(run, problem, n, seed)
    if run.run is not None:
        journal.write(lambda: ({"x": x}, {}), force=True)
    return x


def _identity(run: InvertRun, problem: Problem, what: str) -> str:
    """Of what is made from a run's settings and its prior, and not from its data."""
    settings = {f.name: getattr(run, f.name) for f in dataclasses.fields(run) if f.name not in _BESIDE}
    probe = torch.arange(math.prod(problem.event), dtype=torch.float64).cos().reshape(1, *problem.event)
    with torch.no_grad():
        return digest(what=what, slope=problem.prior.slope(problem.space.colour(probe), 0.1), **settings)


def started(run: InvertRun, problem: Problem, n: int) -> tuple[Tensor, Preconditioner, Tensor | None]:
    """First states of chains (n, *event), the shape of their moves, and the centre of pcn's.

    Informed ones begin around the mode: moves of the posterior's shape seldom lead back from where it has no mass, and
    unadjusted chains may meet a curvature there that forbids their step.
    """
    posterior, plain = problem.posterior, PriorCovariance(problem.space)
    if run.method == "pcn" and not run.informed:
        return prior_draws(run, problem, n, run.seed + 2), plain, None
    mode = find_mode(posterior, torch.zeros(1, *problem.event, dtype=torch.float64))
    try:
        informed = PosteriorInformed.at(posterior, mode)
    except ValueError as error:
        raise ConfigError(f"informed: {error}") from error
    generator = torch.Generator().manual_seed(run.seed + 2)
    xi = torch.empty(n, *problem.event, dtype=torch.float64).normal_(generator=generator)
    start = mode + informed.noise(xi)
    return start, informed if run.informed else plain, mode if run.method == "pcn" else None


def by_chains(
    run: InvertRun,
    posterior: Posterior,
    start: Tensor,
    preconditioner: Preconditioner,
    centre: Tensor | None = None,
    keep: int | None = None,
    journal: Journal | None = None,
) -> Chains:
    """Chains from first states (chains, *event), each thinned to ``keep`` states, or so that all make 4 run.draws.

    Raises:
        KeyboardInterrupt: if interrupted; half a run is of no use here.
    """
    chains = _chains(run, posterior, start, preconditioner, centre, keep, journal)
    if not chains.complete:
        raise KeyboardInterrupt
    return chains


def _chains(
    run: InvertRun,
    posterior: Posterior,
    start: Tensor,
    preconditioner: Preconditioner,
    centre: Tensor | None,
    keep: int | None,
    journal: Journal | None,
) -> Chains:
    steps = run.steps or _STEPS
    keep = keep or -(-4 * run.draws // len(start))
    if run.method == "pcn":
        warmup = steps // 3
        return pcn(
            posterior,
            start,
            steps,
            run.beta,
            seed=run.seed + 3,
            reference=preconditioner,
            centre=centre,
            warmup=warmup,
            target=0.3,
            thin=max(1, (steps - warmup) // keep),
            checkpoint=journal,
            progress=run.progress,
        )
    warmup = max(run.annealing.length(steps), steps // 5)
    if warmup >= steps:
        raise ConfigError("annealing: takes the whole run; give a smaller share, and alpha_end.")
    step = allowed(run, posterior, start, preconditioner) if run.step is None else run.step
    return langevin(
        posterior,
        start,
        steps,
        step,
        run.scheme,
        run.seed + 3,
        annealing=run.annealing,
        preconditioner=preconditioner,
        warmup=warmup,
        thin=max(1, (steps - warmup) // keep),
        trust=run.trust,
        checkpoint=journal,
        progress=run.progress,
    )


def allowed(run: InvertRun, posterior: Posterior, start: Tensor, preconditioner: Preconditioner) -> float:
    """Half of the largest step of langevin that the curvature at the start allows, at the ends of the annealing."""
    found = []
    for tau, alpha in {run.annealing.at(0, 100), run.annealing.at(100, 100)}:
        found.append(check_step(posterior, start, tau, preconditioner, 1.0, run.scheme, alpha).stiffness)
    stiffest = max(found)
    if not math.isfinite(stiffest):
        raise ConfigError("step: the curvature of the posterior is not finite at the start; the prior or the data are.")
    return 0.5 * min(run.trust, 2.0) / max(stiffest, 0.5)


def by_particles(run: InvertRun, problem: Problem, given: Any, journal: Journal | None = None) -> Particles:
    """Weighted draws: by a potential for twisted sampling, from draws of the prior for tempering."""
    if run.method == "tempered":
        return tempered(
            problem.posterior,
            given,
            run.moves,
            run.seed + 3,
            runs=run.runs,
            checkpoint=journal,
            progress=run.progress,
        )
    return twisted(
        problem.diffusion,
        problem.observed,
        given,
        run.particles,
        problem.event,
        run.sampler,
        run.seed + 3,
        strength=run.strength,
        runs=run.runs,
        batch=1024,
        dtype=torch.float64,
        checkpoint=journal,
        progress=run.progress,
    )


# -- calibration -------------------------------------------------------------------------------------------------------


def calibration_of(run: InvertRun, problem: Problem, journal: Journal) -> tuple[Calibration, list[str]]:
    """Ranks of truths of the prior among draws of their posteriors; and what speaks against them.

    An interrupted one goes on with the truth that it had reached.
    """
    space, n = problem.space, run.calibrate
    truths = prior_draws(run, problem, n, run.seed + 5)
    generator = torch.Generator().manual_seed(run.seed + 6)
    experiment = Observation.simulate(run.observe, run.noise, space.decode(truths), generator)
    quiet = dataclasses.replace(run, progress=False)
    if run.method in ("pcn", "langevin") and not run.informed:
        # All truths at once, a chain each, from draws of the prior: at its own truth ranks would be uniform at once.
        start = prior_draws(run, problem, n, run.seed + 7)
        posterior = Posterior(problem.prior, experiment)
        chains = by_chains(quiet, posterior, start, PriorCovariance(space), keep=_RANKED, journal=journal)
        values = chains.states[:, -_RANKED:]
    else:
        values = _one_by_one(quiet, problem, experiment, journal, run.progress)
    modes = _modes(problem, values.flatten(0, 1)).reshape(n, values.shape[1], -1)
    found = calibrate(_modes(problem, truths), modes, _names(modes.shape[-1]), run.seed)
    centred = modes - modes.mean(1, keepdim=True)
    lag = (centred[:, 1:] * centred[:, :-1]).sum(1) / centred.square().sum(1).clamp(min=1e-300)
    worst = float(lag.mean(0).max())
    warnings = []
    if worst > 0.3:
        warnings.append(
            f"Draws of the calibration that follow one another are correlated by {worst:.2g}, and ranks are uniform "
            "for independent draws only; p-values are too small. Give more steps, or --informed true."
        )
    return found, warnings


def _one_by_one(run: InvertRun, problem: Problem, experiment: Observation, journal: Journal, progress: bool) -> Tensor:
    """Draws of the posterior of each experiment, (n, L, *event)."""
    journal = Journal.of(journal, lambda: _identity(run, problem, "calibration"), _APART)
    found, n = journal.read(), len(experiment.y)
    each = [] if found is None else list(found[0]["draws"])

    def snapshot() -> Entry:
        known = [*each]
        return lambda: ({"draws": torch.stack(known)}, {})

    safe: Entry | None = None
    try:
        for i in tqdm(range(len(each), n), disable=not progress, desc="calibration", initial=len(each), total=n):
            one = dataclasses.replace(problem, observation=Observation(run.observe, run.noise, experiment.y[i]))
            each.append(_ranked(dataclasses.replace(run, seed=run.seed + 100 * (i + 1)), one))
            safe = snapshot()
            journal.write(safe)
        journal.write(safe, force=True)
    except BaseException:
        journal.write(safe, force=True)
        raise
    return torch.stack(each)


def _ranked(run: InvertRun, problem: Problem) -> Tensor:
    """Nearly independent draws of one posterior, (L, *event), in random order for particles."""
    if run.method == "twisted":
        particles = by_particles(run, problem, potential_of(run.potential, problem.observed, 1.0))
    elif run.method == "tempered":
        particles = by_particles(run, problem, prior_draws(run, problem, run.runs * run.particles, run.seed + 2))
    else:
        short = dataclasses.replace(run, steps=min(run.steps or _STEPS, _RANK_STEPS))
        start = started(short, problem, _RANK_CHAINS)
        keep = -(-(_RANKED + 1) // _RANK_CHAINS)
        return (
            by_chains(short, problem.posterior, *start, keep=keep)
            .states[:, -keep:]
            .transpose(0, 1)
            .flatten(0, 1)[:_RANKED]
        )
    return particles.resample(_RANKED, torch.Generator().manual_seed(run.seed))


def _modes(problem: Problem, x: Tensor) -> Tensor:
    """The coefficients of most variance under the prior's noise, (n, k)."""
    space = problem.space
    grid = space.basis.grid(problem.event)
    order = space.variances(grid).flatten().argsort(descending=True, stable=True)[:_MODES]
    c = space.coefficients(x.double()).reshape(len(x), -1, math.prod(grid))[:, 0]
    return c[:, order]


def _names(count: int) -> list[str]:
    return [f"mode {j + 1}" for j in range(count)]


# -- what is said ------------------------------------------------------------------------------------------------------


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
        watched = _modes(problem, found.x).reshape(*found.states.shape[:2], -1)[..., :3]
        traces = {"log-likelihood": found.log_likelihood.T}
        traces |= {name: watched[..., j].T for j, name in enumerate(_names(watched.shape[-1]))}
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
        "quantities": quantities(problem, found),
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


def quantities(problem: Problem, found: Chains | Particles) -> list[dict[str, Any]]:
    """Scalars of the posterior: the log-likelihood and the largest modes."""
    truth = problem.truth
    modes = _modes(problem, found.x)
    true: list[float | None] = [None] * (1 + modes.shape[1])
    if truth is not None:
        x = problem.space.encode(truth.double()).unsqueeze(0)
        true = [float(problem.observed.log_likelihood(truth.unsqueeze(0))), *_modes(problem, x)[0].tolist()]
    names = ["log-likelihood", *_names(modes.shape[1])]
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
            watched = {"f": lambda x: torch.cat([found.log_likelihood.reshape(-1, 1), _modes(problem, x)], 1)}
            ess, rhat = found.ess(**watched).tolist(), found.rhat(**watched).tolist()
    columns = (mean.tolist(), sd.tolist(), ends[0].tolist(), ends[1].tolist(), true, ess, rhat)
    keys = ("mean", "sd", "q5", "q95", "truth", "ess", "rhat")
    return [
        {"name": name, **{k: v if v is not None and math.isfinite(v) else None for k, v in zip(keys, row, strict=True)}}
        for name, row in zip(names, zip(*columns, strict=True), strict=True)
    ]
