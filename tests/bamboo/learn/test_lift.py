"""Lifting: what is taken out of the cheap labels and what comes back, against the terms of the models themselves."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from bamboo.errors import InputError
from bamboo.forcefield import ForceField, ForceFieldConfig
from bamboo.learn.lift import Remainder, difference_frames, electrostatic_part, lift_frames
from bamboo.neighbors import find_neighbors
from bamboo.nn.get import NetworkConfig
from bamboo.quantum.dataset import Frame
from bamboo.quantum.labels import Labels
from bamboo.system import Batch, System
from bamboo.terms.d3_table import fill_d3_table

POSITIONS = np.array([[0.0, 0.0, 0.12], [0.0, 0.76, -0.47], [0.1, -0.76, -0.47], [0.3, 0.2, 2.0]])


def force_field(seed: int, *, difference: bool = False) -> ForceField:
    torch.manual_seed(seed)
    network = NetworkConfig(channels=16, heads=4, n_radial=8)
    made = ForceField(ForceFieldConfig(network=network, repulsion=not difference))
    if not difference:
        fill_d3_table(made.dispersion)
    made.known[[1, 3, 8]] = True
    made.reference_energy[[1, 3, 8]] = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    made.reference_electronegativity[[1, 3, 8]] = 0.5
    return made.to_dtype(torch.float64)


def frame(system: System, *, level: str, energy: float = 0.0, forces: np.ndarray | None = None) -> Frame:
    zero = np.zeros((system.n_atoms, 3)) if forces is None else forces
    virial = np.zeros((3, 3)) if system.pbc else None
    return Frame(system, Labels(level, energy, zero, virial=virial), "lithium", "scan", "run")


CLUSTER = System(np.array([8, 1, 1, 3]), POSITIONS, np.zeros((3, 3)), False, 1.0)
BOX = System(np.array([8, 1, 1, 3]), POSITIONS, 8.0 * np.eye(3) + 0.5 * np.eye(3, k=1), True, 0.0)


def output(model: ForceField, system: System):
    batch = Batch.from_systems([system])
    return model(batch, find_neighbors(batch, model.config.network.cutoff, model.config.dispersion.cutoff))


def test_electrostatic_part_is_the_coulomb_energy_alone() -> None:
    base = force_field(0)
    part = output(electrostatic_part(base), CLUSTER)
    assert float(part.terms["electrostatic"]) == pytest.approx(float(output(base, CLUSTER).terms["electrostatic"]))
    assert float(part.terms["network"]) == float(part.terms["electronegativity"]) == 0.0


@pytest.mark.parametrize("system", [CLUSTER, BOX], ids=["cluster", "box"])
def test_remainder_of_the_base_model_is_its_short_range(system: System) -> None:
    """Labels made by the base model itself leave network + electronegativity + repulsion + reference; F = -dE/dx."""
    base = force_field(1)

    def remainder(moved: System) -> Labels:
        made = output(base, moved)
        labelled = frame(moved, level="cheap", energy=float(made.energy), forces=made.forces.numpy())
        return Remainder(base)(replace(labelled, labels=replace(labelled.labels, virial=made.virial[0].numpy())))

    terms = output(base, system).terms
    expected = sum(float(terms[name]) for name in ("network", "electronegativity", "repulsion", "reference"))
    found = remainder(system)
    assert found.energy == pytest.approx(expected, rel=1.0e-9)
    step = np.zeros_like(system.positions)
    step[1, 2] = 1.0e-4  # a hydrogen: lithium has no dispersion
    up, down = (remainder(replace(system, positions=system.positions + sign * step)).energy for sign in (1, -1))
    assert found.forces[1, 2] == pytest.approx(-(up - down) / 2.0e-4, abs=1.0e-6)
    strain = np.zeros((3, 3))
    strain[0, 0] = 1.0e-4
    if system.pbc:
        up, down = (
            remainder(
                replace(
                    system,
                    positions=system.positions @ (np.eye(3) + sign * strain),
                    cell=system.cell @ (np.eye(3) + sign * strain),
                )
            ).energy
            for sign in (1, -1)
        )
        # the tolerance is that of the mesh of the reciprocal space
        assert found.virial[0, 0] == pytest.approx(-(up - down) / 2.0e-4, abs=2.0e-4)


@pytest.mark.parametrize("system", [CLUSTER, BOX], ids=["cluster", "box"])
def test_lifted_labels_are_remainder_plus_difference(system: System) -> None:
    base, difference = force_field(2), force_field(3, difference=True)
    cheap = frame(system, level="cheap", energy=5.0, forces=np.arange(12.0).reshape(4, 3))
    (lifted,) = lift_frames(base, difference, [cheap], level="good")
    low, high = Remainder(base)(cheap), output(difference, system)
    assert lifted.labels.energy == pytest.approx(low.energy + float(high.energy), rel=1.0e-9)
    np.testing.assert_allclose(lifted.labels.forces, low.forces + high.forces.numpy(), atol=1.0e-9)
    np.testing.assert_allclose(lifted.labels.charges, high.charges.numpy(), atol=1.0e-9)
    assert lifted.labels.level == "good; lifted" and (lifted.kind, lifted.trajectory) == (cheap.kind, cheap.trajectory)
    assert (lifted.labels.dipole is None) == system.pbc and (lifted.labels.virial is None) != system.pbc


def test_difference_of_pairs_and_missing_partners() -> None:
    """A perfect difference model would give the good label back: remainder + difference label = good label."""
    base = force_field(4)
    cheap = frame(CLUSTER, level="cheap", energy=-3.0, forces=np.ones((4, 3)))
    good = frame(CLUSTER, level="good", energy=-7.0, forces=np.full((4, 3), 0.5))
    (pair,) = difference_frames(base, [cheap], [good])
    low = Remainder(base)(cheap)
    assert pair.labels.energy + low.energy == pytest.approx(-7.0)
    np.testing.assert_allclose(pair.labels.forces + low.forces, 0.5)
    assert pair.labels.level == "good - cheap"
    moved = replace(good, system=replace(CLUSTER, positions=CLUSTER.positions + 0.01))
    with pytest.raises(InputError, match="1 frames have no label of the cheap level, the first in 'run'"):
        difference_frames(base, [cheap], [moved])
