"""Activation energies: how viscosity, conductivity and diffusion depend on temperature."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import log, sqrt

import numpy as np

from bamboo import units
from md.analysis.estimate import Estimate, no_value

FEWEST_TEMPERATURES = 3  # two make a line whatever they are
CURVED = 2.0  # times its error bars that a line may be missed before the reader is told
METHOD = "Arrhenius, weighted line through ln(x) over 1000/T"


@dataclass(frozen=True)
class ArrheniusFit:
    """The line ln(x) = intercept + slope 1000 K / T, x in its unit, and the activation energy that it means."""

    energy: Estimate
    intercept: float = float("nan")
    slope: float = float("nan")


def arrhenius_fit(estimates: Mapping[float, Estimate], *, rises: bool) -> ArrheniusFit:
    """Fit x = A exp(∓E / (R T)) to the estimates of a property by their temperature [K]; E in kJ/mol.

    rises  whether the property rises with temperature (conductivity, diffusion; not viscosity): the sign of E
    Each ln(x) has the error stderr / x. Where the points miss the line by more than that, the error of E is scaled up
    by sqrt(chi2 / (n - 2)); more than twice, a warning says so: most electrolytes are curved over wide ranges. Points
    without a positive value and an error bar are left out; fewer than three left: no value.
    """
    points = [
        (temperature, estimate.value, estimate.stderr)
        for temperature, estimate in sorted(estimates.items())
        if estimate.value is not None and estimate.value > 0.0 and estimate.stderr
    ]
    if len(points) < FEWEST_TEMPERATURES:
        reason = f"{len(points)} temperatures with a value and an error bar, expected {FEWEST_TEMPERATURES} or more"
        return ArrheniusFit(no_value(reason, unit="kJ/mol", method=METHOD))
    x = np.array([1000.0 / temperature for temperature, _, _ in points])
    y = np.array([log(value) for _, value, _ in points])
    weight = np.array([(value / stderr) ** 2 for _, value, stderr in points])
    centre = float(weight @ x / weight.sum())
    spread = float(weight @ (x - centre) ** 2)
    slope = float(weight @ ((x - centre) * y)) / spread
    intercept = float(weight @ y / weight.sum()) - slope * centre
    excess = sqrt(float(weight @ (y - intercept - slope * x) ** 2) / (len(points) - 2))
    factor = 1000.0 * units.BOLTZMANN / units.KJ_PER_MOL  # K to kJ/mol
    warnings = []
    if excess > CURVED:
        warnings.append(f"the points miss a straight line {excess:.1f} times more than their error bars allow")
    if len(points) < len(estimates):
        warnings.append(f"{len(estimates) - len(points)} of {len(estimates)} temperatures have no value")
    energy = Estimate(
        value=factor * (-slope if rises else slope),
        stderr=factor * max(1.0, excess) / sqrt(spread),
        unit="kJ/mol",
        n_effective=None,
        method=f"{METHOD}, {len(points)} temperatures",
        warnings=tuple(warnings),
    )
    return ArrheniusFit(energy, intercept, slope)
