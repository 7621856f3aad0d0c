r"""A diffusion is a process with a model of the data: it has a score, and it predicts x0.

Two kinds, and every sampler runs both:

* :class:`Diffusion` = process x denoiser. The score is :math:`-S_t^{-1}(z - m_t \otimes D(\tilde x, \sigma))`;
  one denoiser serves every process.
* :class:`NoiseDiffusion`, the papers' way: a network sees all K channels and predicts the noise of one process.

Either lives on a space. On one with coloured noise, of covariance C, the formula above is that of the *preconditioned*
score :math:`C \nabla \log p_t`, which stays finite as a grid gets finer; the score itself is that with C divided out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from undrift._linalg import as_f64, sqrt_sum
from undrift.denoise.base import Denoiser
from undrift.process.linear import LinearProcess, mix
from undrift.space import Space, space_of

__all__ = ["Diffusion", "NoiseDiffusion", "Predictor", "predictor_of", "require_white"]

Predictor = Callable[..., Tensor]
"""``predictor(z, i, **condition)`` -> prediction (batch, P, *event) at the i-th of the times it was made for."""


def _inverse_cov(root: Tensor, v: Tensor) -> Tensor:
    """(L L')^-1 applied to the columns of v (..., K, J)."""
    u = torch.linalg.solve_triangular(root, v, upper=False)
    return torch.linalg.solve_triangular(root.mT, u, upper=True)


def require_white(model: object, what: str) -> None:
    """Raise ValueError if the model's noise is coloured, where a density by coordinates is asked for."""
    if not space_of(model).white:
        raise ValueError(
            f"{what} is a density of coordinates under independent noise, and this model lives on a space of coloured "
            "noise, where functions have none. Give the space coordinates='whitened', in which C is the identity "
            "(values then depend on the grid), or judge with distances between samples."
        )


@dataclass(frozen=True, eq=False)
class Diffusion:
    """Process x denoiser.

    Args:
        process: any linear process.
        denoiser: any denoiser, whatever process or noise levels it was made with.
        space: where the points live and the colour of their noise; by default the denoiser's, if it has one, or White.

    Raises:
        ValueError: if the denoiser has a clock of modes, which is a ModalDiffusion's.
    """

    process: LinearProcess
    denoiser: Denoiser
    space: Space = field(default=None)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        object.__setattr__(self, "space", space_of(self.denoiser, self.space))
        if getattr(self.denoiser, "clock", None) is not None:
            raise ValueError(
                f"Diffusion: the {type(self.denoiser).__name__} was made with a modal clock, on which every mode has a "
                "level of its own; give it to a ModalDiffusion."
            )

    @property
    def predictions(self) -> int:
        """P = 1: the model predicts channel 0 of the start state; the auxiliaries' start has mean 0."""
        return 1

    def predict(self, z: Tensor, t: object, **condition: Any) -> Tensor:
        """E[x0 | z_t = z]: z (batch, K, *event), one time or one per sample; returns (batch, *event)."""
        x, sigma = self.process.statistic(z, t)
        return self.denoiser(x, sigma.to(x), **condition)

    def score(self, z: Tensor, t: object, **condition: Any) -> Tensor:
        """grad log p_t(z), same shape as z (batch, K, *event); on functions, for the inner product of L^2."""
        return self.space.precision(self.preconditioned_score(z, t, **condition))

    def preconditioned_score(self, z: Tensor, t: object, **condition: Any) -> Tensor:
        """C grad log p_t(z), same shape as z (batch, K, *event): the score on White, and finite on every grid.

        References:
            Pidstrigach et al. 2023 (arXiv 2302.10130), definition 1.
        """
        x0 = self.predict(z, t, **condition)
        mean, root = self.process.kernel(self.process._per_sample(z, t))
        eye = torch.eye(self.process.channels, dtype=root.dtype)
        return mix(
            -_inverse_cov(root, torch.cat([eye.expand_as(root), -mean.unsqueeze(-1)], -1)),
            torch.cat([z, x0.unsqueeze(1)], 1),
        )

    def reading(self, times: Tensor) -> Tensor:
        """What :meth:`read` needs at times (N,): the row that reads x~ off z, and sigma; (N, K + 1)."""
        snr, row = self.process._weights(as_f64(times))
        return torch.cat([row, snr.rsqrt().unsqueeze(-1)], -1)

    def read(self, z: Tensor, reading: Tensor, **condition: Any) -> Tensor:
        """Predicted start (batch, P, *event) for z (batch, K, *event) and one row of :meth:`reading`."""
        x = mix(reading[:-1].unsqueeze(0), z).squeeze(1)
        return self.denoiser(x, reading[-1].to(x).expand(z.shape[0]), **condition).unsqueeze(1)

    def predictor(self, times: Tensor) -> Predictor:
        """Predictor at fixed times (N,), its coefficients computed once; P = 1."""
        return predictor_of(self, times)


class NoiseCoefficients(NamedTuple):
    """A process at times (N,), as a noise network sees it.

    Attributes:
        root: root of the covariance that the noise is measured in, of the kernel the network was trained by, (N, K, K).
        baseline: matrix b of the baseline score b z, (N, K, K).
        scale: deviations of the channels, by which the network's inputs are divided, (N, K).
        label: a quarter of log sigma, (N,).
        phi, full: Phi(0, t) and the root of S_t, (N, K, K).
    """

    root: Tensor
    baseline: Tensor
    scale: Tensor
    label: Tensor
    phi: Tensor
    full: Tensor


class NoiseDiffusion:
    r"""The papers' parametrisation: a network :math:`\epsilon_\theta` on all K channels, tied to one process.

    .. math:: \nabla \log p_t(z) \approx s_\theta(z, t) = b_t(z) - L_t^{-\top} \epsilon_\theta(z / \text{scale}_t, c_t)

    with :math:`L_t L_t^\top = S_t` and label :math:`c_t = \frac14 \log \sigma(t)`. The baseline :math:`b_t` is 0, or
    with ``mixed`` the score of Gaussian data of deviation ``data_std``, so that the network learns the departure.

    Args:
        process: the process the network is trained for.
        network: maps (batch, K, *event) and labels (batch,) to (batch, K, *event).
        kernel: "hsm" if trained by hybrid score matching (auxiliary start integrated out), "dsm" if conditioned on it;
            the score must be read with the covariance of the kernel that trained it.
        factor: "lower" Cholesky, or the "upper" triangular root.
        mixed: add the Gaussian baseline.
        data_std: deviation of one data coordinate; scales the network's inputs and the baseline.
        space: where the points live; on a space of coloured noise the network predicts noise of that colour.

    References:
        Pandey & Mandt 2023, eq. 9-10; Dockhorn et al. 2022, eq. 8-9 (hybrid score matching and mixed score).
    """

    def __init__(
        self,
        process: LinearProcess,
        network: Callable[..., Tensor],
        kernel: Literal["hsm", "dsm"] = "hsm",
        factor: Literal["lower", "upper"] = "lower",
        mixed: bool = False,
        data_std: float = 1.0,
        space: Space | None = None,
    ) -> None:
        if kernel not in ("hsm", "dsm"):
            raise ValueError(f"NoiseDiffusion: kernel must be 'hsm' or 'dsm', got {kernel!r}.")
        if factor not in ("lower", "upper"):
            raise ValueError(f"NoiseDiffusion: factor must be 'lower' or 'upper', got {factor!r}.")
        if not data_std > 0:
            raise ValueError(f"NoiseDiffusion: data_std must be positive, got {data_std}.")
        self.process, self.network = process, network
        self.kernel, self.factor, self.mixed, self.data_std = kernel, factor, mixed, data_std
        self.space = space_of(network, space)

    @property
    def predictions(self) -> int:
        """P = K: the model predicts every channel of the start state."""
        return self.process.channels

    def coefficients(self, t: Tensor) -> NoiseCoefficients:
        """What training and sampling need of the process at times t (N,), from one evaluation of its kernel."""
        phi, full = self.process.marginal(t)
        mean = phi[..., 0]
        root = full if self.kernel == "hsm" else self.process.transition(torch.zeros_like(t), t)[1]
        if self.factor == "upper":
            # Reversing the channels turns a lower Cholesky factor into an upper one.
            root = sqrt_sum(root.flip(-2)).flip(-1, -2)
        gaussian = sqrt_sum(full, self.data_std * mean.unsqueeze(-1))
        baseline = torch.zeros_like(full)
        if self.mixed:
            baseline = -_inverse_cov(gaussian, torch.eye(mean.shape[-1], dtype=full.dtype).expand_as(full))
        sigma = torch.linalg.solve_triangular(full, mean.unsqueeze(-1), upper=False).square().sum((-2, -1)).rsqrt()
        return NoiseCoefficients(
            root, baseline, torch.linalg.vector_norm(gaussian, dim=-1), 0.25 * sigma.log(), phi, full
        )

    def _noise(self, z: Tensor, scale: Tensor, label: Tensor, **condition: Any) -> Tensor:
        scaled = z / scale.to(z).reshape(-1, scale.shape[-1], *[1] * (z.ndim - 2))
        return self.network(scaled, label.to(z).expand(z.shape[0]), **condition)

    def noise(self, z: Tensor, t: object, **condition: Any) -> Tensor:
        """Network output at z (batch, K, *event) and times (batch,) or one time: same shape as z."""
        return self.noise_at(z, self.coefficients(self.process._per_sample(z, t)), **condition)

    def noise_at(self, z: Tensor, c: NoiseCoefficients, **condition: Any) -> Tensor:
        """Network output at z, from the coefficients of its times."""
        return self._noise(z, c.scale, c.label, **condition)

    def score(self, z: Tensor, t: object, root: Tensor | None = None, **condition: Any) -> Tensor:
        """Estimated grad log p_t(z), same shape as z (batch, K, *event).

        Args:
            z: states.
            t: one time, or one per sample.
            root: R (..., K, K), float64, for R' times the score: where R is a kernel's root, a number of order 1 near
                the data where the score itself diverges. The product is taken before it meets z's precision.
        """
        return self.space.precision(self.preconditioned_score(z, t, root, **condition))

    def preconditioned_score(self, z: Tensor, t: object, root: Tensor | None = None, **condition: Any) -> Tensor:
        """C times :meth:`score`: the same on White, and finite on every grid."""
        c = self.coefficients(self.process._per_sample(z, t))
        return self.score_of(z, self.noise_at(z, c, **condition), c, root)

    def score_of(self, z: Tensor, noise: Tensor, c: NoiseCoefficients, root: Tensor | None = None) -> Tensor:
        """The preconditioned score at z, from the network's answer there and the coefficients of its time."""
        columns = torch.cat([c.baseline, -torch.linalg.inv(c.root).mT], -1)
        return mix(columns if root is None else root.mT @ columns, torch.cat([z, noise.to(z)], 1))

    def predict(self, z: Tensor, t: object, **condition: Any) -> Tensor:
        r"""x0 by the part of the score that speaks about it: :math:`m^\top S^{-1}(z + S s)/snr`; (batch, *event)."""
        return self.tweedie(z, t, self.preconditioned_score(z, t, **condition))

    def tweedie(self, z: Tensor, t: object, score: Tensor) -> Tensor:
        """x0 by the preconditioned score at z; (batch, *event)."""
        time = self.process._per_sample(z, t)
        full = self.process.kernel(time)[1]
        row = self.process._weights(time)[1].unsqueeze(-2)
        return mix(torch.cat([row, row @ full @ full.mT], -1), torch.cat([z, score], 1)).squeeze(1)

    def reading(self, times: Tensor) -> Tensor:
        r"""What :meth:`read` needs at times (N,), flat, (N, 2 K^2 + K + 1).

        The map to :math:`\Phi^{-1}(z + S_t s_\theta)`, the input scales, and the label.
        """
        c = self.coefficients(as_f64(times))
        s = c.full @ c.full.mT
        eye = torch.eye(s.shape[-1], dtype=s.dtype)
        back = torch.linalg.solve(c.phi, torch.cat([eye + s @ c.baseline, -s @ torch.linalg.inv(c.root).mT], -1))
        return torch.cat([back.flatten(1), c.scale, c.label.unsqueeze(-1)], -1)

    def read(self, z: Tensor, reading: Tensor, **condition: Any) -> Tensor:
        """Predicted start state (batch, K, *event), by Tweedie's formula, for one row of :meth:`reading`."""
        return self.start(z, self.ask(z, reading, **condition), reading)

    def ask(self, z: Tensor, reading: Tensor, **condition: Any) -> Tensor:
        """The network's answer at z (batch, K, *event), for readings (R,) or one per sample (batch, R)."""
        k = self.process.channels
        scale = reading[..., -k - 1 : -1].expand(z.shape[0], k)
        return self._noise(z, scale, reading[..., -1], **condition)

    def start(self, z: Tensor, noise: Tensor, reading: Tensor) -> Tensor:
        """The predicted start state, from the network's answer at z."""
        k = self.process.channels
        back = reading[..., : 2 * k * k].reshape(*reading.shape[:-1], k, 2 * k)
        return mix(back, torch.cat([z, noise.to(z)], 1))

    def predictor(self, times: Tensor) -> Predictor:
        """Predictor of the whole start state at fixed times (N,), its coefficients computed once; P = K."""
        return predictor_of(self, times)


class _Readable(Protocol):
    def reading(self, times: Tensor) -> Tensor: ...

    def read(self, z: Tensor, reading: Tensor, **condition: Any) -> Tensor: ...


def predictor_of(diffusion: _Readable, times: Tensor) -> Predictor:
    """What a diffusion predicts at fixed times (N,), its readings made once."""
    readings = diffusion.reading(times)

    def predict(z: Tensor, i: int, **condition: Any) -> Tensor:
        return diffusion.read(z, readings[i], **condition)

    return predict
