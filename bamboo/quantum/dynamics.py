"""Short GFN2-xTB relaxations and Langevin dynamics on ASE atoms, with positions on the single-precision grid."""

import ase
import numpy as np
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import thermalize_momenta
from ase.optimize import BFGS
from numpy.typing import NDArray

from bamboo.quantum.dataset import round_positions
from bamboo.quantum.xtb import evaluate_atoms, xtb_calculator
from bamboo.system import System
from bamboo.units import FEMTOSECOND

FRICTION_PER_FS = 0.02  # strong: packed clusters thermalise within a tenth of a picosecond


class SinglePrecision:
    """An ASE constraint that keeps positions on the single-precision grid, so that labels belong to what is stored."""

    def adjust_positions(self, atoms: ase.Atoms, new: NDArray[np.float64]) -> None:
        """Round the positions an integrator or optimiser is about to set."""
        new[:] = round_positions(new)

    def adjust_momenta(self, atoms: ase.Atoms, momenta: NDArray[np.float64]) -> None:
        """Leave momenta as they are."""

    def adjust_forces(self, atoms: ase.Atoms, forces: NDArray[np.float64]) -> None:
        """Leave forces as they are: the grid is 5e-7 Å fine."""

    def get_removed_dof(self, atoms: ase.Atoms) -> int:
        """Return 0: no degree of freedom is removed."""
        return 0


def prepare(system: System) -> ase.Atoms:
    """Return ASE atoms with a GFN2-xTB calculator whose positions stay on the single-precision grid."""
    atoms = system.to_atoms()
    atoms.positions = round_positions(atoms.positions)
    atoms.set_constraint(SinglePrecision())
    atoms.calc = xtb_calculator(total_charge=system.total_charge)
    return atoms


def relax(atoms: ase.Atoms, n_steps: int) -> None:
    """Take up to ``n_steps`` quasi-Newton steps of at most 0.1 Å; UnconvergedError if the start does not converge."""
    evaluate_atoms(atoms)
    BFGS(atoms, logfile=None, maxstep=0.1).run(fmax=0.01, steps=n_steps)


def langevin(atoms: ase.Atoms, *, temperature_K: float, generator: np.random.Generator) -> Langevin:
    """Draw thermal momenta and return Langevin dynamics with a time step of 1 fs."""
    thermalize_momenta(atoms, temperature_K, rng=generator)
    friction = FRICTION_PER_FS / FEMTOSECOND
    return Langevin(atoms, FEMTOSECOND, temperature_K=temperature_K, friction=friction, fixcm=False, rng=generator)
