"""The composed field: settings, elements, and each term against a naive formula in numpy."""

import numpy as np
import pytest
import torch

from bamboo import units
from bamboo.elements import numbers_of
from bamboo.errors import InputError, UnknownElementError
from bamboo.forcefield import ForceField, ForceFieldConfig
from bamboo.neighbors import find_neighbors
from bamboo.nn.get import NetworkConfig
from bamboo.system import Batch, System
from bamboo.terms.dispersion import DispersionConfig


def evaluate(field, *systems, **options):
    batch = Batch.from_systems(systems)
    neighbors = find_neighbors(batch, field.config.network.cutoff, field.config.dispersion.cutoff)
    return field(batch, neighbors, **options)


def test_settings_survive_a_round_trip():
    config = ForceFieldConfig(
        network=NetworkConfig(channels=32, heads=4, layers=2, attention="gedt"),
        dispersion=DispersionConfig(cutoff=9.0),
        charge_response="frozen",
        repulsion=False,
    )
    assert ForceFieldConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("network", "channels"), "64"),
        (("network", "channels"), 64.0),
        (("network", "channels"), 65),
        (("network", "channels"), -64),
        (("network", "heads"), 0),
        (("network", "layers"), 1),
        (("network", "layers"), True),
        (("network", "n_radial"), 0),
        (("network", "cutoff"), float("nan")),
        (("network", "cutoff"), float("inf")),
        (("network", "cutoff"), None),
        (("network", "attention"), "softmax"),
        (("network",), []),
        (("dispersion",), None),
        (("dispersion", "cutoff"), 0.0),
        (("dispersion", "cutoff"), 1.0),
        (("dispersion", "smooth"), "yes"),
        (("dispersion", "a7"), 1.0),
        (("charge_limit",), 0.0),
        (("charge_limit",), "2"),
        (("charge_response",), "half"),
        (("repulsion",), 1),
        (("colour",), "blue"),
    ],
)
def test_wrong_settings_are_refused_by_name(path, value):
    values = ForceFieldConfig().to_dict()
    place = values
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(InputError):
        ForceFieldConfig.from_dict(values)


@pytest.mark.parametrize("path", [("network",), ("repulsion",), ("dispersion", "a2"), ("network", "cutoff")])
def test_missing_settings_are_refused(path):
    values = ForceFieldConfig().to_dict()
    (values[path[0]] if len(path) == 2 else values).pop(path[-1])
    with pytest.raises(InputError, match=path[-1]):
        ForceFieldConfig.from_dict(values)


def test_unknown_elements(make_force_field):
    field = make_force_field()
    assert field.elements == ["H", "Li", "B", "C", "N", "O", "F", "Na", "P", "S", "Cl"]
    field.check_elements(torch.tensor(numbers_of(["H", "Cl"])))
    with pytest.raises(UnknownElementError, match=r"does not know He, Xe; it covers H Li B C"):
        field.check_elements(torch.tensor(numbers_of(["H", "Xe", "He", "He"])))


def test_isolated_atom_has_its_reference_energy(make_force_field):
    field = make_force_field("dispersion")
    atom = System(np.array([8]), np.zeros((1, 3)), np.zeros((3, 3)), pbc=False)
    output = evaluate(field, atom)
    assert float(output.energy) == pytest.approx(float(field.reference_energy[8]), abs=1e-12)
    assert float(output.forces.abs().max()) == float(output.virial.abs().max()) == 0.0


def test_fixed_terms_can_be_left_out(make_force_field, make_cluster):
    field, cluster = make_force_field(), make_cluster(1)
    full, trained = evaluate(field, cluster), evaluate(field, cluster, fixed_terms=False)
    assert set(full.terms) - set(trained.terms) == {"dispersion", "repulsion", "reference"}
    fixed = sum(full.terms[name] for name in ("dispersion", "repulsion", "reference"))
    assert torch.allclose(full.energy - trained.energy, fixed)


def test_terms_of_a_cluster_against_numpy(make_force_field, make_cluster):
    """Coulomb over all pairs without cutoff, chi^2 q + J^2 q^2, pair dispersion: written out."""
    field, cluster = make_force_field(), make_cluster(2, total_charge=-1.0)
    output = evaluate(field, cluster)
    q, numbers = output.charges.numpy(), cluster.numbers
    i, j = np.triu_indices(len(q), k=1)
    r = np.linalg.norm(cluster.positions[i] - cluster.positions[j], axis=1)
    softplus = np.log1p(np.exp(18.7 * (r - 2.2) / 2.2)) / 18.7
    coulomb = (units.COULOMB_CONSTANT * q[i] * q[j] / (2.2 * (1 + softplus))).sum()
    assert float(output.terms["electrostatic"]) == pytest.approx(coulomb, rel=1e-9)
    with torch.no_grad():
        embedding = field.embedding(torch.from_numpy(numbers))
        chi = field.electronegativity_head(embedding)[:, 0].numpy()
        chi = chi + field.reference_electronegativity.numpy()[numbers]
        hardness = field.hardness_head(embedding)[:, 0].numpy()
    electronegativity = (chi**2 * q + hardness**2 * q**2).sum()
    assert float(output.terms["electronegativity"]) == pytest.approx(electronegativity, rel=1e-9)
    shape, tables = field.config.dispersion, field.dispersion
    c6 = np.sqrt(tables.c6.numpy()[numbers[i]] * tables.c6.numpy()[numbers[j]])
    radius = tables.radius.numpy()[numbers[i], numbers[j]]
    damping = shape.s6 + shape.a1 / (1 + np.exp(shape.steepness * (r - shape.a2 * radius)))
    x = np.clip((r / shape.cutoff - 0.8) / 0.2, 0, 1)
    switch = 1 - (6 * x**5 - 15 * x**4 + 10 * x**3)
    dispersion = (-c6 / (r**6 + shape.damping_length**6) * damping * switch).sum()
    assert float(output.terms["dispersion"]) == pytest.approx(dispersion, rel=1e-9)
    assert float(output.terms["reference"]) == pytest.approx(field.reference_energy.numpy()[numbers].sum(), rel=1e-9)


def test_rock_salt_through_the_whole_field(make_force_field):
    """Ions of +-1 e on a lattice of 4 Å: the electrostatic term is Madelung's, in energy and virial (E = c / a)."""
    field = make_force_field("dispersion")  # its charge head is silent: the charges are those of the table
    limit = field.config.charge_limit
    for number, charge in ((11, 1.0), (17, -1.0)):
        field.reference_charge[number] = limit * np.arctanh(charge / limit)
    field.dispersion.c6.zero_()
    primitive = 8.0 * np.array([[0.0, 0.5, 0.5], [0.5, 0.0, 0.5], [0.5, 0.5, 0.0]])
    salt = System(np.array([11, 17]), np.array([[0.1, 0.2, 0.3], [4.1, 4.2, 4.3]]), primitive, pbc=True)
    output = evaluate(field, salt)
    madelung = -1.747564594633182 * units.COULOMB_CONSTANT / 4.0
    assert float(output.terms["electrostatic"]) == pytest.approx(madelung, rel=2e-5)
    assert output.charges.tolist() == pytest.approx([1.0, -1.0])
    assert torch.allclose(output.virial[0], torch.eye(3).double() * madelung / 3, rtol=0, atol=1e-3)


def test_charges_depend_on_the_surroundings_and_stay_bounded(make_force_field, make_cluster):
    field, cluster = make_force_field(), make_cluster(2)
    near = evaluate(field, cluster)
    far = evaluate(field, System(cluster.numbers, cluster.positions * 1.1, cluster.cell, False, 1.0))
    assert float((near.charges - far.charges).abs().max()) > 1e-3
    field.charge_head[4].weight.data *= 1e4  # a network that extrapolates wildly
    wild = evaluate(field, cluster)
    shift = (1.0 - float(wild.raw_charge)) / cluster.n_atoms
    assert float((wild.charges - shift).abs().max()) <= field.config.charge_limit + 1e-9


def test_network_in_single_precision_leaves_tables_in_double(make_force_field):
    field = make_force_field().to_dtype(torch.float32)
    assert {p.dtype for p in field.parameters()} == {torch.float32}
    assert {b.dtype for b in field.buffers()} == {torch.float64, torch.bool}


def test_seeded_construction():
    fields = []
    for _ in range(2):
        torch.manual_seed(7)
        fields.append(ForceField(ForceFieldConfig(network=NetworkConfig(channels=8, heads=2, n_radial=4))))
    for one, two in zip(*[field.parameters() for field in fields], strict=True):
        assert torch.equal(one, two)
