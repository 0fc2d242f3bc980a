"""Charge transport by ions that move by known laws."""

from collections.abc import Callable
from dataclasses import replace
from math import sqrt

import numpy as np
import pytest
from scipy.signal import lfilter

from bamboo import units
from md.analysis.conductivity import conductivity, green_kubo_conductivity
from md.trajectory import Ensemble, ThermoSeries, Trajectory

MakeTrajectory = Callable[..., Trajectory]
TEMPERATURE_K, N_PAIRS, N_FRAMES = 300.0, 30, 4000
D_CATION, D_ANION = 0.2, 0.6  # Å^2/ps, frames every ps
WALL = 1.0e9  # amu; a molecule at rest that holds the centre of mass


def walks(n_particles: int, diffusion: float, rng: np.random.Generator) -> np.ndarray:
    return np.cumsum(rng.normal(scale=sqrt(2.0 * diffusion), size=(N_FRAMES, n_particles, 3)), axis=0)


def electrolyte(
    make: MakeTrajectory, cations: np.ndarray, anions: np.ndarray, *, solvent: np.ndarray | None = None,
    ensemble: Ensemble | None = None, charge: float = 1.0,
) -> Trajectory:  # fmt: skip
    """Ions, a solvent (at rest unless given) and a heavy molecule at rest; 30 Å box. The wall is salt, not solvent."""
    n = cations.shape[1]
    solvent = np.zeros((N_FRAMES, 5, 3)) if solvent is None else solvent
    wall = np.zeros((N_FRAMES, 2, 3))
    names = ["Li"] * n + ["F"] * n + ["C"] * 5 + ["plus", "minus"]
    charges = [charge] * n + [-charge] * n + [0.0] * 5 + [1.0, -1.0]
    masses = [7.0] * n + [19.0] * n + [90.0] * 5 + [WALL] * 2
    tracks = np.concatenate([cations, anions, solvent, wall], axis=1)
    return make(tracks, names, charges=charges, masses=masses, ensemble=ensemble)


def exact_mS_cm(sum_q2_d: float) -> float:
    """sum_i q_i^2 D_i / (V k_B T) by hand in SI: D in 1e-8 m^2/s per Å^2/ps, V = 27 nm^3, S/m -> 10 mS/cm."""
    e, boltzmann = 1.602176634e-19, 1.380649e-23
    return 10.0 * e**2 * sum_q2_d * 1.0e-8 / (27.0e-27 * boltzmann * TEMPERATURE_K)


def test_independent_ions_conduct_as_nernst_and_einstein_say(make_trajectory: MakeTrajectory) -> None:
    trajectories = []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        trajectories.append(electrolyte(make_trajectory, walks(N_PAIRS, D_CATION, rng), walks(N_PAIRS, D_ANION, rng)))
    results = conductivity(trajectories, temperature_K=TEMPERATURE_K)
    exact = exact_mS_cm(N_PAIRS * (D_CATION + D_ANION))
    fraction = D_CATION / (D_CATION + D_ANION)
    expected = {
        "conductivity": (exact, 0.1),
        "conductivity_nernst_einstein": (exact, 0.02),
        "ionicity": (1.0, 0.1),
        "transference_Li_barycentric": (fraction, 0.1),
        "transference_F_barycentric": (1.0 - fraction, 0.1),
        "transference_Li_solvent": (fraction, 0.1),
    }
    for name, (value, precision) in expected.items():
        result = results[name]
        assert result.value is not None and result.stderr is not None, name
        assert result.stderr < precision * (exact if name.startswith("conductivity") else 1.0), name
        assert abs(result.value - value) < 3.0 * result.stderr, name
    assert results["conductivity"].unit == "mS/cm" and results["ionicity"].unit == ""
    ions = [results[f"transference_{name}_barycentric"].value for name in ("Li", "F", "plus", "minus")]
    assert sum(value for value in ions if value is not None) == pytest.approx(1.0, abs=1.0e-6)


def test_paired_ions_carry_no_current(make_trajectory: MakeTrajectory) -> None:
    rng = np.random.default_rng(5)
    pairs = walks(N_PAIRS, D_CATION, rng)
    results = conductivity([electrolyte(make_trajectory, pairs, pairs + 2.0)], temperature_K=TEMPERATURE_K)
    single = results["conductivity_nernst_einstein"]
    assert single.value == pytest.approx(exact_mS_cm(2 * N_PAIRS * D_CATION), rel=0.05)
    assert results["conductivity"].value == pytest.approx(0.0, abs=1.0e-6 * float(single.value))
    assert results["ionicity"].value == pytest.approx(0.0, abs=1.0e-6)
    assert results["transference_Li_barycentric"].value is None


def test_rattling_pairs_carry_no_steady_current(make_trajectory: MakeTrajectory) -> None:
    """Their dipoles fluctuate by 1 Å, a bounded collective displacement: sigma is 0 within a small error."""
    rng = np.random.default_rng(6)
    pairs = walks(N_PAIRS, D_CATION, rng)
    anions = pairs + rng.normal(scale=1.0, size=pairs.shape)
    results = conductivity([electrolyte(make_trajectory, pairs, anions)], temperature_K=TEMPERATURE_K)
    sigma, single = results["conductivity"], results["conductivity_nernst_einstein"].value
    assert sigma.value is not None and sigma.stderr is not None and single is not None
    assert abs(sigma.value) < max(3.0 * sigma.stderr, 0.02 * single) and sigma.stderr < 0.1 * single


def test_pairs_that_part_slowly_do_not_conduct_as_free_ions(make_trajectory: MakeTrajectory) -> None:
    """Distances that relax in a twentieth of the run: early slopes give 2.5 times sigma, 1.3 times Nernst-Einstein."""
    exact = {"conductivity": exact_mS_cm(8 * D_CATION), "conductivity_nernst_einstein": exact_mS_cm(8 * D_CATION + 2.4)}
    misses = dict.fromkeys(exact, 0)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        centres, free = walks(16, 0.075, rng), walks(8, D_CATION, rng)
        decay = np.exp(-1.0 / 200.0)
        steps = rng.normal(scale=sqrt(30.0 * (1.0 - decay**2)), size=centres.shape)
        steps[0] /= sqrt(1.0 - decay**2)
        distance = lfilter([1.0], [1.0, -decay], steps, axis=0)
        cations = np.concatenate([centres + 0.5 * distance, free[:, :4]], axis=1)
        anions = np.concatenate([centres - 0.5 * distance, free[:, 4:]], axis=1)
        results = conductivity([electrolyte(make_trajectory, cations, anions)], temperature_K=TEMPERATURE_K)
        for name, value in exact.items():
            interval = results[name].interval()
            misses[name] += interval is not None and not interval[0] <= value <= interval[1]
    assert max(misses.values()) <= 3, misses


def test_charge_enters_squared(make_trajectory: MakeTrajectory) -> None:
    ions = []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        ions.append((walks(N_PAIRS, D_CATION, rng), walks(N_PAIRS, D_ANION, rng)))
    one, two = (
        conductivity([electrolyte(make_trajectory, *pair, charge=q) for pair in ions], temperature_K=TEMPERATURE_K)
        for q in (1.0, 2.0)
    )
    for name in ("conductivity", "conductivity_nernst_einstein"):
        assert one[name].value is not None
        assert two[name].value == pytest.approx(4.0 * float(one[name].value or 0.0), rel=1.0e-9)


def test_transference_depends_on_the_frame(make_trajectory: MakeTrajectory) -> None:
    """Solvent molecules that ride on the cations, s = c <r_cation>: its frame takes c of their motion from both ions.

    M_Li' = sum r_Li - N s = (1 - c) M_Li, M = M_Li + M_F unchanged: t_Li' = (1 - c) t_Li.
    """
    rng = np.random.default_rng(8)
    cations, anions = walks(N_PAIRS, D_CATION, rng), walks(N_PAIRS, D_ANION, rng)
    solvent = np.repeat(0.4 * cations.mean(axis=1, keepdims=True), 5, axis=1)
    trajectory = electrolyte(make_trajectory, cations, anions, solvent=solvent)
    results = conductivity([trajectory], temperature_K=TEMPERATURE_K)
    barycentric, relative = results["transference_Li_barycentric"].value, results["transference_Li_solvent"].value
    assert barycentric is not None and relative is not None
    assert relative == pytest.approx(0.6 * barycentric, rel=1.0e-5)


def test_short_runs_have_no_conductivity(make_trajectory: MakeTrajectory) -> None:
    rng = np.random.default_rng(9)
    full = electrolyte(make_trajectory, walks(2, D_CATION, rng), walks(2, D_ANION, rng))
    short = make_trajectory(
        full.positions[:90], list(full.topology.molecule_names), charges=list(full.topology.molecule_charges)
    )
    for estimate in conductivity([short], temperature_K=TEMPERATURE_K).values():
        assert estimate.value is None and "not converged" in estimate.warnings[0]


@pytest.mark.parametrize(
    ("ensemble", "reason"),
    [(Ensemble("nvt", "langevin"), "Langevin friction"), (Ensemble("npt", "svr", barostat="mtk"), "NPT")],
)
def test_damped_and_constant_pressure_runs_are_refused(
    make_trajectory: MakeTrajectory, ensemble: Ensemble, reason: str
) -> None:
    ions = walks(2, D_CATION, np.random.default_rng(10))
    trajectory = electrolyte(make_trajectory, ions, ions, ensemble=ensemble)
    estimate = conductivity([trajectory], temperature_K=TEMPERATURE_K)["conductivity"]
    assert estimate.value is None and reason in estimate.warnings[0]


def test_liquids_without_ions_and_charged_boxes_are_refused(make_trajectory: MakeTrajectory) -> None:
    tracks = walks(4, D_CATION, np.random.default_rng(11))
    neutral = conductivity([make_trajectory(tracks, ["C"] * 4)], temperature_K=TEMPERATURE_K)["conductivity"]
    assert neutral.value is None and "no ions" in neutral.warnings[0]
    charged = make_trajectory(tracks, ["Li"] * 4, charges=[1.0] * 4)
    refused = conductivity([charged], temperature_K=TEMPERATURE_K)["conductivity"]
    assert refused.value is None and "+4 e" in refused.warnings[0]


def caged_current(n_samples: int, *, interval_ps: float, seed: int) -> np.ndarray:
    """White noise of spectral density 1 at zero frequency plus rattling: white noise minus its moving average.

    The running sum of the second part is bounded by its average, so it adds nothing to the steady current.
    """
    rng = np.random.default_rng(seed)
    white = rng.normal(size=(n_samples, 2, 3))
    rattle = rng.normal(size=(n_samples + 1, 2, 3))
    decay = np.exp(-interval_ps / 0.1)
    average = np.empty_like(rattle)
    average[0] = 0.0
    for k in range(n_samples):
        average[k + 1] = decay * average[k] + (1.0 - decay) * rattle[k]
    return white + 3.0 * (rattle[1:] - average[1:])


def test_green_kubo_sees_through_rattling() -> None:
    """2 x integral = variance of the white part x interval: sigma = h / (2 V k_B T)."""
    interval_ps, volume, n_samples = 0.01, 27_000.0, 6000
    current = caged_current(n_samples, interval_ps=interval_ps, seed=12)
    shape = (n_samples, 2)
    zero = np.zeros(shape)
    thermo = ThermoSeries(
        ensemble=Ensemble("nve"), time_ps=interval_ps * np.arange(n_samples), step=np.arange(n_samples),
        temperature_K=np.full(shape, TEMPERATURE_K), volume=np.full(shape, volume), density_g_cm3=zero,
        potential_energy=zero, kinetic_energy=zero, conserved_energy=zero,
        pressure=np.zeros((*shape, 3, 3)), charge_current=current, dipole=np.zeros((*shape, 3)),
    )  # fmt: skip
    result = green_kubo_conductivity(thermo)["conductivity_green_kubo"]
    internal = 0.5 * interval_ps * units.PICOSECOND / (volume * units.BOLTZMANN * TEMPERATURE_K)
    exact = internal / units.MILLISIEMENS_PER_CENTIMETRE
    assert result.value is not None and result.stderr is not None
    assert result.stderr < 0.25 * exact
    assert abs(result.value - exact) < 3.0 * result.stderr
    refused = green_kubo_conductivity(replace(thermo, ensemble=Ensemble("nvt", "langevin")))
    assert "Langevin" in refused["conductivity_green_kubo"].warnings[0]
