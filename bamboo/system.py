"""The structures a force field is asked about: one ``System``, or many stacked in a ``Batch``."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import ase
import numpy as np
import torch
from numpy.typing import NDArray

from bamboo.elements import MAX_ATOMIC_NUMBER
from bamboo.errors import InputError, UnknownElementError


@dataclass(frozen=True, eq=False)
class System:
    """One isolated cluster or one fully periodic box.

    numbers      (n_atoms,)    atomic numbers
    positions    (n_atoms, 3)  Å; need not be wrapped into the cell
    cell         (3, 3)        Å, rows are the cell vectors; zeros for a cluster
    pbc          True for a periodic box, False for a cluster; partly periodic systems do not exist here
    total_charge e
    molecule     (n_atoms,)    index of the molecule each atom belongs to, 0..n_molecules-1, or None if unknown

    Raises InputError for anything that no force field could evaluate, UnknownElementError for exotic elements.
    """

    numbers: NDArray[np.int64]
    positions: NDArray[np.float64]
    cell: NDArray[np.float64]
    pbc: bool
    total_charge: float = 0.0
    molecule: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        n_atoms = len(self.numbers)
        if n_atoms == 0:
            raise InputError("The structure has no atoms.")
        if self.numbers.shape != (n_atoms,) or not np.issubdtype(self.numbers.dtype, np.integer):
            raise InputError(
                f"numbers have shape {self.numbers.shape}, type {self.numbers.dtype}; expected ({n_atoms},) integers."
            )
        if self.positions.shape != (n_atoms, 3):
            raise InputError(f"positions have shape {self.positions.shape}, expected ({n_atoms}, 3).")
        if not np.isfinite(self.positions).all():
            bad = np.flatnonzero(~np.isfinite(self.positions).all(axis=1))
            raise InputError(
                f"Position of atom {bad[0]} is not finite ({len(bad)} such atoms): {self.positions[bad[0]]}."
            )
        outside = (self.numbers < 1) | (self.numbers > MAX_ATOMIC_NUMBER)
        if outside.any():
            raise UnknownElementError(
                f"Atom {np.flatnonzero(outside)[0]} has atomic number {self.numbers[outside][0]}; "
                f"models cover at most 1..{MAX_ATOMIC_NUMBER}."
            )
        if self.cell.shape != (3, 3) or not np.isfinite(self.cell).all():
            raise InputError(f"The cell must be three finite vectors, (3, 3), got\n{self.cell}")
        if self.pbc and not self.volume > 1.0e-6:
            raise InputError(f"A periodic box needs three independent cell vectors, got\n{self.cell}")
        if not self.pbc and self.cell.any():
            raise InputError(f"A cluster (pbc=False) has no cell, expected zeros, got\n{self.cell}")
        if not np.isfinite(self.total_charge):
            raise InputError(f"total_charge is {self.total_charge}, expected a finite number.")
        if self.molecule is not None and self.molecule.shape != (n_atoms,):
            raise InputError(f"molecule has shape {self.molecule.shape}, expected ({n_atoms},).")

    @classmethod
    def from_atoms(cls, atoms: ase.Atoms, *, total_charge: float | None = None) -> "System":
        """Take over an ASE structure; the total charge comes from ``atoms.info["charge"]`` (0 where absent)."""
        pbc = np.asarray(atoms.pbc, dtype=bool)
        if pbc.any() and not pbc.all():
            raise InputError(
                f"pbc={pbc.tolist()}: partly periodic structures are not supported. "
                "Make all three directions periodic or none."
            )
        charge = atoms.info.get("charge", 0.0) if total_charge is None else total_charge
        try:
            charge = float(charge)
        except (TypeError, ValueError) as error:
            raise InputError(f"atoms.info['charge'] is {charge!r}, expected the total charge in e.") from error
        molecule = atoms.arrays.get("molecule")
        return cls(
            numbers=atoms.numbers.astype(np.int64),
            positions=atoms.positions.astype(np.float64),
            cell=atoms.cell.array.astype(np.float64) if pbc.all() else np.zeros((3, 3)),
            pbc=bool(pbc.all()),
            total_charge=charge,
            molecule=None if molecule is None else molecule.astype(np.int64),
        )

    def to_atoms(self) -> ase.Atoms:
        """Return the ASE structure; molecule indices go to ``arrays["molecule"]``, the charge to ``info["charge"]``."""
        atoms = ase.Atoms(self.numbers, self.positions, cell=self.cell if self.pbc else None, pbc=self.pbc)
        atoms.info["charge"] = self.total_charge
        if self.molecule is not None:
            atoms.arrays["molecule"] = self.molecule.copy()
        return atoms

    @property
    def n_atoms(self) -> int:
        return len(self.numbers)

    @property
    def volume(self) -> float:
        """Volume of the cell [Å^3]; 0 for a cluster."""
        return float(abs(np.linalg.det(self.cell)))


@dataclass(frozen=True, eq=False)
class Batch:
    """Several systems stacked along the atoms. Positions and cells are float64 whatever the network computes in.

    numbers (n_atoms,) int64; positions (n_atoms, 3); cell (n_systems, 3, 3), zeros for clusters; pbc (n_systems,) bool;
    total_charge (n_systems,); system_index (n_atoms,) atom -> system, ascending; molecule (n_atoms,) or None.
    """

    numbers: torch.Tensor
    positions: torch.Tensor
    cell: torch.Tensor
    pbc: torch.Tensor
    total_charge: torch.Tensor
    system_index: torch.Tensor
    molecule: torch.Tensor | None = None

    @classmethod
    def from_systems(cls, systems: Sequence[System], *, device: torch.device | str = "cpu") -> "Batch":
        """Stack systems; molecule indices are kept only where every system has them, and made distinct."""
        if not systems:
            raise InputError("A batch needs at least one system.")
        sizes = torch.tensor([system.n_atoms for system in systems])
        molecule = None
        labels = [system.molecule for system in systems]
        if all(label is not None for label in labels):
            counts = np.array([int(label.max()) + 1 for label in labels if label is not None])
            offsets = np.concatenate([[0], np.cumsum(counts)[:-1]])
            stacked = [label + offset for label, offset in zip(labels, offsets, strict=True) if label is not None]
            molecule = torch.from_numpy(np.concatenate(stacked)).to(device)
        return cls(
            numbers=torch.from_numpy(np.concatenate([s.numbers for s in systems]).astype(np.int64)).to(device),
            positions=torch.from_numpy(np.concatenate([s.positions for s in systems]).astype(np.float64)).to(device),
            cell=torch.from_numpy(np.stack([s.cell for s in systems]).astype(np.float64)).to(device),
            pbc=torch.tensor([s.pbc for s in systems], device=device),
            total_charge=torch.tensor([s.total_charge for s in systems], dtype=torch.float64, device=device),
            system_index=torch.repeat_interleave(torch.arange(len(systems)), sizes).to(device),
            molecule=molecule,
        )

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch with all tensors on the device."""
        tensors = {item.name: getattr(self, item.name) for item in fields(self)}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items() if tensor is not None})

    @property
    def n_atoms(self) -> int:
        return len(self.numbers)

    @property
    def n_systems(self) -> int:
        return len(self.pbc)

    @property
    def atoms_per_system(self) -> torch.Tensor:
        """Number of atoms of each system, (n_systems,)."""
        counts = self.system_index.new_zeros(self.n_systems)  # torch.bincount would make the host wait for a GPU
        return counts.index_add_(0, self.system_index, torch.ones_like(self.system_index))
