"""What the recorders compute from a state."""

from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch

from bamboo.errors import InputError
from bamboo.system import System
from md.engine.state import MDState
from md.recording import Portion, ThermoRecorder, build_topology, molecular_dipole, write_pdb
from md.topology import Ensemble


def two_molecules(*, shift: np.ndarray) -> MDState:
    """Two boxes of HF and of a bent molecule, with charges that do not add up within the molecules."""
    positions = np.array([[0.0, 0.0, 0.0], [0.9, 0.0, 0.0], [5.0, 5.0, 5.0], [5.0, 6.0, 5.0], [6.0, 5.0, 5.5]])
    box = System(
        np.array([9, 1, 8, 1, 1]), positions + shift, 12.0 * np.eye(3), True, molecule=np.array([0, 0, 1, 1, 1])
    )
    state = MDState.from_systems([box, box], temperature_K=0.0, seed=0)
    state.charges = torch.tensor([-0.4, 0.5, -0.8, 0.3, 0.4, -0.2, 0.2, 0.0, 0.0, 0.0], dtype=torch.float64)
    return state


def test_the_dipole_is_that_of_molecules_about_their_centres_of_mass():
    state = two_molecules(shift=np.zeros(3))
    first, second = molecular_dipole(state).numpy()
    expected = np.zeros(3)
    for atoms in ((0, 1), (2, 3, 4)):
        atoms = list(atoms)
        r, m, q = (x[atoms].numpy() for x in (state.batch.positions, state.masses, state.charges))
        expected += (q[:, None] * (r - (m[:, None] * r).sum(axis=0) / m.sum())).sum(axis=0)
    np.testing.assert_allclose(first, expected, atol=1e-14)
    np.testing.assert_allclose(second, [0.2 * 0.9, 0.0, 0.0], atol=1e-14)


def test_the_dipole_does_not_depend_on_the_origin_though_molecules_carry_charge():
    moved = molecular_dipole(two_molecules(shift=np.array([30.0, -7.0, 2.0])))
    np.testing.assert_allclose(moved, molecular_dipole(two_molecules(shift=np.zeros(3))), atol=1e-12)


def test_the_dipole_needs_molecules():
    state = MDState.from_systems(
        [System(np.array([9, 1]), np.eye(3)[:2], np.zeros((3, 3)), False)], temperature_K=0, seed=0
    )
    with pytest.raises(InputError, match="molecule"):
        molecular_dipole(state)


def water_in(cell: np.ndarray) -> System:
    positions = np.array([[0.0, 0.0, 0.12], [0.0, 0.76, -0.47], [0.0, -0.76, -0.47]]) + 3.0
    return System(np.array([8, 1, 1]), positions, cell, pbc=True, molecule=np.zeros(3, dtype=np.int64))


def test_the_structure_file_keeps_a_tilted_cell(tmp_path: Path) -> None:
    system = water_in(np.array([[9.0, 0.0, 0.0], [3.0, 8.0, 0.0], [1.0, 2.0, 7.0]]))
    write_pdb(tmp_path / "start.pdb", system, build_topology(system, {"water": 1}))
    back = ase.io.read(tmp_path / "start.pdb")
    np.testing.assert_allclose(back.cell.cellpar(), system.to_atoms().cell.cellpar(), atol=0.01)
    np.testing.assert_allclose(back.positions, system.positions, atol=0.001)


def test_a_record_that_is_gone_in_the_middle_of_a_run_is_not_begun_anew(tmp_path: Path) -> None:
    system = water_in(9.0 * np.eye(3))
    portion = Portion(tmp_path, build_topology(system, {"water": 1}), slice(0, 1))
    recorder = ThermoRecorder([portion], ensemble=Ensemble("nve"), stride=1)
    with pytest.raises(InputError, match=r"thermo.h5 is gone, and the run is in the middle of it"):
        recorder.truncate(10)
    recorder.truncate(-1)  # the beginning
    recorder.close()
    assert (tmp_path / "thermo.h5").exists()
