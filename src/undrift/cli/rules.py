"""Which flags of conditional sampling go together, by what they say alone."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from undrift.config import ConfigError

if TYPE_CHECKING:
    from undrift.cli.sample import SampleRun

__all__ = ["OF_PARTS", "Method", "Twisting", "check"]

Method = Literal["known", "replace", "amortised", "dps", "pigdm", "moments", "linearised", "twisted"]
Twisting = Literal["dps", "pigdm", "moments", "linearised"]

OF_PARTS = ("known", "replace")
"""Methods of a known part, which is taken as exact; the others have a likelihood."""


def check(run: SampleRun) -> None:
    """Raise ConfigError for flags that do not go together, by what they say alone."""
    part = run.known is not None or run.mask is not None
    told = part or run.observe is not None or run.data is not None or run.method == "amortised"
    true = run.truth is not None or run.simulate is not None
    noisy = run.method not in (None, *OF_PARTS)
    for wrong, message in (
        (
            run.label is not None and run.classifier is None,
            "label: is the class that a classifier guides to; give --classifier RUN, or --y where the network has "
            "classes.",
        ),
        (
            run.classifier is not None and run.label is None,
            "label: a classifier needs the class to guide to, as in --label 3.",
        ),
        (
            run.guidance is not None and not (run.y is not None or run.classifier is not None or told or true),
            "guidance: nothing guides; give --y, --classifier or --observe, or --data to a network that is told them.",
        ),
        (
            run.guidance is not None and run.classifier is not None and noisy and run.method != "amortised",
            "guidance: would be the strength of both the classifier and the observation; leave it out, for 1.",
        ),
        (
            run.guidance is not None
            and run.classifier is None
            and run.y is None
            and (run.method in OF_PARTS or (part and run.method is None)),
            f"guidance: is the strength of a potential's gradient, and {run.method or 'known'} has none.",
        ),
        (
            run.guidance is not None and not math.isfinite(run.guidance),
            f"guidance: must be finite, got {run.guidance}.",
        ),
        (
            run.interval is not None
            and (run.guidance is None or run.classifier is not None or not (run.y is not None or told or true)),
            "interval: the noise levels of guidance without a classifier; give --guidance as well, and --y, or --data "
            "to a network that is told them.",
        ),
        (
            run.interval is not None and not 0 <= run.interval[0] < run.interval[1],
            f"interval: must be [low, high] with 0 <= low < high, noise levels, got {run.interval}.",
        ),
        (part and run.observe is not None, "observe: known and mask are an observation already; give one of the two."),
        (part and run.data is not None, "data: belongs to --observe; with a mask the known values are --known."),
        (
            run.mask is not None and run.known is None and not true,
            "mask: of what? Give the known values, --known FILE, or a truth, --truth FILE or --simulate INDEX.",
        ),
        (
            run.known is not None and run.simulate is not None,
            "known: the known values are those of the simulated truth; give either known or simulate.",
        ),
        (run.truth is not None and run.simulate is not None, "truth: give either truth or simulate."),
        (run.data is not None and run.simulate is not None, "data: are simulated; give either data or simulate."),
        (run.source is not None and run.simulate is None, "source: is where --simulate INDEX takes its truth from."),
        (
            run.observe is not None and run.noise is None,
            "noise: an observation has a law; give its noise, as in --noise '{type: GaussianNoise, std: 0.05}'.",
        ),
        (
            run.observe is not None and run.data is None and not true,
            "data: of what was observed; give --data FILE, or a truth to simulate it from, --simulate INDEX.",
        ),
        (
            run.observe is not None and run.method in OF_PARTS,
            f"method: {run.method} is for a known part, --known and --mask; observations take dps, pigdm, moments, "
            "linearised or twisted.",
        ),
        (part and run.method == "amortised", "method: amortised is for networks that are told data; give --observe."),
        (
            run.noise is not None and not told,
            "noise: of what? Give --observe, or --mask and a method with a likelihood.",
        ),
        (
            part and noisy and run.noise is None,
            f"noise: {run.method} needs a likelihood of the known values, as in --noise "
            "'{type: GaussianNoise, std: 0.05}'.",
        ),
        (
            part and not noisy and run.noise is not None,
            f"noise: {run.method or 'known'} takes known values as exact; choose --method dps, pigdm, moments or "
            "twisted.",
        ),
        (run.method is not None and not told, f"method: {run.method} of what? Give --mask or --observe."),
        (
            run.potential is not None and run.method != "twisted",
            "potential: is what twisted sampling is twisted by; --method dps, pigdm or moments guides by one alone.",
        ),
        (
            (run.particles is not None or run.runs is not None) and run.method != "twisted",
            "particles: belong to --method twisted.",
        ),
    ):
        if wrong:
            raise ConfigError(message)
    for name in ("particles", "runs"):
        value = getattr(run, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name}: expected at least 1, got {value}.")
