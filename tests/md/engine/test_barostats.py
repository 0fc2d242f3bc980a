"""Integrators of constant pressure against the ideal gas, conservation laws and each other."""

from dataclasses import replace
from math import sqrt

import numpy as np
import pytest
import torch

from bamboo.errors import InputError
from bamboo.system import System
from bamboo.units import BAR, BOLTZMANN
from md.engine.barostats import MartynaTobiasKlein, StochasticCellRescaling
from md.engine.state import MDState


def run(integrator, state, evaluator, n_steps):
    for _ in range(n_steps):
        integrator.step(state, evaluator)


def test_ideal_gas_has_the_volume_of_its_ensemble(toys):
    """p(V) ~ V^(N-1) exp(-PV/kT) with the centre of mass fixed: <V> = N kT/P, var V = N (kT/P)^2.

    N = 5 tells N from N - 1 and N + 1 by twenty standard errors. The gas starts a quarter too small.
    """
    n_atoms, n_replicas, kT = 5, 300, BOLTZMANN * 300.0
    pressure_bar = 1000.0
    unit = kT / (pressure_bar * BAR)  # volume
    length = (0.75 * n_atoms * unit) ** (1.0 / 3.0)
    state = MDState.from_systems([toys.gas_box(n_atoms, length=length)] * n_replicas, temperature_K=300.0, seed=1)
    integrator = StochasticCellRescaling(
        timestep_fs=1.0,
        temperature_K=300.0,
        thermostat_time_fs=20.0,
        pressure_bar=pressure_bar,
        barostat_time_fs=100.0,
        compressibility_per_bar=1.0 / pressure_bar,
    )
    gas = toys.IdealGas()
    integrator.start(state, gas)
    run(integrator, state, gas, 600)
    volumes, pressures = [], []
    for _ in range(50):
        run(integrator, state, gas, 20)
        volumes.append(state.volume / unit)
        pressures.append(state.pressure() / BAR)
    by_replica = torch.stack(volumes).mean(dim=0)
    error = float(by_replica.std()) / sqrt(n_replicas)
    assert error < 0.06
    assert float(by_replica.mean()) == pytest.approx(n_atoms, abs=3.5 * error)
    squares = ((torch.stack(volumes) - n_atoms) ** 2).mean(dim=0)
    assert float(squares.mean()) == pytest.approx(n_atoms, abs=3.5 * float(squares.std()) / sqrt(n_replicas))
    pressure = torch.stack(pressures).mean(dim=0)
    assert float(pressure.mean()) == pytest.approx(pressure_bar, abs=3.5 * float(pressure.std()) / sqrt(n_replicas))
    assert float(state.temperature_K().mean()) == pytest.approx(300.0, abs=3.5 * 300.0 * sqrt(2.0 / 12 / n_replicas))


def test_deterministic_barostat_on_the_ideal_gas(toys):
    """The same mean and variance of the volume from the Martyna-Tobias-Klein equations."""
    n_atoms, n_replicas, kT, pressure_bar = 5, 200, BOLTZMANN * 300.0, 1000.0
    unit = kT / (pressure_bar * BAR)
    length = (n_atoms * unit) ** (1.0 / 3.0)
    state = MDState.from_systems([toys.gas_box(n_atoms, length=length)] * n_replicas, temperature_K=300.0, seed=2)
    integrator = MartynaTobiasKlein(
        timestep_fs=2.0, temperature_K=300.0, thermostat_time_fs=20.0, pressure_bar=pressure_bar, barostat_time_fs=100.0
    )
    gas = toys.IdealGas()
    integrator.start(state, gas)
    run(integrator, state, gas, 300)
    volumes = []
    for _ in range(35):
        run(integrator, state, gas, 20)
        volumes.append(state.volume / unit)
    by_replica = torch.stack(volumes).mean(dim=0)
    error = float(by_replica.std()) / sqrt(n_replicas)
    squares = ((torch.stack(volumes) - n_atoms) ** 2).mean(dim=0)
    assert error < 0.1
    assert float(by_replica.mean()) == pytest.approx(n_atoms, abs=3.5 * error)
    assert float(squares.mean()) == pytest.approx(n_atoms, abs=3.5 * float(squares.std()) / sqrt(n_replicas))


def test_barostat_time_of_klein(toys):
    """An ideal gas at twice the pressure outside starts to grow as V = V_0 (1 + (3/4) t^2/tau^2)."""
    state = MDState.from_systems([toys.gas_box(50)], temperature_K=300.0, seed=4, exact_temperature=True)
    inside = 50 * BOLTZMANN * 300.0 / state.volume  # (N_f + 3) kT/(3V), what the equations balance
    integrator = MartynaTobiasKlein(
        timestep_fs=1.0, temperature_K=300.0, pressure_bar=float(inside) / BAR / 2.0, barostat_time_fs=500.0
    )
    before = state.volume
    integrator.start(state, toys.IdealGas())
    run(integrator, state, toys.IdealGas(), 20)
    assert float(state.volume / before - 1.0) == pytest.approx(0.75 * (20.0 / 500.0) ** 2, rel=0.02)


def liquid(toys, n_replicas: int = 1) -> MDState:
    boxes = [toys.argon_box(seed=seed, lattice=5.8) for seed in range(n_replicas)]
    return MDState.from_systems(boxes, temperature_K=100.0, seed=3)


def rescaling(timestep_fs: float, *, barostat_time_fs: float = 400.0) -> StochasticCellRescaling:
    return StochasticCellRescaling(
        timestep_fs=timestep_fs,
        temperature_K=100.0,
        thermostat_time_fs=200.0,
        pressure_bar=500.0,
        barostat_time_fs=barostat_time_fs,
        compressibility_per_bar=2.0e-4,
    )


def klein(timestep_fs: float) -> MartynaTobiasKlein:
    return MartynaTobiasKlein(
        timestep_fs=timestep_fs,
        temperature_K=100.0,
        thermostat_time_fs=200.0,
        pressure_bar=500.0,
        barostat_time_fs=400.0,
    )


def test_booked_energy_of_cell_rescaling(toys):
    """K + U less the energy received from both baths stays put while K + U itself wanders far more."""
    potential, state, integrator = toys.LennardJones(), liquid(toys, 2), rescaling(4.0)
    integrator.start(state, potential)
    conserved, total, volume = [], [], []
    for _ in range(150):
        integrator.step(state, potential)
        conserved.append(integrator.conserved_energy(state))
        total.append(state.kinetic_energy() + state.energy)
        volume.append(state.volume)
    wander = float(torch.stack(total).std(dim=0).min())
    assert float((torch.stack(volume).std(dim=0) / volume[0]).min()) > 0.01  # the cell really moves
    assert float(torch.stack(conserved).std(dim=0).max()) < 0.005 * wander


def test_conserved_quantity_and_time_reversal_of_klein(toys):
    potential, errors = toys.LennardJones(), []
    for timestep, n_steps in ((16.0, 40), (8.0, 80)):
        state, integrator = liquid(toys), klein(timestep)
        integrator.start(state, potential)
        first, worst = integrator.conserved_energy(state), 0.0
        start = state.batch
        for _ in range(n_steps):
            integrator.step(state, potential)
            worst = max(worst, float((integrator.conserved_energy(state) - first).abs()))
        errors.append(worst)
    assert 3.5 < errors[0] / errors[1] < 4.5
    assert abs(float(state.volume) / float(start.cell[0].det()) - 1.0) > 0.02
    state.momenta = -state.momenta
    for name in ("strain_rate", "chain_velocity", "cell_chain_velocity"):
        state.variables[name] = -state.variables[name]
    run(integrator, state, potential, 80)
    np.testing.assert_allclose(state.batch.positions, start.positions, atol=1e-9)
    np.testing.assert_allclose(state.batch.cell, start.cell, atol=1e-9)


@pytest.mark.parametrize("integrator", [rescaling(4.0), klein(4.0)])
def test_cell_and_molecules_scale_together(toys, integrator):
    """A nearly frozen gas, thermostat off: fractional coordinates stay, and momenta shrink as the box grows.

    p L is constant in cell rescaling (a canonical transformation), p L^(1 + 3/N_f) in the extended system.
    """
    state = liquid(toys)
    state.momenta = state.momenta * 1.0e-6
    integrator = replace(integrator, thermostat_time_fs=1.0e18)
    integrator.start(state, toys.IdealGas())
    fractions = state.batch.positions @ torch.linalg.inv(state.batch.cell[0])
    momenta = state.momenta
    run(integrator, state, toys.IdealGas(), 5)
    growth = float(state.batch.cell[0, 0, 0]) / 11.6
    assert abs(growth - 1.0) > 1e-5
    exponent = 1.0 if isinstance(integrator, StochasticCellRescaling) else 1.0 + 3.0 / 93.0
    np.testing.assert_allclose(state.momenta, momenta * growth**-exponent, rtol=1e-9, atol=0.0)
    np.testing.assert_allclose(state.batch.positions @ torch.linalg.inv(state.batch.cell[0]), fractions, atol=1e-6)
    assert float(state.momenta.sum(dim=0).abs().max()) < 1e-12


def test_clusters_are_refused(toys):
    cluster = System(np.array([18, 18]), np.eye(3)[:2] * 4.0, np.zeros((3, 3)), pbc=False)
    for integrator in (rescaling(4.0), klein(4.0)):
        state = MDState.from_systems([cluster], temperature_K=10.0, seed=0)
        with pytest.raises(InputError, match="isolated cluster"):
            integrator.start(state, toys.IdealGas())
