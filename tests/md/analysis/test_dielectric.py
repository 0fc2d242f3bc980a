"""The dielectric constant from processes whose dipole fluctuations are known."""

from collections.abc import Callable
from math import exp, pi, sqrt

import numpy as np
import pytest
from scipy.signal import lfilter

from bamboo import units
from md.analysis.dielectric import dielectric_constant
from md.topology import Ensemble, Topology
from md.trajectory import THERMO, ThermoSeries

VOLUME, TEMPERATURE_K, INTERVAL_PS = 2.0e4, 300.0, 0.1
NVT = Ensemble("nvt", "svr", thermostat_time_ps=1.0)


def liquid(*, charges: tuple[float, ...] = (0.0, 0.0)) -> Topology:
    n = len(charges)
    return Topology(
        numbers=np.full(n, 8), masses=np.ones(n), molecule=np.arange(n),
        molecule_names=tuple(f"M{charge:g}" for charge in charges), molecule_charges=np.array(charges),
    )  # fmt: skip


def series(dipole: np.ndarray, *, ensemble: Ensemble = NVT, volume: float = VOLUME) -> ThermoSeries:
    """A thermo series with dipoles (n_samples, n_replicas, 3) [e Å]."""
    n, replicas, _ = dipole.shape
    columns = {name: np.zeros((n, replicas, *column.shape)) for name, column in THERMO.items()}
    columns |= {"temperature_K": np.full((n, replicas), TEMPERATURE_K), "volume": np.full((n, replicas), volume)}
    columns["dipole"] = dipole
    return ThermoSeries(ensemble=ensemble, time_ps=INTERVAL_PS * np.arange(n), step=np.arange(n), **columns)


def expected(mean_square: float) -> float:
    """eps in Gaussian units with e^2 = k_e: 1 + 4 pi <M^2> / (3 V kT)."""
    return 1.0 + 4.0 * pi * 14.399645 * mean_square / (3.0 * VOLUME * 8.617333e-5 * TEMPERATURE_K)


@pytest.fixture(scope="module")
def wandering() -> Callable[..., np.ndarray]:
    """Return a function that draws dipoles with <M^2> = 3 amplitude^2 and correlation time tau [samples]."""

    def draw(seed: int, *, amplitude: float, tau: float, n: int = 4000, replicas: int = 1) -> np.ndarray:
        decay = exp(-1.0 / tau)
        noise = np.random.default_rng(seed).standard_normal((n, replicas, 3)) * sqrt(1.0 - decay**2)
        noise[0] /= sqrt(1.0 - decay**2)
        return amplitude * np.asarray(lfilter([1.0], [1.0, -decay], noise, axis=0))

    return draw


def test_independent_dipoles_have_the_dielectric_constant_of_an_ideal_gas():
    """N free rotors of moment mu: <M^2> = N mu^2 exactly, whatever their rotational diffusion."""
    n_rotors, moment, generator = 30, 0.4, np.random.default_rng(3)
    axis = generator.standard_normal((n_rotors, 3))
    dipole = np.empty((6000, 1, 3))
    for index in range(len(dipole)):
        axis += 0.25 * generator.standard_normal(axis.shape)
        axis /= np.linalg.norm(axis, axis=1, keepdims=True)
        dipole[index, 0] = moment * axis.sum(axis=0)
    found = dielectric_constant(series(dipole), liquid())["dielectric_constant"]
    low, high = found.interval()
    assert low < expected(n_rotors * moment**2) < high
    assert found.stderr < 0.1 * found.value and found.n_effective > 100 and found.unit == ""


def test_interval_covers_the_truth_also_in_short_runs(wandering):
    """95 % intervals over 200 runs of some 40 and of some 400 correlation times."""
    truth = expected(3.0 * 2.0**2)
    for tau, replicas in ((100.0, 2), (10.0, 1)):
        hits = []
        for seed in range(200):
            found = dielectric_constant(series(wandering(seed, amplitude=2.0, tau=tau, replicas=replicas)), liquid())
            low, high = found["dielectric_constant"].interval()
            hits.append(low <= truth <= high)
        assert 0.9 <= np.mean(hits) <= 0.99


def test_replicas_narrow_the_error(wandering):
    one, four = (
        dielectric_constant(series(wandering(1, amplitude=1.0, tau=10.0, replicas=r)), liquid())["dielectric_constant"]
        for r in (1, 4)
    )
    assert four.stderr == pytest.approx(0.5 * one.stderr, rel=0.3)


def test_a_dipole_that_has_not_turned_round_gives_no_value(wandering):
    slow = dielectric_constant(series(wandering(1, amplitude=1.0, tau=2000.0)), liquid())["dielectric_constant"]
    assert slow.value is None and slow.warnings[0].startswith("not converged") and "run about" in slow.warnings[0]
    frozen = wandering(1, amplitude=0.1, tau=5.0, replicas=2) + np.array([[1.0, -2.0, 0.5], [2.0, 1.0, -1.5]])
    assert dielectric_constant(series(frozen), liquid())["dielectric_constant"].value is None


def test_refusals_name_their_reason(wandering):
    dipole = wandering(1, amplitude=1.0, tau=10.0)
    cases = [
        (series(dipole), liquid(charges=(1.0, -1.0)), "M1, M-1 carry charge"),
        (series(dipole, ensemble=Ensemble("nve")), liquid(), "nve"),
        (series(dipole, volume=np.nan), liquid(), "no cell"),
        (series(dipole * np.nan), liquid(), "no dipoles"),
        (series(0.0 * dipole), liquid(), "no charges"),
    ]
    for thermo, topology, text in cases:
        found = dielectric_constant(thermo, topology)["dielectric_constant"]
        assert found.value is None and text in found.warnings[0]


def test_unit_of_the_dipole():
    """Water's 1.85 debye, 33.3 molecules per nm^3 and 298 K: y = 4 pi rho mu^2 / 9kT = 1.17 with free molecules."""
    moment = 1.85 * units.DEBYE
    generator = np.random.default_rng(5)
    dipole = generator.standard_normal((20000, 1, 3)) * sqrt(100 / 3.0) * moment  # 100 molecules, no memory
    found = dielectric_constant(series(dipole, volume=100 / 0.0333), liquid())["dielectric_constant"]
    y = (
        4.0 * pi * 0.0333e24 * (1.85e-18) ** 2 / (9.0 * 1.380649e-16 * TEMPERATURE_K)
    )  # Gaussian units, cm^-3 and esu cm
    assert found.value == pytest.approx(1.0 + 3.0 * y, rel=0.02)
