"""What a trajectory is of: the ensemble that generated it and the topology of its atoms."""

import json
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from ase.data import atomic_numbers, chemical_symbols
from numpy.typing import NDArray

from bamboo.errors import InputError, suggest

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Ensemble:
    """What generated a trajectory; the analysis decides by it which properties the trajectory supports.

    name "nve" | "nvt" | "npt"; thermostat "none" | "svr" | "nhc" | "langevin"; barostat "none" or its name.
    thermostat_time_ps is the damping time, pressure_bar the target of the barostat.
    """

    name: str
    thermostat: str = "none"
    barostat: str = "none"
    thermostat_time_ps: float | None = None
    pressure_bar: float | None = None

    def __post_init__(self) -> None:
        for value, known in ((self.name, ("nve", "nvt", "npt")), (self.thermostat, ("none", "svr", "nhc", "langevin"))):
            if value not in known:
                raise InputError(f"ensemble: '{value}' is not one of {', '.join(known)}.{suggest(value, known)}")

    @property
    def transport_objection(self) -> str | None:
        """Why transport coefficients cannot be taken from this ensemble, or None where they can."""
        if self.thermostat == "langevin":
            return "Langevin friction damps the momenta that carry transport: use nve, or nvt with svr or nhc"
        if self.name == "npt" or self.barostat != "none":
            return "a barostat moves the atoms (NPT): run nve or nvt at the mean NPT volume"
        return None


@dataclass(frozen=True, eq=False)
class Topology:
    """What the atoms are: numbers, masses [amu], molecule (n_atoms,), names and formal charges [e] (n_molecules,).

    Atoms of a molecule stand together and molecules are numbered in order, 0, 0, 0, 1, 1, ...
    """

    numbers: NDArray[np.int64]
    masses: Floats
    molecule: NDArray[np.int64]
    molecule_names: tuple[str, ...]
    molecule_charges: Floats
    bonds: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        n_atoms, n_molecules = len(self.numbers), len(self.molecule_names)
        if n_atoms == 0 or self.masses.shape != (n_atoms,) or self.molecule.shape != (n_atoms,):
            raise InputError(
                f"topology: numbers {self.numbers.shape}, masses {self.masses.shape} and molecule "
                f"{self.molecule.shape} must all have one entry per atom."
            )
        steps = np.diff(self.molecule, prepend=-1)
        if steps[0] != 1 or not np.isin(steps, (0, 1)).all() or self.molecule[-1] != n_molecules - 1:
            raise InputError(
                f"topology: molecule must rise from 0 to {n_molecules - 1}, there are {n_molecules} names. "
                "Sort the atoms by molecule."
            )
        if self.molecule_charges.shape != (n_molecules,):
            raise InputError(f"topology: {len(self.molecule_charges)} charges for {n_molecules} molecules.")

    @cached_property
    def species(self) -> dict[str, NDArray[np.int64]]:
        """Molecule indices by name, in order of first appearance."""
        names = np.array(self.molecule_names)
        return {name: np.flatnonzero(names == name) for name in dict.fromkeys(self.molecule_names)}

    @cached_property
    def molecule_masses(self) -> Floats:
        """Mass of each molecule [amu], (n_molecules,)."""
        masses: Floats = np.bincount(self.molecule, weights=self.masses).astype(np.float64)
        return masses

    def select(self, *, element: str | None = None, species: str | None = None) -> NDArray[np.int64]:
        """Return the indices of the atoms of an element, of a species, or of both; InputError where there are none."""
        chosen = np.ones(len(self.numbers), dtype=bool)
        if element is not None:
            chosen &= self.numbers == atomic_numbers.get(element, -1)
        if species is not None:
            chosen &= np.array(self.molecule_names)[self.molecule] == species
        if not chosen.any():
            known = [*self.species, *(chemical_symbols[n] for n in np.unique(self.numbers))]
            raise InputError(f"No atoms of element {element} in species {species}; there are {', '.join(known)}.")
        return np.flatnonzero(chosen)

    def to_json(self) -> str:
        """Return the MDTraj topology; ``mass`` and ``formalCharge`` are additions that MDTraj passes over."""
        starts = np.flatnonzero(np.diff(self.molecule, prepend=-1))
        residues = []
        for index, atoms in enumerate(np.split(np.arange(len(self.numbers)), starts[1:])):
            symbols = [chemical_symbols[self.numbers[a]] for a in atoms]
            entries = [
                {"index": int(a), "name": f"{s}{k + 1}", "element": s, "mass": float(self.masses[a])}
                for k, (a, s) in enumerate(zip(atoms, symbols, strict=True))
            ]
            residue = {"index": index, "name": self.molecule_names[index], "resSeq": index + 1, "segmentID": ""}
            residues.append(residue | {"formalCharge": float(self.molecule_charges[index]), "atoms": entries})
        return json.dumps({"chains": [{"index": 0, "residues": residues}], "bonds": [list(b) for b in self.bonds]})

    @classmethod
    def from_json(cls, text: str) -> "Topology":
        """Read back what ``to_json`` wrote."""
        content = json.loads(text)
        residues = [residue for chain in content["chains"] for residue in chain["residues"]]
        atoms = [(index, atom) for index, residue in enumerate(residues) for atom in residue["atoms"]]
        return cls(
            numbers=np.array([atomic_numbers[atom["element"]] for _, atom in atoms], dtype=np.int64),
            masses=np.array([atom["mass"] for _, atom in atoms], dtype=np.float64),
            molecule=np.array([index for index, _ in atoms], dtype=np.int64),
            molecule_names=tuple(residue["name"] for residue in residues),
            molecule_charges=np.array([residue["formalCharge"] for residue in residues], dtype=np.float64),
            bonds=tuple((int(i), int(j)) for i, j in content["bonds"]),
        )
