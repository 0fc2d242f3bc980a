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


@pytest.mark.parametrize("coupling", ["isotropic", "anisotropic"])
def test_deterministic_barostat_on_the_ideal_gas(toys, coupling):
    """The same mean and variance of the volume from the Martyna-Tobias-Klein equations, whether the shape moves."""
    n_atoms, n_replicas, kT, pressure_bar = 5, 200, BOLTZMANN * 300.0, 1000.0
    unit = kT / (pressure_bar * BAR)
    length = (n_atoms * unit) ** (1.0 / 3.0)
    state = MDState.from_systems([toys.gas_box(n_atoms, length=length)] * n_replicas, temperature_K=300.0, seed=2)
    integrator = MartynaTobiasKlein(
        timestep_fs=2.0,
        temperature_K=300.0,
        thermostat_time_fs=20.0,
        pressure_bar=pressure_bar,
        barostat_time_fs=100.0,
        coupling=coupling,
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
    lengths = state.batch.cell.diagonal(dim1=1, dim2=2)
    assert float((lengths.amax(dim=1) / lengths.amin(dim=1)).mean()) > 1.2 or coupling == "isotropic"
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


def test_every_length_of_an_elastic_frame_has_its_own_distribution(toys):
    """p(L) ~ V^(N-1) exp(-(U + PV)/kT), U = sum k_a/2 ln(L_a/L0_a)^2, by quadrature; the mean pressure along every axis
    is that outside. Momenta are drawn anew as it runs: an ideal gas does not exchange energy between its axes."""
    n_atoms, n_replicas, kT, pressure_bar = 8, 200, BOLTZMANN * 300.0, 50.0
    stiffness, lengths = [60.0 * kT, 120.0 * kT, 240.0 * kT], [18.0, 20.0, 25.0]
    box = replace(toys.gas_box(n_atoms), cell=np.diag(lengths))
    state = MDState.from_systems([box] * n_replicas, temperature_K=300.0, seed=5)
    frame = toys.ElasticFrame(stiffness, lengths)
    integrator = anisotropic(
        2.0, temperature_K=300.0, thermostat_time_fs=20.0, barostat_time_fs=50.0, pressure_bar=pressure_bar
    )
    integrator.start(state, frame)
    run(integrator, state, frame, 200)
    strains, pressures = [], []
    for _ in range(60):
        state.draw_momenta(300.0)
        run(integrator, state, frame, 12)
        strains.append((state.batch.cell.diagonal(dim1=1, dim2=2) / torch.tensor(lengths)).log())
        pressures.append(state.pressure_tensor().diagonal(dim1=1, dim2=2) / BAR)
    strain = np.stack(np.meshgrid(*[np.linspace(-0.7, 0.9, 81)] * 3, indexing="ij"))
    volume = np.prod(lengths) * np.exp(strain.sum(axis=0))
    elastic = 0.5 * np.einsum("a,axyz->xyz", stiffness, strain**2)
    weight = np.exp(n_atoms * strain.sum(axis=0) - (elastic + pressure_bar * BAR * volume) / kT)
    for axis in range(3):
        mean = np.average(strain[axis], weights=weight)
        variance = np.average((strain[axis] - mean) ** 2, weights=weight)
        found = torch.stack(strains)[..., axis]
        for values, expected, precision in (
            (found, mean, 0.2 * sqrt(variance)),
            ((found - mean) ** 2, variance, 0.1 * variance),
            (torch.stack(pressures)[..., axis], pressure_bar, 0.05 * pressure_bar),
        ):
            by_replica = values.mean(dim=0)
            error = float(by_replica.std()) / sqrt(n_replicas)
            assert error < precision
            assert float(by_replica.mean()) == pytest.approx(expected, abs=3.5 * error)


def test_the_force_on_each_length_is_a_derivative(toys):
    """G_a = -d(K + U + PV)/d ln(L_a), where momenta scale along by L_a^-1 V^(-1/N_f); isotropic: the sum of G_a."""
    box = toys.argon_box(seed=2, lattice=5.5)
    box = replace(box, positions=box.positions * [1.0, 1.03, 0.98], cell=box.cell * [1.0, 1.03, 0.98])
    potential, forces = toys.LennardJones(), {}
    for coupling in ("isotropic", "anisotropic"):
        state = MDState.from_systems([box], temperature_K=150.0, seed=7)
        integrator = anisotropic(1.0, pressure_bar=3000.0, coupling=coupling)
        integrator.start(state, potential)
        integrator.accelerate_cell(state, 1.0)
        forces[coupling] = state.variables["strain_rate"][0] * integrator.cell_mass(state)
    energies = torch.zeros((3, 2), dtype=torch.float64)
    for axis in range(3):
        for side, step in enumerate((1.0e-5, -1.0e-5)):
            moved = replace(state)
            growth = torch.zeros((1, 3), dtype=torch.float64)
            growth[0, axis] = step
            moved.scale_box(growth.exp())
            moved.scale_momenta((-growth - step / moved.degrees_of_freedom).exp())
            moved.evaluate(potential)
            total = moved.kinetic_energy() + moved.energy + 3000.0 * BAR * moved.volume
            energies[axis, side] = total[0]
    numeric = -(energies[:, 0] - energies[:, 1]) / 2.0e-5
    np.testing.assert_allclose(forces["anisotropic"], numeric, rtol=1e-6)
    np.testing.assert_allclose(forces["isotropic"], numeric.sum(), rtol=1e-6)


def test_anisotropic_coupling_refuses_tilted_boxes_and_unknown_words(toys):
    tilted = replace(toys.argon_box(), cell=np.array([[11.2, 0.0, 0.0], [1.0, 11.2, 0.0], [0.0, 0.0, 11.2]]))
    state = MDState.from_systems([tilted], temperature_K=10.0, seed=0)
    with pytest.raises(InputError, match="orthorhombic"):
        anisotropic(1.0).start(state, toys.IdealGas())
    with pytest.raises(InputError, match="'shear', expected isotropic or anisotropic"):
        klein(1.0, coupling="shear")


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


def klein(timestep_fs: float, **changes) -> MartynaTobiasKlein:
    usual = {"temperature_K": 100.0, "thermostat_time_fs": 200.0, "pressure_bar": 500.0, "barostat_time_fs": 400.0}
    return MartynaTobiasKlein(timestep_fs=timestep_fs, **usual | changes)


def anisotropic(timestep_fs: float, **changes) -> MartynaTobiasKlein:
    return klein(timestep_fs, **{"coupling": "anisotropic"} | changes)


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


@pytest.mark.parametrize("kind", [klein, anisotropic])
def test_conserved_quantity_and_time_reversal_of_klein(toys, kind):
    potential, errors = toys.LennardJones(), []
    for timestep, n_steps in ((16.0, 40), (8.0, 80)):
        state, integrator = liquid(toys), kind(timestep)
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


@pytest.mark.parametrize("integrator", [rescaling(4.0), klein(4.0), anisotropic(4.0)])
def test_cell_and_molecules_scale_together(toys, integrator):
    """A nearly frozen gas, thermostat off: fractional coordinates stay, and momenta shrink as the box grows.

    p L is constant in cell rescaling (a canonical transformation), p_a L_a V^(1/N_f) in the extended system.
    """
    box = toys.argon_box(lattice=5.8)
    box = replace(box, positions=box.positions * [1.0, 1.1, 0.9], cell=box.cell * [1.0, 1.1, 0.9])
    state = MDState.from_systems([box], temperature_K=100.0, seed=3)
    state.momenta = state.momenta * 1.0e-6
    integrator = replace(integrator, thermostat_time_fs=1.0e18)
    integrator.start(state, toys.IdealGas())
    fractions = state.batch.positions @ torch.linalg.inv(state.batch.cell[0])
    momenta = state.momenta
    run(integrator, state, toys.IdealGas(), 5)
    growth = state.batch.cell[0].diagonal() / torch.from_numpy(box.cell).diagonal()
    assert float((growth - 1.0).abs().min()) > 1e-5
    common = 1.0 if isinstance(integrator, StochasticCellRescaling) else growth.prod() ** (1.0 / 93.0)
    np.testing.assert_allclose(state.momenta, momenta / growth / common, rtol=1e-9, atol=0.0)
    np.testing.assert_allclose(state.batch.positions @ torch.linalg.inv(state.batch.cell[0]), fractions, atol=1e-6)
    assert float(state.momenta.sum(dim=0).abs().max()) < 1e-12


def test_clusters_are_refused(toys):
    cluster = System(np.array([18, 18]), np.eye(3)[:2] * 4.0, np.zeros((3, 3)), pbc=False)
    for integrator in (rescaling(4.0), klein(4.0)):
        state = MDState.from_systems([cluster], temperature_K=10.0, seed=0)
        with pytest.raises(InputError, match="isolated cluster"):
            integrator.start(state, toys.IdealGas())
