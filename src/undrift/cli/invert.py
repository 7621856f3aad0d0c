"""undrift invert: from an observation of a function to its posterior."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from undrift._journal import Journal
from undrift.cli.arguments import to_yaml
from undrift.cli.calibrating import calibration_of
from undrift.cli.common import Clock, check_applies, diffusion_of, finish, open_checkpoint
from undrift.cli.given import pick, read_array, read_event, seen
from undrift.cli.inverted import record_of
from undrift.cli.posteriors import by_chains, by_particles, kept_draws, prior_draws, started
from undrift.cli.potentials import potential_of, try_potential
from undrift.cli.resuming import begin_or_resume, interruptible
from undrift.cli.rules import Twisting
from undrift.cli.sample import say
from undrift.config import ConfigError
from undrift.diffusion import Diffusion
from undrift.inverse import (
    TRUSTED,
    Annealing,
    DenoiserPrior,
    FieldMixture,
    LangevinMoves,
    PCNMoves,
    Posterior,
    Scheme,
    StepTooLarge,
)
from undrift.observe import CorrelatedNoise, Darcy1d, GaussianNoise, Noise, Observation, Operator
from undrift.process import VP, LinearProcess
from undrift.report import text_table, write_bytes, write_report
from undrift.report.inverse import quantities_table
from undrift.sample import Ancestral, TableSampler
from undrift.space import FunctionSpace, Matern
from undrift.train import DataSource

__all__ = ["InvertRun"]

_STATE = "state.safetensors"
_STATE_DRAWS = "state-draws.safetensors"  # of a learned prior, from which tempering begins
_STATE_CALIBRATION = "state-calibration.safetensors"
_STATES = (_STATE, _STATE_DRAWS, _STATE_CALIBRATION)
_FILES = ("posterior.npz", "posterior.json", "report.html")
_GRIDS = {1: 64, 2: 32, 3: 16}
_CHAINS = ("pcn", "langevin")


@dataclass(frozen=True, eq=False)
class InvertRun:
    """Draw from the posterior of a function that was observed: a prior, an operator, noise and data.

    Args:
        run: folder of a training run on functions (undrift train --space data), whose law is the prior.
        prior: in place of a run, a FunctionSpace for the Gaussian field of its noise, or a FieldMixture; null for a
            Matern field of alpha 2, kappa 3 and variance 4 on the interval.
        grid: points along each axis; null for those of a run's data, or 64 in one dimension and 32 in two.
        observe: what was observed, an operator.
        noise: law of the data around that.
        data: npz file (y) of what was observed; null to simulate them from a truth.
        truth: npz file (x) of the truth, where it is known; null, without data, for one drawn from the prior.
        simulate: index of a point of the source, as the truth.
        source: where that truth comes from; null for the data that the run was trained on.
        method: pcn, Metropolised chains, exact for a prior with a known density (the default of one); twisted,
            particles along the reverse diffusion (the default of a run, where noise is Gaussian); tempered, particles
            from prior to posterior; langevin, unadjusted chains.
        steps: of each chain, warm-up included; null for 4000.
        chains: how many.
        informed: give chains moves of the posterior's shape at its mode, by Gauss-Newton, and not of the prior's.
        beta: size of pcn's proposals at the start; warm-up steers it to accept 30 %.
        step: of langevin; null for half of what the curvature of the posterior allows. A larger one is refused.
        scheme: of langevin, crank-nicolson or euler.
        annealing: of langevin, the prior's times and weights along the run.
        trust: largest product of step and curvature that langevin is run with.
        moves: of tempering: PCNMoves, or for a run LangevinMoves.
        particles: of a run of particles.
        runs: independent runs of particles.
        process: of twisted sampling; null for the run's own, or VP.
        sampler: of twisted sampling, and of the draws of a run's prior.
        potential: what twisted sampling is twisted by; null for moments, for linearised where the
            operator is not linear, or for dps where the noise is not Gaussian.
        strength: of the guidance that proposes particles; the posterior does not depend on it.
        calibrate: for how many truths of the prior to solve the problem again, and to rank each among the draws of its
            posterior.
        seed: of everything random.
        draws: how many to keep at most.
        out: folder of the results.
        resume: go on with the interrupted run in the folder; its settings must be the same.
        overwrite: replace the results in the folder.
        progress: show a bar.
    """

    run: str | None = None
    prior: FunctionSpace | FieldMixture | None = None
    grid: tuple[int, ...] | None = None
    observe: Operator = field(default_factory=lambda: Darcy1d(tuple(i / 8 for i in range(1, 8))))
    noise: Noise = field(default_factory=lambda: GaussianNoise(0.05))
    data: str | None = None
    truth: str | None = None
    simulate: int | None = None
    source: DataSource | None = None
    method: Literal["pcn", "langevin", "tempered", "twisted"] | None = None
    steps: int | None = None
    chains: int = 16
    informed: bool = True
    beta: float = 0.25
    step: float | None = None
    scheme: Scheme = "crank-nicolson"
    annealing: Annealing = field(default_factory=Annealing)
    trust: float = TRUSTED
    moves: PCNMoves | LangevinMoves | None = None
    particles: int = 1024
    runs: int = 2
    process: LinearProcess | None = None
    sampler: TableSampler = field(default_factory=lambda: Ancestral(steps=50))
    potential: Twisting | None = None
    strength: float = 1.0
    calibrate: int = 0
    seed: int = 0
    draws: int = 1000
    out: str = "runs/invert"
    resume: bool = False
    overwrite: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        gaussian = isinstance(self.noise, GaussianNoise | CorrelatedNoise)
        method = self.method or ("pcn" if self.run is None else "twisted" if gaussian else "langevin")
        default = InvertRun.__dataclass_fields__
        for wrong, message in (
            (self.run is not None and self.prior is not None, "prior: a run is the prior; give one of the two."),
            (
                self.run is not None and method == "pcn",
                "method: pcn accepts by the prior's density, and a network has none; take twisted, langevin or "
                "tempered.",
            ),
            (
                self.run is not None and method == "tempered" and not isinstance(self.moves, LangevinMoves),
                "moves: tempering a run needs moves by its slope, --moves LangevinMoves --moves.step 0.01; or take "
                "--method twisted.",
            ),
            (self.moves is not None and method != "tempered", "moves: are those of --method tempered."),
            (self.step is not None and method != "langevin", "step: is that of --method langevin."),
            (self.potential is not None and method != "twisted", "potential: belongs to --method twisted."),
            (self.steps is not None and method not in _CHAINS, f"steps: {method} has no chains; give particles."),
            (self.simulate is not None and self.truth is not None, "truth: give either truth or simulate."),
            (self.simulate is not None and self.data is not None, "data: are simulated; give either data or simulate."),
            (
                self.source is not None and self.simulate is None,
                "source: is where --simulate INDEX takes its truth from.",
            ),
            (
                self.simulate is not None and self.run is None and self.source is None,
                "source: without a run, say where the truth comes from.",
            ),
            (
                self.calibrate < 0 or 0 < self.calibrate < 20,
                f"calibrate: expected 0, or 20 truths or more, got {self.calibrate}.",
            ),
            (
                self.grid is not None and min(self.grid, default=0) < 2,
                f"grid: expected 2 points an axis or more, got {self.grid}.",
            ),
            (not 0 < self.beta <= 1, f"beta: must lie in (0, 1], got {self.beta}."),
            (
                self.step is not None and not 0 < self.step < math.inf,
                f"step: must be positive and finite, got {self.step}.",
            ),
            (self.resume and self.overwrite, "resume: give either resume or overwrite, not both."),
            (not self.trust > 0, f"trust: must be positive, got {self.trust}."),
            (
                method == "langevin" and self.annealing.length(self.steps or 4000) >= (self.steps or 4000),
                "annealing: takes the whole run; give a smaller share, and alpha_end.",
            ),
            (self.strength != 1.0 and method != "twisted", "strength: is that of --method twisted."),
            (self.seed < 0, f"seed: expected 0 or more, got {self.seed}."),
            (self.beta != default["beta"].default and method != "pcn", "beta: is that of --method pcn."),
        ):
            if wrong:
                raise ConfigError(message)
        for name, least in (("chains", 2), ("particles", 2), ("runs", 1), ("draws", 2), ("steps", 20)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name}: expected at least {least}, got {value}.")
        object.__setattr__(self, "method", method)

    def execute(self, command: Sequence[str]) -> int:
        clock, out = Clock(), Path(self.out)
        problem = self.open()
        if self.method == "twisted":
            potential = potential_of(self.potential, problem.observed, 1.0)
            try_potential(potential, problem.diffusion, problem.event, "potential", {})
        begin_or_resume(self, out, _FILES, _STATES, "posterior.json")
        solving = Journal(out / _STATE, keep=True)
        try:
            with interruptible(out, _STATES, command):
                found = self._solve(problem, solving)
                ranking = Journal(out / _STATE_CALIBRATION, keep=True)
                calibration = calibration_of(self, problem, ranking) if self.calibrate else None
        except FloatingPointError:
            _forget(out)  # it would fail again
            raise
        except StepTooLarge as error:
            _forget(out)  # another step is another run
            place, trust = ("moves.step", "moves.trust") if self.method == "tempered" else ("step", "trust")
            others = ["--informed true"] * (self.method == "langevin" and not self.informed)
            others += ["--method pcn"] * (self.run is None)
            raise ConfigError(
                f"{place}: at iteration {error.report.iteration}, {error.report}. Give --{place} {error.advised:.3g} "
                f"or less; or {', '.join([*others, f'--{trust} .inf'])} if a biased run will do."
            ) from error
        record = record_of(self, problem, found, calibration, solving.earlier + ranking.earlier + clock.seconds)
        record.save(out)
        if self.resume:
            write_bytes(out / "config.yaml", to_yaml(replace(self, resume=False)).encode())
        finish(out, command, clock)
        say(record.about)
        if record.about["quantities"]:
            print()
            print(text_table(*quantities_table(record.about["quantities"]), names=1))
            print()
        print(f"draws    {out / 'posterior.npz'}")
        print(f"summary  {out / 'posterior.json'}")
        print(f"report   {write_report(out)}")
        _forget(out)
        return 0

    # -- the problem ---------------------------------------------------------------------------------------------------

    def open(self) -> Problem:
        """Prior, observation and truth.

        Raises:
            ConfigError: for what does not fit, before any work.
        """
        if self.run is None:
            prior: Any = self._field()
            space, diffusion = prior.space, Diffusion(self.process or VP(), prior)
            event = self.grid or (_GRIDS[space.basis.dims],) * space.basis.dims
            if len(event) != space.basis.dims:
                raise ConfigError(f"grid: the prior has {space.basis.dims} axes, got {event}.")
        else:
            checkpoint = open_checkpoint(self.run)
            checkpoint.check_prior("undrift invert", "give the data to undrift sample, whose answer is the posterior")
            opened = diffusion_of(checkpoint, self.process)
            if not isinstance(opened, Diffusion) or not isinstance(opened.space, FunctionSpace):
                raise ConfigError(
                    f"run: {checkpoint.path} is no denoiser of functions, trained with --space; condition samples of "
                    "other models by undrift sample."
                )
            diffusion, space = opened, opened.space
            prior = DenoiserPrior(diffusion.denoiser)
            event = checkpoint.event
            if self.grid is not None:
                dims = space.basis.dims
                if len(self.grid) != dims:
                    raise ConfigError(f"grid: functions of {checkpoint.path} have {dims} axes, got {self.grid}.")
                event = (*event[: len(event) - dims], *self.grid)
        check_applies(self.sampler, diffusion.process, "twisted" if self.method == "twisted" else None)
        y = None if self.data is None else read_array(self.data, "data", ("y", "x", "data")).double()
        truth, of = None, "data of a file"
        if self.truth is not None:
            truth, of = read_event(self.truth, "truth", event).double(), "a truth from a file"
        elif self.simulate is not None:
            truth, of = self._pick(event, space)
        elif y is None:
            drawn = prior_draws(self, Problem(diffusion, prior, None, event, None, ""), 1, self.seed + 1)
            truth, of = space.decode(drawn)[0], "a draw of the prior"
        observation = seen(self.observe, self.noise, event, y, truth, self.seed, torch.float64)
        return Problem(diffusion, prior, observation, event, truth, of)

    def _field(self) -> FieldMixture:
        prior = self.prior
        if isinstance(prior, FieldMixture):
            return prior
        return FieldMixture(prior or FunctionSpace(spectrum=Matern(2.0, 3.0, 4.0)))

    def _pick(self, event: tuple[int, ...], space: FunctionSpace) -> tuple[Tensor, str]:
        assert self.simulate is not None
        if self.run is not None:
            truth, of = pick(self.source, self.simulate, open_checkpoint(self.run))
        else:
            assert self.source is not None
            data = self.source.load()
            if not 0 <= self.simulate < len(data):
                raise ConfigError(f"simulate: {data.name} has points 0 to {len(data) - 1}, got {self.simulate}.")
            truth, of = data.x[self.simulate], f"point {self.simulate} of {data.name}"
        if truth.ndim != len(event):
            raise ConfigError(f"source: points have shape {tuple(truth.shape)}, the unknown {event}.")
        return space.basis.resample(truth.double(), event[len(event) - space.basis.dims :]), of

    # -- its solution --------------------------------------------------------------------------------------------------

    def _solve(self, problem: Problem, journal: Journal) -> Any:
        posterior = problem.posterior
        if self.method == "twisted":
            return by_particles(self, problem, potential_of(self.potential, problem.observed, 1.0), journal)
        if self.method == "tempered":
            place = Path(self.out) / _STATE_DRAWS
            draws = kept_draws(self, problem, self.runs * self.particles, self.seed + 2, place)
            return by_particles(self, problem, draws, journal)
        return by_chains(self, posterior, *started(self, problem, self.chains), journal=journal)


@dataclass(frozen=True, eq=False)
class Problem:
    """A prior and what was seen.

    Attributes:
        diffusion: of the prior.
        prior: for chains and tempering.
        observation: None before there are data.
        event: shape of the unknown.
        truth: values (*event), if it is known.
        of: where it comes from, in words.
    """

    diffusion: Diffusion
    prior: Any
    observation: Observation | None
    event: tuple[int, ...]
    truth: Tensor | None
    of: str

    @property
    def space(self) -> FunctionSpace:
        """Where the unknown lives."""
        assert isinstance(self.diffusion.space, FunctionSpace)
        return self.diffusion.space

    @property
    def observed(self) -> Observation:
        """The observation."""
        assert self.observation is not None
        return self.observation

    @property
    def posterior(self) -> Posterior:
        """Prior and observation."""
        return Posterior(self.prior, self.observed)


def _forget(out: Path) -> None:
    """Nothing is left to resume."""
    for name in _STATES:
        (out / name).unlink(missing_ok=True)
