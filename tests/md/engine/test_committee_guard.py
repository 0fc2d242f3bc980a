"""The guard that stops a run where the models of a committee part."""

import ase.io
import numpy as np
import pytest

from bamboo.errors import GuardError
from md.engine.guards import CommitteeAgreement
from md.engine.integrators import VelocityVerlet
from md.engine.simulation import Simulation
from md.engine.state import MDState


@pytest.fixture
def state(toys) -> MDState:
    """Two boxes of argon of different sizes with known forces; the second is the more compressed."""
    systems = [toys.argon_box(seed=1, lattice=5.6), toys.argon_box(seed=2, lattice=5.0)]
    state = MDState.from_systems(systems, temperature_K=50.0, seed=1)
    state.evaluate(toys.LennardJones())
    return state


def committee(toys, **changes) -> CommitteeAgreement:
    """Wells of 0.9 and 1.1 times the depth: with the first model, a standard deviation of a tenth of each force."""
    return CommitteeAgreement(others=[toys.LennardJones(epsilon=0.0103 * k) for k in (0.9, 1.1)], **changes)


def test_the_deviation_of_scaled_models_is_that_part_of_the_force(toys, state):
    np.testing.assert_allclose(committee(toys).deviations(state), 0.1 * state.forces.norm(dim=1), rtol=1e-10)


def test_the_worst_atom_is_named_in_its_own_box(toys, state):
    worst = 0.1 * state.forces.norm(dim=1)
    atom, largest = int(worst.argmax()), float(worst.max())
    assert atom >= 32
    assert committee(toys, limit=1.001 * largest).check(state) is None
    violation = committee(toys, limit=0.999 * largest).check(state)
    assert violation is not None and violation.replica == 1 and violation.atoms == (atom - 32,)
    assert f"the force on Ar{atom - 32} by {largest:.2f} eV/Å" in violation.what


def test_a_run_stops_and_the_frame_marks_the_atom(toys, state, tmp_path):
    guard = committee(toys, limit=1.0e-3, stride=3)
    simulation = Simulation(
        state,
        toys.LennardJones(),
        integrator=VelocityVerlet(timestep_fs=1.0),
        guards=[guard],
        frame_folder=tmp_path,
        stage="03-nvt",
    )
    with pytest.raises(GuardError, match=r"03-nvt stopped at 0 ps .step 0., replica 1: the models disagree.*label"):
        simulation.run(5)
    frame = ase.io.read(tmp_path / "blowup.extxyz")
    violation = guard.check(state)
    assert violation is not None
    assert tuple(np.flatnonzero(frame.arrays["offending"])) == violation.atoms
    assert len(frame) == 32
