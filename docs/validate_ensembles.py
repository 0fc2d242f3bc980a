"""Checks of the engine on argon-like liquids and an ideal gas: ensembles, equipartition, conservation of energy."""

from math import sqrt
from typing import Any

import numpy as np
import reference_liquids as liquids
import torch
from validation_rows import Row, row

from bamboo import units
from bamboo.system import Batch, System
from md.analysis.statistics import series_mean
from md.engine.barostats import MartynaTobiasKlein, StochasticCellRescaling
from md.engine.integrators import Integrator, Langevin, NoseHooverChain, StochasticVelocityRescaling, VelocityVerlet
from md.engine.simulation import Simulation
from md.engine.state import MDState

THERMOSTATS = (StochasticVelocityRescaling, NoseHooverChain, Langevin)
BAROSTATS = (StochasticCellRescaling, MartynaTobiasKlein)
SAMPLE = 10  # steps between samples


class SmallArgon(liquids.Argon):
    """Lennard-Jones switched smoothly to zero between 4 and 5.2 Å, for boxes of 32 atoms; argon and carbon alike."""

    NUMBERS, CHARGES = (6, 18), (0.0, 0.0)
    START = 4.0

    def __init__(self) -> None:
        super().__init__()
        self.cutoff = 5.2

    def pair(self, r: float, kinds: int) -> tuple[float, float]:
        energy, strength = super().pair(r, kinds)
        if r < self.START:
            return energy, strength
        c, s, x = self.cutoff**2, self.START**2, r**2
        switch = (c - x) ** 2 * (c + 2.0 * x - 3.0 * s) / (c - s) ** 3
        slope = 6.0 * (c - x) * (s - x) / (c - s) ** 3  # by r^2
        return energy * switch, strength * switch - 2.0 * energy * slope


class IdealGas:
    """No forces."""

    def evaluate(self, batch: Batch) -> Any:
        n, zeros = batch.n_systems, torch.zeros_like(batch.positions)
        return liquids.Output(zeros.new_zeros(n), zeros, zeros.new_zeros(n, 3, 3), zeros.new_zeros(batch.n_atoms))


def sample(
    box: System, potential: Any, integrator: Integrator, *, temperature_K: float, n_steps: int, n_replicas: int,
    names: tuple[str, ...], seed: int = 7,
) -> list[np.ndarray]:  # fmt: skip
    """Series (n_replicas, n_samples) of quantities of the state, after half as many steps of equilibration."""
    state = MDState.from_systems([box] * n_replicas, temperature_K=temperature_K, seed=seed)
    simulation = Simulation(state, potential, integrator=integrator)
    simulation.run(n_steps // 2)
    values: list[list[np.ndarray]] = []
    for _ in range(n_steps // SAMPLE):
        simulation.run(SAMPLE)
        found = [getattr(state, name) for name in names]
        values.append([(each() if callable(each) else each).numpy().copy() for each in found])
    return [np.array(series).T for series in zip(*values, strict=True)]


# -- ratios of two ensembles -------------------------------------------------------------------------------------


def ensembles(n_steps: int = 3000, *, n_replicas: int = 48) -> list[Row]:
    """Argon at two temperatures and two pressures: the ratio of histograms must be exp(-dbeta E), exp(-beta dP V)."""
    rows, box = [], liquids.fcc_box((18,), cells=2, lattice=5.4)
    common: dict[str, Any] = {"n_steps": n_steps, "n_replicas": n_replicas}
    for kind in THERMOSTATS:
        samples = [
            sample(box, SmallArgon(), kind(timestep_fs=5.0, temperature_K=t, thermostat_time_fs=200.0),
                   temperature_K=t, names=("energy",), **common)[0]
            for t in (95.0, 100.0)
        ]  # fmt: skip
        expected = (1.0 / 95.0 - 1.0 / 100.0) / units.BOLTZMANN
        rows.append(ratio_row(f"two temperatures, {kind.__name__}: slope / d(1/kT)", samples, expected))
    for barostat in BAROSTATS:
        samples = []
        for pressure_bar in (200.0, 400.0):
            integrator = barostat(
                timestep_fs=5.0, temperature_K=100.0, pressure_bar=pressure_bar, thermostat_time_fs=200.0,
                barostat_time_fs=500.0,
            )  # fmt: skip
            samples.append(sample(box, SmallArgon(), integrator, temperature_K=100.0, names=("volume",), **common)[0])
        expected = -200.0 * units.BAR / (units.BOLTZMANN * 100.0)
        rows.append(ratio_row(f"two pressures, {barostat.__name__}: slope / (-dP/kT)", samples, expected))
    return rows


def ratio_row(what: str, samples: list[np.ndarray], expected: float) -> Row:
    """Slope of the log ratio of two distributions by logistic regression; its error from leaving out replicas."""
    n_groups = min(16, len(samples[0]))
    groups = np.array_split(np.arange(len(samples[0])), n_groups)
    slope = logistic_slope(samples)
    without = [logistic_slope([np.delete(s, g, axis=0) for s in samples]) for g in groups]
    stderr = sqrt((n_groups - 1) * float(np.var(without)))
    ratio, error = slope / expected, stderr / abs(expected)
    return row(what, f"{ratio:.3f} ± {error:.3f}", "1", passed=abs(ratio - 1.0) < 3.0 * error and error < 0.2)


def logistic_slope(samples: list[np.ndarray]) -> float:
    x = np.concatenate([s.ravel() for s in samples])
    y = np.concatenate([np.zeros(samples[0].size), np.ones(samples[1].size)])
    scale = x.std()
    design = np.stack([np.ones_like(x), (x - x.mean()) / scale], axis=1)
    weights = np.zeros(2)
    for _ in range(30):
        p = 1.0 / (1.0 + np.exp(-design @ weights))
        weights += np.linalg.solve((design * (p * (1.0 - p))[:, None]).T @ design, design.T @ (y - p))
    return float(weights[1] / scale)


# -- constant pressure -------------------------------------------------------------------------------------------


def constant_pressure(n_steps: int = 4000, *, n_replicas: int = 32) -> list[Row]:
    """Mean and variance of the volume of an ideal gas; the density of a liquid at its own pressure."""
    rows, n_atoms = [], 40
    gas = System(
        np.full(n_atoms, 18), np.random.default_rng(1).uniform(0.0, 55.0, (n_atoms, 3)), 55.0 * np.eye(3), True,
        molecule=np.arange(n_atoms),
    )  # fmt: skip
    for barostat in BAROSTATS:
        extra = {"compressibility_per_bar": 0.1} if barostat is StochasticCellRescaling else {}
        integrator = barostat(
            timestep_fs=10.0, temperature_K=300.0, pressure_bar=10.0, thermostat_time_fs=100.0,
            barostat_time_fs=300.0, **extra,
        )  # fmt: skip
        (volume,) = sample(
            gas, IdealGas(), integrator, temperature_K=300.0, n_steps=n_steps, n_replicas=n_replicas, names=("volume",)
        )
        ideal = units.BOLTZMANN * 300.0 / (10.0 * units.BAR)
        for what, series in (("<V> P / NkT", volume / (n_atoms * ideal)),
                             ("var V (P/kT)^2 / N", (volume - volume.mean()) ** 2 / (n_atoms * ideal**2))):  # fmt: skip
            rows.append(mean_row(f"ideal gas, {barostat.__name__}: {what}", series, 1.0, unit=""))
    return rows + liquid_at_its_own_pressure(n_steps, n_replicas=n_replicas // 4)


def liquid_at_its_own_pressure(n_steps: int, *, n_replicas: int) -> list[Row]:
    """Lennard-Jones liquid: the mean pressure at a fixed volume, imposed by a barostat, must give that volume back."""
    liquid = liquids.argon(cells=4)
    common: dict[str, Any] = {
        "temperature_K": liquid.temperature_K, "n_steps": n_steps, "n_replicas": n_replicas, "names": ("pressure",),
    }  # fmt: skip
    settings: dict[str, Any] = {"timestep_fs": 10.0, "temperature_K": liquid.temperature_K, "thermostat_time_fs": 500.0}
    melted = melt(liquid)
    (pressure,) = sample(melted, liquid.potential, StochasticVelocityRescaling(**settings), **common)
    target = series_mean(pressure)
    density = melted.n_atoms / melted.volume * liquid.potential.SIGMA**3
    rows = []
    for barostat in BAROSTATS:
        integrator = barostat(**settings, pressure_bar=target.value / units.BAR, barostat_time_fs=1000.0)
        volume, trace = sample(melted, liquid.potential, integrator, **common | {"names": ("volume", "pressure")})
        reduced = series_mean(melted.n_atoms / volume * liquid.potential.SIGMA**3)
        slope = abs(np.polyfit(volume.ravel(), trace.ravel(), 1)[0])  # only to propagate the error of the target
        stderr = sqrt(reduced.stderr**2 + (density / melted.volume * target.stderr / max(slope, 1e-12)) ** 2)
        what = f"Lennard-Jones liquid, {barostat.__name__} at {target.value / units.BAR:.0f} bar: rho*"
        text = f"{reduced.value:.4f} ± {stderr:.4f}"
        passed = abs(reduced.value - density) < 3.0 * stderr and stderr < 0.01
        rows.append(row(what, text, f"{density:.4f}, the density that has this pressure in NVT", passed=passed))
    return rows


def melt(liquid: Any) -> System:
    """One box of a liquid, molten and cooled."""
    state = MDState.from_systems([liquid.box], temperature_K=liquid.hot_K, seed=1)
    for temperature_K in (liquid.hot_K, liquid.temperature_K):
        integrator = Langevin(timestep_fs=liquid.timestep_fs, temperature_K=temperature_K, thermostat_time_fs=500.0)
        Simulation(state, liquid.potential, integrator=integrator).run(1000)
    return state.systems()[0]


def mean_row(what: str, series: np.ndarray, expected: float, *, unit: str) -> Row:
    mean = series_mean(series)
    text = f"{mean.value:.4g} ± {mean.stderr:.2g} {unit}".strip()
    passed = abs(mean.value - expected) < 3.0 * mean.stderr and mean.stderr < 0.05 * expected
    return row(what, text, f"{expected:g} {unit}".strip(), passed=passed)


# -- equipartition and conservation ------------------------------------------------------------------------------


def equipartition(n_steps: int = 3000, *, n_replicas: int = 32) -> list[Row]:
    """Kinetic temperature of light and heavy atoms of one liquid under each thermostat."""
    box = liquids.fcc_box((18,), cells=2, lattice=5.6)
    numbers = np.where(np.arange(box.n_atoms) % 2 == 0, 18, 6)
    box = System(numbers, box.positions, box.cell, True, molecule=box.molecule)
    masses, rows = np.where(numbers == 6, 12.011, 39.95), []
    for kind in THERMOSTATS:
        state = MDState.from_systems([box] * n_replicas, temperature_K=100.0, seed=3)
        integrator = kind(timestep_fs=4.0, temperature_K=100.0, thermostat_time_fs=200.0)
        simulation = Simulation(state, SmallArgon(), integrator=integrator)
        simulation.run(n_steps // 3)
        light = torch.from_numpy(np.tile(numbers == 6, n_replicas))
        series = []
        for _ in range(n_steps // SAMPLE):
            simulation.run(SAMPLE)
            per_atom = (state.momenta**2).sum(dim=1) / state.masses / (3.0 * units.BOLTZMANN)
            series.append([state.sum_by_replica(torch.where(light == k, per_atom, 0.0)).numpy() for k in (True, False)])
        for index, (name, member) in enumerate((("light", numbers == 6), ("heavy", numbers == 18))):
            # of the 3 momenta of the centre of mass that are missing, each kind lacks its share by mass
            freedom = member.sum() - (masses[member].sum() / masses.sum() if state.centre_of_mass_fixed else 0.0)
            what = f"equipartition, {kind.__name__}, {name} atoms"
            rows.append(mean_row(what, np.array(series)[:, index].T / freedom, 100.0, unit="K"))
    return rows


def conservation(n_steps: int = 2000) -> list[Row]:
    """NVE: the energy fluctuates as dt^2 and does not drift."""
    box = melt(liquids.argon(cells=4))
    fluctuation, rows = {}, []
    for timestep_fs in (20.0, 10.0, 5.0):
        state = MDState.from_systems([box], temperature_K=86.0, seed=3)
        potential = SmallArgon()
        simulation = Simulation(state, potential, integrator=VelocityVerlet(timestep_fs=timestep_fs))
        energies = []
        for _ in range(round(n_steps * 10.0 / timestep_fs)):
            simulation.run(1)
            energies.append(float(state.kinetic_energy() + state.energy))
        series = 1.0e3 * np.array(energies) / state.batch.n_atoms
        time_ps = 1.0e-3 * timestep_fs * np.arange(len(series))
        fluctuation[timestep_fs] = float(np.std(series))
        drift = abs(float(np.polyfit(time_ps, series, 1)[0]))
        what = f"NVE of 256 argon atoms, {time_ps[-1]:.0f} ps at {timestep_fs:g} fs: drift"
        rows.append(row(what, f"{drift:.1e} meV/atom/ps", "< 0.001", passed=drift < 1.0e-3))
    for coarse, fine in ((20.0, 10.0), (10.0, 5.0)):
        ratio = fluctuation[coarse] / fluctuation[fine]
        what = f"NVE: fluctuation of the energy at {coarse:g} fs / at {fine:g} fs"
        rows.append(row(what, f"{ratio:.2f}", "4", passed=abs(ratio - 4.0) < 0.8))
    return rows
