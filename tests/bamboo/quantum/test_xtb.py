"""GFN2-xTB labels: signs and units of every derivative against finite differences of the energy."""

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("tblite")

from bamboo.quantum.dataset import round_positions
from bamboo.quantum.xtb import LEVEL, UnconvergedError, label_xtb
from bamboo.structure.packing import pack_cluster
from bamboo.system import System


@pytest.fixture(scope="module")
def lithium_pair():
    cluster = pack_cluster({"EC": 1, "Li": 1}, seed=1)
    return replace(cluster, positions=round_positions(cluster.positions))


def test_forces_are_minus_the_gradient(lithium_pair):
    forces = label_xtb(lithium_pair).forces
    direction = np.round(np.random.default_rng(0).normal(size=forces.shape))
    step = 2.0**-8  # moves by whole steps of the single-precision grid, so rounding cannot disturb the difference
    energies = []
    for sign in (1, -1):
        moved = replace(lithium_pair, positions=lithium_pair.positions + sign * step * direction)
        energies.append(label_xtb(moved).energy)
    slope = (energies[0] - energies[1]) / (2.0 * step)
    assert slope == pytest.approx(-(forces * direction).sum(), abs=5e-3)


def test_charges_sum_to_the_total_charge_and_dipole_has_their_units(lithium_pair):
    labels = label_xtb(lithium_pair)
    assert labels.level == LEVEL and labels.virial is None
    assert labels.charges.sum() == pytest.approx(1.0, abs=1e-6)
    # Moving a charge q by d changes its dipole about the origin by q d: fixes unit (e Å), sign and origin at once.
    moved = label_xtb(replace(lithium_pair, positions=lithium_pair.positions + np.array([0.5, 0.0, 0.0])))
    assert moved.dipole - labels.dipole == pytest.approx([0.5, 0.0, 0.0], abs=1e-4)


def test_total_charge_is_honoured(lithium_pair):
    cation = label_xtb(lithium_pair)
    anion = label_xtb(replace(lithium_pair, total_charge=-1.0))
    assert anion.charges.sum() == pytest.approx(-1.0, abs=1e-6)
    assert abs(anion.energy - cation.energy) > 1.0


def test_virial_is_minus_the_strain_derivative():
    # one water-like and one lithium fluoride unit in a small tilted cell: cheap, and no component vanishes
    numbers = np.array([8, 1, 1, 3, 9])
    positions = np.array([[0.0, 0.1, 0.2], [0.76, 0.6, 0.1], [-0.7, 0.65, 0.3], [0.4, -1.9, 0.5], [1.7, -2.8, 1.1]])
    cell = np.array([[5.5, 0.0, 0.0], [0.4, 6.0, 0.0], [-0.3, 0.5, 5.8]])
    system = System(numbers, round_positions(positions), cell, pbc=True)
    labels = label_xtb(system)
    assert labels.dipole is None
    for a, b in ((0, 0), (1, 2)):
        energies = []
        for sign in (1, -1):
            strain = np.eye(3)
            strain[a, b] += sign * 4e-3
            strained = replace(system, positions=system.positions @ strain.T, cell=cell @ strain.T)
            energies.append(label_xtb(strained).energy)
        slope = (energies[0] - energies[1]) / 8e-3
        assert labels.virial[a, b] == pytest.approx(-slope, abs=0.02), (a, b)
    assert np.abs(labels.virial).max() > 0.5


def test_label_belongs_to_single_precision_positions(lithium_pair):
    noisy = replace(lithium_pair, positions=lithium_pair.positions + 1e-9)
    assert label_xtb(noisy).energy == label_xtb(lithium_pair).energy


def test_unconverged_electrons_are_reported(lithium_pair):
    with pytest.raises(UnconvergedError, match="did not converge for C3H4LiO3"):
        label_xtb(lithium_pair, max_iterations=2)
