"""Lifting: labels move by the difference of two models, with every derivative, and dispersion where it belongs."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from bamboo.forcefield import ForceField, ForceFieldConfig, ForceFieldOutput
from bamboo.learn.lift import lift_frames, predict
from bamboo.neighbors import find_neighbors
from bamboo.nn.get import NetworkConfig
from bamboo.quantum.dataset import Frame
from bamboo.quantum.labels import Labels
from bamboo.system import Batch, System
from bamboo.terms.d3_table import fill_d3_table

POSITIONS = np.array([[0.0, 0.0, 0.12], [0.0, 0.76, -0.47], [0.1, -0.76, -0.47], [0.3, 0.2, 2.0]])
CLUSTER = System(np.array([8, 1, 1, 3]), POSITIONS, np.zeros((3, 3)), False, 1.0)
BOX = System(np.array([8, 1, 1, 3]), POSITIONS, 8.0 * np.eye(3) + 0.5 * np.eye(3, k=1), True, 0.0)
GOOD = "B3LYP/def2-SVPD, RI"  # contains no dispersion


def force_field(seed: int) -> ForceField:
    torch.manual_seed(seed)
    made = ForceField(ForceFieldConfig(network=NetworkConfig(channels=16, heads=4, n_radial=8)))
    fill_d3_table(made.dispersion)
    made.known[[1, 3, 8]] = True
    made.reference_energy[[1, 3, 8]] = torch.tensor([1.0, 2.0, 3.0 + seed], dtype=torch.float64)
    made.reference_electronegativity[[1, 3, 8]] = 0.5
    return made.to_dtype(torch.float64)


def frame(system: System, *, level: str = "cheap", energy: float = 0.0, forces: np.ndarray | None = None) -> Frame:
    zero = np.zeros((system.n_atoms, 3)) if forces is None else forces
    virial = np.full((3, 3), 0.1) if system.pbc else None
    return Frame(system, Labels(level, energy, zero, virial=virial), "lithium", "scan", "run")


def output(model: ForceField, system: System) -> ForceFieldOutput:
    batch = Batch.from_systems([system])
    return model(batch, find_neighbors(batch, model.config.network.cutoff, model.config.dispersion.cutoff))


@pytest.mark.parametrize("system", [CLUSTER, BOX], ids=["cluster", "box"])
def test_prediction_is_the_model_less_the_dispersion_that_a_level_has_not(system: System) -> None:
    model = force_field(1)
    whole = output(model, system)
    same = predict(model, frame(system), level="cheap")
    assert same.energy == pytest.approx(float(whole.energy), rel=1e-10)
    np.testing.assert_allclose(same.forces, whole.forces.numpy(), atol=1e-9)
    np.testing.assert_allclose(same.charges, whole.charges.numpy(), atol=1e-12)
    bare = predict(model, frame(system), level=GOOD)
    assert abs(float(whole.terms["dispersion"])) > 1e-3
    assert bare.energy == pytest.approx(float(whole.energy - whole.terms["dispersion"]), rel=1e-10)

    def energy(moved: System) -> float:
        return predict(model, frame(moved), level=GOOD).energy

    step = np.zeros_like(system.positions)
    step[1, 2] = 1.0e-4  # a hydrogen: lithium has no dispersion
    up, down = (energy(replace(system, positions=system.positions + sign * step)) for sign in (1, -1))
    assert bare.forces is not None and bare.forces[1, 2] == pytest.approx(-(up - down) / 2.0e-4, abs=1.0e-6)
    assert (bare.virial is None) != system.pbc and (bare.dipole is None) == system.pbc
    if system.pbc and bare.virial is not None:
        strained = (np.eye(3) + sign * 1.0e-4 * np.diag([1.0, 0.0, 0.0]) for sign in (1, -1))
        up, down = (energy(replace(system, positions=POSITIONS @ s, cell=system.cell @ s)) for s in strained)
        # the tolerance is that of the mesh of the reciprocal space
        assert bare.virial[0, 0] == pytest.approx(-(up - down) / 2.0e-4, abs=2.0e-4)


@pytest.mark.parametrize("system", [CLUSTER, BOX], ids=["cluster", "box"])
def test_what_the_base_cannot_explain_is_kept(system: System) -> None:
    base, tuned = force_field(2), force_field(3)
    forces = 0.01 * np.arange(12.0).reshape(4, 3)
    low, high = output(base, system), predict(tuned, frame(system), level=GOOD)
    cheap = frame(system, energy=float(low.energy) + 5.0, forces=low.forces.numpy() + forces)
    (lifted,) = lift_frames(base, [tuned], [cheap], level=GOOD)
    labels = lifted.labels
    assert labels.energy == pytest.approx(high.energy + 5.0, rel=1e-10)
    np.testing.assert_allclose(labels.forces, high.forces + forces, atol=1e-9)
    np.testing.assert_allclose(labels.charges, high.charges)
    if system.pbc:
        np.testing.assert_allclose(labels.virial, high.virial + 0.1 - low.virial[0].numpy(), atol=1e-9)
    assert labels.level == f"{GOOD}; lifted" and not labels.contains_dispersion
    assert (lifted.kind, lifted.trajectory) == (cheap.kind, cheap.trajectory)


def test_labels_that_the_base_does_not_explain_are_left_out() -> None:
    base, tuned = force_field(2), force_field(3)
    close = POSITIONS.copy()
    close[3] = [0.0, 0.0, 0.82]  # lithium in the wall of oxygen: forces far above 1.4 eV/Å
    for system, residuals in ((CLUSTER, (0.12, 0.14)), (replace(CLUSTER, positions=close), (0.14, None))):
        forces = output(base, system).forces.numpy()
        sound, unexplained = residuals
        assert len(lift_frames(base, [tuned], [frame(system, forces=forces + sound)], level=GOOD)) == 1
        size = np.sqrt(np.mean(forces**2))
        beyond = 0.12 * size if unexplained is None else unexplained
        assert (size > 1.4) == (unexplained is None)
        signs = np.resize([1.0, -1.0], forces.shape)
        assert len(lift_frames(base, [tuned], [frame(system, forces=forces + beyond * signs)], level=GOOD)) == 0


@pytest.mark.parametrize("system", [CLUSTER, BOX], ids=["cluster", "box"])
def test_several_tuned_models_lift_by_their_mean(system: System) -> None:
    base, tuned, cheap = force_field(2), [force_field(3), force_field(4)], frame(system, energy=1.0)
    base_forces = output(base, system).forces.numpy()
    cheap = replace(cheap, labels=replace(cheap.labels, forces=base_forces))
    (both,) = lift_frames(base, tuned, [cheap], level=GOOD)
    alone = [lift_frames(base, [model], [cheap], level=GOOD)[0] for model in tuned]
    assert abs(alone[0].labels.energy - alone[1].labels.energy) > 1e-3
    for name in ("energy", "forces", "virial", "charges", "dipole"):
        values = [getattr(one.labels, name) for one in alone]
        if values[0] is None:
            assert getattr(both.labels, name) is None
        else:
            np.testing.assert_allclose(getattr(both.labels, name), (values[0] + values[1]) / 2.0, atol=1e-12)


def test_absent_labels_stay_absent() -> None:
    cheap = replace(frame(CLUSTER), labels=Labels("cheap", 1.0))
    (lifted,) = lift_frames(force_field(2), [force_field(3)], [cheap], level=GOOD)
    assert lifted.labels.forces is None and lifted.labels.charges is not None
