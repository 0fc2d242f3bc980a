"""FIRE on boxes too crowded for dynamics."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from bamboo.errors import InputError
from md.config import load_config
from md.engine.minimiser import LIQUID_FORCE, minimise
from md.engine.state import MDState


def test_crystal_is_found_again(toys):
    """A shaken crystal relaxes to the energy of the perfect one, whose forces vanish by symmetry; replicas differ."""
    potential = toys.LennardJones()
    perfect, shaken = toys.argon_box(noise=0.0), toys.argon_box(noise=0.25, lattice=5.4)
    state = MDState.from_systems([perfect, shaken], temperature_K=100.0, seed=0)
    momenta = state.momenta
    result = minimise(state, potential, max_steps=300, force_tolerance=1e-4)
    reference = potential.evaluate(
        MDState.from_systems([toys.argon_box(noise=0.0, lattice=5.4)], temperature_K=0, seed=0).batch
    )
    assert result.converged and 20 < result.n_steps < 300
    assert float(result.max_force.max()) < 1e-4
    assert float(result.energy[1]) == pytest.approx(float(reference.energy[0]), abs=1e-5)
    np.testing.assert_array_equal(state.momenta, momenta)
    np.testing.assert_allclose(state.batch.positions[:32], perfect.positions, atol=1e-12)


def test_overlaps_part_in_small_steps(toys):
    """Two argon atoms 0.8 Å apart feel 1e6 eV/Å, yet no atom moves more than 0.1 Å in a step."""
    box = toys.argon_box(noise=0.05)
    positions = box.positions.copy()
    positions[1] = positions[0] + [0.8, 0.0, 0.0]
    state = MDState.from_systems([replace(box, positions=positions)], temperature_K=0.0, seed=0)
    seen = []

    class Watched(toys.LennardJones):
        def evaluate(self, batch):
            seen.append(batch.positions)
            return super().evaluate(batch)

    result = minimise(state, Watched(), max_steps=200, force_tolerance=0.01)
    steps = torch.stack([(b - a).norm(dim=1).max() for a, b in pairwise(seen)])
    assert float(steps.max()) < 0.1 + 1e-9 and float(steps.max()) > 0.09
    assert result.converged and float(result.energy[0]) < -1.0


def test_settings_are_checked(toys):
    state = MDState.from_systems([toys.argon_box()], temperature_K=0.0, seed=0)
    with pytest.raises(InputError, match="must be positive"):
        minimise(state, toys.LennardJones(), max_displacement=0.0)


def test_relaxation_ends_at_the_forces_of_a_liquid(toys):
    """Not at rest: a liquid has such forces anyway, and on the way to rest ions collapse that nothing screens yet."""
    state = MDState.from_systems([toys.argon_box(noise=0.6)], temperature_K=100.0, seed=0)
    result = minimise(state, toys.LennardJones())
    assert result.converged and 0.2 < float(result.max_force.max()) < LIQUID_FORCE
    assert load_config(Path(__file__).parents[3] / "examples/electrolyte.yaml").stages[0].force == LIQUID_FORCE
