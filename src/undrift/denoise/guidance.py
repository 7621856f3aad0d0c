r"""Conditioning a denoiser on an event y that the data had no part in training: guidance by a potential.

With :math:`\tilde x = x_0 + \sigma n`, :math:`n \sim N(0, C)`, Bayes and Tweedie give, exactly,

.. math:: E[x_0 \mid \tilde x, y] = D(\tilde x, \sigma) + \sigma^2 C\, \nabla_{\tilde x} \log p_\sigma(y \mid \tilde x).

No process stands in this. A state :math:`z_t` of any linear process knows :math:`x_0` through :math:`\tilde x(z, t)`
alone, so :math:`p(y \mid z_t) = p_{\sigma(t)}(y \mid \tilde x)`: one potential serves every process and sampler, and it
is asked at a noise level, never at a time that could run the wrong way. By the chain rule the score of the conditioned
diffusion is the old one plus :math:`\nabla_z \log p(y \mid z_t)`, on every channel, which is what the reverse drift
multiplies by :math:`GG^\top` (Pandey & Mandt 2023, eq. 13-14).

References:
    Dhariwal & Nichol, Diffusion Models Beat GANs on Image Synthesis, 2021, arXiv 2105.05233 (guidance by a classifier).
    Wu et al., Practical and Asymptotically Exact Conditional Sampling in Diffusion Models, 2023, arXiv 2306.17775
    (potentials as twisting functions).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from undrift.denoise.base import Denoiser, per_sample
from undrift.space import Space, space_of

__all__ = ["Guided", "Parts", "Potential", "coloured", "potential_on", "slope_of", "told_apart"]


def coloured(space: Space, slope: Tensor) -> Tensor:
    r""":math:`C\,\nabla f` of a function f of points, from its partial derivatives ``slope`` (batch, *event).

    That is the matrix of covariances of the noise's coordinates, times the slope: on the values of a function, whose
    inner product is :math:`h^d \sum u v`, the operator C applied to the gradient for that inner product.
    """
    return space.covariance(space.gradient(slope))


class Potential(Protocol):
    r"""Log of an estimate of :math:`p_\sigma(y \mid \tilde x = x)`, differentiable in x.

    Any callable will do. One that takes conditions of its own names them in an attribute ``conditions``, a tuple of
    texts: what the caller of the denoiser gives under these names goes to the potential, and the rest to the model. One
    that must know the space is a dataclass with a field ``space``; where that is None, :class:`Guided` fills it in. One
    that has no use for the prediction says ``of_prediction = False``, and the model then keeps no graph.
    """

    def __call__(self, x: Tensor, sigma: Tensor, x0: Tensor, **condition: Any) -> Tensor:
        """
        Args:
            x: noisy points (batch, *event).
            sigma: noise levels (batch,), in x's dtype.
            x0: prediction at x, D(x, sigma), (batch, *event), with its graph attached to x unless ``of_prediction``
                is false.
            condition: those of the caller's conditions that the potential names.

        Returns:
            (batch,).
        """
        ...


def potential_on(space: Space, potential: Potential) -> Potential:
    """The potential, told the space it is used on.

    Raises:
        ValueError: if it was made for another.
    """
    own: Any = potential
    if not hasattr(own, "space"):
        return potential
    if own.space is None:
        return dataclasses.replace(own, space=space)
    if own.space != space:
        raise ValueError(
            f"Guided: the potential was made for {own.space}, the model lives on {space}; leave the potential's space "
            "out."
        )
    return potential


def told_apart(potential: Potential, condition: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The conditions that the potential takes, and the rest."""
    names = getattr(potential, "conditions", ())
    own = {k: v for k, v in condition.items() if k in names}
    return own, {k: v for k, v in condition.items() if k not in names}


def slope_of(
    potential: Potential, x: Tensor, sigma: Tensor, x0: Tensor, own: Mapping[str, Any], onward: bool
) -> tuple[Tensor, Tensor]:
    """The potential (batch,), and its partial derivatives in x (batch, *event), to which x0 is attached.

    Args:
        potential: see :class:`Potential`.
        x, sigma, x0: as it takes them.
        own: its conditions.
        onward: keep the graph, for derivatives of the slope.

    Raises:
        ValueError: if the potential is not one number per sample.
        RuntimeError: if it has no graph back to x.
    """
    value = potential(x, sigma, x0, **own)
    if value.shape != x.shape[:1]:
        raise ValueError(
            f"Guided: the potential must return one number per sample, ({x.shape[0]},), got {tuple(value.shape)}."
        )
    if not value.requires_grad:
        raise RuntimeError(
            "Guided: the potential has no graph back to the noisy points, so it has no gradient. "
            + (
                "Inference mode keeps none: use torch.no_grad(), within which guidance takes its own."
                if torch.is_inference_mode_enabled()
                else "Look for no_grad(), detach() or numbers taken out of tensors in the model and in the potential."
            )
        )
    (slope,) = torch.autograd.grad(value.sum(), x, create_graph=onward)
    return (value, slope) if onward else (value.detach(), slope)


class Parts(NamedTuple):
    """What one call of a guided denoiser knows.

    Attributes:
        guided: prediction given y, (batch, *event).
        unguided: prediction of the denoiser inside, (batch, *event).
        log_potential: value of the potential, (batch,); the strength does not enter.
        slope: its partial derivatives in the noisy point, (batch, *event); nor does it here.
    """

    guided: Tensor
    unguided: Tensor
    log_potential: Tensor
    slope: Tensor


@dataclass(frozen=True, eq=False)
class Guided(Denoiser):
    r"""A denoiser given y: :math:`D + \text{strength}\; \sigma^2 C\, \nabla \log \text{potential}`.

    At strength 1, with the true potential, it is the exact posterior mean of x0 given x~ and y. Other strengths aim at
    :math:`p(x) p(y | x)^{\text{strength}}`, whose noisy versions they follow only approximately.

    Guided denoisers nest: the inner one is the model of the outer one, which is Bayes' rule for two independent
    observations. Gradients flow through the guidance where they are asked for, at the price of second derivatives.

    Args:
        denoiser: the model; conditions that the potential does not take are passed on to it.
        potential: see :class:`Potential`.
        strength: factor on the gradient.
        space: where the points live, C being the covariance of its noise; by default the denoiser's, if it has one, or
            White.

    Raises:
        ValueError: if the strength is not finite, the denoiser has a clock of modes, or the potential was made for
            another space.
    """

    denoiser: Denoiser
    potential: Potential
    strength: float = 1.0
    space: Space = field(default=None)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if not math.isfinite(self.strength):
            raise ValueError(f"Guided: strength must be finite, got {self.strength}.")
        if getattr(self.denoiser, "clock", None) is not None:
            raise ValueError(
                f"Guided: the {type(self.denoiser).__name__} has a clock of modes, on which every mode has a level of "
                "its own, and guidance is by one level; guide a denoiser without a clock."
            )
        space = space_of(self.denoiser, self.space)
        object.__setattr__(self, "space", space)
        object.__setattr__(self, "potential", potential_on(space, self.potential))

    def parts(self, x: Tensor, sigma: Tensor | float, **condition: Any) -> Parts:
        """Both predictions and the log potential, from one call of the model and one pass back through it.

        Args:
            x: noisy points (batch, *event).
            sigma: noise levels (batch,), or one level.
            condition: what the potential takes goes to it, the rest to the model.

        Returns:
            The predictions and the slope, in x's dtype, and the log potential in its own; without a graph unless
            gradients are enabled and x asks for them.
        """
        own, rest = told_apart(self.potential, condition)
        onward = torch.is_grad_enabled() and x.requires_grad
        level = per_sample(sigma, x)
        with torch.enable_grad():
            point = x if onward else x.detach().requires_grad_()
            with torch.set_grad_enabled(onward or getattr(self.potential, "of_prediction", True)):
                x0 = self.denoiser(point, level.flatten(), **rest)
            value, slope = slope_of(self.potential, point, level.flatten(), x0, own, onward)
        x0 = x0 if onward else x0.detach()
        # One factor at a time: sigma^2 may overflow, where the slope is of order 1 / sigma^2.
        guided = x0 + level * (level * (self.strength * coloured(self.space, slope)))
        return Parts(guided, x0, value, slope)

    def __call__(self, x: Tensor, sigma: Tensor | float, **condition: Any) -> Tensor:
        """E[x0 | x~ = x, y] as the potential has it; same shape and dtype as x (batch, *event)."""
        return self.parts(x, sigma, **condition).guided
