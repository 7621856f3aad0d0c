r"""Named, constrained parameters and the unconstrained coordinates they are sampled in.

Each parameter has a constraint of ``torch.distributions.constraints`` and a shape; ``biject_to`` gives the bijection
:math:`\theta = T(x)` from R^k, with :math:`\log |\det dT/dx|`. A point (batch, d) holds all, one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributions import biject_to, constraints
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import Transform

__all__ = ["Parameters", "ordered"]


class _Ordered(Constraint):
    """Vectors with increasing entries."""

    event_dim = 1

    def check(self, value: Tensor) -> Tensor:
        return (value.diff(dim=-1) > 0).all(-1)


class _OrderedTransform(Transform):
    r"""R^k to increasing vectors: :math:`y_1 = x_1,\; y_i = y_{i-1} + e^{x_i}`."""

    domain = constraints.real_vector
    codomain = _Ordered()
    bijective = True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _OrderedTransform)

    __hash__ = Transform.__hash__

    def _call(self, x: Tensor) -> Tensor:
        return torch.cat([x[..., :1], x[..., 1:].exp()], -1).cumsum(-1)

    def _inverse(self, y: Tensor) -> Tensor:
        return torch.cat([y[..., :1], y.diff(dim=-1).log()], -1)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return x[..., 1:].sum(-1)


ordered = _Ordered()
"""Constraint of vectors with increasing entries: ``Parameters({"mu": (ordered, 2)})``."""

biject_to.register(_Ordered)(lambda constraint: _OrderedTransform())


class Parameters:
    """Names, constraints and shapes of what a point stands for.

    Args:
        spec: name -> constraint, for a number; or (constraint, *shape). Constraints are those of
            ``torch.distributions.constraints``, or :data:`ordered`.

    Example:
        >>> from torch.distributions import constraints
        >>> space = Parameters({"mu": constraints.real, "tau": constraints.positive, "theta": (constraints.real, 8)})
        >>> space.dim
        10
    """

    def __init__(self, spec: Mapping[str, object]) -> None:
        if not spec:
            raise ValueError("Parameters: give at least one, name -> constraint.")
        self.names = list(spec)
        self._parts: list[tuple[Constraint, tuple[int, ...], Transform, tuple[int, ...]]] = []
        for name, entry in spec.items():
            constraint, *shape = entry if isinstance(entry, tuple) else (entry,)
            if not isinstance(constraint, Constraint):
                raise ValueError(
                    f"Parameters: {name} needs a constraint of torch.distributions.constraints, such as real or "
                    f"positive, got {constraint!r}."
                )
            sizes = tuple(shape)
            if any(isinstance(s, bool) or not isinstance(s, int) or s < 1 for s in sizes):
                raise ValueError(f"Parameters: the shape of {name} must be of positive whole sizes, got {sizes}.")
            try:
                transform = biject_to(constraint)
                if len(sizes) < constraint.event_dim:
                    raise ValueError(
                        f"Parameters: {name} has the shape {sizes}, but {constraint} needs {constraint.event_dim} "
                        "dimensions or more: give (constraint, *shape), as in (simplex, 3)."
                    )
                free = tuple(transform.inverse_shape(sizes))
                probe = torch.zeros(2, *free, dtype=torch.float64)
                transform.log_abs_det_jacobian(probe, transform(probe))
            except NotImplementedError as error:
                raise ValueError(f"Parameters: no bijection from R^k is known for {name}, {constraint}.") from error
            if math.prod(free) == 0:
                raise ValueError(f"Parameters: {name}, {constraint} of shape {sizes}, is a constant; leave it out.")
            self._parts.append((constraint, sizes, transform, free))
        self.sizes = [math.prod(free) for *_, free in self._parts]
        self.dim = sum(self.sizes)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Constrained shape of each parameter."""
        return {name: shape for name, (_, shape, _, _) in zip(self.names, self._parts, strict=True)}

    @property
    def trivial(self) -> bool:
        """Whether this is one unconstrained vector, or number."""
        constraint, shape, _, _ = self._parts[0]
        inner = getattr(constraint, "base_constraint", constraint)
        return len(self.names) == 1 and inner is constraints.real and len(shape) <= 1

    @property
    def labels(self) -> list[str]:
        """One label for each constrained scalar, in order: "mu", "theta[0]", ..."""
        out = []
        for name, shape in self.shapes.items():
            count = math.prod(shape)
            index = [torch.unravel_index(torch.tensor(i), shape) for i in range(count)] if shape else []
            out += [f"{name}[{','.join(str(int(k)) for k in i)}]" for i in index] if shape else [name]
        return out

    def constrain(self, x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Named values (batch, *shape), and log |det| of the map (batch,), for points x (batch, d)."""
        if x.ndim != 2 or x.shape[1] != self.dim:
            raise ValueError(f"Parameters: points must have shape (batch, {self.dim}), got {tuple(x.shape)}.")
        values, log_det = {}, torch.zeros(x.shape[0], dtype=x.dtype, device=x.device)
        for name, part, (_, _, transform, free) in zip(self.names, x.split(self.sizes, -1), self._parts, strict=True):
            flat = part.reshape(-1, *free)
            values[name] = transform(flat)
            jacobian = transform.log_abs_det_jacobian(flat, values[name])
            log_det = log_det + jacobian.reshape(x.shape[0], -1).sum(-1)
        return values, log_det

    def unconstrain(self, values: Mapping[str, Tensor]) -> Tensor:
        """Points (batch, d) of named values (batch, *shape)."""
        missing = [n for n in self.names if n not in values]
        if missing:
            raise ValueError(f"Parameters: values for {', '.join(missing)} are missing.")
        flat = []
        for name, (_, shape, transform, _) in zip(self.names, self._parts, strict=True):
            value = torch.as_tensor(values[name])
            if tuple(value.shape[1:]) != shape:
                raise ValueError(
                    f"Parameters: {name} must have shape (batch, {', '.join(map(str, shape))}), "
                    f"got {tuple(value.shape)}."
                )
            flat.append(transform.inv(value).reshape(value.shape[0], -1))
        return torch.cat(flat, -1)

    def flat(self, x: Tensor) -> Tensor:
        """Constrained values in one array (batch, scalars), in the order of :attr:`labels`."""
        values, _ = self.constrain(x)
        return torch.cat([values[n].reshape(x.shape[0], -1) for n in self.names], -1)
