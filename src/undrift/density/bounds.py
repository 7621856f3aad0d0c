r"""Bounds on log Z from the weights of paths: from below by the sampler's own, from above by those of exact samples.

A path that the sampler draws has a weight w of mean Z; a path that is walked back from an exact sample of the target
has one whose inverse has the mean 1/Z. By Jensen's inequality, for any control and any number of steps,

    ELBO     :math:`\mathbb E_{\text{sampler}}[\log w] \le \log Z`
    EUBO     :math:`\mathbb E_{\text{target}}[\log w] \ge \log Z`
    log Z    :math:`-\log \mathbb E_{\text{target}}[w^{-1}]`, where the sampler leaves no part of the target out
    ESS      :math:`Z^2 / \mathbb E_{\text{sampler}}[w^2] = Z / \mathbb E_{\text{target}}[w]`, a share of the draws

The gaps are the Kullback-Leibler divergences between the two laws of paths, one way and the other. What the sampler
never visits is missing from its own weights, so that ELBO, log Z and ESS look right for what remains; exact samples do
lie there, with large weights: EUBO and forward ESS show it. See Blessing et al., Beyond ELBOs, 2024.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from undrift.measure.evidence import log_mean_exp

__all__ = ["Bounds", "bounds"]


@dataclass(frozen=True)
class Bounds:
    """What log Z lies between: E ELBO <= log Z <= E EUBO, in nats.

    Attributes:
        elbo: mean log weight of the sampler's paths; -inf if one has no weight.
        elbo_std_error: its standard error; NaN where it has none.
        eubo: mean log weight of paths walked back from exact samples; None without exact samples, as what follows. NaN
            if one left the numbers.
        eubo_std_error: its standard error.
        forward_ess: effective share of draws by these paths, in [0, 1].
        forward_log_z: log Z by these paths.
    """

    elbo: float
    elbo_std_error: float
    eubo: float | None = None
    eubo_std_error: float | None = None
    forward_ess: float | None = None
    forward_log_z: float | None = None


def bounds(log_weights: Tensor, forward: Tensor | None = None) -> Bounds:
    """Bounds from log weights of paths that nothing has resampled: all paths are independent.

    Args:
        log_weights: of the sampler's paths, of any shape, as (repeats, walkers).
        forward: of paths walked back from exact samples of the target, of any shape; None where there are none.

    Raises:
        ValueError: if there is no weight, or one of the sampler's is not a number.
    """
    if bool(log_weights.isnan().any()):
        raise ValueError("bounds: log_weights hold NaN; a path that left the numbers has the weight 0, so -inf.")
    elbo, error = _mean("log_weights", log_weights)
    if forward is None:
        return Bounds(elbo, error)
    eubo, eubo_error = _mean("forward", forward)
    log_w = forward.double().reshape(-1)
    log_z = -float(log_mean_exp(-log_w))
    share = math.exp(min(log_z - float(log_mean_exp(log_w)), 0.0))  # Jensen: not above 1 but for rounding
    return Bounds(elbo, error, eubo, eubo_error, share, log_z)


def _mean(name: str, log_w: Tensor) -> tuple[float, float]:
    """Mean and its standard error."""
    values = log_w.double().reshape(-1)
    if not len(values):
        raise ValueError(f"bounds: {name} of shape {tuple(log_w.shape)} holds no weights; give at least one.")
    mean = float(values.mean())
    if len(values) < 2 or not math.isfinite(mean):
        return mean, math.nan
    return mean, float(values.std()) / math.sqrt(len(values))
