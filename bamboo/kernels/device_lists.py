"""Lists of neighbours found where the atoms are: cells, sorting and counting in torch, on a GPU as on a CPU."""

from dataclasses import dataclass
from itertools import product

import torch

from bamboo.system import Batch

CANDIDATES = 2**24  # so many pairs, roughly, are looked at in one go: 2.5 GB
SPARE = 1.2  # room for this many times the pairs of the first list


@dataclass(frozen=True)
class Grid:
    """The systems of a batch cut into bins, those of one system beside each other; tensors start with n_systems.

    origin (3), inverse (3, 3) of the cell (clusters: of the box around them); bins (3) along each cell vector; steps
    (3), how many bins a neighbour may be away; first, the number of the system's first bin; total of all bins.
    """

    origin: torch.Tensor
    inverse: torch.Tensor
    bins: torch.Tensor
    steps: torch.Tensor
    first: torch.Tensor
    total: int

    @classmethod
    def of(cls, batch: Batch, reach: torch.Tensor) -> "Grid":
        """Cut into bins no narrower than the reach (n_systems,) [Å], or one bin where the box itself is."""
        ends = torch.stack([
            torch.full_like(batch.cell[:, 0], sign * torch.inf).scatter_reduce(
                0, batch.system_index[:, None].expand(-1, 3), batch.positions, kind
            )
            for sign, kind in ((1.0, "amin"), (-1.0, "amax"))
        ])  # fmt: skip
        periodic = batch.pbc[:, None]
        frame = torch.where(periodic[..., None], batch.cell, torch.diag_embed(ends[1] - ends[0] + 1.0))
        inverse = torch.linalg.inv(frame)
        width = 1.0 / inverse.norm(dim=1)  # of the cell, across each pair of faces
        most = batch.atoms_per_system.to(width.dtype).pow(1.0 / 3.0).ceil()  # as many bins as atoms, roughly
        bins = torch.minimum((width / reach[:, None]).floor(), most[:, None]).clamp(min=1.0)
        steps = torch.where(periodic, (reach[:, None] * bins / width).ceil(), (bins > 1.0).to(bins.dtype))
        bins = bins.long()
        sizes = bins.prod(1)
        origin = torch.where(periodic, torch.zeros_like(ends[0]), ends[0])
        return cls(origin, inverse, bins, steps.long(), sizes.cumsum(0) - sizes, int(sizes.sum()))


def find_pairs(batch: Batch, reach: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return i, j (n_pairs,) int32 and shift (n_pairs, 3) int16 of all pairs, both directions, in the order of i.

    reach (n_systems,) [Å]; infinite for a cluster of which all pairs are wanted. Convention as in ``neighbors.py``.
    """
    grid, system = Grid.of(batch, reach), batch.system_index
    bins, periodic = grid.bins[system], batch.pbc[system, None]
    fraction = torch.einsum("na,nab->nb", batch.positions - grid.origin[system], grid.inverse[system])
    wraps = fraction.floor() * periodic
    place = torch.minimum(((fraction - wraps) * bins).long(), bins - 1)
    wraps = wraps.long()

    def number(at: torch.Tensor) -> torch.Tensor:
        rows = at[..., 0] * bins[:, None, 1] + at[..., 1]
        return grid.first[system, None] + rows * bins[:, None, 2] + at[..., 2]

    own_bin = number(place[:, None])[:, 0]
    order = own_bin.argsort(stable=True)
    occupants = torch.bincount(own_bin, minlength=grid.total)
    first_in_bin = occupants.cumsum(0) - occupants
    ways = list(product(*(range(-most, most + 1) for most in grid.steps.amax(0).tolist())))
    at_once = max(1, CANDIDATES // int(occupants.square().sum()))
    found = []
    for away in torch.tensor(ways, device=place.device).split(at_once):  # (m, 3): to the bins so far away
        target = place[:, None] + away
        image = torch.div(target, bins[:, None], rounding_mode="floor")
        exists = ((periodic[:, None] | (image == 0)) & (away.abs() <= grid.steps[system, None])).all(2)
        there = torch.where(exists, number(target - image * bins[:, None]), 0)
        count = (occupants[there] * exists).flatten()
        visit = torch.repeat_interleave(count)  # of an atom to a bin; one for each atom that may be met there
        within = torch.arange(len(visit), device=visit.device) - (count.cumsum(0) - count)[visit]
        i, j = visit // len(away), order[first_in_bin[there.flatten()[visit]] + within]
        shift = image.view(-1, 3)[visit] + wraps[i] - wraps[j]
        vector = batch.positions[j] - batch.positions[i]
        vector += torch.einsum("pa,pab->pb", shift.to(vector.dtype), batch.cell[system[i]])
        near = vector.square().sum(1) < reach[system[i]].square()
        near &= (i != j) | (shift != 0).any(1)
        kept = near.nonzero().flatten()
        found.append((i[kept].int(), j[kept].int(), shift[kept].short()))
    i, j, shift = (torch.cat(parts) for parts in zip(*found, strict=True))
    order = i.argsort(stable=True)
    return i[order], j[order], shift[order]


class Rows:
    """A list of neighbours for the kernels: ``start`` (n + 1,) int32, ``index`` (capacity,) int32, ``shift``
    (capacity, 3) int16; the neighbours of atom i are start[i] .. start[i + 1]. The tensors stay in place while they
    are large enough, so that a captured graph reads the new list.
    """

    def __init__(self, n_atoms: int, device: torch.device) -> None:
        self.start = torch.zeros(n_atoms + 1, dtype=torch.int32, device=device)
        self.index = torch.zeros(0, dtype=torch.int32, device=device)
        self.shift = torch.zeros(0, 3, dtype=torch.int16, device=device)

    @property
    def capacity(self) -> int:
        return len(self.index)

    def fill(self, batch: Batch, reach: torch.Tensor) -> bool:
        """Find the neighbours anew; return whether the tensors had to move to larger ones."""
        i, j, shift = find_pairs(batch, reach)
        moved = len(j) >= self.capacity  # the first time also where no atom has a neighbour
        if moved:
            capacity = int(SPARE * len(j)) + 1
            self.index = self.index.new_zeros(capacity)
            self.shift = self.shift.new_zeros(capacity, 3)
        self.start[1:] = torch.bincount(i, minlength=len(self.start) - 1).cumsum(0)
        self.index[: len(j)] = j
        self.shift[: len(j)] = shift
        return moved
