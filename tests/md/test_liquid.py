"""The pressure of molecules as rigid bodies, against its definition written out molecule by molecule."""

import numpy as np
import pytest
import torch

from bamboo.elements import ATOMIC_MASSES
from bamboo.structure.molecules import molecule
from bamboo.system import System
from md.engine.state import MDState
from md.liquid import HYDROGEN_MASS, as_rigid, heavy_hydrogens


def test_molecular_pressure_is_that_of_centres_of_mass() -> None:
    """P V = (sum_m P_m^2 / M_m + sum_m R_m F_m) / 3 for an open set of molecules, whose virial is sum_i r_i F_i."""
    generator = np.random.default_rng(3)
    molecule = np.array([0, 0, 0, 1, 1, 2])
    positions = generator.uniform(0.0, 8.0, size=(6, 3))
    system = System(np.array([8, 1, 1, 6, 8, 3]), positions, 9.0 * np.eye(3), pbc=True, molecule=molecule)
    state = MDState.from_systems([system], temperature_K=300.0, seed=1)
    # forces that turn no molecule keep the virial symmetric: along the arms inside, plus a push on the whole
    forces = generator.normal(size=(3, 3))[molecule] / state.masses.numpy().mean()
    state.forces, mass = torch.from_numpy(forces), state.masses.numpy()
    state.virial = torch.from_numpy((positions.T @ forces)[None])
    expected = 0.0
    for m in range(3):
        inside = molecule == m
        centre = mass[inside] @ positions[inside] / mass[inside].sum()
        momentum = state.momenta.numpy()[inside].sum(0)
        expected += momentum @ momentum / mass[inside].sum() + centre @ forces[inside].sum(0)
    assert float(as_rigid(state).pressure()[0]) == pytest.approx(expected / 3.0 / 9.0**3, rel=1.0e-10)
    assert float(state.pressure()[0]) != pytest.approx(expected / 3.0 / 9.0**3, rel=1.0e-2)


def test_heavy_hydrogens_take_their_mass_from_the_atom_that_bears_them() -> None:
    known = molecule("DMC")
    positions = np.concatenate([known.positions, known.positions + np.array([6.0, 0.0, 0.0])])
    numbers = np.concatenate([known.numbers, known.numbers])
    index = np.repeat([0, 1], known.n_atoms)
    system = System(numbers, positions, 14.0 * np.eye(3), pbc=True, molecule=index)
    masses, usual = heavy_hydrogens(system).numpy(), ATOMIC_MASSES[numbers]
    assert masses[numbers == 1] == pytest.approx(HYDROGEN_MASS)
    assert np.bincount(index, weights=masses) == pytest.approx(np.bincount(index, weights=usual), rel=1e-12)
    methyl = (numbers == 6) & (masses < usual - 0.1)
    assert methyl.sum() == 4  # two methyl groups each; the carbonyl carbon keeps its mass, as do the oxygens
    assert masses[methyl] == pytest.approx(usual[methyl] - 3.0 * (HYDROGEN_MASS - ATOMIC_MASSES[1]))
    assert masses[numbers == 8] == pytest.approx(usual[numbers == 8])
