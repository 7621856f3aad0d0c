r"""Laws on the line, and how far a map of one is from another.

Densities here are mixtures of normals. The normal law, data, and every law that a step with noise leaves are: if x has
the density r, and f is a map, then

.. math:: f(x) + L \xi \;\sim\; \int r(x) N(\cdot; f(x), L^2)\, dx \approx \sum_i w_i r(x_i) N(\cdot; f(x_i), L^2)

with the nodes and weights of Gauss-Legendre panels, so short that r and the kernel are smooth on each: the nodes lie
where f is steep. If y = g(x), and p is the law to compare with, of quantile function Q,

.. math:: W_2^2 = \int \bigl(g(x) - Q(F(g(x)))\bigr)^2 r(x)\, dx, \qquad
    KL(p \| law\ of\ y) = \int \frac{p(g(x)) |g'(x)|}{m(g(x))} \ln \frac{p(g(x))}{q(g(x))}\, dx, \qquad
    q(y) = \sum_{g(x) = y} \frac{r(x)}{|g'(x)|}

F being the distribution function of y and m(y) the number of x with g(x) = y: 1 unless g folds the line. The
integrands jump where p or y has a gap, so the panels are halved until nothing changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from undrift._linalg import gauss_legendre

__all__ = ["Line", "TooFine", "compare", "smoothed"]

Map = Callable[[Tensor], Tensor]
"""A function of points (n,), with a derivative by autograd."""

_NODES = 10  # of a panel
_BLOCK = 256  # points that share a band of components
_MOST = 100_000  # nodes of a law: a minute or so
_ROUNDS = 60  # halvings of a panel


class TooFine(ValueError):
    """A law would need more nodes than can be carried."""


@dataclass(frozen=True, eq=False)
class Line:
    """A mixture of normals: weights, increasing means and positive deviations, each (M,); ``reach`` deviations wide."""

    weights: Tensor
    means: Tensor
    deviations: Tensor
    reach: float

    @classmethod
    def of(cls, weights: Tensor, means: Tensor, deviations: Tensor, reach: float) -> Line:
        """The mixture with its components in any order."""
        order = means.argsort()
        return cls(weights[order], means[order], deviations.expand(means.shape)[order], reach)

    @property
    def floor(self) -> float:
        """Logarithm of the mass that does not count."""
        return -0.5 * self.reach**2 - 5

    def _banded(self, x: Tensor, f: Callable[[Tensor, int, int], Tensor]) -> Tensor:
        """f of sorted blocks of points (n, 1) and of the range of components near them, back in order."""
        if not len(x):
            return f(x.unsqueeze(-1), 0, 0)
        order = x.argsort()
        far = (self.reach + 1) * float(self.deviations.max())
        blocks = x[order].split(_BLOCK)
        ends = torch.stack([torch.stack([b[0] - far, b[-1] + far]) for b in blocks])
        near = torch.searchsorted(self.means, ends).tolist()
        out = torch.cat([f(b.unsqueeze(-1), i, j) for b, (i, j) in zip(blocks, near, strict=True)], -1)
        back = torch.empty_like(out)
        back[..., order] = out
        return back

    def log_density(self, x: Tensor) -> Tensor:
        """(n,); minus infinity where there is nothing."""
        scale = self.weights.log() - self.deviations.log() - 0.5 * math.log(2 * math.pi)

        def log_sum(x: Tensor, i: int, j: int) -> Tensor:
            if i == j:
                return torch.full_like(x[:, 0], -math.inf)
            return (scale[i:j] - 0.5 * ((x - self.means[i:j]) / self.deviations[i:j]).square()).logsumexp(-1)

        return self._banded(x, log_sum)

    def tails(self, x: Tensor) -> Tensor:
        """Mass below and above the points, each to rounding; (2, n)."""
        zero = self.weights.new_zeros(1)
        below = torch.cat([zero, self.weights.cumsum(0)])
        above = torch.cat([self.weights.flip(0).cumsum(0).flip(0), zero])

        def sums(x: Tensor, i: int, j: int) -> Tensor:
            z, w = (x - self.means[i:j]) / self.deviations[i:j], self.weights[i:j]
            return torch.stack([below[i] + torch.special.ndtr(z) @ w, above[j] + torch.special.ndtr(-z) @ w])

        return self._banded(x, sums)

    def quantile(self, tails: Tensor) -> Tensor:
        """The points with these masses (2, n) below and above; the smaller of the two decides."""
        low = (self.means - 40 * self.deviations).min().expand(tails.shape[1])
        high = (self.means + 40 * self.deviations).max().expand(tails.shape[1])
        left = tails[0] < tails[1]
        for _ in range(64):
            middle = 0.5 * (low + high)
            below, above = self.tails(middle)
            short = torch.where(left, below < tails[0], above > tails[1])
            low, high = torch.where(short, middle, low), torch.where(short, high, middle)
        return 0.5 * (low + high)

    def panels(self, f: Map | None, width: float, step: float) -> tuple[Tensor, Tensor]:
        """Ends of panels that cover the mass, at most ``step`` deviations wide, over which f moves by 2 ``width``."""
        deviation = float(self.deviations.min())
        span = self.reach * float(self.deviations.max())
        low, high = float(self.means[0]) - span, float(self.means[-1]) + span
        count = math.ceil((high - low) / (step * deviation))
        if count > 10 * _MOST:
            raise TooFine
        edges = torch.linspace(low, high, count + 1, dtype=torch.float64)
        a, b = edges[:-1], edges[1:]
        done: list[tuple[Tensor, Tensor]] = []
        for _ in range(_ROUNDS):
            middle = 0.5 * (a + b)
            three = torch.cat([a, middle, b])
            heavy = self.log_density(three).reshape(3, -1).amax(0) + (b - a).log() > self.floor
            a, middle, b = a[heavy], middle[heavy], b[heavy]
            if f is None or not len(a):
                done.append((a, b))
                break
            with torch.no_grad():
                moved = f(torch.cat([a, middle, b])).reshape(3, -1).diff(dim=0).abs().amax(0)
            wide = moved > width
            done.append((a[~wide], b[~wide]))
            if not bool(wide.any()):
                break
            if len(a) * _NODES > _MOST:
                raise TooFine
            a, b = torch.cat([a[wide], middle[wide]]), torch.cat([middle[wide], b[wide]])
        return torch.cat([d[0] for d in done]), torch.cat([d[1] for d in done])


def _nodes(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes and weights, each (panels, _NODES)."""
    x, w = gauss_legendre(_NODES)
    width = (b - a).unsqueeze(-1)
    return a.unsqueeze(-1) + width * x, width * w


def smoothed(law: Line, f: Map, width: float) -> Line:
    """The law of f(x) plus noise of deviation ``width`` > 0."""
    x, w = (v.flatten() for v in _nodes(*law.panels(f, width, 2.0)))
    mass = w * law.log_density(x).exp()
    kept = mass.log() > law.floor - 5
    if int(kept.sum()) > _MOST:
        raise TooFine
    with torch.no_grad():
        moved = f(x[kept])
    return Line.of(mass[kept], moved, torch.tensor([width], dtype=torch.float64), law.reach)


class _Branches:
    """The pieces of the line on which g is monotone, B of them, between its folds (B - 1,)."""

    def __init__(self, law: Line, g: Map, folds: Tensor, seen: Tensor) -> None:
        self.law, self.g = law, g
        far = law.reach * float(law.deviations.max())
        self.ends = torch.cat([law.means[:1] - far, folds, law.means[-1:] + far])
        with torch.no_grad():
            self.values = g(self.ends)
            points = torch.cat([self.ends, seen]).sort().values
            points = points[(points >= self.ends[0]) & (points <= self.ends[-1])]
            self.table = points, g(points)
        self.rising = self.values[1:] > self.values[:-1]
        self.mass = law.tails(self.ends)  # below and above the ends; beyond the outer ones there is none
        self.mass[:, 0], self.mass[:, -1] = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])

    def kinks(self) -> Tensor:
        """The folds, and the points whose branch is another but which g sends where it sends a fold."""
        fold = self.values[1:-1].expand(len(self.rising), -1)
        inside = (fold - self.values[:-1, None]) * (fold - self.values[1:, None]) < 0
        return torch.cat([self.ends[1:-1], self._solve(fold[inside], inside.nonzero()[:, 0])])

    def law_of(self, x: Tensor, y: Tensor, slope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """At y = g(x): masses below and above y (2, n), log density (n,), and how many points end there (n,)."""
        branch = torch.arange(len(self.rising)).unsqueeze(-1)
        own = branch == torch.searchsorted(self.ends[1:-1].contiguous(), x)
        first, last, rising = self.ends[:-1, None], self.ends[1:, None], self.rising.unsqueeze(-1)
        past_first = (y > self.values[:-1, None]) == rising  # on the side of the branch's first value that it goes to
        past_last = (y > self.values[1:, None]) == rising
        at = torch.where(past_last, last, first).where(~own, x)  # (B, n)
        log_q, count = self.law.log_density(x) - slope.abs().log(), torch.ones_like(x)
        inside = past_first & ~past_last & ~own
        k, i = inside.nonzero().unbind(-1)
        if len(k):
            there = self._solve(y[i], k)
            at[inside] = there
            steep = _value_and_slope(self.g, there)[1].abs().clamp(min=1e-150)
            density = torch.full(at.shape, -math.inf, dtype=torch.float64)
            density[inside] = self.law.log_density(there) - steep.log()
            log_q = torch.cat([log_q.unsqueeze(0), density]).logsumexp(0)
            count = count + inside.sum(0)
        # Of each branch's mass, what lies before and behind ``at``: below and above y, or the other way round.
        below, above = self.law.tails(at.flatten()).unflatten(-1, at.shape)
        before = torch.where(below < above, below - self.mass[0, :-1, None], self.mass[1, :-1, None] - above)
        behind = torch.where(below < above, self.mass[0, 1:, None] - below, above - self.mass[1, 1:, None])
        parts = torch.stack([torch.where(rising, before, behind), torch.where(rising, behind, before)])
        return parts.clamp(min=0).sum(1), log_q, count

    def _bracket(self, y: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Neighbours in the table of points on branches k with y between their values, and the values less y."""
        out = torch.empty(4, len(y), dtype=torch.float64)
        for branch in k.unique().tolist():
            some = k == branch
            i, j = torch.searchsorted(self.table[0], self.ends[branch : branch + 2]).tolist()
            x, value = (v[i : j + 1] for v in self.table)
            sign = 1.0 if self.rising[branch] else -1.0
            place = torch.searchsorted((sign * value).cummax(0).values, sign * y[some]).clamp(1, len(x) - 1)
            out[:, some] = torch.stack([x[place - 1], value[place - 1], x[place], value[place]])
        return out[0], out[1] - y, out[2], out[3] - y

    def _solve(self, y: Tensor, k: Tensor) -> Tensor:
        """The points of branches k (n,) that g sends to y, by the Illinois method with a bisection every third time."""
        low, at_low, high, at_high = self._bracket(y, k)
        near, side = 1e-13 * (1 + y.abs()), torch.zeros_like(y)
        best, least = low, at_low.abs()
        with torch.no_grad():
            for i in range(60 if len(y) else 0):
                x = 0.5 * (low + high) if i % 3 == 2 else (low * at_high - high * at_low) / (at_high - at_low)
                off = self.g(x) - y
                best, least = torch.where(off.abs() < least, x, best), torch.minimum(off.abs(), least)
                if bool(((least <= near) | (high - low <= 1e-14 * x.abs())).all()):
                    break
                left = off.sign() == at_low.sign()
                at_high = torch.where(left, torch.where(side == 1, 0.5 * at_high, at_high), off)
                at_low = torch.where(left, off, torch.where(side == -1, 0.5 * at_low, at_low))
                low, high = torch.where(left, x, low), torch.where(left, high, x)
                side = torch.where(left, 1.0, -1.0)
        return best


def _value_and_slope(g: Map, x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        point = x.detach().clone().requires_grad_(True)
        y = g(point)
        (slope,) = torch.autograd.grad(y.sum(), point)
    return y.detach(), slope


def compare(law: Line, g: Map | None, exact: Line) -> tuple[float, float, float]:
    """How far y = g(x), x of ``law``, is from ``exact``; None is the identity.

    Returns:
        W2, KL(exact || y), and the mass of ``exact`` that lies where y has none, to which KL is blind.
    """
    scale = float((exact.means[-1] - exact.means[0]) + exact.deviations.max())
    a, b = law.panels(g, 2 * float(exact.deviations.min()), 4.0)
    branches: _Branches | None = None
    seen: list[tuple[Tensor, Tensor]] = []

    def integrands(x: Tensor) -> Tensor:
        if g is None:
            y, slope = x, torch.ones_like(x)
        else:
            y, slope = _value_and_slope(g, x)
            seen.append((x, slope))
        if branches is None:
            tails, count = law.tails(x), torch.ones_like(x)
            log_r = law.log_density(x)
            log_q = log_r - slope.abs().clamp(min=1e-150).log()
        else:
            log_r = law.log_density(x)
            tails, log_q, count = branches.law_of(x, y, slope)
        log_p = exact.log_density(y)
        p = log_p.exp() * slope.abs() / count
        log_ratio = torch.where(p > 0, log_p - log_q, 0.0)
        return torch.stack([(y - exact.quantile(tails)).square() * log_r.exp(), p * log_ratio, p])

    total = _integral(integrands, a, b, scale)
    if g is not None:
        x, slope = (torch.cat(v) for v in zip(*seen, strict=True))
        if bool((slope < 0).any()):  # folded: several x end at one y
            branches = _Branches(law, g, _folds(g, x, slope), x)
            total = _integral(integrands, *_cut(a, b, branches.kinks()), scale)
    w2, kl, covered = total.tolist()
    return math.sqrt(max(w2, 0.0)), kl, 1 - covered


def _folds(g: Map, x: Tensor, slope: Tensor) -> Tensor:
    """Where the slope changes its sign, by bisection."""
    order = x.argsort()
    x, falling = x[order], slope[order] < 0
    change = (falling[1:] != falling[:-1]).nonzero().squeeze(-1)
    if not len(change):  # it falls everywhere
        return x[:0]
    low, high, first = x[change], x[change + 1], falling[change]
    for _ in range(60):
        middle = 0.5 * (low + high)
        same = (_value_and_slope(g, middle)[1] < 0) == first
        low, high = torch.where(same, middle, low), torch.where(same, high, middle)
    return 0.5 * (low + high)


def _cut(a: Tensor, b: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """The panels, cut at points."""
    for c in points:
        inside = (a < c) & (c < b)
        a, b = torch.cat([a, c.expand(int(inside.sum()))]), torch.cat([torch.where(inside, c, b), b[inside]])
    return a, b


def _integral(f: Callable[[Tensor], Tensor], a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Integrals (J,) of f: (n,) -> (J, n) over panels, halved until the halves add up to the whole.

    A panel may be off by 1e-10 of the integral, or, where that vanishes, by 1e-18 of its natural size.
    """

    def over(a: Tensor, b: Tensor) -> Tensor:
        x, w = _nodes(a, b)
        return (f(x.flatten()).unflatten(-1, x.shape) * w).sum(-1)

    whole = over(a, b)
    floor = torch.tensor([1e-18 * scale**2, 1e-15, 1e-14], dtype=torch.float64)
    total = whole.new_zeros(whole.shape[0])
    for _ in range(_ROUNDS):
        middle = 0.5 * (a + b)
        halves = over(torch.cat([a, middle]), torch.cat([middle, b])).unflatten(-1, (2, -1))
        both = halves.sum(1)
        least = torch.maximum(1e-10 * (total + both.sum(-1)).abs(), floor)
        rough = ((both - whole).abs() > least.unsqueeze(-1)).any(0)
        total = total + both[:, ~rough].sum(-1)
        if not bool(rough.any()):
            return total
        a, b = torch.cat([a[rough], middle[rough]]), torch.cat([middle[rough], b[rough]])
        whole = halves[..., rough].flatten(1)
    return total + whole.sum(-1)
