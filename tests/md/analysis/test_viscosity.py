"""Viscosity of synthetic stress: an Ornstein-Uhlenbeck process has eta = V sigma^2 tau / (k_B T)."""

from dataclasses import replace
from math import exp, sqrt

import numpy as np
import pytest
from scipy.signal import lfilter

from bamboo import units
from md.analysis.viscosity import deviatoric_components, viscosity
from md.trajectory import Ensemble, ThermoSeries

TEMPERATURE_K, VOLUME = 300.0, 20_000.0
INTERVAL_PS, TAU_PS = 0.005, 0.05
SIGMA = 1.0e-3  # eV/Å^3


def ornstein_uhlenbeck(shape: tuple[int, ...], tau_ps: float, seed: int) -> np.ndarray:
    decay = exp(-INTERVAL_PS / tau_ps)
    noise = np.random.default_rng(seed).standard_normal(shape) * sqrt(1.0 - decay**2)
    noise[0] /= sqrt(1.0 - decay**2)
    return lfilter([1.0], [1.0, -decay], noise, axis=0)


def stress_of(five: np.ndarray) -> np.ndarray:
    """Symmetric tensors (..., 3, 3) with the five given components and a noisy trace."""
    xy, yz, zx, difference, axial = np.moveaxis(five, -1, 0)
    trace = np.random.default_rng(99).normal(scale=5.0 * SIGMA, size=xy.shape)
    zz = axial / sqrt(3.0) * 2.0
    xx, yy = -0.5 * zz + difference, -0.5 * zz - difference
    rows = [[xx + trace, xy, zx], [xy, yy + trace, yz], [zx, yz, zz + trace]]
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def run(n_samples: int, *, n_replicas: int = 1, seed: int = 0, slow_ps: float = 0.0) -> ThermoSeries:
    five = SIGMA * ornstein_uhlenbeck((n_samples, n_replicas, 5), TAU_PS, seed)
    if slow_ps:
        five += 0.3 * SIGMA * ornstein_uhlenbeck((n_samples, n_replicas, 5), slow_ps, seed + 1)
    shape = (n_samples, n_replicas)
    zero = np.zeros(shape)
    return ThermoSeries(
        ensemble=Ensemble("nvt", "svr"), time_ps=INTERVAL_PS * np.arange(n_samples), step=np.arange(n_samples),
        temperature_K=np.full(shape, TEMPERATURE_K), volume=np.full(shape, VOLUME), density_g_cm3=zero,
        potential_energy=zero, kinetic_energy=zero, conserved_energy=zero,
        pressure=stress_of(five), charge_current=np.zeros((*shape, 3)), dipole=np.zeros((*shape, 3)),
    )  # fmt: skip


def exact_mPa_s() -> float:
    """V sigma^2 tau / (k_B T) by hand in SI; sampling every tau / 10 exceeds the integral by 0.08 %."""
    e, angstrom, boltzmann = 1.602176634e-19, 1.0e-10, 1.380649e-23
    sigma_Pa = SIGMA * e / angstrom**3
    return 1.0e3 * VOLUME * angstrom**3 / (boltzmann * TEMPERATURE_K) * sigma_Pa**2 * TAU_PS * 1.0e-12


def test_five_components_are_orthonormal() -> None:
    """Isotropy: each carries the variance of xy, and any rotation keeps the sum of the five squares."""
    tensor = np.random.default_rng(1).normal(size=(50, 2, 3, 3))
    five = deviatoric_components(tensor)
    assert five.shape == (2, 5, 50)
    symmetric = 0.5 * (tensor + np.swapaxes(tensor, -1, -2))
    traceless = symmetric - np.trace(symmetric, axis1=-2, axis2=-1)[..., None, None] * np.eye(3) / 3.0
    np.testing.assert_allclose((five**2).sum(axis=1).T, 0.5 * (traceless**2).sum(axis=(-2, -1)))
    given = np.random.default_rng(2).normal(size=(50, 2, 5))
    np.testing.assert_allclose(deviatoric_components(stress_of(given)), given.transpose(1, 2, 0), atol=1.0e-12)


def test_viscosity_of_an_ornstein_uhlenbeck_stress() -> None:
    estimate = viscosity(run(8000, n_replicas=2, seed=3))["viscosity"]
    assert estimate.value is not None and estimate.stderr is not None and estimate.unit == "mPa s"
    assert estimate.stderr < 0.08 * estimate.value
    assert abs(estimate.value - exact_mPa_s()) < 2.5 * estimate.stderr


def test_slow_mode_beyond_the_run_is_noticed() -> None:
    """A mode of 20 ps carries 97 % of this viscosity; 20 ps of data must not report the 3 % they resolve."""
    estimate = viscosity(run(4000, seed=5, slow_ps=20.0))["viscosity"]
    assert estimate.value is None and "not converged" in estimate.warnings[0]


def test_runs_that_carry_no_viscosity_are_refused() -> None:
    thermo = run(400)
    for ensemble, reason in (
        (Ensemble("nvt", "langevin"), "Langevin friction"),
        (Ensemble("npt", "svr", barostat="mtk"), "NPT"),
    ):
        refused = viscosity(replace(thermo, ensemble=ensemble))["viscosity"]
        assert refused.value is None and reason in refused.warnings[0]
    rare = viscosity(replace(thermo, time_ps=thermo.time_ps * 4.0))["viscosity"]
    assert rare.value is None and rare.warnings[0] == "pressure sampled every 20 fs, Green-Kubo needs 10 fs or less"
    short = viscosity(run(50))["viscosity"]
    assert short.value is None and "only 50 samples" in short.warnings[0]


def test_units_of_the_reference() -> None:
    internal = VOLUME / (units.BOLTZMANN * TEMPERATURE_K) * SIGMA**2 * TAU_PS * units.PICOSECOND
    assert internal / units.MILLIPASCAL_SECOND == pytest.approx(exact_mPa_s(), rel=1.0e-6)
