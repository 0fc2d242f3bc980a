"""Structures from elsewhere: molecules found by their bonds, in any order of atoms, cut by the boundary of the box."""

import numpy as np
import pytest

from bamboo.errors import InputError
from bamboo.structure import molecules
from bamboo.structure.molecules import IONS, SOLVENTS, define, molecule
from bamboo.structure.packing import formal_bonds, molecule_names, pack_box
from bamboo.structure.recognition import recognise, recognised_system
from bamboo.system import System


def test_every_known_molecule_is_told_from_its_isomers():
    generator = np.random.default_rng(1)
    for name in (*SOLVENTS, *IONS):
        known = molecule(name)
        shuffled = generator.permutation(known.n_atoms)
        system = System(known.numbers[shuffled], known.positions[shuffled], np.zeros((3, 3)), False)
        names, order = recognise(system)
        assert names == (name,)
        assert system.numbers[order].tolist() == known.numbers.tolist()


def test_a_shuffled_wrapped_box_comes_back_whole_and_in_order():
    box = pack_box({"EC": 2, "DMC": 3, "Li": 2, "PF6": 1, "FSI": 1}, density_g_cm3=0.8, seed=1)
    shuffled = np.random.default_rng(2).permutation(box.n_atoms)
    moved = (box.positions + 3.0) @ np.linalg.inv(box.cell) % 1.0 @ box.cell
    counts, found = recognised_system(System(box.numbers[shuffled], moved[shuffled], box.cell, True))
    assert dict(sorted(counts.items())) == {"DMC": 3, "EC": 2, "FSI": 1, "Li": 2, "PF6": 1}
    assert found.total_charge == 0.0
    bonds = formal_bonds(molecule_names(counts))
    lengths = np.linalg.norm(found.positions[bonds[:, 0]] - found.positions[bonds[:, 1]], axis=1)
    assert lengths.max() < 2.1  # no bond through the boundary
    names = molecule_names(counts)
    for index, name in enumerate(names):
        assert found.numbers[found.molecule == index].tolist() == molecule(name).numbers.tolist()


def test_unknown_and_touching_molecules_are_refused():
    ethane = molecules.molecule_from_smiles("CC")
    with pytest.raises(InputError, match=r"molecule C2H6 with 7 bonds that is none of the known"):
        recognise(System(ethane.numbers, ethane.positions.copy(), np.zeros((3, 3)), False))
    water = molecule("water")
    positions = np.concatenate([water.positions, water.positions + np.array([0.0, 0.0, 1.2])])
    with pytest.raises(InputError, match="two molecules touch"):
        recognise(System(np.tile(water.numbers, 2), positions, np.zeros((3, 3)), False))


def test_names_are_given_once(monkeypatch):
    for table in ("SOLVENTS", "IONS", "SALTS"):
        monkeypatch.setattr(molecules, table, dict(getattr(molecules, table)))
    define("FB", "Fc1ccccc1")
    define("FB", "Fc1ccccc1")
    define("TDI", "FC(F)(F)C1=NC(C#N)=C(C#N)[N-]1")
    assert molecules.molecule("FB").n_atoms == 12 and molecules.SALTS["LiTDI"] == {"Li": 1, "TDI": 1}
    for name, smiles, problem in (
        ("FB", "C", "stands for"), ("EC", "C", "stands for"), ("LiPF6", "C", "stands for a salt"),
        ("a b", "C", "not a name"),
        ("X", "C1CC", "Cannot read SMILES"), ("X", "C" * 90, "has 272 atoms"), ("X", "C.C", "several molecules"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=problem):
            define(name, smiles)
