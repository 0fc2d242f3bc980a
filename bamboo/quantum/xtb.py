"""Labels from GFN2-xTB (tblite): energy, forces, Mulliken charges, dipole, virial.

GFN2-xTB: Bannwarth, Ehlert, Grimme, J. Chem. Theory Comput. 15, 1652 (2019), doi 10.1021/acs.jctc.8b01176. It contains
the D4 dispersion. One process uses as many threads as OMP_NUM_THREADS says; set it to 1 and run several processes.
"""

from typing import TYPE_CHECKING

import ase
import numpy as np
from ase.calculators.calculator import CalculationFailed

from bamboo.errors import BambooError
from bamboo.quantum.dataset import round_positions
from bamboo.quantum.labels import Labels
from bamboo.system import System

if TYPE_CHECKING:
    from tblite.ase import TBLite

LEVEL = "GFN2-xTB"


class UnconvergedError(BambooError):
    """The electronic-structure method found no self-consistent solution for a geometry."""


def xtb_calculator(*, total_charge: float, max_iterations: int = 250) -> "TBLite":
    """Return an ASE calculator for GFN2-xTB that starts each step from the electrons of the step before."""
    from tblite.ase import TBLite

    return TBLite(method=LEVEL, charge=total_charge, verbosity=0, max_iterations=max_iterations)


def label_xtb(system: System, *, max_iterations: int = 250) -> Labels:
    """Label one structure with GFN2-xTB at its positions rounded to single precision (see ``bamboo.quantum.dataset``).

    Raises UnconvergedError where the self-consistent field does not converge.
    """
    atoms = system.to_atoms()
    atoms.positions = round_positions(atoms.positions)
    atoms.calc = xtb_calculator(total_charge=system.total_charge, max_iterations=max_iterations)
    return evaluate_atoms(atoms)


def evaluate_atoms(atoms: ase.Atoms) -> Labels:
    """Label ASE atoms that carry an ``xtb_calculator``; no work is repeated for a geometry just computed.

    The virial (-dE/dstrain = -V stress) is set for periodic boxes only, the dipole for clusters only.
    """
    try:
        forces = atoms.get_forces(apply_constraint=False)
    except CalculationFailed as error:
        formula = atoms.get_chemical_formula()
        raise UnconvergedError(f"{LEVEL} did not converge for {formula} ({str(error).strip()}).") from error
    results = atoms.calc.results
    periodic = bool(atoms.pbc.all())
    return Labels(
        level=LEVEL,
        energy=float(results["energy"]),
        forces=np.array(forces),
        charges=np.array(results["charges"]),
        dipole=None if periodic else np.array(results["dipole"]),
        virial=-atoms.get_volume() * atoms.get_stress(voigt=False, apply_constraint=False) if periodic else None,
    )
