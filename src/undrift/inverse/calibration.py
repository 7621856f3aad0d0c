r"""Simulation-based calibration: does a posterior sampler mean what it says?

Draw a truth from the prior, data from the truth, and L draws of the posterior given these data. If the draws are
right and independent, the rank of any functional of the truth among those of the draws is uniform on 0, ..., L (ties
broken at random). Too narrow posteriors pile ranks up at both ends, too wide ones in the middle, biased ones at
one end.

References:
    Talts, Betancourt, Simpson, Vehtari & Gelman, Validating Bayesian Inference Algorithms with Simulation-Based
    Calibration, 2018 (arXiv 1804.06788).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Calibration", "Coverage", "calibrate"]


@dataclass(frozen=True)
class Coverage:
    """How often credible intervals hold the truth.

    Attributes:
        level: what they promise.
        share: of truths inside, for each functional.
        std_error: of that share if the promise holds.
    """

    level: float
    share: tuple[float, ...]
    std_error: float


@dataclass(frozen=True, eq=False)
class Calibration:
    """Ranks of truths among draws.

    Attributes:
        ranks: (replications, functionals), whole numbers from 0 to ``draws``.
        draws: L.
        names: of the functionals.
    """

    ranks: Tensor
    draws: int
    names: tuple[str, ...]

    def histogram(self, bins: int | None = None) -> Tensor:
        """Counts (functionals, bins); bins are equally wide in ranks where they can be. None for 5 expected in each."""
        edges = self._edges(bins)
        which = torch.bucketize(self.ranks, edges, right=True)
        return torch.stack([torch.bincount(column, minlength=len(edges) + 1) for column in which.T])

    def _edges(self, bins: int | None) -> Tensor:
        """First ranks of all bins but the first."""
        n = len(self.ranks)
        bins = max(2, min(20, n // 5, self.draws + 1)) if bins is None else bins
        if not 2 <= bins <= self.draws + 1:
            raise ValueError(
                f"Calibration: bins must lie between 2 and the {self.draws + 1} possible ranks, got {bins}."
            )
        return (torch.arange(1, bins) * (self.draws + 1)).div(bins, rounding_mode="floor")

    def chi_square(self, bins: int | None = None) -> Tensor:
        """p-value of Pearson's test that ranks are uniform, for each functional, (functionals,)."""
        from scipy.stats import chisquare

        edges = [0, *self._edges(bins).tolist(), self.draws + 1]
        expected = torch.tensor(edges).diff().double() * len(self.ranks) / (self.draws + 1)
        return torch.tensor(
            [float(chisquare(h.numpy(), expected.numpy()).pvalue) for h in self.histogram(bins)], dtype=torch.float64
        )

    def uniformity(self, seed: int = 0) -> Tensor:
        """p-value of Cramer and von Mises's test, for each functional; it has no bins and needs few replications.

        Ranks are spread over their cells, (rank + U) / (L + 1), which is uniform exactly if ranks are.
        """
        from scipy.stats import cramervonmises

        generator = torch.Generator().manual_seed(seed)
        u = torch.rand(self.ranks.shape, generator=generator, dtype=torch.float64)
        spread = (self.ranks.double() + u) / (self.draws + 1)
        return torch.tensor([float(cramervonmises(c.numpy(), "uniform").pvalue) for c in spread.T], dtype=torch.float64)

    def coverage(self, levels: Sequence[float] = (0.5, 0.8, 0.95)) -> list[Coverage]:
        """Shares of truths inside central credible intervals, from the ranks.

        With L draws an interval leaves out floor((1 - level)(L + 1) / 2) ranks on each side; the level reported is the
        one that these ranks promise.
        """
        out = []
        for level in levels:
            if not 0 < level < 1:
                raise ValueError(f"Calibration.coverage: levels must lie in (0, 1), got {level}.")
            outside = int((1 - level) * (self.draws + 1) / 2 + 1e-9)
            promised = 1 - 2 * outside / (self.draws + 1)
            inside = (self.ranks >= outside) & (self.ranks <= self.draws - outside)
            error = (promised * (1 - promised) / len(self.ranks)) ** 0.5
            out.append(Coverage(promised, tuple(inside.double().mean(0).tolist()), error))
        return out

    def table(self) -> list[dict[str, object]]:
        """One row a functional: its name, both p-values, and the coverage of 80 % intervals."""
        chi, cvm = self.chi_square(), self.uniformity()
        covered = self.coverage((0.8,))[0]
        return [
            {"functional": name, "chi_square": float(a), "uniformity": float(b), "level": covered.level, "covered": c}
            for name, a, b, c in zip(self.names, chi, cvm, covered.share, strict=True)
        ]


def calibrate(truths: Tensor, draws: Tensor, names: Sequence[str] | None = None, seed: int = 0) -> Calibration:
    """Ranks of truths among posterior draws, functional by functional.

    Args:
        truths: functionals (such as coefficients) of the truths, (replications, functionals).
        draws: the same of each replication's posterior draws, (replications, L, functionals); they must be (nearly)
            independent, so chains are to be thinned by their autocorrelation.
        names: of the functionals.
        seed: breaks ties.

    Raises:
        ValueError: if shapes do not belong together, or values are not finite.
    """
    if draws.ndim != 3 or truths.shape != (draws.shape[0], draws.shape[2]):
        raise ValueError(
            "calibrate: truths (replications, functionals) and draws (replications, L, functionals) are needed, got "
            f"{tuple(truths.shape)} and {tuple(draws.shape)}."
        )
    if not bool(torch.isfinite(truths).all() and torch.isfinite(draws).all()):
        raise ValueError("calibrate: values must be finite; a sampler that failed has no rank.")
    names = tuple(names) if names is not None else tuple(f"mode {j}" for j in range(truths.shape[1]))
    if len(names) != truths.shape[1]:
        raise ValueError(f"calibrate: {len(names)} names for {truths.shape[1]} functionals.")
    truth = truths.unsqueeze(1)
    below, ties = (draws < truth).sum(1), (draws == truth).sum(1)
    generator = torch.Generator().manual_seed(seed)
    _, u = torch.rand(2, *ties.shape, generator=generator, dtype=torch.float64)  # the first are those of uniformity
    ranks = below.cpu() + (u * (ties.cpu() + 1)).floor().long()
    return Calibration(ranks, draws.shape[1], names)
