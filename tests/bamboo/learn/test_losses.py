"""The loss: its gradient, molecules as wholes, and what is not finite."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from springs import FRAMES, small_force_field
from torch_geometric.data import Batch as Stack

from bamboo.errors import InputError
from bamboo.learn.evaluate import evaluate
from bamboo.learn.losses import LossWeights, deviations, loss_parts, total_loss
from bamboo.learn.samples import (
    make_sample,
    make_samples,
    unpack,
)


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


def test_parts_are_means_of_huber_and_of_the_missing_charge() -> None:
    """H(x) = x^2 up to the width d, d (2 |x| - d) beyond, both in one batch; (Q - sum q~)^2 / n: numbers by hand."""
    force_field = small_force_field()
    data = Stack.from_data_list(make_samples(force_field, [FRAMES[0], FRAMES[2]]))  # two waters
    batch, neighbors = unpack(data)
    output = force_field(batch, neighbors, fixed_terms=False)
    step = torch.zeros((6, 3), dtype=torch.float64)
    step[0, 0], step[1, 1], step[5, 2] = 0.5, -1.0, 3.0  # eV/Å; the width is 1
    off = replace(
        output,
        forces=data.forces + step,
        energy=data.energy + torch.tensor([0.03, -0.2], dtype=torch.float64) * np.sqrt(3.0),  # eV; the width is 0.05
        raw_charge=data.total_charge + torch.tensor([0.3, -0.6], dtype=torch.float64),
    )
    parts = loss_parts(off, data, batch.atoms_per_system)
    assert float(parts["forces"]) == pytest.approx((0.25 + 1.0 + (2.0 * 3.0 - 1.0)) / 18.0)
    assert float(parts["energy"]) == pytest.approx((0.03**2 + 0.05 * (2.0 * 0.2 - 0.05)) / 2.0)
    assert float(parts["raw_charge"]) == pytest.approx((0.3**2 + 0.6**2) / 3.0 / 2.0)
    weights = LossWeights(forces=2.0, energy=3.0, charges=0.0, dipole=0.0, raw_charge=5.0, molecular_forces=0.0)
    expected = sum(weight * float(parts[n]) for n, weight in (("forces", 2.0), ("energy", 3.0), ("raw_charge", 5.0)))
    assert float(total_loss(parts, weights)) == pytest.approx(expected)
