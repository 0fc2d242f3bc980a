"""Closed-shell B3LYP with density fitting in PySCF, with the parts that dominate its time written for one thread.

PySCF (Sun et al., J. Chem. Phys. 153, 024109 (2020), doi 10.1063/5.0006074) supplies integrals, grids, the functional
and the self-consistency loop. Written here: a quadrature of the exchange-correlation energy that keeps the basis
functions on the grid between cycles, a start on a coarse grid, and an analytic gradient that works with occupied
orbitals throughout. Energies agree with PySCF's own to 1e-7 Hartree, gradients to 1e-5 Hartree/bohr.

Atomic units (Hartree, bohr) inside this module; importing it needs PySCF.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import scipy.linalg
from ase.data import chemical_symbols
from numpy.typing import NDArray
from pyscf import dft, gto, lib
from pyscf.ao2mo.outcore import balance_partition

from bamboo.units import BOHR

Array = NDArray[np.float64]
Rows = NDArray[np.int64]

FUNCTIONAL = "b3lyp"  # with VWN's RPA parametrisation, as in Gaussian: the default of PySCF since 2.3
AUXILIARY_BASIS = "def2-universal-jkfit"  # Weigend, J. Comput. Chem. 29, 167 (2008): made for Coulomb and exchange
COARSE_GRID = (30, 110)  # radial and angular points per atom while the density is still far from converged
MAX_RADIUS = 0.6  # Å, largest atomic radius in the partition of space
COARSE_UNTIL = 1.0e-2  # norm of the orbital gradient
CONVERGED_ENERGY, CONVERGED_GRADIENT = 1.0e-9, 3.0e-5
SMALL_DENSITY = 1.0e-5  # grid points that together hold fewer electrons are dropped
SMALL_FUNCTION = 1.0e-7  # basis functions that stay below this in a block of grid points are left out there
BLOCK = 1024  # grid points at a time: the basis functions of a block stay in the cache of a core
SECOND = ((4, 5, 6), (5, 7, 8), (6, 8, 9))  # where PySCF keeps d^2/dx_a dx_b: rows xx xy xz yy yz zz from 4 on

MAX_MEMORY_MB = 4000  # what PySCF plans its batches for


def build_molecule(numbers: Sequence[int], positions: Array, *, charge: int, basis: str) -> Any:
    """Return the PySCF molecule; positions (n_atoms, 3) [bohr]; beyond Kr the core potential of the basis is used."""
    atoms = [(int(number), tuple(position)) for number, position in zip(numbers, positions, strict=True)]
    core = {chemical_symbols[number]: basis for number in set(numbers) if number > 36}
    names = {"unit": "Bohr", "charge": charge, "basis": basis, "max_memory": MAX_MEMORY_MB}
    return gto.M(atom=atoms, ecp=core, **names, verbose=0, parse_arg=False)


def solve(molecule: Any, *, grid_level: int, orbitals: Array | None = None, max_cycles: int = 50) -> Any:
    """Return PySCF's mean-field object after the self-consistency loop; the caller checks ``converged``.

    orbitals  (n_basis, n_occupied) of a similar geometry in the same basis; orthonormalised here in the new overlap
    """
    mean_field = dft.RKS(molecule, xc=FUNCTIONAL).density_fit(auxbasis=AUXILIARY_BASIS)
    mean_field.chkfile, mean_field.conv_check, mean_field.max_cycle = None, False, max_cycles
    mean_field.small_rho_cutoff = SMALL_DENSITY
    mean_field._numint.nr_rks = Quadrature(mean_field._numint, max_bytes=0.4e6 * molecule.max_memory)
    mean_field.conv_tol, mean_field.conv_tol_grad = CONVERGED_ENERGY, CONVERGED_GRADIENT
    mean_field.grids = quadrature_grid(molecule, atom_grid=COARSE_GRID)
    mean_field.check_convergence = lambda state: state["norm_gorb"] < COARSE_UNTIL
    mean_field.kernel(dm0=None if orbitals is None else _density(molecule, orbitals))
    coarse_cycles = mean_field.cycles
    mean_field.grids, mean_field.check_convergence = quadrature_grid(molecule, level=grid_level), None
    mean_field.kernel(dm0=mean_field.make_rdm1())  # a new extrapolation: one that mixes both grids converges slowly
    mean_field.cycles += coarse_cycles
    return mean_field


def quadrature_grid(molecule: Any, **settings: Any) -> Any:
    """Return PySCF's grid (``level`` or ``atom_grid``) with a partition of space that suits small cations.

    Scheme of Stratmann, Scuseria and Frisch, Chem. Phys. Lett. 257, 213 (1996), doi 10.1016/0009-2614(96)00600-8, its
    boundaries shifted by the radii as in Treutler and Ahlrichs, J. Chem. Phys. 102, 346 (1995), doi 10.1063/1.469408.
    Bragg's radii are those of neutral atoms: 1.45 Å for lithium moves the boundary deep into its neighbour, and forces
    in LiF are wrong by 30 meV/Å at level 2 and at level 3. Radii capped at 0.6 Å bring that to 1 meV/Å.
    """
    grid = dft.gen_grid.Grids(molecule)
    grid.becke_scheme = dft.gen_grid.stratmann
    grid.atomic_radii = np.minimum(dft.radi.BRAGG_RADII, MAX_RADIUS / BOHR)
    for name, value in settings.items():
        setattr(grid, name, value)
    return grid


def solve_second_order(mean_field: Any) -> Any:
    """Return the mean-field object after a second-order search from where an unconverged loop ended.

    Co-iterative augmented Hessian, Sun, Chem. Phys. Lett. 683, 291 (2017), doi 10.1016/j.cplett.2017.03.004.
    """
    solver = mean_field.newton()
    solver.conv_tol, solver.conv_tol_grad, solver.max_cycle = CONVERGED_ENERGY, CONVERGED_GRADIENT, 50
    solver.kernel(mean_field.mo_coeff, mean_field.mo_occ)
    for name in ("converged", "e_tot", "mo_energy", "mo_coeff", "mo_occ"):
        setattr(mean_field, name, getattr(solver, name))
    mean_field.cycles += solver.cycles
    return mean_field


def occupied(mean_field: Any) -> Array:
    """Return the occupied orbitals, (n_basis, n_occupied), normalised to one."""
    return np.ascontiguousarray(mean_field.mo_coeff[:, mean_field.mo_occ > 0])


def dipole(mean_field: Any) -> Array:
    """Return the dipole [e bohr] about the origin of the coordinates, (3,)."""
    molecule = mean_field.mol
    with molecule.with_common_origin((0.0, 0.0, 0.0)):
        integrals = molecule.intor_symmetric("int1e_r", comp=3)
    orbitals = occupied(mean_field)
    electrons = 2.0 * np.einsum("xmn,mi,ni->x", integrals, orbitals, orbitals, optimize=True)
    return np.asarray(molecule.atom_charges() @ molecule.atom_coords() - electrons)


def electrostatic_potential(mean_field: Any, points: Array) -> Array:
    """Return the potential [Hartree/e] of nuclei and electrons at ``points`` (n_points, 3) [bohr].

    The electrons are the density-fitted ones, corrected to the right number of electrons:
    V(r) = sum_A Z_A / |r - R_A| - sum_P d_P (P | 1/|r - .|). That costs two-centre integrals only, a twentieth of the
    exact potential, and differs from it by 1 % outside the van der Waals surface.
    """
    molecule, auxiliary = mean_field.mol, mean_field.with_df.auxmol
    orbitals = np.sqrt(2.0) * occupied(mean_field)
    metric = _metric(auxiliary)
    density = lib.pack_tril(2.0 * orbitals @ orbitals.T)
    density[np.cumsum(np.arange(1, molecule.nao + 1)) - 1] *= 0.5
    projections = np.concatenate([block @ density for block in mean_field.with_df.loop()])
    fitted = scipy.linalg.solve_triangular(metric, projections, lower=True, trans=1)
    far = 1.0e8  # bohr: from there only the charge of a function is seen
    charges = far * _point_charge_integrals(auxiliary, np.array([[far, 0.0, 0.0]]))[:, 0]
    response = scipy.linalg.cho_solve((metric, True), charges)
    fitted += response * (molecule.nelectron - charges @ fitted) / (charges @ response)
    potential = np.empty(len(points))
    for start in range(0, len(points), BLOCK):
        block = points[start : start + BLOCK]
        distances = np.linalg.norm(block[:, None] - molecule.atom_coords(), axis=2)
        nuclei = (molecule.atom_charges() / distances).sum(axis=1)
        potential[start : start + BLOCK] = nuclei - fitted @ _point_charge_integrals(auxiliary, block)
    return potential


def gradient(mean_field: Any) -> Array:
    """Return dE/dR [Hartree/bohr], (n_atoms, 3), of a converged mean field; the response of the grid is left out."""
    molecule = mean_field.mol
    parts = mean_field.nuc_grad_method()
    orbitals = np.sqrt(2.0) * occupied(mean_field)
    density = orbitals @ orbitals.T
    weighted = parts.make_rdm1e(mean_field.mo_energy, mean_field.mo_coeff, mean_field.mo_occ)
    core, overlap = parts.hcore_generator(molecule), parts.get_ovlp(molecule)
    by_function = _exchange_correlation_gradient(mean_field, orbitals)
    by_function -= 2.0 * np.einsum("xmn,mn->mx", overlap, weighted)
    from_functions, by_auxiliary = _coulomb_exchange_gradient(mean_field, orbitals)
    by_function += from_functions
    total: Array = parts.grad_nuc(molecule)
    for atom, (own, fitted) in enumerate(
        zip(molecule.aoslice_by_atom(), mean_field.with_df.auxmol.aoslice_by_atom(), strict=True)
    ):
        total[atom] += np.einsum("xmn,mn->x", core(atom), density)
        total[atom] += by_function[own[2] : own[3]].sum(axis=0) + by_auxiliary[fitted[2] : fitted[3]].sum(axis=0)
    return total


class Quadrature:
    """Exchange-correlation energy and matrix of a closed shell, as PySCF's ``nr_rks`` but keeping phi and grad phi.

    rho = sum_i psi_i^2, V_mn = int phi_m (v_rho / 2 phi_n + v_grad . grad phi_n) + transpose.
    """

    def __init__(self, numint: Any, *, max_bytes: float) -> None:
        self.numint, self.max_bytes = numint, max_bytes
        self.grids: Any = None
        self.kept: list[tuple[Array, Rows]] = []
        self.kept_bytes = 0

    def __call__(
        self, molecule: Any, grids: Any, functional: str, density: Any, **_: Any
    ) -> tuple[float, float, Array]:
        """Return the number of electrons, the energy and the matrix (n_basis, n_basis)."""
        orbitals, signs = _factors(density)
        n_electrons, energy, matrix = 0.0, 0.0, np.zeros((molecule.nao, molecule.nao))
        for functions, rows, weights in self._blocks(molecule, grids):
            psi = orbitals[rows].T @ functions
            rho = np.einsum("ig,xig->xg", psi[0] * signs[:, None], psi)
            rho[1:] *= 2.0
            energies, potentials = self.numint.eval_xc_eff(functional, rho, deriv=1, xctype="GGA")[:2]
            n_electrons += float(rho[0] @ weights)
            energy += float((rho[0] * weights) @ energies)
            potentials *= weights
            potentials[0] *= 0.5
            weighted = np.einsum("xng,xg->ng", functions, potentials)
            matrix[np.ix_(rows, rows)] += functions[0] @ weighted.T
        return n_electrons, energy, matrix + matrix.T

    def _blocks(self, molecule: Any, grids: Any) -> Iterator[tuple[Array, Rows, Array]]:
        """Yield (phi, d/dx, d/dy, d/dz), their rows, and weights; kept between calls as far as the memory goes."""
        if self.grids is not grids:
            self.grids, self.kept, self.kept_bytes = grids, [], 0
        for k, start in enumerate(range(0, len(grids.weights), BLOCK)):
            if k < len(self.kept):
                functions, rows = self.kept[k]
            else:
                functions, rows = _functions(molecule, grids.coords[start : start + BLOCK], derivatives=1)
                if k == len(self.kept) and self.kept_bytes + functions.nbytes <= self.max_bytes:
                    self.kept.append((functions, rows))
                    self.kept_bytes += functions.nbytes
            yield functions, rows, grids.weights[start : start + BLOCK]


def _exchange_correlation_gradient(mean_field: Any, orbitals: Array) -> Array:
    """Return the exchange-correlation part of dE/dR per basis function, (n_basis, 3), the grid held fixed.

    With X_m = sum_n D_mn phi_n and Y_m = v_rho X_m + sum_y v_y sum_n D_mn d_y phi_n it is
    -2 sum_points w (d_x phi_m Y_m + sum_y d_x d_y phi_m v_y X_m).
    """
    molecule, grids, numint = mean_field.mol, mean_field.grids, mean_field._numint
    result = np.zeros((molecule.nao, 3))
    for start in range(0, len(grids.weights), BLOCK):
        functions, rows = _functions(molecule, grids.coords[start : start + BLOCK], derivatives=2)
        own = orbitals[rows]
        psi = own.T @ functions[:4]
        rho = np.einsum("ig,xig->xg", psi[0], psi)
        rho[1:] *= 2.0
        potentials = numint.eval_xc_eff(mean_field.xc, rho, deriv=1, xctype="GGA")[1]
        potentials *= grids.weights[start : start + BLOCK]
        x = own @ psi[0]
        y = potentials[0] * x + own @ np.einsum("yig,yg->ig", psi[1:], potentials[1:])
        for axis in range(3):
            result[rows, axis] += np.einsum("ng,ng->n", functions[1 + axis], y)
            for other in range(3):
                result[rows, axis] += (functions[SECOND[axis][other]] * x) @ potentials[1 + other]
    return -2.0 * result


def _coulomb_exchange_gradient(mean_field: Any, orbitals: Array) -> tuple[Array, Array]:
    """Return the density-fitted Coulomb and exchange parts of dE/dR per basis and per auxiliary function.

    E = 1/2 d.J.d - a/4 sum_ij d_ij.J.d_ij with d = J^-1 (P|D), d_ij = J^-1 (P|ij) and a the share of exact exchange, so
    dE = sum_Pmn G_Pmn d(P|mn) - sum_PQ g_PQ dJ_PQ with G_P = d_P D - a/2 sum_ij c_i d_Pij c_j and
    g = d d / 2 - a/4 sum_ij d_ij d_ij. The derivative with respect to the auxiliary centre in (P|mn) follows from
    translation. Orbitals carry the factor sqrt(2) of their occupation: D = c c^T.
    """
    molecule, auxiliary = mean_field.mol, mean_field.with_df.auxmol
    exchange = mean_field._numint.hybrid_coeff(mean_field.xc)
    projections = np.concatenate(
        [orbitals.T @ (lib.unpack_tril(block) @ orbitals) for block in mean_field.with_df.loop(128)]
    )
    n_fitted, n_occupied = projections.shape[:2]
    fitted = scipy.linalg.solve_triangular(
        _metric(auxiliary), projections.reshape(n_fitted, -1), lower=True, trans=1, overwrite_b=True
    )
    coulomb = np.ascontiguousarray(fitted[:, :: n_occupied + 1].sum(axis=1))
    metric_factor = 0.5 * np.outer(coulomb, coulomb) - 0.25 * exchange * fitted @ fitted.T
    by_auxiliary = 2.0 * np.einsum("xpq,pq->px", auxiliary.intor("int2c2e_ip1"), metric_factor)
    by_function, density = np.zeros((molecule.nao, 3)), orbitals @ orbitals.T
    pairs = fitted.reshape(n_fitted, n_occupied, n_occupied)
    for first, last, _ in balance_partition(auxiliary.ao_loc, 64):
        part = slice(auxiliary.ao_loc[first], auxiliary.ao_loc[last])
        factors = orbitals @ pairs[part] @ (-0.5 * exchange * orbitals.T)
        factors += coulomb[part, None, None] * density
        for axis, integrals in enumerate(_three_centre_derivatives(molecule, auxiliary, first, last)):
            terms = 2.0 * np.einsum("pnm,pnm->pm", integrals, factors)
            by_function[:, axis] -= terms.sum(axis=0)
            by_auxiliary[part, axis] += terms.sum(axis=1)
    return by_function, by_auxiliary


def _three_centre_derivatives(molecule: Any, auxiliary: Any, first: int, last: int) -> Array:
    """Return (d/dx m n | P) for auxiliary shells first..last-1 as (3, n_P, n, m)."""
    joined = molecule + auxiliary
    shells = (0, molecule.nbas, 0, molecule.nbas, molecule.nbas + first, molecule.nbas + last)
    return np.asarray(joined.intor("int3c2e_ip1", shls_slice=shells).transpose(0, 3, 2, 1))


def _point_charge_integrals(auxiliary: Any, points: Array) -> Array:
    return np.asarray(gto.intor_cross("int2c2e", auxiliary, gto.fakemol_for_charges(points)))


def _metric(auxiliary: Any) -> Array:
    """Return the lower Cholesky factor of (P|Q), the one PySCF divides the three-centre integrals by."""
    return np.asarray(scipy.linalg.cholesky(auxiliary.intor("int2c2e"), lower=True))


def _functions(molecule: Any, points: Array, *, derivatives: int) -> tuple[Array, Rows]:
    """Return the basis functions that matter at the points with derivatives, (4 or 10, n, n_points), and which."""
    values = molecule.eval_gto(f"GTOval_sph_deriv{derivatives}", points).transpose(0, 2, 1)
    rows = np.flatnonzero(np.abs(values[:4]).max(axis=(0, 2)) > SMALL_FUNCTION)
    return np.ascontiguousarray(values[:, rows]), rows


def _density(molecule: Any, orbitals: Array) -> Any:
    """Return the density matrix of orbitals after symmetric orthonormalisation, with the tags that PySCF reads."""
    values, vectors = np.linalg.eigh(orbitals.T @ molecule.intor("int1e_ovlp") @ orbitals)
    orthonormal = orbitals @ (vectors / np.sqrt(values)) @ vectors.T
    occupations = np.full(orbitals.shape[1], 2.0)
    return lib.tag_array(2.0 * orthonormal @ orthonormal.T, mo_coeff=orthonormal, mo_occ=occupations)


def _factors(density: Any) -> tuple[Array, Array]:
    """Return c (n_basis, n) and signs s (n,) with D = c s c^T; the first guess of PySCF has no orbitals."""
    if getattr(density, "mo_coeff", None) is not None:
        filled = density.mo_occ > 0
        return density.mo_coeff[:, filled] * np.sqrt(density.mo_occ[filled]), np.ones(int(filled.sum()))
    values, vectors = np.linalg.eigh(np.asarray(density))
    large = np.abs(values) > 1.0e-10
    return vectors[:, large] * np.sqrt(np.abs(values[large])), np.sign(values[large])
