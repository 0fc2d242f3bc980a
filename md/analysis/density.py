"""Density and volume fluctuations of a constant-pressure run."""

import numpy as np
from numpy.typing import NDArray

from bamboo import units
from md.analysis.estimate import Estimate, format_time, no_value, with_precision_advice
from md.analysis.statistics import MIN_EFFECTIVE_SAMPLES, equilibration_start, series_mean, variance_stderr
from md.trajectory import ThermoSeries

SHORTEST_PS = 50.0  # equilibrated time below which a liquid's density is never reported
UNITS = {"density": "g/cm3", "isothermal_compressibility": "1/GPa", "thermal_expansion": "1/K"}


def density(thermo: ThermoSeries) -> dict[str, Estimate]:
    """Return density, isothermal compressibility and thermal expansion of a constant-pressure run.

    rho     = <density>                                                  g/cm3
    kappa_T = (<V^2> - <V>^2) / (k_B T <V>)                              1/GPa
    alpha_P = (<V H> - <V><H>) / (k_B T^2 <V>), H = E_kin + E_pot + P V   1/K

    (Allen and Tildesley, Computer Simulation of Liquids, 2nd ed., section 2.5). The start of equilibrium is detected
    and what precedes it discarded. A run gets values only with at least ``SHORTEST_PS`` of equilibrium that holds
    ``MIN_EFFECTIVE_SAMPLES`` independent samples of the quantity; otherwise the reason and the length needed.
    The two fluctuations hold for barostats that sample the isothermal-isobaric ensemble.
    """
    method = "NPT average after detected equilibration"
    if thermo.ensemble.name != "npt":
        reason = f"the volume is fixed in an {thermo.ensemble.name} run: density follows from an npt run"
        return {name: no_value(reason, unit=unit, method=method) for name, unit in UNITS.items()}
    interval_ps = thermo.interval_ps
    start = equilibration_start(thermo.density_g_cm3.T)
    length_ps = thermo.n_samples * interval_ps
    if start is None:
        reason = (
            f"not converged: the density still drifts after {format_time(length_ps)}, "
            f"run about {format_time(max(2.0 * length_ps, 2.0 * SHORTEST_PS))}; "
            f"unequilibrated mean {thermo.density_g_cm3.mean():.3f} g/cm3"
        )
        return {name: no_value(reason, unit=unit, method=method) for name, unit in UNITS.items()}
    series = _fluctuations(thermo, start) | {"density": thermo.density_g_cm3[start:].T}
    results = {
        name: _mean(
            series[name],
            unit=unit,
            interval_ps=interval_ps,
            discarded_ps=start * interval_ps,
            method=method,
            squares=name == "isothermal_compressibility",
        )
        for name, unit in UNITS.items()
    }
    results["density"] = with_precision_advice(results["density"], length_ps=length_ps, target=0.005)
    return results


def _fluctuations(thermo: ThermoSeries, start: int) -> dict[str, NDArray[np.float64]]:
    """Series (n_replicas, n_samples) whose means are the two fluctuation properties.

    The mean volume comes from the same samples, which takes 1 / n_effective of the fluctuation away; it is given back.
    """
    volume, temperature_K = thermo.volume[start:].T, float(thermo.temperature_K[start:].mean())
    pressure = (thermo.ensemble.pressure_bar or 0.0) * units.BAR
    enthalpy = (thermo.kinetic_energy + thermo.potential_energy + pressure * thermo.volume)[start:].T
    n_effective = series_mean(volume).n_effective
    correction = n_effective / max(n_effective - 1.0, 1.0)
    dv, dh = volume - volume.mean(), enthalpy - enthalpy.mean()
    thermal = units.BOLTZMANN * temperature_K * float(volume.mean())
    return {
        "isothermal_compressibility": correction * dv**2 / thermal * (1.0e9 * units.PASCAL),
        "thermal_expansion": correction * dv * dh / (thermal * temperature_K),
    }


def _mean(
    series: NDArray[np.float64], *, unit: str, interval_ps: float, discarded_ps: float, method: str, squares: bool
) -> Estimate:
    """Estimate of the mean of an equilibrated series (of squares, or not), or the reason why it is too short."""
    mean = series_mean(series)
    length_ps = series.shape[1] * interval_ps
    independent_ps = mean.correlation_time * interval_ps
    needed_ps = max(SHORTEST_PS, MIN_EFFECTIVE_SAMPLES * independent_ps / len(series))
    notes = (f"first {format_time(discarded_ps)} discarded",) if discarded_ps > 0.0 else ()
    if mean.is_converged and length_ps >= SHORTEST_PS:
        stderr = variance_stderr(mean) if squares else mean.stderr
        return Estimate(mean.value, stderr, unit, mean.n_effective, method, notes)
    reason = (
        f"not converged: {format_time(length_ps)} of equilibrium hold {mean.n_effective:.1f} independent samples, "
        f"needed are {MIN_EFFECTIVE_SAMPLES:.0f} and {format_time(SHORTEST_PS)}: "
        f"run about {format_time(discarded_ps + needed_ps)}; unequilibrated mean {mean.value:.4g} {unit}"
    )
    return no_value(reason, unit=unit, method=method, n_effective=mean.n_effective)
