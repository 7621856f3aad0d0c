"""A posterior without data to train on: name its parameters, draw, and hear how far to trust the draws.

python examples/minimal_density.py
"""

import torch
from torch.distributions import Gamma, Poisson, constraints

from undrift.density import Auto, Target

# Coal-mining disasters in Britain, by year, 1851 to 1900 (Carlin, Gelfand & Smith 1992): when did the rate fall?
counts = torch.tensor([int(c) for c in "45401434063340263354531441553425223421322111130010"], dtype=torch.float64)
year = torch.arange(1851, 1901, dtype=torch.float64)


def log_prob(v: dict[str, torch.Tensor]) -> torch.Tensor:
    """Log joint density of two rates, and of the year of a change that takes about a year, (batch,)."""
    share = torch.sigmoid(2.0 * (year - v["change"].unsqueeze(-1)))
    rate = v["before"].unsqueeze(-1) * (1 - share) + v["after"].unsqueeze(-1) * share
    prior = Gamma(2.0, 1.0).log_prob(v["before"]) + Gamma(2.0, 1.0).log_prob(v["after"])
    return prior - torch.log(torch.tensor(50.0)) + Poisson(rate).log_prob(counts).sum(-1)


parameters = {
    "before": constraints.positive,
    "after": constraints.positive,
    "change": constraints.interval(1851.0, 1901.0),
}
target = Target.constrained(log_prob, parameters, name="coal")
draws = Auto().run(target, n=2048, seed=0)

print(draws.reason)
low, middle, high = draws.quantile([0.05, 0.5, 0.95])
for label, a, b, c in zip(target.labels, low, middle, high, strict=True):
    print(f"{label:7} {b:8.2f}   90 % in {a:.2f} to {c:.2f}")
print(f"log Z   {draws.log_z:8.2f} ± {draws.log_z_std_error:.2f}, {draws.promise}")
print(f"{draws.evaluations.gradients} gradients, {draws.seconds:.1f} s")
print("\n".join(draws.warnings()) or "nothing in the run speaks against these draws")
