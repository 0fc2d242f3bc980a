"""Boxes that users bring: a structure file to a system of known molecules."""

from pathlib import Path

import ase
import ase.io

from bamboo.errors import BambooError, InputError
from bamboo.structure.recognition import recognised_system
from bamboo.system import System


def read_atoms(path: str | Path) -> ase.Atoms:
    """Return the last structure of a file in any format that ASE reads; InputError, in one line, for anything else."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file.")
    try:
        atoms = ase.io.read(path, index=-1)
    except BambooError:
        raise
    except Exception as error:  # ASE's readers raise whatever their parsing meets
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise InputError(f"{path}: not a structure that ASE can read ({reason}).") from error
    if not isinstance(atoms, ase.Atoms):
        raise InputError(f"{path}: holds no structure.")
    return atoms


def read_box(path: str | Path) -> tuple[dict[str, int], System]:
    """Return the counts of molecules and the periodic box of a structure file, turned so that a lies along x.

    Raises InputError for unreadable files, clusters, and molecules that are not known by name.
    """
    atoms = read_atoms(path)
    if not atoms.pbc.all():
        raise InputError(f"{path}: pbc={atoms.pbc.tolist()}, expected a periodic box: liquids are simulated in boxes.")
    cell, rotation = atoms.cell.standard_form()
    atoms.set_positions(atoms.positions @ rotation.T)
    atoms.set_cell(cell)
    try:
        return recognised_system(System.from_atoms(atoms, total_charge=0.0))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
