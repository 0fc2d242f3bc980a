"""Repeated evaluation: lists with a skin along trajectories, and what happens when something is wrong."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from bamboo.errors import InputError, UnknownElementError
from bamboo.evaluator import Evaluator
from bamboo.kernels.engines import native_status
from bamboo.system import Batch, System


@pytest.fixture(params=["reference", "native"])
def engine(request):
    if request.param == "native" and native_status():
        pytest.skip(native_status())
    return request.param


@pytest.fixture
def field(make_force_field):
    return make_force_field()


def same(one, two, *, tolerance=1e-9):
    for name in ("energy", "forces", "virial", "charges"):
        expected = getattr(two, name)
        scale = max(1.0, float(expected.abs().max()))
        assert float((getattr(one, name) - expected).abs().max()) < tolerance * scale, name


def count_rebuilds(evaluator, monkeypatch):
    calls, original = [], evaluator._engine.rebuild

    def rebuild(batch, skin):
        calls.append(batch)
        original(batch, skin)

    monkeypatch.setattr(evaluator._engine, "rebuild", rebuild)
    return calls


def test_skin_gives_the_same_as_a_fresh_list_along_a_trajectory(field, make_box, make_cluster, engine, monkeypatch):
    """Atoms wander off in steps of all sizes; cells breathe and shear; some steps wrap atoms back into the cell."""
    rng = np.random.default_rng(0)
    batch = Batch.from_systems([make_box(1), make_cluster(1), make_box(2)])
    kept = Evaluator(field, skin=1.2, engine=engine)
    rebuilds = count_rebuilds(kept, monkeypatch)
    for step in range(14):
        fresh = Evaluator(field, skin=0.0, engine=engine).evaluate(batch)
        # the native engine may keep its charge mesh while the cell changes a little
        same(kept.evaluate(batch), fresh, tolerance=1e-9 if engine == "reference" else 2e-6)
        positions = batch.positions + torch.from_numpy(rng.normal(size=(batch.n_atoms, 3))) * rng.choice([0.01, 0.05])
        cell = batch.cell
        if step % 3 == 2:
            strain = torch.from_numpy(rng.normal(size=(3, 3))) * 0.004
            cell, positions = cell @ (torch.eye(3) + strain), positions @ (torch.eye(3) + strain)
        if step == 8:
            positions = positions.clone()
            positions[:5] += cell[0, 1]
        batch = replace(batch, positions=positions, cell=cell)
    assert 2 <= len(rebuilds) < 12


def test_sudden_changes_are_noticed(field, make_box, make_cluster, engine):
    """Another structure of the same size, another cell, other elements, other order of systems."""
    box, cluster = make_box(1), make_cluster(1, n_atoms=16)
    evaluator = Evaluator(field, skin=1.0, engine=engine)
    larger = System(box.numbers, box.positions, box.cell * 1.3, pbc=True)
    swapped = System(box.numbers[::-1].copy(), box.positions, box.cell, pbc=True)
    three, five = (
        System(np.full(n, 8), 2.5 * np.arange(3.0 * n).reshape(n, 3) % 7.0, np.zeros((3, 3)), pbc=False) for n in (3, 5)
    )
    for systems in ([three, five], [five, three]):  # the same atoms, dealt out differently
        batch = Batch.from_systems(systems)
        batch.positions[:] = torch.arange(24.0).view(8, 3) * 1.3 % 5.0
        same(evaluator.evaluate(batch), Evaluator(field, skin=0.0, engine=engine).evaluate(batch))
    for systems in ([box], [make_box(2)], [larger], [box], [swapped], [cluster], [box, cluster], [cluster, box], [box]):
        batch = Batch.from_systems(systems)
        same(evaluator.evaluate(batch), Evaluator(field, skin=0.0, engine=engine).evaluate(batch), tolerance=2e-6)


def test_atoms_moved_in_place(field, make_box, engine):
    """An integrator may write into the batch it handed over."""
    batch = Batch.from_systems([make_box(1)])
    evaluator = Evaluator(field, skin=0.5, engine=engine)
    evaluator.evaluate(batch)
    for _ in range(8):
        batch.positions[3] += 0.2
        batch.positions[7] -= 0.2
        same(evaluator.evaluate(batch), Evaluator(field, skin=0.0, engine=engine).evaluate(batch))
    batch.cell.mul_(1.2)
    same(evaluator.evaluate(batch), Evaluator(field, skin=0.0, engine=engine).evaluate(batch), tolerance=2e-6)


def test_small_moves_do_not_rebuild(field, make_box, engine, monkeypatch):
    batch = Batch.from_systems([make_box(1)])
    evaluator = Evaluator(field, skin=1.0, engine=engine)
    rebuilds = count_rebuilds(evaluator, monkeypatch)
    for shift in (0.0, 0.1, 0.49):
        moved = batch.positions.clone()
        moved[0, 0] += shift
        evaluator.evaluate(replace(batch, positions=moved))
    assert len(rebuilds) == 1
    moved[0, 0] += 0.02  # 0.51 Å: more than half the skin
    evaluator.evaluate(replace(batch, positions=moved))
    assert len(rebuilds) == 2
    stretched = replace(batch, positions=moved * 1.001, cell=batch.cell * 1.001)
    evaluator.evaluate(stretched)
    assert len(rebuilds) == 2
    evaluator.reset()
    evaluator.evaluate(stretched)
    assert len(rebuilds) == 3


def test_reset_forgets_the_past(field, make_box, engine):
    batch = Batch.from_systems([make_box(1)])
    moved = replace(batch, positions=batch.positions + 0.05 * torch.randn(batch.positions.shape, dtype=torch.float64))
    evaluator = Evaluator(field, skin=1.0, engine=engine)
    evaluator.evaluate(batch)
    evaluator.reset()
    fresh = Evaluator(field, skin=1.0, engine=engine).evaluate(moved)
    assert torch.equal(evaluator.evaluate(moved).forces, fresh.forces)


def test_overlapping_atoms_are_named(field, engine):
    positions = np.array([[0.0, 0, 0], [3.0, 0, 0], [3.0, 0.2, 0], [6.0, 0, 0]])
    for cell in (np.zeros((3, 3)), np.eye(3) * 20.0):
        system = System(np.array([8, 6, 1, 8]), positions, cell, pbc=bool(cell.any()))
        with pytest.raises(InputError, match=r"Atoms (1 and 2|2 and 1) are 0\.200 Å apart"):
            Evaluator(field, engine=engine).evaluate(Batch.from_systems([system]))


def test_coinciding_atoms_and_images(field, engine):
    twice = System(np.array([8, 8]), np.zeros((2, 3)), np.zeros((3, 3)), pbc=False)
    with pytest.raises(InputError, match="overlapping"):
        Evaluator(field, engine=engine).evaluate(Batch.from_systems([twice]))
    image = System(np.array([8, 8]), np.array([[0.0, 0, 0], [9.95, 0, 0]]), np.eye(3) * 10.0, pbc=True)
    with pytest.raises(InputError, match=r"0\.050 Å apart"):
        Evaluator(field, engine=engine).evaluate(Batch.from_systems([image]))


def test_unknown_element(field, engine):
    argon = System(np.array([8, 18]), np.eye(3)[:2] * 3.0, np.zeros((3, 3)), pbc=False)
    evaluator = Evaluator(field, engine=engine)
    with pytest.raises(UnknownElementError, match="does not know Ar") as caught:
        evaluator.evaluate(Batch.from_systems([argon]))
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e9])
@pytest.mark.parametrize("periodic", [True, False])
def test_run_that_blows_up(field, make_box, make_cluster, engine, value, periodic):
    """The lists exist already when the bad numbers arrive; the evaluator says so and works again afterwards."""
    batch = Batch.from_systems([make_box(1) if periodic else make_cluster(1)])
    evaluator = Evaluator(field, engine=engine)
    expected = evaluator.evaluate(batch)
    broken = batch.positions.clone()
    broken[4, 2] = value
    with pytest.raises(InputError, match="Atom 4"):
        evaluator.evaluate(replace(batch, positions=broken))
    same(evaluator.evaluate(batch), expected)


def test_box_that_collapses(field, make_box, engine):
    batch = Batch.from_systems([make_box(1)])
    evaluator = Evaluator(field, engine=engine)
    evaluator.evaluate(batch)
    for factor in (0.01, 0.0, float("nan")):
        with pytest.raises(InputError):
            evaluator.evaluate(replace(batch, positions=batch.positions * 0.01, cell=batch.cell * factor))
    evaluator.evaluate(batch)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"skin": -1.0}, "skin"),
        ({"skin": float("nan")}, "skin"),
        ({"device": "toaster"}, "device 'toaster'"),
        ({"engine": "steam"}, "engine is 'steam'"),
    ],
)
def test_wrong_options(field, options, message):
    with pytest.raises(InputError, match=message):
        Evaluator(field, **options)


def test_single_atoms(field, engine):
    """No pairs at all: a cluster of one, and one atom in a large box."""
    alone = System(np.array([3]), np.ones((1, 3)), np.zeros((3, 3)), pbc=False, total_charge=1.0)
    boxed = System(np.array([3]), np.ones((1, 3)), np.eye(3) * 30.0, pbc=True, total_charge=1.0)
    output = Evaluator(field, engine=engine).evaluate(Batch.from_systems([alone, boxed]))
    assert torch.isfinite(output.energy).all()
    assert output.charges.tolist() == pytest.approx([1.0, 1.0], abs=1e-14)
    assert float(output.forces.abs().max()) < 1e-4  # an ion pulls itself a little towards the nodes of the charge mesh
