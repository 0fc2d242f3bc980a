"""Energy and forces are continuous where a pair enters or leaves a cutoff or a switch."""

import numpy as np
import pytest
import torch

from bamboo.elements import COVALENT_RADII
from bamboo.system import System
from bamboo.terms import electrostatics
from bamboo.terms.repulsion import INNER, OUTER

NETWORK, DISPERSION = 5.0, 7.0  # Å, cutoffs of the test force field
STEP = 1e-7  # Å


def trimer(distance, *, pbc=False):
    """Atoms O and C at a given distance, and an F near the first: the network has something to look at."""
    positions = np.array([[0.0, 0, 0], [1.3, 0.4, -0.2], [-distance, 0.0, 0.0]])
    cell = np.eye(3) * 15.3 * pbc
    return System(np.array([8, 9, 6]), positions + 1.0, cell, pbc=pbc)


def jump(evaluate, field, distance, **options):
    """Return energy and force just inside and the changes over 2e-7 Å, with the smooth part of the change removed."""
    below, above = (evaluate(field, trimer(distance + side, **options)) for side in (-STEP, STEP))
    slope = float(below.forces[2, 0])  # dE/d(distance), as atom 2 moves along -x
    energy = float((above.energy - below.energy)[0]) - 2 * STEP * slope
    return abs(energy), float((above.forces - below.forces).abs().max()), below


@pytest.mark.parametrize("attention", ["get", "gedt"])
def test_network_cutoff(evaluate, make_force_field, attention, engine):
    """Full field of a cluster (Coulomb without cutoff): nothing jumps, and the pair was felt before."""
    if attention == "gedt" and engine == "native":
        pytest.skip("the native engine knows the plain attention only")
    field = make_force_field("all", attention=attention)
    energy, force, _ = jump(evaluate, field, NETWORK)
    assert energy < 1e-11
    assert force < 1e-6
    network = make_force_field("network", attention=attention)
    inside, outside = (evaluate(network, trimer(distance)).energy for distance in (4.0, 5.5))
    assert abs(float(inside - outside)) > 1e-3


def test_network_does_not_reach_beyond_its_cutoff(evaluate, make_force_field):
    field = make_force_field("network")
    output = evaluate(field, trimer(5.0 + 1e-9))
    assert float(output.forces[2].abs().max()) < 1e-12
    assert float((output.energy - evaluate(field, trimer(6.9)).energy).abs().max()) < 1e-12


@pytest.mark.parametrize("distance", [0.8 * DISPERSION, DISPERSION])
def test_dispersion_switch_and_cutoff(evaluate, make_force_field, distance):
    for term in ("dispersion", "all"):
        energy, force, _ = jump(evaluate, make_force_field(term), distance)
        assert energy < 1e-11
        assert force < 1e-7
    field = make_force_field("dispersion")
    felt = evaluate(field, trimer(distance - 0.3)).forces[2].abs().max()
    assert float(felt) > 1e-6


@pytest.mark.parametrize("end", [INNER, OUTER])
def test_wall(evaluate, make_force_field, end):
    distance = end * (COVALENT_RADII[8] + COVALENT_RADII[6])
    energy, force, below = jump(evaluate, make_force_field("repulsion"), distance)
    stiffness = 1e5  # eV/Å^2, curvature of the wall
    assert energy < stiffness * STEP**2 * 4
    assert force < stiffness * STEP * 4
    assert end == OUTER or float(below.forces.abs().max()) > 1.0


def test_real_space_cutoff_of_the_charges(evaluate, make_force_field):
    """The Ewald split leaves a step of k q q erfc(3.25) / r_c, 1.2e-5 eV for unit charges, and nothing more."""
    field = make_force_field("electrostatic")
    energy, force, below = jump(evaluate, field, NETWORK, pbc=True)
    q = float((below.charges[0] * below.charges[2]).abs())
    tail = electrostatics.units.COULOMB_CONSTANT * q * float(torch.erfc(torch.tensor(3.25, dtype=torch.float64))) / 5.0
    assert energy == pytest.approx(tail, rel=0.05, abs=1e-10)
    assert q > 0.01
    assert force < 1e-4 * q


def test_no_step_anywhere_on_a_scan(evaluate, make_force_field, engine):
    """The energy between two distances is the work of the force (Simpson's rule), from contact to beyond cutoffs."""
    if engine == "triton":
        pytest.skip("661 systems take the interpreter too long; the tests above ask at every cutoff")
    field = make_force_field("all")
    distances = np.linspace(1.4, 8.0, 2 * 330 + 1)
    output = evaluate(field, *[trimer(distance) for distance in distances])
    forces = output.forces.view(-1, 3, 3)[:, 2, 0].numpy()
    energies = output.energy.numpy()
    width = distances[2] - distances[0]
    work = width / 6 * (forces[:-2:2] + 4 * forces[1:-1:2] + forces[2::2])
    assert np.abs(np.diff(energies[::2]) - work).max() < 1e-6
    assert np.ptp(energies) > 0.1
