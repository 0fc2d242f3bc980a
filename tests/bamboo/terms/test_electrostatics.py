"""Coulomb energies against Madelung constants, Wigner crystals and a direct Ewald sum written here."""

import itertools

import numpy as np
import pytest
import torch
from scipy.special import erfc

from bamboo import units
from bamboo.errors import InputError
from bamboo.neighbors import find_neighbors
from bamboo.system import Batch, System
from bamboo.terms import electrostatics

FCC = np.array([[0.0, 0.5, 0.5], [0.5, 0.0, 0.5], [0.5, 0.5, 0.0]])
# crystal: lattice vectors and anion position in units of the cubic cell, nearest distance / cubic cell, Madelung
# constant with respect to the nearest distance (Johnson and Templeton, J. Chem. Phys. 34, 2004 (1961))
CRYSTALS = {
    "NaCl": (FCC, (0.5, 0.5, 0.5), 0.5, 1.747564594633182),
    "CsCl": (np.eye(3), (0.5, 0.5, 0.5), 3**0.5 / 2, 1.76267477307099),
    "ZnS": (FCC, (0.25, 0.25, 0.25), 3**0.5 / 4, 1.63805505338879),
}
NEAREST = 4.0  # Å, beyond the damping


def energy_of(charges, positions, cell, *, cutoff=5.0):
    """Return the electrostatic energy [eV] of a box as the force field adds it up: real-space pairs plus mesh."""
    system = System(np.ones(len(charges), dtype=np.int64), positions, cell, pbc=True)
    batch = Batch.from_systems([system])
    pairs = find_neighbors(batch, cutoff, 0.0).edges
    i, j = pairs.index
    q = torch.as_tensor(charges, dtype=torch.float64)
    distance = pairs.vectors(batch.positions, batch.cell, system_index=batch.system_index).norm(dim=1)
    real = 0.5 * electrostatics.real_space_energy(q[i] * q[j], distance, cutoff).sum()
    return float(real + electrostatics.reciprocal_energy(q, batch.positions, batch.cell[0], cutoff=cutoff))


def direct_long_range(charges, positions, cell, alpha):
    """The reciprocal sum term by term, self energy and background removed [eV]."""
    reciprocal = 2 * np.pi * np.linalg.inv(cell).T
    reach = [int(12 * alpha * np.linalg.norm(row) / (2 * np.pi)) + 1 for row in cell]
    waves = np.array(list(itertools.product(*[range(-n, n + 1) for n in reach]))) @ reciprocal
    squared = (waves**2).sum(1)
    waves, squared = waves[squared > 0], squared[squared > 0]
    volume = abs(np.linalg.det(cell))
    structure = abs(np.exp(1j * waves @ positions.T) @ charges) ** 2
    total = 2 * np.pi / volume * (np.exp(-squared / (4 * alpha**2)) / squared * structure).sum()
    total -= alpha / np.sqrt(np.pi) * (charges**2).sum()
    total -= np.pi / (2 * volume * alpha**2) * charges.sum() ** 2
    return units.COULOMB_CONSTANT * total


@pytest.mark.parametrize("cutoff", [4.0, 5.0, 6.0])
@pytest.mark.parametrize("name", CRYSTALS)
def test_madelung_constants(name, cutoff):
    """Primitive cells, two atoms, much smaller than the cutoff; every cutoff means another Ewald alpha."""
    lattice, anion, nearest, madelung = CRYSTALS[name]
    edge = NEAREST / nearest
    positions = np.array([[0.0, 0.0, 0.0], anion]) * edge + 0.123
    energy = energy_of(np.array([1.0, -1.0]), positions, lattice * edge, cutoff=cutoff)
    assert energy == pytest.approx(-madelung * units.COULOMB_CONSTANT / NEAREST, rel=2e-5)


def test_charged_cell_is_the_wigner_crystal():
    """Point charges on a simple cubic lattice in a uniform background: E = -2.837297 k q^2 / (2 L).

    The lattice constant is that of Makov and Payne, Phys. Rev. B 51, 4014 (1995).
    """
    for edge, charge in ((9.0, 1.0), (14.0, -0.7)):
        energy = energy_of(np.array([charge]), np.array([[1.0, 2.0, 3.0]]), np.eye(3) * edge)
        assert energy == pytest.approx(-2.837297479 * units.COULOMB_CONSTANT * charge**2 / (2 * edge), rel=2e-5)


CELLS = {
    "cubic": np.eye(3) * 9.0,
    "tilted": np.array([[9.0, 0, 0], [3.1, 8.0, 0], [-4.0, 2.5, 8.5]]),
    "left-handed": np.array([[0, 7.0, 0.5], [9.0, 0, 0], [0, 1.0, 8.0]]),
    "flat": np.diag([3.0, 11.0, 21.0]),
}


@pytest.mark.parametrize("net", [0.0, 1.5])
@pytest.mark.parametrize("name", CELLS)
def test_mesh_equals_direct_sum(name, net):
    rng, cell = np.random.default_rng(1), CELLS[name]
    positions = rng.random((16, 3)) @ cell + 30.0
    charges = rng.normal(size=16)
    charges += (net - charges.sum()) / 16
    expected = direct_long_range(charges, positions, cell, electrostatics.splitting(5.0))
    q, r, c = (torch.from_numpy(array) for array in (charges, positions, cell))
    r.requires_grad_()
    energy = electrostatics.reciprocal_energy(q, r, c, cutoff=5.0)
    assert energy.item() == pytest.approx(expected, abs=1e-4)
    (gradient,) = torch.autograd.grad(energy, r)
    step = np.zeros_like(positions)
    step[3, 1] = 1e-5
    slope = direct_long_range(charges, positions + step, cell, electrostatics.splitting(5.0))
    slope -= direct_long_range(charges, positions - step, cell, electrostatics.splitting(5.0))
    assert float(gradient[3, 1]) == pytest.approx(slope / 2e-5, abs=2e-4)


def test_whole_coulomb_energy_against_an_independent_ewald_sum():
    """Damping only matters at contact: with all atoms 3.6 Å apart the energy is that of point charges."""
    rng, cell = np.random.default_rng(2), CELLS["tilted"] * 1.3
    grid = np.array(list(itertools.product(range(2), repeat=3))) / 2.0
    positions = (grid + rng.uniform(-0.02, 0.02, grid.shape)) @ cell
    charges = rng.normal(size=8)
    alpha, reach = 0.55, range(-3, 4)
    expected = direct_long_range(charges, positions, cell, alpha)
    for shift in itertools.product(reach, repeat=3):
        distance = np.linalg.norm(positions[None] - positions[:, None] + np.array(shift) @ cell, axis=-1)
        far = distance > 1e-9
        assert distance[far].min() > 3.6
        safe = np.where(far, distance, 1.0)
        expected += 0.5 * units.COULOMB_CONSTANT * (np.outer(charges, charges) * erfc(alpha * safe) / safe * far).sum()
    energies = [energy_of(charges, positions, cell, cutoff=cutoff) for cutoff in (4.0, 5.0, 6.5)]
    assert energies == pytest.approx([expected] * 3, abs=1e-3)


def test_damping():
    k = units.COULOMB_CONSTANT
    far = torch.tensor([3.5, 6.0, 40.0], dtype=torch.float64)
    energy = electrostatics.damped_coulomb(torch.full_like(far, -0.6), far)
    assert (energy * far / (-0.6 * k) - 1).abs().tolist() == pytest.approx([5.3e-7, 0.0, 0.0], abs=1e-8)
    # at contact x = 0: softplus(0) = log 2 / beta
    contact = electrostatics.damped_coulomb(
        torch.tensor(1.0, dtype=torch.float64), torch.tensor(2.2, dtype=torch.float64)
    )
    assert float(contact) == pytest.approx(k / (2.2 * (1 + np.log(2) / 18.7)), rel=1e-12)
    # finite where atoms coincide, and flat: no force pulls opposite charges into each other
    zero = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    value = electrostatics.damped_coulomb(torch.ones(1, dtype=torch.float64), zero)
    assert value.item() == pytest.approx(k / 2.2, rel=1e-8)
    assert abs(float(torch.autograd.grad(value.sum(), zero)[0])) < 1e-6


def test_nothing_singular_where_atoms_of_a_cluster_coincide():
    pair = electrostatics.damped_coulomb(torch.tensor([1.0, 1.0]).double(), torch.tensor([0.0, 1e-8]).double())
    assert torch.isfinite(pair).all()


def test_second_derivatives_of_the_mesh_in_positions_charges_and_cell():
    """Training on forces and virials differentiates twice; the wave vector zero must not turn that into nan."""
    torch.manual_seed(0)
    cell = torch.tensor([[2.8, 0, 0], [0.5, 2.5, 0], [0.3, -0.4, 2.7]], dtype=torch.float64)
    point = [torch.tensor([0.4, -0.7], dtype=torch.float64), torch.rand(2, 3, dtype=torch.float64) @ cell, cell]
    first, second = ([torch.randn_like(part) for part in point] for _ in range(2))

    def slope(shift):
        """The derivative of the energy along ``first``, at a point shifted along ``second``; with its graph."""
        moved = [(part + shift * along).requires_grad_() for part, along in zip(point, second, strict=True)]
        energy = electrostatics.reciprocal_energy(*moved, cutoff=5.0)
        gradients = torch.autograd.grad(energy, moved, create_graph=True)
        return sum((g * along).sum() for g, along in zip(gradients, first, strict=True)), moved

    value, moved = slope(0.0)
    curvature = torch.autograd.grad(value, moved)
    exact = sum((g * along).sum() for g, along in zip(curvature, second, strict=True)).item()
    assert abs(exact) > 1.0
    assert exact == pytest.approx((slope(1e-5)[0] - slope(-1e-5)[0]).item() / 2e-5, rel=1e-6)


def test_a_box_for_a_mesh_beyond_all_memory_is_refused():
    with pytest.raises(InputError, match="pbc=False"):
        energy_of(np.array([1.0, -1.0]), np.array([[0.0, 0, 0], [0, 0, 3.0]]), np.eye(3) * 900.0)
