"""When draws should not be trusted, in sentences: what was seen, why it matters, what to do next.

Everything here follows from the numbers of a run, its repeats above all, and from what is known of the target. No
warning is no proof: a mode that no walker has found leaves no trace in any of these numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from undrift.density.draws import Draws
from undrift.density.trust_learned import elbo_excess, impossible, known_log_z, shortfall, training, unseen
from undrift.measure.evidence import effective_sample_size, total_variation

__all__ = ["ModeShares", "mode_shares", "verdict", "warnings"]

HEATED = 0.5
"""eps L from which Euler's error is named: a well's deviation comes out 1 / sqrt(1 - eps L / 2), 15 % too wide."""
UNSTABLE = 2.0
"""eps L at which an Euler step on a quadratic well diverges."""
FEW = 100
"""Effective draws below which a mean is known worse than to a tenth of a deviation."""
SHARE = 0.05
"""Effective share of weighted draws below which the start law misses the target more than it meets it."""
HEAVY = 0.1
"""Weight of one walker above which it moves any estimate by more than ten of its equals."""
SPREAD = 0.5
"""Deviation of log Z over repeats above which single estimates of Z differ by more than a factor e."""
DISAGREEMENT = 3.0
"""Ratio of that deviation to what the weights suggest. Clean runs stay near 1, and below 2.5 when moves mix slowly."""
ACCEPTANCE = (0.15, 0.98)
"""Acceptance outside of which a gradient-based step is wasted: refused, or far too short."""
RHAT = 1.01
"""Vehtari et al., Rank-normalization, folding, and localization, 2021."""
OVERDISPERSION = 2.0
"""Ratio of deviations, between repeats' mode weights and multinomial ones; chance does not reach it for 8 repeats."""
MISS = 3.0
"""Standard errors by which a known log Z may be missed."""
UNDEFINED = 1e-3
"""Share of points without a number above which it is no longer a stray proposal that overflowed."""
LOST = 0.1
"""A mode is lost if it holds less than this share of its true weight..."""
EXPECTED = 10.0
"""...while this many effective draws of it were to be expected."""


class ModeShares(NamedTuple):
    """Weights of a target's modes, as drawn and as they are.

    Attributes:
        share: of the draws' weight, (modes,).
        std_error: from repeats, (modes,); NaN for one repeat.
        truth: (modes,).
        by_repeat: (repeats, modes).
        size: effective draws of each repeat, (repeats,): Kish's number for weights, the walkers otherwise.
    """

    share: Tensor
    std_error: Tensor
    truth: Tensor
    by_repeat: Tensor
    size: Tensor

    @property
    def overdispersion(self) -> float:
        """Deviation of weights between repeats over that of independent draws; NaN where nothing can vary."""
        seen = self.share > 0
        freedom = (len(self.by_repeat) - 1) * (int(seen.sum()) - 1)
        if freedom < 1:
            return math.nan
        gap = (self.by_repeat - self.share)[:, seen].square() / self.share[seen]
        return math.sqrt(float((self.size.unsqueeze(-1) * gap).sum()) / freedom)


def mode_shares(draws: Draws) -> ModeShares | None:
    """Weights of modes; None for targets that do not say where their modes are and what they weigh."""
    truth, assign = getattr(draws.target, "mode_weights", None), getattr(draws.target, "assign", None)
    if truth is None or assign is None:
        return None
    repeats, walkers, length, _ = draws.states.shape
    count = len(truth)
    weights = draws.weights.cpu()
    cell = assign(draws.x).cpu() + count * torch.arange(repeats).repeat_interleave(walkers * length)
    total = torch.zeros(repeats * count, dtype=torch.float64).index_add_(0, cell, weights).reshape(repeats, count)
    of_repeat = total.sum(1, keepdim=True)
    share = total.sum(0) / of_repeat.sum()
    if repeats > 1:
        error = ((total - of_repeat * share).square().sum(0) * repeats / (repeats - 1)).sqrt() / of_repeat.sum()
    else:
        error = torch.full_like(share, math.nan)
    size = torch.full((repeats,), float(walkers), dtype=torch.float64)
    if draws.walker_log_weights is not None:
        size = effective_sample_size(draws.walker_log_weights.double()).cpu()
    return ModeShares(share, error, truth.double().cpu(), total / of_repeat.clamp(min=1e-300), size)


def warnings(draws: Draws) -> list[str]:
    """Reasons not to trust the draws, the weightiest first; empty if the numbers hold none."""
    shares = mode_shares(draws)
    found = [*_correction(draws), *impossible(draws), *_undefined(draws)]
    few = [*_weights(draws), *_chains(draws)]
    missing = [] if few or (shares is not None and bool(_lost(shares).any())) else [*unseen(draws)]
    short = [] if few or missing else [*shortfall(draws)]
    explained = bool(missing) or elbo_excess(draws) > 0
    found += [*few, *short, *training(draws), *_modes(draws, shares), *missing, *_evidence(draws, explained)]
    return [*found, *_acceptance(draws), *_repeats(draws), *draws.notes]


def verdict(draws: Draws, found: list[str]) -> str:
    """The warnings in half a sentence."""
    if not draws.corrected:
        return "for exploration only: no correction makes these draws of the target"
    if not found:
        return "nothing in the run speaks against these draws"
    return "read the warning first" if len(found) == 1 else f"read the {len(found)} warnings first"


# -- what a method does not promise ------------------------------------------------------------------------------------


def _correction(draws: Draws) -> Iterator[str]:
    if draws.corrected:
        return
    yield (
        f"Nothing corrects the draws of {draws.method or 'this method'}: they are not of the target even in the limit "
        "of many walkers, so that neither weights of modes nor tails can be trusted, and there is no estimate of Z. "
        "Use them to see where the mass may lie, and take the numbers from a corrected method (SMC, parallel "
        "tempering, MCMC)."
    )
    r = draws.relative_step
    if r is None or r <= HEATED:
        return
    at_the_end = _last_relative_step(draws)
    end = "" if at_the_end is None else f", {at_the_end:.2g} at the last level"
    if r >= UNSTABLE:
        yield (
            f"Steps reach eps L = {r:.3g}{end}: from 2 on, Euler's steps overshoot the stiffest wells and throw "
            "walkers apart. In early levels that is how this method explores; it also means that what it finds is "
            "weighted by accident. Shorten the step (step.relative) to see what changes."
        )
    else:
        yield (
            f"Steps reach eps L = {r:.3g}{end}: Euler's error heats the walkers, and deviations along the stiffest "
            f"directions come out up to {1 / math.sqrt(1 - r / 2):.2f} times too wide. Shorten the step "
            "(step.relative), or take an exact move (MALA, HMC)."
        )


def _last_relative_step(draws: Draws) -> float | None:
    """eps L at the last level, with the L under which the largest over levels is what the draws say."""
    keys = ("step", "exponent", "base_curvature")
    rows = [tuple(float(row[k]) for k in keys) for row in draws.levels if all(row.get(k) is not None for k in keys)]
    rows = [row for row in rows if row[0] > 0 and row[1] > 0]
    if not rows or draws.relative_step is None:
        return None
    curved = min((draws.relative_step / step - base) / exponent for step, exponent, base in rows)
    step, exponent, base = rows[-1]
    return step * (exponent * curved + base)


# -- too few draws -----------------------------------------------------------------------------------------------------


def _weights(draws: Draws) -> Iterator[str]:
    if draws.walker_log_weights is None:
        return
    log_w = draws.walker_log_weights.double().reshape(-1)
    count, ess = len(log_w), float(effective_sample_size(log_w))
    if ess < FEW or ess < SHARE * count:
        yield (
            f"The weights leave {ess:.0f} effective draws of {count} ({ess / count:.1%}): a mean is known to "
            f"{1 / math.sqrt(max(ess, 1.0)):.0%} of a deviation at best, and tails rest on a handful of walkers. "
            f"{_nearer(draws)}"
        )
    top = float(log_w.softmax(0).max())
    if top > HEAVY:
        yield (
            f"One walker carries {top:.0%} of the weight: every estimate is mostly that one point, and a region that "
            "only it has reached is as good as unseen. "
            f"{'Longer training' if _learned(draws) else 'More levels or moves'}, or a wider base, share it out."
        )


def _learned(draws: Draws) -> bool:
    return draws.bounds is not None or len(draws.training) > 0


def _nearer(draws: Draws) -> str:
    """What to do about uneven weights."""
    if not _learned(draws):
        return (
            "Draw more, or bring the start nearer to the target: coordinates (loc, scale), a wider base, more levels."
        )
    gap = ""
    if draws.bounds is not None and draws.log_z is not None:
        gap = f" (ELBO lies {draws.log_z - draws.bounds.elbo:.3g} nats below log Z)"
    return (
        f"The sampler has not been trained long enough{gap}, or it cannot do better: train longer, take more steps or "
        "a larger network, give coordinates (loc, scale), or let the annealing loop resample and move the walkers."
    )


def _chains(draws: Draws) -> Iterator[str]:
    if draws.walker_log_weights is not None or not draws.corrected:
        return
    repeats, walkers, length, _ = draws.states.shape
    if draws.rhat is None:
        yield (
            f"Each of {repeats * walkers} chains kept {length} state{'' if length == 1 else 's'}: from fewer than 4, "
            "neither R-hat nor an effective number of draws can be found, and whether the chains have forgotten their "
            "start is unknown. Keep more states (keep)."
        )
        return
    if bool(torch.isnan(draws.rhat).all()):  # single ones may be constant by their constraint
        yield (
            f"All {repeats * walkers * length} states of the chains are the same: no proposal was ever accepted. "
            "Shorten the step (step.relative), or start elsewhere (loc, scale)."
        )
        return
    r = torch.nan_to_num(draws.rhat.double(), nan=0.0)
    if float(r.max()) > RHAT:
        above = int((r > RHAT).sum())
        many = f"{above} of {len(r)} parameters, at most" if len(r) > 1 else "the parameter,"
        yield (
            f"R-hat exceeds {RHAT} for {many} {float(r.max()):.3g} ({draws.target.labels[int(r.argmax())]}), over "
            f"{repeats * walkers} chains of {length} states: no chain alone has seen the whole target. Either they sit "
            "in different modes, and weights of modes are those of the start, or they are short for their memory. Run "
            "them longer (moves, keep, thin); if R-hat stays, take SMC or parallel tempering."
        )
    ess = draws.ess
    if ess is not None and ess < FEW:
        yield (
            f"The chains are worth {ess:.0f} independent draws of {repeats * walkers * length}: a mean is known to "
            f"{1 / math.sqrt(max(ess, 1.0)):.0%} of a deviation. Run them longer (keep, thin), or give coordinates "
            "(loc, scale) in which the target is rounder."
        )


def _undefined(draws: Draws) -> Iterator[str]:
    count, asked = draws.evaluations.undefined, draws.evaluations.total
    if count > UNDEFINED * asked:
        yield (
            f"The target gave no number at {count} of the {asked} points it was asked about; walkers were not let "
            "there. If these points belong to the support, the draws lack them: look for overflow, 0/0 and "
            "logs of rounding."
        )


# -- modes -------------------------------------------------------------------------------------------------------------


def _lost(shares: ModeShares) -> Tensor:
    """Which modes hold next to nothing, though they would have been seen, (modes,)."""
    return (shares.share < LOST * shares.truth) & (float(shares.size.sum()) * shares.truth >= EXPECTED)


def _modes(draws: Draws, shares: ModeShares | None) -> Iterator[str]:
    if shares is None:
        return
    excess = shares.overdispersion
    if excess > OVERDISPERSION:
        yield (
            f"Weights of modes differ between repeats {excess:.1f} times as much as independent draws would: walkers "
            "stay in the mode that they, or the few ancestors they share, fell into first. Trust the weights only to "
            "their standard errors over repeats; more walkers, levels or moves help."
        )
    size, lost = float(shares.size.sum()), _lost(shares)
    if bool(lost.any()):
        mass = float(shares.truth[lost].sum())
        deficit = math.log1p(-mass) if mass < 1 else -math.inf
        seen = ""
        if draws.log_z is not None and draws.target.log_z is not None:
            seen = f"; {draws.log_z - draws.target.log_z:+.3g} was found"
        yield (
            f"{int(lost.sum())} of the {len(lost)} known modes, with {mass:.1%} of the mass, hold less than a tenth "
            f"of their weight: the draws are of the others, whose log Z is log({1 - mass:.3g}) = {deficit:.3g} "
            f"short{seen}. "
            "Start from a law that covers all modes (path.base.std, or scale)."
        )
    elif draws.corrected and draws.states.shape[0] > 1:
        distance = total_variation(shares.share, shares.truth)
        noise = 0.5 * float(shares.std_error.sum())
        if distance > MISS * noise and distance > 0.5 * math.sqrt(len(lost) / size):
            yield (
                f"Weights of modes are off by {distance:.3g} in total variation, {distance / max(noise, 1e-300):.1f} "
                "times their spread over repeats: all repeats are wrong in the same way, as when none mixes between "
                "modes. Take a path with a wider base, or more levels."
            )


# -- evidence ----------------------------------------------------------------------------------------------------------


def _expected_spread(draws: Draws) -> float | None:
    """Deviation of a repeat's log Z if walkers mixed perfectly: from each level's conditional ESS, or the final ESS."""
    if draws.walker_log_weights is None:
        return None
    log_w = draws.walker_log_weights.double()
    walkers = log_w.shape[-1]
    last = float(effective_sample_size(log_w).clamp(min=1.0).reciprocal().mean()) - 1 / walkers
    jumps = [float(row["cess"]) for row in draws.levels if row.get("cess")]
    return math.sqrt(max(last, sum(1 / c - 1 for c in jumps) / walkers, 0.0))


def _evidence(draws: Draws, explained: bool) -> Iterator[str]:
    """What repeats say of log Z, and how the known one was missed, unless that is explained already."""
    z = draws.repeat_log_z
    if z is None:
        return
    if len(z) > 1:
        spread, expected = float(z.double().std()), _expected_spread(draws)
        if not spread <= SPREAD:
            yield (
                f"Repeats disagree on log Z, with a deviation of {spread:.2g}: single estimates of Z differ by a "
                f"factor of {math.exp(min(spread, 700.0)):.2g}, their mean is made by the largest few, and its error "
                "is itself uncertain. More walkers, levels or moves, or a start nearer to the target, bring them "
                "together."
            )
        elif expected is not None and spread > DISAGREEMENT * expected and spread > 1e-6:
            yield (
                f"Repeats disagree on log Z {spread / max(expected, 1e-12):.1f} times as much as their weights suggest "
                f"(a deviation of {spread:.2g}, not {expected:.2g}): the moves do not bring walkers to equilibrium at "
                "each level, and a part of the target may be missing from all repeats. Take more moves, more levels, "
                "or coordinates."
            )
    truth, error = known_log_z(draws), draws.log_z_std_error
    if truth is not None and error is not None and not explained:
        miss, error = float(draws.log_z) - truth[0], math.hypot(error, truth[1])  # type: ignore[arg-type]
        if not abs(miss) <= MISS * error + 1e-9:
            yield (
                f"log Z came out as {draws.log_z:.5g} ± {error:.2g}; the target's is {truth[0]:.5g}, "
                f"{abs(miss) / max(error, 1e-300):.1f} standard errors away: all repeats miss the same mass. The "
                "start law does not cover the target, or the moves do not follow the path."
            )
    if draws.promise == "consistent" and draws.walker_log_weights is not None:
        yield (
            "The estimate of Z is consistent, not unbiased: levels or steps were chosen by the walkers that estimate "
            "Z, which shifts it by an amount that vanishes with many walkers and that repeats do not show. Let a pilot "
            "run choose them (pilot: true), or compare with a run of more walkers."
        )


# -- moves and repeats -------------------------------------------------------------------------------------------------


def _acceptance(draws: Draws) -> Iterator[str]:
    low, high = ACCEPTANCE
    rate = draws.acceptance
    if rate is None or not any(move in draws.method for move in ("MALA", "HMC")) or low <= rate <= high:
        return
    if rate < low:
        yield (
            f"{rate:.1%} of the proposals were accepted at the last level: most gradients are spent on moves that are "
            "refused, and walkers stay where the path left them. Shorten the step (step.relative), or let it adapt "
            "(step: null)."
        )
    else:
        yield (
            f"{rate:.1%} of the proposals were accepted at the last level: steps are far shorter than they could be, "
            "and walkers hardly move. Lengthen the step (step.relative), or let it adapt (step: null)."
        )


def _repeats(draws: Draws) -> Iterator[str]:
    if draws.states.shape[0] < 2:
        yield (
            "There was one repeat: no standard error is known, neither of means nor of log Z, and a run that went "
            "wrong looks like one that went right. Take 8 (repeats); they run in one batch and cost nothing more."
        )
