r"""A diffusion on functions in which every mode runs to a time of its own.

With a modal clock the state of mode j is the process at the time :math:`t_j` at which its effective noise level is
:math:`\sigma_j`. All modes see the function through the same statistic, and one call of the denoiser predicts them
all. States are arrays of coefficients, (batch, K, *event): the matrices of a step differ from mode to mode.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from undrift._linalg import as_f64
from undrift.denoise.free import ClassifierFree
from undrift.denoise.known import Known
from undrift.denoise.spectral import SpectralDenoiser
from undrift.process.linear import LinearProcess
from undrift.space import FunctionSpace
from undrift.space.clock import ModalClock

__all__ = ["ModalDiffusion"]


@dataclass(frozen=True, eq=False)
class ModalDiffusion:
    """Process x denoiser, on a clock of modes.

    Args:
        process: any linear process whose sigma(T) reaches the clock's highest level.
        denoiser: a SpectralDenoiser made with a clock, or Known or ClassifierFree around one.

    Raises:
        ValueError: if the denoiser has no clock, or the process ends before its highest level.

    References:
        Hoogeboom & Salimans 2023 (arXiv 2209.05557); Rissanen et al. 2023 (arXiv 2206.13397); Lim et al. 2023
        (arXiv 2302.07400).
    """

    process: LinearProcess
    denoiser: SpectralDenoiser | Known | ClassifierFree

    def __post_init__(self) -> None:
        clock = getattr(self.denoiser, "clock", None)
        if not isinstance(clock, ModalClock):
            raise ValueError(
                f"ModalDiffusion: the denoiser must have a modal clock, got a {type(self.denoiser).__name__} without; "
                "a Diffusion runs all modes on one clock."
            )
        reach = float(self.process.sigma(self.process.horizon))
        if clock.highest > reach * (1 + 1e-9):
            raise ValueError(
                f"ModalDiffusion: the clock's modes reach sigma_max / floor = {clock.highest:g}, and "
                f"{type(self.process).__name__} ends at sigma(T) = {reach:.4g}; lower sigma_max or raise floor, or "
                "take a process that goes further, such as VE on a PowerClock of greater sigma_max."
            )

    @property
    def clock(self) -> ModalClock:
        """Levels of the modes."""
        assert self.denoiser.clock is not None
        return self.denoiser.clock

    @property
    def functions(self) -> FunctionSpace:
        """The denoiser's space, in whose coordinates samples are expressed."""
        space = self.denoiser.space
        assert isinstance(space, FunctionSpace)
        return space

    @property
    def space(self) -> FunctionSpace:
        """Where states live: the denoiser's space, by coefficients."""
        return self.functions.in_coordinates("coefficients")

    @property
    def predictions(self) -> int:
        """P = 1, as for a :class:`~undrift.diffusion.Diffusion`."""
        return 1

    def times(self, sigma: object, grid: tuple[int, ...]) -> Tensor:
        """Times of the modes of a grid at clock levels sigma (N,): (N, modes), flat over the grid, float64."""
        mu = self.space.basis.eigenvalues(grid).flatten()
        return self.process.time(self.clock.levels(as_f64(sigma).reshape(-1, 1), mu))

    def express(self, c: Tensor) -> Tensor:
        """Coefficients (..., *grid) in the coordinates of the denoiser's space."""
        space = self.functions
        return space.encode(space.basis.synthesise(c))

    def read(self, z: Tensor, row: Tensor, sigma: Tensor, **condition: Any) -> Tensor:
        """Coefficients (batch, 1, *event) of the predicted function, for states z (batch, K, *event) of coefficients.

        Args:
            z: states.
            row: what reads x~ off a state, (K, *grid).
            sigma: clock level.
            condition: passed on to the denoiser.
        """
        space = self.functions
        weights = row.to(z).reshape(row.shape[0], *[1] * (z.ndim - 1 - row.ndim), *row.shape[1:])
        x = self.express((weights * z).sum(1))
        x0 = self.denoiser(x, sigma.to(x).expand(z.shape[0]), **condition)
        return space.coefficients(x0).unsqueeze(1)

    def predict(self, z: Tensor, sigma: float, **condition: Any) -> Tensor:
        """E[x0 | z] in the denoiser's coordinates, (batch, *event), for states of coefficients at a clock level."""
        grid = self.space.basis.grid(z.shape)
        row = self.process._weights(self.times(sigma, grid)[0])[1].mT.reshape(-1, *grid)
        x0 = self.read(z, row, as_f64(sigma), **condition).squeeze(1)
        return self.express(x0)
