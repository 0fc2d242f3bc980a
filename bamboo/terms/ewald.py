"""The reciprocal part of Ewald's sum, term by term: for training on small boxes.

E = k_e / V sum_{k, half space} 4 pi / k^2 exp(-k^2 / (4 alpha^2)) |S(k)|^2 - k_e alpha / sqrt(pi) sum q^2
    - k_e pi / (2 V alpha^2) (sum q)^2,        S(k) = sum_i q_i exp(i k.r_i)

It equals ``electrostatics.reciprocal_energy`` up to the error of that mesh. The mesh is faster for large boxes and one
evaluation; differentiated twice for training, a box of 100 atoms costs it twenty times as much as this sum.
"""

import math
from typing import Any

import torch
from torch.autograd import Function

from bamboo import units
from bamboo.terms.electrostatics import splitting

REACH = 4.0  # terms up to k = 2 alpha REACH; leaves out exp(-REACH^2) = 1e-7 of the energy, 1e-5 of a force
MAX_ATOMS = 500  # the cost grows with the square of the number of atoms; beyond, the mesh is faster


def _half_space(cell: torch.Tensor, k_max: float) -> torch.Tensor:
    """Return the integer vectors m, (n_k, 3), of one half of 0 < |k| < k_max, with k = 2 pi m (cell^-1)^T."""
    highest = [int(k_max * float(length) / (2.0 * math.pi)) for length in torch.linalg.vector_norm(cell, dim=1)]
    axes = (torch.arange(-n if axis else 0, n + 1, device=cell.device) for axis, n in enumerate(highest))
    m = torch.cartesian_prod(*axes)
    first = torch.where(m[:, 0] != 0, m[:, 0], torch.where(m[:, 1] != 0, m[:, 1], m[:, 2]))  # first that is not zero
    m = m[first > 0].to(cell.dtype)
    k = 2.0 * math.pi * torch.linalg.solve(cell, m.T)
    return m[k.square().sum(0) < k_max**2]


class _StructureFactor(Function):
    """(q, fractional coordinates, cos, sin, m) -> (sum q cos, sum q sin) per k, with cos and sin (n, n_k) of 2 pi s.m.

    The derivative in the coordinates is written as products of small matrices instead of passing through (n, n_k)
    arrays. cos and sin are arguments because second derivatives in the coordinates go through them.
    """

    @staticmethod
    def forward(
        ctx: Any, charges: torch.Tensor, fractional: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, m: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(charges, cos, sin, m)
        return charges @ cos, charges @ sin

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        charges, cos, sin, m = ctx.saved_tensors
        on_cos, on_sin = upstream
        on_charges = cos @ on_cos + sin @ on_sin
        on_fractional = 2.0 * math.pi * (cos @ (on_sin[:, None] * m) - sin @ (on_cos[:, None] * m))
        return on_charges, charges[:, None] * on_fractional, None, None, None


def reciprocal_energy(
    charges: torch.Tensor, positions: torch.Tensor, cell: torch.Tensor, *, cutoff: float
) -> torch.Tensor:
    """Return the long-range energy [eV] of one periodic box, with self and background terms removed.

    charges (n,), positions (n, 3), cell (3, 3); cutoff [Å] of the real-space part, which fixes alpha.
    """
    alpha = splitting(cutoff)
    m = _half_space(cell.detach(), 2.0 * alpha * REACH)
    inverse = torch.linalg.inv(cell)
    fractional = positions @ inverse
    phase = 2.0 * math.pi * (fractional @ m.T)
    real, imaginary = _StructureFactor.apply(charges, fractional, phase.cos(), phase.sin(), m)  # type: ignore[no-untyped-call]
    k_squared = (2.0 * math.pi * (m @ inverse.T)).square().sum(-1)
    weight = 4.0 * math.pi / k_squared * torch.exp(-k_squared / (4.0 * alpha**2))
    volume = torch.linalg.det(cell).abs()
    waves = (weight * (real.square() + imaginary.square())).sum() / volume
    own = alpha / math.sqrt(math.pi) * charges.square().sum()
    background = math.pi / (2.0 * alpha**2 * volume) * charges.sum().square()
    energy: torch.Tensor = units.COULOMB_CONSTANT * (waves - own - background)
    return energy
