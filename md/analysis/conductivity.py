"""Ionic conductivity, its Nernst-Einstein counterpart, ionicity and transference numbers."""

from collections.abc import Sequence

import numpy as np

from bamboo import units
from md.analysis.diffusion import (
    Floats,
    barycentric_centres,
    block_msd,
    check_replicas,
    first_diffusive_lag,
    not_diffusive,
    ratio_of_means,
    slopes,
)
from md.analysis.estimate import Estimate, format_time, no_value, with_precision_advice
from md.analysis.green_kubo import LARGEST_RELATIVE_ERROR, green_kubo, series_objection
from md.analysis.statistics import spread_stderr
from md.trajectory import ThermoSeries, Trajectory

UNIT = "mS/cm"
EINSTEIN, NERNST_EINSTEIN = "Einstein, collective charge displacement", "Nernst-Einstein"
SMALL = 0.1  # of the Nernst-Einstein slope: what is smaller counts as zero when judging linearity and errors


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
    return _estimates(
        _curves(trajectories, ions),
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


def _curves(trajectories: Sequence[Trajectory], ions: list[str]) -> dict[str, Floats]:
    """Block curves (n_blocks, n_lags) [e^2 Å^2]: "total" <|dM|^2>, "own" without cross terms, partial <dM_X dM>."""
    topology = trajectories[0].topology
    charges, masses = topology.molecule_charges, topology.molecule_masses
    charged, neutral = np.flatnonzero(charges != 0.0), np.flatnonzero(charges == 0.0)
    centres = [barycentric_centres(trajectory) for trajectory in trajectories]
    moment = [np.einsum("tmx,m->tx", track, charges) for track in centres]
    own = block_msd([track[:, charged] * charges[charged, None] for track in centres])
    curves = {"total": block_msd([track[:, None] for track in moment]), "own": own * len(charged)}
    for name in ions:
        members = topology.species[name]
        part = [np.einsum("tmx,m->tx", track[:, members], charges[members]) for track in centres]
        curves[f"transference_{name}_barycentric"] = _cross(part, moment)
        if len(neutral):
            weights = masses[neutral] / masses[neutral].sum() * charges[members].sum()
            solvent = [np.einsum("tmx,m->tx", track[:, neutral], weights) for track in centres]
            relative = [p - s for p, s in zip(part, solvent, strict=True)]
            curves[f"transference_{name}_solvent"] = _cross(relative, moment)
    return curves


def _cross(first: list[Floats], second: list[Floats]) -> Floats:
    """Block curves of <da db> for tracks (n_frames, 3), from |a + b|^2 - |a - b|^2 = 4 a.b."""
    plus = block_msd([(a + b)[:, None] for a, b in zip(first, second, strict=True)])
    minus = block_msd([(a - b)[:, None] for a, b in zip(first, second, strict=True)])
    return 0.25 * (plus - minus)


def _estimates(
    curves: dict[str, Floats], *, scale: float, interval_ps: float, length_ps: float
) -> dict[str, Estimate]:  # fmt: skip
    """All properties from the block curves; ``scale`` turns a slope per frame into mS/cm."""
    total, own = curves["total"], curves["own"]
    partial = {name: curve for name, curve in curves.items() if name not in ("total", "own")}
    first_lag = first_diffusive_lag(own)
    if first_lag is None:
        reason = not_diffusive(own, interval_ps, length_ps)
        return _no_values(["conductivity", "conductivity_nernst_einstein", "ionicity", *partial], reason)
    own_slope = slopes(own, first_lag)
    single = _mean(own_slope * scale, NERNST_EINSTEIN, first_lag * interval_ps, length_ps)
    results = {"conductivity_nernst_einstein": single}
    lag = _collective_lag(total, first_lag, float(own_slope.mean()))
    if lag is None:
        reason = (
            f"not converged: the collective displacement in {format_time(length_ps)} is not yet linear in time, "
            f"run at least {format_time(4.0 * length_ps)}"
        )
        return results | _no_values(["conductivity", "ionicity", *partial], reason)
    slope = slopes(total, lag)
    mean, stderr, reference = float(slope.mean()), spread_stderr(slope), float(own_slope.mean())
    if stderr > max(LARGEST_RELATIVE_ERROR * mean, SMALL * reference):
        needed_ps = length_ps * (stderr / (0.1 * max(mean, SMALL * reference))) ** 2
        reason = f"not converged: {mean * scale:.2g} ± {stderr * scale:.2g} mS/cm, run about {format_time(needed_ps)}"
        return results | _no_values(["conductivity", "ionicity", *partial], reason)
    results["conductivity"] = _mean(slope * scale, EINSTEIN, lag * interval_ps, length_ps)
    results["ionicity"] = _ratio(slope, own_slope, f"{EINSTEIN} / {NERNST_EINSTEIN}, same box")
    if mean <= 2.0 * stderr:
        return results | _no_values(list(partial), "the conductivity cannot be told from zero")
    for name, curve in partial.items():
        results[name] = _ratio(slopes(curve, lag), slope, f"{EINSTEIN}, {name.rsplit('_', 1)[1]} frame")
    return results


def _collective_lag(total: Floats, first_lag: int, reference: float) -> int | None:
    """Return the first lag >= ``first_lag`` from which on successive octaves of <|dM|^2> have one slope.

    One: they differ by less than ``SMALL`` of the Nernst-Einstein slope ``reference`` or three standard errors. Unlike
    the logarithmic slope, this also holds for ion pairs that stay together, whose collective slope is zero.
    """
    longest = (total.shape[1] - 1) // 4
    lags = [first_lag * 2**k for k in range(max(0, int(np.log2(max(longest, 1) / first_lag)) + 1)) if longest]
    found = None
    for lag in reversed([lag for lag in lags if lag <= longest]):
        change = slopes(total, 2 * lag) - slopes(total, lag)
        if abs(change.mean()) > max(SMALL * reference, 3.0 * spread_stderr(change)):
            break
        found = lag
    return found


def _mean(values: Floats, method: str, from_ps: float, length_ps: float) -> Estimate:
    text = f"{method}, linear from {format_time(from_ps)}"
    estimate = Estimate(float(values.mean()), spread_stderr(values), UNIT, float(len(values)), text)
    return with_precision_advice(estimate, length_ps=length_ps)


def _ratio(numerator: Floats, denominator: Floats, method: str) -> Estimate:
    value, stderr = ratio_of_means(numerator, denominator)
    return Estimate(value, stderr, "", float(len(numerator)), method)


def _no_values(names: list[str], reason: str) -> dict[str, Estimate]:
    units_of = {name: UNIT if name.startswith("conductivity") else "" for name in names}
    return {name: no_value(reason, unit=unit, method=EINSTEIN) for name, unit in units_of.items()}
