"""The learning stage: labels lose what the network need not learn, the loop is exact, errors mean what they say."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch_geometric.data import Batch as Stack

from bamboo import checkpoint, units
from bamboo.errors import InputError
from bamboo.forcefield import ForceField, ForceFieldConfig
from bamboo.learn.evaluate import disagreement, evaluate
from bamboo.learn.fit import (
    LoopBlock,
    NetworkBlock,
    TrainConfig,
    WeightsBlock,
    _log,
    _pooled,
    measured_by,
    new_force_field,
    prepare_force_field,
    train,
)
from bamboo.learn.lift import LIFTED
from bamboo.learn.loop import Loop, LoopConfig, Progress
from bamboo.learn.losses import LossWeights, deviations, loss_parts, total_loss
from bamboo.learn.samples import (
    EdgeBudgetSampler,
    far_pairs,
    fit_references,
    make_sample,
    make_samples,
    unpack,
)
from bamboo.neighbors import find_neighbors
from bamboo.nn.get import NetworkConfig
from bamboo.quantum.dataset import Frame, write_frames
from bamboo.quantum.labels import Labels
from bamboo.system import Batch, System
from bamboo.terms.charges import bound
from bamboo.terms.d3_table import fill_d3_table
from bamboo.terms.dispersion import DispersionConfig

WATER = np.array([[0.0, 0.0, 0.12], [0.0, 0.76, -0.47], [0.0, -0.76, -0.47]])
LITHIUM = np.array([[0.0, 0.0, 2.0]])


def small_force_field(seed: int = 0) -> ForceField:
    torch.manual_seed(seed)
    force_field = ForceField(ForceFieldConfig(network=NetworkConfig(channels=16, heads=4, n_radial=8)))
    fill_d3_table(force_field.dispersion)
    force_field.known[[1, 3, 8]] = True
    return force_field.to_dtype(torch.float64)


def spring_frame(seed: int, *, lithium: bool) -> Frame:
    """A distorted water, with or without Li+, whose atoms are joined pairwise by springs: cheap and invariant."""
    generator = np.random.default_rng(seed)
    mean = np.concatenate([WATER, LITHIUM]) if lithium else WATER
    displacement = generator.normal(scale=0.05, size=mean.shape)
    positions = mean + displacement
    vector = positions[None] - positions[:, None]
    length = np.linalg.norm(vector, axis=-1) + np.eye(len(mean))
    stretch = length - np.linalg.norm(mean[None] - mean[:, None], axis=-1) - np.eye(len(mean))
    charges = np.array([-0.6, 0.3, 0.3, 1.0][: len(mean)])
    system = System(
        numbers=np.array([8, 1, 1, 3][: len(mean)]),
        positions=positions,
        cell=np.zeros((3, 3)),
        pbc=False,
        total_charge=1.0 if lithium else 0.0,
    )
    labels = Labels(
        level="springs",
        energy=-100.0 - 7.0 * lithium + 0.25 * 10.0 * float((stretch**2).sum()),
        forces=10.0 * ((stretch / length)[..., None] * vector).sum(1),
        charges=charges,
        dipole=charges @ system.positions,
    )
    return Frame(system, labels, "lithium" if lithium else "neutral", "dynamics", f"trajectory-{seed}", 300.0)


FRAMES = [spring_frame(seed, lithium=bool(seed % 2)) for seed in range(24)]


def test_residual_labels_add_up_to_the_label() -> None:
    """Trainable terms + what was subtracted = the total that users see: exactly, for energy and forces."""
    force_field = small_force_field()
    force_field.reference_energy[[1, 3, 8]] = torch.tensor([-3.0, -5.0, -80.0], dtype=torch.float64)
    frame = FRAMES[1]
    sample = make_sample(force_field, frame)
    batch, neighbors = unpack(Stack.from_data_list([sample]))
    trainable = force_field(batch, neighbors, fixed_terms=False)
    whole_neighbors = find_neighbors(batch, 5.0, force_field.config.dispersion.cutoff)
    whole = force_field(batch, whole_neighbors)
    torch.testing.assert_close(
        trainable.energy - sample.energy, whole.energy - frame.labels.energy, rtol=0.0, atol=1e-10
    )
    torch.testing.assert_close(
        trainable.forces - sample.forces, whole.forces - torch.as_tensor(frame.labels.forces), rtol=0.0, atol=1e-10
    )


def test_reference_energies_solve_the_least_squares_problem() -> None:
    """Energies built from known atomic energies are recovered; reference charges are the mean labels."""
    force_field = small_force_field()
    atomic = {1: -13.0, 3: -7.5, 8: -430.0}
    frames = []
    for counts in ([8, 1, 1], [8, 8], [1, 1], [3, 8, 1], [3, 3]):
        numbers = np.array(counts)
        positions = 3.0 * np.arange(len(numbers))[:, None] * np.ones(3)
        system = System(numbers, positions, np.zeros((3, 3)), False)
        energy = sum(atomic[z] for z in counts)
        charges = np.arange(len(numbers)) * 0.1
        frames.append(Frame(system, Labels("sum", energy, charges=charges), "neutral", "dynamics", "t"))
    fit_references(force_field, frames)
    for number, energy in atomic.items():
        assert float(force_field.reference_energy[number]) == pytest.approx(energy, abs=1e-4)
    assert force_field.elements == ["H", "Li", "O"]
    limit = force_field.config.charge_limit
    assert float(bound(force_field.reference_charge[3], limit)) == pytest.approx((0.0 + 0.0 + 0.1) / 3.0)


def test_far_pairs_add_labels_and_coulomb() -> None:
    """Two clusters 500 Å apart: forces and charges stack, the energy gains k Q Q / R."""
    pair = far_pairs(FRAMES, 6, seed=3)[0]
    system, labels = pair.system, pair.labels
    assert labels.charges is not None and labels.dipole is None
    assert labels.charges.sum() == pytest.approx(system.total_charge)
    parts = [f for f in FRAMES if f.labels.charges is not None]
    singles = [a.labels.energy + b.labels.energy for a in parts for b in parts]
    lithium = np.flatnonzero(system.numbers == 3)
    expected = 0.0
    if len(lithium) == 2:
        expected = units.COULOMB_CONSTANT / np.linalg.norm(np.diff(system.positions[lithium], axis=0))
    assert min(abs(labels.energy - single - expected) for single in singles) < 1e-3


def test_sampler_fills_batches_and_skips_exactly() -> None:
    """Every frame once per epoch, no batch over budget but single frames, and skipping drops whole batches."""
    sizes = [100, 5000, 30, 700, 900, 20, 20, 12000]
    sampler = EdgeBudgetSampler(sizes, budget=1500, seed=1)
    batches = list(sampler)
    assert sorted(index for batch in batches for index in batch) == list(range(len(sizes)))
    assert all(len(batch) == 1 or sum(sizes[i] + 1 for i in batch) <= 1500 for batch in batches)
    sampler.skip = 2
    assert list(sampler) == batches[2:]
    sampler.skip, sampler.epoch = 0, 1
    assert list(sampler) != batches


def test_loss_gradient_is_the_derivative_of_the_loss() -> None:
    """Training through forces and charges needs second derivatives: compare with a finite difference of one weight."""
    force_field = small_force_field()
    data = Stack.from_data_list(make_samples(force_field, FRAMES[:3]))
    batch, neighbors = unpack(data)
    weight = force_field.network.layers[1].qkv.weight

    def loss() -> torch.Tensor:
        output = force_field(batch, neighbors, fixed_terms=False, create_graph=True)
        return total_loss(loss_parts(output, data, batch.atoms_per_system), LossWeights())

    (gradient,) = torch.autograd.grad(loss(), weight)
    step = 1.0e-5
    values = []
    for sign in (1.0, -1.0):
        with torch.no_grad():
            weight[3, 5] += sign * step
        values.append(float(loss().detach()))
        with torch.no_grad():
            weight[3, 5] -= sign * step
    assert (values[0] - values[1]) / (2.0 * step) == pytest.approx(float(gradient[3, 5]), rel=1e-5, abs=1e-9)


def run_loop(path: Path | None, *, stop_after: int | None = None) -> Loop:
    force_field = small_force_field()
    fit_references(force_field, FRAMES)
    loop = Loop(
        force_field,
        make_samples(force_field, FRAMES),
        weights=LossWeights(),
        config=LoopConfig(epochs=4, edges_per_batch=60, save_seconds=0.0),
        state_path=path,
    )
    if stop_after is not None:
        original = loop._step

        def step(data: object) -> dict[str, float]:
            if loop.step == stop_after:
                raise KeyboardInterrupt
            return original(data)  # type: ignore[arg-type]

        loop._step = step  # type: ignore[method-assign]
    return loop


def test_resume_is_exact(tmp_path: Path) -> None:
    """Stopped in the middle of an epoch and continued = never stopped, bit for bit."""
    whole = run_loop(None)
    whole.run(lambda _: None)
    path = tmp_path / "state.safetensors"
    with pytest.raises(KeyboardInterrupt):
        run_loop(path, stop_after=7).run(lambda _: None)
    resumed = run_loop(path)
    assert resumed.step == 7
    resumed.run(lambda _: None)
    assert resumed.step == whole.step
    for name, value in whole.averaged.state_dict().items():
        assert torch.equal(value, resumed.averaged.state_dict()[name]), name


def test_resume_refuses_other_settings_and_damage(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    run_loop(None).save(path)
    force_field = small_force_field()
    samples = make_samples(force_field, FRAMES[:2])
    with pytest.raises(InputError, match="learning_rate"):
        Loop(
            force_field,
            samples,
            weights=LossWeights(),
            config=LoopConfig(epochs=4, edges_per_batch=60, learning_rate=1.0),
            state_path=path,
        )
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["training"])
    del header["weights"]["molecular_forces"]  # a state from before that part of the loss was there
    save_file(load_file(path), path, metadata={"training": json.dumps(header)})
    config = LoopConfig(epochs=4, edges_per_batch=60, save_seconds=0.0)
    with pytest.raises(InputError, match=r"other settings \(molecular_forces\)"):
        Loop(force_field, samples, weights=LossWeights(), config=config, state_path=path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="damaged"):
        Loop(force_field, samples, weights=LossWeights(), config=LoopConfig(), state_path=path)


def test_resume_refuses_other_data(tmp_path: Path) -> None:
    """The saved reference energies belong to the old labels: with other data every total energy would be wrong."""
    path = tmp_path / "state.safetensors"
    run_loop(path).save(path)
    config = LoopConfig(epochs=4, edges_per_batch=60, save_seconds=0.0)
    force_field = small_force_field()
    fit_references(force_field, FRAMES)
    samples = make_samples(force_field, FRAMES)
    Loop(force_field, samples, weights=LossWeights(), config=config, state_path=path)
    with pytest.raises(InputError, match=r"other data \(.*frames"):
        Loop(force_field, samples[:-1], weights=LossWeights(), config=config, state_path=path)
    samples[3].forces = 2.0 * samples[3].forces
    with pytest.raises(InputError, match=r"other data \(forces\)"):
        Loop(force_field, samples, weights=LossWeights(), config=config, state_path=path)


def test_training_learns_and_writes_a_usable_model(tmp_path: Path) -> None:
    """The whole stage on springs: the held-out force error falls well below the size of the forces."""
    data = tmp_path / "springs.h5"
    frames = [spring_frame(seed, lithium=seed % 4 == 0) for seed in range(80)]
    write_frames(data, frames)
    config = TrainConfig(
        data=[data],
        output=tmp_path / "model.safetensors",
        network=NetworkBlock(channels=32, heads=8, n_radial=16),
        loop=LoopBlock(epochs=16, edges_per_batch=30, learning_rate=3.0e-3),
        weights=WeightsBlock(virial=0.0),
    )
    said: list[str] = []
    errors = train(config, say=said.append)
    forces = np.concatenate([frame.labels.forces for frame in frames if frame.labels.forces is not None])
    assert errors["all"].forces < 0.7 * float(np.sqrt((forces**2).mean()))
    assert errors["all"].n_frames == sum(frame.split == "test" for frame in frames)
    card = checkpoint.describe(config.output)["card"]
    assert card["frames"] == {"neutral": 60, "lithium": 20} and card["levels"] == ["springs"]
    assert "lithium" in said[0]
    assert card["held_out"]["all"]["pressure"] is None
    json.dumps(card, allow_nan=False)


def test_evaluate_reports_the_error_it_was_given() -> None:
    """Labels shifted by a known amount from the model's own prediction: the RMSE is that amount."""
    force_field = small_force_field()
    sample = make_sample(force_field, FRAMES[0])
    batch, neighbors = unpack(Stack.from_data_list([sample]))
    output = force_field(batch, neighbors, fixed_terms=False)
    sample.forces = output.forces + 0.1
    sample.energy = output.energy - 0.3
    sample.charges = output.charges + torch.tensor([0.3, 0.0, 0.0])
    errors = evaluate(force_field, [sample], ["neutral"])["neutral"]
    assert errors.forces == pytest.approx(0.1)
    assert errors.energy_per_atom == pytest.approx(0.1)
    assert errors.charges == pytest.approx(0.3 / np.sqrt(3.0))
    assert np.isnan(errors.pressure)


def test_weight_on_an_absent_label_is_refused(tmp_path: Path) -> None:
    frames = [replace(frame, labels=replace(frame.labels, charges=None)) for frame in FRAMES]
    write_frames(tmp_path / "frames.h5", frames)
    config = TrainConfig(
        data=[tmp_path / "frames.h5"], output=tmp_path / "m.safetensors", weights=WeightsBlock(charges=1.0)
    )
    with pytest.raises(InputError, match=r"weights\.charges > 0, but no frame has charges"):
        train(config, say=lambda _: None)


def test_periodic_frames_train_with_virial() -> None:
    """A periodic frame carries a virial residual and contributes to the loss."""
    force_field = small_force_field()
    cell = 6.0 * np.eye(3)
    system = System(np.array([8, 1, 1]), WATER, cell, True)
    batch = Batch.from_systems([system])
    whole = force_field(batch, find_neighbors(batch, 5.0, 10.0))
    labels = Labels(
        "own", float(whole.energy[0]), whole.forces.numpy(), whole.charges.numpy(), None, whole.virial[0].numpy()
    )
    sample = make_sample(force_field, Frame(system, labels, "periodic", "dynamics", "t"))
    data = Stack.from_data_list([sample])
    stacked, neighbors = unpack(data)
    parts = loss_parts(force_field(stacked, neighbors, fixed_terms=False), data, stacked.atoms_per_system)
    assert {"forces", "energy", "virial", "charges"} <= set(parts) and "dipole" not in parts
    for name in ("forces", "energy", "virial", "charges"):
        assert float(parts[name]) < 1e-18, name


def test_forces_on_whole_molecules_are_compared_molecule_by_molecule() -> None:
    """Water, water with Li+ twice: a push on one hydrogen is a push on its molecule; single molecules say nothing."""
    force_field = small_force_field()
    frames = [FRAMES[0], FRAMES[1], FRAMES[3]]
    samples = make_samples(force_field, frames)
    data = Stack.from_data_list(samples)
    batch, neighbors = unpack(data)
    output = force_field(batch, neighbors, fixed_terms=False)
    forces = data.forces.clone()
    forces[3 + 4 + 1] += torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64)  # of the last water
    found = deviations(replace(output, forces=forces), data, batch.atoms_per_system)["molecular_forces"]
    expected = [0.0] * 6 + [0.1, -0.2, 0.3] + [0.0] * 3  # two frames of water and Li+
    assert found.tolist() == pytest.approx(expected, abs=1e-12)
    samples = [sample.clone() for sample in samples]
    for sample, part in zip(samples, forces.split([3, 4, 4]), strict=True):  # labels such that errors are known
        own = force_field(*unpack(Stack.from_data_list([sample])), fixed_terms=False).forces
        sample.molecular_forces += torch.zeros_like(part).index_add(
            0, sample.molecule_index.long(), own - sample.forces
        )
        sample.molecular_forces += 0.3
    errors = evaluate(force_field, samples, ["neutral", "lithium", "lithium"])
    assert errors["lithium"].molecular_forces == pytest.approx(0.3) and np.isnan(errors["neutral"].molecular_forces)


def test_molecules_are_those_that_the_frame_names() -> None:
    """A bond stretched until it looks broken is no second molecule, also where two clusters stand far apart."""
    system = FRAMES[1].system
    positions = system.positions.copy()
    positions[1] += [0.0, 3.0, 0.0]
    named = replace(system, positions=positions, molecule=np.array([4, 4, 4, 9]))
    frame = replace(FRAMES[1], system=named)
    sample = make_sample(small_force_field(), frame)
    assert sample.molecule_index.tolist() == [0, 0, 0, 1]
    torch.testing.assert_close(sample.molecular_forces[0], sample.forces[:3].sum(0))
    (pair,) = far_pairs([frame, replace(frame, labels=frame.labels)], 1, seed=1)
    assert pair.system.molecule.tolist() == [0, 0, 0, 1, 2, 2, 2, 3]
    unnamed = make_sample(small_force_field(), replace(frame, system=replace(named, molecule=None)))
    assert len(set(unnamed.molecule_index.tolist())) == 3


def test_predictions_that_are_not_finite_are_no_absent_labels() -> None:
    """A nan prediction must stop training and evaluation; taken for a missing label it would flatter the model."""
    force_field = small_force_field()
    sample = make_sample(force_field, FRAMES[0])
    data = Stack.from_data_list([sample])
    batch, neighbors = unpack(data)
    output = force_field(batch, neighbors, fixed_terms=False)
    forces = output.forces.clone()
    forces[1, 2] = torch.nan
    parts = loss_parts(replace(output, forces=forces), data, batch.atoms_per_system)
    assert torch.isnan(parts["forces"]) and "virial" not in parts
    with torch.no_grad():
        force_field.energy_head[-1].bias.fill_(torch.nan)
    with pytest.raises(InputError, match="energy that are not finite"):
        evaluate(force_field, [sample], ["neutral"])


def test_gradient_that_is_not_finite_never_reaches_the_weights() -> None:
    loop = run_loop(None)
    bias = loop.force_field.energy_head[0].bias
    bias.register_hook(lambda gradient: gradient * torch.nan)
    before = bias.detach().clone()
    with pytest.raises(InputError, match="gradient is not finite at step 0"):
        loop.run(lambda _: None)
    assert torch.equal(bias.detach(), before)


def test_pooled_error_leaves_out_groups_without_forces() -> None:
    """One group of energies alone must not turn the number by which the best model is chosen into nan."""
    force_field = small_force_field()
    frames = [FRAMES[0], replace(FRAMES[1], labels=replace(FRAMES[1].labels, forces=None))]
    errors = evaluate(force_field, make_samples(force_field, frames), [frame.kind for frame in frames])
    assert _pooled(errors) == pytest.approx(errors["neutral"].forces)


def test_errors_are_measured_by_each_true_label_once() -> None:
    frames = [spring_frame(seed, lithium=False) for seed in range(40)]
    frames = [frame for frame in frames if frame.split == "test"]
    lifted = [replace(f, labels=replace(f.labels, level=f"{f.labels.level}{LIFTED}")) for f in frames]
    assert frames and {id(frame) for frame in measured_by([*frames, *lifted, *frames], "test")} == set(map(id, frames))
    assert len(measured_by([*lifted, *lifted], "test")) == len(lifted)  # better than nothing
    assert measured_by(frames, "train") == []


def test_disagreement_is_the_spread_of_forces_over_models() -> None:
    models = [small_force_field(seed) for seed in (0, 1, 2)]
    frame = FRAMES[0]
    batch = Batch.from_systems([frame.system])
    neighbors = find_neighbors(batch, 5.0, 10.0)
    forces = torch.stack([model(batch, neighbors).forces for model in models])
    mean = forces.mean(dim=0)
    spread = (((forces - mean) ** 2).sum(dim=-1).sum(dim=0) / (len(models) - 1)).sqrt()
    found = disagreement(models, [frame, frame])
    assert found == pytest.approx([float(spread.max())] * 2, rel=1.0e-5)
    assert disagreement([models[0], models[0]], [frame]) == pytest.approx([0.0])


def test_log_keeps_its_columns_when_resumed_at_the_end_of_an_epoch(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    for epoch, losses in ((1.0, {"loss": 0.5, "forces": 0.25}), (2.0, {})):
        _log(path, Progress(epoch, 10, 20, 1.0e-3, losses, 0.0, True), {})
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert [row["train_loss"] for row in rows] == ["0.5", ""]
    assert [row["validation_forces_pooled_eV_A"] for row in rows] == ["nan", "nan"]


def test_settings_that_cannot_work_are_refused_and_dropped_frames_are_told(tmp_path: Path) -> None:
    frames = [replace(frame, labels=replace(frame.labels, level=f"level {k % 2}")) for k, frame in enumerate(FRAMES)]
    write_frames(tmp_path / "frames.h5", frames)
    config = TrainConfig(data=[tmp_path / "frames.h5"], output=tmp_path / "m.safetensors", max_force=3.0)
    left_out = sum(float(np.linalg.norm(frame.labels.forces, axis=1).max()) > 3.0 for frame in frames)
    said: list[str] = []
    with pytest.raises(InputError, match="mix levels of theory"):
        train(config, say=said.append)
    assert 0 < left_out < len(frames) and said[0].startswith(f"{left_out} frames with forces above 3 eV/Å")
    write_frames(tmp_path / "frames.h5", FRAMES)
    with pytest.raises(InputError, match="`network` has no effect"):
        train(config.model_copy(update={"start": "default", "network": NetworkBlock()}), say=said.append)


def test_start_from_another_level_begins_without_offset(tmp_path: Path) -> None:
    """Total energies of two methods differ by far more than a loss can mend: the reference energies take it up."""
    start = tmp_path / "start.safetensors"
    checkpoint.save(small_force_field(), start, card={"levels": ["springs"]})
    write_frames(tmp_path / "frames.h5", FRAMES)
    config = TrainConfig(data=[tmp_path / "frames.h5"], output=tmp_path / "m.safetensors", start=str(start))
    np.testing.assert_array_equal(prepare_force_field(config, FRAMES).reference_energy, 0.0)  # the same level
    moved = [
        replace(f, labels=replace(f.labels, level="other", energy=f.labels.energy - 1.0e4 * f.system.n_atoms))
        for f in FRAMES
    ]
    force_field = prepare_force_field(config, moved)
    mean = np.mean([float(s.energy - force_field(*unpack(s), fixed_terms=False).energy) for s in
                    make_samples(force_field, moved)])  # fmt: skip
    assert abs(mean) < 0.1


def test_start_from_another_level_takes_the_dispersion_of_a_new_model(tmp_path: Path) -> None:
    """The damping belongs to the level: it is fitted where labels contain none, and to no weight."""
    short = small_force_field()
    config = replace(short.config, dispersion=DispersionConfig(damping_length=2.0))
    started = ForceField(config).to_dtype(short.dtype)
    started.load_state_dict(short.state_dict())
    started.dispersion.c6.zero_()
    start = tmp_path / "start.safetensors"
    checkpoint.save(started, start, card={"levels": ["springs"]})
    settings = TrainConfig(data=[tmp_path / "frames.h5"], output=tmp_path / "m.safetensors", start=str(start))
    assert prepare_force_field(settings, FRAMES).config.dispersion.damping_length == 2.0  # the same level
    moved = [replace(f, labels=replace(f.labels, level="other")) for f in FRAMES]
    force_field = prepare_force_field(settings, moved)
    assert force_field.config.dispersion == DispersionConfig()
    torch.testing.assert_close(force_field.dispersion.c6[[1, 3, 8]], short.dispersion.c6[[1, 3, 8]])
    torch.testing.assert_close(force_field.embedding.weight, short.embedding.weight.float())


def test_dispersion_comes_on_top_of_levels_that_contain_none() -> None:
    force_field, frame = small_force_field(), spring_frame(3, lithium=True)
    with_, without = (
        make_sample(force_field, replace(frame, labels=replace(frame.labels, level=level)))
        for level in ("GFN2-xTB", "B3LYP/def2-SVPD, RI, grid 2")
    )
    batch = Batch.from_systems([frame.system])
    neighbors = find_neighbors(batch, 5.0, 10.0)
    dispersion = force_field(batch, neighbors).terms["dispersion"]
    assert abs(float(dispersion)) > 1.0e-4
    assert float(with_.energy - without.energy) == pytest.approx(-float(dispersion), rel=1.0e-9)


def test_elements_without_dispersion_coefficients_are_refused() -> None:
    """An element that the table lacks would silently not attract."""
    frame = spring_frame(1, lithium=False)
    strange = replace(frame, system=replace(frame.system, numbers=np.array([54, 1, 1])))
    network = NetworkConfig(channels=16, heads=4, n_radial=8)
    with pytest.raises(InputError, match="but not Xe"):
        new_force_field(network, [strange])
