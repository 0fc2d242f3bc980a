"""The reciprocal sum for training: against Wigner and Madelung constants, the mesh, and its own derivatives."""

import math

import numpy as np
import pytest
import torch

from bamboo import units
from bamboo.terms import electrostatics, ewald

TILTED = np.array([[9.0, 0.0, 0.0], [3.1, 8.0, 0.0], [-4.0, 2.5, 8.5]])


def random_box(n_atoms: int, cell: np.ndarray, *, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return charges with a net charge, positions and cell."""
    rng = np.random.default_rng(seed)
    charges = rng.normal(size=n_atoms)
    return torch.tensor(charges), torch.tensor(rng.random((n_atoms, 3)) @ cell), torch.tensor(cell)


def derivatives(term, charges, positions, cell) -> list[torch.Tensor]:
    """Return energy, its gradient in charges, positions and strain, and the gradient of a scalar of those."""
    inputs = [charges.clone(), positions.clone(), torch.zeros(3, 3, dtype=torch.float64)]
    q, r, strain = (tensor.requires_grad_() for tensor in inputs)
    energy = term(q, r + r @ strain, cell + cell @ strain, cutoff=5.0)
    first = torch.autograd.grad(energy, (q, r, strain), create_graph=True)
    second = torch.autograd.grad(sum(tensor.sin().sum() for tensor in first), (q, r, strain))
    return [energy.detach(), *(tensor.detach() for tensor in first), *second]


def test_point_charges_in_a_background_are_the_wigner_crystal():
    """E = -2.837297 k q^2 / (2 L), Makov and Payne, Phys. Rev. B 51, 4014 (1995); erfc(alpha L) is 1e-16 here."""
    edge, charge = 14.0, -0.7
    energy = ewald.reciprocal_energy(
        torch.tensor([charge]).double(),
        torch.tensor([[1.0, 2.0, 3.0]]).double(),
        torch.eye(3).double() * edge,
        cutoff=5.0,
    )
    assert float(energy) == pytest.approx(-2.837297479 * units.COULOMB_CONSTANT * charge**2 / (2 * edge), rel=1e-6)


def test_long_range_part_of_rock_salt_is_the_madelung_energy():
    """Nearest distance 8 Å: the short-range part erfc(alpha r) / r of the nearest pairs is 2e-13 of 1/r."""
    nearest = 8.0
    lattice = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 1.0], [1.0, 1.0, 0.0]]).double() * nearest
    positions = torch.tensor([[0.3, 0.1, 0.2], [nearest + 0.3, 0.1, 0.2]]).double()
    energy = ewald.reciprocal_energy(torch.tensor([1.0, -1.0]).double(), positions, lattice, cutoff=5.0)
    assert float(energy) == pytest.approx(-1.747564594633182 * units.COULOMB_CONSTANT / nearest, rel=1e-6)


@pytest.mark.parametrize("cell", [np.eye(3) * 9.0, TILTED, np.diag([3.0, 11.0, 21.0]), TILTED[[1, 0, 2]]])
def test_equals_the_mesh_with_first_and_second_derivatives(cell):
    """The waves left out carry 1e-5 of the force between charges of 1 e; second derivatives weigh them once more."""
    box = random_box(20, cell, seed=1)
    ours = derivatives(ewald.reciprocal_energy, *box)
    mesh = derivatives(electrostatics.reciprocal_energy, *box)
    for got, expected, tolerance in zip(ours, mesh, [3e-5] * 4 + [2e-4] * 3, strict=True):
        assert float((got - expected).abs().max() / expected.abs().max()) < tolerance


def test_derivatives_are_those_of_the_energy():
    charges, positions, cell = random_box(3, TILTED, seed=2)
    strain = torch.zeros(3, 3, dtype=torch.float64)

    def energy(q: torch.Tensor, r: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return ewald.reciprocal_energy(q, r + r @ s, cell + cell @ s, cutoff=2.5)

    inputs = [tensor.requires_grad_() for tensor in (charges, positions, strain)]
    assert torch.autograd.gradcheck(energy, inputs)
    assert torch.autograd.gradgradcheck(energy, inputs)


def test_half_space_holds_one_of_every_pair_of_waves():
    cell, k_max = torch.tensor(TILTED), 3.0
    half = {tuple(m) for m in ewald._half_space(cell, k_max).long().tolist()}
    reach = range(-12, 13)
    inverse = 2.0 * math.pi * np.linalg.inv(TILTED).T
    waves = np.array([(a, b, c) for a in reach for b in reach for c in reach])
    inside = {tuple(m) for m in waves[(np.linalg.norm(waves @ inverse, axis=1) < k_max)].tolist()} - {(0, 0, 0)}
    opposite = {tuple(-number for number in m) for m in half}
    assert not half & opposite
    assert half | opposite == inside
