"""Labelled structures from other people's files: extended XYZ, in whatever units they were written."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ase
import numpy as np
from ase.io import iread
from ase.io.extxyz import XYZError
from numpy.typing import NDArray

from bamboo import units as u
from bamboo.errors import InputError, suggest
from bamboo.quantum.dataset import Frame
from bamboo.quantum.labels import Labels
from bamboo.structure.packing import MONATOMIC_IONS
from bamboo.system import System

ENERGY_UNITS = {
    "eV": u.EV,
    "meV": 1.0e-3 * u.EV,
    "Hartree": u.HARTREE,
    "Ha": u.HARTREE,
    "kcal/mol": u.KCAL_PER_MOL,
    "kJ/mol": u.KJ_PER_MOL,
}
LENGTH_UNITS = {"Å": u.ANGSTROM, "A": u.ANGSTROM, "angstrom": u.ANGSTROM, "bohr": u.BOHR, "nm": u.NANOMETRE}
DIPOLE_UNITS = {"Debye": u.DEBYE, "D": u.DEBYE, "e*Å": u.ANGSTROM, "e*A": u.ANGSTROM, "e*bohr": u.BOHR, "au": u.BOHR}
KEYS = ("energy", "forces", "charges", "dipole", "virial", "stress", "charge")
MAX_FORCE = 500.0  # eV/Å; beyond, the units were wrong
LARGE_CLUSTER = 90  # atoms


def import_extxyz(
    path: str | Path,
    *,
    units: str,
    level: str,
    keys: Mapping[str, str] | None = None,
    block: int = 20,
) -> list[Frame]:
    """Read labelled frames from an extended-XYZ file.

    units  "energy,length" or "energy,length,dipole", for example "eV,Å" or "kcal/mol,Å,Debye"; positions
           and cell are in length, forces in energy/length, stress in energy/length^3, dipoles in e*length by default
    level  name of the method that made the labels, for example "B3LYP/def2-SVPD"
    keys   what the file calls a quantity, for those named differently here: {"energy": "dft_energy"}; the names are
           energy (needed), forces, charges, dipole, virial (-dE/dstrain), stress (dE/dstrain / V, or its six Voigt
           components xx yy zz yz xz xy), charge (total charge of the frame; 0 where absent)
    block  so many consecutive frames form one trajectory, kept together when data are split; a ``trajectory`` entry
           in a comment line takes precedence

    Raises InputError, naming file and frame, for unknown units or keys, missing energies, wrong shapes, values that are
    not finite, and forces so large that the units must be wrong.
    """
    path = Path(path)
    energy_unit, length_unit, dipole_unit = parse_units(units)
    names = {key: key for key in KEYS}
    for key, name in (keys or {}).items():
        if key not in names:
            raise InputError(f"Unknown quantity '{key}' in keys.{suggest(key, KEYS)} Expected: {', '.join(KEYS)}.")
        names[key] = name
    if not path.exists():
        raise InputError(f"{path}: no such file.")
    frames = []
    try:
        for k, atoms in enumerate(iread(path, index=":", format="extxyz")):
            trajectory = str(atoms.info.get("trajectory", f"{path.stem}-{k // block:05d}"))
            found = _Found(atoms, names, f"{path}: frame {k}")
            frames.append(found.frame(energy_unit, length_unit, dipole_unit, level=level, trajectory=trajectory))
    except (XYZError, ValueError, KeyError) as error:
        raise InputError(f"{path}: frame {len(frames)} is not valid extended XYZ ({error}).") from error
    if not frames:
        raise InputError(f"{path}: no frames.")
    return frames


def parse_units(units: str) -> tuple[float, float, float]:
    """Return the size of the units of energy, length and dipole in internal units, from "energy,length[,dipole]"."""
    parts = [part.strip() for part in units.split(",")]
    if len(parts) not in (2, 3):
        raise InputError(f"units is '{units}', expected 'energy,length' or 'energy,length,dipole', such as 'eV,Å'.")
    tables = {"energy": ENERGY_UNITS, "length": LENGTH_UNITS, "dipole": DIPOLE_UNITS}
    factors = []
    for part, (quantity, table) in zip(parts, tables.items(), strict=False):
        if part not in table:
            raise InputError(f"Unknown unit of {quantity} '{part}'.{suggest(part, table)} Known: {', '.join(table)}.")
        factors.append(table[part])
    return factors[0], factors[1], factors[2] if len(factors) == 3 else factors[1]


class _Found:
    """One ASE frame and where its labels are: ASE moves names that it knows into a calculator."""

    def __init__(self, atoms: ase.Atoms, names: Mapping[str, str], where: str) -> None:
        self.atoms, self.names, self.where = atoms, names, where
        results = dict(atoms.calc.results) if atoms.calc is not None else {}
        self.values: dict[str, Any] = {**atoms.arrays, **atoms.info, **results}

    def array(self, key: str, shape: tuple[int, ...], factor: float) -> NDArray[np.float64] | None:
        """Return a label in internal units, None where the file has none; InputError for a wrong shape or NaN."""
        name = self.names[key]
        if name not in self.values:
            if name != key:
                raise InputError(f"{self.where}: no '{name}' (for {key}). Found: {', '.join(sorted(self.values))}.")
            return None
        value = np.asarray(self.values[name], dtype=np.float64)
        if value.size != int(np.prod(shape)):
            raise InputError(f"{self.where}: '{name}' has shape {value.shape}, expected {shape}.")
        if not np.isfinite(value).all():
            raise InputError(f"{self.where}: '{name}' has values that are not finite.")
        return factor * value.reshape(shape)

    def virial(self, energy_unit: float, length_unit: float, volume: float) -> NDArray[np.float64] | None:
        """Return -dE/dstrain [eV] from the virial itself or from the stress, full or in Voigt order."""
        virial = self.array("virial", (3, 3), energy_unit)
        name = self.names["stress"]
        if virial is not None or name not in self.values:
            return virial
        if np.size(self.values[name]) == 6:
            xx, yy, zz, yz, xz, xy = np.ravel(self.values[name])
            self.values[name] = np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]])
        stress = self.array("stress", (3, 3), energy_unit / length_unit**3)
        return None if stress is None else -volume * stress

    def frame(
        self, energy_unit: float, length_unit: float, dipole_unit: float, *, level: str, trajectory: str
    ) -> Frame:
        """Build the frame in internal units."""
        n_atoms = len(self.atoms)
        energy = self.array("energy", (), energy_unit)
        if energy is None:
            known = ", ".join(sorted(self.values))
            raise InputError(f"{self.where}: no energy. Found: {known}. Name it with keys={{'energy': ...}}.")
        total_charge = self.array("charge", (), 1.0)
        self.atoms.set_cell(self.atoms.cell * length_unit)
        self.atoms.positions *= length_unit
        system = System.from_atoms(self.atoms, total_charge=0.0 if total_charge is None else float(total_charge))
        forces = self.array("forces", (n_atoms, 3), energy_unit / length_unit)
        if forces is not None and np.abs(forces).max() > MAX_FORCE:
            raise InputError(f"{self.where}: a force of {np.abs(forces).max():.0f} eV/Å. Check the units.")
        labels = Labels(
            level=level,
            energy=float(energy),
            forces=forces,
            charges=self.array("charges", (n_atoms,), 1.0),
            dipole=None if system.pbc else self.array("dipole", (3,), dipole_unit),
            virial=self.virial(energy_unit, length_unit, system.volume) if system.pbc else None,
        )
        return Frame(system, labels, _kind(system), "imported", trajectory)


def _kind(system: System) -> str:
    if system.pbc:
        return "periodic"
    if system.n_atoms >= LARGE_CLUSTER:
        return "large"
    if np.isin(system.numbers, MONATOMIC_IONS).any():
        return "lithium" if system.total_charge > 0.5 else "ion_pair"
    return "anion" if system.total_charge < -0.5 else "neutral"
