"""Labels from density-functional theory: B3LYP/def2-SVPD with density fitting, isolated closed-shell clusters (PySCF).

B3LYP: Stephens, Devlin, Chabalowski and Frisch, J. Phys. Chem. 98, 11623 (1994), doi 10.1021/j100096a001. def2-SVPD:
Rappoport and Furche, J. Chem. Phys. 133, 134105 (2010), doi 10.1063/1.3484283. Contains no dispersion. One process uses
as many threads as OMP_NUM_THREADS says; set it to 1 and run several processes.
"""

import gc
from dataclasses import dataclass
from types import ModuleType

import numpy as np
from ase.data import chemical_symbols
from numpy.typing import NDArray

from bamboo.errors import InputError
from bamboo.quantum.dataset import round_positions
from bamboo.quantum.esp import ChargeFit, fit_charges, potential_points
from bamboo.quantum.labels import Labels
from bamboo.quantum.xtb import UnconvergedError
from bamboo.system import System
from bamboo.units import BOHR, HARTREE

BASIS = "def2-SVPD"
GRID_LEVEL = 2


@dataclass(frozen=True, eq=False)
class DensityGuess:
    """Occupied orbitals of one geometry, from which the next one of the same atoms in the same order may start."""

    numbers: NDArray[np.int64]
    total_charge: float
    basis: str
    orbitals: NDArray[np.float64]

    def fits(self, system: System, *, basis: str = BASIS) -> bool:
        """Tell whether a structure has the same atoms in the same order, the same charge and the same basis."""
        same_atoms = np.array_equal(self.numbers, system.numbers)
        return same_atoms and self.total_charge == system.total_charge and self.basis == basis


@dataclass(frozen=True, eq=False)
class DFTResult:
    """Labels of one structure and what came with them.

    labels        energy, forces, charges, dipole
    guess         start for a neighbouring geometry
    fit           how well the charges reproduce the potential
    dipole_error  e Å, length of the dipole of the charges minus the dipole of the density
    cycles        cycles of the self-consistency loop
    """

    labels: Labels
    guess: DensityGuess
    fit: ChargeFit
    dipole_error: float
    cycles: int


class DFTLabeller:
    """Label structures one after another, each from the density of the one before where it has the same atoms.

    ``last`` is the newest result. Frames of one trajectory, in their order, need the fewest cycles.
    """

    def __init__(self) -> None:
        self.last: DFTResult | None = None

    def __call__(self, system: System) -> Labels:
        """Return the labels of one structure; errors as of ``label_dft``."""
        guess = self.last.guess if self.last is not None and self.last.guess.fits(system, basis=BASIS) else None
        self.last = label_dft(system, guess=guess)
        gc.collect()  # PySCF's objects refer to each other, and the collector does not see how large their arrays are
        return self.last.labels


def label_dft(
    system: System,
    *,
    guess: DensityGuess | None = None,
    grid_level: int = GRID_LEVEL,
    basis: str = BASIS,
) -> DFTResult:
    """Label one closed-shell cluster with B3LYP at its positions rounded to single precision.

    guess       orbitals of a similar geometry; changes the time, and the energy by less than 1e-6 Hartree
    grid_level  of PySCF's quadrature, 0..9; 2 leaves forces within 1 meV/Å of the limit of fine grids
    basis       any def2 basis set that PySCF ships

    The forces are analytic, without the response of the grid, so their sum vanishes within 1 meV/Å. Charges are those
    of ``bamboo.quantum.esp``.

    Raises InputError for a structure that this method cannot take, UnconvergedError where neither the
    self-consistency loop nor a second-order search converges.
    """
    _check(system, guess, basis)
    engine = _engine()
    numbers, positions = system.numbers, round_positions(system.positions)
    molecule = _molecule(engine, system, positions, basis=basis)
    try:
        mean_field = engine.solve(molecule, grid_level=grid_level, orbitals=None if guess is None else guess.orbitals)
        if not mean_field.converged:
            mean_field = engine.solve_second_order(mean_field)
    except np.linalg.LinAlgError as error:
        raise UnconvergedError(f"{_name(system)}: basis functions are linearly dependent ({error}).") from error
    if not mean_field.converged:
        raise UnconvergedError(
            f"B3LYP/{basis} did not converge for {_name(system)} in {mean_field.cycles} cycles, second order included."
        )
    forces = -engine.gradient(mean_field) * HARTREE / BOHR
    dipole = engine.dipole(mean_field) * BOHR
    points = potential_points(numbers, positions)
    potential = engine.electrostatic_potential(mean_field, points / BOHR) * HARTREE
    fit = fit_charges(numbers, positions, points=points, potential=potential, total_charge=system.total_charge)
    labels = Labels(
        level=f"B3LYP/{basis}, RI, grid {grid_level}",
        energy=float(mean_field.e_tot) * HARTREE,
        forces=forces,
        charges=fit.charges,
        dipole=dipole,
    )
    return DFTResult(
        labels,
        guess=DensityGuess(numbers.copy(), system.total_charge, basis, engine.occupied(mean_field)),
        fit=fit,
        dipole_error=float(np.linalg.norm(fit.charges @ positions - dipole)),
        cycles=int(mean_field.cycles),
    )


def _check(system: System, guess: DensityGuess | None, basis: str) -> None:
    if system.pbc:
        raise InputError("B3LYP labels are for isolated clusters, got a periodic box. Cut a cluster, or use GFN2-xTB.")
    if system.total_charge != round(system.total_charge):
        raise InputError(f"total_charge is {system.total_charge}, expected a whole number of elementary charges.")
    n_electrons = int(system.numbers.sum() - round(system.total_charge))
    if n_electrons <= 0 or n_electrons % 2:
        raise InputError(
            f"{_name(system)} has {n_electrons} electrons, expected an even number: only closed shells are labelled. "
            "Check total_charge."
        )
    if guess is not None and not guess.fits(system, basis=basis):
        raise InputError("The density guess belongs to other atoms, another order, charge or basis.")


def _engine() -> ModuleType:
    try:
        from bamboo.quantum import kohn_sham
    except ImportError as error:
        if error.name is None or not error.name.startswith("pyscf"):
            raise
        raise InputError("B3LYP labels need PySCF, which is not installed. Run: pip install 'bamboo-md[qm]'") from error
    return kohn_sham


def _molecule(engine: ModuleType, system: System, positions: NDArray[np.float64], *, basis: str) -> object:
    from pyscf.lib.exceptions import BasisNotFoundError

    charge = round(system.total_charge)
    try:
        return engine.build_molecule(system.numbers.tolist(), positions / BOHR, charge=charge, basis=basis)
    except BasisNotFoundError as error:
        raise InputError(f"PySCF has no basis '{basis}' for all elements of {_name(system)}: {error}.") from error


def _name(system: System) -> str:
    """Return the formula and charge of a structure, for messages."""
    symbols, counts = np.unique([chemical_symbols[number] for number in system.numbers], return_counts=True)
    formula = "".join(f"{symbol}{count}" for symbol, count in zip(symbols, counts, strict=True))
    return f"{formula} (charge {system.total_charge:+g})"
