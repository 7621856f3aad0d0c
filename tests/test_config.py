"""Plain data to objects and back, and what is said when that cannot be."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import pytest
import torch
from torch import Tensor

from tests.process.cases import CATALOG, RANDOM
from undrift.config import ConfigError, build, describe, family, schema
from undrift.process import (
    CLD,
    PSLD,
    VE,
    VP,
    CallableClock,
    Clock,
    ConstantClock,
    CosineClock,
    GeometricClock,
    LinearClock,
    LinearProcess,
    PowerClock,
    Recipe,
)

CLOCKS = {
    "constant": ConstantClock(3.0, horizon=2.0),
    "linear": LinearClock(0.2, 12.0),
    "cosine": CosineClock(offset=0.01, horizon=0.9),
    "power": PowerClock(40.0, 2.0, 3.0),
    "geometric": GeometricClock(0.02, 30.0),
    "parameter": ConstantClock(torch.tensor(0.1, dtype=torch.float64, requires_grad=True)),
}
PROCESSES = {name: CATALOG.get(name, RANDOM.get(name)) for name in [*CATALOG, *RANDOM] if "callable" not in name}


@pytest.mark.parametrize("name", PROCESSES)
def test_processes_round_trip_bit_for_bit(name):
    process = PROCESSES[name]
    data = describe(process)
    again = build(data, LinearProcess)
    assert type(again) is type(process)
    assert describe(again) == data
    t = torch.tensor([1e-4, 0.3, 1.0], dtype=torch.float64) * process.horizon
    for a, b in zip(process.marginal(t), again.marginal(t), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", CLOCKS)
def test_clocks_round_trip(name):
    clock = CLOCKS[name]
    again = build(describe(clock), Clock)
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64) * clock.horizon
    assert torch.equal(again.integral(t), clock.integral(t).detach())
    assert again.horizon == clock.horizon


def test_a_name_stands_for_its_defaults():
    assert describe(build("VP", LinearProcess)) == describe(VP())
    assert describe(build({"type": "VE"}, LinearProcess)) == describe(VE())
    assert describe(build({"gamma": 0.02}, PSLD)) == describe(PSLD(gamma=0.02))
    assert isinstance(build({"type": "VP", "clock": "CosineClock"}, LinearProcess).clock, CosineClock)


def test_an_object_is_taken_as_it_is():
    process = CLD()
    assert build(process, LinearProcess) is process
    assert build({"type": "VP", "clock": (clock := ConstantClock(2.0))}, LinearProcess).clock is clock


def test_values_become_what_the_constructor_asks_for():
    assert build(3, float) == 3.0
    assert type(build(3, float)) is float
    assert build("1e-3", float) == 1e-3  # how YAML 1.1 hands over a number without a point
    assert build([1, 2.5], list[float]) == [1.0, 2.5]
    assert build([1, "a"], tuple[int, str]) == (1, "a")
    assert build([[1, 2], [3, 4]], Tensor).dtype == torch.float64
    assert build(None, float | None) is None
    assert build("a", Literal["a", "b"]) == "a"
    assert build({"k": 1}, dict) == {"k": 1}
    recipe = build({"type": "Recipe", "D": [[0.5]], "Q": [[0]]}, LinearProcess)
    assert isinstance(recipe, Recipe)
    assert recipe.channels == 1


@dataclass(frozen=True, eq=False)
class _Base:
    """A family for these tests."""


@dataclass(frozen=True, eq=False)
class Plain(_Base):
    size: int
    rate: float = 0.5
    name: str = "x"
    flag: bool = False
    mode: Literal["low", "high"] = "low"
    shape: tuple[int, int] = (1, 1)
    steps: list[float] = field(default_factory=lambda: [1.0])
    weights: Tensor | None = None


@dataclass(frozen=True, eq=False)
class NeedsFunction(_Base):
    function: Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class MayTakeFunction(_Base):
    function: Callable[[Tensor], Tensor] | None = None


def test_family_is_what_a_file_can_name():
    assert list(family(_Base)) == ["MayTakeFunction", "Plain"]
    assert "CallableClock" not in family(Clock)
    assert set(family(Clock)) >= {"ConstantClock", "CosineClock", "GeometricClock", "LinearClock", "PowerClock"}
    processes = family(LinearProcess)
    assert set(processes) >= {"ALDA", "CLD", "FlowMatching", "HOLD", "MALDA", "PSLD", "Recipe", "SubVP", "VE", "VP"}
    assert not {"LinearProcess", "ClockedProcess", "PanelProcess", "RecipeProcess", "_Augmented"} & set(processes)


def test_schema_knows_inherited_fields_and_their_defaults():
    fields = schema(PSLD)
    assert list(fields) == ["gamma", "nu", "inverse_mass", "aux_scale", "clock"]
    assert fields["gamma"][1] == 0.01
    assert isinstance(fields["clock"][1], ConstantClock)

    @dataclass(frozen=True, eq=False)
    class _Heavier(CLD):
        mass: float = 2.0

    assert schema(_Heavier)["friction"][1] is None


BAD = [
    ({"type": "PLSD"}, LinearProcess, r"^type: unknown 'PLSD' \(did you mean 'PSLD'\?\); one of ALDA"),
    ({"type": "PSLD", "gama": 1}, LinearProcess, r"^gama: unknown key \(did you mean 'gamma'\?\); PSLD takes"),
    ({"type": "PSLD", "zzz": 1}, LinearProcess, r"^zzz: unknown key; PSLD takes gamma, nu, inverse_mass"),
    ({"type": "PSLD", "gamma": "small"}, LinearProcess, r"^gamma: expected a number or .* got 'small'\.$"),
    ({"type": "PSLD", "gamma": True}, LinearProcess, r"^gamma: expected a number"),
    ({"type": "PSLD", "gamma": -1}, LinearProcess, r"^PSLD: gamma must be a finite non-negative number, got -1\.0\.$"),
    ({"type": "PSLD", "clock": {"rate": 1}}, LinearProcess, r"^clock: needs a key 'type': one of ConstantClock, Cos"),
    ({"type": "PSLD", "clock": "Clock"}, LinearProcess, r"^clock\.type: unknown 'Clock'.*; one of ConstantClock"),
    ({"type": "PSLD", "clock": 3}, LinearProcess, r"^clock: expected one of ConstantClock, .*, got 3"),
    ({"type": "VP", "clock": {"type": "LinearClock", "beta_max": "x"}}, LinearProcess, r"^clock\.beta_max: expected"),
    ({"type": "VP", "clock": {"type": "CosineClock", "horizon": 2}}, LinearProcess, r"^clock: CosineClock: horizon"),
    ({"type": "VP", "clock": {"type": "CallableClock"}}, LinearProcess, r"^clock\.type: unknown 'CallableClock'"),
    ({"type": "Recipe", "D": [[1.0]]}, LinearProcess, r"^Recipe needs Q\.$"),
    ({"type": "Recipe", "D": [[1.0], [1.0, 2.0]], "Q": [[0]]}, LinearProcess, r"^D must be a square"),
    ({"type": "MALDA", "auxiliaries": 1.5}, LinearProcess, r"^auxiliaries: expected a whole number, got 1\.5\.$"),
    (7, LinearProcess, r"^expected one of ALDA, .*, with its settings, got 7\.$"),
    ({}, LinearProcess, r"^needs a key 'type': one of ALDA"),
    ({"type": "Plain"}, _Base, r"^Plain needs size\.$"),
    ({"type": "Plain", "size": 1, "flag": 1}, _Base, r"^flag: expected true or false, got 1\.$"),
    ({"type": "Plain", "size": 1, "name": 1}, _Base, r"^name: expected a text, got 1\.$"),
    ({"type": "Plain", "size": 1, "mode": "mid"}, _Base, r"^mode: expected one of 'low', 'high', got 'mid'\.$"),
    ({"type": "Plain", "size": 1, "shape": [1, 2, 3]}, _Base, r"^shape: expected a list of "),
    ({"type": "Plain", "size": 1, "shape": [1, "b"]}, _Base, r"^shape\[1\]: expected a whole number, got 'b'\.$"),
    ({"type": "Plain", "size": 1, "steps": [1.0, None]}, _Base, r"^steps\[1\]: expected a number, got None\.$"),
    ({"type": "Plain", "size": 1, "weights": "w"}, _Base, r"^weights: expected a \(nested\) list of numbers or null"),
    ({"type": "NeedsFunction"}, _Base, r"^type: unknown 'NeedsFunction' .*; one of MayTakeFunction, Plain\.$"),
    ("1e", float, r"^expected a number, got '1e'\.$"),
    (1, None, r"^expected null, got 1\.$"),
]  # fmt: skip


@pytest.mark.parametrize(("data", "expected", "message"), BAD)
def test_errors_name_place_value_and_choices(data, expected, message):
    with pytest.raises(ConfigError, match=message):
        build(data, expected)


def test_the_place_leads():
    with pytest.raises(ConfigError, match=r"^process\.clock\.rate: expected a number"):
        build({"type": "CLD", "clock": {"type": "ConstantClock", "rate": "fast"}}, LinearProcess, "process")


def test_functions_have_no_description():
    process = VP(clock=CallableClock(lambda t: t))
    with pytest.raises(ConfigError, match=r"^clock\.clock: a function cannot be written as a description"):
        describe(process)
    with pytest.raises(ConfigError, match=r"^process\.clock\.clock: "):
        describe(process, "process")
