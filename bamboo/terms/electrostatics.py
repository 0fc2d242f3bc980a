"""Coulomb energy of the predicted charges, full 1/r beyond contact and finite inside.

Pair energy E_ij = k_e q_i q_j / (r0 (1 + softplus_beta((r - r0) / r0))), softplus_beta(x) = log(1 + exp(beta x)) / beta
with r0 = 2.2 Å and beta = 18.7 (Gong et al. 2025). It equals k_e q_i q_j / r to 6e-7 relative at 3.5 Å, 1e-10 at 4.5 Å.
Every pair counts, bonded ones too: the network has learnt what is left.

Clusters: all pairs. Periodic boxes: Ewald's split with the same alpha in both parts; in real space, within the cutoff,
E_ij + k_e q_i q_j (erfc(alpha r) - 1) / r; in reciprocal space a particle mesh (torch-pme's P3M) with self term and
neutralising background.
"""

import math

import torch
from torch.nn.functional import softplus
from torchpme import P3MCalculator
from torchpme.lib import P3MKSpaceFilter, generate_kvectors_for_mesh
from torchpme.potentials import CoulombPotential

from bamboo import units
from bamboo.errors import InputError
from bamboo.nn import fused
from bamboo.nn.radial import safe_norm

CONTACT_LENGTH = 2.2  # Å, r0
CONTACT_SHARPNESS = 18.7  # beta
SPLITTING = 3.25  # alpha r_c; erfc(3.25) = 4.3e-6 is what the real-space sum leaves out at its cutoff
MESH_SPACING = 0.6  # Å
MESH_NODES = 5
MAX_MESH_POINTS = 1.0e8  # a box of 139 Å; a mesh eight times as large no longer fits into a usual memory


def damped_coulomb(charge_product: torch.Tensor, distance: torch.Tensor) -> torch.Tensor:
    """Return the damped pair energy [eV] of q_i q_j [e^2] at r [Å]."""
    scaled = (distance - CONTACT_LENGTH) / CONTACT_LENGTH
    return units.COULOMB_CONSTANT * charge_product / (CONTACT_LENGTH * (1.0 + softplus(scaled, beta=CONTACT_SHARPNESS)))


def splitting(cutoff: float) -> float:
    """Return Ewald's alpha [1/Å] for which the real-space part is negligible beyond the cutoff."""
    return SPLITTING / cutoff


def real_space_energy(charge_product: torch.Tensor, distance: torch.Tensor, cutoff: float) -> torch.Tensor:
    """Return the damped pair energy minus its long-range part, zero beyond the cutoff, per pair [eV]."""
    alpha = splitting(cutoff)
    long_range = units.COULOMB_CONSTANT * charge_product * torch.erf(alpha * distance) / distance
    return (damped_coulomb(charge_product, distance) - long_range) * (distance < cutoff)


def pair_sum(
    charges: torch.Tensor,
    vectors: torch.Tensor,
    ends: torch.Tensor,
    *,
    system_index: torch.Tensor,
    weight: torch.Tensor,
    cutoff: float | None,
) -> torch.Tensor:
    """Return weight * sum of the pair energies of each system [eV], (n_systems,), by the native library if possible.

    charges (n_atoms,); vectors (n_pairs, 3) between the two atoms in ends (2, n_pairs); system_index (n_atoms,); weight
    (n_systems,). The pair energy is ``real_space_energy``, or without a cutoff ``damped_coulomb``.
    """
    if fused.ready(charges):
        alpha, reach = (0.0, 1.0e30) if cutoff is None else (splitting(cutoff), cutoff)
        settings = (units.COULOMB_CONSTANT, CONTACT_LENGTH, CONTACT_SHARPNESS, alpha, reach)
        return fused.coulomb(charges, vectors, ends, system_index=system_index, weight=weight, settings=settings)
    i, j = ends
    product, distance = charges[i] * charges[j], safe_norm(vectors)
    pair = damped_coulomb(product, distance) if cutoff is None else real_space_energy(product, distance, cutoff)
    system = system_index[i]
    return torch.zeros_like(weight).index_add(0, system, weight[system] * pair)


class _MeshFilter(P3MKSpaceFilter):  # type: ignore[misc]
    """torch-pme's influence function G(k) / U(k)^2, put right for tilted cells and for second derivatives.

    U(k) = prod_c sinc(m_c / n_c)^nodes, with wave number m_c and n_c mesh points along lattice vector c; torch-pme
    takes it along x, y, z, and its |k| has no second derivative at k = 0 (nan in training on virials).
    """

    cell: torch.Tensor
    ns_mesh: torch.Tensor

    def update(self, cell: torch.Tensor | None = None, ns_mesh: torch.Tensor | None = None) -> None:
        """Take over a new cell (3, 3) and mesh (3,)."""
        self.cell = self.cell if cell is None else cell
        self.ns_mesh = self.ns_mesh if ns_mesh is None else ns_mesh
        unit_mesh = torch.diag(self.ns_mesh).to(self.cell.dtype)
        phase = generate_kvectors_for_mesh(ns=self.ns_mesh, cell=unit_mesh) / (2.0 * math.pi)  # m_c / n_c
        k_squared = generate_kvectors_for_mesh(ns=self.ns_mesh, cell=self.cell).square().sum(-1)
        assignment = torch.sinc(phase).prod(-1) ** (2 * self.interpolation_nodes)
        self._kfilter = self.kernel.kernel_from_k_sq(k_squared) / assignment


def reciprocal_energy(
    charges: torch.Tensor, positions: torch.Tensor, cell: torch.Tensor, *, cutoff: float
) -> torch.Tensor:
    """Return the long-range energy [eV] of one periodic box, with self and background terms removed.

    charges (n,), positions (n, 3), cell (3, 3); cutoff [Å] of the real-space part, which fixes alpha.
    Raises InputError for a box so large that its mesh would fill the memory.
    """
    points = float((2.0 * cell.detach().norm(dim=1) / MESH_SPACING + 1.0).prod())  # before rounding up to powers of two
    if points > MAX_MESH_POINTS:
        raise InputError(
            f"The periodic box with the cell {cell.tolist()} Å needs a charge mesh of {points:.0e} points, at most "
            f"{MAX_MESH_POINTS:.0e} are possible. Use a smaller box, or pbc=False for an isolated structure."
        )
    potential = CoulombPotential(smearing=1.0 / (math.sqrt(2.0) * splitting(cutoff)), prefactor=units.COULOMB_CONSTANT)
    mesh = P3MCalculator(potential, mesh_spacing=MESH_SPACING, interpolation_nodes=MESH_NODES).to(
        device=positions.device, dtype=positions.dtype
    )
    mesh.kspace_filter = _MeshFilter(
        cell.detach(), torch.ones(3, dtype=torch.int64, device=cell.device), MESH_NODES, potential,
        fft_norm="backward", ifft_norm="forward",
    )  # fmt: skip
    none = torch.zeros(0, 2, dtype=torch.int64, device=positions.device)
    at_atoms: torch.Tensor = mesh(charges[:, None], cell, positions, none, positions.new_zeros(0))
    return (charges[:, None] * at_atoms).sum()
