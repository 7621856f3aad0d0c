r"""The evidence lower bound of a diffusion, term by term, for any linear process and any number of auxiliaries.

With the kernel given x, :math:`q(z_t|x) = N(m_t x, S_t)`, :math:`S_t = L L^\top`, a model score :math:`s_\theta`, a
prior :math:`\pi` for z_T and an earliest time :math:`\epsilon`,

.. math::
    \log p(x) \ge \underbrace{-\mathrm{KL}(q(z_T|x) \| \pi)}_{\text{prior}}
    - \underbrace{\tfrac12 \int_\epsilon^T E\|s_\theta - \nabla \log q(z_t|x)\|^2_{GG^\top} dt}_{\text{path}}
    + \underbrace{E \log N(x; \hat x(z_\epsilon), \tau^2)}_{\text{start}}

Nothing but the mismatch of the scores is sampled: the entropy of z_eps and the drift's divergence cancel against the
terminal entropy. In the kernel's own noise coordinates, :math:`z = m x + L \xi`, the mismatch is
:math:`e = \xi + L^\top s_\theta`, and everything reads off it:

    path   1/2 e' M e, M = L^-1 GG' L^-T
    start  the data-only decoder, tau^2 = 1/snr(eps): -1/2 [d log(2 pi tau^2) + (w' e)^2], w = L^-1 m / |L^-1 m|

With a denoiser :math:`e = -L^{-1} m\,(x - D)`, so whatever the process

    path   1/2 (-snr') |x - D|^2          start   -1/2 [d log(2 pi sigma^2) + |x - D|^2 / sigma^2]

which depends on the process only through sigma(eps) and sigma(T): see :class:`Bound`, form "denoising".

The other forms, decoders and their bookkeeping (H_x, H_u: entropies of z_eps given x, and given u_0 = (x, v_0); H_v: of
the auxiliaries' start, for which a bound on the joint density is paid back):

    path       "hybrid"  against grad log q(z_t|x)                      takes H_x off the start
               "dsm"     against grad log q(z_t|u_0)                    takes H_u off
               "ism"     -1/2 |s|^2_GG' - div(GG' s) + div(F z)         takes nothing off; its prior is E log pi(z_T)
    decoder    "data"    log N(x; x^, tau^2) + H_x
               "joint"   log N(u_0; Phi^-1 (z + Sigma s), Phi^-1 Sigma Phi^-T) + H_u + H_v, Sigma that of q(z_eps|u_0)
               "none"    H_v: a bound on the density of z_eps, *not* of x

References:
    Singhal, Goldstein & Ranganath, Where to Diffuse, How to Diffuse, and How to Get Back, 2023, section 3 (the bound
    for any number of auxiliaries, "joint", "dsm", "ism").
    Huang, Lim & Courville, A Variational Perspective on Diffusion-Based Generative Models, 2021 (one channel).
    Kingma et al., Variational Diffusion Models, 2021, section 4 (the denoising form for one channel).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from undrift._linalg import psd_sqrt
from undrift._trace import carried_trace
from undrift.diffusion import Diffusion, NoiseCoefficients, NoiseDiffusion, require_white
from undrift.process.linear import mix

__all__ = ["Bound", "Decoder", "Form"]

Form = Literal["denoising", "hybrid", "dsm", "ism"]
Decoder = Literal["data", "joint", "none"]


class _Kernel(NamedTuple):
    """The kernel at times (N,).

    Attributes:
        phi: Phi(0, t).
        given_x: root L of S_t, the covariance given x.
        given_start: root of the covariance given u_0, where it is needed.
        noise: what a noise network needs at these times.
    """

    phi: Tensor
    given_x: Tensor
    given_start: Tensor
    noise: NoiseCoefficients | None

    def at(self, rows: slice) -> _Kernel:
        """The kernel at some of the times."""
        noise = None if self.noise is None else NoiseCoefficients(*(m[rows] for m in self.noise))
        return _Kernel(self.phi[rows], self.given_x[rows], self.given_start[rows], noise)


@dataclass(frozen=True, eq=False)
class Bound:
    """The bound's terms as differentiable functions of the model and of the process.

    Args:
        diffusion: a process with a denoiser or a noise network; any object with ``process`` and ``score(z, t)`` serves
            the forms that read a score.
        form: how the path term is written; None for "denoising" with a denoiser and "hybrid" otherwise. All are equal
            in expectation.
        decoder: how the stretch before t_min is closed. "data" is the tightest.
        t_min: earliest time eps; 0 is allowed for "ism" without a decoder.
        terminal: mean (K,) and root (K, K) of the Gaussian prior of z_T per coordinate; None for the process's own.

    Raises:
        ValueError: if the terms do not exist for this choice.
    """

    diffusion: Any
    form: Form | None = None
    decoder: Decoder = "data"
    t_min: float = 1e-5
    terminal: tuple[Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        for name, value, known in (
            ("form", self.form, (None, "denoising", "hybrid", "dsm", "ism")),
            ("decoder", self.decoder, ("data", "joint", "none")),
        ):
            if value not in known:
                raise ValueError(f"Bound: {name} must be one of {known}, got {value!r}.")
        require_white(self.diffusion, "Bound")
        process = self.diffusion.process
        name = type(process).__name__
        if self.form == "denoising" and not isinstance(self.diffusion, Diffusion):
            raise ValueError("Bound: the form 'denoising' is for a Diffusion, a process with a denoiser; use 'hybrid'.")
        if self._form == "denoising" and self.decoder != "data":
            raise ValueError(f"Bound: decoder {self.decoder!r} needs the score of all channels; use form 'hybrid'.")
        if not 0 <= self.t_min < process.horizon:
            raise ValueError(f"Bound: t_min must lie in [0, {process.horizon:g}) for {name}, got {self.t_min:g}.")
        if self.t_min == 0 and (self._form != "ism" or self.decoder != "none"):
            raise ValueError(
                "Bound: at t_min = 0 the path term diverges; only form 'ism' with decoder 'none' exists there."
            )
        if self.decoder != "data" and process.channels > 1 and bool((self._start_root().diagonal() <= 0).any()):
            raise ValueError(
                f"Bound: the auxiliaries of {name} start without spread, so their entropy is -inf and decoder "
                f"{self.decoder!r} does not exist; give them a positive start covariance, or use 'data'."
            )

    @property
    def _form(self) -> Form:
        return self.form or ("denoising" if isinstance(self.diffusion, Diffusion) else "hybrid")

    @property
    def noises(self) -> int:
        """Standard normal numbers per coordinate that :meth:`path` and :meth:`start` take, as channels of ``noise``.

        One for a denoiser, K where only x is given, and K - 1 more where the auxiliaries' start is drawn.
        """
        k = self.diffusion.process.channels
        if self._form == "denoising":
            return 1
        return 2 * k - 1 if self._form == "dsm" or self.decoder == "joint" else k

    def _start_root(self) -> Tensor:
        return psd_sqrt(self.diffusion.process.start()[1:, 1:])

    def _kernel(self, t: Tensor) -> _Kernel:
        process, c = self.diffusion.process, None
        if isinstance(self.diffusion, NoiseDiffusion):
            c = self.diffusion.coefficients(t)
        phi, root = process.marginal(t) if c is None else (c.phi, c.full)
        given_start = root
        if self.noises > process.channels:
            given_start = process.transition(torch.zeros_like(t), t)[1]
        return _Kernel(phi, root, given_start, c)

    # -- prior ---------------------------------------------------------------------------------------------------------

    def prior(self, x: Tensor) -> Tensor:
        """-KL(q(z_T | .) || pi), or E log pi(z_T) for "ism", in nats: (batch,), in closed form.

        Args:
            x: data (batch, *event).
        """
        return self._prior(x, self._kernel(torch.full((1,), self.diffusion.process.horizon, dtype=torch.float64)))

    def _prior(self, x: Tensor, last: _Kernel) -> Tensor:
        process = self.diffusion.process
        k = process.channels
        phi, root, given_start = (m[0] for m in last[:3])
        centre, scale = (
            (torch.zeros(k, dtype=torch.float64), process.prior()) if self.terminal is None else self.terminal
        )

        def whiten(m: Tensor) -> Tensor:
            return torch.linalg.solve_triangular(scale, m, upper=False)

        # E |R^-1 (z_T - c)|^2 is the same whether the auxiliaries' start is drawn or integrated out.
        pull, offset = whiten(phi[:, :1]).squeeze(-1), whiten(centre.unsqueeze(-1)).squeeze(-1)
        d = x[0].numel()
        first, second = x.double().flatten(1).sum(1).cpu(), x.double().square().flatten(1).sum(1).cpu()
        squares = pull.square().sum() * second - 2 * (pull @ offset) * first + d * offset.square().sum()
        squares = squares + d * whiten(root).square().sum()
        value = -0.5 * (squares + 2 * d * _log_det(scale))
        if self._form == "ism":
            value = value - 0.5 * d * k * math.log(2 * math.pi)
        else:
            value = value + d * (_log_det(given_start if self._form == "dsm" else root) + 0.5 * k)
        return value.to(x.device)

    # -- path ----------------------------------------------------------------------------------------------------------

    def path(self, x: Tensor, t: Tensor, noise: Tensor, probe: Tensor | None = None, **condition: Any) -> Tensor:
        """Integrand of the path term at one time per sample, in nats per unit of time: (batch,), in float64.

        Args:
            x: data (batch, *event).
            t: times in [t_min, T], (batch,) or (1,), float64.
            noise: standard normal (batch, noises, *event).
            probe: for "ism", signs (batch, r, *event) where GG' has rank r, for an unbiased estimate of the divergence;
                without, it is exact, by one backward pass for every coordinate that carries noise.
            condition: handed to the model.
        """
        process, kernel = self.diffusion.process, self._kernel(t)
        if self._form == "denoising":
            sigma, rate = self._information(kernel, t)
            return -0.5 * rate.to(x.device) * self._denoising_error(x, sigma, noise, **condition)
        if self._form == "ism":
            return self._implicit(x, t, kernel, noise, probe, **condition)
        by_start = self._form == "dsm"
        e = self._mismatch(x, t, kernel, noise, by_start, **condition)
        root = kernel.given_start if by_start else kernel.given_x
        gain = torch.linalg.solve_triangular(root, psd_sqrt(process.diffusion(t)), upper=False).mT
        return -0.5 * _squares(mix(gain, e))

    def path_control(self, t: Tensor, noise: Tensor) -> Tensor:
        r"""A control variate for :meth:`path`, of mean zero at every t: (batch,), in float64.

        The path term with the raw noise in place of the mismatch, :math:`-\tfrac12(\xi^\top M \xi - d\,tr M)`. Near the
        data a model that knows x up to sigma leaves e close to xi, and the two nearly cancel.

        Raises:
            ValueError: for "ism", whose integrand is no such square.
        """
        process, d = self.diffusion.process, noise[0, 0].numel()
        if self._form == "ism":
            raise ValueError("Bound: the form 'ism' has no control variate.")
        kernel = self._kernel(t)
        if self._form == "denoising":
            sigma, rate = self._information(kernel, t)
            return -0.5 * (rate * sigma.square()).to(noise.device) * (_squares(noise) - d)
        root = kernel.given_start if self._form == "dsm" else kernel.given_x
        gain = torch.linalg.solve_triangular(root, psd_sqrt(process.diffusion(t)), upper=False)
        mean = d * gain.square().sum((-2, -1)).to(noise.device)
        return -0.5 * (_squares(mix(gain.mT, noise[:, : process.channels])) - mean)

    def start_control(self, noise: Tensor) -> Tensor:
        """The same for :meth:`start`: (batch,), in float64."""
        if self.decoder == "none":
            return torch.zeros(noise.shape[0], dtype=torch.float64, device=noise.device)
        xi = noise[:, : self.diffusion.process.channels]
        if self._form != "denoising" and self.decoder == "data":
            t = torch.full((1,), self.t_min, dtype=torch.float64)
            xi = mix(_reader(self._kernel(t))[0], xi)
        return -0.5 * (_squares(xi) - xi[0].numel())

    def _information(self, kernel: _Kernel, t: Tensor) -> tuple[Tensor, Tensor]:
        """sigma and -d snr/dt at the kernel's times, each (N,)."""
        direction, sigma = _reader(kernel)
        pull = torch.linalg.solve_triangular(kernel.given_x.mT, direction.mT, upper=True) / sigma[:, None, None]
        return sigma, (pull.mT @ self.diffusion.process.diffusion(t) @ pull)[..., 0, 0]

    def start(self, x: Tensor, noise: Tensor, **condition: Any) -> Tensor:
        """The term that closes [0, t_min], in nats: (batch,), in float64.

        Args:
            x: data (batch, *event).
            noise: standard normal (batch, noises, *event).
            condition: handed to the model.
        """
        t = torch.full((1,), self.t_min, dtype=torch.float64)
        return self.start_constant(x) - 0.5 * self._start_squares(x, t, noise, **condition)

    def start_constant(self, x: Tensor) -> Tensor:
        """What of :meth:`start` is no square of a mismatch: its log determinants and entropies, a scalar in nats."""
        first = self._kernel(torch.full((1,), self.t_min, dtype=torch.float64)) if self.t_min > 0 else None
        return self._start_constant(x, first)

    def _start_constant(self, x: Tensor, first: _Kernel | None) -> Tensor:
        k, d = self.diffusion.process.channels, x[0].numel()
        constant = torch.zeros((), dtype=torch.float64)
        if self.decoder != "data" and k > 1:
            constant = constant + d * (_log_det(self._start_root()) + 0.5 * (k - 1) * math.log(2 * math.pi * math.e))
        if first is not None:
            phi, root, given_start = (m[0] for m in first[:3])
            entropy = 0.5 * k * math.log(2 * math.pi * math.e)
            h_x, h_u = d * (_log_det(root) + entropy), d * (_log_det(given_start) + entropy)
            if self.decoder == "data":
                constant = constant + h_x - d * (0.5 * math.log(2 * math.pi) + _reader(first)[1][0].log())
            elif self.decoder == "joint":
                constant = constant + d * (torch.linalg.slogdet(phi).logabsdet + 0.5 * k)
            if self._form != "ism":
                constant = constant - (h_u if self._form == "dsm" else h_x)
        return constant.to(x.device)

    def _start_squares(self, x: Tensor, t: Tensor, noise: Tensor, **condition: Any) -> Tensor:
        """The squared mismatch of the decoder, (batch,)."""
        if self.decoder == "none":
            return torch.zeros(x.shape[0], dtype=torch.float64, device=x.device)
        kernel = self._kernel(t)
        if self._form == "denoising":
            sigma = _reader(kernel)[1]
            return self._denoising_error(x, sigma, noise, **condition) / sigma.square().to(x.device)
        e = self._mismatch(x, t, kernel, noise, self.decoder == "joint", **condition)
        if self.decoder == "joint":
            return _squares(e)
        return _squares(mix(_reader(kernel)[0], e))

    def sampled(
        self, x: Tensor, t: Tensor, at_start: Tensor, weight: Tensor, noise: Tensor, **condition: Any
    ) -> tuple[Tensor, Tensor]:
        """Minus the bound from one draw per sample, for training: the model is called once, and the kernel once.

        Args:
            x: data (batch, *event).
            t: times (batch,), float64; ``t_min`` where ``at_start``.
            at_start: which samples serve the start term, and not the path, (batch,), bool, on the CPU.
            weight: one over the density of each draw, (batch,), float64.
            noise: standard normal (batch, noises, *event).
            condition: handed to the model.

        Returns:
            Minus :meth:`prior`, less the constant of :meth:`start`, plus ``weight`` times the sample's term, (batch,),
            in float64; and noise levels, (batch,).
        """
        if self.decoder != "data" or self._form not in ("denoising", "hybrid"):
            raise ValueError(f"Bound: training uses forms 'denoising' and 'hybrid' with decoder 'data', got {self}.")
        process, n = self.diffusion.process, len(t)
        ends = torch.tensor([self.t_min, process.horizon], dtype=torch.float64)
        everywhere = self._kernel(torch.cat([t, ends]))
        kernel = everywhere.at(slice(n))
        if self._form == "denoising":
            sigma, rate = self._information(kernel, t)
            factor = torch.where(at_start, sigma.square().reciprocal(), rate).to(x.device)
            squares = factor * self._denoising_error(x, sigma, noise, **condition)
        else:
            reader, sigma = _reader(kernel)
            reader = torch.nn.functional.pad(reader, (0, 0, 0, process.channels - 1))
            gain = torch.linalg.solve_triangular(kernel.given_x, psd_sqrt(process.diffusion(t)), upper=False).mT
            e = self._mismatch(x, t, kernel, noise, False, **condition)
            squares = _squares(mix(torch.where(at_start[:, None, None], reader, gain), e))
        first, last = everywhere.at(slice(n, n + 1)), everywhere.at(slice(n + 1, n + 2))
        value = 0.5 * weight.to(x.device) * squares - self._prior(x, last) - self._start_constant(x, first)
        return value, sigma

    # -- mismatches ----------------------------------------------------------------------------------------------------

    def _denoising_error(self, x: Tensor, sigma: Tensor, noise: Tensor, **condition: Any) -> Tensor:
        """|x - D(x + sigma n, sigma)|^2, (batch,)."""
        sigma = sigma.to(x)
        noisy = x + sigma.reshape(-1, *[1] * (x.ndim - 1)) * noise[:, 0]
        return _squares(x - self.diffusion.denoiser(noisy, sigma.expand(x.shape[0]), **condition))

    def _state(self, x: Tensor, kernel: _Kernel, noise: Tensor, by_start: bool) -> tuple[Tensor, Tensor]:
        """z_t (batch, K, *event), and the noise that made it, from the kernel given x or given u_0."""
        k = self.diffusion.process.channels
        source = [x.unsqueeze(1), noise[:, :k]]
        columns = [kernel.phi[..., :1], kernel.given_x]
        if by_start and k > 1:
            source = [x.unsqueeze(1), noise[:, k:], noise[:, :k]]
            columns = [kernel.phi[..., :1], kernel.phi[..., 1:] @ self._start_root(), kernel.given_start]
        return mix(torch.cat(columns, -1), torch.cat(source, 1)), noise[:, :k]

    def _mismatch(
        self, x: Tensor, t: Tensor, kernel: _Kernel, noise: Tensor, by_start: bool, **condition: Any
    ) -> Tensor:
        """e = xi + L' s_theta, (batch, K, *event), for the kernel given x, or given u_0."""
        z, xi = self._state(x, kernel, noise, by_start)
        root = kernel.given_start if by_start else kernel.given_x
        if kernel.noise is not None:  # L' times the score's own factor is of order 1, and taken in float64
            assert isinstance(self.diffusion, NoiseDiffusion)
            said = self.diffusion.noise_at(z, kernel.noise, **condition)
            return xi + self.diffusion.score_of(z, said, kernel.noise, root)
        return xi + mix(root.mT, self.diffusion.score(z, t, **condition))

    def _implicit(
        self, x: Tensor, t: Tensor, kernel: _Kernel, noise: Tensor, probe: Tensor | None, **condition: Any
    ) -> Tensor:
        r"""-1/2 |s|^2_a - div(a s) + div(F z) with a = GG' = g g'; only coordinates that carry noise are probed."""
        process, d = self.diffusion.process, x[0].numel()
        z, _ = self._state(x, kernel, noise, False)
        g = psd_sqrt(process.diffusion(t))
        g = g[..., (g != 0).flatten(0, -2).any(0)]
        shape = torch.Size((z.shape[0], g.shape[-1], *z.shape[2:]))
        keep = torch.is_grad_enabled()
        with torch.enable_grad():
            z = z if z.requires_grad else z.detach().requires_grad_()
            score = self.diffusion.score(z, t, **condition)
            probes = None if probe is None else probe.unsqueeze(0)
            divergence = carried_trace(score, z, shape, lambda v: mix(g, v.expand(shape)), probes, keep).squeeze(1)
        pushed = mix(g.mT, score)  # g's, of r channels
        drift = process.drift(t).diagonal(dim1=-2, dim2=-1).sum(-1)
        return -0.5 * _squares(pushed) - divergence + d * drift.to(x.device)


def _reader(kernel: _Kernel) -> tuple[Tensor, Tensor]:
    """w' = (L^-1 m / |L^-1 m|)', the direction of noise that the data-only decoder reads, (N, 1, K), and sigma (N,)."""
    w = torch.linalg.solve_triangular(kernel.given_x, kernel.phi[..., :1], upper=False).mT
    length = torch.linalg.vector_norm(w, dim=-1, keepdim=True)
    return w / length, length.flatten().reciprocal()


def _log_det(root: Tensor) -> Tensor:
    """log |det| of triangular roots (..., K, K)."""
    return root.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)


def _squares(e: Tensor) -> Tensor:
    """Squared norm of each sample, (batch,), summed in float64."""
    return e.flatten(1).square().sum(1, dtype=torch.float64)
