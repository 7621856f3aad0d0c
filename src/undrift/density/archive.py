"""Draws on disk, and draws for ArviZ.

A file of draws is a sealed safetensors file (see :mod:`undrift.container`): the states, their weights, the evidence of
each repeat, the parameters on their own scale, and what the run was. Benchmark targets are kept by name and settings;
a density that is a Python function is not kept at all, so its draws are read back with the function, or without it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from undrift.config import ConfigError, build, describe, family
from undrift.container import CheckpointError, read_file, write_file
from undrift.density.bounds import Bounds
from undrift.density.draws import Draws
from undrift.density.target import Evaluations, Target, TargetError

__all__ = ["RecordedDraws", "RecordedTarget", "load_draws", "save_draws", "to_arviz"]

_KIND = "density draws"


class RecordedTarget(Target):
    """What is left of a target when its density is not at hand: names, shapes, and log Z if it was known.

    Args:
        name, dim, log_z: as of the target.
        labels: one for each constrained scalar.
        shapes: constrained shape of each named parameter; None for a target without names.
    """

    def __init__(
        self,
        name: str,
        dim: int,
        labels: list[str],
        shapes: Mapping[str, tuple[int, ...]] | None,
        log_z: float | None = None,
    ) -> None:
        super().__init__(self._gone, dim, log_z=log_z, name=name)
        self._labels, self.shapes = labels, shapes

    def _gone(self, x: Tensor) -> Tensor:
        raise TargetError(
            f"{self.name}: these draws were read without their density; give it, as in load_draws(path, target)."
        )

    @property
    def labels(self) -> list[str]:
        return self._labels


@dataclass(frozen=True, eq=False)
class RecordedDraws(Draws):
    """Draws of a :class:`RecordedTarget`, whose parameters come from the file.

    Attributes:
        recorded: (n, scalars), on the parameters' own scale; None where that is the scale of the states.
    """

    recorded: Tensor | None = None

    @cached_property
    def values(self) -> Tensor:
        return self.x if self.recorded is None else self.recorded

    def parameters(self) -> dict[str, Tensor]:
        assert isinstance(self.target, RecordedTarget)
        shapes = self.target.shapes
        if shapes is None:
            return {"x": self.x}
        sizes = [math.prod(shape) for shape in shapes.values()]
        parts = self.values.split(sizes, -1)
        return {name: part.reshape(-1, *shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


# -- to disk and back --------------------------------------------------------------------------------------------------


def save_draws(path: str | Path, draws: Draws) -> Path:
    """Write draws to a file, atomically.

    Args:
        path: where to; its folder is made.
        draws: of any method.

    Returns:
        The path.
    """
    place, target = Path(path), draws.target
    tensors = {"states": draws.states}
    if draws.walker_log_weights is not None:
        tensors["walker_log_weights"] = draws.walker_log_weights
    if draws.repeat_log_z is not None:
        tensors["repeat_log_z"] = draws.repeat_log_z
    shapes = _shapes(target)
    if shapes is not None:
        tensors["values"] = draws.values
    description = {
        "kind": _KIND,
        "target": {
            "name": target.name,
            "dim": target.dim,
            "labels": target.labels,
            "shapes": None if shapes is None else {name: list(shape) for name, shape in shapes.items()},
            "log_z": _finite(target.log_z),
            "settings": _settings(target),
        },
        "corrected": draws.corrected,
        "promise": draws.promise,
        "method": draws.method,
        "reason": draws.reason,
        "evaluations": astuple(draws.evaluations),
        "acceptance": _finite(draws.acceptance),
        "relative_step": _finite(draws.relative_step),
        "levels": [{key: _finite(value) for key, value in row.items()} for row in draws.levels],
        "notes": list(draws.notes),
        "seconds": _finite(draws.seconds),
        "bounds": None if draws.bounds is None else _spelled(asdict(draws.bounds)),
        "training": [_spelled(row) for row in draws.training],
    }
    place.parent.mkdir(parents=True, exist_ok=True)
    write_file(place, tensors, description)
    return place


def load_draws(path: str | Path, target: Target | None = None) -> Draws:
    """Read draws back.

    Args:
        path: of the file.
        target: the density that was sampled. None builds a benchmark target from its settings, and leaves out
            a density that is a function: everything but new evaluations of it still works.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it is not an intact file of draws.
        TargetError: if the draws are of another target than the one given.
    """
    place = Path(path)
    if not place.is_file():
        raise FileNotFoundError(f"no draws at {place.absolute()}; save_draws and undrift density write such files.")
    tensors, about = read_file(place)
    if about.get("kind") != _KIND or "states" not in tensors:
        raise CheckpointError(f"{place} holds no draws of a density, but {about.get('kind', 'something else')}.")
    noted = about["target"]
    shapes = noted["shapes"]
    if target is None:
        target = _rebuilt(noted)
    else:
        _check_same(place, target, noted)
    kind: type[Draws] = Draws
    more: dict[str, Any] = {}
    if target is None:
        sizes = None if shapes is None else {name: tuple(shape) for name, shape in shapes.items()}
        target = RecordedTarget(noted["name"], noted["dim"], noted["labels"], sizes, noted["log_z"])
        kind, more = RecordedDraws, {"recorded": tensors.get("values")}
    return kind(
        target=target,
        states=tensors["states"],
        walker_log_weights=tensors.get("walker_log_weights"),
        corrected=about["corrected"],
        repeat_log_z=tensors.get("repeat_log_z"),
        promise=about["promise"],
        method=about["method"],
        reason=about["reason"],
        evaluations=Evaluations(*about["evaluations"]),
        acceptance=about["acceptance"],
        relative_step=about["relative_step"],
        levels=tuple(about["levels"]),
        notes=tuple(about["notes"]),
        seconds=math.nan if about["seconds"] is None else about["seconds"],
        bounds=None if about.get("bounds") is None else Bounds(**_read(about["bounds"])),
        training=tuple(_read(row) for row in about.get("training", ())),
        **more,
    )


def _shapes(target: Target) -> Mapping[str, tuple[int, ...]] | None:
    if isinstance(target, RecordedTarget):
        return target.shapes
    return None if target.parameters is None else target.parameters.shapes


def _finite(value: Any) -> Any:
    """A value for JSON, which has no infinities: None stands for them."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


_SPELLED = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def _spelled(row: Mapping[str, Any]) -> dict[str, Any]:
    """Values for JSON, in which infinities and NaN are words: None keeps its meaning."""
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def _read(row: Mapping[str, Any]) -> dict[str, Any]:
    """The reverse of :func:`_spelled`."""
    return {k: _SPELLED.get(v, v) if isinstance(v, str) else v for k, v in row.items()}


def _settings(target: Target) -> Any:
    """Plain data that builds the target again; None for one made of a Python function."""
    try:
        settings = describe(target)
    except ConfigError:
        return None
    return settings if settings.get("type") in family(Target) else None


def _rebuilt(noted: Mapping[str, Any]) -> Target | None:
    if noted["settings"] is None:
        return None
    import undrift.density.targets  # noqa: F401 - here and not above, because they are built on this package

    try:
        return build(noted["settings"], Target)
    except ConfigError:  # a class of the user's own, which is not in memory now
        return None


def _check_same(place: Path, target: Target, noted: Mapping[str, Any]) -> None:
    settings = _settings(target)
    both = settings is not None and noted["settings"] is not None
    for what, given, held in (
        ("dim", target.dim, noted["dim"]),
        ("name", target.name, noted["name"]),
        ("labels", target.labels, noted["labels"]),
        ("settings", settings if both else None, noted["settings"] if both else None),
    ):
        if given != held:
            raise TargetError(
                f"{place} holds draws of {noted['name']}, not of {target.name}: {what} is {_brief(held)} there, "
                f"{_brief(given)} here. Give the target that was sampled."
            )


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


# -- ArviZ -------------------------------------------------------------------------------------------------------------


def to_arviz(draws: Draws, seed: int = 0) -> Any:
    """Draws as an ArviZ ``DataTree``, parameters by name and with their shapes.

    Group ``posterior`` holds draws of equal weight. Walkers that kept several states are chains. Walkers of one state
    are independent draws, so each repeat is a chain. Weighted draws are resampled into one chain of as many draws as
    they are worth, so that the effective size that ArviZ finds is honest, and none is suggested by R-hat; all of them,
    with ``log_weight``, are in the group ``weighted``, a chain for each repeat. Attributes hold method, log Z,
    evaluations and acceptance.

    Args:
        draws: of any method.
        seed: of the resampling.

    Raises:
        ImportError: without the package arviz-base.
    """
    try:
        import arviz_base
    except ImportError as error:
        raise ImportError("to_arviz needs the package arviz-base: pip install 'undrift[arviz]'.") from error
    repeats, walkers, length, _ = draws.states.shape
    named = {name: value.detach().cpu() for name, value in draws.parameters().items()}

    def shaped(chains: int, index: Tensor | None = None) -> dict[str, Any]:
        parts = {name: value if index is None else value[index] for name, value in named.items()}
        return {name: value.reshape(chains, -1, *value.shape[1:]).numpy() for name, value in parts.items()}

    attributes = {
        "inference_library": "undrift",
        "target": draws.target.name,
        "method": draws.method,
        "gradient_evaluations": draws.evaluations.gradients,
        "value_evaluations": draws.evaluations.values,
    }
    for key in ("log_z", "log_z_std_error", "promise", "acceptance", "relative_step"):
        value = getattr(draws, key)
        if value is not None:
            attributes[key] = value
    if draws.walker_log_weights is None:
        groups = {"posterior": shaped(repeats if length == 1 else repeats * walkers)}
    else:
        generator = torch.Generator().manual_seed(seed)
        worth = max(1, math.floor(draws.ess or 1.0))
        index = torch.multinomial(draws.weights.cpu(), worth, replacement=True, generator=generator)
        log_w = draws.log_weights
        assert log_w is not None
        weighted = {**shaped(repeats), "log_weight": log_w.detach().cpu().reshape(repeats, -1).numpy()}
        groups = {"posterior": shaped(1, index), "weighted": weighted}
    return arviz_base.from_dict(
        groups, attrs={name: attributes for name in groups}, sample_dims=["chain", "draw"], check_conventions=False
    )
