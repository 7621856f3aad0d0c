"""Faults of a target, found before any work and explained."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from undrift.density.target import Target

__all__ = ["TargetError", "check", "twice"]


class TargetError(ValueError):
    """A target that cannot be sampled as it is; the message says what was seen, what was expected and what to do."""


def check(target: Target, x: Tensor, gradient: bool = True) -> None:
    """See :meth:`undrift.density.Target.check`."""
    target._check_points(x)
    target.evaluations.values += len(x)
    # torch.distributions, where they are used, check their arguments here, and only here
    first = target._checked(x, target._log_density(x))
    value, score = target.log_prob_and_score(x)
    bad = torch.isnan(value) | (value == math.inf)
    if bool(bad.any()):
        i = int(bad.nonzero()[0])
        raise TargetError(
            f"{target.name}: log_prob is {float(value[i])} at {target._show(x[i])}, and at {int(bad.sum())} of "
            f"{len(x)} points. It must be finite, or -inf outside the support; look for logs of "
            "negative numbers, 0/0 and overflow, or use constrained parameters."
        )
    inside = torch.isfinite(value)
    if not bool(inside.any()):
        raise TargetError(
            f"{target.name}: log_prob is -inf at all {len(x)} points tried, such as {target._show(x[0])}. Give a start "
            "inside the support (loc= and scale= of an affine map), or use constrained parameters."
        )
    broken = inside & ~torch.isfinite(score).all(-1)
    if bool(broken.any()):
        i = int(broken.nonzero()[0])
        raise TargetError(
            f"{target.name}: log_prob is {float(value[i]):.6g} at {target._show(x[i])} but its gradient is not finite. "
            "Look for torch.where around an invalid branch, sqrt or norm at 0."
        )
    tolerance = max(1e-8, 1e3 * torch.finfo(value.dtype).eps)
    if not torch.allclose(first[inside], value[inside], rtol=tolerance, atol=tolerance):
        raise TargetError(
            f"{target.name}: two calls at the same points gave different values (by up to "
            f"{float((first - value)[inside].abs().max()):.3g}). A target must be a function; fix its randomness."
        )
    alone = torch.cat([target.log_prob(x[i : i + 1]) for i in range(min(2, len(x)))])
    expected = value[: len(alone)]
    fine = torch.isfinite(expected)
    gap = (alone - expected)[fine].abs()
    if not bool((gap <= tolerance * (1 + expected[fine].abs())).all()):  # NaN, too, is a fault
        raise TargetError(
            f"{target.name}: the log density of a point changes by {float(gap.max()):.3g} with the other points of "
            "its batch. It must treat points one by one: reduce over the last axis only, and mind broadcasting."
        )
    if gradient:
        single = torch.float32 in (x.dtype, value.dtype)
        fault = _wrong_gradient(target, x[inside], score[inside], single)
        # Parts of a density may be in float32, as torch.distributions of plain numbers are: rough, not wrong.
        if fault is not None and not single:
            fault = _wrong_gradient(target, x[inside], score[inside], True)
        if fault is not None:
            raise TargetError(fault)


def _wrong_gradient(target: Target, x: Tensor, score: Tensor, single: bool) -> str | None:
    """What is wrong with the score, by differences in single or double precision; None if it fits."""
    x, score = x[:8], score[:8]
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
    direction /= direction.norm(dim=-1, keepdim=True)
    slope = (score.double() * direction).sum(-1)
    rounding, step, factors = (1e-5, 1e-2, (1.0, 0.1)) if single else (1e-13, 1e-5, (1.0, 1e-2))
    reach = step * (1 + x.norm(dim=-1, keepdim=True))
    best = torch.full_like(slope, math.inf)
    worth = torch.zeros_like(slope)
    for factor in factors:  # a step that suits the target's scale is not known
        h = factor * reach
        ends = target.log_prob(torch.cat([x + h * direction, x - h * direction]))
        up, down = ends.double().chunk(2)
        found = (up - down) / (2 * h.squeeze(-1).double())
        noise = rounding * (up.abs() + down.abs()) / h.squeeze(-1)
        miss = ((found - slope).abs() - noise).clamp(min=0) / (slope.abs() + found.abs()).clamp(min=1e-3)
        better = torch.isfinite(miss) & (miss < best)
        best, worth = torch.where(better, miss, best), torch.where(better, found, worth)
    wrong = torch.isfinite(best) & (best > 1e-3)
    if bool(wrong.double().mean() > 0.5):  # kinks may spoil some points, not most
        i = int(best.argmax())
        return (
            f"{target.name}: the score is not the gradient of log_prob. Along a random direction at "
            f"{target._show(x[i])} the score says {float(slope[i]):.6g}, differences of log_prob say "
            f"{float(worth[i]):.6g}. Correct score=, or leave it out and let autograd find it."
        )
    return None


def twice(target: Target, x: Tensor) -> bool | None:
    """Whether a second derivative may go through the score that was given, or through log_prob only.

    Tried at two of the points x: the product of a random direction with the graph of the score, against differences of
    the score along it.

    Returns:
        True for the score as given; False for log_prob, differentiated twice; None where both points are undefined.

    Raises:
        TargetError: if neither is right.
    """
    x = x[:2]
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
    direction /= direction.norm(dim=-1, keepdim=True)
    value, score = target.log_prob_and_score(x)
    fine = torch.isfinite(value) & torch.isfinite(score).all(-1)
    if not bool(fine.any()):
        return None
    expected = []
    eps = torch.finfo(torch.promote_types(x.dtype, score.dtype)).eps
    for step in (1e-2, 1e-4, 1e-6):  # one that suits the target's scale is not known
        h = step * (1 + x.norm(dim=-1, keepdim=True))
        up, down = (target.score(x + sign * h * direction) for sign in (1, -1))
        noise = 30 * eps * (up.norm(dim=-1) + down.norm(dim=-1)) / h.squeeze(-1)
        expected.append(((up - down) / (2 * h), noise))
    said = ""
    for given in (True, False):
        if given and target._given_score is None:
            continue
        target.evaluations.gradients += len(x)
        with torch.enable_grad():
            leaf = x.clone().requires_grad_()
            try:
                known = target._gradient(leaf) if given else target._by_autograd(leaf, create_graph=True)
                assert known is not None
                if not known[0].requires_grad:
                    raise TargetError("log_prob does not depend on x for autograd")
                (found,) = torch.autograd.grad((known[1] * direction).sum(), leaf)
            except (RuntimeError, TargetError) as error:
                said = str(error).split("\n", 1)[0]
                continue
        best = torch.full_like(value, math.inf)
        for difference, noise in expected:
            size = (found.norm(dim=-1) + difference.norm(dim=-1)).clamp(min=1e-3)
            miss = ((found - difference).norm(dim=-1) - noise).clamp(min=0) / size
            best = torch.where(miss < best, miss, best)
        if bool((best[fine] <= 0.01).any()):  # a kink may spoil one of the points
            return given
        said = "the derivative that autograd finds is not that of differences of the score"
    raise TargetError(
        f"{target.name}: the density cannot be differentiated twice: {said}. Compute log_prob (or score) with torch "
        "operations that have second derivatives, nothing of x detached, or train by a loss that needs the score only, "
        "such as the log-variance."
    )
