"""Who is near whom.

Convention, stated once: ``edge_vec = r_j - r_i + shift @ cell`` with i = index[0] (receives) and j = index[1] (sends);
``shift`` counts cell vectors. Periodic boxes may be smaller than the cutoff: several images of one pair, and images of
an atom with itself, are separate edges. Lists are found with vesin.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from vesin import NeighborList as _Vesin

from bamboo.errors import InputError
from bamboo.system import Batch

# a box packed so densely that the list would fill the memory is an input error, not a reason to be killed
MAX_NEIGHBORS_PER_ATOM = 5000
# Å; further out vesin's cells overflow, and no structure is that large: the run has blown up
MAX_COORDINATE = 1.0e5


@dataclass(frozen=True)
class Pairs:
    """A list of pairs over all systems of a batch: index (2, n_pairs) int64, shift (n_pairs, 3) float64."""

    index: torch.Tensor
    shift: torch.Tensor

    def vectors(self, positions: torch.Tensor, cell: torch.Tensor, *, system_index: torch.Tensor) -> torch.Tensor:
        """Return r_j - r_i + shift @ cell, (n_pairs, 3), differentiable in positions and cell."""
        i, j = self.index
        difference = positions[j] - positions[i]
        if len(cell) == 1:
            return difference + self.shift @ cell[0]
        return difference + torch.einsum("pa,pab->pb", self.shift, cell[system_index[i]])

    def select(self, keep: torch.Tensor) -> "Pairs":
        return Pairs(self.index[:, keep], self.shift[keep])


@dataclass(frozen=True)
class Neighbors:
    """The three lists of a force field.

    edges       full list (both directions) within the network's cutoff, sorted by receiver
    dispersion  half list (each pair once) within the dispersion cutoff
    cluster     each pair of a non-periodic system once, without cutoff (Coulomb energy of clusters)
    """

    edges: Pairs
    dispersion: Pairs
    cluster: Pairs


def check_geometry(batch: Batch) -> None:
    """Raise InputError, naming an atom, for coordinates that are not finite or absurd, or a cell without volume."""
    lost = ~(batch.positions.detach().abs() < MAX_COORDINATE).all(dim=1)  # also true for nan
    if bool(lost.any()):
        atom = int(lost.nonzero()[0])
        raise InputError(
            f"Atom {atom} is at {batch.positions[atom].tolist()} Å ({int(lost.sum())} such atoms), expected "
            f"coordinates below {MAX_COORDINATE:.0e} Å. The run has blown up, or the structure is broken."
        )
    volumes = torch.linalg.det(batch.cell.detach()[batch.pbc]).abs()
    if not bool((volumes > 0).all()):
        raise InputError(f"A periodic box needs three independent cell vectors, got\n{batch.cell[batch.pbc].tolist()}")


def check_density(n_atoms: int, cell: NDArray[np.float64], cutoff: float) -> None:
    """Raise InputError if a periodic box is so dense that its list of pairs would fill the memory."""
    density = n_atoms / abs(np.linalg.det(cell))
    if density * 4.2 * cutoff**3 > MAX_NEIGHBORS_PER_ATOM:
        raise InputError(
            f"The box holds {density:.2f} atoms/Å^3 (a liquid has about 0.1): "
            "check its cell vectors and the number of atoms."
        )


def find_pairs(batch: Batch, cutoff: float, *, full: bool) -> Pairs:
    """Return all pairs closer than the cutoff [Å] within each system, sorted by i."""
    positions, cells = batch.positions.detach().cpu().numpy(), batch.cell.detach().cpu().numpy()
    start, found_index, found_shift = 0, [], []
    for size, cell, periodic in zip(batch.atoms_per_system.tolist(), cells, batch.pbc.tolist(), strict=True):
        local = positions[start : start + size]
        if periodic:
            check_density(size, cell, cutoff)
        i, j, shift = _Vesin(cutoff=cutoff, full_list=full).compute(
            points=local, box=cell, periodic=periodic, quantities="ijS"
        )
        order = np.lexsort((j, i))
        found_index.append(np.stack([i[order], j[order]]).astype(np.int64) + start)
        found_shift.append(shift[order].astype(np.float64))
        start += size
    device = batch.positions.device
    return Pairs(
        torch.from_numpy(np.concatenate(found_index, axis=1)).to(device),
        torch.from_numpy(np.concatenate(found_shift)).to(device),
    )


def all_cluster_pairs(batch: Batch) -> Pairs:
    """Return each pair i < j of every non-periodic system once."""
    device = batch.positions.device
    start, found = 0, [torch.zeros(2, 0, dtype=torch.int64, device=device)]
    for size, periodic in zip(batch.atoms_per_system.tolist(), batch.pbc.tolist(), strict=True):
        if not periodic:
            found.append(torch.triu_indices(size, size, offset=1, device=device) + start)
        start += size
    index = torch.cat(found, dim=1)
    return Pairs(index, torch.zeros(index.shape[1], 3, dtype=torch.float64, device=device))


def find_neighbors(batch: Batch, cutoff: float, dispersion_cutoff: float, *, skin: float = 0.0) -> Neighbors:
    """Return the lists of a force field; with a skin [Å] they stay valid while no atom moves more than skin / 2."""
    check_geometry(batch)
    none = Pairs(batch.numbers.new_zeros(2, 0), batch.positions.new_zeros(0, 3))
    return Neighbors(
        edges=find_pairs(batch, cutoff + skin, full=True),
        dispersion=find_pairs(batch, dispersion_cutoff + skin, full=False) if dispersion_cutoff > 0 else none,
        cluster=all_cluster_pairs(batch),
    )


def trim(neighbors: Neighbors, batch: Batch, cutoff: float, dispersion_cutoff: float) -> Neighbors:
    """Return the lists without the pairs that lie in the skin."""

    def near(pairs: Pairs, length: float) -> Pairs:
        vectors = pairs.vectors(batch.positions, batch.cell, system_index=batch.system_index)
        return pairs.select(vectors.square().sum(-1) < length**2)

    return Neighbors(near(neighbors.edges, cutoff), near(neighbors.dispersion, dispersion_cutoff), neighbors.cluster)
