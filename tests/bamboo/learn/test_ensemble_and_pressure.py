"""What several models say of a liquid, and the shift of a liquid's pressure: against direct evaluation."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch_geometric.data import Batch as Stack

from bamboo import units
from bamboo.errors import InputError
from bamboo.evaluator import Evaluator
from bamboo.learn.align import Liquid, arms, cluster_sample, molecular_pressure, shift_pressures, shifted_sample
from bamboo.learn.ensemble import ensemble_labels, majority, put_on_one_zero, rms_spread
from bamboo.learn.fit import TrainConfig, WeightsBlock, _check_labels, choose_trained, held_out_group
from bamboo.learn.loop import LoopConfig
from bamboo.learn.losses import LossWeights, deviations, loss_parts
from bamboo.learn.samples import make_sample, unpack
from bamboo.quantum.dataset import Frame, trajectory_in
from bamboo.quantum.labels import Labels
from bamboo.system import Batch, System

WATER = np.array([[0.0, 0.0, 0.12], [0.0, 0.76, -0.47], [0.0, -0.76, -0.47]])
CORNERS = np.array([[0.0, 0.0, 0.0], [3.1, 0.3, 0.2], [0.2, 3.2, 2.9]])
SHIFT = 500.0 * units.BAR


def water_box(seed: int = 0, *, scale: float = 1.0) -> System:
    """Three waters in a box; ``scale`` moves their centres of mass with the cell and leaves their shapes alone."""
    generator = np.random.default_rng(seed)
    shapes = [WATER + generator.normal(scale=0.05, size=(3, 3)) for _ in CORNERS]
    masses = np.array([15.999, 1.008, 1.008])
    centred = [shape - masses @ shape / masses.sum() for shape in shapes]
    places = CORNERS + generator.normal(scale=0.1, size=(3, 3))
    positions = np.concatenate([scale * place + shape for place, shape in zip(places, centred, strict=True)])
    return System(np.tile([8, 1, 1], 3), positions, scale * 6.3 * np.eye(3), pbc=True, molecule=np.repeat([0, 1, 2], 3))


def trained_energy(force_field: Any, system: System) -> float:
    sample = make_sample(force_field, Frame(system, Labels("own", 0.0), "periodic", "liquid", "own"))
    return float(force_field(*unpack(sample), fixed_terms=False).energy)


def test_molecular_pressure_is_the_derivative_by_the_volume_of_rigid_molecules(make_force_field: Any) -> None:
    """-dE/dV while the molecules keep their shapes, by finite difference; the atomic virial gives another number."""
    force_field, step = make_force_field("all"), 1.0e-5
    system = water_box()
    energies = [trained_energy(force_field, water_box(scale=1.0 + sign * step)) for sign in (1.0, -1.0)]
    slope = (energies[0] - energies[1]) / (2.0 * step)  # dE/dln(length) = -3 V P
    expected = -slope / (3.0 * system.volume)
    assert molecular_pressure(force_field, [system])[0] == pytest.approx(expected, rel=1.0e-5)
    sample = Stack.from_data_list(
        [make_sample(force_field, Frame(system, Labels("o", 0.0), "periodic", "liquid", "o"))]
    )
    atomic = float(force_field(*unpack(sample), fixed_terms=False).virial[0].trace()) / (3.0 * system.volume)
    assert abs(atomic - expected) > 0.1 * abs(expected)


def test_own_predictions_leave_only_the_shift_in_the_loss(make_force_field: Any) -> None:
    """At the start every part of the loss is zero but that of the pressure: H(V s / sqrt(n)) on a third of a tensor."""
    force_field, system = make_force_field("network"), water_box()
    data = Stack.from_data_list([shifted_sample(force_field, system, SHIFT)])
    batch, neighbors = unpack(data)
    parts = loss_parts(force_field(batch, neighbors, fixed_terms=False), data, batch.atoms_per_system)
    expected = (system.volume * SHIFT) ** 2 / system.n_atoms / 3.0
    assert float(parts.pop("molecular_virial")) == pytest.approx(expected, rel=1.0e-6)
    assert max(float(parts[name]) for name in ("forces", "energy", "charges")) < 1.0e-20
    assert "virial" not in parts  # the atomic virial may follow the pressure


def test_labelled_clusters_stack_with_liquids_and_count_molecule_by_molecule(make_force_field: Any) -> None:
    """In one batch with a liquid a cluster's labels give the same parts as alone; its virial has no say."""
    force_field = make_force_field()
    cluster = labelled_cluster(force_field)
    alone = Stack.from_data_list([make_sample(force_field, cluster)])
    both = Stack.from_data_list([cluster_sample(force_field, cluster), shifted_sample(force_field, water_box(), 0.0)])
    with torch.no_grad():
        force_field.energy_head[-1].weight.mul_(1.1)
    found = []
    for data in (alone, both):
        batch, neighbors = unpack(data)
        output = force_field(batch, neighbors, fixed_terms=False)
        found.append(deviations(output, data, batch.atoms_per_system))
    for name in ("forces", "molecular_forces", "energy", "charges"):
        own = found[0][name]
        assert own.abs().max() > 1e-9 or name == "charges"
        torch.testing.assert_close(found[1][name].flatten()[: own.numel()], own.flatten(), rtol=1e-8, atol=1e-10)
    assert found[1]["molecular_virial"].numel() == 9  # of the liquid alone


def labelled_cluster(force_field: Any) -> Frame:
    """Three waters labelled by the model itself."""
    box = water_box(9)
    system = System(box.numbers, box.positions, np.zeros((3, 3)), False, 0.0, box.molecule)
    output = Evaluator(force_field).evaluate(Batch.from_systems([system]))
    level = "ensemble of one"  # whose labels contain dispersion
    labels = Labels(level, float(output.energy), forces=output.forces.numpy(), charges=output.charges.numpy())
    return Frame(system, labels, "neutral", "dynamics", "own")


def test_a_shift_mends_what_is_wrong_with_the_clusters(make_force_field: Any) -> None:
    """The clusters are held to their labels, not to what the model said of them: a wrong model comes nearer to them."""
    truth, wrong = make_force_field("network"), make_force_field("network")
    cluster = labelled_cluster(truth)
    with torch.no_grad():
        wrong.energy_head[-1].weight.mul_(1.3)
    off = np.abs(evaluated_forces(wrong, [cluster.system]) - cluster.labels.forces).max()
    loop = LoopConfig(epochs=40, edges_per_batch=10**6, learning_rate=1.0e-3, weight_decay=0.0, ema_decay=0.9)
    mended = shift_pressures(
        wrong,
        [Liquid([water_box()], SHIFT)],
        clusters=[cluster],
        trained="energy_head",
        weights=LossWeights(forces=10.0),
        config=loop,
    )
    assert np.abs(evaluated_forces(mended, [cluster.system]) - cluster.labels.forces).max() < 0.7 * off


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_pressure_shifts_as_asked_and_the_rest_stays(make_force_field: Any, sign: float) -> None:
    force_field = make_force_field("network")
    systems, cluster = [water_box(seed) for seed in range(3)], labelled_cluster(force_field)
    before, forces = molecular_pressure(force_field, systems), evaluated_forces(force_field, systems)
    charge_weights = [value.clone() for value in force_field.charge_head.parameters()]
    loop = LoopConfig(epochs=40, edges_per_batch=10**6, learning_rate=1.0e-3, weight_decay=0.0, ema_decay=0.9)
    shifted = shift_pressures(
        force_field,
        [Liquid(systems, sign * SHIFT)],
        clusters=[cluster],
        trained="energy_head",
        weights=LossWeights(molecular_virial=10.0),
        config=loop,
    )
    gained = (molecular_pressure(shifted, systems) - before).mean()
    assert gained == pytest.approx(sign * SHIFT, rel=0.3)
    moved = np.sqrt(np.mean((evaluated_forces(shifted, systems) - forces) ** 2))
    assert moved < 0.1 * np.sqrt(np.mean(forces**2))
    for old, new in zip(charge_weights, shifted.charge_head.parameters(), strict=True):
        assert torch.equal(old, new)


def evaluated_forces(force_field: Any, systems: list[System]) -> np.ndarray:
    return np.concatenate([Evaluator(force_field).evaluate(Batch.from_systems([s])).forces.numpy() for s in systems])


def test_no_shift_leaves_every_weight_bit_for_bit(make_force_field: Any) -> None:
    force_field = make_force_field("all")
    before = {name: value.clone() for name, value in force_field.state_dict().items()}
    same = shift_pressures(
        force_field,
        [Liquid([water_box()], 0.0)],
        clusters=[],
        trained="all",
        weights=LossWeights(),
        config=LoopConfig(epochs=2),
    )
    assert all(torch.equal(value, before[name]) for name, value in same.state_dict().items())


def test_arms_need_molecules_and_carry_no_mass() -> None:
    system = water_box()
    moment = np.array([15.999, 1.008, 1.008]) @ arms(system)[:3]
    np.testing.assert_allclose(moment, 0.0, atol=1.0e-10)
    with pytest.raises(InputError, match="needs to know the molecules"):
        arms(replace(system, molecule=None))


@pytest.fixture(autouse=True)
def wide_majority(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models with random weights are far apart."""
    monkeypatch.setattr("bamboo.learn.ensemble.MOST_APART", 50.0)


@pytest.fixture(scope="module")
def teachers(make_force_field: Callable[..., Any]) -> dict[str, Evaluator]:
    return {f"t{seed}": Evaluator(make_force_field("all", seed=seed)) for seed in range(3)}


def test_mean_and_spread_are_those_of_direct_evaluation(teachers: dict[str, Evaluator]) -> None:
    systems = [water_box(seed) for seed in range(2)]
    labels = ensemble_labels(teachers, systems, trajectories=["a", "b"], temperature_K=300.0)
    for index, frame in enumerate(labels.mean):
        outputs = [teacher.evaluate(Batch.from_systems([frame.system])) for teacher in teachers.values()]
        for name in ("energy", "forces", "virial", "charges"):
            values = np.stack([getattr(output, name).numpy() for output in outputs])
            values = values[:, 0] if name in ("energy", "virial") else values
            np.testing.assert_allclose(getattr(frame.labels, name), values.mean(0), rtol=1e-9, atol=1e-9)
            spread = getattr(labels.spread[index].labels, name)
            np.testing.assert_allclose(spread, np.sqrt(((values - values.mean(0)) ** 2).sum(0) / 2.0), atol=1e-9)
        assert frame.labels.level == "ensemble of t0, t1, t2" and frame.labels.contains_dispersion
        assert frame.system.positions.astype(np.float32).astype(np.float64) == pytest.approx(frame.system.positions)
    pressures = labels.pressure.std(axis=1, ddof=1)
    assert rms_spread(labels)["pressure"] == pytest.approx(np.sqrt(np.mean(pressures**2)))
    with pytest.raises(InputError, match="one has no spread"):
        ensemble_labels({"t0": teachers["t0"]}, systems, trajectories=["a", "b"], temperature_K=300.0)


def test_a_model_with_a_hole_is_outvoted_and_no_majority_gives_no_label(teachers: dict[str, Evaluator]) -> None:
    """One of three models pushes an atom wrongly: the label is the mean of the two others. Two do: there is none."""

    class Pushed:
        def __init__(self, evaluator: Evaluator, push: float) -> None:
            self.evaluator, self.push = evaluator, push

        def evaluate(self, batch: Batch) -> Any:
            output = self.evaluator.evaluate(batch)
            forces = output.forces.clone()
            forces[4, 1] += self.push
            return replace(output, forces=forces)

    t0, t1, t2 = teachers.values()
    system = water_box()
    forces = np.stack([t.evaluate(Batch.from_systems([system])).forces.numpy() for t in (t0, t1, t2)])
    assert np.ptp(forces, axis=0).max() < 50.0  # they agree as they are
    common: dict[str, Any] = {"trajectories": ["a", "b"], "temperature_K": 300.0}
    one: Any = {"t0": t0, "t1": Pushed(t1, 150.0), "t2": t2}
    labels = ensemble_labels(one, [system, system], **common)
    assert labels.agrees.tolist() == [[True, False, True]] * 2 and labels.has_majority.all()
    assert labels.mean[0].labels.forces == pytest.approx(forces[[0, 2]].mean(axis=0), abs=1e-4)
    assert labels.spread[0].labels.forces == pytest.approx(forces[[0, 2]].std(axis=0, ddof=1), abs=1e-4)
    difference = np.diff(labels.pressure[0, [0, 2]])[0]
    assert rms_spread(labels)["pressure"] == pytest.approx(abs(difference) / np.sqrt(2.0))
    two: Any = {"t0": t0, "t1": Pushed(t1, 150.0), "t2": Pushed(t2, -150.0)}
    labels = ensemble_labels(two, [system, system], **common)
    assert labels.mean == labels.spread == [] and not labels.has_majority.any() and len(labels.pressure) == 2
    assert rms_spread(labels)["forces"] == 0.0
    apart = np.zeros((4, 2, 3)) + np.array([0.0, 0.0, 75.0, 75.0])[:, None, None]
    assert majority(apart).all()  # all at 37.5 from a median that nobody is near: two camps of one size
    assert majority(2.0 * apart).sum() == 0


def test_offsets_of_teachers_do_not_reach_the_labels(make_force_field: Any, make_cluster: Any) -> None:
    """Two copies of one model, one with other reference energies: on one zero their spread vanishes."""
    models = [make_force_field("all", seed=4), make_force_field("all", seed=4)]
    models[1].reference_energy[[1, 8]] += torch.tensor([-13.0, 400.0], dtype=torch.float64)
    frames = []
    for seed in range(4):
        whole = water_box(seed)
        for atoms in (range(3), range(2), range(6), range(9)):  # also OH: compositions that tell the elements apart
            index = list(atoms)
            system = System(whole.numbers[index], whole.positions[index], np.zeros((3, 3)), pbc=False)
            energy = float(Evaluator(models[0]).evaluate(Batch.from_systems([system])).energy)
            frames.append(Frame(system, Labels("truth", energy), "neutral", "dynamics", f"t{seed}"))
    names = ["right", "off"]
    evaluators = dict(zip(names, map(Evaluator, models), strict=True))
    common: dict[str, Any] = {"trajectories": ["a"], "temperature_K": 300.0}
    assert ensemble_labels(evaluators, [water_box()], **common).spread[0].labels.energy > 100.0
    put_on_one_zero(models, frames)
    labels = ensemble_labels(dict(zip(names, map(Evaluator, models), strict=True)), [water_box()], **common)
    assert labels.spread[0].labels.energy < 1.0e-2
    direct = float(evaluators["right"].evaluate(Batch.from_systems([labels.mean[0].system])).energy)
    assert labels.mean[0].labels.energy == pytest.approx(direct, abs=1.0e-2)


def test_ensemble_labels_train_beside_a_quantum_level(teachers: dict[str, Evaluator], make_force_field: Any) -> None:
    """Their dispersion is subtracted, that of DFT is not; they are no second level; they are reported as bulk."""
    (frame,) = ensemble_labels(teachers, [water_box()], trajectories=["a"], temperature_K=300.0).mean
    quantum = replace(frame, labels=replace(frame.labels, level="B3LYP/def2-SVPD"))
    _check_labels([frame, quantum], WeightsBlock())
    assert held_out_group(frame) == "bulk" and held_out_group(quantum) != "bulk"
    field = make_force_field("all")
    residual = [float(make_sample(field, given).energy) for given in (frame, quantum)]
    dispersion = float(Evaluator(field).evaluate(Batch.from_systems([frame.system])).terms["dispersion"])
    assert residual[1] - residual[0] == pytest.approx(dispersion, rel=1.0e-6)


def test_only_the_energy_head_moves_where_that_is_asked(make_force_field: Any) -> None:
    field = make_force_field("all")
    choose_trained(field, "energy_head")
    moving = {name for name, value in field.named_parameters() if value.requires_grad}
    assert moving and all(name.startswith("energy_head.") for name in moving)
    choose_trained(field, TrainConfig.model_fields["trained"].default)
    assert all(value.requires_grad for value in field.parameters())


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_trajectory_is_named_for_its_split(split: str) -> None:
    name = trajectory_in(split, run="1 mol/kg LiPF6 in DMC, 298 K, t0")
    assert Frame(water_box(), Labels("x", 0.0), "periodic", "liquid", name).split == split
    assert "1 mol per kg LiPF6 in DMC" in name
