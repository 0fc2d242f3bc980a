"""Self-diffusion from mean squared displacements, and the tools that charge transport shares with it.

Trajectories are cut into blocks; every slope is taken in each block, the value is the mean over blocks of all replicas
and the error follows from their scatter. That keeps what particles of one box have in common (their correlated motion)
in the error bar, which the scatter over particles would lose.
"""

from collections.abc import Sequence
from math import pi, sqrt

import numpy as np
from numpy.typing import NDArray
from scipy.fft import irfft, next_fast_len, rfft

from bamboo import units
from bamboo.errors import InputError
from md.analysis.estimate import Estimate, format_time, no_value, with_precision_advice
from md.analysis.statistics import spread_stderr, student_widening
from md.trajectory import Trajectory

Floats = NDArray[np.float64]
N_BLOCKS = 8  # over all replicas: enough for an error bar, few enough to leave long blocks
LAGS_PER_BLOCK = 4  # the longest lag is a quarter of a block
FEWEST_LAGS = 8
LOG_SLOPE_TOLERANCE = 0.1
PARTICLES_AT_ONCE = 2**22  # numbers per Fourier transform, bounds the memory
YEH_HUMMER = 2.837297  # self-term of a cubic Wigner lattice
UNIT = "cm2/s"
METHOD = "Einstein, linear fit of the MSD"


def mean_squared_displacement(positions: Floats) -> Floats:
    """Return MSD(t) = <|r(s + t) - r(s)|^2> over particles and all time origins s, (n_frames,), by FFT.

    positions (n_frames, n_particles, n_dimensions), unwrapped. Algorithm: |a - b|^2 = a^2 + b^2 - 2 a.b with the last
    term as an autocorrelation (Kneller et al., Comput. Phys. Commun. 91, 191 (1995)); O(n log n).
    """
    n_frames = len(positions)
    tracks = np.ascontiguousarray((positions - positions.mean(axis=0)).reshape(n_frames, -1).T)  # (n_series, n_frames)
    n_padded = next_fast_len(2 * n_frames, real=True)
    power = np.zeros(n_padded // 2 + 1)
    for chunk in np.array_split(tracks, max(1, tracks.size // PARTICLES_AT_ONCE)):
        power += (np.abs(rfft(chunk, n_padded, axis=1)) ** 2).sum(axis=0)
    products = irfft(power, n_padded)[:n_frames]
    squares = np.concatenate([[0.0], np.cumsum((tracks**2).sum(axis=0))])
    lag = np.arange(n_frames)
    sums = squares[n_frames - lag] + squares[n_frames] - squares[lag]  # of a^2 and b^2 over the pairs at each lag
    result: Floats = np.maximum(sums - 2.0 * products, 0.0) / ((n_frames - lag) * positions.shape[1])
    result[0] = 0.0
    return result


def block_msd(tracks: Sequence[Floats]) -> Floats:
    """Return the MSD of every block of every replica, (n_blocks, n_lags), n_lags a quarter of a block.

    tracks: per replica (n_frames, n_particles, 3). ``N_BLOCKS`` blocks are spread over the replicas.
    """
    n_frames = min(len(track) for track in tracks)
    per_replica = max(1, -(-N_BLOCKS // len(tracks)))
    length = n_frames // per_replica
    blocks = [track[b * length : (b + 1) * length] for track in tracks for b in range(per_replica)]
    return np.stack([mean_squared_displacement(block)[: length // LAGS_PER_BLOCK + 1] for block in blocks])


def first_diffusive_lag(curves: Floats) -> int | None:
    """Return the first lag [frames] from which on the MSD is linear, or None where there is none.

    Linear: log2(MSD(2t) / MSD(t)) differs from 1 by less than ``LOG_SLOPE_TOLERANCE`` or three standard errors, at
    this and every later octave. Ballistic motion has 2, motion in a cage less than 1.
    """
    n_lags = curves.shape[1]
    if n_lags <= FEWEST_LAGS:
        return None
    lags = 2 ** np.arange(int(np.log2((n_lags - 1) / 2)) + 1)
    if not (curves[:, lags] > 0.0).all():
        return None
    mean = curves.mean(axis=0)
    slope = np.log2(mean[2 * lags] / mean[lags])
    without = (curves.sum(axis=0) - curves) / (len(curves) - 1)  # leave one block out: jackknife
    scatter = np.log2(without[:, 2 * lags] / without[:, lags])
    stderr = np.sqrt((len(curves) - 1) * scatter.var(axis=0))
    linear = np.abs(slope - 1.0) <= np.maximum(LOG_SLOPE_TOLERANCE, 3.0 * stderr)
    if not linear[-1] or stderr[0] > LOG_SLOPE_TOLERANCE:
        return None
    unlinear = np.flatnonzero(~linear)
    return int(lags[unlinear[-1] + 1]) if len(unlinear) else 1


def slopes(curves: Floats, first_lag: int) -> Floats:
    """Return the slope [curve unit per frame] of each curve (n_blocks, n_lags) over one octave, (n_blocks,).

    Straight line with intercept over ``first_lag`` to twice that: longer lags are so noisy that they would widen the
    error even at their weight t^-3, the inverse variance of a random walk's MSD.
    """
    lag = np.arange(first_lag, 2 * first_lag + 1, dtype=np.float64)
    weight = lag**-3.0
    centred = lag - np.average(lag, weights=weight)
    gain = weight * centred / (weight * centred**2).sum()
    result: Floats = curves[:, first_lag : 2 * first_lag + 1] @ gain
    return result


def self_diffusion(
    trajectories: Sequence[Trajectory], *, temperature_K: float, viscosity: Estimate | None = None
) -> dict[str, Estimate]:
    """Return self-diffusion coefficients of all species in cm2/s, from the centres of mass of the molecules.

    "diffusion_X_box"  D_PBC = lim MSD / (6 t), as simulated, in the barycentric frame
    "diffusion_X"      D = D_PBC + 2.837297 k_B T / (6 pi eta L), for infinite size (Yeh, Hummer, J. Phys. Chem. B
                       108, 15873 (2004)), with the error of the model's own ``viscosity`` [mPa s] propagated

    trajectories: replicas of one system. No value, with the reason, for Langevin or constant-pressure runs, where the
    MSD never becomes linear, and for the corrected one where the viscosity is not known.
    """
    check_replicas(trajectories)
    species = trajectories[0].topology.species
    if objection := trajectories[0].ensemble.transport_objection:
        refused = no_value(f"refused: {objection}", unit=UNIT, method=METHOD)
        return {f"diffusion_{name}{suffix}": refused for name in species for suffix in ("_box", "")}
    centres = [barycentric_centres(trajectory) for trajectory in trajectories]
    interval_ps = trajectories[0].interval_ps
    results = {}
    for name, molecules in species.items():
        curves = block_msd([track[:, molecules] for track in centres])
        box = _coefficient(curves, interval_ps=interval_ps, length_ps=len(centres[0]) * interval_ps)
        results[f"diffusion_{name}_box"] = box
        results[f"diffusion_{name}"] = _infinite_size(box, trajectories, temperature_K, viscosity)
    return results


def _coefficient(curves: Floats, *, interval_ps: float, length_ps: float) -> Estimate:
    first_lag = first_diffusive_lag(curves)
    if first_lag is None:
        return no_value(not_diffusive(curves, interval_ps, length_ps), unit=UNIT, method=METHOD)
    coefficient = slopes(curves, first_lag) / (6.0 * interval_ps * units.PICOSECOND) / units.CM2_PER_SECOND
    estimate = Estimate(
        float(coefficient.mean()),
        spread_stderr(coefficient),
        UNIT,
        float(len(coefficient)),
        f"{METHOD} from {format_time(first_lag * interval_ps)}",
    )
    return with_precision_advice(estimate, length_ps=length_ps)


def not_diffusive(curves: Floats, interval_ps: float, length_ps: float) -> str:
    """Return why no linear regime was found, and the length that may show one."""
    n_lags = curves.shape[1]
    if n_lags <= FEWEST_LAGS:
        needed = N_BLOCKS * LAGS_PER_BLOCK * (FEWEST_LAGS + 1)
        return f"not converged: too few frames, about {needed} over all replicas are needed"
    mean, half = curves.mean(axis=0), (n_lags - 1) // 2
    slope = f"{np.log2(mean[2 * half] / mean[half]):.2f}" if mean[half] > 0.0 else "0"
    return (
        f"not converged: d log MSD / d log t is {slope} at {format_time(half * interval_ps)}, not 1: the motion is not "
        f"yet diffusive, run at least {format_time(4.0 * length_ps)}"
    )


def _infinite_size(
    box: Estimate, trajectories: Sequence[Trajectory], temperature_K: float, viscosity: Estimate | None
) -> Estimate:
    method = f"{METHOD}, Yeh-Hummer"
    if box.value is None or box.stderr is None:
        return no_value(box.warnings[0], unit=UNIT, method=method)
    if viscosity is None or viscosity.value is None or viscosity.stderr is None:
        reason = "the finite-size correction needs the viscosity, which is not known"
        return no_value(reason, unit=UNIT, method=method)
    if viscosity.unit != "mPa s":
        raise InputError(f"The viscosity is given in {viscosity.unit}, expected mPa s.")
    length = float(np.mean([trajectory.mean_volume for trajectory in trajectories])) ** (1.0 / 3.0)
    eta = viscosity.value * units.MILLIPASCAL_SECOND
    correction = YEH_HUMMER * units.BOLTZMANN * temperature_K / (6.0 * pi * eta * length) / units.CM2_PER_SECOND
    notes = box.warnings
    cell = trajectories[0].cells
    if cell is not None and not np.allclose(cell[0], np.eye(3) * cell[0, 0, 0], rtol=1.0e-3, atol=1.0e-3):
        notes = (*notes, "the box is not cubic: the finite-size correction holds roughly")
    stderr = sqrt(box.stderr**2 + (correction * viscosity.stderr / viscosity.value) ** 2)
    method = f"{method} +{correction / box.value:.0%}"
    return Estimate(box.value + correction, stderr, UNIT, box.n_effective, method, notes)


def check_replicas(trajectories: Sequence[Trajectory]) -> None:
    """Refuse trajectories that are not replicas of one periodic system sampled at one interval (InputError)."""
    if not trajectories:
        raise InputError("No trajectories were given.")
    first = trajectories[0]
    if first.cells is None:
        raise InputError("The trajectory has no cell: transport coefficients need a periodic box.")
    for other in trajectories[1:]:
        same = other.topology.molecule_names == first.topology.molecule_names
        if not same or other.ensemble != first.ensemble or abs(other.interval_ps / first.interval_ps - 1.0) > 1.0e-3:
            raise InputError("The trajectories are not replicas: molecules, ensemble or interval of frames differ.")


def barycentric_centres(trajectory: Trajectory) -> Floats:
    """Return molecular centres of mass relative to that of the whole box, (n_frames, n_molecules, 3) Å."""
    centres = trajectory.molecule_centres()
    masses = trajectory.topology.molecule_masses
    centres -= np.einsum("tmx,m->tx", centres, masses / masses.sum())[:, None]
    return centres


def ratio_of_means(numerator: Floats, denominator: Floats) -> tuple[float, float]:
    """Return mean(numerator) / mean(denominator) over blocks and its Student-widened jackknife error."""
    n = len(numerator)
    without = (numerator.sum() - numerator) / (denominator.sum() - denominator)
    stderr = sqrt((n - 1) * float(without.var())) * student_widening(n - 1)
    return float(numerator.mean() / denominator.mean()), stderr
