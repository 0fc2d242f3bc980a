"""Ionic conductivity, its Nernst-Einstein counterpart, ionicity and transference numbers."""

from collections.abc import Sequence

import numpy as np

from bamboo import units
from md.analysis.diffusion import (
    Floats,
    Regime,
    Slopes,
    barely_diffusive,
    barycentric_centres,
    check_replicas,
    diffusive_regime,
    frames_objection,
    msd_slopes,
    not_diffusive,
    ratio_of_means,
    slope_error,
    too_uncertain,
)
from md.analysis.estimate import LARGEST_RELATIVE_ERROR, Estimate, format_time, no_value, with_precision_advice
from md.analysis.green_kubo import green_kubo, series_objection
from md.trajectory import ThermoSeries, Trajectory

UNIT = "mS/cm"
EINSTEIN, NERNST_EINSTEIN = "Einstein, collective charge displacement", "Nernst-Einstein"
SMALL = 0.1  # of the Nernst-Einstein slope: an error below it may exceed half the conductivity, which is then near zero


def conductivity(trajectories: Sequence[Trajectory], *, temperature_K: float) -> dict[str, Estimate]:
    """Return conductivities [mS/cm], ionicity and transference numbers of replicas of one electrolyte.

    "conductivity"                 sigma = lim d/dt <|M(t) - M(0)|^2> / (6 V k_B T), M = sum_i q_i r_i
    "conductivity_nernst_einstein" the same without cross terms: sum_i q_i^2 <|r_i(t) - r_i(0)|^2> / (6 V k_B T)
    "ionicity"                     their ratio; both from the same box, without finite-size correction
    "transference_X_barycentric"   lim <dM_X dM> / <dM dM>, displacements relative to the whole box
    "transference_X_solvent"       the same relative to the centre of mass of all neutral molecules

    r_i are unwrapped centres of mass of molecules, q_i their formal charges: integers give the steady
    current of the electrons' response itself, the Born charges (Grasselli, Baroni, Nat. Phys. 15, 967 (2019)), which
    fractional charges of a model do not. Transference numbers follow
    Fong et al., Macromolecules 54, 2575 (2021). No value, with the reason, for Langevin and constant-pressure runs,
    without ions, and where the run is too short.
    """
    check_replicas(trajectories)
    first = trajectories[0]
    charges, species = first.topology.molecule_charges, first.topology.species
    ions = [name for name, members in species.items() if charges[members].any()]
    reason = None
    if first.ensemble.transport_objection is not None:
        reason = f"refused: {first.ensemble.transport_objection}"
    elif not ions:
        reason = "no ions: every molecule has formal charge 0"
    elif abs(charges.sum()) > 1.0e-6:
        reason = f"refused: the formal charges add up to {charges.sum():+g} e, the box must be neutral"
    if reason is not None:
        return _no_values(["conductivity", "conductivity_nernst_einstein", "ionicity"], reason)
    volume = float(np.mean([trajectory.mean_volume for trajectory in trajectories]))
    per_frame = 6.0 * volume * units.BOLTZMANN * temperature_K * first.interval_ps * units.PICOSECOND
    if objection := frames_objection([trajectory.positions for trajectory in trajectories]):
        return _no_values(["conductivity", "conductivity_nernst_einstein", "ionicity"], objection)
    return _estimates(
        _slopes(trajectories, ions),
        scale=1.0 / per_frame / units.MILLISIEMENS_PER_CENTIMETRE,
        interval_ps=first.interval_ps,
        length_ps=min(trajectory.n_frames for trajectory in trajectories) * first.interval_ps,
    )


def green_kubo_conductivity(thermo: ThermoSeries) -> dict[str, Estimate]:
    """Return {"conductivity_green_kubo": sigma} in mS/cm from the charge current of an NVE or NVT run.

    sigma = 1 / (3 V k_B T) integral_0^inf <J(0) J(t)> dt, J = sum_i q_i v_i with formal charges and molecular
    centre-of-mass velocities. Ions rattle in the cage of their neighbours, which makes <JJ> negative at late times, a
    dip of its spectrum at zero frequency: both shapes are tried.
    """
    name = "conductivity_green_kubo"
    if objection := series_objection(thermo, "charge current"):
        return {name: no_value(objection, unit=UNIT, method="Green-Kubo, STACIE")}
    thermal = units.BOLTZMANN * float(thermo.temperature_K.mean())
    estimate = green_kubo(
        thermo.charge_current.transpose(1, 2, 0),
        1.0 / (float(thermo.volume.mean()) * thermal),
        interval_ps=thermo.interval_ps,
        unit=UNIT,
        unit_size=units.MILLISIEMENS_PER_CENTIMETRE,
        models=("lorentz", "debye"),
    )
    return {name: estimate}


def _slopes(trajectories: Sequence[Trajectory], ions: list[str]) -> dict[str, Slopes]:
    """Slopes [e^2 Å^2 per frame]: "total" of <|dM|^2>, "own" without cross terms, partial ones of <dM_X dM>."""
    topology = trajectories[0].topology
    charges, masses = topology.molecule_charges, topology.molecule_masses
    charged, neutral = np.flatnonzero(charges != 0.0), np.flatnonzero(charges == 0.0)
    centres = [barycentric_centres(trajectory) for trajectory in trajectories]
    moment = [np.einsum("tmx,m->tx", track, charges) for track in centres]
    weight = np.sqrt(float(len(charged))) * charges[charged, None]  # the sum over ions, not their mean
    slopes = {
        "total": msd_slopes([track[:, None] for track in moment]),
        "own": msd_slopes([track[:, charged] * weight for track in centres]),
    }
    for name in ions:
        members = topology.species[name]
        part = [np.einsum("tmx,m->tx", track[:, members], charges[members]) for track in centres]
        slopes[f"transference_{name}_barycentric"] = _cross(part, moment)
        if len(neutral):
            weights = masses[neutral] / masses[neutral].sum() * charges[members].sum()
            solvent = [np.einsum("tmx,m->tx", track[:, neutral], weights) for track in centres]
            relative = [p - s for p, s in zip(part, solvent, strict=True)]
            slopes[f"transference_{name}_solvent"] = _cross(relative, moment)
    return slopes


def _cross(first: list[Floats], second: list[Floats]) -> Slopes:
    """Slopes of <da db> for tracks (n_frames, 3), from |a + b|^2 - |a - b|^2 = 4 a.b."""
    plus = msd_slopes([(a + b)[:, None] for a, b in zip(first, second, strict=True)])
    minus = msd_slopes([(a - b)[:, None] for a, b in zip(first, second, strict=True)])
    return Slopes(plus.lags, 0.25 * (plus.samples - minus.samples))


def _estimates(
    slopes: dict[str, Slopes], *, scale: float, interval_ps: float, length_ps: float
) -> dict[str, Estimate]:  # fmt: skip
    """All properties from the slopes; ``scale`` turns a slope per frame into mS/cm."""
    total, own = slopes["total"], slopes["own"]
    partial = {name: each for name, each in slopes.items() if name not in ("total", "own")}
    reference = float(own.values[-1])
    single = diffusive_regime(own, scale=reference)
    if single is None:
        reason = not_diffusive(own, interval_ps, length_ps)
        return _no_values(["conductivity", "conductivity_nernst_einstein", "ionicity", *partial], reason)

    def mean(each: Slopes, regime: Regime, method: str) -> Estimate:
        text = f"{method}, linear from {format_time(float(each.lags[regime.octave]) * interval_ps)}"
        value, stderr = float(each.values[regime.octave]) * scale, slope_error(each, regime) * scale
        notes = barely_diffusive(each, regime, interval_ps, length_ps)
        estimate = Estimate(value, stderr, UNIT, float(each.samples.shape[1]), text, notes)
        return with_precision_advice(estimate, length_ps=length_ps)

    results = {"conductivity_nernst_einstein": mean(own, single, NERNST_EINSTEIN)}
    # single ions are many and show slow motion that the one collective displacement hides in its noise
    regime = diffusive_regime(total, scale=reference, earliest=single.agreeing)
    if regime is None:
        reason = (
            f"not converged: the collective displacement in {format_time(length_ps)} is not yet linear in time, "
            f"run at least {format_time(4.0 * length_ps)}"
        )
        return results | _no_values(["conductivity", "ionicity", *partial], reason)
    value, stderr = float(total.values[regime.octave]), slope_error(total, regime)
    if stderr > max(LARGEST_RELATIVE_ERROR * value, SMALL * reference):
        reason = too_uncertain(value * scale, stderr * scale, UNIT, length_ps)
        return results | _no_values(["conductivity", "ionicity", *partial], reason)
    results["conductivity"] = mean(total, regime, EINSTEIN)
    results["ionicity"] = _ratio(total, own, regime, f"{EINSTEIN} / {NERNST_EINSTEIN}, same box")
    if value <= 2.0 * stderr:
        return results | _no_values(list(partial), "the conductivity cannot be told from zero")
    for name, each in partial.items():
        results[name] = _ratio(each, total, regime, f"{EINSTEIN}, {name.rsplit('_', 1)[1]} frame")
    return results


def _ratio(numerator: Slopes, denominator: Slopes, regime: Regime, method: str) -> Estimate:
    """Ratio of two slopes; where early octaves are out, its error holds the change among those that agree."""
    value, stderr = ratio_of_means(numerator.samples[regime.octave], denominator.samples[regime.octave])
    if regime.agreeing:
        ratios = (numerator.values / denominator.values)[regime.agreeing :]
        stderr = float(np.hypot(stderr, np.abs(ratios - value).max()))
    return Estimate(value, stderr, "", float(numerator.samples.shape[1]), method)


def _no_values(names: list[str], reason: str) -> dict[str, Estimate]:
    units_of = {name: UNIT if name.startswith("conductivity") else "" for name in names}
    return {name: no_value(reason, unit=unit, method=EINSTEIN) for name, unit in units_of.items()}
