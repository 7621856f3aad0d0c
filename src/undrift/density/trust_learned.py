"""What speaks against the draws of a sampler that was trained: its bounds on log Z, and how its training ended."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from undrift.density.draws import Draws
from undrift.measure.evidence import effective_sample_size

__all__ = ["elbo_excess", "impossible", "known_log_z", "shortfall", "training", "unseen"]

BEYOND = 4.0
"""Standard errors by which a bound may lie on the wrong side of log Z by chance."""
ROUNDED = 1e-3
"""Nats by which sums over many steps may move a bound, and which change no weight by more than a thousandth."""
GAP = 3.0
"""Nats from a bound to log Z above which log weights are not what their effective number suggests: normal ones leave
exp(-2 gap), 5 % at 1.5 and a quarter of a per cent here."""
UNSEEN = 0.25
"""Ratio of the forward ESS to that of the draws, which estimate one number, below which draws miss what weighs."""
LOPSIDED = 4.0
"""Ratio of EUBO - log Z to log Z - ELBO; normal log weights have 1."""
ROWS = 32
"""Rows of training from which a quarter of them can be said to fall."""
CHANCE = 3.0
"""Deviations by which medians of two halves of a level loss may differ."""
NOTHING_TO_GAIN = 0.1
"""Nats from ELBO to log Z below which longer training could add a fifth to the effective draws at most."""


def known_log_z(draws: Draws) -> tuple[float, float] | None:
    """The target's log Z and its standard error, 0 for exact ones; None where it is not known."""
    truth = draws.target.log_z
    if truth is None:
        return None
    return float(truth), float(getattr(draws.target, "log_z_std_error", None) or 0.0)


# -- on the wrong side of log Z ----------------------------------------------------------------------------------------


def elbo_excess(draws: Draws) -> float:
    """Nats by which ELBO lies above the known log Z, where chance cannot have put it there; else 0."""
    truth = known_log_z(draws)
    if draws.bounds is None or truth is None:
        return 0.0
    excess = draws.bounds.elbo - truth[0]
    return excess if excess > BEYOND * math.hypot(draws.bounds.elbo_std_error, truth[1]) + ROUNDED else 0.0


def impossible(draws: Draws) -> Iterator[str]:
    """Bounds that right weights cannot give."""
    bounds = draws.bounds
    if bounds is None:
        return
    rounding = "" if draws.states.dtype == torch.float64 else ", and run once in float64: sums over steps round"
    truth, excess = known_log_z(draws), elbo_excess(draws)
    if truth is not None and excess > 0:
        yield (
            f"ELBO came out as {bounds.elbo:.5g} ± {bounds.elbo_std_error:.2g}, {excess:.3g} nats above the target's "
            f"log Z, {truth[0]:.5g}: with right weights it lies below, for any control. Either the target's log_z is "
            "of another normalisation, or the weights are wrong, and with them means and log Z. Check log_z against "
            f"another method (SMC), and log_prob for terms left out{rounding}."
        )
    if bounds.eubo is None:
        return
    if math.isnan(bounds.eubo) or bounds.eubo == math.inf:
        yield (
            f"EUBO came out as {bounds.eubo}: paths walked back from exact samples leave the numbers, so that nothing "
            "can be said about parts that the sampler does not visit. Take more steps, or float64 (dtype)."
        )
        return
    error = bounds.eubo_std_error or 0.0
    if truth is not None:
        whose, (value, other) = "the target's log Z", truth
    elif draws.log_z is not None:
        whose, value, other = "the estimate of log Z", draws.log_z, draws.log_z_std_error or 0.0
    else:
        return
    if value - bounds.eubo > BEYOND * math.hypot(error, other) + ROUNDED:
        yield (
            f"EUBO came out as {bounds.eubo:.5g} ± {error:.2g}, {value - bounds.eubo:.3g} nats below {whose}, "
            f"{value:.5g}: with right weights it lies above, for any control. Either the exact samples are not of "
            "this density, or the weights of paths walked back from them are wrong: compare the target's sample with "
            f"its log_prob, and its log_z with another method{rounding}."
        )


# -- what the weights cannot show --------------------------------------------------------------------------------------


def unseen(draws: Draws) -> Iterator[str]:
    """Parts of the target that exact samples visit and the sampler does not; only for weights that look even."""
    bounds = draws.bounds
    if bounds is None or bounds.eubo is None or draws.walker_log_weights is None:
        return
    if not bounds.eubo < math.inf:  # nothing to compare, which is said already
        return
    log_w = draws.walker_log_weights.double().reshape(-1)
    share = float(effective_sample_size(log_w)) / len(log_w)
    log_z = float(log_w.logsumexp(0)) - math.log(len(log_w))
    above, below = bounds.eubo - log_z, log_z - bounds.elbo
    few = bounds.forward_ess is not None and bounds.forward_ess < UNSEEN * share
    if not few and not above > max(GAP, LOPSIDED * below, BEYOND * (bounds.eubo_std_error or 0.0)):
        return
    forward = "" if bounds.forward_ess is None else f"leave {bounds.forward_ess:.2%} effective draws, and "
    truth = known_log_z(draws)
    missed = "" if truth is None else f" log Z, {log_z - truth[0]:+.3g} from the target's, is that of the rest."
    yield (
        f"The sampler hardly visits a part of the target. Its own weights leave {share:.1%} effective draws, and put "
        f"ELBO {below:.2g} nats below log Z; those of paths walked back from exact samples {forward}put EUBO "
        f"{above:.3g} above it. Weights look even because they compare only what was visited: a mode is missing, or a "
        f"tail.{missed} Start wider (coordinates), take a control that is guided by the target, or train on paths that "
        "explore (spread above 1, replay); no divergence sees by itself what its paths do not visit."
    )


def shortfall(draws: Draws) -> Iterator[str]:
    """An ELBO far below log Z although the weights look even."""
    bounds = draws.bounds
    if bounds is None or draws.log_z is None:
        return
    if bounds.elbo == -math.inf:
        yield (
            "ELBO is -inf: paths end where the density is 0, and their draws have no weight. Nothing is wrong with "
            "the others; train longer, or bound the drift, if there are many."
        )
    elif draws.log_z - bounds.elbo > GAP:
        yield (
            f"ELBO lies {draws.log_z - bounds.elbo:.3g} nats below log Z, more than such even weights explain: some "
            "paths end where the target has next to no mass, and the control has not been learned there. Train "
            "longer, or on paths from elsewhere (replay, more noise)."
        )


# -- training ----------------------------------------------------------------------------------------------------------


def training(draws: Draws) -> Iterator[str]:
    """How training ended."""
    rows = draws.training
    if not rows:
        return
    skipped = int(max(row.get("skipped") or 0 for row in rows))
    lost = f"{skipped} step{'' if skipped == 1 else 's'}"
    for key, name in (("loss", "loss"), ("gradient_norm", "norm of the gradient")):
        if _ended_without(rows, key):
            yield (
                f"Training ended without numbers: at step {rows[-1].get('step')} the {name} was not finite"
                f"{f'; {lost} in all had to be skipped' if skipped else ''}. The control is that of the last step "
                "that could be taken. Take a lower rate, a smaller clip of the control's guide, or float64."
            )
            return
    if skipped:
        yield (
            f"Training skipped {lost} whose loss or gradient was not finite: paths left the support or the numbers. "
            "Draws keep their weights, but the control has not learned where that happened. Take a lower rate, a "
            "smaller clip of the control's guide, or coordinates (loc, scale)."
        )
    fallen = _fall(rows)
    near = draws.bounds is not None and draws.log_z is not None and draws.log_z - draws.bounds.elbo < NOTHING_TO_GAIN
    if fallen is not None and not near:
        yield (
            f"The loss still fell when training ended, from {fallen[0]:.4g} to {fallen[1]:.4g} within the last "
            "quarter (medians of its halves), by more than it scatters: the sampler is not as good as it can be. "
            "Train for more steps."
        )


def _ended_without(rows: Sequence[Mapping[str, Any]], key: str) -> bool:
    """Whether the last row has no finite number where others have; one that is not finite is NaN or None by then."""
    value = rows[-1].get(key)
    return not math.isfinite(value) if value is not None else any(row.get(key) is not None for row in rows)


def _fall(rows: Sequence[Mapping[str, Any]]) -> tuple[float, float] | None:
    """Medians of the loss over both halves of the last quarter, if the second is below the first beyond chance.

    A median of m normal numbers has the deviation 1.25 sigma / sqrt(m), and 1.35 sigma lie between their quartiles. A
    straight line falls by twice the quartiles' distance of a half.
    """
    losses = [float(row["loss"]) for row in rows if row.get("loss") is not None and math.isfinite(row["loss"])]
    if len(losses) < ROWS:
        return None
    last = losses[-(len(losses) // 4) :]
    m = len(last) // 2
    first, second = last[:m], last[-m:]
    scatter = 0.5 * (_quartiles(first) + _quartiles(second))
    before, after = statistics.median(first), statistics.median(second)
    least = max(1.0, CHANCE * 1.25 * math.sqrt(2 / m) / 1.35) * scatter
    return (before, after) if before - after > least + 1e-9 * abs(before) else None


def _quartiles(values: list[float]) -> float:
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return high - low
