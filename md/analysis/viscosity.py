"""Shear viscosity from the fluctuations of the pressure tensor."""

from math import sqrt

import numpy as np
from numpy.typing import NDArray

from bamboo import units
from md.analysis.estimate import Estimate, no_value
from md.analysis.green_kubo import green_kubo, series_objection
from md.trajectory import ThermoSeries

UNIT = "mPa s"


def viscosity(thermo: ThermoSeries) -> dict[str, Estimate]:
    """Return the shear viscosity of an NVE or NVT run, {"viscosity": Estimate in mPa s}.

    eta = V / (k_B T) integral_0^inf <P(0) P(t)> dt over the five independent components of ``deviatoric_components``
    and all replicas (Green-Kubo). No value, with the reason, for Langevin or constant-pressure runs, for pressures
    sampled more rarely than every 10 fs, and for runs too short for their correlation time.
    """
    if objection := series_objection(thermo, "pressure"):
        return {"viscosity": no_value(objection, unit=UNIT, method="Green-Kubo, STACIE")}
    thermal = units.BOLTZMANN * float(thermo.temperature_K.mean())
    estimate = green_kubo(
        deviatoric_components(thermo.pressure),
        float(thermo.volume.mean()) / thermal,
        interval_ps=thermo.interval_ps,
        unit=UNIT,
        unit_size=units.MILLIPASCAL_SECOND,
        models=("lorentz",),
    )
    return {"viscosity": estimate}


def deviatoric_components(pressure: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return xy, yz, zx, (xx - yy) / 2 and (2 zz - xx - yy) / sqrt(12), (n_replicas, 5, n_samples).

    pressure (n_samples, n_replicas, 3, 3). In an isotropic liquid the five are uncorrelated and their autocorrelations
    equal: they are orthogonal and of one norm in the space of symmetric traceless tensors, sum of squares P:P / 2, with
    xy counted as (xy + yx) / 2.
    """
    p = 0.5 * (pressure + np.swapaxes(pressure, -1, -2))
    xx, yy, zz = p[..., 0, 0], p[..., 1, 1], p[..., 2, 2]
    five = [p[..., 0, 1], p[..., 1, 2], p[..., 2, 0], 0.5 * (xx - yy), (2.0 * zz - xx - yy) / sqrt(12.0)]
    return np.stack(five).transpose(2, 0, 1)
