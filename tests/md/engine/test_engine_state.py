"""What is read off a state: degrees of freedom, temperature, pressure, current."""

from dataclasses import replace

import ase.calculators.lj
import numpy as np
import pytest
import torch

from bamboo.errors import InputError
from bamboo.system import Batch, System
from bamboo.units import BOLTZMANN, GRAM_PER_CM3
from md.engine.integrators import VelocityVerlet
from md.engine.state import MDState, charge_current, trace


def test_toy_lennard_jones_equals_ase(toys):
    system = toys.argon_box()
    potential = toys.LennardJones()
    result = potential.evaluate(Batch.from_systems([system, toys.argon_box(seed=1)]))
    atoms = system.to_atoms()
    atoms.calc = ase.calculators.lj.LennardJones(
        epsilon=potential.epsilon, sigma=potential.sigma, rc=potential.cutoff, ro=potential.start, smooth=True
    )
    assert float(result.energy[0]) == pytest.approx(atoms.get_potential_energy(), rel=1e-10)
    np.testing.assert_allclose(result.forces[: len(atoms)], atoms.get_forces(), atol=1e-10)
    stress = atoms.get_stress(voigt=False)
    np.testing.assert_allclose(-result.virial[0] / system.volume, stress, atol=1e-12)


def test_maxwell_boltzmann_momenta(toys):
    """Kinetic energy of a replica of 8 atoms has mean and variance N_f kT/2 and N_f (kT)^2/2, N_f = 21."""
    state = MDState.from_systems([toys.gas_box(8)] * 4000, temperature_K=300.0, seed=1)
    kT = BOLTZMANN * 300.0
    kinetic = state.kinetic_energy() / kT
    assert state.degrees_of_freedom.unique().tolist() == [21.0]
    standard_error = (21.0 / 2.0 / 4000) ** 0.5
    assert float(kinetic.mean()) == pytest.approx(10.5, abs=4.0 * standard_error)
    assert float(kinetic.var()) == pytest.approx(10.5, rel=4.0 * ((2.0 + 6.0 / 10.5) / 4000) ** 0.5)
    assert float(state.sum_by_replica(state.momenta).abs().max()) < 1e-12
    assert float(state.temperature_K().mean()) == pytest.approx(300.0, rel=4.0 * standard_error / 10.5)


def test_mixed_masses_share_the_energy_equally(toys):
    box = toys.gas_box(2000)
    numbers = np.where(np.arange(2000) < 1000, 1, 53)
    state = MDState.from_systems([replace(box, numbers=numbers)], temperature_K=300.0, seed=2)
    energies = 0.5 * (state.momenta**2).sum(dim=1) / state.masses / (1.5 * BOLTZMANN * 300.0)
    assert float(energies[:1000].mean()) == pytest.approx(1.0, abs=4 * (2 / 3000) ** 0.5)
    assert float(energies[1000:].mean()) == pytest.approx(1.0, abs=4 * (2 / 3000) ** 0.5)


def test_exact_temperature(toys):
    systems = [toys.gas_box(5), toys.gas_box(9)]
    state = MDState.from_systems(systems, temperature_K=298.0, seed=3, exact_temperature=True)
    assert state.temperature_K().tolist() == pytest.approx([298.0, 298.0], rel=1e-12)
    assert state.degrees_of_freedom.tolist() == [12.0, 24.0] and state.degrees_of_freedom.dtype == torch.float64


def test_pressure_is_minus_dE_dV(toys):
    """At rest, P = -dE/dV; moving, the ideal-gas part 2K/(3V) comes on top."""
    potential = toys.LennardJones()
    state = MDState.from_systems([toys.argon_box(), toys.argon_box(seed=4, lattice=5.4)], temperature_K=90.0, seed=4)
    state.evaluate(potential)

    def energy(factor: float) -> torch.Tensor:
        scaled = replace(state.batch, positions=state.batch.positions * factor, cell=state.batch.cell * factor)
        return potential.evaluate(scaled).energy

    h = 1.0e-5
    slope = (energy(1 + h) - energy(1 - h)) / (state.volume * ((1 + h) ** 3 - (1 - h) ** 3))
    kinetic = 2.0 * state.kinetic_energy() / (3.0 * state.volume)
    np.testing.assert_allclose(state.pressure(), kinetic - slope, rtol=1e-7)
    np.testing.assert_allclose(trace(state.pressure_tensor()) / 3.0, state.pressure(), rtol=1e-12)
    momenta, velocities = state.momenta[:32].numpy(), state.velocities[:32].numpy()
    expected = (np.einsum("ia,ib->ab", momenta, velocities) + state.virial[0].numpy()) / 11.2**3
    np.testing.assert_allclose(state.pressure_tensor()[0], expected, rtol=1e-12)


def test_density_and_clusters(toys):
    cluster = System(np.array([8, 1, 1]), np.eye(3), np.zeros((3, 3)), pbc=False)
    state = MDState.from_systems([toys.argon_box(), cluster], temperature_K=0.0, seed=0)
    assert float(state.density_g_cm3[0]) == pytest.approx(32 * 39.948 / 11.2**3 / GRAM_PER_CM3, rel=1e-4)
    assert bool(torch.isnan(state.density_g_cm3[1])) and bool(torch.isnan(state.pressure()[1]))


def test_net_force_does_not_move_the_centre_of_mass(toys):
    """Forces with a spurious sum, as from a mesh, must leave the total momentum alone: one common acceleration goes."""

    class Leaky(toys.LennardJones):
        def evaluate(self, batch):
            result = super().evaluate(batch)
            result.forces = result.forces + torch.tensor([1e-3, -2e-3, 5e-4])
            return result

    box = replace(toys.argon_box(), numbers=np.where(np.arange(32) < 16, 18, 6))
    state = MDState.from_systems([box], temperature_K=80.0, seed=5)
    integrator = VelocityVerlet(timestep_fs=5.0)
    integrator.start(state, Leaky())
    removed = (Leaky().evaluate(state.batch).forces - state.forces) / state.masses[:, None]
    assert float(removed.abs().max()) > 1e-5
    assert float((removed - removed[0]).abs().max()) < 1e-15
    for _ in range(20):
        integrator.step(state, Leaky())
    assert float(state.momenta.sum(dim=0).abs().max()) < 1e-12


def test_charge_current_counts_molecules_by_formal_charge():
    """Two replicas of a cation and an anion of two atoms: J = sum_m z_m v_m, whatever moves inside a molecule."""
    numbers, molecule = np.array([3, 9, 5]), np.array([0, 1, 1])
    box = System(numbers, np.arange(9.0).reshape(3, 3), np.eye(3) * 20.0, True, molecule=molecule)
    state = MDState.from_systems([box, box], temperature_K=0.0, seed=0)
    velocities = torch.tensor(np.random.default_rng(0).normal(size=(6, 3)))
    state.momenta = velocities * state.masses[:, None]
    m = state.masses
    anion = (m[1] * velocities[1] + m[2] * velocities[2]) / (m[1] + m[2])
    other = (m[4] * velocities[4] + m[5] * velocities[5]) / (m[4] + m[5])
    expected = torch.stack([velocities[0] - anion, 2.0 * velocities[3] - 2.0 * other])
    current = charge_current(state, torch.tensor([1.0, -1.0, 2.0, -2.0], dtype=torch.float64))
    np.testing.assert_allclose(current, expected, rtol=1e-13)
    with pytest.raises(InputError, match="expected \\(4,\\)"):
        charge_current(state, torch.tensor([1.0, -1.0]))


def test_systems_come_back(toys):
    first, second = toys.argon_box(), toys.argon_box(cells=1, seed=9)
    for before, after in zip(
        [first, second], MDState.from_systems([first, second], temperature_K=1.0, seed=0).systems(), strict=True
    ):
        np.testing.assert_array_equal(before.positions, after.positions)
        np.testing.assert_array_equal(before.molecule, after.molecule)
        np.testing.assert_array_equal(before.cell, after.cell)


def test_new_volume_moves_molecules_as_wholes(toys):
    """Distances inside molecules stay, centres of mass scale with the cell, momenta stay."""
    box = replace(toys.gas_box(6), numbers=np.array([8, 1, 1, 8, 1, 1]), molecule=np.array([0, 0, 0, 1, 1, 1]))
    state = MDState.from_systems([box, replace(box, cell=box.cell * 1.1)], temperature_K=300.0, seed=1)
    before, momenta = state.batch, state.momenta
    state.scale_volume(9000.0)
    assert state.volume.tolist() == pytest.approx([9000.0, 9000.0])
    assert torch.equal(state.momenta, momenta)
    for replica, length in enumerate((20.0, 22.0)):
        for first in (6 * replica, 6 * replica + 3):
            old, new = (batch.positions[first : first + 3] for batch in (before, state.batch))
            torch.testing.assert_close(torch.pdist(new), torch.pdist(old))
            masses = state.masses[first : first + 3, None]
            centres = [(masses * part).sum(dim=0) / masses.sum() for part in (old, new)]
            torch.testing.assert_close(centres[1], centres[0] * 9000.0 ** (1.0 / 3.0) / length)
