r"""Configuration from a YAML file and flags, by one schema: the annotations of the command's dataclass.

A flag is the path of a key, with dots: ``--process PSLD --process.gamma 0.02``. Its value is read as YAML. The file
is laid over the defaults and the flags over the file, in the order given; naming a whole object (``--process PSLD``)
starts it from its defaults. What the schema does not know is refused, with its place, before any work starts.
"""

from __future__ import annotations

import inspect
import textwrap
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from undrift.config import ConfigError, _in_full, build, describe, family, schema, show_type

__all__ = ["help_text", "parse", "to_yaml"]

_NONE = inspect.Parameter.empty


def parse(command: type, argv: Sequence[str]) -> tuple[Any, bool]:
    """The configuration of a command, and whether it was asked only to print it.

    Args:
        command: its dataclass.
        argv: ``--config FILE``, ``--print-config``, and ``--key value`` or ``--key=value``; a key that is true or
            false may stand alone, and so may the value of the command's first key if that has no default, or null.
            Words within a key may be joined by dashes as well.

    Raises:
        ConfigError: naming the flag or the place in the file, and what is allowed there.
    """
    data: dict[str, Any] = {}
    flags: list[tuple[str, str]] = []
    print_config = False
    tokens = list(argv)
    first, (_, default) = next(iter(schema(command).items()))
    if tokens and not tokens[0].startswith("-") and (default is _NONE or default is None):
        flags.append((first, tokens.pop(0)))
    while tokens:
        token = tokens.pop(0)
        if not token.startswith("--") or token == "--":
            raise ConfigError(f"{token!r}: expected a flag, --key value; undrift COMMAND --help lists the keys.")
        key, has_value, value = token[2:].partition("=")
        if key == "print-config" and not has_value:
            print_config = True
            continue
        key = key.replace("-", "_")
        if not has_value:
            if tokens and not tokens[0].startswith("--"):
                value = tokens.pop(0)
            elif schema(command).get(key, (None,))[0] is bool:
                value = "true"
            else:
                raise ConfigError(f"--{key}: needs a value.")
        if key == "config":
            data = {**data, **_read(value)}
        else:
            flags.append((key, value))
    for key, value in flags:
        _set(data, key, _scalar(key, value), command)
    return build(data, command), print_config


def _read(path: str) -> dict[str, Any]:
    place = Path(path).expanduser()
    try:
        data = yaml.safe_load(place.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config: cannot read {place}: {getattr(error, 'strerror', None) or error}.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"--config: {place} is not YAML: {' '.join(str(error).split())}.") from error
    if data is None:
        return {}
    if not isinstance(data, dict) or not all(isinstance(k, str) for k in data):
        raise ConfigError(f"--config: {place} must hold 'key: value' lines, got {type(data).__name__}.")
    return data


def _scalar(key: str, value: str) -> Any:
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"--{key}: {value!r} is not a YAML value: {' '.join(str(error).split())}.") from error


def _set(data: dict[str, Any], key: str, value: Any, command: type) -> None:
    """Put a flag's value at its path; objects on the way start from the default of their key."""
    *path, last = key.split(".")
    node: Any = data
    owner: type | None = command
    for i, part in enumerate(path):
        child = node.get(part)
        annotation, default = schema(owner).get(part, (None, _NONE)) if owner is not None else (None, _NONE)
        if child is None:
            child = describe(default) if default is not _NONE and default is not None else None
        if isinstance(child, str):
            child = {"type": child}
        elif isinstance(child, Mapping):
            child = dict(child)
        elif child is None:
            child = {}
        else:
            raise ConfigError(f"--{key}: {'.'.join(path[: i + 1])} is {child!r}, which has no keys.")
        node[part] = child
        owner = _member(annotation, child.get("type"))
        node = child
    node[last] = value


def _member(annotation: Any, name: Any) -> type | None:
    """The class that a configuration names where ``annotation`` is expected, if it is one of its family."""
    for option in typing.get_args(annotation) or (annotation,):
        if inspect.isclass(option) and name is not None:
            members = family(option)
            full = name if name in members else _in_full(str(name), option, members)
            if full in members:
                return members[full]
    return None


def to_yaml(run: Any) -> str:
    """The complete configuration, every default written out; ``--config`` reads it back."""
    plain = describe(run)
    plain.pop("type")
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=110)


# -- help --------------------------------------------------------------------------------------------------------------


def help_text(name: str, command: type) -> str:
    """Keys of a command, with types, defaults and allowed names, from its schema and its docstring."""
    summary, documented = _docstring(command)
    first, (_, required) = next(iter(schema(command).items()))
    word = f" {first.upper()}" if required is _NONE else f" [{first.upper()}]" if required is None else ""
    lines = [summary, "", f"usage: undrift {name}{word} [--config FILE] [--key value ...] [--print-config]", ""]
    seen: dict[str, type] = {}
    for key, (annotation, default) in schema(command).items():
        lines.append(f"  --{key}  {show_type(annotation)}; {_default(default)}")
        lines += textwrap.wrap(documented.get(key, ""), 96, initial_indent=" " * 6, subsequent_indent=" " * 6)
        _collect(annotation, seen)
    lines += ["", "Objects: name one, and set its keys with dots, as in --process PSLD --process.gamma 0.02."]
    for title, base in seen.items():
        lines += ["", f"{title}:"]
        for member_name, member in family(base).items():
            keys = [f"{k}={_brief(d)}" for k, (_, d) in schema(member).items()]
            lines += textwrap.wrap(
                f"{member_name}  {', '.join(keys)}", 110, initial_indent="  ", subsequent_indent=" " * 6
            )
    lines += ["", "--config FILE reads keys from a YAML file; flags override it. --print-config prints the complete"]
    lines += ["configuration as YAML and does nothing else."]
    return "\n".join(lines)


def _default(default: Any) -> str:
    return "required" if default is _NONE else f"default {_brief(default)}"


def _brief(value: Any) -> str:
    if value is _NONE:
        return "(required)"
    plain = describe(value)
    if isinstance(plain, dict) and "type" in plain:
        inner = [f"{k}={_brief(v)}" for k, v in plain.items() if k != "type"]
        return plain["type"] if len(inner) > 4 else f"{plain['type']}({', '.join(inner)})"
    if isinstance(plain, dict):
        return str(plain)
    if isinstance(plain, list):
        return f"[{', '.join(_brief(v) for v in plain)}]"
    if plain is None or isinstance(plain, bool):
        return {None: "null", True: "true", False: "false"}[plain]
    return str(plain)


def _collect(annotation: Any, seen: dict[str, type]) -> None:
    """Families that a configuration may name here, and within what they hold."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is not None or isinstance(annotation, types.UnionType):
        for a in args:
            _collect(a, seen)
        return
    if not inspect.isclass(annotation) or annotation.__module__.split(".")[0] != "undrift":
        return
    if annotation.__name__ in seen or not family(annotation):
        return
    seen[annotation.__name__] = annotation
    for member in family(annotation).values():
        for inner, _ in schema(member).values():
            _collect(inner, seen)


def _docstring(cls: type) -> tuple[str, dict[str, str]]:
    """First paragraph of a class's docstring, and the text of each entry under "Args:"."""
    text = inspect.getdoc(cls) or ""
    summary, _, rest = text.partition("Args:")
    entries: dict[str, str] = {}
    current = None
    for line in rest.splitlines():
        stripped = line.strip()
        if line.startswith("    ") and not line.startswith("     ") and ":" in stripped:
            names, _, first = stripped.partition(":")
            current = [n.strip() for n in names.split(",")]
            entries.update(dict.fromkeys(current, first.strip()))
        elif current and stripped:
            entries.update({n: f"{entries[n]} {stripped}" for n in current})
    return " ".join(summary.split()), entries
