r"""Models on disk: weights and the description from which the whole model is rebuilt.

The description is that of :mod:`undrift.config`: {"denoiser": ...} for a denoiser, {"denoiser": ..., "process": ...}
for a diffusion made of one, {"noise": {"process": ..., "network": ..., ...}} for a noise-predicting diffusion,
{"classifier": ...} for a classifier of noisy points. Tensors named ``weights/...`` are the network's; a trainer's own
file carries its state beside them. A learned process is part of the description, as it stands.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from undrift.config import ConfigError, build, describe
from undrift.container import CheckpointError, read_file, write_file
from undrift.denoise.classifier import NetworkClassifier
from undrift.denoise.network import NetworkDenoiser
from undrift.diffusion import Diffusion, NoiseDiffusion
from undrift.networks.base import Network
from undrift.nonlinear_diffusion import NonlinearDiffusion
from undrift.process.linear import LinearProcess
from undrift.space import Space, space_of

__all__ = ["Model", "describe_model", "load", "network_of", "notes", "parts_of", "save", "with_parts"]

Model: TypeAlias = NetworkDenoiser | NetworkClassifier | NoiseDiffusion | Diffusion | NonlinearDiffusion
"""What can be trained, and but for a NonlinearDiffusion saved; a Diffusion's denoiser must be a NetworkDenoiser."""

_NOISE = ("kernel", "factor", "mixed", "data_std")


def network_of(model: Model) -> nn.Module:
    """The network inside a model.

    Raises:
        TypeError: if the model has none.
    """
    inner = model.denoiser if isinstance(model, Diffusion) else model
    known = (NetworkDenoiser, NetworkClassifier, NoiseDiffusion, NonlinearDiffusion)
    if not isinstance(inner, known) or not isinstance(inner.network, nn.Module):
        raise TypeError(
            f"a {type(model).__name__}{f' of a {type(inner).__name__}' * (inner is not model)} holds no network to "
            "train or save; give a NetworkDenoiser, a Diffusion of one, a NetworkClassifier, or a NoiseDiffusion of a "
            "torch.nn.Module."
        )
    return inner.network


def parts_of(model: Model) -> nn.ModuleDict:
    """What of a model is trained: its "network", and its "process" if that has parameters that ask for gradients.

    Raises:
        TypeError: if the model has no network, or its process is a fixed one on a clock that would learn.
    """
    parts = nn.ModuleDict({"network": network_of(model)})
    process = getattr(model, "process", None)
    clock = getattr(process, "clock", None)
    if isinstance(process, nn.Module):
        if any(p.requires_grad for p in process.parameters()):
            parts["process"] = process
    elif isinstance(clock, nn.Module) and any(p.requires_grad for p in clock.parameters()):
        raise TypeError(
            f"a {type(process).__name__} does not train its {type(clock).__name__}; make it a learned process, "
            "LearnedProcess.like(process, learn=('clock',)), or hold the clock with clock.requires_grad_(False)."
        )
    return parts


def with_parts(model: Model, parts: nn.ModuleDict) -> Model:
    """The same model around other parts of the same kind."""
    network = parts["network"]
    if isinstance(model, (NetworkDenoiser, NetworkClassifier)):
        return model.with_network(network)
    if isinstance(model, NonlinearDiffusion):
        return dataclasses.replace(model, network=network)
    process = cast(LinearProcess, parts["process"]) if "process" in parts else model.process
    if isinstance(model, NoiseDiffusion):
        return NoiseDiffusion(process, network, model.kernel, model.factor, model.mixed, model.data_std, model.space)
    denoiser = cast(NetworkDenoiser, with_parts(cast(NetworkDenoiser, model.denoiser), parts))
    return Diffusion(process, denoiser, model.space)


def describe_model(model: Model) -> dict[str, Any]:
    """Plain data from which :func:`load` rebuilds the model, weights apart.

    Raises:
        TypeError, ConfigError: if a part has no description; the message names it.
    """
    network_of(model)
    if isinstance(model, NonlinearDiffusion):
        raise TypeError("a NonlinearDiffusion has no description: its process is made of Python functions.")
    if isinstance(model, NoiseDiffusion):
        settings = {k: getattr(model, k) for k in _NOISE}
        return {
            "noise": {
                "process": describe(model.process, "process"),
                "network": describe(model.network, "network"),
                **settings,
                "space": describe(model.space, "space"),
            }
        }
    if isinstance(model, Diffusion):
        own = {} if model.space == space_of(model.denoiser) else {"space": describe(model.space, "space")}
        return {"denoiser": describe(model.denoiser, "denoiser"), "process": describe(model.process, "process"), **own}
    if isinstance(model, NetworkClassifier):
        return {"classifier": describe(model, "classifier")}
    return {"denoiser": describe(model, "denoiser")}


def build_model(description: Mapping[str, Any]) -> Model:
    """The model of a description, its weights as initialised."""
    if "noise" in description:
        parts = dict(description["noise"])
        process = build(parts.pop("process"), LinearProcess, "noise.process")
        space = build(parts.pop("space"), Space, "noise.space") if "space" in parts else None
        network = build(parts.pop("network"), Network, "noise.network")
        return NoiseDiffusion(process, network, **parts, space=space)
    if "classifier" in description:
        return build(description["classifier"], NetworkClassifier, "classifier")
    denoiser = build(description["denoiser"], NetworkDenoiser, "denoiser")
    if "process" in description:
        own = {"space": build(description["space"], Space, "space")} if "space" in description else {}
        return Diffusion(build(description["process"], LinearProcess, "process"), denoiser, **own)
    return denoiser


def save(path: str | Path, model: Model, notes: Mapping[str, Any] | None = None) -> None:
    """Write a model: its network's weights and its description, in one file, atomically.

    Args:
        path: file to write, by custom ``*.safetensors``; its folder is made if missing.
        model: a NetworkDenoiser, a Diffusion of one, a NetworkClassifier, or a NoiseDiffusion.
        notes: plain data to keep beside it: the data set's name, the shape of an event, ...
    """
    write_model(path, model, notes or {}, {}, {})


def write_model(
    path: str | Path,
    model: Model,
    notes: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    training: Mapping[str, Any],
) -> None:
    """:func:`save` with a trainer's tensors and state."""
    place = Path(path)
    place.parent.mkdir(parents=True, exist_ok=True)
    weights = {f"weights/{k}": v for k, v in network_of(model).state_dict().items()}
    description = {"model": describe_model(model), "notes": describe(dict(notes)), "training": dict(training)}
    write_file(place, {**weights, **tensors}, description)


def load(path: str | Path, device: str | torch.device = "cpu") -> Any:
    """Rebuild a model: process, network, weights (the average, for a trainer's file), in evaluation mode.

    Args:
        path: file written by :func:`save` or by a trainer.
        device: where the network goes.

    Returns:
        What was saved: a NetworkDenoiser, a Diffusion, a NetworkClassifier or a NoiseDiffusion. A learned process comes
        back without gradients; ``model.process.requires_grad_()`` lets it learn on.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if the file is not an intact checkpoint, or its weights do not fit its description.
    """
    tensors, description = read_file(path)
    try:
        model = build_model(description["model"])
    except (ConfigError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: its description cannot be built here: {error} Import classes of your own before loading."
        ) from error
    network = network_of(model)
    weights = {k.removeprefix("weights/"): v for k, v in tensors.items() if k.startswith("weights/")}
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: its weights do not fit the network it describes: {error}") from error
    network.to(device).eval()
    process = getattr(model, "process", None)
    for part in (process, getattr(process, "clock", None)):
        if isinstance(part, nn.Module):
            part.requires_grad_(False)
    if isinstance(model, Diffusion):
        cast(NetworkDenoiser, model.denoiser).eval()
    elif isinstance(model, nn.Module):
        model.eval()
    return model


def notes(path: str | Path) -> dict[str, Any]:
    """What was noted beside a saved model."""
    return dict(read_file(path)[1]["notes"])
