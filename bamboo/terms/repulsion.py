"""A fixed wall between atoms that are much closer than any bond, so that they can never fuse."""

import torch

from bamboo import units
from bamboo.elements import COVALENT_RADII, MAX_ATOMIC_NUMBER
from bamboo.terms.dispersion import smooth_step

# Universal screening function of Ziegler, Biersack and Littmark (1985): phi(x) = sum_k c_k exp(-d_k x)
SCREENING = ((0.18175, 3.19980), (0.50986, 0.94229), (0.28022, 0.40290), (0.02817, 0.20162))
SCREENING_LENGTH = 0.46850  # Å; a = 0.4685 / (Z_i^0.23 + Z_j^0.23)
# Switched off between these fractions of the sum of covalent radii. Double bonds are short: C=O sits at 0.85 of the
# sum and vibrates down to 0.75, so a wall that reached further out would have to be unlearned by the network.
INNER, OUTER = 0.4, 0.7
LONGEST_WALL = 2.0 * OUTER * float(COVALENT_RADII[: MAX_ATOMIC_NUMBER + 1].max())  # Å


def repulsion_energy(distance: torch.Tensor, number_i: torch.Tensor, number_j: torch.Tensor) -> torch.Tensor:
    """Return the screened nuclear repulsion per pair [eV], switched smoothly to zero inside bonding distance.

    E = k_e Z_i Z_j / r phi(r / a) (1 - S((r / R - 0.4) / 0.3)), R the sum of covalent radii, S a quintic step.
    """
    radii = torch.as_tensor(COVALENT_RADII[: MAX_ATOMIC_NUMBER + 1], device=distance.device)
    reduced = distance / (radii[number_i] + radii[number_j])
    z_i, z_j = number_i.to(distance.dtype), number_j.to(distance.dtype)
    x = distance * (z_i**0.23 + z_j**0.23) / SCREENING_LENGTH
    screening = sum(weight * torch.exp(-decay * x) for weight, decay in SCREENING)
    bare = units.COULOMB_CONSTANT * z_i * z_j / distance
    return bare * screening * (1.0 - smooth_step((reduced - INNER) / (OUTER - INNER)))
