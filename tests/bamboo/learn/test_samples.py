"""Samples: labels lose what the network need not learn, batches fill and skip exactly, molecules are known."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from springs import FRAMES, WATER, small_force_field, spring_frame
from torch_geometric.data import Batch as Stack

from bamboo import units
from bamboo.errors import InputError
from bamboo.learn.fit import (
    new_force_field,
)
from bamboo.learn.losses import loss_parts
from bamboo.learn.samples import (
    EdgeBudgetSampler,
    far_pairs,
    fit_references,
    make_sample,
    unpack,
)
from bamboo.neighbors import find_neighbors
from bamboo.nn.get import NetworkConfig
from bamboo.quantum.dataset import Frame
from bamboo.quantum.labels import Labels
from bamboo.system import Batch, System
from bamboo.terms.charges import bound


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
