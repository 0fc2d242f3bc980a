"""A whole training, and errors that mean what they say."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from springs import FRAMES, small_force_field, spring_frame
from torch_geometric.data import Batch as Stack

from bamboo import checkpoint
from bamboo.errors import InputError, LockedError
from bamboo.files import held
from bamboo.forcefield import ForceField
from bamboo.learn.evaluate import disagreement, evaluate
from bamboo.learn.fit import (
    LoopBlock,
    NetworkBlock,
    TrainConfig,
    WeightsBlock,
    _pooled,
    measured_by,
    prepare_force_field,
    train,
)
from bamboo.learn.lift import LIFTED
from bamboo.learn.samples import (
    make_sample,
    make_samples,
    unpack,
)
from bamboo.neighbors import find_neighbors
from bamboo.quantum.dataset import write_frames
from bamboo.system import Batch
from bamboo.terms.dispersion import DispersionConfig


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
    with held(tmp_path / "model.lock", what="a test"), pytest.raises(LockedError, match="another run"):
        train(config)
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
