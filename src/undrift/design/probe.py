r"""The exact law of any sampler's real code on Gaussian data, by prescribing its noise.

On a spectrum the denoiser is affine, so a sampler with steps of its own choosing, in whatever library, is one affine
map of all the noise that it draws, coordinate by coordinate:

.. math:: x = m + \sum_j g_j \xi_j, \quad \xi_j \sim N(0, I) \quad\Longrightarrow\quad
    x_i \sim N\bigl(m_i, \textstyle\sum_j g_{ji}^2\bigr).

Run with every draw zero it returns m; run with one row of the batch per source of noise, that source 1 in all
coordinates and the others 0, it returns m + g_j. Two runs, a few more rows to see whether the map is affine at all, and
no derivation of anything: what :mod:`undrift.design.gaussian` computes from a plan, measured on the code that samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from undrift.denoise.base import Denoiser
from undrift.design.gaussian import Law, reference
from undrift.design.score_error import ScoreError
from undrift.design.spectrum import Spectrum
from undrift.diffusion import Diffusion
from undrift.process.linear import LinearProcess
from undrift.sample.plan import Plan, TableSampler
from undrift.sample.run import sample

__all__ = ["Probe", "probe", "probe_sampler"]

_NORMAL = {torch.randn, torch.randn_like, torch.normal, Tensor.normal_}
_OTHER = {
    torch.rand,
    torch.rand_like,
    torch.bernoulli,
    torch.poisson,
    Tensor.uniform_,
    Tensor.bernoulli_,
    Tensor.exponential_,
    Tensor.cauchy_,
    Tensor.log_normal_,
    Tensor.geometric_,
}


@dataclass(frozen=True, eq=False)
class Probe:
    """What a sampler's code does to Gaussian data.

    Attributes:
        law: of the samples, one channel, beside the data's.
        gains: response of the samples to each source of noise, in the order of its draws, (sources, n).
        calls: denoiser calls per sample.
        departure: largest deviation of the check rows from the affine map, relative to the largest entry: rounding.
    """

    law: Law
    gains: Tensor
    calls: int
    departure: float

    @property
    def mean(self) -> Tensor:
        """Mean of the samples, (n,)."""
        return self.law.mean[:, 0]

    @property
    def variance(self) -> Tensor:
        """Variance of the samples, (n,)."""
        return self.law.variance

    @property
    def kl(self) -> Tensor:
        """KL(data || samples), nats."""
        return self.law.kl

    @property
    def w2(self) -> Tensor:
        """W2 between data and samples, data units."""
        return self.law.w2

    def __repr__(self) -> str:
        return (
            f"Probe({self.law.spectrum.name}: {self.calls} calls, {len(self.gains)} sources of noise, "
            f"KL = {float(self.kl):.4g}, W2 = {float(self.w2):.4g})"
        )


def probe(
    run: Callable[[Denoiser, int], Tensor],
    spectrum: Spectrum,
    *,
    error: ScoreError | None = None,
    sigma: float = 0.0,
    tolerance: float | None = None,
) -> Probe:
    """The exact law of a sampler's code, whatever library it is from.

    While it runs, ``torch.randn``, ``torch.randn_like``, ``torch.normal`` and ``Tensor.normal_`` return what is
    prescribed, in shape, dtype and device what was asked for, and torch's default dtype is float64. Draws have the
    coordinates last, (batch, n) or (batch, channels, n), each channel a source of its own; an event of several
    dimensions is n coordinates in its own order.

    Args:
        run: ``run(denoiser, batch)`` draws ``batch`` samples (batch, *event), event of n coordinates, all rows at once,
            with ``denoiser(x, sigma)``, x (batch, *event), in place of a network. Steps may depend on anything but the
            states.
        spectrum: the data, in whose eigenbasis the sampler is run: one coordinate per eigenvalue, whatever its count.
        error: of the denoiser; None for the exact one.
        sigma: noise that the run leaves in its samples; they are compared with the data seen through it.
        tolerance: departure from an affine map, relative to the largest entry, up to which it is rounding; None for
            1e-9, or 1e-4 if the samples are not float64.

    Raises:
        ValueError: if noise is drawn in other shapes, or otherwise than normal through torch, or the map from noise to
            samples is not affine coordinate by coordinate: steps that adapt, clipped predictions, mixed coordinates.
    """
    if not 0 <= sigma < math.inf:
        raise ValueError(f"probe: sigma must be finite and not negative, got {sigma}.")
    exact = spectrum.variance + sigma**2
    return _probe(run, spectrum, error, spectrum._mean, exact, 0.0, tolerance)


def probe_sampler(
    process: LinearProcess, sampler: TableSampler | Plan, spectrum: Spectrum, error: ScoreError | None = None
) -> Probe:
    """The same for :func:`undrift.sample.sample` and a sampler of this library, its real loop run in float64.

    Args:
        process: any linear process.
        sampler: or a plan made for that process.
        spectrum, error: see :func:`probe`.
    """
    plan = sampler.plan(process) if isinstance(sampler, TableSampler) else sampler
    n = len(spectrum.variance)

    def run(denoiser: Denoiser, batch: int) -> Tensor:
        return sample(Diffusion(process, denoiser), batch, (n,), plan, 0, dtype=torch.float64)  # type: ignore[return-value]

    mean, cov = reference(plan, spectrum, plan.after[-1])
    return _probe(run, spectrum, error, mean[:, 0], cov[:, 0, 0], float(plan.after[-1].detach()), None)


@torch.no_grad()
def _probe(
    run: Callable[[Denoiser, int], Tensor],
    spectrum: Spectrum,
    error: ScoreError | None,
    exact_mean: Tensor,
    exact_variance: Tensor,
    time: float,
    tolerance: float | None,
) -> Probe:
    n = len(spectrum.variance)
    # A first run of two rows, without noise, shows the mean and what is drawn.
    silent = _Prescribed(n, 2)
    rest, points = _run(run, spectrum, error, silent)
    if not torch.equal(rest[0], rest[1]):
        raise ValueError(
            "probe: with all of torch's normal noise set to zero, two samples still differ, by "
            f"{float((rest[0] - rest[1]).abs().max()):.3g}; draw all noise with torch.randn, torch.randn_like, "
            "torch.normal or Tensor.normal_."
        )
    sources = sum(silent.drawn)
    # One row for every source, and two with noise of usual and of threefold size in all of them at once.
    usual = torch.empty(2, sources, n, dtype=torch.float64).normal_(generator=torch.Generator().manual_seed(0))
    usual[1] *= 3
    impulses = torch.eye(sources, dtype=torch.float64).unsqueeze(-1).expand(sources, sources, n)
    noise = torch.cat([torch.zeros(1, sources, n, dtype=torch.float64), impulses, usual])
    loud = _Prescribed(n, len(noise), noise.split(silent.drawn, 1) if sources else ())
    rows, _ = _run(run, spectrum, error, loud)
    if loud.drawn != silent.drawn:
        raise ValueError(
            f"probe: the run drew noise {len(silent.drawn)} times without noise and {len(loud.drawn)} times with it; "
            "the steps must not depend on the states, as an adaptive solver's do."
        )

    mean, gains = rows[0], rows[1 : sources + 1] - rows[0]
    predicted = mean + (usual * gains).sum(1)
    found = torch.cat([rows[sources + 1 :] - predicted, rest[:1] - mean])
    size = float(torch.cat([predicted, rows]).abs().max())
    departure = float(found.abs().max()) / size if size > 0 else 0.0
    limit = tolerance if tolerance is not None else loud.tolerance
    if not departure <= limit:
        raise ValueError(
            f"probe: the samples depart from an affine map of the noise by {departure:.3g} of their size, more than "
            f"{limit:g}; steps must not adapt to the states, predictions not be clipped, coordinates not mix. If this "
            "is rounding, compute in float64 or raise tolerance."
        )
    law = Law(
        spectrum,
        time,
        mean.unsqueeze(-1),
        gains.square().sum(0)[:, None, None],
        exact_mean.detach().unsqueeze(-1),
        exact_variance.detach()[:, None, None],
    )
    return Probe(law, gains, points // 2, departure)


def _run(
    run: Callable[[Denoiser, int], Tensor], spectrum: Spectrum, error: ScoreError | None, noise: _Prescribed
) -> tuple[Tensor, int]:
    """Samples (batch, n), float64, with prescribed noise, and the number of points that were denoised."""
    inner = spectrum.denoiser() if error is None else error.denoiser(spectrum)
    points = 0

    def denoiser(x: Tensor, sigma: Tensor, **condition: Any) -> Tensor:
        nonlocal points
        points += len(x)
        return inner(x, sigma, **condition)

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with noise:
            x = run(denoiser, noise.batch)
    finally:
        torch.set_default_dtype(before)
    n = len(spectrum.variance)
    if not isinstance(x, Tensor) or x.ndim < 2 or len(x) != noise.batch or x[0].numel() != n:
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(
            f"probe: run(denoiser, {noise.batch}) must return samples ({noise.batch}, *event) of {n} coordinates, one "
            f"for each eigenvalue, got {got}."
        )
    if not bool(x.isfinite().all()):
        raise ValueError("probe: the samples are not finite; the method is unstable in these steps.")
    noise.tolerance = 1e-9 if x.dtype == torch.float64 else 1e-4
    return x.detach().cpu().double().flatten(1), points


class _Prescribed(TorchFunctionMode):
    """Gives every normal draw (batch, channels, n) its prescribed values, or zeros where there are none.

    Attributes:
        drawn: channels of the draws so far.
        tolerance: what rounding may amount to in the samples' dtype.
    """

    def __init__(self, n: int, batch: int, values: tuple[Tensor, ...] | None = None) -> None:
        super().__init__()
        self.n, self.batch, self.values = n, batch, values
        self.drawn: list[int] = []
        self.tolerance = 0.0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _OTHER:
            raise ValueError(
                f"probe: the run calls {getattr(func, '__name__', func)}; only normal noise keeps the law Gaussian."
            )
        out = func(*args, **kwargs)  # of the right shape, dtype and device
        if func not in _NORMAL:
            return out
        values = self._next(out.shape).to(out).reshape(out.shape)
        if func is Tensor.normal_:
            args = args[1:]
        if func in (torch.normal, Tensor.normal_):
            mean = args[0] if args else kwargs.get("mean", 0.0)
            std = args[1] if len(args) > 1 else kwargs.get("std", 1.0)
            values = mean + std * values
        out.detach().copy_(values)
        return out

    def _next(self, shape: torch.Size) -> Tensor:
        each = math.prod(shape[1:])
        if len(shape) < 2 or shape[0] != self.batch or each % self.n or not each:
            raise ValueError(
                f"probe: the run drew noise of shape {tuple(shape)} for a batch of {self.batch}; every draw must be "
                f"(batch, *event) or (batch, channels, *event) with {self.n} coordinates an event."
            )
        place, channels = len(self.drawn), each // self.n
        self.drawn.append(channels)
        if self.values is None:
            return torch.zeros(self.batch, channels, self.n, dtype=torch.float64)
        if place >= len(self.values) or self.values[place].shape[1] != channels:
            raise ValueError(
                f"probe: draw {place + 1} of the run, {channels} channels, was not made when all noise was zero; the "
                "steps must not depend on the states, as an adaptive solver's do."
            )
        return self.values[place]
