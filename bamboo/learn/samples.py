"""Frames made ready for training: known parts of the labels are subtracted, neighbour lists are built once.

Dispersion, repulsion and reference energies have no trainable parameter, so they are taken out of the labels here and
``ForceField.forward(fixed_terms=False)`` is compared with the rest: the total then matches the label. Dispersion stays
where a level of theory contains none: there the total is the label plus dispersion.
torch-geometric stacks samples into batches.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Sampler
from torch_geometric.data import Data

from bamboo import units
from bamboo.errors import InputError
from bamboo.forcefield import ForceField
from bamboo.neighbors import Neighbors, Pairs, all_cluster_pairs, find_neighbors
from bamboo.quantum.dataset import Frame
from bamboo.quantum.labels import Labels
from bamboo.structure.packing import bond_graph
from bamboo.structure.recognition import bonded_groups
from bamboo.system import Batch, System

FAR_DISTANCE = 500.0  # Å between the two clusters of a far pair


def _energies_per_element(
    numbers: Sequence[NDArray[np.int64]], energies: NDArray[np.float64], n_rows: int
) -> NDArray[np.float64]:
    """Return e_Z (n_rows,), the least squares of sum_f (E_f - sum_Z n_fZ e_Z)^2 / n_f; 0 for absent elements [eV]."""
    counts = np.stack([np.bincount(z, minlength=n_rows) for z in numbers])
    present = np.flatnonzero(counts.sum(0))
    weight = 1.0 / np.sqrt(counts.sum(1))
    # a trace of ridge keeps elements that always occur together (P and F in PF6-) from diverging
    design = np.vstack([counts[:, present] * weight[:, None], 1.0e-4 * np.eye(len(present))])
    target = np.concatenate([energies * weight, np.zeros(len(present))])
    solution = np.zeros(n_rows)
    solution[present] = np.linalg.lstsq(design, target, rcond=None)[0]
    return solution


def shift_references(force_field: ForceField, samples: Sequence[Data]) -> None:
    """Shift the reference energies so that a trained force field starts without offset on another level of theory."""
    residual = []
    for sample in samples:
        output = force_field(*unpack(sample), fixed_terms=False)
        residual.append(float(sample.energy) - float(output.energy))
    numbers = [sample.numbers.numpy().astype(np.int64) for sample in samples]
    shift = _energies_per_element(numbers, np.array(residual), len(force_field.known))
    force_field.reference_energy += torch.from_numpy(shift)


def fit_references(force_field: ForceField, frames: Sequence[Frame]) -> None:
    """Set per-element reference energies [eV] and charges [e], and the covered elements, from labels.

    Energies: least squares over total energies. Charges: mean label of each element. The network then learns
    deviations.
    """
    numbers = [frame.system.numbers for frame in frames]
    energies = _energies_per_element(
        numbers, np.array([frame.labels.energy for frame in frames]), len(force_field.known)
    )
    force_field.reference_energy.copy_(torch.from_numpy(energies))
    force_field.known.zero_()
    force_field.known[torch.from_numpy(np.unique(np.concatenate(numbers)))] = True
    charged = [frame for frame in frames if frame.labels.charges is not None]
    if charged:
        labelled = np.concatenate([frame.system.numbers for frame in charged])
        charges = np.concatenate([frame.labels.charges for frame in charged if frame.labels.charges is not None])
        force_field.reference_charge.zero_()
        for number in np.unique(labelled).tolist():
            # the inverse of the bound that the model applies to it
            mean = float(charges[labelled == number].mean()) / force_field.config.charge_limit
            force_field.reference_charge[number] = force_field.config.charge_limit * np.arctanh(
                np.clip(mean, -0.9, 0.9)
            )


def make_sample(force_field: ForceField, frame: Frame) -> Data:
    """Return one frame as a graph with residual labels; absent labels are nan.

    ``molecule_index`` is the molecule of each atom, or what bonds hold together where the frame does not tell; row k of
    ``molecular_forces`` is the residual force on the whole of molecule k, nan beyond the last molecule, and everywhere
    where there is only one.
    """
    batch = Batch.from_systems([frame.system])
    config = force_field.config
    neighbors = find_neighbors(batch, config.network.cutoff, config.dispersion.cutoff)
    strain = torch.zeros(1, 3, 3, dtype=torch.float64, requires_grad=True)
    positions = batch.positions.clone().requires_grad_()
    strained, cell = positions + positions @ strain[0], batch.cell + batch.cell @ strain
    terms = force_field.fixed_terms(batch, strained, cell, neighbors=neighbors)
    if not frame.labels.contains_dispersion:
        del terms["dispersion"]
    fixed = torch.stack(list(terms.values())).sum()
    gradient, strain_gradient = torch.autograd.grad(fixed, (positions, strain))
    labels, n_atoms = frame.labels, frame.system.n_atoms
    forces = _label(labels.forces, (n_atoms, 3)) + gradient
    group = torch.from_numpy(molecules_of(frame.system))
    net = torch.full((n_atoms, 3), float("nan"), dtype=torch.float64)
    if (n_groups := int(group.max()) + 1) > 1:
        net[:n_groups] = torch.zeros(n_groups, 3, dtype=torch.float64).index_add(0, group, forces)
    return Data(
        numbers=batch.numbers.to(torch.uint8),
        positions=batch.positions,
        cell=batch.cell,
        pbc=batch.pbc,
        total_charge=batch.total_charge,
        edge_index=neighbors.edges.index.to(torch.int32),
        edge_shift=neighbors.edges.shift.to(torch.int8),
        energy=torch.tensor([labels.energy - float(fixed.detach())], dtype=torch.float64),
        forces=forces,
        molecule_index=group.to(torch.int32),
        molecular_forces=net,
        charges=_label(labels.charges, (n_atoms,)),
        dipole=_label(labels.dipole, (3,))[None],
        virial=_label(labels.virial, (3, 3))[None] + strain_gradient,
        num_nodes=n_atoms,
    )


def molecules_of(system: System) -> np.ndarray:
    """Return the number of each atom's molecule, (n_atoms,), from 0 without gaps."""
    if system.molecule is None:
        return bonded_groups(bond_graph(system), system.n_atoms)
    return np.unique(system.molecule, return_inverse=True)[1].astype(np.int64)


def _label(values: object, shape: tuple[int, ...]) -> torch.Tensor:
    """Return a label as a tensor, nan where it is absent."""
    if values is None:
        return torch.full(shape, float("nan"), dtype=torch.float64)
    return torch.as_tensor(np.asarray(values, dtype=np.float64)).reshape(shape)


def make_samples(
    force_field: ForceField, frames: Sequence[Frame], *, progress: Callable[[int, int], None] | None = None
) -> list[Data]:
    """Return all frames as graphs; ``progress(done, total)`` is called now and then."""
    samples = []
    for index, frame in enumerate(frames):
        samples.append(make_sample(force_field, frame))
        if progress is not None and (index + 1) % 200 == 0:
            progress(index + 1, len(frames))
    return samples


def unpack(data: Data) -> tuple[Batch, Neighbors]:
    """Return the batch and its neighbour lists from stacked samples."""
    system_index = data.batch if data.batch is not None else torch.zeros(data.num_nodes, dtype=torch.int64)
    batch = Batch(
        numbers=data.numbers.long(),
        positions=data.positions,
        cell=data.cell,
        pbc=data.pbc,
        total_charge=data.total_charge,
        system_index=system_index,
    )
    edges = Pairs(data.edge_index.long(), data.edge_shift.double())
    none = Pairs(torch.zeros(2, 0, dtype=torch.int64), torch.zeros(0, 3, dtype=torch.float64))
    return batch, Neighbors(edges=edges, dispersion=none, cluster=all_cluster_pairs(batch))


def far_pairs(frames: Sequence[Frame], count: int, *, seed: int) -> list[Frame]:
    """Return frames of two labelled clusters placed 500 Å apart, of all charges and sizes.

    Labels add, each cluster keeps its own charges; the energy gains the Coulomb energy of the labelled charges. They
    teach the network that ions far apart keep their charge. No dipole: over 500 Å it would drown all other errors.
    """
    generator = np.random.default_rng(seed)
    clusters = [frame for frame in frames if not frame.system.pbc and frame.labels.charges is not None]
    if len(clusters) < 2:
        return []
    charge = np.array([round(f.system.total_charge) for f in clusters])
    # every total charge equally often, and among them small clusters: a bare ion must keep its charge as well
    chance = 1.0 / np.array([np.sum(charge == q) * f.system.n_atoms for q, f in zip(charge, clusters, strict=True)])
    made = []
    for _ in range(count):
        first, second = generator.choice(len(clusters), size=2, replace=False, p=chance / chance.sum())
        direction = generator.normal(size=3)
        offset = FAR_DISTANCE * direction / np.linalg.norm(direction)
        made.append(_far_pair(clusters[first], clusters[second], offset))
    return made


def _far_pair(first: Frame, second: Frame, offset: np.ndarray) -> Frame:
    a, b = first.system, second.system
    moved = b.positions - b.positions.mean(0) + a.positions.mean(0) + offset
    one, two = first.labels, second.labels
    if one.charges is None or two.charges is None:
        raise InputError("Far pairs need frames with charges.")
    distance = np.linalg.norm(a.positions[:, None] - moved[None], axis=-1)
    coulomb = units.COULOMB_CONSTANT * float((one.charges[:, None] * two.charges[None] / distance).sum())
    forces = None if one.forces is None or two.forces is None else np.concatenate([one.forces, two.forces])
    return Frame(
        system=System(
            numbers=np.concatenate([a.numbers, b.numbers]),
            positions=np.concatenate([a.positions, moved]),
            cell=np.zeros((3, 3)),
            pbc=False,
            total_charge=a.total_charge + b.total_charge,
            molecule=np.concatenate([(own := molecules_of(a)), own.max() + 1 + molecules_of(b)]),
        ),
        labels=Labels(
            level=one.level,
            energy=one.energy + two.energy + coulomb,
            forces=forces,
            charges=np.concatenate([one.charges, two.charges]),
        ),
        kind=first.kind,
        sampling=first.sampling,
        trajectory=first.trajectory,
        temperature_K=first.temperature_K,
    )


class EdgeBudgetSampler(Sampler[list[int]]):
    """Batches of random frames that hold about the same number of edges, so that every step costs about the same.

    The order follows from seed and epoch alone; ``skip`` leaves out the first batches of the epoch when resuming.
    """

    def __init__(self, n_edges: Sequence[int], *, budget: int, seed: int, shuffle: bool = True) -> None:
        self.n_edges, self.budget, self.seed, self.shuffle = list(n_edges), budget, seed, shuffle
        self.epoch = self.skip = 0

    def batches(self) -> list[list[int]]:
        """Return the batches of the current epoch, indices of samples."""
        generator = np.random.default_rng([self.seed, self.epoch])
        order = generator.permutation(len(self.n_edges)) if self.shuffle else np.arange(len(self.n_edges))
        batches: list[list[int]] = [[]]
        filled = 0
        for index in order.tolist():
            cost = self.n_edges[index] + 1
            if batches[-1] and filled + cost > self.budget:
                batches.append([])
                filled = 0
            batches[-1].append(index)
            filled += cost
        return batches

    def __iter__(self) -> Iterator[list[int]]:
        yield from self.batches()[self.skip :]

    def __len__(self) -> int:
        return len(self.batches()) - self.skip
