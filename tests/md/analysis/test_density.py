"""Density and fluctuations of synthetic constant-pressure runs with known answers."""

from math import exp, sqrt

import numpy as np
import pytest
from scipy.signal import lfilter

from bamboo import units
from md.analysis.density import density
from md.trajectory import Ensemble, ThermoSeries

NPT = Ensemble("npt", "svr", barostat="mtk", pressure_bar=1000.0)
TEMPERATURE_K, VOLUME, MASS = 300.0, 20_000.0, 15_000.0
COMPRESSIBILITY_PER_GPA = 0.5
EXPANSION_PER_K = 1.1e-3


def ornstein_uhlenbeck(shape: tuple[int, int], tau: float, seed: int) -> np.ndarray:
    decay = exp(-1.0 / tau)
    noise = np.random.default_rng(seed).standard_normal(shape) * sqrt(1.0 - decay**2)
    noise[0] /= sqrt(1.0 - decay**2)
    return lfilter([1.0], [1.0, -decay], noise, axis=0)


def npt_run(
    length_ps: float, *, n_replicas: int = 1, tau_ps: float = 1.0, seed: int = 0, transient: float = 0.0,
    transient_ps: float = 10.0, ensemble: Ensemble = NPT,
) -> ThermoSeries:  # fmt: skip
    """Volumes with <dV^2> = kappa k_B T V and enthalpies with <dV dH> = alpha k_B T^2 V; decay times in ps."""
    interval_ps = 0.1
    n_samples = round(length_ps / interval_ps)
    shape, thermal = (n_samples, n_replicas), units.BOLTZMANN * TEMPERATURE_K
    noise = ornstein_uhlenbeck(shape, tau_ps / interval_ps, seed)
    compressibility = COMPRESSIBILITY_PER_GPA / (1.0e9 * units.PASCAL)
    width = sqrt(compressibility * thermal * VOLUME)
    time_ps = interval_ps * np.arange(n_samples)
    volume = VOLUME + width * noise + transient * np.exp(-time_ps / transient_ps)[:, None]
    slope = EXPANSION_PER_K * TEMPERATURE_K / compressibility
    enthalpy = slope * (volume - VOLUME) + ornstein_uhlenbeck(shape, 3.0, seed + 1)
    kinetic = np.full(shape, 50.0)
    return ThermoSeries(
        ensemble=ensemble, time_ps=time_ps, step=np.arange(n_samples), temperature_K=np.full(shape, TEMPERATURE_K),
        volume=volume, density_g_cm3=MASS / volume / units.GRAM_PER_CM3, kinetic_energy=kinetic,
        potential_energy=enthalpy - kinetic - 1000.0 * units.BAR * volume, conserved_energy=np.zeros(shape),
        pressure=np.zeros((*shape, 3, 3)), charge_current=np.zeros((*shape, 3)), dipole=np.zeros((*shape, 3)),
    )  # fmt: skip


def test_density_and_fluctuations_of_a_long_run() -> None:
    results = density(npt_run(4000.0, n_replicas=4, transient=8000.0))
    exact = {
        "density": MASS / VOLUME * 1.66053906660,  # 1 amu/Å^3 = 1.66054 g/cm3
        "isothermal_compressibility": COMPRESSIBILITY_PER_GPA,
        "thermal_expansion": EXPANSION_PER_K,
    }
    assert {name: result.unit for name, result in results.items()} == {
        "density": "g/cm3",
        "isothermal_compressibility": "1/GPa",
        "thermal_expansion": "1/K",
    }
    for name, value in exact.items():
        result = results[name]
        assert result.value is not None and result.stderr is not None
        assert result.stderr < 0.05 * value
        assert abs(result.value - value) < 3.0 * result.stderr, name
    # <1/V> differs from 1/<V> by kappa k_B T / V = 6e-5, well below what is asked of the density here
    assert results["density"].stderr == pytest.approx(1.2454 * 0.01 * sqrt(2.0 / 16000.0), rel=0.3)


def test_transient_is_discarded() -> None:
    """A box that starts at 60 % of its density, as a packed box does; keeping the start would shift the mean by 2 %."""
    result = density(npt_run(500.0, transient=12_000.0, seed=3))["density"]
    assert result.value is not None and result.stderr is not None
    assert abs(result.value - 1.24540) < 3.0 * result.stderr
    assert "discarded" in result.warnings[0]


@pytest.mark.parametrize("length_ps", [5.0, 40.0])
def test_a_short_run_has_no_density(length_ps: float) -> None:
    """Correlation time 1 ps: 40 ps hold the twenty independent samples, but are too short for a liquid to relax."""
    for result in density(npt_run(length_ps, seed=4)).values():
        assert result.value is None and result.stderr is None
        assert result.warnings[0].startswith("not converged") and "run about" in result.warnings[0]


def test_slow_relaxation_is_not_called_equilibrium() -> None:
    result = density(npt_run(100.0, transient=12_000.0, transient_ps=100.0, seed=5))["density"]
    assert result.value is None
    assert "still drifts" in result.warnings[0] and "unequilibrated mean" in result.warnings[0]


def test_runs_of_few_correlation_times_rarely_report_a_wrong_density() -> None:
    """100 ps with a correlation time of 2 tau = 16 ps: six independent samples, and no run knows that from itself."""
    results = [density(npt_run(100.0, tau_ps=8.0, seed=300 + seed))["density"] for seed in range(100)]
    intervals = [interval for result in results if (interval := result.interval()) is not None]
    assert len(intervals) < 25
    assert sum(not low < 1.24540 < high for low, high in intervals) <= 8


def test_density_of_constant_volume_is_refused() -> None:
    results = density(npt_run(100.0, ensemble=Ensemble("nvt", "svr")))
    assert all(result.value is None and "volume is fixed" in result.warnings[0] for result in results.values())


def test_intervals_cover_the_truth() -> None:
    """80 ps hold 40 independent volumes: few enough for the skewness of a variance to show in its coverage."""
    exact = {
        "density": 1.24540 + 7.5e-5,  # <1/V> = (1 + kappa k_B T / V) / V
        "isothermal_compressibility": COMPRESSIBILITY_PER_GPA,
        "thermal_expansion": EXPANSION_PER_K,
    }
    covered: dict[str, list[bool]] = {name: [] for name in exact}
    for seed in range(200):
        results = density(npt_run(80.0, seed=100 + seed, transient=1000.0, transient_ps=3.0))
        for name, value in exact.items():
            if (interval := results[name].interval()) is not None:
                covered[name].append(interval[0] < value < interval[1])
    for name, hits in covered.items():
        assert len(hits) > 150
        assert 0.90 <= np.mean(hits) <= 0.99, name
