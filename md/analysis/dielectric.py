"""Static dielectric constant from the fluctuations of the dipole of a box."""

from math import pi

import numpy as np

from bamboo import units
from md.analysis.estimate import Estimate, format_time, no_value, with_precision_advice
from md.analysis.statistics import MIN_EFFECTIVE_SAMPLES, series_mean, variance_stderr
from md.topology import Topology
from md.trajectory import ThermoSeries

METHOD = "dipole fluctuations, conducting boundary, polarisation by fluctuating charges included"
NAME = "dielectric_constant"


def dielectric_constant(thermo: ThermoSeries, topology: Topology) -> dict[str, Estimate]:
    """Return {"dielectric_constant": eps} of a liquid without ions at constant temperature.

    eps = 1 + 4 pi k_e <M^2> / (3 V k_B T), M the sum of the molecules' dipoles about their centres of mass

    (Neumann, Mol. Phys. 50, 841 (1983), conducting boundary as in Ewald's sum). <M> is zero by symmetry and not
    subtracted, for the mean of a short run would take part of the fluctuation with it. The charges follow their
    surroundings, so M contains the electronic polarisation that they can express; the 1 is that of the vacuum. Each
    component of each replica is a series with the same mean; a box whose dipole has not yet turned round often enough
    has few effective samples and gets no value, but the length needed. No value, with the reason, for liquids with
    ions, for nve runs (the formula needs a temperature) and for clusters.
    """
    objection = _objection(thermo, topology)
    if objection is not None:
        return {NAME: no_value(objection, unit="", method=METHOD)}
    scale = 4.0 * pi * units.COULOMB_CONSTANT / (3.0 * units.BOLTZMANN * float(thermo.temperature_K.mean()))
    components = thermo.dipole.transpose(1, 2, 0).reshape(-1, thermo.n_samples)  # (3 n_replicas, n_samples)
    volume = np.repeat(thermo.volume.T, 3, axis=0)
    fluctuation = series_mean(3.0 * scale * components**2 / volume)
    turns = series_mean(components / np.sqrt(volume)).n_effective
    length_ps = thermo.n_samples * thermo.interval_ps
    if turns < MIN_EFFECTIVE_SAMPLES:
        needed_ps = length_ps * MIN_EFFECTIVE_SAMPLES / turns
        reason = (
            f"not converged: the dipole of the box takes {turns:.1f} independent values in {format_time(length_ps)}, "
            f"needed are {MIN_EFFECTIVE_SAMPLES:.0f}: run about {format_time(needed_ps)}; mean so far "
            f"{1.0 + fluctuation.value:.3g}"
        )
        return {NAME: no_value(reason, unit="", method=METHOD, n_effective=turns)}
    estimate = Estimate(1.0 + fluctuation.value, variance_stderr(fluctuation), "", fluctuation.n_effective, METHOD)
    return {NAME: with_precision_advice(estimate, length_ps=length_ps)}


def _objection(thermo: ThermoSeries, topology: Topology) -> str | None:
    """Why the fluctuations of the dipole give no dielectric constant, or None where they do."""
    ions = [name for name, index in topology.species.items() if topology.molecule_charges[index[0]] != 0.0]
    if ions:
        return (
            f"refused: {', '.join(ions)} carry charge: the static dielectric constant is that of a liquid without ions"
        )
    if thermo.ensemble.name == "nve":
        return "refused: nve fixes the energy, the fluctuation formula holds at constant temperature: run nvt"
    if not np.isfinite(thermo.volume).all():
        return "refused: there is no cell, the dielectric constant needs a periodic box"
    if not np.isfinite(thermo.dipole).all():
        return "the series holds no dipoles: an earlier version recorded it"
    if not thermo.dipole.any():
        return "the dipole is zero throughout: the force field has no charges"
    return None
