"""An evaluation changes nothing but its result, and its result has the promised shape, type and place."""

from dataclasses import fields

import pytest
import torch

from bamboo.evaluator import Evaluator
from bamboo.system import Batch

KINDS = {"cluster": 1.0, "charged box": -1.0, "box": 0.0}


@pytest.fixture
def batch(make_cluster, make_box, engine_options):
    systems = [make_cluster(1, total_charge=1.0), make_box(1, total_charge=-1.0), make_box(2), make_cluster(2)]
    return Batch.from_systems(systems).to(engine_options["device"])


@pytest.fixture
def evaluator(make_force_field, engine_options):
    def make(dtype=torch.float64, **options):
        field = make_force_field("all", **options).to_dtype(dtype)
        return Evaluator(field, skin=1.0, **engine_options)

    return make


@pytest.mark.parametrize("charge_response", ["full", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_charges_sum_to_the_total_charge(evaluator, batch, dtype, charge_response):
    charges = evaluator(dtype, charge_response=charge_response).evaluate(batch).charges
    sums = batch.positions.new_zeros(4).index_add(0, batch.system_index, charges)
    assert float((sums - batch.total_charge).abs().max()) < 1e-12
    assert float(charges.abs().max()) > 0.2


def test_nothing_is_changed(evaluator, batch):
    evaluator = evaluator()
    batch.positions.requires_grad_(False)
    before = {item.name: getattr(batch, item.name) for item in fields(batch)}
    copies = {name: None if tensor is None else tensor.clone() for name, tensor in before.items()}
    parameters = {name: tensor.clone() for name, tensor in evaluator.force_field.state_dict().items()}
    random, default = torch.random.get_rng_state(), torch.get_default_dtype()
    first = evaluator.evaluate(batch)
    second = evaluator.evaluate(batch)
    for name, copy in copies.items():
        assert getattr(batch, name) is before[name]
        assert copy is None or torch.equal(before[name], copy)
        assert copy is None or not before[name].requires_grad
    for name, tensor in evaluator.force_field.state_dict().items():
        assert torch.equal(tensor, parameters[name])
    assert all(parameter.grad is None for parameter in evaluator.force_field.parameters())
    assert torch.equal(torch.random.get_rng_state(), random)
    assert torch.get_default_dtype() == default
    # the result of one call does not live in memory that the next one writes to
    assert first.forces.data_ptr() != second.forces.data_ptr()
    assert torch.allclose(first.forces, second.forces, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_results_are_double_precision_without_graph_on_the_device(evaluator, batch, dtype):
    evaluator = evaluator(dtype)
    output = evaluator.evaluate(batch)
    shapes = {
        "energy": (4,), "forces": (batch.n_atoms, 3), "virial": (4, 3, 3),
        "charges": (batch.n_atoms,), "dipole": (4, 3), "raw_charge": (4,),
    }  # fmt: skip
    tensors = {name: getattr(output, name) for name in shapes} | output.terms
    for name, tensor in tensors.items():
        assert tensor.shape == shapes.get(name, (4,)), name
        assert (tensor.dtype, tensor.device, tensor.requires_grad) == (torch.float64, batch.positions.device, False)
        assert torch.isfinite(tensor).all(), name
    assert evaluator.force_field.dtype == dtype
    names = {"network", "electrostatic", "electronegativity", "dispersion", "repulsion", "reference"}
    assert set(output.terms) == names


def test_single_precision_is_close_to_double(evaluator, batch):
    double, single = evaluator().evaluate(batch), evaluator(torch.float32).evaluate(batch)
    scale = float(double.forces.abs().max())
    assert float((single.forces - double.forces).abs().max()) < 2e-5 * scale
    assert float((single.energy - double.energy).abs().max()) < 1e-4
    assert float((single.charges - double.charges).abs().max()) < 1e-5


def test_works_where_gradients_are_switched_off(evaluator, batch):
    expected = evaluator().evaluate(batch)
    with torch.no_grad():
        output = evaluator().evaluate(batch)
    assert torch.allclose(output.forces, expected.forces, rtol=0, atol=1e-10)
    assert torch.allclose(output.virial, expected.virial, rtol=0, atol=1e-9)


def test_dipole_is_the_first_moment_of_the_charges(evaluator, batch):
    output = evaluator().evaluate(batch)
    moment = output.charges[:, None] * batch.positions
    expected = batch.positions.new_zeros(4, 3).index_add(0, batch.system_index, moment)
    assert torch.allclose(output.dipole, expected, rtol=0, atol=1e-10)
