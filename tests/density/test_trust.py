"""Warnings: each from draws made for it, and none for draws that deserve none."""

from __future__ import annotations

import math

import pytest
import torch

from undrift.density import Draws
from undrift.density.targets import Gaussian, Grid16, TwoModes
from undrift.density.trust import mode_shares, verdict, warnings

R, M = 8, 500


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weighted(log_w=None, **changed) -> Draws:
    """Exact draws of a Gaussian in the plane with nearly even weights, whose mean is 1 up to their noise."""
    log_w = 0.1 * normal(R, M, seed=1) - 0.005 if log_w is None else log_w
    z = log_w.logsumexp(-1) - math.log(log_w.shape[1])
    settings = {
        "target": Gaussian(),
        "states": normal(*log_w.shape, 1, 2),
        "walker_log_weights": log_w,
        "corrected": True,
        "repeat_log_z": z,
        "promise": "unbiased",
        "method": "SMC (Geometric path, MALA)",
        "acceptance": 0.57,
    }
    return Draws(**{**settings, **changed})


def chains(states=None, **changed) -> Draws:
    """Exact, independent draws as 16 chains of 200 states."""
    settings = {
        "target": Gaussian(),
        "states": normal(4, 4, 200, 2) if states is None else states,
        "walker_log_weights": None,
        "corrected": True,
        "method": "MCMC (Direct path, HMC)",
        "acceptance": 0.8,
    }
    return Draws(**{**settings, **changed})


def of_modes(counts: torch.Tensor, target: TwoModes | Grid16, **changed) -> Draws:
    """Unweighted draws at the centres of modes: counts (repeats, modes), equal in sum."""
    modes = target.modes
    x = torch.stack([modes.repeat_interleave(row, 0) for row in counts])
    return Draws(target=target, states=x.unsqueeze(2), walker_log_weights=None, corrected=False, **changed)


def only(draws: Draws, words: str) -> str:
    """The one warning, which must hold these words."""
    found = warnings(draws)
    assert len(found) == 1, found
    assert words in found[0]
    return found[0]


@pytest.mark.parametrize("clean", [weighted(), chains()], ids=["weights", "chains"])
def test_clean_runs_have_no_warning(clean):
    assert warnings(clean) == []
    assert verdict(clean, []) == "nothing in the run speaks against these draws"


def test_notes_of_the_run_come_through():
    assert only(weighted(notes=("The ladder has a gap.",)), "The ladder has a gap.")


# -- no correction -----------------------------------------------------------------------------------------------------


def uncorrected(relative, **changed) -> Draws:
    return weighted(walker_log_weights=None, corrected=False, repeat_log_z=None, promise=None, acceptance=None,
                    relative_step=relative, method="Langevin (Direct path, ULA)", **changed)  # fmt: skip


def test_draws_without_correction_say_so_whatever_else_is_right():
    assert "neither weights of modes nor tails" in only(uncorrected(0.4), "Nothing corrects")
    assert verdict(uncorrected(0.4), []).startswith("for exploration only")


def test_heat_is_said_in_units_of_the_deviation():
    """On a well of curvature L a step eps leaves the variance 1 / (1 - eps L / 2) of it: 2 for eps L = 1."""
    _, heat = warnings(uncorrected(1.0))
    assert f"{math.sqrt(2):.2f} times too wide" in heat


def test_steps_beyond_stability_are_named_and_those_at_the_end_apart():
    """Two levels of dilation: eps 20 and 0.3 times its own, so eps L = 40 at most is 0.6 at the last level."""
    rows = [{"step": s, "exponent": 1.0, "base_curvature": 0.0} for s in (20.0, 0.3)]
    _, heat = warnings(uncorrected(40.0, levels=rows))
    assert "eps L = 40, 0.6 at the last level" in heat
    assert "overshoot" in heat


def test_the_curvature_behind_the_relative_step_is_recovered_with_a_base_law():
    """L = 3, geometric: eps L_u = .5 (.2 * 3 + .8 * 1) = .7 and .3 (1 * 3) = .9."""
    keys = ("step", "exponent", "base_curvature")
    rows = [dict(zip(keys, row, strict=True)) for row in ((0.5, 0.2, 0.8), (0.3, 1.0, 0.0))]
    assert "eps L = 0.9, 0.9 at the last level" in warnings(uncorrected(0.9, levels=rows))[1]
    rows[1]["step"] = 0.1
    assert "eps L = 0.7, 0.3 at the last level" in warnings(uncorrected(0.7, levels=rows))[1]


# -- few draws ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kept", "words"), [(15, "120 effective draws of 4000 (3.0%)"), (30, None)])
def test_few_effective_draws(kept, words):
    """``kept`` of 500 walkers share all the weight, so that a repeat is worth as many draws."""
    log_w = torch.full((R, M), -math.inf, dtype=torch.float64)
    log_w[:, :kept] = 0.0
    draws = weighted(log_w, target=Gaussian(log_z=math.log(kept / M)))
    assert warnings(draws) == [] if words is None else only(draws, words)


def test_a_single_walker_that_carries_the_estimate():
    log_w = torch.zeros(R, M, dtype=torch.float64)
    log_w[3, 7] = math.log(R * M / 4)
    found = warnings(weighted(log_w, target=Gaussian(log_z=0.2)))
    assert any(w.startswith("One walker carries 20% of the weight") for w in found), found


def test_chains_that_sit_apart_and_chains_too_short_to_tell():
    apart = normal(4, 4, 200, 2)
    apart[::2, ..., 0] += 3
    found = warnings(chains(apart))
    assert "1 of 2 parameters" in found[0]
    assert "(x[0])" in found[0]
    assert "independent draws of 3200" in found[1]
    assert "16 chains kept 1 state" in only(chains(normal(4, 4, 1, 2)), "neither R-hat nor")


# -- evidence ----------------------------------------------------------------------------------------------------------


def test_repeats_that_disagree():
    log_w = torch.linspace(-1, 1, R, dtype=torch.float64).unsqueeze(-1).expand(R, M)
    assert "differ by a factor of" in only(weighted(log_w, target=Gaussian(log_z=0.1)), "deviation of 0.7")


def test_repeats_that_disagree_more_than_their_weights_suggest():
    """Even weights within a repeat promise a deviation of 0; a conditional ESS of .8 over M walkers, sqrt(.25 / M)."""
    log_w = torch.linspace(-0.2, 0.2, R, dtype=torch.float64).unsqueeze(-1).expand(R, M)
    levels = [{"cess": None}, {"cess": 0.8}]
    assert f"not {math.sqrt(0.25 / M):.2g}" in only(weighted(log_w, levels=levels), "as much as their weights suggest")
    enough = [{"cess": None}, *40 * [{"cess": 0.8}]]
    assert warnings(weighted(log_w, levels=enough)) == []


def test_a_known_evidence_that_is_missed():
    assert "the target's is 0.5" in only(weighted(target=Gaussian(log_z=0.5)), "standard errors away")


def test_one_repeat_has_no_standard_errors():
    assert only(weighted(0.1 * normal(1, M, seed=1) - 0.005), "There was one repeat")


def test_estimates_that_are_only_consistent():
    assert only(weighted(promise="consistent"), "consistent, not unbiased")
    assert warnings(chains(repeat_log_z=0.01 * normal(4), promise="consistent")) == [], "chains never promise more"


@pytest.mark.parametrize(("rate", "words"), [(0.1, "refused"), (0.995, "hardly move")])
def test_acceptance_out_of_range(rate, words):
    assert words in only(weighted(acceptance=rate), "of the proposals were accepted")
    assert warnings(weighted(acceptance=rate, method="SMC (Geometric path, Independence)")) == []


# -- modes -------------------------------------------------------------------------------------------------------------


def test_shares_of_modes_and_their_errors():
    counts = torch.tensor([[40, 360], [60, 340], [20, 380], [40, 360]])
    shares = mode_shares(of_modes(counts, TwoModes()))
    assert torch.allclose(shares.share, torch.tensor([0.1, 0.9], dtype=torch.float64))
    assert torch.allclose(shares.by_repeat[:, 0], torch.tensor([0.1, 0.15, 0.05, 0.1], dtype=torch.float64))
    # The mean of 4 numbers of variance 2 * .05^2 / 3 has the standard error sqrt(that / 4).
    assert torch.allclose(shares.std_error, torch.full((2,), math.sqrt(2 * 0.05**2 / 12), dtype=torch.float64))
    # Binomial variance .09 / 400; the sum of squares 2 * .05^2 over 3 degrees of freedom.
    assert shares.overdispersion == pytest.approx(math.sqrt(2 * 0.05**2 / 3 / (0.09 / 400)))
    assert mode_shares(weighted(target=Gaussian(dim=2))).overdispersion != 0


def test_repeats_that_fell_into_different_modes():
    calm = torch.tensor([[40, 360], [45, 355], [35, 365], [40, 360]])
    wild = torch.tensor([[80, 320], [0, 400], [70, 330], [10, 390]])
    assert not any("between repeats" in w for w in warnings(of_modes(calm, TwoModes())))
    assert any("Weights of modes differ between repeats" in w for w in warnings(of_modes(wild, TwoModes())))


def test_multinomial_repeats_are_not_over_dispersed():
    """chi^2 over its degrees of freedom, 7 * 15, is 1 to within four times sqrt(2 / 105)."""
    target = Grid16()
    generator = torch.Generator().manual_seed(0)
    mode = torch.multinomial(target.mode_weights.expand(R, -1), 1000, replacement=True, generator=generator)
    counts = torch.stack([torch.bincount(m, minlength=16) for m in mode])
    ratio = mode_shares(of_modes(counts, target)).overdispersion ** 2
    assert abs(ratio - 1) < 4 * math.sqrt(2 / (7 * 15))


def test_lost_modes_are_counted_with_the_evidence_they_cost():
    """The four inner modes of the grid hold a quarter of the mass: log(1/4) = -1.39."""
    target = Grid16()
    inner = target.modes.abs().amax(-1) < 10
    assert float(target.mode_weights[inner].sum()) == pytest.approx(0.25)
    counts = (inner.long() * 100).expand(4, -1)
    found = [w for w in warnings(of_modes(counts, target)) if "known modes" in w]
    assert len(found) == 1
    assert "12 of the 16 known modes, with 75.0% of the mass" in found[0]
    assert "= -1.39 short" in found[0]


def test_weights_of_modes_that_are_wrong_in_all_repeats():
    counts = torch.tensor([[200, 200], [205, 195], [195, 205], [200, 200]])
    drawn = of_modes(counts, TwoModes())
    fair = {**vars(drawn), "corrected": True, "walker_log_weights": torch.zeros(4, 400, dtype=torch.float64)}
    found = warnings(Draws(**fair))
    assert any("off by 0.4 in total variation" in w for w in found), found
