"""Chains and particles that are interrupted, and end as if they had not been."""

import dataclasses
import functools
import itertools

import pytest
import torch

from undrift import Diffusion
from undrift._journal import Journal, digest
from undrift.inverse import (
    Annealing,
    FieldMixture,
    LangevinMoves,
    PCNMoves,
    Posterior,
    PosteriorInformed,
    StepTooLarge,
    langevin,
    pcn,
    tempered,
)
from undrift.observe import GaussianNoise, Observation, Points
from undrift.process import PSLD
from undrift.sample import Ancestral, Exponential, twisted
from undrift.space import Cosine, FunctionSpace, Matern

SPACE = FunctionSpace(Cosine(), Matern(2.0, 3.0))
PRIOR = FieldMixture(SPACE, torch.tensor([[0.8, 0.3], [-0.5, 0.1]]), [0.4, 0.6])
Y = torch.tensor([0.3, -0.5], dtype=torch.float64)
PROCESS = PSLD()


class Observed:
    """A likelihood that is interrupted at its n-th call, and then never again."""

    def __init__(self, at=None, error=KeyboardInterrupt, y=Y):
        self.inner = Observation(Points((0.2, 0.7)), GaussianNoise(0.3), y)
        self.at, self.error, self.calls = at, error, 0

    def log_likelihood(self, x):
        self.calls += 1
        if self.calls == self.at:
            raise self.error("the n-th call")
        return self.inner.log_likelihood(x)


def start(n=3, dtype=torch.float64):
    return SPACE.colour(torch.randn(n, 12, generator=torch.Generator().manual_seed(1), dtype=dtype))


INFORMED = PosteriorInformed.at(Posterior(PRIOR, Observed().inner), start(1))
ANNEALING = Annealing(1e-2, 1.0, 0.3, 2.0, 0.2)


def by_langevin(observed, seed, checkpoint=None):
    settings = {"annealing": ANNEALING, "thin": 3, "trust": 9.0, "checks": 1, "checkpoint": checkpoint}
    return langevin(Posterior(PRIOR, observed), start(), 24, 0.01, seed=seed, **settings)


def by_euler(observed, seed, checkpoint=None):
    settings = {"preconditioner": INFORMED, "warmup": 3, "checks": 0, "checkpoint": checkpoint}
    return langevin(Posterior(PRIOR, observed), start(), 17, 0.005, "euler", seed, **settings)


def by_pcn(observed, seed, checkpoint=None):
    return pcn(Posterior(PRIOR, observed), start(), 25, 0.4, seed=seed, warmup=12, target=0.3, checkpoint=checkpoint)


def by_pcnl(observed, seed, checkpoint=None):
    settings = {"reference": INFORMED, "centre": start(1), "thin": 4, "checkpoint": checkpoint}
    return pcn(Posterior(PRIOR, observed), start(), 20, 0.5, "pcnl", seed, **settings)


def by_tempering(observed, seed, checkpoint=None):
    return tempered(Posterior(PRIOR, observed), start(16), PCNMoves(2), seed, runs=2, checkpoint=checkpoint)


def by_tempered_langevin(observed, seed, checkpoint=None):
    return tempered(Posterior(PRIOR, observed), start(12), LangevinMoves(0.01, count=1), seed, checkpoint=checkpoint)


def by_twisting(observed, seed, checkpoint=None):
    def potential(x, sigma, x0):
        return observed.log_likelihood(SPACE.decode(x0))

    settings = {"runs": 2, "checkpoint": checkpoint}
    return twisted(Diffusion(PROCESS, PRIOR), observed, potential, 6, (12,), Ancestral(6), seed, **settings)


def by_multistep_twisting(observed, seed, checkpoint=None):
    def potential(x, sigma, x0):
        return 0.5 * observed.log_likelihood(SPACE.decode(x0))

    sampler, settings = (
        Exponential(9, order=2, stochasticity=1.0, guard=False),
        {"resample": 1.0, "checkpoint": checkpoint},
    )
    return twisted(Diffusion(PROCESS, PRIOR), observed, potential, 8, (12,), sampler, seed, **settings)


CHAINS = [by_langevin, by_euler, by_pcn, by_pcnl]
PARTICLES = [by_tempering, by_tempered_langevin, by_twisting, by_multistep_twisting]
RUNS = [*CHAINS, *PARTICLES]


def same(found, expected):
    assert type(found) is type(expected)
    for name in expected.__dataclass_fields__:
        one, other = getattr(found, name), getattr(expected, name)
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, name


@functools.cache
def whole(run):
    """The result without an interruption, where the generator is then, and how often the likelihood was called."""
    observed, generator = Observed(), torch.Generator().manual_seed(5)
    return run(observed, generator), generator.get_state(), observed.calls


@pytest.mark.parametrize(("run", "error"), [*((r, KeyboardInterrupt) for r in RUNS), (by_pcn, RuntimeError)])
def test_interrupted_again_and_again_it_ends_with_the_same_bits(run, error, tmp_path):
    path, stops = tmp_path / "folder" / "state", 0
    expected, end, calls = whole(run)
    while stops < 9:
        parts = torch.Generator().manual_seed(5)
        try:
            found = run(Observed(calls // 3 + stops, error), parts, path)
            break
        except error:
            stops += 1
    assert stops >= 2
    same(found, expected)
    assert torch.equal(parts.get_state(), end)
    assert not path.exists(), "nothing is left to resume"


@pytest.mark.parametrize("run", RUNS)
def test_what_was_written_on_the_way_is_enough_after_a_kill(run, tmp_path, monkeypatch):
    """No last words: only writes in passing reach the file."""
    path, (expected, _, calls) = tmp_path / "state", whole(run)
    with monkeypatch.context() as patch:
        patch.setattr(Journal.__init__, "__defaults__", ("", 0.0))
        write = Journal.write
        patch.setattr(Journal, "write", lambda self, state, force=False: None if force else write(self, state))
        with pytest.raises(KeyboardInterrupt):
            run(Observed(calls - 1), 5, path)
    resumed = Observed()
    same(run(resumed, 5, path), expected)
    assert resumed.calls < calls, "it did not begin anew"


@pytest.mark.parametrize("run", RUNS)
def test_the_state_of_another_run_is_refused(run, tmp_path):
    path = tmp_path / "state"
    with pytest.raises(KeyboardInterrupt):
        run(Observed(2 * whole(run)[2] // 3), 5, path)
    kept = path.read_bytes()
    for other in (lambda: run(Observed(), 6, path), lambda: run(Observed(y=Y + 1e-4), 5, path)):
        with pytest.raises(ValueError, match=r"belongs to a run with another .* or seed; give the same settings"):
            other()
    with pytest.raises(ValueError, match="belongs to a run with another"):
        RUNS[RUNS.index(run) - 1](Observed(), 5, path)
    assert path.read_bytes() == kept


def test_settings_priors_and_starts_tell_runs_apart(tmp_path):
    path = tmp_path / "state"

    def run(at=None, prior=PRIOR, x=None, **settings):
        settings = {"steps": 20, "step": 0.01, "checks": 0, "checkpoint": path} | settings
        return langevin(Posterior(prior, Observed(at)), start() if x is None else x, **settings)

    with pytest.raises(KeyboardInterrupt):
        run(12)
    other = FieldMixture(SPACE, torch.tensor([[0.8, 0.3], [-0.5, 0.2]]), [0.4, 0.6])
    for changed in (
        {"steps": 21},
        {"step": 0.011},
        {"scheme": "euler"},
        {"annealing": ANNEALING},
        {"preconditioner": INFORMED},
        {"thin": 2},
        {"warmup": 3},
        {"trust": 1.0},
        {"prior": other},
        {"x": start() * 1.0001},
        {"x": start()[:2]},
        {"x": start(dtype=torch.float32)},
    ):
        with pytest.raises(ValueError, match="belongs to a run with another posterior, start, setting or seed"):
            run(**changed)
    assert run().complete


@pytest.mark.parametrize("run", CHAINS)
def test_without_a_checkpoint_an_interruption_gives_what_there_is(run):
    expected, _, calls = whole(run)
    chains = run(Observed(calls - 4), 5)
    length = chains.states.shape[1]
    assert not chains.complete
    assert 0 < length < expected.states.shape[1]
    assert torch.equal(chains.states, expected.states[:, :length])
    with pytest.raises(RuntimeError, match="n-th call"):
        run(Observed(calls - 4, RuntimeError), 5)


def test_a_refused_step_leaves_nothing_to_resume(tmp_path, monkeypatch):
    """At 0 this likelihood is flat, where the chains go it is not: the run is refused when it is under way."""
    monkeypatch.setattr(Journal.__init__, "__defaults__", ("", 0.0))
    path = tmp_path / "state"
    walls = Posterior(FieldMixture(SPACE), lambda x: -5 * x[:, 0] ** 4)
    with pytest.raises(StepTooLarge) as caught:
        langevin(walls, torch.zeros(3, 12, dtype=torch.float64), 9, 0.05, checks=2, trust=0.05, checkpoint=path)
    assert caught.value.report.iteration > 0
    assert not path.exists()


def test_a_journal_that_is_kept_gives_the_result_again(tmp_path):
    path = tmp_path / "state"
    for run in (by_langevin, by_pcnl, by_tempering, by_twisting):
        run(Observed(), 5, Journal(path, keep=True))
        again = Observed()
        same(run(again, 5, Journal(path, keep=True)), whole(run)[0])
        assert again.calls <= 5, "of the likelihood: what the run is known by, and values at its end"
        path.unlink()


def test_writes_become_rarer_as_they_take_longer(tmp_path, monkeypatch):
    """A write of 3 s is followed by none for a minute: what grows with the run takes a twentieth of it at most."""
    now = [0.0]
    monkeypatch.setattr("undrift._journal.time.monotonic", lambda: now[0])
    written = []

    def slow(path, tensors, description):
        now[0] += 3.0 if len(written) else 0.1
        written.append((now[0], description["seconds"]))

    monkeypatch.setattr("undrift._journal.write_file", slow)
    journal = Journal(tmp_path / "state")
    while now[0] < 200:
        journal.write(lambda: ({}, {}))
        now[0] += 1.0
    ends = [end for end, _ in written]
    assert ends[0] == pytest.approx(10.1)
    assert [b - a for a, b in itertools.pairwise(ends)] == pytest.approx([13.0, 63.0, 63.0], abs=1.0)
    assert written[0][1] == pytest.approx(10.0)


def test_a_digest_is_of_values_not_of_rounding_or_addresses():
    x = start()
    base = digest(x=x, f=lambda: 1, annealing=ANNEALING, seed=torch.arange(4, dtype=torch.uint8))
    assert base == digest(x=x * (1 + 1e-15), f=lambda: 2, annealing=ANNEALING, seed=torch.arange(4, dtype=torch.uint8))
    for other in (
        {"x": x * (1 + 1e-4)},
        {"x": x.flip(1)},
        {"x": x.float()},
        {"x": x.flatten()},
        {"annealing": Annealing(1e-2, 1.0, 0.3, 2.0, 0.25)},
        {"seed": torch.tensor([0, 1, 3, 2], dtype=torch.uint8)},
    ):
        settings = {"x": x, "f": lambda: 1, "annealing": ANNEALING, "seed": torch.arange(4, dtype=torch.uint8)}
        assert digest(**settings | other) != base


def test_where_an_object_lies_in_memory_is_no_part_of_a_run():
    """Or no process but the first could go on with it; what else an object prints is one."""

    class Unknown:
        pass

    @dataclasses.dataclass(eq=False)
    class Holds:
        what: Unknown
        size: int = 1

    one, other = Unknown(), Unknown()
    assert repr(one) != repr(other)
    assert digest(move=Holds(one)) == digest(move=Holds(other)) != digest(move=Holds(one, 2))
