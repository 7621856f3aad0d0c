r"""Guidance of a network of all channels: the papers' parametrisation, conditioned on an event y.

A :class:`~undrift.diffusion.NoiseDiffusion` sees the state :math:`z_t` itself, not its statistic :math:`\tilde x`. The
guidance is the one of :class:`~undrift.denoise.Guided` still. With :math:`p(y \mid z_t) = p_\sigma(y \mid \tilde x)`,
:math:`\tilde x = r_t^\top z_t` and :math:`S_t r_t = \sigma^2 m_t`,

.. math::
    \nabla \log p_t(z_t \mid y) = s(z_t, t) + r_t \otimes \nabla_{\tilde x} \log p_\sigma(y \mid \tilde x), \qquad
    E[x_0 \mid z_t, y] = E[x_0 \mid z_t] + \sigma^2 C\, \nabla_{\tilde x} \log p_\sigma(y \mid \tilde x),

the first on every channel, the second on channel 0 of the predicted start alone. A potential that looks at the
prediction needs its derivative in x~; a state has it along :math:`m_t`, the way a change of :math:`x_0` moves it, since
:math:`r_t^\top m_t = 1`. Where the network is right, every such way gives the same.

References:
    Pandey & Mandt, A Complete Recipe for Diffusion Generative Models, 2023, eq. 13-14 and appendix D.3.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from undrift._linalg import as_f64
from undrift.denoise.free import ClassifierFree
from undrift.denoise.guidance import Guided, Potential, coloured, potential_on, slope_of, told_apart
from undrift.diffusion import Diffusion, NoiseDiffusion, Predictor, predictor_of
from undrift.modal_diffusion import ModalDiffusion
from undrift.process.linear import LinearProcess, mix
from undrift.space import Space

__all__ = ["GuidedNoise", "NoiseParts", "classifier_free", "guide"]


class NoiseParts(NamedTuple):
    """What one call of a guided noise network knows.

    Attributes:
        noise: what the network says, (batch, K, *event).
        guided: predicted start given y, (batch, K, *event).
        pull: strength C grad log p(y | x~), summed over nested guidance, (batch, *event).
        unguided: predicted start of the model inside, (batch, K, *event).
        log_potential: value of the potential, (batch,); the strength does not enter.
        slope: its partial derivatives in x~, (batch, *event); nor does it here.
    """

    noise: Tensor
    guided: Tensor
    pull: Tensor
    unguided: Tensor
    log_potential: Tensor
    slope: Tensor


@dataclass(frozen=True, eq=False)
class GuidedNoise:
    """A noise network of all channels, given y; every sampler runs it as it runs the network.

    Guided models nest, as guided denoisers do: Bayes' rule for two independent observations.

    Args:
        diffusion: the model, or one that is guided already; conditions that the potential does not take are passed on.
        potential: see :class:`~undrift.denoise.guidance.Potential`.
        strength: factor on the gradient, as for :class:`~undrift.denoise.Guided`.

    Raises:
        TypeError: if the model is no NoiseDiffusion.
        ValueError: if the strength is not finite, or the potential was made for another space.
    """

    diffusion: NoiseDiffusion | GuidedNoise
    potential: Potential
    strength: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.diffusion, (NoiseDiffusion, GuidedNoise)):
            raise TypeError(
                f"GuidedNoise: guides a NoiseDiffusion, got a {type(self.diffusion).__name__}; a denoiser is guided by "
                "Guided."
            )
        if not math.isfinite(self.strength):
            raise ValueError(f"GuidedNoise: strength must be finite, got {self.strength}.")
        object.__setattr__(self, "potential", potential_on(self.space, self.potential))

    @property
    def _model(self) -> NoiseDiffusion:
        return self.diffusion._model if isinstance(self.diffusion, GuidedNoise) else self.diffusion

    @property
    def process(self) -> LinearProcess:
        """That of the model."""
        return self.diffusion.process

    @property
    def space(self) -> Space:
        """Where the points live: the model's space."""
        return self.diffusion.space

    @property
    def predictions(self) -> int:
        """P = K, as for the model."""
        return self.diffusion.predictions

    def reading(self, times: Tensor) -> Tensor:
        """What :meth:`read` needs at times (N,): the model's, then r, m, and sigma; (N, R + 2 K + 1)."""
        times = as_f64(times)
        snr, row = self.process._weights(times)
        return torch.cat(
            [self.diffusion.reading(times), row, self.process.kernel(times)[0], snr.rsqrt().unsqueeze(-1)], -1
        )

    def parts(self, z: Tensor, reading: Tensor, **condition: Any) -> NoiseParts:
        """What one call of the network and one pass back through it tell.

        Args:
            z: states (batch, K, *event).
            reading: a row of :meth:`reading`, (R,), or one per sample, (batch, R).
            condition: what the potential takes goes to it, the rest to the model.
        """
        k = self.process.channels
        own, rest = told_apart(self.potential, condition)
        inner, row, mean, sigma = reading.split([reading.shape[-1] - 2 * k - 1, k, k, 1], -1)
        level = sigma.to(z).expand(len(z), 1).flatten()
        onward = torch.is_grad_enabled() and z.requires_grad
        with torch.enable_grad():
            state = z if onward else z.detach()
            x = mix(row.unsqueeze(-2), state).squeeze(1)
            point = x.clone() if onward else x.requires_grad_()
            moved = state + mix(mean.unsqueeze(-1), (point - (x if onward else x.detach())).unsqueeze(1))
            with torch.set_grad_enabled(onward or getattr(self.potential, "of_prediction", True)):
                if isinstance(self.diffusion, GuidedNoise):
                    noise, start, before = self.diffusion.parts(moved, inner, **rest)[:3]
                else:
                    noise = self.diffusion.ask(moved, inner, **rest)
                    start, before = self.diffusion.start(moved, noise, inner), torch.zeros_like(point)
            value, slope = slope_of(self.potential, point, level, start[:, 0], own, onward)
        pull = self.strength * coloured(self.space, slope)
        if not onward:
            noise, start, before = noise.detach(), start.detach(), before.detach()
        each = level.reshape(-1, *[1] * (pull.ndim - 1))
        x0 = start[:, 0] + each * (each * pull)
        return NoiseParts(noise, torch.cat([x0.unsqueeze(1), start[:, 1:]], 1), before + pull, start, value, slope)

    def read(self, z: Tensor, reading: Tensor, **condition: Any) -> Tensor:
        """Predicted start state (batch, K, *event) given y, for one row of :meth:`reading`."""
        return self.parts(z, reading, **condition).guided

    def predictor(self, times: Tensor) -> Predictor:
        """Predictor of the whole start state at fixed times (N,), its coefficients computed once; P = K."""
        return predictor_of(self, times)

    def score(self, z: Tensor, t: object, root: Tensor | None = None, **condition: Any) -> Tensor:
        """Estimated grad log p_t(z | y), same shape as z (batch, K, *event); arguments as the model's."""
        return self.space.precision(self.preconditioned_score(z, t, root, **condition))

    def preconditioned_score(self, z: Tensor, t: object, root: Tensor | None = None, **condition: Any) -> Tensor:
        """C times :meth:`score`: the same on White, and finite on every grid."""
        time = self.process._per_sample(z, t)
        reading = self.reading(time)
        noise, _, pull = self.parts(z, reading, **condition)[:3]
        k = self.process.channels
        row = reading[:, -2 * k - 1 : -k - 1].unsqueeze(-1)
        score = self._model.score_of(z, noise, self._model.coefficients(time), root)
        return score + mix(row if root is None else root.mT @ row, pull.unsqueeze(1))

    def predict(self, z: Tensor, t: object, **condition: Any) -> Tensor:
        r"""E[x0 | z_t = z, y] by the part of the score that speaks about it; (batch, *event)."""
        return self._model.tweedie(z, t, self.preconditioned_score(z, t, **condition))


def guide(
    diffusion: Diffusion | NoiseDiffusion | GuidedNoise, potential: Potential, strength: float = 1.0
) -> Diffusion | GuidedNoise:
    """A diffusion of either kind, given y: by :class:`~undrift.denoise.Guided`, or :class:`GuidedNoise`."""
    if isinstance(diffusion, (NoiseDiffusion, GuidedNoise)):
        return GuidedNoise(diffusion, potential, strength)
    return Diffusion(diffusion.process, Guided(diffusion.denoiser, potential, strength, diffusion.space))


def classifier_free(
    diffusion: Diffusion | NoiseDiffusion | ModalDiffusion,
    strength: float = 2.0,
    interval: tuple[float, float] = (0.0, math.inf),
) -> Diffusion | NoiseDiffusion | ModalDiffusion:
    """A diffusion of any kind, guided without a classifier; see :class:`~undrift.denoise.ClassifierFree`.

    Scores are affine in what a network says, so a noise network is guided by the difference of two of its answers.

    Args:
        diffusion: the conditional model, trained with conditions dropped now and then.
        strength: w.
        interval: noise levels (low, high] at which to guide.
    """
    if isinstance(diffusion, NoiseDiffusion):
        d, network = diffusion, _Free(diffusion.network, strength, interval)
        return NoiseDiffusion(d.process, network, d.kernel, d.factor, d.mixed, d.data_std, d.space)
    return dataclasses.replace(diffusion, denoiser=ClassifierFree(diffusion.denoiser, strength, interval))


class _Free:
    """A noise network with guidance at noise levels, which are told by its label, a quarter of their logarithm."""

    def __init__(self, network: Callable[..., Tensor], strength: float, interval: tuple[float, float]) -> None:
        def at_levels(x: Tensor, sigma: Tensor | float, **condition: Any) -> Tensor:
            return network(x, 0.25 * torch.as_tensor(sigma).log(), **condition)

        self._guided = ClassifierFree(at_levels, strength, interval)

    def __call__(self, z: Tensor, label: Tensor, **condition: Any) -> Tensor:
        return self._guided(z, (4 * label).exp(), **condition)
