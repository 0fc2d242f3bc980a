"""Error bars of correlated series, against processes whose answers are known in closed form."""

from math import exp, sqrt

import numpy as np
import pytest
from scipy.signal import lfilter

from bamboo.errors import InputError
from md.analysis.estimate import Estimate
from md.analysis.statistics import (
    SeriesMean,
    autocovariance,
    combine,
    equilibrated_mean,
    equilibration_start,
    integrated_autocorrelation_time,
    series_mean,
    spread_stderr,
    variance_stderr,
)


def ornstein_uhlenbeck(*shape: int, tau: float, seed: int) -> np.ndarray:
    """Stationary, unit variance, <x(0) x(t)> = exp(-t / tau) along the last axis: tau_int = coth(1 / (2 tau)) / 2."""
    decay = exp(-1.0 / tau)
    noise = np.random.default_rng(seed).standard_normal(shape) * sqrt(1.0 - decay**2)
    noise[..., 0] /= sqrt(1.0 - decay**2)
    return lfilter([1.0], [1.0, -decay], noise, axis=-1)


def exact_tau(tau: float) -> float:
    decay = exp(-1.0 / tau)
    return 0.5 * (1.0 + decay) / (1.0 - decay)


def test_autocovariance_equals_the_sum_over_pairs() -> None:
    x = np.random.default_rng(0).normal(size=(2, 40))
    d = x - x.mean()
    expected = [(d[:, : 40 - t] * d[:, t:]).sum() / (2 * (40 - t)) for t in range(40)]
    np.testing.assert_allclose(autocovariance(x), expected, atol=1.0e-14)


@pytest.mark.parametrize("tau", [1.0, 3.0, 40.0])
def test_autocorrelation_time_of_an_exponential(tau: float) -> None:
    n_runs, n_samples = 100, int(600 * tau) + 100
    runs = ornstein_uhlenbeck(n_runs, n_samples, tau=tau, seed=1)
    taus = np.array([integrated_autocorrelation_time(run)[0] for run in runs])
    # Sokal: each is known to sqrt(2 (2 W + 1) / n); the tail beyond five tau is worth 0.7 %
    tolerance = 3.0 * taus.std() / sqrt(n_runs) + 0.01 * exact_tau(tau)
    # the larger of two estimates, one known to 30 %, comes out high
    assert -tolerance < taus.mean() - exact_tau(tau) < tolerance + 0.12 * exact_tau(tau)


def test_constant_series_is_exactly_known() -> None:
    mean = series_mean(np.full(50, 7.3))
    assert mean.value == pytest.approx(7.3) and mean.stderr < 1.0e-12


@pytest.mark.parametrize(("tau", "n_samples", "n_replicas"), [(10.0, 1000, 1), (10.0, 4000, 1), (30.0, 600, 8)])
def test_intervals_cover_the_truth(tau: float, n_samples: int, n_replicas: int) -> None:
    runs = ornstein_uhlenbeck(600, n_replicas, n_samples, tau=tau, seed=2)
    means = [series_mean(run) for run in runs]
    covered = [abs(mean.value) < 1.96 * mean.stderr for mean in means if mean.is_converged]
    assert len(covered) > 500
    assert 0.92 < np.mean(covered) < 0.98


def test_intervals_cover_the_truth_of_a_slow_part_beneath_a_fast_one() -> None:
    """2 % of the variance lasts a hundred times as long as the rest and makes two thirds of the error of the mean."""
    fast, slow = (ornstein_uhlenbeck(400, 4000, tau=tau, seed=seed) for tau, seed in ((2.0, 10), (200.0, 11)))
    means = [series_mean(run) for run in fast + 0.15 * slow]
    assert 0.88 < np.mean([abs(mean.value) < 1.96 * mean.stderr for mean in means]) < 0.98


@pytest.mark.parametrize(("n_samples", "bias"), [(250, 0.35), (1000, 0.3)])
def test_sigma_is_that_of_the_mean_and_not_widened(n_samples: int, bias: float) -> None:
    """The mean of sigma^2 is the variance of the means, a quarter above it at most; that of stderr^2 is more."""
    runs = ornstein_uhlenbeck(800, n_samples, tau=5.0, seed=8)
    means = [series_mean(run) for run in runs]
    variance = np.var([mean.value for mean in means])
    assert np.mean([mean.sigma**2 for mean in means]) == pytest.approx(variance, rel=bias)
    assert np.mean([mean.stderr**2 for mean in means]) > 1.2 * variance


def test_intervals_cover_the_truth_after_equilibration() -> None:
    """From a start 50 standard deviations off, relaxing in three correlation times, as a density does."""
    runs = ornstein_uhlenbeck(300, 800, tau=10.0, seed=3) + 50.0 * np.exp(-np.arange(800) / 30.0)
    covered = []
    for run in runs:
        start = equilibration_start(run)
        if start is not None and (mean := series_mean(run[start:])).is_converged:
            covered.append(abs(mean.value) < 1.96 * mean.stderr)
    assert len(covered) > 250
    assert 0.90 < np.mean(covered) < 0.99


def test_replicas_that_disagree_widen_the_error() -> None:
    runs = ornstein_uhlenbeck(4, 2000, tau=5.0, seed=4)
    shifted = runs + np.array([-1.0, 1.0, -1.0, 1.0])[:, None]
    assert series_mean(runs).is_converged
    assert series_mean(shifted).stderr > 0.5 and not series_mean(shifted).is_converged


def test_equilibrated_series_keeps_its_samples() -> None:
    runs = ornstein_uhlenbeck(50, 2000, tau=5.0, seed=5)
    starts = [equilibration_start(run) for run in runs]
    assert np.median([2000 if start is None else start for start in starts]) < 100


def test_drift_longer_than_the_run_is_seen() -> None:
    drift = np.linspace(0.0, 30.0, 2000) + ornstein_uhlenbeck(2000, tau=5.0, seed=6)
    assert equilibration_start(drift) is None
    relaxing = 50.0 * np.exp(-np.arange(100_000) / 5000.0) + ornstein_uhlenbeck(100_000, tau=5.0, seed=7)
    start = equilibration_start(relaxing)
    assert start is not None and 20_000 < start < 45_000  # 50 exp(-4) = 0.9, 50 exp(-9) = 0.006 standard deviations


def test_spread_of_few_independent_values_covers_the_truth() -> None:
    values = np.random.default_rng(8).normal(size=(2000, 4))
    covered = [abs(four.mean()) < 1.96 * spread_stderr(four) for four in values]
    assert abs(np.mean(covered) - 0.95) < 3.0 * sqrt(0.95 * 0.05 / 2000)
    with pytest.raises(InputError, match="at least two"):
        spread_stderr(np.ones(1))


def estimate(value: float | None, stderr: float | None, n_effective: float = 10.0) -> Estimate:
    return Estimate(value, stderr, "g/cm3", n_effective, "mean", () if value is not None else ("too short",))


def test_combining_weights_by_samples() -> None:
    together = combine([estimate(1.0, 0.2, 30.0), estimate(1.4, 0.3, 10.0)])
    assert together.value == pytest.approx(1.1)
    assert together.stderr == pytest.approx(sqrt(0.75**2 * 0.04 + 0.25**2 * 0.09) * sqrt(0.25 + 1.0))
    assert together.n_effective == 40.0


def test_combining_warns_of_disagreement_and_of_missing_values() -> None:
    apart = combine([estimate(1.0, 0.01), estimate(1.2, 0.01)])
    assert apart.stderr == pytest.approx(0.01 / sqrt(2) * sqrt(200.0)) and "differ 14.1 times" in apart.warnings[0]
    partly = combine([estimate(1.0, 0.01), estimate(None, None)])
    assert partly.value == 1.0 and partly.warnings == ("1 of 2 runs gave no value", "too short")
    assert combine([estimate(None, None)]).value is None
    with pytest.raises(InputError, match="different units"):
        combine([estimate(1.0, 0.1), Estimate(1.0, 0.1, "kg/m3", 1.0, "mean")])


def test_series_with_gaps_are_refused() -> None:
    with pytest.raises(InputError, match="not finite"):
        series_mean([1.0, np.nan, 2.0])
    with pytest.raises(InputError, match="at least one sample"):
        series_mean(np.zeros((3, 0)))


def test_error_of_a_variance_covers_its_skewness() -> None:
    """Squares of a series of 30 correlation times: what comes out low has a low error and would miss the truth."""
    plain, widened = [], []
    for seed in range(500):
        mean = series_mean(ornstein_uhlenbeck(600, tau=10.0, seed=seed) ** 2)
        plain.append(abs(mean.value - 1.0) < 1.96 * mean.stderr)
        widened.append(abs(mean.value - 1.0) < 1.96 * variance_stderr(mean))
    assert np.mean(plain) < 0.925 and 0.93 < np.mean(widened) < 0.98
    low = SeriesMean(0.5, 0.1, 0.1, 50.0, 10.0)
    assert 0.5 + 1.96 * variance_stderr(low) == pytest.approx(0.5 * exp(1.96 * 0.1 / 0.5), rel=1e-4)


def test_a_mean_that_drifts_is_no_surer_than_what_its_halves_differ_by() -> None:
    """A line from 0 to 30 with noise: the second half has the mean 22.5, the halves differ by 15."""
    noise = ornstein_uhlenbeck(2000, tau=5.0, seed=6)
    mean, drifts = equilibrated_mean(np.linspace(0.0, 30.0, 2000) + noise)
    assert drifts and mean.value == pytest.approx(22.5, abs=0.3)
    assert mean.sigma == pytest.approx(7.5, abs=0.3) and mean.stderr >= mean.sigma
    still, drifts = equilibrated_mean(noise)
    assert not drifts and still.stderr < 0.3
