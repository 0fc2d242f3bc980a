"""The native engine against the reference: the same numbers, whatever the shape of network, box or batch."""

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch

from bamboo import units
from bamboo.checkpoint import load
from bamboo.errors import InputError
from bamboo.evaluator import Evaluator
from bamboo.kernels import engines, mesh, native
from bamboo.published import import_published
from bamboo.system import Batch, System
from bamboo.terms import electrostatics, ewald

needs_library = pytest.mark.skipif(bool(engines.native_status()), reason=engines.native_status())
EXACT = 1e-10  # relative to the largest value
KCAL = units.KCAL_PER_MOL
NETWORKS = {
    "small": {},
    "published": {"channels": 64, "heads": 16},
    "two layers": {"layers": 2, "channels": 32, "heads": 8},
    "four layers": {"layers": 4},
    "wide": {"channels": 128, "heads": 16},
    "differential": {"attention": "gedt", "channels": 64, "heads": 8},
    "small differential": {"attention": "gedt"},
}


@pytest.fixture
def exact_waves(monkeypatch):
    """Both engines sum reciprocal space to rounding: the reference wave by wave, the native one on a very fine mesh."""
    monkeypatch.setattr(ewald, "REACH", 6.0)
    monkeypatch.setattr(electrostatics, "reciprocal_energy", ewald.reciprocal_energy)
    set_spacing(monkeypatch, 0.1)


def set_spacing(monkeypatch, spacing):
    monkeypatch.setattr(mesh, "SPACING", spacing)
    monkeypatch.setattr(mesh, "SMALLEST", 0.8 * spacing)
    monkeypatch.setattr(mesh, "LARGEST", 1.05 * spacing)


def evaluate(field, *systems, engine, skin=1.0):
    return Evaluator(field, engine=engine, skin=skin).evaluate(Batch.from_systems(systems))


def differences(actual, expected):
    """Yield (name, largest difference relative to the largest value) of everything an output holds."""
    assert actual.terms.keys() == expected.terms.keys()
    pairs = {name: (actual.terms[name], expected.terms[name]) for name in expected.terms}
    for name in ("energy", "forces", "virial", "charges", "dipole", "raw_charge"):
        pairs[name] = (getattr(actual, name), getattr(expected, name))
    for name, (one, other) in pairs.items():
        assert one.shape == other.shape and one.dtype == other.dtype == torch.float64, name
        yield name, float((one - other).abs().max()) / max(1.0, float(other.abs().max()))


def assert_same(actual, expected, *, tolerance=EXACT):
    worst = {name: error for name, error in differences(actual, expected) if not error < tolerance}
    assert not worst, worst


@needs_library
@pytest.mark.parametrize("response", ["full", "frozen"])
@pytest.mark.parametrize("network", NETWORKS)
def test_clusters(make_force_field, make_cluster, network, response):
    field = make_force_field(charge_response=response, network=NETWORKS[network])
    systems = [make_cluster(1, n_atoms=25, total_charge=-1.0), make_cluster(2, n_atoms=3), make_cluster(3)]
    expected = evaluate(field, *systems, engine="reference")
    assert float(expected.forces.abs().max()) > 1e-2
    assert_same(evaluate(field, *systems, engine="native"), expected)


@pytest.fixture(scope="module")
def small_boxes(make_box):
    """Tilted, left-handed and charged boxes with several images of one pair, atoms far outside their cell."""
    # seeds without a pair at 4.553 Å, where torch's softplus of the damped Coulomb energy steps by 2e-9
    tilted, charged = make_box(1), make_box(6, n_atoms=7, cell=np.diag([4.4, 6.3, 5.4]), total_charge=1.0)
    images = np.random.default_rng(0).integers(-3, 4, (tilted.n_atoms, 3))
    mirrored = System(tilted.numbers, tilted.positions + images @ tilted.cell, tilted.cell[[1, 0, 2]], pbc=True)
    return tilted, charged, mirrored


@needs_library
@pytest.mark.parametrize("response", ["full", "frozen"])
@pytest.mark.parametrize("network", ["small", "published", "small differential"])
def test_boxes_smaller_than_the_cutoffs(make_force_field, small_boxes, exact_waves, network, response):
    field = make_force_field(charge_response=response, network=NETWORKS[network])
    expected = evaluate(field, *small_boxes, engine="reference")
    assert float(expected.forces.abs().max()) > 1e-2
    assert_same(evaluate(field, *small_boxes, engine="native"), expected)


@needs_library
def test_published_dispersion_and_no_repulsion(make_force_field, make_box, make_cluster, exact_waves):
    field = make_force_field("dispersion", dispersion={"smooth": False, "a1": 0.82, "cutoff": 6.0})
    for system in (make_box(1), make_cluster(1, total_charge=0.0)):
        expected = evaluate(field, system, engine="reference")
        assert "repulsion" not in expected.terms
        assert_same(evaluate(field, system, engine="native"), expected)


@needs_library
def test_repulsion_between_nearly_fused_atoms(make_force_field, make_cluster):
    field = make_force_field()
    crowded = make_cluster(5, closest=0.4, n_atoms=30)
    close = System(crowded.numbers, crowded.positions * 0.8, crowded.cell, pbc=False)
    expected = evaluate(field, close, engine="reference")
    assert float(expected.terms["repulsion"][0]) > 1.0
    assert_same(evaluate(field, close, engine="native"), expected)


@needs_library
def test_mesh_forces_at_the_default_spacing(make_force_field, make_box, monkeypatch):
    """Against the direct sum: force within 0.005 kcal/mol/Å at the coarsest mesh that is ever kept."""
    monkeypatch.setattr(ewald, "REACH", 6.0)
    monkeypatch.setattr(electrostatics, "reciprocal_energy", ewald.reciprocal_energy)
    monkeypatch.setattr(mesh.MeshPlan, "fit", coarsest)
    field = make_force_field("electrostatic")
    box = make_box(1, n_atoms=60, cell=np.diag([10.0, 9.0, 9.5]) + 0.8 * np.eye(3, k=1), closest=1.1)
    exact, meshed = evaluate(field, box, engine="reference"), evaluate(field, box, engine="native")
    assert float(exact.charges.abs().max()) > 0.8
    assert float((exact.forces - meshed.forces).abs().max()) / KCAL < 0.005
    assert float((exact.virial - meshed.virial).abs().max()) / KCAL < 0.05


def coarsest(plan, cell):
    """Replace ``MeshPlan.fit``: as few nodes as the largest spacing allows, handy size or not."""
    length = np.linalg.norm(cell, axis=1)
    plan.size = np.ceil(length / mesh.LARGEST).astype(np.int32)
    plan.nodes = torch.zeros(tuple(plan.size.tolist()), dtype=torch.float64)
    plan.influence = [mesh.influence_factor(int(size)) for size in plan.size]


def test_mesh_sizes():
    assert [mesh.good_size(n) for n in (1, 17, 31, 61, 65, 121, 1000)] == [16, 18, 32, 64, 72, 128, 1000]
    plan = mesh.MeshPlan()
    plan.fit(np.eye(3) * 20.0)
    assert (20.0 / plan.size <= mesh.SPACING).all()
    nodes = plan.nodes
    for scale in (1.03, 0.97, 1.05, 0.9, 1.0):  # a breathing box keeps its mesh
        plan.fit(np.eye(3) * 20.0 * scale)
        assert plan.nodes is nodes
    plan.fit(np.eye(3) * 24.0)
    assert (plan.size > 40).all() and (24.0 / plan.size <= mesh.SPACING).all()


@needs_library
@pytest.mark.parametrize("pbc", [True, False])
def test_lists_hold_for_the_whole_skin(make_force_field, make_box, make_cluster, pbc):
    """After motion and strain within the skin the old lists give what new ones give."""
    field, system = make_force_field(), make_box(6) if pbc else make_cluster(6)
    evaluator = Evaluator(field, engine="native", skin=1.0)
    evaluator.evaluate(Batch.from_systems([system]))
    built = evaluator._built
    step = np.random.default_rng(1).normal(size=(system.n_atoms, 3))
    step *= 0.38 / np.linalg.norm(step, axis=1)[:, None]
    strain = np.eye(3) + 0.004 * np.random.default_rng(2).normal(size=(3, 3)) * pbc
    moved = System(system.numbers, (system.positions + step) @ strain, system.cell @ strain, pbc=pbc)
    kept = evaluator.evaluate(Batch.from_systems([moved]))
    assert evaluator._built is built
    assert_same(kept, evaluate(field, moved, engine="native", skin=0.0), tolerance=1e-9)


@needs_library
def test_same_bits_again_and_after_reset(make_force_field, make_box, monkeypatch):
    monkeypatch.setattr(native, "_threads", lambda n_atoms: 2)
    boxes = [make_box(7, cell=9.4 * np.eye(3)), make_box(8)]
    field, batch = make_force_field().to_dtype(torch.float32), Batch.from_systems(boxes)
    evaluator = Evaluator(field, engine="native")
    first = evaluator.evaluate(batch)
    again = evaluator.evaluate(batch)
    evaluator.evaluate(replace(batch, positions=1.1 * batch.positions, cell=1.1 * batch.cell))  # leaves another mesh
    assert not torch.equal(evaluator.evaluate(batch).forces, first.forces)
    evaluator.reset()
    for output in (again, evaluator.evaluate(batch)):
        assert torch.equal(output.forces, first.forces)
        assert torch.equal(output.energy, first.energy) and torch.equal(output.virial, first.virial)


@needs_library
def test_number_of_threads_changes_rounding_only(make_force_field, make_box, monkeypatch):
    field, box = make_force_field(), make_box(9)
    one = evaluate(field, box, engine="native")
    monkeypatch.setattr(native, "_threads", lambda n_atoms: 3)
    assert_same(evaluate(field, box, engine="native"), one, tolerance=1e-11)


@needs_library
def test_changed_parameters_are_noticed(make_force_field, make_cluster):
    field, system = make_force_field(), make_cluster(1)
    batch = Batch.from_systems([system])
    evaluator = Evaluator(field, engine="native")
    before = evaluator.evaluate(batch)
    with torch.no_grad():
        field.energy_head[0].weight.mul_(1.5)
        field.reference_charge.add_(0.1)
    after = evaluator.evaluate(batch)
    assert abs(float(after.energy - before.energy)) > 1e-3
    assert_same(after, evaluate(field, system, engine="reference"))
    field.to_dtype(torch.float32)
    assert_same(evaluator.evaluate(batch), after, tolerance=1e-5)


@needs_library
def test_overlap_names_the_atoms(make_force_field, make_cluster):
    field, system = make_force_field(), make_cluster(1)
    positions = system.positions.copy()
    positions[9] = positions[4] + [0.0, 0.2, 0.0]
    broken = System(system.numbers, positions, system.cell, pbc=False)
    with pytest.raises(InputError, match=r"Atoms (4 and 9|9 and 4) are 0.200 Å apart"):
        evaluate(field, broken, engine="native")


@needs_library
def test_overfull_box_is_refused(make_force_field):
    packed = System(np.ones(500, dtype=int), np.random.default_rng(0).random((500, 3)), np.eye(3), pbc=True)
    with pytest.raises(InputError, match=r"500\.00 atoms"):
        evaluate(make_force_field(), packed, engine="native")


def test_missing_library_is_said_once(make_force_field, monkeypatch, caplog):
    def absent():
        raise native.EngineUnavailableError("it was not built: no C++ compiler was found")

    monkeypatch.setattr(native, "library", absent)
    engines._warn_once.cache_clear()
    field = make_force_field()
    with caplog.at_level(logging.WARNING, logger="bamboo"):
        assert Evaluator(field).engine == "reference"
        assert Evaluator(field).engine == "reference"
    assert len(caplog.records) == 1 and "no C++ compiler" in caplog.text and "\n" not in caplog.records[0].message
    with pytest.raises(InputError, match=r"native.*no C"):
        Evaluator(field, engine="native")


@needs_library
def test_choice_of_engine(make_force_field):
    assert Evaluator(make_force_field()).engine == "native"
    assert Evaluator(make_force_field(), engine="reference").engine == "reference"
    with pytest.raises(InputError, match=r"warp.*expected one of auto"):
        Evaluator(make_force_field(), engine="warp")
    odd = make_force_field(network={"channels": 24, "heads": 3})
    with pytest.raises(InputError, match="no kernel for this number of channels and heads"):
        Evaluator(odd, engine="native")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tables_interpolate(dtype):
    """The tabulated function and its derivative, for a Gaussian as narrow as the sharpest radial function."""
    width, length = 0.1, 5.0
    intervals, degree = native.FEATURE_TABLE[dtype]

    def gaussian(r):
        return torch.exp(-(((r - 1.3) / width) ** 2))[:, None]

    table = native.piecewise_polynomial(gaussian, length, intervals=intervals, degree=degree)
    r = np.linspace(0.3, 4.9, 4001)
    interval = (r / length * intervals).astype(int)
    t = r / length * intervals - interval
    coefficients = table[interval, :, 0]
    value = np.array([np.polyval(c, x) for c, x in zip(coefficients, t, strict=True)])
    slope = np.array([np.polyval(np.polyder(c), x) for c, x in zip(coefficients, t, strict=True)]) * intervals / length
    exact = gaussian(torch.from_numpy(r)).numpy()[:, 0]
    exact_slope = -2.0 * (r - 1.3) / width**2 * exact
    close, close_slope = (2e-7, 5e-5) if dtype == torch.float32 else (1e-12, 1e-10)
    assert np.abs(value - exact).max() < close
    assert np.abs(slope - exact_slope).max() < close_slope * np.abs(exact_slope).max()


@pytest.fixture(scope="module")
def published_model(published, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "published.safetensors"
    import_published(published / "weights.safetensors", path)
    return path


def published_cluster(folder, name):
    frame = np.load(folder / f"{name}.npz")
    numbers, charge = frame["numbers"].astype(np.int64), float(frame["total_charge"])
    return frame, System(numbers, frame["positions"], np.zeros((3, 3)), pbc=False, total_charge=charge)


@needs_library
@pytest.mark.parametrize("pbc", [False, True])
def test_single_precision(published, published_model, exact_waves, pbc):
    """Forces in float32 within 1e-4 kcal/mol/Å RMS of the exact ones, for real molecules packed as in a liquid."""
    _, system = published_cluster(published, "gas1")
    if pbc:
        cell = np.diag(np.ptp(system.positions, axis=0) + 2.3)
        system = System(system.numbers, system.positions, cell, pbc=True)
    exact = evaluate(load(published_model, dtype=torch.float64, charge_response="full"), system, engine="reference")
    single = evaluate(load(published_model, charge_response="full"), system, engine="native")
    assert float(exact.forces.square().mean().sqrt()) / KCAL > 10.0
    assert float((single.forces - exact.forces).square().mean().sqrt()) / KCAL < 1e-4
    assert_same(single, exact, tolerance=1e-5)


@needs_library
@pytest.mark.parametrize("name", ["gas0", "gas1", "gas2", "gas3"])
def test_published_clusters(published, published_model, name):
    frame, system = published_cluster(published, name)
    output = evaluate(load(published_model), system, engine="native")
    assert np.abs(output.forces.numpy() / KCAL - frame["total_forces"]).max() < 5e-4
    assert abs(float(output.energy[0]) / KCAL - frame["total_energy"]) < 2e-3


@needs_library
def test_published_liquid(published, published_model):
    frame = np.load(published / "bulk_ec_dmc_lipf6.npz")
    system = System(frame["numbers"].astype(np.int64), frame["positions"], frame["cell"], pbc=True)
    output = evaluate(load(published_model), system, engine="native")
    assert np.abs(output.forces.numpy() / KCAL - frame["total_forces"]).max() < 0.01
    assert np.abs(output.charges.numpy() - frame["pred_charge"]).max() < 5e-6
