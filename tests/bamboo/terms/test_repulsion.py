"""The wall between atoms: its value, its end, its smoothness."""

import math

import pytest
import torch

from bamboo import units
from bamboo.elements import COVALENT_RADII
from bamboo.terms.repulsion import INNER, LONGEST_WALL, OUTER, repulsion_energy


def energy(distance, z_i, z_j):
    r = torch.tensor(distance, dtype=torch.float64, requires_grad=True)
    value = repulsion_energy(r[None], torch.tensor([z_i]), torch.tensor([z_j]))[0]
    (slope,) = torch.autograd.grad(value, r)
    return value.item(), slope.item()


@pytest.mark.parametrize(("z_i", "z_j"), [(6, 8), (1, 1), (3, 9), (15, 17)])
def test_value_of_the_universal_potential(z_i, z_j):
    """Ziegler, Biersack, Littmark, Stopping and Range of Ions in Solids (1985): a = 0.8854 a0 / (Z^0.23 + Z^0.23)."""
    radii = COVALENT_RADII[z_i] + COVALENT_RADII[z_j]
    distance = 0.9 * INNER * radii
    x = distance / (0.8854 * units.BOHR / (z_i**0.23 + z_j**0.23))
    phi = (
        0.18175 * math.exp(-3.1998 * x)
        + 0.50986 * math.exp(-0.94229 * x)
        + 0.28022 * math.exp(-0.4029 * x)
        + 0.02817 * math.exp(-0.20162 * x)
    )
    assert energy(distance, z_i, z_j)[0] == pytest.approx(units.COULOMB_CONSTANT * z_i * z_j / distance * phi, rel=1e-3)


def test_united_atom_limit_is_the_bare_coulomb_energy():
    # the weights of the screening function add up to one
    assert energy(1e-6, 6, 6)[0] * 1e-6 == pytest.approx(36 * units.COULOMB_CONSTANT, rel=1e-4)


@pytest.mark.parametrize(("z_i", "z_j"), [(6, 8), (1, 3)])
def test_zero_beyond_and_smooth_at_both_ends_of_the_switch(z_i, z_j):
    radii = COVALENT_RADII[z_i] + COVALENT_RADII[z_j]
    assert energy(OUTER * radii * (1 + 1e-9), z_i, z_j) == (0.0, 0.0)
    for end in (INNER, OUTER):
        below, above = (energy(end * radii * (1 + side), z_i, z_j) for side in (-1e-7, 1e-7))
        assert below[0] == pytest.approx(above[0], rel=1e-5, abs=1e-9)
        assert below[1] == pytest.approx(above[1], rel=1e-5, abs=1e-5)


def test_no_wall_at_the_shortest_bonds_of_electrolytes():
    # C=O 1.19, C#N 1.15, H-F 0.92, O-H 0.96, C-H 1.08 Å
    for z_i, z_j, distance in ((6, 8, 1.19), (6, 7, 1.15), (1, 9, 0.92), (1, 8, 0.96), (1, 6, 1.08)):
        assert energy(distance, z_i, z_j)[0] == 0.0


def test_repulsive_everywhere_inside():
    radii = COVALENT_RADII[6] + COVALENT_RADII[8]
    for fraction in (0.1, 0.3, 0.5, 0.69):
        value, slope = energy(fraction * radii, 6, 8)
        assert value > 0
        assert slope < 0


def test_longest_wall_covers_all_elements():
    longest = 2 * OUTER * COVALENT_RADII[:87].max()
    assert longest == pytest.approx(LONGEST_WALL)
