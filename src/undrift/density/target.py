r"""A density on R^d that can only be evaluated: :math:`\pi(x) = \gamma(x) / Z`, with :math:`\log \gamma` given.

Notation, here and in the whole package:

    gamma   the density as given, not normalised;  log_prob = log gamma, (batch, d) -> (batch,)
    score   its gradient, grad log gamma, (batch, d) -> (batch, d)
    Z       the normaliser, or evidence;  log_z = log Z where it is known
    x       a point of R^d. Constrained parameters are sampled in unconstrained coordinates: see parameters.py

A target counts what is asked of it, in points: a value and a gradient of one point at once count as one gradient.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution, MixtureSameFamily
from torch.distributions.transforms import Transform

from undrift.density import faults
from undrift.density.faults import TargetError
from undrift.density.parameters import Parameters

if TYPE_CHECKING:
    from undrift.density.affine import AffineTarget

__all__ = ["Evaluations", "Point", "Target", "TargetError"]


@contextmanager
def _unvalidated() -> Iterator[None]:
    """Let torch.distributions answer -inf or NaN where a walker goes too far, rather than stop the batch."""
    before = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)


@dataclass
class Evaluations:
    """Points at which a target was evaluated.

    Attributes:
        values: log densities without a gradient.
        gradients: gradients; the log density of the same point comes with them.
        undefined: finite points, among those, where the target had no number to give, and walkers were refused.
    """

    values: int = 0
    gradients: int = 0
    undefined: int = 0

    @property
    def total(self) -> int:
        return self.values + self.gradients

    def copy(self) -> Evaluations:
        return Evaluations(self.values, self.gradients, self.undefined)

    def __sub__(self, other: Evaluations) -> Evaluations:
        return Evaluations(
            self.values - other.values, self.gradients - other.gradients, self.undefined - other.undefined
        )

    def __add__(self, other: Evaluations) -> Evaluations:
        return Evaluations(
            self.values + other.values, self.gradients + other.gradients, self.undefined + other.undefined
        )


class Point(NamedTuple):
    """Points with what is known of the target there.

    Attributes:
        x: (n, d).
        log_prob: log gamma(x), (n,).
        score: its gradient, (n, d).
    """

    x: Tensor
    log_prob: Tensor
    score: Tensor

    def take(self, index: Tensor | slice) -> Point:
        """The points at an index into the batch."""
        return Point(self.x[index], self.log_prob[index], self.score[index])

    @staticmethod
    def where(choose: Tensor, yes: Point, no: Point) -> Point:
        """Point by point: ``yes`` where ``choose`` (n,) holds, else ``no``."""
        column = choose.unsqueeze(-1)
        return Point(
            torch.where(column, yes.x, no.x),
            torch.where(choose, yes.log_prob, no.log_prob),
            torch.where(column, yes.score, no.score),
        )


class Target:
    """A density known up to a constant, from a batched function.

    Args:
        log_prob: log gamma of a batch of points, (batch, dim) -> (batch,). Differentiable by autograd, unless ``score``
            is given. -inf outside the support.
        dim: number of coordinates d.
        score: gradient of ``log_prob``, (batch, dim) -> (batch, dim), if there is a better way than autograd.
        sample: exact draws, ``sample(n, generator) -> (n, dim)``, where they are known.
        log_z: log of the integral of gamma, where it is known.
        parameters: names, shapes and constraints of what x stands for; see :meth:`constrained`.
        name: for reports.

    Example:
        >>> target = Target(lambda x: -0.5 * x.square().sum(-1), dim=2)
        >>> target.log_prob(torch.zeros(3, 2))
        tensor([-0., -0., -0.])
    """

    dim: int
    log_z: float | None = None
    parameters: Parameters | None = None
    exact: bool = False
    """Whether :meth:`sample` knows exact draws."""
    _sampler: Callable[[int, torch.Generator], Tensor] | None = None
    _given_score: Callable[[Tensor], Tensor] | None = None
    _trusted: bool | None = None  # whether a graph may go through the score as given; None before the probe

    def __init__(
        self,
        log_prob: Callable[[Tensor], Tensor],
        dim: int,
        *,
        score: Callable[[Tensor], Tensor] | None = None,
        sample: Callable[[int, torch.Generator], Tensor] | None = None,
        log_z: float | None = None,
        parameters: Parameters | None = None,
        name: str | None = None,
    ) -> None:
        if not callable(log_prob):
            raise TargetError(f"Target: log_prob must be a function of a batch of points, got {log_prob!r}.")
        if isinstance(dim, bool) or not isinstance(dim, int) or dim < 1:
            raise TargetError(f"Target: dim must be the number of coordinates, at least 1, got {dim!r}.")
        self._function, self.dim, self._given_score, self._sampler = log_prob, dim, score, sample
        self.exact = sample is not None
        self.log_z, self.parameters = log_z, parameters
        self._name = name or getattr(log_prob, "__name__", type(log_prob).__name__)

    @classmethod
    def constrained(
        cls,
        log_prob: Callable[[Mapping[str, Tensor]], Tensor],
        parameters: Parameters | Mapping[str, object],
        *,
        log_z: float | None = None,
        name: str | None = None,
    ) -> Target:
        r"""A density of named, constrained parameters, sampled without its constraints.

        The target's x lives on R^d; its density is :math:`\gamma(\theta(x)) |\det d\theta / dx|`, so that draws,
        mapped by :meth:`constrain`, have the density as given, with the same Z.

        Args:
            log_prob: of a mapping from names to tensors (batch, *shape); returns (batch,).
            parameters: as :class:`Parameters` takes them: name -> constraint, or (constraint, *shape).
            log_z: of the constrained density, where it is known.
            name: for reports.
        """
        space = parameters if isinstance(parameters, Parameters) else Parameters(parameters)

        def density(x: Tensor) -> Tensor:
            values, log_det = space.constrain(x)
            return log_prob(values) + log_det

        label = name or getattr(log_prob, "__name__", "posterior")
        return Target(density, space.dim, log_z=log_z, parameters=space, name=label)

    @classmethod
    def of(cls, distribution: torch.distributions.Distribution, name: str | None = None) -> Target:
        """A ``torch.distributions`` object as a target, on unconstrained coordinates, with log Z = 0.

        Args:
            distribution: of batch shape (); any event shape and any support with a bijection from R^d.
            name: for reports.
        """
        if tuple(distribution.batch_shape) != ():
            raise TargetError(
                f"Target.of: the distribution has batch shape {tuple(distribution.batch_shape)}, a target is one "
                "density: wrap the batch as an event with torch.distributions.Independent."
            )
        simple = distribution.component_distribution if isinstance(distribution, MixtureSameFamily) else distribution
        support: Any = simple.support
        if support is None or support.is_discrete:
            raise TargetError(f"Target.of: {type(distribution).__name__} is not a density on a continuous support.")
        try:
            space = Parameters({"x": (support, *distribution.event_shape)})
        except ValueError as error:
            raise TargetError(
                f"Target.of: the support of {type(distribution).__name__} has no known bijection from R^d; write its "
                "density in parameters that have one, with Target.constrained."
            ) from error
        placed: dict[torch.device, Any] = {}

        def on(device: torch.device) -> Any:
            if device not in placed:
                placed[device] = _in_double(distribution, device)
            return placed[device]

        def density(x: Tensor) -> Tensor:
            values, log_det = space.constrain(x)
            value = on(x.device).log_prob(values["x"].double()).to(x.dtype) + log_det
            # Far out, a bijection ends on the boundary itself, where the tails have nothing left.
            return torch.where(torch.isnan(value) & torch.isfinite(x).all(-1), -math.inf, value)

        def draw(n: int, generator: torch.Generator) -> Tensor:
            # torch.distributions draw from the global generator: borrow its state, and give it back.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int(torch.randint(2**31, (), generator=generator, device=generator.device)))
                return space.unconstrain({"x": on(torch.device("cpu")).sample((n,))})

        label = name or type(distribution).__name__
        parameters = None if space.trivial else space
        return Target(density, space.dim, sample=draw, log_z=0.0, parameters=parameters, name=label)

    # -- what benchmark targets override -------------------------------------------------------------------------------

    def _log_density(self, x: Tensor) -> Tensor:
        """log gamma, (batch, d) -> (batch,)."""
        return self._function(x)

    def _gradient(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """log gamma and its gradient in one go, or None where autograd is to find them."""
        if self._given_score is None:
            return None
        return self._log_density(x), self._given_score(x)

    def _draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Exact draws (n, d) in float64; asked for only where ``exact``."""
        assert self._sampler is not None
        return self._sampler(n, generator)

    # -- evaluation ----------------------------------------------------------------------------------------------------

    @cached_property
    def evaluations(self) -> Evaluations:
        """What has been asked of the target so far."""
        return Evaluations()

    @property
    def name(self) -> str:
        return getattr(self, "_name", type(self).__name__)

    def log_prob(self, x: Tensor) -> Tensor:
        """log gamma(x): (batch, d) -> (batch,)."""
        self._check_points(x)
        self.evaluations.values += x.shape[0]
        with _unvalidated():
            return self._checked(x, self._log_density(x))

    def log_prob_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """log gamma(x) and its gradient, (batch,) and (batch, d), from one evaluation; no graph is kept."""
        self._check_points(x)
        self.evaluations.gradients += x.shape[0]
        with _unvalidated():
            return self._value_and_score(x)

    def _value_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        known = self._gradient(x.detach())
        if known is not None:
            value, score = known
            value = self._checked(x, value)
            if score.shape != x.shape:
                raise TargetError(
                    f"{self.name}: score must have the shape of the points, {tuple(x.shape)}, got {tuple(score.shape)}."
                )
            return value.detach(), score.detach()
        with torch.enable_grad():
            value, score = self._by_autograd(x.detach().requires_grad_())
        return value.detach(), score

    def _by_autograd(self, x: Tensor, create_graph: bool = False) -> tuple[Tensor, Tensor]:
        """log gamma and its gradient through :meth:`_log_density`, at x that requires grad."""
        unseen = (
            f"{self.name}: log_prob does not depend on x for autograd (detached, or computed in numpy?). "
            "Compute it with torch operations, or give score=."
        )
        try:
            value = self._checked(x, self._log_density(x))
        except RuntimeError as error:
            if "numpy()" in str(error):
                raise TargetError(unseen) from error
            raise
        score: Tensor | None = None
        if value.requires_grad:
            (score,) = torch.autograd.grad(value.sum(), x, create_graph=create_graph, allow_unused=True)
        if score is None:
            raise TargetError(unseen)
        if create_graph and not score.requires_grad:  # constant in x: tied to its graph, with the derivative zero
            score = torch.where(torch.ones_like(x, dtype=torch.bool), score, x)
        return value, score

    def differentiable(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """log gamma(x) and its gradient, (batch,) and (batch, d), in the graph of x: a loss may go through the score.

        Where x requires no gradient, or none is recorded, the same as :meth:`log_prob_and_score`. Formulas of the
        target's own for its gradient are differentiated where autograd can follow them, else log_prob is, twice.
        A target made of functions is probed once, at two of the points of the first call: the derivative of its score
        must be that of differences of the score. That takes up to 18 gradients more, which are counted.

        Args:
            x: points (batch, d), which may be the result of other operations.

        Raises:
            TargetError: if autograd cannot differentiate the density twice.
        """
        self._check_points(x)
        if not (torch.is_grad_enabled() and x.requires_grad):
            return self.log_prob_and_score(x)
        with _unvalidated():
            formulas = type(self)._log_density is not Target._log_density  # not functions, which are anyone's
            if not formulas and self._trusted is None:
                self._trusted = faults.twice(self, x.detach())
            self.evaluations.gradients += x.shape[0]
            known = self._gradient(x) if formulas or self._trusted else None
            if known is None or not (known[0].requires_grad and known[1].requires_grad):
                return self._by_autograd(x, create_graph=True)
            return known

    def score(self, x: Tensor) -> Tensor:
        """grad log gamma(x), same shape as x (batch, d)."""
        return self.log_prob_and_score(x)[1]

    def at(self, x: Tensor) -> Point:
        """Points with value and score."""
        return Point(x, *self.log_prob_and_score(x))

    def sample(self, n: int, seed: int | torch.Generator = 0) -> Tensor:
        """Exact draws, (n, d).

        Raises:
            TargetError: if the target has none; ``exact`` tells.
        """
        generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
        if not self.exact:
            raise TargetError(f"{self.name} has no exact samples; draw with undrift.density.anneal.")
        return self._draw(n, generator)

    def constrain(self, x: Tensor) -> dict[str, Tensor]:
        """Points (n, d) as named parameters (n, *shape), on their own scale; {"x": x} for a target without names."""
        return {"x": x} if self.parameters is None else self.parameters.constrain(x)[0]

    @property
    def labels(self) -> list[str]:
        """One name for each constrained scalar, such as "theta[2]"."""
        return [f"x[{i}]" for i in range(self.dim)] if self.parameters is None else self.parameters.labels

    # -- faults that are found before any work -------------------------------------------------------------------------

    def _check_points(self, x: Tensor) -> None:
        if x.ndim != 2 or x.shape[1] != self.dim:
            raise TargetError(
                f"{self.name}: points must have shape (batch, {self.dim}), got {tuple(x.shape)}"
                + ("; one point is x.unsqueeze(0)." if tuple(x.shape) == (self.dim,) else ".")
            )

    def _checked(self, x: Tensor, value: Tensor) -> Tensor:
        if not isinstance(value, Tensor):
            raise TargetError(f"{self.name}: log_prob must return a tensor, got {type(value).__name__}.")
        if value.shape == x.shape[:1]:
            return value
        hint = f"return one log density a point, shape ({x.shape[0]},)"
        if value.ndim == 0:
            hint += "; the batch dimension was summed as well: reduce over the last axis only, as in .sum(-1)"
        elif value.shape == x.shape:
            hint += "; the coordinates were not summed: end with .sum(-1)"
        elif value.ndim == 2 and value.shape[1] == 1:
            hint += "; drop the last axis, as in .squeeze(-1)"
        raise TargetError(
            f"{self.name}: log_prob of points {tuple(x.shape)} returned shape {tuple(value.shape)}; {hint}."
        )

    @torch.no_grad()
    def check(self, x: Tensor, gradient: bool = True) -> None:
        """Look for faults at points x (n, d), n >= 2.

        Finds: wrong shapes, a forgotten batch dimension (values that depend on the other points of the batch), values
        that differ between two calls, values or scores that are not finite, and a score that is not the gradient of
        the log density, by central differences along random directions.

        Raises:
            TargetError: naming the fault, the point, and what to do.
        """
        faults.check(self, x, gradient)

    def _show(self, x: Tensor) -> str:
        head = ", ".join(f"{v:.4g}" for v in x[:4].tolist())
        return f"x = ({head}{', ...' if x.numel() > 4 else ''})"

    # -- coordinates ---------------------------------------------------------------------------------------------------

    def affine(self, loc: Tensor | float = 0.0, scale: Tensor | float = 1.0) -> AffineTarget:
        """The same density in coordinates z, x = loc + scale z; see :class:`AffineTarget`."""
        from undrift.density.affine import AffineTarget  # which is a target

        return AffineTarget(self, loc, scale)

    def __repr__(self) -> str:
        if "__dataclass_fields__" in dir(type(self)):
            fields = ", ".join(f"{k}={getattr(self, k)!r}" for k in inspect.signature(type(self)).parameters)
            return f"{type(self).__name__}({fields})"
        return f"Target({self.name}, dim={self.dim})"


def _in_double(part: Any, device: torch.device) -> Any:
    """A copy of a distribution, or of a part of one, with its numbers in float64 on a device, and without checks."""
    if isinstance(part, Tensor):
        return part.to(device, torch.float64) if part.is_floating_point() else part.to(device)
    if isinstance(part, list):
        return [_in_double(inner, device) for inner in part]
    if not isinstance(part, Distribution | Transform):
        return part
    new = copy.copy(part)
    new.__dict__.update({key: _in_double(value, device) for key, value in vars(new).items()})
    if isinstance(new, Distribution):
        new._validate_args = False  # a walker may come to the edge of the support
    return new
