r"""Objects from plain data and back: one typed schema for configuration files, flags and checkpoints.

``build`` makes an object from nested dictionaries, with the constructor's own annotations as the schema; ``describe``
is its inverse. A family (processes, clocks, samplers, networks, ...) is a base class, and its members are the concrete
subclasses that are in memory: nothing is ever imported because a file says so.

    build({"type": "PSLD", "gamma": 0.02, "clock": {"type": "ConstantClock", "rate": 4.0}}, LinearProcess)

A name alone stands for its defaults: ``build("VP", LinearProcess)``. It may go without capitals and without the noun of
its family: where a LinearProcess is expected, "learned" is LearnedProcess; and the beginning of a name, or of a word
within it, is enough where it is that of one member only. Every error names the place, what stood there, and what would
be allowed.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar, Union

import torch
from torch import Tensor

__all__ = ["ConfigError", "build", "describe", "family", "schema", "show_type"]

T = TypeVar("T")
_PLAIN = {float: "a number", int: "a whole number", bool: "true or false", str: "a text"}


class ConfigError(ValueError):
    """A configuration that cannot be built; the message starts with the place."""


def family(base: type) -> dict[str, type]:
    """The concrete classes a configuration may name where ``base`` is expected, by name."""
    members: dict[str, type] = {}
    stack = [base]
    while stack:
        cls = stack.pop()
        stack.extend(cls.__subclasses__())
        if not inspect.isabstract(cls) and not cls.__name__.startswith("_") and _describable(cls):
            members[cls.__name__] = cls
    return dict(sorted(members.items()))


def _describable(cls: type) -> bool:
    """Whether plain data can make one: its arguments are known, and none that it needs is a Python function."""
    if not dataclasses.is_dataclass(cls) and not any("config" in vars(b) for b in cls.__mro__):
        return False
    required = (annotation for annotation, default in schema(cls).values() if default is inspect.Parameter.empty)
    return not any(annotation is Callable or typing.get_origin(annotation) is Callable for annotation in required)


@functools.cache
def schema(cls: type) -> dict[str, tuple[Any, Any]]:
    """Keys a configuration of ``cls`` may give: name -> (annotation, default or ``inspect.Parameter.empty``)."""
    # A dataclass inherits annotations from modules with names of their own; only the class knows where each belongs.
    init = cls.__init__  # type: ignore[misc]
    hints = typing.get_type_hints(cls if dataclasses.is_dataclass(cls) else init)
    parameters = list(inspect.signature(init).parameters.values())[1:]
    out = {}
    for p in parameters:
        default = p.default
        if type(default).__name__ == "_HAS_DEFAULT_FACTORY_CLASS":
            default = {f.name: f for f in dataclasses.fields(cls)}[p.name].default_factory()  # type: ignore[operator]
        out[p.name] = (hints.get(p.name, Any), default)
    return out


def show_type(annotation: Any) -> str:
    """An annotation in words, as errors and help texts name it."""
    if annotation in _PLAIN:
        return _PLAIN[annotation]
    if annotation in (None, type(None)):
        return "null"
    if annotation is Tensor:
        return "a (nested) list of numbers"
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return "one of " + ", ".join(repr(a) for a in args)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(show_type(a) for a in args))
    if origin in (list, tuple):
        return "a list of " + (show_type(args[0]).removeprefix("a ") + "s" if args else "values")
    if inspect.isclass(annotation):
        names = list(family(annotation)) or [annotation.__name__]
        return names[0] if len(names) == 1 else "one of " + ", ".join(names)
    return str(annotation)


def build(data: Any, expected: Any, place: str = "") -> Any:
    """Build what ``data`` describes.

    Args:
        data: plain data: numbers, texts, lists, dictionaries; or an object that already is what is expected.
        expected: a type: a base class of a family, a dataclass, a builtin, or an annotation made of these.
        place: where in the configuration ``data`` stands, for errors.

    Raises:
        ConfigError: naming the place, the value, and what is allowed.
    """
    where = f"{place}: " if place else ""
    origin, args = typing.get_origin(expected), typing.get_args(expected)
    if expected is Any:
        return data
    if origin in (Union, types.UnionType):
        return _build_union(data, args, place)
    if expected in (None, type(None)):
        if data is None:
            return None
    elif origin is Literal:
        if data in args and type(data) in {type(a) for a in args}:
            return data
    elif expected is float:
        if isinstance(data, (int, float)) and not isinstance(data, bool):
            return float(data)
        if isinstance(data, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", data):
            return float(data)  # YAML 1.1 reads 1e-3, without a point, as a text
    elif expected is int:
        if isinstance(data, int) and not isinstance(data, bool):
            return data
    elif expected in (bool, str):
        if isinstance(data, expected):
            return data
    elif expected is Tensor:
        if isinstance(data, Tensor):
            return data
        if isinstance(data, (list, tuple)):
            try:
                return torch.tensor(data, dtype=torch.float64)
            except (ValueError, TypeError):
                pass
    elif origin in (list, tuple):
        if isinstance(data, (list, tuple)):
            if origin is tuple and len(args) > 0 and args[-1] is not Ellipsis:
                if len(data) == len(args):
                    return tuple(build(d, a, f"{place}[{i}]") for i, (d, a) in enumerate(zip(data, args, strict=True)))
            else:
                return origin(build(d, args[0] if args else Any, f"{place}[{i}]") for i, d in enumerate(data))
    elif origin is dict or expected is dict:
        if isinstance(data, Mapping):
            return dict(data)
    elif inspect.isclass(expected):
        return _build_object(data, expected, place)
    raise ConfigError(f"{where}expected {show_type(expected)}, got {data!r}.")


def _build_union(data: Any, args: tuple[Any, ...], place: str) -> Any:
    errors = []
    for option in args:
        try:
            return build(data, option, place)
        except ConfigError as error:
            errors.append(error)
    objects = [
        e
        for a, e in zip(args, errors, strict=True)
        if inspect.isclass(a) and a not in _PLAIN and a not in (Tensor, type(None))
    ]
    if isinstance(data, (Mapping, str)) and objects:
        raise objects[0]  # the member that a dictionary or a name was meant for says more than the list of all
    where = f"{place}: " if place else ""
    raise ConfigError(f"{where}expected {' or '.join(dict.fromkeys(show_type(a) for a in args))}, got {data!r}.")


def _build_object(data: Any, expected: type, place: str) -> Any:
    if isinstance(data, expected):
        return data
    where = f"{place}: " if place else ""
    members = family(expected)
    if isinstance(data, str):
        data = {"type": data}
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where}expected {show_type(expected)}, with its settings, got {data!r}.")
    keys = dict(data)
    name = keys.pop("type", expected.__name__ if expected.__name__ in members else None)
    if name is None:
        raise ConfigError(f"{where}needs a key 'type': one of {', '.join(members)}.")
    if name not in members:
        name = _in_full(str(name), expected, members)
    if name not in members:
        near = _near(str(name), members)
        raise ConfigError(f"{place + '.' if place else ''}type: unknown {name!r}{near}; one of {', '.join(members)}.")
    cls = members[name]
    fields = schema(cls)
    for key in keys:
        if key not in fields:
            allowed = ", ".join(fields) or "no settings"
            raise ConfigError(
                f"{place + '.' if place else ''}{key}: unknown key{_near(key, fields)}; {name} takes {allowed}."
            )
    missing = [k for k, (_, default) in fields.items() if default is inspect.Parameter.empty and k not in keys]
    if missing:
        raise ConfigError(f"{where}{name} needs {', '.join(missing)}.")
    values = {k: build(v, fields[k][0], f"{place}.{k}" if place else k) for k, v in keys.items()}
    try:
        return cls(**values)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{where}{error}") from error


def _in_full(name: str, base: type, members: Mapping[str, Any]) -> str:
    """The member that a short name means, or the name itself if that is none, or more than one.

    A short name is, in this order: the name in other capitals, with or without the noun of its family; its beginning;
    the beginning of a word within it.
    """
    noun = re.sub(".*(?=[A-Z])", "", base.__name__).lower()
    low = name.lower()
    for means in (
        lambda m: m.lower() in (low, low + noun),
        lambda m: low and m.lower().startswith(low),
        lambda m: low and any(m[i:].lower().startswith(low) for i, c in enumerate(m) if c.isupper()),
    ):
        found = [m for m in members if means(m)]
        if found:
            return found[0] if len(found) == 1 else name
    return name


def _near(name: str, options: Mapping[str, Any]) -> str:
    folded = {o.lower(): o for o in options}
    near = difflib.get_close_matches(name.lower(), folded, n=1)
    return f" (did you mean {folded[near[0]]!r}?)" if near else ""


def describe(obj: Any, place: str = "") -> Any:
    """Plain data that ``build`` turns back into an equal object: numbers, texts, lists, dictionaries.

    Raises:
        ConfigError: for what has no description, such as a clock made of a Python function.
    """
    if obj is None or isinstance(obj, (bool, int, float, str)):
        return obj
    if isinstance(obj, Tensor):
        return obj.detach().cpu().tolist()
    if isinstance(obj, (list, tuple)):
        return [describe(o, f"{place}[{i}]") for i, o in enumerate(obj)]
    if isinstance(obj, Mapping):
        return {k: describe(v, f"{place}.{k}") for k, v in obj.items()}
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        values = {f.name: getattr(obj, f.name) for f in dataclasses.fields(obj) if f.init}
    elif isinstance(getattr(obj, "config", None), Mapping):
        values = dict(obj.config)
    else:
        where = f"{place}: " if place else ""
        raise ConfigError(
            f"{where}a {type(obj).__name__} cannot be written as a description; use a named class of the library, "
            "or define a dataclass of your own for it."
        )
    return {"type": type(obj).__name__, **{k: describe(v, f"{place}.{k}" if place else k) for k, v in values.items()}}
