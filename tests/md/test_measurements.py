"""The curated table of measurements, and what a table may not say."""

import re
from pathlib import Path

import pytest

from bamboo import units
from bamboo.errors import InputError
from md.measurements import Measurement, load_measurements

TABLE = Path(__file__).parents[2] / "data" / "experiment" / "densities.yaml"
ROWS = load_measurements(TABLE)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_row_has_a_source_and_physical_values(row: Measurement) -> None:
    assert re.search(r"10\.\d{4,}/\S+", row.source)
    assert 280.0 < row.temperature < 345.0 and row.pressure == pytest.approx(units.BAR)
    if row.density is not None:
        assert 0.7 < row.density_g_cm3 < 1.7
    if row.viscosity is not None:
        assert 0.2 < row.viscosity / units.MILLIPASCAL_SECOND < 50.0
    if row.conductivity is not None:
        assert "Li" in row.electrolyte and 0.5 < row.conductivity / units.MILLISIEMENS_PER_CENTIMETRE < 20.0


def test_some_rows_align_and_others_are_held_out() -> None:
    """Held out: other temperatures of aligned liquids, mixtures of them, and liquids that are neither."""
    aligned = [row for row in ROWS if row.use == "align"]
    tests = [row for row in ROWS if row.use == "test" and row.density is not None]
    assert len(aligned) >= 6 and len(tests) >= 6
    liquids = {row.electrolyte for row in aligned}
    assert any(row.electrolyte in liquids for row in tests) and any(":" in row.electrolyte for row in tests)
    assert all(row.density is not None for row in aligned)
    assert {"LiPF6", "LiFSI"} <= {salt for row in aligned for salt in row.electrolyte.split()}


def test_densities_fall_with_temperature() -> None:
    """Expansion of organic liquids, -dln(rho)/dT, is close to 1e-3 per K."""
    found = 0
    for one in ROWS:
        for other in ROWS:
            same = one.electrolyte == other.electrolyte and one.density is not None and other.density is not None
            if same and one.temperature < other.temperature:
                expansion = (one.density_g_cm3 / other.density_g_cm3 - 1.0) / (other.temperature - one.temperature)
                assert 0.6e-3 < expansion < 1.8e-3, one.name
                found += 1
    assert found >= 3


GOOD = "- {electrolyte: DMC, temperature: 298 K, density: 1.06 g/cm3, source: 10.1063/1.3664084}\n"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{electrolyte: DMCC, temperature: 298 K, density: 1.06 g/cm3, source: here}", "Did you mean 'DMC'"),
        ("{electrolyte: EMC, temperature: -5 K, density: 1.06 g/cm3, source: here}", "temperature: .* out of range"),
        ("{electrolyte: EMC, temperature: 298, density: 1.06 g/cm3, source: here}", "has no unit"),
        ("{electrolyte: EMC, temperature: 298 K, density: 1.5 g/cm3, source: here}", r"\+49% off the ideal mixture"),
        ("{electrolyte: EMC, temperature: 298 K, density: 1006 kg/cm3, source: here}", "unknown unit 'kg/cm3'"),
        ("{electrolyte: EMC, temperature: 298 K, density: 1.006 g/cm3}", "the key 'source' is missing"),
        ("{electrolyte: EMC, temperature: 298 K, use: align, source: here}", "nothing is measured"),
        ("{electrolyte: EMC, temperature: 298 K, viscosity: 0.65 mPa.s, source: here}", "without a density"),
        ("{electrolyte: DMC, temperature: 298 K, density: 1.06 g/cm3, source: here}", "in the list already, row 1"),
        ("{electrolyte: DMC, temperature: 299 K, presumed: true, density: 1.06 g/cm3, source: a b c}", "a dated row"),
    ],
)
def test_bad_rows_are_refused_with_file_and_line(tmp_path: Path, row: str, message: str) -> None:
    path = tmp_path / "table.yaml"
    path.write_text("measurements:\n" + GOOD + f"- {row}\n")
    with pytest.raises(InputError, match=rf"table.yaml:3: .*{message}"):
        load_measurements(path)
