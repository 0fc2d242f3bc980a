"""Packed systems have the density, contacts and bonds that were asked for; clusters are cut whole."""

from dataclasses import replace

import numpy as np
import pytest

from bamboo.errors import InputError
from bamboo.structure.molecules import molecule
from bamboo.structure.packing import (
    bond_graph,
    cut_cluster,
    formal_bonds,
    make_whole,
    min_intermolecular_distance,
    molecule_names,
    pack_box,
    pack_cluster,
)
from bamboo.units import GRAM_PER_CM3

COUNTS = {"EC": 10, "DMC": 12, "Li": 2, "PF6": 2}


@pytest.fixture(scope="module")
def box():
    return pack_box(COUNTS, density_g_cm3=1.15, seed=5)


def test_box_has_the_density_and_composition(box):
    mass = sum(molecule(name).molar_mass * count for name, count in COUNTS.items())
    assert mass / box.volume / GRAM_PER_CM3 == pytest.approx(1.15, rel=1e-9)
    assert box.n_atoms == 10 * 10 + 12 * 12 + 2 + 2 * 7
    assert box.pbc and box.total_charge == 0.0
    assert molecule_names(COUNTS)[20:24] == ("DMC", "DMC", "Li", "Li")
    assert np.array_equal(np.bincount(box.molecule), [10] * 10 + [12] * 12 + [1] * 2 + [7] * 2)


def test_contacts_hold_through_the_boundary(box):
    # naive reference: every pair of molecules, 27 images
    shifts = np.array(np.meshgrid(*[[-1, 0, 1]] * 3)).reshape(3, -1).T @ box.cell
    closest = min(
        np.linalg.norm(box.positions[a] + shift - box.positions[box.molecule > box.molecule[a]], axis=1).min()
        for a in range(box.n_atoms - 7)
        for shift in shifts
    )
    assert min_intermolecular_distance(box) == pytest.approx(closest, abs=1e-9)
    assert closest > 1.95


def test_packing_is_reproducible_and_depends_on_the_seed(box):
    same = pack_box(COUNTS, density_g_cm3=1.15, seed=5)
    other = pack_box(COUNTS, density_g_cm3=1.15, seed=6)
    assert np.array_equal(same.positions, box.positions)
    assert not np.allclose(other.positions, box.positions)


def test_molecules_stay_intact_wherever_the_boundary_cuts(box):
    formal = formal_bonds(molecule_names(COUNTS))
    assert np.array_equal(bond_graph(box), formal)
    length = box.cell[0, 0]
    wrapped = replace(box, positions=(box.positions + 3.0) % length)
    assert np.array_equal(bond_graph(wrapped), formal)
    whole = make_whole(wrapped)
    for m in range(len(molecule_names(COUNTS))):
        atoms = box.molecule == m
        expected = box.positions[atoms] - box.positions[atoms].mean(axis=0)
        assert whole.positions[atoms] - whole.positions[atoms].mean(axis=0) == pytest.approx(expected, abs=1e-9)


def test_bond_graph_sees_a_broken_bond(box):
    moved = box.positions.copy()
    moved[0] += [0.0, 0.0, 1.5]
    assert not np.array_equal(bond_graph(replace(box, positions=moved)), formal_bonds(molecule_names(COUNTS)))


def test_lithium_never_bonds():
    pair = pack_cluster({"EC": 1, "Li": 1}, seed=1)
    positions = pair.positions.copy()
    positions[-1] = positions[4] + [1.8, 0.0, 0.0]  # closer than the covalent radii of Li and O, 1.94 Å
    assert bond_graph(replace(pair, positions=positions)).max() < 10


def test_conformers_are_used():
    shape = molecule("EC").positions * 1.05
    box = pack_box({"EC": 3}, density_g_cm3=0.5, seed=1, conformers={"EC": [shape]})
    first = box.positions[:10]
    distances = np.linalg.norm(first[:, None] - first[None], axis=2)
    assert distances == pytest.approx(np.linalg.norm(shape[:, None] - shape[None], axis=2), abs=1e-4)


def test_cluster_is_whole_and_complete(box):
    charges = np.array([float(molecule(name).charge) for name in molecule_names(COUNTS)])
    wrapped = replace(box, positions=box.positions % box.cell[0, 0])
    core = int(np.flatnonzero(box.numbers == 3)[0])
    cluster, kept = cut_cluster(wrapped, [core], radius_A=4.0, molecule_charges=charges)
    names = [molecule_names(COUNTS)[m] for m in kept]
    assert names[0] == "Li" and not cluster.pbc
    assert cluster.total_charge == sum(molecule(name).charge for name in names)
    assert np.array_equal(bond_graph(cluster), formal_bonds(names))
    assert cluster.positions[0] == pytest.approx(0.0, abs=1e-9)
    # naive reference: distances of all atoms to the core through 27 images
    shifts = np.array(np.meshgrid(*[[-1, 0, 1]] * 3)).reshape(3, -1).T @ box.cell
    images = box.positions[None] + shifts[:, None] - box.positions[core]
    near = np.linalg.norm(images, axis=2) < 4.0
    assert set(kept) == set(box.molecule[near.any(axis=0)])
    assert int((np.linalg.norm(cluster.positions, axis=1) < 4.0).sum()) == int(near.sum())


def test_cluster_needing_two_images_is_refused(box):
    charges = np.zeros(len(molecule_names(COUNTS)))
    with pytest.raises(InputError, match="two images"):
        cut_cluster(box, [0], radius_A=9.0, molecule_charges=charges)


def test_pack_cluster_is_compact_and_charged():
    cluster = pack_cluster({"Li": 1, "EC": 4}, seed=2)
    assert not cluster.pbc and cluster.total_charge == 1.0 and cluster.molecule is not None
    assert min_intermolecular_distance(cluster) > 1.95
    centred = cluster.positions - cluster.positions.mean(axis=0)
    assert np.linalg.norm(centred, axis=1).max() < 9.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"counts": {"EC": 20}, "density_g_cm3": 6.0}, "Packmol .* 20 molecules .* Lower the density"),
        ({"counts": {"EC": 0}, "density_g_cm3": 1.0}, "at least one molecule"),
        ({"counts": {"EC": 1}, "density_g_cm3": -1.0}, "density_g_cm3 is -1"),
    ],
)
def test_impossible_packings_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        pack_box(arguments["counts"], density_g_cm3=arguments["density_g_cm3"], seed=1, timeout_s=2.0)
