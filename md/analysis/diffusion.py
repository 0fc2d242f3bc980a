"""Self-diffusion from mean squared displacements, and the tools that charge transport shares with it.

The value is the slope of the MSD of whole replicas. Its error is the scatter of the same slope over blocks, replicas
and the three components: particles of one box move together, so their scatter would lose part of the error. How late
the motion becomes diffusive is judged by comparing the slopes at all lags, up to those that only the whole run has.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import pi, sqrt

import numpy as np
from numpy.typing import NDArray
from scipy.fft import irfft, next_fast_len, rfft

from bamboo import units
from bamboo.errors import InputError
from md.analysis.estimate import LARGEST_RELATIVE_ERROR, Estimate, format_time, no_value, with_precision_advice
from md.analysis.statistics import spread_stderr, student_widening
from md.trajectory import Trajectory

Floats = NDArray[np.float64]
N_BLOCKS = 4  # over all replicas, three components each: twelve samples
LAGS_PER_BLOCK = 8  # lags up to an eighth of a block: longer ones would waste too many of its pairs
LAGS_PER_RUN = 4
FEWEST_LAGS = 8
N_LONGEST = 3  # octaves of the longest lags, which alone can show a slow motion
DIFFERENT, DIFFERENT_FROM_LONGEST = 3.0, 1.8  # errors; the latter is low: a missed cage costs more than a later lag
NEGLIGIBLE = 0.01  # of the slope
OCTAVES_BEYOND = 2  # four times the lag from which slopes agree: what remains of a relaxation there, to the 4th power
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


@dataclass(frozen=True)
class Slopes:
    """Slopes of a mean squared displacement over octaves of the lag.

    lags     (n_octaves,) frames: octave k reaches from lags[k] to twice that, the last to a quarter of the run
    samples  (n_octaves, n_samples) curve unit per frame. Their mean is the slope of the whole replicas, their scatter
             is that of independent samples of it
    """

    lags: NDArray[np.int64]
    samples: Floats

    @property
    def values(self) -> Floats:
        """Slope at each octave, (n_octaves,)."""
        result: Floats = self.samples.mean(axis=1)
        return result

    @property
    def stderr(self) -> Floats:
        """Standard error of each, widened by Student's t, (n_octaves,)."""
        return np.array([spread_stderr(samples) for samples in self.samples])


def msd_slopes(tracks: Sequence[Floats]) -> Slopes:
    """Return the slopes of the MSD of replicas, tracks (n_frames, n_particles, 3) each.

    Beyond ``LAGS_PER_BLOCK`` the scatter is continued from the last octave that blocks have, by the law of a random
    walk: the variance of the slope over [t, 2 t] in a run of length T grows as t / (1 - 2 t / T). Raises InputError
    below ``fewest_frames``.
    """
    n_frames = min(len(track) for track in tracks)
    if n_frames < fewest_frames(len(tracks)):
        raise InputError(f"{n_frames} frames are too few for slopes, {fewest_frames(len(tracks))} are needed.")
    whole = np.mean([mean_squared_displacement(track[:n_frames]) for track in tracks], axis=0)
    longest = n_frames // LAGS_PER_RUN // 2
    lags = longest >> np.arange(int(np.log2(longest)), -1, -1)
    per_replica = -(-N_BLOCKS // len(tracks))
    length = n_frames // per_replica
    blocks = [track[b * length : (b + 1) * length] for track in tracks for b in range(per_replica)]
    curves = np.stack([3.0 * mean_squared_displacement(block[:, :, [x]]) for block in blocks for x in range(3)])
    samples = []
    for lag in lags:
        if 2 * lag <= length // LAGS_PER_BLOCK:
            last, scatter = lag, _slope(curves, lag) - _slope(curves, lag).mean()
        growth = lag / last * (1.0 - 2.0 * last / n_frames) / (1.0 - 2.0 * lag / n_frames)
        samples.append(_slope(whole, lag) + sqrt(growth) * scatter)
    return Slopes(lags, np.stack(samples))


def fewest_frames(n_replicas: int) -> int:
    """Return how many frames each replica needs for slopes with error bars."""
    return -(-N_BLOCKS // n_replicas) * LAGS_PER_BLOCK * (FEWEST_LAGS + 1)


def _slope(curves: Floats, lag: int) -> Floats:
    """Return the slope [curve unit per frame] of curves (..., n_lags) from ``lag`` to twice that, (...).

    Straight line with intercept, at the weight t^-3, the inverse variance of a random walk's MSD.
    """
    lags = np.arange(lag, 2 * lag + 1, dtype=np.float64)
    weight = lags**-3.0
    centred = lags - np.average(lags, weights=weight)
    gain = weight * centred / (weight * centred**2).sum()
    result: Floats = curves[..., lag : 2 * lag + 1] @ gain
    return result


@dataclass(frozen=True)
class Regime:
    """Where a slope is taken: ``octave``, those ``agreeing`` from which on all do, and whether the run is too short.

    barely  there is no octave ``OCTAVES_BEYOND`` the first that agrees: the motion has only just become diffusive
    """

    agreeing: int
    octave: int
    barely: bool


def diffusive_regime(slopes: Slopes, *, scale: float, earliest: int = 0) -> Regime | None:
    """Return where the slope no longer changes with the lag, or None where it does so to the end.

    Two octaves differ where their slopes do by more than ``DIFFERENT`` errors (``DIFFERENT_FROM_LONGEST`` where the
    later is one of the longest) and ``NEGLIGIBLE`` times ``scale``. The variance of a difference is that of the later
    slope less that of the earlier, as for an efficient and a consistent estimate of one number (Hausman, Econometrica
    46, 1251 (1978)). Where all agree, the most precise is taken. Where early ones are out, the slope is taken
    ``OCTAVES_BEYOND`` the first that agrees, since a relaxation that ends there would bias it unseen. A relaxation that
    changes the slope by less than the error of the longest octaves is not seen: many particles see more than few.

    scale     the slope that matters
    earliest  octave before which nothing is trusted
    """
    values, variance = slopes.values, slopes.stderr**2
    last = len(values) - 1
    limit = np.where(np.arange(last + 1) > last - N_LONGEST, DIFFERENT_FROM_LONGEST, DIFFERENT)
    agreeing = last
    while agreeing > earliest:
        later = slice(agreeing, None)
        error = np.sqrt(np.maximum(variance[later] - variance[agreeing - 1], 0.0))
        change = np.abs(values[later] - values[agreeing - 1])
        if (change > np.maximum(limit[later] * error, NEGLIGIBLE * scale)).any():
            break
        agreeing -= 1
    if agreeing == last:
        return None
    start = agreeing + OCTAVES_BEYOND if agreeing else 0
    octave = last if start >= last else start + int(np.argmin(variance[start:]))
    return Regime(agreeing, octave, barely=start > last)


def slope_error(slopes: Slopes, regime: Regime) -> float:
    """Return the error of the slope: where early octaves are out, with the largest change among those that agree."""
    stderr = float(slopes.stderr[regime.octave])
    if regime.agreeing == 0:
        return stderr
    values = slopes.values
    return float(np.hypot(stderr, np.abs(values[regime.agreeing :] - values[regime.octave]).max()))


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
    n_frames = min(len(track) for track in centres)
    results = {}
    for name, molecules in species.items():
        box = _coefficient([track[:, molecules] for track in centres], interval_ps, n_frames * interval_ps)
        results[f"diffusion_{name}_box"] = box
        results[f"diffusion_{name}"] = _infinite_size(box, trajectories, temperature_K, viscosity)
    return results


def _coefficient(tracks: list[Floats], interval_ps: float, length_ps: float) -> Estimate:
    if objection := frames_objection(tracks):
        return no_value(objection, unit=UNIT, method=METHOD)
    slopes = msd_slopes(tracks)
    regime = diffusive_regime(slopes, scale=float(slopes.values[-1]))
    if regime is None:
        return no_value(not_diffusive(slopes, interval_ps, length_ps), unit=UNIT, method=METHOD)
    scale = 1.0 / (6.0 * interval_ps * units.PICOSECOND) / units.CM2_PER_SECOND
    value, stderr = float(slopes.values[regime.octave]) * scale, slope_error(slopes, regime) * scale
    if not stderr < LARGEST_RELATIVE_ERROR * value:
        return no_value(too_uncertain(value, stderr, UNIT, length_ps), unit=UNIT, method=METHOD)
    notes = barely_diffusive(slopes, regime, interval_ps, length_ps)
    method = f"{METHOD} from {format_time(float(slopes.lags[regime.octave]) * interval_ps)}"
    estimate = Estimate(value, stderr, UNIT, float(slopes.samples.shape[1]), method, notes)
    return with_precision_advice(estimate, length_ps=length_ps)


def frames_objection(tracks: Sequence[Floats]) -> str | None:
    """Why the tracks are too short for slopes, or None where they are not."""
    needed = fewest_frames(len(tracks))
    if min(len(track) for track in tracks) >= needed:
        return None
    return f"not converged: too few frames, about {needed * len(tracks)} over all replicas are needed"


def not_diffusive(slopes: Slopes, interval_ps: float, length_ps: float) -> str:
    """Return that no linear regime was found, and the length that may show one."""
    before, after = slopes.values[-2:]
    times = [format_time(float(lag) * interval_ps) for lag in slopes.lags[-2:]]
    return (
        f"not converged: the slope of the mean squared displacement still changes, by {after / before - 1.0:+.0%} from "
        f"{times[0]} to {times[1]}: the motion is not yet diffusive, run at least {format_time(4.0 * length_ps)}"
    )


def too_uncertain(value: float, stderr: float, unit: str, length_ps: float) -> str:
    """Return that the error is too large, and the length for 10 % (four times this one where the value may be zero)."""
    factor = (stderr / (0.1 * value)) ** 2 if value > stderr else 4.0
    return f"not converged: {value:.2g} ± {stderr:.2g} {unit}, run about {format_time(factor * length_ps)}"


def barely_diffusive(slopes: Slopes, regime: Regime, interval_ps: float, length_ps: float) -> tuple[str, ...]:
    """Return a warning where the motion has only just become diffusive within the run."""
    if not regime.barely:
        return ()
    lag = float(slopes.lags[regime.agreeing])
    factor = 2.0**OCTAVES_BEYOND * lag / float(slopes.lags[-1])
    text = (
        f"the displacement is barely diffusive: its slope changes up to {format_time(lag * interval_ps)}, the error "
        f"holds the change beyond; run about {format_time(factor * length_ps)} in all"
    )
    return (text,)


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
