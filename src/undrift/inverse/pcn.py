r"""Metropolised moves whose acceptance does not fall as the grid gets finer: pCN and its kin.

For a posterior :math:`\pi \propto e^{\ell} \mu` whose prior has a density with respect to a Gaussian measure,
:math:`-\Phi = \ell + \log \frac{d\mu}{dN(0, C)}`, and a reference N(m, K) that is equivalent to N(0, C):

    pcn        x' = m + sqrt(1 - beta^2) (x - m) + beta K^(1/2) xi             accept by Phi(x) - Phi(x')
    pcnl       (2 + delta) x' = (2 - delta) x + 2 delta (m - K grad Phi(x)) + sqrt(8 delta) K^(1/2) xi
    random-walk  x' = x + beta K^(1/2) xi
    white-walk   x' = x + beta xi, xi white in the coefficients

with Phi always measured against the proposal's own reference (for K other than C that adds a quadratic form of finitely
many directions). The last two are for comparison: their acceptance by densities vanishes with the grid. In ``pcnl``,
:math:`\delta` is such that :math:`(2 - \delta)/(2 + \delta) = \sqrt{1 - \beta^2}`.

References:
    Cotter, Roberts, Stuart & White, MCMC Methods for Functions: Modifying Old Algorithms to Make Them Faster, 2013.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from tqdm import tqdm

from undrift._journal import Entry, Journal, digest
from undrift.inverse._resuming import APART, marks, packed, unpacked
from undrift.inverse.chains import Chains
from undrift.inverse.posterior import Posterior, dot, pull_back, push_forward_inverse, whiten
from undrift.inverse.preconditioner import Preconditioner, PriorCovariance
from undrift.space import FunctionSpace

__all__ = ["Proposal", "pcn"]

Proposal = Literal["pcn", "pcnl", "random-walk", "white-walk"]


class _Point(NamedTuple):
    """A state, its log density with respect to the reference and the slope of that, and its log-likelihood."""

    x: Tensor
    log_density: Tensor
    log_likelihood: Tensor
    slope: Tensor | None


class Kernel:
    """One Metropolised move of a batch of chains, at an inverse temperature.

    Args:
        posterior: whose prior has ``log_ratio``.
        proposal: see the module.
        reference: its covariance K.
        centre: its mean m (1, *event); 0 if None.
        temperature: power of the likelihood.
    """

    def __init__(
        self,
        posterior: Posterior,
        proposal: Proposal = "pcn",
        reference: Preconditioner | None = None,
        centre: Tensor | None = None,
        temperature: float = 1.0,
    ) -> None:
        if proposal not in get_args(Proposal):
            raise ValueError(f"pcn: proposal must be one of {', '.join(get_args(Proposal))}, got {proposal!r}.")
        ratio = getattr(posterior.prior, "log_ratio", None)
        if ratio is None:
            raise ValueError(
                f"pcn: a {type(posterior.prior).__name__} has no log_ratio, the log density of the prior with respect "
                "to the Gaussian measure of its space, without which no move can be accepted or rejected; take "
                "langevin(), or twisted sampling of the diffusion."
            )
        self.posterior, self.proposal, self.temperature = posterior, proposal, temperature
        self.ratio: Callable[[Tensor], Tensor] = ratio
        self.reference = PriorCovariance(posterior.space) if reference is None else reference
        self.centre = centre
        self._white_centre = (
            None if centre is None else push_forward_inverse(posterior.space, whiten(posterior.space, centre))
        )

    def _log_density(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """log of the target with respect to the proposal's reference, up to a constant, and the log-likelihood."""
        likelihood = self.posterior.log_likelihood(x)
        value = self.temperature * likelihood + self.ratio(x).double()
        if self.proposal in ("random-walk", "white-walk"):
            return value - 0.5 * self.posterior.space.norm2(x, 1.0).double(), likelihood
        if self.centre is not None:
            assert self._white_centre is not None
            value = value - dot(x, self._white_centre.to(x).expand_as(x))  # from N(0, C) to N(m, C)
            value = value + self.reference.energy(x - self.centre.to(x))
        else:
            value = value + self.reference.energy(x)
        return value, likelihood

    def at(self, x: Tensor) -> _Point:
        """What the kernel needs of states x (chains, *event)."""
        if self.proposal != "pcnl":
            with torch.no_grad():
                value, likelihood = self._log_density(x)
            return _Point(x, _finite(value), likelihood, None)
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            value, likelihood = self._log_density(point)
            (slope,) = torch.autograd.grad(value.sum(), point)
        return _Point(x, _finite(value.detach()), likelihood.detach(), slope)

    def move(self, now: _Point, beta: float, generator: torch.Generator) -> tuple[_Point, Tensor]:
        """Propose and decide; returns the points and which chains moved (chains,)."""
        x = now.x
        xi = torch.empty_like(x).normal_(generator=generator)
        space = self.posterior.space
        offset = 0.0 if self.centre is None else self.centre.to(x)
        noise = xi if self.proposal == "white-walk" else self.reference.noise(xi)
        if self.proposal == "white-walk" and isinstance(space, FunctionSpace):
            noise = space.colour(space.in_coordinates("coefficients").power(xi, -0.5))
        if self.proposal == "pcn":
            new = self.at(offset + math.sqrt(1 - beta * beta) * (x - offset) + beta * noise)
            log_ratio = new.log_density - now.log_density
        elif self.proposal == "pcnl":
            root = math.sqrt(1 - beta * beta)
            delta = 2 * (1 - root) / (1 + root)
            assert now.slope is not None
            drift = 2 * delta * self.reference.of_slope(now.slope)
            new = self.at(offset + ((2 - delta) * (x - offset) + drift + math.sqrt(8 * delta) * noise) / (2 + delta))
            log_ratio = self._langevin_term(now, new, delta) - self._langevin_term(new, now, delta)
        else:
            new = self.at(x + beta * noise)
            log_ratio = new.log_density - now.log_density
        uniform = torch.rand(len(x), generator=generator, dtype=torch.float64, device=x.device)
        accept = uniform.log() < log_ratio
        pick = accept.reshape(-1, *[1] * (x.ndim - 1))
        slope = None if now.slope is None or new.slope is None else torch.where(pick, new.slope, now.slope)
        return _Point(
            torch.where(pick, new.x, x),
            torch.where(accept, new.log_density, now.log_density),
            torch.where(accept, new.log_likelihood, now.log_likelihood),
            slope,
        ), accept

    def _langevin_term(self, u: _Point, v: _Point, delta: float) -> Tensor:
        """rho(u, v) of Cotter et al. 2013, eq. 4.11, with Phi minus the log density."""
        assert u.slope is not None
        offset = 0.0 if self.centre is None else self.centre.to(u.x)
        g = -u.slope
        root = self.reference.root(pull_back(self.posterior.space, g))
        return -u.log_density + 0.5 * dot(v.x - u.x, g) + delta / 4 * (dot(u.x + v.x - 2 * offset, g) + dot(root, root))


def _finite(value: Tensor) -> Tensor:
    """What cannot be evaluated has no density."""
    return torch.nan_to_num(value, nan=-math.inf, posinf=-math.inf, neginf=-math.inf)


@torch.no_grad()
def pcn(
    posterior: Posterior,
    start: Tensor,
    steps: int,
    beta: float = 0.25,
    proposal: Proposal = "pcn",
    seed: int | torch.Generator = 0,
    *,
    reference: Preconditioner | None = None,
    centre: Tensor | None = None,
    warmup: int = 0,
    target: float | None = None,
    thin: int = 1,
    checkpoint: str | Path | Journal | None = None,
    progress: bool = False,
) -> Chains:
    """Metropolised chains that leave the posterior invariant, for priors whose density ratio is known.

    Args:
        posterior: what is sampled; its prior must have ``log_ratio``.
        start: first states (chains, *event), in the space's coordinates; float64 is advised.
        steps: moves of every chain, warm-up included.
        beta: size of the proposal, in (0, 1] (any positive for the random walks).
        proposal: "pcn", "pcnl" (uses the gradient), "random-walk" or "white-walk".
        seed: integer or generator.
        reference: covariance K of the proposals' Gaussian; the prior's if None.
        centre: its mean (1, *event), such as :func:`~undrift.inverse.find_mode`; 0 if None.
        warmup: moves that are thrown away.
        target: share of accepted moves that beta is steered to, during warm-up only; None leaves beta as it is.
        thin: moves between kept states.
        checkpoint: file to keep the run's state in, so that an interrupted run goes on where it was; removed when the
            run is complete.
        progress: show a bar.

    Returns:
        Chains; if interrupted from the keyboard without a checkpoint, those of the states it had.

    Raises:
        ValueError: for unusable arguments, a prior without a ratio, a start of no density, or a checkpoint of another
            run.
        KeyboardInterrupt: if interrupted with a checkpoint, which then holds what there was.
    """
    if not (beta > 0 and (beta <= 1 or proposal in ("random-walk", "white-walk")) and math.isfinite(beta)):
        raise ValueError(f"pcn: beta must lie in (0, 1], got {beta}.")
    if not 0 <= warmup < steps or thin < 1 or (steps - warmup) < thin:
        raise ValueError(
            f"pcn: {steps} steps, {warmup} of them warm-up, thinned by {thin}, leave nothing to keep; steps must "
            "exceed warmup by at least thin >= 1."
        )
    if target is not None and (not 0 < target < 1 or warmup == 0):
        raise ValueError(
            f"pcn: target is a share in (0, 1) that a warm-up steers to, got {target} with {warmup} moves."
        )
    kernel = Kernel(posterior, proposal, reference, centre)
    generator = seed if isinstance(seed, torch.Generator) else torch.Generator(start.device).manual_seed(seed)
    kept: list[Tensor] = []
    likelihoods: list[Tensor] = []
    asked = beta

    def identity() -> str:
        probed = marks(posterior, start)
        settings = {
            "method": proposal,
            "lengths": [steps, warmup, thin],
            "beta": [asked, target],
            "ratio": kernel.ratio(probed["probe"]),
            "moves": kernel.reference.noise(probed["probe"]),
            "centre": centre,
            "seed": generator.get_state(),
        }
        return digest(**probed, **settings)

    def snapshot(k: int) -> Entry:
        here, mark, size, moves, known = point, generator.get_state(), beta, accepted, len(kept)

        def entry() -> tuple[dict[str, Tensor], dict[str, Any]]:
            now = {f"point.{name}": v for name, v in here._asdict().items() if v is not None}
            tensors = {**now, "generator": mark, "accepted": moves, **packed(kept[:known], likelihoods[:known])}
            return tensors, {"k": k, "beta": size}

        return entry

    journal = Journal.of(checkpoint, identity, APART)
    found = journal.read()
    if found is None:
        first, point = 0, kernel.at(start.detach().clone())
        bad = int((~torch.isfinite(point.log_density)).sum())
        if bad:
            raise ValueError(f"pcn: {bad} of {len(start)} starts have no finite density.")
        accepted = torch.zeros(len(start), dtype=torch.float64, device=start.device)
    else:
        tensors, plain = found
        generator.set_state(tensors["generator"])
        first, beta, accepted = plain["k"], plain["beta"], tensors["accepted"].to(start.device)
        parts = {name: tensors.get(f"point.{name}") for name in _Point._fields}
        point = _Point(**{name: None if v is None else v.to(start.device) for name, v in parts.items()})  # type: ignore[arg-type]
        kept, likelihoods = unpacked(tensors, start.device)
    complete, k = True, first - 1
    try:
        with journal:
            for k in tqdm(range(first, steps), disable=not progress, desc=proposal, initial=first, total=steps):
                point, moved = kernel.move(point, beta, generator)
                if k < warmup:
                    if target is not None:
                        gain = (float(moved.double().mean()) - target) / math.sqrt(k + 1)
                        beta = beta * math.exp(gain)
                        beta = min(beta, 0.999) if proposal in ("pcn", "pcnl") else beta
                else:
                    accepted = accepted + moved
                    if (k - warmup + 1) % thin == 0:
                        kept.append(point.x.clone())
                        likelihoods.append(point.log_likelihood)
                if journal.active:
                    journal.note(snapshot(k + 1))
    except KeyboardInterrupt:
        if journal.active or not kept:
            raise
        complete = False
    made = max(1, k + 1 - warmup)
    journal.close()
    return Chains(
        torch.stack(kept, 1),
        torch.stack(likelihoods, 1),
        accepted / made,
        posterior.space,
        beta,
        (),
        complete,
        f"{proposal}, beta {beta:.3g}",
    )
