"""Means of correlated series and their honest error bars.

The standard error of the mean of n correlated samples is sqrt(2 tau / n) times their standard deviation, with the
integrated autocorrelation time tau = 1/2 + sum_{t>=1} rho(t) in samples; n_effective = n / (2 tau). The sum is cut at
the smallest window W >= 5 tau (Sokal, Monte Carlo methods in statistical mechanics, 1996), its bias is corrected, and
the few degrees of freedom of the error itself, n / (2 W + 1), enter through Student's t.

Where most of the variance is fast, as in the pressure of a liquid, the window closes before the slow part has begun.
So the same is done with the averages of 128 blocks, in which the fast part has died out, and the larger error is taken:
some 5 % too large where there is no slow part.

Series have shape (n_replicas, n_samples); a single one (n_samples,) is accepted as well. Replicas are independent runs
of the same state: they share one mean, so replicas that disagree widen the error bar by themselves.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import expm1, sqrt

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.fft import irfft, next_fast_len, rfft
from scipy.special import stdtrit

from bamboo.errors import InputError
from md.analysis.estimate import NORMAL_95, Estimate

WINDOW = 5.0  # Sokal's window in units of tau: an exponential tail beyond it holds 0.7 % of tau
MIN_EFFECTIVE_SAMPLES = 20.0  # below, tau and so the error bar are themselves unknown to a factor of two
N_BLOCKS = 128
LONGEST_SCAN = 8192  # samples kept (as block averages) while searching for the start of equilibrium


@dataclass(frozen=True)
class SeriesMean:
    """Mean of a correlated series; ``correlation_time`` is 2 tau, in samples.

    stderr  half the 95 % interval / 1.96: widened by Student's t, for a reader
    sigma   the standard error itself, sqrt(variance of the mean), for further computing
    """

    value: float
    stderr: float
    sigma: float
    n_effective: float
    correlation_time: float

    @property
    def is_converged(self) -> bool:
        """True where the series holds enough independent samples for an error bar that can be trusted."""
        return self.n_effective >= MIN_EFFECTIVE_SAMPLES


def student_widening(degrees_of_freedom: float) -> float:
    """Return t_{0.975}(nu) / 1.96, the factor that turns a standard error into one whose ±1.96 covers 95 %."""
    return float(stdtrit(max(degrees_of_freedom, 1.0), 0.975)) / NORMAL_95


def autocovariance(series: ArrayLike) -> NDArray[np.float64]:
    """Return C(t) = <dx(s) dx(s + t)>, dx about the common mean, averaged over replicas, for t = 0..n_samples-1.

    Computed by FFT with zero padding, each lag divided by its number of pairs.
    """
    x = _replicas(series)
    n_samples = x.shape[1]
    spectrum = rfft(x - x.mean(), next_fast_len(2 * n_samples, real=True), axis=1)
    power = (spectrum * spectrum.conj()).real.mean(axis=0)
    n_padded = next_fast_len(2 * n_samples, real=True)
    covariance: NDArray[np.float64] = irfft(power, n_padded)[:n_samples] / np.arange(n_samples, 0, -1)
    return covariance


def integrated_autocorrelation_time(series: ArrayLike) -> tuple[float, int]:
    """Return (tau, W) in samples: tau = 1/2 + sum_{t=1..W} rho(t) with the smallest self-consistent W >= 5 tau.

    Or that of block averages m of length b, where it is larger: 2 tau var(x) / n is the variance of the mean, and so
    tau = tau_m b var(m) / var(x). At least 1/2: anticorrelation is not trusted to improve an error bar. A constant has
    tau 1/2.
    """
    x = _replicas(series)
    fine = _windowed_time(x)
    block = x.shape[1] // N_BLOCKS
    if block < 2 or not x.var():
        return fine
    means = x[:, : N_BLOCKS * block].reshape(len(x), N_BLOCKS, block).mean(axis=2)
    tau, window = _windowed_time(means)
    return max(fine, (tau * block * float(means.var() / x.var()), (window + 1) * block))


def _windowed_time(x: NDArray[np.float64]) -> tuple[float, int]:
    """Return (tau, W) of series of one resolution.

    Corrected for the bias that the subtracted mean causes, tau (1 + (2 W + 1) / n) (Wolff, Comput. Phys. Commun. 156,
    143 (2004), eq. 49).
    """
    covariance = autocovariance(x)
    # FFT rounding leaves a variance of order eps^2 mean^2 where the series is constant
    if covariance[0] <= 1.0e-24 * float(np.abs(x).max()) ** 2:
        return 0.5, 0
    tau = np.cumsum(covariance / covariance[0]) - 0.5
    closed = np.arange(len(tau)) >= WINDOW * tau
    window = int(np.argmax(closed)) if closed.any() else len(tau) - 1
    return max(0.5, float(tau[window]) * (1.0 + (2 * window + 1) / x.size)), window


def series_mean(series: ArrayLike) -> SeriesMean:
    """Return the mean of a stationary series with its standard error (see the module's text)."""
    x = _replicas(series)
    tau, window = integrated_autocorrelation_time(x)
    n_effective = x.size / (2.0 * tau)
    variance = float(x.var()) * (1.0 + 1.0 / n_effective)  # the sample mean took away 1 / n_effective of it
    widening = student_widening(x.size / (2 * window + 1))
    sigma = sqrt(variance / n_effective)
    return SeriesMean(float(x.mean()), widening * sigma, sigma, n_effective, 2.0 * tau)


def variance_stderr(mean: SeriesMean) -> float:
    """Return the error of a mean of squares [its unit], widened so that ±1.96 of it covers 95 %.

    Variances from few samples scatter like chi-squared: those that come out low have low error bars too, and miss the
    truth more often than one time in twenty. Their logarithms are nearly normal: half the interval is taken from the
    upper end there, value (exp(1.96 stderr / value) - 1).
    """
    if not mean.value > 0.0:
        return mean.stderr
    return mean.value * expm1(NORMAL_95 * mean.stderr / mean.value) / NORMAL_95


def equilibration_start(series: ArrayLike) -> int | None:
    """Return the first equilibrated sample: the start that maximises n_effective of the rest.

    Chodera, J. Chem. Theory Comput. 12, 1799 (2016). Replicas are averaged first, which shows a common drift best. None
    where the optimum lies at half the run: then the drift may last longer than the run.
    """
    x = _replicas(series).mean(axis=0)
    block = max(1, len(x) // LONGEST_SCAN)
    coarse = x[: len(x) // block * block].reshape(-1, block).mean(axis=1)
    half = len(coarse) // 2
    if half < 2:
        return None
    starts = np.unique(np.concatenate([[0], np.geomspace(1, half, 24).astype(int)]))
    effective = [(len(coarse) - s) / integrated_autocorrelation_time(coarse[s:])[0] for s in starts]
    best = int(np.argmax(effective))
    return None if starts[best] == half else int(starts[best]) * block


def equilibrated_mean(series: NDArray[np.float64]) -> tuple[SeriesMean, bool]:
    """Return the mean of the equilibrated part of a series, and whether it drifts.

    Of one that drifts: of its second half, with an error of no less than half of what the halves differ by.
    """
    start = equilibration_start(series)
    if start is not None:
        return series_mean(series[start:]), False
    first, second = np.array_split(series, 2)
    mean, drift = series_mean(second), abs(float(first.mean() - second.mean())) / 2.0  # it may be noise that lasts
    return replace(mean, sigma=max(mean.sigma, drift), stderr=max(mean.stderr, drift)), True


def spread_stderr(values: NDArray[np.float64]) -> float:
    """Return std / sqrt(n) t_{0.975}(n - 1) / 1.96, the widened standard error of the mean of independent values."""
    if len(values) < 2:
        raise InputError(f"The spread of independent values needs at least two of them, got {len(values)}.")
    return float(values.std(ddof=1)) / sqrt(len(values)) * student_widening(len(values) - 1)


def combine(estimates: Sequence[Estimate]) -> Estimate:
    """Return the mean of independent estimates of one property (replicas, repeated runs), weighted by n_effective.

    Inverse variances would favour runs whose error happened to be underestimated. Where the scatter exceeds what the
    error bars allow, the error is scaled up by sqrt(chi2 / (n - 1)) with a warning. Estimates without a value are left
    out with a warning; none left: no value.
    """
    if not estimates:
        raise InputError("Nothing to combine: no estimates were given.")
    units = {estimate.unit for estimate in estimates}
    if len(units) > 1:
        raise InputError(f"Estimates in different units cannot be combined: {sorted(units)}.")
    used = [e for e in estimates if e.value is not None and e.stderr is not None]
    notes = list(dict.fromkeys(text for e in estimates for text in e.warnings))
    if len(used) < len(estimates):
        notes.insert(0, f"{len(estimates) - len(used)} of {len(estimates)} runs gave no value")
    unit, method = estimates[0].unit, f"{estimates[0].method}, {len(used)} independent runs"
    if not used:
        return Estimate(None, None, unit, None, method, tuple(notes))
    value = np.array([e.value for e in used], dtype=np.float64)
    stderr = np.array([e.stderr for e in used], dtype=np.float64)
    weight = np.array([e.n_effective or 1.0 for e in used])
    weight /= weight.sum()
    mean, error = float(weight @ value), float(np.sqrt(weight**2 @ stderr**2))
    if len(used) > 1 and (stderr > 0.0).all():
        excess = sqrt(float((((value - mean) / stderr) ** 2).sum()) / (len(used) - 1))
        if excess > 1.0:
            error *= excess
        if excess > 2.0:
            notes.insert(0, f"the runs differ {excess:.1f} times more than their error bars allow")
    return Estimate(mean, error, unit, sum(e.n_effective or 1.0 for e in used), method, tuple(notes))


def _replicas(series: ArrayLike) -> NDArray[np.float64]:
    """Return the series as (n_replicas, n_samples) float64, refused where empty or not finite."""
    x = np.atleast_2d(np.asarray(series, dtype=np.float64))
    if x.ndim != 2 or x.shape[1] < 1:
        raise InputError(f"A series has shape {x.shape}, expected (n_replicas, n_samples) with at least one sample.")
    if not np.isfinite(x).all():
        raise InputError(f"A series holds {int((~np.isfinite(x)).sum())} values that are not finite.")
    return x
