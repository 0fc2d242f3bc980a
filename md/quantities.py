"""Quantities as people write them, ``298 K`` or ``20 ps``, and the pydantic types that accept them.

Values are kept in internal units; temperatures in K and wall times in seconds, which have no internal unit.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError, core_schema

from bamboo import units
from bamboo.errors import InputError

UNITS: dict[str, dict[str, float]] = {
    "temperature": {"K": 1.0, "°C": 1.0, "C": 1.0, "degC": 1.0, "℃": 1.0},
    "pressure": {"bar": units.BAR, "Pa": units.PASCAL, "MPa": 1.0e6 * units.PASCAL, "GPa": 1.0e9 * units.PASCAL},
    "time": {"ps": units.PICOSECOND, "fs": units.FEMTOSECOND, "ns": units.NANOSECOND},
    "wall time": {"min": 60.0, "s": 1.0, "h": 3600.0},
    "length": {"A": units.ANGSTROM, "Å": units.ANGSTROM, "nm": units.NANOMETRE},
    "density": {"g/cm3": units.GRAM_PER_CM3, "kg/m3": 1.0e-3 * units.GRAM_PER_CM3},
    "viscosity": {"mPa.s": units.MILLIPASCAL_SECOND},
    "conductivity": {"mS/cm": units.MILLISIEMENS_PER_CENTIMETRE, "S/m": units.SIEMENS_PER_METRE},
    "compressibility": {"1/GPa": 1.0e-9 / units.PASCAL, "1/bar": 1.0 / units.BAR},
    "force": {
        "eV/A": units.EV / units.ANGSTROM,
        "eV/Å": units.EV / units.ANGSTROM,
        "kcal/mol/A": units.KCAL_PER_MOL / units.ANGSTROM,
        "kcal/mol/Å": units.KCAL_PER_MOL / units.ANGSTROM,
    },
}
ZEROS = dict.fromkeys(("°C", "C", "degC", "℃"), units.CELSIUS_ZERO_K)  # where the scale of a unit begins, if not at 0
COLDEST_LIQUID_K = 150.0  # no liquid electrolyte is colder: tetrahydrofuran freezes at 165 K
MOST_SEVERAL = 50
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"


def parse_quantity(text: object, *, dimension: str) -> float:
    """Return a quantity in internal units; raises InputError where number, unit or dimension are not right."""
    known = UNITS[dimension]
    unit = next(iter(known))
    if isinstance(text, str) and re.fullmatch(_NUMBER, text.strip()):
        text = float(text)
    if isinstance(text, int | float) and not isinstance(text, bool):
        raise InputError(f"{text:.6g} has no unit. Write, for example, {_with_unit(float(text), dimension=dimension)}.")
    match = re.fullmatch(rf"({_NUMBER})\s*(\S+)", text.strip()) if isinstance(text, str) else None
    if match is None:
        raise InputError(f"{str(text)[:60]!r} is not a {dimension} with its unit, for example '1 {unit}'.")
    if match[2] not in known:
        raise InputError(f"unknown unit '{match[2][:20]}'. Known units of {dimension}: {', '.join(known)}.")
    return float(match[1]) * known[match[2]] + ZEROS.get(match[2], 0.0)


def _with_unit(value: float, *, dimension: str) -> str:
    """Return what a number without a unit may mean, likeliest first: 25 are °C and 298 are K."""
    if dimension != "temperature":
        return f"'{value:.6g} {next(iter(UNITS[dimension]))}'"
    if value < COLDEST_LIQUID_K:
        return f"'{value:.6g} °C' or '{value + units.CELSIUS_ZERO_K:.6g} K'"
    return f"'{value:.6g} K' or '{value - units.CELSIUS_ZERO_K:.6g} °C'"


def quantity_text(value: float, *, dimension: str) -> str:
    """Return a quantity as text in the first unit of its dimension, ``parse_quantity`` reversed."""
    unit, size = next(iter(UNITS[dimension].items()))
    return f"{value / size:.12g} {unit}"


def validator(function: Callable[[Any], Any]) -> BeforeValidator:
    """Return the pydantic validator that a parser raising InputError makes."""
    return BeforeValidator(lambda value: refused_by_pydantic(function, value))


def refused_by_pydantic(function: Callable[[Any], Any], value: Any) -> Any:
    """Call a function that raises InputError in the middle of pydantic's validation."""
    try:
        return function(value)
    except InputError as error:
        raise PydanticCustomError("bamboo", "{message}", {"message": str(error)}) from None


@dataclass(frozen=True)
class Quantity:
    """Annotation of a float: text with a unit, strictly above ``low`` and up to ``high``, kept in internal units."""

    dimension: str
    low: str
    high: str

    def parse(self, given: object) -> float:
        """Return the value; raises InputError where it is no such quantity or out of range."""
        value = parse_quantity(given, dimension=self.dimension)
        low, high = (parse_quantity(limit, dimension=self.dimension) for limit in (self.low, self.high))
        if not (math.isfinite(value) and low < value <= high):
            raise InputError(f"{given} is out of range, expected more than {self.low} and at most {self.high}.")
        return value

    def text(self, value: float) -> str:
        """Return the value as text."""
        return quantity_text(value, dimension=self.dimension)

    def __get_pydantic_core_schema__(self, _source: Any, _handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            lambda given: refused_by_pydantic(self.parse, given),
            serialization=core_schema.plain_serializer_function_ser_schema(self.text),
        )

    def __get_pydantic_json_schema__(self, _schema: Any, _handler: Any) -> dict[str, Any]:
        return {"type": "string", "pattern": rf"^{_NUMBER}\s*({'|'.join(UNITS[self.dimension])})$"}


@dataclass(frozen=True)
class QuantityPair(Quantity):
    """Annotation of a tuple: two quantities [from, to], or one text that stands for both."""

    def parse_pair(self, given: object) -> tuple[float, float]:
        """Return both values; raises InputError."""
        if isinstance(given, list | tuple) and len(given) == 2:
            return self.parse(given[0]), self.parse(given[1])
        if isinstance(given, str | int | float):
            return self.parse(given), self.parse(given)
        raise InputError(f"expected one {self.dimension} or two, [from, to], got {str(given)[:60]!r}.")

    def __get_pydantic_core_schema__(self, _source: Any, _handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            lambda given: refused_by_pydantic(self.parse_pair, given),
            serialization=core_schema.plain_serializer_function_ser_schema(lambda pair: [self.text(v) for v in pair]),
        )

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        one = super().__get_pydantic_json_schema__(schema, handler)
        return {"anyOf": [one, {"type": "array", "items": one, "minItems": 2, "maxItems": 2}]}


@dataclass(frozen=True)
class OneOrSeveral(Quantity):
    """Annotation of a float or a tuple: one quantity, or a list of several."""

    def parse_all(self, given: object) -> float | tuple[float, ...]:
        """Return one value, or all of a list; raises InputError."""
        if not isinstance(given, list | tuple):
            return self.parse(given)
        if not 1 < len(given) <= MOST_SEVERAL:
            raise InputError(f"expected one {self.dimension} or a list of 2 to {MOST_SEVERAL}, got {len(given)}.")
        return tuple(self.parse(item) for item in given)

    def __get_pydantic_core_schema__(self, _source: Any, _handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            lambda given: refused_by_pydantic(self.parse_all, given),
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda value: [self.text(v) for v in value] if isinstance(value, tuple) else self.text(value)
            ),
        )

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        one = super().__get_pydantic_json_schema__(schema, handler)
        return {"anyOf": [one, {"type": "array", "items": one, "minItems": 2, "maxItems": MOST_SEVERAL}]}


Temperature = Annotated[float, Quantity("temperature", "0 K", "5000 K")]
Temperatures = Annotated[float | tuple[float, ...], OneOrSeveral("temperature", "0 K", "5000 K")]
Ramp = Annotated[tuple[float, float], QuantityPair("temperature", "0 K", "5000 K")]
Pressure = Annotated[float, Quantity("pressure", "-10 GPa", "100 GPa")]
Duration = Annotated[float, Quantity("time", "0 fs", "1e6 ns")]
Timestep = Annotated[float, Quantity("time", "0 fs", "5 fs")]
Damping = Annotated[float, Quantity("time", "1 fs", "1 ns")]
WallTime = Annotated[float, Quantity("wall time", "0 s", "10000 h")]
Length = Annotated[float, Quantity("length", "0 A", "100 A")]
Density = Annotated[float, Quantity("density", "0 g/cm3", "30 g/cm3")]
DensityRange = Annotated[tuple[float, float], QuantityPair("density", "0 g/cm3", "30 g/cm3")]
Force = Annotated[float, Quantity("force", "0 eV/A", "1e6 eV/A")]
Viscosity = Annotated[float, Quantity("viscosity", "0 mPa.s", "1e6 mPa.s")]
Conductivity = Annotated[float, Quantity("conductivity", "0 mS/cm", "1e4 mS/cm")]
Compressibility = Annotated[float, Quantity("compressibility", "0 1/GPa", "100 1/GPa")]
