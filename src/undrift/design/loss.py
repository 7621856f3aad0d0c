r"""A denoiser seen through one curve: its measured denoising loss.

.. math:: L(\sigma) = E|x_0 - \hat D(x_0 + \sigma n, \sigma)|^2 = mmse(\sigma) + E|\hat D - D|^2 ,

summed over coordinates. mmse does not decrease in sigma. L may: where the denoiser is worse at an easier task, or
where the measurement errs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from undrift._linalg import as_f64
from undrift.denoise.base import Denoiser
from undrift.design.curves import DataModel, integrate_snr

__all__ = ["LossCurve"]


class LossCurve:
    r"""A measured denoising loss :math:`L(\sigma) = E|x_0 - \hat D|^2`, summed over coordinates.

    Between the levels log L is interpolated in log sigma by monotone cubics (Fritsch and Carlson). Above them L is
    constant, below it falls as sigma^2, as for data with a density. With a reference the *ratio* to the reference's
    mmse is interpolated instead, and constant outside: the shape of the curve is then the reference's.

    As a :class:`DataModel` the loss stands for the data's mmse, which is at most as large.

    Args:
        sigma: noise levels (n,), at least two, increasing.
        loss: (n,), positive.
        std_error: of the loss, (n,), if known.
        reference: a data model whose mmse gives the shape between and beyond the levels.
        dim: coordinates of a point; needed where the curve stands for the data and there is no reference.
        second_moment: E|x0|^2, likewise.

    Raises:
        ValueError: for levels or losses that are no curve.
    """

    def __init__(
        self,
        sigma: Tensor,
        loss: Tensor,
        std_error: Tensor | None = None,
        reference: DataModel | None = None,
        dim: float | None = None,
        second_moment: float | None = None,
    ) -> None:
        from scipy.interpolate import PchipInterpolator  # slow to import

        self.sigma, self.losses = as_f64(sigma).detach(), as_f64(loss).detach()
        self.std_error = None if std_error is None else as_f64(std_error).detach()
        self.reference = reference
        if self.sigma.ndim != 1 or len(self.sigma) < 2 or self.losses.shape != self.sigma.shape:
            raise ValueError(
                f"LossCurve: needs a loss for each of at least two levels, got shapes {tuple(self.sigma.shape)} and "
                f"{tuple(self.losses.shape)}."
            )
        if not bool((self.sigma > 0).all() and self.sigma.isfinite().all() and (self.sigma.diff() > 0).all()):
            raise ValueError(f"LossCurve: levels must be positive, finite and increasing, got {self.sigma.tolist()}.")
        if not bool((self.losses > 0).all() and self.losses.isfinite().all()):
            raise ValueError(f"LossCurve: losses must be positive and finite, got {self.losses.tolist()}.")
        if self.std_error is not None and self.std_error.shape != self.sigma.shape:
            raise ValueError(f"LossCurve: std_error must have shape {tuple(self.sigma.shape)}.")
        value = self.losses
        if reference is not None:
            floor = reference.mmse(self.sigma)
            if not bool((floor > 0).all()):
                raise ValueError("LossCurve: the reference's mmse must be positive at all levels.")
            value = value / floor
        self._dim, self._second = dim, second_moment
        self._log = PchipInterpolator(self.sigma.log().numpy(), value.log().numpy(), extrapolate=False)

    @classmethod
    def measure(
        cls,
        denoiser: Denoiser,
        x: Tensor,
        levels: Tensor,
        *,
        samples: int = 1,
        seed: int = 0,
        batch: int = 256,
        reference: DataModel | None = None,
        progress: bool = False,
        **condition: Any,
    ) -> LossCurve:
        """The loss of a denoiser on points it was not trained on.

        The noise is the same at all levels, so that neighbouring losses err in the same direction.

        Args:
            denoiser: any; it stays on its device.
            x: points (n, *event), n at least 2, on the denoiser's device.
            levels: noise levels, increasing.
            samples: noises per point.
            seed: of the noises.
            batch: points per call.
            reference: see :class:`LossCurve`.
            progress: show a bar.
            condition: handed to the denoiser; tensors with one row per point are cut like x.

        Raises:
            ValueError: for arguments that do not fit, before any work.
            FloatingPointError: if the denoiser's answer is not finite.
        """
        sigma = as_f64(levels)
        if x.ndim < 2 or len(x) < 2 or not x.is_floating_point():
            raise ValueError(
                f"LossCurve.measure: x must be floating-point points (n, *event) with n >= 2, got {x.dtype} "
                f"{tuple(x.shape)}."
            )
        if samples < 1 or batch < 1:
            raise ValueError(f"LossCurve.measure: samples and batch must be positive, got {samples} and {batch}.")
        if sigma.ndim != 1 or len(sigma) < 2 or not bool((sigma > 0).all() and (sigma.diff() > 0).all()):
            raise ValueError(f"LossCurve.measure: levels must be positive and increasing, got {sigma.tolist()}.")
        n = len(x)
        # Salted: points that were drawn with the same seed would be correlated with the noise.
        generator = torch.Generator(x.device).manual_seed(seed ^ 0x105C)
        loss = torch.zeros(n, len(sigma), dtype=torch.float64)
        with torch.no_grad():
            for rows in tqdm(torch.arange(n).split(batch), desc="loss", disable=not progress):
                here = rows.to(x.device)
                some = {
                    key: v[rows.to(v.device)] if isinstance(v, Tensor) and v.ndim and len(v) == n else v
                    for key, v in condition.items()
                }
                points = x[here]
                for _ in range(samples):
                    noise = torch.empty_like(points).normal_(generator=generator)
                    for j, level in enumerate(sigma.tolist()):
                        s = torch.full((len(points),), level, dtype=points.dtype, device=x.device)
                        miss = denoiser(points + level * noise, s, **some) - points
                        loss[rows, j] += miss.double().square().flatten(1).sum(-1).cpu() / samples
        if not bool(loss.isfinite().all()):
            j = int((~loss.isfinite()).any(0).nonzero()[0])
            raise FloatingPointError(f"LossCurve.measure: the denoiser's answer is not finite at sigma = {sigma[j]:g}.")
        return cls(
            sigma,
            loss.mean(0),
            loss.std(0) / math.sqrt(n),
            reference,
            float(x[0].numel()),
            float(x.double().square().flatten(1).sum(-1).mean()),
        )

    @property
    def monotone(self) -> bool:
        """Whether the measured losses do not decrease in sigma, as a perfect denoiser's would not."""
        return bool((self.losses.diff() >= 0).all())

    def smoothed(self) -> LossCurve:
        """The nearest curve that does not decrease: isotonic regression of log L, weighted by (L / standard error)^2.

        A decreasing stretch is noise of the measurement, or a denoiser that is worse where its task is easier. Only
        the first should be smoothed away, so nothing is unless asked for.
        """
        from sklearn.isotonic import isotonic_regression  # slow to import

        weight = None
        if self.std_error is not None and bool((self.std_error > 0).all()):
            weight = (self.losses / self.std_error).square().numpy()
        log = isotonic_regression(self.losses.log().numpy(), sample_weight=weight)
        return LossCurve(
            self.sigma, torch.from_numpy(log).exp(), self.std_error, self.reference, self._dim, self._second
        )

    def loss(self, sigma: Tensor) -> Tensor:
        """L at any levels, shape of ``sigma``."""
        level = as_f64(sigma)
        inside = level.clamp(self.sigma[0], self.sigma[-1])
        value = torch.as_tensor(self._log(inside.detach().log().clamp(*self.sigma[[0, -1]].log()).numpy())).exp()
        if self.reference is not None:
            return value * self.reference.mmse(level)
        return value * (level / self.sigma[0]).clamp(max=1).square()

    def excess(self, reference: DataModel | LossCurve) -> Callable[[Tensor], Tensor]:
        """The loss minus a reference's, of sigma: E|D^ - D|^2 if the reference is the data's mmse.

        What a measurement makes negative stays negative; a profile of noise takes it for zero.
        """

        def profile(sigma: Tensor) -> Tensor:
            return self.loss(sigma) - reference.mmse(sigma)

        return profile

    # -- as a model of the data --------------------------------------------------------------------------------------

    def _known(self, name: str, value: float | None) -> float:
        if value is None and self.reference is not None:
            value = float(getattr(self.reference, name))
        if value is None:
            raise ValueError(f"LossCurve: give {name}, or a reference, to use the curve as a model of the data.")
        return value

    @property
    def dim(self) -> float:
        """Coordinates, d."""
        return self._known("dim", self._dim)

    @property
    def second_moment(self) -> float:
        """E|x0|^2."""
        return self._known("second_moment", self._second)

    def mmse(self, sigma: Tensor) -> Tensor:
        """The loss, for want of the mmse below it."""
        return self.loss(sigma)

    def information(self, low: Tensor, high: Tensor) -> Tensor:
        """See :class:`DataModel`; by quadrature between the levels."""
        knee = float(self.sigma[-1])
        if self.reference is not None:  # above the levels the reference has structure of its own
            knee = max(knee, 4 * math.sqrt(self.reference.second_moment))
        return integrate_snr(self.loss, low, high, self.sigma.tolist(), knee)

    def to_dict(self) -> dict[str, Any]:
        """Levels, losses and standard errors as plain lists."""
        return {
            "sigma": self.sigma.tolist(),
            "loss": self.losses.tolist(),
            "std_error": None if self.std_error is None else self.std_error.tolist(),
        }

    def __repr__(self) -> str:
        shape = "monotone" if self.monotone else "not monotone"
        return f"LossCurve({len(self.sigma)} levels, sigma {self.sigma[0]:.4g} to {self.sigma[-1]:.4g}, {shape})"
