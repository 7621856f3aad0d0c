r"""Posteriors with public reference draws: the models of posteriordb, exactly as their Stan programs write them.

Magnusson, Torkar, Bürkner et al., posteriordb: a database with data, models and posteriors
(github.com/stan-dev/posteriordb). ``reference()`` of each gives the means and deviations of its 10 000 reference draws.
N(a, b) has mean a and standard deviation b; half-Cauchy(s) and half-N(0, s) are the positive halves, normalised; flat
priors have no normaliser, hence no log Z. Points are unconstrained: the log of a positive number, the logit of a
probability, and so on.

Linear models need the data only through a QR decomposition of the design (1, ..., X | y): with the least-squares
coefficients b, :math:`|y - X \beta|^2 = |R (\beta - b)|^2 + |y - X b|^2`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import softplus

from undrift.density.parameters import Parameters, ordered
from undrift.density.targets._data import Placed, load_npz
from undrift.density.targets._densities import (
    log_beta,
    log_gamma,
    log_half_cauchy,
    log_half_normal,
    log_normal,
)
from undrift.density.targets._posterior import Posterior

__all__ = [
    "AutoRegression",
    "EightSchools",
    "GPRegression",
    "KidScore",
    "LowDimGaussMix",
    "Mesquite",
    "Nes1980",
    "SblrcBlr",
]


def data(name: str) -> dict[str, Tensor]:
    """Columns of one data set of posteriordb."""
    return {k.split(".", 1)[1]: v for k, v in load_npz("posteriors").items() if k.startswith(f"{name}.")}


# -- a hierarchy -------------------------------------------------------------------------------------------------------


class _NonCentered(Parameters):
    r"""theta, mu, tau from coordinates (e, mu, log tau): :math:`\theta = \mu + \tau e`."""

    def constrain(self, x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        values, log_det = super().constrain(x)
        mu, tau = values["mu"].unsqueeze(-1), values["tau"].unsqueeze(-1)
        return {**values, "theta": mu + tau * values["theta"]}, log_det + 8 * values["tau"].log()

    def unconstrain(self, values: Mapping[str, Tensor]) -> Tensor:
        mu, tau = torch.as_tensor(values["mu"]).unsqueeze(-1), torch.as_tensor(values["tau"]).unsqueeze(-1)
        return super().unconstrain({**values, "theta": (torch.as_tensor(values["theta"]) - mu) / tau})


@dataclass(frozen=True, eq=False)
class EightSchools(Posterior):
    r"""Eight schools, d = 10: :math:`y_j \sim N(\theta_j, \sigma_j),\ \theta_j \sim N(\mu, \tau)`.

    :math:`\mu \sim N(0, 5),\ \tau \sim` half-Cauchy(5). Rubin (1981); Gelman et al., Bayesian Data Analysis, section
    5.5. posteriordb: eight_schools_centered and eight_schools_noncentered. log Z = -31.3113474, by quadrature: given
    tau everything is Gaussian.

    Args:
        centered: sample theta itself, a funnel; or else :math:`(\theta_j - \mu) / \tau`. Both give the same named
        draws.
    """

    centered: bool = False
    log_z = -31.311347352285452
    _reference: ClassVar[str | None] = "eight_schools"

    @cached_property
    def parameters(self) -> Parameters:  # type: ignore[override]
        spec = {"theta": (constraints.real, 8), "mu": constraints.real, "tau": constraints.positive}
        return Parameters(spec) if self.centered else _NonCentered(spec)

    @cached_property
    def _constants(self) -> Placed:
        effect = torch.tensor([28, 8, -3, 7, -1, 1, 18, 12], dtype=torch.float64)
        error = torch.tensor([15, 10, 16, 11, 9, 11, 10, 18], dtype=torch.float64)
        return Placed(effect=effect, error=error)

    def _log_joint(self, values: Mapping[str, Tensor]) -> Tensor:
        theta, mu, tau = values["theta"], values["mu"], values["tau"]
        c = self._constants.on(theta)
        likelihood = log_normal(c["effect"], theta, c["error"]).sum(-1)
        schools = log_normal(theta, mu.unsqueeze(-1), tau.unsqueeze(-1)).sum(-1)
        return likelihood + schools + log_normal(mu, 0.0, 5.0) + log_half_cauchy(tau, 5.0)

    def _log_density(self, x: Tensor) -> Tensor:
        if self.centered:
            return super()._log_density(x)
        # The same density; but (theta - mu) / tau from theta would lose its digits where tau is small.
        e, mu, log_tau = x[:, :8], x[:, 8], x[:, 9]
        tau, c = log_tau.exp(), self._constants.on(x)
        theta = mu.unsqueeze(-1) + tau.unsqueeze(-1) * e
        likelihood = log_normal(c["effect"], theta, c["error"]).sum(-1)
        prior = log_normal(e, 0.0, 1.0).sum(-1) + log_normal(mu, 0.0, 5.0) + log_half_cauchy(tau, 5.0)
        return likelihood + prior + log_tau


# -- linear regressions ------------------------------------------------------------------------------------------------


class _LinearModel(Posterior):
    """y ~ N(X beta, sigma), with coefficients beta (p,) and sigma > 0; priors are flat unless given."""

    _coefficients: ClassVar[int] = 1

    def _design(self) -> tuple[Tensor, Tensor]:
        """X (N, p) and y (N,)."""
        raise NotImplementedError

    def _log_prior(self, beta: Tensor, sigma: Tensor) -> Tensor:
        return torch.zeros_like(sigma)

    def _beta(self, values: Mapping[str, Tensor]) -> Tensor:
        return values["beta"]

    @cached_property
    def parameters(self) -> Parameters:  # type: ignore[override]
        count = self._design()[0].shape[1]
        return Parameters({"beta": (constraints.real, count), "sigma": constraints.positive})

    @cached_property
    def _constants(self) -> Placed:
        x, y = self._design()
        q, r = torch.linalg.qr(x)
        rest = y - q @ (q.T @ y)
        best = torch.linalg.solve_triangular(r, (q.T @ y).unsqueeze(-1), upper=True).squeeze(-1)
        return Placed(r=r, best=best, rest=rest.square().sum(), count=torch.tensor(float(len(y))))

    def _log_joint(self, values: Mapping[str, Tensor]) -> Tensor:
        beta, sigma = self._beta(values), values["sigma"]
        c = self._constants.on(beta)
        squares = ((beta - c["best"]) @ c["r"].T).square().sum(-1) + c["rest"]
        likelihood = -0.5 * squares / sigma.square() - c["count"] * (sigma.log() + 0.5 * math.log(2 * math.pi))
        return likelihood + self._log_prior(beta, sigma)


def _columns(*columns: Tensor) -> Tensor:
    """(N, p) of columns (N,), a column of ones first."""
    return torch.stack([torch.ones_like(columns[0]), *columns], -1)


@dataclass(frozen=True, eq=False)
class KidScore(_LinearModel):
    r"""Test scores of 434 children on their mothers' IQ and schooling: flat beta, :math:`\sigma \sim` half-Cauchy(2.5).

    Gelman & Hill, Data Analysis Using Regression and Multilevel/Hierarchical Models, chapter 3. posteriordb:
    kidiq-kidscore_momiq, -kidscore_momhsiq, -kidscore_interaction.

    Args:
        model: ``momiq``: (1, iq), d = 3; ``momhsiq``: (1, high school, iq), d = 4; ``interaction``: with their product
            beside, d = 5.
    """

    model: Literal["momiq", "momhsiq", "interaction"] = "momiq"

    def _design(self) -> tuple[Tensor, Tensor]:
        d = data("kidiq")
        school, iq = d["mom_hs"], d["mom_iq"]
        columns = {"momiq": (iq,), "momhsiq": (school, iq), "interaction": (school, iq, school * iq)}
        return _columns(*columns[self.model]), d["kid_score"]

    def _log_prior(self, beta: Tensor, sigma: Tensor) -> Tensor:
        return log_half_cauchy(sigma, 2.5)

    @property
    def _reference(self) -> str:  # type: ignore[override]
        return f"kidscore_{self.model}"


@dataclass(frozen=True, eq=False)
class Mesquite(_LinearModel):
    r"""Weight of the leaves of 46 mesquite bushes on their measures, d = 8; flat priors on beta and sigma.

    Columns: 1, both diameters, canopy height, total height, density, group. Gelman & Hill, section 4.6. posteriordb:
    mesquite-mesquite and mesquite-logmesquite.

    Args:
        log: take logs of the weight and of all measures but the group.
    """

    log: bool = True

    def _design(self) -> tuple[Tensor, Tensor]:
        d = data("mesquite")
        measures = [d[k] for k in ("diam1", "diam2", "canopy_height", "total_height", "density")]
        if self.log:
            return _columns(*(m.log() for m in measures), d["group"]), d["weight"].log()
        return _columns(*measures, d["group"]), d["weight"]

    @property
    def _reference(self) -> str:  # type: ignore[override]
        return "logmesquite" if self.log else "mesquite"


@dataclass(frozen=True, eq=False)
class Nes1980(_LinearModel):
    r"""Party identification of 701 voters in 1980, d = 10; flat priors on beta and sigma.

    Columns: 1, ideology, race, age group 2, 3, 4 (against 1), education, gender, income. Gelman & Hill, section 4.7.
    posteriordb: nes1980-nes.
    """

    _reference: ClassVar[str | None] = "nes"

    def _design(self) -> tuple[Tensor, Tensor]:
        d = data("nes1980")
        ages = [(d["age_discrete"] == k).double() for k in (2, 3, 4)]
        return _columns(d["real_ideo"], d["race_adj"], *ages, d["educ1"], d["gender"], d["income"]), d["partyid7"]


@dataclass(frozen=True, eq=False)
class SblrcBlr(_LinearModel):
    r"""Linear regression on five strongly correlated columns, d = 6: :math:`\beta_k \sim N(0, 10)`.

    sigma > 0 has the density of N(0, 10) *without* the factor two of its positive half, as in the Stan program.
    posteriordb: sblrc-blr. log Z = -195.6607358 with that convention, by quadrature over sigma.
    """

    log_z = -195.66073576677076
    _reference: ClassVar[str | None] = "blr"

    def _design(self) -> tuple[Tensor, Tensor]:
        d = data("sblrc")
        return d["X"], d["y"]

    def _log_prior(self, beta: Tensor, sigma: Tensor) -> Tensor:
        return log_normal(beta, 0.0, 10.0).sum(-1) + log_normal(sigma, 0.0, 10.0)


@dataclass(frozen=True, eq=False)
class AutoRegression(_LinearModel):
    r"""An autoregression of order five on a series of 200, d = 7.

    :math:`y_t \sim N(\alpha + \sum_k \beta_k y_{t-k}, \sigma)` for t > 5; alpha and beta N(0, 10), sigma
    half-Cauchy(2.5). posteriordb: arK-arK. log Z = 58.5875939, by quadrature over sigma.
    """

    log_z = 58.58759392284432
    _reference: ClassVar[str | None] = "arK"

    @cached_property
    def parameters(self) -> Parameters:  # type: ignore[override]
        return Parameters({"alpha": constraints.real, "beta": (constraints.real, 5), "sigma": constraints.positive})

    def _design(self) -> tuple[Tensor, Tensor]:
        y = data("arK")["y"]
        return _columns(*(y[5 - k : len(y) - k] for k in range(1, 6))), y[5:]

    def _beta(self, values: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([values["alpha"].unsqueeze(-1), values["beta"]], -1)

    def _log_prior(self, beta: Tensor, sigma: Tensor) -> Tensor:
        return log_normal(beta, 0.0, 10.0).sum(-1) + log_half_cauchy(sigma, 2.5)


# -- others ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class GPRegression(Posterior):
    r"""Settings of a Gaussian process through eleven points, d = 3: :math:`y \sim N(0, K + \sigma I)`.

    :math:`K_{ij} = \alpha^2 e^{-(x_i - x_j)^2 / 2 \rho^2}`; sigma is added as a variance. rho ~ Gamma(25, rate 4),
    alpha ~ half-N(0, 2), sigma ~ half-N(0, 1). posteriordb: gp_pois_regr-gp_regr. A jitter of 32 units of rounding of
    alpha^2 keeps K invertible for any sigma. log Z = -27.5554556, by quadrature over the three logs.
    """

    log_z = -27.55545559
    _reference: ClassVar[str | None] = "gp_regr"

    @cached_property
    def parameters(self) -> Parameters:  # type: ignore[override]
        return Parameters({name: constraints.positive for name in ("rho", "alpha", "sigma")})

    @cached_property
    def _constants(self) -> Placed:
        d = data("gp_pois_regr")
        return Placed(squares=(d["x"].unsqueeze(0) - d["x"].unsqueeze(1)).square(), y=d["y"])

    def _parts(self, x: Tensor) -> tuple[Tensor, ...]:
        """log gamma (n,), parameters (3, n), kernel (n, N, N), jitter (n,) and Cholesky factor (n, N, N)."""
        logs = x.T
        rho, alpha, sigma = values = logs.exp()
        c = self._constants.on(x)
        y, variance = c["y"], alpha.square()
        kernel = variance[:, None, None] * (c["squares"] * (-0.5 / rho.square())[:, None, None]).exp()
        jitter = 32 * torch.finfo(x.dtype).eps * variance
        root, failed = torch.linalg.cholesky_ex(
            kernel + torch.diag_embed((sigma + jitter).unsqueeze(-1).expand(-1, len(y)))
        )
        # Where the kernel is not positive in floating point the density is put to 0; any root will do there.
        root = torch.where((failed == 0)[:, None, None], root, torch.eye(len(y), dtype=x.dtype, device=x.device))
        white = torch.linalg.solve_triangular(root, y.expand(len(x), -1).unsqueeze(-1), upper=False).squeeze(-1)
        log_det = root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        likelihood = -0.5 * white.square().sum(-1) - log_det - 0.5 * len(y) * math.log(2 * math.pi)
        prior = log_gamma(rho, 25.0, 4.0) + log_half_normal(alpha, 2.0) + log_half_normal(sigma, 1.0)
        value = torch.where(failed == 0, likelihood + prior + logs.sum(0), -math.inf)
        return value, values, kernel, jitter, root

    def _log_density(self, x: Tensor) -> Tensor:
        return self._parts(x)[0]

    def _gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        value, (rho, alpha, sigma), kernel, jitter, root = self._parts(x)
        c = self._constants.on(x)
        inverse = torch.cholesky_inverse(root)
        weights = inverse @ c["y"]
        pull = 0.5 * (weights.unsqueeze(-1) * weights.unsqueeze(-2) - inverse)  # d log N(y; 0, C) / dC
        trace = pull.diagonal(dim1=-2, dim2=-1).sum(-1)
        weighted = pull * kernel
        by_rho = (weighted * c["squares"]).sum((-2, -1)) / rho.square() + 25 - 4 * rho
        by_alpha = 2 * (weighted.sum((-2, -1)) + jitter * trace) + 1 - alpha.square() / 4
        by_sigma = sigma * trace + 1 - sigma.square()
        return value, torch.stack([by_rho, by_alpha, by_sigma], -1)


@dataclass(frozen=True, eq=False)
class LowDimGaussMix(Posterior):
    r"""A mixture of two normals for 1000 numbers, d = 5.

    :math:`y_i \sim \theta N(\mu_0, \sigma_0) + (1 - \theta) N(\mu_1, \sigma_1)` with :math:`\mu_0 < \mu_1`; each mu
    with density N(0, 2), not renormalised to the half where they are in order; sigma ~ half-N(0, 2), theta ~ Beta(5,
    5). posteriordb: low_dim_gauss_mix-low_dim_gauss_mix.
    """

    _reference: ClassVar[str | None] = "low_dim_gauss_mix"

    @cached_property
    def parameters(self) -> Parameters:  # type: ignore[override]
        return Parameters({"mu": (ordered, 2), "sigma": (constraints.positive, 2), "theta": constraints.unit_interval})

    @cached_property
    def _constants(self) -> Placed:
        return Placed(y=data("low_dim_gauss_mix")["y"])

    def _log_joint(self, values: Mapping[str, Tensor]) -> Tensor:
        mu, sigma, theta = values["mu"], values["sigma"], values["theta"]
        y = self._constants.on(mu)["y"]
        # The log of each part's density is a quadratic in y. The first sums in closed form, the second less the first
        # is a matrix product, and log(e^f + e^s) = f + softplus(s - f).
        precision = sigma.square().reciprocal()
        weight = torch.stack([theta.log(), torch.log1p(-theta)], -1) - sigma.log()
        parts = torch.stack([weight - 0.5 * mu.square() * precision, mu * precision, -0.5 * precision], -1)  # (n, 2, 3)
        powers = torch.stack([torch.ones_like(y), y, y.square()])
        first, second = parts.unbind(1)
        likelihood = first @ powers.sum(-1) + softplus((second - first) @ powers, threshold=40).sum(-1)
        likelihood = likelihood - 0.5 * len(y) * math.log(2 * math.pi)
        prior = log_normal(mu, 0.0, 2.0).sum(-1) + log_half_normal(sigma, 2.0).sum(-1) + log_beta(theta, 5.0, 5.0)
        return likelihood + prior
