"""Neighbour lists against brute force over images."""

import itertools

import numpy as np
import pytest
import torch

from bamboo.errors import InputError
from bamboo.neighbors import all_cluster_pairs, find_neighbors, find_pairs, trim
from bamboo.system import Batch, System


def brute_force(positions, cell, cutoff):
    """Return {(i, j, shift)} of all directed pairs within the cutoff, images of an atom with itself included."""
    fractional = positions @ np.linalg.inv(cell)
    heights = 1.0 / np.linalg.norm(np.linalg.inv(cell), axis=0)
    reach = np.ceil(cutoff / heights + np.ptp(fractional, axis=0)).astype(int)
    found = set()
    for shift in itertools.product(*[range(-n, n + 1) for n in reach]):
        distance = np.linalg.norm(positions[None] - positions[:, None] + np.array(shift) @ cell, axis=-1)
        for i, j in np.argwhere(distance < cutoff).tolist():
            if i != j or any(shift):
                found.add((i, j, *shift))
    return found


def as_list(pairs):
    return [(i, j, *map(int, s)) for (i, j), s in zip(pairs.index.T.tolist(), pairs.shift.tolist(), strict=True)]


def box(seed, *, n_atoms=5, size=3.5):
    rng = np.random.default_rng(seed)
    while abs(np.linalg.det(cell := rng.normal(size=(3, 3)) * size)) < size**3:
        pass
    return System(np.ones(n_atoms, dtype=int), rng.normal(size=(n_atoms, 3)) * 5.0, cell, pbc=True)


@pytest.mark.parametrize("seed", range(5))
def test_periodic_lists_equal_brute_force(seed):
    """Skewed cells, left-handed ones among them, smaller than the cutoff; atoms outside the cell."""
    system, cutoff = box(seed), 4.5
    batch = Batch.from_systems([system])
    expected = brute_force(system.positions, system.cell, cutoff)
    full = as_list(find_pairs(batch, cutoff, full=True))
    assert len(full) == len(set(full))
    assert set(full) == expected
    half = as_list(find_pairs(batch, cutoff, full=False))
    both = half + [(j, i, -a, -b, -c) for i, j, a, b, c in half]
    assert len(both) == len(set(both))
    assert set(both) == expected


def test_vectors_point_from_receiver_to_sender():
    system = box(1)
    batch = Batch.from_systems([system])
    pairs = find_pairs(batch, 4.5, full=True)
    vectors = pairs.vectors(batch.positions, batch.cell, system_index=batch.system_index).numpy()
    i, j = pairs.index.numpy()
    assert np.allclose(vectors, system.positions[j] - system.positions[i] + pairs.shift.numpy() @ system.cell)
    assert (np.linalg.norm(vectors, axis=1) < 4.5).all()
    assert (np.diff(i) >= 0).all()  # sorted by receiver


def test_systems_of_a_batch_do_not_see_each_other():
    systems = [box(1), System(np.ones(3, dtype=int), np.eye(3), np.zeros((3, 3)), pbc=False), box(2)]
    pairs = find_pairs(Batch.from_systems(systems), 4.5, full=True)
    start, expected = 0, []
    for system in systems:
        alone = find_pairs(Batch.from_systems([system]), 4.5, full=True)
        expected += [(i + start, j + start, *s) for i, j, *s in as_list(alone)]
        start += system.n_atoms
    assert as_list(pairs) == expected
    batch = Batch.from_systems(systems)
    together = pairs.vectors(batch.positions, batch.cell, system_index=batch.system_index)
    assert float(together.norm(dim=1).max()) < 4.5


def test_lists_of_a_field():
    cluster = System(np.ones(4, dtype=int), np.arange(12.0).reshape(4, 3) * 2.0, np.zeros((3, 3)), pbc=False)
    batch = Batch.from_systems([cluster, box(3), cluster])
    neighbors = find_neighbors(batch, 3.0, 6.0)
    assert neighbors.cluster.index.shape == (2, 12)  # 6 pairs of each cluster, none of the box
    assert sorted(map(tuple, neighbors.cluster.index.T.tolist()))[:6] == list(itertools.combinations(range(4), 2))
    assert neighbors.edges.index.shape[1] % 2 == 0
    skinned = find_neighbors(batch, 3.0, 6.0, skin=1.5)
    assert skinned.edges.index.shape[1] > neighbors.edges.index.shape[1]
    trimmed = trim(skinned, batch, 3.0, 6.0)
    assert as_list(trimmed.edges) == as_list(neighbors.edges)
    assert as_list(trimmed.dispersion) == as_list(neighbors.dispersion)
    assert find_neighbors(batch, 3.0, 0.0).dispersion.index.shape == (2, 0)


def test_single_atoms():
    alone = Batch.from_systems([System(np.array([1]), np.zeros((1, 3)), np.zeros((3, 3)), pbc=False)])
    assert find_pairs(alone, 5.0, full=True).index.shape == (2, 0)
    assert all_cluster_pairs(alone).index.shape == (2, 0)
    crystal = Batch.from_systems([System(np.array([1]), np.zeros((1, 3)), np.eye(3) * 3.0, pbc=True)])
    assert find_pairs(crystal, 3.1, full=True).index.shape == (2, 6)
    assert find_pairs(crystal, 3.1, full=False).index.shape == (2, 3)


def test_absurd_density_is_an_error_not_a_full_memory():
    dense = System(np.ones(300, dtype=int), np.random.default_rng(0).random((300, 3)), np.eye(3) * 3.0, pbc=True)
    with pytest.raises(InputError, match="atoms/Å"):
        find_pairs(Batch.from_systems([dense]), 10.0, full=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e7, -1e30])
@pytest.mark.parametrize("periodic", [True, False])
def test_lost_atoms_are_named(value, periodic):
    """A run that blows up reaches the list through a Batch; vesin crashes or returns nothing for such numbers."""
    system = System(np.ones(2, dtype=int), np.eye(3)[:2], np.eye(3) * 9.0 * periodic, pbc=periodic)
    batch = Batch.from_systems([system, system])
    batch.positions[3, 1] = value
    with pytest.raises(InputError, match="Atom 3"):
        find_neighbors(batch, 5.0, 6.0)


def test_collapsed_cell_is_refused():
    batch = Batch.from_systems([System(np.ones(2, dtype=int), np.eye(3)[:2], np.eye(3) * 9.0, pbc=True)])
    for value in (0.0, float("nan")):
        batch.cell[0, 2, 2] = value
        with pytest.raises(InputError, match="cell vectors"):
            find_neighbors(batch, 5.0, 6.0)


def test_vectors_are_differentiable_in_positions_and_cell():
    batch = Batch.from_systems([box(4, n_atoms=2), box(5, n_atoms=2)])
    pairs = find_pairs(batch, 4.0, full=True)
    positions, cell = batch.positions.requires_grad_(), batch.cell.requires_grad_()
    vectors = pairs.vectors(positions, cell, system_index=batch.system_index)
    to_positions, to_cell = torch.autograd.grad(vectors[:, 0].sum(), (positions, cell))
    # a full list holds each pair and its reverse: the sum of all vectors is zero, whatever positions and cell are
    assert float(to_positions.abs().max()) < 1e-12
    assert float(to_cell.abs().max()) < 1e-12
    to_cell = torch.autograd.grad(pairs.vectors(positions, cell, system_index=batch.system_index)[0].sum(), cell)[0]
    assert torch.equal(to_cell[0], pairs.shift[0][:, None].expand(3, 3))
