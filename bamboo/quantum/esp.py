"""Atomic charges that reproduce the electrostatic potential around a cluster.

Points: Breneman and Wiberg, J. Comput. Chem. 11, 361 (1990), doi 10.1002/jcc.540110311 (CHELPG), but on a lattice that
turns with the cluster. Restraint: Bayly, Cieplak, Cornell and Kollman, J. Phys. Chem. 97, 10269 (1993), doi
10.1021/j100142a004 (RESP, first stage). Buried atoms hardly change the potential outside, so that a fit without
restraint gives them charges that jump between similar geometries.
"""

from dataclasses import dataclass

import numpy as np
from ase.data import chemical_symbols
from ase.data.vdw_alvarez import vdw_radii
from numpy.typing import NDArray

from bamboo.errors import InputError
from bamboo.units import COULOMB_CONSTANT, HARTREE

REACH = 2.8  # Å, the farthest a point may be from the nearest nucleus
SPACING = 0.4  # Å
RESTRAINT = 1.0e-6 * HARTREE**2  # (eV/e)^2 per e; five times RESP's 5e-4 over its sum of some 2500 points
ROUNDING = 0.1  # e, below which the restraint is harmonic
MAX_ITERATIONS = 200


@dataclass(frozen=True, eq=False)
class ChargeFit:
    """Charges fitted to a potential.

    charges        (n_atoms,) e; they sum to the total charge
    potential_rms  eV/e, root mean square of the potential minus that of the charges over the points
    relative_rms   the same over the root mean square of the potential
    n_points       number of points
    """

    charges: NDArray[np.float64]
    potential_rms: float
    relative_rms: float
    n_points: int


def potential_points(
    numbers: NDArray[np.int64], positions: NDArray[np.float64], *, spacing_A: float = SPACING
) -> NDArray[np.float64]:
    """Return points (n_points, 3) [Å] outside all van der Waals spheres and within 2.8 Å of a nucleus.

    The lattice is centred on the cluster and parallel to its principal axes, so that points turn with it. Radii:
    Alvarez, Dalton Trans. 42, 8617 (2013), doi 10.1039/c3dt50599e. Raises InputError for elements without a radius.
    """
    radii = np.asarray(vdw_radii)[numbers]
    if np.isnan(radii).any():
        symbol = chemical_symbols[int(numbers[np.isnan(radii)][0])]
        raise InputError(f"No van der Waals radius is known for {symbol}, so its charge cannot be fitted.")
    centre = positions.mean(axis=0)
    axes = np.linalg.eigh((positions - centre).T @ (positions - centre))[1]
    local = (positions - centre) @ axes
    reach = np.abs(local).max(axis=0) + REACH
    ticks = [np.arange(-np.ceil(r / spacing_A), np.ceil(r / spacing_A)) + 0.5 for r in reach]
    lattice = spacing_A * np.stack(np.meshgrid(*ticks, indexing="ij"), axis=-1).reshape(-1, 3)
    nearest, outside = np.full(len(lattice), np.inf), np.ones(len(lattice), dtype=bool)
    for position, radius in zip(local, radii, strict=True):
        distances = np.linalg.norm(lattice - position, axis=1)
        nearest = np.minimum(nearest, distances)
        outside &= distances > radius
    points: NDArray[np.float64] = lattice[outside & (nearest < REACH)] @ axes.T + centre
    return points


def fit_charges(
    numbers: NDArray[np.int64],
    positions: NDArray[np.float64],
    *,
    points: NDArray[np.float64],
    potential: NDArray[np.float64],
    total_charge: float,
    restraint: float = RESTRAINT,
) -> ChargeFit:
    """Fit charges q to a potential V [eV/e] at points (n_points, 3) [Å]:

        mean_p (V_p - k_e sum_i q_i / r_pi)^2 + a sum_i (sqrt(q_i^2 + b^2) - b),   sum_i q_i = Q,

    the second sum over all but hydrogen, a = ``restraint``, b = 0.1 e, Q through a Lagrange multiplier. The restraint
    is not quadratic, so linear solves are repeated until the charges settle.
    """
    n_atoms = len(numbers)
    basis = COULOMB_CONSTANT / np.linalg.norm(points[:, None] - positions, axis=2)
    matrix, right = np.zeros((n_atoms + 1, n_atoms + 1)), np.append(basis.T @ potential / len(points), total_charge)
    matrix[:n_atoms, :n_atoms] = basis.T @ basis / len(points)
    matrix[n_atoms, :n_atoms] = matrix[:n_atoms, n_atoms] = 1.0
    strength = np.where(numbers > 1, restraint, 0.0)
    charges = np.zeros(n_atoms)
    for _ in range(MAX_ITERATIONS):
        pull = np.zeros(n_atoms + 1)
        pull[:n_atoms] = 0.5 * strength / np.hypot(charges, ROUNDING)
        previous, charges = charges, np.linalg.solve(matrix + np.diag(pull), right)[:n_atoms]
        if np.abs(charges - previous).max() < 1.0e-9:
            break
    charges += (total_charge - charges.sum()) / n_atoms  # rounding of the solve
    rms = float(np.sqrt(np.mean((basis @ charges - potential) ** 2)))
    return ChargeFit(charges, rms, rms / float(np.sqrt(np.mean(potential**2))), len(points))
