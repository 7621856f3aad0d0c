r"""What training minimises.

Every objective returns one number per sample, a mean over the sample's coordinates, and the noise level it was taken
at; the loss is the mean over the batch.

For a denoiser, with :math:`e(\sigma) = E\|x_0 - D(x_0 + \sigma n, \sigma)\|^2` per coordinate, a *weight* is w in
:math:`E_{\sigma \sim p}[w(\sigma)\, e(\sigma)]`. The same weight looks different in each parametrisation: an error of
the predicted noise is :math:`e/\sigma^2`, an error of EDM's raw network output F is :math:`e/c_{out}^2`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from undrift._linalg import psd_sqrt
from undrift.bound import Bound
from undrift.diffusion import Diffusion, NoiseDiffusion, require_white
from undrift.process.linear import mix
from undrift.process.times import InformationTimes, LogSnrTimes, TimeDensity, earliest
from undrift.space import White, space_of
from undrift.train.levels import DefensiveMixture, NoiseLevels, stratified

__all__ = ["Denoising", "EvidenceBound", "NoiseMatching", "Objective"]


class Objective(ABC):
    """Base of all objectives.

    Attributes:
        drops_classes: whether the trainer may hide the class of a sample, for classifier-free guidance.
    """

    drops_classes: ClassVar[bool] = True

    @abstractmethod
    def loss(self, model: Any, x: Tensor, generator: torch.Generator, **condition: Any) -> tuple[Tensor, Tensor]:
        """
        Args:
            model: what is trained.
            x: data (batch, *event).
            generator: source of all randomness, on x's device.
            condition: passed on to the model.

        Returns:
            Loss of each sample (batch,), and its noise level sigma (batch,).
        """


@dataclass(frozen=True, eq=False)
class Denoising(Objective):
    r"""Squared error of a denoiser at random noise levels.

    Weights on the error of the prediction of x0:

    * "edm": :math:`w = (\sigma^2 + \sigma_d^2)/(\sigma \sigma_d)^2 = 1/c_{out}^2`, unit weight on the error of the raw
      network F, so that the density of the levels alone says what matters (Karras et al. 2022, eq. 8 and table 1);
    * "likelihood": :math:`w = \sigma^{-2}/p(\ln\sigma)`, an unbiased estimate of the ELBO's path term
      :math:`\frac12 \int e\, d\,\mathrm{snr} = \int e\,\sigma^{-2}\, d\ln\sigma` over the levels' range, in nats per
      coordinate, whatever the density p;
    * "uniform": :math:`w = \sigma^{-2}`, unit weight on the error of the predicted noise (the "simple" loss of Ho
      et al. 2020 where the levels follow its schedule).

    What is minimised is :math:`\int \mathrm{total}(\sigma)\, e(\sigma)\, d\ln\sigma` with the total weighting
    total = w p. By itself a change of p changes it. To visit other levels for the same objective, name the density
    that defines it as ``target``: losses are multiplied by target / p.

    On a space of functions the noise is the space's, and the error's size its norm, with weights
    :math:`\lambda_j^{-\theta}` on the modes. At theta = 0, the norm of L^2, loss and gradient stay finite as the grid
    gets finer; at theta = 1, which is what the likelihood counts, their variance grows with it. The minimiser is the
    same.

    Args:
        weighting: one of the above.
        noise: density p of the levels that are visited. "likelihood" needs one with a bounded range.
        target: density that defines the objective, for "edm" and "uniform"; None for ``noise`` itself.
        theta: exponent of the weights on the modes of a function, in [0, 1]; 0 on White.
    """

    weighting: Literal["edm", "likelihood", "uniform"] = "edm"
    noise: NoiseLevels = field(default_factory=DefensiveMixture)
    target: NoiseLevels | None = None
    theta: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.theta <= 1:
            raise ValueError(f"Denoising: theta must lie in [0, 1], got {self.theta}.")
        if self.weighting not in ("edm", "likelihood", "uniform"):
            raise ValueError(f"Denoising: weighting must be 'edm', 'likelihood' or 'uniform', got {self.weighting!r}.")
        if self.weighting == "likelihood" and not (self.noise.support[0] > 0 and self.noise.support[1] < math.inf):
            raise ValueError(
                f"Denoising: the likelihood is an integral over a range of levels, and {type(self.noise).__name__} has "
                "none; use LogUniform or DefensiveMixture."
            )
        if self.target is not None:
            if self.weighting == "likelihood":
                raise ValueError("Denoising: the likelihood's weight corrects for noise already; leave target out.")
            (low, high), (first, last) = self.noise.support, self.target.support
            if first < low * (1 - 1e-6) or last > high * (1 + 1e-6):
                raise ValueError(
                    f"Denoising: target has levels from {first:g} to {last:g}, noise only from {low:g} to {high:g}: "
                    "the rest would never be trained; widen noise, or narrow target."
                )

    def weight(self, sigma: Tensor, sigma_data: float | None = None) -> Tensor:
        """w(sigma) on the squared error of x0, same shape as ``sigma``; ``sigma_data`` matters to "edm" only."""
        if self.weighting == "likelihood":
            return 1 / (sigma.square() * self.noise.density(sigma))
        weight = self._plain(sigma, sigma_data)
        return weight if self.target is None else weight * self.target.density(sigma) / self.noise.density(sigma)

    def total(self, sigma: Tensor, sigma_data: float | None = None) -> Tensor:
        """What a unit of ln sigma counts for in the objective, w p, whatever levels are visited; shape of ``sigma``."""
        if self.weighting == "likelihood":
            return torch.where(self.noise.density(sigma) > 0, sigma.square().reciprocal(), 0.0)
        return self._plain(sigma, sigma_data) * (self.target or self.noise).density(sigma)

    def visiting(self, noise: NoiseLevels) -> Denoising:
        """The same objective, estimated at other levels.

        Raises:
            ValueError: if they leave out levels that the objective counts.
        """
        if self.weighting == "likelihood":
            if any(abs(a / b - 1) > 1e-6 for a, b in zip(noise.support, self.noise.support, strict=True)):
                raise ValueError(
                    f"Denoising: the likelihood is an integral over the levels from {self.noise.support[0]:g} to "
                    f"{self.noise.support[1]:g}; a density from {noise.support[0]:g} to {noise.support[1]:g} would "
                    "change it."
                )
            return replace(self, noise=noise)
        return replace(self, noise=noise, target=self.target or self.noise)

    def _plain(self, sigma: Tensor, sigma_data: float | None) -> Tensor:
        if self.weighting == "uniform":
            return sigma.square().reciprocal()
        if sigma_data is None:
            raise ValueError("Denoising: the EDM weight needs a model with sigma_data; use another weighting.")
        return sigma.square().reciprocal() + 1 / sigma_data**2

    def loss(self, model: Any, x: Tensor, generator: torch.Generator, **condition: Any) -> tuple[Tensor, Tensor]:
        model = model.denoiser if isinstance(model, Diffusion) else model
        sigma = self.noise.draw(stratified(x.shape[0], generator))
        weight = self.weight(sigma, getattr(model, "sigma_data", None)).to(x)
        sigma = sigma.to(x)
        space = space_of(model)
        noise = space.colour(torch.empty_like(x).normal_(generator=generator))
        noisy = torch.addcmul(x, noise, sigma.reshape(-1, *[1] * (x.ndim - 1)))
        error = model(noisy, sigma, **condition) - x
        if isinstance(space, White):
            if self.theta:
                raise ValueError("Denoising: theta weights the modes of functions; this model lives on White.")
            return weight * error.reshape(x.shape[0], -1).square().mean(1), sigma
        return weight * space.norm2(error, self.theta), sigma


@dataclass(frozen=True, eq=False)
class NoiseMatching(Objective):
    r"""Error of the predicted noise on all K channels, for a :class:`~undrift.diffusion.NoiseDiffusion`.

    The state is :math:`z_t = \mu + L \epsilon`. By hybrid score matching (the model's kernel "hsm")
    :math:`\mu = m_t x_0` and L includes the auxiliaries' start; by denoising score matching ("dsm") a start
    :math:`v_0 \sim N(0, \text{start})` is drawn, :math:`\mu = \Phi (x_0, v_0)`, and L is the kernel's given both. The
    model's score :math:`b(z) - L^{-\top}\epsilon_\theta` matches :math:`-L^{-\top}\epsilon` where
    :math:`\epsilon_\theta = \epsilon + L^\top b(z)`; the baseline b is 0 unless the model has a mixed score.

    * "uniform": mean of the squared error of :math:`\epsilon_\theta` over channels and coordinates, t uniform
      (Pandey & Mandt 2023, eq. 10);
    * "likelihood": :math:`\frac12 (T - t_{min}) \|s_\theta - \nabla\log p\|^2_{GG^\top}`, summed over channels, a mean
      over coordinates: an estimate of the ELBO's path term in nats per coordinate, up to a constant (eq. 8).

    Args:
        weighting: one of the above.
        t_min: earliest time.
    """

    weighting: Literal["uniform", "likelihood"] = "uniform"
    t_min: float = 1e-5

    def __post_init__(self) -> None:
        if self.weighting not in ("uniform", "likelihood"):
            raise ValueError(f"NoiseMatching: weighting must be 'uniform' or 'likelihood', got {self.weighting!r}.")
        if not 0 < self.t_min < math.inf:
            raise ValueError(
                f"NoiseMatching: t_min must be positive, got {self.t_min}; at t = 0 there is no noise to predict."
            )

    def loss(self, model: Any, x: Tensor, generator: torch.Generator, **condition: Any) -> tuple[Tensor, Tensor]:
        if not isinstance(model, NoiseDiffusion):
            raise TypeError(
                f"NoiseMatching: trains a NoiseDiffusion, got a {type(model).__name__}; Denoising trains denoisers."
            )
        require_white(model, "NoiseMatching")
        span = model.process.horizon - self.t_min
        if not span > 0:
            raise ValueError(f"NoiseMatching: t_min = {self.t_min} must lie below T = {model.process.horizon}.")
        t = (self.t_min + span * stratified(x.shape[0], generator)).cpu()
        return self.loss_at(model, x, t, generator, **condition)

    def loss_at(
        self, model: NoiseDiffusion, x: Tensor, t: Tensor, generator: torch.Generator, **condition: Any
    ) -> tuple[Tensor, Tensor]:
        """``loss`` at given times t, float64: one per sample (batch,), or one for all (1,)."""
        process = model.process
        with torch.no_grad():
            c = model.coefficients(t)
            noise = torch.empty(x.shape[0], process.channels, *x.shape[1:], dtype=x.dtype, device=x.device)
            noise.normal_(generator=generator)
            start = x.unsqueeze(1)
            if model.kernel == "hsm":
                mean = c.phi[..., :1]
            else:
                mean = c.phi
                aux = torch.empty_like(noise).normal_(generator=generator)
                start = mix(psd_sqrt(process.start()), aux) + torch.nn.functional.pad(
                    start, [0, 0] * (x.ndim - 1) + [0, process.channels - 1]
                )
            z = mix(torch.cat([mean, c.root], -1), torch.cat([start, noise], 1))
            target = noise + mix(c.root.mT @ c.baseline, z) if model.mixed else noise
        error = model._noise(z, c.scale, c.label, **condition).to(z) - target
        sigma = (4 * c.label).exp().to(x).expand(x.shape[0])
        if self.weighting == "likelihood":
            # G' L^-T, in float64 since L is nearly singular, applied to the error of the noise
            gain = psd_sqrt(process.diffusion(t)).mT @ torch.linalg.inv(c.root).mT
            squares = mix(gain, error).square().sum(1).reshape(x.shape[0], -1).mean(1)
            return 0.5 * (process.horizon - self.t_min) * squares, sigma
        return error.reshape(x.shape[0], -1).square().mean(1), sigma


@dataclass(frozen=True, eq=False)
class EvidenceBound(Objective):
    """Minus the evidence lower bound, whole: in nats per coordinate, unbiased, and differentiable in the process.

    Trains a :class:`~undrift.diffusion.Diffusion` (process and denoiser) or a
    :class:`~undrift.diffusion.NoiseDiffusion`, and the process with it if that has parameters: through the kernel, the
    weight, the prior's divergence and the decoder. See :mod:`undrift.bound`.

    One call of the model serves path and decoder: a share of each batch is taken at the earliest time.

    Args:
        sigma_min: noise level, in data units, at which the decoder takes over.
        t_min: the time at which it does, instead.
        times: density of the times; None for uniform ln sigma with a denoiser, else in proportion to tr(GG' S^-1).
        start_share: share of a batch that serves the decoder, in (0, 1).

    References:
        Singhal, Goldstein & Ranganath, Where to Diffuse, How to Diffuse, and How to Get Back, 2023, section 3.
    """

    sigma_min: float = 1e-3
    t_min: float | None = None
    times: TimeDensity | None = None
    start_share: float = 0.0625

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < math.inf:
            raise ValueError(f"EvidenceBound: sigma_min must be positive, got {self.sigma_min}.")
        if self.t_min is not None and not self.t_min > 0:
            raise ValueError(f"EvidenceBound: t_min must be positive, got {self.t_min}.")
        if not 0 < self.start_share < 1:
            raise ValueError(f"EvidenceBound: start_share must lie in (0, 1), got {self.start_share}.")

    def loss(self, model: Any, x: Tensor, generator: torch.Generator, **condition: Any) -> tuple[Tensor, Tensor]:
        if not isinstance(model, (Diffusion, NoiseDiffusion)):
            raise TypeError(
                f"EvidenceBound: trains a Diffusion or a NoiseDiffusion, got a {type(model).__name__}; the bound is of "
                "a process with a model."
            )
        require_white(model, "EvidenceBound")
        process, n = model.process, x.shape[0]
        t_min = earliest(process, self.sigma_min) if self.t_min is None else self.t_min
        bound = Bound(model, t_min=t_min)
        times = self.times or (_LOG_SNR if isinstance(model, Diffusion) else _INFORMATION)
        u = stratified(n, generator).cpu()
        at_start = u < self.start_share
        inner = ((u - self.start_share) / (1 - self.start_share)).clamp(1e-12, 1 - 1e-12)
        t, density = times.draw(process, t_min, inner)
        t = torch.where(at_start, t_min, t)
        weight = torch.where(at_start, 1 / self.start_share, 1 / ((1 - self.start_share) * density))
        noise = torch.empty(n, bound.noises, *x.shape[1:], dtype=x.dtype, device=x.device).normal_(generator=generator)
        value, sigma = bound.sampled(x, t, at_start, weight, noise, **condition)
        return (value / x[0].numel()).to(x.dtype), sigma.detach().to(x)


_LOG_SNR, _INFORMATION = LogSnrTimes(64), InformationTimes(64)
