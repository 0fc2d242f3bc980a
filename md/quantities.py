"""Quantities as people write them, ``298 K`` or ``20 ps``, and the pydantic types that accept them.

Values are kept in internal units; temperatures in K and wall times in seconds, which have no internal unit.
"""

import math
import re
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema
from pydantic_core import PydanticCustomError

from bamboo import units
from bamboo.errors import InputError

UNITS: dict[str, dict[str, float]] = {
    "temperature": {"K": 1.0},
    "pressure": {"bar": units.BAR, "Pa": units.PASCAL, "MPa": 1.0e6 * units.PASCAL, "GPa": 1.0e9 * units.PASCAL},
    "time": {"ps": units.PICOSECOND, "fs": units.FEMTOSECOND, "ns": units.NANOSECOND},
    "wall time": {"min": 60.0, "s": 1.0, "h": 3600.0},
    "length": {"A": units.ANGSTROM, "Å": units.ANGSTROM, "nm": units.NANOMETRE},
    "density": {"g/cm3": units.GRAM_PER_CM3, "kg/m3": 1.0e-3 * units.GRAM_PER_CM3},
    "force": {"eV/A": units.EV / units.ANGSTROM, "eV/Å": units.EV / units.ANGSTROM},
}
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"


def parse_quantity(text: object, *, dimension: str) -> float:
    """Return a quantity in internal units; raises InputError where number, unit or dimension are not right."""
    known = UNITS[dimension]
    unit = next(iter(known))
    if isinstance(text, int | float) and not isinstance(text, bool):
        raise InputError(f"{text:.6g} has no unit. Write, for example, '{text:.6g} {unit}'.")
    match = re.fullmatch(rf"({_NUMBER})\s*(\S+)", text.strip()) if isinstance(text, str) else None
    if match is None:
        raise InputError(f"{str(text)[:60]!r} is not a {dimension} with its unit, for example '1 {unit}'.")
    if match[2] not in known:
        raise InputError(f"unknown unit '{match[2][:20]}'. Known units of {dimension}: {', '.join(known)}.")
    return float(match[1]) * known[match[2]]


def quantity_text(value: float, *, dimension: str) -> str:
    """Return a quantity as text in the first unit of its dimension, ``parse_quantity`` reversed."""
    unit, size = next(iter(UNITS[dimension].items()))
    return f"{value / size:.12g} {unit}"


def validator(function: Callable[[Any], Any]) -> BeforeValidator:
    """Return the pydantic validator that a parser raising InputError makes."""

    def validate(value: Any) -> Any:
        try:
            return function(value)
        except InputError as error:
            raise PydanticCustomError("bamboo", "{message}", {"message": str(error)}) from None

    return BeforeValidator(validate)


def _quantity(dimension: str, low: str, high: str) -> Any:
    """A pydantic type: text with a unit, strictly above ``low`` and up to ``high``, kept in internal units."""
    bottom, top = (parse_quantity(limit, dimension=dimension) for limit in (low, high))

    def parse(text: object) -> float:
        value = parse_quantity(text, dimension=dimension)
        if not (math.isfinite(value) and bottom < value <= top):
            raise InputError(f"{text} is out of range, expected more than {low} and at most {high}.")
        return value

    return Annotated[
        float,
        validator(parse),
        PlainSerializer(lambda value: quantity_text(value, dimension=dimension), return_type=str),
        WithJsonSchema({"type": "string", "pattern": rf"^{_NUMBER}\s*({'|'.join(UNITS[dimension])})$"}),
    ]


def _pair(dimension: str, low: str, high: str) -> Any:
    """A pydantic type: two quantities [a, b], or one text that stands for both."""
    one = _quantity(dimension, low, high)
    return Annotated[
        tuple[one, one],  # type: ignore[valid-type]
        BeforeValidator(lambda value: [value, value] if isinstance(value, str) else value),
        PlainSerializer(lambda pair: [quantity_text(value, dimension=dimension) for value in pair]),
        WithJsonSchema({"type": ["string", "array"]}),
    ]


Temperature = _quantity("temperature", "0 K", "5000 K")
Ramp = _pair("temperature", "0 K", "5000 K")
Pressure = _quantity("pressure", "-10 GPa", "100 GPa")
Duration = _quantity("time", "0 fs", "1e6 ns")
Timestep = _quantity("time", "0 fs", "5 fs")
Damping = _quantity("time", "1 fs", "1 ns")
WallTime = _quantity("wall time", "0 s", "10000 h")
Length = _quantity("length", "0 A", "100 A")
Density = _quantity("density", "0 g/cm3", "30 g/cm3")
DensityRange = _pair("density", "0 g/cm3", "30 g/cm3")
Force = _quantity("force", "0 eV/A", "1e6 eV/A")
