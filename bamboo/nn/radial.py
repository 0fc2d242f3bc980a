"""What an edge knows of its length: the envelope and the radial basis."""

import math

import torch
from torch import nn


def safe_norm(vector: torch.Tensor) -> torch.Tensor:
    """Return |vector| over the last axis, (…, 3) -> (…,); its gradient at zero length is zero instead of nan."""
    squared = (vector * vector).sum(-1)
    return torch.where(squared > 0, squared, 1.0).sqrt() * (squared > 0)


def cosine_envelope(distance: torch.Tensor, cutoff: float) -> torch.Tensor:
    """Return f(r) = (cos(pi r / r_c) + 1) / 2 inside the cutoff, 0 outside; f and f' vanish at the cutoff."""
    return 0.5 * (torch.cos(distance.clamp(max=cutoff) * (math.pi / cutoff)) + 1.0)


class RadialBasis(nn.Module):
    """Exponential Gaussians phi_k(r) = f(r) exp(-beta_k (exp(-5 r / r_c) - mu_k)^2), with trainable mu and beta.

    k = 1..K, K = ``n_radial``; r and r_c in Å. Initial mu are spaced evenly between exp(-5) and 1, initial beta =
    (2/K (1 - exp(-5)))^-2. The form is PhysNet's (Unke and Meuwly, JCTC 15, 3678 (2019)), the scaling by the cutoff
    that of TorchMD-Net (Thölke and De Fabritiis, ICLR 2022).
    """

    def __init__(self, n_radial: int, cutoff: float) -> None:
        super().__init__()
        self.decay = 5.0 / cutoff
        smallest = math.exp(-5.0)
        self.means = nn.Parameter(torch.linspace(smallest, 1.0, n_radial))
        self.betas = nn.Parameter(torch.full((n_radial,), (2.0 / n_radial * (1.0 - smallest)) ** -2))

    def forward(self, distance: torch.Tensor, envelope: torch.Tensor) -> torch.Tensor:
        """Return phi, (n_edges, n_radial), from r and f(r), (n_edges,)."""
        decayed = torch.exp(-self.decay * distance)[:, None]
        return envelope[:, None] * torch.exp(-self.betas * (decayed - self.means).square())
