"""Transport coefficients of two liquids through the engine and the analysis, beside published ones.

The runs are kept in runs/reference and go on where they were; a longer ``length_ps`` continues them.
"""

from math import sqrt
from pathlib import Path

from reference_liquids import argon, molten_salt
from validation_rows import Row, row

from bamboo import units
from bamboo.elements import ATOMIC_MASSES
from md.analysis.conductivity import conductivity, green_kubo_conductivity
from md.analysis.diffusion import self_diffusion
from md.analysis.estimate import Estimate, format_with_error
from md.analysis.viscosity import viscosity

RUNS = Path(__file__).parents[1] / "runs" / "reference"
LARGEST_ERROR = 0.06  # relative, above which agreement proves little


def beside(what: str, found: Estimate, published: float, error: float, source: str, *, unit: str, size: float) -> Row:
    """Row of an estimate (``size``: one ``unit`` in the estimate's) beside a published value with its error."""
    expected = f"{published:g} ± {error:g} {unit} ({source})".replace("  ", " ")
    if found.value is None or found.stderr is None:
        return row(what, str(found), expected, passed=False)
    value, stderr = found.value / size, found.stderr / size
    combined = sqrt(stderr**2 + error**2)
    text = f"{format_with_error(value, stderr)} {unit}, {(value - published) / combined:+.1f} combined errors"
    return row(what, text, expected, passed=abs(value - published) < 2.0 * combined and stderr < LARGEST_ERROR * value)


def argon_rows(length_ps: float, *, folder: Path = RUNS) -> list[Row]:
    """Viscosity of the Lennard-Jones liquid, and self-diffusion in two boxes, made one by Yeh and Hummer's term."""
    liquid = argon()
    trajectories, thermo = liquid.simulate(folder / "argon", length_ps=length_ps)
    eta = viscosity(thermo)["viscosity"]
    mass, epsilon, sigma = float(ATOMIC_MASSES[18]), liquid.potential.EPSILON, liquid.potential.SIGMA
    reduced = sqrt(mass * epsilon) / sigma**2 / units.MILLIPASCAL_SECOND
    what = f"Lennard-Jones liquid, rho* 0.8442, T* 0.722, {thermo.n_replicas} x {length_ps:g} ps: viscosity"
    published = (("Viscardy 2007, 10.1063/1.2724820", 3.268, 0.055), ("Meier 2004, 10.1063/1.1770695", 3.277, 0.098))
    rows = [beside(what, eta, value, error, source, unit="eta*", size=reduced) for source, value, error in published]
    small = argon(cells=3, n_replicas=32)
    small_boxes, _ = small.simulate(folder / "argon-small", length_ps=0.2 * length_ps)
    both = [
        self_diffusion(boxes, temperature_K=liquid.temperature_K, viscosity=eta)
        for boxes in (small_boxes, trajectories)
    ]
    for name, kind in (("diffusion_Ar_box", "in the box"), ("diffusion_Ar", "corrected for the size of the box")):
        few, many = (result[name] for result in both)
        what = f"self-diffusion {kind}, {small.box.n_atoms} and {liquid.box.n_atoms} atoms"
        if few.value is None or many.value is None or few.stderr is None or many.stderr is None:
            rows.append(row(what, f"{few}; {many}", "values", passed=False))
            continue
        gap = (few.value - many.value) / sqrt(few.stderr**2 + many.stderr**2)
        text, equal = f"{few}; {many}: {gap:+.1f} combined errors", name == "diffusion_Ar"
        rows.append(
            row(
                what,
                text,
                "equal" if equal else "the smaller box slower",
                passed=abs(gap) < 2.5 if equal else gap < 0.0,
            )
        )
    return rows


def salt_rows(length_ps: float, *, folder: Path = RUNS) -> list[Row]:
    """Conductivity and self-diffusion of molten NaCl of rigid ions."""
    liquid = molten_salt()
    trajectories, thermo = liquid.simulate(folder / "salt", length_ps=length_ps)
    eta = viscosity(thermo)["viscosity"]
    found = conductivity(trajectories, temperature_K=liquid.temperature_K) | green_kubo_conductivity(thermo)
    diffusion = self_diffusion(trajectories, temperature_K=liquid.temperature_K, viscosity=eta)
    base, source = f"molten NaCl, 1100 K, {thermo.n_replicas} x {length_ps:g} ps: ", "Wang 2020, 10.1063/5.0023225"
    rows = [
        beside(f"{base}conductivity, {method}", found[name], 348.0, 7.0, source, unit="S/m", size=10.0)
        for name, method in (("conductivity", "Einstein"), ("conductivity_green_kubo", "Green-Kubo"))
    ]
    for name, value, error in (("Na", 8.8, 0.4), ("Cl", 8.2, 0.5)):
        what = f"{base}self-diffusion of {name}, corrected for the size of the box"
        rows.append(beside(what, diffusion[f"diffusion_{name}"], value, error, source, unit="1e-9 m2/s", size=1.0e-5))
    return rows
