"""How often the 95 % intervals of the analysis hold the truth, over synthetic runs with known answers."""

from collections.abc import Callable
from math import exp, pi, sqrt, tanh

import numpy as np
from scipy.signal import lfilter
from validation_rows import Row, row

from bamboo import units
from md.analysis.conductivity import conductivity, green_kubo_conductivity
from md.analysis.density import density
from md.analysis.dielectric import dielectric_constant
from md.analysis.diffusion import self_diffusion
from md.analysis.estimate import Estimate
from md.analysis.statistics import series_mean
from md.analysis.viscosity import viscosity
from md.topology import Ensemble, Topology
from md.trajectory import THERMO, ThermoSeries, Trajectory

Run = Callable[[int], dict[str, tuple[Estimate, float]]]  # seed -> name -> (what the analysis says, the truth)
KT = units.BOLTZMANN * 300.0


def coverage(number: int, runs: dict[str, Run]) -> list[Row]:
    """Rows with the share of the synthetic runs with a value whose interval holds the truth."""
    rows = []
    for name, synthetic in runs.items():
        found: dict[str, list[bool | None]] = {}
        for seed in range(number):
            for key, (estimate, truth) in synthetic(seed).items():
                interval = estimate.interval()
                found.setdefault(key, []).append(None if interval is None else interval[0] <= truth <= interval[1])
        for key, hits in found.items():
            valued = [hit for hit in hits if hit is not None]
            share = sum(valued) / max(len(valued), 1)
            text = f"{100.0 * share:.1f} % of {len(valued)}; {len(hits) - len(valued)} without value"
            rows.append(row(f"coverage, {key or name}", text, "90-99 %", passed=0.9 <= share <= 0.99))
    return rows


def correlated(shape: tuple[int, ...], tau: float, seed: int) -> np.ndarray:
    """Ornstein-Uhlenbeck series along the first axis, unit variance, correlation time tau in samples."""
    decay = exp(-1.0 / tau)
    noise = np.random.default_rng(seed).standard_normal(shape) * sqrt(1.0 - decay**2)
    noise[0] /= sqrt(1.0 - decay**2)
    return np.asarray(lfilter([1.0], [1.0, -decay], noise, axis=0))


def mixture(shape: tuple[int, ...], parts: dict[float, float], seed: int) -> np.ndarray:
    """Sum of such series: parts {correlation time in samples: variance}."""
    series = [sqrt(share) * correlated(shape, tau, seed + 10**6 * k) for k, (tau, share) in enumerate(parts.items())]
    return np.asarray(sum(series))


# -- averages and fluctuations -----------------------------------------------------------------------------------


def mean_run(seed: int) -> dict[str, tuple[Estimate, float]]:
    mean = series_mean(correlated((4000, 2), 20.0, seed).T)
    return {"mean of a correlated series": (Estimate(mean.value, mean.stderr, "", mean.n_effective, ""), 0.0)}


def blank(n: int, interval_ps: float, ensemble: Ensemble) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    """Columns of a series of one replica at 300 K in 20 nm^3, all else zero, and what else a series needs."""
    columns: dict[str, np.ndarray] = {name: np.zeros((n, 1, *column.shape)) for name, column in THERMO.items()}
    columns |= {"temperature_K": np.full((n, 1), 300.0), "volume": np.full((n, 1), 2.0e4)}
    return columns, {"ensemble": ensemble, "time_ps": interval_ps * np.arange(n), "step": np.arange(n)}


def dipole_run(seed: int) -> dict[str, tuple[Estimate, float]]:
    """A dipole of 2 e Å per component that forgets itself in 4 ps, over 400 ps."""
    columns, rest = blank(4000, 0.1, Ensemble("nvt", "svr"))
    columns["dipole"] = 2.0 * correlated((4000, 1, 3), 40.0, seed)
    topology = Topology(np.array([8]), np.ones(1), np.zeros(1, dtype=np.int64), ("M",), np.zeros(1))
    truth = 1.0 + 4.0 * pi * units.COULOMB_CONSTANT * 12.0 / (3.0 * 2.0e4 * KT)
    estimate = dielectric_constant(ThermoSeries(**columns, **rest), topology)["dielectric_constant"]
    return {"dielectric constant": (estimate, truth)}


def volume_run(seed: int) -> dict[str, tuple[Estimate, float]]:
    """Volume and enthalpy as two correlated Gaussian processes of 2 ps, over 400 ps of constant pressure.

    var V = kappa kT <V> with kappa = 0.5/GPa; cov(V, H) = alpha k T^2 <V> with alpha = 1e-3/K.
    """
    kappa, alpha, mean = 0.5 / (1.0e9 * units.PASCAL), 1.0e-3, 2.0e4
    columns, rest = blank(8000, 0.05, Ensemble("npt", "svr", "c-rescale", pressure_bar=1.0))
    first, second = correlated((8000, 1, 2), 40.0, seed).transpose(2, 0, 1)
    spread = sqrt(kappa * KT * mean)
    columns["volume"] = mean + spread * first
    enthalpy = alpha * KT * 300.0 * mean / spread * first + 3.0 * second
    columns["potential_energy"] = enthalpy - units.BAR * columns["volume"]
    columns["density_g_cm3"] = 1.0e4 / columns["volume"]
    found = density(ThermoSeries(**columns, **rest))
    rho = 0.5 * (1.0 + (spread / mean) ** 2)
    return {
        "density": (found["density"], rho),
        "isothermal compressibility": (found["isothermal_compressibility"], 0.5),
        "thermal expansion": (found["thermal_expansion"], alpha),
    }


def slow_volume_run(seed: int) -> dict[str, tuple[Estimate, float]]:
    """Density of which 90 % of the variance forgets itself in 1 ps and 10 % in 50 ps, over 1 ns."""
    n, interval_ps = 5000, 0.2
    columns, rest = blank(n, interval_ps, Ensemble("npt", "svr", "c-rescale", pressure_bar=1.0))
    columns["density_g_cm3"] = 1.2 + 0.01 * mixture((n, 1), {5.0: 0.9, 250.0: 0.1}, seed)
    columns["volume"] = 2.4e4 / columns["density_g_cm3"]
    return {"density with a slow part": (density(ThermoSeries(**columns, **rest))["density"], 1.2)}


# -- transport ---------------------------------------------------------------------------------------------------

TAU = 10.0 * 0.005 * units.PICOSECOND  # of stress and current


def thermo(seed: int) -> ThermoSeries:
    """50 ps, a thousand correlation times, of stress and current, every 5 fs."""
    stress = correlated((10_000, 1, 5), 10.0, seed)
    return stressed(stress, charge_current=correlated((10_000, 1, 3), 10.0, seed + 10**6))


def stressed(five: np.ndarray, **others: np.ndarray) -> ThermoSeries:
    """Series every 5 fs with the five components (n, 1, 5) of the stress in meV/Å^3, and other columns."""
    columns, rest = blank(len(five), 0.005, Ensemble("nve"))
    xy, yz, zx, difference, axial = 1.0e-3 * np.moveaxis(five, -1, 0)
    zz = 2.0 * axial / sqrt(3.0)
    xx, yy = -0.5 * zz + difference, -0.5 * zz - difference
    rows = [[xx, xy, zx], [xy, yy, yz], [zx, yz, zz]]
    columns["pressure"] = np.stack([np.stack(r, axis=-1) for r in rows], axis=-2)
    return ThermoSeries(**columns | others, **rest)


def viscosity_run(seed: int) -> dict[str, tuple[Estimate, float]]:
    truth = 2.0e4 / KT * 1.0e-6 * TAU / units.MILLIPASCAL_SECOND
    return {"viscosity, Green-Kubo": (viscosity(thermo(seed))["viscosity"], truth)}


def slow_stress_run(seed: int) -> dict[str, tuple[Estimate, float]]:
    """Stress of three times, 4, 40 and 400 samples, the slowest with 54 % of the viscosity; 250 ps."""
    parts = {4.0: 0.9, 40.0: 0.08, 400.0: 0.02}
    integral = sum(share * 0.5 / tanh(0.5 / tau) for tau, share in parts.items())  # sum over samples, not integral
    truth = 2.0e4 / KT * 1.0e-6 * integral * 0.005 * units.PICOSECOND / units.MILLIPASCAL_SECOND
    estimate = viscosity(stressed(mixture((50_000, 1, 5), parts, seed)))["viscosity"]
    return {"viscosity of three times, Green-Kubo": (estimate, truth)}


def current_run(seed: int) -> dict[str, tuple[Estimate, float]]:
    truth = TAU / (2.0e4 * KT) / units.MILLISIEMENS_PER_CENTIMETRE
    estimate = green_kubo_conductivity(thermo(seed))["conductivity_green_kubo"]
    return {"conductivity, Green-Kubo": (estimate, truth)}


def ion_run(seed: int) -> dict[str, tuple[Estimate, float]]:
    """Four replicas of 2 x 20 independent walkers, 0.2 and 0.6 Å^2/ps, beside a heavy wall that holds the centre."""
    names = ("Li",) * 20 + ("F",) * 20 + ("C",) * 2
    n, d = len(names), np.array([0.2] * 20 + [0.6] * 20 + [0.0] * 2)
    charges = np.array([1.0] * 20 + [-1.0] * 20 + [0.0] * 2)
    topology = Topology(
        numbers=np.array([3] * 20 + [9] * 20 + [6] * 2), masses=np.array([7.0] * 40 + [1.0e9] * 2),
        molecule=np.arange(n), molecule_names=names, molecule_charges=charges,
    )  # fmt: skip
    trajectories = []
    for replica in range(4):
        generator = np.random.default_rng([seed, replica])
        steps = generator.standard_normal((2000, n, 3)) * np.sqrt(2.0 * d)[:, None]
        trajectories.append(
            Trajectory.from_arrays(
                np.cumsum(steps, axis=0),
                topology,
                time_ps=np.arange(2000.0),
                cells=30.0 * np.eye(3),
                ensemble=Ensemble("nve"),
            )
        )
    results = conductivity(trajectories, temperature_K=300.0)
    diffusion = self_diffusion(trajectories, temperature_K=300.0)
    per_time = 1.0 / units.PICOSECOND
    sigma = float((charges**2 * d).sum()) * per_time / (27000.0 * KT) / units.MILLISIEMENS_PER_CENTIMETRE
    return {
        "self-diffusion, Einstein": (diffusion["diffusion_Li_box"], 0.2 * per_time / units.CM2_PER_SECOND),
        "conductivity, Einstein": (results["conductivity"], sigma),
        "conductivity, Nernst-Einstein": (results["conductivity_nernst_einstein"], sigma),
        "ionicity": (results["ionicity"], 1.0),
        "transference number": (results["transference_Li_solvent"], 0.25),
    }


def cage_run(seed: int) -> dict[str, tuple[Estimate, float]]:
    """40 walkers, 0.02 Å^2/ps, in cages of 3 Å^2 that relax in a hundredth, thirtieth and tenth of one run of 4 ns."""
    n, per_time = 40, units.CM2_PER_SECOND * units.PICOSECOND
    topology = Topology(np.full(n + 1, 18), np.array([40.0] * n + [1.0e9]), np.arange(n + 1),
                        ("Ar",) * n + ("C",), np.zeros(n + 1))  # fmt: skip
    walk = np.cumsum(np.random.default_rng(seed).normal(scale=0.2, size=(4000, n, 3)), axis=0)
    found = {}
    for share in (100, 30, 10):
        cage = sqrt(3.0) * correlated((4000, n, 3), 4000.0 / share, seed + share * 10**6)
        positions = np.concatenate([walk + cage, np.zeros((4000, 1, 3))], axis=1)
        trajectory = Trajectory.from_arrays(
            positions, topology, time_ps=np.arange(4000.0), cells=30.0 * np.eye(3), ensemble=Ensemble("nve")
        )
        estimate = self_diffusion([trajectory], temperature_K=300.0)["diffusion_Ar_box"]
        found[f"self-diffusion in a cage of 1/{share} of the run"] = (estimate, 0.02 / per_time)
    return found


AVERAGES: dict[str, Run] = {
    "mean": mean_run,
    "dielectric constant": dipole_run,
    "density": volume_run,
    "density with a slow part": slow_volume_run,
}
TRANSPORT: dict[str, Run] = {
    "viscosity, Green-Kubo": viscosity_run,
    "viscosity of three times": slow_stress_run,
    "ions": ion_run,
    "cages": cage_run,
    "conductivity, Green-Kubo": current_run,
}
