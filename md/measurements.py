"""Measured properties of liquids: what alignment aims at, and what every prediction is compared with.

A table is a YAML file with one key, ``measurements``, a list of rows (``Measurement``); quantities carry their units.
``data/experiment/densities.yaml`` is the curated one.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from bamboo import units
from bamboo.errors import InputError
from bamboo.structure.densities import ideal_density
from md.composition import parse_composition, realise
from md.quantities import Conductivity, Density, Pressure, Temperature, Viscosity, validator
from md.yaml_model import Problem, load_yaml

FARTHEST = 0.3  # a measured density this far from ideal mixing, relative, is an error of input
SIZE = 400  # atoms of the box whose composition is looked at


class Measurement(BaseModel):
    """One liquid at one temperature.

    electrolyte   composition, ``1 m LiPF6 in EC:DMC 30:70 wt``
    temperature   as stated in the source; ``presumed`` where it is not stated there
    pressure      1 bar where the source is silent
    density, viscosity, conductivity   as measured; at least one
    use           "align": a model may be aligned to it; "test": held out, it only tests
    source        DOI or full reference
    note          what a reader must know: scatter among sources, inferred units
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    electrolyte: Annotated[str, validator(lambda text: _checked(text))]
    temperature: Temperature
    presumed: bool = False
    pressure: Pressure = units.BAR
    density: Density | None = None
    viscosity: Viscosity | None = None
    conductivity: Conductivity | None = None
    use: Literal["align", "test"] = "align"
    source: Annotated[str, Field(min_length=4)]
    note: str = ""

    @property
    def name(self) -> str:
        """Electrolyte and temperature, as people name it."""
        return f"{self.electrolyte}, {self.temperature:g} K"

    @property
    def species(self) -> set[str]:
        """Names of its solvents and salts."""
        composition = parse_composition(self.electrolyte)
        return {*composition.solvents, *composition.salts}

    @property
    def density_g_cm3(self) -> float:
        """Measured density [g/cm3]; InputError where it was not measured."""
        if self.density is None:
            raise InputError(f"{self.name}: has no measured density.")
        return float(self.density) / units.GRAM_PER_CM3


class Table(BaseModel):
    """A file of measurements."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    measurements: Annotated[tuple[Measurement, ...], Field(min_length=1, max_length=1000)]


def load_measurements(path: str | Path) -> tuple[Measurement, ...]:
    """Read a table; raises InputError that lists every problem as ``file:line: key.path: problem``."""
    return load_yaml(path, Table, checks=lambda table: problems(table.measurements, ("measurements",))).measurements


def problems(rows: tuple[Measurement, ...], key: tuple[str | int, ...]) -> list[Problem]:
    """Return what joins several keys: nothing measured, impossible densities, presumed rows that align, doubles.

    A row whose temperature is only presumed aligns only where no dated row of the same liquid has a density.
    """
    found: list[Problem] = []
    dated = {row.electrolyte for row in rows if row.density is not None and not row.presumed}
    seen: dict[tuple[str, float, float], int] = {}
    for index, row in enumerate(rows):
        where = (*key, index)
        if row.density is None and row.viscosity is None and row.conductivity is None:
            found.append((where, "nothing is measured: give density, viscosity or conductivity."))
        if row.use == "align" and row.density is None:
            found.append(((*where, "use"), "a row without a density cannot align. Write `use: test`."))
        if row.use == "align" and row.presumed and row.electrolyte in dated:
            found.append(((*where, "use"), "the temperature is only presumed, and a dated row exists: this one tests."))
        if row.density is not None and (problem := density_problem(row)):
            found.append(((*where, "density"), problem))
        place = (row.electrolyte, row.temperature, row.pressure)
        if place in seen:
            found.append((where, f"{row.name} is in the list already, row {seen[place] + 1}."))
        seen.setdefault(place, index)
    return found


def density_problem(row: Measurement) -> str | None:
    """Return why a density cannot be that of its liquid, or None: it is far from ideal mixing of the pure liquids."""
    realised = realise(parse_composition(row.electrolyte), n_atoms=SIZE)
    ideal = ideal_density({name: float(count) for name, count in realised.formula.items()})
    if abs(row.density_g_cm3 / ideal - 1.0) <= FARTHEST:
        return None
    return (
        f"{row.density_g_cm3:.4g} g/cm3 is {row.density_g_cm3 / ideal - 1.0:+.0%} off the ideal mixture of the pure "
        f"liquids, {ideal:.3f} g/cm3. Check number, unit and composition."
    )


def _checked(text: object) -> str:
    if not isinstance(text, str):
        raise InputError(f"{str(text)[:60]!r} is not text such as '1 m LiPF6 in EC:DMC 30:70 wt'.")
    parse_composition(text)
    return text
