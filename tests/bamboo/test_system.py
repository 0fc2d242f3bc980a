"""Structures: what is refused and with which words, and what batching keeps."""

import ase
import numpy as np
import pytest
import torch
from ase.build import molecule as ase_molecule

from bamboo.errors import InputError, UnknownElementError
from bamboo.system import Batch, System

CUBE = np.eye(3) * 10.0


def system(**changes):
    values = {
        "numbers": np.array([1, 8]), "positions": np.array([[0.0, 0, 0], [0, 0, 1.0]]),
        "cell": np.zeros((3, 3)), "pbc": False,
    }  # fmt: skip
    return System(**values | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"numbers": np.array([], dtype=int), "positions": np.zeros((0, 3))}, "no atoms"),
        ({"numbers": np.array([1.0, 8.0])}, "integers"),
        ({"numbers": np.array([[1], [8]])}, "numbers have shape"),
        ({"positions": np.zeros((3, 3))}, "positions have shape"),
        ({"positions": np.array([[0.0, 0, 0], [0, np.nan, 1]])}, "atom 1 is not finite"),
        ({"positions": np.array([[np.inf, 0, 0], [0, 0, 1]])}, "atom 0 is not finite"),
        ({"pbc": True}, "three independent cell vectors"),
        ({"pbc": True, "cell": np.diag([5.0, 5.0, 0.0])}, "three independent cell vectors"),
        ({"pbc": True, "cell": np.array([[1.0, 2, 3], [2, 4, 6], [0, 0, 1]])}, "three independent cell vectors"),
        ({"pbc": True, "cell": np.diag([5.0, 5.0, np.nan])}, "three finite vectors"),
        ({"pbc": True, "cell": np.array([5.0, 5.0, 5.0])}, "three finite vectors"),
        ({"cell": CUBE}, "has no cell"),
        ({"total_charge": float("nan")}, "total_charge"),
        ({"molecule": np.array([0])}, "molecule has shape"),
    ],
)
def test_impossible_structures_are_refused(changes, message):
    with pytest.raises(InputError, match=message) as caught:
        system(**changes)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("number", [0, -1, 87, 118])
def test_exotic_elements(number):
    with pytest.raises(UnknownElementError, match=rf"Atom 1 has atomic number {number}") as caught:
        system(numbers=np.array([1, number]))
    assert caught.value.exit_code == 3


def test_from_atoms_and_back():
    atoms = ase_molecule("CH3OH", cell=[9, 8, 7], pbc=True)
    atoms.info["charge"] = -1
    atoms.arrays["molecule"] = np.zeros(6, dtype=int)
    taken = System.from_atoms(atoms)
    assert (taken.pbc, taken.total_charge, taken.volume) == (True, -1.0, pytest.approx(504.0))
    again = taken.to_atoms()
    assert np.array_equal(again.positions, atoms.positions)
    assert np.array_equal(again.cell.array, atoms.cell.array)
    assert again.info["charge"] == -1
    assert np.array_equal(again.arrays["molecule"], atoms.arrays["molecule"])
    assert System.from_atoms(atoms, total_charge=2.0).total_charge == 2.0


def test_from_atoms_copies():
    atoms = ase_molecule("H2O", cell=[9, 8, 7], pbc=True)
    atoms.arrays["molecule"] = np.zeros(3, dtype=int)
    taken = System.from_atoms(atoms)
    atoms.positions += 1.0
    atoms.cell[:] *= 2.0
    atoms.arrays["molecule"] += 1
    assert taken.volume == pytest.approx(504.0)
    assert taken.positions[0, 2] == pytest.approx(0.119262)
    assert taken.molecule.max() == 0


def test_cell_of_a_cluster_is_dropped():
    taken = System.from_atoms(ase.Atoms("H", cell=[5, 5, 5], pbc=False))
    assert taken.volume == 0.0


def test_partly_periodic_is_refused():
    with pytest.raises(InputError, match="all three directions"):
        System.from_atoms(ase.Atoms("H", cell=[5, 5, 5], pbc=[True, True, False]))


@pytest.mark.parametrize("charge", ["one", None, [1, 2]])
def test_charge_that_is_no_number(charge):
    atoms = ase.Atoms("H")
    atoms.info["charge"] = charge
    with pytest.raises(InputError, match="info\\['charge'\\]"):
        System.from_atoms(atoms)


def test_batch_stacks_and_numbers_molecules():
    one = system(molecule=np.array([0, 1]))
    two = system(pbc=True, cell=CUBE, total_charge=1.0, molecule=np.array([0, 0]))
    batch = Batch.from_systems([one, two, one])
    assert batch.system_index.tolist() == [0, 0, 1, 1, 2, 2]
    assert batch.molecule.tolist() == [0, 1, 2, 2, 3, 4]
    assert batch.pbc.tolist() == [False, True, False]
    assert batch.total_charge.tolist() == [0.0, 1.0, 0.0]
    assert batch.cell.shape == (3, 3, 3)
    assert batch.atoms_per_system.tolist() == [2, 2, 2]
    assert (batch.n_atoms, batch.n_systems) == (6, 3)


def test_molecules_are_dropped_unless_all_systems_have_them():
    assert Batch.from_systems([system(molecule=np.array([0, 1])), system()]).molecule is None


def test_batch_is_double_precision_and_independent_of_its_source():
    source = system(positions=np.zeros((2, 3), dtype=np.float32), numbers=np.array([1, 8], dtype=np.int32))
    batch = Batch.from_systems([source])
    assert (batch.positions.dtype, batch.numbers.dtype) == (torch.float64, torch.int64)
    source.positions[0, 0] = 5.0
    assert float(batch.positions[0, 0]) == 0.0
    moved = batch.to("cpu")
    assert torch.equal(moved.positions, batch.positions)
    assert moved.molecule is None


def test_empty_batch_is_refused():
    with pytest.raises(InputError, match="at least one system"):
        Batch.from_systems([])
