"""Which measurements a run may be compared with: the same liquid at the same temperature and pressure, nothing near it.

The measurements are those of ``data/experiment/densities.yaml``, installed with the package as ``md/densities.yaml``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bamboo import units
from bamboo.structure.molecules import SALTS, salt
from md.analysis.estimate import Estimate
from md.composition import Composition, moles_per_kg_solvent, parse_composition
from md.config import RunConfig
from md.measurements import Measurement, load_measurements

CURATED = Path(__file__).with_name("densities.yaml")
SAME_AMOUNT = 0.01  # relative difference of amounts that count as one composition
SAME_TEMPERATURE_K = 0.5  # 298 K and 298.15 K are the same; a density changes by 0.05 % over this
SAME_PRESSURE_BAR = 0.1  # so are 1 bar and 1 atm
MEASURED = {  # attribute of a measurement -> internal units of the unit in which the property is reported
    "density": units.GRAM_PER_CM3,
    "viscosity": units.MILLIPASCAL_SECOND,
    "conductivity": units.MILLISIEMENS_PER_CENTIMETRE,
}


@dataclass(frozen=True)
class Comparison:
    """A measured value beside a property of a run; ``measured`` in the unit of the property."""

    name: str
    measured: float
    unit: str
    row: Measurement
    estimate: Estimate

    @property
    def deviation(self) -> float | None:
        """Relative deviation of the simulated value; None where there is none."""
        return None if self.estimate.value is None else self.estimate.value / self.measured - 1.0

    @property
    def agrees(self) -> bool | None:
        """Whether the 95 % interval of the simulation holds the measured value; None where there is no interval."""
        interval = self.estimate.interval()
        return None if interval is None else interval[0] <= self.measured <= interval[1]


def comparisons(
    config: RunConfig, properties: Mapping[str, Estimate], *, table: Sequence[Measurement] | None = None
) -> list[Comparison]:
    """Return the properties of one condition beside what was measured of this very liquid.

    table  measurements to look through; default: the curated ones. None matches: an empty list.
    """
    rows = load_measurements(CURATED) if table is None else table
    found = []
    for row in rows:
        if not matches(row, config):
            continue
        for name, unit_size in MEASURED.items():
            value, estimate = getattr(row, name), properties.get(name)
            if value is not None and estimate is not None:
                found.append(Comparison(name, float(value) / unit_size, estimate.unit, row, estimate))
    return found


def unmeasured(
    config: RunConfig, asked: Sequence[str], *, table: Sequence[Measurement] | None = None
) -> list[str]:  # fmt: skip
    """Return those of some properties, of the measurable ones, that the table holds no value of for this liquid."""
    rows = [row for row in (load_measurements(CURATED) if table is None else table) if matches(row, config)]
    return [name for name in MEASURED if name in asked and all(getattr(row, name) is None for row in rows)]


def matches(row: Measurement, config: RunConfig) -> bool:
    """Tell whether a measurement is of the composition, temperature and pressure of a run of one condition."""
    if abs(row.temperature - config.temperature_K) > SAME_TEMPERATURE_K:
        return False
    if abs(row.pressure - config.target_pressure) / units.BAR > SAME_PRESSURE_BAR:
        return False
    mine, measured = _shares(config.what()), _shares(parse_composition(row.electrolyte))
    if mine.keys() != measured.keys():
        return False
    return all(abs(mine[name] / share - 1.0) <= SAME_AMOUNT for name, share in measured.items())


def _shares(composition: Composition) -> dict[str, float]:
    """Return the share of every molecule and ion among all of them; salts count as their ions."""
    amounts = composition.counts or moles_per_kg_solvent(composition)
    parts: dict[str, float] = {}
    for name, amount in amounts.items():
        for part, multiple in (salt(name) if name in SALTS else {name: 1}).items():
            parts[part] = parts.get(part, 0.0) + multiple * amount
    total = sum(parts.values())
    return {name: amount / total for name, amount in parts.items()}
