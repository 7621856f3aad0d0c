r"""Denoisers of functions that are preconditioned mode by mode.

Where the data's coefficients have variances :math:`\mu_j` and the noise's :math:`\sigma_j^2 \lambda_j`, the best linear
denoiser and what is left for a network to say are, in each mode,

.. math:: D_j = c_{skip} \tilde c_j + c_{out}\, f_j, \qquad
    c_{skip} = \frac{\mu_j}{\mu_j + \sigma_j^2 \lambda_j}, \quad
    c_{out}^2 = \frac{\mu_j\, \sigma_j^2 \lambda_j}{\mu_j + \sigma_j^2 \lambda_j}.

The network reads and writes functions with the data's spectrum: its input has coefficients
:math:`\tilde c_j \sqrt{\mu_j / (\mu_j + \sigma_j^2 \lambda_j)}`, and f is its output's coefficients over
:math:`\sqrt{\mu_j}`. With the same level in all modes and :math:`\mu \propto \lambda` this is EDM's preconditioning.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from undrift.denoise.base import per_sample
from undrift.denoise.network import NetworkDenoiser
from undrift.networks.base import Network
from undrift.space import Covariance, FunctionSpace
from undrift.space.clock import ModalClock

__all__ = ["SpectralDenoiser"]


class SpectralDenoiser(NetworkDenoiser):
    """A network on functions, preconditioned by the spectra of data and noise, on any grid.

    Args:
        network: maps physical values (batch, *event) and labels (batch,) to (batch, *event).
        space: where the functions live.
        data: spectrum of the data; None for that of the space's noise.
        clock: levels of the modes; None for one level in all. With a clock, ``sigma`` below is the clock's, and the
            denoiser is for a :class:`~undrift.modal_diffusion.ModalDiffusion`.
        sigma_min, sigma_max: range of levels that the network is trained at; the clock's own, with one.
    """

    def __init__(
        self,
        network: Network,
        space: FunctionSpace,
        data: Covariance | None = None,
        clock: ModalClock | None = None,
        sigma_min: float = 0.002,
        sigma_max: float = 300.0,
    ) -> None:
        if clock is not None:
            sigma_min, sigma_max = clock.sigma_min, clock.sigma_max
        super().__init__(network, 1.0, sigma_min, sigma_max, space)
        if not isinstance(space, FunctionSpace):
            raise TypeError(f"SpectralDenoiser: space must be a FunctionSpace, got a {type(space).__name__}.")
        self.function_space, self.data, self.clock = space, data or space.spectrum, clock
        self._of_data = FunctionSpace(space.basis, self.data)  # keeps the spectra of the grids it has met

    @property
    def config(self) -> dict[str, Any]:
        """Constructor arguments; the weights are the checkpoint's."""
        return {
            "network": self.network,
            "space": self.space,
            "data": self.data,
            "clock": self.clock,
            "sigma_min": self.sigma_min,
            "sigma_max": self.sigma_max,
        }

    def variances(self, x: Tensor, sigma: Tensor | float) -> tuple[Tensor, Tensor]:
        """Variances of the data's and of the noise's coefficients for points x (batch, *event).

        Returns:
            mu (*grid) and sigma_j^2 lambda_j (batch, 1, ..., *grid), in x's dtype.
        """
        space = self.function_space
        grid = space.basis.grid(x.shape)
        level = per_sample(sigma, x)
        if self.clock is not None:
            level = self.clock.levels(level, space.basis.eigenvalues(grid).to(x))
        return self._of_data.variances(grid).to(x), level.square() * space.variances(grid).to(x)

    def scatter(self, x: Tensor, sigma: Tensor, xi: Tensor) -> Tensor:
        """x~ for clean points x (batch, *event), levels sigma (batch,) and unit normals xi of x's shape."""
        space = self.function_space
        noise = self.variances(x, sigma)[1].sqrt() * xi
        return x + space.encode(space.basis.synthesise(noise))

    def _network(self, c: Tensor, mu: Tensor, noise: Tensor, sigma: Tensor | float, **condition: Any) -> Tensor:
        """f_j for coefficients c of x~."""
        basis = self.function_space.basis
        shown = basis.synthesise(c * (mu / (mu + noise)).sqrt())
        dtype = next((p.dtype for p in self.network.parameters()), c.dtype)
        label = 0.25 * per_sample(sigma, c).clamp(self.sigma_min, self.sigma_max).log().flatten()
        out = self.network(shown.to(dtype), label.to(dtype), **condition).to(c.dtype)
        return basis.analyse(out) / mu.sqrt()

    def forward(self, x: Tensor, sigma: Tensor | float, **condition: Any) -> Tensor:
        """Estimated posterior mean of the function behind x~ = x, in the space's coordinates; shape and dtype of x."""
        space = self.function_space
        c = space.coefficients(x)
        mu, noise = self.variances(x, sigma)
        total = mu + noise
        f = self._network(c, mu, noise, sigma, **condition)
        return space.encode(space.basis.synthesise(mu / total * c + mu.sqrt() * (noise / total).sqrt() * f))

    def misfit(self, x: Tensor, sigma: Tensor, xi: Tensor, **condition: Any) -> Tensor:
        r"""Error of the network's own output, :math:`\sum_j \mu_j |f_j - f^*_j|^2 / \sum_j \mu_j`, (batch,).

        Of order 1 at every level, on every grid; :math:`f^*` is what would make D the clean point x.
        """
        space = self.function_space
        mu, noise = self.variances(x, sigma)
        total = mu + noise
        clean = space.coefficients(x)
        c = clean + noise.sqrt() * xi
        # (clean - c_skip c) / c_out with its differences taken by hand: mu times noise underflows in smooth modes.
        target = (noise / total).sqrt() * clean / mu.sqrt() - (mu / total).sqrt() * xi
        error = self._network(c, mu, noise, sigma, **condition) - target
        parts = x.numel() // (x.shape[0] * mu.numel())
        return (mu * error.square()).reshape(x.shape[0], -1).sum(1) / (parts * mu.sum())
